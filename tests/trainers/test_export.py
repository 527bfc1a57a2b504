"""The exported folder in the stock classes: same ids, pixels, logits and words; whole or not at all; refused where it cannot be."""

import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from gated import open_gates
from made import Session, photograph, tokenizer
from mmfast.trainers import export as module
from mmfast.trainers.chat import chat
from mmfast.trainers.export import BORDER, export, messages_of
from mmfast.trainers.loop import RunError
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, IdeficsForVisionText2Text, LlavaForConditionalGeneration

from mmfast import spec
from mmfast.data import chat as conversations
from mmfast.data import images
from mmfast.models import add_lora, lora_parameters, tokenizer_for
from mmfast.models.lora import merged

KINDS = ("bytes", "prepend", "metaspace", "words")
TURNS = [
    [("<image>\nWhat colour is the circle?", None)],
    [("<image>\nWhat is this?", "Yes, it is red.")],
    [("What <image> is <image>this?  ", "  It's red.\n"), ("Really? <image>", "no"), ("\tAnd then?", None)],
    [("Hello", "Hi"), ("user", "assistant")],
]


def recipe(session, template="vicuna_v1"):
    return replace(session.system, stages=(replace(session.system.stages[0], template=template),))


@pytest.mark.parametrize("template", conversations.TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_training(kind, template, tmp_path):
    session = Session(tmp_path, kind)
    if conversations.TEMPLATES[template].picture_first:  # messages have no place before the beginning token
        with pytest.raises(RunError, match="the stock processor would read"):
            export(session, recipe(session, template), tmp_path / "out")
        return
    processor = AutoProcessor.from_pretrained(export(session, recipe(session, template), tmp_path / "out"))
    again = tokenizer_for(spec.System("again", weights=str(tmp_path / "out")))  # training may go on from the export
    places = dict(image_tokens=session.system.encoder.tokens, image_token=session.model.image_token)
    for turns in TURNS:
        ours, _ = session.encoder(template)(turns)
        # What is exported begins no text by itself: its processor's texts hold that token.
        begun = conversations.TEMPLATES[template].begin is None and ours[0] == again.bos_token_id
        assert conversations.encode(again, template, turns, **places)[0] == ours[begun:]
        text = processor.apply_chat_template(messages_of(turns), add_generation_prompt=turns[-1][1] is None)
        expanded = text.replace("<image>", "<image>" * session.system.encoder.tokens)
        assert processor.tokenizer(expanded)["input_ids"] == ours, turns


def test_the_borders_are_needed(tmp_path):
    """Without them a byte-pair tokenizer joins what training kept apart: the test above can fail."""
    session = Session(tmp_path, "bytes")
    out = export(session, recipe(session, "bare"), tmp_path / "out")
    processor = AutoProcessor.from_pretrained(out)
    turns = [("What is ", "this?")]
    text = processor.apply_chat_template(messages_of(turns))
    ours, _ = session.encoder("bare")(turns)
    assert processor.tokenizer(text)["input_ids"] == ours
    assert processor.tokenizer(text.replace(BORDER, ""))["input_ids"] != ours


def test_a_tokenizer_whose_stock_form_differs_is_refused(tmp_path, monkeypatch):
    session = Session(tmp_path, "bytes")
    monkeypatch.setattr(module, "BORDER", " ")
    with pytest.raises(RunError, match=r"the tokenizer cannot be exported: the stock processor would read .* from token \d+ on"):
        export(session, recipe(session), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_first_token():
    """Where a tokenizer has none, neither has the text."""
    import jinja2

    def told(name):
        text = module.chat_template(name, "\n")
        return jinja2.Environment().from_string(text).render(messages=messages_of([("a", "b")]), bos_token=None, eos_token="</s>")

    assert told("vicuna_v1") == f"{conversations.TEMPLATES['vicuna_v1'].system} USER: a ASSISTANT: b</s>"  # one text
    assert told("bare") == f"a{BORDER}b</s>"


def test_the_stock_class_ends_where_the_template_does(tmp_path):
    session = Session(tmp_path)
    session.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    for template, end in (("mpt", "<|im_end|>"), ("vicuna_v1", "</s>")):
        told = json.loads((export(session, recipe(session, template), tmp_path / template) / "generation_config.json").read_text())
        assert told["eos_token_id"] == session.tokenizer.convert_tokens_to_ids(end)


def test_pixels_are_those_of_training(tmp_path):
    session = Session(tmp_path)
    processor = AutoProcessor.from_pretrained(export(session, recipe(session), tmp_path / "out"))
    for i, (width, height) in enumerate([(61, 47), (47, 61), (28, 28), (300, 31), (200, 133)]):
        path = photograph(tmp_path / f"{i}.jpg", width, height, seed=i)
        theirs = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
        ours = session.pixels(torch.from_numpy(images.load(path, 28))[None])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tower", "options"),
    [
        (spec.Clip, {}),
        (spec.Clip, {"keep_class_token": True, "layer": -1}),
        (spec.Siglip, {}),
        (spec.Dino, {}),
        (spec.Dino, {"keep_class_token": True}),
    ],
)
@pytest.mark.parametrize("lora", [False, True])
def test_logits_and_words_of_the_stock_class(tower, options, lora, tmp_path):
    """One picture and a prompt as a user of transformers gives them, to the last token."""
    session = Session(tmp_path, tower=tower, **options)
    if lora:
        add_lora(session.model, spec.Lora(rank=2, alpha=4, dropout=0.0))
        with torch.no_grad():
            for p in lora_parameters(session.model):
                p.normal_(std=0.2)
        session.model.train_only(("connector",), lora=True)
    path = photograph(tmp_path / "a.jpg")
    out = export(session, recipe(session), tmp_path / "out", metrics={"accuracy": 0.5})
    processor, stock = AutoProcessor.from_pretrained(out), LlavaForConditionalGeneration.from_pretrained(out).eval()
    messages = [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": "What is this?"}]}]
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    again = processor(
        text=processor.apply_chat_template(messages, add_generation_prompt=True), images=Image.open(path), return_tensors="pt"
    )
    assert torch.equal(batch["input_ids"], again["input_ids"])
    ids, _ = session.encoder("vicuna_v1")([("<image>\nWhat is this?", None)])
    assert batch["input_ids"].tolist() == [ids]
    pixels = session.pixels(torch.from_numpy(images.load(path, 28))[None])
    with torch.no_grad():
        want, got = session.model(torch.tensor([ids]), pixel_values=pixels).logits, stock(**batch).logits
        with merged(session.model):  # the same weights; what folding adapters in may change is tests/models/test_lora.py's
            same = session.model(torch.tensor([ids]), pixel_values=batch["pixel_values"]).logits
    assert want.std() > 0.3
    torch.testing.assert_close(got, same, atol=1e-5, rtol=0)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=0)  # pixels differ in their last bit
    ours = session.model.generate(torch.tensor([ids]), pixel_values=pixels, end=session.tokenizer.eos_token_id, max_new_tokens=20)
    theirs = stock.generate(**batch, max_new_tokens=20)[:, len(ids) :]
    assert theirs.tolist() == ours.tolist()
    assert len(set(ours[0].tolist())) > 5
    said = chat(session, [path], "What is this?", template="vicuna_v1", max_new_tokens=20)
    assert said == processor.decode(theirs[0], skip_special_tokens=True)
    assert bool(lora_parameters(session.model)) == lora  # the session keeps its adapters


def test_what_lies_in_the_folder(tmp_path):
    session = Session(tmp_path)
    (tmp_path / "lm" / "README.md").write_text("---\nlicense: mit\n---\n# base\n")
    session.model.train_only(("connector",))
    out = export(session, recipe(session), tmp_path / "out", metrics={"accuracy": 0.9375, "steps": 30})
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "processor_config.json", "README.md"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    told = json.loads((out / "generation_config.json").read_text())
    assert (told["eos_token_id"], told["bos_token_id"]) == (session.tokenizer.eos_token_id, session.tokenizer.bos_token_id)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text"
    assert "| accuracy | 0.9375 |" in card
    assert "| steps | 30 |" in card
    assert "- lm: licence mit" in card
    assert "stop_strings" not in card
    card = module.model_card(session, recipe(session, "llava_v0"), {}, "x")
    assert 'max_new_tokens=64, stop_strings=["\\n###"], tokenizer=processor.tokenizer)' in card
    assert "- tower: licence not stated beside the weights" in card
    assert "license" not in front  # one of the two is unknown
    assert re.search(r"Trained with mmfast \S+", card)
    assert "4 tensors" in card
    assert "- `connector.*.weight`" in card
    written = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert written["language"]["weights"] == "lm"
    assert str(tmp_path) not in card  # no folders of this machine
    assert AutoTokenizer.from_pretrained(out).chat_template == (out / "chat_template.jinja").read_text()


def test_it_is_a_start_for_another_run(tmp_path):
    """Weights of a system, or of its tower, with the pictures' normalisation."""
    from mmfast.models import build, resolved

    session = Session(tmp_path, kind="words")
    changed = replace(session.system.image, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    session.model.system = session.system = replace(session.system, image=changed)
    out = str(export(session, recipe(session), tmp_path / "out"))
    for given in (spec.System("whole", weights=out), replace(session.system, encoder=spec.Clip(weights=out), image=spec.Fixed(size=99))):
        assert resolved(given).image == changed
        model = build(given, tokenizer=tokenizer_for(given))
        ids = torch.tensor([[1, *[model.image_token] * 4, 9, 10]])
        pixels = torch.randn(1, 3, 28, 28)
        if given.weights:
            with torch.no_grad():
                torch.testing.assert_close(model(ids, pixel_values=pixels).logits, session.model(ids, pixel_values=pixels).logits)
        assert torch.equal(model.encode(pixels), session.model.encode(pixels))


def test_large_models_are_cut_into_shards(tmp_path, monkeypatch):
    from mmfast.models import published

    session = Session(tmp_path)
    monkeypatch.setattr(published, "SHARD", "50KB")
    out = export(session, recipe(session), tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    ids = torch.tensor([[1, 9, 10]])
    with torch.no_grad():
        stock = LlavaForConditionalGeneration.from_pretrained(out).eval()
        torch.testing.assert_close(stock(ids).logits, session.model(ids).logits, atol=1e-5, rtol=0)


def test_parts_of_unlike_precision_lose_nothing(tmp_path):
    session = Session(tmp_path, dtype=torch.bfloat16)
    out = export(session, recipe(session), tmp_path / "out")
    stock = LlavaForConditionalGeneration.from_pretrained(out)
    assert stock.dtype == torch.float32
    assert torch.equal(stock.model.multi_modal_projector.linear_1.weight, session.model.connector[0].weight)
    assert torch.equal(stock.lm_head.weight, session.model.language.lm_head.weight.float())


def test_a_folder_that_is_taken(tmp_path):
    session = Session(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(RunError, match=r"out exists and is not empty; choose another --out"):
        export(session, recipe(session), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert (export(session, recipe(session), tmp_path / "empty") / "config.json").exists()


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    session = Session(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_finish_configs", full)
    with pytest.raises(RunError, match=r"out could not be written: No space left on device"):
        export(session, recipe(session), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"lm", "tower"}


def test_what_the_stock_class_cannot_be(tmp_path):
    session = Session(tmp_path, connector=spec.Mlp(3))
    with pytest.raises(ValueError, match=r"the stock class has a connector of two affine maps, this one has 3"):
        export(session, recipe(session), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


class Hub:
    calls: list = []
    fails = False

    def create_repo(self, name, exist_ok):
        if self.fails:
            raise ConnectionError("no route\nto the hub")
        self.calls.append(("create", name, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, folder_path))


def test_push(tmp_path, monkeypatch):
    import huggingface_hub

    session = Session(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    out = export(session, recipe(session), tmp_path / "out", push_to="someone/thing")
    assert Hub.calls == [("create", "someone/thing", True), ("upload", "someone/thing", str(out))]
    assert 'from_pretrained("someone/thing")' in (out / "README.md").read_text()
    monkeypatch.setattr(Hub, "fails", True)
    with pytest.raises(RunError, match=r"two is complete, but could not be uploaded to someone/thing: no route$"):
        export(session, recipe(session), tmp_path / "two", push_to="someone/thing")
    assert (tmp_path / "two" / "config.json").exists()


def test_tokenizers_of_this_file_differ():
    """Each kind treats a text's beginning in its own way, or the table above would be one row."""
    rows = {
        kind: tokenizer(kind).convert_ids_to_tokens(tokenizer(kind)(" red", add_special_tokens=False)["input_ids"])[0] for kind in KINDS
    }
    assert len(set(rows.values())) >= 3, rows


IDEFICS = dict(
    connector=spec.Resampler(tokens=3, depth=1, heads=2, head_width=8, activation="relu"),
    fusion=spec.GatedCrossAttention(every=2, block="idefics", end="<end_of_utterance>", around="<fake_token_around_image>"),
    image=spec.Fixed(size=28, fit="squash"), kv_heads=4, layer=-1, keep_class_token=True,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_idefics_run(kind, tmp_path):
    """Its processor takes prompts as lists of texts and pictures: tokens, pixels and words are those of training."""
    session = Session(tmp_path, kind, **IDEFICS)
    open_gates(session.model)
    if kind == "metaspace":  # training marks the beginning of each text between pictures, and the processor that of the first
        with pytest.raises(RunError, match="the stock processor would read"):
            export(session, recipe(session, "idefics"), tmp_path / "out")
        return
    out = export(session, recipe(session, "idefics"), tmp_path / "out")
    processor, theirs = AutoProcessor.from_pretrained(out), IdeficsForVisionText2Text.from_pretrained(out).eval()
    picture = Image.open(photograph(tmp_path / "a.jpg"))
    prompt = ["User:", picture, "\nWhat is this?<end_of_utterance>\nAssistant:"]
    assert '["User:", picture, "\\nWhat is this?<end_of_utterance>\\nAssistant:"]' in (out / "README.md").read_text()
    batch = processor(text=[prompt, ["User: Hello<end_of_utterance>\nAssistant:"]])
    ids, _ = session.encoder("idefics")([("<image>\nWhat is this?", None)])
    assert batch["input_ids"][0].tolist()[-len(ids) :] == ids
    pixels = session.pixels(torch.from_numpy(images.load(tmp_path / "a.jpg", session.system.image))[None])
    torch.testing.assert_close(batch["pixel_values"][0], pixels, atol=1e-5, rtol=0)
    want = theirs.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    got = session.model.generate(**batch, end=session.tokenizer.eos_token_id, max_new_tokens=6)
    assert got.tolist() == want.tolist()


def test_what_has_no_processor_is_refused(tmp_path):
    for changes, sentence in (
        ({"image": spec.Fixed(size=28)}, "Idefics' processor resizes both sides of a picture; image.fit crop cannot be exported"),
        ({"fusion": replace(IDEFICS["fusion"], around="")}, "puts <fake_token_around_image> around pictures; without it in fusion.around"),
        ({"fusion": replace(IDEFICS["fusion"], block="flamingo")}, "no class of transformers has a model of Resampler and GatedCross"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        session = Session(folder, "words", **{**IDEFICS, **changes})
        with pytest.raises((RunError, ValueError), match=sentence):
            export(session, recipe(session, "idefics"), folder / "out")
