"""From words and files to a recipe: layers in order, everything wrong told at once, and what is printed means the same when given back."""

import dataclasses
import itertools
import json
import re
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from mmfast.trainers import config, describe
from mmfast.trainers.__main__ import main
from mmfast.trainers.loop import RunError

import mmfast.spec as vocabulary
from mmfast.spec import Contrast, Data, Likelihood, Linear, Lora, Mixture, Mlp, View

NAMES = list(config.recipe_names())


def given(name, *words, tiny=False, files=()):
    """The recipe of a command line that is right."""
    recipe, problems = config.layered(name, tiny=tiny, files=files, rest=words)
    assert problems == []
    assert config.check(recipe) == []
    return recipe


def wrong(name, *words, tiny=True, files=()):
    """What is told of one that is not."""
    recipe, problems = config.layered(name, tiny=tiny, files=files, rest=words)
    return [*problems, *config.check(recipe)]


def stage(recipe, name="instruct"):
    return next(s for s in recipe.stages if s.name == name)


# ----------------------------------------------------------------------------------------------------------------- layers


def test_layers_in_order(tmp_path):
    """Recipe, tiny, the files one after the other, options: the later one counts, field by field."""
    (tmp_path / "a.yaml").write_text("encoder: {width: 32, depth: 5}\nstages: {instruct: {optim: {lr: 0.5, batch: 3, accumulate: 7}}}\n")
    (tmp_path / "b.json").write_text(json.dumps({"stages.instruct": {"optim.lr": 0.25, "optim.batch": 4}, "encoder.depth": 6}))
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.json")]
    recipe = given("llava", "--stages.instruct.optim.batch=5", tiny=True, files=files)
    optim = stage(recipe).optim
    assert (recipe.encoder.width, recipe.encoder.depth, recipe.encoder.heads) == (32, 6, 4)
    assert (optim.lr, optim.batch, optim.accumulate, optim.steps) == (0.25, 5, 7, 1200)


@pytest.mark.parametrize(
    ("words", "read", "expected"),
    [
        (["--connector.kind", "Mlp"], lambda r: r.connector, Mlp()),
        (["--connector", "Mlp"], lambda r: r.connector, Mlp()),
        (["--connector.depth", "3", "--connector.kind", "Mlp"], lambda r: r.connector, Mlp(3)),
        (["--connector", "{kind: Mlp, depth: 4}"], lambda r: r.connector, Mlp(4)),
        (["--stages.instruct.optim.lr_of.connector", "1e-4"], lambda r: stage(r).optim.lr_of, {"connector": 1e-4}),
        (
            ["--stages.instruct.optim.lr_of", "{connector: 1e-4, language: 2}"],
            lambda r: stage(r).optim.lr_of,
            {"connector": 1e-4, "language": 2.0},
        ),
        (["--stages.instruct.data.columns.meta.picture", "image"], lambda r: stage(r).data.columns, {"meta.picture": "image"}),
        (["--stages.0.optim.betas.1", "0.5"], lambda r: r.stages[0].optim.betas, (0.9, 0.5)),
        (["--stages.align.optim.betas", "[0.1, 0.2]"], lambda r: r.stages[0].optim.betas, (0.1, 0.2)),
        (["--stages.align.optim.betas=0.1,0.2"], lambda r: r.stages[0].optim.betas, (0.1, 0.2)),
        (["--stages.instruct.train", "connector"], lambda r: stage(r).train, ("connector",)),
        (["--stages.instruct.train", "[connector, language]"], lambda r: stage(r).train, ("connector", "language")),
        (["--stages.instruct.train.1", "encoder"], lambda r: stage(r).train[:2], ("connector", "encoder")),
        (["--stages.align.lora", "{rank: 8}"], lambda r: r.stages[0].lora, Lora(rank=8)),
        (["--stages.align.lora.rank", "8", "--stages.align.lora.alpha", "9"], lambda r: r.stages[0].lora, Lora(rank=8, alpha=9)),
        (["--stages.align.lora", "null"], lambda r: r.stages[0].lora, None),
        (["--encoder.weights", "None"], lambda r: r.encoder.weights, None),
        (["--encoder.layer", "-1"], lambda r: r.encoder.layer, -1),
        (["--encoder.keep_class_token", "true"], lambda r: r.encoder.keep_class_token, True),
        (["--stages.align", "null"], lambda r: [s.name for s in r.stages], ["instruct"]),
        (["--encoder.width", "64", "--encoder.width", "128"], lambda r: r.encoder.width, 128),
        (
            ["--stages.align.data", "{kind: Mixture, name: m, parts: [{name: a, weight: 1}, {name: b, weight: 2.5}]}"],
            lambda r: r.stages[0].data,
            Mixture("m", (Data("a", weight=1.0), Data("b", weight=2.5))),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_be_set(words, read, expected):
    assert read(given("llava", *words)) == expected


def test_a_picture_does_not_take_a_text_s_places_unasked(tmp_path):
    """FROMAGe's texts are 24 tokens beside a picture of one; who asks for four says what becomes of the text."""
    (tmp_path / "c.yaml").write_text("stages: {pairs: {max_length: 28}}")
    more = ["--connector.tokens", "4"]
    _, problems = config.layered("fromage", rest=more)
    assert problems == [
        "stages.pairs.max_length: 25 left 24 tokens to a text, and beside connector.tokens 4 leaves 21; give --stages.pairs.max_length 28 for texts as "
        "long as before, or 25 for shorter ones"
    ]
    for files, rest in (
        ([], [*more, "--stages.pairs.max_length", "28"]), ([], [*more, "--stages.pairs.max_length", "25"]), ([tmp_path / "c.yaml"], more),
        ([], ["--stages.pairs.max_length", "20"]), ([], ["--connector.tokens", "1"]),
    ):  # fmt: skip
        assert config.layered("fromage", files=map(str, files), rest=rest)[1] == []
    assert config.layered("fromage", tiny=True, rest=more)[1] == []
    assert config.layered("frozen", rest=more)[1] == []


def test_parts_of_an_alignment():
    recipe = given(
        "dpo",
        "--views.blind.text",
        "chosen",
        "--terms",
        "[{kind: Likelihood, view: blind}, {kind: Contrast, better: chosen, worse: rejected}]",
    )
    assert recipe.views["blind"] == View("chosen")
    assert recipe.terms == (Likelihood("blind"), Contrast("chosen", "rejected"))
    assert given("dpo", "--terms.0.loss_type", "ipo").terms[0].loss_type == "ipo"
    assert given("dpo", "--policy.connector.kind", "Mlp").policy.connector == Mlp()
    assert list(given("dpo", "--views.rejected", "null", "--terms", "[{kind: Likelihood, view: chosen}]").views) == ["chosen"]


def test_a_kind_starts_from_its_own_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("stages: {instruct: {optim: {kind: Optim, lr: 0.1, steps: 3}}}\n")
    optim = stage(given("llava", tiny=True, files=[str(file)])).optim
    assert optim == vocabulary.Optim(lr=0.1, steps=3)
    file.write_text("stages: {instruct: {optim: {lr: 0.1, steps: 3}}}\n")
    assert stage(given("llava", tiny=True, files=[str(file)])).optim.warmup == 40


def test_the_file_in_the_documents(tmp_path):
    text = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
    (tmp_path / "lab.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.S).group(1))
    recipe = given("llava", files=[str(tmp_path / "lab.yaml")])
    assert [s.name for s in recipe.stages] == ["instruct"]
    assert stage(recipe).optim.lr_of == {"connector": 1e-4}
    words, told = re.search(r"\$ mmfast train llava --tiny (.*?)\nmmfast: (.*?)```", text, re.S).groups()
    assert str(config.ConfigError(wrong("llava", *words.split()))) == told.strip()


# ------------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_print_config_and_back(name, shrink, capsys, tmp_path):
    """Over the same recipe, over any other, and as a recipe of its own."""
    options = ["--tiny"] if shrink else []
    with pytest.raises(SystemExit) as end:
        main(["show", name, *options, "--print-config"])
    text = capsys.readouterr().out
    assert not end.value.code
    (tmp_path / "all.yaml").write_text(text)
    recipe = config.load_recipe(name, tiny=shrink)
    assert config.load_recipe(str(tmp_path / "all.yaml")) == recipe
    for other in NAMES:
        assert given(other, files=[str(tmp_path / "all.yaml")]) == recipe
    assert config.to_yaml(given(name, tiny=shrink, files=[str(tmp_path / "all.yaml")])) == text


def test_print_config_keeps_what_was_taken_out(tmp_path):
    changed = given(
        "dpo",
        "--views.rejected",
        "null",
        "--terms",
        "[{kind: Likelihood, view: chosen}]",
        "--data.columns.a",
        "b",
        "--train",
        "[]",
        "--lora.rank",
        "4",
    )
    (tmp_path / "a.yaml").write_text(config.to_yaml(changed))
    assert given("dpo", files=[str(tmp_path / "a.yaml")]) == changed
    assert given("dpo", "--lora", "null", "--train", "language", files=[str(tmp_path / "a.yaml")]).lora is None


def test_print_config_holds_the_flags_too(capsys):
    with pytest.raises(SystemExit):
        main(["train", "llava", "--tiny", "--steps", "7", "--device", "cpu", "--print-config"])
    tree = yaml.safe_load(capsys.readouterr().out)
    assert [s["optim"]["steps"] for s in tree["stages"]] == [7, 7, 7]
    assert tree["compute"]["device"] == "cpu"


def test_data_replaces_a_mixture(capsys, tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    mixture = "{kind: Mixture, name: m, parts: [{name: a}, {name: b}]}"
    with pytest.raises(SystemExit):
        main(["train", "llava", "--stages.instruct.data", mixture, "--data", str(tmp_path / "mine.json"), "--print-config"])
    data = yaml.safe_load(capsys.readouterr().out)["stages"][1]["data"]
    assert (data["kind"], data["name"], data["path"]) == ("Data", "m", str(tmp_path / "mine.json"))


def test_every_field_can_be_set_by_its_shown_name():
    """`mmfast show` prints names and values that the command line takes, and they change nothing."""
    for name in NAMES:
        recipe = config.load_recipe(name, tiny=True)
        for key, value in describe.flat(recipe).items():
            if not key.endswith("kind") and value != {}:
                assert given(name, f"--{key}", describe.text(value), tiny=True) == recipe, key


# ------------------------------------------------------------------------------------------------------------------ wrong


def test_everything_wrong_at_once(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("encoder: {wdith: 32, heads: many}\nstages: {instrct: {max_length: 3}, align: {optim: {floor: 2}}}\n")
    argv = ["train", "llava", "--tiny", "--config", str(tmp_path / "a.yaml"), "--config", "gone.yaml", "--stpes", "3", "stray"]
    argv += ["--stages.instruct.optim.lr", "fast", "--stages.instruct.optim.batch", "0", "--image.size", "32", "--quiett"]
    with pytest.raises(SystemExit) as end:
        main(argv)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.splitlines() == [
        "mmfast: 11 errors in the configuration",
        f"  {tmp_path}/a.yaml: encoder.wdith: Clip has no field 'wdith' (did you mean 'width'?); it has weights, width, depth, heads, ffn, "
        "patch, size, layer, scales, keep_class_token, post_norm, unit, activation, interpolate",
        f"  {tmp_path}/a.yaml: encoder.heads: expected a whole number, got 'many'",
        f"  {tmp_path}/a.yaml: stages.instrct: nothing is called 'instrct' there (did you mean 'instruct'?); there are words, align, instruct",
        "  config file gone.yaml does not exist",
        "  unexpected argument 'stray'; fields are set as --name.of.field value",
        "  --quiett needs a value",
        "  unknown option --stpes (did you mean 'steps'?); `mmfast show llava` lists the recipe's fields",
        "  --stages.instruct.optim.lr: expected a number, got 'fast'",
        "  image.size: 32 and encoder.size 64 must agree",
        "  stages.align.optim.floor: expected at least 0 and at most 1, got 2",
        "  stages.instruct.optim.batch: expected at least 1, got 0",
    ]


TOLD = [
    (["--encoder.width", "3.5"], "--encoder.width: expected a whole number, got '3.5'"),
    (["--encoder.width", "null"], "--encoder.width: expected a whole number, got 'null'"),
    (["--encoder.width", "[3]"], "--encoder.width: expected a whole number, got '[3]'"),
    (["--encoder.keep_class_token", "2"], "--encoder.keep_class_token: expected true or false, got '2'"),
    (["--stages.align.optim.lr", "nan"], "--stages.align.optim.lr: expected a number, got 'nan'"),
    (["--stages.align.optim.steps", "few"], "--stages.align.optim.steps: expected a whole number or null, got 'few'"),
    (
        ["--stages.align.objective", "lmm"],
        "--stages.align.objective: expected one of lm, words, tokenizer, retrieval, queries, got 'lmm' (did you mean 'lm'?)",
    ),
    (
        ["--stages.align.train", "[conector]"],
        "--stages.align.train: expected one of encoder, last_block, connector, queries, adapter, language, embeddings, new_tokens, got 'conector'",
    ),
    (["--stages.align.optim.betas", "[0.9]"], "--stages.align.optim.betas: expected 2 values, got [0.9]"),
    (["--stages.align.optim.betas.2", "0.9"], "--stages.align.optim.betas.2: nothing is called '2' there"),
    (["--stages.align.optim.lr_of", "0.1"], "--stages.align.optim.lr_of: expected entries such as {key: value}, got '0.1'"),
    (["--stages.align.optim.lr_of.connector", "x"], "--stages.align.optim.lr_of.connector: expected a number, got 'x'"),
    (["--stages.align.optim.lr_of.connector", "null"], "there is no entry 'connector' to take out"),
    (["--connector.kind", "Mpl"], "--connector.kind: unknown kind 'Mpl' (did you mean 'Mlp'?), expected one of Linear, Mlp"),
    (["--encoder.kind", "Clipp"], "--encoder.kind: unknown kind 'Clipp' (did you mean 'Clip'?), expected one of Clip, Siglip, Dino, Eva,"),
    (["--connector", "{depth: 3}"], "--connector.depth: Linear has no field 'depth'"),
    (["--stages.align.data", "{kind: Mixture, name: m, parts: 3}"], "--stages.align.data.parts: expected a list such as [a, b], got 3"),
    (
        ["--connector", "3"],
        "--connector: is a group of fields; expected the name of a kind (Linear, Mlp, Pooled, NoConnector, Tokens, Resampler, AttentionPool, QFormer), got '3'",
    ),
    (["--connector.depth", "3"], "--connector.depth: Linear has no field 'depth'; it has none"),
    (
        ["--encoder", "Klip"],
        "--encoder: is a group of fields; expected the name of a kind (Clip, Siglip, Dino, Eva, NfResnet, Vqgan), got 'Klip' (did you mean 'Clip'?)",
    ),
    (["--compute", "fast"], "--compute: is a group of fields; expected fields, say --compute.device, got 'fast'"),
    (["--stages", "[{name: a}]"], "--stages.a: Stage is missing train, data, optim"),
    (["--stages.align.data", "{kind: Mixture, name: m}"], "--stages.align.data: Mixture is missing parts"),
    (["--encoder", "Clip", "--encoder.width", "8"], "--encoder: is given twice, or both whole and in parts"),
    (["--name.of.it", "x"], "--name: expected text, got {'of.it': 'x'}"),
]


@pytest.mark.parametrize(("words", "sentence"), TOLD, ids=[" ".join(w) for w, _ in TOLD])
def test_types_say_field_given_and_allowed(words, sentence):
    problems = wrong("llava", *words)
    assert [p for p in problems if sentence in p], problems


RULES = [
    ("llava", ["--stages.align.optim.lr", "0"], "stages.align.optim.lr: expected more than 0, got 0.0"),
    ("llava", ["--stages.align.optim.floor", "1.5"], "stages.align.optim.floor: expected at least 0 and at most 1, got 1.5"),
    ("llava", ["--stages.align.optim.hold", "-0.1"], "stages.align.optim.hold: expected at least 0 and at most 1, got -0.1"),
    ("llava", ["--stages.align.optim.betas.0", "1"], "stages.align.optim.betas: expected at least 0 and less than 1, got 1.0"),
    ("llava", ["--stages.align.optim.ema", "1"], "stages.align.optim.ema: expected at least 0 and less than 1, got 1.0"),
    ("llava", ["--stages.align.optim.steps", "null"], "stages.align.optim.steps: a stage needs steps or epochs, and has neither"),
    ("llava", ["--stages.align.optim.accumulate", "0"], "stages.align.optim.accumulate: expected at least 1, got 0"),
    ("llava", ["--stages.align.optim.lr_of.conector", "1"], "there is no part 'conector' (did you mean 'connector'?)"),
    ("llava", ["--stages.align.optim.lr_of.language", "1"], "stages.align.optim.lr_of.language: language does not train there"),
    ("llava", ["--stages.instruct.optim.lr_of.language", "0"], "stages.instruct.optim.lr_of.language: expected more than 0, got 0.0"),
    ("llava", ["--stages.align.optim.layer_decay", "0"], "stages.align.optim.layer_decay: expected more than 0 and at most 1, got 0.0"),
    (
        "blip2",
        ["--stages.speak.optim.layer_decay", "0.9"],
        "stages.speak.optim.layer_decay: is of the encoder's layers, and these do not train",
    ),
    (
        "blip2",
        ["--connector.instructed", "true", "--stages.speak.template", "llava_v0"],
        "stages.speak.template: llava_v0 learns what stands before the question, so that a Q-Former would not read it",
    ),
    (
        "frozen",
        ["--stages.captions.optim.layer_decay", "0.9"],
        "layer_decay: goes by a vision transformer's layers, and encoder is NfResnet",
    ),
    ("llava", ["--stages.align.train", "[]"], "stages.align.train: nothing trains"),
    ("llava", ["--stages.align.train", "connector,connector"], "stages.align.train: a part is named twice"),
    ("llava", ["--stages.align.template", "vicuna"], "stages.align.template: unknown template 'vicuna' (did you mean 'vicuna_v1'?)"),
    (
        "llava",
        ["--stages.align.max_length", "17"],
        "stages.align.max_length: 17 cannot hold a picture of 16 tokens and an answer; at least 18",
    ),
    ("llava", ["--stages.align.lora.rank", "0"], "stages.align.lora.rank: expected at least 1, got 0"),
    ("llava", ["--stages.align.lora.targets", "[]"], "stages.align.lora.targets: names no module"),
    ("llava", ["--stages.instruct.lora.rank", "4"], "stages.instruct.lora: language trains whole and through adapters"),
    ("llava", ["--language.quantize", "4bit"], "language.quantize: 4bit holds given weights in fewer bits; set language.weights too"),
    ("llava", ["--language.quantize", "4bit"], "stages.instruct.train: a 4bit language model cannot train whole"),
    (
        "llava",
        ["--compute.precision", "fp16", "--compute.device", "cpu"],
        "compute.precision: fp16 is for CUDA; on the CPU choose bf16 or fp32",
    ),
    ("blip2", ["--connector.heads", "5"], "connector.width: 64 is not a multiple of connector.heads 5"),
    ("blip2", ["--connector.text", "false"], "stages.see.objective: queries needs a connector QFormer with text, got QFormer("),
    ("blip2", ["--connector", "Mlp"], "stages.see.objective: queries needs a connector QFormer with text, got Mlp("),
    ("blip2", ["--stages.see.objective", "lm"], "stages.see.train: the part queries learns by objective queries; say connector"),
    ("blip2", ["--stages.speak.objective", "queries"], "stages.speak.train: objective queries trains the part queries; name it"),
    (
        "blip2",
        ["--stages.see.train", "queries,connector,language"],
        "stages.see.train: objective queries reaches queries and encoder, not connector, language; take it out",
    ),
    (
        "blip2",
        ["--stages.see.data.clean", "true"],
        "stages.see.data.clean: shapes_captions is built in and read as it is; leave clean off",
    ),
    ("blip2", ["--stages.see.max_length", "65"], "stages.see.max_length: 65 words are more than the Q-Former's 64 positions; at most 64"),
    ("blip2", ["--stages.see.optim.batch", "1"], "stages.see.optim.batch: a text is compared with other pictures of its micro-batch"),
    (
        "blip2_flan_t5",
        ["--stages.speak.template", "llava_v0"],
        "stages.speak.template: llava_v0 learns what stands before the question, so that the encoder of t5 would not read it; choose another",
    ),
    ("blip2_flan_t5", ["--compute.packing", "true"], "compute.packing: the decoder of t5 cannot keep packed rows apart"),
    (
        "flamingo",
        ["--language.family", "t5"],
        "fusion: GatedCrossAttention goes into a causal language model, and t5 is an encoder and a decoder",
    ),
    ("kosmos_1", ["--language.family", "t5"], "fusion.begin: <image> is learnt behind a text, and t5 reads pictures in its encoder alone"),
    ("llava", ["--compute.bad_steps", "0"], "compute.bad_steps: expected at least 1, got 0"),
    ("llava", ["--encoder.heads", "7"], "encoder.width: 64 is not a multiple of encoder.heads 7"),
    ("llava", ["--encoder.heads", "0"], "encoder.heads: expected at least 1, got 0"),
    ("llava", ["--encoder.layer", "9"], "encoder.layer: expected at least -4 and at most 3, got 9"),
    ("llava", ["--encoder.scales", "[1, 9]"], "encoder.scales: expected at least -4 and at most 3, got 9"),
    (
        "llava",
        ["--encoder.scales", "[1]", "--encoder.unit", "true"],
        "encoder.scales: post_norm and unit are about one layer's states; leave",
    ),
    ("llava", ["--encoder.patch", "12"], "encoder.size: 64 is not a multiple of encoder.patch 12"),
    ("llava", ["--language.kv_heads", "3"], "language.heads: 4 is not a multiple of language.kv_heads 3"),
    ("llava", ["--image.std.0", "0"], "image.std: expected more than 0, got 0.0"),
    ("llava", ["--stages.align.data.frames", "0"], "stages.align.data.frames: expected at least 1, got 0"),
    (
        "llava",
        ["--stages.align.data.streaming", "true", "--stages.align.optim.steps", "null", "--stages.align.optim.epochs", "1"],
        "stages.align.data.streaming: a stream has no known length; set optim.steps instead of epochs",
    ),
    (
        "llava",
        ["--stages.align.data", "{kind: Mixture, name: m, parts: [{name: a, weight: 1}, {name: a}]}"],
        "stages.align.data.parts: every data set of a mixture needs a name of its own",
    ),
    (
        "llava",
        ["--stages.align.data", "{kind: Mixture, name: m, parts: [{name: a, weight: 1}, {name: b}]}"],
        "stages.align.data.parts: give every data set of a mixture a weight, or none",
    ),
    (
        "llava",
        ["--stages.align.data", "{kind: Mixture, name: m, parts: [{name: a, loss: 1}, {name: b}]}"],
        "stages.align.data.parts: give the loss of every data set of a mixture a weight, or of none",
    ),
    (
        "llava",
        ["--stages.align.data", "{kind: Mixture, name: m, parts: [{name: shapes, loss: 1}, {name: shapes_told, loss: 2}]}"],
        "stages.align.data.parts: the losses of built-in sets have no weights of their own; leave loss out",
    ),
    ("flamingo", ["--fusion.every", "0"], "fusion.every: expected at least 1, got 0"),
    ("fromage", ["--fusion.shared", "0"], "fusion.shared: expected at least 1, got 0"),
    ("kosmos_2", ["--regions.bins", "2000"], "regions.bins: expected at least 1 and at most 256, got 2000"),
    ("llava", ["--stages.align.data.pages.following", "1.5"], "stages.align.data.pages.following: expected"),
    ("llava", ["--stages.align.data.loss", "0"], "stages.align.data.loss: expected"),
    (
        "llava",
        ["--stages.align.data", "{kind: Mixture, name: m, parts: [{name: a, path: a.json}, {name: b}]}"],
        "stages.align.data.parts: give every data set of a mixture a path; b has none",
    ),
    (
        "llava",
        ["--stages.align.data", "{kind: Mixture, name: m, parts: [{name: a, path: a.jsonl, streaming: true}]}"],
        "stages.align.data.parts.a.streaming: a mixture is drawn from by number; leave streaming off, or train on one set",
    ),
    ("llava", ["--stages.align.data.streaming", "true"], "stages.align.data.streaming: shapes is built in and held in memory"),
    (
        "llava",
        ["--stages.align.data.captions_first", "0.5"],
        "stages.align.data.captions_first: shapes is built in and read as it is; set it to null",
    ),
    ("llava", ["--stages.align.data.captions_first", "2"], "stages.align.data.captions_first: expected at least 0 and at most 1, got 2.0"),
    ("llava", ["--stages.align.data.shots.shots", "2"], "stages.align.data.shots: shapes is built in and read as it is"),
    (
        "llava",
        ["--stages.align.data.shots.prompt", "kosmoss"],
        "stages.align.data.shots.prompt: unknown prompt 'kosmoss' (did you mean 'kosmos'?)",
    ),
    ("llava", ["--stages.words.data.path", "a.json"], "stages.words.objective: words needs to know what is true of a picture"),
    (
        "llava",
        ["--stages.words.lora.rank", "4", "--stages.align.lora.rank", "8"],
        "stages.align.lora: the adapters of words are still there and train on, and these are others; give both stages the same",
    ),
    ("llava", ["--compute.workers", "-1"], "compute.workers: expected at least 0, got -1"),
    ("llava", ["--stages.align.optim.schedule", "cosin"], "schedule: expected one of cosine, linear, exponential, constant, got 'cosin'"),
    ("llava", ["--encoder.kind", "Dino", "--encoder.weights", "null", "--encoder.ffn", "800"], "encoder.ffn: 800 is not a multiple"),
    ("dpo", ["--policy.stages.words.optim.batch", "0"], "policy.stages.words.optim.batch: expected at least 1, got 0"),
    ("llava", ["--stages.align.name", "instruct"], "stages: every stage needs a name of its own"),
    ("dpo", ["--beta", "0"], "beta: expected more than 0, got 0.0"),
    ("dpo", ["--terms", "[]"], "terms: an alignment needs at least one term"),
    (
        "dpo",
        ["--terms.0.worse", "rejcted"],
        "terms.0.worse: there is no view 'rejcted' (did you mean 'rejected'?), the views are chosen, rejected",
    ),
    ("dpo", ["--terms.0.worse", "chosen"], "terms.0.worse: contrasts a view with itself"),
    ("dpo", ["--terms.0.label_smoothing", "0.5"], "terms.0.label_smoothing: expected at least 0 and less than 0.5, got 0.5"),
    ("dpo", ["--reference", "adapter_off"], "reference: adapter_off needs adapters to switch off; set lora"),
    (
        "dpo",
        ["--reference", "adapter_off", "--lora.rank", "4", "--train", "embeddings"],
        "reference: adapter_off leaves embeddings as trained; set train [] or another reference",
    ),
    ("llama_adapter", ["--fusion.layers", "4"], "fusion.layers: expected at least 1 and at most 3, got 4"),
    ("llama_adapter", ["--connector.kind", "Linear"], "connector: adapter prompts take one vector a picture; set connector Pooled"),
    ("llama_adapter", ["--encoder.keep_class_token", "false"], "connector.pool: class reads the class token"),
    ("llama_adapter", ["--fusion.kind", "Prefix"], "stages.answers.train: adapter is what the fusion has to learn, and Prefix has nothing"),
    (
        "fromage",
        ["--connector.kind", "Linear"],
        "connector: Retrieval compares a picture's pooled state, which Linear does not have; set Tokens",
    ),
    (
        "fromage",
        ["--fusion.kind", "Prefix"],
        "stages.pairs.objective: retrieval compares pictures with texts, and Prefix does not; choose lm",
    ),
    ("fromage", ["--fusion.layers", "[-1, 3]"], "fusion.layers: expected some of -4 to 3, no state twice, got [-1, 3]"),
    (
        "llava",
        ["--stages.align.max_length", "257"],
        "stages.align.max_length: 257 is more than the language model's context of 256; at most 256",
    ),
    ("fromage", ["--stages.text.max_length", "300"], "stages.text.max_length: 300 is more than the language model's context of 256"),
    ("dpo", ["--max_length", "300"], "max_length: 300 is more than the language model's context of 256; at most 256"),
    ("dpo", ["--policy.language.context", "100"], "policy.stages.align.max_length: 256 is more than the language model's context of 100"),
    (
        "kosmos_2",
        ["--image.augment", "true"],
        "image.augment: shows a part of a picture, mirrored or not, and the places told of it would not",
    ),
    ("fromage", ["--fusion.layers", "[]"], "fusion.layers: expected some of -4 to 3, no state twice, got []"),
    ("fromage", ["--stages.pairs.template", "bare"], "stages.pairs.template: retrieval ends texts with [RET]; choose fromage"),
    ("fromage", ["--compute.packing", "true"], "stages.pairs.objective: retrieval compares rows; set compute.packing false"),
    ("fromage", ["--stages.pairs.contrast", "-1"], "stages.pairs.contrast: expected at least 0, got -1.0"),
    ("fromage", ["--stages.pairs.train", "[connector]"], "optim.level_new: gives rows of new_tokens their norm, and these do not train"),
    ("dpo", ["--policy.image.size", "32"], "policy.image.size: 32 and encoder.size 64 must agree"),
    ("dpo", ["--data.scenes", "1"], "data.scenes: expected at least 2, got 1"),
]


@pytest.mark.parametrize(("name", "words", "sentence"), RULES, ids=[" ".join([n, *w]) for n, w, _ in RULES])
def test_rules_beyond_types(name, words, sentence):
    problems = wrong(name, *words)
    assert [p for p in problems if sentence in p], problems
    assert all("\n" not in p for p in problems)


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_keeps_the_rules(name, shrink):
    assert config.check(config.load_recipe(name, tiny=shrink)) == []


def test_what_is_declared_beside_weights_is_not_held_against_them():
    """Their sizes are read later: a picture of theirs, a layer of theirs and a policy's stages that will not run refuse nothing here."""
    assert given("llava", "--encoder.layer", "-30", "--encoder.patch", "13", "--image.size", "3", "--stages.align.max_length", "40")
    assert given("dpo", "--policy.stages.instruct.optim.batch", "0")


def test_a_context_that_weights_bring_is_kept_to():
    recipe = config.load_recipe("llava")
    read = replace(recipe, language=replace(recipe.language, family="gpt2", context=1024))
    sentence = "max_length: 2048 is more than the language model's context of 1024; at most 1024"
    assert config.check(read) == [], "what is declared beside weights may be anything"
    assert config.length_misfits(recipe, read) == [f"stages.{name}.{sentence}" for name in ("align", "instruct")]
    assert config.length_misfits(recipe, recipe) == []
    dpo = config.load_recipe("dpo")
    assert config.length_misfits(dpo, read) == [sentence], "the policy's stages are behind it"
    t5 = replace(recipe, language=replace(recipe.language, family="t5", context=512))
    assert config.length_misfits(recipe, t5) == []


def test_sizes_are_refused_by_the_rules_that_build_has(tmp_path):
    """One rule, told by the command line and by build."""
    from mmfast.models import build

    for words in (["--encoder.heads", "7"], ["--language.kv_heads", "3"], ["--encoder.layer", "9"], ["--image.size", "32"]):
        recipe, _ = config.layered("llava", tiny=True, rest=[*words, "--language.vocab", "50"])
        (sentence,) = config.check(recipe)
        with pytest.raises(ValueError, match=re.escape(f"llava: {sentence}")):
            build(recipe)


def test_a_batch_is_divided_among_processes(monkeypatch):
    recipe = config.load_recipe("dpo")
    assert config.check(recipe, processes=8) == []
    assert config.check(recipe, processes=3) == ["optim.batch: 32 rows do not divide among 3 processes; choose a multiple of 3"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert len(config.check(recipe)) == 1, "torchrun tells how many there are"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.yaml", "encoder: {", "is not valid YAML"),
        ("a.yaml", "encoder: {width: 3}\nencoder: {depth: 3}\n", "the key 'encoder' is there twice"),
        ("a.yaml", "- 3\n", "must hold fields and values"),
        ("a.yaml", "", "must hold fields and values"),
        ("a.json", '{"encoder": ', "is not valid JSON"),
        ("a.yaml", b"\xff\xfe\x00", "is not valid YAML"),
        ("a.yaml", "encoder.width: 3\nencoder: {width: 4}\n", "encoder: is given twice"),
        ("a.yaml", "encoder: 3\n", "encoder: is a group of fields"),
        ("a.yaml", "name: [1]\n", "name: expected text, got [1]"),
        ("a.yaml", "name: on\n", "name: expected text, got True"),
        ("a.yaml", "!!python/object:os.system x\n", "is not valid YAML"),
    ],
)
def test_files_that_are_no_config(name, text, sentence, tmp_path):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    problems = wrong("llava", files=[str(path)])
    assert [p for p in problems if sentence in p and p.startswith((f"{path}: ", f"config file {path} "))], problems


# ----------------------------------------------------------------------------------------------------- stored, shown, compared


def test_a_stored_recipe_tells_all_that_is_wrong():
    from mmfast.spec import to_dict

    stored = to_dict(config.load_recipe("llava"))
    stored["encoder"] |= {"wdith": 3, "heads": "x"}
    stored["connector"]["kind"] = "Lin"
    with pytest.raises(config.ConfigError) as told:
        config.from_dict(stored)
    assert len(told.value.problems) == 3


def test_what_a_recipe_can_be_read_from(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    recipe = config.load_recipe("dpo", tiny=True)
    (run / "recipe.json").write_text(json.dumps(vocabulary.to_dict(recipe) | {"seed": 3}))
    assert config.load_recipe(str(run)) == recipe
    for name, sentence in (
        (str(tmp_path), "is no run folder: it holds no recipe.json"),
        ("lava", r"unknown recipe 'lava' \(did you mean 'llava'\?\)"),
        ("gone.yaml", "recipe file gone.yaml does not exist"),
    ):
        with pytest.raises(RunError, match=sentence):
            config.load_recipe(name)
    (tmp_path / "part.yaml").write_text("encoder: {width: 3}\n")
    with pytest.raises(RunError, match="is no whole recipe"):
        config.load_recipe(str(tmp_path / "part.yaml"))


def test_diff_of_runs_files_and_names(capsys, tmp_path):
    def call(*argv):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in argv])
        return end.value.code, *capsys.readouterr()

    changed = given("llava", "--stages.instruct.optim.lr", "0.5", "--connector.kind", "Mlp", tiny=True)
    (tmp_path / "recipe.json").write_text(json.dumps(vocabulary.to_dict(changed) | {"seed": 3}))
    (tmp_path / "b.yaml").write_text(config.to_yaml(changed))
    code, out, _ = call("diff", tmp_path, tmp_path / "b.yaml")
    assert (code, out) == (0, "llava and llava do not differ\n")
    (tmp_path / "b.yaml").write_text(config.to_yaml(config.load_recipe("llava", tiny=True)))
    rows = [line.split() for line in call("diff", tmp_path, tmp_path / "b.yaml")[1].splitlines()]
    assert [row for row in rows if row and "." in row[0]] == [
        ["connector.kind", "Mlp", "Linear"],
        ["stages.instruct.optim.lr", "0.5", "0.004"],
    ]
    assert rows[-1][:3] == ["2", "fields", "differ;"]


def test_show_says_what_was_changed():
    before = config.load_recipe("llava")
    lines = describe.show(given("llava", "--encoder.width", "32", "--connector.kind", "Mlp"), before).splitlines()
    assert lines[0] == "llava  (System; arXiv:2304.08485)"
    assert [line.split() for line in lines if "#" in line] == [
        ["encoder.width", "=", "32", "#", "was", "1024"],
        ["connector.kind", "=", "Mlp", "#", "was", "Linear"],
    ]
    assert not any(a == b == "" for a, b in itertools.pairwise(lines)), "no two empty lines"


def test_diff_pairs_what_belongs_together():
    """Stages by name, else by place; kinds with their fields; nothing of defaults that the other side has no place for."""

    def rows(a, b):
        return {
            key: rest for key, *rest in filter(None, map(str.split, describe.diff(a, b).splitlines())) if re.fullmatch(r"(\w+\.)+\w+", key)
        }

    base = given("llava")
    other = given(
        "llava",
        "--connector.kind",
        "Resampler",
        "--connector.depth",
        "2",
        "--stages.instruct.lora",
        "{rank: 8}",
        "--stages.instruct.train",
        "connector",
    )
    assert rows(base, other) == {
        "connector.kind": ["Linear", "Resampler"],
        "connector.depth": ["-", "2"],
        "stages.instruct.train": ["[connector,", "language,", "embeddings]", "[connector]"],
        "stages.instruct.lora.rank": ["-", "8"],
    }
    first, second = base.stages
    moved = dataclasses.replace(base, stages=(second, dataclasses.replace(first, name="more", max_length=64)))
    assert rows(base, moved).keys() >= {"stages.align.train", "stages.more.train"}, "no namesake, and no place in common"
    renamed = dataclasses.replace(base, stages=(dataclasses.replace(first, name="begin", max_length=64), second))
    assert rows(base, renamed) == {"stages.0.name": ["align", "begin"], "stages.0.max_length": ["2048", "64"]}
    parts = dataclasses.replace(base, stages=(first, dataclasses.replace(second, data=Mixture("two", (Data("a", weight=2.0), Data("b"))))))
    assert rows(base, parts) == {
        "stages.instruct.data.kind": ["Data", "Mixture"],
        "stages.instruct.data.name": ["llava_instruct_158k", "two"],
        "stages.instruct.data.parts.a.kind": ["-", "Data"],
        "stages.instruct.data.parts.a.weight": ["-", "2.0"],
        "stages.instruct.data.parts.b.kind": ["-", "Data"],
    }
    told = describe.diff(config.load_recipe("dpo"), base)
    assert "policy.name" not in told, "beside a preference method a system is its policy"
    assert "DPO (arXiv:2305.18290)" in told
    assert re.search(r"^Contrast +-log sigmoid", told, re.M)
    assert describe.diff(base, base) == "llava and llava do not differ"


def test_env_with_a_wrong_isa_is_one_sentence():
    """Neither `env` nor any other command answers with a traceback."""
    import os
    import subprocess
    import sys

    def call(*argv):
        code = "import sys; from mmfast.trainers.__main__ import main; main(sys.argv[1:])"
        return subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, env=os.environ | {"MMFAST_CPU_ISA": "sse9"}
        )

    done = call("env")
    assert (done.returncode, done.stderr) == (1, "")
    assert "MMFAST_CPU_ISA: unknown level 'sse9', expected one of auto, baseline" in done.stdout
    done = call("show", "llava")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mmfast: MMFAST_CPU_ISA: unknown level 'sse9'")
    assert done.stderr.count("\n") == 1


def test_every_type_of_the_vocabulary_can_be_read():
    """A field of a type that nobody here thought of would be refused for any value: this list tells before a user does."""
    plain = (str, int, float, bool, type(None))

    def known(hint):
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if hint in plain or origin is typing.Literal or dataclasses.is_dataclass(hint):
            return True
        return origin is not None and all(known(part) for part in inner if part is not Ellipsis)

    for kind in vars(vocabulary).values():
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            for name, hint in typing.get_type_hints(kind).items():
                assert known(hint), f"{kind.__name__}.{name}: {hint}"
                options = config._options(hint)
                scalars = [o for o in options if o in plain[:4]]
                assert len(scalars) <= 1, f"{kind.__name__}.{name}: of several plain types the first alone is read"


def test_linear_is_no_mapping_of_its_own():
    assert given("llava", "--connector", "Linear").connector == Linear()
