"""LLaVA's own files (arXiv:2304.08485): its projection apart from tower and language model, and its deltas over LLaMA, by the names of its release.

``mm_projector.bin`` holds ``model.mm_projector.weight`` and ``.bias``, or in LLaVA-1.5 those of ``.0`` and ``.2``; where pictures stand between
``<im_start>`` and ``<im_end>`` also ``model.embed_tokens.weight``, whole or the rows of these two, which are its last.
``non_lora_trainables.bin`` is the same with ``base_model.model.`` before every name. All are pickles, and read for tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmfast.models.build import MultimodalModel
from mmfast.models.files import read_metadata, read_state, write_state
from mmfast.models.pretrained import IMAGE, load_weights
from mmfast.nn.projector import Projector

PROJECTOR, ROWS = "model.mm_projector.", "model.embed_tokens.weight"


def llava_state(model: MultimodalModel) -> dict[str, Tensor]:
    """The projection and, of tokens around pictures, the input rows by their published names."""
    state = {name: p.detach() for name, p in _own(model).items()}
    return state | ({ROWS: model.language.get_input_embeddings().weight.detach()[around]} if (around := _around(model)) else {})


def load_llava_state(model: MultimodalModel, state: Mapping[str, Tensor], where: str = "projector") -> None:
    """A published projection into a model whose connector is ``Linear`` or ``Mlp``. Rows of tokens around pictures stay where the file has none.

    Raises:
        ValueError: names that are no projection's; another number of maps, or other sizes, than the model's; rows of tokens that it has not.
    """
    own, around, table = _own(model), _around(model), model.language.get_input_embeddings().weight
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    rows = state.pop(ROWS, None)
    if strange := sorted(name for name in state if not name.startswith(PROJECTOR)):
        raise ValueError(f"{where} holds {strange[0]}, which is no part of LLaVA's projection")
    if state.keys() != own.keys():
        raise ValueError(
            f"{where} holds {', '.join(sorted(state)) or 'no projection'}; the connector of {model.system.name}, {model.system.connector}, is "
            f"{', '.join(sorted(own))}"
        )
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{where}: {name}: expected {list(tensor.shape)}, got {list(state[name].shape)}")
    if rows is not None and not around:
        raise ValueError(
            f"{where} holds rows of the tokens around a picture, and {model.system.name} has none; set fusion.begin to <im_start> and fusion.end to "
            "<im_end>"
        )
    if rows is not None and (len(rows) < len(around) or rows.shape[1:] != table.shape[1:]):
        raise ValueError(f"{where}: {ROWS}: expected [{len(around)} or more, {table.shape[1]}], got {list(rows.shape)}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
        if rows is not None:
            table[around] = rows[-len(around) :].to(table)


def load_llava(model: MultimodalModel, path: str | Path) -> None:
    """Reads a released ``mm_projector.bin`` or ``non_lora_trainables.bin``, or what ``save_llava`` wrote.

    Raises:
        ValueError: as ``load_llava_state``, or a file that says that it fits other parts.
    """
    told = read_metadata(path)
    for name, own in fits(model).items():
        if name in told and Path(told[name]).name != Path(own).name:  # the same weights may lie elsewhere
            raise ValueError(
                f"{path}: its projection was trained with {name} {told[name] or 'empty'}, and {model.system.name} has {own or 'none'}; set {name}, or "
                "take another file (load_llava_state reads tensors whatever they were trained with)"
            )
    load_llava_state(model, read_state(path), str(path))


def save_llava(model: MultimodalModel, path: str | Path) -> None:
    """Writes the projection alone: safetensors, which say what it ``fits``, or for ``.bin`` what the released code reads, which says nothing."""
    write_state(llava_state(model), path, fits(model))


def fits(model: MultimodalModel) -> dict[str, str]:
    """What a projection goes with, field by field: the weights and the layer of the tower, the weights of the language model, the tokens around a
    picture. A part that was not read from weights of its own says nothing of them."""
    system = model.system
    begin, end = system.borders or ("", "")
    told = {
        "encoder.weights": system.encoder.weights, "encoder.layer": getattr(system.encoder, "layer", None),
        "language.weights": system.language.weights, "fusion.begin": begin, "fusion.end": end,
    }  # fmt: skip
    return {name: str(value) for name, value in told.items() if value is not None}


def add_delta(base: Mapping[str, Tensor], delta: Mapping[str, Tensor], where: str = "delta") -> dict[str, Tensor]:
    """The tensors of a release that was published as differences to LLaMA's, ``base``, in the delta's precision: base + delta. The projection is
    there as it is; of embeddings and head the rows beyond LLaMA's vocabulary are.

    Raises:
        ValueError: names that base or delta lack, or shapes that differ otherwise.
    """
    delta = {name: tensor for name, tensor in delta.items() if not name.endswith("rotary_emb.inv_freq")}  # a buffer of old versions
    if missing := sorted(base.keys() - delta.keys()):
        raise ValueError(f"{where} holds no {missing[0]}, so it is no delta over this base")
    target = {}
    for name, more in delta.items():
        if name.startswith(PROJECTOR):
            target[name] = more
            continue
        if name not in base:
            raise ValueError(f"{where} holds {name}, which is neither in the base nor of a projection")
        own, rows = base[name].to(more), name in (ROWS, "lm_head.weight")
        if own.shape != more.shape and not (rows and own.shape[1:] == more.shape[1:] and len(own) < len(more)):
            raise ValueError(f"{where}: {name}: expected {list(own.shape)}{' or more rows' if rows else ''}, got {list(more.shape)}")
        target[name] = more.clone()
        target[name][: len(own)] += own
    return target


def merge_delta(base: str | Path, delta: str | Path, out: str | Path) -> None:
    """A folder of LLaMA's weights and one of a released delta to a new folder: the language model and its tokenizer, for ``language.weights``, and
    beside them ``mm_projector.bin``, for ``load_llava``."""
    delta, out = Path(delta), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty")
    files = sorted(delta.glob("*.safetensors")) or sorted(delta.glob("pytorch_model*.bin"))
    if not files:
        raise ValueError(f"delta {delta} holds neither *.safetensors nor pytorch_model*.bin")
    held = {name: tensor for file in files for name, tensor in read_state(file).items()}
    try:
        tokenizer = AutoTokenizer.from_pretrained(delta)
    except Exception as error:  # the tokenizer libraries raise whatever they like
        raise ValueError(f"delta {delta}: no tokenizer can be read: {(str(error).strip().splitlines() or [''])[0]}") from error
    language = load_weights(AutoModelForCausalLM, str(base), "base", next(iter(held.values())).dtype)
    target = add_delta(language.state_dict(), held, f"delta {delta}")
    language.resize_token_embeddings(len(target[ROWS]), mean_resizing=False)
    language.load_state_dict({name: tensor for name, tensor in target.items() if not name.startswith(PROJECTOR)})
    language.save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_state({name: tensor for name, tensor in target.items() if name.startswith(PROJECTOR)}, out / "mm_projector.bin")


def _own(model: MultimodalModel) -> dict[str, nn.Parameter]:
    """The projection's parameters by their published names: a single map has no number."""
    if not isinstance(model.connector, Projector):
        raise ValueError(
            f"{model.system.name}: its connector is a {type(model.system.connector).__name__}; LLaVA's files hold a Linear or an Mlp"
        )
    return {
        PROJECTOR + (name if len(model.connector) > 1 else name.removeprefix("0.")): p for name, p in model.connector.named_parameters()
    }


def _around(model: MultimodalModel) -> list[int]:
    """The ids of the tokens around a picture that are added to a tokenizer."""
    return list(model.new_tokens[: sum(token != IMAGE for token in model.system.borders)])
