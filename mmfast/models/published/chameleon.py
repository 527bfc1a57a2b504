"""Chameleon: ``ChameleonForConditionalGeneration``, whose pictures are codes of a tokenizer that it holds without a decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from mmfast import spec
from mmfast.models import chameleon
from mmfast.models.build import CodeTower, MultimodalModel
from mmfast.models.lora import merged
from mmfast.models.pretrained import IMAGE, check_head, language_sizes
from mmfast.nn.quantizer import VectorQuantizer2
from mmfast.nn.vqgan import VQGAN, published_state

STOCK = ChameleonForConditionalGeneration


class READER(ChameleonForConditionalGeneration):
    """The stock class as it is read: its image tokenizer in fp32 whatever the rest is held in, since rounded weights give a picture other codes."""

    _keep_in_fp32_modules_strict = {"vqmodel"}


def system_of(config: ChameleonConfig, name: str) -> spec.System:
    """The choices that a stock Chameleon's configuration stands for."""
    vq = config.vq_config
    for field, only in (("attn_type", "vanilla"), ("double_latent", False), ("in_channels", 3)):
        if getattr(vq, field) != only:
            raise ValueError(f"{name}: vq_config.{field} is {getattr(vq, field)!r}, expected {only!r}")
    check_head(config, name)
    system = spec.System(
        name=Path(name).name,
        paper="arXiv:2405.09818",
        encoder=spec.Vqgan(
            size=vq.resolution,
            channels=vq.base_channels,
            multipliers=tuple(vq.channel_multiplier),
            blocks=vq.num_res_blocks,
            attention=tuple(vq.attn_resolutions or ()),
            latent=vq.latent_channels,
            width=vq.embed_dim,
            codes=vq.num_embeddings,
            dropout=vq.dropout,
        ),
        connector=spec.NoConnector(),
        fusion=spec.SharedTokens(),
        language=language_sizes(spec.LanguageModel(weights=None), config),
        image=spec.Fixed(size=vq.resolution, mean=(0.5,) * 3, std=(0.5,) * 3),
    )
    if missing := [token for token in (IMAGE, *system.added_tokens) if token not in (config.vocabulary_map or {})]:
        raise ValueError(f"{name}: vocabulary_map has no {missing[0]}, which a picture of {vq.num_embeddings} codes needs")
    return system


def from_stock(stock: ChameleonForConditionalGeneration, name: str = "chameleon") -> MultimodalModel:
    """Take the parts out of a stock Chameleon; weights are shared with it, not copied, but for a tokenizer in half precision, which becomes fp32.
    As there, logits put codes of pictures out of reach, so a loss is one of text; ``text_only = False`` gives them back, to learn or score pictures.
    The tokenizer reads pictures and cannot draw them: ``add_decoder`` puts that half in, from the original tokenizer checkpoint."""
    system = system_of(stock.config, name)
    with torch.device("meta"):  # only the shells; their insides are the checkpoint's
        language = chameleon.without_pictures(ChameleonForConditionalGeneration(stock.config))
        vq = tokenizer_of(system.encoder, decoder=False)
    for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
        setattr(language.model, part, getattr(stock.model, part))
    language.set_output_embeddings(stock.lm_head)
    with torch.no_grad():
        state = {n: p if p.element_size() > 2 else p.float() for n, p in stock.model.vqmodel.state_dict(keep_vars=True).items()}
        vq.load_state_dict(state, assign=True)
    words = stock.config.vocabulary_map
    model = MultimodalModel(
        system, CodeTower(vq), torch.nn.Identity(), language, image_token=words[IMAGE], new_tokens=[words[t] for t in system.added_tokens]
    ).eval()
    model.text_only = True
    return model


def tokenizer_of(choice: spec.Vqgan, *, decoder: bool) -> VQGAN:
    """Chameleon's tokenizer of these sizes."""
    return VQGAN(
        size=choice.size, channels=choice.channels, multipliers=choice.multipliers, blocks=choice.blocks, attention=choice.attention,
        latent=choice.latent, quantize=VectorQuantizer2(choice.codes, choice.width), groups=choice.groups, dropout=choice.dropout, decoder=decoder,
    )  # fmt: skip


@contextmanager
def as_stock(model: MultimodalModel) -> Iterator[ChameleonForConditionalGeneration]:
    """The model's parts in a stock Chameleon that gives the same logits of text; adapters are folded in meanwhile, and the half of the
    tokenizer that draws is left out."""
    system, choice, config = model.system, model.system.encoder, copy.deepcopy(model.language.config)
    if config.model_type != "chameleon":
        raise ValueError(f"{system.name}: the stock class has a decoder of family chameleon, this one is {config.model_type}")
    if choice.groups != 32:
        raise ValueError(f"{system.name}: the stock class normalises in 32 groups, encoder.groups is {choice.groups}")
    config.vocabulary_map = {
        **(config.vocabulary_map or {}), IMAGE: model.image_token, **dict(zip(system.added_tokens, model.new_tokens, strict=True)),
    }  # fmt: skip
    config.image_token_id = model.image_token
    config.vq_config = type(config.vq_config)(
        embed_dim=choice.width, num_embeddings=choice.codes, latent_channels=choice.latent, resolution=choice.size,
        base_channels=choice.channels, channel_multiplier=list(choice.multipliers), num_res_blocks=choice.blocks,
        attn_resolutions=list(choice.attention) or None, dropout=choice.dropout,
    )  # fmt: skip
    with torch.device("meta"):
        stock = ChameleonForConditionalGeneration(config)
    vq = model.encoder.vision
    state = {k: v for k, v in vq.state_dict(keep_vars=True).items() if not k.startswith(("decoder.", "quantize."))}
    stock.model.vqmodel.load_state_dict({**state, "quantize.embedding.weight": vq.codebook}, assign=True)
    with merged(model):
        for part in ("embed_tokens", "layers", "norm", "rotary_emb"):
            setattr(stock.model, part, getattr(model.language.model, part))
        stock.lm_head = model.language.get_output_embeddings()
        yield stock


def add_decoder(model: MultimodalModel, state: dict[str, torch.Tensor]) -> None:
    """Let a published Chameleon draw: the whole tokenizer from its original checkpoint's dictionary (``{"state_dict": ..}`` or its inside),
    in place of the half that a stock folder holds.

    Raises:
        ValueError: names or shapes that are not those of this tokenizer, or codes that are not those that the model reads.
    """
    whole, own = tokenizer_of(model.system.encoder, decoder=True), model.encoder.vision
    try:
        whole.load_state_dict(published_state(state))
    except RuntimeError as error:
        raise ValueError(f"{model.system.name}: this is no tokenizer of its sizes: {str(error).splitlines()[1].strip()}") from error
    stored = (own.codebook.dtype, torch.bfloat16, torch.float16)  # what the folder may have rounded its codes to
    if not any(torch.equal(whole.codebook.to(own.codebook.device, kind).to(own.codebook), own.codebook) for kind in stored):
        raise ValueError(f"{model.system.name}: this tokenizer has other codes than the model reads")
    model.encoder.vision = whole.to(own.codebook).requires_grad_(False).eval()
