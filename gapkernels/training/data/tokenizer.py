"""Turns captions into padded rows of token numbers, with a vocabulary built from the training captions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

Level = Literal["character", "word"]

PADDING = 0
UNKNOWN = 1
_FIRST_TOKEN = 2


class Tokenizer:
    """Character or word tokenizer; case is ignored.

    Args:
        vocabulary: tokens in the order of their numbers, which start at 2.
        level: what a token is.
        length: tokens per caption; longer captions are cut, shorter ones padded.
    """

    def __init__(self, vocabulary: Sequence[str], level: Level, length: int) -> None:
        self.vocabulary = tuple(vocabulary)
        self.level = level
        self.length = length
        self._numbers = {token: number for number, token in enumerate(self.vocabulary, start=_FIRST_TOKEN)}

    @classmethod
    def from_captions(cls, captions: Iterable[str], level: Level, max_length: int = 64) -> Tokenizer:
        """Build the vocabulary from captions: most frequent token first, ties in alphabetical order."""
        split = [_split(caption, level) for caption in captions]
        if not any(split):
            raise ValueError("cannot build a vocabulary: the captions hold no token")
        counts = Counter(token for tokens in split for token in tokens)
        vocabulary = sorted(counts, key=lambda token: (-counts[token], token))
        return cls(vocabulary, level, length=min(max_length, max(map(len, split))))

    @property
    def size(self) -> int:
        """Number of distinct token numbers, padding and unknown included."""
        return len(self.vocabulary) + _FIRST_TOKEN

    def encode(self, captions: Iterable[str]) -> Tensor:
        """Return token numbers, [N, length] int64; 0 is padding, 1 a token outside the vocabulary."""
        rows = []
        for caption in captions:
            numbers = [self._numbers.get(token, UNKNOWN) for token in _split(caption, self.level)[: self.length]]
            rows.append(numbers + [PADDING] * (self.length - len(numbers)))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, self.length)


def _split(caption: str, level: Level) -> list[str]:
    caption = caption.lower()
    return list(caption) if level == "character" else re.findall(r"\w+|[^\w\s]", caption)
