"""LLaMA-Adapter through the trainer: its first loss is the language model's own, and only prompts, gates and the projection move."""

import json
from dataclasses import replace

import pytest
import torch
from mmfast.trainers import config
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.loop import Batches, Options
from mmfast.trainers.supervised import Session, run_stage

STEPS = 12


def test_training_starts_at_the_language_model_and_moves_nothing_of_it(tmp_path):
    recipe = config.load_recipe("llama_adapter", tiny=True)
    stage = recipe.stages[-1]
    stage = replace(stage, optim=replace(stage.optim, lr=0.05, steps=STEPS, batch=8, warmup=0, schedule="constant", hold=0.0))
    session = Session(recipe, seed=0)
    before = {name: p.clone() for name, p in session.model.state_dict().items()}
    options = Options(seed=0, quiet=True, compute=replace(recipe.compute, packing=True))
    run_stage(session, Run(tmp_path), stage, first_step=0, options=options)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    # The same first batch, through the language model alone.
    batch = next(Batches(session.source(stage.data, stage.template, stage.max_length), stage.optim, 0, options.place)(0, 1))[0]
    with torch.no_grad():
        logp = (
            session.model.language(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[:, :-1].log_softmax(-1)
        )
    labels = batch["labels"][:, 1:]
    said = logp.gather(-1, labels.clamp_min(0)[..., None])[..., 0] * (labels >= 0)
    weights = (1 / batch["counts"].clamp_min(1)).float()[batch["groups"]][batch["rows"][:, 1:]]
    assert losses[0] == pytest.approx(float(-(said * weights).sum()), abs=1e-5)
    assert min(losses[-3:]) < losses[0]

    moved = {name for name, p in session.model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {f"connector.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")} | {
        f"fusion.layers.{i}.{n}" for i in (1, 2) for n in ("prompt", "gate")
    }
