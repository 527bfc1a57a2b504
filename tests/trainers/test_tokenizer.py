"""The tokenizer's stage: it learns, it counts by pictures, and it continues bit for bit, its moving codebook and its critic included."""

import json
from dataclasses import replace

import pytest
import torch
from mmfast.trainers import plan, runs, tokenizer
from mmfast.trainers.checkpoint import Run, RunError
from mmfast.trainers.config import check
from mmfast.trainers.loop import Options
from mmfast.trainers.supervised import Session, train_system
from safetensors.torch import load_file

from mmfast.data import supervised
from mmfast.models import build
from mmfast.spec import Compute, Data, Drawing, Fixed, LanguageModel, Linear, Optim, Stage, System, Vqgan

STAGE = Stage(
    "tokenizer", train=("encoder",), data=Data("shapes"), objective="tokenizer", template="bare",
    optim=Optim(lr=1e-3, steps=4, batch=4, betas=(0.5, 0.9), schedule="constant", warmup=0, clip=0.0),
)  # fmt: skip
SYSTEM = System(
    name="little", connector=Linear(),
    encoder=Vqgan(size=64, channels=8, multipliers=(1, 1, 2, 2), blocks=1, latent=8, width=6, codes=32, groups=4, codebook="ema", dead_below=1.0),
    language=LanguageModel(weights=None, vocab=0, width=16, depth=1, heads=2, kv_heads=2, ffn=32, context=512),
    image=Fixed(size=64, mean=(0.5,) * 3, std=(0.5,) * 3), stages=(STAGE,),
)  # fmt: skip
CRITIC = Drawing(adversarial=0.8, critic_after=2, critic_channels=4, critic_layers=2)


def changed(stage=None, **encoder):
    return replace(SYSTEM, encoder=replace(SYSTEM.encoder, **encoder), stages=(replace(STAGE, **(stage or {})),))


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(
        supervised.Shapes.__init__, "__kwdefaults__", {**supervised.Shapes.__init__.__kwdefaults__, "count": 24, "turns": 1}
    )
    monkeypatch.setattr(tokenizer, "PROBED", 6)


def go(system, folder, *, resume=False, perceptual=None, **options):
    session = Session(system, seed=1)
    session.perceptual = perceptual
    options = Options(seed=1, quiet=True, resume=resume, **options)
    train_system(system, Run(folder, resume=resume), options=options, session=session)
    return session, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "stage", [{}, {"drawing": CRITIC}, {"optim": replace(STAGE.optim, ema=0.9, accumulate=2)}], ids=["ema codes", "critic", "average"]
)
def test_resumes_bit_for_bit(tmp_path, stage):
    system = changed(stage)
    go(system, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):  # in step 4, after a checkpoint of step 3
        stop_in(system, tmp_path / "cut", 3)
    go(system, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / name / "checkpoints" / "step-4" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert {k for k in whole if "_codebook" in k} == {
        f"encoder.vision.quantize._codebook.{k}" for k in ("embed", "embed_avg", "cluster_size", "initted")
    }
    assert [k for k in whole if not torch.equal(whole[k], cut[k])] == []
    states = [torch.load(tmp_path / name / "checkpoints" / "step-4" / "state.pt", weights_only=True) for name in ("whole", "cut")]
    assert states[0]["extra"].keys() == states[1]["extra"].keys()
    assert all(torch.equal(v, states[1]["extra"][k]) for k, v in states[0]["extra"].items())
    if "drawing" in stage:
        assert states[0]["extra"]["critic.seen"] == 4
        assert any("running_mean" in k for k in states[0]["extra"])


def stop_in(system, folder, steps):
    """The loop is killed while it logs the step after ``steps``."""
    run, log = Run(folder), Run.log

    def killed(self, record):
        if record["step"] > steps:
            raise KeyboardInterrupt
        log(self, record)

    run.log = killed.__get__(run)
    train_system(system, run, options=Options(seed=1, quiet=True, save_every=1), session=Session(system, seed=1))


def test_it_learns_and_tells_how(tmp_path):
    session, log = go(changed({"optim": replace(STAGE.optim, lr=5e-3, steps=30, batch=8)}), tmp_path / "run")
    assert log[-1]["loss/reconstruction"] < 0.6 * log[0]["loss/reconstruction"]
    probed = [r for r in log if "codebook/usage" in r]
    assert [r["step"] for r in probed] == [1, 20, 30]
    assert probed[-1]["reconstruction/l1"] < 0.6 * probed[0]["reconstruction/l1"]
    assert 0 < probed[-1]["codebook/usage"] <= 1 <= probed[-1]["codebook/perplexity"] <= 32
    assert log[-1]["loss"] == pytest.approx(log[-1]["loss/reconstruction"] + log[-1]["loss/codebook"], rel=1e-5)
    torch.manual_seed(1)
    before = dict(build(session.system, tokenizer=session.tokenizer).named_parameters())
    still = {n for n, p in session.model.named_parameters() if torch.equal(p, before[n])}
    assert {n.split(".")[0] for n in before if n not in still} == {"encoder"}  # nothing else moved
    assert not [n for n in still if n.startswith("encoder")]  # and all of the encoder did


def test_pieces_of_a_step_add_up(tmp_path):
    """Learned codes and no BatchNorm: a step of 2 x 4 pictures is one of 8."""
    system = [changed({"optim": replace(STAGE.optim, batch=b, accumulate=a)}, codebook="learned") for b, a in ((8, 1), (4, 2))]
    (one, log_one), (two, log_two) = (go(s, tmp_path / str(i)) for i, s in enumerate(system))
    assert [r["loss"] for r in log_two] == pytest.approx([r["loss"] for r in log_one], rel=1e-4)
    for (name, a), b in zip(one.model.named_parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_critic_waits_and_then_pulls(tmp_path):
    _, log = go(changed({"drawing": CRITIC}), tmp_path / "with")
    _, without = go(SYSTEM, tmp_path / "without")
    assert [r["critic_weight"] > 0 for r in log] == [False, False, True, True]
    assert [a["loss/reconstruction"] == b["loss/reconstruction"] for a, b in zip(log, without, strict=True)] == [True, True, True, False]
    for r in log[:2]:  # until then neither player knows of the other
        assert r["loss"] == pytest.approx(r["loss/reconstruction"] + r["loss/codebook"], rel=1e-6)
    weighed = (
        log[2]["loss/reconstruction"] + log[2]["loss/codebook"] + log[2]["critic_weight"] * log[2]["loss/generator"] + log[2]["loss/critic"]
    )
    assert log[2]["loss"] == pytest.approx(weighed, rel=1e-5)


def test_each_player_has_its_own_gradient():
    """The generator's pull reaches what is drawn and not the critic; the critic's loss the critic alone."""
    session = Session(changed({"drawing": replace(CRITIC, critic_after=0)}), seed=1)
    session.let_train(("encoder",), None)
    stage = session.system.stages[0]
    objective = tokenizer.tokenizer_stage(session, stage, Options())
    source = session.source(stage.data, "bare")
    batch = {"pictures": source.load_pictures(torch.arange(4)), "counts": torch.tensor([4.0])}
    critic = objective.extra["critic"]
    pixels = session.pixels(batch["pictures"])
    drawn = torch.zeros_like(pixels).requires_grad_()
    critic.judge(drawn).mean().backward()
    assert drawn.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())
    session.model.train()
    loss, _ = objective(batch, torch.tensor([4.0], dtype=torch.float64))
    loss.backward()
    got = [p.grad.clone() for p in critic.net.parameters()]
    critic.zero_grad()
    from mmfast.losses import critic_loss

    vq = tokenizer.tokenizer_of(Session(session.system, seed=1)).train()
    with torch.no_grad():
        shown = vq(pixels)[0]
    critic_loss(critic.net(pixels), critic.net(shown)).backward()
    for a, b in zip(got, critic.net.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-6, rtol=1e-4)


class Darkness(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, drawn, pixels):
        return self.weight * (drawn.mean((1, 2, 3)) - pixels.mean((1, 2, 3))).square()


def test_a_perceptual_term_without_a_module_is_told(capsys):
    session = Session(SYSTEM, seed=1)
    session.let_train(("encoder",), None)
    for weight, perceptual, told in ((1.0, None, True), (0.0, None, False), (1.0, Darkness(), False)):
        session.perceptual = perceptual
        stage = replace(SYSTEM.stages[0], drawing=replace(SYSTEM.stages[0].drawing, perceptual=weight))
        tokenizer.tokenizer_stage(session, stage, Options())
        assert ("drawing.perceptual is 1 and there is no module for it" in capsys.readouterr().out) == told


def test_a_perceptual_module_is_added_and_stays_as_it_is(tmp_path):
    seen = Darkness()
    _, log = go(SYSTEM, tmp_path / "with", perceptual=seen)
    _, without = go(SYSTEM, tmp_path / "without")
    assert log[0]["loss/reconstruction"] > without[0]["loss/reconstruction"]
    assert seen.weight.item() == 1
    assert not seen.weight.requires_grad


def test_measure_against_the_mean_picture():
    session = Session(SYSTEM, seed=1)
    pictures = session.source(STAGE.data, "bare").pictures
    mean = pictures.float().mean(0)
    before = {k: v.clone() for k, v in session.model.state_dict().items()}
    got = tokenizer.measure(session, pictures, mean=mean, batch=5)
    assert got["reconstruction/mean_l1"] == pytest.approx(((pictures.float() - mean) / 127.5).abs().mean().item(), rel=1e-5)
    assert got["reconstruction/mean_l2"] == pytest.approx(((pictures.float() - mean) / 127.5).square().mean().item(), rel=1e-5)
    vq = tokenizer.tokenizer_of(session)
    ids = vq.tokenise(session.pixels(pictures))
    assert got["codebook/usage"] == pytest.approx(len(ids.unique()) / 32)
    assert got["reconstruction/l1"] == pytest.approx((vq.draw(ids) - session.pixels(pictures)).abs().mean().item(), rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in session.model.state_dict().items())


def test_the_command_trains_and_measures_a_tokenizer(tmp_path):
    """From a recipe to its folder: no exam of a language model that has learnt nothing."""
    runs.train(SYSTEM, runs.Start(tmp_path / "run", seed=1, quiet=True))
    measured = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert measured.keys() == {
        *(f"reconstruction/{k}" for k in ("l1", "l2", "mean_l1", "mean_l2")), "codebook/usage", "codebook/perplexity"
    }  # fmt: skip
    again, _ = runs.open_run(tmp_path / "run")
    pictures = torch.from_numpy(again.world.render(again.world.scenes("eval", 500)))
    assert tokenizer.measure(again, pictures)["reconstruction/l1"] == pytest.approx(measured["reconstruction/l1"], rel=1e-6)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_plan_says_that_it_does_not_know():
    sentence = (
        f"little, {STAGE.name}: the plan knows the memory of objectives lm, words and queries, not of tokenizer; this stage has to be tried"
    )
    with pytest.raises(RunError, match=sentence):
        plan.predict(SYSTEM, STAGE)
    page = plan.page(SYSTEM)
    assert sentence in page
    assert "memory of a process" not in page


def test_as_a_tower_its_states_are_codes():
    session = Session(SYSTEM, seed=1)
    pixels = session.pixels(session.source(STAGE.data, "bare").pictures[:3])
    vq, states = tokenizer.tokenizer_of(session), session.model.encode(pixels)
    assert states.shape == (3, SYSTEM.encoder.tokens, 6)
    torch.testing.assert_close(states, vq.quantize.codebook[vq.tokenise(pixels)])


@pytest.mark.parametrize(
    ("system", "compute", "message"),
    [
        (changed({"train": ("encoder", "connector")}), {}, "trains the encoder alone"),
        (replace(SYSTEM, image=Fixed(size=64)), {}, "image.mean and image.std to 0.5"),
        (SYSTEM, {"checkpointing": True}, "compute.checkpointing off"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, system, compute, message):
    with pytest.raises(RunError, match=message):
        go(system, tmp_path / "run", compute=Compute(**compute))


def test_settings_are_checked():
    assert check(SYSTEM) == []
    problems = "\n".join(map(str, check(changed(channels=6, decay=2.0, multipliers=()))))
    for name in ("encoder.channels", "encoder.decay", "encoder.multipliers"):
        assert name in problems
