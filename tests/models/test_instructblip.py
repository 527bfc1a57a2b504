"""A Q-Former that reads the question: parity with transformers' InstructBLIP on tiny random checkpoints, both ways."""

import pytest
import torch
from blip import IMAGE, WORDS, drawn, saved, shapes, sizes
from made import lively
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

from mmfast import spec
from mmfast.models import from_pretrained

PAD = 0


def stock(*, seed=0, queries=4, language="llama", **choices):
    parts = sizes(pad=PAD, language=language, **choices)
    return drawn(InstructBlipForConditionalGeneration, InstructBlipConfig(**parts, num_query_tokens=queries, image_token_index=IMAGE), seed)


def batch(queries=4, size=28, seed=0, pad="right"):
    """Three rows of unlike length, as the stock processor lays them out: pictures first, questions for the Q-Former in its own words."""
    g = torch.Generator().manual_seed(seed)

    def rows(lengths, low, high, before=()):
        made = [[*before, *torch.randint(low, high, (n,), generator=g).tolist()] for n in lengths]
        fill = [[PAD] * (max(map(len, made)) - len(row)) for row in made]
        ids = torch.tensor([row + f if pad == "right" else f + row for row, f in zip(made, fill, strict=True)])
        return ids, (ids != PAD).long()

    ids, mask = rows((6, 3, 5), 3, 55, (*[IMAGE] * queries, 2))
    asked, asked_mask = rows((2, 5, 4), 1, WORDS)
    return {
        "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, size, size, generator=g), "qformer_input_ids": asked,
        "qformer_attention_mask": asked_mask, "labels": ids.masked_fill((ids == IMAGE) | (ids == PAD), -100),
    }  # fmt: skip


CASES = [{}, {"seed": 7}, {"size": 42, "queries": 3, "seed": 3}, {"tower": 36}, {"language": "opt"}]
NAMES = ["llama", "seed", "size", "tower", "opt"]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("pad", ["right", "left"])
def test_logits_and_loss_equal_the_stock_class_both_ways(case, pad, tmp_path):
    theirs = lively(stock(**case))
    ours, inputs = from_pretrained(saved(theirs, tmp_path / "a")), batch(**shapes(case), pad=pad, seed=case.get("seed", 0))
    assert ours.system.connector.instructed
    assert not ours.system.connector.text
    ours.save_pretrained(tmp_path / "b")
    back = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "b").eval()
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want, got, again = (model(**inputs) for model in (theirs, ours, back))
    assert want.logits[real].std() > 0.2, "a checkpoint that says nothing proves nothing"
    for other in (got, again):
        torch.testing.assert_close(other.logits[real], want.logits[real], atol=1e-5, rtol=0)
        torch.testing.assert_close(other.loss, want.loss, atol=1e-5, rtol=0)
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_equal_the_stock_class(case, beams, tmp_path):
    theirs = stock(**case)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(**shapes(case), pad="left", seed=3)
    inputs.pop("labels")
    want = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=2, num_beams=beams)
    got = ours.generate(**inputs, end=2, max_new_tokens=12, beams=beams)
    assert got.tolist() == want[:, -got.shape[1] :].tolist()
    assert len(set(got.flatten().tolist())) > 3 - (beams > 1)


def test_the_question_moves_the_logits_and_its_padding_does_not(tmp_path):
    ours, inputs = from_pretrained(saved(stock(), tmp_path)), batch()
    real, asked = inputs["attention_mask"].bool(), inputs["qformer_input_ids"]
    with torch.no_grad():
        want = ours(**inputs).logits[real]
        padded = asked.where(inputs["qformer_attention_mask"].bool(), 5)
        torch.testing.assert_close(ours(**{**inputs, "qformer_input_ids": padded}).logits[real], want, atol=1e-5, rtol=0)
        assert (ours(**{**inputs, "qformer_input_ids": asked % 7 + 1}).logits[real] - want).abs().max() > 1e-2
        for name in (
            "qformer.embeddings.word_embeddings.weight", "qformer.embeddings.position_embeddings.weight", "qformer.embeddings.layernorm.bias",
            "qformer.encoder.layer.0.output.dense.bias", "qformer.encoder.layer.2.attention.attention.key.weight", "query_tokens",
        ):  # fmt: skip
            other = from_pretrained(tmp_path)
            p = other.connector.get_parameter(name)
            p.add_(0.1 * torch.randn_like(p))
            assert (other(**inputs).logits[real] - want).abs().max() > 1e-4, name


def test_rows_may_show_a_picture_twice_with_a_question_each(tmp_path):
    ours, inputs = from_pretrained(saved(stock(), tmp_path)), batch()
    real, rows = inputs["attention_mask"].bool(), torch.tensor([1, 0, 1])
    pixels = inputs.pop("pixel_values")[:2]
    with torch.no_grad():
        states = ours.encode(pixels)
        want = ours(**inputs, image_states=states[rows]).logits[real]
        got = ours(**inputs, image_states=states, image_rows=rows).logits[real]
        other = ours(**inputs, image_states=states, image_rows=1 - rows).logits[real]
    assert torch.equal(got, want)
    assert (other - want).abs().max() > 1e-2


def test_a_question_is_asked_for_and_not_taken_in_vain(tmp_path):
    from mmfast.models import build

    ours, inputs = from_pretrained(saved(stock(), tmp_path)), batch()
    with pytest.raises(ValueError, match=r"reads a question beside each picture, and none came: give qformer_input_ids"):
        ours(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    blind = build(
        spec.System(
            "plain",
            encoder=spec.Clip(weights=None, width=32, depth=2, heads=2, ffn=32, size=28),
            language=spec.LanguageModel(weights=None, vocab=60, width=16, depth=1, heads=2, kv_heads=2, ffn=32),
            image=spec.Fixed(size=28),
        )
    )
    with pytest.raises(ValueError, match="qformer_input_ids are read by a connector QFormer with instructed"):
        blind(**inputs)


def test_what_learns_of_a_q_former_that_reads_questions():
    """All of InstructBLIP's connector (its paper counts 188 million) but what the last layer makes of the text, which nobody reads."""
    from mmfast.models.build import queries

    with torch.device("meta"):
        connector = queries(spec.QFormer(text=False, instructed=True), 1408, 4096)
    whole, unread = sum(p.numel() for p in connector.parameters()), list(connector.unread(compared=False))
    assert whole == 188_837_376
    assert sum(p.numel() for p in unread) == 4_723_968 == 2 * 768 * 3072 + 3072 + 768 + 2 * 768
    small = queries(spec.QFormer(tokens=2, width=16, depth=3, heads=2, ffn=32, instructed=True, vocab=9, shared=4), 8, 6)
    small(torch.randn(2, 3, 8), torch.tensor([[1, 2], [3, 4]]), torch.ones(2, 2)).sum().backward()
    left = {id(p) for p in small.unread(compared=False)}
    for name, p in small.named_parameters():
        assert (p.grad is None or not p.grad.any()) == (id(p) in left), name
