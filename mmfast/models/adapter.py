"""LLaMA-Adapter's own files (arXiv:2303.16199): prompts and gates apart from the language model, under the names of its release.

``adapter_query.weight`` [L K, D] holds the prompts of the last L layers, lowest first; ``layers.{i}.attention.gate`` is there for all layers
of the language model, [1, H, 1, 1], or [1] in the first release (one gate a layer). Which function the gates go through stands in no file:
the training code takes tanh, the paper and the first inference code the gate itself (``spec.AdapterPrompts.gate``).
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from mmfast import spec
from mmfast.models.build import MultimodalModel

_GATE = re.compile(r"layers\.(\d+)\.attention\.gate")


def adapter_state(model: MultimodalModel) -> dict[str, Tensor]:
    """Prompts and gates by their published names; gates of layers without prompts are 0."""
    layers = _layers(model)
    gates = {int(i): layer.gate.detach() for i, layer in layers.items()}
    none = torch.zeros_like(next(iter(gates.values())))
    state = {f"layers.{i}.attention.gate": gates.get(i, none).view(1, -1, 1, 1).clone() for i in range(len(_blocks(model)))}
    return {**state, "adapter_query.weight": torch.cat([layer.prompt.detach() for layer in layers.values()])}


def load_adapter_state(model: MultimodalModel, state: dict[str, Tensor], where: str = "adapter") -> None:
    """Published prompts and gates into a model whose fusion is ``AdapterPrompts``.

    Raises:
        ValueError: another number of layers, prompts, heads or another width than the model's; names that are no adapter's, or are missing.
    """
    layers, depth = _layers(model), len(_blocks(model))
    length, width = next(iter(layers.values())).prompt.shape
    found = {int(match[1]): tensor for name, tensor in state.items() if (match := _GATE.fullmatch(name))}
    query = state.get("adapter_query.weight")
    if strange := sorted(set(state) - {"adapter_query.weight"} - {f"layers.{i}.attention.gate" for i in range(depth)}):
        raise ValueError(f"{where} holds {strange[0]}, which is no prompt and no gate of a language model of {depth} layers")
    if query is None or query.shape != (len(layers) * length, width):
        got = "no such tensor" if query is None else list(query.shape)
        raise ValueError(
            f"{where}: adapter_query.weight: expected [{len(layers)} layers x {length} prompts = {len(layers) * length}, {width}], got {got}"
        )
    if missing := [i for i in map(int, layers) if i not in found]:
        raise ValueError(f"{where} holds no layers.{missing[0]}.attention.gate")
    for i, layer in layers.items():
        if found[int(i)].numel() not in (1, len(layer.gate)):
            raise ValueError(f"{where}: layers.{i}.attention.gate: expected 1 or {len(layer.gate)} values, got {list(found[int(i)].shape)}")
    with torch.no_grad():
        for (i, layer), prompt in zip(layers.items(), query.split(length), strict=True):
            layer.prompt.copy_(prompt)
            layer.gate.copy_(found[int(i)].flatten().expand_as(layer.gate))


def save_adapter(model: MultimodalModel, path: str | Path) -> None:
    """Writes prompts and gates alone: safetensors, or for ``.pth`` what the released code reads."""
    write_state(adapter_state(model), path)


def load_adapter(model: MultimodalModel, path: str | Path) -> None:
    """Reads what ``save_adapter`` or the released training code wrote: ``.safetensors``, or a ``.pth`` that holds tensors alone."""
    load_adapter_state(model, read_state(path), str(path))


def write_state(state: dict[str, Tensor], path: str | Path) -> None:
    """Named tensors in fp32: safetensors, or for ``.pt``, ``.pth`` and ``.bin`` torch's own format."""
    state = {name: tensor.float().cpu().contiguous() for name, tensor in state.items()}
    if Path(path).suffix in (".pt", ".pth", ".bin"):
        torch.save(state, path)
        return
    from safetensors.torch import save_file

    save_file(state, path)


def read_state(path: str | Path) -> dict[str, Tensor]:
    """What ``write_state`` or a release's training code wrote; a file that holds anything but tensors and plain data is refused."""
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is no file of tensors alone, and nothing else is read, as it could run code") from error


def _layers(model: MultimodalModel) -> torch.nn.ModuleDict:
    if not isinstance(model.system.fusion, spec.AdapterPrompts):
        raise ValueError(f"{model.system.name}: its fusion is {type(model.system.fusion).__name__}; an adapter needs AdapterPrompts")
    return model.fusion.layers


def _blocks(model: MultimodalModel) -> torch.nn.ModuleList:
    return model.language.get_decoder().layers
