"""A word-level tokenizer for tiny models: nothing to download, every word one id."""

from __future__ import annotations

import re
from collections.abc import Sequence


def word_tokenizer(words: Sequence[str], added: Sequence[str] = ()):
    """A transformers tokenizer over these words, whose ids are their places; the first five are <pad> <bos> <eos> <unk> <image>. ``added``
    tokens come behind them, and are found wherever they stand in a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
    if tuple(words[:5]) != specials:
        raise ValueError(f"word_tokenizer: the vocabulary must start with {' '.join(specials)}")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*words, *added))}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        additional_special_tokens=["<image>", *added],
    )  # fmt: skip


def tagged_text(tokenizer, ids: Sequence[int]) -> str:
    """Decoded text up to the end token with the tokens that are tags, blanks before them left out, as Kosmos-2 shows it."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = re.sub(" +(?=<)", "", tokenizer.decode(ids, skip_special_tokens=False))
    return re.sub(r" +([,.?:])", r"\1", text)


def plain_text(tokenizer, ids: Sequence[int]) -> str:
    """Decoded text up to the end token; that of a word-level tokenizer with punctuation back at its word."""
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    if getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None) is not None:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # knows its own spaces
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for mark in ",.?:":
        text = text.replace(f" {mark}", mark)
    return text
