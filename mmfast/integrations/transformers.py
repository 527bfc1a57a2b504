"""``mmfast.apply(model)`` puts the ops into a live transformers model, ``mmfast.restore(model)`` takes them out again.

A replaced module changes its class to a small subclass of its own class, made here, that has another ``forward`` and nothing else: parameters,
hooks, ``state_dict``, ``isinstance`` and the class's name stay, other models are untouched. What a call needs and the ops do not have is given
to the stock ``forward``, with one warning that says why. transformers itself is never imported: modules are known by their class's full name.
"""

import math
import types
import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfast.ops import cross_attention, media_cross_attention, qformer_attention, vq_quantize

_warned: set[tuple[str, str]] = set()  # (class, reason); emptied by apply


def apply(model: nn.Module) -> nn.Module:
    """Replaces the forward of every module that an op can serve, prints what was replaced and what was left alone, and returns the model.

    Known: the Q-Formers of BLIP-2, InstructBLIP and InstructBLIP-Video, the resamplers of Idefics and Idefics2, Idefics' gated
    cross-attention, Kosmos-2's connector, Chameleon's quantiser; the model may be wrapped (PEFT, DDP, FSDP, accelerate's hooks). Outputs and
    gradients stay the same up to rounding; dropout draws other numbers. A second call changes nothing. docs/apply.md has the details.

    Raises:
        TypeError: model is no ``torch.nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"mmfast.apply: expected a torch.nn.Module, got {type(model).__name__}")
    _warned.clear()
    replaced, already, alone, inside = _Count(), _Count(), _Count(), set()
    for module in model.modules():
        name = type(module).__name__
        kind = _KINDS.get(_full_name(_stock_class(module)))
        if isinstance(module, _Fused):
            already.add((name, module.ops))
            inside.update(module.modules())
        elif kind is not None:
            why = kind.unserved(module) or _foreign_forward(module)
            if why:
                alone.add((name, why))
            else:
                _set_class(module, _subclass(type(module), kind))
                replaced.add((name, kind.ops))
            inside.update(module.modules())
        elif module not in inside and _attention_like(module) and not any(map(_attention_like, list(module.modules())[1:])):
            alone.add((name, "no op of mmfast replaces it"))
    for (name, ops), count in replaced.items():
        print(f"mmfast: {count} {name} -> {ops}")
    for (name, _), count in already.items():
        print(f"mmfast: {count} {name} already replaced")
    for (name, why), count in alone.items():
        print(f"mmfast: {count} {name} left alone: {why}")
    if not replaced and not already:
        known = ", ".join(dict.fromkeys(full.split(".")[2] for full in _KINDS))
        print(f"mmfast: nothing replaced in {type(model).__name__}; known are parts of {known}")
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undoes ``apply``: every module gets back the class it had. Returns the model."""
    for module in model.modules():
        if isinstance(module, _Fused):
            _set_class(module, _without(type(module)))
    return model


# ------------------------------------------------------------------------------------------------------------ replacing a class


class _Fused(nn.Module):
    """What the kinds below share: a replaced class is made of a kind and the class it stands for (``stock``)."""

    stock: type
    kind: type
    ops: str

    @staticmethod
    def unserved(module: nn.Module) -> str | None:
        """Why this module, as configured, cannot run on the ops; None if it can."""
        return None

    def fall_back(self, why: str, *args, **kwargs):
        name = type(self).__name__
        if (name, why) not in _warned:
            _warned.add((name, why))
            warnings.warn(f"mmfast: {name} runs its stock forward: {why}", RuntimeWarning, stacklevel=2)
        return self.stock.forward(self, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"mmfast: {self.ops}"

    def __reduce_ex__(self, protocol):
        # The class was made at run time and cannot be found by name; what it was made from can. Serves pickle and deepcopy.
        return _blank, (self.stock, self.kind), self.__dict__


@cache
def _subclass(stock: type, kind: type) -> type:
    # The stock's name: FSDP's and accelerate's wrapping rules look for it.
    return type(stock.__name__, (kind, stock), {"stock": stock, "kind": kind, "__module__": __name__})


def _without(cls: type) -> type:
    """The class that a replaced class stands for, under whatever (FSDP) was put on top of it since."""
    if "stock" in vars(cls):
        return cls.stock
    bases = tuple(_without(base) if issubclass(base, _Fused) else base for base in cls.__bases__)
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, own)


def _blank(stock: type, kind: type) -> nn.Module:
    cls = _subclass(stock, kind)
    return cls.__new__(cls)


def _set_class(module: nn.Module, cls: type) -> None:
    old = type(module)
    module.__class__ = cls
    # accelerate's hooks (device_map) and some tools keep the bound forward on the instance; it has to follow the class.
    for slot in ("forward", "_old_forward"):
        held = vars(module).get(slot)
        if isinstance(held, types.MethodType) and held.__self__ is module and held.__func__ is old.forward:
            setattr(module, slot, types.MethodType(cls.forward, module))


def _foreign_forward(module: nn.Module) -> str | None:
    held = vars(module).get("_old_forward", vars(module).get("forward"))
    stock = getattr(held, "__func__", None) is type(module).forward
    return None if held is None or stock else "something else has replaced its forward already"


def _stock_class(module: nn.Module) -> type:
    """The class that a known name stands for: the module's own, or what FSDP made a subclass of; not a class with another forward."""
    for cls in type(module).__mro__:
        if _full_name(cls) in _KINDS:
            return cls if type(module).forward is cls.forward else type(module)
    return type(module)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _attention_like(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ or "Quantiz" in type(module).__name__


class _Count(dict):
    def add(self, key) -> None:
        self[key] = self.get(key, 0) + 1


# -------------------------------------------------------------------------------------------------------------- reading masks


class _Visible(NamedTuple):
    """Which keys are real: all (no field), the leading lens ``[B]``, or where mask ``[B, N]`` is true; or why that could not be told."""

    lens: Tensor | None = None
    mask: Tensor | None = None
    why: str | None = None


def _visible_keys(mask: Any, batch: int, keys: int, eager: bool) -> _Visible:
    """Reads the mask that reached an attention module, if it says no more than which keys are padding."""
    return _Visible() if mask is None else _remembered(mask, ("keys", batch, keys, eager), _read_key_padding, batch, keys, eager)


def _read_key_padding(mask: Any, batch: int, keys: int, eager: bool) -> _Visible:
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool:  # flash attention's
        mask = mask[:, None, None]
    seen, why = _read_mask(mask, batch, keys, eager)
    if why:
        return _Visible(why=why)
    if not (seen == seen[:, :1, :1]).all():
        return _Visible(why="the attention mask differs between heads or rows, so it is not key padding alone")
    seen = seen[:, 0, 0].expand(batch, -1)
    lens = seen.sum(-1)
    if not lens.all():  # the stock classes average over the padding then
        return _Visible(why="the attention mask leaves a sequence without any key")
    if seen.all():
        return _Visible()
    leading = torch.arange(keys, device=seen.device) < lens[:, None]
    return _Visible(lens=lens) if (seen == leading).all() else _Visible(mask=seen)


class _Media(NamedTuple):
    """What each row sees: of blocks of ``size`` keys the block ``time`` (0 none), or with ``immediate`` False the first ``time`` blocks."""

    time: Tensor | None = None
    size: int = 0
    immediate: bool = True
    why: str | None = None


def _visible_media(mask: Any, batch: int, rows: int, keys: int, eager: bool) -> _Media:
    return _remembered(mask, ("media", batch, rows, keys, eager), _read_media, batch, rows, keys, eager)


def _read_media(mask: Any, batch: int, rows: int, keys: int, eager: bool) -> _Media:
    seen, why = _read_mask(mask, batch, keys, eager)
    if why or mask.shape[1] != 1 or mask.shape[2] != rows:
        return _Media(why=why or f"an image attention mask of shape {list(mask.shape)}")
    seen = seen[:, 0].expand(batch, -1, -1)
    # Tokens per image do not reach this module, but the mask can only change where an image ends: any common divisor of these places will do.
    edges = (seen[..., 1:] != seen[..., :-1]).any(0).any(0).nonzero().flatten() + 1
    size = math.gcd(keys, *edges.tolist())
    blocks = seen[..., ::size]
    time = blocks.sum(-1)
    if (time <= 1).all():
        return _Media(torch.where(time > 0, blocks.int().argmax(-1) + 1, 0), size)
    if (blocks == (torch.arange(keys // size, device=time.device) < time[..., None])).all():
        return _Media(time, size, immediate=False)
    return _Media(why="the image attention mask shows a token several images that are not all from the first on")


def _read_mask(mask: Any, batch: int, keys: int, eager: bool) -> tuple[Tensor | None, str | None]:
    """``[1 or B, heads, rows, N]`` true where visible; or why the mask is not of that kind."""
    if not isinstance(mask, Tensor):
        return None, f"an attention mask of type {type(mask).__name__}"
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[-1] != keys:
        return None, f"an attention mask of shape {list(mask.shape)}"
    # Stride 0 is one row or head shown many times.
    mask = mask[:, : 1 if mask.stride(1) == 0 else None, : 1 if mask.stride(2) == 0 else None]
    if mask.dtype == torch.bool:
        return (None, "a boolean mask, which eager attention adds to the scores as numbers") if eager else (mask, None)
    if not mask.is_floating_point():
        return None, f"an attention mask of type {mask.dtype}"
    seen = mask == 0
    if not (seen | (mask <= -1e4)).all():
        return None, "the attention mask holds other values than 0 and minus (almost) infinity"
    return seen, None


@torch.compiler.disable
def _remembered(mask: Any, key: tuple, read, *args):
    """Reading a mask waits for the device; all layers get the same tensor, so what was read is kept on it."""
    if not isinstance(mask, Tensor) or mask.is_inference():
        return read(mask, *args)
    key = (mask._version, *key)
    notes = getattr(mask, "_mmfast", None)
    if notes is None or notes[0] != key:
        notes = mask._mmfast = (key, read(mask, *args))
    return notes[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: _Visible, dropout_p: float) -> Tensor:
    if visible.mask is None:
        return cross_attention(q, k, v, key_lens=visible.lens, dropout_p=dropout_p)
    # With no queries set apart, the text mask covers all keys.
    return qformer_attention(q, k, v, num_queries=0, mask_mode="bidirectional", text_mask=visible.mask, dropout_p=dropout_p)


def _eager(config) -> bool:
    return getattr(config, "_attn_implementation", "eager") == "eager"


def _extras(kwargs: dict) -> str | None:
    """Arguments of a call that change what attention computes or returns."""
    for name in ("output_attentions", "output_cross_attentions", "head_mask", "past_key_values", "is_causal", "position_bias"):
        value = kwargs.get(name)
        if value is not None and value is not False:
            return f"the call gives {name}"
    return None


# --------------------------------------------------------------------------------------------------------------------- the kinds


class _QFormerAttention(_Fused):
    """BLIP-2's and InstructBLIP's Q-Former: self-attention, and cross-attention when ``encoder_hidden_states`` are given."""

    ops = "cross_attention, qformer_attention"

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
        cross = encoder_hidden_states is not None
        states, mask = (encoder_hidden_states, encoder_attention_mask) if cross else (hidden_states, attention_mask)
        why = _extras(kwargs)
        if getattr(self.config, "output_attentions", False) or getattr(self, "save_attention", False):
            why = "attention weights are wanted"
        if why is None:
            visible = _visible_keys(mask, len(states), states.shape[1], _eager(self.config))
            why = visible.why
        if why:
            return self.fall_back(why, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs)
        heads = (self.num_attention_heads, self.attention_head_size)
        q = self.query(hidden_states).unflatten(-1, heads).expand(len(states), -1, -1, -1)
        k, v = self.key(states).unflatten(-1, heads), self.value(states).unflatten(-1, heads)
        p = self.attention_dropout if hasattr(self, "attention_dropout") else self.dropout.p
        return _attend(q, k, v, visible, p if self.training else 0.0).flatten(-2), None


class _IdeficsPerceiverAttention(_Fused):
    ops = "cross_attention"

    def forward(self, context, latents):
        context, latents = self.context_layer_norm(context), self.latents_layer_norm(latents)
        heads = (self.n_heads, self.head_dim)
        q, (k, k2), (v, v2) = (
            self.q_proj(latents).unflatten(-1, heads),
            (self.k_proj(x).unflatten(-1, heads) for x in (context, latents)),
            (self.v_proj(x).unflatten(-1, heads) for x in (context, latents)),
        )
        if self.qk_layer_norms:
            q, k, k2 = self.q_layer_norm(q), self.k_layer_norm(k), self.k_layer_norm(k2)
        return self.output_proj(cross_attention(q, k, v, k2, v2, scale=self.qk_scale).flatten(-2))


class _IdeficsCrossAttention(_Fused):
    """The attention inside Idefics' gated blocks. A row that sees no image gives 0; its caller sets such rows to 0 in any case."""

    ops = "media_cross_attention"

    @staticmethod
    def unserved(module):
        return None if module.is_cross_attention else "the language model's self-attention"

    def forward(self, hidden_states, key_value_states=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        why = _extras({**kwargs, "past_key_values": past_key_values, "output_attentions": None})  # these weights are never returned
        if self.training and self.dropout > 0:
            why = "attention dropout in training, which media_cross_attention does not have"
        if attention_mask is None or key_value_states is None:
            why = "no image attention mask" if attention_mask is None else "no key_value_states"
        if why is None:
            seen = _visible_media(
                attention_mask, len(hidden_states), hidden_states.shape[1], key_value_states.shape[1], _eager(self.config)
            )
            why = seen.why
        if why:
            return self.fall_back(why, hidden_states, key_value_states, attention_mask, position_ids, past_key_values, **kwargs)
        heads = (self.num_heads, self.head_dim)
        q = self.q_proj(hidden_states).unflatten(-1, heads)
        k, v = self.k_proj(key_value_states).unflatten(-1, heads), self.v_proj(key_value_states).unflatten(-1, heads)
        if self.qk_layer_norms:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        out = media_cross_attention(q, k, v, text_time=seen.time, latents_per_media=seen.size, only_immediate=seen.immediate)
        return self.o_proj(out.flatten(-2)), None


class _Idefics2PerceiverAttention(_Fused):
    ops = "cross_attention, qformer_attention"

    def forward(self, latents, context, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        why = _extras({**kwargs, "past_key_values": past_key_values})
        if why is None:
            visible = _visible_keys(attention_mask, len(latents), context.shape[1] + latents.shape[1], _eager(self.config))
            why = visible.why
        if why:
            return self.fall_back(why, latents, context, attention_mask, position_ids, past_key_values, **kwargs)
        q = self.q_proj(latents).unflatten(-1, (self.num_heads, self.head_dim))
        heads = (self.num_key_value_heads, self.head_dim)
        k, k2 = (self.k_proj(x).unflatten(-1, heads) for x in (context, latents))
        v, v2 = (self.v_proj(x).unflatten(-1, heads) for x in (context, latents))
        p = self.attention_dropout if self.training else 0.0
        if visible.mask is None and visible.lens is None:
            out = cross_attention(q, k, v, k2, v2, scale=self.scaling, dropout_p=p)
        else:  # padding lies between the image and the latents; keys and values are far narrower than what the stock class concatenates
            out = _attend(q, torch.cat([k, k2], 1), torch.cat([v, v2], 1), visible, p)
        return self.o_proj(out.flatten(-2)), None


class _Kosmos2Projection(_Fused):
    """Kosmos-2's connector: learned latents read the image and themselves."""

    ops = "cross_attention"

    @staticmethod
    def unserved(module):
        attention = module.x_attn
        if _eager(attention.config):
            return "eager attention returns its weights (projection_attentions); use attn_implementation='sdpa'"
        if attention.is_causal:
            return "this transformers runs it causally, which later versions corrected and no op reproduces"
        return None if attention.inner_attn_ln is None else "a LayerNorm inside its attention"

    def forward(self, features):
        why = self.unserved(self)
        if why:
            return self.fall_back(why, features)
        maps = self.x_attn
        features, heads = self.dense(features), (maps.num_heads, maps.head_dim)
        # The latents are the same for all images: projected once, shown to the op with stride 0.
        q, k2, v2 = (
            proj(self.latent_query).unflatten(-1, heads).expand(len(features), -1, -1, -1)
            for proj in (maps.q_proj, maps.k_proj, maps.v_proj)
        )
        k, v = maps.k_proj(features).unflatten(-1, heads), maps.v_proj(features).unflatten(-1, heads)
        out = cross_attention(q, k, v, k2, v2, scale=maps.scaling, dropout_p=maps.dropout if self.training else 0.0)
        return maps.out_proj(out.flatten(-2)), None


class _ChameleonQuantizer(_Fused):
    ops = "vq_quantize"

    def forward(self, hidden_state):
        quantized, indices, loss = vq_quantize(hidden_state, self.embedding.weight, beta=self.beta, legacy=True, channel_dim=1)
        return quantized, loss.to(hidden_state.dtype), indices.flatten()


_KINDS: dict[str, type[_Fused]] = {
    f"transformers.models.{name}": kind
    for name, kind in {
        "blip_2.modeling_blip_2.Blip2QFormerMultiHeadAttention": _QFormerAttention,
        "instructblip.modeling_instructblip.InstructBlipQFormerMultiHeadAttention": _QFormerAttention,
        "instructblipvideo.modeling_instructblipvideo.InstructBlipVideoQFormerMultiHeadAttention": _QFormerAttention,
        "idefics.perceiver.IdeficsPerceiverAttention": _IdeficsPerceiverAttention,
        "idefics.modeling_idefics.IdeficsAttention": _IdeficsCrossAttention,
        "idefics2.modeling_idefics2.Idefics2PerceiverAttention": _Idefics2PerceiverAttention,
        "kosmos2.modeling_kosmos2.Kosmos2ImageToTextProjection": _Kosmos2Projection,
        "chameleon.modeling_chameleon.ChameleonVQVAEVectorQuantizer": _ChameleonQuantizer,
    }.items()
}
