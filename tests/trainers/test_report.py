"""The page of a run: what is marked, whole HTML, nothing from outside."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from mmfast.trainers import report
from PIL import Image

from mmfast.data.synthetic import ClassCount as Count
from mmfast.data.synthetic import Object, Scene, World

# A red circle top left and two blue stars, which this world (six shapes) does not know; so a square.
SCENE = Scene(
    0, 0, "eval", 0,
    (Object(0, 0, 0, 0, 8.0, 8.0, 5.0), Object(2, 1, 1, 3, 56.0, 24.0, 5.0), Object(2, 1, 3, 3, 56.0, 56.0, 5.0)),
    (Count(0, 0, 1), Count(2, 1, 2)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("we see a red circle top left.", "we see a red circle top left."),
        ("we see a red disc top left and a green ring top right.", "we see a red disc top left and a <mark>green ring</mark> top right."),
        ("a blue circle top left", "a <mark>blue circle</mark> top left"),
        ("a circle, a star", "a circle, a <mark>star</mark>"),
        ("two red circles top left", "<u>two red circles</u> top left"),
        ("a red circle middle centre", "a red circle <u>middle centre</u>"),
        ("a red circle top left, a red square, a red circle", "a red circle top left, a <mark>red square</mark>, a red circle"),
        ("<b>a red square & more", "&lt;b&gt;a <mark>red square</mark> &amp; more"),
        ("", ""),
    ],
)
def test_false_claims_are_marked(text, want):
    assert report.marked(World(), SCENE, text) == want


class Page(HTMLParser):
    VOID = {"meta", "img", "br", "line", "polyline", "link", "hr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources = [], [], []
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def run_folder(folder, samples=3, steps=60):
    """What a finished preference run leaves, made up."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps({"kind": "Alignment", "name": "made <up>", "paper": "arXiv:0000.00000", "beta": 0.1}))
    rows = []
    for step in range(1, steps + 1):
        stage = "first" if step <= steps // 2 else "second"
        row = {"step": step, "stage": stage, "loss": 3.0 / step, "lr": 1e-3, "rewards/margins": step / steps}
        rows.append(row | ({"loss": None} if step == 7 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "before.json").write_text(json.dumps({"chair_s": 0.26, "recall": 0.95, "len": 21.0, "pope_random_f1": None}))
    (folder / "eval.json").write_text(json.dumps({"chair_s": 0.13, "recall": 0.94, "len": 20.0}))
    (folder / "samples").mkdir(exist_ok=True)
    shown = []
    for i in range(samples):
        picture = np.full((64, 64, 3), 230, np.uint8)
        picture[16:48, 16:48] = (220, 40, 40)
        Image.fromarray(picture).save(folder / "samples" / f"{i}.png")
        shown.append(
            {"image": f"{i}.png", "said": {"before": "a <mark>green ring</mark> top left", "after": "a red square " * (1 + 8 * i)}}
        )
    (folder / "samples" / "samples.json").write_text(json.dumps(shown))
    return folder


def test_a_runs_page_is_whole_and_self_contained(tmp_path):
    text = report.run_page(run_folder(tmp_path / "run"))
    page = Page(text)
    assert page.tags.count("img") == 3
    assert page.tags.count("polyline") == 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text
    assert "url(" not in text
    assert "<script" not in text
    assert "made &lt;up&gt;" in text
    assert "made <up>" not in text
    assert ">-0.130<" in text, "the change of CHAIR_s"
    assert "nan" not in text.lower().replace("nano", "")


def test_a_run_without_evaluation_or_samples_still_has_a_page(tmp_path):
    folder = run_folder(tmp_path / "run")
    for name in ("before.json", "eval.json", "samples/samples.json"):
        (folder / name).unlink()
    assert Page(report.run_page(folder)).tags.count("polyline") == 2
    (folder / "metrics.jsonl").unlink()
    assert Page(report.run_page(folder)).tags.count("polyline") == 0


def test_a_run_in_progress_has_a_page(tmp_path):
    folder = run_folder(tmp_path / "run", steps=30)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "stage": "se')
    (folder / "samples" / "steps.jsonl").write_text('{"step": 1, "said": "a & b", "images": ["0.png", "gone.png"]}\n{"step": 2, "sa')
    page = Page(report.run_page(folder))
    assert page.tags.count("polyline") == 2
    assert page.tags.count("img") == 4


def test_samples_of_the_training_are_shown_with_all_their_pictures(tmp_path):
    folder = run_folder(tmp_path / "run", samples=2)
    rows = [{"step": s, "asked": "<image><image>\nwhich <b>?", "said": f"say {s} <i>", "images": ["0.png", "1.png"]} for s in range(1, 8)]
    rows += [{"step": 4, "asked": "words alone", "said": "fine", "images": []}, rows[6] | {"said": "again"}]
    (folder / "samples" / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.during(folder)
    page = Page(text)
    assert page.tags.count("img") == 2
    assert "which &lt;b&gt;?" in text
    assert "say 1 &lt;i&gt;" in text
    assert "say 4 &lt;i&gt;" in text
    assert "say 7" not in text, "a resumed run said it again"
    assert "again" in text
    assert text.count("say ") == 2
    assert "words alone" in text
    assert report.during(tmp_path) == ""


def test_measures_of_any_name_are_shown():
    text = report.measures(
        {"before": {"loss": 2.5, "my<score": 0.25, "answers": 1200}, "after": {"loss": 2.0, "my<score": 0.5, "note": "x"}}
    )
    page = Page(text)
    assert ">2.500<" in text
    assert 'class="n good">-0.500<' in text, "a smaller loss is better"
    assert "my&lt;score" in text
    assert ">+0.250<" in text
    assert ">1,200<" in text
    assert "note" not in text
    assert page.tags.count("details") == 1
    assert "details" not in report.measures({"measured": {"my": 0.1}}), "nothing to hide them behind"
    assert report.measures({"measured": {}}) == ""


def test_a_curve_keeps_the_ends_of_its_values():
    points = [(float(x), x / 10) for x in range(1000)]
    svg = report.curve(points, "a < b")
    line = svg.split('points="')[1].split('"')[0].split()
    assert 100 <= len(line) <= 400
    assert 'aria-label="a &lt; b"' in svg
    flat = report.curve([(1, 2.0), (2, 2.0)], "flat")
    assert "nan" not in flat
