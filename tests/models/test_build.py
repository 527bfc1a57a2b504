"""What `build` makes of a system: sizes, trainable parts, and the same answer whichever form images come in."""

from dataclasses import replace

import pytest
import torch

from mmfast import spec
from mmfast.models import build, tiny

SYSTEM = spec.System(
    "test",
    encoder=spec.Clip(weights=None, width=32, depth=3, heads=2, ffn=48, patch=8, size=16),
    language=spec.LanguageModel(weights=None, vocab=50, width=24, depth=2, heads=2, kv_heads=2, ffn=40),
    image=spec.Fixed(size=16),
)
IMAGE = 49


def inputs():
    ids = torch.tensor([[1, *[IMAGE] * 4, 5, 6, 7], [1, *[IMAGE] * 4, 8, 9, 3]])
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16), "labels": ids.masked_fill(ids == IMAGE, -100)}


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        (("connector",), ("connector.",)),
        (("connector", "language"), ("connector.", "language.")),
        (("encoder", "connector", "embeddings"), ("encoder.", "connector.", "language.model.embed_tokens.")),
        (("embeddings",), ("language.model.embed_tokens.",)),
        ((), ()),
    ],
)
def test_gradients_reach_exactly_what_a_stage_trains(parts, prefixes):
    model = build(SYSTEM)
    trained = {id(p) for p in model.train_only(parts)}
    if parts:
        model(**inputs()).loss.backward()
    unread = ("encoder.vision.encoder.layers.2.", "encoder.vision.post_layernorm.")  # behind hidden state -2
    for name, parameter in model.named_parameters():
        expected = name.startswith(prefixes) and not name.startswith(unread) if prefixes else False
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == expected, name
        assert (id(parameter) in trained) == expected, name


def test_frozen_parts_stay_in_evaluation_mode():
    model = build(SYSTEM)
    model.train_only(("connector",))
    model.train()
    assert model.connector.training
    assert not model.encoder.training
    assert not model.language.training
    assert not model.eval().connector.training


def test_images_in_any_form():
    model, x = build(SYSTEM).eval(), inputs()
    want = model(**x).logits
    states = model.encode(x["pixel_values"])
    assert torch.equal(model(x["input_ids"], image_states=states).logits, want)
    assert torch.equal(model(x["input_ids"], image_embeds=model.connector(states)).logits, want)
    one = model(x["input_ids"], pixel_values=x["pixel_values"][:1], image_rows=torch.tensor([0, 0])).logits
    both = model(x["input_ids"], pixel_values=x["pixel_values"][:1].repeat(2, 1, 1, 1)).logits
    torch.testing.assert_close(one, both, atol=1e-6, rtol=0)


def test_connectors():
    for connector, keys in [
        (spec.Linear(), ["0.weight", "0.bias"]),
        (spec.Mlp(3), [f"{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")]),
    ]:
        assert list(build(replace(SYSTEM, connector=connector)).connector.state_dict()) == keys


def test_published_sizes():
    """Parameter counts of LLaVA v1 7B, on no memory: projector 4,198,400; tower 303,179,776; language model 6,738,415,616."""
    from mmfast.trainers.recipes.architectures.llava import RECIPE

    random = replace(RECIPE, encoder=replace(RECIPE.encoder, weights=None), language=replace(RECIPE.language, weights=None))
    with torch.device("meta"):
        model = build(random)
    count = {name: sum(p.numel() for p in model.part(name).parameters()) for name in ("connector", "encoder", "language")}
    assert count == {"connector": 4_198_400, "encoder": 303_179_776, "language": 6_738_415_616}
    assert RECIPE.encoder.tokens == 256
    assert sum(p.numel() for p in model.train_only(RECIPE.stages[0].train)) == 4_198_400


def test_tiny_keeps_every_structural_choice():
    from mmfast.trainers.recipes.architectures.llava import RECIPE

    small = tiny(RECIPE)
    assert small.connector == RECIPE.connector
    assert small.fusion == RECIPE.fusion
    assert (small.encoder.layer, small.encoder.keep_class_token) == (RECIPE.encoder.layer, RECIPE.encoder.keep_class_token)
    assert [s.train for s in small.stages[1:]] == [s.train for s in RECIPE.stages]
    assert small.encoder.weights is None
    assert small.language.weights is None


def test_what_cannot_be_built_says_so():
    with pytest.raises(ValueError, match=r"image.size: 32 and encoder.size 16 must agree"):
        build(replace(SYSTEM, image=spec.Fixed(size=32)))
    with pytest.raises(ValueError, match=r"nothing builds a Prefix, expected one of Linear, Mlp"):
        build(replace(SYSTEM, connector=spec.Prefix()))
    with pytest.raises(ValueError, match=r"unknown part 'langauge' \(did you mean 'language'\?\)"):
        build(SYSTEM).train_only(("langauge",))
