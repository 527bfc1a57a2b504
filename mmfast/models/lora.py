"""Low-rank adapters (arXiv:2106.09685) through peft: W x + (alpha / rank) B A x beside frozen weights.

They are put into a part's own modules, so every part keeps its path and its methods; what a checkpoint gains are ``lora_A`` and ``lora_B``, and
a module with adapters keeps its weights under ``base_layer``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfast import spec


def add_lora(model: nn.Module, choice: spec.Lora) -> list[str]:
    """Adapters on every module of ``choice.part`` whose path ends with a target, in whole words; returns their paths.

    Adapters are fp32 and begin as nothing (B is 0). Tower blocks behind the state that is read get none, as no gradient reaches them.

    Raises:
        ValueError: a target that fits no module, or one that is no affine map; adapters that are there already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if lora_parameters(model):
        raise ValueError(f"{model.system.name}: the model has adapters already; merge them (merge_lora) before adding others")
    part = getattr(model, choice.part)
    unread = {id(p) for p in model.encoder.unread()}
    paths = {name: m for name, m in part.named_modules() if name and not (unread & {id(p) for p in m.parameters()})}
    affine = [name for name, m in paths.items() if _is_affine(m) and m is not part_head(part)]
    found: list[str] = []
    for target in choice.targets:
        # Whole words: "proj" is not the end of "q_proj", and "mlp.up_proj" asks for its parent too.
        hits = [name for name in paths if f".{name}".endswith(f".{target}")]
        if not hits:
            known = sorted({name.rpartition(".")[2] for name in affine})
            raise ValueError(
                f"{model.system.name}: no module of the {choice.part} part ends with {target!r}{spec.nearest(target, [*known, *affine])}; its affine "
                f"maps end with {', '.join(known)}"
            )
        if wrong := [name for name in hits if name not in affine]:
            kind = type(paths[wrong[0]]).__name__
            raise ValueError(f"{model.system.name}: {wrong[0]} is a {kind}; adapters go beside affine maps, and not on the head")
        found += [name for name in hits if name not in found]
    config = LoraConfig(r=choice.rank, lora_alpha=choice.alpha, lora_dropout=choice.dropout, target_modules=found)
    inject_adapter_in_model(config, part)
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    model.train_only(model._trained)
    added = [name for name, module in _adapted(part)]
    if sorted(added) != sorted(found):
        raise ValueError(f"{model.system.name}: adapters were meant for {len(found)} modules and went to {len(added)}")
    return [f"{choice.part}.{name}" for name in added]


def part_head(part: nn.Module) -> nn.Module | None:
    return part.get_output_embeddings() if hasattr(part, "get_output_embeddings") else None


def _is_affine(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's own name for it


def _adapted(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with adapters, known by what peft gives them, so that a model without any needs no peft."""
    return ((name, m) for name, m in module.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer"))


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All adapters' parameters."""
    return [p for _, m in _adapted(model) for table in (m.lora_A, m.lora_B) for p in table.parameters()]


def lora_dropouts(model: nn.Module) -> list[nn.Module]:
    return [m.lora_dropout for _, m in _adapted(model)]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before its adapters, exactly: what it computes inside is the reference of a policy that trains adapters only."""
    layers = [m for _, m in _adapted(model)]
    learning = [(p, p.requires_grad) for p in lora_parameters(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, learns in learning:  # peft turns these on and off with the adapters
            parameter.requires_grad_(learns)


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its adapters folded into plain modules, W + (alpha / rank) B A, put back afterwards: for export."""
    swapped = []
    try:
        for name, layer in list(_adapted(model)):
            plain = _folded(name, layer)
            parent, _, child = name.rpartition(".")
            swapped.append((model.get_submodule(parent), child, layer))
            setattr(model.get_submodule(parent), child, plain)
        yield model
    finally:
        for parent, child, layer in swapped:
            setattr(parent, child, layer)


def merge_lora(model: nn.Module) -> nn.Module:
    """Folds the adapters into the weights for good. Refused where these are held in few bits: the sum would be rounded to them."""
    for name, plain in [(name, _folded(name, layer)) for name, layer in _adapted(model)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain)
    for module in model.modules():  # what peft leaves behind would make it warn of a second set of adapters
        vars(module).pop("peft_config", None)
    model.train_only(model._trained)
    return model


def _folded(name: str, layer: nn.Module) -> nn.Module:
    base = layer.get_base_layer()
    if not base.weight.is_floating_point() or hasattr(base.weight, "quant_state"):
        raise ValueError(
            f"{name}: adapters cannot be folded into 4-bit weights without rounding; load the same weights with language.quantize=none "
            "and the adapters over them (load_lora), then merge"
        )
    delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
    plain = copy.copy(base)  # same class and settings, its own table of parameters
    plain._parameters = dict(base._parameters)
    plain.weight = nn.Parameter((base.weight.float() + delta).to(base.weight.dtype), requires_grad=False)
    return plain


# --------------------------------------------------------------------------------------------------------- adapters alone


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors by name, as ``state_dict`` names them."""
    own = {id(p) for p in lora_parameters(model)}
    return {name: p.detach() for name, p in model.named_parameters() if id(p) in own}


def save_lora(model: nn.Module, path: str | Path) -> None:
    """Writes the adapters alone, one safetensors file."""
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in lora_state(model).items()}, path)


def load_lora(model: nn.Module, path: str | Path) -> None:
    """Reads adapters into a model that has the same ones (``add_lora``)."""
    from safetensors.torch import load_file

    given, own = load_file(path), lora_state(model)
    if strange := sorted(given.keys() ^ own.keys()):
        raise ValueError(f"{path} holds other adapters than the model: {strange[0]} is in one of them only ({len(strange)} such)")
    with torch.no_grad():
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{path}: {name} has shape {list(tensor.shape)}, the model's {list(own[name].shape)}; is the rank the same?"
                )
            own[name].copy_(tensor)
