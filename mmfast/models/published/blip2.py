"""BLIP-2: ``Blip2ForConditionalGeneration`` with a causal language model or T5; what compares pictures with texts is in ``blip2_retrieval``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2VisionModel, InstructBlipConfig

from mmfast import spec
from mmfast.models.build import MultimodalModel, Tower, queries
from mmfast.models.lora import merged
from mmfast.models.pretrained import check_head, language_sizes, tower_sizes
from mmfast.nn.query_connector import QueryConnector

STOCK = Blip2ForConditionalGeneration


def system_of(config: Blip2Config, name: str) -> spec.System:
    """The choices that a stock BLIP-2's configuration stands for."""
    return whole(config, name, "arXiv:2301.12597", text=False)


def whole(config: Blip2Config | InstructBlipConfig, name: str, paper: str, **words: bool) -> spec.System:
    """The choices of a stock class; ``words`` as of ``choices``."""
    if not config.use_decoder_only_language_model and config.text_config.model_type not in spec.ENCODER_DECODERS:
        raise ValueError(
            f"{name}: its language model is a {config.text_config.model_type}, an encoder and a decoder; expected a causal one, or "
            f"{', '.join(spec.ENCODER_DECODERS)}"
        )
    if config.image_token_index is None:
        raise ValueError(f"{name}: image_token_index is null, so nothing in a text says where a picture stands; set it in config.json")
    check_head(config.text_config, name)
    return spec.System(
        name=Path(name).name,
        paper=paper,
        **choices(config, name, **words),
        language=language_sizes(spec.LanguageModel(weights=None), config.text_config),
    )


def choices(config: Blip2Config | InstructBlipConfig, name: str, *, text: bool, instructed: bool = False) -> dict:
    """Encoder, connector and image plan of a stock configuration."""
    vision, q = config.vision_config, config.qformer_config
    for where, act in (("vision_config", vision.hidden_act), ("qformer_config", q.hidden_act)):
        if act != "gelu":
            raise ValueError(f"{name}: {where}.hidden_act is {act!r}, expected 'gelu'")
    if q.layer_norm_eps != 1e-12:
        raise ValueError(f"{name}: qformer_config.layer_norm_eps is {q.layer_norm_eps}, expected 1e-12")
    connector = spec.QFormer(
        tokens=config.num_query_tokens, width=q.hidden_size, depth=q.num_hidden_layers, heads=q.num_attention_heads, ffn=q.intermediate_size,
        every=q.cross_attention_frequency, text=text, instructed=instructed, vocab=q.vocab_size if text or instructed else 0,
        positions=q.max_position_embeddings, shared=getattr(config, "image_text_hidden_size", spec.QFormer.shared),
        dropout=q.hidden_dropout_prob, norm_eps=vision.layer_norm_eps,
    )  # fmt: skip
    return {
        "encoder": tower_sizes(spec.Eva(weights=None), vision), "connector": connector, "image": spec.Fixed(size=vision.image_size),
    }  # fmt: skip


def from_stock(stock: Blip2ForConditionalGeneration, name: str = "blip2") -> MultimodalModel:
    """Take the parts out of a stock BLIP-2; weights are shared with it, but for the norm behind the tower, which is the connector's here."""
    return joined(stock, system_of(stock.config, name))


def joined(stock: nn.Module, system: spec.System) -> MultimodalModel:
    """A stock class's parts as one model."""
    tower, connector = parts(stock, system, stock.language_projection.out_features)
    connector.projection = stock.language_projection
    return MultimodalModel(system, tower, connector, stock.language_model, image_token=stock.config.image_token_index).eval()


def parts(stock: nn.Module, system: spec.System, width_out: int) -> tuple[Tower, QueryConnector]:
    """Tower and connector with the weights that both stock classes have."""
    vision = stock.vision_model
    with torch.device("meta"):
        connector = queries(system.connector, system.encoder.width, width_out)
    connector.ln_vision = copy.deepcopy(vision.post_layernorm)
    connector.query_tokens = stock.query_tokens
    state = {name: value for name, value in stock.qformer.state_dict().items() if connector.reads_text or not _of_text(name)}
    if connector.compares:
        state = {_with_embeddings(name): value for name, value in state.items()}
        state |= {f"embeddings.{name}": value for name, value in stock.embeddings.state_dict().items() if name != "position_ids"}
    connector.qformer.load_state_dict(state, assign=True)
    return Tower(vision, layer=-1, skip=0), connector


@contextmanager
def as_stock(model: MultimodalModel) -> Iterator[Blip2ForConditionalGeneration]:
    """The model's parts in a stock BLIP-2 that gives the same logits; adapters are folded in meanwhile. A text side is left out."""
    config = stock_config(model.encoder, model.connector, model.system, text=False)
    with filled(model, STOCK, config) as stock:
        yield stock


@contextmanager
def filled(model: MultimodalModel, kind: type, config: Blip2Config | InstructBlipConfig) -> Iterator[nn.Module]:
    """The model's parts in a stock class of this configuration."""
    if getattr(model.language, "is_quantized", False):
        raise ValueError(f"{model.system.name}: 4-bit weights are not written back; load them with language.quantize=none")
    config.text_config, config.image_token_index = model.language.config, model.image_token
    config.is_encoder_decoder = model.is_encoder_decoder
    config.use_decoder_only_language_model = not model.is_encoder_decoder
    with torch.device("meta"):
        stock = kind(config)
    with merged(model):
        fill(stock, model.encoder, model.connector)
        stock.language_projection, stock.language_model = model.connector.projection, model.language
        yield stock


def stock_config(encoder: nn.Module, connector: QueryConnector, system: spec.System, *, text: bool) -> Blip2Config:
    """A stock configuration of tower and connector, with the language model's defaults."""
    vision, choice = getattr(encoder, "vision", None), system.connector
    if not isinstance(vision, Blip2VisionModel) or encoder.read != len(encoder.blocks):
        raise ValueError(f"{system.name}: the stock classes have an Eva tower and read its last state, this one has {system.encoder}")
    if vision.config.layer_norm_eps != connector.ln_vision.eps:
        raise ValueError(
            f"{system.name}: the norm behind the tower has eps {connector.ln_vision.eps}, and the stock classes that of the tower's own norms, "
            f"{vision.config.layer_norm_eps}; set connector.ln_vision.eps to it (the difference is far below half precision)"
        )
    q = dict(
        hidden_size=choice.width, num_hidden_layers=choice.depth, num_attention_heads=choice.heads, intermediate_size=choice.ffn,
        cross_attention_frequency=choice.every, hidden_dropout_prob=choice.dropout, attention_probs_dropout_prob=choice.dropout,
        use_qformer_text_input=text, max_position_embeddings=choice.positions,
    )  # fmt: skip
    if connector.reads_text:
        q["vocab_size"] = connector.qformer.embeddings["word_embeddings"].num_embeddings
    return Blip2Config(
        vision_config=vision.config,
        qformer_config=q,
        num_query_tokens=choice.tokens,
        image_text_hidden_size=choice.shared,
        image_token_index=None,
    )


def fill(stock: nn.Module, encoder: Tower, connector: QueryConnector) -> None:
    """Tower and connector into a stock class."""
    vision = copy.copy(encoder.vision)
    vision._modules = {**vision._modules, "post_layernorm": connector.ln_vision}  # the tower keeps its own
    stock.vision_model, stock.query_tokens = vision, connector.query_tokens
    own, wanted = connector.qformer.state_dict(), stock.qformer.state_dict()
    own |= {_without_embeddings(name): value for name, value in own.items()}
    stock.qformer.load_state_dict({name: own[name] for name in wanted}, assign=True)


def _of_text(name: str) -> bool:
    return ".intermediate." in name or (".output." in name and "attention.output" not in name)


def _with_embeddings(name: str) -> str:
    return f"embeddings.{name}" if name.startswith("layernorm.") else name


def _without_embeddings(name: str) -> str:
    return name.removeprefix("embeddings.")


def tensors(connector: QueryConnector) -> dict[str, Tensor]:
    """Words and positions as ``Blip2TextEmbeddings`` has them."""
    table = connector.qformer.embeddings
    return {f"{name}.weight": table[name].weight for name in ("word_embeddings", "position_embeddings")}
