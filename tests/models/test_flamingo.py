"""OpenFlamingo's published sizes and files."""

from dataclasses import replace

import pytest
import torch
from gated import IMAGE, SYSTEM, made, pictures, rows

from mmfast import spec
from mmfast.models import build, load_flamingo, save_flamingo
from mmfast.models.flamingo import flamingo_state, load_flamingo_state
from mmfast.nn import GatedCrossAttention

# OpenFlamingo's models: language model, every, parameters that learn (embeddings aside), and those of one block.
PUBLISHED = [
    (dict(family="mpt", width=2048, depth=24, heads=16, kv_heads=16), 1, 944_019_504, 36_708_354),
    (dict(family="gpt_neox", width=2560, depth=32, heads=32, kv_heads=32), 2, 960_763_936, 56_109_058),
    (dict(family="mpt", width=4096, depth=32, heads=32), 4, 1_178_834_960, 139_476_994),
]


@pytest.mark.parametrize(("language", "every", "total", "block"), PUBLISHED, ids=["3B", "4B", "9B"])
def test_published_sizes(language, every, total, block):
    system = spec.System(
        "open_flamingo",
        encoder=spec.Clip(weights=None),
        connector=spec.Resampler(),
        fusion=spec.GatedCrossAttention(every=every, offset=1),
        language=spec.LanguageModel(weights=None, vocab=50, **language),
    )
    with torch.device("meta"):
        model = build(system)
        learns = model.train_only(("connector", "adapter"))
    assert sum(p.numel() for p in learns) == total
    assert sum(p.numel() for p in model.connector.parameters()) == 63_019_008
    assert {sum(p.numel() for p in b.parameters()) for b in model.fusion.blocks} == {block}
    assert len(model.fusion.layers) == language["depth"] // every
    assert system.image_tokens == 64
    assert system.image_places == 1


LAYERS = {"mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers", "llama": "model.layers", "opt": "model.decoder.layers"}
TABLES = {
    "mpt": {"transformer.wte.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight", "embed_out.weight"},
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "opt": {"model.decoder.embed_tokens.weight"},
}


@pytest.mark.parametrize(("width", "count", "narrow", "wide"), [(2048, 24, 1.158, 1.21), (4096, 10, 1.804, 2.01), (8192, 12, 8.36, 9.66)])
def test_sizes_of_the_papers_blocks(width, count, narrow, wide):
    """Of 3B, 9B and 80B in billions. The paper's table says 1.2, 1.6 and 10, its text 1.4, 1.8 and 10; the latents' width is not told with them."""
    for latents, told in ((1536, narrow), (width, wide)):
        with torch.device("meta"):
            block = GatedCrossAttention(dim=width, dim_visual=latents, dim_head=128, heads=width // 128)
        assert count * sum(p.numel() for p in block.parameters()) / 1e9 == pytest.approx(told, abs=0.005)


@pytest.mark.parametrize("family", LAYERS)
def test_published_names(family):
    names = {"perceiver.latents", "perceiver.norm.weight", "perceiver.norm.bias"}
    for i in range(2):
        names |= {f"perceiver.layers.{i}.0.{n}.{w}" for n in ("norm_media", "norm_latents") for w in ("weight", "bias")}
        names |= {f"perceiver.layers.{i}.0.{n}.weight" for n in ("to_q", "to_kv", "to_out")}
        names |= {f"perceiver.layers.{i}.1.{n}" for n in ("0.weight", "0.bias", "1.weight", "3.weight")}
    for i in (1, 3):
        block = f"lang_encoder.{LAYERS[family]}.{i}.gated_cross_attn_layer"
        names |= {f"{block}.attn.{n}" for n in ("norm.weight", "norm.bias", "to_q.weight", "to_kv.weight", "to_out.weight")}
        names |= {f"{block}.{n}" for n in ("attn_gate", "ff_gate", "ff.0.weight", "ff.0.bias", "ff.1.weight", "ff.3.weight")}
    model = made(family, tied=family in ("mpt", "opt"))
    assert flamingo_state(model, embeddings=False).keys() == names
    assert flamingo_state(model).keys() == names | {f"lang_encoder.{table}" for table in TABLES[family]}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_there_and_back(tmp_path, name):
    model, other = made(), made(seed=1)
    save_flamingo(model, tmp_path / name)
    ids = rows("xIabE", "Iabcd")
    other.language.load_state_dict(model.language.state_dict())
    other.encoder.load_state_dict(model.encoder.state_dict())
    assert (other(ids, pixel_values=pictures(2)).logits - model(ids, pixel_values=pictures(2)).logits).abs().max() > 1e-3
    load_flamingo(other, tmp_path / name)
    assert torch.equal(other(ids, pixel_values=pictures(2)).logits, model(ids, pixel_values=pictures(2)).logits)


def test_a_training_checkpoint_of_several_processes(tmp_path):
    """What the official training code writes: wrapped, under DDP's prefix, and with what it kept twice."""
    model, other = made(), made(seed=1)
    state = flamingo_state(model)
    extra = {
        "vision_encoder.conv1.weight": torch.zeros(1),
        "lang_encoder.old_decoder_blocks.0.self_attn.q_proj.weight": torch.zeros(1),
        "lang_encoder.gated_cross_attn_layers.1.attn_gate": torch.zeros(1),
        "lang_encoder.model.layers.0.decoder_layer.self_attn.q_proj.weight": torch.zeros(1),
    }
    wrapped = {f"module.{name}": t for name, t in {**state, **extra}.items()}
    torch.save({"epoch": 3, "model_state_dict": wrapped, "lr_scheduler_state_dict": {"last": 1}}, tmp_path / "checkpoint_3.pt")
    load_flamingo(other, tmp_path / "checkpoint_3.pt")
    for name, tensor in flamingo_state(other).items():
        assert torch.equal(tensor, state[name]), name


def test_the_two_rows_go_where_the_tokens_are():
    model, other = made(), made(seed=1)
    state = {n: t.clone() for n, t in flamingo_state(model).items()}
    table = "lang_encoder.model.embed_tokens.weight"
    state[table] = torch.cat([state[table], torch.randn(7, 24)])
    del state["lang_encoder.lm_head.weight"]  # without one of the tables, or without both, is fine
    with pytest.raises(ValueError, match=r"embed_tokens.weight: expected \[50, 24\], got \[57, 24\]; tell the rows"):
        load_flamingo_state(other, state)
    before = other.language.get_input_embeddings().weight.clone()
    load_flamingo_state(other, state, added=(51, 53))
    after = other.language.get_input_embeddings().weight
    assert torch.equal(after[[49, IMAGE]], state[table][[51, 53]])
    assert torch.equal(after[:IMAGE], before[:IMAGE])
    load_flamingo_state(other, {n: t for n, t in state.items() if n != table})


def test_what_is_no_checkpoint_of_the_model():
    model = made()
    state = flamingo_state(model)
    with pytest.raises(ValueError, match=r"holds perceiver\.colour, which test has not"):
        load_flamingo_state(model, {**state, "perceiver.colour": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"mine holds no perceiver\.latents"):
        load_flamingo_state(model, {n: t for n, t in state.items() if n != "perceiver.latents"}, "mine")
    with pytest.raises(ValueError, match=r"perceiver.latents: expected \[3, 32\], got \[4, 32\]"):
        load_flamingo_state(model, {**state, "perceiver.latents": torch.zeros(4, 32)})
    with pytest.raises(ValueError, match="model of Linear and Prefix; OpenFlamingo's are of Resampler and GatedCrossAttention"):
        flamingo_state(build(replace(SYSTEM, connector=spec.Linear(), fusion=spec.Prefix())))
