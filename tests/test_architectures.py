"""bench/trainers/architectures.py: its table of runs names what exists, and its rows and means are right."""

import importlib.util
from pathlib import Path

import pytest
from mmfast.trainers import config, measured
from mmfast.trainers.evaluate import Exam
from mmfast.trainers.session import Session

ROOT = Path(__file__).resolve().parent.parent


def _bench():
    spec = importlib.util.spec_from_file_location("bench_architectures", ROOT / "bench" / "trainers" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = _bench()


@pytest.mark.parametrize("name", bench.RUNS)
def test_every_variant_is_a_recipe_that_holds_together(name):
    assert "" in bench.RUNS[name]
    made = {}
    for variant, options in bench.RUNS[name].items():
        recipe, problems = config.layered(name, tiny=True, rest=options)
        made[variant] = config.resolved(recipe, problems)
    assert all(made[variant] != made[""] for variant in made if variant), "a control that changes nothing"


def row(variant, seed, measure, value, recipe="llava"):
    return dict(recipe=recipe, variant=variant, seed=seed, commit="c", cpu="p", threads="1", seconds="9.0", measure=measure, value=value)


def test_new_rows_take_the_place_of_those_of_the_same_run(tmp_path):
    path = tmp_path / "sub" / "a.csv"
    bench.write([row("", 0, "old", "1"), row("", 1, "recall", "0.5"), row("", 0, "recall", "0.1")], path)
    bench.write([row("", 0, "recall", "0.3"), row("blind", 0, "recall", "0.2"), row("", 10, "recall", "0.7", recipe="b")], path)
    assert [(r["recipe"], r["variant"], r["seed"], r["measure"], r["value"]) for r in bench.read(path)] == [
        ("b", "", "10", "recall", "0.7"), ("llava", "", "0", "recall", "0.3"), ("llava", "", "1", "recall", "0.5"),
        ("llava", "blind", "0", "recall", "0.2"),
    ]  # fmt: skip
    assert [p.name for p in path.parent.iterdir()] == ["a.csv"]
    assert bench.read(tmp_path / "none.csv") == []


def test_table_has_means_and_ranges_over_seeds():
    rows = [row("", s, "few/4", v) for s, v in enumerate(("0.25", "0.5", "0.6"))] + [
        row("blind", 0, "few/4", "0.125"),
        row("", 0, "len", "9"),
    ]
    assert bench.table("llava", rows).splitlines() == [
        "| variant | seeds | few/4 | seconds |", "| --- | --- | --- | --- |", "| as it is | 3 | 0.45 (0.25 .. 0.6) | 9 |",
        "| blind | 1 | 0.125 | 9 |",
    ]  # fmt: skip
    assert "| 9 |" in bench.table("llava", rows, ["len"]).splitlines()[2]
    assert bench.table("flamingo", rows) == "flamingo: nothing measured yet"


def test_effect_in_a_few_words():
    rows = [row("", s, "few/4", v) for s, v in enumerate(("0.25", "0.5", "0.6"))] + [
        row("blind", 0, "few/4", "0.125"),
        row("", 0, "few/0", "1"),
    ]
    assert measured.effect("llava", rows) == "few/4 0.45 (blind 0.125), few/0 1; 3 seeds"
    assert measured.effect("llava", rows[:1]) == "few/4 0.25; 1 seed"
    assert measured.effect("llava", rows[3:4]) == measured.effect("flamingo", rows) == "-"


@pytest.mark.parametrize("blind", [False, True])
def test_a_blind_twin_is_examined_in_the_dark(blind):
    options = ["--stages.answers.data.blind", str(blind).lower()]
    recipe, problems = config.layered("llama_adapter", tiny=True, rest=options)
    session = Session(config.resolved(recipe, problems), seed=0, with_model=False)
    assert session.blind == blind
    assert bool(Exam(session, scenes=5, statistics_scenes=50).pictures.any()) != blind
