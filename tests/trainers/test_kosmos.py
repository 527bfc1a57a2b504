"""Kosmos' recipes: published numbers, what does not go together, and what the exam of places measures."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from mmfast.trainers import config, grounding, plan, runs
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.session import Session
from mmfast.trainers.supervised import train_system
from PIL import Image

from mmfast import spec
from mmfast.data import chat, regions
from mmfast.data.synthetic import World
from mmfast.models import tiny
from mmfast.models.pretrained import adopted
from mmfast.models.tokenizer import word_tokenizer

KOSMOS_1, KOSMOS_2 = (config.load_recipe(name) for name in ("kosmos_1", "kosmos_2"))


def test_published_hyper_parameters():
    published = ((2e-4, 300_000), (1e-5, 10_000), (2e-4, 60_000), (1e-5, 10_000))  # the second of them is Kosmos-2's
    for stage, (lr, steps) in zip((*KOSMOS_1.stages, *KOSMOS_2.stages), published, strict=True):
        optim = stage.optim
        assert (optim.lr, optim.steps, optim.warmup, optim.schedule, stage.dropout, stage.max_length) == (
            lr,
            steps,
            375,
            "linear",
            0.1,
            2048,
        )
        assert (optim.betas, optim.eps, optim.weight_decay, optim.clip) == ((0.9, 0.98), 1e-6, 0.01, 2.0)
    assert KOSMOS_1.stages[0].train[0] == "last_block"
    assert KOSMOS_2.stages[0].train[0] == "encoder"
    assert {p.name: p.weight for p in KOSMOS_2.stages[0].data.parts} == {
        "text": 93, "image_text_pairs": 1117, "grit": 1117, "interleaved": 47,
    }  # fmt: skip
    rows = {"language_instructions": 117, "llava_instruct": 351, "grit": 1404, "text": 30, "interleaved": 15}
    assert {p.name: p.weight for p in KOSMOS_2.stages[1].data.parts} == rows
    assert KOSMOS_2.stages[1].optim.batch == sum(rows.values())
    assert {p.name: (p.weight, p.full) for p in KOSMOS_1.stages[0].data.parts} == {
        "text": (0.5, True), "image_text_pairs": (0.5, False), "interleaved": (0.2, False),
    }  # fmt: skip
    assert KOSMOS_2.regions.bins == 32
    assert len(KOSMOS_2.regions.tokens) == 1024 + 6
    assert KOSMOS_2.added_tokens[:2] == ("</image>", "<phrase>")


def test_a_batch_of_kosmos_1_is_as_many_tokens_as_published():
    """1.2 million an update, at the row lengths that Kosmos-2's batches have: 215 K tokens are 2 x 1117 captions, 19 K are 47 documents. Rows are drawn
    so that tokens have the shares (``by="tokens"``: a set's weight over its mean length)."""
    lengths = {"text": 2048, "image_text_pairs": 215_000 / (2 * 1117), "interleaved": 19_000 / 47}
    stage = KOSMOS_1.stages[0]
    assert stage.data.by == "tokens"
    drawn = {p.name: p.weight / lengths[p.name] for p in stage.data.parts}
    tokens = {name: stage.optim.batch * share / sum(drawn.values()) * lengths[name] for name, share in drawn.items()}
    assert sum(tokens.values()) == pytest.approx(1.2e6, rel=0.02)
    assert tokens == pytest.approx({"text": 0.5e6, "image_text_pairs": 0.5e6, "interleaved": 0.2e6}, rel=0.02)


def test_earlier_answers_of_instructions_end_too():
    words = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "what", "is", "it", "red", "blue")
    tokenizer, stage = word_tokenizer(words), KOSMOS_2.stages[1]

    def told(*turns):
        ids, labels = chat.encode(tokenizer, stage.template, turns, image_tokens=1, image_token=4)
        return " ".join(
            f"{word}!" if label != -100 else word for word, label in zip(tokenizer.convert_ids_to_tokens(ids), labels, strict=True)
        )

    assert told(("<image> what is it", "red"), ("is it", "blue")) == "<bos> <image> what is it red! <eos>! is it blue! <eos>!"
    assert told(("<image> what is it", "red")) == "<bos> <image> what is it red! <eos>!"
    assert KOSMOS_2.stages[0].template == KOSMOS_1.stages[1].template == "bare"


def test_instructions_of_text_among_the_data_of_the_first_stage(tmp_path):
    """Kosmos-1's second stage on files of all its sets: of an instruction the output and the end are learnt, of the others their text, and a mixture
    of as many draws as there are records has as many of each as its weights say."""
    pretrain, instruct = KOSMOS_1.stages
    assert instruct.train == pretrain.train
    assert {p.name for p in instruct.data.parts} == {p.name for p in pretrain.data.parts} | {"language_instructions"}
    assert instruct.optim.batch == sum(p.weight for p in instruct.data.parts)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    unnatural = {"instruction": "what", "instances": [
        {"instruction_with_input": "what is red", "input": "red", "constraints": "no", "output": "a red circle"},
        {"instruction_with_input": "what is blue", "input": "blue", "constraints": "no", "output": "a blue square"},
    ]}  # fmt: skip
    files = {
        "language_instructions": [unnatural, {"inputs": "is there a square", "targets": "yes", "task": "t"}],
        "text": [{"text": "we see red"}] * 3,
        "image_text_pairs": [{"image": "a.png", "caption": "a green circle"}] * 500,
        "interleaved": [{"items": [{"text": "we see"}, {"image": "a.png"}, {"text": "a circle"}]}] * 40,
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = tuple(replace(part, path=str(tmp_path / f"{part.name}.jsonl")) for part in instruct.data.parts)
    system = tiny(KOSMOS_1)
    own = replace(instruct, data=replace(instruct.data, parts=parts))
    session = Session(replace(system, stages=(*system.stages[:-1], own)), seed=0, with_model=False)
    source = session.source_of(own)

    drawn = Counter(source.items[i][0] for i in source.permutation(0).tolist())
    names = [part.name for part in parts]
    assert len(source) == sum(drawn.values())
    for at, part in enumerate(parts):
        assert abs(drawn[at] - len(source) * part.weight / instruct.optim.batch) < 1, part.name
    heard = {name: set() for name in names}
    for i in range(len(source)):
        batch, words = source.batch(torch.tensor([i])), session.tokenizer.convert_ids_to_tokens
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        prompt, learnt = (
            " ".join(words(row.tolist())) for row in (ids[(labels == -100) & (ids != session.image_token)], labels[labels != -100])
        )
        heard[names[source.items[i][0]]].add((prompt, learnt))
    assert heard["language_instructions"] == {
        ("<bos> what is red", "a red circle <eos>"), ("<bos> what is blue", "a blue square <eos>"), ("<bos> is there a square", "yes <eos>"),
    }  # fmt: skip
    assert heard["text"] == {("<bos> <bos> <bos>", "we see red <eos> we see red <eos> we see red <eos>")}
    assert heard["image_text_pairs"] == {("<bos> <image> </image>", "a green circle <eos>")}
    assert heard["interleaved"] == {("<bos> </image>", "we see <image> a circle <eos>")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"fusion": spec.Prefix(begin="<image>")}, "fusion: begin and end stand around a picture together; set both, or neither"),
        ({"compute": spec.Compute(packing=True)}, "compute.packing: the decoder of kosmos_2_text_model cannot keep packed rows apart"),
        (
            {"language": replace(KOSMOS_1.language, weights="somewhere")},
            "language.words: language.weights bring a tokenizer of their own; take one of them out",
        ),
    ],
)
def test_what_does_not_go_together(changes, sentence):
    assert any(said.startswith(sentence) for said in spec.misfits(replace(KOSMOS_1, **changes)))
    assert not any(said.startswith(sentence) for said in spec.misfits(KOSMOS_1))


def trained(recipe, folder):
    """A run of the recipe, as it lies on the disk."""
    run = Run(folder)
    run.write_json("recipe.json", spec.to_dict(recipe) | {"seed": 0})
    return train_system(recipe, run, quiet=True)


def test_kosmos_2_starts_from_a_run_of_kosmos_1(tmp_path, monkeypatch):
    """Its places are its own, and so is the way it fits pictures; places get rows that nothing had, which learn like the others. A policy that
    says nothing of places takes over what the run has."""
    scenes = World.scenes
    monkeypatch.setattr(World, "scenes", lambda world, split, count, *args, **kw: scenes(world, split, min(count, 48), *args, **kw))
    one, two = (
        replace(system, stages=tuple(replace(s, optim=replace(s.optim, steps=2, warmup=0)) for s in system.stages))
        for system in (tiny(KOSMOS_1), tiny(KOSMOS_2))
    )
    before = trained(one, tmp_path / "one")
    words = len(before.tokenizer)
    two = replace(two, weights=str(tmp_path / "one"))
    start = Session(two, seed=0)
    assert (start.system.regions, start.system.image.fit) == (spec.BoxTokens(16), "squash")
    places = start.tokenizer.convert_tokens_to_ids(list(start.system.regions.tokens))
    assert places == list(range(words, words + 256 + 6))
    assert set(places) < set(start.model.new_tokens)
    assert start.model.image_token == start.image_token == len(start.tokenizer)
    table = start.model.language.get_input_embeddings().weight.detach().clone()
    torch.testing.assert_close(table[:words], before.model.language.get_input_embeddings().weight)
    assert table[words:].std() == pytest.approx(two.language.init, rel=0.1)
    assert start.model.language.get_output_embeddings().weight is start.model.language.get_input_embeddings().weight
    assert plan.sized(two).language.vocab == len(table)

    after = trained(two, tmp_path / "two")
    assert not torch.equal(after.model.language.get_input_embeddings().weight[words:], table[words:])
    opened, _ = runs.open_run(tmp_path / "two")
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor), name
    policy = adopted(replace(one, regions=spec.NoRegions(), image=spec.Fixed()), opened.system)
    assert (policy.regions, policy.image) == (spec.BoxTokens(16), two.image)
    finer = adopted(replace(two, regions=spec.BoxTokens(32), image=spec.Fixed(fit="crop")), opened.system)
    assert (finer.regions.bins, finer.image.fit, finer.image.mean) == (32, "crop", two.image.mean)


@pytest.fixture(scope="module")
def session():
    return Session(replace(tiny(KOSMOS_2), stages=()), seed=0)


def test_a_model_that_knows_scores_what_the_grid_allows(session, monkeypatch):
    """Answers are put in the model's mouth: the true box, cut to the grid, for a picture; so that another scene's picture gives its own."""
    world, form, size = session.world, regions.format_of(session.system.regions), (64, 64)
    scenes = world.scenes("eval", 30)
    states = session.states(torch.from_numpy(world.render(scenes)))

    def told(session, prompts, seen, most):
        said = []
        for prompt, state in zip(prompts, seen, strict=True):
            scene = scenes[int((states - state).abs().flatten(1).sum(1).argmin())]
            words = prompt.removesuffix("</phrase>").split()[-2:]
            boxes = [o.box for o in scene.objects if world.class_name(6 * o.colour + o.shape).split() == words]
            said.append(form.encode(boxes[0], size) if boxes else "nothing")
        return said

    monkeypatch.setattr(grounding, "generated", told)
    measured = grounding.grounded(session, session.system, scenes=30)
    assert measured["grounding/mean_iou"] == pytest.approx(measured["grounding/ceiling_mean_iou"])
    assert measured["grounding/mean_iou"] > 0.6
    assert measured["grounding/unread"] == 0
    assert measured["grounding/permuted_mean_iou"] < 0.15
    assert measured["grounding/permuted_unread"] > 0.5
    assert measured["grounding/constant_mean_iou"] < 0.1


def test_what_a_model_from_nothing_says_is_no_box(session):
    measured = grounding.grounded(session, session.system, scenes=8)
    assert measured["grounding/unread"] > 0.9
    assert measured["grounding/accuracy"] < 0.05


def test_dropout_reaches_all_that_the_released_code_drops(session):
    model = session.model
    model.drop(0.2)
    rates = {type(m).__name__: m.dropout for m in model.language.model.modules() if hasattr(m, "dropout")}
    # The stock class drops embeddings twice: keeping .8944 of them twice is keeping .8 once.
    assert rates.pop("Kosmos2TextTransformer") == pytest.approx(1 - 0.8**0.5)
    assert rates == {"Kosmos2TextBlock": 0.2, "KosmosTextAttention": 0.2, "Kosmos2TextFFN": 0.2}
    assert model.connector.x_attn.dropout == 0.2
    model.drop(0.0)
    assert model.connector.x_attn.dropout == 0.0
