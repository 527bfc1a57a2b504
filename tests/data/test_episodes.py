"""Few-shot episodes: the published prompts word for word, answers that are true of the pictures, and knobs that do what they say."""

import numpy as np
import pytest
import torch

from mmfast.data import chat, supervised
from mmfast.data.episodes import ATTRIBUTES, FILLERS, NONSENSE, PROMPTS, WORDS, Episode, Plan, Pool, mixed, most_similar, orderings
from mmfast.data.formats import parse
from mmfast.data.synthetic import Draws, World
from mmfast.models.tokenizer import word_tokenizer


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


def test_attribute_episodes_are_true_and_say_which_attribute_is_meant(pool):
    for episode in episodes(pool, Plan("attribute", shots=3)):
        told = [*episode.examples, (episode.query, episode.answer)]
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
        assert len({p for p, _ in first} | {episode.query}) == 7  # every picture is another one
        classes = {word: {pool.name(p) for p, w in first if w == word} for word in episode.words}
        assert all(len(names) == 1 for names in classes.values())
        assert len(set.union(*classes.values())) == 3
        assert classes[episode.answer] == {pool.name(episode.query)}
        assert {w for _, w in first[:3]} == {w for _, w in first[3:]} == set(episode.words)  # interleaved
        bound |= {(word, *names) for word, names in classes.items()}
    assert len({word for word, _ in bound}) == len(NONSENSE)
    assert len({name for _, name in bound}) > 20
    orders = [[w for _, w in e.examples[:2]] for e in episodes(pool, Plan("naming", inner_shots=4, order="shuffled"))]
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
        for picture, answer in episode.examples:
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
