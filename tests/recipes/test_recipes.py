"""Every bundled recipe, by name: data that goes to JSON and back, builds at tiny size, and trains what it says."""

import dataclasses
import json

import pytest
import torch
from mmfast.trainers import config
from mmfast.trainers.loop import RunError

from mmfast.data import chat
from mmfast.data.synthetic import World
from mmfast.models import build, tiny
from mmfast.models.tokenizer import word_tokenizer
from mmfast.spec import Alignment, System, to_dict

NAMES = list(config.recipe_names())


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


@pytest.mark.parametrize("name", NAMES)
def test_tiny_builds_and_trains_exactly_its_parts(name):
    recipe = tiny(config.load_recipe(name))
    system = recipe.policy if isinstance(recipe, Alignment) else recipe
    tokenizer = word_tokenizer(World().vocabulary)
    model = build(system, tokenizer=tokenizer)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    for name, parameter in model.named_parameters():
        if name.endswith((".gate", ".skip_gain")):  # they start at 0, where they alone have gradients
            torch.nn.init.constant_(parameter, 0.5)
    ids, labels = chat.encode(
        tokenizer,
        "bare",
        [("<image> describe the picture:", "a red circle")],
        image_tokens=system.image_places,
        image_token=model.image_token,
    )
    parts = [(recipe.train, recipe.template)] if isinstance(recipe, Alignment) else [(s.train, s.template) for s in recipe.stages]
    for train, template in parts:
        chat.check_template(template)
        trained = {id(p) for p in model.train_only(train)}
        model.zero_grad(set_to_none=True)
        pixels = torch.randn(1, 3, system.image.size, system.image.size)
        model(torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss.backward()
        reached = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
        assert reached == trained


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
