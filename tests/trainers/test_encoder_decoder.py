"""Training with T5 as the language model: BLIP-2's second stage, and preferences, on few scenes."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from mmfast.trainers import config, preference
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.evaluate import caption_all, measure_answers
from mmfast.trainers.loop import Options
from mmfast.trainers.recipes.align.dpo import RECIPE as DPO
from mmfast.trainers.session import Session
from mmfast.trainers.supervised import run_stage

from mmfast import spec
from mmfast.data import supervised as data
from mmfast.models import tiny


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setattr(data, "Shapes", partial(data.Shapes, count=64))
    recipe = config.load_recipe("blip2_flan_t5", tiny=True)
    speak = recipe.stages[-1]
    speak = replace(speak, optim=replace(speak.optim, steps=30, batch=16, warmup=2))
    return Session(replace(recipe, stages=(speak,)), seed=0)


def logged(folder, name="loss"):
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_published_recipe():
    """The paper's second stage; the first is that of OPT's."""
    recipe, other = config.load_recipe("blip2_flan_t5"), config.load_recipe("blip2")
    assert recipe.stages[0] == other.stages[0]
    speak = recipe.stages[1]
    assert (speak.train, speak.optim.batch, speak.optim.steps, speak.template) == (("connector",), 1520, 80_000, "blip2_t5")
    assert (speak.optim.lr, speak.optim.lr * speak.optim.floor, speak.optim.warmup, speak.optim.betas) == (1e-4, 5e-5, 2000, (0.9, 0.98))
    assert recipe.compute.precision == "bf16"


def test_a_second_stage_reads_beginnings_and_learns_the_rest(session, tmp_path):
    stage, model = session.system.stages[0], session.model
    source = session.source_of(stage)
    batch = source.batch(torch.arange(64))
    scored = batch["labels"] != -100
    assert (scored.int().diff(dim=1) > 0).sum(1).max() == 1, "what is learnt is one run"
    read = (scored.int().argmax(1) - session.system.image_places - 1).tolist()  # words behind the picture and the beginning token
    assert min(read) == 0
    assert len(set(read)) > 8
    assert torch.equal(source.batch(torch.arange(64))["labels"], batch["labels"]), "drawn once a text"
    assert batch["counts"].sum() == scored.sum()

    frozen = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("connector.")}
    before = measure_answers(session, source)
    run_stage(session, Run(tmp_path), stage, first_step=0, options=Options(quiet=True))
    after = measure_answers(session, source)
    assert after["loss"] < 0.9 * before["loss"]
    assert logged(tmp_path)[0] == pytest.approx(before["loss"], rel=0.2)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    texts, _ = caption_all(session, session.states(source.pictures[:3]), stage.template)
    assert len(texts) == 3


def test_preferences_are_those_of_what_the_decoder_says(session, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    good = {"image": "a.png", "prompt": "describe the picture:", "chosen": "we see a red circle.", "rejected": "we see a green ring."}
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(r) for r in [good] * 4))
    policy = tiny(DPO)
    own = replace(
        policy, policy=session.system, data=spec.Pairs("mine", path=str(tmp_path / "p.jsonl")), template="bare",
        optim=replace(policy.optim, steps=8, batch=4, lr=1e-3),
    )  # fmt: skip
    source = preference.make_source(session, own)
    got = preference.view_logps(session, source.batch(torch.tensor([0])), None)
    pixels = session.pixels(source.load_pictures(torch.tensor([0])))
    for logp, text in zip(got, (good["chosen"], good["rejected"]), strict=True):
        ids, labels = (torch.tensor([x]) for x in session.encoder("bare")([("<image>\ndescribe the picture:", text)]))
        said = labels[labels != -100][None]
        with torch.no_grad():
            out = session.model(ids[:, : ids.shape[1] - said.shape[1]], pixel_values=pixels, labels=said)
        assert logp.item() == pytest.approx(-out.loss.item() * said.numel(), abs=1e-4)
    preference.train_alignment(own, session, Run(tmp_path / "run"), quiet=True)
    losses = logged(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.5
    assert logged(tmp_path / "run", "rewards/accuracies")[-1] == 1


def test_rows_of_several_answers_are_refused(session, tmp_path):
    """The decoder would read the second question in training, and the encoder in use."""
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    talks = [
        [("<image>\nwhat is in the picture?", "a red circle"), ("is it red?", "yes")],
        [("<image>\nis it red?", "yes")],
    ]
    for name, turns in zip(("several", "one"), talks, strict=True):
        said = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": "x7", "image": "a.png", "conversations": said}]))
    sentence = "x7.*something stands between the texts that are learnt .* the decoder of t5 would read in training"
    with pytest.raises(Exception, match=sentence):
        session.source(spec.Data("several", path=str(tmp_path / "several.json"), images=str(tmp_path)), "bare")
    assert len(session.source(spec.Data("one", path=str(tmp_path / "one.json"), images=str(tmp_path)), "bare")) == 1
    with pytest.raises(ValueError, match="something stands between"):
        session.encoder("bare").document("a dog <image> a cat")
    # The world's own questions, four a row else, are one.
    batch = session.source(spec.Data("shapes"), "bare").batch(torch.arange(20))
    said = (batch["labels"] != -100).int()
    assert len(said) == 40
    assert ((said.diff(dim=1) > 0).sum(1) == 1).all()
    # What is asked after earlier answers is read whole.
    ids, _ = session.encoder("blip2_t5_vqa")([*talks[0][:1], ("is it red?", None)])
    assert ids.count(session.tokenizer.eos_token_id) == 1
    assert ids[-1] == session.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compute": spec.Compute(packing=True)}, "compute.packing: the decoder of t5 cannot keep packed rows apart; leave packing off"),
        ({"compute": spec.Compute(device="cuda", precision="fp16")}, "compute.precision: t5 overflows in fp16; set bf16"),
        ({"template": "blip2_t5"}, "template: blip2_t5 reads a part of each answer, drawn by its words, and learns the rest"),
    ],
)  # fmt: skip
def test_what_an_alignment_of_it_cannot_do(changes, sentence):
    own = replace(DPO, policy=config.load_recipe("blip2_flan_t5"))
    assert not [problem for problem in config.check(own) if problem.startswith(sentence.partition(":")[0])]
    assert any(problem.startswith(sentence) for problem in config.check(replace(own, **changes)))
