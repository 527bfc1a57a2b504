"""Does a model know where things are? Phrases of held-out scenes, each answered by a box, and captions whose phrases come with boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.data import regions
from mmfast.data.supervised import Grounded
from mmfast.data.synthetic import Scene, parse
from mmfast.eval import chair, grounding
from mmfast.models.tokenizer import tagged_text
from mmfast.spec import System

from .evaluate import alike


def grounded(session: Any, system: System, *, scenes: int = 300) -> dict[str, float]:
    """Places and grounded captions of held-out scenes.

    ``grounding/..``: a phrase for each class with one object, the answer one box: mean IoU, share of hits (IoU above one half; an answer that
    holds no box, or several, is a miss), share that cannot be read. ``permuted``: the same questions about another scene's picture.
    ``centre`` and ``constant``: the box in the middle, and the best that always answers alike, both chosen by training boxes. ``ceiling``:
    what the grid of the box tokens allows. ``caption/..``: of what grounded captions claim with a box, the share whose box hits one of that
    class; and recall and false claims of their words.
    """
    world, form = session.world, regions.format_of(system.regions)
    if form is None:
        raise ValueError(f"{system.name}: an exam of places needs a system that speaks of them; set regions")
    shown, side = world.scenes("eval", scenes), world.config.pixels
    states = session.states(session.exam_pictures(shown))
    asked = [
        (i, world.counted(k, 1), Grounded.boxes(scene, k, world.config.shapes)[0])
        for i, scene in enumerate(shown)
        for k, n in zip(world.class_ids(scene), scene.classes, strict=True)
        if n.count == 1
    ]
    targets = [box for *_, box in asked]
    size = (side, side)
    learnt = [o.box for scene in world.scenes("train", 200) for o in scene.objects]
    guesses = {"centre": grounding.centre_box, "constant": grounding.constant_box}
    measured = {}
    for name, states_of in (("", states), ("permuted_", states.roll(len(states) // 2, 0))):
        told = grounding.score(places(session, asked, states_of, form, size), targets)
        measured |= {f"grounding/{name}{key.removeprefix('grounding_')}": value for key, value in told.items()}
    for name, guess in guesses.items():
        box = guess(learnt, [size] * len(learnt), size)
        told = grounding.score([box] * len(targets), targets)
        measured |= {f"grounding/{name}_{key}": told[f"grounding_{key}"] for key in ("mean_iou", "accuracy")}
    rounded = [regions.sole(form.parse(form.encode(box, size), size)) for box in targets]
    measured["grounding/ceiling_mean_iou"] = grounding.score(rounded, targets)["grounding_mean_iou"]
    return measured | captions(session, shown, states, form)


@torch.no_grad()
def generated(session: Any, prompts: Sequence[str], states: Tensor, max_new_tokens: int) -> list[str]:
    """Greedy answers with their tags to ``<image>`` and each prompt; ``states`` [R, N, D], one picture a prompt."""
    encode, model, said = session.encoder("bare"), session.model.eval(), [""] * len(prompts)
    for numbers, ids in alike([encode([(f"<image>{prompt}", None)])[0] for prompt in prompts]):
        seen = states[torch.tensor(numbers, device=states.device)]
        end = session.tokenizer.eos_token_id
        ids = ids.to(session.place.device)
        out = model.generate(ids, image_states=seen, end=end, max_new_tokens=max_new_tokens, **session.beside(ids))
        for i, row in zip(numbers, out.tolist(), strict=True):
            said[i] = tagged_text(session.tokenizer, row)
    return said


def places(session: Any, asked: Sequence[tuple[int, str, Any]], states: Tensor, form: regions.Format, size: regions.Size) -> list:
    """The box that answers each phrase, or None where the answer does not hold exactly one."""
    at = torch.tensor([i for i, *_ in asked], device=states.device)
    said = generated(session, [f"<grounding><phrase>{phrase}</phrase>" for _, phrase, _ in asked], states[at], 6)
    # An answer ends with its region; what a model says beyond it is not of this phrase.
    return [regions.sole(form.parse(text.partition("</object>")[0] + "</object>", size)) for text in said]


def captions(session: Any, scenes: Sequence[Scene], states: Tensor, form: regions.Format) -> dict[str, float]:
    world = session.world
    said = [form.read(text, (world.config.pixels,) * 2) for text in generated(session, ["<grounding>"] * len(scenes), states, 96)]
    boxes = hits = 0
    for scene, reading in zip(scenes, said, strict=True):
        for region in reading.regions:
            for mention in parse(region.phrase):
                k = world.class_of(mention)
                true = Grounded.boxes(scene, k, world.config.shapes) if k is not None else ()
                boxes += len(region.boxes)
                hits += sum(any(grounding.iou(box, t) > 0.5 for t in true) for box in region.boxes)
    told = chair.caption_metrics(world, scenes, [reading.text for reading in said], chair.Cooccurrence(world, world.scenes("train", 2000)))
    return {
        "caption/boxes_right": hits / max(boxes, 1),
        "caption/boxes": boxes / max(len(scenes), 1),
        **{f"caption/{name}": told[name] for name in ("recall", "chair_i")},
    }
