"""Few-shot episodes: the published prompts word for word, answers that are true of the pictures, and knobs that do what they say."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmfast.data import chat, supervised
from mmfast.data.episodes import ATTRIBUTES, FILLERS, NONSENSE, PROMPTS, WORDS, Episode, Plan, Pool, chosen, mixed, most_similar, orderings
from mmfast.data.formats import parse
from mmfast.data.synthetic import Draws, World
from mmfast.models.tokenizer import word_tokenizer
from mmfast.spec import Shots


@pytest.fixture(scope="module")
def pool():
    return Pool(World(), "eval", 1500)


def episodes(pool, plan, count=40):
    return mixed(pool, count, purpose=8, plans=(plan,))


def test_the_published_strings():
    two = Episode(((3, "dax"), (4, "blicket")), 5, "dax", "naming", induction=True, words=("dax", "blicket"))
    frozen = PROMPTS["frozen"]
    assert frozen.prompt(two).split("<image>") == [
        "Answer with dax or blicket. ", "This is a dax. ", "This is a blicket. ", "Q: What is this? A: This is a",
    ]  # fmt: skip
    assert frozen.document(two) == frozen.prompt(two) + " dax."
    shown = Episode(((3, "two cats"),), 5, "a dog", "attribute")
    flamingo = PROMPTS["flamingo"]
    assert flamingo.document(shown) == "<image>Output: two cats<|endofchunk|><image>Output: a dog<|endofchunk|>"
    assert flamingo.prompt(shown, unseen=True) == "Output: two cats<|endofchunk|><image>Output:"
    asked = Episode((), 0, "yes", "naming", induction=True, question="is it big?")
    assert flamingo.document(asked) == "Please answer the question.<image>Question: is it big? Answer: yes<|endofchunk|>"
    assert frozen.prompt(asked).endswith("<image>Question: is it big? Answer:")


ASKED = Episode(((3, "red", "what colour?"), (4, "yes", "is it big?")), 5, "no", "vqa", induction=True, question="is it {small}?")


@pytest.mark.parametrize(
    ("prompt", "document"),
    [
        (
            "frozen",
            "Please answer the question. <image>Question: what colour? Answer: red <image>Question: is it big? Answer: yes "
            "<image>Question: is it {small}? Answer: no",
        ),
        (
            "kosmos",
            "Please answer the question. <image>Question: what colour? Answer: red <image>Question: is it big? Answer: yes "
            "<image>Question: is it {small}? Answer: no",
        ),
        (
            "flamingo",
            "Please answer the question.<image>Question: what colour? Answer: red<|endofchunk|><image>Question: is it big? Answer: yes"
            "<|endofchunk|><image>Question: is it {small}? Answer: no<|endofchunk|>",
        ),
        (
            "open_flamingo",
            "Please answer the question.<image>Question:what colour? Short answer:red<|endofchunk|><image>Question:is it big? Short answer:yes"
            "<|endofchunk|><image>Question:is it {small}? Short answer:no<|endofchunk|>",
        ),
    ],
)
def test_every_example_has_its_own_question(prompt, document):
    """The published words, written out; as a conversation the same, the answers and what ends them alone in the answers."""
    say = PROMPTS[prompt]
    assert say.document(ASKED) == document
    assert document.startswith(say.prompt(ASKED))
    turns = say.turns(ASKED, lambda picture: f"({picture})")
    end = say.after("any")
    assert [answer.strip() for _, answer in turns] == ["red" + end, "yes" + end, "no" + end]
    joined = "".join(asked + answer for asked, answer in turns)
    assert re.sub(r"\(\d\) ", "<image>", joined) == document
    unseen = say.prompt(ASKED, unseen=True)
    assert unseen.count("<image>") == 1
    assert unseen.replace("<image>", "") == say.prompt(ASKED).replace("<image>", "")


def test_captions_and_memes():
    shown = Episode(((3, "two cats"),), 5, "a dog", "attribute")
    assert PROMPTS["kosmos"].document(shown) == "<image>An image of two cats <image>An image of a dog"
    assert PROMPTS["open_flamingo"].document(shown) == "<image>Output:two cats<|endofchunk|><image>Output:a dog<|endofchunk|>"
    memes = Episode(((1, "yes", "go home"),), 2, "no", "memes", question="good morning")
    assert PROMPTS["hateful_memes"].document(memes) == (
        "<image>is an image with: 'go home' written on it. Is it hateful? Answer:yes<|endofchunk|>"
        "<image>is an image with: 'good morning' written on it. Is it hateful? Answer:no<|endofchunk|>"
    )


def test_questions_about_pictures_are_true_and_one_half_each(pool):
    plan = Plan("vqa", shots=3, repeats=1, induction=True)
    said = []
    for episode in episodes(pool, plan, 200):
        assert len(episode.examples) == 6
        assert episode.examples[:3] == episode.examples[3:]
        for picture, answer, question in (*episode.examples[:3], (episode.query, episode.answer, episode.question)):
            assert question.startswith("is there a")
            assert (pool.name(picture) in question) == (answer == "yes")
            assert answer in ("yes", "no")
            said.append((answer, question))
    assert len({question for _, question in said}) == 36
    assert 0.4 < sum(answer == "yes" for answer, _ in said) / len(said) < 0.6
    text = PROMPTS["frozen"].document(episodes(pool, plan, 1)[0])
    encode = encoder()
    assert encode.tokenizer.unk_token_id not in encode.document(text)[0], "a tiny model knows the words"


def test_fewer_examples_of_an_episode():
    """Worked by hand on three classes of two pictures."""
    shown = ((0, "dax"), (1, "blicket"), (2, "perpo"), (3, "dax"), (4, "blicket"), (5, "perpo"))
    episode = Episode(shown, 6, "perpo", "naming", words=("dax", "blicket", "perpo"))

    def left(**shots):
        made = chosen(episode, Shots(**shots))
        return [p for p, *_ in made.examples], made.words

    names = ("dax", "blicket", "perpo")
    assert left() == ([0, 1, 2, 3, 4, 5], names)
    assert left(ways=2) == ([0, 2, 3, 5], ("dax", "perpo"))
    assert left(ways=1) == ([2, 5], ("perpo",))
    assert left(inner_shots=1) == ([0, 1, 2], names)
    assert left(shots=4) == ([0, 1, 2, 3], names)
    assert left(ways=2, inner_shots=1, repeats=2) == ([0, 2, 0, 2, 0, 2], ("dax", "perpo"))
    assert left(shots=0) == left(inner_shots=0) == ([], names)
    assert chosen(episode, Shots(induction=True)).induction
    assert chosen(replace(episode, induction=True), Shots()).induction
    for shots, sentence in (
        (Shots(ways=4), "has examples of 3 answers, and ways is 4"),
        (Shots(inner_shots=3), "has 2 examples of 'dax', and inner_shots is 3"),
        (Shots(shots=7), "has 6 examples, and shots is 7"),
    ):
        with pytest.raises(ValueError, match=sentence):
            chosen(episode, shots)
    with pytest.raises(ValueError, match="has no example of the right answer, 'slation', which ways keeps"):
        chosen(replace(episode, answer="slation"), Shots(ways=2))


def test_attribute_episodes_are_true_and_say_which_attribute_is_meant(pool):
    for episode in episodes(pool, Plan("attribute", shots=3)):
        told = [*((p, answer) for p, answer, _ in episode.examples), (episode.query, episode.answer)]
        fits = [name for name, said in ATTRIBUTES.items() if all(said(pool.scenes[p], pool.world) == answer for p, answer in told)]
        assert len(fits) == 1
        assert fits[0] in Plan().attributes
    assert {e.examples for e in episodes(pool, Plan("attribute", shots=0))} == {()}
    place = episodes(pool, Plan("attribute", attributes=("place",)))[0]
    assert place.answer.split()[0] in ("top", "middle", "bottom")


def test_naming_binds_words_to_classes_for_an_episode(pool):
    plan = Plan("naming", ways=3, inner_shots=2, repeats=1, induction=True)
    bound = set()
    for episode in episodes(pool, plan):
        assert len(episode.examples) == 3 * 2 * 2
        assert episode.examples[:6] == episode.examples[6:]
        first = episode.examples[:6]
        assert len({p for p, *_ in first} | {episode.query}) == 7  # every picture is another one
        classes = {word: {pool.name(p) for p, w, _ in first if w == word} for word in episode.words}
        assert all(len(names) == 1 for names in classes.values())
        assert len(set.union(*classes.values())) == 3
        assert classes[episode.answer] == {pool.name(episode.query)}
        assert {w for _, w, _ in first[:3]} == {w for _, w, _ in first[3:]} == set(episode.words)  # interleaved
        bound |= {(word, *names) for word, names in classes.items()}
    assert len({word for word, _ in bound}) == len(NONSENSE)
    assert len({name for _, name in bound}) > 20
    orders = [[w for _, w, _ in e.examples[:2]] for e in episodes(pool, Plan("naming", inner_shots=4, order="shuffled"))]
    assert any(len(set(words)) == 1 for words in orders)


def test_an_episode_depends_on_seed_purpose_and_number_alone(pool):
    plans = (Plan("naming"), Plan("attribute"))
    assert mixed(pool, 9, purpose=1, plans=plans)[:4] == mixed(pool, 4, purpose=1, plans=plans)
    assert mixed(pool, 9, purpose=1, plans=plans) != mixed(pool, 9, purpose=2, plans=plans)


def test_every_class_is_as_likely(pool):
    queries = [pool.name(e.query) for e in episodes(pool, Plan("attribute", shots=0), 3600)]
    counts = np.unique(queries, return_counts=True)[1]
    assert len(counts) == 36
    assert counts.min() > 60
    assert counts.max() < 150


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"ways": 6}, "ways is 6, expected 1 to 5"), ({"shots": -1}, "shots is -1"), ({"attributes": ("size",)}, "expected some of colour")],
)
def test_plans_that_cannot_be(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Plan(**change)


def encoder(template="frozen", image_tokens=2, added=()):
    tokenizer = word_tokenizer(supervised.vocabulary({"shapes_episodes"}, World()), added)
    return chat.Encoder(tokenizer, template, image_tokens, tokenizer.convert_tokens_to_ids("<image>"), 0)


def test_new_words_leave_the_old_ids():
    old, new = World().vocabulary, supervised.vocabulary({"shapes_told", "shapes"}, World())
    assert new == (*old, *WORDS)
    assert supervised.vocabulary({"shapes"}, World()) == old
    assert len(set(new)) == len(new)


@pytest.mark.parametrize(("template", "added"), [("frozen", ()), ("flamingo", ("<|endofchunk|>",))])
def test_documents_supervise_all_text_and_show_their_pictures_in_order(template, added):
    encode, world = encoder(template, added=added), World()
    source = supervised.shapes_episodes(world, encode, 16)
    pool = Pool(world, "single", 3000)
    made = mixed(pool, 16, purpose=1, plans=supervised.TAUGHT)
    assert encode.tokenizer.unk_token_id not in source.columns[0].ids
    batch = source.batch(torch.tensor([3, 9]))
    image = batch["input_ids"] == encode.image_token
    assert image.sum(1).tolist() == [2 * len(made[i].pictures) for i in (3, 9)]
    shown = batch["picture_ids"][batch["image_rows"]].tolist()
    assert shown == [*made[3].pictures, *made[9].pictures]
    assert torch.equal(batch["pictures"][batch["image_rows"][0]], torch.from_numpy(world.render([pool.scenes[made[3].pictures[0]]]))[0])
    text = ~image & (batch["input_ids"] != 0) & (batch["input_ids"] != encode.tokenizer.bos_token_id)
    assert torch.equal(batch["labels"] != -100, text)


def test_told_episodes_have_other_words_where_a_picture_was_and_do_not_teach_them():
    encode, world = encoder(), World()
    source = supervised.shapes_told(world, encode, 8)
    assert source.picture_count == 0
    assert source.pictures.shape == (0, 64, 64, 3)
    pool = Pool(world, "single", 3000)
    for i, episode in enumerate(mixed(pool, 8, purpose=2, plans=supervised.TOLD)):
        text = "Answer with {} or {} . ".format(*episode.words) if episode.induction else ""
        answers = []
        for picture, answer, _ in episode.examples:
            text += f"{pool.told(picture)} This is a {answer} . "
            answers.append(f"This is a {answer} .")
        text += f"{pool.told(episode.query)} Q : What is this ? A : This is a {episode.answer} ."
        ids, labels = source.columns[0].ids[i], source.columns[0].labels[i]
        assert encode.tokenizer.decode(ids, skip_special_tokens=True) == text
        assert encode.tokenizer.decode(labels[labels >= 0]) == " ".join([*answers, f"{episode.answer} . <eos>"])
    chunks = encoder("flamingo", added=("<|endofchunk|>",))
    assert chunks.end_token == chunks.tokenizer.convert_tokens_to_ids("<|endofchunk|>")  # nothing that follows is of the same picture
    assert encode.end_token == encode.tokenizer.eos_token_id
    other = supervised.shapes_told(world, chunks, 1).columns[0]
    assert (other.ids == chunks.tokenizer.convert_tokens_to_ids("<|endofchunk|>")).sum() == 8
    assert (other.ids == chunks.tokenizer.eos_token_id).sum() == 1
    names = [pool.told(p) for p in range(len(pool.scenes))]
    assert len({tuple(sorted(w for w in name.split() if w not in FILLERS)) for name in names}) == 36  # the classes, in any order
    assert {len(name.split()) for name in names} == {2, 3, 4, 5, 6}
    assert not {word for name in names for word in name.split()} & {word for p in range(99) for word in pool.name(p).split()}


def test_single_pictures_are_captioned_in_three_ways():
    encode, world = encoder(), World()
    source = supervised.shapes_single(world, encode, 20)
    pool, texts = Pool(world, "single", 20), []
    for i, scene in enumerate(pool.scenes):
        colour, shape = world.class_name(scene.objects[0].colour * 6 + scene.objects[0].shape).split()
        texts += [(i, f"This is a {said} .") for said in (colour, shape, f"{colour} {shape}")]
    said = [encode.tokenizer.decode(ids, skip_special_tokens=True) for ids in source.columns[0].ids]
    assert [(*shown, text) for shown, text in zip(source.shown, said, strict=True)] == texts


def test_the_published_files_are_records():
    row = {
        "image_1": "a.jpg", "caption_1": "This is a dax.", "image_2": "b.jpg", "caption_2": "This is a blicket.",
        "question_image": "c.jpg", "question": "Q: What is this? A: This is a", "answer": "dax",
    }  # fmt: skip
    record = parse(row, 0, root="pictures")
    assert record.turns == (("<image>This is a dax. <image>This is a blicket. <image>Q: What is this? A: This is a", "dax"),)
    assert [p.source for p in record.pictures] == ["pictures/a.jpg", "pictures/b.jpg", "pictures/c.jpg"]
    alone = parse({"question_image": "c.jpg", "question": "what?", "answer": "a"}, 0, root="")
    assert alone.turns == (("<image>what?", "a"),)
    with pytest.raises(ValueError, match=r'has 2 examples and a question, but no "caption_2"'):
        parse({k: v for k, v in row.items() if k != "caption_2"}, 0, root="")
    with pytest.raises(ValueError, match='but no "question_image"'):
        parse({k: v for k, v in row.items() if k != "question_image"}, 0, root="")


FILE = {
    "image_1": "a.jpg", "caption_1": "This is a dax.", "image_2": "b.jpg", "caption_2": "This is a blicket.", "image_3": "d.jpg",
    "caption_3": "This is a dax.", "question_image": "c.jpg", "question": "Q: What is this? A: This is a", "answer": "blicket",
}  # fmt: skip
VQA = {
    "image_1": "a.jpg", "question_1": "what colour?", "answer_1": "red", "image_2": "b.jpg", "question_2": "is it big?", "answer_2": "yes",
    "question_image": "c.jpg", "question": "is it small?", "answer": "no",
}  # fmt: skip


def asked_of(row, **shots):
    """The prompt of a record, and its pictures."""
    record = parse(row, 0, root="", shots=Shots(**shots))
    ((prompt, answer),) = record.turns
    assert answer == row["answer"]
    return prompt, "".join(p.source[0] for p in record.pictures)


def test_records_have_every_knob():
    query = "<image>Q: What is this? A: This is a"
    assert asked_of(FILE, induction=True, inner_shots=1, repeats=1) == (
        "Answer with dax or blicket. " + "<image>This is a dax. <image>This is a blicket. " * 2 + query, "ababc",
    )  # fmt: skip
    assert asked_of(FILE, ways=1) == (f"<image>This is a blicket. {query}", "bc")
    assert asked_of(FILE, shots=2, unseen=True) == (f"This is a dax. This is a blicket. {query}", "c")
    assert asked_of(FILE, prompt="flamingo", shots=2) == (
        "<image>Output: dax<|endofchunk|><image>Output: blicket<|endofchunk|><image>Output:", "abc",
    )  # fmt: skip
    other = {**FILE, "caption_1": "A cat.", "question": "which one? ", "answer": "cat"}  # no words that are known: all as it stands
    assert asked_of(other, induction=True, shots=1) == ("Please answer the question. <image>A cat. <image>which one? ", "ac")
    assert asked_of(other, prompt="kosmos", shots=1) == ("<image>A cat. <image>Question: which one?  Answer:", "ac")
    with pytest.raises(ValueError, match="has 1 examples of 'blicket', and inner_shots is 2"):
        asked_of(FILE, inner_shots=2)


def test_records_of_questions_and_answers():
    assert asked_of(VQA) == (
        "<image>Question: what colour? Answer: red <image>Question: is it big? Answer: yes <image>Question: is it small? Answer:", "abc",
    )  # fmt: skip
    assert asked_of(VQA, prompt="open_flamingo", shots=1, induction=True, repeats=1) == (
        "Please answer the question." + "<image>Question:what colour? Short answer:red<|endofchunk|>" * 2
        + "<image>Question:is it small? Short answer:", "aac",
    )  # fmt: skip
    memes = {name: text for name, text in VQA.items() if not name.endswith("_2")}
    assert asked_of(memes, prompt="hateful_memes") == (
        "<image>is an image with: 'what colour?' written on it. Is it hateful? Answer:red<|endofchunk|>"
        "<image>is an image with: 'is it small?' written on it. Is it hateful? Answer:", "ac",
    )  # fmt: skip
    captions = {"image_1": "a.jpg", "answer_1": "two cats", "question_image": "c.jpg", "answer": "a dog"}
    assert asked_of(captions, prompt="flamingo") == ("<image>Output: two cats<|endofchunk|><image>Output:", "ac")
    assert asked_of(captions) == ("<image>This is a two cats. <image>Q: What is this? A: This is a", "ac")
    zero = {"question_image": "c.jpg", "question": "is it small?", "answer": "no"}
    assert asked_of(zero) == ("<image>is it small?", "c")
    assert asked_of(zero, prompt="flamingo") == ("<image>Question: is it small? Answer:", "c")


HUMANS = {"image": "c.jpg", "question": "is it small?", "answers": ["yes", "no", {"answer": "no"}]}


def test_a_question_with_answers_is_an_episode_without_examples():
    """Frozen's and Flamingo's zero-shot VQA; where nothing is asked of ``shots`` it is what it was."""
    for row in (HUMANS, {"question_image": "c.jpg", **{k: v for k, v in HUMANS.items() if k != "image"}}):
        record = parse(row, 0, root="", shots=Shots(prompt="frozen", induction=True))
        assert record.turns == (("Please answer the question. <image>Question: is it small? Answer:", "no"),)
        assert (record.answers, [p.source for p in record.pictures]) == (("yes", "no", "no"), ["c.jpg"])
        assert record.spaced
    told = {"image": "c.jpg", "question": "is it small?", "answer": "no"}
    assert asked_of(told, prompt="open_flamingo") == ("<image>Question:is it small? Short answer:", "c")
    assert not parse(told, 0, root="", shots=Shots(prompt="open_flamingo")).spaced
    assert asked_of(told, induction=True) == ("Please answer the question. <image>is it small?", "c")
    for question in ("<image>\nis it small?", "is it small?<image>", [{"role": "user", "content": "is it small?"}]):
        assert asked_of({**told, "question": question}, prompt="flamingo") == ("<image>Question: is it small? Answer:", "c")
    assert asked_of({**told, "image": None}, prompt="flamingo") == ("Question: is it small? Answer:", "")
    two = {"images": ["a.jpg", "b.jpg"], "question": "is <image> or <image> older?", "answer": "the first"}
    assert asked_of(two, prompt="flamingo") == ("Question: is <image> or <image> older? Answer:", "ab")
    assert asked_of({**two, "question": "are they old?"}, prompt="flamingo") == ("<image><image>Question: are they old? Answer:", "ab")
    with pytest.raises(ValueError, match="has 0 examples, and shots is 4"):
        asked_of(told, shots=4)
    placed = {**told, "question": "where?", "answer": "<region>", "boxes": [[0, 0, 1, 1]]}
    assert parse(placed, 0, root="", shots=Shots(prompt="frozen")).turns == (("<image>\nwhere?", "<region>"),)
    assert parse(HUMANS, 0, root="").turns == (("<image>\nis it small?", "no"),)
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "is it small?"}]
    kept = parse({**told, "question": talk}, 0, root="", shots=Shots(prompt="frozen"))
    assert kept.turns == (("<image>\nhi", "yes?"), ("is it small?", "no"))


def test_humans_answer_the_question_behind_examples():
    row = {**{k: v for k, v in VQA.items() if k != "answer"}, "answers": ["no", "yes", "no"]}
    record = parse(row, 0, root="")
    assert record.answers == ("no", "yes", "no")
    assert record.turns == parse(VQA, 0, root="").turns
    assert parse({**VQA, "answers": ["yes"]}, 0, root="").turns[0][1] == "no", "the one that is named is learnt"
    with pytest.raises(ValueError, match='"answers" is an empty list'):
        parse({**row, "answers": []}, 0, root="")


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace", "words"])
@pytest.mark.parametrize("template", ["frozen", "flamingo", "open_flamingo", "bare"])
def test_answers_go_on_as_they_do_in_the_examples(kind, template):
    """Bytes have the tokens that one text would have, as examples and documents are read; SentencePiece and words, which begin any text like a
    word, those of the answer by itself."""
    from tests.made import tokenizer as made

    tokenizer, after = made(kind), "<|endofchunk|>" if "flamingo" in template else ""
    encode = chat.Encoder(tokenizer, template, image_tokens=1, image_token=99_999, pad_token=0)
    gap = " " if kind == "bytes" and template != "open_flamingo" else ""

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for row in (
        {"image_1": "a", "answer_1": "red", "question_image": "b", "answer": "red"},
        {"image_1": "a", "question_1": "Q?", "answer_1": "red", "question_image": "b", "question": "Q?", "answer": "red"},
        {"image": "b", "question": "What colour?", "answer": "red"},
    ):
        record = parse(row, 0, root="", shots=Shots(prompt=template if template in PROMPTS else "frozen"))
        ids, labels = encode.record(record)
        assert [label for label in labels if label != -100] == [*ids_of(gap + "red" + after), tokenizer.eos_token_id]
        said = record.turns[0][0].rpartition("<image>")[2]
        assert kind != "bytes" or ids_of(said + gap + "red") == ids_of(said) + ids_of(gap + "red")
        prompt, _ = encode([(record.turns[0][0], None)])
        assert ids[: len(prompt)] == prompt, "what it is asked with is what it was trained on"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer_2": None}, 'has 2 examples and a question, but no "answer_2"'),
        ({"caption_1": "c"}, 'has both "caption_1" and "answer_1"'),
        (
            {"question_2": None, "answer_2": None, "caption_2": "c"},
            "has examples with captions and examples with answers, expected one kind",
        ),
        ({"image_2": None}, 'has 2 examples and a question, but no "image_2"'),
        ({"question_1": None, "answer_1": None}, 'has 2 examples and a question, but no "caption_1"'),
        ({"question": None, "answer": None}, 'but no "answer"'),
        ({"answer_1": "<image>"}, r'"answer_1" holds <image>'),
        ({"question_1": 3}, '"question_1" is a number, expected text'),
    ],
)
def test_records_that_are_no_episode(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        asked_of({name: text for name, text in {**VQA, **change}.items() if text is not None})


def test_the_most_similar_comes_last():
    support = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0], [-1.0, 0.0]])
    assert most_similar(torch.tensor([[1.0, 0.1], [0.0, 2.0]]), support, 3).tolist() == [[1, 2, 0], [0, 2, 1]]
    assert most_similar(torch.tensor([[5.0, 0.5]]), 9 * support, 1).tolist() == [[0]], "by angle, not by length"


def test_orders_of_the_same_examples(pool):
    (episode,) = episodes(pool, Plan("attribute", shots=4), 1)
    made = orderings(episode, Draws(0, 3), 6)
    assert len(made) == 6
    assert len({e.examples for e in made}) > 3
    for e in made:
        assert sorted(e.examples) == sorted(episode.examples)
        assert (e.query, e.answer) == (episode.query, episode.answer)
