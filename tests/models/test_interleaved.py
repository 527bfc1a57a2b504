"""Texts and pictures in any order: for every kind of fusion the ids written out by hand, and the text that these give."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmfast.trainers.config import load_recipe
from PIL import Image

from mmfast.data import images
from mmfast.models import build, drawing, interleaved, tiny
from mmfast.models.interleaved import encode, write
from mmfast.models.tokenizer import plain_text, word_tokenizer

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a", "red", "circle", "blue", "and")
BOS, A, RED, CIRCLE, BLUE = 1, 5, 6, 7, 8
# The number of a picture's places, and whether tokens stand around it.
SYSTEMS = {
    "frozen": (2, False), "llava": (16, False), "kosmos_2": (16, True), "flamingo": (1, False), "fromage": (1, False), "blip2": (16, False),
    "llama_adapter": (1, False), "chameleon": (16, True),
}  # fmt: skip


def made(name):
    system = tiny(load_recipe(name))
    system = replace(system, language=replace(system.language, context=128, init=0.4))
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS, system.added_tokens)
    model = build(system, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gate" in parameter_name.split(".")[-1]:  # closed at the start
                parameter.fill_(0.5)
    return model, tokenizer


def words_alone(step, logits):
    """A rule of generation: one of the five words comes."""
    return logits.index_fill(1, torch.tensor([i for i in range(logits.shape[1]) if i not in range(A, len(WORDS))]), -torch.inf)


@pytest.fixture(scope="module", params=SYSTEMS)
def each(request):
    return request.param, *made(request.param)


def picture(seed):
    return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_ids_and_text_are_those_of_the_prompt_by_hand(each):
    name, model, tokenizer = each
    places, around = SYSTEMS[name]
    slot = [model.image_token] * places
    if around:
        begin, end = ("<image>", "</image>") if name == "kosmos_2" else ("<racm3:break>", "<eoss>")
        slot = [tokenizer.get_vocab()[begin], *slot, tokenizer.get_vocab()[end]]
    first, second = picture(1), picture(2)
    one = name == "llama_adapter"  # it sees one picture a sequence
    parts = ["a red", first, *([] if one else ["and", second]), "circle", "a"]
    hand = [BOS, A, RED, *slot, *([] if one else [9, *slot]), CIRCLE, A]
    shown = torch.stack([first] if one else [first, second])
    ids, given = encode(model, tokenizer, parts)
    assert ids.tolist() == [hand]
    assert torch.equal(given["pixel_values"], shown)
    options = dict(max_new_tokens=9, rule=words_alone)
    want = model.generate(torch.tensor([hand]), pixel_values=shown, **options)
    said = write(model, tokenizer, parts, **options)
    assert said == plain_text(tokenizer, want[0].tolist())
    assert len(said.split()) == 9
    with torch.no_grad():
        logits = model(torch.tensor([hand]), pixel_values=shown).logits[:, -1]
        turned = model(**dict(zip(("input_ids", "pixel_values"), (ids, given["pixel_values"].flip(-1)), strict=True))).logits[:, -1]
    assert not torch.equal(logits, turned), "the pictures must be seen"


def test_the_beginning_token_comes_once(each):
    """First; where a system has learnt pictures before it, before the first text."""
    name, model, tokenizer = each
    places, around = SYSTEMS[name]
    ids = encode(model, tokenizer, [picture(1), "a", "red"])[0][0].tolist()
    behind = places if name in ("fromage", "blip2") else 0
    assert ids.count(BOS) == 1
    assert ids[behind] == BOS
    assert ids[-2:] == [A, RED]
    assert len(ids) == places + 2 * around + 3
    alone, nothing = encode(model, tokenizer, ["a red"])
    assert (alone.tolist(), nothing) == ([[BOS, A, RED]], {})


def test_a_text_ends_at_its_end_and_options_are_those_of_generate():
    model, tokenizer = made("llava")
    parts = [picture(1), "a red circle"]
    ids, shown = encode(model, tokenizer, parts)
    new = model.generate(ids, **shown, max_new_tokens=12)[0].tolist()
    end = new[4]
    at = new.index(end)
    assert write(model, tokenizer, parts, end=end, max_new_tokens=12) == plain_text(tokenizer, new[:at])
    beams = model.generate(ids, **shown, beams=3, end=2, max_new_tokens=6)[0].tolist()
    assert write(model, tokenizer, parts, beams=3, end=2, max_new_tokens=6) == plain_text(tokenizer, beams)


def test_a_text_ends_by_default_as_the_last_stage_taught(monkeypatch):
    model, tokenizer = made("flamingo")
    ends = []
    monkeypatch.setattr(interleaved, "generate", lambda *_, end, **__: ends.append(end) or torch.tensor([[A]]))
    assert write(model, tokenizer, ["a"]) == "a"
    assert ends == [tokenizer.convert_tokens_to_ids("<|endofchunk|>")]


def taught(model, template):
    model.system = replace(model.system, stages=(replace(model.system.stages[-1], template=template),))


def test_a_text_ends_at_its_templates_text_where_no_token_ends_it(monkeypatch):
    model, tokenizer = made("llava")
    taught(model, "llava_v0")
    monkeypatch.setattr(interleaved, "plain_text", lambda *_: "red\n### Human: blue")
    assert write(model, tokenizer, ["a"], max_new_tokens=2) == "red"
    assert write(model, tokenizer, ["a"], max_new_tokens=2, end=2) == "red\n### Human: blue", "the end that is given, and nothing else"


def test_an_encoder_reads_the_end_that_it_has_learnt():
    model, tokenizer = made("blip2_flan_t5")
    taught(model, "blip2_t5")
    (ids,) = encode(model, tokenizer, ["a", "red"])[0].tolist()
    taught(model, "blip2_t5_prompt")
    assert encode(model, tokenizer, ["a", "red"])[0].tolist() == [[*ids, tokenizer.eos_token_id]]


def test_no_beginning_token_where_the_template_has_none():
    model, tokenizer = made("llava")
    taught(model, "mpt")
    assert encode(model, tokenizer, ["a", "red"])[0].tolist() == [[A, RED]]
    assert encode(model, tokenizer, ["a", "red"], begin_each=True)[0].tolist() == [[BOS, A, BOS, RED]]


def test_a_q_former_that_asks_reads_all_texts_beside_each_picture():
    system = tiny(load_recipe("blip2"))
    system = replace(system, connector=replace(system.connector, instructed=True), language=replace(system.language, context=128, init=0.4))
    tokenizer = word_tokenizer(WORDS, system.added_tokens)
    torch.manual_seed(0)
    model = build(system, tokenizer=tokenizer).eval()
    first, second = picture(1), picture(2)
    ids, given = encode(model, tokenizer, [first, "a red", second, "circle"])
    assert given["qformer_input_ids"].tolist() == [[BOS, A, RED, CIRCLE, 2]] * 2
    assert given["qformer_attention_mask"].tolist() == [[1] * 5] * 2
    assert set(encode(model, tokenizer, ["a red"])[1]) == set()
    slot = [model.image_token] * 16
    assert ids.tolist() == [[*slot, BOS, A, RED, *slot, CIRCLE]]
    said = model.generate(ids, max_new_tokens=5, rule=words_alone, **given)[0].tolist()
    assert write(model, tokenizer, [first, "a red", second, "circle"], max_new_tokens=5, rule=words_alone) == plain_text(tokenizer, said)


def test_a_picture_is_a_file_an_array_or_pixels(tmp_path):
    model, tokenizer = made("frozen")
    array = np.random.default_rng(0).integers(0, 255, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    plan = model.system.image
    loaded = images.load(tmp_path / "a.png", plan)
    pixels = (torch.from_numpy(loaded).permute(2, 0, 1) / 255 - torch.tensor(plan.mean).view(3, 1, 1)) / torch.tensor(plan.std).view(
        3, 1, 1
    )
    for part in (Path(tmp_path / "a.png"), loaded, torch.from_numpy(loaded), pixels):
        torch.testing.assert_close(encode(model, tokenizer, [part])[1]["pixel_values"][0], pixels)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([], "expected a list of at least one text or picture"),
        ("a red", "expected a list of at least one text or picture"),
        (["see <image>"], "the text 'see <image>' holds <image>; give the picture itself as a part"),
        ([torch.zeros(3, 32, 32)], r"a picture is torch.float32 \[3, 32, 32\], expected its Path, uint8 \[64, 64, 3\]"),
        ([Path("none.png")], "image none.png does not exist"),
        (["a " * 127], "write: the prompt takes 128 places of the model's 128, so nothing can follow"),
    ],
)
def test_what_cannot_be_written_is_told(parts, sentence):
    with pytest.raises(ValueError, match=sentence):
        write(*made("frozen"), parts)


def test_composing_is_writing_and_can_be_read_again():
    """Chameleon's texts and pictures, from the pieces that ``drawing.write`` gives for the prompt by hand."""
    model, tokenizer = made("chameleon")
    begin, end, *_ = model.new_tokens
    shown = picture(3).clamp(-1, 1)
    hand = torch.tensor([[BOS, RED, begin, *[model.image_token] * 16, end, BLUE]])
    options = dict(max_new_tokens=60, temperature=2.0, top_p=1.0)
    for seed in range(8):
        pieces = list(drawing.write(model, hand, end=2, generator=torch.Generator().manual_seed(seed), pixel_values=shown[None], **options))
        got = drawing.compose(
            model, tokenizer, ["red", shown, "blue"], generator=torch.Generator().manual_seed(seed), **options
        )  # fmt: skip
        want = [plain_text(tokenizer, said) if kind == "text" else drawing.pixels(model, torch.tensor([said]))[0] for kind, said in pieces]
        want = [part for part in want if not isinstance(part, str) or part]
        assert [type(part) for part in got] == [type(part) for part in want]
        assert all(a == b if isinstance(a, str) else torch.equal(a, b) for a, b in zip(got, want, strict=True))
        if any(kind == "picture" for kind, _ in pieces):
            ids, given = encode(model, tokenizer, ["red", *got])
            assert given["pixel_values"].shape[1:] == (3, 64, 64)
            assert (ids == begin).sum() == len(given["pixel_values"])
            break
    else:
        pytest.fail("no picture was drawn, so nothing was tried")
