"""Tiny random transformers models whose connectors matter, and batches for them."""

import torch
import transformers as tf
from torch import nn

VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28, "patch_size": 14}
OPT = {
    "model_type": "opt", "vocab_size": 60, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "word_embed_proj_dim": 16, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "dropout": 0.0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def qformer(**changes) -> dict:
    return {
        "vocab_size": 37, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
        "encoder_hidden_size": 24, "cross_attention_frequency": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes,
    }  # fmt: skip


def redraw(model: nn.Module) -> nn.Module:
    """Every weight at random: the stock start has zero queries, zero gates and vision weights of 1e-10, behind which any fault hides."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            is_norm = p.dim() <= 2 and name.endswith("weight") and "norm" in name.lower()
            fan = p[0].numel() if p.dim() > 1 else 1
            one = any(part in name for part in ("query_tokens", "latent", "alpha", "embedding.weight", "class_embedding"))
            p.copy_(1 + 0.2 * draw if is_norm else draw if one else 0.2 * draw if fan == 1 else draw / fan**0.5)
    return model.eval()


def build(config, cls, impl: str | None) -> nn.Module:
    """impl None: what this transformers takes by itself (SDPA where a part has it)."""
    return redraw(cls(config) if impl is None else cls._from_config(config, attn_implementation=impl))


def ids(*shape, low=3, high=30, seed=0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: int, length: int, side: str) -> torch.Tensor:
    """Ones, with row i missing i + 1 places (the last row none) on one side, or in the middle."""
    mask = torch.ones(rows, length, dtype=torch.long)
    for i in range(rows - 1):
        where = {"right": slice(length - 1 - i, length), "left": slice(0, i + 1), "middle": slice(2, 3 + i)}[side]
        mask[i, where] = 0
    return mask


def blip2(impl=None, text=False, **q):
    config = tf.Blip2Config(
        vision_config=dict(VISION), qformer_config=qformer(use_qformer_text_input=text, **q), text_config=dict(OPT), num_query_tokens=4,
        image_token_index=59, image_text_hidden_size=8,
    )  # fmt: skip
    return build(config, tf.Blip2ForImageTextRetrieval if text else tf.Blip2ForConditionalGeneration, impl)


def blip2_batch():
    text = torch.cat([torch.full((3, 4), 59), ids(3, 5)], 1)
    return {"pixel_values": pixels(3, 3, 28, 28), "input_ids": text, "attention_mask": torch.ones_like(text)}


def retrieval_batch(side="right"):
    mask = torch.cat([torch.ones(3, 4, dtype=torch.long), padded(3, 6, side)], 1)
    return {"pixel_values": pixels(3, 3, 28, 28), "input_ids": torch.cat([torch.full((3, 4), 59), ids(3, 6)], 1), "attention_mask": mask}


def instructblip(impl=None, video=False, **q):
    name = "InstructBlipVideo" if video else "InstructBlip"
    token = {"video_token_index": 59} if video else {"image_token_index": 59}
    config = getattr(tf, f"{name}Config")(
        vision_config=dict(VISION), qformer_config=qformer(**q), text_config=dict(LLAMA), num_query_tokens=4, **token
    )
    return build(config, getattr(tf, f"{name}ForConditionalGeneration"), impl)


def instructblip_batch(side="right", frames=0):
    text = torch.cat([torch.full((3, 4 * max(frames, 1)), 59), ids(3, 5)], 1)
    return {
        "pixel_values": pixels(3, frames, 3, 28, 28) if frames else pixels(3, 3, 28, 28),
        "input_ids": text,
        "attention_mask": torch.ones_like(text),
        "qformer_input_ids": ids(3, 6, seed=2),
        "qformer_attention_mask": padded(3, 6, side),
    }


def idefics(impl=None, resampler=True, qk=False, **changes):
    config = tf.IdeficsConfig(
        vocab_size=50, additional_vocab_size=0, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        cross_layer_interval=2, alpha_type="float", alpha_initializer="ones", qk_layer_norms=qk, dropout=changes.pop("dropout", 0.0),
        pad_token_id=0, use_resampler=resampler,
        perceiver_config={
            "use_resampler": resampler, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 2, "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": qk,
        },
        vision_config={
            "embed_dim": 24, "image_size": 28, "intermediate_size": 40, "patch_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2,
        },
        **changes,
    )  # fmt: skip
    return build(config, tf.IdeficsForVisionText2Text, impl)


def idefics_batch(kind="latest"):
    """Two rows, three images; the first tokens see none."""
    time = torch.tensor([[0, 1, 1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 1, 2, 2, 2]])
    image = torch.arange(1, 4)
    seen = {"latest": time[..., None] == image, "all": time[..., None] >= image, "odd": (time[..., None] >= image) & (image != 2)}[kind]
    return {
        "input_ids": ids(2, 8),
        "attention_mask": torch.ones(2, 8, dtype=torch.long),
        "pixel_values": pixels(2, 3, 3, 28, 28),
        "image_attention_mask": seen.long(),
    }


def idefics2(impl=None, **perceiver):
    config = tf.Idefics2Config(
        vision_config={**VISION, "image_size": 56},
        perceiver_config={
            "hidden_size": 16, "resampler_n_latents": 3, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8,
            "num_key_value_heads": 2, **perceiver,
        },
        text_config={**LLAMA, "model_type": "mistral", "sliding_window": None},
        image_token_id=59,
    )  # fmt: skip
    return build(config, tf.Idefics2ForConditionalGeneration, impl)


def idefics2_batch(ragged=True):
    text = torch.cat([ids(2, 2), torch.full((2, 3), 59), ids(2, 4, seed=3)], 1)
    real = torch.ones(2, 1, 56, 56, dtype=torch.long)
    if ragged:
        real[0, :, :, 28:] = 0  # holes in every row of patches
        real[1, :, 42:] = 0  # the last row of patches
    return {
        "input_ids": text, "attention_mask": torch.ones_like(text), "pixel_values": pixels(2, 1, 3, 56, 56), "pixel_attention_mask": real,
    }  # fmt: skip


def kosmos2(impl=None, **text):
    config = tf.Kosmos2Config(
        text_config={
            "vocab_size": 60, "embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 64,
            "pad_token_id": 1, "attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0, **text,
        },
        vision_config=dict(VISION),
        latent_query_num=3,
    )  # fmt: skip
    return build(config, tf.Kosmos2ForConditionalGeneration, impl)


def kosmos2_batch():
    text = ids(2, 9)
    place = torch.zeros_like(text)
    place[:, 2:5] = 1
    return {
        "pixel_values": pixels(2, 3, 28, 28), "input_ids": text, "attention_mask": torch.ones_like(text), "image_embeds_position_mask": place,
    }  # fmt: skip


def chameleon(impl=None):
    words = {"<s>": 1, "</s>": 2, "<pad>": 3, "<image>": 4, "<racm3:break>": 5, "<eoss>": 6}
    words |= {f"IMGIMG{chr(65 + i)}Z": 10 + i for i in range(8)}
    config = tf.ChameleonConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, vocabulary_map=words,
        vq_config={
            "embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 32, "base_channels": 32, "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
        },
    )  # fmt: skip
    return build(config, tf.ChameleonForConditionalGeneration, impl)


def chameleon_batch():
    text = torch.cat([ids(2, 2, low=20, high=40), torch.full((2, 256), 4), ids(2, 4, low=20, high=40)], 1)
    return {"pixel_values": pixels(2, 3, 32, 32), "input_ids": text, "attention_mask": torch.ones_like(text)}
