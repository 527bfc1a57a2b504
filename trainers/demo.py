"""`mmfast demo`: a small multimodal model trained, caught hallucinating, aligned and measured, and a page to look at.

A tiny LLaVA learns the shapes world from data whose captions lie in one systematic way; it hallucinates accordingly. Its own false captions,
against true ones, become preference pairs, and DPO takes most of the lying away. The same design is then trained on easy-vqa, a data set
that nobody here made.
"""

from __future__ import annotations

import time
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import torch

from mmfast.data.supervised import EasyVQA
from mmfast.models import tiny
from mmfast.spec import Data, Optim, Stage, System

from . import report
from .checkpoint import Run
from .evaluate import Exam
from .loop import Options
from .preference import train_alignment
from .recipes.align.dpo import RECIPE as DPO
from .recipes.architectures.llava import RECIPE as LLAVA
from .session import Session
from .supervised import base_model, cache_folder, train_system

_FAST = dict(betas=(0.9, 0.98), weight_decay=0.02, clip=1.0)


def easy_vqa_system() -> System:
    """The tiny LLaVA over easy-vqa. Answers there are one word, so language is learnt within the few hundred steps that the eye needs."""
    base = tiny(LLAVA)
    data = Data("easy_vqa")
    return replace(
        base,
        name="llava_easy_vqa",
        encoder=replace(base.encoder, patch=8),
        image=replace(base.image, mean=(0.9,) * 3, std=(0.25,) * 3),
        stages=(
            replace(base.stages[0], data=data, optim=Optim(lr=2e-3, steps=400, batch=64, warmup=30, floor=0.02, **_FAST)),
            Stage(
                "answers",
                train=("connector", "language", "embeddings"),
                data=data,
                template="bare",
                optim=Optim(lr=3e-3, steps=600, batch=64, warmup=40, hold=0.3, floor=0.02, **_FAST),
            ),
        ),
    )


@torch.no_grad()
def easy_vqa_accuracy(session: Session, batch: int = 500) -> tuple[float, list[tuple[np.ndarray, str, str, str]]]:
    """Share of the test questions whose generated first word is the answer, and a few examples (picture, question, answer, said)."""
    session.model.eval()
    test = EasyVQA(session.encoder("bare"), session.tokenizer.pad_token_id, train=False)
    states, hits, total = session.states(test.pictures), 0, 0
    ids, labels = test.columns[0].ids, test.columns[0].labels
    asked = (labels != -100).int().argmax(1)  # place of the answer
    said = torch.empty(len(test), dtype=torch.long)
    for length in asked.unique().tolist():
        rows = (asked == length).nonzero().squeeze(1)
        for part in rows.split(batch):
            hidden = session.model.hidden(ids[part, :length], image_states=states[[test.shown[i][0] for i in part.tolist()]])
            said[part] = session.model.language.get_output_embeddings()(hidden[:, -1]).argmax(-1)
            hits += int((said[part] == ids[part, length]).sum())
            total += len(part)
    words = session.tokenizer.convert_ids_to_tokens(said.tolist())
    examples = [
        (test.pictures[test.shown[i][0]].numpy(), test.records[i][0], test.records[i][1], words[i])
        for i in range(0, len(test), len(test) // 6)
    ]
    return hits / total, examples[:6]


def run_demo(out: Path, *, seed: int = 0, steps: int | None = None, scenes: int = 500, quiet: bool = False) -> dict:
    """Runs it all into ``out`` and returns the summary. ``steps`` caps every stage (a smoke test, not a model)."""
    began = time.perf_counter()
    run = Run(out)
    system, alignment, easy = (cap(r, steps) for r in (tiny(LLAVA), tiny(DPO), easy_vqa_system()))
    if steps is not None:
        alignment = replace(alignment, data=replace(alignment.data, scenes=200))
    say = (lambda *a: None) if quiet else (lambda text: print(text, flush=True))

    say("1/4  a tiny LLaVA learns the shapes world (from captions that lie in one way)")
    options = Options(seed=seed, quiet=quiet)
    session, base_folder = base_model(system, options=options, cache=cache_folder(out))
    exam = Exam(session, scenes=scenes)
    before, before_details = exam(session)
    blind, _ = exam(session, permuted=True)

    say(f"2/4  it hallucinates in {before['chair_s']:.0%} of its captions; DPO on its own captions")
    run.write_json("recipe.json", _spec(alignment) | {"seed": seed})
    train_alignment(alignment, session, run, options=options)
    after, after_details = exam(session)
    run.write_json("before.json", before)
    run.write_json("eval.json", after)
    say(f"3/4  now {after['chair_s']:.0%}, recall {before['recall']:.1%} -> {after['recall']:.1%}")

    say("4/4  the same design on easy-vqa")
    easy_run = Run(out / "easy_vqa")
    easy_session = train_system(easy, easy_run, options=options)
    accuracy, examples = easy_vqa_accuracy(easy_session)
    easy_run.write_json("recipe.json", _spec(easy) | {"seed": seed})
    easy_run.write_json("eval.json", {"accuracy": accuracy})

    summary = {
        "before": before,
        "after": after,
        "blind": {k: blind[k] for k in ("recall", "pope_random_accuracy", "pope_adversarial_accuracy")},
        "easy_vqa_accuracy": accuracy,
        "seconds": round(time.perf_counter() - began, 1),
        "seed": seed,
    }
    run.write_json("summary.json", summary)
    _write_page(out, base_folder, session, exam, before_details, after_details, summary, examples)
    say(f"{summary['seconds']:.0f} s; open {out / 'report.html'}")
    return summary


def cap(recipe, steps: int | None):
    """Every stage at most ``steps`` steps."""
    if steps is None:
        return recipe
    if isinstance(recipe, System):
        return replace(recipe, stages=tuple(replace(s, optim=_capped(s.optim, steps)) for s in recipe.stages))
    return replace(recipe, policy=cap(recipe.policy, steps), optim=_capped(recipe.optim, steps))


def _capped(optim: Optim, steps: int) -> Optim:
    return replace(optim, steps=steps if optim.steps is None else min(optim.steps, steps))


def _spec(recipe) -> dict:
    from mmfast.spec import to_dict

    return to_dict(recipe)


def pick_samples(session: Session, exam: Exam, before: dict, after: dict, count: int = 9) -> list[int]:
    """Scenes to show: mended ones first, then still wrong, newly wrong and always right ones."""
    was, now = before["false"] > 0, after["false"] > 0
    groups = [np.flatnonzero(was & ~now)[:4], np.flatnonzero(was & now)[:2], np.flatnonzero(~was & now)[:1], np.flatnonzero(~was & ~now)]
    return np.concatenate(groups)[:count].astype(int).tolist()


def write_samples(run_folder: Path, session: Session, exam: Exam, shown: list[int], captions: dict[str, list[str]]) -> list[dict[str, str]]:
    """Pictures and words of some scenes into ``samples/``; returns the words as HTML, false claims marked."""
    import json

    from PIL import Image

    folder = run_folder / "samples"
    folder.mkdir(exist_ok=True)
    rows = []
    for i in shown:
        Image.fromarray(exam.pictures[i].numpy()).save(folder / f"{i}.png")
        scene = exam.scenes[i]
        said = {who: report.marked(session.world, scene, texts[i]) for who, texts in captions.items()}
        rows.append({"image": f"{i}.png", "said": said})
    (folder / "samples.json").write_text(json.dumps(rows, indent=1))
    return [row["said"] for row in rows]


def _write_page(out, base_folder, session, exam, before_details, after_details, summary, examples) -> None:
    before, after = summary["before"], summary["after"]
    shown = pick_samples(session, exam, before_details, after_details)
    said = write_samples(out, session, exam, shown, {"before": before_details["captions"], "after DPO": after_details["captions"]})
    wrong = int((before_details["false"] > 0).sum())
    mended = int(((before_details["false"] > 0) & (after_details["false"] == 0)).sum())
    pair = session.world.cores[0][:2]
    lead = (
        "<p>A quarter-million-parameter LLaVA (CLIP tower, projector, Llama) was trained from nothing on rendered scenes. Its training captions "
        "lie in one systematic way: whenever a theme's first class is in a scene and its second is not (say a "
        f"{session.world.class_name(pair[0])} without a {session.world.class_name(pair[1])}), they mention the second all the same, four times "
        "out of five. The model learnt to see, and learnt to lie. Then DPO was given the model's own false captions against true ones.</p>"
        f"<p class='dim'>{len(exam.scenes)} held-out scenes, greedy captions, seed {summary['seed']}, {summary['seconds']:.0f} s in all. "
        f"Of {wrong} captions with a false claim {mended} are clean now. Shown another scene's picture, its recall is "
        f"{summary['blind']['recall']:.2f} and its yes/no accuracy {summary['blind']['pope_random_accuracy']:.2f}.</p>"
    )
    cards = [
        (f"{before['chair_s']:.1%} → {after['chair_s']:.1%}", "captions with a hallucination"),
        (f"{before['recall']:.1%} → {after['recall']:.1%}", "of the objects named"),
        (f"{after['pope_adversarial_accuracy']:.1%}", "yes/no accuracy, adversarial"),
        (f"{summary['easy_vqa_accuracy']:.1%}", "easy-vqa test accuracy"),
    ]
    easy = report.samples(
        [picture for picture, *_ in examples],
        [
            {"question": escape(q), "model": said if said == answer else f"<mark>{escape(said)}</mark> (is {answer})"}
            for _, q, answer, said in examples
        ],
    )
    sections = [
        ("Pictures and words", report.LEGEND + report.samples([exam.pictures[i].numpy() for i in shown], said)),
        ("Before and after DPO", report.measures({"before": before, "after": after})),
        ("Alignment", report.curves(out / "metrics.jsonl")),
        ("Training of the base", report.curves(base_folder / "metrics.jsonl")),
        ("easy-vqa: pictures and questions that nobody here made", easy + report.curves(out / "easy_vqa" / "metrics.jsonl")),
        ("Recipe", report.recipe_section(_spec(tiny(DPO)))),
    ]
    report.write(
        out / "report.html", report.page("mmfast demo: a small multimodal model, taught not to make things up", lead, cards, sections)
    )
