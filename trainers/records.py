"""Measuring a model on a user's records: each measure where the records call for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast.data import regions
from mmfast.data.chat import TEMPLATES
from mmfast.data.sources import Question
from mmfast.eval import grounding, vqa
from mmfast.models.generate import until
from mmfast.models.matching import rank
from mmfast.models.tokenizer import plain_text, tagged_text
from mmfast.spec import Alignment, Data, Retrieval, System

from .captions import recall, scores
from .checkpoint import RunError
from .evaluate import alike, looking, measure_answers
from .queries import Texts
from .runs import system_of, template_of

# How many of the most similar are matched anew (LAVIS's evaluation of BLIP-2).
RERANKED = 128
# Pictures whose states are there at a time.
SHOWN = 250


def source_of(session: Any, recipe: System | Alignment, data: Data, *, open_questions: bool = False) -> Any:
    """The records as the model's last training read its own, and with ``open_questions`` those that ask and do not answer.

    Raises:
        RunError: records of which nothing can be measured.
    """
    last = recipe if isinstance(recipe, Alignment) else recipe.stages[-1]
    source = session.source(data, template_of(recipe), last.max_length, compared=compares(recipe), open_questions=open_questions)
    if compares(recipe) and len(source.captions()) < 2:
        raise RunError(f"{data.path}: pictures are compared with captions, and there are not two records of one picture and one caption")
    return source


def compares(recipe: System | Alignment) -> bool:
    """Whether the last stage is a Q-Former's beside texts, with no language model to answer."""
    return isinstance(recipe, System) and recipe.stages[-1].objective == "queries"


def measure(
    session: Any, recipe: System | Alignment, data: Data, *, decoding: dict[str, Any] | None = None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """``measure_answers``; ``retrieved``, for a system that finds pictures; and with ``decoding``, the options of ``generated``, ``answered``.
    Returns the measures, and what was said to each question.
    """
    source = source_of(session, recipe, data, open_questions=decoding is not None)
    finds = compares(recipe) or isinstance(system_of(recipe).fusion, Retrieval)
    measured, said = {}, []
    if not compares(recipe) and (told := measure_answers(session, source))["answers"]:
        measured |= told
    if finds:
        measured |= retrieved(session, source)
    if decoding is not None:
        told, said = answered(session, source, **decoding)
        measured |= told
    return measured, said


# -------------------------------------------------------------------------------------------------- pictures and captions


@torch.no_grad()
def retrieved(session: Any, source: Any) -> dict[str, float]:
    """Recall among all records of one picture and one text (FROMAGe, arXiv:2301.13823; BLIP-2, arXiv:2301.12597, section 4.4).

    ``image_retrieval``: the text's picture is among the best k; ``text_retrieval``: one of the picture's texts is. By [RET] in FROMAGe's space,
    or by a Q-Former's contrast and, ``reranked``, the best ``RERANKED`` anew by its matching. Nothing where there are not two such records.
    """
    items, model = source.captions(), session.model.eval()
    if len(items) < 2:
        return {}
    with looking(session, source) as states:
        source.with_pictures = False
        batch = (source if isinstance(session.system.fusion, Retrieval) else Texts(source)).batch(torch.tensor(items))
        shown = batch["keys"] if "keys" in batch else batch["picture_ids"][batch["image_rows"]]
    pictures, device = shown.unique(), session.place.device

    def seen() -> Iterator[Tensor]:  # thousands of pictures' states would not fit beside the model
        for ids in pictures.split(SHOWN):
            yield session.states(source.load_pictures(ids)) if states is None else states[ids.to(states.device)].to(device)

    own = (shown[:, None] == pictures).to(device)
    if isinstance(session.system.fusion, Retrieval):
        pooled = torch.cat([model.connector.pooled(some)[:, None] for some in seen()])
        cosines = scores(session, [source.encoded(i, "answer")[0][session.system.image_places :] for i in items], pooled)
        ranked = {"": (cosines.T, cosines)}
    else:
        ids, mask = batch["ids"].to(device), batch["mask"].to(device)
        ranked = {name: rank(model.connector, seen, ids, mask, top=top) for name, top in (("", 0), ("reranked_", RERANKED))}
    measured = {}
    for name, (of_pictures, of_texts) in ranked.items():
        measured |= recall(of_texts, f"{name}image_retrieval", own=own) | recall(of_pictures, f"{name}text_retrieval", own=own.T)
    return measured


# ------------------------------------------------------------------------------------------------------ generated answers


@torch.no_grad()
def generated(
    session: Any, source: Any, questions: Sequence[Question], *, max_new_tokens: int = 64, beams: int = 1, batch: int = 64, **options: Any
) -> list[list[int]]:
    """Token ids of a decoded answer to each question, up to its end; ``options`` as for ``mmfast.models.generate.generate``."""
    from .supervised import see

    model, end, context = session.model.eval(), source.encoder.end_token, session.model.system.language.context
    said: list[list[int]] = [[] for _ in questions]
    for question in questions:
        if len(question.ids) >= context:
            raise RunError(f"record {question.record.id}: its question takes {len(question.ids)} of {context} places, so no answer fits")
    with looking(session, source) as states:
        for numbers, ids in alike([question.ids for question in questions], max(batch // beams, 1)):
            shown = session.place.to(source.show([picture for i in numbers for picture in questions[i].shown]))
            most = min(max_new_tokens, context - ids.shape[1])
            ids = ids.to(session.place.device)
            seen = see(session, shown | session.beside(ids), states)
            rows = model.generate(ids, end=end, stops=model.stops, max_new_tokens=most, beams=beams, **options, **seen)
            for i, row in zip(numbers, rows.tolist(), strict=True):
                said[i] = row[: row.index(end)] if end in row else row
    return said


def answered(session: Any, source: Any, **decoding: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What is said to every question of the records, decoded, and how right it is.

    ``vqa_accuracy``: of questions that are answered in words, by VQAv2's rule (``mmfast.eval.vqa``). ``choice_accuracy``: of questions with
    choices (ScienceQA), whether the letter of "The answer is A" is that of the right one, whatever is said before it. ``grounding_..``: of those whose answer
    has one place (``mmfast.eval.grounding``; its box in the picture's file, a hit above an IoU of one half, a miss where the answer cannot be
    read). Captions, which nothing asks for but the picture, answers of several places and those with pictures, and questions without an answer are
    decoded, as text, and not scored.
    """
    questions = list(source.questions(range(len(source))))
    if not questions:
        raise RunError(f"{source.parts[0].name}: holds documents alone, which ask nothing, so no answer can be generated")
    asks = TEMPLATES[source.encoder.template].keep_question
    rows, boxes, targets = [], [], []
    for question, ids in zip(questions, generated(session, source, questions, **decoding), strict=True):
        placed, drawn = bool(question.boxes), "<image>" in question.answer
        text = until((tagged_text if placed else plain_text)(session.tokenizer, ids), source.encoder.stop).strip()
        row = {"id": question.record.id, "question": question.text, "answers": list(question.answers), "said": text}
        if asks and question.record.letter:
            row["choice_accuracy"] = float(vqa.letter(text) == question.record.letter)
        elif asks and question.text and question.answers and not placed and not drawn:
            row["vqa_accuracy"] = vqa.accuracy(text, question.answers)
        elif asks and question.text and len(question.boxes) == 1:
            box, target = _place(source.encoder, question, text), question.boxes[0]
            row |= {"boxes": target, "box": box, "iou": grounding.score([box], [target])["grounding_mean_iou"]}
            boxes.append(box)
            targets.append(target)
        rows.append(row)
    measured = {}
    for kind in ("vqa", "choice"):
        if right := [row[f"{kind}_accuracy"] for row in rows if f"{kind}_accuracy" in row]:
            measured |= {f"{kind}_accuracy": sum(right) / len(right), f"{kind}_questions": len(right)}
    return measured | ({**grounding.score(boxes, targets), "grounding_questions": len(boxes)} if boxes else {}), rows


def _place(encoder: Any, question: Question, text: str) -> regions.Coords | None:
    """The box that an answer tells, in the picture's file: its only one, or where several are right, its first (R@1, any box)."""
    placement = encoder.placement(question.record)
    found = encoder.regions.parse(text, placement.size)
    if len(question.boxes[0]) > 1:
        found = [regions.Region(region.boxes[:1]) for region in found[:1]]
    box = regions.sole(found)
    return None if box is None else placement.back(box)
