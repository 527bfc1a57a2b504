"""Parts from given weights: sizes, tokenizers, every family's parity with its stock class, and one sentence for what cannot be read."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MptConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmfast import spec
from mmfast.models import build, from_pretrained, pretrained, resolved, tokenizer_for
from mmfast.models.tokenizer import word_tokenizer

WORDS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", *(f"w{i}" for i in range(45)))
VISION = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14)
TOWERS = {
    spec.Clip: lambda: CLIPVisionModel(CLIPVisionConfig(intermediate_size=48, initializer_factor=3.0, **VISION)),
    spec.Siglip: lambda: SiglipVisionModel(SiglipVisionConfig(intermediate_size=48, **VISION)),
    spec.Dino: lambda: Dinov2Model(Dinov2Config(mlp_ratio=2, **VISION)),
}
# Families and what they call their sizes.
FAMILIES = {
    "llama": dict(num_key_value_heads=2, intermediate_size=40),
    "mistral": dict(num_key_value_heads=2, intermediate_size=40),
    "qwen2": dict(num_key_value_heads=2, intermediate_size=40),
    "qwen3": dict(num_key_value_heads=2, intermediate_size=40, head_dim=8),
    "gemma": dict(num_key_value_heads=2, intermediate_size=40, head_dim=8),
    "olmo2": dict(num_key_value_heads=2, intermediate_size=40),
    "gpt2": dict(n_inner=40),
    "opt": dict(ffn_dim=40, word_embed_proj_dim=32),
    "gpt_neox": dict(intermediate_size=40),
}


def write_language(path, family="llama", vocab=50, tied=None, **kwargs):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    tie = {} if tied is None else {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(
        family, vocab_size=vocab, **sizes, **FAMILIES.get(family, {}), **tie, **kwargs, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.save_pretrained(path)
    word_tokenizer(WORDS[:vocab]).save_pretrained(path)
    return str(path)


def write_tower(path, kind=spec.Clip, mean=(0.5, 0.4, 0.3)):
    torch.manual_seed(1)
    TOWERS[kind]().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": [0.2, 0.2, 0.2]}))
    return str(path)


def system(tmp_path, kind=spec.Clip, family="llama", **kwargs):
    return spec.System(
        "test",
        encoder=kind(weights=write_tower(tmp_path / "tower", kind), layer=-2),
        connector=spec.Mlp(2),
        language=spec.LanguageModel(weights=write_language(tmp_path / "lm", family, **kwargs)),
    )


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_alone_has_its_kinds_pixels(kind, tmp_path):
    """Without preprocessor_config.json beside it: what its kind was trained with, if the plan does not say otherwise."""
    given = system(tmp_path, kind)
    (tmp_path / "tower" / "preprocessor_config.json").unlink()
    mean = {spec.Siglip: (0.5, 0.5, 0.5), spec.Dino: (0.485, 0.456, 0.406)}.get(kind, spec.Fixed.mean)
    assert resolved(given).image.mean == mean
    assert resolved(replace(given, image=spec.Fixed(size=28, mean=(0.1, 0.1, 0.1)))).image.mean == (0.1, 0.1, 0.1)


def batch(tokens):
    ids = torch.tensor([[1, *[4] * tokens, 5, 6, 7, 8], [1, 9, *[4] * tokens, 10, 11, 0]])
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("kind", TOWERS)
def test_sizes_are_those_of_the_weights(kind, tmp_path):
    """Known without reading a weight, and those of the model that is built."""
    given = system(tmp_path, kind, vocab=45)
    told = resolved(given)
    assert (told.encoder.width, told.encoder.depth, told.encoder.heads, told.encoder.patch, told.encoder.size) == (32, 3, 4, 14, 28)
    assert told.encoder.ffn == (64 if kind is spec.Dino else 48)
    lm = told.language
    assert (lm.family, lm.vocab, lm.width, lm.depth, lm.heads, lm.kv_heads, lm.ffn, lm.context) == ("llama", 45, 32, 2, 4, 2, 40, 64)
    assert told.image == spec.Fixed(size=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    assert told.encoder.weights == given.encoder.weights
    assert resolved(told) == told
    model = build(given, tokenizer=tokenizer_for(given))
    assert model.system == told
    assert model.encode(torch.zeros(1, 3, 28, 28)).shape == (1, told.encoder.tokens, 32)
    (tmp_path / "lm" / "model.safetensors").unlink()
    assert resolved(given) == told


def test_weightless_systems_resolve_to_themselves():
    from mmfast.trainers.recipes.architectures.llava import RECIPE

    from mmfast.models import tiny

    assert resolved(tiny(RECIPE)) == tiny(RECIPE)


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_equal_the_stock_llava(kind, tmp_path):
    """Out through the stock class and back: the same logits in all three."""
    given = system(tmp_path, kind)
    ours = build(given, tokenizer=tokenizer_for(given)).eval()
    inputs = batch(ours.system.encoder.tokens)
    ours.save_pretrained(tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        want, got = ours(**inputs).logits, theirs(**inputs).logits
        again = from_pretrained(tmp_path / "out")(**inputs).logits
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(again, want, atol=1e-5, rtol=0)
    # Its tower as the tower of another system.
    eye = replace(given, encoder=replace(given.encoder, weights=str(tmp_path / "out")))
    assert resolved(eye).encoder.tokens == ours.system.encoder.tokens
    pixels = inputs["pixel_values"]
    assert torch.equal(build(eye, tokenizer=tokenizer_for(eye)).encode(pixels), ours.encode(pixels))
    # The whole of it as a start for another system.
    whole = spec.System("whole", weights=str(tmp_path / "out"))
    told = resolved(whole)
    assert type(told.encoder) is kind
    assert (told.encoder.tokens, told.language.width) == (4, 32)
    with torch.no_grad():
        torch.testing.assert_close(build(whole)(**inputs).logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_for_larger_pictures_is_that_of_transformers(kind, tmp_path):
    """Its position embeddings are stretched once, as the stock class stretches them each time it is asked to."""
    given = system(tmp_path, kind)
    given = replace(given, encoder=replace(given.encoder, interpolate=70))
    model = build(given, tokenizer=tokenizer_for(given)).eval()
    assert (model.system.encoder.size, model.system.image.size, model.system.image_places) == (70, 70, 25)
    stock = pretrained.TOWERS[kind][0].from_pretrained(given.encoder.weights).eval()
    pixels = torch.randn(2, 3, 70, 70)
    how = {} if kind is spec.Dino else {"interpolate_pos_encoding": True}
    told = stock(pixels, output_hidden_states=True, **how).hidden_states[-2][:, 0 if kind in (spec.Siglip, spec.Eva) else 1 :]
    torch.testing.assert_close(model.encode(pixels), told, rtol=1e-5, atol=1e-5)
    model.encoder.vision.save_pretrained(tmp_path / "wide")
    again = replace(given, encoder=replace(given.encoder, interpolate=0, weights=str(tmp_path / "wide")))
    torch.testing.assert_close(build(again, tokenizer=tokenizer_for(again)).eval().encode(pixels), told, rtol=1e-5, atol=1e-5)


def test_pictures_that_no_tower_can_be_stretched_to(tmp_path):
    given = system(tmp_path)
    for side, weights, sentence in (
        (71, given.encoder.weights, "encoder.interpolate: 71 is not a multiple of encoder.patch 14"),
        (56, None, "encoder.interpolate: stretches what encoder.weights bring, and there are none; set encoder.size in its place"),
    ):
        with pytest.raises(ValueError, match=sentence):
            build(replace(given, encoder=replace(given.encoder, weights=weights, interpolate=side)), tokenizer=tokenizer_for(given))


@pytest.mark.parametrize("kind", TOWERS)
def test_gradients_reach_what_is_read_of_a_tower(kind, tmp_path):
    given = system(tmp_path, kind)
    model = build(given, tokenizer=tokenizer_for(given))
    model.train_only(("encoder",))
    inputs = batch(model.system.encoder.tokens)
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 4, -100)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values()), [name for name, p in trained.items() if p.grad is None]
    assert not any(".2." in name and "layer" in name for name in trained)  # the third block lies behind state -2
    assert any(".1." in name and "layer" in name for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_equal_their_stock_class(family, tmp_path):
    """Logits, padding on the left included, and greedy tokens: decoder and head are all we use of any family."""
    path = write_language(tmp_path / "lm", family, tied=False)  # a tied random model repeats itself
    given = spec.System("test", encoder=spec.Clip(weights=write_tower(tmp_path / "tower")), language=spec.LanguageModel(weights=path))
    ours = build(given, tokenizer=tokenizer_for(given)).eval()
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 9, 10, 11, 12, 13], [0, 0, 1, 20, 21, 22]])
    mask = (ids != 0).long()
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
        alone = theirs(ids[1:, 2:]).logits
    assert want.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(ours(ids[:1]).logits, want[:1], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(ids[1:, 2:]).logits, alone, atol=1e-5, rtol=0)
    expected = [
        theirs.generate(row[None], attention_mask=torch.ones_like(row[None]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(row):]
        for row in (ids[0], ids[1, 2:])
    ]  # fmt: skip
    got = ours.generate(ids, attention_mask=mask, end=2, max_new_tokens=8)
    assert [row[: len(e)].tolist() for row, e in zip(got, expected, strict=True)] == [e.tolist() for e in expected]
    assert len({t for e in expected for t in e.tolist()}) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_families_through_the_stock_llava(family, tmp_path):
    given = system(tmp_path, family=family)
    ours = build(given, tokenizer=tokenizer_for(given)).eval()
    inputs = batch(4)
    ours.save_pretrained(tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        want = ours(**inputs).logits
        torch.testing.assert_close(theirs(**inputs).logits, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(from_pretrained(tmp_path / "out")(**inputs).logits, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old(tied, tmp_path):
    """A tokenizer without <image> gains it; table and head grow together and stay as tied as they were."""
    path = write_language(tmp_path / "lm", vocab=50, tied=tied)
    stripped = json.loads((tmp_path / "lm" / "tokenizer.json").read_text())
    stripped["added_tokens"] = [t for t in stripped["added_tokens"] if t["content"] != "<image>"]
    stripped["model"]["vocab"]["picture"] = stripped["model"]["vocab"].pop("<image>")
    (tmp_path / "lm" / "tokenizer.json").write_text(json.dumps(stripped))
    told = json.loads((tmp_path / "lm" / "tokenizer_config.json").read_text())
    told = {k: v for k, v in told.items() if k not in ("additional_special_tokens", "extra_special_tokens", "pad_token")}
    (tmp_path / "lm" / "tokenizer_config.json").write_text(json.dumps(told))
    given = spec.System("test", encoder=spec.Clip(weights=write_tower(tmp_path / "tower")), language=spec.LanguageModel(weights=path))
    tokenizer = tokenizer_for(given)
    assert tokenizer.convert_tokens_to_ids("<image>") == 50
    assert tokenizer("w1<image>w2", add_special_tokens=False)["input_ids"][1] == 50
    assert tokenizer.pad_token == "<eos>"
    model = build(given, tokenizer=tokenizer)
    before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for table, old in (
        (model.language.get_input_embeddings(), before.get_input_embeddings()),
        (model.language.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert table.weight.shape == (51, 32)
        assert torch.equal(table.weight[:50], old.weight)
        torch.testing.assert_close(table.weight[50], old.weight.mean(0))
    assert (model.language.get_input_embeddings().weight is model.language.get_output_embeddings().weight) == tied
    assert model.image_token == 50
    assert model.language.config.vocab_size == 51


def test_frozen_parts_in_bf16(tmp_path):
    given = system(tmp_path)
    model = build(given, tokenizer=tokenizer_for(given), dtype=torch.bfloat16)
    assert {p.dtype for p in model.encoder.parameters()} == {p.dtype for p in model.language.parameters()} == {torch.bfloat16}
    learn = model.train_only(("connector",))
    assert {p.dtype for p in learn} == {torch.float32}
    inputs = batch(4)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learn)
    exact = build(given, tokenizer=tokenizer_for(given))
    exact.connector.load_state_dict(model.connector.state_dict())
    assert abs(loss.item() - exact(**inputs, labels=inputs["input_ids"]).loss.item()) < 0.1
    assert {p.dtype for p in model.train_only(("language",))} == {torch.float32}


def test_adapters_over_bf16(tmp_path):
    """Adapters are fp32 and learn, with and without autocast; what they stand beside stays bf16."""
    from mmfast.models import add_lora

    given = system(tmp_path)
    model = build(given, tokenizer=tokenizer_for(given), dtype=torch.bfloat16)
    add_lora(model, spec.Lora(rank=2, alpha=4, dropout=0.0))
    learn = model.train_only(("connector",), lora=True)
    assert {p.dtype for p in learn} == {torch.float32}
    assert {p.dtype for n, p in model.language.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    inputs = batch(4)
    plain = model(**inputs, labels=inputs["input_ids"]).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(**inputs, labels=inputs["input_ids"]).loss
    for loss in (plain, cast):
        model.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learn)
    assert abs(plain.item() - cast.item()) < 0.1


def test_a_quantised_language_model(tmp_path, monkeypatch):
    import importlib.util

    given = system(tmp_path)
    four = replace(given, language=replace(given.language, quantize="4bit"))
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
        with pytest.raises(ValueError, match=r"language.quantize=4bit needs bitsandbytes \(pip install bitsandbytes\)"):
            build(four)
    with pytest.raises(ValueError, match=r"language.quantize: 4bit needs language.weights of its own"):
        build(replace(four, weights=str(tmp_path / "lm")))
    with pytest.raises(ValueError, match=r"language.quantize: 4bit holds given weights"):
        build(replace(four, language=replace(four.language, weights=None)))
    if find("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed: 4-bit weights themselves are not tried")
    from mmfast.models import add_lora, merge_lora

    model = build(four, tokenizer=tokenizer_for(four))
    add_lora(model, spec.Lora(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "up_proj")))
    learn = model.train_only(("connector",), lora=True)
    inputs = batch(4)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert {p.dtype for p in learn} == {torch.float32}
    assert all(p.grad is not None for p in learn)
    with pytest.raises(ValueError, match="cannot be folded into 4-bit weights"):
        merge_lora(model)
    with pytest.raises(ValueError, match="held in 4 bits and cannot learn itself"):
        model.train_only(("language",))
    with pytest.raises(ValueError, match="4-bit weights are not written back"):
        model.save_pretrained(tmp_path / "out")


def test_gguf(tmp_path):
    """A tiny llama written with the gguf package reads as the same numbers; a tokenizer comes from it too."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    path = write_language(tmp_path / "lm", "llama", tied=False)
    torch_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config, tensors = torch_model.config, {k: v.numpy() for k, v in torch_model.state_dict().items()}
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(40)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(50)
    writer.add_tokenizer_model("gpt2")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?"
    pairs = ["a b", "c d", "e f", "g h", "i j", "k l", "m n"]
    writer.add_token_list([w.encode() for w in (*WORDS[:4], *letters, *(p.replace(" ", "") for p in pairs))])
    writer.add_token_types([3] * 4 + [1] * 46)
    writer.add_token_merges(pairs)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def rows(weight, heads):  # GGUF keeps the halves of a rotary pair next to each other
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)

    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, inner = stem.split(".", 3)
            tensor = rows(tensor, 4) if inner.endswith("q_proj") else rows(tensor, 2) if inner.endswith("k_proj") else tensor
            if inner.endswith("up_proj"):  # in 8-bit blocks, and our reference rounded alike
                blocks = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
                torch_model.get_parameter(name).data = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
                writer.add_tensor(f"blk.{layer}.{names[inner]}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
                continue
            writer.add_tensor(f"blk.{layer}.{names[inner]}.weight", tensor)
        else:
            writer.add_tensor(f"{names[stem]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    given = spec.System(
        "test",
        encoder=spec.Clip(weights=write_tower(tmp_path / "tower")),
        language=spec.LanguageModel(weights=str(tmp_path / "tiny.gguf")),
    )
    told = resolved(given).language
    assert (told.family, told.vocab, told.width, told.kv_heads, told.ffn, told.context) == ("llama", 50, 32, 2, 40, 64)
    tokenizer = tokenizer_for(given)
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1 >= 50
    ids = torch.tensor([[1, 9, 10, 11]])
    with torch.no_grad():
        got, want = build(given, tokenizer=tokenizer)(ids).logits, torch_model(ids).logits
    torch.testing.assert_close(got[..., :50], want, atol=1e-5, rtol=0)
    # Blocks are unpacked: the weights train, and can be written.
    model = build(given, tokenizer=tokenizer)
    model.train_only(("language",))
    assert all(p.requires_grad for p in model.language.parameters())
    model.save_pretrained(tmp_path / "out")


def faults(tmp_path):
    """What can be wrong with given weights: what to do to good ones, and the sentence."""
    lm, tower = tmp_path / "lm", tmp_path / "tower"

    def to_pickle():
        (lm / "model.safetensors").unlink()
        (lm / "pytorch_model.bin").write_bytes(pickle.dumps({}))

    def renamed_pickle():
        torch.save({"a": torch.zeros(3)}, lm / "model.safetensors")

    def cut():
        whole = (lm / "model.safetensors").read_bytes()
        (lm / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    def other_weights():
        from safetensors.torch import load_file, save_file

        tensors = load_file(lm / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if "layers.1." not in k}, lm / "model.safetensors", metadata={"format": "pt"})

    def other_shapes():
        told = json.loads((lm / "config.json").read_text())
        (lm / "config.json").write_text(json.dumps(told | {"hidden_size": 64}))

    def bad_json():
        (lm / "config.json").write_text("{")

    def unknown_type():
        (lm / "config.json").write_text(json.dumps({"model_type": "nonsense"}))

    def no_text_model():
        shutil.copytree(tower, lm, dirs_exist_ok=True)

    def no_tower():
        shutil.copytree(lm, tower, dirs_exist_ok=True)

    def softcapped():
        shutil.rmtree(lm)
        write_language(lm, "gemma2", num_key_value_heads=2, intermediate_size=40, head_dim=8)

    def dino():
        shutil.rmtree(tower)
        write_tower(tower, spec.Dino)

    return {
        "missing folder": (lambda: shutil.rmtree(lm), r"language.weights .*lm: there is no such folder"),
        "no config": ((lm / "config.json").unlink, r"language.weights .*lm holds no config.json"),
        "config is not JSON": (bad_json, r"language.weights .*lm: no configuration can be read"),
        "unknown model type": (unknown_type, r"language.weights .*lm: no configuration can be read"),
        "no weights": ((lm / "model.safetensors").unlink, r"language.weights .*lm holds no \*.safetensors"),
        "pickled": (to_pickle, r"holds pickled weights only \(pytorch_model.bin\).*convert them to safetensors"),
        "renamed pickle": (renamed_pickle, r"model.safetensors is no safetensors file, whatever its name says"),
        "empty": (lambda: (lm / "model.safetensors").write_bytes(b""), r"model.safetensors is no safetensors file"),
        "no header": (
            lambda: (lm / "model.safetensors").write_bytes(b"\x03" + b"\0" * 7 + b"abc"),
            r"model.safetensors is no safetensors file",
        ),
        "cut off": (cut, r"language.weights .*lm: the weights cannot be read"),
        "weights of another model": (
            other_weights,
            r"holds no model.layers.1.*and \d+ more of the right shape: its weights are not those of its config.json",
        ),
        "other sizes": (other_shapes, r"language.weights .*lm holds no lm_head.weight and 20 more of the right shape"),
        "no language model": (no_text_model, r"model_type 'clip_vision_model' is no causal language model"),
        "no tower": (no_tower, r"encoder.weights .*model_type is 'llama', a Clip is one of clip_vision_model, clip"),
        "another tower": (dino, r"model_type is 'dinov2'.*declare the encoder as Dino"),
        "logits behind the head": (softcapped, r"final_logit_softcapping 30.0 changes logits behind the head"),
    }


@pytest.mark.parametrize("fault", faults(__import__("pathlib").Path("unused")))
def test_what_cannot_be_read_is_one_sentence(fault, tmp_path):
    given = system(tmp_path)
    change, sentence = faults(tmp_path)[fault]
    change()
    with pytest.raises(ValueError, match=sentence) as caught:
        build(given)
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path):
    def language(weights):
        return spec.System("test", encoder=spec.Clip(weights=None), language=spec.LanguageModel(weights=weights))

    with pytest.raises(ValueError, match=r"the Python package no_such_thing is not installed \(pip install no-such-thing\)"):
        resolved(
            language("package:no_such_thing/x.gguf" if __import__("importlib.util").util.find_spec("gguf") else "package:no_such_thing")
        )
    with pytest.raises(ValueError, match=r"language.weights nobody/nothing: no configuration can be read"):
        resolved(language("nobody/nothing"))
    with pytest.raises(ValueError, match=r"a tokenizer comes with weights, and language.weights is None"):
        tokenizer_for(language(None))


def test_a_stock_llava_that_is_not_understood(tmp_path):
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(intermediate_size=48, **VISION), text_config=AutoConfig.for_model("llama", hidden_size=32),
        vision_feature_layer=[-2, -1],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"read at one layer, got siglip_vision_model at layer \[-2, -1\]"):
        resolved(spec.System("test", weights=str(tmp_path)))


def test_the_context_of_mpt_has_a_name_of_its_own():
    assert pretrained.language_sizes(spec.LanguageModel(weights=None), MptConfig(max_seq_len=77)).context == 77
