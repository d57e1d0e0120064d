"""Outcomes of questions asked twice: right both times, lost, gained, wrong both times; and routing by outcome.

The two times are the reference language and another one [arXiv 2605.28306], or two runs of a model. Experts that differ
between outcomes of one language are candidates for what it cannot use [arXiv 2603.17102].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, Statistics
from moe_route.analysis.measures import ratio
from moe_route.analysis.resampling import FEWEST_ITEMS, ResampledStatistics, Sequences
from moe_route.analysis.result import Result
from moe_route.base.budget import Budget
from moe_route.base.schema import parse_json, read_text
from moe_route.base.table import Table

OUTCOMES = ("cc", "ci", "ic", "ii")
"""Right (c) or wrong (i) the first time, then the second time."""
Answers = Mapping[tuple[str, str], bool]


def read_answers(
    path: str | os.PathLike[str], *, task: str | None = None, scorer: str | None = None
) -> dict[Any, bool]:
    """(item, language) -> whether the answer is right, from a file of `moe-route eval` (``evaluate/CONDITION.jsonl``).

    Args:
        task: of several in the file.
        scorer: by default the last one.

    Raises ``AnalysisError`` for a file of another form, or with several tasks if none is named.
    """
    records = []
    budget = Budget(path)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        one = parse_json(line, f"{path}, line {number}", AnalysisError, budget)
        if isinstance(one, dict) and {"item", "language", "correct"} <= one.keys():
            records.append(one)
    tasks = {one.get("task") for one in records}
    if task is not None:
        records = [one for one in records if one.get("task") == task]
    elif len(tasks) > 1:
        raise AnalysisError(f"{path} has answers to {', '.join(sorted(map(str, tasks)))}: name the task")
    if not records:
        raise AnalysisError(f"{path} has no line with item, language and correct: give answers of moe-route eval")
    answers: dict[Any, bool] = {}
    for one in records:
        right = one["correct"]
        if isinstance(right, dict):
            if scorer is not None and scorer not in right:
                raise AnalysisError(f"no scorer {scorer!r}: {path} has {', '.join(right)}")
            right = right[scorer or list(right)[-1]]
        answers[str(one["item"]), str(one["language"])] = bool(right)
    return answers


@dataclass(frozen=True, eq=False, repr=False)
class OutcomeTable(Result, hidden=("of",)):
    """Numbers of questions by language and outcome.

    Attributes:
        counts: int64 [language, outcome].
        languages, outcomes: names of the axes; an outcome is "cc", "ci", "ic" or "ii".
        of: (item, language) -> outcome.
        compared: what the first and the second letter are.
    """

    counts: Annotated[np.ndarray, "language outcome as questions"]
    languages: tuple[str, ...]
    outcomes: tuple[str, ...]
    of: Mapping[tuple[str, str], str]
    compared: tuple[str, str]

    @property
    def shares(self) -> np.ndarray:
        """float64 [language, outcome]: shares of the language's questions."""
        return ratio(self.counts, self.counts.sum(1, keepdims=True))

    def tables(self) -> list[Table]:
        shares = self.shares
        rows = [
            [name, *counts, f"{shares[place, 1]:.1%}"]
            for place, (name, counts) in enumerate(zip(self.languages, self.counts.tolist(), strict=True))
        ]
        first, second = self.compared
        note = f"c: right, i: wrong; first letter: {first}, second letter: {second}"
        return [Table(["language", *self.outcomes, "share of ci"], rows, "Questions by outcome", note)]


def outcomes(first: Answers, second: Answers | None = None, *, reference: str = "eng_Latn") -> OutcomeTable:
    """Sort questions by whether they are answered right twice.

    Args:
        first: (item, language) -> whether the answer is right, such as from ``read_answers``.
        second: the same of another run; the first letter is then the first run. Without it, the first letter is the
            reference language's answer to the item, and the second that of each other language.

    Raises ``AnalysisError`` if no question was asked twice.
    """
    pairs: dict[tuple[str, str], tuple[bool, bool]] = {}
    for (item, language), right in first.items():
        if second is not None and (item, language) in second:
            pairs[item, language] = right, second[item, language]
        elif second is None and language != reference and (item, reference) in first:
            pairs[item, language] = first[item, reference], right
    if not pairs:
        missing = f"an answer in {reference}" if second is None else "a question that both runs were asked"
        raise AnalysisError(f"there is not {missing}: compare answers to the same items")
    of = {key: "".join("c" if right else "i" for right in pair) for key, pair in pairs.items()}
    languages = tuple(dict.fromkeys(language for _, language in of))
    counts = np.zeros((len(languages), len(OUTCOMES)), np.int64)
    for (_, language), outcome in of.items():
        counts[languages.index(language), OUTCOMES.index(outcome)] += 1
    compared = (f"in {reference}", "in the language") if second is None else ("first run", "second run")
    return OutcomeTable(counts, languages, OUTCOMES, of, compared)


def by_outcome(statistics: Statistics, of: OutcomeTable, group: str) -> ResampledStatistics:
    """The recording of one language with a group per outcome of its items, for ``risk_experts`` and other rules.

        table = outcomes(read_answers("evaluate/base.jsonl"))
        apart = by_outcome(statistics, table, "swh_Latn")
        risk_experts(apart, apart, group="cc", baseline_group="ci", top_n=20)

    Outcomes with fewer than five items are left out. Raises ``AnalysisError`` if fewer than two are left, or sequences
    were not kept under the items of the answers.
    """
    kept = Sequences.of_group(statistics, group, group)
    named = [of.of.get((str(item), group)) for item in kept.items]
    drawn = {
        outcome: (kept, np.array([float(name == outcome) for name in named]))
        for outcome in OUTCOMES
        if sum(name == outcome for name in named) >= FEWEST_ITEMS
    }
    if len(drawn) < 2:
        raise AnalysisError(
            f"{len(drawn)} outcomes of {group!r} have {FEWEST_ITEMS} items or more among the "
            f"{sum(name is not None for name in named)} recorded ones with an answer: record the questions under the "
            "items of the answers, or ask more"
        )
    source: Any = _Grouped(statistics, tuple(drawn))
    return ResampledStatistics(source, drawn)


class _Grouped:
    """The shape of a recording, with other groups."""

    def __init__(self, source: Statistics, groups: Iterable[str]) -> None:
        self.groups = tuple(groups)
        self.layers, self.num_experts, self.top_k = source.layers, source.num_experts, source.top_k
        self.metadata = source.metadata
