"""The question that a Q-Former reads beside a picture: from the rows of every source to the loss, to exams, and on from an earlier run."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmfast.trainers import captions, config, plan, runs, supervised
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.evaluate import Exam
from mmfast.trainers.loop import Options
from mmfast.trainers.session import Session
from PIL import Image

from mmfast import spec
from mmfast.data import chat
from mmfast.data import supervised as data
from mmfast.data.synthetic import PROMPT
from mmfast.models import build
from mmfast.models.pretrained import taken
from tests.made import tokenizer as made_tokenizer


def asking(**connector):
    """The tiny BLIP-2 with one stage, captions and questions; its queries read these."""
    recipe = config.load_recipe("blip2", tiny=True)
    speak = replace(recipe.stages[-1], data=spec.Data("shapes"), template="bare")
    speak = replace(speak, optim=replace(speak.optim, steps=1, batch=4, warmup=0))
    return replace(recipe, connector=replace(recipe.connector, instructed=True, **connector), stages=(speak,))


@pytest.fixture(scope="module")
def few():
    shapes, data.Shapes = data.Shapes, partial(data.Shapes, count=12)
    yield
    data.Shapes = shapes


@pytest.fixture(scope="module")
def session(few):
    return Session(asking(), seed=0)


def told(session, batch):
    ids, mask = batch["qformer_input_ids"], batch["qformer_attention_mask"]
    return [session.tokenizer.decode(row[: int(real.sum())]) for row, real in zip(ids, mask, strict=True)]


def as_words(text):
    return "<bos> " + text.replace("?", " ?").replace(":", " :").replace("  ", " ").strip() + " <eos>"


def test_built_in_rows_carry_what_is_asked_before_the_first_answer(session):
    source, stage = session.source_of(session.system.stages[0]), session.system.stages[0]
    batch = source.batch(torch.arange(3))
    first = [session.world.turns(scene, 4, planted=True)[0][0] for scene in source.scenes[:3]]
    assert told(session, batch) == [as_words(PROMPT)] * 3 + [as_words(question) for question in first]
    source.packing = True
    packed = source.batch(torch.arange(3))
    source.packing = False
    assert packed["input_ids"].shape[0] == 1
    assert torch.equal(packed["qformer_input_ids"], batch["qformer_input_ids"])
    assert stage.data == spec.Data("shapes")
    plain = Session(replace(asking(), connector=replace(asking().connector, instructed=False)), seed=0, with_model=False)
    assert not any(name.startswith("qformer") for name in plain.source_of(stage).batch(torch.arange(3)))


def test_records_and_streams_carry_it_too_a_picture_each(session, tmp_path):
    rows = [
        {"images": ["0.png", "1.png"], "question": "<image> what is this <image> ?", "answer": "a red circle"},
        {"image": "1.png", "caption": "a blue square"},
        {"question": "is there a star ?", "answer": "no"},
        {"images": ["0.png"], "messages": [
            {"role": "user", "content": "<image> is there a star ?"}, {"role": "assistant", "content": "no"},
            {"role": "user", "content": "is there a circle ?"}, {"role": "assistant", "content": "yes"}]},
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(2):
        Image.fromarray(np.full((70, 64, 3), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
    expected = ["<bos> what is this ? <eos>"] * 2 + ["<bos> <eos>", "<bos> is there a star ? <eos>"]
    words = set(session.tokenizer.get_vocab())
    expected = [" ".join(w for w in text.split() if w in words) for text in expected]
    for source in (
        session.source(spec.Data("mine", path=str(tmp_path / "a.json")), "bare"),
        session.source(spec.Data("mine", path=str(tmp_path / "a.jsonl"), streaming=True), "bare"),
    ):
        batch = source.take(4) if hasattr(source, "take") else source.batch(torch.arange(4))
        assert told(session, batch) == expected
        assert len(batch["image_rows"]) == 4


def test_a_row_s_loss_is_that_of_its_picture_read_with_its_own_question(session):
    """A batch of captions and questions against one row and one picture at a time, nothing padded; and what that teaches."""
    stage, model = session.system.stages[0], session.model
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.connector.parameters():
            p.add_(0.1 * torch.randn_like(p))
    trained = set(session.let_train(stage.train, None))
    source = session.source_of(stage)
    batch = source.batch(torch.arange(3))
    objective = supervised.answer_objective(session, None)
    loss, _ = objective(batch, batch["counts"])
    want, others = 0.0, 0.0
    pixels = session.pixels(batch["pictures"])
    for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        length = int(max((ids != session.tokenizer.pad_token_id).nonzero())) + 1
        ids, labels = ids[None, :length], labels[None, :length]
        first = int((labels[0] != -100).nonzero()[0])
        words = [t for t in ids[0, :first].tolist() if t not in (session.image_token, session.tokenizer.bos_token_id)]
        for question, name in ((words, "own"), (words[::-1], "other")):
            beside = torch.tensor([[session.tokenizer.bos_token_id, *question, session.tokenizer.eos_token_id]])
            out = model(ids, labels=labels, pixel_values=pixels[batch["image_rows"][i]][None], qformer_input_ids=beside)
            mean = out.loss * (labels[:, 1:] != -100).sum() / batch["counts"][batch["groups"][i]]
            want, others = (want + mean, others) if name == "own" else (want, others + mean)
    torch.testing.assert_close(loss.double(), want.double(), atol=1e-5, rtol=1e-5)
    assert abs(others - want) > 1e-4, "the question matters"
    model.zero_grad(set_to_none=True)
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == trained
    assert "connector.qformer.embeddings.word_embeddings.weight" in trained
    last = session.system.connector.depth - 1
    assert not any(f"layer.{last}.intermediate." in name or "itm_head" in name or "text_proj" in name for name in trained)


def test_exams_and_answers_ask_as_training_did(session, monkeypatch):
    """Whoever shows a picture to the language model gives the question along, or the connector would say so."""
    exam = Exam(session, scenes=6, statistics_scenes=50)
    measured, _ = exam(session)
    assert 0 <= measured["pope_random_accuracy"] <= 1
    states = session.states(exam.pictures)
    texts = [session.world.caption(scene).text for scene in exam.scenes]
    own = captions.likelihood(session, "bare", texts, states)
    monkeypatch.setattr(chat.Questions, "_told", lambda self, words: [self.side.first, self.side.last])
    assert captions.likelihood(session, "bare", texts, states) != own


def test_own_words_are_the_text_told_anew_and_its_end_is_kept():
    """A lower-casing tokenizer of BERT's kind beside a byte-level one; special tokens and places are none of the text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "colour", "is", "the", "circle", "?", "question", "answer", ":", "it", "'", "s"]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    own, spoken = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]"), made_tokenizer("bytes")
    image = len(spoken)
    encode = chat.Encoder(spoken, "blip2_vqa", 3, image, spoken.eos_token_id)
    ids, labels = (torch.tensor([part]) for part in encode([("<image>\nWhat colour IS the circle?", "red")]))
    assert spoken.decode([i for i in ids[0].tolist() if i != image]).startswith("<s>Question: What colour IS the circle? Answer: red")
    side = chat.TextSide(own, 2, 3, -1, 0, max_length=spec.QUESTION)
    got = chat.Questions(side, spoken, 3, image)(ids, labels)
    expected = [own.get_vocab()[w] for w in ["question", ":", "what", "colour", "is", "the", "circle", "?", "answer", ":"]]
    assert got["qformer_input_ids"].tolist() == [[2, *expected, 3]]
    assert got["qformer_attention_mask"].tolist() == [[1] * (len(expected) + 2)]
    for most in (2, 5, len(expected) + 1):
        cut = chat.Questions(replace(side, max_length=most), spoken, 3, image)(ids, labels)["qformer_input_ids"]
        assert cut.tolist() == [[2, *expected[len(expected) - (most - 2) :], 3]]
    prompt, _ = encode([("<image>\nWhat colour IS the circle?", None)])
    assert chat.Questions(side, spoken, 3, image)(torch.tensor([prompt]))["qformer_input_ids"].tolist() == [[2, *expected, 3]]


def test_what_fine_tuning_shows_a_language_model():
    """LAVIS's rows with OPT: the prompt and its beginning token are not learnt, the line's end is."""
    spoken = made_tokenizer("bytes")
    for template, question, text, said in (
        ("blip2_caption", "", "a photo of a red circle\n", " a red circle\n"),
        ("blip2_vqa", "What is this?", "Question: What is this? Answer: red\n", " red\n"),
        ("blip2_prompt", "a photo of", "a photo of a red circle\n", " a red circle\n"),
    ):
        ids, labels = chat.Encoder(spoken, template, 2, 9999, 0)([(f"<image>{question}", said.strip())])
        assert ids[:3] == [9999, 9999, spoken.bos_token_id]
        assert spoken.decode(ids[3:]) == text
        assert spoken.decode([label for label in labels if label != -100]) == said


# ------------------------------------------------------------------------------------------------- on from other weights


def test_a_run_goes_on_with_larger_pictures_and_the_question(few, tmp_path):
    """Stage 2 without questions at 64 pixels, then with them at 128, then from that run again."""
    plain = asking()
    plain = replace(plain, connector=replace(plain.connector, instructed=False))
    supervised.train_system(first := plain, Run(tmp_path / "a"), options=Options(quiet=True))
    (tmp_path / "a" / "recipe.json").write_text(json.dumps(spec.to_dict(first) | {"seed": 0}))
    old, _ = runs.open_run(tmp_path / "a")
    given = replace(asking(), weights=str(tmp_path / "a"), encoder=replace(plain.encoder, interpolate=128))
    given = replace(given, stages=(replace(given.stages[0], train=("encoder", "connector")),))
    table = old.model.encoder.vision.embeddings.position_embedding.detach()[0]
    side = plain.encoder.size // plain.encoder.patch
    grid = F.interpolate(table[1:].T.reshape(1, -1, side, side), size=(2 * side,) * 2, mode="bicubic", align_corners=False)
    want = torch.cat([table[:1], grid.flatten(2)[0].T])
    new = Session(given, seed=0)
    assert (new.system.image.size, new.system.encoder.size, new.model.system.encoder.tokens) == (128, 128, 4 * side**2 + 1)
    assert new.model.connector.instructed
    assert not new.model.trained
    torch.testing.assert_close(new.model.encoder.vision.embeddings.position_embedding[0], want)
    for name, value in old.model.connector.state_dict().items():
        assert torch.equal(new.model.connector.state_dict()[name], value), name
    # The world draws 64 pixels: what is shown is drawn again, larger.
    (tmp_path / "b.json").write_text(json.dumps([{"image": "b.png", "question": "<image> is there a star ?", "answer": "no"}] * 4))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)).save(tmp_path / "b.png")
    given = replace(given, stages=(replace(given.stages[0], data=spec.Data("mine", path=str(tmp_path / "b.json"))),))
    trained = supervised.train_system(given, Run(tmp_path / "b"), options=Options(quiet=True))
    assert "connector.qformer.embeddings.word_embeddings.weight" in trained.model.trained
    (tmp_path / "b" / "recipe.json").write_text(json.dumps(spec.to_dict(given) | {"seed": 0}))
    opened, _ = runs.open_run(tmp_path / "b")
    for name, value in trained.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], value), name
    third = Session(replace(asking(), weights=str(tmp_path / "b")), seed=0)
    assert third.model.connector.instructed
    assert third.system.encoder.size == third.system.image.size == 128
    assert sum(plan.predict(given, given.stages[0]).parameters.values()) == sum(p.numel() for p in trained.model.parameters())
    with pytest.raises(ValueError, match=r"encoder\.interpolate: 100 is not a multiple of encoder.patch 16"):
        Session(replace(given, encoder=replace(given.encoder, interpolate=100)), seed=0)


def test_weights_that_cannot_be_asked():
    given, own = replace(asking(), weights="some/folder"), asking()
    wordless = replace(own, connector=replace(own.connector, text=False, instructed=False))
    with pytest.raises(ValueError, match=r"connector\.instructed: weights some/folder have no Q-Former with words to read a question in"):
        taken(given, wordless, image=own.image)
    with pytest.raises(ValueError, match=r"connector\.instructed: weights some/folder have no Q-Former"):
        taken(given, replace(own, connector=spec.Linear()), image=own.image)
    wide = replace(given, encoder=replace(given.encoder, interpolate=128))
    with pytest.raises(ValueError, match=r"encoder\.interpolate: weights some/folder have a Vqgan, which is not stretched; set it to 0"):
        taken(wide, replace(own, encoder=spec.Vqgan()), image=own.image)
    kept = taken(replace(given, connector=spec.Linear()), replace(own, connector=replace(own.connector, instructed=True)), image=own.image)
    assert kept.connector.instructed


def test_a_published_instructblip_brings_both_tokenizers(tmp_path):
    from transformers import BertTokenizerFast

    from tests.models.test_instructblip import stock

    folder, spoken = tmp_path / "stock", made_tokenizer("prepend")
    spoken.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<image>"]})
    theirs = stock()
    theirs.language_model.resize_token_embeddings(len(spoken))
    theirs.config.text_config.vocab_size, theirs.config.image_token_index = len(spoken), spoken.convert_tokens_to_ids("<image>")
    theirs.save_pretrained(folder)
    spoken.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "?"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(folder / "qformer_tokenizer")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "a.png", "question": "<image>\nIs it RED?", "answer": "Yes"}] * 2))
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "a.png")
    optim = spec.Optim(lr=1e-3, steps=1, batch=2, warmup=0)
    stage = spec.Stage("ask", ("connector",), spec.Data("mine", path=str(tmp_path / "a.json")), optim, template="bare")
    made = Session(spec.System("mine", weights=str(folder), stages=(stage,)), seed=0)
    batch = made.source_of(stage).batch(torch.arange(2))
    assert batch["qformer_input_ids"].tolist() == [[2, 5, 6, 7, 8, 3]] * 2
    before = made.model.connector.qformer.embeddings["word_embeddings"].weight.detach().clone()
    supervised.run_stage(made, Run(tmp_path / "run"), stage, first_step=0, options=Options(quiet=True))
    moved = (made.model.connector.qformer.embeddings["word_embeddings"].weight - before).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [2, 3, 5, 6, 7, 8]


def test_a_plan_counts_the_question():
    """As long as it may be, read once a row; within 5 % of what autograd keeps."""
    recipe = asking(positions=24)
    stage = replace(recipe.stages[0], max_length=64)
    recipe = replace(recipe, stages=(stage,), language=replace(recipe.language, vocab=100))
    saved = plan.trace(recipe, stage, pictures=4, length=64)
    model = build(recipe)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    model.train_only(stage.train)
    model.train()
    seen = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.full((4, 64), 7)
    ids[:, : recipe.image_tokens] = model.image_token
    states, question = torch.randn(4, recipe.encoder.tokens, recipe.encoder.width), torch.full((4, 24), 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden(ids, image_states=states, qformer_input_ids=question, qformer_attention_mask=torch.ones_like(question))
    real, told = sum(s.nbytes() for s in seen.values()), saved.outside + sum(sum(sizes) for sizes in saved.blocks.values())
    assert hidden.requires_grad
    assert told == pytest.approx(real, rel=0.05)


# -------------------------------------------------------------------------------------------- the published fine-tunings

# The paper's numbers (section 4 and appendix) and what learns: side of pictures, places of one, batch, rate, rate of the ViT's embeddings, words.
PUBLISHED = {
    "coco": (364, 677, 256, 1e-5, 1e-5, "a photo of", {"encoder.vision", "connector.qformer", "connector.projection"}, 107_133_696),
    "vqa": (490, 1226, 128, 1e-5, 1e-5 * 0.95**40, "Question: ", {"encoder.vision", "connector.qformer", "connector.projection"}, 182_932_224),
    "retrieval": (364, 677, 224, 1e-5, 1e-5, "", {"encoder.vision", "connector.qformer", "connector.itm_head", "connector.temp"}, 186_705_470),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_fine_tunings_in_the_documents(name, tmp_path, monkeypatch, capsys):
    """Each file on the page as a user would give it, on a run of the recipe, at full size and on no memory."""
    import re
    from pathlib import Path

    from mmfast.trainers import loop
    from mmfast.trainers.__main__ import main

    from mmfast.data.chat import TEMPLATES

    side, places, batch, rate, lowest, words, learns, connector = PUBLISHED[name]
    page = (Path(__file__).resolve().parents[2] / "docs" / "blip2.md").read_text()
    file = next(text for text in re.findall(r"```yaml\n(.*?)```", page, re.S) if text.startswith(f"# {name}.yaml"))
    (tmp_path / f"{name}.yaml").write_text(file)
    monkeypatch.chdir(tmp_path)
    first = config.load_recipe("blip2")
    for run, stages in (("runs/blip2", first.stages), ("runs/see", first.stages[:1])):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "recipe.json").write_text(json.dumps(spec.to_dict(replace(first, stages=stages)) | {"seed": 0}))
    command = re.match(r"# .*?: mmfast train (\S+ --config \S+) --data", file)[1].split()
    for what in ("show", *(("plan",) if name == "vqa" else ())):
        with pytest.raises(SystemExit) as end:
            main([what, *command])
        out, err = capsys.readouterr()
        assert (end.value.code, err) == (0, "")
        assert re.search(rf"^encoder\.interpolate += {side} +# was 0$" if what == "show" else r"^encoder +98\d,\d{3},\d{3} ", out, re.M)
        if what == "plan":
            assert f"{lowest:.2g} .. {rate * 0.95:.2g}" in out
    recipe, problems = config.layered("blip2", files=[f"{name}.yaml"], rest=())
    assert not config.resolved(recipe, problems).stages[1:]
    (stage,), shape = recipe.stages, plan.sized(recipe)
    assert (shape.encoder.tokens, stage.optim.batch, stage.optim.lr, stage.optim.epochs, stage.optim.warmup) == (
        places,
        batch,
        rate,
        5,
        1000,
    )
    assert shape.connector.instructed == (name == "vqa")
    assert stage.objective == "queries" or TEMPLATES[stage.template].before == words
    with torch.device("meta"):
        model = build(replace(shape, stages=()))
    named = {id(p): n for n, p in model.named_parameters()}
    trained = {named[id(p)] for p in model.train_only(stage.train)}
    assert {next((part for part in learns if n.startswith(part)), "other") for n in trained} >= learns
    assert not any(n.startswith("language") for n in trained)
    assert sum(p.numel() for n, p in model.named_parameters() if n in trained and n.startswith("connector")) == connector
    rates = {named[id(p)]: group["peak"] for group in loop._groups(loop.Objective(None, model), stage.optim) for p in group["params"]}
    assert rates["encoder.vision.embeddings.position_embedding"] == pytest.approx(lowest)
    assert rates["encoder.vision.encoder.layers.38.mlp.fc2.weight"] == pytest.approx(rate * (0.95 if name == "vqa" else 1))
    assert rates["connector.query_tokens"] == rate
