"""BLIP-2's first stage through the trainer: its losses pair by pair and text by text, on one process and on two, and what learns."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmfast.trainers import config, queries, supervised
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.loop import Options
from mmfast.trainers.session import Session

from mmfast.data import supervised as data

ROWS = 6


@pytest.fixture(scope="module")
def session():
    """The tiny system at its start, its towers and temperature moved away from their initial values."""
    shapes, data.Shapes = data.Shapes, partial(data.Shapes, count=64)
    made = Session(config.load_recipe("blip2", tiny=True), seed=0)
    see = made.system.stages[-2]
    made.small = made.source_of(see), see
    data.Shapes = shapes
    with torch.no_grad():
        for p in made.model.connector.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made


def first(session, rows=ROWS):
    """A batch, and its objective with the tower's states or from pixels."""
    source, stage = session.small
    batch = queries.Texts(source).batch(torch.arange(rows))
    return batch, queries.queries_objective(session, stage, None), stage


def test_a_batch_is_texts_and_what_they_are_of(session):
    batch, _, _ = first(session)
    words = session.tokenizer
    for i, (ids, mask) in enumerate(zip(batch["ids"], batch["mask"], strict=True)):
        text = session.small[0].world.caption(session.small[0].scenes[i]).text
        said = words.convert_ids_to_tokens(ids[mask.bool()])
        assert said == ["<bos>", *text.replace(",", " ,").replace(".", " .").split(), "<eos>"]
        assert not mask[len(said) :].any()
    assert batch["keys"].tolist() == batch["shown"].tolist() == list(range(ROWS))
    assert batch["counts"].tolist() == [ROWS, batch["mask"].sum() - ROWS]


def by_hand(session, batch, image_for, text_for):
    """The three losses from passes of one picture and one text each, none of them padded, captioning in one pass with the queries."""
    connector, model = session.model.connector, session.model
    texts = [ids[: int(mask.sum())][None] for ids, mask in zip(batch["ids"], batch["mask"], strict=True)]
    image = connector.ln_vision(model.encode(session.pixels(batch["pictures"])))
    n, temp = len(texts), connector.temp
    cosines = torch.empty(n, n)
    for i in range(n):
        seen = connector.qformer(connector.query_tokens, image[i : i + 1]).queries[0]
        for j, text in enumerate(texts):
            words = connector.text_proj(connector.qformer(text=text).text[0, 0])
            cosines[i, j] = max(F.cosine_similarity(connector.vision_proj(query), words, dim=0) for query in seen)
    own = torch.arange(n)
    contrast = sum(F.cross_entropy(s / temp, own, label_smoothing=0.1) for s in (cosines, cosines.T)) / 2
    pairs = [
        *((i, i, 1) for i in range(n)),
        *((int(p), i, 0) for i, p in enumerate(image_for)),
        *((i, int(t), 0) for i, t in enumerate(text_for)),
    ]
    logits = [
        connector.itm_head(connector.qformer(connector.query_tokens, image[p : p + 1], text=texts[t]).queries).mean(1) for p, t, _ in pairs
    ]
    matching = F.cross_entropy(torch.cat(logits), torch.tensor([belongs for *_, belongs in pairs]))
    told, wanted = [], []
    for i, text in enumerate(texts):
        begun = torch.cat([torch.tensor([[session.tokenizer.convert_tokens_to_ids("[DEC]")]]), text[:, 1:]], 1)
        out = connector.qformer(connector.query_tokens, image[i : i + 1], text=begun, mask_mode="multimodal_causal").text[0, :-1]
        hidden = F.layer_norm(
            F.gelu(connector.cls["transform"](out)), (64,), connector.cls["norm"].weight, connector.cls["norm"].bias, 1e-12
        )
        told.append(hidden @ connector.qformer.embeddings["word_embeddings"].weight.T + connector.cls_bias)
        wanted.append(text[0, 1:])
    return contrast, matching, F.cross_entropy(torch.cat(told), torch.cat(wanted), label_smoothing=0.1)


def test_the_losses_are_those_of_single_pairs_and_reach_exactly_what_trains(session, monkeypatch):
    batch, objective, stage = first(session)
    chosen = [torch.tensor([3, 0, 5, 1, 2, 4]), torch.tensor([1, 2, 3, 4, 5, 0])]
    drawn = iter([*chosen, *chosen])
    monkeypatch.setattr(queries, "hard_negatives", lambda *a: next(drawn))
    trained = set(session.let_train(stage.train, None))
    session.model.zero_grad(set_to_none=True)
    loss, measures = objective(batch, batch["counts"])
    contrast, matching, captioning = by_hand(session, batch, *chosen)
    for name, want in (("contrast", contrast), ("matching", matching), ("captioning", captioning)):
        torch.testing.assert_close(measures[f"loss/{name}"], want.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, contrast + matching + captioning, atol=1e-5, rtol=1e-5)
    loss.backward()
    reached = {name for name, p in session.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == trained
    assert not any(name.startswith(("connector.projection", "language", "encoder")) for name in trained)
    assert {"connector.temp", "connector.cls_bias", "connector.ln_vision.weight", "connector.query_tokens"} <= trained


def test_features_to_contrast_with_have_no_gradient(session):
    """LAVIS detaches what it gathers, and on one process gathers nothing; here one process computes what many do."""
    batch, _, stage = first(session)
    session.let_train(stage.train, None)
    connector = session.model.connector
    image = connector.normed(session.model.encode(session.pixels(batch["pictures"])))
    images, texts = connector.images(connector.read(image)), connector.texts(batch["ids"], batch["mask"])
    objective = queries.queries_objective(session, stage, None)
    session.model.zero_grad(set_to_none=True)
    loss, measures = objective(batch, batch["counts"])
    i2t = queries.similarity(images, texts.detach()) / connector.temp
    t2i = queries.similarity(images.detach(), texts).T / connector.temp
    want = (F.cross_entropy(i2t, batch["keys"], label_smoothing=0.1) + F.cross_entropy(t2i, batch["keys"], label_smoothing=0.1)) / 2
    torch.testing.assert_close(measures["loss/contrast"], want.detach(), atol=1e-6, rtol=1e-6)
    # text_proj is reached by the contrast alone.
    (gradient,) = torch.autograd.grad(want, connector.text_proj.weight)
    loss.backward()
    torch.testing.assert_close(connector.text_proj.weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_captions_of_one_picture_are_no_negatives_of_each_other(session, monkeypatch):
    batch, objective, _ = first(session)
    seen = []
    monkeypatch.setattr(
        queries, "hard_negatives", lambda s, keys, everyone: seen.append((keys, everyone)) or queries.torch.arange(len(keys))
    )
    twice = {**batch, "keys": torch.tensor([0, 0, 2, 3, 4, 5]), "shown": torch.tensor([0, 0, 2, 3, 4, 5])}
    objective(twice, batch["counts"])
    assert seen[0][0].tolist() == seen[0][1].tolist() == [0, 0, 2, 3, 4, 5]


def test_matching_leaves_out_rows_beside_which_no_other_picture_stands(session):
    """The last micro-batch of three records cut in two, or captions that all show one picture: the same pair was both right and wrong."""
    batch, objective, _ = first(session)
    one = {name: batch[name][:1] for name in ("pictures", "picture_ids", "ids", "mask", "keys", "shown")}
    _, measures = objective(one, batch["counts"])
    assert measures["loss/matching"] == measures["matching_accuracy"] == 0
    assert measures["loss/contrast"] == 0
    assert measures["loss/captioning"] > 0
    same = {**batch, "keys": torch.zeros(ROWS, dtype=torch.long), "shown": torch.zeros(ROWS, dtype=torch.long)}
    assert objective(same, batch["counts"])[1]["loss/matching"] == 0


def test_records_that_are_no_caption_of_a_picture_are_refused(session):
    class Two:
        def batch(self, index):
            ids = torch.tensor([[-1, -1, 5, 6]])
            return {"input_ids": ids, "labels": ids.masked_fill(ids < 0, -100), "image_rows": torch.tensor([0, 1])}

    with pytest.raises(ValueError, match="a text and a picture each"):
        queries.Texts(Two()).batch(torch.tensor([0]))
    side = session.text_side(6)
    ids, labels = side([("<image> what is it ?", "a red circle and a blue square .")])
    assert ids[0] == -1
    assert ids[1:2] + ids[-1:] == [side.first, side.last]
    assert len(ids) == 1 + 6
    assert labels == [-100, *ids[1:]]


PROGRAM = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from mmfast.data import supervised as data
from mmfast.spec import Compute
from mmfast.trainers import config, place, queries, supervised
from mmfast.trainers.checkpoint import Run
from mmfast.trainers.loop import Options

out, parallel = sys.argv[1:]
torch.set_num_threads(1)
data.Shapes = partial(data.Shapes, count=32)
# What is drawn depends on the process; the most similar does not.
queries.hard_negatives = lambda s, keys, everyone: s.masked_fill(keys[:, None] == everyone, -1e4).argmax(1)
compute = Compute(parallel=parallel)
where = place.find(compute, "cpu")
system = config.load_recipe("blip2", tiny=True)
see, speak = (replace(s, optim=replace(s.optim, steps=3, batch=8, warmup=0, lr=1e-3)) for s in system.stages[-2:])
system = replace(system, stages=(see, speak))
options = Options(quiet=True, compute=compute, place=where)
supervised.train_system(system, Run(Path(out), main=where.main), options=options)
if where.processes > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_contrast_as_one_does(tmp_path, parallel):
    """Rows of both are each other's negatives, with pictures' gradients sent back: the curve of one process with all rows."""
    (tmp_path / "program.py").write_text(PROGRAM)
    curves = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if processes > 1 else []
        command = [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path / str(processes)), parallel]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        lines = [json.loads(line) for line in (tmp_path / str(processes) / "metrics.jsonl").read_text().splitlines()]
        curves.append(torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64))
    assert len(curves[0]) == 6
    torch.testing.assert_close(curves[1][:, 0], curves[0][:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(curves[1][:3, 1], curves[0][:3, 1], atol=1e-5, rtol=1e-5)
    # AdamW divides by tiny second moments in its first steps, and by the second stage has magnified the rounding of sums in another order.
    torch.testing.assert_close(curves[1][3:, 1], curves[0][3:, 1], atol=1e-5, rtol=1e-4)


def test_the_stage_resumes_and_its_measures_are_sums(session, tmp_path):
    """Two steps at once, or one and then, from its checkpoint, the other."""
    system, (source, stage) = session.system, session.small
    stage = replace(stage, optim=replace(stage.optim, steps=2, batch=4, warmup=0, lr=1e-3))
    curves = []
    for cuts in ((2,), (1, 2)):
        for last in cuts:
            made = Session(replace(system, stages=()), seed=0)
            made._sources = {repr((stage.data, None, stage.max_length)): source}
            run = Run(tmp_path / str(len(cuts)), resume=True)
            if run.last_checkpoint():
                supervised.load_model(made.model, run.last_checkpoint()[1])
            part = replace(stage, optim=replace(stage.optim, steps=last, schedule="constant"))
            supervised.run_stage(made, run, part, first_step=0, options=Options(quiet=True, resume=True))
        curves.append([json.loads(line)["loss"] for line in (tmp_path / str(len(cuts)) / "metrics.jsonl").read_text().splitlines()])
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2


def test_augmented_pictures_are_seen_in_training_alone_and_never_kept(session):
    source, _ = session.small
    plain = session.pixels(source.pictures[:4])
    assert supervised.cached_states(session, source) is not None
    system = session.system
    session.system = replace(system, image=replace(system.image, augment=True))
    try:
        session.model.train()
        assert not torch.equal(session.pixels(source.pictures[:4]), plain)
        assert supervised.cached_states(session, source) is None
        session.model.eval()
        assert torch.equal(session.pixels(source.pictures[:4]), plain)
    finally:
        session.system = system


def test_what_it_is_written_as(session, tmp_path):
    """Two stock classes have halves of it; a folder with LLaVA's processor is none of them."""
    from mmfast.trainers.export import export
    from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

    from mmfast.models import Matcher

    model, pixels = session.model.eval(), session.pixels(session.small[0].pictures[:2])
    with pytest.raises(supervised.RunError, match="only the weights of a Blip2ForConditionalGeneration are written"):
        export(session, session.system, tmp_path / "none")
    model.save_pretrained(tmp_path / "speaks")
    Matcher.of(model).save_pretrained(tmp_path / "compares")
    speaks = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "speaks").eval()
    compares = Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "compares").eval()
    ids, mask = session.text_side().texts(["a red circle .", "a blue square top left ."])
    prompt, _ = session.encoder("blip2")([("<image>", "a red circle .")])
    prompt = torch.tensor([prompt] * 2)
    with torch.no_grad():
        torch.testing.assert_close(speaks(pixels, prompt).logits, model(prompt, pixel_values=pixels).logits, atol=1e-5, rtol=0)
        for matching in (False, True):
            want = compares(pixels, ids, mask, use_image_text_matching_head=matching).logits_per_image
            got = Matcher.of(model)(pixels, ids, mask, use_image_text_matching_head=matching).logits_per_image
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_records_of_the_user(session, tmp_path):
    """Two captions of one picture have one key; packing, which is for the other stage, leaves texts row by row; a stream knows pictures, too."""
    import numpy as np
    from PIL import Image

    from mmfast.spec import Data

    rows = [
        {"image": f"{i // 2}.png", "caption": f"a {colour} circle ."}
        for i, colour in enumerate(["red", "blue", "green", "red", "yellow", "blue"])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(3):
        Image.fromarray(np.full((70, 64, 3), 60 * i, np.uint8)).save(tmp_path / f"{i}.png")
    see = replace(session.small[1], data=Data("mine", path=str(tmp_path / "a.json")))
    made = Session(replace(session.system, stages=(see,)), seed=0)
    source = made.source_of(see)
    batch = queries.Texts(source).batch(torch.tensor([0, 1, 4]))
    assert batch["keys"].tolist() == [0, 0, 2]
    assert made.tokenizer.decode(batch["ids"][1]) == "<bos> a blue circle . <eos>"
    compute = replace(session.system.compute, packing=True)
    stage = replace(see, optim=replace(see.optim, steps=2, batch=4, warmup=0))
    supervised.run_stage(made, Run(tmp_path / "run"), stage, first_step=0, options=Options(quiet=True, compute=compute))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    stream = made.source_of(replace(see, data=Data("mine", path=str(tmp_path / "a.jsonl"), streaming=True)))
    taken = queries.Texts(stream).take(6, 1, 2)
    assert made.tokenizer.decode(taken["ids"][0]).startswith("<bos> a blue circle . <eos>")
    keys = queries.Texts(stream).take(6)["keys"].tolist()  # the next epoch, in another order
    assert sorted(keys.count(key) for key in set(keys)) == [2, 2, 2]
