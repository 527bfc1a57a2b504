"""``report.html``: one self-contained page of a run, with curves, measures before and after, and pictures with the model's words."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.data.synthetic import Scene, World, parse

from .checkpoint import write_atomically

# What the measures table shows: key, title, whether more is better, what it says.
MEASURES = (
    ("chair_s", "CHAIR-s", False, "captions that name something which is not there"),
    ("chair_i", "CHAIR-i", False, "mentions of something which is not there"),
    ("recall", "Recall", True, "things in the picture that the caption names"),
    ("len", "Length", None, "words a caption"),
    ("pope_random_accuracy", "POPE random", True, "yes/no accuracy, negatives at random"),
    ("pope_popular_accuracy", "POPE popular", True, "negatives that are frequent in training"),
    ("pope_adversarial_accuracy", "POPE adversarial", True, "negatives that usually stand beside what is there"),
    ("pope_adversarial_f1", "POPE adversarial F1", True, ""),
    ("yes_ratio_adversarial", "Yes ratio, adversarial", None, "0.5 is balanced"),
    ("loss", "Loss", False, "nats a token of the answers"),
    ("answer_accuracy", "Right answers", True, "answers that greedy decoding gives word for word"),
    ("vqa_accuracy", "VQA accuracy", True, "decoded answers against what humans said"),
    ("choice_accuracy", "Right choices", True, "decoded answers that name the right one of the question's choices"),
    ("grounding_accuracy", "Grounding", True, "decoded boxes that overlap the right one by more than half"),
)
CURVES = (
    ("loss", "Loss"),
    ("rewards/margins", "Reward margin (nats x beta)"),
    ("rewards/accuracies", "Pairs told apart"),
    ("len", "Words a caption"),
    ("logps/chosen", "log p of the better answer"),
    ("logps/rejected", "log p of the worse answer"),
)

STYLE = """
:root{--bg:#fbfbf9;--fg:#1c1f23;--dim:#646a73;--line:#dcdde0;--card:#fff;--a:#2f6fdf;--b:#d9622b;--good:#1d7f4e;--bad:#c0392b;--mark:#ffd9d2}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--fg:#e8e9eb;--dim:#9aa1ab;--line:#33373d;--card:#1d2025;--a:#7aa7ff;--b:#ff9d6b;
--good:#5fcf97;--bad:#ff8a7a;--mark:#5a2a24}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}h1{font-size:28px;margin:0 0 4px}h2{font-size:20px;margin:40px 0 12px}
p{max-width:72ch}.dim{color:var(--dim)}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;margin:0;min-width:0}
.card b{display:block;font-size:24px;font-variant-numeric:tabular-nums}.card span{color:var(--dim);font-size:14px}
.curves,.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:12px}
figure svg{width:100%;height:auto;display:block}figcaption{font-size:14px;color:var(--dim)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top}td.n,th.n{text-align:right;white-space:nowrap}
.good{color:var(--good)}.bad{color:var(--bad)}.sample{display:grid;grid-template-columns:96px 1fr;gap:12px;font-size:14px}
.sample img{width:96px;height:96px;image-rendering:pixelated;border-radius:6px}mark{background:var(--mark);color:inherit;border-radius:3px;padding:0 2px}
u{text-decoration:underline dotted var(--dim);text-underline-offset:3px}.sample p{margin:0 0 6px}.who{color:var(--dim);font-size:12px;text-transform:uppercase;letter-spacing:.04em}
pre{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px;overflow-x:auto;font-size:13px}
"""


def png(pixels: np.ndarray) -> str:
    """A data URI of uint8 ``[H, W, 3]``."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(points: Sequence[tuple[float, float]], title: str, breaks: Sequence[tuple[float, str]] = ()) -> str:
    """A line chart as inline SVG: at most 300 points, axes labelled at their ends, stage borders dashed."""
    width, height, left, right, top, bottom = 340, 190, 46, 10, 14, 26
    step = max(1, len(points) // 300)
    smooth = [
        (points[min(i + step - 1, len(points) - 1)][0], sum(y for _, y in points[i : i + step]) / len(points[i : i + step]))
        for i in range(0, len(points), step)
    ]
    xs, ys = [x for x, _ in smooth], [y for _, y in smooth]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1e-9), min(ys), max(ys)
    if y1 - y0 < 1e-12:
        y0, y1 = y0 - 0.5, y1 + 0.5

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in smooth))
    marks = "".join(
        f'<line x1="{at(x, y0)[0]:.1f}" x2="{at(x, y0)[0]:.1f}" y1="{top}" y2="{height - bottom}" stroke="var(--line)" stroke-dasharray="3 3"/>'
        f'<text x="{at(x, y0)[0] + 3:.1f}" y="{top + 9 + 11 * (i % 2)}" font-size="10" fill="var(--dim)">{html.escape(name)}</text>'
        for i, (x, name) in enumerate(breaks)  # on two lines in turn: a short stage's name would run into the next
        if x0 <= x < x1
    )
    return (
        f'<figure class="curve"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{marks}'
        f'<line x1="{left}" x2="{left}" y1="{top}" y2="{height - bottom}" stroke="var(--line)"/>'
        f'<line x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}" stroke="var(--line)"/>'
        f'<polyline fill="none" stroke="var(--a)" stroke-width="1.8" stroke-linejoin="round" points="{line}"/>'
        f'<g font-size="11" fill="var(--dim)"><text x="{left - 4}" y="{top + 8}" text-anchor="end">{y1:.3g}</text>'
        f'<text x="{left - 4}" y="{height - bottom}" text-anchor="end">{y0:.3g}</text>'
        f'<text x="{left}" y="{height - 8}">{x0:.0f}</text>'
        f'<text x="{width - right}" y="{height - 8}" text-anchor="end">step {x1:.0f}</text></g></svg>'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file to which a run may be writing just now: a line that is not whole yet is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


def curves(metrics: Path, title: str = "") -> str:
    """All known curves of a ``metrics.jsonl``."""
    rows = _lines(metrics)
    breaks, seen = [], set()
    for row in rows:
        if row["stage"] not in seen:
            seen.add(row["stage"])
            breaks.append((row["step"], row["stage"]))
    found = []
    for key, name in CURVES:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if len(points) > 1:
            found.append(curve(points, f"{title}{name}", breaks if len(breaks) > 1 else ()))
    return f'<div class="curves">{"".join(found)}</div>' if found else ""


def measures(columns: dict[str, dict[str, float]]) -> str:
    """The measures of one or more evaluations; with two, the change, coloured by whether it is for the better. What has no title here stands
    below the others under its own name."""
    known = {key for key, *_ in MEASURES}
    other = dict.fromkeys(k for c in columns.values() for k, v in c.items() if k not in known and isinstance(v, int | float))
    shown = _table(columns, MEASURES)
    rest = _table(columns, [(key, html.escape(key), None, "") for key in other])
    return shown + (f"<details><summary>All measures</summary>{rest}</details>" if shown and rest else rest)


def _table(columns: dict[str, dict[str, float]], lines: Sequence[tuple[str, str, bool | None, str]]) -> str:
    names = list(columns)
    head = "".join(f'<th class="n">{html.escape(n)}</th>' for n in names) + ('<th class="n">change</th>' if len(names) == 2 else "")
    rows = []
    for key, title, up, meaning in lines:
        values = [columns[n].get(key) for n in names]
        if all(v is None for v in values):
            continue
        cells = "".join(
            f'<td class="n">{"-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.3f}" if key != "len" else f"{v:.1f}"}</td>'
            for v in values
        )
        if len(names) == 2 and None not in values:
            change = values[1] - values[0]
            better = "" if up is None or abs(change) < 5e-4 else "good" if (change > 0) == up else "bad"
            cells += f'<td class="n {better}">{change:+.3f}</td>'
        rows.append(f'<tr><td>{title}<br><span class="dim">{meaning}</span></td>{cells}</tr>')
    if not rows:
        return ""
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def marked(world: World, scene: Scene, text: str) -> str:
    """The text as HTML: what is not in the picture marked, a wrong count or place underlined."""
    words = list(re.finditer(r"[^\W_]+", text.lower()))
    shapes = [i for i, word in enumerate(words) if parse(word.group())]  # `parse` makes one mention of each, in order
    spans = []
    for i, mention in zip(shapes, parse(text), strict=True):
        error = world.claim_error(scene, mention)
        first = i - (mention.colour is not None)
        if error in ("object", "colour"):
            spans.append(("mark", words[first].start(), words[i].end()))
        elif error == "count":
            spans.append(("u", words[first - 1].start(), words[i].end()))
        elif error == "position":
            spans.append(("u", words[i + 1].start(), words[i + 2].end()))
    out, at = "", 0
    for tag, start, end in spans:
        out += f"{html.escape(text[at:start])}<{tag}>{html.escape(text[start:end])}</{tag}>"
        at = end
    return out + html.escape(text[at:])


LEGEND = '<p class="dim"><mark>Marked</mark>: not in the picture. <u>Underlined</u>: there, but not so many or not at that place.</p>'


def samples(pictures: Sequence[np.ndarray | Sequence[np.ndarray]], rows: Sequence[dict[str, str]]) -> str:
    """Pictures, one or several at a time, with what was said about them; the values are HTML."""
    cells = []
    for picture, row in zip(pictures, rows, strict=True):
        said = "".join(f'<p><span class="who">{html.escape(who)}</span><br>{text}</p>' for who, text in row.items())
        seen = [picture] if isinstance(picture, np.ndarray) else picture
        shown = "".join(f'<img src="{png(one)}" alt="scene">' for one in seen)
        cells.append(f'<div class="card sample"><div>{shown}</div><div>{said}</div></div>')
    return f'<div class="samples">{"".join(cells)}</div>'


def during(folder: Path) -> str:
    """The samples that a run took while it trained (``samples/steps.jsonl``): each question with its pictures, and what was said to it at the
    first step, half way and last. What a resumed run said a second time counts."""
    from PIL import Image

    said: dict[tuple, dict[int, str]] = {}
    for row in _lines(folder / "samples" / "steps.jsonl"):
        said.setdefault((row.get("asked", ""), *row.get("images", ())), {})[row["step"]] = row["said"]
    pictures, rows = [], []
    for (asked, *names), by_step in said.items():
        steps = sorted(by_step)
        files = [folder / "samples" / Path(name).name for name in names]
        pictures.append([np.asarray(Image.open(file).convert("RGB")) for file in files if file.exists()])
        told = {f"step {step}": html.escape(by_step[step]) for step in dict.fromkeys((steps[0], steps[len(steps) // 2], steps[-1]))}
        rows.append(({"asked": html.escape(asked.replace("<image>", "").strip())} if asked else {}) | told)
    return samples(pictures, rows) if rows else ""


def page(title: str, lead: str, cards: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str]]) -> str:
    """The whole page; lead and sections are HTML."""
    boxes = "".join(f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>' for value, name in cards)
    body = "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main><h1>{html.escape(title)}</h1>{lead}"
        f'<div class="cards">{boxes}</div>{body}</main></body></html>\n'
    )


def recipe_section(recipe: Any) -> str:
    return f"<details><summary>The resolved recipe</summary><pre>{html.escape(json.dumps(recipe, indent=1))}</pre></details>"


def run_page(folder: Path) -> str:
    """The page of any run folder, from its files alone."""
    recipe = json.loads((folder / "recipe.json").read_text())
    evaluations = {}
    for name in ("before", "eval"):
        if (folder / f"{name}.json").exists():
            evaluations["after" if name == "eval" and evaluations else name if name == "before" else "measured"] = json.loads(
                (folder / f"{name}.json").read_text()
            )
    shown = ""
    if (folder / "samples" / "samples.json").exists():
        from PIL import Image

        rows = json.loads((folder / "samples" / "samples.json").read_text())
        shown = samples([np.asarray(Image.open(folder / "samples" / r["image"])) for r in rows], [r["said"] for r in rows])
    final = evaluations.get("after") or evaluations.get("measured") or {}
    cards = [(f"{final[k]:.3f}", title) for k, title, _, _ in MEASURES if final.get(k) is not None][:4]
    return page(
        recipe["name"],
        f'<p class="dim">{html.escape(recipe.get("paper", ""))}</p>',
        cards,
        [
            ("Measures", measures(evaluations) if evaluations else ""),
            ("Pictures and words", LEGEND + shown if shown else ""),
            ("Curves", curves(folder / "metrics.jsonl")),
            ("While it trained", during(folder)),
            ("Recipe", recipe_section(recipe)),
        ],
    )


def write(path: Path, text: str) -> Path:
    write_atomically(path, text.encode())
    return path
