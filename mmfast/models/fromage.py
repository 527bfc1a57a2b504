"""FROMAGe's own files (arXiv:2301.13823): what it learns apart from tower and language model, under the names of its release.

``pretrained_ckpt.pth.tar`` is a pickle of ``{"state_dict": ..}``, read for tensors alone, and ``model_args.json`` beside it says what they fit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast import spec
from mmfast.models.build import MultimodalModel
from mmfast.models.files import read_state

CHECKPOINT, ARGS = "pretrained_ckpt.pth.tar", "model_args.json"
_ROW = "ret_input_embeddings.weight"
# Of a checkpoint that was not pruned; the embeddings' last row is that of [RET].
_GIVEN = ("model.lm.", "model.visual_model.", "model.input_embeddings.")
_PUBLISHED = {
    "model.logit_scale": "fusion.logit_scale",
    "model.visual_embeddings.weight": "connector.linear.weight",
    "model.visual_embeddings.bias": "connector.linear.bias",
    "model.visual_fc.weight": "fusion.visual_fc.weight",
    "model.visual_fc.bias": "fusion.visual_fc.bias",
}


def system_of(args: dict[str, Any], base: spec.System) -> spec.System:
    """``base`` with the choices that a ``model_args.json`` stands for; what it says beyond them is ignored. Stages keep their length of text beside
    a picture of more or fewer tokens."""
    given = {"weights": args[name]} if (name := "opt_version") in args else {}
    seen = {"weights": args[name]} if (name := "visual_encoder") in args else {}
    tokens = args.get("n_visual_tokens", 1)
    return replace(
        base,
        stages=tuple(replace(stage, max_length=stage.max_length + tokens - base.connector.tokens) for stage in base.stages),
        encoder=replace(base.encoder, **seen),
        language=replace(base.language, **given),
        connector=replace(base.connector, tokens=tokens),
        fusion=replace(base.fusion, shared=args.get("shared_emb_dim", 256), layers=tuple(args.get("text_emb_layers", (-1,)))),
    )


def fromage_state(model: MultimodalModel) -> dict[str, Tensor]:
    """What was learnt by its published names, ``ret_input_embeddings.weight`` [1, D] the row of [RET]."""
    state = {name: weight.detach() for name, weight in _own(model).items()}
    return state | {_ROW: model.language.get_input_embeddings().weight.detach()[list(model.new_tokens)]}


def load_fromage_state(model: MultimodalModel, state: dict[str, Tensor], where: str = "checkpoint") -> None:
    """Published weights into a model whose fusion is ``Retrieval``.

    Raises:
        ValueError: names that are not FROMAGe's, or are missing; shapes of another model.
    """
    own, table = _own(model), model.language.get_input_embeddings().weight
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    whole = state.get("model.input_embeddings.weight")
    if _ROW not in state and whole is not None:
        state[_ROW] = whole[-1:]
    if strange := sorted(name for name in state if name not in (*own, _ROW) and not name.startswith(_GIVEN)):
        raise ValueError(f"{where} holds {strange[0]}, which is no weight of FROMAGe")
    shapes = {**{name: weight.shape for name, weight in own.items()}, _ROW: (1, table.shape[1])}
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"{where} holds no {name}")
        if tuple(state[name].shape) != tuple(shape):
            raise ValueError(f"{where}: {name}: expected {list(shape)}, got {list(state[name].shape)}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(state[name])
        table[list(model.new_tokens)] = state[_ROW].to(table)


def save_fromage(model: MultimodalModel, folder: str | Path) -> None:
    """Writes ``pretrained_ckpt.pth.tar`` and ``model_args.json`` as the released code reads them."""
    folder, system = Path(folder), model.system
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.float().cpu().clone() for name, tensor in fromage_state(model).items()}
    torch.save({"state_dict": state}, folder / CHECKPOINT)
    args = {
        "opt_version": system.language.weights, "visual_encoder": system.encoder.weights, "task": "multitask", "freeze_lm": True,
        "freeze_vm": True, "n_visual_tokens": system.connector.tokens, "image_embed_dropout_prob": 0.0, "text_embed_dropout_prob": 0.0,
        "shared_emb_dim": system.fusion.shared, "text_emb_layers": list(system.fusion.layers), "retrieval_token_idx": model.new_tokens[0],
    }  # fmt: skip
    (folder / ARGS).write_text(json.dumps(args, indent=2) + "\n")


def load_fromage(model: MultimodalModel, folder: str | Path) -> None:
    """Reads what ``save_fromage`` or the released training code wrote."""
    file = Path(folder) / CHECKPOINT
    saved = read_state(file)
    load_fromage_state(model, saved.get("state_dict", saved), str(file))


def read_args(folder: str | Path) -> dict[str, Any]:
    """A folder's ``model_args.json``."""
    return json.loads((Path(folder) / ARGS).read_text())


def _own(model: MultimodalModel) -> dict[str, torch.nn.Parameter]:
    """What was learnt apart from the row of [RET], by its published names; ``text_hidden_fcs`` has a map for each layer."""
    if not isinstance(model.system.fusion, spec.Retrieval):
        raise ValueError(f"{model.system.name}: its fusion is {type(model.system.fusion).__name__}; FROMAGe's is Retrieval")
    maps = (f"text_hidden_fcs.{name}" for name, _ in model.fusion.text_hidden_fcs.named_parameters())
    names = _PUBLISHED | {f"model.{name}": f"fusion.{name}" for name in maps}
    return {name: model.get_parameter(ours) for name, ours in names.items()}
