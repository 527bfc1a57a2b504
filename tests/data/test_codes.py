"""Codes of pictures as words of Chameleon's vocabulary, against the names it publishes and transformers' own mapping."""

import pytest
import torch

from mmfast.data.codes import ImageVocabulary, code_number
from mmfast.spec import SharedTokens


def vocabulary(codes=13, shuffle=True):
    order = torch.randperm(codes, generator=torch.Generator().manual_seed(1)).tolist() if shuffle else range(codes)
    words = {"<s>": 1, "</s>": 2, "<pad>": 3, "<racm3:break>": 5, "<eoss>": 60, "<image>": 4, "IMGIMG": 61, "red": 62}
    return {**words, **{SharedTokens.code(k): 10 + at for k, at in enumerate(order)}}


def test_names():
    """The two that the specification writes out, the last of 8192, and all of them there and back."""
    assert [SharedTokens.code(k) for k in (0, 12, 8191)] == ["IMGIMGAZ", "IMGIMGBCZ", "IMGIMGIBJBZ"]
    assert all(code_number(SharedTokens.code(k)) == k for k in range(8192))
    assert [code_number(name) for name in ("IMGIMG", "IMGIMGZ", "IMGIMGKZ", "IMGIMGAZx", "<s>")] == [None] * 5


def test_same_mapping_as_transformers():
    from transformers.models.chameleon.modeling_chameleon import ChameleonImageVocabularyMapping

    words = vocabulary()
    del words["IMGIMG"]  # theirs takes whatever begins so
    theirs, ours = ChameleonImageVocabularyMapping(words), ImageVocabulary(words)
    codes = torch.randint(0, 13, (3, 7))
    assert torch.equal(ours.to_ids(codes), theirs.convert_img2bpe(codes).long())
    assert sorted(ours.ids.tolist()) == theirs.image_tokens
    assert {int(i): int(ours.to_codes(torch.tensor(i))) for i in theirs.image_tokens} == theirs.bpe2img


def test_there_and_back():
    words = ImageVocabulary(vocabulary())
    codes = torch.arange(13)
    assert torch.equal(words.to_codes(words.to_ids(codes)), codes)
    assert words.to_ids(codes.to(torch.uint8)).dtype == torch.int64  # stored codes are narrow
    assert len(words) == 13
    ids = torch.tensor([1, 5, 10, 22, 23, 60, 62, 70_000, -100])
    assert words.is_code(ids).tolist() == [False, False, True, True, False, False, False, False, False]


def test_a_picture_is_1026_ids():
    words = ImageVocabulary(vocabulary(8192) | {"<eoss>": 9000})
    span = words.wrap(torch.randint(0, 8192, (2, 1024)))
    assert span.shape == (2, 1026)
    assert span[:, 0].tolist() == [5, 5]
    assert span[:, -1].tolist() == [9000, 9000]


def test_pictures_are_found_in_a_text():
    words = ImageVocabulary(vocabulary())
    first, second = torch.tensor([3, 1, 2]), torch.tensor([0, 12])
    text = torch.tensor([1, 62, 62])
    row = torch.cat([text, words.wrap(first), text, words.wrap(second)[:-1], text, words.wrap(first)[:2]])
    found = words.pictures_in(row)  # whole; without its end, text goes on; cut off by the row's end
    assert [p.tolist() for p in found] == [[3, 1, 2], [0, 12], [3]]
    assert words.pictures_in(text) == []
    assert [p.tolist() for p in words.pictures_in(torch.tensor([5]))] == [[]]
    with pytest.raises(ValueError, match=r"one row \[T\]"):
        words.pictures_in(row[None])


def test_errors_name_what_is_wrong():
    words = ImageVocabulary(vocabulary())
    with pytest.raises(ValueError, match="id 62 is no code"):
        words.to_codes(torch.tensor([10, 62]))
    with pytest.raises(ValueError, match=r"codes 0 \.\. 12, got 2 \.\. 13"):
        words.to_ids(torch.tensor([2, 13]))
    gap = vocabulary()
    del gap[SharedTokens.code(4)]
    with pytest.raises(ValueError, match="12 words up to code 12"):
        ImageVocabulary(gap)
    with pytest.raises(ValueError, match="0 words for codes"):
        ImageVocabulary({"red": 1})
    with pytest.raises(ValueError, match="no <eoss>"):
        ImageVocabulary({k: v for k, v in vocabulary().items() if k != "<eoss>"})
