"""The few-shot exam against models whose answers are known: one that reads examples, one that always says the colour, one that never ends."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mmfast.trainers import config, exams
from mmfast.trainers.place import Place
from mmfast.trainers.session import Session

from mmfast.data import chat, supervised
from mmfast.data.episodes import ATTRIBUTES, Plan, Pool
from mmfast.data.synthetic import COUNTS, World, parse
from mmfast.models.tokenizer import word_tokenizer

PICTURES = 2  # tokens of one


class Fake:
    """A model whose pictures' states are their numbers, and whose words are those of ``think(pictures, text) -> answer``."""

    def __init__(self, session, think):
        self.session, self.think = session, think

    def eval(self):
        return self

    def generate(self, ids, *, image_states, image_rows, max_new_tokens):
        tokenizer, rows = self.session.tokenizer, []
        shown = image_states[image_rows][:, 0, 0].int().tolist()
        for row in ids.tolist():
            count = row.count(self.session.image_token) // PICTURES
            pictures, shown = shown[:count], shown[count:]
            text = tokenizer.decode([i for i in row if i != self.session.image_token], skip_special_tokens=True)
            said = tokenizer(self.think(pictures, text), add_special_tokens=False)["input_ids"][:max_new_tokens]
            rows.append(said + [tokenizer.pad_token_id] * (max_new_tokens - len(said)))
        assert not shown
        return torch.tensor(rows)


def session_of(think, template="frozen", added=()):
    world = World()
    tokenizer = word_tokenizer(supervised.vocabulary({"shapes_single"}, world), added)
    session = SimpleNamespace(
        world=world, tokenizer=tokenizer, image_token=tokenizer.convert_tokens_to_ids("<image>"), place=Place(torch.device("cpu"))
    )
    session.encoder = lambda name, length=2048: chat.Encoder(tokenizer, name, PICTURES, session.image_token, 0, length)
    session.states = lambda pictures: torch.arange(len(pictures)).float().view(-1, 1, 1).where(pictures.bool().any(), -1.0)
    session.blind, session.exam_pictures = False, lambda scenes: Session.exam_pictures(session, scenes)
    session.beside = lambda ids: {}
    session.model = Fake(session, think)
    recipe = config.load_recipe("frozen", tiny=True)
    return session, recipe


POOL = Pool(World(), "eval", 1500)


def told(text):
    """Answers of the examples."""
    return [part.split("This is a ")[1].strip() for part in text.split(" .") if "This is a " in part]


def reader(pictures, text):
    """Takes what is common to all examples; without any, the colour."""
    *shown, query = pictures
    answers = told(text)
    for said in ATTRIBUTES.values():
        if all(said(POOL.scenes[p], POOL.world) == answer for p, answer in zip(shown, answers, strict=True)):
            return said(POOL.scenes[query], POOL.world) + " ."
    named = {POOL.name(p): answer for p, answer in zip(shown, answers, strict=True)}
    return named[POOL.name(query)] + " ."


def test_who_reads_the_examples_is_right_and_knows_nothing_without():
    measured = exams.few_shot(*session_of(reader), episodes=90)
    assert all(measured[f"few_shot/{n}"] == 1 for n in (1, 2, 4))
    assert all(measured[name] == 1 for name in exams.NAMINGS)
    assert measured["few_shot/0"] == pytest.approx(1 / 3, abs=0.15)
    assert measured["few_shot/chance"] == pytest.approx((1 / 6 + 1 / 6 + 1 / 36) / 3)


def test_who_repeats_the_last_answer_is_at_chance():
    measured = exams.few_shot(*session_of(lambda pictures, text: ((told(text) or ["dax"])[-1]) + " ."), episodes=300)
    assert measured["few_shot/0"] == 0
    for n in (1, 2, 4):
        assert measured[f"few_shot/{n}"] == pytest.approx(measured["few_shot/chance"], abs=0.08)
    assert measured["naming/inner_1"] == pytest.approx(measured["naming/chance"], abs=0.12)


@pytest.mark.parametrize(
    "spoil", [lambda words: words.replace(" .", ""), lambda words: words.replace(" .", " and ."), lambda words: "a " + words]
)
def test_an_answer_that_does_not_end_there_or_begins_otherwise_is_wrong(spoil):
    measured = exams.few_shot(*session_of(lambda pictures, text: spoil(reader(pictures, text))), episodes=10)
    assert all(value == 0 for name, value in measured.items() if not name.endswith("chance"))


def test_the_end_token_ends_an_answer_too():
    measured = exams.few_shot(*session_of(lambda pictures, text: reader(pictures, text).replace(".", "<eos>")), episodes=10)
    assert measured["few_shot/4"] == 1


def test_any_plan_is_an_exam_and_questions_are_answered_one_by_one():
    """A model that looks each question up, and finds the examples answered as it would; one that says no; one that does not end."""
    plans = {"vqa/2": Plan("vqa", shots=2, repeats=1, induction=True), "three": Plan("naming", ways=3, induction=True)}

    def look(pictures, text):
        if "dax" in text or "This is" in text:
            return reader(pictures, text.partition("Answer with")[2].partition(" . ")[2])
        asked = [part.partition(" ? Answer :") for part in text.split("Question : is there ")[1:]]
        truth = ["yes" if POOL.name(p) in what else "no" for p, (what, *_) in zip(pictures, asked, strict=True)]
        assert text.startswith("Please answer the question . ")
        assert len(pictures) == 5
        assert [answer.strip() for *_, answer in asked] == [*truth[:-1], ""]
        return truth[-1] + " <eos>"

    measured = exams.few_shot(*session_of(look), episodes=40, plans=plans)
    assert measured == {"vqa/2": 1.0, "three": 1.0}
    some = exams.few_shot(*session_of(lambda *_: "no <eos>"), episodes=200, plans={"vqa/0": Plan("vqa", shots=0)})
    assert some["vqa/0"] == pytest.approx(0.5, abs=0.12)
    assert exams.few_shot(*session_of(lambda *_: "no ."), episodes=9, plans={"vqa/0": Plan("vqa", shots=0)}) == {"vqa/0": 0}
    chunks = list(session_of(lambda *_: "no <|endofchunk|>", added=("<|endofchunk|>",)))
    chunks[1] = replace(chunks[1], stages=(replace(chunks[1].stages[-1], template="flamingo"),))
    assert exams.few_shot(*chunks, episodes=200, plans={"vqa/0": Plan("vqa", shots=0)})["vqa/0"] == some["vqa/0"]


def test_a_blind_twin_is_shown_black_pictures():
    seen = set()

    def look(pictures, text):
        seen.update(pictures)
        return "red ."

    session, recipe = session_of(look)
    blind, problems = config.layered("frozen", tiny=True, rest=["--stages.captions.data.blind", "true"])
    assert not problems
    assert Session(blind, seed=0, with_model=False).blind
    session.blind = True
    exams.few_shot(session, blind, episodes=5)
    assert seen == {-1}
    session.blind = False
    exams.few_shot(session, recipe, episodes=5)
    assert min(seen - {-1}) >= 0


def test_instructions_in_text():
    def follow(pictures, text):
        assert not pictures
        asked, *said = parse(text)
        number = sum(m.count for m in said if (m.colour, m.shape) == (asked.colour, asked.shape))
        return (["zero", *COUNTS][number] if text.startswith("how many") else "yes" if number else "no") + " <eos>"

    assert exams.instructed(*session_of(follow), scenes=80)["instructions/right"] == 1
    always = {
        word: exams.instructed(*session_of(lambda *_, word=word: f"{word} <eos>"), scenes=80) for word in ("yes", "no", "one", "zero")
    }
    assert all(measured["instructions/constant"] < 0.4 for measured in always.values())
    assert max(measured["instructions/right"] for measured in always.values()) == always["no"]["instructions/constant"]
    assert exams.instructed(*session_of(lambda *_: "no yes no yes no yes no yes no"), scenes=8)["instructions/right"] == 0


def test_interleaved_prompts_are_answered_in_their_order():
    """Texts of several lengths, with no, one and two pictures."""
    session, _ = session_of(lambda pictures, text: f"{'one' if len(pictures) == 1 else 'two' if pictures else 'zero'} .")
    states = torch.arange(9).float().view(9, 1, 1)
    asked = [("<image> what", [3]), ("what", []), ("<image> is <image>", [4, 5]), ("<image> how", [1])]
    assert exams.answers(session, asked, states, end=".") == ["one", "zero", "two", "one"]
