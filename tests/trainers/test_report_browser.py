"""The report seen by a real browser: drawn, inside its width on a laptop and a phone, light and dark."""

import json
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
from mmfast.trainers import report
from PIL import Image

from .test_report import run_folder

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on PATH (Debian: apt-get install chromium)")

# The page in a frame of the device's width, which a window cannot be narrowed to; what it measures is left in the title.
HARNESS = """<!doctype html><title>waiting</title><style>html,body{margin:0}iframe{border:0;display:block}</style>
<iframe id="f" width="WIDTH" height="2400" src="report.html"></iframe><script>
document.getElementById("f").onload = event => {
  const page = event.target.contentDocument, root = page.documentElement, boxes = list => list.map(e => e.getBoundingClientRect())
  const all = name => [...page.querySelectorAll(name)]
  document.title = JSON.stringify({
    width: root.clientWidth, scroll: root.scrollWidth, height: root.scrollHeight,
    pictures: all("img").map(i => i.naturalWidth), curves: boxes(all("polyline")).map(b => [b.width, b.height]),
    beyond: all("main *").filter(e => e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".scroll,pre")).map(e => e.outerHTML.slice(0, 80)),
    font: getComputedStyle(page.body).fontSize,
  })
}</script>"""


def browse(folder, width, *extra):
    (folder / "harness.html").write_text(HARNESS.replace("WIDTH", str(width)))
    shot = folder / "shot.png"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},2400", "--virtual-time-budget=5000", *extra,
    ]  # fmt: skip
    url = (folder / "harness.html").as_uri()
    dom = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120).stdout
    subprocess.run([*command, f"--screenshot={shot}", url], capture_output=True, timeout=120, check=True)
    title = unescape(dom.split("<title>")[1].split("</title>")[0])
    return json.loads(title), np.asarray(Image.open(shot).convert("RGB"))[:, :width].astype(int)


def near(pixels, colour, by=12):
    return int((np.abs(pixels - np.array(colour)).max(-1) <= by).sum())


@pytest.fixture
def page(tmp_path):
    folder = run_folder(tmp_path / "run")
    report.write(folder / "report.html", report.run_page(folder))
    return folder


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_drawn_and_nothing_sticks_out(page, width):
    seen, pixels = browse(page, width)
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["beyond"] == []
    assert seen["pictures"] == [64, 64, 64]
    assert len(seen["curves"]) == 2
    assert all(w > 200 and h > 80 for w, h in seen["curves"])
    assert near(pixels[:, :1], (251, 251, 249)) > 2000, "the light background reaches the edge"
    assert near(pixels, (220, 40, 40)) >= 3 * 40 * 40, "three pictures of a red square"
    assert near(pixels, (47, 111, 223)) > 300, "curves in their colour"
    assert near(pixels, (28, 31, 35), 40) > 1500, "text"


def test_dark(page):
    _, pixels = browse(page, 390, "--blink-settings=preferredColorScheme=0")
    assert near(pixels[:, :1], (21, 23, 26)) > 2000
    assert near(pixels, (122, 167, 255)) > 300, "curves in their dark colour"
    assert near(pixels, (232, 233, 235), 40) > 1500, "text"


def test_a_page_that_is_too_wide_is_noticed(page):
    """The check can fail."""
    text = (page / "report.html").read_text()
    (page / "report.html").write_text(text.replace("<h2>", '<div style="width:900px">wide</div><h2>', 1))
    seen, _ = browse(page, 390)
    assert seen["scroll"] > 390
    assert any("900px" in element for element in seen["beyond"])
