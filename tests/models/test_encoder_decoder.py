"""T5 as the language model: BLIP-2 and InstructBLIP of transformers on tiny random checkpoints, both ways; rows that are cut in two."""

from dataclasses import replace

import pytest
import torch
from blip import IMAGE, WORDS, drawn, saved, shapes, sizes
from torch.nn.functional import cross_entropy
from transformers import Blip2Config, Blip2ForConditionalGeneration, InstructBlipConfig, InstructBlipForConditionalGeneration

from mmfast import spec
from mmfast.models import build, from_pretrained, load_lavis, save_lavis
from mmfast.models.encoder_decoder import cuts
from mmfast.models.generate import option_logps
from mmfast.models.pretrained import resize_embeddings

PAD, END = 0, 2
KINDS = {
    "blip2": (Blip2ForConditionalGeneration, Blip2Config),
    "instructblip": (InstructBlipForConditionalGeneration, InstructBlipConfig),
}


def stock(kind, *, seed=0, queries=4, language="flan", **choices):
    made, config = KINDS[kind]
    parts = sizes(pad=PAD, language=language, **choices)
    return drawn(made, config(**parts, num_query_tokens=queries, image_token_index=IMAGE), seed)


def filled(lengths, low, high, g, pad="right", before=(), fill=PAD):
    made = [[*before, *torch.randint(low, high, (n,), generator=g).tolist()] for n in lengths]
    short = [[fill] * (max(map(len, made)) - len(row)) for row in made]
    return torch.tensor([row + f if pad == "right" else f + row for row, f in zip(made, short, strict=True)])


def batch(kind, queries=4, size=28, seed=0, pad="right"):
    """Three rows of unlike length, as the stock processor lays them out: pictures and a prompt that is read, and labels of what is said."""
    g = torch.Generator().manual_seed(seed)
    ids = filled((6, 3, 5), 3, 55, g, pad, [IMAGE] * queries)
    asked = filled((2, 5, 4), 1, WORDS, g)
    more = {"qformer_input_ids": asked, "qformer_attention_mask": (asked != PAD).long()} if kind == "instructblip" else {}
    return {
        "input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": torch.randn(3, 3, size, size, generator=g),
        "labels": filled((4, 7, 2), 3, 55, g, fill=-100), **more,
    }  # fmt: skip


CASES = [{}, {"language": "t5"}, {"seed": 7}, {"size": 42, "queries": 3, "seed": 3}, {"tower": 36, "language": "t5", "seed": 5}]
named = pytest.mark.parametrize("case", CASES, ids=lambda k: "-".join(f"{a}={b}" for a, b in k.items()) or "flan")
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@named
@pytest.mark.parametrize("pad", ["right", "left"])
def test_logits_and_loss_equal_the_stock_class_both_ways(kind, case, pad, tmp_path):
    theirs = stock(kind, **case)
    ours, inputs = from_pretrained(saved(theirs, tmp_path / "a")), batch(kind, **shapes(case), pad=pad, seed=case.get("seed", 0))
    assert ours.system.language.encodes
    assert ours.system.language.tied == (case.get("language") == "t5")
    ours.save_pretrained(tmp_path / "b")
    back = KINDS[kind][0].from_pretrained(tmp_path / "b").eval()
    with torch.no_grad():
        want, got, again = (model(**inputs) for model in (theirs, ours, back))
        first = ours(**{**inputs, "labels": None}).logits
    assert want.logits.std() > 0.2, "a checkpoint that says nothing proves nothing"
    for other in (got, again):
        torch.testing.assert_close(other.logits, want.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.loss, want.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(first, want.logits[:, :1], atol=1e-5, rtol=0)
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@kinds
@named
@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": -1.0}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}],
    ids=["greedy", "beams", "short", "unrepeating"],
)
def test_tokens_equal_the_stock_class(kind, case, pad, options, tmp_path):
    theirs = stock(kind, **case)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(kind, **shapes(case), pad=pad, seed=3)
    inputs.pop("labels")
    want = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=END, eos_token_id=END, **options)[:, 1:]
    names = {"num_beams": "beams", "no_repeat_ngram_size": "no_repeat"}
    got = ours.generate(**inputs, end=END, max_new_tokens=12, **{names.get(name, name): value for name, value in options.items()})
    assert got.tolist() == want[:, : got.shape[1]].tolist()
    assert (want[:, got.shape[1] :] == END).all()


@kinds
def test_what_is_said_varies(kind, tmp_path):
    """The tokens above are not those of a model that says one thing whatever it sees."""
    ours, inputs = from_pretrained(saved(stock(kind), tmp_path)), batch(kind, seed=3)
    inputs.pop("labels")
    said = ours.generate(**inputs, end=END, max_new_tokens=12)
    assert len(set(said.flatten().tolist())) > 5
    other = ours.generate(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}, end=END, max_new_tokens=12)
    assert said.tolist() != other.tolist()
