"""The ladder of skill: exact match on problems that every language saw, that English alone saw, and that nobody saw."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from moe_route.analysis import Difference
from moe_route.analysis.result import plain
from moe_route.analysis.stats import RESAMPLES, draw_items
from moe_route.base.table import table
from moe_route.data import demo_model_folder
from moe_route.demo.measurement import HELD_OUT, PIVOT, SUBSETS, Scores
from moe_route.demo.wording import name, paragraph, told
from moe_route.runs.language_model import DEMO_MODEL


class Share(NamedTuple):
    """A share with its 95 % interval (Wilson's)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, correct: np.ndarray) -> Share:
        """Share of ones among n independent items."""
        n, p, z = len(correct), float(correct.mean()), NormalDist().inv_cdf(0.975)
        center = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return cls(p, max(0.0, center - reach), min(1.0, center + reach))

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Skill:
    """Exact match by language and subset.

    Attributes:
        languages: of the problems.
        scores: subset -> how its problems are answered.
        shares: language -> share of the pairs of numbers that it saw in training; empty if not known.
    """

    languages: tuple[str, ...]
    scores: Mapping[str, Scores]
    shares: Mapping[str, float]

    def match(self, subset: str) -> dict[str, Share]:
        """language -> exact match of a subset."""
        correct = self.scores[subset].correct
        return {language: Share.of(correct[:, i]) for i, language in enumerate(self.languages)}

    @property
    def others(self) -> tuple[str, ...]:
        """The languages that did not see the pairs that English alone saw; those of the corpus without English."""
        return tuple(language for language in self.languages if language != PIVOT)

    def transfer(self, *languages: str) -> Difference:
        """Exact match of what English alone saw minus that of what nobody saw, mean over languages.

        The subsets hold other problems of the same kinds, so the interval is a bootstrap over each by itself.
        """
        columns = [self.languages.index(language) for language in languages]
        parts = [self.scores[subset].correct[:, columns].mean(1) for subset in HELD_OUT]
        drawn = [draw_items(len(part), RESAMPLES, seed) @ part / len(part) for seed, part in enumerate(parts)]
        value = float(parts[0].mean() - parts[1].mean())
        return Difference.of(value, drawn[0] - drawn[1], min(map(len, parts)))

    @property
    def sentence(self) -> str:
        """What was found, from the interval."""
        seen = self.scores["seen"].correct.mean()
        if not self.others:
            return f"Exact match on problems whose numbers were seen in training is {seen:.2f} in {name(PIVOT)}."
        columns = [self.languages.index(language) for language in self.others]
        english, nobody = (self.scores[subset].correct[:, columns].mean() for subset in HELD_OUT)
        transfer = self.transfer(*self.others)
        start = f"Problems whose numbers were seen in English alone are answered in other languages at {english:.2f},"
        match transfer.verdict:
            case "higher":
                return f"{start} those that nobody saw at {nobody:.2f}: English transfers by {told(transfer)}."
            case "lower":
                return (
                    f"{start} less than those that nobody saw ({nobody:.2f}): {told(transfer)}, so nothing transfers."
                )
            case _:
                return (
                    f"{start} those that nobody saw at {nobody:.2f}: a transfer from English cannot be told from none, "
                    f"{told(transfer)}."
                )

    def __str__(self) -> str:
        rows: list[tuple[object, ...]] = []
        matches = [self.match(subset) for subset in SUBSETS]
        for language in self.languages:
            share = f"{self.shares[language]:.0%}" if language in self.shares else "-"
            transfer = "" if language == PIVOT else told(self.transfer(language))
            rows.append((name(language), share, *(str(match[language]) for match in matches), transfer))
        if self.others:
            columns = [self.languages.index(language) for language in self.others]
            means = (f"{self.scores[subset].correct[:, columns].mean():.2f}" for subset in SUBSETS)
            rows.append(("mean of the others", "", *means, told(self.transfer(*self.others))))
        head = ("language", "pairs seen", "seen by all", "English only", "never seen", "English only - never")
        number = len(self.scores[SUBSETS[0]].correct)
        note = paragraph(
            f"Exact match of {number} problems of each kind, with 95 % intervals (Wilson's; of differences bootstrap).",
            "pairs seen: share of the pairs of numbers that the language saw in training."
            if self.shares
            else "The model has no record of which pairs its languages saw, so the subsets are its own to explain.",
        )
        return f"{paragraph(self.sentence)}\n\n{table(head, rows)}\n{note}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {
            "sentence": self.sentence,
            "problems": {subset: len(scores.correct) for subset, scores in self.scores.items()},
            "shares_in_training": dict(self.shares),
            "exact_match": {
                subset: {language: plain(share._asdict()) for language, share in self.match(subset).items()}
                for subset in SUBSETS
            },
            "transfer": {language: self.transfer(language).to_dict() for language in self.others},
            "mean_transfer": self.transfer(*self.others).to_dict() if self.others else None,
        }


def shares_in_training(model: str) -> dict[str, float]:
    """language -> share of the pairs of numbers seen, from the model's training.json; empty if it says nothing of them.

    `model` is a name as for `LanguageModel.load`.
    """
    folder = demo_model_folder() if model == DEMO_MODEL else Path(model)
    record = folder / "training.json"
    if not record.is_file():
        return {}
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except ValueError:  # a file of this name that another program wrote
        return {}
    shares = content.get("shares") if isinstance(content, dict) else None
    if not isinstance(shares, dict) or not all(type(one) in (int, float) and 0 <= one <= 1 for one in shares.values()):
        return {}
    return {str(language): float(share) for language, share in shares.items()}
