"""Videos of a user's records through the trainer, where the connector reads frames: one place each, beside pictures."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from gated import open_gates
from mmfast.trainers import config, evaluate, records
from mmfast.trainers.session import Session
from mmfast.trainers.supervised import answer_objective, cached_states, see
from PIL import Image

from mmfast.models import tiny
from mmfast.spec import Data

FLAMINGO = tiny(config.load_recipe("flamingo"))


def session_of(frames):
    session = Session(replace(FLAMINGO, connector=replace(FLAMINGO.connector, frames=frames)), seed=0)
    open_gates(session.model)
    return session


@pytest.fixture(scope="module")
def session():
    return session_of(8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    noise = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(folder / f"{i}.png")
    told = [{"video": ["0.png", "1.png", "2.png"]}, {"image": "3.png"}, {"video": ["2.png", "3.png", "4.png"], "image": "5.png"}]
    asked = ["<video> what", "<image> what", "<video> and <image> what"]
    rows = [{**row, "question": question, "answer": "red circle"} for row, question in zip(told, asked, strict=True)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Data("mine", path=str(folder / "data.jsonl"), frames=3)


def test_a_video_is_one_picture_and_each_of_its_frames_learns(session, data):
    """From pixels and from the states that are kept."""
    source = session.source(data, "flamingo")
    batch, states = source.batch(torch.arange(3)), cached_states(session, source)
    assert (batch["input_ids"] == session.image_token).sum(1).tolist() == [1, 1, 2]
    assert (batch["frames"].tolist(), states.shape[0]) == ([3, 1, 3, 1], 6)
    seen = see(session, batch, None)["image_embeds"]
    assert seen.shape[:2] == (4, session.system.image_tokens)
    torch.testing.assert_close(see(session, batch, states)["image_embeds"], seen, atol=1e-5, rtol=1e-5)
    picture = session.model.embed_images(image_states=states[3:4])
    torch.testing.assert_close(seen[1:2], picture, atol=1e-5, rtol=1e-5)

    session.let_train(("connector", "adapter"), None)
    session.model.zero_grad(set_to_none=True)
    losses = [answer_objective(session, kept)(batch, batch["counts"])[0] for kept in (None, states)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
    losses[0].backward()
    reached = session.model.connector.resampler.frame_embs.grad.abs().amax(1)
    assert (reached > 0).tolist() == [True] * 3 + [False] * 5


def test_a_video_is_asked_about(session, data):
    """As samples during training, and in answers to records, with states that are kept or without; the order of its frames matters."""
    source = session.source(data, "flamingo")
    asked = source.prompts(3)
    assert [frames for *_, frames, _ in asked] == [[3], [1], [3, 1]]
    said = evaluate.answer(session, asked, end=source.encoder.end_token, max_new_tokens=6)
    measured, rows = records.answered(session, source, max_new_tokens=6)
    assert [row["said"] for row in rows] == [text.strip() for text in said]
    assert measured["vqa_questions"] == 3
    assert np.isfinite(evaluate.measure_answers(session, source)["loss"])
    batch = source.batch(torch.tensor([0]))
    turned = {**batch, "pictures": batch["pictures"].flip(0)}
    same, other = (see(session, b, None)["image_embeds"] for b in (batch, turned))
    assert (same - other).abs().max() > 1e-3


def test_without_frames_each_is_a_picture(data):
    session = session_of(0)
    batch = session.source(data, "flamingo").batch(torch.arange(3))
    assert "frames" not in batch
    assert (batch["input_ids"] == session.image_token).sum(1).tolist() == [3, 1, 4]
