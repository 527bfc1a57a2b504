"""Our LLaVA is the published one: parity with transformers' class on tiny random checkpoints, both ways."""

import pytest
import torch
from made import moves_logits, same_logits, same_tokens, saved
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mmfast.models import from_pretrained

IMAGE, PAD = 97, 96


def stock(act="gelu", tied=False, layer=-2, select="default", seed=0):
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        initializer_factor=2.0,
    )
    text = LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4 + (select == "full"), projector_hidden_act=act,
        vision_feature_layer=layer, vision_feature_select_strategy=select, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
            layer.bias.normal_()
        if act == "linear":
            layer.weight.copy_(torch.eye(48))
            layer.bias.zero_()
    return model


def batch(tokens, seed=0, pad="right"):
    """Two rows of unlike length, the first with two images and the second with one."""
    g = torch.Generator().manual_seed(seed)
    slots = [IMAGE] * tokens
    words = torch.randint(3, 90, (12,), generator=g).tolist()
    rows = [[1, *slots, *words[:5], *slots, *words[5:9]], [1, words[9], *slots, *words[10:]]]
    width = max(map(len, rows))
    fill = [[PAD] * (width - len(r)) for r in rows]
    ids = torch.tensor([r + f if pad == "right" else f + r for r, f in zip(rows, fill, strict=True)])
    labels = ids.masked_fill((ids == IMAGE) | (ids == PAD) | (ids == 1), -100)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.randn(3, 3, 28, 28, generator=g),
        "labels": labels,
    }


CASES = [
    {},
    {"act": "linear"},
    {"tied": True},
    {"layer": -1},
    {"layer": 1},
    {"layer": [-3, 1, -2]},
    {"select": "full"},
    {"seed": 7},
]


@pytest.mark.parametrize("kwargs", CASES, ids=lambda k: "-".join(f"{a}={b}" for a, b in k.items()) or "llava_1_5")
def test_logits_and_loss_equal_the_stock_class(kwargs, tmp_path):
    theirs = stock(**kwargs)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(4 + (kwargs.get("select") == "full"))
    same_logits(ours, theirs, inputs)
    # On the right, padding needs no mask.
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = theirs(**inputs).logits
        inputs.pop("attention_mask")
        torch.testing.assert_close(ours(**inputs).logits[real], want[real], atol=1e-5, rtol=0)


def test_a_changed_weight_is_seen(tmp_path):
    names = (
        "encoder.vision.pre_layrnorm.bias", "connector.0.bias", "connector.2.weight", "language.model.layers.1.mlp.up_proj.weight",
    )  # fmt: skip
    moves_logits(from_pretrained(saved(stock(), tmp_path)), batch(4), names)


def test_the_way_back_loads_in_the_stock_class(tmp_path):
    for i, kwargs in enumerate(CASES):
        ours = from_pretrained(saved(stock(**kwargs), tmp_path / f"a{i}"))
        theirs = LlavaForConditionalGeneration.from_pretrained(saved(ours, tmp_path / f"b{i}")).eval()
        same_logits(ours, theirs, batch(4 + (kwargs.get("select") == "full")))


def test_greedy_tokens_equal_the_stock_class(tmp_path):
    """Prompts of unlike length, padded on the left, until the end token or the limit."""
    theirs = stock(seed=3)
    ours, inputs = from_pretrained(saved(theirs, tmp_path)), batch(4, seed=3, pad="left")
    inputs.pop("labels")
    got = same_tokens(ours, theirs, inputs, end=2)
    # A row alone, without padding, says the same.
    row = inputs["input_ids"][1][inputs["attention_mask"][1].bool()][None]
    alone = ours.generate(row, pixel_values=inputs["pixel_values"][2:], end=2, max_new_tokens=12)
    assert alone[0].tolist() == got[1, : alone.shape[1]].tolist()


def test_the_end_token_ends_a_row(tmp_path):
    ours, inputs = from_pretrained(saved(stock(), tmp_path)), batch(4, pad="left")
    inputs.pop("labels")
    free = ours.generate(**inputs, max_new_tokens=6)
    end = int(free[0, 2])
    stopped = ours.generate(**inputs, end=end, max_new_tokens=6)
    at = free[0].tolist().index(end)
    assert stopped[0, at:].tolist() == [end] * (stopped.shape[1] - at)


def test_sampling_repeats_with_its_generator(tmp_path):
    ours, inputs = from_pretrained(saved(stock(), tmp_path)), batch(4, pad="left")
    inputs.pop("labels")
    draws = [
        ours.generate(**inputs, temperature=1.0, max_new_tokens=8, generator=torch.Generator().manual_seed(s)).tolist() for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_placeholders_and_images_must_agree(tmp_path):
    ours, inputs = from_pretrained(saved(stock(), tmp_path)), batch(4)
    with pytest.raises(ValueError, match=r"12 image placeholders.*2 images have 8 tokens"):
        ours(inputs["input_ids"], pixel_values=inputs["pixel_values"][:2])


def test_what_it_cannot_read_is_named(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        from_pretrained(tmp_path)
