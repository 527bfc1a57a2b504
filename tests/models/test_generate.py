"""Streaming says what generation says, in pieces that are final; sampling keeps to its nucleus."""

import pytest
import torch

from mmfast import spec
from mmfast.models import build
from mmfast.models.generate import nucleus, text_pieces
from mmfast.models.tokenizer import plain_text, word_tokenizer

SYSTEM = spec.System(
    "test",
    encoder=spec.Clip(weights=None, width=32, depth=3, heads=2, ffn=48, patch=8, size=16),
    language=spec.LanguageModel(weights=None, vocab=50, width=24, depth=2, heads=2, kv_heads=2, ffn=40, init=0.5),
    image=spec.Fixed(size=16),
)


def byte_tokenizer():
    """A token a byte: any character beyond ASCII takes several."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def model(seed=0):
    torch.manual_seed(seed)
    return build(SYSTEM).eval()


def inputs():
    return {"input_ids": torch.tensor([[1, 49, 49, 49, 49, 5], [1, 49, 49, 49, 49, 8]]), "pixel_values": torch.randn(2, 3, 16, 16)}


def test_a_prompt_padded_on_the_right_is_told():
    """Its answer would stand behind padding; a mask without holes at the end is none of its business."""
    ours, x = model(), inputs()
    mask = torch.ones_like(x["input_ids"])
    assert torch.equal(ours.generate(**x, attention_mask=mask, max_new_tokens=3), ours.generate(**x, max_new_tokens=3))
    mask[1, -1] = 0
    with pytest.raises(ValueError, match=r"attention_mask: a prompt is padded on its right, .* pad on the left"):
        ours.generate(**x, attention_mask=mask, max_new_tokens=3)


def test_steps_are_the_columns_of_generate():
    ours, x = model(), inputs()
    whole = ours.generate(**x, max_new_tokens=9)
    assert torch.equal(torch.stack(list(ours.steps(**x, max_new_tokens=9)), 1), whole)
    assert ours.generate(**x, max_new_tokens=0).shape == (2, 0)
    draw = dict(temperature=1.0, max_new_tokens=9)
    a, b = (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(torch.stack(list(ours.steps(**x, **draw, generator=a)), 1), ours.generate(**x, **draw, generator=b))
    assert not any(t.requires_grad for t in ours.steps(**x, max_new_tokens=2))


def test_a_stream_can_be_left():
    """Nothing is computed that nobody asks for, and grad mode is the caller's in between."""
    ours, x = model(), inputs()
    stream = ours.steps(**x, max_new_tokens=1_000_000)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()


@pytest.mark.parametrize(
    "text", ["plain words, and more.", "é", "naïve café — 東京 👩‍👩‍👧 done", "ends with space ", "\ufffd in it\ufffd", "a\n\n b", ""]
)
def test_pieces_are_final_and_complete(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    said = [row[0] for row in text_pieces(tokenizer, (torch.tensor([i]) for i in ids))]
    assert "".join(said) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in said)
    assert sum(map(bool, said)) >= min(3, len(text.split()))  # in pieces, not at the end


@pytest.mark.parametrize(
    ("text", "said"),
    [("a # b\n## c\n### Human: d", "a # b\n## c"), ("a\n", "a\n"), ("\n#", "\n#"), ("\n### ", ""), ("a\n\n###", "a\n"), ("é\n###", "é")],
)
def test_a_text_that_ends_an_answer(text, said):
    """It and what follows are left out, what only begins like it is not, and nothing is asked for behind it."""
    tokenizer, asked = byte_tokenizer(), []

    def tokens():
        for token in tokenizer(text)["input_ids"]:
            asked.append(token)
            yield torch.tensor([token])

    pieces = [row[0] for row in text_pieces(tokenizer, tokens(), "\n###")]
    assert "".join(pieces) == said
    assert tokenizer.decode(asked) == (text[: text.index("\n###") + 4] if "\n###" in text else text)
    rows = text_pieces(
        tokenizer, [torch.tensor(pair) for pair in zip(*(tokenizer(t)["input_ids"] for t in ("ab\n###", "\n###cd")), strict=True)], "\n###"
    )
    assert ["".join(row) for row in zip(*rows, strict=True)] == ["ab", ""]


def test_a_token_that_is_no_character_comes_out_at_the_end():
    tokenizer = byte_tokenizer()
    half = tokenizer("é")["input_ids"][:1]
    said = [row[0] for row in text_pieces(tokenizer, (torch.tensor([i]) for i in [*tokenizer("ab")["input_ids"], *half]))]
    assert said == ["a", "b", "", "\ufffd"]


def test_rows_of_their_own_length():
    words = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "red", "circle", ",", ".", "there")
    tokenizer = word_tokenizer(words)
    rows = torch.tensor([[5, 6, 7, 9, 2], [10, 8, 5, 2, 2]])
    said = list(text_pieces(tokenizer, rows.T))
    assert (
        ["".join(p) for p in zip(*said, strict=True)] == [plain_text(tokenizer, r) for r in rows.tolist()] == ["a red circle.", "there, a"]
    )
    assert said[:2] == [["a", "there"], [" red", ","]]
    assert list(text_pieces(tokenizer, [])) == []


def test_nucleus():
    p = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.05, 0.9, 0.03, 0.02]])
    assert nucleus(p, 1.0) is p
    assert nucleus(p, 0.5).tolist() == torch.tensor([[0.5, 0, 0, 0], [0, 0.9, 0, 0]]).tolist()
    assert (nucleus(p, 0.6) > 0).tolist() == [[True, False, True, False], [False, True, False, False]]
    assert (nucleus(p, 1e-9) > 0).sum(-1).tolist() == [1, 1]


def test_sampling_keeps_to_the_nucleus():
    """A nucleus of one token is greedy, whatever the temperature; a wide one is not."""
    ours, x = model(), inputs()
    greedy = ours.generate(**x, max_new_tokens=12)
    g = torch.Generator().manual_seed(0)
    assert torch.equal(ours.generate(**x, max_new_tokens=12, temperature=2.0, top_p=1e-6, generator=g), greedy)
    assert not torch.equal(ours.generate(**x, max_new_tokens=12, temperature=2.0, generator=g), greedy)
    with pytest.raises(ValueError, match=r"temperature >= 0 and 0 < top_p <= 1, got 1.0 and 0"):
        ours.generate(**x, temperature=1.0, top_p=0)
