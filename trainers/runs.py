"""A run from its recipe to its folder, and a run folder opened again."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmfast.spec import BUILT_IN, Alignment, Data, Mixture, Stage, System, to_dict

from . import config
from .checkpoint import Run, RunError
from .place import Place, find


@dataclass(frozen=True)
class Start:
    """What a command line says about a run beyond its recipe."""

    out: Path
    seed: int = 0
    resume: bool = False
    save_every: int | None = None
    keep: int = 2
    eval_every: int = 0
    eval_data: Data | None = None
    track: str = ""
    quiet: bool = False

    def __post_init__(self):
        for name, least in (("save_every", 1), ("keep", 1), ("eval_every", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise RunError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")


# ------------------------------------------------------------------------------------------------------------- a new run


def train(recipe: System | Alignment, start: Start) -> None:
    """Everything from the first check to the page. What can be known before data is touched raises ``ValueError`` or ``RunError`` from
    ``prepare``, and so before anything is written."""
    prepare(recipe, start)()


def prepare(recipe: System | Alignment, start: Start) -> partial:
    """The run, ready to be called: model built, settings checked, folder claimed."""
    from .loop import Options
    from .plan import out_of_memory_hint
    from .session import Session
    from .trackers import open_trackers

    recipe = _where_it_lies(recipe)
    place = find(recipe.compute)
    stored = to_dict(recipe) | {"seed": start.seed}
    if start.resume and (start.out / "recipe.json").exists():
        began, seed = read_recipe(start.out)  # what it says nothing of is younger than the run, and stands at its default
        _check_same(to_dict(began) | {"seed": seed}, stored, start.out)
    session = Session(system_of(recipe), seed=start.seed, place=place, precision=recipe.compute.precision)
    # Its family and its context may have been read from weights.
    if wrong := config.compute_misfits(session.system, recipe.compute) + config.length_misfits(recipe, session.system):
        raise RunError(f"{recipe.name}: {wrong[0]}")
    run = Run(start.out, resume=start.resume, keep=start.keep, main=place.main)
    options = Options(
        seed=start.seed, resume=start.resume, save_every=start.save_every, eval_every=start.eval_every, quiet=start.quiet,
        compute=recipe.compute, place=place, trackers=open_trackers(start.track, start.out, stored) if place.main else (),
        out_of_memory=lambda stage: out_of_memory_hint(recipe, stage, processes=place.processes),
    )  # fmt: skip
    return partial(_go, recipe, session, run, options, stored, start.eval_data)


def _go(recipe, session, run: Run, options, stored: dict[str, Any], eval_data: Data | None) -> None:
    _check_records(recipe, session, eval_data)
    run.write_json("recipe.json", stored)
    if isinstance(recipe, System):
        from .supervised import train_system

        finish(recipe, train_system(recipe, run, options=options, session=session), run, eval_data=eval_data)
        return
    from .preference import train_alignment
    from .supervised import base_model, cache_folder

    if session.is_untrained:
        session, _ = base_model(recipe.policy, options=options, cache=cache_folder(run.folder))
    session.tokenizer.save_pretrained(run.folder / "tokenizer")
    exam, before = None, None
    if session.knows_the_world:
        from .evaluate import Exam

        exam = Exam(session)
        measured, before = exam(session, template=recipe.template)
        run.write_json("before.json", measured)
    finish(recipe, train_alignment(recipe, session, run, options=options), run, exam, before, eval_data)


def finish(recipe, session, run: Run, exam=None, before: dict | None = None, eval_data: Data | None = None) -> None:
    """Measures, samples and the page of a trained model; one process does it."""
    from . import benchmarks, report
    from .demo import pick_samples, write_samples
    from .records import measure as measure_records

    if not run.main:
        return
    measured, details, exam = measure(session, recipe, exam=exam)
    if eval_data is not None:
        published = benchmarks.opened(session, eval_data.path, eval_data.images)
        measured |= measure_records(session, recipe, eval_data)[0] if published is None else published.take()
    run.write_json("eval.json", measured)
    if details is not None:
        captions = {"before": before["captions"], "after": details["captions"]} if before else {"model": details["captions"]}
        write_samples(run.folder, session, exam, pick_samples(session, exam, before or details, details), captions)
    report.write(run.folder / "report.html", report.run_page(run.folder))
    shown = (
        "chair_s",
        "chair_i",
        "recall",
        "pope_adversarial_accuracy",
        "loss",
        "answer_accuracy",
    )
    if found := [k for k in measured if (k in shown or "/" in k) and measured[k] is not None]:
        print({k: round(measured[k], 4) for k in found})
    print(f"open {run.folder / 'report.html'}")


def measure(session, recipe, *, exam=None, scenes: int = 500) -> tuple[dict[str, float], dict | None, Any]:
    """What can be measured of a model without more data: the exams of its built-in data, else the shapes world's where it speaks its words, or
    loss and right answers on the test part of easy-vqa where it was trained on that. Returns the measures, the exam's details and the exam,
    where there was one."""
    from mmfast.data.supervised import EasyVQA

    from .evaluate import Exam, measure_answers
    from .exams import EXAMS

    if isinstance(recipe, System) and recipe.stages[-1].objective == "tokenizer":
        from .tokenizer import measure_all

        return measure_all(session, recipe.stages[-1], scenes), None, exam
    template, details, measured = template_of(recipe), None, {}
    own = [EXAMS[data.name] for data in data_of(system_of(recipe)) if data.path is None and data.name in EXAMS]
    if own:
        for take in dict.fromkeys(own):  # sets may share one
            measured |= take(session, system_of(recipe))
    elif session.knows_the_world:
        exam = exam or Exam(session, scenes=scenes)
        measured, details = exam(session, template=template)
    elif any(data.name == "easy_vqa" and data.path is None for data in data_of(recipe)):
        encode = session.encoder(template, recipe.max_length if isinstance(recipe, Alignment) else recipe.stages[-1].max_length)
        test = EasyVQA(encode, encode.pad_token, train=False)
        test.asked = session.questions
        measured = measure_answers(session, test)
    return measured, details, exam


def preview(recipe: System | Alignment, count: int = 2, colour: bool = True) -> str:
    """What is supervised, in colour (or between guillemets), of the first items of every stage whose data is at hand."""
    from mmfast.data.sources import PreferencePairs

    from .preference import OWN_PAIRS, Records
    from .session import Session, parts_of

    if isinstance(recipe, Alignment) and recipe.data.path is None and recipe.data.name == OWN_PAIRS:
        return "no preview: these pairs are made of what the policy says once it is trained"
    stages = [] if isinstance(recipe, Alignment) else [s for s in recipe.stages if s.objective in ("lm", "retrieval")]
    readable = [s for s in stages if all(data.path is not None or data.name in BUILT_IN for data in parts_of(s.data))]
    if not (readable or (isinstance(recipe, Alignment) and recipe.data.path is not None)):
        return "no preview: the data of this recipe is not built in, and none was given (--data FILE)"
    session, shown = Session(system_of(recipe), seed=0, with_model=False), []
    if isinstance(recipe, Alignment):
        encode = session.encoder(recipe.template, recipe.max_length)
        sources = {recipe.name: PreferencePairs(Records(recipe.data, clips=session.system.clips), encode, plan=session.system.image)}
    else:
        sources = {s.name: session.source(s.data, s.template, s.max_length) if s in readable else None for s in stages}
    for name, source in sources.items():
        if source is None:
            shown.append(f"{name}: no preview, its data is not built in and was not given")
            continue
        source.with_pictures = False
        batch = source.take(count) if hasattr(source, "take") else source.batch(torch.arange(min(count, len(source))))
        rows = list(zip(batch["input_ids"], batch["labels"], strict=True))
        for at, (ids, labels) in enumerate(rows):
            view = f", {list(source.views)[at * len(source.views) // len(rows)]}" if hasattr(source, "views") else ""
            shown.append(f"{name}{view}: {_told(session, ids, labels, colour)}")
    return "\n".join(shown)


def _told(session, ids: torch.Tensor, labels: torch.Tensor, colour: bool) -> str:
    """Token ids as text, the supervised ones marked, a picture's places counted."""
    on, off = ("\x1b[32;1m", "\x1b[0m") if colour else ("«", "»")
    runs: list[tuple[str, list[int]]] = []
    for i, label in zip(ids.tolist(), labels.tolist(), strict=True):
        kind = "image" if i == session.image_token else "answer" if label != -100 else "prompt"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(i)
    pad, words = session.tokenizer.pad_token_id, []
    while runs and runs[-1][0] == "prompt" and (not runs[-1][1] or runs[-1][1][-1] == pad):
        runs[-1][1].pop() if runs[-1][1] else runs.pop()
    for kind, tokens in runs:
        text = f"[{len(tokens)} image tokens]" if kind == "image" else session.tokenizer.decode(tokens).replace("\n", "\\n")
        words.append(f"{on}{text}{off}" if kind == "answer" else text)
    return " ".join(words)


def system_of(recipe: System | Alignment) -> System:
    return recipe.policy if isinstance(recipe, Alignment) else recipe


def template_of(recipe: System | Alignment) -> str:
    return recipe.template if isinstance(recipe, Alignment) else recipe.stages[-1].template


def data_of(recipe: System | Alignment) -> list:
    """The data sets of a recipe's stages, mixtures taken apart."""
    from .session import parts_of

    return [recipe.data] if isinstance(recipe, Alignment) else [d for stage in recipe.stages for d in parts_of(stage.data)]


def not_at_hand(recipe: System | Alignment) -> str:
    """A sentence about the first data set that is neither built in nor given, or nothing."""
    from .preference import OWN_PAIRS
    from .session import absent

    name = next((d.name for d in data_of(recipe) if d.path is None and d.name not in (*BUILT_IN, OWN_PAIRS)), None)
    return "" if name is None else absent(name, "pairs" if isinstance(recipe, Alignment) else "data")


def with_data(recipe: System | Alignment, **given: Any) -> System | Alignment:
    """The recipe reading other records, in every stage that reads text; without ``path`` its own records, read otherwise."""
    from .session import parts_of

    if isinstance(recipe, Alignment):
        return replace(recipe, data=replace(recipe.data, **given))

    def other(stage: Stage) -> Stage:
        if "path" not in given:
            parts = tuple(replace(part, **given) for part in parts_of(stage.data))
            return replace(stage, data=replace(stage.data, parts=parts) if isinstance(stage.data, Mixture) else parts[0])
        own = stage.data if isinstance(stage.data, Data) else Data(stage.data.name)  # a mixture gives way to the one set
        return replace(stage, data=replace(own, **given)) if stage.objective in ("lm", "queries", "retrieval") else stage

    return replace(recipe, stages=tuple(map(other, recipe.stages)))


def to_measure(recipe: System | Alignment, path: str, images: str | None, shots: str | None = None) -> Data:
    """Records to measure a recipe's model on, read as the recipe's own records are: a file of conversations has the same names, episodes are
    asked alike but for the fields of ``shots`` (YAML), and a model that saw black pictures alone sees no others; of ScienceQA's problems, whose
    file holds every split, they are the test's.

    Raises:
        RunError: a model that answers nothing and finds nothing.
        ConfigError: wrong ``shots``.
    """
    from .session import is_blind

    if isinstance(recipe, System) and recipe.stages[-1].objective == "tokenizer":
        raise RunError(f"{recipe.name}: its last stage trains an image tokenizer, which answers nothing; records cannot be measured")
    own = next((data for data in reversed(data_of(recipe)) if data.path is not None and isinstance(data, Data)), Data("eval"))
    split = "train" if path.startswith("hub:") else "test"
    asked = own.shots if shots is None else config.read_shots(own.shots, shots)
    return Data(
        "eval", path=path, images=images, split=split, columns=own.columns, frames=own.frames, clean=own.clean, boxes=own.boxes,
        choices=own.choices, pages=replace(own.pages, single=1.0), shots=asked, blind=is_blind(system_of(recipe)),
    )  # fmt: skip


def _check_records(recipe, session, eval_data: Data | None) -> None:
    """Faults in the user's own records are named before the first step, not when the stage that reads them begins."""
    if isinstance(recipe, Alignment):
        if recipe.data.path is not None and session.is_untrained:  # hours of training the base come first
            from .preference import make_source

            make_source(session, recipe)
    else:
        for stage in recipe.stages:
            if any(data.path is not None for data in data_of(replace(recipe, stages=(stage,)))):
                session.source_of(stage)
    if eval_data is not None:
        from .benchmarks import opened
        from .records import source_of

        if opened(session, eval_data.path, eval_data.images) is None:
            source_of(session, recipe, eval_data)


def _where_it_lies(recipe: System | Alignment) -> System | Alignment:
    """The recipe with the whole path of a run that it starts from: a run folder must not depend on where it was begun."""
    system = system_of(recipe)
    if not (system.weights and is_run(system.weights)):
        return recipe
    system = replace(system, weights=str(Path(system.weights).resolve()))
    return replace(recipe, policy=system) if isinstance(recipe, Alignment) else system


def _check_same(before: dict, now: dict, out: Path) -> None:
    """A run is continued with the recipe and seed it was begun with: another would join two curves that do not belong together. How it is
    computed may change."""
    from .describe import flat

    left, right = ({k: v for k, v in flat(d).items() if ".compute." not in f".{k}"} for d in json.loads(json.dumps([before, now])))
    changed = [f"{key} was {left.get(key)!r}, now {right.get(key)!r}" for key in {**left, **right} if left.get(key) != right.get(key)]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise RunError(f"{out} was begun with another recipe: {changed[0]}{more}; give the same options or choose another --out")


# --------------------------------------------------------------------------------------------------------- an earlier run


def is_run(folder: str | Path) -> bool:
    return (Path(folder) / "recipe.json").is_file()


def read_recipe(folder: Path) -> tuple[System | Alignment, int]:
    """A run's recipe and seed.

    Raises:
        RunError: no run folder, or one whose recipe cannot be read.
    """
    try:
        saved = json.loads((folder / "recipe.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is no run folder: recipe.json is missing or unreadable") from error
    return config.from_dict({k: v for k, v in saved.items() if k != "seed"}, f"{folder / 'recipe.json'}: "), saved.get("seed", 0)


def open_run(folder: Path, *, place: Place | None = None) -> tuple[Any, System | Alignment]:
    """The session of a run, its model trained as far as the run got and frozen, and its recipe.

    Raises:
        RunError: no run folder, or none of its checkpoints is intact.
    """
    from .session import Session
    from .supervised import restore

    recipe, seed = read_recipe(folder)
    last = Run(folder, resume=True).last_checkpoint()
    if last is None:
        raise RunError(f"{folder} holds no intact checkpoint")
    session = Session(system_of(recipe), seed=seed, place=place, precision=recipe.compute.precision)
    restore(session, (recipe,) if isinstance(recipe, Alignment) else recipe.stages, last[1])
    session.model.train_only(())
    session.model.eval()
    return session, recipe
