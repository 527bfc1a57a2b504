"""Our Flamingo-type model is Idefics: parity with transformers' class on tiny random checkpoints, both ways."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from made import lively, moves_logits, same_logits, same_tokens, saved, words_loss
from PIL import Image
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsProcessor
from transformers.models.idefics.configuration_idefics import IdeficsPerceiverConfig, IdeficsVisionConfig
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from mmfast import spec
from mmfast.data import chat
from mmfast.models import add_lora, build, from_pretrained
from mmfast.models.tokenizer import word_tokenizer

PAD, BOS, EOS, WORDS = 0, 1, 2, 50
FAKE, IMAGE = 50, 51  # of the additional vocabulary


def stock(resampler=True, layers=4, every=2, gates="float", qk_norm=False, perceiver_norm=False, extra=2, tied=False, act="gelu", seed=0):
    config = IdeficsConfig(
        vocab_size=WORDS + 2 - extra, additional_vocab_size=extra, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, cross_layer_interval=every, alpha_type=gates, qk_layer_norms=qk_norm, use_resampler=resampler,
        max_position_embeddings=128, tie_word_embeddings=tied, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        perceiver_config=IdeficsPerceiverConfig(
            use_resampler=resampler, resampler_n_latents=6, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=8,
            qk_layer_norms_perceiver=perceiver_norm,
        ),
        vision_config=IdeficsVisionConfig(
            embed_dim=24, image_size=28, intermediate_size=40, patch_size=14, num_hidden_layers=2, num_attention_heads=2, hidden_act=act
        ),
    )  # fmt: skip
    torch.manual_seed(seed)
    return lively(IdeficsForVisionText2Text(config), seed=seed)


def batch(seed=0, pad="right", pictures=3):
    """Rows that show two pictures, one and none, of unlike length, as Idefics' processor makes them: a row sees its latest picture alone, and
    none behind an end token until the next."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randint(3, WORDS, (30,), generator=g).tolist()
    shown = [FAKE, IMAGE, FAKE]
    rows = [[BOS, *w[:2], *shown, *w[2:6], *shown, *w[6:9]], [BOS, *shown, *w[9:14], EOS, *w[14:16]], [BOS, *w[16:20]]]
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(r)) for r in rows]
    ids = torch.tensor([r + f if pad == "right" else f + r for r, f in zip(rows, fill, strict=True)])
    mask = torch.zeros(3, width, pictures, dtype=torch.long)
    for row, line in enumerate(ids.tolist()):
        count, ended = -1, False
        for place, token in enumerate(line):
            count, ended = (count + 1, False) if token == IMAGE else (count, ended)
            if count >= 0 and not ended:
                mask[row, place, count] = 1
            ended = ended or token == EOS
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.randn(3, pictures, 3, 28, 28, generator=g),
        "image_attention_mask": mask,
        "labels": ids.masked_fill((ids == PAD) | (ids == IMAGE) | (ids == BOS), -100),
    }


def prompts(seed=0):
    inputs = batch(seed, pad="left")
    inputs.pop("labels")
    return inputs


CASES = [
    {},
    {"resampler": False},
    {"gates": "vector", "seed": 1},
    {"qk_norm": True, "perceiver_norm": True, "seed": 2},
    {"every": 1, "layers": 2},
    {"layers": 6, "every": 3, "seed": 3},
    {"extra": 0},
    {"tied": True},
    {"tied": True, "extra": 0},
    {"act": "quick_gelu", "seed": 7},
]
IDS = ["-".join(f"{a}={b}" for a, b in case.items()) or "idefics" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_logits_and_loss_equal_the_stock_class(case, tmp_path):
    theirs = stock(**case)
    ours = from_pretrained(saved(theirs, tmp_path))
    for pad, pictures in (("right", 3), ("left", 2), ("left", 5)):
        # With an additional vocabulary the stock class reshapes its loss by the regular one's size, and fails.
        same_logits(ours, theirs, batch(case.get("seed", 0) + pictures, pad, pictures), loss=case.get("extra") == 0)


MASKS = {
    "all so far": lambda m: m.cumsum(1).clamp(max=1),
    "everything": torch.ones_like,
    "any": lambda m: (torch.rand(m.shape, generator=torch.Generator().manual_seed(5)) < 0.4).long(),
    "nothing": torch.zeros_like,
    "booleans": lambda m: m.bool(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_any_image_mask(mask, tmp_path):
    """Rows may see several pictures, ones that come later, or have no <image> token at all: the mask alone decides."""
    theirs = stock(resampler=False, qk_norm=True)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(4)
    inputs["image_attention_mask"] = mask(inputs["image_attention_mask"])
    same_logits(ours, theirs, inputs, loss=False)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 7)
    same_logits(ours, theirs, inputs, loss=False)


def test_gradients_equal_the_stock_class(tmp_path):
    theirs, inputs = stock(gates="vector", qk_norm=True), batch()
    ours = from_pretrained(saved(theirs, tmp_path))
    ours.train_only(("adapter", "connector", "language"))
    ours(**inputs).loss.backward()
    theirs.requires_grad_(True)
    labels = inputs.pop("labels")
    words_loss(theirs(**inputs).logits, labels).backward()
    stocks = theirs.model
    for i, block in enumerate(ours.fusion.layers.values()):
        for name, p in block.named_parameters():
            want = stocks.gated_cross_attn_layers[i].get_parameter(name).grad
            assert want.abs().max() > 1e-5, name
            torch.testing.assert_close(p.grad, want, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for ours_p, want in (
        (ours.connector.resampler.latents, stocks.perceiver_resampler.latents),
        (ours.language.model.layers[0].self_attn.q_proj.weight, stocks.layers[0].self_attn.q_proj.weight),
    ):
        torch.testing.assert_close(ours_p.grad, want.grad, atol=1e-5, rtol=1e-4)
    table = torch.cat([stocks.embed_tokens.weight.grad, stocks.embed_tokens.additional_embedding.weight.grad])
    torch.testing.assert_close(ours.language.model.embed_tokens.weight.grad, table, atol=1e-5, rtol=1e-4)


def test_a_changed_weight_is_seen(tmp_path):
    names = [
        "encoder.vision.pre_layrnorm.bias", "connector.resampler.layers.1.0.to_kv.weight", "connector.resampler.latents",
        "fusion.layers.0.cross_attn.k_proj.weight", "fusion.layers.2.alpha_dense", "fusion.layers.2.alpha_cross_attn",
        "language.model.layers.3.mlp.up_proj.weight", "language.lm_head.weight",
    ]  # fmt: skip
    moves_logits(from_pretrained(saved(stock(), tmp_path)), batch(), names)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_way_back_loads_in_the_stock_class(case, tmp_path):
    first = stock(**case)
    ours, inputs = from_pretrained(saved(first, tmp_path / "a")), batch(3)
    theirs = IdeficsForVisionText2Text.from_pretrained(saved(ours, tmp_path / "b")).eval()
    assert theirs.config.additional_vocab_size == case.get("extra", 2)
    assert theirs.state_dict().keys() == first.state_dict().keys()
    for name, value in first.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    same_logits(ours, theirs, inputs, loss=case.get("extra") == 0)


@pytest.mark.parametrize(("case", "seed"), list(zip(CASES[:5], (6, 3, 2, 0, 0), strict=True)), ids=IDS[:5])
def test_greedy_tokens_equal_the_stock_class(case, seed, tmp_path):
    theirs = stock(**{**case, "seed": seed})
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), prompts(6)
    same_tokens(ours, theirs, inputs, end=EOS)
    # Every picture at once.
    inputs["image_attention_mask"] = torch.ones_like(inputs["image_attention_mask"])
    same_tokens(ours, theirs, inputs, end=EOS)


def test_a_row_alone_says_the_same(tmp_path):
    ours, inputs = from_pretrained(saved(stock(), tmp_path)), prompts(6)
    together = ours.generate(**inputs, end=EOS, max_new_tokens=8)
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = ours.generate(
            inputs["input_ids"][row][real][None], pixel_values=inputs["pixel_values"][row : row + 1],
            image_attention_mask=inputs["image_attention_mask"][row][real][None], end=EOS, max_new_tokens=8,
        )  # fmt: skip
        assert alone[0].tolist() == together[row, : alone.shape[1]].tolist()


def test_pictures_in_reading_order_are_the_same_model(tmp_path):
    """The trainers' own batch, pictures end to end and places told by <image> tokens, where the processor's mask says the same."""
    ours, inputs = from_pretrained(saved(stock(), tmp_path)), batch()
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == EOS, 9)
    mask = inputs.pop("image_attention_mask")
    count = (inputs["input_ids"] == IMAGE).cumsum(1)
    mask = (count[..., None] == torch.arange(1, mask.shape[-1] + 1)).long()
    with torch.no_grad():
        want = ours(**inputs, image_attention_mask=mask)
        pixels = inputs.pop("pixel_values")
        shown = torch.cat([pixels[row, : int(count[row, -1])] for row in range(3)])
        got = ours(**inputs, pixel_values=shown)
    torch.testing.assert_close(got.logits, want.logits, atol=1e-6, rtol=0)


def tokenizer():
    """Words, with <image> in another place than the stock rows have it."""
    words = ("User", ":", "What", "is", "this", "?", "Assistant", "It", "and", "red")
    return word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", *words), ("<end_of_utterance>", "<fake_token_around_image>"))


def test_the_processors_batch(tmp_path):
    """What the stock processor makes of prompts goes into the model as it is, and the template ``idefics`` reads the same tokens."""
    words, g = tokenizer(), np.random.default_rng(0)
    a, b, c = (Image.fromarray(g.integers(0, 255, (40, 30, 3), dtype=np.uint8)) for _ in range(3))
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=28), words)
    prompts = [
        ["User:", a, b, "What is this?<end_of_utterance>", "\nAssistant:", "It is red<end_of_utterance>", "\nUser:", c, "And?<end_of_utterance>\nAssistant:"],
        ["User: What", a, "is this?<end_of_utterance>\nAssistant:"],
        ["User: What is this?<end_of_utterance>\nAssistant:"],
    ]  # fmt: skip
    inputs = processor(text=prompts, padding=True)
    assert inputs["pixel_values"].shape == (3, 3, 3, 28, 28)
    theirs = stock(seed=6)
    words.save_pretrained(tmp_path)
    ours = from_pretrained(saved(theirs, tmp_path))
    same_logits(ours, theirs, inputs)
    words.padding_side = "left"
    same_tokens(ours, theirs, dict(processor(text=prompts, padding=True)), end=EOS)
    borders = words.convert_tokens_to_ids(list(ours.system.borders))
    conversations = [
        [("<image><image>What is this?", "It is red"), ("<image>And?", None)], [("What<image>is this?", None)], [("What is this?", None)],
    ]  # fmt: skip
    for row, turns in enumerate(conversations):
        ids, _ = chat.encode(words, "idefics", turns, image_tokens=1, image_token=ours.image_token, borders=borders)
        assert ids == inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()


def test_a_system_starts_from_its_weights(tmp_path):
    """All choices are those of the folder; only its kind of fusion has to be declared, and its additional rows are the new tokens."""
    theirs = stock(gates="vector", qk_norm=True)
    tokenizer().save_pretrained(tmp_path)
    given = spec.System("mine", weights=str(saved(theirs, tmp_path)), fusion=spec.GatedCrossAttention(end=""))
    model = build(given)
    assert from_pretrained(tmp_path).image_token == 4, "which token shows a picture, its tokenizer knows"
    assert (model.system.fusion.every, model.system.fusion.gates, model.system.fusion.block) == (2, "vector", "idefics")
    same_logits(model, theirs, batch(), loss=False)
    model.train_only(("new_tokens",))
    model(**batch()).loss.backward()
    for table in (model.language.get_input_embeddings(), model.language.get_output_embeddings()):
        moved = table.weight.grad.abs().amax(1) > 0
        assert moved.nonzero().flatten().tolist() == [FAKE, IMAGE]
    with pytest.raises(ValueError, match="are those of a model with GatedCrossAttention; with Prefix give the parts' own weights"):
        build(replace(given, fusion=spec.Prefix(), connector=spec.Mlp()))


def test_adapters_are_folded_in(tmp_path):
    ours, inputs = from_pretrained(saved(stock(), tmp_path / "a")), batch()
    add_lora(ours, spec.Lora(rank=2, alpha=2, targets=("q_proj", "mlp.up_proj")))
    for name, p in ours.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    same_logits(ours, IdeficsForVisionText2Text.from_pretrained(saved(ours, tmp_path / "b")).eval(), inputs, loss=False)


def test_without_any_picture(tmp_path):
    """Blocks run all the same: their networks are gated, not their attention alone."""
    theirs, inputs = stock(), batch()
    ours, labels = from_pretrained(saved(theirs, tmp_path)), inputs.pop("labels")
    inputs["image_attention_mask"] = torch.zeros_like(inputs["image_attention_mask"])
    with torch.no_grad():
        want = theirs(**inputs).logits
        got = ours(inputs["input_ids"], inputs["attention_mask"], labels=labels).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)


def test_computed_again_or_in_half_precision(tmp_path):
    ours, inputs = from_pretrained(saved(stock(gates="vector", qk_norm=True), tmp_path)), batch()
    inputs["image_attention_mask"] = torch.ones_like(inputs["image_attention_mask"])
    ours.train_only(("adapter", "connector", "new_tokens"))
    ours.train()

    def gradients():
        ours.zero_grad()
        ours(**inputs).loss.backward()
        return {n: p.grad.clone() for n, p in ours.named_parameters() if p.requires_grad}

    kept = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        for name, half in gradients().items():
            error = (half - kept[name]).norm() / kept[name].norm()
            assert error < 0.1, f"{name}: {error:.3f}"
    ours.checkpoint_activations()
    calls = []
    for block in ours.fusion.blocks:
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    for name, again in gradients().items():
        torch.testing.assert_close(again, kept[name], atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert len(calls) == 2 * len(ours.fusion.blocks), "the blocks were not computed again"


def test_what_has_no_form_there(tmp_path):
    model = from_pretrained(saved(stock(), tmp_path))
    system = model.system
    for change, sentence in (
        (
            {"fusion": replace(system.fusion, every=3)},
            r"a block before layers 0, 3, .. of a multiple of them, here offset is 0 and layers 4",
        ),
        ({"connector": replace(system.connector, activation="gelu")}, r"a resampler with ReLU and without frames, this one has gelu and 0"),
    ):
        model.system = replace(system, **change)
        with pytest.raises(ValueError, match=f"IdeficsForVisionText2Text has {sentence}"):
            model.save_pretrained(tmp_path / "no")
    prefix = replace(system, fusion=spec.Prefix(), connector=spec.Linear(), language=replace(system.language, vocab=52))
    with pytest.raises(ValueError, match="image_attention_mask is read by gated cross-attention, not by Prefix"):
        build(prefix)(**batch())
    with pytest.raises(
        ValueError, match=r"connector: NoConnector leaves states in the tower's width, .*; with Prefix set Linear or another"
    ):
        build(replace(prefix, connector=spec.NoConnector()))
    with pytest.raises(ValueError, match=r"fusion.immediate: false is for Flamingo's blocks"):
        build(replace(system, fusion=replace(system.fusion, immediate=False)))
    for field, value in (("hidden_act", "gelu"), ("alpha_type", "tensor")):
        stock().config.save_pretrained(tmp_path / field)
        written = tmp_path / field / "config.json"
        written.write_text(json.dumps(json.loads(written.read_text()) | {field: value}))
        with pytest.raises(ValueError, match=f"{field} is '{value}', expected"):
            from_pretrained(tmp_path / field)


def test_published_sizes():
    """Idefics-9B, on no memory: 8,929,679,632 parameters, of the resampler 125,961,984 and of the gated blocks 1,434,519,568."""
    system = spec.System(
        "idefics_9b",
        encoder=spec.Clip(
            weights=None, width=1280, depth=32, heads=16, ffn=5120, layer=-1, keep_class_token=True, activation="gelu"
        ),
        connector=spec.Resampler(tokens=64, depth=6, heads=16, head_width=96, activation="relu", qk_norm=True),
        fusion=spec.GatedCrossAttention(every=4, block="idefics", qk_norm=True, end=""),
        language=spec.LanguageModel(weights=None, vocab=32002),
    )  # fmt: skip
    with torch.device("meta"):
        model = build(system)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["connector"] == 125_961_984
    assert count["fusion"] == 1_434_519_568
    assert sum(count.values()) == 8_929_679_632
