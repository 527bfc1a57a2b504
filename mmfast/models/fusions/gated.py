"""Gated cross-attention before some layers. Letters: B batch, S positions of a row, R pictures, L latents of a picture, E their width, T most
pictures of a row, D width of the language model, Q sequences (rows, or more where they are laid end to end).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mmfast import spec
from mmfast.models.fusions.prefix import blocks, run_decoder, starts
from mmfast.models.pretrained import language_sizes
from mmfast.nn.gated import GatedCrossAttention
from mmfast.nn.idefics import IdeficsGatedBlock, media_times

# Language models whose layers are known to take and give hidden states alone, so that a block can stand before each.
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "mpt", "opt", "qwen2", "qwen3")

# Whose block: (choice, width of the latents, the language model's sizes) -> module(x [B, S, D], media [B, T, L, E], text_time=[B, S]).
BLOCKS = {
    "flamingo": lambda choice, dim_visual, sizes: GatedCrossAttention(
        dim=sizes.width, dim_visual=dim_visual, dim_head=choice.head_width, heads=choice.heads, activation=choice.activation,
        only_attend_immediate_media=choice.immediate,
    ),
    "idefics": lambda choice, dim_visual, sizes: IdeficsGatedBlock(
        dim=sizes.width, dim_visual=dim_visual, heads=sizes.heads, inner=sizes.ffn, eps=sizes.norm_eps, qk_norm=choice.qk_norm,
        gates=choice.gates,
    ),
}  # fmt: skip


@dataclass
class MediaByRow:
    """Latents of each row's pictures in reading order, ``[B, T, L, E]``, 0 behind its last, and their number ``[B]``."""

    latents: Tensor
    count: Tensor

    def spread(self, count: int) -> "MediaByRow":
        """Each row ``count`` times."""
        return MediaByRow(self.latents.repeat_interleave(count, 0), self.count.repeat_interleave(count, 0))


@dataclass
class MediaByMask:
    """Latents of each row's pictures ``[B, T, L, E]``, and who sees which as text times (``mmfast.nn.idefics.media_times``), each ``[B, S]``, or
    ``[B, 1]`` for all that comes."""

    latents: Tensor
    times: list[Tensor]

    def spread(self, count: int) -> "MediaByMask":
        """Each row ``count`` times."""
        return MediaByMask(self.latents.repeat_interleave(count, 0), [time.repeat_interleave(count, 0) for time in self.times])


@dataclass
class _Seen:
    """What the blocks of one forward pass read: ``text_time`` [B, S], pictures at or before a position that it may see. Where sequences lie
    end to end and see all their pictures, ``place`` [Q, longest] has each one's positions among all ``B S`` and ``real`` says which are its
    own; media and text_time are then those of the sequences."""

    media: Tensor
    text_time: Tensor
    place: Tensor | None = None
    real: Tensor | None = None


class GatedFusion(nn.Module):
    """Gated cross-attention blocks before layers of a live causal language model (Flamingo, arXiv:2204.14198, section 2.3).

    Nothing of the language model changes: its modules, names and weights stay, and without this fusion it computes what it did. A block runs
    in a hook before its layer, on what the layer is about to read; with gates at 0, where they start, that is what the layer gets, bit for bit.
    Layer i has a block where ``(i + offset) % every == 0``.

    A picture takes one place in the sequence, that of its ``<image>`` token, which is a token like any other to the language model and already
    sees its picture. From there to the next, text sees that picture (``immediate``), or all so far of its own sequence; text before the
    first sees none and gets exactly 0, though the gated feed-forward still applies.

    Keys: ``layers.{i}``, i counted in the language model, with the names of ``mmfast.nn.GatedCrossAttention``. ``mmfast.models.flamingo``
    reads those of OpenFlamingo.
    """

    def __init__(self, choice: spec.GatedCrossAttention, language: nn.Module, width: int):
        """``width``: E."""
        super().__init__()
        layers, family = blocks(language), language.config.model_type
        if family not in FAMILIES:
            raise ValueError(f"GatedCrossAttention: no block is known to fit before a layer of {family}; known are {', '.join(FAMILIES)}")
        places = [i for i in range(len(layers)) if (i + choice.offset) % choice.every == 0]
        if not places:
            raise ValueError(
                f"GatedCrossAttention: every={choice.every} and offset={choice.offset} name none of the language model's {len(layers)} layers"
            )
        if choice.block not in BLOCKS:
            raise ValueError(f"GatedCrossAttention: nothing builds block {choice.block!r}, expected one of {', '.join(map(repr, BLOCKS))}")
        self.width, self.immediate = width, choice.immediate
        sizes = language_sizes(spec.LanguageModel(weights=None), language.config)
        self.layers = nn.ModuleDict({str(i): BLOCKS[choice.block](choice, width, sizes) for i in places})
        self._now: _Seen | None = None
        for i in places:
            layers[i].register_forward_pre_hook(partial(self._before, str(i)), with_kwargs=True)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers.values())

    def checkpoint_activations(self) -> None:
        """Recompute the blocks' activations in backward."""
        for block in self.blocks:
            block.checkpointing = True

    def forward(
        self, language: nn.Module, input_ids: Tensor, image_embeds: Tensor | MediaByRow | None, image_token: int, **kwargs
    ) -> tuple[Tensor, object]:
        """As for ``PrefixFusion``, with image_embeds [R, L, E] of as many pictures as the batch has ``<image>`` tokens."""
        cu_seqlens = None
        if kwargs.get("attention_mask") is None and kwargs.get("position_ids") is not None:
            cu_seqlens = starts(kwargs["position_ids"].expand(input_ids.shape))
        seen = self._see(input_ids, image_embeds, image_token, cu_seqlens)
        with _Showing(self, seen):
            return run_decoder(language, language.get_input_embeddings()(input_ids), **kwargs)

    def carry(self, input_ids: Tensor, image_embeds: Tensor | MediaByRow | None, image_token: int) -> MediaByRow | None:
        """What steps after this one need of the images: each row's, all of which it has now shown."""
        if isinstance(image_embeds, MediaByMask):  # what comes sees what the last position saw
            return MediaByMask(image_embeds.latents, [time[:, -1:] for time in image_embeds.times])
        return None if image_embeds is None else self._by_row(input_ids, image_embeds, image_token)

    def by_mask(self, image_embeds: Tensor, mask: Tensor) -> MediaByMask:
        """Pictures [B T, L, E] that the positions of a mask [B, S, T] see, in place of ``<image>`` tokens: of any pattern, which costs a pass
        over what is visible for each picture of the position that sees most (``mmfast.nn.idefics.media_attention``)."""
        if not all(isinstance(block, IdeficsGatedBlock) for block in self.blocks):
            raise ValueError("image_attention_mask is read by Idefics' blocks; those of Flamingo go by <image> tokens")
        if mask.dim() != 3 or len(image_embeds) != mask.shape[0] * mask.shape[2]:
            raise ValueError(f"expected image_attention_mask [B, S, T] for {len(image_embeds)} = B T images, got {list(mask.shape)}")
        return MediaByMask(image_embeds.unflatten(0, (mask.shape[0], -1)), media_times(mask))

    def recomputing(self) -> tuple[nullcontext, "_Showing"]:
        """torch.utils.checkpoint's ``context_fn``: a layer that is computed again reads what it read. (Hooks are within what is computed again
        in some versions of transformers, and not in others.)"""
        return nullcontext(), _Showing(self, self._now)

    # -- who sees what

    def _see(self, input_ids: Tensor, images: Tensor | MediaByRow | None, image_token: int, cu_seqlens: Tensor | None) -> _Seen:
        rows, length = input_ids.shape
        if images is None:
            return _Seen(torch.zeros(rows, 0, 1, self.width, device=input_ids.device), torch.zeros_like(input_ids))
        if isinstance(images, MediaByRow):  # a token <image> that the model itself says shows nothing
            return _Seen(images.latents, images.count[:, None].expand(-1, length))
        if isinstance(images, MediaByMask):
            return _Seen(images.latents, [time.expand(-1, length) for time in images.times])
        is_image = input_ids == image_token
        if cu_seqlens is None:
            return _Seen(self._by_row(input_ids, images, image_token).latents, is_image.cumsum(-1))
        if self.immediate:
            before = torch.cat([is_image.new_zeros(1, dtype=torch.long), is_image.flatten().cumsum(0)])
            first = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=input_ids.numel())
            own = (before[1:] - before[first]).view_as(input_ids)  # pictures of the sequence so far
            return _Seen(self._by_row(input_ids, images, image_token).latents, torch.where(own > 0, is_image.cumsum(-1), 0))
        lengths, at = cu_seqlens.diff(), torch.arange(int(cu_seqlens.diff().max()), device=input_ids.device)
        real = at < lengths[:, None]
        place = (cu_seqlens[:-1, None] + at).where(real, 0).long()
        ids = input_ids.flatten()[place].where(real, -1)
        return _Seen(self._by_row(ids, images, image_token).latents, (ids == image_token).cumsum(-1), place, real)

    @staticmethod
    def _by_row(input_ids: Tensor, images: Tensor | MediaByRow, image_token: int) -> MediaByRow:
        if isinstance(images, MediaByRow):
            return images
        row, _ = (input_ids == image_token).nonzero(as_tuple=True)
        if len(row) != len(images):
            raise ValueError(f"the batch has {len(row)} image placeholders, but {len(images)} images came with it")
        count = row.bincount(minlength=len(input_ids))
        number = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]  # of a picture within its row
        most = int(count.max()) if len(row) else 0
        latents = images.new_zeros(len(input_ids), most, *images.shape[1:]).index_put((row, number), images)
        return MediaByRow(latents, count)

    # -- before a layer

    def _before(self, i: str, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._now is None:
            return None
        if not args:
            return args, {**kwargs, "hidden_states": self._read(self.layers[i], kwargs["hidden_states"])}
        return (self._read(self.layers[i], args[0]), *args[1:]), kwargs

    def _read(self, block: nn.Module, hidden: Tensor) -> Tensor:
        seen, dtype = self._now, next(block.parameters()).dtype  # blocks that learn are held in fp32 over layers that may not be
        x, media = hidden.to(dtype), seen.media.to(dtype)
        if seen.place is None:
            return block(x, media, text_time=seen.text_time).to(hidden.dtype)
        flat = x.flatten(0, 1)
        read = block(flat[seen.place], media, text_time=seen.text_time)
        return flat.index_put((seen.place[seen.real],), read[seen.real]).view_as(x).to(hidden.dtype)


class _Showing:
    """Lets a fusion's blocks see while it is entered; once or again."""

    def __init__(self, fusion: GatedFusion, seen: _Seen | None):
        self.fusion, self.seen, self.before = fusion, seen, []

    def __enter__(self) -> None:
        self.before.append(self.fusion._now)
        self.fusion._now = self.seen

    def __exit__(self, *_) -> None:
        self.fusion._now = self.before.pop()
