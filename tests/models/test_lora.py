"""Adapters: where they go, that nothing else learns, that off means off and folded in means the same."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmfast import spec
from mmfast.models import adapters_off, add_lora, build, from_pretrained, load_lora, lora_parameters, merge_lora, save_lora

SYSTEM = spec.System(
    "test",
    encoder=spec.Clip(weights=None, width=32, depth=3, heads=2, ffn=48, patch=8, size=16),
    language=spec.LanguageModel(weights=None, vocab=50, width=24, depth=2, heads=2, kv_heads=1, ffn=40, init=0.3),
    image=spec.Fixed(size=16),
)
LORA = spec.Lora(rank=3, alpha=6, dropout=0.0)


def inputs():
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, *[49] * 4, 5, 6, 7], [1, *[49] * 4, 8, 9, 3]])
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=g), "labels": ids.masked_fill(ids == 49, -100)}


def adapted(choice=LORA, system=SYSTEM, seed=0):
    """A model whose adapters do something: B is 0 at first."""
    torch.manual_seed(seed)
    model = build(system)
    paths = add_lora(model, choice)
    with torch.no_grad():
        for p in lora_parameters(model):
            p.normal_(std=0.3)
    return model, paths


def logits(model):
    x = inputs()
    with torch.no_grad():
        return model(x["input_ids"], pixel_values=x["pixel_values"]).logits


@pytest.mark.parametrize(
    ("targets", "part", "expected"),
    [
        (("q_proj",), "language", {"language.model.layers.0.self_attn.q_proj", "language.model.layers.1.self_attn.q_proj"}),
        (("mlp.up_proj", "1.self_attn.o_proj"), "language",
         {"language.model.layers.0.mlp.up_proj", "language.model.layers.1.mlp.up_proj", "language.model.layers.1.self_attn.o_proj"}),
        # The third block lies behind hidden state -2.
        (("q_proj",), "encoder", {"encoder.vision.encoder.layers.0.self_attn.q_proj", "encoder.vision.encoder.layers.1.self_attn.q_proj"}),
        (("layers.0.mlp.fc1",), "encoder", {"encoder.vision.encoder.layers.0.mlp.fc1"}),
    ],
)  # fmt: skip
def test_targets_are_ends_of_paths(targets, part, expected):
    model, paths = adapted(replace(LORA, targets=targets, part=part))
    assert set(paths) == expected
    assert len(paths) == len(expected)
    with_adapters = {re.sub(r"\.lora_[AB]\.default\.weight$", "", n) for n, _ in model.named_parameters() if ".lora_" in n}
    assert with_adapters == expected


def test_the_default_is_every_affine_map_but_the_head():
    model, paths = adapted()
    affine = {f"language.{n}" for n, m in build(SYSTEM).language.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert set(paths) == affine
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        (("proj",), r"no module of the language part ends with 'proj'.*its affine maps end with down_proj, gate_proj, k_proj"),
        (("q_porj",), r"ends with 'q_porj' \(did you mean 'q_proj'\?\)"),
        (("fc1",), r"no module of the language part ends with 'fc1'"),  # the tower has one
        (("self_attn",), r"model.layers.0.self_attn is a \w+; adapters go beside affine maps"),
        (("lm_head",), r"lm_head is a Linear; adapters go beside affine maps, and not on the head"),
        (("embed_tokens",), r"embed_tokens is a Embedding; adapters go beside affine maps"),
    ],
)
def test_targets_that_fit_nothing(targets, sentence):
    model = build(SYSTEM)
    with pytest.raises(ValueError, match=sentence):
        add_lora(model, replace(LORA, targets=targets))
    assert not lora_parameters(model)


def test_twice_is_refused():
    model, _ = adapted()
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, LORA)


def test_fresh_adapters_change_nothing():
    torch.manual_seed(0)
    model = build(SYSTEM)
    before = logits(model)
    add_lora(model, LORA)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("parts", [(), ("connector",), ("connector", "embeddings")])
@pytest.mark.parametrize("part", ["language", "encoder"])
def test_exactly_the_declared_parts_and_adapters_learn(parts, part):
    model, _ = adapted(replace(LORA, part=part, targets=("q_proj", "v_proj")))
    learn = model.train_only(parts, lora=True)
    model.train()
    model(**inputs()).loss.backward()
    starts = tuple({"connector": "connector.", "embeddings": "language.model.embed_tokens."}[p] for p in parts)
    for name, p in model.named_parameters():
        expected = ".lora_" in name or (bool(starts) and name.startswith(starts))
        assert (p.grad is not None and p.grad.abs().sum() > 0) == expected, name
        assert (name in model.trained) == expected
    assert len(learn) == len(model.trained)
    assert model.encoder_learns == (part == "encoder")
    # Without lora the same parts learn and the adapters are as frozen as the rest.
    model.train_only(parts)
    assert not any(".lora_" in name for name in model.trained)
    assert not model.encoder_learns


def test_dropout_is_active_in_adapters_that_learn_alone():
    model, _ = adapted(replace(LORA, dropout=0.5))
    model.train_only(("connector",), lora=True)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))
    model.train_only(("connector", "language"))  # the part learns, its adapters do not
    model.train()
    assert torch.equal(logits(model), logits(model))


def test_training_adapters_that_are_not_there():
    with pytest.raises(ValueError, match=r"adapters are to train, and none were added"):
        build(SYSTEM).train_only((), lora=True)


def test_off_is_the_base_exactly():
    torch.manual_seed(0)
    base = logits(build(SYSTEM))
    model, _ = adapted()
    model.train_only(("connector",), lora=True)
    on, names = logits(model), model.trained
    assert (on - base).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), on)
    assert model.trained == names
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), on)
    # Adapters that are frozen stay frozen.
    model.train_only(("connector",))
    with adapters_off(model):
        pass
    assert not any(p.requires_grad for p in lora_parameters(model))
    model.train_only(("connector",), lora=True)
    # Between a forward and its backward.
    loss = model(**inputs()).loss
    with adapters_off(model):
        logits(model)
    loss.backward()
    assert all(p.grad is not None for p in lora_parameters(model))


@pytest.mark.parametrize("part", ["language", "encoder"])
def test_folded_in_it_says_the_same(part):
    model, _ = adapted(replace(LORA, part=part, targets=("q_proj", "k_proj", "v_proj")))
    want, keys = logits(model), list(build(SYSTEM).state_dict())
    merge_lora(model)
    assert list(model.state_dict()) == keys
    assert not lora_parameters(model)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=0)
    merge_lora(model)
    torch.testing.assert_close(logits(model), want, atol=1e-5, rtol=0)


def test_gpt2_has_its_own_affine_map(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64)
    ).save_pretrained(tmp_path)
    system = replace(SYSTEM, language=spec.LanguageModel(weights=str(tmp_path)))
    model, paths = adapted(replace(LORA, targets=("c_attn", "mlp.c_proj")), system)
    assert len(paths) == 4
    want = logits(model)
    torch.testing.assert_close(logits(merge_lora(model)), want, atol=1e-5, rtol=0)


def test_saved_adapters_are_read_back(tmp_path):
    model, _ = adapted()
    save_lora(model, tmp_path / "adapters.safetensors")
    other, _ = adapted(seed=0)
    with torch.no_grad():
        for p in lora_parameters(other):
            p.zero_()
    assert not torch.equal(logits(other), logits(model))
    load_lora(other, tmp_path / "adapters.safetensors")
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(ValueError, match="is in one of them only"):
        load_lora(adapted(replace(LORA, targets=("q_proj",)))[0], tmp_path / "adapters.safetensors")
    with pytest.raises(ValueError, match="is the rank the same"):
        load_lora(adapted(replace(LORA, rank=2))[0], tmp_path / "adapters.safetensors")


def test_state_keys():
    """What a checkpoint holds: the base under base_layer, adapters by name, other modules as ever."""
    model, paths = adapted(replace(LORA, targets=("q_proj",)))
    plain, keys = set(build(SYSTEM).state_dict()), set(model.state_dict())
    assert keys - plain == {f"{p}.{n}.weight" for p in paths for n in ("base_layer", "lora_A.default", "lora_B.default")}
    assert plain - keys == {f"{p}.weight" for p in paths}
    again, _ = adapted(replace(LORA, targets=("q_proj",)), seed=5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_written_folded_and_kept(tmp_path):
    """save_pretrained folds adapters in and leaves the model as it was."""
    model, _ = adapted()
    want, keys = logits(model), list(model.state_dict())
    model.save_pretrained(tmp_path)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), want)
    torch.testing.assert_close(logits(from_pretrained(tmp_path)), want, atol=1e-5, rtol=0)
