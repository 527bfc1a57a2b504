"""Chat: what a model says about a picture, piece by piece; a conversation survives what cannot be done."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from made import Session, photograph
from mmfast.trainers.chat import chat, converse, joint, question
from mmfast.trainers.evaluate import answer, caption_all
from mmfast.trainers.loop import RunError

from mmfast import spec
from mmfast.data import chat as conversations
from mmfast.data import images
from mmfast.models.tokenizer import plain_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def session(folder):
    return Session(folder)


@pytest.fixture(scope="module")
def pictures(folder):
    return [photograph(folder / f"{i}.jpg", seed=i) for i in range(3)]


def by_hand(session, turns, files, tokens):
    """The same by encode and generate."""
    ids, _ = session.encoder("vicuna_v1")(turns)
    pixels = session.pixels(torch.stack([torch.from_numpy(images.load(f, 28)) for f in files])) if files else None
    out = session.model.generate(torch.tensor([ids]), pixel_values=pixels, end=session.tokenizer.eos_token_id, max_new_tokens=tokens)
    return plain_text(session.tokenizer, out[0].tolist())


def test_an_answer(session, pictures):
    pieces = []
    said = chat(session, pictures[:1], "What is this?", template="vicuna_v1", max_new_tokens=16, stream=pieces.append)
    assert said == "".join(pieces) == by_hand(session, [("<image>\nWhat is this?", None)], pictures[:1], 16)
    assert len(pieces) > 3
    other = chat(session, pictures[1:2], "What is this?", template="vicuna_v1", max_new_tokens=16)
    assert other != said, "the picture must matter"


def test_without_and_with_several_pictures(session, pictures):
    options = dict(template="vicuna_v1", max_new_tokens=8)
    assert chat(session, [], "Hello", **options) == by_hand(session, [("Hello", None)], [], 8)
    assert chat(session, pictures[:2], "Which?", **options) == by_hand(session, [("<image><image>\nWhich?", None)], pictures[:2], 8)
    placed = "Is <image> as <image>?"
    assert chat(session, pictures[:2], placed, **options) == by_hand(session, [(placed, None)], pictures[:2], 8)
    with pytest.raises(RunError, match=r"the prompt has 1 <image> places for 2 pictures"):
        chat(session, pictures[:2], "Is <image>?", **options)
    with pytest.raises(RunError, match=r"the prompt has 1 <image> places for 0 pictures"):
        chat(session, [], "Is <image>?", **options)


def test_an_answer_that_ends_with_a_text(session, monkeypatch):
    """Put in the model's mouth: what follows the text that ends llava_v0's answers is not the model's to say."""
    tokens = session.tokenizer("A red one.\n### Human: And", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(session.model, "steps", lambda ids, **given: (torch.tensor([token]) for token in tokens))
    assert chat(session, [], "Which?", template="llava_v0") == "A red one."
    assert chat(session, [], "Which?", template="llava_v1") == "A red one.\n### Human: And"
    monkeypatch.setattr(session.model, "generate", lambda ids, **given: torch.tensor([tokens] * len(ids)))
    monkeypatch.setattr(session, "place", SimpleNamespace(device="cpu"), raising=False)
    for template, told, ended in (("llava_v0", "A red one.", 1), ("llava_v1", "A red one.\n### Human: And", 0)):
        encode = conversations.Encoder(session.tokenizer, template, 4, session.model.image_token, 0)
        assert answer(session, [("Which?", [1, 2], [], torch.zeros(0))], end=encode.end_token, stop=encode.stop) == [told]
        monkeypatch.setattr(session, "encoder", lambda template, encode=encode: encode)
        assert caption_all(session, torch.zeros(2, 4, 32), template) == ([told] * 2, ended)


def test_sampling_repeats_with_its_seed(session, pictures):
    def draw(seed, **options):
        return chat(session, pictures[:1], "?", template="vicuna_v1", max_new_tokens=12, temperature=1.5, seed=seed, **options)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_p=1e-6) == chat(session, pictures[:1], "?", template="vicuna_v1", max_new_tokens=12)


@pytest.mark.parametrize(
    "asked",
    [
        dict(beams=3, length_penalty=-1.0),
        dict(no_repeat=1),
        dict(repetition_penalty=1.5),
        dict(beams=2, no_repeat=2, repetition_penalty=1.2),
    ],
)
def test_decoding_is_what_is_asked_for(session, pictures, asked):
    plain = dict(template="vicuna_v1", max_new_tokens=12)
    said = chat(session, pictures[:1], "What is this?", **plain, **asked)
    ids, _ = session.encoder("vicuna_v1")([("<image>\nWhat is this?", None)])
    pixels = session.pixels(torch.from_numpy(images.load(pictures[0], 28))[None])
    out = session.model.generate(torch.tensor([ids]), pixel_values=pixels, end=session.tokenizer.eos_token_id, max_new_tokens=12, **asked)
    assert said == plain_text(session.tokenizer, out[0].tolist())
    assert said != chat(session, pictures[:1], "What is this?", **plain), "or it would not show that anything was asked"


def test_words_that_the_template_drops_are_told(session, pictures):
    """A run that describes pictures alone would answer another question than the one asked."""
    with pytest.raises(
        RunError, match=r"template plain shows pictures without words, so 'What is this\?' would not be read; .* --prompt ''"
    ):
        chat(session, pictures[:1], "What is this?", template="plain", max_new_tokens=2)
    said = chat(session, pictures[:1], "", template="plain", max_new_tokens=4)
    written = []
    turns = converse(session, ["", f"/image {pictures[0]}", "What?", "", "/quit"], written.append, template="plain", max_new_tokens=4)
    assert [answer for _, answer in turns] == [said]
    assert any("would not be read" in line for line in written)


def test_the_mode_of_the_model_is_kept(session, pictures):
    session.model.train()
    chat(session, [], "Hello", template="vicuna_v1", max_new_tokens=2)
    assert session.model.training
    session.model.eval()


def test_what_stands_between_picture_and_question(session):
    stage = session.system.stages[0]
    assert joint(session.system) == "\n"
    assert joint(replace(session.system, stages=(replace(stage, data=spec.Data("easy_vqa")),))) == " "
    assert joint(replace(session.system, stages=(replace(stage, data=spec.Data("shapes", path="mine.json")),))) == "\n"
    assert joint(replace(session.system, stages=())) == "\n"
    assert question(session.system, "a", 0) == "a"


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("word " * 400, r"the conversation takes \d+ places of the model's 256, so no answer fits"),
    ],
)
def test_a_prompt_that_does_not_fit(session, prompt, sentence):
    with pytest.raises(RunError, match=sentence):
        chat(session, [], prompt, template="vicuna_v1")


def test_an_answer_ends_where_the_context_ends(session):
    ids, _ = session.encoder("vicuna_v1", 4096)([("word", None)])
    count = []
    steps = session.model.steps
    session.model.steps = lambda *a, **k: count.append(k["max_new_tokens"]) or steps(*a, **k)
    try:
        chat(session, [], "word", template="vicuna_v1", max_new_tokens=10_000)
    finally:
        del session.model.steps
    assert count == [256 - len(ids)]


def talk(session, *lines, **options):
    out = []
    turns = converse(session, lines, out.append, template="vicuna_v1", max_new_tokens=6, **options)
    return turns, "".join(out)


def test_a_conversation_has_its_history(session, pictures):
    turns, text = talk(session, "What is this?", "Really?", f"/image {pictures[1]}", "And this?", images=pictures[:1])
    first = by_hand(session, [("<image>\nWhat is this?", None)], pictures[:1], 6)
    second = by_hand(session, [("<image>\nWhat is this?", first), ("Really?", None)], pictures[:1], 6)
    history = [("<image>\nWhat is this?", first), ("Really?", second)]
    third = by_hand(session, [*history, ("<image>\nAnd this?", None)], pictures[:2], 6)
    assert turns == [*history, ("<image>\nAnd this?", third)]
    assert text == f"{first}\n{second}\n1 picture for the next question\n{third}\n"


def test_reset_and_quit(session, pictures):
    turns, text = talk(session, "What is this?", "/reset", "Hello", "/quit", "never asked", images=pictures[:1])
    assert turns == [("Hello", by_hand(session, [("Hello", None)], [], 6))]
    assert "the conversation begins anew\n" in text


def test_what_cannot_be_done_is_a_sentence_and_it_goes_on(session, pictures, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    turns, text = talk(
        session, "", f"/image {tmp_path / 'none.png'}", f"/image {tmp_path / 'empty.png'}", f"/image {tmp_path / 'text.png'}", "/image", "/rest",
        "word " * 400, f"/image {pictures[0]}", "x <image> <image>", "What is this?",
    )  # fmt: skip
    lines = text.split("\n")
    assert "none.png does not exist" in lines[0]
    assert "empty.png cannot be read" in lines[1]
    assert "text.png cannot be read" in lines[2]
    assert lines[3] == "/image needs a file"
    assert lines[4].startswith("unknown command /rest (did you mean '/reset'?); there are: /image FILE")
    assert "so no answer fits" in lines[5]
    assert lines[6] == "1 picture for the next question"
    assert lines[7] == "the prompt has 2 <image> places for 1 pictures"
    assert turns == [("<image>\nWhat is this?", by_hand(session, [("<image>\nWhat is this?", None)], pictures[:1], 6))]


def test_an_interrupted_answer_stays_as_far_as_it_came(session):
    said = []

    def write(piece):
        said.append(piece)
        if len(said) == 2:
            raise KeyboardInterrupt

    turns = converse(session, ["Hello"], write, template="vicuna_v1", max_new_tokens=20)
    assert turns == [("Hello", "".join(said[:2]))]
