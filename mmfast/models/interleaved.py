"""Prompts of texts and pictures in any order, for every kind of fusion, and what a model goes on with.

    write(model, tokenizer, ["Two owls:", Path("a.jpg"), Path("b.jpg"), "The second one is"])

Letters: T tokens, M pictures, H rows and W columns of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmfast import spec
from mmfast.data import chat, images
from mmfast.models.build import MultimodalModel
from mmfast.models.generate import generate, until
from mmfast.models.pretrained import questions
from mmfast.models.tokenizer import plain_text

# A text, or a picture: its file, uint8 [H, W, 3] as ``images.load`` makes it, or pixels [3, H, W] as the tower takes them.
Part = str | Path | Tensor


def encode(model: MultimodalModel, tokenizer: Any, parts: Sequence[Part], *, begin_each: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Token ids [1, T] and the pictures, as ``model`` and all that generates with it take them: ``model.steps(ids, **pictures)``.

    A picture has its places (and the tokens around it, where the system has such) where it stands. The beginning token comes once: before all,
    or where the system has learnt pictures before it (FROMAGe, BLIP-2) before the first text; not at all where the template of its last stage
    has none; ``begin_each``: before each text. The end token follows where the template's encoder has learnt it. A Q-Former that reads questions reads all texts beside each picture.

    Raises:
        ValueError: no part, a picture that cannot be read or has another size, or ``<image>`` in a text.
    """
    if not parts or isinstance(parts, str):
        raise ValueError("expected a list of at least one text or picture")
    system, device = model.system, next(model.parameters()).device
    ids = chat.encode_parts(
        tokenizer, [part if isinstance(part, str) else None for part in parts], image_tokens=system.image_places,
        image_token=model.image_token, borders=tokenizer.convert_tokens_to_ids(list(system.borders)),
        begin="each" if begin_each else _begin(system, tokenizer),
    )  # fmt: skip
    if system.stages and chat.TEMPLATES[system.stages[-1].template].end_asked:
        ids.append(tokenizer.eos_token_id)
    row, shown = torch.tensor([ids], device=device), [_pixels(part, system.image) for part in parts if not isinstance(part, str)]
    if not shown:
        return row, {}
    asked = questions(system, tokenizer)
    return row, {"pixel_values": torch.stack(shown).to(device), **({} if asked is None else asked(row))}


def write(
    model: MultimodalModel, tokenizer: Any, parts: Sequence[Part], *, end: int | None = None, max_new_tokens: int = 64, **options
) -> str:  # fmt: skip
    """The text that a model goes on with behind texts and pictures, up to the token ``end``: by default what ends an answer in the template
    of its last stage, a token or a text, else the tokenizer's end token. Greedy; ``options`` as for ``mmfast.models.generate.generate``.

    A model that draws (Chameleon) writes text alone here, up to where it would begin a picture; ``mmfast.models.drawing.compose`` gives its pictures
    too.

    Raises:
        ValueError: as ``encode``, or a prompt that leaves no room in the model's context.
    """
    (ids, pictures), stop = encode(model, tokenizer, parts), ""
    if end is None and model.system.stages:
        template = model.system.stages[-1].template
        end, stop = chat.last_token(tokenizer, template), chat.TEMPLATES[template].stop
    elif end is None:
        end = tokenizer.eos_token_id
    context = model.system.language.context
    if ids.shape[1] >= context:
        raise ValueError(f"write: the prompt takes {ids.shape[1]} places of the model's {context}, so nothing can follow")
    most = min(max_new_tokens, context - ids.shape[1])
    new = generate(model, ids, end=end, stops=model.stops, max_new_tokens=most, **options, **pictures)[0].tolist()
    return until(plain_text(tokenizer, new[: new.index(end)] if end in new else new), stop)


def _begin(system: spec.System, tokenizer: Any) -> str:
    """Where the beginning token stands: as in the last stage's template, or where there is none as systems of its kind have learnt."""
    if system.stages:
        form = chat.TEMPLATES[system.stages[-1].template]
        return "text" if form.picture_first else "row" if form.begins(tokenizer) else "never"
    return "text" if isinstance(system.connector, spec.QFormer) or isinstance(system.fusion, spec.Retrieval) else "row"


def _pixels(picture: Path | Tensor, plan: spec.Fixed) -> Tensor:
    """[3, H, W] as the tower takes it."""
    if isinstance(picture, Path):
        picture = torch.from_numpy(images.load(picture, images.asked(plan)))
    picture = torch.as_tensor(picture)
    if picture.dtype == torch.uint8 and picture.shape == (plan.size, plan.size, 3):
        return images.normalise(picture[None], plan)[0]
    if not picture.is_floating_point() or picture.shape != (3, plan.size, plan.size):
        raise ValueError(
            f"a picture is {picture.dtype} {list(picture.shape)}, expected its Path, uint8 [{plan.size}, {plan.size}, 3] "
            f"(mmfast.data.images.load makes it) or the tower's pixels [3, {plan.size}, {plan.size}]"
        )
    return picture
