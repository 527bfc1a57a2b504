"""Chameleon through the trainer: what a batch holds, what is learnt of it, and the terms that keep it in bounds."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from mmfast.trainers import chat as chatting
from mmfast.trainers import config, evaluate, records
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.drawn import drawing_exam
from mmfast.trainers.loop import Options, rate
from mmfast.trainers.session import Session
from mmfast.trainers.supervised import answer_objective, cached_states, run_stage
from PIL import Image

from mmfast.data import chat, images
from mmfast.data.supervised import shapes_drawing
from mmfast.data.synthetic import World
from mmfast.losses.lm import z_loss
from mmfast.models import tiny
from mmfast.models.tokenizer import word_tokenizer
from mmfast.spec import Data, Fixed, Linear, Optim, Prefix, misfits

RECIPE = config.load_recipe("chameleon")
TINY = tiny(RECIPE)


@pytest.fixture(scope="module")
def session():
    return Session(TINY, seed=0)


@pytest.fixture(scope="module")
def source(session):
    return shapes_drawing(session.world, session.encoder("bare"), count=24)


def test_both_orders_are_whole_sequences_and_all_of_them_is_learnt(session, source):
    t, tokens = session.tokenizer, TINY.encoder.tokens
    begin, end = t.convert_tokens_to_ids(list(TINY.borders))
    first = []
    for i in range(24):
        ids, labels = (x[0].tolist() for x in source.columns[0].batch(torch.tensor([i]))[:2])
        assert (ids[0], ids[-1], labels[0]) == (t.bos_token_id, t.eos_token_id, -100)
        assert labels[1:] == ids[1:]
        at = ids.index(begin)
        assert ids[at + 1 : at + 2 + tokens] == [session.image_token] * tokens + [end]
        first.append(at == 1)
        assert (at + tokens + 2 == len(ids) - 1) == (not first[-1])
    assert first == [i % 2 == 0 for i in range(24)]


def test_labels_are_the_codes_and_questions_pictures_are_not_learnt(session, source):
    model, batch = session.model, source.batch(torch.arange(6))
    codes = model.encode(session.pixels(batch["pictures"]))
    labels = model.targets(batch["labels"], batch["input_ids"], codes, batch["image_rows"])
    assert not (labels == session.image_token).any()
    assert torch.equal(labels[batch["labels"] == session.image_token].view(6, -1), codes[batch["image_rows"]])
    ids, labels = session.encoder("bare")([("<image> what is it?", "a star")])
    assert session.image_token in ids
    assert session.image_token not in labels
    # A picture in an answer is one that the model is to draw.
    ids, labels = session.encoder("bare")([("a star?", "there: <image>")])
    assert labels.count(session.image_token) == TINY.encoder.tokens


def test_answers_pictures_are_learnt_as_their_codes_and_prompts_pictures_are_not(session, tmp_path):
    """Records to loss: the labels of one item against ids written out, its codes those of its second picture's pixels; the loss of these labels."""
    draws = np.random.default_rng(0)
    for name, shape in (("a", (90, 64, 3)), ("b", (64, 90, 3))):
        Image.fromarray(draws.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    said = [{"role": "user", "content": "<image>a circle"}, {"role": "assistant", "content": "red <image>"}]
    (tmp_path / "sft.json").write_text(json.dumps([{"messages": said, "images": ["a.png", "b.png"]}]))
    source = session.source(Data("mine", path=str(tmp_path / "sft.json")), "bare")
    batch, model, vocabulary = source.batch(torch.tensor([0])), session.model, session.tokenizer.get_vocab()
    pixels = [images.load(tmp_path / f"{name}.png", Fixed(size=64, fit=fit)) for name, fit in (("a", "pad"), ("b", "crop"))]
    assert np.array_equal(batch["pictures"][batch["image_rows"]], np.stack(pixels))
    asked, answered = model.encode(session.pixels(torch.from_numpy(np.stack(pixels)))).tolist()
    assert asked != answered
    begin, end = (vocabulary[token] for token in TINY.borders)
    ids = [1, begin, *asked, end, vocabulary["a"], vocabulary["circle"], vocabulary["red"], begin, *answered, end, 2]
    want = torch.tensor([[-100] * (1 + 2 + TINY.encoder.tokens + 2) + [vocabulary["red"], begin, *answered, end, 2]])
    states = model.encode(session.pixels(batch["pictures"]))
    assert torch.equal(model.targets(batch["labels"], batch["input_ids"], states, batch["image_rows"]), want)
    loss, _ = answer_objective(session, None)(batch, batch["counts"])
    logits = model.language.get_output_embeddings()(model.hidden(torch.tensor([ids])))
    plain = torch.nn.functional.cross_entropy(logits[0, :-1], want[0, 1:])
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-5)


def test_a_picture_that_does_not_fit_goes_whole():
    t = word_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "a"), ["<b>", "<e>"])
    sizes = dict(image_tokens=3, image_token=4, borders=(6, 7), learn_pictures=True)
    whole = chat.encode_document(t, "a<image>a<image>", **sizes)[0]
    assert whole == [1, 5, 6, 4, 4, 4, 7, 5, 6, 4, 4, 4, 7, 2]
    for length, left in ((14, 14), (13, 13), (12, 8), (9, 8), (8, 8), (7, 7), (6, 2), (3, 2)):
        ids, labels = chat.encode_document(t, "a<image>a<image>", max_length=length, **sizes)
        assert ids == whole[:left]
        assert labels == [-100, *whole[1:left]]


def test_z_loss_is_its_formula_on_the_scored_tokens(session, source):
    """Against ``losses.z_loss`` on whole logits, of labels with the codes in them; the step's loss is the sum of both."""
    model, batch = session.model, source.batch(torch.arange(5))
    batch["labels"][:, :4] = -100  # not everything is scored
    batch["counts"] = (batch["labels"][:, 1:] != -100).sum().double().view(1)
    both, measures = answer_objective(session, None, 0.1)(batch, batch["counts"])
    plain, _ = answer_objective(session, None)(batch, batch["counts"])
    codes = model.encode(session.pixels(batch["pictures"]))
    images = dict(image_embeds=codes, image_rows=batch["image_rows"])
    logits = model.language.get_output_embeddings()(model.hidden(batch["input_ids"], **images))
    want = z_loss(logits, model.targets(batch["labels"], batch["input_ids"], **images), weight=0.1)
    assert want > 1e-3
    torch.testing.assert_close(measures["loss/z"], want.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both - plain, want, atol=1e-5, rtol=0)
    assert z_loss(torch.tensor([[[1.0, 2, 3], [0, 0, 0]]]), torch.tensor([[-100, 1]]), weight=1e-5).item() == pytest.approx(
        1.161e-4, rel=1e-3
    )


def test_states_that_are_kept_are_the_ids(session, source):
    states = cached_states(session, source)
    assert states.dtype == torch.int64
    assert states.shape == (24, TINY.encoder.tokens)
    assert torch.isin(states, session.model.encoder.words).all()
    batch = source.batch(torch.arange(4))
    plain, cached = (answer_objective(session, s)(batch, batch["counts"])[0] for s in (None, states))
    torch.testing.assert_close(plain, cached)


def test_codes_of_a_step_in_half_precision_are_those_that_are_kept(session, source):
    """What a set too large to be kept is trained on, and what is asked about a picture outside of a step."""
    states, batch = cached_states(session, source), source.batch(torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        shown = session.states_in(batch, None)
    torch.testing.assert_close(shown, states[batch["picture_ids"]], rtol=0, atol=0)


def test_answers_end_where_a_picture_would_begin(session, monkeypatch, tmp_path):
    """Chat and what is measured want text alone; codes may not come in it, so what would follow is not what the model has learnt."""
    head = session.model.language.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[session.model.new_tokens[0]], bias[session.world.vocabulary.index("red")] = 60.0, 50.0
    monkeypatch.setitem(head._parameters, "bias", torch.nn.Parameter(bias))
    pictures = torch.from_numpy(session.world.render(session.world.scenes("eval", 1)))
    (ids, _), states = session.encoder("bare")([("<image> what", None)]), session.states(pictures)
    Image.fromarray(pictures[0].numpy()).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "question": "what", "answer": "red"}]))
    source = session.source(Data("mine", path=str(tmp_path / "a.json")), "bare")

    def said():
        yield chatting.chat(session, [tmp_path / "a.png"], "what", template="bare", max_new_tokens=4)
        yield from evaluate.answer(session, [("what", ids, [1], pictures)], max_new_tokens=4)
        yield from evaluate.caption_all(session, states)[0]
        yield from (row["said"] for row in records.answered(session, source, max_new_tokens=4)[1])

    assert list(said()) == [""] * 4
    bias[session.model.new_tokens[0]] = 0.0
    monkeypatch.setitem(head._parameters, "bias", torch.nn.Parameter(bias))
    assert all(text.startswith("red red") for text in said())


def test_dropout_acts_while_the_language_model_trains_and_is_gone_at_0(session):
    model, ids = session.model, torch.arange(5, 25)[None]
    model.train_only(("language",))
    try:
        model.train()
        still = model.hidden(ids)
        model.drop(0.5)
        model.drop(0.5)  # not twice
        assert len(model._dropouts) == 2 * TINY.language.depth
        assert not torch.equal(model.hidden(ids), model.hidden(ids))
        model.eval()
        assert torch.equal(model.hidden(ids), still)
        model.train()
        model.train_only(())
        assert torch.equal(model.hidden(ids), still), "a frozen part drops nothing"
    finally:
        model.drop(0.0)
        model.train_only(())
    assert not model._dropouts


def test_exponential_decay():
    optim = Optim(lr=2.0, steps=104, warmup=4, schedule="exponential", floor=0.01)
    rates = [rate(optim, step, 104) for step in range(105)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[54] == pytest.approx(2.0 * 0.1)  # halfway of the fall
    assert rates[104] == pytest.approx(2.0 * 0.01)
    factors = [b / a for a, b in pairwise(rates[4:])]
    assert max(factors) - min(factors) < 1e-9
    stages = (replace(RECIPE.stages[1], optim=replace(RECIPE.stages[1].optim, floor=0.0)),)
    assert any("optim.floor: expected more than 0" in p for p in config.check(replace(RECIPE, stages=stages)))


def test_terms_out_of_place():
    first, second, *_ = RECIPE.stages
    for stage, told in (
        (replace(first, z_loss=1e-5), "stages.tokenizer.z_loss: is a term of objective lm, and this is tokenizer; set it to 0"),
        (replace(second, z_loss=-1.0), "stages.pretrain.z_loss: expected at least 0, got -1.0"),
        (replace(second, dropout=1.0), "stages.pretrain.dropout: expected at least 0 and less than 1, got 1.0"),
    ):
        assert told in config.check(replace(RECIPE, stages=(stage,)))


def test_published_hyper_parameters():
    _, pretrain, anneal, sft = RECIPE.stages
    for stage in (pretrain, anneal):
        o = stage.optim
        assert (o.lr, o.betas, o.eps, o.weight_decay, o.clip, o.schedule) == (1e-4, (0.9, 0.95), 1e-5, 0.1, 1.0, "exponential")
        assert (stage.z_loss, stage.dropout, stage.max_length, o.batch * stage.max_length) == (1e-5, 0.1, 4096, 2**23)
    assert (pretrain.optim.warmup, anneal.optim.warmup) == (4000, 0)
    share = pretrain.optim.steps / (pretrain.optim.steps + anneal.optim.steps)
    assert math.isclose(share, 0.8, abs_tol=1e-3)
    assert math.isclose((pretrain.optim.steps + anneal.optim.steps) * 2**23, 9.2e12, rel_tol=1e-2)
    assert (sft.optim.lr, sft.optim.batch, sft.optim.schedule, sft.dropout, sft.z_loss) == (1e-5, 128, "cosine", 0.05, 1e-5)
    language = RECIPE.language
    assert (language.width, language.depth, language.heads, language.kv_heads, language.ffn) == (4096, 32, 32, 32, 11008)
    assert (language.context, language.norm_eps, language.tied, language.vocab) == (4096, 1e-5, False, 65536)


def test_choices_that_do_not_fit():
    for change, sentence in (
        ({"connector": Linear()}, "SharedTokens goes with encoder Vqgan and connector NoConnector"),
        ({"fusion": Prefix()}, "NoConnector leaves states in the tower's width, which GatedCrossAttention reads; with Prefix set Linear"),
    ):
        assert any(sentence in p for p in misfits(replace(TINY, **change)))
    llama = replace(TINY, language=replace(TINY.language, family="llama", norm="after"))
    assert any("language.norm: after is an order of family chameleon, and this is llama" in p for p in misfits(llama))
    both = replace(RECIPE, language=replace(RECIPE.language, weights="somewhere"))
    assert any("language.words: language.weights bring a tokenizer" in p for p in misfits(both))
    assert not misfits(TINY)
    assert not config.check(RECIPE)


def test_a_step_of_each_stage_and_the_exam(tmp_path, monkeypatch):
    """Through the loop, dropout and all; the exam's measures are shares, and its reader is sure of the world's own pictures."""
    scenes = World.scenes
    monkeypatch.setattr(World, "scenes", lambda world, split, count, *args, **kw: scenes(world, split, min(count, 48), *args, **kw))
    session, step = Session(TINY, seed=1), 0
    for stage in (TINY.stages[0], TINY.stages[1]):
        stage = replace(stage, dropout=0.1, optim=replace(stage.optim, steps=2, batch=4))
        step = run_stage(session, Run(tmp_path / stage.name), stage, first_step=step, options=Options(seed=1, quiet=True))
    assert len(session.model._dropouts) == 2 * TINY.language.depth
    source = session.source_of(TINY.stages[1])
    kept = session.states_of(source)
    assert session.states_of(source) is kept  # the tower is as it was
    session.model.encoder.vision.codebook[0] += 1
    assert session.states_of(source) is not kept
    assert session.states_of(session.source_of(TINY.stages[0])) is not session.states_of(source)
    kept = session.states_of(source)
    run_stage(session, Run(tmp_path / "again"), replace(TINY.stages[0], optim=replace(TINY.stages[0].optim, steps=1, batch=4)), first_step=step,
              options=Options(seed=1, quiet=True))  # fmt: skip
    assert session.states_of(source) is not kept
    measured = drawing_exam(session, TINY, count=12)
    assert measured["reader/asked"] == 1.0
    assert all(0 <= value <= 1 for name, value in measured.items() if name.split("/")[0] in ("drawn", "caption", "reader"))
    assert {"codebook/usage", "reconstruction/l2", "drawn/asked", "drawn/chance", "drawn/ceiling", "caption/class"} <= measured.keys()
