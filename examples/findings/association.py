"""Correlation over languages of exact match with divergence of tasks from English, and what may lie behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from moe_route.analysis import Correlation, Divergence, correlation, divergence
from moe_route.analysis.result import mean_of_seen, plain
from moe_route.base.table import interval, table
from moe_route.demo.measurement import PIVOT
from moe_route.demo.wording import name, paragraph
from moe_route.recording import RoutingStatistics

SHARE, LOSS = "share of pairs seen", "loss of general text"
_LEAST = 4  # languages beside English; with three the smallest p-value is 1/3


@dataclass(frozen=True)
class Association:
    """Correlation over languages between divergence of task text from English and exact match.

    Attributes:
        divergence: of the problems from English, by language and layer.
        match: language -> exact match of the same problems.
        covariates: name -> (language -> number): what else may explain exact match.
        raw: the correlation, with the mean over layers as the last one; None with too few languages, or if exact match
            or divergence is the same in all.
        partial: names of the covariates held constant -> partial correlation.
        reason: why there is none.
    """

    divergence: Divergence
    match: Mapping[str, float]
    covariates: Mapping[str, Mapping[str, float]]
    raw: Correlation | None
    partial: Mapping[tuple[str, ...], Correlation] = field(default_factory=dict)
    reason: str = ""

    @property
    def strongest(self) -> int:
        """The layer of the largest |r|."""
        assert self.raw is not None
        return int(np.nanargmax(np.abs(self.raw.pearson[:-1])))  # the last one is the mean

    def explained_by(self, covariate: str) -> float:
        """Pearson r over the languages between a covariate and exact match; NaN if it does not vary."""
        values = np.array([[self.covariates[covariate][one], self.match[one]] for one in self.divergence.groups])
        return float(np.corrcoef(values.T)[0, 1]) if (np.ptp(values, axis=0) > 0).all() else float("nan")

    @property
    def sentence(self) -> str:
        """What was found, from the p-value that is corrected for the number of layers."""
        if self.raw is None:
            return f"Divergence of tasks and exact match are not correlated here: {self.reason}."
        at = self.strongest
        r, p = self.raw.pearson[at], self.raw.p_corrected[at]
        number = (
            f"over {len(self.divergence.groups)} languages (r = {r:+.2f} in layer {at}, p = {p:.3f} over all layers)"
        )
        if p >= 0.05:
            return f"Exact match is not clearly correlated with divergence of tasks from {name(PIVOT)} {number}."
        better = "nearer to" if r < 0 else "farther from"
        return f"Languages that route tasks {better} {name(PIVOT)} answer better {number}{self._confounded(r)}."

    def _confounded(self, r: float) -> str:
        """Whether some layer stays clear, with the sign of `r`, given as many covariates as the languages allow."""
        most = max(map(len, self.partial), default=0)
        largest = {held: one for held, one in self.partial.items() if len(held) == most}
        gone = [held for held in largest if not _clear(largest[held], r)]
        if gone:
            given = " or ".join(map(_given, gone))
            return f", but no layer is clear once {given} {'is' if most == 1 else 'are'} held constant"
        return f", also given {' or '.join(map(_given, largest))}" if largest else ""

    def __str__(self) -> str:
        if self.raw is None:
            return paragraph(self.sentence)
        low, high = self.raw.interval()
        at = self.strongest
        more = [
            f"Its interval for other languages and other problems is {interval(low[at], high[at], digits=2)}, "
            "before the choice of the layer."
        ]
        known = [(covariate, self.explained_by(covariate)) for covariate in self.covariates]
        said = [f"the {covariate} {r:+.2f}" for covariate, r in known if np.isfinite(r)]
        if said:
            more.append(f"What may lie behind it: with exact match correlate {', '.join(said)}.")
        return "\n\n".join((f"{paragraph(self.sentence)}\n{paragraph(*more)}", self._table()))

    def _table(self) -> str:
        assert self.raw is not None
        short = {(SHARE,): "share", (LOSS,): "loss", (SHARE, LOSS): "both"}
        head, columns = ["layer", "r", "p", "p (all)"], [self.raw.pearson, self.raw.p_value, self.raw.p_corrected]
        for held, given in self.partial.items():
            head += [f"r given {short[held]}", "p (all)"]
            columns += [given.pearson, given.p_corrected]
        rows = [
            (layer, *map(float, cells))
            for layer, cells in zip(self.raw.layers, zip(*columns, strict=True), strict=True)
        ]
        note = paragraph(
            "Pearson r of divergence with exact match, on problems whose numbers English alone saw; p by exchanging",
            "the scores of languages; all: corrected for all layers. mean: of the divergence over layers.",
            "given: partial correlation; share: of the pairs seen in training; loss: nats per sentence of general text."
            if self.partial
            else "",
        )
        return f"{table(head, rows)}\n{note}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        content: dict[str, Any] = {
            "sentence": self.sentence,
            "divergence": self.divergence.to_dict(),
            "exact_match": dict(self.match),
            "covariates": {key: dict(values) for key, values in self.covariates.items()},
            "no_correlation_because": self.reason or None,
        }
        if self.raw is None:
            return content
        low, high = self.raw.interval()
        return content | {
            "correlation": self.raw.to_dict() | {"low": plain(low), "high": plain(high)},
            "covariate_with_exact_match": {key: plain(self.explained_by(key)) for key in self.covariates},
            "partial": [{"given": list(held), **given.to_dict()} for held, given in self.partial.items()],
        }


def associate(
    task: RoutingStatistics, match: Mapping[str, float], covariates: Mapping[str, Mapping[str, float]]
) -> Association | None:
    """Correlate the divergence of problems with exact match; None without a language beside English.

    Args:
        task: routing of the problems in every language.
        match: language -> exact match of the same problems.
        covariates: name -> (language -> number). Those that lack a language are left out.
    """
    if len(task.groups) < 2:
        return None
    diverging = divergence(task, reference=PIVOT)
    known = {key: values for key, values in covariates.items() if set(diverging.groups) <= set(values)}
    scores = np.array([match[language] for language in diverging.groups])
    if len(scores) < _LEAST:
        return Association(diverging, match, known, None, reason=f"{len(scores)} languages beside English are too few")
    if np.ptp(scores) == 0:
        return Association(diverging, match, known, None, reason="exact match is the same in all languages")
    joined = _with_mean(diverging)
    raw = correlation(joined, match)
    if np.isnan(raw.pearson[:-1]).all():
        return Association(
            diverging, match, known, None, reason="divergence is undefined, or the same in all languages"
        )
    partial = {
        held: correlation(joined, match, covariates={key: known[key] for key in held})
        for held in _subsets(tuple(known))
        if len(scores) >= _LEAST + len(held)
    }
    return Association(diverging, match, known, raw, partial)


def _clear(given: Correlation, r: float) -> bool:
    """Whether the correlation of some layer has the sign of `r` and a corrected p-value below .05."""
    same = np.sign(given.pearson[:-1]) == np.sign(r)  # the last one is the mean
    return bool((same & (given.p_corrected[:-1] < 0.05)).any())


def _given(held: tuple[str, ...]) -> str:
    return " and ".join(f"the {one}" for one in held)


def _with_mean(diverging: Divergence) -> Divergence:
    """The same with the mean over layers as a further one."""
    pairs = diverging.pair_values
    return replace(
        diverging,
        values=np.column_stack([diverging.values, mean_of_seen(diverging.values, 1)[0]]),
        undefined=np.column_stack([diverging.undefined, diverging.undefined.sum(1)]),
        pair_values=None if pairs is None else np.concatenate([pairs, mean_of_seen(pairs, 2)[0][..., None]], axis=2),
        layers=(*map(str, range(len(diverging.layers))), "mean"),
        floor=None,
        reference_floor=None,
    )


def _subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every set of the names but the empty one, the largest last."""
    yield from (some for size in range(1, len(names) + 1) for some in combinations(names, size))
