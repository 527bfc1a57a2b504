"""The exam of what reads and writes pictures as codes: its tokenizer, the scenes that it draws, the captions that it writes."""

from __future__ import annotations

from typing import Any

import torch

from mmfast.data.supervised import drawing_caption
from mmfast.data.synthetic import Scene, parse
from mmfast.eval.drawn import Reader, Seen
from mmfast.models.drawing import draw, pixels
from mmfast.models.tokenizer import plain_text
from mmfast.spec import System

from .evaluate import alike
from .tokenizer import measure as measure_tokenizer
from .tokenizer import tokenizer_of

ASKED = 300


def drawing_exam(session: Any, system: System, *, count: int = ASKED) -> dict[str, float]:
    """Held-out scenes of one object, centred as those of training, at the published sampling (temperature 0.7, top-p 0.9, guidance 1.2 and 3.0).

    ``drawn/asked``: the share of drawn pictures that show the colour and shape of their caption, as ``eval.drawn.Reader`` finds them;
    ``drawn/ceiling``: the same of pictures that only went through the tokenizer; ``drawn/placed``: in the place it names as well; ``drawn/alone``: and nothing else. ``drawn/chance``: the first by other captions than
    their own. ``reader/asked``: the first on the world's own pictures. ``caption/class``: the share of captions whose colour and shape are
    the scene's, ``caption/chance`` of other scenes.
    """
    world = session.world
    scenes = world.centred([s for s in world.scenes("eval", 2 * count, classes=(1, 1)) if len(s.objects) == 1][:count])
    true = torch.from_numpy(world.render(scenes))
    measured = measure_tokenizer(session, torch.from_numpy(world.render(world.centred(world.scenes("eval", count)))))
    session.model.eval()
    encode, read = session.encoder("bare"), Reader(world)
    drawn = torch.empty_like(true)
    generator = torch.Generator(session.place.device).manual_seed(session.seed)
    for numbers, ids in alike([encode([(drawing_caption(world, scene), None)])[0] for scene in scenes]):
        drawn[numbers] = draw(session.model, ids.to(session.place.device), generator=generator).cpu()
    through = torch.cat([pixels(session.model, tokenizer_of(session).tokenise(session.pixels(part))).cpu() for part in true.split(64)])
    shown, other = read(drawn.numpy()), [*scenes[count // 2 :], *scenes[: count // 2]]
    measured |= {
        "drawn/asked": _share(map(_asked, scenes, shown)),
        "drawn/ceiling": _share(map(_asked, scenes, read(through.numpy()))),
        "drawn/placed": _share(map(_placed(world), scenes, shown)),
        "drawn/alone": _share(_placed(world)(s, seen) and len(seen) == 1 for s, seen in zip(scenes, shown, strict=True)),
        "drawn/chance": _share(map(_asked, other, shown)),
        "reader/asked": _share(map(_asked, scenes, read(true.numpy()))),
    }
    said = _captions(session, true)
    return measured | {"caption/class": _share(map(_named, scenes, said)), "caption/chance": _share(map(_named, other, said))}


def _asked(scene: Scene, seen: list[Seen]) -> bool:
    return any((found.colour, found.shape) == (scene.objects[0].colour, scene.objects[0].shape) for found in seen)


def _placed(world):
    def placed(scene: Scene, seen: list[Seen]) -> bool:
        asked = scene.objects[0]
        here = [f for f in seen if (world.third(f.row), world.third(f.col)) == (world.third(asked.row), world.third(asked.col))]
        return _asked(scene, here)

    return placed


def _named(scene: Scene, text: str) -> bool:
    told = parse(text)
    return len(told) == 1 and (told[0].colour, told[0].shape) == (scene.objects[0].colour, scene.objects[0].shape)


def _share(found) -> float:
    found = list(found)
    return sum(found) / max(len(found), 1)


def _captions(session: Any, pictures: torch.Tensor) -> list[str]:
    """Greedy, behind a picture alone."""
    t, borders = session.tokenizer, session.tokenizer.convert_tokens_to_ids(list(session.system.borders))
    ids = [t.bos_token_id, borders[0], *[session.image_token] * session.system.image_places, borders[1]]
    prompt = torch.tensor([ids], device=session.place.device).repeat(len(pictures), 1)
    said = session.model.generate(prompt, image_states=session.states(pictures), end=t.eos_token_id, max_new_tokens=24)
    return [plain_text(t, row) for row in said.tolist()]
