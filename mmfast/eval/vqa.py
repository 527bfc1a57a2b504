"""Answers in words against what humans said: VQA accuracy (arXiv:1505.00468, section 3) with the normalisation of VQAv2's released evaluation."""

import re
from collections.abc import Sequence

# Words whose apostrophe may be missing; each is found by its spellings that lack one of them. "couldntve", which lacks both, stays as it is.
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't
it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _APOSTROPHES.split() for i, mark in enumerate(word) if mark == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the released table has this one the other way round
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def normalised(answer: str) -> str:
    """An answer as VQAv2's evaluation compares it.

    Punctuation (not the apostrophe, the colon, the full stop) goes where it has a blank beside it, and becomes a blank inside a word; in an
    answer with a comma between two digits all of it goes. A full stop stays before a digit alone. Then lower case, number words up to ten as
    digits, no articles, apostrophes where they were left out.
    """
    answer = re.sub(r"[\n\t]", " ", answer).strip()
    thousands, text = re.search(r"\d,\d", answer), answer
    for mark in PUNCTUATION:
        text = text.replace(mark, "" if thousands or f"{mark} " in answer or f" {mark}" in answer else " ")
    words = (NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def letter(said: str) -> str | None:
    """The one letter of which a text says "The answer is A", as LLaVA's evaluation of ScienceQA reads it, or "The answer is (A)"; None of a text that says
    none, or several."""
    found = set(re.findall(r"The answer is \(?([A-Z])\b", said))
    return found.pop() if len(found) == 1 else None


def accuracy(said: str, answers: Sequence[str]) -> float:
    """How right an answer is, 0 .. 1, all compared as ``normalised``.

    Against several humans' answers: ``min(1, n / 3)``, n those that say the same, averaged over all choices of all but one of them. It is meant
    for ten; of fewer than four no answer can agree with three. Against a single answer: whether it is the same. (The released code normalises
    neither side where all humans wrote the same; here both always are.)
    """
    if not answers:
        raise ValueError("vqa.accuracy: expected at least one answer to compare with")
    same = sum(normalised(answer) == normalised(said) for answer in answers)
    if len(answers) == 1:
        return float(same)
    others = len(answers) - same  # leaving one of these out leaves all that are the same
    return (same * min(1, (same - 1) / 3) + others * min(1, same / 3)) / len(answers)
