"""Published checkpoints in and out.

The stock class of transformers is the map between names: parts are taken out of it when reading and put back into it when writing, so that
whatever layouts it understands (old key names, shards, half precision) we understand too, and what we write it loads.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from mmfast import spec
from mmfast.models.build import ClipTower, MultimodalModel
from mmfast.nn.projector import Projector


def from_pretrained(path: str | Path) -> MultimodalModel:
    """Read a Hugging Face folder (or hub name) of a known ``model_type``; frozen and in evaluation mode.

    Known: ``llava`` with a CLIP tower and a LLaMA language model. Anything else raises ``ValueError`` with what was found, and so do weights
    that are missing, torn, or a pickle by another name.
    """
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "llava":
        raise ValueError(f"{path}: model_type is {config.model_type!r}; from_pretrained knows 'llava'")
    parts = (config.vision_config.model_type, config.text_config.model_type)
    if parts != ("clip_vision_model", "llama") or not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"{path}: expected a clip_vision_model tower read at one layer and a llama, got {parts} at layer {config.vision_feature_layer}"
        )
    try:
        # A pickle (pytorch_model.bin) is not read, and a weight that is not there is not made up.
        stock, told = LlavaForConditionalGeneration.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ValueError(f"{path}: its weights are not the safetensors file they are named: {error}") from None
    except OSError as error:
        raise ValueError(f"{path}: has no weights in safetensors format: {' '.join(str(error).split())}") from None
    if absent := sorted(told["missing_keys"]) + [name for name, *_ in told["mismatched_keys"]]:
        more = f", and so are {len(absent) - 1} more weights" if len(absent) > 1 else ""
        raise ValueError(f"{path}: {absent[0]} is missing from its checkpoint or of another shape{more}")
    return from_stock(stock, Path(path).name)


def from_stock(stock: LlavaForConditionalGeneration, name: str = "llava") -> MultimodalModel:
    """Take the parts out of a stock LLaVA; weights are shared with it, not copied."""
    config, parts = stock.config, stock.model
    vision, text = config.vision_config, config.text_config
    first, second = parts.multi_modal_projector.linear_1, parts.multi_modal_projector.linear_2
    linear = config.projector_hidden_act == "linear"
    if linear and not (torch.equal(second.weight, torch.eye(len(second.weight)).to(second.weight)) and not second.bias.any()):
        raise ValueError(
            f"{name}: projector_hidden_act is 'linear' and linear_2 is not the identity; two maps without activation are unknown"
        )
    if not linear and config.projector_hidden_act != "gelu":
        raise ValueError(f"{name}: projector_hidden_act is {config.projector_hidden_act!r}, expected 'gelu' or 'linear'")
    system = spec.System(
        name=name,
        paper="arXiv:2304.08485",
        encoder=spec.Clip(
            weights=None,
            width=vision.hidden_size,
            depth=vision.num_hidden_layers,
            heads=vision.num_attention_heads,
            ffn=vision.intermediate_size,
            patch=vision.patch_size,
            size=vision.image_size,
            layer=config.vision_feature_layer,
            keep_class_token=config.vision_feature_select_strategy == "full",
        ),
        connector=spec.Linear() if linear else spec.Mlp(2),
        language=spec.LanguageModel(
            family=text.model_type,
            weights=None,
            vocab=text.vocab_size,
            width=text.hidden_size,
            depth=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            ffn=text.intermediate_size,
            context=text.max_position_embeddings,
            tied=bool(text.tie_word_embeddings),
            norm_eps=text.rms_norm_eps,
        ),
        image=spec.Fixed(size=vision.image_size),
    )
    connector = Projector(vision.hidden_size, text.hidden_size, 1 if linear else 2)
    for slot, layer in ((0, first),) if linear else ((0, first), (2, second)):
        connector[slot] = layer
    with torch.device("meta"):  # only the shell of the causal model; its insides are the checkpoint's
        language = AutoModelForCausalLM.from_config(text)
    language.model, language.lm_head = parts.language_model, stock.lm_head
    tower = ClipTower(parts.vision_tower, layer=system.encoder.layer, keep_class_token=system.encoder.keep_class_token)
    return MultimodalModel(system, tower, connector, language, image_token=config.image_token_id).eval()


def save_pretrained(model: MultimodalModel, path: str | Path) -> None:
    """Write a folder that ``LlavaForConditionalGeneration.from_pretrained`` loads, with the same logits.

    A single affine connector is written as ``linear_1`` with the identity behind it, the stock class having no other form for it.
    """
    system, vision, text = model.system, model.encoder.vision.config, model.language.config
    maps = [m for m in model.connector if isinstance(m, nn.Linear)]
    if len(maps) > 2:
        raise ValueError(f"{system.name}: the stock class has a connector of two affine maps, this one has {len(maps)}")
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=model.image_token,
        image_seq_length=system.encoder.tokens,
        projector_hidden_act="linear" if len(maps) == 1 else "gelu",
        vision_feature_layer=system.encoder.layer,
        vision_feature_select_strategy="full" if system.encoder.keep_class_token else "default",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )
    with torch.device("meta"):
        stock = LlavaForConditionalGeneration(config)
    if len(maps) == 1:
        width = maps[0].out_features
        maps.append(nn.Linear(width, width, device=maps[0].weight.device, dtype=maps[0].weight.dtype))
        nn.init.eye_(maps[1].weight)
        nn.init.zeros_(maps[1].bias)
    stock.model.vision_tower, stock.model.language_model = model.encoder.vision, model.language.get_decoder()
    stock.model.multi_modal_projector.linear_1, stock.model.multi_modal_projector.linear_2 = maps
    stock.lm_head = model.language.get_output_embeddings()
    stock.save_pretrained(path)
