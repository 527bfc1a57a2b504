"""Idefics: ``IdeficsForVisionText2Text`` (arXiv:2306.16527), a CLIP tower, a LLaMA and gated blocks between its layers, with or without a
resampler. Its decoder layers and its tower are LLaMA's and CLIP's in all but name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, IdeficsConfig, IdeficsForVisionText2Text, LlamaConfig, LlamaForCausalLM
from transformers.models.idefics.modeling_idefics import IdeficsRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mmfast import spec
from mmfast.models import pretrained
from mmfast.models.build import CONNECTORS, MultimodalModel, Tower
from mmfast.models.lora import merged
from mmfast.models.pretrained import share

STOCK = IdeficsForVisionText2Text
AROUND = "<fake_token_around_image>"  # what its processor puts on either side of a picture


def system_of(config: IdeficsConfig, name: str) -> spec.System:
    """The choices that a stock Idefics' configuration stands for. ``language.vocab`` is the regular vocabulary; rows beyond it are the
    additional one. Dropout of the stock layers is not read: the released models have none."""
    vision, perceiver = config.vision_config, config.perceiver_config
    for field, value, known in (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("vision_config.hidden_act", vision.hidden_act, ("gelu", "quick_gelu")),
        ("alpha_type", config.alpha_type, ("float", "vector")),
    ):
        if value not in known:
            raise ValueError(f"{name}: {field} is {value!r}, expected {' or '.join(map(repr, known))}")
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise ValueError(f"{name}: expected square pictures and patches, got {vision.image_size} and {vision.patch_size}")
    connector = spec.NoConnector()
    if config.use_resampler:
        connector = spec.Resampler(
            tokens=perceiver.resampler_n_latents, depth=perceiver.resampler_depth, heads=perceiver.resampler_n_heads,
            head_width=perceiver.resampler_head_dim, activation="relu", qk_norm=perceiver.qk_layer_norms_perceiver,
        )  # fmt: skip
    tower = spec.Clip(weights=None, layer=-1, keep_class_token=True, activation=vision.hidden_act)
    return spec.System(
        name=Path(name).name,
        paper="arXiv:2306.16527",
        encoder=pretrained.tower_sizes(tower, vision),
        connector=connector,
        fusion=spec.GatedCrossAttention(
            every=config.cross_layer_interval, heads=config.num_attention_heads, head_width=config.hidden_size // config.num_attention_heads,
            block="idefics", qk_norm=config.qk_layer_norms, gates="vector" if config.alpha_type == "vector" else "scalar", end="",
            around=AROUND,
        ),
        language=pretrained.language_sizes(spec.LanguageModel(weights=None), _text_config(config)),
        image=spec.Fixed(size=vision.image_size, fit="squash"),
    )  # fmt: skip


def from_stock(stock: IdeficsForVisionText2Text, name: str = "idefics") -> MultimodalModel:
    """Take the parts out of a stock Idefics; weights are shared with it, but for the two vocabularies, which become one, and the resampler's
    keys and values.

    The configuration does not say which token is ``<image>``; a tokenizer beside the weights does, and without one it is taken to be the last.
    With the processor's ``image_attention_mask`` it is not read.
    """
    config, theirs = stock.config, stock.model
    system = system_of(config, name)
    text = _text_config(config)
    text.vocab_size += config.additional_vocab_size
    vision = CLIPVisionConfig(**{ours: getattr(config.vision_config, ours) for ours in pretrained.VISION})
    with torch.device("meta"):  # only the shells; what fills them is the checkpoint's
        language, tower = LlamaForCausalLM(text), CLIPVisionModel(vision)
    tables = {"model.embed_tokens.weight": _joined(theirs.embed_tokens, "additional_embedding")}
    tables["lm_head.weight"] = tables["model.embed_tokens.weight"] if text.tie_word_embeddings else _joined(stock.lm_head, "additional_fc")
    layers = {f"model.layers.{key}": value for key, value in theirs.layers.state_dict().items()}
    language.load_state_dict({**layers, **tables, "model.norm.weight": theirs.norm.weight}, strict=True, assign=True)
    language.tie_weights()
    language.model.rotary_emb = LlamaRotaryEmbedding(text)
    share(theirs.vision_model, tower)
    image_token, added = _image_token(config, text.vocab_size), range(config.vocab_size, text.vocab_size)
    with torch.device("meta"):
        connector = CONNECTORS[type(system.connector)](system.connector, system.encoder.width, None)
        model = MultimodalModel(system, Tower(tower, layer=-1, skip=0), connector, language, image_token=image_token, new_tokens=added)
    if config.use_resampler:
        connector.resampler.load_state_dict(resampler_names(theirs.perceiver_resampler.state_dict()), strict=True, assign=True)
    for ours, block in zip(model.fusion.layers.values(), theirs.gated_cross_attn_layers, strict=True):
        share(block, ours)
    model.train_only(())
    return model.eval()


@contextmanager
def as_stock(model: MultimodalModel) -> Iterator[IdeficsForVisionText2Text]:
    """The model's parts in a stock Idefics that gives the same logits; adapters are folded in meanwhile.

    Rows of the vocabulary beyond ``language.vocab``, those that were added to the language model, become the additional vocabulary.
    """
    system, text, vision = model.system, model.language.config, model.encoder.vision.config
    check(model)
    fusion, connector, rows = system.fusion, system.connector, model.language.get_input_embeddings().num_embeddings
    regular = system.language.vocab if 0 < system.language.vocab <= rows else rows
    perceiver = {}
    if isinstance(connector, spec.Resampler):
        perceiver = dict(
            resampler_n_latents=connector.tokens, resampler_depth=connector.depth, resampler_n_heads=connector.heads,
            resampler_head_dim=connector.head_width, qk_layer_norms_perceiver=connector.qk_norm,
        )  # fmt: skip
    config = IdeficsConfig(
        **{field: getattr(text, field) for field in _TEXT},
        vocab_size=regular,
        additional_vocab_size=rows - regular,
        tie_word_embeddings=bool(text.tie_word_embeddings),
        alpha_type="vector" if fusion.gates == "vector" else "float",
        cross_layer_interval=fusion.every,
        qk_layer_norms=fusion.qk_norm,
        use_resampler=bool(perceiver),
        perceiver_config={"use_resampler": bool(perceiver), **perceiver},
        vision_config={
            "embed_dim": vision.hidden_size,
            **{field: getattr(vision, field) for field in pretrained.VISION if field != "hidden_size"},
        },
    )
    with torch.device("meta"):
        stock = IdeficsForVisionText2Text(config)
    for module in stock.modules():  # no checkpoint holds the tables of their angles
        if isinstance(module, IdeficsRotaryEmbedding):
            module.__init__(config)
    with merged(model):
        theirs, ours = stock.model, model.language.model
        share(model.encoder.vision, theirs.vision_model)
        share(ours.layers, theirs.layers)
        share(ours.norm, theirs.norm)
        for mine, block in zip(model.fusion.layers.values(), theirs.gated_cross_attn_layers, strict=True):
            share(mine, block)
        if perceiver:
            theirs.perceiver_resampler.load_state_dict(stock_resampler_names(model.connector.resampler.state_dict()), assign=True)
        for module, more, table in (
            (theirs.embed_tokens, "additional_embedding", model.language.get_input_embeddings().weight.detach()),
            (stock.lm_head, "additional_fc", model.language.get_output_embeddings().weight.detach()),
        ):
            split = {"weight": table[:regular], f"{more}.weight": table[regular:]}
            module.load_state_dict({name: part for name, part in split.items() if len(part)}, assign=True)
        if config.tie_word_embeddings:
            stock.tie_weights()
        stock.to(ours.norm.weight.device)
        yield stock.eval()


def check(model: MultimodalModel) -> None:
    """What the stock class has no form for."""
    system, text, vision = model.system, model.language.config, model.encoder.vision
    fusion, connector, wrong = system.fusion, system.connector, None
    if fusion.block != "idefics":
        wrong = f"blocks of Idefics, these are those of {fusion.block} (open_flamingo's names: mmfast.models.save_flamingo)"
    elif fusion.offset % fusion.every or text.num_hidden_layers % fusion.every:
        wrong = f"a block before layers 0, {fusion.every}, .. of a multiple of them, here offset is {fusion.offset} and layers {text.num_hidden_layers}"
    elif text.model_type != "llama" or text.num_key_value_heads != text.num_attention_heads:
        wrong = f"a LLaMA with as many key heads as heads, this is a {text.model_type} with {text.num_key_value_heads} of {text.num_attention_heads}"
    elif not isinstance(vision, CLIPVisionModel) or model.encoder.skip or _reads_otherwise(model.encoder):
        wrong = "all states of a CLIP tower's last layer, with the class token's"
    elif isinstance(connector, spec.Resampler) and (connector.activation != "relu" or connector.frames):
        wrong = f"a resampler with ReLU and without frames, this one has {connector.activation} and {connector.frames} frames"
    elif getattr(model.language, "is_quantized", False):
        raise ValueError(f"{system.name}: 4-bit weights are not written back; load them with language.quantize=none")
    if wrong:
        raise ValueError(f"{system.name}: IdeficsForVisionText2Text has {wrong}")


# ---------------------------------------------------------------------------------------------------------------- names

# Fields that LLaMA's configuration and Idefics' share.
_TEXT = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "initializer_range", "rms_norm_eps",
    "max_position_embeddings", "rope_parameters", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def _reads_otherwise(tower: Tower) -> bool:
    return len(tower.layers) > 1 or tower.read != len(tower.blocks) or tower.post_norm or tower.unit


def _text_config(config: IdeficsConfig) -> LlamaConfig:
    shared = {field: getattr(config, field) for field in _TEXT}
    return LlamaConfig(**shared, vocab_size=config.vocab_size, tie_word_embeddings=bool(config.tie_word_embeddings))


def _joined(module: nn.Module, more: str) -> Tensor:
    """A table with its additional rows behind it."""
    extra = getattr(module, more, None)
    return module.weight if extra is None else torch.cat([module.weight, extra.weight]).detach()


def _image_token(config: IdeficsConfig, vocab: int) -> int:
    from transformers import AutoTokenizer

    try:
        known = AutoTokenizer.from_pretrained(config.name_or_path).get_vocab() if config.name_or_path else {}
    except Exception:  # no tokenizer, or none that can be read: the tokenizer libraries raise whatever they like
        known = {}
    return known.get(pretrained.IMAGE, vocab - 1)


# A resampler's names here and there; keys and values are one map here.
_RESAMPLER = (
    ("layers.{i}.0.norm_media", "blocks.{i}.0.context_layer_norm"),
    ("layers.{i}.0.norm_latents", "blocks.{i}.0.latents_layer_norm"),
    ("layers.{i}.0.norm_q", "blocks.{i}.0.q_layer_norm"),
    ("layers.{i}.0.norm_k", "blocks.{i}.0.k_layer_norm"),
    ("layers.{i}.0.to_q", "blocks.{i}.0.q_proj"),
    ("layers.{i}.0.to_out", "blocks.{i}.0.output_proj"),
    ("layers.{i}.1.0", "blocks.{i}.1.ln"),
    ("layers.{i}.1.1", "blocks.{i}.1.fc"),
    ("layers.{i}.1.3", "blocks.{i}.1.c_proj"),
    ("norm", "layer_norm"),
)


def resampler_names(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A stock resampler's tensors under the names of ``mmfast.nn.PerceiverResampler``."""
    ours = {}
    for name, tensor in theirs.items():
        if name.endswith(".v_proj.weight"):
            continue
        if name.endswith(".k_proj.weight"):
            values = theirs[name.replace(".k_proj.", ".v_proj.")]
            ours[re.sub(r"blocks\.(\d+)\.0\.k_proj", r"layers.\1.0.to_kv", name)] = torch.cat([tensor, values])
        else:
            ours[_renamed(name, back=False)] = tensor
    return ours


def stock_resampler_names(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back."""
    theirs = {}
    for name, tensor in ours.items():
        if name.endswith(".to_kv.weight"):
            for kind, half in zip("kv", tensor.chunk(2), strict=True):
                theirs[re.sub(r"layers\.(\d+)\.0\.to_kv", rf"blocks.\1.0.{kind}_proj", name)] = half
        else:
            theirs[_renamed(name, back=True)] = tensor
    return theirs


def _renamed(name: str, *, back: bool) -> str:
    number = next((word for word in name.split(".") if word.isdigit()), "")
    for pair in _RESAMPLER:
        old, new = (form.format(i=number) for form in (pair if back else pair[::-1]))
        if name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name
