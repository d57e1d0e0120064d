"""Requests of lm-eval as rows of batches: which group and item a row counts for, and in which order rows run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["GROUPS", "Grouping", "Place", "Row", "RowNames", "language_of", "rows_of"]

Grouping = Literal["task", "language"]
GROUPS: tuple[Grouping, ...] = ("task", "language")

_FLORES = re.compile(r"(?<![A-Za-z])[a-z]{3}_[A-Z][a-z]{3}(?![A-Za-z])")
_ISO_639_1 = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo "
    "es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka "
    "kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng "
    "nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su "
    "sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)


def language_of(task: str, document: Any) -> str:
    """The language of a request: field ``language`` of its document, or the code in the name of its task.

    A FLORES code counts anywhere in the name, a code of two letters at its end. Raises ``ValueError`` for a task
    without either.
    """
    said = document.get("language") if isinstance(document, Mapping) else None
    if isinstance(said, str) and said:
        return said
    codes = _FLORES.findall(task)
    last = task.rpartition("_")[2]
    if codes:
        return str(codes[-1])
    if last in _ISO_639_1.split():
        return last
    raise ValueError(
        f"the language of task {task!r} is unknown: its name has no language code at the end and its documents have no "
        "field language; use groups=task"
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request comes from.

    Attributes:
        group: the group that it counts for.
        task: name of its task.
        document: index of its document in the task.
        index: index of the request among those of its document.
        item: key of the document. Documents with a field ``item`` have the same key in every language of a task.
    """

    group: str
    task: str
    document: int
    index: int
    item: str

    @classmethod
    def of(cls, request: Any, by: Grouping) -> Place:
        """The place of an ``Instance`` of lm-eval. Raises ``ValueError`` if its language is asked for and unknown."""
        task, document = str(request.task_name), int(request.doc_id or 0)
        group = task if by == "task" else language_of(task, request.doc)
        key = request.doc.get("item") if isinstance(request.doc, Mapping) else None
        item = f"{task}/{document}" if key is None else f"{_without_language(task, request.doc)}/{key}"
        return cls(group, task, document, int(request.idx or 0), item)


def _without_language(task: str, document: Mapping[str, Any]) -> str:
    try:
        return task.replace(language_of(task, document), "").strip("_").replace("__", "_")
    except ValueError:
        return task


@dataclass(frozen=True, slots=True)
class Row:
    """One input of the model, which answers one or more requests.

    Attributes:
        place: of the first request.
        ids: the input tokens: context and continuation, without the last token.
        context: number of input tokens that belong to the context of the first request.
        requests: indices of the requests, and the continuation of each.
    """

    place: Place
    ids: tuple[int, ...]
    context: int
    requests: tuple[tuple[int, tuple[int, ...]], ...]


def rows_of(
    requests: Sequence[tuple[Place, Sequence[int], Sequence[int]]], max_length: int, *, shared: bool = True
) -> list[Row]:
    """The rows that answer `requests` (place, context, continuation), from long to short, then by place.

    The order depends on nothing else, so batches are the same in every run. Contexts are cut on the left, so that a row
    has at most `max_length` tokens. If `shared`, requests of one document with the same input share a row, as the
    choices A to D after one question do.
    """
    found: dict[Any, Row] = {}
    for number, (place, context, continuation) in enumerate(requests):
        whole = tuple([*context, *continuation][-(max_length + 1) :])
        if not continuation or len(continuation) > max_length or len(whole) < 2:
            raise ValueError(
                f"a request of task {place.task} has {len(context)} tokens of context and {len(continuation)} to "
                f"score, and the model reads 1 to {max_length}: leave the document out"
            )
        ids = whole[:-1]
        key: Any = (place.task, place.document, ids) if shared else number
        answer = (number, tuple(continuation))
        row = found.get(key)
        if row is None:
            found[key] = Row(place, ids, len(whole) - len(continuation), (answer,))
        else:
            found[key] = Row(row.place, ids, row.context, (*row.requests, answer))
    return sorted(found.values(), key=lambda row: (-len(row.ids), row.place.task, row.place.document, row.place.index))


class RowNames:
    """Names of rows for a recording: an item names one sequence of a group, so repetitions get a number."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str]] = Counter()

    def name(self, place: Place) -> str:
        """The item of the next row of this place."""
        key = (place.group, place.item)
        self._seen[key] += 1
        return place.item if self._seen[key] == 1 else f"{place.item}/{self._seen[key]}"
