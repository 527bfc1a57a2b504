"""From a ``System`` to a module: the place where the six choices meet.

Letters: B batch rows, T tokens, M images, N tokens an image, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig

from mmfast import spec
from mmfast.data.chat import IGNORE
from mmfast.losses.lm import token_cross_entropy
from mmfast.models import chameleon, encoder_decoder, pretrained
from mmfast.models.fusions import AdapterFusion, GatedFusion, PrefixFusion, RetrievalFusion, SharedTokensFusion, blocks
from mmfast.models.lavis import load_bert
from mmfast.models.lora import lora_dropouts, lora_parameters
from mmfast.nn.nfresnet import NFResNet
from mmfast.nn.pool import AttentionPool
from mmfast.nn.projector import PooledProjector, Projector, ResampledProjector, TokenProjector
from mmfast.nn.quantizer import VectorQuantize, VectorQuantizer2
from mmfast.nn.query_connector import QueryConnector
from mmfast.nn.vqgan import VQGAN, start_plain


@dataclass
class Output:
    logits: Tensor  # [B, T, V]
    loss: Tensor | None = None


class Tower(nn.Module):
    """One hidden state of a vision tower: pixels ``[M, 3, size, size]`` -> states ``[M, N, D]``, without the class token where ``skip`` is 1.

    ``scales``: hidden states that stand before it on the channels. ``post_norm``: through the norm that CLIP keeps for its class token;
    ``unit``: then of length 1, both for every state.
    """

    def __init__(
        self, vision: nn.Module, *, layer: int, skip: int, scales: Sequence[int] = (), post_norm: bool = False, unit: bool = False
    ):
        super().__init__()
        self.vision, self.layer, self.layers = vision, layer, (*scales, layer)
        self.skip, self.post_norm, self.unit = skip, post_norm, unit
        self.width = vision.config.hidden_size * len(self.layers)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.vision(pixels.to(self.vision.dtype), output_hidden_states=True).hidden_states
        states = torch.cat([hidden[layer] for layer in self.layers], -1)[:, self.skip :]
        if self.post_norm:
            states = self._inner.post_layernorm(states)
        return F.normalize(states, dim=-1) if self.unit else states

    @property
    def _inner(self) -> nn.Module:
        return getattr(self.vision, "vision_model", self.vision)

    @property
    def blocks(self) -> nn.ModuleList:
        encoder = self._inner.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    @property
    def read(self) -> int:
        """How many blocks stand before the highest state that is read; state 0 is what block 0 reads."""
        return max(layer % (len(self.blocks) + 1) for layer in self.layers)

    def last_block(self) -> nn.ModuleList:
        """The last block that is read, and the norm behind it where that is."""
        return nn.ModuleList([*self.blocks[: self.read][-1:], *([self._inner.post_layernorm] if self.post_norm else [])])

    def below(self) -> Iterator[tuple[nn.Parameter, int]]:
        """What stands before the state that is read, and how many layers down: 1 in the last block, one more in each before it, and one more in
        the embeddings."""
        first = [getattr(self._inner, name) for name in ("embeddings", "pre_layrnorm") if hasattr(self._inner, name)]
        for down, part in enumerate([*reversed(self.blocks[: self.read]), nn.ModuleList(first)], 1):
            yield from ((p, down) for p in part.parameters())

    def unread(self) -> Iterator[nn.Parameter]:
        """Parameters behind the hidden state that is read: kept for the checkpoint, out of reach for any gradient."""
        tower = self._inner
        for block in self.blocks[self.read :]:
            yield from block.parameters()
        for name in ("post_layernorm", "layernorm", "head"):  # CLIP and SigLIP, DINOv2, SigLIP's pooling
            if hasattr(tower, name) and not self.post_norm:
                yield from getattr(tower, name).parameters()
        if hasattr(tower.embeddings, "mask_token"):  # DINOv2's own training
            yield tower.embeddings.mask_token


class CodeTower(nn.Module):
    """An image tokenizer as a tower: pixels ``[M, 3, size, size]`` -> the vectors of their codes ``[M, N, D]``, row after row; or with
    ``words``, the token ids ``[K]`` of the codes in a language model's vocabulary, their ids ``[M, N]``. Neither depends on autocast."""

    def __init__(self, vision: VQGAN):
        super().__init__()
        self.vision, self.width = vision, vision.width
        self.register_buffer("words", None, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        if self.words is not None:
            return self.words[self.vision.tokenise(pixels)]
        return self.vision.nearest(self.vision.encode(pixels))[0].flatten(2).transpose(1, 2)

    def unread(self) -> Iterator[nn.Parameter]:
        """None: the decoder is read when the tokenizer trains."""
        yield from ()


class GridTower(nn.Module):
    """A convolutional network as a tower: pixels ``[M, 3, size, size]`` -> its last grid ``[M, N, D]``, all of which is read."""

    def __init__(self, vision: NFResNet):
        super().__init__()
        self.vision, self.width = vision, vision.width

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision(pixels.to(self.vision.stem.weight.dtype))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.vision.blocks

    def unread(self) -> Iterator[nn.Parameter]:
        """None."""
        yield from ()


def _grid_tower(choice: spec.NfResnet, dtype: torch.dtype | None) -> GridTower:
    return GridTower(NFResNet(stem=choice.stem, blocks=choice.blocks, width=choice.width))


def _code_tower(choice: spec.Vqgan, dtype: torch.dtype | None) -> CodeTower:
    if choice.codebook == "ema":
        quantize = VectorQuantize(
            choice.width, choice.codes, decay=choice.decay, threshold_ema_dead_code=choice.dead_below, accept_image_fmap=True,
            commitment_weight=choice.beta, rotation_trick=choice.gradient == "rotation",
        )  # fmt: skip
    else:
        quantize = VectorQuantizer2(choice.codes, choice.width, choice.beta, legacy=choice.legacy, gradient=choice.gradient)
    vq = VQGAN(
        size=choice.size, channels=choice.channels, multipliers=choice.multipliers, blocks=choice.blocks, attention=choice.attention,
        latent=choice.latent, quantize=quantize, groups=choice.groups, dropout=choice.dropout,
    )  # fmt: skip
    return CodeTower(start_plain(vq))


def _tower(choice: spec.Clip | spec.Siglip | spec.Dino | spec.Eva, dtype: torch.dtype | None) -> Tower:
    if choice.weights:
        vision = pretrained.load_tower(choice, dtype)
    else:
        sizes = dict(
            hidden_size=choice.width,
            num_hidden_layers=choice.depth,
            num_attention_heads=choice.heads,
            patch_size=choice.patch,
            image_size=choice.size,
        )
        sizes |= {"mlp_ratio": choice.ffn // choice.width} if isinstance(choice, spec.Dino) else {"intermediate_size": choice.ffn}
        sizes |= {"initializer_range": 0.02} if isinstance(choice, spec.Eva) else {}  # transformers' own is 1e-10
        sizes |= {"hidden_act": choice.activation} if isinstance(choice, spec.Clip) else {}
        kind = pretrained.TOWERS[type(choice)][0]
        vision = kind(kind.config_class(**sizes))
        # A random tower's position embeddings start at a tenth of its patches' size, and it takes long to learn where things are.
        for name, module in vision.named_modules():
            if name.endswith("position_embedding"):
                nn.init.normal_(module.weight, std=0.5)
        if isinstance(choice, spec.Dino):
            nn.init.normal_(vision.embeddings.position_embeddings, std=0.5)
        if isinstance(choice, spec.Eva):
            nn.init.normal_(vision.embeddings.position_embedding, std=0.5)
    own = {name: getattr(choice, name) for name in ("scales", "post_norm", "unit")} if isinstance(choice, spec.Clip) else {}
    return Tower(vision, layer=choice.layer, skip=_skip(choice), **own)


def _skip(choice: spec.Clip | spec.Siglip | spec.Dino | spec.Eva) -> int:
    return 0 if isinstance(choice, spec.Siglip | spec.Eva) else int(not choice.keep_class_token)


def queries(choice: spec.QFormer, width_in: int, width_out: int) -> QueryConnector:
    """A Q-Former's connector, with the layers of its BERT if it has one."""
    connector = QueryConnector(
        width_in, width_out, tokens=choice.tokens, width=choice.width, depth=choice.depth, heads=choice.heads, ffn=choice.ffn,
        every=choice.every, vocab=choice.vocab if choice.reads else None, compares=choice.text, instructed=choice.instructed,
        positions=choice.positions, shared=choice.shared, dropout=choice.dropout, norm_eps=choice.norm_eps, init=choice.init,
    )  # fmt: skip
    if choice.weights:
        load_bert(connector, choice.weights)
    return connector


# Sizes that some families call otherwise than Llama.
_OTHER_NAMES = (
    ("intermediate_size", "ffn_dim"), ("intermediate_size", "d_ff"), ("rms_norm_eps", "layer_norm_eps"), ("rms_norm_eps", "layer_norm_epsilon"),
    ("initializer_range", "init_std"),
)  # fmt: skip


def _language(choice: spec.LanguageModel, tokenizer, dtype: torch.dtype | None) -> nn.Module:
    vocab = choice.vocab if tokenizer is None else len(tokenizer)
    if choice.weights:
        model = pretrained.load_language(choice, dtype)
        pretrained.resize_embeddings(model, vocab)
        return model
    sizes = dict(
        vocab_size=vocab,
        hidden_size=choice.width,
        num_hidden_layers=choice.depth,
        num_attention_heads=choice.heads,
        num_key_value_heads=choice.kv_heads,
        intermediate_size=choice.ffn,
        max_position_embeddings=choice.context,
        rms_norm_eps=choice.norm_eps,
        tie_word_embeddings=choice.tied,
        initializer_range=choice.init,
    )
    if tokenizer is not None:
        sizes |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    if choice.family == "chameleon":
        return chameleon.language(**sizes, swin_norm=choice.norm == "after")
    kind = type(AutoConfig.for_model(choice.family))
    for ours, theirs in _OTHER_NAMES:
        if not hasattr(kind, ours) and hasattr(kind, theirs):
            sizes[theirs] = sizes.pop(ours)
    sizes |= {name: 0.0 for name in ("dropout", "attention_dropout", "dropout_rate") if hasattr(kind, name)}  # a stage's own
    if choice.encodes:  # FlanT5's form (T5 1.1); its weights start as wide as T5's own rule says
        first = sizes.setdefault("pad_token_id", kind.pad_token_id)
        sizes |= dict(
            num_decoder_layers=choice.depth, d_kv=choice.width // choice.heads, feed_forward_proj="gated-gelu", decoder_start_token_id=first
        )
    language = pretrained.new_language(AutoConfig.for_model(choice.family, **sizes))
    if hasattr(language, "start_anew"):
        language.start_anew(choice.init)
    return language


# What builds each kind of choice; a new kind is a class in mmfast.spec and a line here.
ENCODERS = {**dict.fromkeys(pretrained.TOWERS, _tower), spec.Vqgan: _code_tower, spec.NfResnet: _grid_tower}
CONNECTORS = {
    spec.Linear: lambda choice, width_in, width_out: Projector(width_in, width_out),
    spec.Mlp: lambda choice, width_in, width_out: Projector(width_in, width_out, choice.depth),
    spec.Tokens: lambda choice, width_in, width_out: TokenProjector(width_in, width_out, choice.tokens, choice.pool, choice.init),
    spec.AttentionPool: lambda choice, width_in, width_out: AttentionPool(width_in, width_out, choice.tokens, choice.heads),
    spec.Resampler: lambda choice, width_in, width_out: ResampledProjector(
        width_in, width_out, num_latents=choice.tokens, depth=choice.depth, heads=choice.heads, dim_head=choice.head_width,
        activation=choice.activation, qk_norm=choice.qk_norm, max_num_frames=choice.frames or None, interpolate_frames=True,
    ),
    spec.QFormer: queries,
    spec.Pooled: lambda choice, width_in, width_out: PooledProjector(width_in, width_out, choice.hidden, choice.pool),
    spec.NoConnector: lambda choice, width_in, width_out: nn.Identity(),
}  # fmt: skip
# (choice, language model, the tower's width)
FUSIONS = {
    spec.Prefix: lambda choice, language, width: PrefixFusion(),
    spec.AdapterPrompts: lambda choice, language, width: AdapterFusion(choice, language),
    spec.GatedCrossAttention: GatedFusion,
    spec.Retrieval: RetrievalFusion,
    spec.SharedTokens: lambda choice, language, width: SharedTokensFusion(),
}


class MultimodalModel(nn.Module):
    """A system's parts and the way through them.

    The batch is that of the published processors: ``input_ids`` holds one placeholder id for each image token, ``pixel_values`` the images in
    reading order. A frozen tower's states may come in place of pixels (``image_states``), or the connector's output when that is frozen too
    (``image_embeds``): both are worth computing once. Rows that show the same image share it through ``image_rows``.
    """

    def __init__(
        self, system: spec.System, encoder: nn.Module, connector: nn.Module, language: nn.Module, *, image_token: int,
        new_tokens: Sequence[int] = (),
    ):  # fmt: skip
        """``new_tokens``: ids of ``system.added_tokens``, the rows that the part of this name trains."""
        super().__init__()
        self.system, self.image_token, self.new_tokens = system, image_token, tuple(new_tokens)
        self.encoder, self.connector, self.language = encoder, connector, language
        self.fusion = FUSIONS[type(system.fusion)](system.fusion, language, encoder.width)
        if isinstance(self.fusion, SharedTokensFusion):  # its tower speaks the language model's tokens; before the codes come begin and end
            encoder.words = torch.tensor(self.new_tokens[2:])
        self.text_only = False  # logits as Chameleon's stock class gives them, codes of pictures out of reach
        self._trained: tuple[str, ...] = ()
        self._lora = False
        self._masks: list = []  # handles of the hooks on partly trained weights
        self._dropouts: list = []
        self.train_only(())

    # -- which parts learn

    def part(self, name: str) -> nn.Module:
        parts = {
            "encoder": self.encoder,
            **({"last_block": self.encoder.last_block()} if hasattr(self.encoder, "last_block") else {}),
            "connector": self.connector,
            "adapter": self.fusion,  # what a fusion has to learn: gated prompts, gated blocks
            **({"queries": self.connector} if isinstance(self.connector, QueryConnector) else {}),  # what of it, train_only says
            "language": self.language,
            "embeddings": self.language.get_input_embeddings(),
            # Their rows of the embeddings and of the head, which may be the same.
            "new_tokens": nn.ModuleList([self.language.get_input_embeddings(), self.language.get_output_embeddings()]),
        }
        if name not in parts:
            raise ValueError(f"{self.system.name}: unknown part {name!r}{spec.nearest(name, parts)}, expected some of {', '.join(parts)}")
        return parts[name]

    def train_only(self, parts: Sequence[str], *, lora: bool = False) -> list[nn.Parameter]:
        """Let exactly these parts learn, and the adapters with ``lora``; returns their parameters. All else is frozen, in evaluation mode.

        ``language`` holds its embeddings. Tower blocks behind the state that is read stay frozen: no gradient can reach them; nor can any reach a
        Q-Former's text side from a language model, or its projection from ``queries``. What learns is held in fp32, whatever the precision of
        the rest.
        """
        modules = [self.part(name) for name in parts]
        if "language" in parts and getattr(self.language, "is_quantized", False):
            raise ValueError(
                f"{self.system.name}: the language model is held in 4 bits and cannot learn itself; train adapters over it (lora)"
            )
        self.requires_grad_(False)
        for module in modules:
            module.float().requires_grad_(True)
        adapters = lora_parameters(self)
        if lora and not adapters:
            raise ValueError(f"{self.system.name}: adapters are to train, and none were added (mmfast.models.add_lora)")
        for parameter in adapters:
            parameter.requires_grad_(lora)
        for parameter in self.unread(parts):
            parameter.requires_grad_(False)
        self._trained, self._lora = tuple(parts), lora
        self._mask_old_rows()
        self.train(self.training)
        return [p for p in self.parameters() if p.requires_grad]

    def unread(self, parts: Sequence[str]) -> Iterator[nn.Parameter]:
        """Parameters of tower and connector that stages which train ``parts`` do not read: no gradient can reach them."""
        yield from self.encoder.unread()
        if isinstance(self.connector, QueryConnector):
            yield from self.connector.unread(compared="queries" in parts)

    def partly_trained(self) -> list[nn.Parameter]:
        """Weights of which only the rows of ``new_tokens`` learn."""
        if "new_tokens" not in self._trained or {"language", "embeddings"} & set(self._trained):
            return []
        return list(self.part("new_tokens").parameters())

    @torch.no_grad()
    def level_new_rows(self) -> None:
        """Gives the input embeddings of ``new_tokens`` the mean norm of the rows before them (FROMAGe, arXiv:2301.13823, its released code)."""
        table = self.language.get_input_embeddings().weight
        mean = table[: min(self.new_tokens)].norm(dim=1).mean()
        for row in self.new_tokens:
            table[row] *= mean / table[row].norm()

    def _mask_old_rows(self) -> None:
        while self._masks:
            self._masks.pop().remove()
        for parameter in self.partly_trained():
            if not self.new_tokens:
                raise ValueError(f"{self.system.name}: new_tokens are to train, and its choices add no token")
            rows = torch.tensor(self.new_tokens)

            def new_rows_alone(gradient: Tensor) -> Tensor:
                at = rows.to(gradient.device)
                return torch.zeros_like(gradient).index_copy(0, at, gradient[at])

            self._masks.append(parameter.register_hook(new_rows_alone))

    def drop(self, rate: float) -> None:
        """Dropout of what each attention and each feed-forward layer of the language model adds, while that trains, and with Kosmos' of all that
        its code drops; 0: none."""
        while self._dropouts:
            self._dropouts.pop().remove()
        if hasattr(self.language, "drop"):
            self.language.drop(rate)
            if isinstance(self.connector, AttentionPool):
                self.connector.x_attn.dropout = rate
            return
        for layer in self.blocks if rate else ():
            adds = [module for name, module in layer.named_modules() if name in ("self_attn.o_proj", "mlp.down_proj")]
            if len(adds) != 2:
                raise ValueError(
                    f"{self.system.name}: dropout is put behind o_proj and down_proj, which {type(layer).__name__} has not; set it to 0"
                )
            self._dropouts += [m.register_forward_hook(lambda m, _, out: F.dropout(out, rate, m.training)) for m in adds]

    @property
    def blocks(self) -> list[nn.Module]:
        """The units that a sharded step gathers one at a time: the language model's layers, and what a fusion puts between them."""
        return [*blocks(self.language), *getattr(self.fusion, "blocks", ())]

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that learn."""
        return [name for name, p in self.named_parameters() if p.requires_grad]

    @property
    def encoder_learns(self) -> bool:
        """Whether the tower's states change in training: itself, or adapters in it. Otherwise they may be computed once."""
        return any(p.requires_grad for p in self.encoder.parameters())

    def train(self, mode: bool = True) -> MultimodalModel:
        super().train(False)  # dropout in a frozen part would blur what the others learn from
        self.training = mode
        for name in self._trained:
            self.part(name).train(mode)
        # transformers recomputes a layer's activations only while that layer trains, and a frozen one that gradients pass keeps as many.
        # A layer that drops out by itself (OPT's) stays as it is.
        for layer in (*self.language.modules(), *(self.encoder.modules() if self.encoder_learns else ())):
            if getattr(layer, "gradient_checkpointing", False) and not isinstance(getattr(layer, "dropout", None), float):
                layer.training = mode
        for dropout in lora_dropouts(self):  # also those inside a part that trains while its adapters do not
            dropout.train(mode and self._lora)
        return self

    def checkpoint_activations(self) -> None:
        """Recompute activations in backward instead of keeping them: in the language model, and in the tower where it learns."""
        for part in (self.language, self.encoder.vision):
            if isinstance(part, VQGAN):  # frozen beside a language model it keeps nothing; its own stage says that it cannot
                continue
            again = {"context_fn": self.fusion.recomputing} if part is self.language and hasattr(self.fusion, "recomputing") else {}
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **again})
        if hasattr(self.fusion, "checkpoint_activations"):
            self.fusion.checkpoint_activations()
        self.train(self.training)

    # -- forward

    def with_slots(self, input_ids: Tensor, images: dict[str, Tensor | None]) -> Tensor:
        """Token ids with the placeholder in every image place. ``images`` may name these by ``image_embeds_position_mask`` [B, T] (Kosmos-2's
        processor, whose ids there mean nothing), which is taken out of it."""
        mask = images.pop("image_embeds_position_mask", None)
        return input_ids if mask is None else input_ids.masked_fill(mask.bool(), self.image_token)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """pixels [M, 3, H, W] -> the tower's states [M, N, D_tower], without a graph when the tower is frozen; videos [M, F, 3, H, W], each one
        medium to the connector, -> [M, F, N, D_tower]."""
        with nullcontext() if self.encoder_learns else torch.no_grad():
            if pixel_values.dim() == 5:
                return self.encoder(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])
            return self.encoder(pixel_values)

    def embed_images(
        self,
        pixel_values: Tensor | None = None,
        image_states: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_rows: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        image_frames: Tensor | None = None,
    ) -> Tensor | object | None:
        """Whichever form the images come in -> what the language model sees, [M, N, D]; ``image_rows`` [R] picks and repeats: [R, N, D].

        With ``image_attention_mask`` [B, T, I] (Idefics) row b has images of its own, pixel_values [B, I, 3, H, W] or the other forms [B I, ..],
        and the mask says which of them a position sees, whatever its tokens are; the fusion takes what is returned.

        With ``image_frames`` [M] the pixels or states are those of frames end to end, and picture m is a video of so many (a picture: of 1).

        ``qformer_input_ids`` [R, S], with its mask: a question beside every picture, as often as it is shown (``spec.QFormer.instructed``).
        """
        if qformer_input_ids is not None and not getattr(self.connector, "instructed", False):
            raise ValueError(
                f"{self.system.name}: qformer_input_ids are read by a connector QFormer with instructed, and this one has none"
            )
        if image_attention_mask is not None and not hasattr(self.fusion, "by_mask"):
            raise ValueError(
                f"{self.system.name}: image_attention_mask is read by gated cross-attention, not by {type(self.system.fusion).__name__}"
            )
        if image_frames is not None and not self.system.clips:
            raise ValueError(
                f"{self.system.name}: image_frames are read by a connector Resampler with frames, and this one has none; give each frame a place"
            )
        if image_attention_mask is not None and pixel_values is not None and pixel_values.dim() == 5:
            pixel_values = pixel_values.flatten(0, 1)
        if image_embeds is None:
            if image_states is None and pixel_values is not None:
                image_states = self.encode(pixel_values)
            if image_states is not None:
                learned = next(self.connector.parameters(), image_states)  # a connector of nothing takes states as they are
                beside = ()
                if qformer_input_ids is not None:
                    beside = (qformer_input_ids, qformer_attention_mask)
                    image_states, image_rows = image_states if image_rows is None else image_states[image_rows], None
                image_states = image_states.to(learned.dtype)
                image_embeds = self.connector(image_states, *beside) if image_frames is None else self._clips(image_states, image_frames)
        if image_embeds is None:
            return None
        image_embeds = image_embeds if image_rows is None else image_embeds[image_rows]
        return image_embeds if image_attention_mask is None else self.fusion.by_mask(image_embeds, image_attention_mask)

    def _clips(self, states: Tensor, frames: Tensor) -> Tensor:
        """States of all frames end to end, [F, N, D_tower], so many of each picture [M] -> [M, L, D]; those of as many frames at once."""
        parts = states.split(frames.tolist())
        embeds: list[Tensor] = [states] * len(parts)
        for count in {len(part) for part in parts}:
            at = [m for m, part in enumerate(parts) if len(part) == count]
            for m, made in zip(at, self.connector(torch.stack([parts[m] for m in at])), strict=True):
                embeds[m] = made
        return torch.stack(embeds)

    def targets(self, labels: Tensor, input_ids: Tensor, image_embeds: Tensor | None = None, image_rows: Tensor | None = None) -> Tensor:
        """Labels [B, T] with a picture's own tokens where a label is the placeholder, which only those of shared tokens may be."""
        if image_embeds is None or not isinstance(self.fusion, SharedTokensFusion):
            return labels
        ids = self.fusion.tokens(input_ids, self.embed_images(image_embeds=image_embeds, image_rows=image_rows), self.image_token)
        return labels.where(labels != self.image_token, ids)

    def without_codes(self, logits: Tensor, value: float = -torch.inf) -> Tensor:
        """Logits [..., V] with ``value`` for the codes of pictures, which no text has; as they are where a model has none."""
        words = getattr(self.encoder, "words", None)
        return logits if words is None else logits.index_fill(-1, words.to(logits.device), value)

    @property
    def stops(self) -> tuple[int, ...]:
        """What ends a text beside its own end, where text alone is asked for: of a model that draws the token that begins a picture."""
        return self.new_tokens[:1] if isinstance(self.fusion, SharedTokensFusion) else ()

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model reads a row up to its first label and says the rest (``mmfast.models.encoder_decoder``)."""
        return encoder_decoder.is_encoder_decoder(self.language.config)

    def hidden(
        self, input_ids: Tensor, *, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, labels: Tensor | None = None,
        **images: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Last hidden states [B, T, D]; ``images`` as for ``embed_images``. ``labels`` [B, T] tell an encoder-decoder where its rows are cut (None:
        they are prompts); a causal model needs none.

        Without ``attention_mask`` padding must be on the right: under the causal mask no real token sees it, so no mask is needed.
        ``position_ids`` that start anew keep rows apart that lie end to end in one. An encoder-decoder reads all of a prompt, its padding too unless
        the mask says where it is, and has no such ``position_ids``.
        """
        input_ids = self.with_slots(input_ids, images)
        if self.is_encoder_decoder and position_ids is not None:
            raise ValueError(
                f"{self.system.name}: position_ids keep rows apart that lie end to end, which {self.language.config.model_type} cannot; leave packing off"
            )
        if position_ids is None and attention_mask is not None:  # counted from the first token that is real
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = (places - attention_mask.long().argmax(-1, keepdim=True)).clamp_min(0)
        masks = {k: v for k, v in (("attention_mask", attention_mask), ("position_ids", position_ids)) if v is not None}
        if self.is_encoder_decoder and labels is not None:
            masks["cut"] = cut = encoder_decoder.cuts(labels)
            masks["most"] = encoder_decoder.steps(labels, cut)
            said = torch.arange(input_ids.shape[1], device=input_ids.device) >= cut[:, None]
            if (said & (input_ids == self.image_token)).any():
                raise ValueError(
                    f"{self.system.name}: a picture stands behind the first word that is learnt, and {self.language.config.model_type} reads pictures "
                    "in its encoder alone; put them before it (a question, a caption behind its picture), or take a causal language model"
                )
        return self.fusion(self.language, input_ids, self.embed_images(**images), self.image_token, use_cache=False, **masks)[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
        total: Tensor | float | None = None,
        **images: Tensor | None,
    ) -> Output:
        """input_ids, attention_mask, position_ids, labels, token_weights [B, T]; pixel_values [M, 3, H, W], or one of ``embed_images``' other forms.

        The loss is the weighted mean over scored tokens, labels shifted inside (``mmfast.losses.token_cross_entropy``). With an encoder-decoder
        input_ids are what its encoder reads and labels, token_weights [B, S] what its decoder says, as for the stock classes; logits are [B, S, V]
        (without labels those of the first token, [B, 1, V]).
        """
        input_ids = self.with_slots(input_ids, images)
        seen = self.embed_images(pixel_values, **images)
        if self.is_encoder_decoder:
            return self._said(input_ids, attention_mask, labels, token_weights, total, seen)
        hidden = self.hidden(input_ids, attention_mask=attention_mask, position_ids=position_ids, image_embeds=seen)
        labels = labels if labels is None else self.targets(labels, input_ids, seen)
        logits = self.language.get_output_embeddings()(hidden)
        if self.text_only:
            logits = self.without_codes(logits, torch.finfo(logits.dtype).min)
        loss = None if labels is None else token_cross_entropy(logits, labels, token_weights=token_weights, total=total)
        return Output(logits, loss)

    def _said(
        self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, weights: Tensor | None, total: Tensor | float | None,
        seen: Tensor | None,
    ) -> Output:  # fmt: skip
        """``forward`` of an encoder-decoder: what is read and what is said as one row, which is cut there again."""
        said = input_ids[:, :0] if labels is None else labels.where(labels != IGNORE, self.language.config.pad_token_id)
        ids, cut = torch.cat([input_ids, said], 1), torch.cat([torch.full_like(input_ids, IGNORE), said], 1)
        mask = None if attention_mask is None else torch.cat([attention_mask, torch.ones_like(said)], 1)
        hidden = self.hidden(ids, attention_mask=mask, labels=cut, image_embeds=seen)[:, input_ids.shape[1] - 1 :]
        logits = self.language.get_output_embeddings()(hidden)
        if labels is None:
            return Output(logits)
        labels, weights = F.pad(labels, (1, 0), value=IGNORE), None if weights is None else F.pad(weights, (1, 0))
        return Output(logits[:, :-1], token_cross_entropy(logits, labels, token_weights=weights, total=total))

    def generate(self, input_ids: Tensor, **kwargs) -> Tensor:
        """See ``mmfast.models.generate``."""
        from mmfast.models.generate import generate

        return generate(self, input_ids, **kwargs)

    def steps(self, input_ids: Tensor, **kwargs) -> Iterator[Tensor]:
        """``generate``, token by token."""
        from mmfast.models.generate import steps

        return steps(self, input_ids, **kwargs)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` as the published class of transformers names them."""
        from mmfast.models.published import save_pretrained

        save_pretrained(self, path)


def refit(model: MultimodalModel, system: spec.System, tokenizer=None) -> MultimodalModel:
    """A whole model for what a system asks of it anew (``pretrained.taken``), all parts frozen. Tokens that only the tokenizer has get rows of
    random numbers, as Kosmos-2's places over Kosmos-1."""
    if side := getattr(system.encoder, "interpolate", 0):
        pretrained.interpolated(model.encoder.vision, side)
    if isinstance(model.connector, QueryConnector):
        model.connector.instructed = system.connector.instructed
    model.system = replace(model.system, encoder=system.encoder, connector=system.connector, image=system.image, regions=system.regions)
    if tokenizer is not None:
        pretrained.resize_embeddings(model.language, len(tokenizer), init=system.language.init)
        model.image_token = pretrained.placeholder(system, tokenizer)
        model.new_tokens = tuple(dict.fromkeys((*model.new_tokens, *tokenizer.convert_tokens_to_ids(list(system.added_tokens)))))
    model.train_only(())
    return model


def build(system: spec.System, *, tokenizer=None, tiny: bool = False, dtype: torch.dtype | None = None) -> MultimodalModel:
    """The module of a system, all parts frozen. Its ``system`` has the sizes of the weights that were read.

    Args:
        tokenizer: decides the vocabulary's size and the id of ``<image>``, which must be among its tokens; with weights, give
            ``tokenizer_for(system)``. Without one the vocabulary is the recipe's and its last id the placeholder.
        tiny: shrink the system first (``mmfast.models.tiny``).
        dtype: of tower and language model that are read from weights (default fp32); a part that ``train_only`` names becomes fp32.
    """
    if tiny:
        from mmfast.models.tiny import tiny as shrink

        system = shrink(system)
    for table, choice in ((ENCODERS, system.encoder), (CONNECTORS, system.connector), (FUSIONS, system.fusion)):
        if type(choice) not in table:
            known = ", ".join(kind.__name__ for kind in table)
            raise ValueError(f"{system.name}: nothing builds a {type(choice).__name__}, expected one of {known}")
    if wrong := spec.misfits(system) or spec.misfits(system := pretrained.resolved(system), read=True):
        raise ValueError(f"{system.name}: {wrong[0]}")
    if tokenizer is not None and (tokenizer.convert_tokens_to_ids("<image>") in (None, tokenizer.unk_token_id)):
        raise ValueError(f"{system.name}: the tokenizer has no <image> token (mmfast.models.tokenizer_for adds it)")
    if system.weights:
        from mmfast.models.published import from_pretrained

        model = refit(from_pretrained(system.weights, dtype=dtype), system)
        model.system, model.text_only = system, False
        if tokenizer is not None:
            pretrained.resize_embeddings(model.language, len(tokenizer))
            model.image_token = pretrained.placeholder(system, tokenizer)
        return model
    if tokenizer is None:  # the added tokens come last, and the placeholder before them
        vocab, count = system.language.vocab, len(system.added_tokens)
        image_token, new_tokens = vocab - count - 1, list(range(vocab - count, vocab))
    else:
        image_token = pretrained.placeholder(system, tokenizer)
        new_tokens = tokenizer.convert_tokens_to_ids(list(system.added_tokens))
    if isinstance(system.fusion, spec.GatedCrossAttention):  # <image> is read by the language model, and new to it
        new_tokens = [image_token, *new_tokens]
    encoder, language = ENCODERS[type(system.encoder)](system.encoder, dtype), _language(system.language, tokenizer, dtype)
    table, choice = language.get_input_embeddings(), system.connector
    if isinstance(choice, spec.QFormer) and not choice.vocab:  # its words are the language model's
        choice = replace(choice, vocab=table.num_embeddings)
    # What is read between the layers stays in the tower's width; what is in the sequence has the language model's.
    gated = isinstance(system.fusion, spec.GatedCrossAttention)
    connector = CONNECTORS[type(choice)](choice, encoder.width, None if gated else table.embedding_dim)
    return MultimodalModel(system, encoder, connector, language, image_token=image_token, new_tokens=new_tokens)
