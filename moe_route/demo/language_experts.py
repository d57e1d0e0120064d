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
from moe_route.base.table import number_of
from moe_route.data import Corpus
from moe_route.demo.measurement import Losses, Measurement, random_sets, sample_corpus
from moe_route.demo.wording import bar, columns, name, paragraph, told
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan

_SHARE = 20  # a language has one expert of so many
_PERCENTILE = 80.0  # its experts are among the most frequent fifth of all
DRAWS = 19  # random sets at most for each language, on its own text
_SAMPLED = 12  # sentences on which they are measured
_LINES = 10  # languages in a terminal


@dataclass(frozen=True)
class LanguageExpertsOff:
    """Loss of general text in every language without the experts of one language.

    Attributes:
        experts: language -> its experts.
        languages: of the text.
        before: loss of the text.
        after: the same without the experts of each language, in the order of `experts`.
        sampled: places of the sentences on which random sets are measured.
        random: float64 [sets, rows], change of the nats per token of these in the language itself by random sets of as
            many experts; fewer sets where there are no more. None if there are no other experts.
    """

    experts: Mapping[str, ExpertSelection]
    languages: tuple[str, ...]
    before: Losses
    after: tuple[Losses, ...]
    sampled: np.ndarray
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
    def own_sampled(self) -> np.ndarray:
        """float64 [rows]: the same of the sampled sentences."""
        columns = (np.array([self.languages.index(of)]) for of in self.experts)
        both = (
            (one.of(self.sampled, at), self.before.of(self.sampled, at))
            for one, at in zip(self.after, columns, strict=True)
        )
        return np.array([(one.nats - before.nats).sum() / before.tokens.sum() for one, before in both])

    @property
    def hurt(self) -> list[str]:
        """The languages whose own text loses, by the interval, without their experts."""
        columns = (slice(at, at + 1) for at in map(self.languages.index, self.experts))
        return [
            of
            for of, one, at in zip(self.experts, self.after, columns, strict=True)
            if one.of(slice(None), at).change(self.before.of(slice(None), at)).verdict == "higher"
        ]

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
        return (1 + int((self.random.mean(1) >= self.own_sampled.mean()).sum())) / (1 + len(self.random))

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
        """The text for a terminal: a line for each language, `_LINES` of them at most."""
        if not self.experts:
            return paragraph(self.sentence)
        number = number_of(max(map(len, self.experts.values())), "expert")
        lost = f"{len(self.hurt)} of {len(self.experts)}"
        change = self.selectivity
        values = {
            "higher": f"{change.value:.2f} nats per token less",
            "lower": f"{-change.value:.2f} nats per token more",
        }
        less = values.get(change.verdict, "no less")
        head = f"A language's own {number} off: its loss rises in {lost}, others' {less}."
        largest, labels = max(float(self.own.max()), 1e-9), [name(of) for of in self.experts]
        width = max(map(len, labels)) + 2
        cells = max(6, min(30, columns() - 48 - 2 * width))
        lines = [paragraph(head)]
        for i, (of, label, own, row) in enumerate(zip(self.experts, labels, self.own, self.matrix, strict=True)):
            others = {one: value for one, value in zip(self.languages, row, strict=True) if one != of}
            most = max(others, key=others.__getitem__)
            control = "" if self.random is None else f"  random {self.random[:, i].mean():+.2f}"
            also = f"  also {name(most)} {others[most]:+.2f}" if others[most] > own / 2 > 0 else ""
            shown = f"{label:<{width}}{own:+.2f} {bar(max(own, 0) / largest, 0, cells)}"
            lines.append(f"{shown}  others {np.mean(list(others.values())):+.2f}{control}{also}")
        if len(self.experts) > _LINES:
            lines[_LINES:] = [f"and {len(self.experts) - _LINES + 1} more languages, in report.json"]
        return "\n".join(lines)

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
            "hurt": self.hurt,
            "hit_first": self.hit_first,
            "sampled": len(self.sampled),
            "selectivity": self.selectivity.to_dict(),
            "random": plain(self.random),
            "p_value": plain(self.p_value),
        }


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
    some, places = sample_corpus(general, _SAMPLED)
    random = []
    for of, plan in plans.items():
        column = np.array([general.languages.index(of)])
        own, natural = some.subset([of]), before.of(places, column)
        sets = random_sets(plan, min(draws, DRAWS))[0]
        losses = [run.losses(own, f"random experts, {name(of)}", one) for one in sets]
        random.append([float((one.nats - natural.nats).sum() / natural.tokens.sum()) for one in losses])
    fewest = min(map(len, random), default=0)
    control = np.array([row[:fewest] for row in random]).T if fewest else None
    return LanguageExpertsOff(experts, general.languages, before, after, places, control)
