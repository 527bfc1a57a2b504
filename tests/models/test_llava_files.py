"""LLaVA's own files: the projection by its published names, and deltas over LLaMA; references are worked out from the tensors alone."""

from dataclasses import replace

import pytest
import torch
from made import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mmfast import spec
from mmfast.models import build, load_llava, save_llava, tokenizer_for
from mmfast.models.llava import add_delta, llava_state, load_llava_state, merge_delta

SYSTEM = spec.System(
    "test",
    encoder=spec.Clip(weights=None, width=32, depth=3, heads=2, ffn=48, patch=8, size=16),
    language=spec.LanguageModel(weights=None, vocab=50, width=24, depth=2, heads=2, kv_heads=2, ffn=40, init=0.3),
    image=spec.Fixed(size=16),
)
AROUND = spec.Prefix(begin="<im_start>", end="<im_end>")
P = "model.mm_projector."


def made(seed=0, **changes):
    torch.manual_seed(seed)
    return build(replace(SYSTEM, **changes)).eval()


@pytest.mark.parametrize(("width", "trained"), [(4096, 4_198_400), (5120, 5_248_000)])
def test_published_sizes(width, trained):
    with torch.device("meta"):
        model = build(
            replace(SYSTEM, encoder=spec.Clip(weights=None), image=spec.Fixed(), language=replace(SYSTEM.language, width=width, depth=1))
        )
    state = llava_state(model)
    assert {name: tuple(t.shape) for name, t in state.items()} == {f"{P}weight": (width, 1024), f"{P}bias": (width,)}
    assert sum(t.numel() for t in state.values()) == trained


@pytest.mark.parametrize("before", ["", "base_model.model."])
def test_a_projection_is_read_by_its_published_names(before, tmp_path):
    """LLaVA's W v + b, and LLaVA-1.5's two maps with GELU between, from files as the release writes them."""
    g = torch.Generator().manual_seed(0)
    w, b, w2, b2, v = (torch.randn(*s, generator=g) for s in ((24, 32), (24,), (24, 24), (24,), (3, 32)))
    one, two = {"weight": w, "bias": b}, {"0.weight": w, "0.bias": b, "2.weight": w2, "2.bias": b2}
    hidden = v @ w.T + b
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    for connector, state, want in ((spec.Linear(), one, hidden), (spec.Mlp(2), two, gelu @ w2.T + b2)):
        torch.save({f"{before}{P}{name}": t for name, t in state.items()}, tmp_path / "mm_projector.bin")
        model = made(connector=connector)
        load_llava(model, tmp_path / "mm_projector.bin")
        torch.testing.assert_close(model.connector(v), want)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("fusion", [spec.Prefix(), AROUND], ids=["plain", "around"])
@pytest.mark.parametrize("connector", [spec.Linear(), spec.Mlp(2)], ids=["linear", "mlp"])
def test_files_both_ways(connector, fusion, suffix, tmp_path):
    model, other = made(1, connector=connector, fusion=fusion), made(2, connector=connector, fusion=fusion)
    save_llava(model, tmp_path / f"a.{suffix}")
    load_llava(other, tmp_path / f"a.{suffix}")
    for name, tensor in model.connector.named_parameters():
        assert torch.equal(other.connector.get_parameter(name), tensor)
    new, old = (m.language.get_input_embeddings().weight for m in (other, model))
    same = (new == old).all(1).nonzero().flatten().tolist()
    assert same == (list(model.new_tokens) if fusion is AROUND else [])
    if suffix == "bin":
        assert torch.load(tmp_path / "a.bin", weights_only=True).keys() == llava_state(model).keys()


def test_rows_of_the_tokens_around_a_picture():
    """The whole table or these two alone: the last are theirs."""
    model, table = made(fusion=AROUND), torch.randn(53, 24)
    state = {name: t for name, t in llava_state(model).items() if "projector" in name}
    for rows in (table, table[-2:]):
        torch.nn.init.zeros_(model.language.get_input_embeddings().weight)
        load_llava_state(model, state | {"model.embed_tokens.weight": rows})
        own = model.language.get_input_embeddings().weight
        assert torch.equal(own[-2:], table[-2:])
        assert not own[:-2].any()
    load_llava_state(model, state)  # a file without them leaves the model's
    assert torch.equal(model.language.get_input_embeddings().weight[-2:], table[-2:])


def test_projections_that_do_not_fit_say_so(tmp_path):
    model = made()
    state = llava_state(model)
    for change, sentence in (
        ({f"{P}weight": torch.zeros(24, 31)}, r"model.mm_projector.weight: expected \[24, 32\], got \[24, 31\]"),
        ({"model.layers.0.gate": torch.zeros(1)}, "holds model.layers.0.gate, which is no part of LLaVA's projection"),
        ({"model.embed_tokens.weight": torch.zeros(52, 24)}, "holds rows of the tokens around a picture, and test has none; set fusion.begin"),
        ({f"{P}2.weight": torch.zeros(24, 24)}, r"holds model.mm_projector.2.weight, .*; the connector of test, Linear\(\), is model.mm_projector.bias, "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            load_llava_state(model, state | change)
    with pytest.raises(ValueError, match=r"holds no projection; the connector of test, Linear\(\), is"):
        load_llava_state(model, {})
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight: expected \[2 or more, 24\], got \[1, 24\]"):
        load_llava_state(made(fusion=AROUND), state | {"model.embed_tokens.weight": torch.zeros(1, 24)})
    with pytest.raises(ValueError, match="its connector is a Tokens; LLaVA's files hold a Linear or an Mlp"):
        llava_state(made(connector=spec.Tokens(2)))
    torch.save({"w": Unknown()}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match=r"evil.bin is no file of tensors alone, and nothing else is read"):
        load_llava(model, tmp_path / "evil.bin")


def test_a_file_says_what_its_projection_fits(tmp_path):
    """Weights that lie elsewhere are the same weights; a file without such words, as the release has them, is read as ever."""

    def named(tower="openai/clip", layer=-2, language="vicuna-7b", **changes):
        model = made(**changes)
        parts = replace(model.system.encoder, weights=tower, layer=layer), replace(model.system.language, weights=language)
        model.system = replace(model.system, encoder=parts[0], language=parts[1])
        return model

    save_llava(named(), tmp_path / "a.safetensors")
    save_llava(named(), tmp_path / "a.bin")
    for model in (named("/models/clip"), named(None, language=None), made()):
        load_llava(model, tmp_path / "a.safetensors")
    for model, sentence in (
        (named(tower="openai/clip-336"), "a.safetensors: its projection was trained with encoder.weights openai/clip, and test has openai/clip-336; set "),
        (named(layer=-1), "trained with encoder.layer -2, and test has -1; set encoder.layer, or take another file"),
        (named(language="llama-7b"), "trained with language.weights vicuna-7b, and test has llama-7b"),
        (named(fusion=AROUND), "trained with fusion.begin empty, and test has <im_start>"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            load_llava(model, tmp_path / "a.safetensors")
        load_llava(model, tmp_path / "a.bin")


class Unknown:
    """Something that a pickle would have to be run for."""


# ------------------------------------------------------------------------------------------------------------------ deltas


def llama(vocab, seed):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=40)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, initializer_range=0.3, tie_word_embeddings=False, **sizes)).eval()


def test_a_delta_is_added():
    base = {
        "model.embed_tokens.weight": torch.tensor([[1.0], [2.0]]),
        "lm_head.weight": torch.tensor([[3.0], [4.0]]),
        "model.norm.weight": torch.ones(1),
    }
    delta = {
        "model.embed_tokens.weight": torch.tensor([[10.0], [20.0], [7.0]]), "lm_head.weight": torch.tensor([[30.0], [40.0], [8.0]]),
        "model.norm.weight": torch.tensor([0.5]), f"{P}weight": torch.tensor([[9.0]]), f"{P}bias": torch.zeros(1),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }  # fmt: skip
    target = add_delta(base, delta)
    assert {name: t.flatten().tolist() for name, t in target.items()} == {
        "model.embed_tokens.weight": [11, 22, 7], "lm_head.weight": [33, 44, 8], "model.norm.weight": [1.5], f"{P}weight": [9], f"{P}bias": [0],
    }  # fmt: skip
    assert delta["model.norm.weight"].tolist() == [0.5]
    assert base["model.norm.weight"].tolist() == [1]
    for change, sentence in (
        ({"model.norm.weight": torch.ones(2)}, r"model.norm.weight: expected \[1\], got \[2\]"),
        ({"lm_head.weight": torch.ones(1, 1)}, r"lm_head.weight: expected \[2, 1\] or more rows, got \[1, 1\]"),
        ({"model.vision": torch.ones(1)}, "holds model.vision, which is neither in the base nor of a projection"),
    ):
        with pytest.raises(ValueError, match=sentence):
            add_delta(base, delta | change)
    with pytest.raises(ValueError, match=r"delta holds no model.norm.weight, so it is no delta over this base"):
        add_delta(base, {name: t for name, t in delta.items() if name != "model.norm.weight"})


def test_a_released_delta_becomes_a_model(tmp_path):
    """Folders as the release has them: LLaMA's, and a delta in two pickles with the longer tokenizer. What is built of their sum says what the
    model says whose difference it is."""
    words = tokenizer("bytes")
    count = len(words)
    words.add_tokens(["[PAD]", "<im_start>", "<im_end>"], special_tokens=True)
    base, whole, projection = llama(count, 0), llama(count + 3, 1), torch.nn.Linear(32, 24)
    base.save_pretrained(tmp_path / "base")
    delta = {}
    for name, tensor in whole.state_dict().items():
        delta[name] = tensor.clone()
        own = base.state_dict()[name]
        delta[name][: len(own)] -= own
    delta |= {f"{P}{name}": p.detach() for name, p in projection.named_parameters()}
    delta["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    (tmp_path / "delta").mkdir()
    for i, names in enumerate((sorted(delta)[:7], sorted(delta)[7:])):
        torch.save({name: delta[name] for name in names}, tmp_path / "delta" / f"pytorch_model-0000{i + 1}-of-00002.bin")
    with pytest.raises(ValueError, match="no tokenizer can be read"):
        merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    words.save_pretrained(tmp_path / "delta")
    merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    system = replace(SYSTEM, fusion=AROUND, language=spec.LanguageModel(weights=str(tmp_path / "out")))
    model = build(system, tokenizer=tokenizer_for(system)).eval()
    load_llava(model, tmp_path / "out" / "mm_projector.bin")
    assert model.new_tokens == (count + 1, count + 2)
    pixels = torch.randn(1, 3, 16, 16)
    ids = torch.tensor([[1, count + 1, *[model.image_token] * 4, count + 2, 9, 11]])
    with torch.no_grad():
        embeds = whole.get_input_embeddings()(ids.where(ids != model.image_token, 0))
        embeds[0, 2:6] = projection(model.encoder(pixels)[0])
        want = whole(inputs_embeds=embeds).logits
        got = model(ids, pixel_values=pixels).logits[..., : count + 3]
    assert want.std() > 0.3
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"out exists and is not empty"):
        merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds neither \*.safetensors nor pytorch_model\*.bin"):
        merge_delta(tmp_path / "base", tmp_path, tmp_path / "other")
