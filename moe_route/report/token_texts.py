"""Texts of tokens as a reader sees them, also where one character takes several tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Piece", "Pieces", "pieces_by_id", "pieces_of"]

Piece = tuple[str, int, int]  # text, number of this part from 1, number of parts (1 for a token of whole characters)
Pieces = Callable[[Sequence[int]], list[Piece]]

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are not a character yet
_LONGEST = 12  # tokens of one run; a byte-level token can be one of 4 bytes, and clusters begin in the middle of one
_BEFORE = 4  # tokens that are decoded before a run, because some decoders drop the space of the first one


def pieces_by_id(ids: Sequence[int]) -> list[Piece]:
    """The ids themselves, where there is no tokenizer."""
    return [(f"{number} " if number >= 0 else "? ", 1, 1) for number in ids]


def pieces_of(tokenizer: Any) -> Pieces:
    """The function that turns ids into texts by this tokenizer; joined, they are the decoded text.

    Tokens that hold parts of a character share the text of their run: part i of n.
    """

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def added(ids: Sequence[int], start: int, end: int) -> str:
        """What the tokens from start to end add to the text."""
        first = max(start - _BEFORE, 0)
        before, after = decode(ids[first:start]), decode(ids[first:end])
        return after[len(before) :] if after.startswith(before) else decode(ids[start:end])

    def pieces(ids: Sequence[int]) -> list[Piece]:
        found: list[Piece] = []
        start = 0
        while start < len(ids):
            if ids[start] < 0:  # the model was called with embeddings
                found.append(("? ", 1, 1))
                start += 1
                continue
            ends = range(start + 1, min(start + _LONGEST, len(ids)) + 1)
            end = next((end for end in ends if not added(ids, start, end).endswith(_BROKEN)), start + 1)
            text = added(ids, start, end)
            found.extend((text, part + 1, end - start) for part in range(end - start))
            start = end
        return found

    return pieces
