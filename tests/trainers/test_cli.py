"""The command line: what is wrong is said in one line, with exit code 2 before data is touched and 1 after."""

import json
import subprocess
import sys

import numpy as np
import pytest
from mmfast.trainers.__main__ import main
from PIL import Image


def call(capsys, *argv):
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in argv])
    out = capsys.readouterr()
    return end.value.code, out.out, out.err


WRONG = [
    (["train", "lava"], "unknown recipe 'lava' (did you mean 'llava'?)"),
    (["train", "nothing_like_it"], "unknown recipe 'nothing_like_it'; `mmfast list` shows all"),
    (["train", "gone.py"], "recipe file gone.py does not exist"),
    (
        ["train", "llava", "--stages.align.data.name", "shapes_captions", "--stages.instruct.data.name", "shapes_captions"],
        "no tokenizer can be read",
    ),
    (["train", "llava", "--tiny", "--stpes", "3"], "unknown option --stpes (did you mean 'steps'?)"),
    (["train", "llava", "--tiny", "--encoder.wdith", "3"], "Clip has no field 'wdith' (did you mean 'width'?)"),
    (["train", "llava", "--tiny", "--stages.instrct.optim.lr", "3"], "nothing is called 'instrct' there (did you mean 'instruct'?)"),
    (["train", "llava", "--tiny", "--stages.instruct.optim.lr", "fast"], "--stages.instruct.optim.lr: expected a number, got 'fast'"),
    (
        ["train", "llava", "--tiny", "--stages.instruct.objective", "lmm"],
        "expected one of lm, words, tokenizer, retrieval, queries, got 'lmm'",
    ),
    (["train", "llava", "--tiny", "--encoder"], "--encoder needs a value"),
    (["train", "llava", "--tiny", "--encoder", "clip"], "is a group of fields"),
    (["train", "llava", "--tiny", "stray"], "unexpected argument 'stray'"),
    (["train", "llava", "--tiny", "--config", "gone.yaml"], "config file gone.yaml does not exist"),
    (["train", "llava", "--tiny", "--data", "gone.json"], "data file gone.json does not exist"),
    (["train", "llava", "--tiny", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["train", "llava", "--tiny", "--save-every", "0"], "--save-every 0: expected at least 1"),
    (["train", "llava", "--tiny", "--dry-run", "--keep", "-1"], "--keep -1: expected at least 1"),
    (["train", "frozen"], "data 'conceptual_captions' is not built in; give its records with --data FILE"),
    (["train", "dpo", "--tiny", "--data.name", "mine"], "pairs 'mine' are not built in; give records with --data FILE"),
    (["train", "llava", "--tiny", "--steps", "0"], "--steps 0: expected at least 1"),
    (["train", "llava", "--tiny", "--encoder.heads", "7"], "encoder.width: 64 is not a multiple of encoder.heads 7"),
    (["train", "llava", "--tiny", "--encoder.patch", "12"], "encoder.size: 64 is not a multiple of encoder.patch 12"),
    (["train", "llava", "--tiny", "--image.size", "32"], "image.size: 32 and encoder.size 64 must agree"),
    (["train", "llava", "--tiny", "--stages.align.train", "[conector]"], "conector"),
    (["train", "llava", "--tiny", "--stages.align.template", "vicuna"], "unknown template 'vicuna' (did you mean 'vicuna_v1'?)"),
    (["show", "llava", "--optm.lr", "3"], "unknown option --optm.lr"),
    (["train", "llava", "--tiny", "--step", "3"], "unknown option --step (did you mean 'steps'?)"),
    (["plan", "lava"], "unknown recipe 'lava' (did you mean 'llava'?)"),
    (["plan", "llava", "--gpu-memory", "x"], "argument --gpu-memory: invalid float value: 'x'"),
    (["diff", "llava", "dop"], "unknown recipe 'dop' (did you mean 'dpo'?)"),
    (["eval", "gone"], "gone is no run folder"),
    (["eval", "gone", "--generate"], "--generate is about records, and none are given; add --data FILE"),
    (
        ["eval", "gone", "--data", "x", "--no-repeat-ngram-size", "3"],
        "--no-repeat-ngram-size is about answers that are decoded; add --generate",
    ),
    (["eval", "gone", "--data", "x", "--generate", "--max-new-tokens", "0"], "--max-new-tokens 0: expected at least 1"),
    (["chat", "gone", "--beams", "0"], "--beams 0: expected at least 1"),
    (["chat", "gone", "--beams", "2", "--temperature", "1"], "--beams follows the likeliest texts, and --temperature draws others"),
    (["chat", "gone", "--length-penalty", "2"], "--length-penalty is about beams; add --beams N"),
    (["chat", "gone", "--repetition-penalty", "nan"], "--repetition-penalty nan: expected a number above 0"),
    (["report", "gone"], "gone is no run folder"),
    (["bench", "vqq"], "mmfast"),
    (["lits"], "did you mean 'list'"),
    (["list", "--markdwon"], "unknown option '--markdwon'"),
    (["train", "llava", "--tiny", "--eval-every", "-1"], "--eval-every -1: expected at least 0"),
    (["train", "llava", "--tiny", "--eval-data", "gone.json"], "data file gone.json does not exist"),
    (["train", "llava", "--tiny", "--images", "folder"], "--images is about records, and none are given; add --data FILE"),
    (["train", "llava", "--tiny", "--on-bad-record", "skip"], "--on-bad-record is about records, and none are given"),
    (
        ["train", "llava", "--tiny", "--stages.words.data.path", "x.json"],
        "stages.words.objective: words needs to know what is true of a picture",
    ),
    (["demo", "--steps", "0"], "--steps 0: expected at least 1"),
    (["demo", "--scenes", "0"], "--scenes 0: expected at least 1"),
]


@pytest.mark.parametrize(("argv", "words"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *argv)
    assert words in err
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("mmfast: ")
    assert list(tmp_path.iterdir()) == [], "nothing may be written before the input is known to be right"


def test_an_existing_folder_is_refused(capsys, tmp_path):
    (tmp_path / "old").write_text("")
    for argv in (["train", "llava", "--tiny"], ["demo"]):
        code, _, err = call(capsys, *argv, "--out", tmp_path)
        assert code == 2
        assert "exists and is not empty" in err
        assert err.count("\n") == 1
        code, _, err = call(capsys, *argv, "--out", tmp_path / "old")
        assert code == 2
        assert "old is a file; choose another --out" in err


def test_config_file_then_option_then_flag(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("encoder: {width: 32}\nstages: {instruct: {optim: {lr: 0.5, batch: 3}}}\n")
    code, out, _ = call(
        capsys, "train", "llava", "--tiny", "--config", tmp_path / "a.yaml", "--stages.instruct.optim.lr=0.25", "--steps", "7", "--dry-run"
    )
    recipe = json.loads(out)
    assert code == 0
    instruct = recipe["stages"][-1]
    assert (recipe["encoder"]["width"], instruct["optim"]["lr"], instruct["optim"]["batch"], instruct["optim"]["steps"]) == (32, 0.25, 3, 7)


def test_list_show_diff_env(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= {"llava", "dpo"}
    assert "| llava |" in call(capsys, "list", "--markdown")[1]
    shown = call(capsys, "show", "llava", "--encoder.width", "80")[1]
    assert ["encoder.width", "=", "80", "#", "was", "1024"] in [line.split() for line in shown.splitlines()]
    assert ["stages.instruct.optim.lr", "=", "2e-05"] in [line.split() for line in shown.splitlines()]
    assert "do not differ" in call(capsys, "diff", "llava", "llava")[1]
    code, out, _ = call(capsys, "env")
    assert code == 0
    assert "torch" in out


def test_a_recipe_of_ones_own(capsys, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from dataclasses import replace\nfrom mmfast.trainers.recipes.architectures.llava import RECIPE as LLAVA\n"
        "RECIPE = replace(LLAVA, name='mine', encoder=replace(LLAVA.encoder, layer=-1))\n"
    )
    code, out, _ = call(capsys, "train", mine, "--tiny", "--dry-run")
    assert code == 0
    assert json.loads(out)["encoder"]["layer"] == -1
    mine.write_text("RECIPE = 3\n")
    assert "must define RECIPE" in call(capsys, "train", mine)[2]
    mine.write_text("1 / 0\n")
    assert "fails: ZeroDivisionError" in call(capsys, "train", mine)[2]


def user_data(folder, faulty=0):
    records = []
    for i in range(6):
        Image.fromarray(np.full((70, 90, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        said = [{"from": "human", "value": "<image>\ndescribe the picture:"}, {"from": "gpt", "value": "we see a red circle top left."}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": said})
    for i in range(faulty):
        (folder / f"{i}.png").write_bytes(b"torn")
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


ONLY_INSTRUCT = "from dataclasses import replace\nfrom mmfast.models import tiny\nfrom mmfast.trainers.recipes.architectures.llava import RECIPE as L\nT = tiny(L)\nRECIPE = replace(T, name='mine', stages=T.stages[-1:])\n"


def test_training_on_own_records(capsys, tmp_path, monkeypatch):
    """A run folder whole; unreadable pictures fail by name, at run time, or are left out when asked."""
    data = user_data(tmp_path, faulty=2)
    (tmp_path / "mine.py").write_text(ONLY_INSTRUCT)
    train = ["train", tmp_path / "mine.py", "--data", data, "--steps", "2", "--quiet", "--stages.instruct.optim.batch", "2"]
    code, _, err = call(capsys, *train, "--out", tmp_path / "a")
    assert code == 1
    assert "2 of 6 records are faulty" in err
    assert "0.png cannot be read" in err
    assert "1.png cannot be read" in err
    assert list((tmp_path / "a").iterdir()) == [], "nothing was trained, and the same command works once the pictures are mended"
    code, out, err = call(capsys, *train, "--out", tmp_path / "b", "--on-bad-record", "skip")
    assert (code, err) == (0, "")
    assert "left out 2 of 6 records" in out
    names = {p.name for p in (tmp_path / "b").iterdir()}
    assert {"recipe.json", "metrics.jsonl", "eval.json", "checkpoints", "samples", "report.html"} <= names
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_mb"} <= set(rows[0])
    evaluated = json.loads((tmp_path / "b" / "eval.json").read_text())
    assert {"chair_s", "recall", "len", "pope_random_f1", "yes_ratio"} <= set(evaluated)
    # Continuing with another recipe or seed is refused, with the same ones there is nothing left to do.
    code, _, err = call(capsys, *train, "--out", tmp_path / "b", "--resume", "--on-bad-record", "skip", "--seed", "1")
    assert code == 2
    assert "begun with another recipe: seed was 0, now 1; give the same options" in err
    # What was trained can be measured again, and gives the same.
    code, out, _ = call(capsys, "eval", tmp_path / "b")
    assert code == 0
    again = json.loads((tmp_path / "b" / "eval.json").read_text())
    assert {k: v for k, v in again.items() if v == v} == {k: v for k, v in evaluated.items() if v == v}


def test_a_closed_pipe_is_no_error():
    """`mmfast show llava | head -1`"""
    code = f"{sys.executable} -m mmfast.trainers show llava | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_checkout_runs_without_an_installation(tmp_path):
    """`python -m trainers` in the checkout is the same command."""
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-m", "trainers", "list"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "llava" in done.stdout
