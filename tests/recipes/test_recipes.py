"""Every bundled recipe, by name: data that goes to JSON and back, builds at tiny size, and trains what it says."""

import dataclasses
import json
import math
import re
import types
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmfast.trainers import config, describe
from mmfast.trainers.__main__ import run as run_command
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.exams import EXAMS
from mmfast.trainers.loop import Batches, Objective, Options, RunError
from mmfast.trainers.runs import measure, open_run
from mmfast.trainers.supervised import OBJECTIVES, Session, train_system

from mmfast.data import images, supervised
from mmfast.data.synthetic import World
from mmfast.models import lora_parameters, tiny
from mmfast.spec import Alignment, Compute, Stage, System, to_dict

NAMES = list(config.recipe_names())
FLAMINGO, BLIP2, BLIP2_T5 = (config.load_recipe(name) for name in ("flamingo", "blip2", "blip2_flan_t5"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_named_after_its_file_and_says_where_it_comes_from(name):
    recipe = config.load_recipe(name)
    assert recipe.name == name
    assert recipe.paper
    assert isinstance(recipe, System | Alignment)


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_json_and_back(name, shrink):
    recipe = config.load_recipe(name)
    recipe = tiny(recipe) if shrink else recipe
    assert config.from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


# What a tiny form may have at most, where it cannot do with less: recipe, to parameters and why.
LARGER: dict[str, tuple[int, str]] = {
    "chameleon": (1_000_000, "its tokenizer halves a picture four times and keeps the shapes, which takes three quarters of a million"),
}


def small(name: str, steps: int = 2) -> System:
    """The tiny form as a system, with a handful of steps a stage. An alignment's parts train on what its policy's last stage reads."""
    recipe = tiny(config.load_recipe(name))
    if isinstance(recipe, Alignment):
        stage = replace(recipe.policy.stages[-1], name="align", train=recipe.train, lora=recipe.lora, template=recipe.template)
        recipe = replace(recipe.policy, stages=(*recipe.policy.stages, stage))
    few = {stage.name: replace(stage.optim, steps=steps, batch=8, warmup=1) for stage in recipe.stages}
    return replace(recipe, stages=tuple(replace(stage, optim=few[stage.name]) for stage in recipe.stages))


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    """Whatever a built-in set is made of, it is made of a few scenes, and of easy-vqa's questions every fiftieth, about pictures of noise."""
    scenes = World.scenes
    few = types.SimpleNamespace(loads=lambda text: json.loads(text)[::50])
    monkeypatch.setattr(supervised, "json", few)
    monkeypatch.setattr(images, "load", lambda path, size: np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))
    for exam in EXAMS.values():  # their numbers of scenes and episodes
        fewer = {name: 24 if isinstance(value, int) else value for name, value in exam.__kwdefaults__.items()}
        monkeypatch.setattr(exam, "__kwdefaults__", fewer)
    monkeypatch.setattr(World, "scenes", lambda world, split, count, *args, **kw: scenes(world, split, min(count, 48), *args, **kw))


def opened(name: str) -> tuple[System, Session]:
    system = small(name)
    if any(stage.data.name == "easy_vqa" for stage in system.stages):
        pytest.importorskip("easy_vqa", reason="the words and pictures of easy-vqa are in its package")
    return system, Session(system, seed=0)


def objective_of(session: Session, stage: Stage, folder) -> tuple[Objective, Callable[[int], dict]]:
    """A stage's objective over a session whose parts learn as it says, and its batches by step."""
    source = session.source_of(stage)
    session.let_train(stage.train, stage.lora)
    objective, items, _ = OBJECTIVES[stage.objective](session, stage, source, Run(folder), Options(quiet=True))
    batches = Batches(items, stage.optim, 0, session.place)
    return objective, lambda step: next(batches(step, step + 1))[0]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_is_small(name):
    _, session = opened(name)
    most, why = LARGER.get(name, (500_000, ""))
    assert sum(p.numel() for p in session.model.parameters()) < most, why


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_what_a_stage_declares_and_nothing_else(name, tmp_path):
    system, session = opened(name)
    for stage in system.stages:
        objective, batch = objective_of(session, stage, tmp_path / stage.name)
        model, declared = session.model, {id(p) for p in session.model.train_only(stage.train, lora=stage.lora is not None)}
        adapters = {id(p) for p in lora_parameters(model)}
        asked = {id(p) for part in stage.train for p in model.part(part).parameters() if id(p) not in adapters}
        assert declared <= asked | (adapters if stage.lora is not None else set()), stage.name
        for p in model.parameters():  # those parameters of a part that stay frozen are out of reach for this objective
            p.requires_grad_(id(p) in asked | declared)
        with torch.no_grad():  # gates and adapters start at 0, and let no gradient through to what stands behind them
            for p in objective.parameters():
                if p.requires_grad and not p.any():
                    p.normal_(std=0.5)
        objective.zero_grad(set_to_none=True)
        model.train()
        reached: set[int] = set()
        for step in range(3):  # a part may be silent in one batch: a token that no row of it holds
            loss, _ = objective(batch(step), batch(step)["counts"])
            assert loss.isfinite()
            loss.backward()
        for p in objective.parameters():
            if p.grad is not None and p.grad.any():
                reached.add(id(p))
        beside = {id(p) for p in objective.extra.parameters()}
        assert reached - beside == declared, [n for n, p in model.named_parameters() if (id(p) in reached) != (id(p) in declared)]
        assert beside <= reached
        for p in model.partly_trained():
            old = torch.ones(len(p), dtype=torch.bool)
            old[list(model.new_tokens)] = False
            assert not p.grad[old].any(), "only the rows of new tokens learn"


def curve(folder) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["stage"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run_and_one_that_is_cut_and_resumed(name, tmp_path):
    """Through the real loop, stage after stage; the cut falls into the last stage, behind a checkpoint, and the curve goes on as if there had
    been none. What comes out is measured."""
    system, session = opened(name)
    steps = 2 * len(system.stages)
    whole = train_system(system, Run(tmp_path / "whole"), options=Options(quiet=True), session=session)
    assert [step for step, *_ in curve(tmp_path / "whole")] == list(range(1, steps + 1))
    assert all(math.isfinite(value) for row in curve(tmp_path / "whole") for value in row[2:])

    def cut(record: dict) -> None:
        if record["step"] == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_system(system, Run(tmp_path / "cut"), options=Options(quiet=True, save_every=1, trackers=(cut,)))
    resumed = train_system(system, Run(tmp_path / "cut", resume=True), options=Options(quiet=True, resume=True))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    weights = resumed.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in whole.model.state_dict().items())
    measured, *_ = measure(resumed, system, scenes=8)
    assert measured


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_opened_as_it_was_left(name, tmp_path):
    system, session = opened(name)
    run = Run(tmp_path / "run")
    run.write_json("recipe.json", to_dict(system) | {"seed": 0})
    trained = train_system(system, run, options=Options(quiet=True), session=session)
    again, recipe = open_run(tmp_path / "run")
    assert recipe == system
    weights = again.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in trained.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_list_show_and_diff(name, capsys):
    assert not run_command(["list"])
    assert re.search(rf"^{name}\b", capsys.readouterr().out, re.M)
    for flags in ([], ["--tiny"]):
        assert not run_command(["show", name, *flags])
        assert capsys.readouterr().out.startswith(f"{name}  (")
    for other in NAMES:
        assert not run_command(["diff", name, other])
        told = capsys.readouterr().out
        assert ("do not differ" in told) == (other == name)
        assert len(told.splitlines()) <= 150, "defaults that nothing stands against are not told"
        left, right = (describe.flat(config.load_recipe(side)) for side in (name, other))
        if left["kind"] != right["kind"]:  # a system beside a policy
            continue
        rows = {line.split()[0]: line for line in told.splitlines() if line}
        for key in left.keys() & right.keys() - {"name", "paper", "kind"}:
            assert (left[key] == right[key]) or (describe.text(left[key]) in rows[key] and describe.text(right[key]) in rows[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_fits_a_screen(name):
    """A recipe is data that one reads at a glance."""
    import importlib
    from pathlib import Path

    source = Path(importlib.import_module(config.recipe_names()[name]).__file__).read_text()
    assert len(source.splitlines()) <= 60


def test_published_hyper_parameters_of_llava():
    align, instruct = config.load_recipe("llava").stages
    assert (align.train, align.optim.lr, align.optim.batch, align.optim.epochs, align.template) == (("connector",), 2e-3, 128, 1, "plain")
    assert (instruct.optim.lr, instruct.optim.batch, instruct.optim.epochs, instruct.template) == (2e-5, 32, 3, "vicuna_v1")
    assert "encoder" not in instruct.train
    for stage in (align, instruct):
        assert (stage.optim.warmup, stage.optim.weight_decay, stage.optim.schedule, stage.max_length) == (0.03, 0.0, "cosine", 2048)


def test_published_hyper_parameters_of_flamingo():
    (stage,), optim = FLAMINGO.stages, FLAMINGO.stages[0].optim
    assert (optim.lr, optim.steps, optim.warmup, optim.schedule, optim.floor, optim.clip) == (1e-4, 500_000, 5000, "constant", 0, 1.0)
    assert (optim.weight_decay, optim.weight_decay_of) == (0, {"adapter": 0.1})  # the resampler has none
    assert {part.name: part.loss for part in stage.data.parts} == {"m3w": 1.0, "align": 0.2, "ltip": 0.2, "vtp": 0.03}
    assert (stage.max_length, stage.train) == (256, ("connector", "adapter", "new_tokens"))
    assert (stage.data.parts[0].pages.pictures, stage.data.parts[0].pages.following) == (5, 0.5)


def test_published_hyper_parameters_of_blip2():
    for recipe, batches in ((BLIP2, (1680, 1920)), (BLIP2_T5, (1680, 1520))):
        see, speak = (stage.optim for stage in recipe.stages)
        assert (see.steps, speak.steps, see.batch, speak.batch) == (250_000, 80_000, *batches)
        assert (see.floor, speak.floor) == (0, 0.5)  # of 1e-4
        for optim in (see, speak):
            assert (optim.lr, optim.warmup, optim.schedule, optim.betas, optim.weight_decay) == (1e-4, 2000, "cosine", (0.9, 0.98), 0.05)
            assert not optim.decay_vectors
        assert [stage.max_length for stage in recipe.stages] == [32, 64]


@pytest.mark.parametrize(
    "name", ["llava", "kosmos_1", "kosmos_2", "llama_adapter", "flamingo", "blip2", "blip2_flan_t5", "fromage", "chameleon"]
)
def test_what_was_trained_in_half_precision_is(name):
    recipe = config.load_recipe(name)
    assert recipe.compute.precision == "bf16"
    assert recipe.compute.checkpointing == (name == "llava")
    assert tiny(recipe).compute == Compute(device="cpu")


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load_recipe("llava").name = "mine"


def test_what_a_stored_recipe_may_not_hold():
    stored = to_dict(config.load_recipe("llava"))
    with pytest.raises(RunError, match=r"recipe.encoder.wdith: Clip has no field 'wdith' \(did you mean 'width'\?\)"):
        config.from_dict({**stored, "encoder": {**stored["encoder"], "wdith": 3}})
    with pytest.raises(RunError, match=r"unknown kind 'Clipp' \(did you mean 'Clip'\?\)"):
        config.from_dict({**stored, "encoder": {**stored["encoder"], "kind": "Clipp"}})
    with pytest.raises(RunError, match=r"recipe\.stages\.align: Stage is missing optim"):
        config.from_dict({**stored, "stages": [{k: v for k, v in s.items() if k != "optim"} for s in stored["stages"]]})
