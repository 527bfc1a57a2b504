"""BLIP-2's own files: LAVIS's names of tower, Q-Former and heads (arXiv:2301.12597), and those of the BERT that a Q-Former starts from.

A file is ``{"model": {name: tensor}}`` and holds what was trained, mostly without the frozen tower. A language model that is in it is read, and
none is written. Two names are one tensor here: the masked-word head's last map is the table of words. A tower's keys have no bias there and one of zeros here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM

from mmfast import spec
from mmfast.models.files import read_state
from mmfast.models.pretrained import load_weights
from mmfast.nn.query_connector import QueryConnector

if TYPE_CHECKING:
    from mmfast.models.build import MultimodalModel

# Theirs and ours, first match wins; {} stands for a layer's number. A prefix, all of a name behind it stays.
_Q_FORMER = {
    "bert.embeddings.word_embeddings.": "qformer.embeddings.word_embeddings.",
    "bert.embeddings.position_embeddings.": "qformer.embeddings.position_embeddings.",
    "bert.embeddings.LayerNorm.": "qformer.embeddings.layernorm.",
    "bert.encoder.layer.{}.attention.self.": "qformer.encoder.layer.{}.attention.attention.",
    "bert.encoder.layer.{}.crossattention.self.": "qformer.encoder.layer.{}.crossattention.attention.",
    "bert.encoder.layer.": "qformer.encoder.layer.",
    "cls.predictions.transform.dense.": "cls.transform.",
    "cls.predictions.transform.LayerNorm.": "cls.norm.",
    "cls.predictions.bias": "cls_bias",
}
_CONNECTOR = {
    **{f"Qformer.{theirs}": ours for theirs, ours in _Q_FORMER.items()},
    **{name: name for name in ("ln_vision.", "query_tokens", "vision_proj.", "text_proj.", "itm_head.", "temp")},
    "opt_proj.": "projection.",
    "t5_proj.": "projection.",
    "llm_proj.": "projection.",
}
_TOWER = {
    "visual_encoder.cls_token": "embeddings.class_embedding",
    "visual_encoder.pos_embed": "embeddings.position_embedding",
    "visual_encoder.patch_embed.proj.": "embeddings.patch_embedding.",
    "visual_encoder.blocks.{}.norm1.": "encoder.layers.{}.layer_norm1.",
    "visual_encoder.blocks.{}.norm2.": "encoder.layers.{}.layer_norm2.",
    "visual_encoder.blocks.{}.attn.qkv.": "encoder.layers.{}.self_attn.qkv.",
    "visual_encoder.blocks.{}.attn.proj.": "encoder.layers.{}.self_attn.projection.",
    "visual_encoder.blocks.{}.mlp.": "encoder.layers.{}.mlp.",
}
_LANGUAGE = {name: "" for name in ("opt_model.", "t5_model.", "llm_model.")}  # transformers' names behind
# The word table's second names, and what is no weight.
_TWICE = ("cls.predictions.decoder.", "bert.embeddings.position_ids", "bert.embeddings.token_type_embeddings.")


def _renamed(name: str, table: dict[str, str]) -> str | None:
    for theirs, ours in table.items():
        if found := re.match(re.escape(theirs).replace(r"\{\}", r"(\d+)"), name):
            return ours.replace("{}", found[1] if found.groups() else "") + name[found.end() :]
    return None


def load_bert(connector: QueryConnector, weights: str) -> None:
    """A masked-word BERT into a Q-Former with text: words, positions, layers (their feed-forward for text and for queries) and head. The queries'
    cross-attention and [DEC], which it does not have, stay as they are; its type embedding is left, as in LAVIS."""
    state = load_weights(BertForMaskedLM, weights, "connector.weights", torch.float32).state_dict()
    own = connector.state_dict()
    for name, value in state.items():
        if name.startswith(_TWICE):
            continue
        to = _renamed(name, _Q_FORMER)
        if to.startswith("cls") and not connector.compares:
            continue
        # The queries' feed-forward starts as the text's.
        for at in dict.fromkeys((to, re.sub(r"(layer\.\d+\.)(intermediate|output)\.", r"\1\2_query.", to))):
            if at not in own or own[at].shape[1:] != value.shape[1:] or len(own[at]) < len(value):
                raise ValueError(f"connector.weights {weights}: {name} {list(value.shape)} does not fit the Q-Former that is declared")
            with torch.no_grad():
                own[at][: len(value)] = value


def load_lavis_state(model: MultimodalModel, state: dict[str, Tensor], where: str = "checkpoint") -> None:
    """LAVIS's tensors into a model whose connector is a ``QFormer``; what the file does not hold stays as it is.

    A Q-Former takes a file of one that reads or compares more, and leaves that. Norms get LAVIS's eps, 1e-5.

    Raises:
        ValueError: a name that is no part of BLIP-2, or a tensor of another size than the model's.
    """
    connector, vision = _connector(model), model.encoder.vision
    own, tower, language, changes = connector.state_dict(), vision.state_dict(), model.language.state_dict(), []
    biases: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.removeprefix("Qformer.").startswith(_TWICE):
            continue
        if found := re.fullmatch(r"visual_encoder\.blocks\.(\d+)\.attn\.([qv])_bias", name):
            biases.setdefault(f"encoder.layers.{found[1]}.self_attn.qkv.bias", {})[found[2]] = value
            continue
        to, parts = _renamed(name, _CONNECTOR), own
        for table, others in ((_TOWER, tower), (_LANGUAGE, language)):
            if to is None:
                to, parts = _renamed(name, table), others
        if to is None:
            raise ValueError(f"{where} holds {name}, which is no part of BLIP-2")
        value = value.view(1) if name == "temp" else value  # a scalar there
        if parts is own and to not in own and not connector.compares:
            continue  # the text's half, or its heads
        if to == "qformer.embeddings.layernorm.weight" or to == "qformer.embeddings.layernorm.bias":
            to = to if to in own else to.replace("embeddings.", "")
        changes.append((name, parts, to, value))
    for to, both in biases.items():
        changes.append((to, tower, to, torch.cat([both["q"], torch.zeros_like(both["q"]), both["v"]])))
    for name, parts, to, value in changes:
        if to not in parts or parts[to].shape != value.shape:
            expected = list(parts[to].shape) if to in parts else "no such tensor"
            raise ValueError(f"{where}: {name}: expected {expected}, got {list(value.shape)}")
    with torch.no_grad():
        for _, parts, to, value in changes:
            parts[to].copy_(value)
    connector.ln_vision.eps = 1e-5


def lavis_state(model: MultimodalModel, projection: str = "opt_proj") -> dict[str, Tensor]:
    """Tower, connector and heads by LAVIS's names; ``projection``: opt_proj, t5_proj or llm_proj."""
    connector, state = _connector(model), {}
    tables = {ours: theirs for theirs, ours in _CONNECTOR.items() if ours != "projection."} | {"projection.": f"{projection}."}
    tables = {"qformer.layernorm.": "Qformer.bert.embeddings.LayerNorm.", **tables}
    for name, value in connector.state_dict().items():
        state[_renamed(name, tables)] = value.view(()) if name == "temp" else value
    if connector.compares:
        state["Qformer.cls.predictions.decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
        state["Qformer.cls.predictions.decoder.bias"] = state["Qformer.cls.predictions.bias"]
    if isinstance(model.system.encoder, spec.Eva):
        for name, value in model.encoder.vision.state_dict().items():
            if name.startswith("post_layernorm."):
                continue
            to = _renamed(name, {ours: theirs for theirs, ours in _TOWER.items()})
            if to.endswith("attn.qkv.bias"):
                q, _, v = value.chunk(3)
                state |= {to.replace("qkv.bias", "q_bias"): q, to.replace("qkv.bias", "v_bias"): v}
            else:
                state[to] = value
    return state


def load_lavis(model: MultimodalModel, path: str | Path) -> None:
    """Reads a ``.pth`` of LAVIS, or what ``save_lavis`` wrote, tensors alone."""
    held = read_state(path)
    load_lavis_state(model, held.get("model", held), str(path))


def save_lavis(model: MultimodalModel, path: str | Path, projection: str = "opt_proj") -> None:
    """Writes what LAVIS's ``load_checkpoint`` reads."""
    torch.save(
        {"model": {name: tensor.detach().float().cpu().contiguous() for name, tensor in lavis_state(model, projection).items()}}, path
    )


def _connector(model: MultimodalModel) -> nn.Module:
    if not isinstance(model.connector, QueryConnector):
        raise ValueError(f"{model.system.name}: its connector is a {type(model.system.connector).__name__}; LAVIS's files hold a QFormer")
    return model.connector
