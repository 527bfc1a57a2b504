"""Pictures as words: code numbers of an image tokenizer in the vocabulary of a language model that reads and writes them.

Chameleon (arXiv:2405.09818) has a word for every code, ``IMGIMG`` + the number's digits as letters (A for 0 to J for 9) + ``Z``, and a picture
is one word that begins it, one for each code, row after row, and one that ends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmfast.spec import SharedTokens

_NAME = re.compile(r"IMGIMG([A-J]+)Z")


def code_number(name: str) -> int | None:
    """The code that a word stands for, None if for none.

    >>> code_number("IMGIMGBCZ"), code_number("red")
    (12, None)
    """
    found = _NAME.fullmatch(name)
    return int("".join(str(ord(letter) - ord("A")) for letter in found[1])) if found else None


class ImageVocabulary:
    """Which id each code of a picture has, and which ids are codes.

    Args:
        vocabulary: words to ids, ``tokenizer.get_vocab()``; the ids of codes may lie in any order.
        begin, end: the words around a picture.

    Raises:
        ValueError: no code among the words, a number left out or given twice, or no word that begins or ends a picture.
    """

    def __init__(self, vocabulary: Mapping[str, int], *, begin: str = "<racm3:break>", end: str = "<eoss>"):
        named = sorted((code, id) for name, id in vocabulary.items() if (code := code_number(name)) is not None)
        if not named or [code for code, _ in named] != list(range(len(named))):
            raise ValueError(
                f"ImageVocabulary: expected a word for each code 0 .. K - 1 ({SharedTokens.code(0)} is 0, {SharedTokens.code(12)} is 12), got {len(named)} words "
                + (f"up to code {named[-1][0]}" if named else "for codes")
            )
        for word in (begin, end):
            if word not in vocabulary:
                raise ValueError(f"ImageVocabulary: the vocabulary has no {word}, which stands around a picture; give begin and end")
        self.begin, self.end = vocabulary[begin], vocabulary[end]
        self.ids = torch.tensor([id for _, id in named])  # [K], of code k
        self._codes = torch.full((max(int(self.ids.max()), self.begin, self.end) + 1,), -1)  # [largest id + 1], -1: no code
        self._codes[self.ids] = torch.arange(len(named))

    def __len__(self) -> int:
        """K."""
        return len(self.ids)

    def is_code(self, ids: Tensor) -> Tensor:
        """bool like ids: which of them are codes of pictures."""
        return self._lookup(ids) >= 0

    def to_ids(self, codes: Tensor) -> Tensor:
        """Code numbers ``[..]`` -> ids ``[..]`` (int64).

        Raises:
            ValueError: a number that no code has.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < len(self):
            raise ValueError(f"ImageVocabulary: expected codes 0 .. {len(self) - 1}, got {int(codes.min())} .. {int(codes.max())}")
        return self.ids.to(codes.device)[codes.long()]

    def to_codes(self, ids: Tensor) -> Tensor:
        """Ids ``[..]`` -> code numbers ``[..]``.

        Raises:
            ValueError: an id that is no code's.
        """
        codes = self._lookup(ids)
        if (codes < 0).any():
            raise ValueError(f"ImageVocabulary: id {int(ids[codes < 0][0])} is no code of a picture; cut pictures out with pictures_in")
        return codes

    def _lookup(self, ids: Tensor) -> Tensor:
        table = self._codes.to(ids.device)
        known = (ids >= 0) & (ids < len(table))
        return torch.where(known, table[torch.where(known, ids, 0)], -1)

    def wrap(self, codes: Tensor) -> Tensor:
        """A picture ``[.., N]`` as it stands in a text, ``[.., N + 2]``: begin, codes, end."""
        ids = self.to_ids(codes)
        edge = ids.new_empty((*ids.shape[:-1], 1))
        return torch.cat([edge.fill_(self.begin), ids, torch.full_like(edge, self.end)], -1)

    def pictures_in(self, ids: Tensor) -> list[Tensor]:
        """The codes of every picture that begins in a row ``[T]``. A picture ends where its end stands, or at the first id that is no code
        (text went on), or with the row; it may so have fewer codes than a grid, which ``VQGAN.draw`` fills up."""
        if ids.dim() != 1:
            raise ValueError(f"ImageVocabulary.pictures_in: expected the ids of one row [T], got {list(ids.shape)}")
        codes, found = self._lookup(ids), []
        for start in (ids == self.begin).nonzero().flatten().tolist():
            rest = codes[start + 1 :]
            other = (rest < 0).nonzero()
            found.append(rest[: int(other[0])] if len(other) else rest)
        return found
