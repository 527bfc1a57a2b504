"""OpenFlamingo's own files (arXiv:2308.01390): resampler and gated blocks apart from the frozen parts, under the names of its release.

``perceiver.*`` is the resampler; ``lang_encoder.{layers}.{i}.gated_cross_attn_layer.*`` the block before layer i, where {layers} is what the
family calls its layers (``transformer.blocks``, ``gpt_neox.layers``, ``model.layers``, ``model.decoder.layers``). Embeddings, where they
were trained, are there whole, ``lang_encoder.{the family's name of it}``, and of them ``<|endofchunk|>`` and ``<image>`` are the rows that
learned. Whatever else of frozen parts a file holds is passed over.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfast import spec
from mmfast.models.build import MultimodalModel
from mmfast.models.files import read_state, write_state
from mmfast.models.fusions import blocks

# Kept twice or frozen there: the tower, the layers without their blocks, the blocks in a list of their own.
_ELSEWHERE = re.compile(r"vision_encoder\.|lang_encoder\.(old_decoder_blocks|gated_cross_attn_layers)\.|.*\.decoder_layer\.")


def flamingo_state(model: MultimodalModel, *, embeddings: bool = True) -> dict[str, Tensor]:
    """Resampler, gated blocks and, if wanted, the embeddings by their published names."""
    state = {theirs: tensor.detach() for theirs, tensor in _named(model).items()}
    return state | ({name: p.detach() for name, p in _embeddings(model).items()} if embeddings else {})


def load_flamingo_state(
    model: MultimodalModel, state: dict[str, Tensor], where: str = "checkpoint", *, added: tuple[int, int] | None = None
) -> None:
    """A published state, or a training checkpoint that holds one, into a model with a ``Resampler`` and ``GatedCrossAttention``.

    Args:
        added: the rows of ``<|endofchunk|>`` and ``<image>`` in the file's embeddings, which go to where the model's tokenizer has these
            tokens; all other rows are the language model's own and stay. (OpenFlamingo adds them to its tokenizer in this order: 50277 and
            50278 in the releases.) None: the file's embeddings are taken as they are, in one tokenizer's order.

    Raises:
        ValueError: names or shapes that are not the model's.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.get("model_state_dict", state).items()}
    own, tables = _named(model), _embeddings(model)
    frozen = {f"lang_encoder.{name}" for name, _ in model.language.named_parameters(remove_duplicate=False)}
    given = {name: t for name, t in state.items() if not _ELSEWHERE.match(name)}
    if strange := sorted(set(given) - own.keys() - tables.keys() - frozen):
        raise ValueError(f"{where} holds {strange[0]}, which {model.system.name} has not")
    if missing := sorted(own.keys() - given.keys()):
        raise ValueError(f"{where} holds no {missing[0]}")
    for name, tensor in own.items():
        if given[name].shape != tensor.shape:
            raise ValueError(f"{where}: {name}: expected {list(tensor.shape)}, got {list(given[name].shape)}")
    with torch.no_grad():
        for name, table in tables.items():
            if name not in given:
                continue
            if added is not None:
                here = [*model.new_tokens[1:], model.image_token]
                table[here] = given[name][list(added)[-len(here) :]].to(table)
            elif given[name].shape == table.shape:
                table.copy_(given[name])
            else:
                raise ValueError(
                    f"{where}: {name}: expected {list(table.shape)}, got {list(given[name].shape)}; tell the rows of <|endofchunk|> and "
                    "<image> in it (added) to take these alone"
                )
        for name, tensor in own.items():
            tensor.copy_(given[name])


def load_flamingo(model: MultimodalModel, path: str | Path, *, added: tuple[int, int] | None = None) -> None:
    """Reads a released ``checkpoint.pt``, or what ``save_flamingo`` wrote. ``added``: see ``load_flamingo_state``."""
    load_flamingo_state(model, read_state(path), str(path), added=added)


def save_flamingo(model: MultimodalModel, path: str | Path, *, embeddings: bool = True) -> None:
    """Writes resampler, gated blocks and embeddings: ``.safetensors``, or ``.pt`` as OpenFlamingo's ``load_state_dict(.., strict=False)`` reads."""
    write_state(flamingo_state(model, embeddings=embeddings), path)


def _named(model: MultimodalModel) -> dict[str, Tensor]:
    """Our tensors by their published names."""
    choices = model.system.connector, model.system.fusion
    if not (isinstance(choices[0], spec.Resampler) and isinstance(choices[1], spec.GatedCrossAttention) and choices[1].block == "flamingo"):
        names = " and ".join(type(choice).__name__ for choice in choices)
        raise ValueError(f"{model.system.name}: it is a model of {names}; OpenFlamingo's are of Resampler and GatedCrossAttention")
    layers = f"lang_encoder.{_name_of(model.language, blocks(model.language))}"
    return {f"perceiver.{name}": p for name, p in model.connector.resampler.named_parameters()} | {
        f"{layers}.{i}.gated_cross_attn_layer.{name}": p for i, b in model.fusion.layers.items() for name, p in b.named_parameters()
    }


def _embeddings(model: MultimodalModel) -> dict[str, Tensor]:
    """Input and output embeddings; where they are one, as in MPT, by the input's name."""
    language, weights = model.language, {}
    for module in (language.get_input_embeddings(), language.get_output_embeddings()):
        name = _name_of(language, module)
        if language.config.model_type == "gpt_neox":
            name = name.replace("lm_head", "embed_out")  # as transformers called it then
        weights.setdefault(id(module.weight), (f"lang_encoder.{name}.weight", module.weight))
    return dict(weights.values())


def _name_of(language: nn.Module, module: nn.Module) -> str:
    return next(name for name, m in language.named_modules() if m is module)
