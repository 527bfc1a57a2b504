"""Visual Storytelling (VIST, arXiv:1604.03968): stories of five pictures, whose last is to be found (FROMAGe, arXiv:2301.13823, section 4).

The file is one of the data set's ``sis/*.story-in-sequence.json``: ``{"images": [..], "annotations": [[{..}], ..]}``, of which every sentence is
a list of one object with ``story_id``, ``photo_flickr_id``, ``worker_arranged_photo_order`` (0 .. 4), ``text`` (tokenised) and
``original_text``. So it is read by the data set's users, FROMAGe's released evaluation among them.
"""

from dataclasses import dataclass
from typing import Any

SENTENCES = 5
# What is told of a story before its last picture is asked for: how many of its last captions, and how many of its first pictures.
CONTEXTS = {"1_caption": (1, 0), "5_captions": (5, 0), "5_captions_4_images": (5, 4)}


@dataclass(frozen=True)
class Story:
    id: str
    captions: tuple[str, ...]
    pictures: tuple[int, ...]  # Flickr's ids, in the story's order


def is_vist(raw: Any) -> bool:
    """Whether a JSON file's content is stories in sequence: COCO's captions, which have the same names, are no lists of one."""
    notes = raw.get("annotations") if isinstance(raw, dict) else None
    return isinstance(notes, list) and bool(notes) and isinstance(notes[0], list) and "images" in raw


def stories(raw: dict[str, Any], name: str = "stories") -> list[Story]:
    """All stories, in the order in which they begin in the file; captions are ``text``, or ``original_text`` where there is none.

    Raises:
        ValueError: a sentence that lacks something, or a story that is not five in a row.
    """
    found: dict[str, dict[int, tuple[str, int]]] = {}
    for number, note in enumerate(raw["annotations"]):
        sentence = note[0] if isinstance(note, list) and len(note) == 1 else None
        if not isinstance(sentence, dict):
            raise ValueError(f"{name}: annotation {number}: expected a list of one object, as stories in sequence have it")
        text = sentence.get("text") or sentence.get("original_text")
        try:
            story, place = str(sentence["story_id"]), int(sentence["worker_arranged_photo_order"])
            picture = int(sentence["photo_flickr_id"])
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else f"has a wrong number ({error})"
            raise ValueError(f"{name}: annotation {number} {what}") from None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}: annotation {number} (story {story}) has no text")
        if place in found.setdefault(story, {}):
            raise ValueError(f"{name}: story {story} has two sentences of place {place}")
        found[story][place] = text, picture
    for story, sentences in found.items():
        if sorted(sentences) != list(range(SENTENCES)):
            raise ValueError(f"{name}: story {story} has the places {sorted(sentences)}, expected 0 to {SENTENCES - 1}")
    rows = ((story, [sentences[i] for i in range(SENTENCES)]) for story, sentences in found.items())
    return [Story(story, tuple(t for t, _ in row), tuple(p for _, p in row)) for story, row in rows]


def prompt(story: Story, context: str, token: str) -> tuple[list[str | None], list[int]]:
    """Texts and pictures (None) as ``mmfast.data.chat.encode_parts`` takes them, and the pictures shown: each picture behind its caption, and
    the retrieval ``token`` at once behind the last one, whose picture is asked for."""
    captions, pictures = CONTEXTS[context]
    parts: list[str | None] = []
    for place in range(SENTENCES - captions, SENTENCES):
        last = place == SENTENCES - 1
        parts += [story.captions[place] + token] if last else [story.captions[place]] + [None] * (place < pictures)
    return parts, list(story.pictures[:pictures])
