"""Kosmos-2: ``Kosmos2ForConditionalGeneration``, and the names of the original checkpoint (which serves Kosmos-1, too)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, Kosmos2Config, Kosmos2ForConditionalGeneration

from mmfast import spec
from mmfast.models.build import MultimodalModel, Tower
from mmfast.models.files import read_state
from mmfast.models.kosmos import KosmosLanguage
from mmfast.models.lora import merged
from mmfast.models.pretrained import VISION, language_sizes, set_decoder, share, tower_sizes
from mmfast.nn.pool import AttentionPool

STOCK = Kosmos2ForConditionalGeneration


def system_of(config: Kosmos2Config, name: str) -> spec.System:
    """The choices that a stock Kosmos-2's configuration stands for."""
    vision, text = config.vision_config, config.text_config
    if text.add_cross_attention or not text.scale_embedding:
        raise ValueError(f"{name}: expected a decoder with scaled embeddings and without cross-attention, as Kosmos-2's is")
    tower = spec.Clip(weights=None, layer=-1, keep_class_token=True, post_norm=True, unit=True, activation=vision.hidden_act)
    return spec.System(
        name=Path(name).name,
        paper="arXiv:2306.14824",
        encoder=tower_sizes(tower, vision),
        connector=spec.AttentionPool(tokens=config.latent_query_num, heads=text.attention_heads),
        fusion=spec.Prefix(begin="<image>", end="</image>"),
        language=language_sizes(spec.LanguageModel(weights=None), text),
        image=spec.Fixed(size=vision.image_size),
        regions=spec.BoxTokens(),
    )


def from_stock(stock: Kosmos2ForConditionalGeneration, name: str = "kosmos2") -> MultimodalModel:
    """Take the parts out of a stock Kosmos-2; weights are shared with it, not copied."""
    config = stock.config
    system = system_of(config, name)
    with torch.device("meta"):  # shells; their insides are the checkpoint's
        vision = CLIPVisionModel(CLIPVisionConfig(**{key: getattr(config.vision_config, key) for key in VISION}))
        connector = AttentionPool(vision.config.hidden_size, system.language.width, system.connector.tokens, system.connector.heads)
        language = KosmosLanguage(config.text_config)
    share(stock.vision_model.model, vision)
    share(stock.image_to_text_projection, connector)
    set_decoder(language, stock.text_model.model)
    language.lm_head = stock.text_model.lm_head
    tower = Tower(vision, layer=-1, skip=0, post_norm=True, unit=True)
    # In the processor's batch a mask says where images are, and ids there mean nothing: ours is one behind the vocabulary.
    return MultimodalModel(system, tower, connector, language, image_token=config.text_config.vocab_size).eval()


@contextmanager
def as_stock(model: MultimodalModel) -> Iterator[Kosmos2ForConditionalGeneration]:
    """The model's parts in a stock Kosmos-2 that gives the same logits; adapters are folded in meanwhile."""
    system, tower, connector, text = model.system, model.encoder, model.connector, model.language.config
    if not isinstance(model.language, KosmosLanguage):
        raise ValueError(f"{system.name}: the stock class has Kosmos' language model, and this is a {text.model_type}")
    if not (isinstance(tower.vision, CLIPVisionModel) and tower.post_norm and tower.unit and not tower.skip and _reads_last(tower)):
        raise ValueError(f"{system.name}: the stock class reads all last states of a CLIP tower, with its last norm and of length 1")
    if connector.x_attn.heads != text.attention_heads:
        raise ValueError(
            f"{system.name}: the stock class has as many heads in the connector as in the language model, {text.attention_heads}"
        )
    config = Kosmos2Config(
        text_config=text.to_dict(),
        vision_config={key: getattr(tower.vision.config, key) for key in VISION},
        latent_query_num=len(connector.latent_query),
    )
    with torch.device("meta"):
        stock = Kosmos2ForConditionalGeneration(config)
    with merged(model):
        share(tower.vision, stock.vision_model.model)
        share(connector, stock.image_to_text_projection)
        stock.text_model.model, stock.text_model.lm_head = model.language.model, model.language.lm_head
        yield stock


def _reads_last(tower: Tower) -> bool:
    return tower.read == len(tower.blocks)


# ------------------------------------------------------------------------------------------------- the original checkpoint

_RENAMED = (
    (r"^gpt_model\.decoder\.output_projection\.", "text_model.lm_head."),
    (r"^gpt_model\.decoder\.", "text_model.model."),
    (r"^img_connector\.", "image_to_text_projection."),
    (r"^img_model\.visual\.(class_embedding)$", r"vision_model.model.embeddings.\1"),
    (r"^img_model\.visual\.positional_embedding$", "vision_model.model.embeddings.position_embedding.weight"),
    (r"^img_model\.visual\.conv1\.", "vision_model.model.embeddings.patch_embedding."),
    (r"^img_model\.visual\.", "vision_model.model."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.ts_attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
# A buffer, and what the xPos branch left behind that the released code has commented out.
_IGNORED = re.compile(r"(embed_positions\._float_tensor|self_attn_sope\.scale)$")


def stock_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the original release (``gpt_model.*``, ``img_connector.*``, ``img_model.visual.*``) under the stock class' names."""
    told = {}
    for name, value in state.items():
        if _IGNORED.search(name):
            continue
        for theirs, ours in _RENAMED:
            name = re.sub(theirs, ours, name)
        told[name] = value
    return told


def load_original(model: MultimodalModel, state: Mapping[str, Tensor] | str | Path) -> None:
    """The original release's tensors into a model of its sizes: ``state``, or a file of them (``.pt`` under "model", read without running code).

    Raises:
        ValueError: a tensor that is missing, too many, or of another shape.
    """
    if isinstance(state, str | Path):
        state = read_state(state)
        state = state.get("model", state)
    told = stock_names(state)
    with as_stock(model) as stock, torch.no_grad():
        own = stock.state_dict()
        own.pop("text_model.lm_head.weight") if "text_model.lm_head.weight" not in told else None  # the embeddings, once more
        if wrong := sorted({n for n in {*own, *told} if n not in own or n not in told or own[n].shape != told[n].shape}):
            raise ValueError(
                f"{model.system.name}: the original checkpoint and this model differ in {wrong[0]}"
                + (f" and {len(wrong) - 1} more tensors" if len(wrong) > 1 else "")
            )
        for name, value in own.items():
            value.copy_(told[name])
