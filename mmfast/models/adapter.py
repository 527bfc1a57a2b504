"""LLaMA-Adapter's own files (arXiv:2303.16199): prompts and gates apart from the language model, under the names of its release.

``adapter_query.weight`` [L K, D] holds the prompts of the last L layers, lowest first; ``layers.{i}.attention.gate`` is there for all layers
of the language model, [1, H, 1, 1], or [1] in the first release (one gate a layer). Which function the gates go through stands in no file:
the training code takes tanh, the paper and the first inference code the gate itself (``spec.AdapterPrompts.gate``).

peft's files hold the same: of each adapted layer ``..layers.{i}.self_attn.adaption_prompt`` [1, K, D] and ``.adaption_gate`` [1], one gate for all
heads, which is multiplied as it is: tanh of ours where ours goes through it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from mmfast import spec
from mmfast.models.build import MultimodalModel
from mmfast.models.files import read_state, write_state

_GATE = re.compile(r"layers\.(\d+)\.attention\.gate")
_PEFT = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.adaption_(prompt|gate)")
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapter_state(model: MultimodalModel) -> dict[str, Tensor]:
    """Prompts and gates by their published names; gates of layers without prompts are 0."""
    layers = _layers(model)
    gates = {int(i): layer.gate.detach() for i, layer in layers.items()}
    none = torch.zeros_like(next(iter(gates.values())))
    state = {f"layers.{i}.attention.gate": gates.get(i, none).view(1, -1, 1, 1).clone() for i in range(len(_blocks(model)))}
    return {**state, "adapter_query.weight": torch.cat([layer.prompt.detach() for layer in layers.values()])}


def peft_state(model: MultimodalModel) -> dict[str, Tensor]:
    """Prompts and gates by peft's names.

    Raises:
        ValueError: heads of a layer whose gates differ, which peft has no form for.
    """
    state = {}
    for i, layer in _layers(model).items():
        gate = layer.gate.detach()
        if (gate != gate[0]).any():
            raise ValueError(f"{model.system.name}: the heads of layer {i} have gates of their own, and peft has one a layer")
        start = f"base_model.model.model.layers.{i}.self_attn.adaption_"
        state[f"{start}prompt"] = layer.prompt.detach()[None]
        state[f"{start}gate"] = gate[:1].tanh() if model.system.fusion.gate == "tanh" else gate[:1].clone()
    return state


def _from_peft(model: MultimodalModel, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """A state with peft's names under the release's; another as it is."""
    told = {(int(match[1]), match[2]): t for name, t in state.items() if (match := _PEFT.fullmatch(name))}
    if not told:
        return state
    rest = {name: t for name, t in state.items() if not _PEFT.fullmatch(name)}
    for (i, kind), tensor in sorted(told.items(), key=lambda item: item[0]):
        if kind == "gate" and model.system.fusion.gate == "tanh":
            if (tensor.abs() >= 1).any():
                raise ValueError(f"{where}: the gate of layer {i}, {tensor.item():g}, is no tanh; set fusion.gate to identity")
            tensor = tensor.float().atanh()
        if kind == "gate":
            rest[f"layers.{i}.attention.gate"] = tensor
    prompts = [told[i, "prompt"].flatten(0, -2) for i, kind in sorted(told) if kind == "prompt"]
    return rest | ({"adapter_query.weight": torch.cat(prompts)} if prompts else {})


def load_adapter_state(model: MultimodalModel, state: dict[str, Tensor], where: str = "adapter") -> None:
    """Published prompts and gates, or peft's, into a model whose fusion is ``AdapterPrompts``.

    Raises:
        ValueError: another number of layers, prompts, heads or another width than the model's; names that are no adapter's, or are missing; a gate
            of peft's that no tanh gives.
    """
    layers, depth = _layers(model), len(_blocks(model))
    state = _from_peft(model, state, where)
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


def save_peft_adapter(model: MultimodalModel, folder: str | Path) -> None:
    """Writes a folder that peft's ``PeftModel.from_pretrained`` puts over the language model; the projection of pictures is not in it."""
    state, fusion = peft_state(model), model.system.fusion
    config = {
        "peft_type": "ADAPTION_PROMPT", "task_type": "CAUSAL_LM", "adapter_len": fusion.length, "adapter_layers": fusion.layers,
        "target_modules": "self_attn", "base_model_name_or_path": model.system.language.weights, "inference_mode": True,
    }  # fmt: skip
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_state(state, Path(folder) / PEFT_WEIGHTS)
    (Path(folder) / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: MultimodalModel, path: str | Path) -> None:
    """Reads what ``save_adapter`` or the released training code wrote, ``.safetensors`` or a ``.pth`` that holds tensors alone; or a folder of
    peft's."""
    load_adapter_state(model, read_state(Path(path) / PEFT_WEIGHTS if Path(path).is_dir() else path), str(path))


def _layers(model: MultimodalModel) -> torch.nn.ModuleDict:
    if not isinstance(model.system.fusion, spec.AdapterPrompts):
        raise ValueError(f"{model.system.name}: its fusion is {type(model.system.fusion).__name__}; an adapter needs AdapterPrompts")
    return model.fusion.layers


def _blocks(model: MultimodalModel) -> torch.nn.ModuleList:
    return model.language.get_decoder().layers
