"""Texts with the experts of each token, and the texts of tokens as a reader sees them, for a report.

A character may take several tokens, which then share its text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_route.calls.call import PHASES
from moe_route.recording import Trace
from moe_route.report.page import packed_bytes, packed_integers

logger = logging.getLogger(__name__)

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
        made: list[Piece] = []
        start = 0
        while start < len(ids):
            if ids[start] < 0:  # the model was called with embeddings
                made.append(("? ", 1, 1))
                start += 1
                continue
            ends = range(start + 1, min(start + _LONGEST, len(ids)) + 1)
            end = next((end for end in ends if not added(ids, start, end).endswith(_BROKEN)), start + 1)
            text = added(ids, start, end)
            made.extend((text, part + 1, end - start) for part in range(end - start))
            start = end
        return made

    return pieces


def token_view(trace: Trace, pieces: Pieces, sequences: Sequence[int]) -> dict[str, Any]:
    """The tokens of these sequences: texts, and experts with weights as packed [token, layer, slot]."""
    rows = [_rows(trace, number) for number in sequences]
    together = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return {
        "layers": list(trace.layer_numbers),
        "slots": int(trace.ids.shape[2]),
        "tokens": len(together),
        "allTokens": len(trace),
        "truncated": trace.truncated,
        "texts": [_text(trace, number, of, pieces) for number, of in zip(sequences, rows, strict=True)],
        "ids": packed_integers(trace.ids[together]),
        "weights": packed_bytes(trace.weights[together]),
    }


def chosen_sequences(trace: Trace, most_bytes: int) -> list[int]:
    """Sequences that fit into so many bytes: the first of each group, then the second, and so on.

    Sequences without one order, such as those of beams, are left out with a warning.
    """
    per_token = max(int(np.prod(trace.ids.shape[1:])), 1) * 4  # an id and a weight, in base64; and the text
    order: dict[int, list[int]] = {}
    unordered = 0
    for number in range(len(trace.items)):
        rows = np.flatnonzero(trace.sequence == number)
        if not len(rows):
            continue
        if len(np.unique(trace.position[rows])) < len(rows):
            unordered += 1
            continue
        order.setdefault(int(trace.group[rows[0]]), []).append(number)
    if unordered:
        logger.warning("%d sequences of a trace have several tokens at one position and are not shown", unordered)
    for of_group in order.values():
        of_group.sort(key=lambda number: _item_key(trace.items[number]))
    turns = [
        of[turn] for turn in range(max(map(len, order.values()), default=0)) for of in order.values() if turn < len(of)
    ]
    chosen: list[int] = []
    used = 0
    for number in turns:
        used += int((trace.sequence == number).sum()) * per_token
        if used > most_bytes and chosen:
            break
        chosen.append(number)
    return sorted(chosen, key=lambda number: (int(trace.group[trace.sequence == number][0]), turns.index(number)))


def _item_key(item: Any) -> tuple[int, Any]:
    """Sorts items that are numbers, or begin with one, by that number; the same items for every group come first."""
    text = str(item)
    return (0, (int(text), text)) if text.isdecimal() else (1, (0, text))


def _rows(trace: Trace, number: int) -> np.ndarray:
    rows = np.flatnonzero(trace.sequence == number)
    return rows[np.argsort(trace.position[rows], kind="stable")]


def _text(trace: Trace, number: int, rows: np.ndarray, pieces: Pieces) -> dict[str, Any]:
    ids = trace.token[rows].tolist()
    made = pieces(ids)
    generated = trace.phase[rows] == PHASES.index("decode")
    item = trace.items[number]
    positions = trace.position[rows].tolist()
    return {
        "group": trace.groups[int(trace.group[rows[0]])],
        "item": str(number if item is None else item),
        "pieces": [text for text, _, _ in made],
        "parts": [[i, part, of] for i, (_, part, of) in enumerate(made) if of > 1],
        "ids": ids,
        "positions": None if positions == list(range(len(ids))) else positions,
        "prompt": int(np.argmax(generated)) if generated.any() else len(ids),
    }
