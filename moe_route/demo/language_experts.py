"""The experts of each language are switched off: which languages lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moe_route.analysis import Difference, entropy_experts
from moe_route.analysis.result import plain
from moe_route.analysis.stats import RESAMPLES, draw_items
from moe_route.base.table import number_of, table
from moe_route.data import Corpus
from moe_route.demo.measurement import Losses, Measurement, random_sets
from moe_route.demo.wording import name, paragraph, told
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan

_SHARE = 20  # a language has one expert of so many
_PERCENTILE = 80.0  # its experts are among the most frequent fifth of all
DRAWS = 19  # random sets at most for each language, on its own text


@dataclass(frozen=True)
class LanguageExpertsOff:
    """Loss of general text in every language without the experts of one language.

    Attributes:
        experts: language -> its experts.
        languages: of the text.
        before: loss of the text.
        after: the same without the experts of each language, in the order of `experts`.
        random: float64 [sets, rows], change of the nats per token of a language's own text by random sets of as many
            experts; a mean over fewer sets where there are no more. None if there are no other experts.
    """

    experts: Mapping[str, ExpertSelection]
    languages: tuple[str, ...]
    before: Losses
    after: tuple[Losses, ...]
    random: np.ndarray | None

    @property
    def matrix(self) -> np.ndarray:
        """float64 [rows, languages]: change of the nats per token of a language without the experts of another."""
        tokens = self.before.tokens.sum(0)
        return np.stack([(one.nats - self.before.nats).sum(0) / tokens for one in self.after])

    @property
    def own(self) -> np.ndarray:
        """float64 [rows]: change of a language's own text."""
        return np.array([row[self.languages.index(of)] for of, row in zip(self.experts, self.matrix, strict=True)])

    @property
    def hit_first(self) -> list[str]:
        """The languages whose experts cost their own text the most."""
        rows = zip(self.experts, self.own, self.matrix, strict=True)
        return [language for language, own, row in rows if own > 0 and own >= row.max()]

    @cached_property
    def selectivity(self) -> Difference:
        """Change of the own text minus the mean change of the others' text, mean over the languages' experts."""
        changes = np.stack([one.nats - self.before.nats for one in self.after])
        own = np.array([[language == of for language in self.languages] for of in self.experts])

        def difference(weights: np.ndarray) -> np.ndarray:
            """[rows of weights]: own minus others, of weighted items."""
            per_token = np.einsum("wi,ril->wrl", weights, changes) / (weights @ self.before.tokens)[:, None]
            others = (per_token * ~own).sum(-1) / (~own).sum(-1)
            return ((per_token * own).sum(-1) - others).mean(-1)

        items = len(self.before.nats)
        value = float(difference(np.ones((1, items)))[0])
        return Difference.of(value, difference(draw_items(items, RESAMPLES, 0)), items)

    @property
    def p_value(self) -> float:
        """Rank of the mean change of the own text among that of the random sets, as a p-value; NaN without sets."""
        if self.random is None:
            return float("nan")
        return (1 + int((self.random.mean(1) >= self.own.mean()).sum())) / (1 + len(self.random))

    @property
    def sentence(self) -> str:
        """What was found, from the interval."""
        if not self.experts:
            return "No language has experts of its own, so there are none to switch off."
        change = self.selectivity
        start = "Switching off a language's own experts"
        first = f"its own text loses the most in {len(self.hit_first)} of {number_of(len(self.experts), 'language')}"
        match change.verdict:
            case "higher":
                effect = f"costs its own text {told(change, 3)} nats per token more than other languages' text"
            case "lower":
                effect = f"costs other languages' text more than its own, by {told(change, 3)} nats per token"
            case _:
                effect = (
                    f"costs its own text no more than other languages' that these sentences can show: {told(change, 3)}"
                )
        return f"{start} {effect}; {first}."

    def __str__(self) -> str:
        if not self.experts:
            return paragraph(self.sentence)
        return "\n\n".join((f"{paragraph(self.sentence)}\n{paragraph(self._against_random())}", self._table()))

    def _against_random(self) -> str:
        if self.random is None:
            return "There are no other experts in these layers to compare with."
        return (
            f"Its own text changes by {self.own.mean():+.3f} on average; by {self.random.mean():+.3f} "
            f"(at most {self.random.mean(1).max():+.3f}) under {number_of(len(self.random), 'random set')} of as many "
            f"experts of the same layers (p = {self.p_value:.3f})."
        )

    def _table(self) -> str:
        head = ("experts off", *map(_short, self.languages))
        rows = []
        for i, (language, values) in enumerate(zip(self.experts, self.matrix, strict=True)):
            cells = [
                f"{value:+.2f}{'<' if of == language else ' '}"
                for of, value in zip(self.languages, values, strict=True)
            ]
            control = () if self.random is None else (f"{self.random[:, i].mean():+.2f}",)
            rows.append((f"{name(language)} ({_short(language)})", *cells, *control))
        numbers = sorted({len(found) for found in self.experts.values()})
        experts = number_of(numbers[0], "expert") if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} experts"
        note = paragraph(
            f"Change of nats per token of {number_of(len(self.before.nats), 'sentence')} per language (columns) when",
            f"the {experts} of a language (rows) are off. <: its own text. Experts: those that few",
            "languages use (lowest entropy over languages), found in other sentences.",
            "" if self.random is None else "random: random sets off, the row's own text.",
        )
        control = () if self.random is None else ("random",)
        return f"{table((*head, *control), rows)}\n{note}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        content: dict[str, Any] = {"sentence": self.sentence}
        if not self.experts:
            return content
        return content | {
            "experts": {
                language: {str(layer): list(ids) for layer, ids in found.items()}
                for language, found in self.experts.items()
            },
            "languages": list(self.languages),
            "matrix": plain(self.matrix),
            "own": dict(zip(self.experts, plain(self.own), strict=True)),
            "hit_first": self.hit_first,
            "selectivity": self.selectivity.to_dict(),
            "random": plain(self.random),
            "p_value": plain(self.p_value),
        }


def _short(language: str) -> str:
    """The code of a language without its script, for the head of a narrow column."""
    return language.partition("_")[0]


def find_language_experts(statistics: RoutingStatistics) -> dict[str, ExpertSelection]:
    """The experts of each language: the most language-specific twentieth of all experts, by the entropy rule."""
    number = max(1, round(sum(statistics.num_experts) / _SHARE))
    found = entropy_experts(statistics, top_n=number, percentile=_PERCENTILE, by="sequence")
    return {language: experts for language, experts in found.items() if experts}


def switch_language_experts_off(
    run: Measurement, experts: Mapping[str, ExpertSelection], general: Corpus, before: Losses, draws: int = DRAWS
) -> LanguageExpertsOff:
    """Measure text in every language without the experts of each, and a language's own text without random ones.

    Args:
        run: the model.
        experts: language -> its experts.
        general: other sentences than those that the experts were found in.
        before: their loss.
        draws: number of random sets for each language, at most `DRAWS`.
    """
    plans = {language: Plan.forbid(found) for language, found in experts.items()}
    after = tuple(run.losses(general, f"experts of {name(of)} off", plan) for of, plan in plans.items())
    random = []
    for of, plan in plans.items():
        column = np.array([general.languages.index(of)])
        own, natural = general.subset([of]), before.of(slice(None), column)
        sets = random_sets(plan, min(draws, DRAWS))[0]
        losses = [run.losses(own, f"random experts, {name(of)}", one) for one in sets]
        random.append([float((one.nats - natural.nats).sum() / natural.tokens.sum()) for one in losses])
    fewest = min(map(len, random), default=0)
    control = np.array([row[:fewest] for row in random]).T if fewest else None
    return LanguageExpertsOff(experts, general.languages, before, after, control)
