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


def test_the_norm_behind_the_tower():
    """Of every state, as CLIP norms its class token alone (FROMAGe's pooled state); with ``unit`` of length 1 (Kosmos-2)."""
    last = replace(SYSTEM.encoder, layer=-1, keep_class_token=True)
    model, pixels = build(replace(SYSTEM, encoder=replace(last, post_norm=True))), inputs()["pixel_values"]
    tower, norm = model.encoder.vision, model.encoder.vision.post_layernorm
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    whole, states = tower.eval()(pixels), model.encode(pixels)
    torch.testing.assert_close(states[:, 0], whole.pooler_output)
    torch.testing.assert_close(states, norm(whole.last_hidden_state))
    model.encoder.unit = True
    torch.testing.assert_close(model.encode(pixels), states / states.norm(dim=-1, keepdim=True))
    learns = {id(p) for p in model.train_only(("encoder",))}
    assert {id(p) for p in norm.parameters()} <= learns, "read, so it trains with the tower"
    bare = build(replace(SYSTEM, encoder=last))
    assert not {id(p) for p in bare.encoder.vision.post_layernorm.parameters()} & {id(p) for p in bare.train_only(("encoder",))}


@pytest.mark.parametrize("name", ["quick_gelu", "gelu"])
def test_the_activation_of_a_tower_without_weights(name):
    assert build(replace(SYSTEM, encoder=replace(SYSTEM.encoder, activation=name))).encoder.vision.config.hidden_act == name


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


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_rows_of_new_tokens_learn(tied):
    """Whatever the loss, the old rows of embeddings and head get no gradient; with the whole table in training they do."""
    system = replace(SYSTEM, fusion=spec.GatedCrossAttention(), language=replace(SYSTEM.language, tied=tied))
    assert system.added_tokens == ("<|endofchunk|>",)
    model = build(replace(SYSTEM, language=system.language))
    model.system, model.new_tokens = system, (48,)
    ids = torch.tensor([[1, 5, 48, 6, 48, 7]])
    for parts, new in ((("new_tokens",), True), (("embeddings",), False), (("new_tokens",), True)):
        model.zero_grad(set_to_none=True)
        trained = {n for n, p in model.named_parameters() if p.requires_grad} if model.train_only(parts) else set()
        model(ids, labels=ids).loss.backward()
        table = model.language.get_input_embeddings().weight
        others = torch.arange(50) != 48
        assert table.grad[48].any()
        assert bool(table.grad[others].any()) != new
        if new and not tied:
            head = model.language.get_output_embeddings().weight
            assert head.grad[48].any()
            assert not head.grad[others].any()
        assert all("embed_tokens" in name or "lm_head" in name for name in trained)
    assert [p.shape[0] for p in model.partly_trained()] == [50] * (1 if tied else 2)
    model.train_only(("connector",))
    assert model.partly_trained() == []


def test_new_tokens_without_added_tokens_are_refused():
    with pytest.raises(ValueError, match="new_tokens are to train, and its choices add no token"):
        build(SYSTEM).train_only(("new_tokens",))


def test_tokens_that_choices_add_have_ids_of_their_own():
    from mmfast.data.synthetic import World
    from mmfast.models.tokenizer import word_tokenizer

    system = replace(SYSTEM, encoder=spec.Vqgan(codes=14), fusion=spec.SharedTokens(), regions=spec.BoxTokens(bins=2))
    added = system.added_tokens
    assert added[:3] == ("<racm3:break>", "<eoss>", "IMGIMGAZ")
    assert added[2 + 12] == "IMGIMGBCZ"
    assert added[16:] == (
        "<phrase>", "</phrase>", "<object>", "</object>", "</delimiter_of_multi_objects/>", "<grounding>", "<patch_index_0000>",
        "<patch_index_0001>", "<patch_index_0002>", "<patch_index_0003>",
    )  # fmt: skip
    words = World().vocabulary
    tokenizer = word_tokenizer(words, added)
    assert tokenizer.convert_tokens_to_ids(list(added)) == list(range(len(words), len(words) + len(added)))
    text = "a<phrase> red circle</phrase><object><patch_index_0003></object>IMGIMGBDZ"
    assert tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]) == [
        "a", "<phrase>", "red", "circle", "</phrase>", "<object>", "<patch_index_0003>", "</object>", "IMGIMGBDZ",
    ]  # fmt: skip
