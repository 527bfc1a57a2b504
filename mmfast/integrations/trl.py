"""``patch(trainer)`` gives the log-probabilities of a live TRL trainer to ``mmfast.linear_logp``; ``restore(trainer)`` gives them back to TRL.

Only the way from hidden states to a log-probability is exchanged: inside the model's own forward, the head runs on the rows that predict a
scored token, and the logits of a batch never exist. Loss types, reference, metrics, evaluation and saving stay TRL's code. TRL is never
imported: its functions are known by the names they use. Two designs are known:

- TRL 1.15 and later: a model has a forward, made for it alone, that calls TRL's kernel by name. Its code gets our name instead, in place, so
  whatever was or will be wrapped around it (PEFT, accelerate, DDP, FSDP) does not matter.
- TRL 0.29 to 1.14: the loss takes log-probabilities and metrics from logits. The head returns ``_Scores`` instead, which stand for logits
  there; the trainer gets copies of its methods that know how to read them.

Letters: B sequences, T tokens, H hidden width, V vocabulary.
"""

import functools
import types
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.ops import linear_logp


def patch(trainer):
    """Replaces the log-probabilities of a TRL ``DPOTrainer``, prints what it replaced and what it left alone, and returns the trainer.

    For language and vision-language models, with a reference model, adapters switched off as reference, or reference log-probabilities
    computed in advance. Losses, metrics and trained parameters stay the same up to rounding. Call it on a made trainer; a second call
    changes nothing. docs/trl.md has the details.

    Raises:
        TypeError: no TRL trainer, or one that computes log-probabilities in a way that is not known here.
        ValueError: a setting that cannot be served; the sentence says which one and what to do.
    """
    models, methods = _models(trainer), _logit_methods(trainer)
    fused = {role: list(_fused_forwards(model)) for role, model in models.items()}
    if not methods and not all(fused.values()):
        raise TypeError(
            f"mmfast.integrations.trl: {type(trainer).__name__} computes log-probabilities in an unknown way, expected a DPOTrainer of TRL >= 0.29"
        )
    for role, model in models.items():
        why = _unserved(trainer, _base(model), from_logits=bool(methods))
        if why:
            raise ValueError(f"mmfast.integrations.trl: the {role} cannot be patched: {why}")
    for role, model in models.items():
        for forward in fused[role]:
            _exchange_kernel(forward)
        for head in _heads(_base(model)) if methods else ():
            _exchange_head(head)
        print(f"mmfast: {role} {type(_base(model)).__name__} -> linear_logp")
    for name, method in methods.items() if not vars(trainer).keys() & methods.keys() else ():
        setattr(trainer, name, types.MethodType(_reading_scores(method), trainer))
    if getattr(trainer, "precompute_ref_logps", False):
        print("mmfast: reference left alone: computed in advance")
    elif "reference" not in models and hasattr(trainer.model, "peft_config"):
        print("mmfast: reference is the policy, its adapter switched by TRL")
    print("mmfast: loss and metrics left to TRL")
    return trainer


def restore(trainer):
    """Undoes ``patch``: every function and method is what it was. Returns the trainer."""
    for model in _models(trainer).values():
        for forward in _fused_forwards(model):
            forward.__code__ = vars(forward).pop("_mmfast_stock", forward.__code__)
        for head in model.modules():
            if "_mmfast_stock" in vars(head):
                held = vars(head).pop("_mmfast_stock")
                vars(head).pop("forward")
                if held is not None:
                    head.forward = held
    for name in _METHODS:
        if hasattr(vars(trainer).get(name), "_mmfast"):
            delattr(trainer, name)
    return trainer


def _models(trainer) -> dict[str, nn.Module]:
    if not isinstance(getattr(trainer, "model", None), nn.Module) or not hasattr(trainer, "accelerator"):
        raise TypeError(f"mmfast.integrations.trl: expected a TRL DPOTrainer, got {type(trainer).__name__}")
    models = {"policy": trainer.model, "reference": getattr(trainer, "ref_model", None)}
    return {role: model for role, model in models.items() if model is not None}


def _base(model: nn.Module) -> nn.Module:
    """The transformers model under PEFT, DDP and FSDP1, which is the one that has the head."""
    while not hasattr(type(model), "get_output_embeddings") or hasattr(model, "get_base_model"):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model.module
    return model


def _unserved(trainer, model: nn.Module, from_logits: bool) -> str | None:
    """Why the model, as configured, cannot run on linear_logp; None if it can."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3 takes the head's weight away before the backward reads it; use ZeRO-2 or FSDP2"
    heads = _heads(model)
    if not heads:
        return f"its head is a {type(model.get_output_embeddings()).__name__}, expected a torch.nn.Linear of floating-point weights"
    if not from_logits:
        return None
    if getattr(trainer, "use_liger_kernel", False) or trainer.args.use_liger_kernel:
        return "use_liger_kernel replaces the same computation; turn it off"
    if getattr(trainer, "is_fsdp_enabled", False):
        return "FSDP shards the head; TRL 1.15 and later can be patched under FSDP2"
    if any(getattr(config, "is_prompt_learning", False) for config in getattr(trainer.model, "peft_config", {}).values()):
        return "prompt learning adds tokens that have no labels; TRL 1.15 and later can be patched"
    text = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if getattr(text, name, None) not in (None, 1.0):
            return f"the model changes its logits after the head ({name}); TRL 1.15 and later can be patched"
    return None


def _heads(model: nn.Module) -> list[nn.Linear]:
    """The head, or what PEFT keeps instead of it when it is trained beside the adapters; none if it is anything but a plain linear map."""
    head = model.get_output_embeddings()
    heads = [head.original_module, *head.modules_to_save.values()] if hasattr(head, "modules_to_save") else [head]
    return heads if all(isinstance(h, nn.Linear) and h.weight.is_floating_point() for h in heads) else []


# ------------------------------------------------------------------------------------------------------------ the kernel


class _Kernel:
    """Stands for TRL's autograd function of the same arguments and outputs; those not asked for are None."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float = 1.0,
        chunk_size: int = 0,
        softcap: float | None = None,
        scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """hidden [.., H], weight [V, H], bias [V], labels [..] -> log-probability, entropy, log sum of p^2, mean logit, label is the mode.

        Logits are ``softcap tanh(scale (hidden weight^T + bias) / softcap) / temperature``.
        """
        weight, bias = (x if x is None else x.to(hidden.dtype) for x in (weight, bias))  # a head in float32 over a bf16 body
        # The scale comes before the softcap in TRL and does not exist in linear_logp; both can absorb it.
        softcap, temperature = softcap and softcap / scale, temperature / scale
        stats = "log_sum_sq_probs" in outputs or "is_top1" in outputs
        got = linear_logp(
            hidden, weight, labels, bias, softcap=softcap, temperature=temperature, return_entropy="entropy" in outputs, return_stats=stats
        )
        logp, *more = got if isinstance(got, tuple) else (got,)
        entropy = more.pop(0) if "entropy" in outputs else None
        _, squares, top = more.pop() if stats else (None, None, None)
        with torch.no_grad():
            mean = _mean_logit(hidden, weight, bias, softcap, temperature) if "mean_logits" in outputs else None
            log_sq = squares.clamp_min(1e-30).log() if "log_sum_sq_probs" in outputs else None  # 0 where there is no label
        return logp, entropy, log_sq, mean, top if "is_top1" in outputs else None


def _mean_logit(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> Tensor:
    """[..] in fp32: the mean of a linear map is a linear map, so one pass over the weight will do, unless a softcap bends the logits."""
    if softcap is None:
        with torch.autocast(hidden.device.type, enabled=False):
            mean = hidden.float() @ weight.mean(0, dtype=torch.float32)
        return (mean if bias is None else mean + bias.float().mean()) / temperature
    rows = hidden.flatten(0, -2).split(256)
    means = [(softcap * torch.tanh(F.linear(row, weight, bias).float() / softcap)).mean(-1) for row in rows]
    return torch.cat(means).view(hidden.shape[:-1]) / temperature


# ------------------------------------------------------------------------------------------------------------ TRL 1.15 and later

# The kernel, and whether unscored rows are dropped before it, which TRL does on GPUs alone.
_NAMES = {"_ChunkedLogProbFunction": "_mmfast_kernel", "_use_triton": "_mmfast_drops_unscored"}


def _fused_forwards(model: nn.Module) -> Iterator[types.FunctionType]:
    """The functions, below whatever is wrapped around them, that call TRL's kernel or ours."""
    for module in model.modules():
        forward = vars(module).get("forward")
        forward = getattr(forward, "__func__", forward)
        while forward is not None:
            if {"_ChunkedLogProbFunction", "_mmfast_kernel"}.intersection(getattr(getattr(forward, "__code__", None), "co_names", ())):
                yield forward
                break
            forward = getattr(forward, "__wrapped__", None)


def _exchange_kernel(forward: types.FunctionType) -> None:
    # The function keeps its identity, for it may sit deep inside accelerate's and autocast's wrappers; its globals are TRL's and get our names.
    if "_mmfast_stock" not in vars(forward):
        forward.__globals__.update(_mmfast_kernel=_Kernel, _mmfast_drops_unscored=lambda device: True)
        forward._mmfast_stock = forward.__code__
        forward.__code__ = forward.__code__.replace(co_names=tuple(_NAMES.get(name, name) for name in forward.__code__.co_names))


# ------------------------------------------------------------------------------------------------------------ TRL 0.29 to 1.14

_METHODS = ("_compute_loss", "compute_ref_log_probs", "_compute_ref_log_probs")
_labels: ContextVar[Tensor | None] = ContextVar("labels", default=None)  # [B, T], -100 where not scored; None: the head returns logits


class _Scores(Tensor):
    """What takes the place of logits ``[B, T, V]``: ``[B, T, 5]``, the outputs of ``_Kernel`` for the next token, the last as its id or -1.

    The reductions over V that TRL's loss and metrics make of logits give the column that holds their result.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, last = func.__name__, kwargs.get("dim", args[1] if len(args) > 1 else None) == -1
        if name in ("mul", "__mul__", "__rmul__"):  # 2 z, of which only logsumexp(2 z) - 2 logsumexp(z) is made, the log sum of p^2
            return args[0].as_subclass(_Doubled)
        if name == "logsumexp" and last:
            return _column(args[0], 2) * (1.0 if isinstance(args[0], _Doubled) else 0.0)
        if name == "mean" and last:
            return _column(args[0], 3)
        if name == "argmax" and last:
            return _column(args[0], 4).long()
        if name == "cross_entropy":
            return -_column(args[0], 0).mean()
        return super().__torch_function__(func, types, args, kwargs)


class _Doubled(_Scores):
    pass


def _column(scores: _Scores, i: int) -> Tensor:
    return scores.as_subclass(Tensor)[..., i].clone()  # TRL sets elements of log-probabilities in place


def _exchange_head(head: nn.Linear) -> None:
    if "_mmfast_stock" not in vars(head):
        head._mmfast_stock = vars(head).get("forward")  # accelerate's hooks keep theirs on the instance
        head.forward = types.MethodType(_head_forward, head)


def _head_forward(head: nn.Linear, hidden: Tensor) -> Tensor:
    """hidden [B, T, H] -> _Scores [B, T, 5], in the loss; logits [B, T, V] anywhere else."""
    labels = _labels.get()
    if labels is None:
        return head._mmfast_stock(hidden) if head._mmfast_stock else type(head).forward(head, hidden)
    labels = F.pad(labels[:, 1:], (0, 1), value=-100).to(hidden.device)
    logp, entropy, log_sq, mean, top = _Kernel.apply(hidden, head.weight, head.bias, labels)
    return torch.stack([logp, entropy.detach(), log_sq, mean, torch.where(top, labels, -1)], -1).as_subclass(_Scores)


def _logit_methods(trainer) -> dict[str, types.FunctionType]:
    """The methods of a DPOTrainer's class that read logits by TRL's functions."""
    if all(cls.__name__ != "DPOTrainer" for cls in type(trainer).__mro__):  # others have methods of these names for other batches
        return {}
    methods = {name: getattr(type(trainer), name, None) for name in _METHODS}
    return {name: m for name, m in methods.items() if set(_READERS).intersection(getattr(getattr(m, "__code__", None), "co_names", ()))}


def _reading_scores(stock: types.FunctionType) -> types.FunctionType:
    """A copy of one of the methods, whose functions of logits also know ``_Scores`` and whose models therefore may return them."""
    names = stock.__globals__
    copy = types.FunctionType(
        stock.__code__, {**names, **{name: _reader(names[name], *columns) for name, columns in _READERS.items() if name in names}},
        stock.__name__, stock.__defaults__, stock.__closure__,
    )  # fmt: skip

    @functools.wraps(stock)
    def method(trainer, model, inputs, return_outputs=False):
        if return_outputs:  # evaluation that hands the logits on
            return stock(trainer, model, inputs, return_outputs)
        ids, mask = inputs["input_ids"], inputs["completion_mask"]
        if hasattr(trainer, "_truncate_inputs"):  # 0.29 cuts the batch inside the method
            ids, _, mask = trainer._truncate_inputs(ids, inputs["attention_mask"], mask)
        token = _labels.set(ids.masked_fill(mask == 0, -100))
        try:
            return copy(trainer, model, inputs, *([False] if stock.__name__ == "_compute_loss" else []))
        finally:
            _labels.reset(token)

    method._mmfast = True
    return method


_READERS = {"selective_log_softmax": (0,), "entropy_from_logits": (1,), "selective_log_softmax_and_entropy": (0, 1)}


def _reader(stock, *columns: int):
    def read(logits, *args, **kwargs):
        if not isinstance(logits, _Scores):
            return stock(logits, *args, **kwargs)
        got = tuple(_column(logits, i) for i in columns)
        return got if len(got) > 1 else got[0]

    return read
