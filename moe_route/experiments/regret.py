"""Regret of the natural route: how much better the best of several drawn routes predicts each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moe_route.analysis.effects import PERMUTATIONS, Effects
from moe_route.analysis.result import Result, plain
from moe_route.analysis.stats import RESAMPLES, expected_maximum
from moe_route.base.table import Table, interval
from moe_route.data.batches import EncodedTexts, Text
from moe_route.experiments.text_run import TextRun
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.lines import KeptRuns
from moe_route.steering import Plan

CONFIDENCE = (0.25, 0.5, 0.75)
ROUNDING = 1e-5  # nats; smaller gains may come from the order of float32 sums
_MEASURES = ("regret", "by_chance", "excess", "held_out", "random", "gains")


@dataclass(frozen=True, eq=False, repr=False)
class Regret(Result, hidden=_MEASURES):
    """Change of the log probability of the true token by other routes of the same size, in nats per token.

    Effects have shape [G, B]: groups, and classes of the natural prediction's confidence (the probability of its most
    likely token). The last class is all tokens.

    Attributes:
        groups, classes: their names.
        routes: number R of drawn routes.
        regret: ``max over r of log p(y | r) - log p(y | natural)``. Positive values are expected by chance.
        by_chance: what the maximum comes to if every change keeps its size and takes a random sign
            (``analysis.expected_maximum``).
        excess: ``regret - by_chance``; positive: the drawn routes help more than they hurt, beyond chance.
        held_out: gain of the route that is best on every second token of the text, measured on the others (and the
            other way round). What is left of the regret for somebody who has to choose a route in advance.
        random: mean change over the R routes.
        gains: share of the tokens that some route predicts better, by more than 1e-5 nats.
        temperature: of the draw.
        layers: layers in which routes were drawn; None for all.
        note: which texts were cut, "" if none was.
    """

    groups: tuple[str, ...]
    classes: tuple[str, ...]
    routes: int
    regret: Effects
    by_chance: Effects
    excess: Effects
    held_out: Effects
    random: Effects
    gains: Effects
    temperature: float
    layers: tuple[int, ...] | None
    note: str = ""

    def _measured(self) -> dict[str, np.ndarray]:
        columns = {"tokens": self.regret.tokens}
        for name in _MEASURES:
            columns |= getattr(self, name).columns(name)
        del columns["gains_p"], columns["by_chance_p"], columns["regret_p"]  # 0 is not what chance gives
        return columns

    def columns(self) -> dict[str, Any]:
        """``group``, class of ``confidence``, ``tokens``, and every measure with its interval."""
        group, kind = np.indices(self.regret.mean.shape).reshape(2, -1)
        keys = {"group": np.asarray(self.groups, object)[group], "confidence": np.asarray(self.classes, object)[kind]}
        return keys | {name: values.reshape(-1) for name, values in self._measured().items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {**super().to_dict(), **plain(self._measured())}

    def tables(self) -> list[Table]:
        rows = []
        for g, group in enumerate(self.groups):
            for b, kind in enumerate(self.classes):
                numbers = [float(getattr(self, name).mean[g, b]) for name in _MEASURES[:-1]]
                ends = interval(self.held_out.low[g, b], self.held_out.high[g, b])
                gains = float(self.gains.mean[g, b])
                rows.append([group, kind, int(self.regret.tokens[g, b]), *numbers[:4], ends, numbers[4], gains])
        names = ("tokens", "regret", "by chance", "excess", "held out", "95 % interval", "random", "gain")
        head = ("group", "confidence", *names)
        where = "all layers" if self.layers is None else f"layers {', '.join(map(str, self.layers))}"
        return [
            Table(
                head,
                rows,
                f"Regret in nats per token, {self.routes} drawn routes ({where}, temperature {self.temperature:g})",
                "\n".join(
                    part for part in ("gain: share of tokens that some route predicts better", self.note) if part
                ),
            )
        ]


def regret(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    *,
    routes: int = 8,
    temperature: float = 1.0,
    layers: Iterable[int] | int | None = None,
    confidence: Sequence[float] = CONFIDENCE,
    routed: RoutedModel | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: bool = False,
    kept: KeptRuns | None = None,
) -> Regret:
    """Measure how much better drawn routes predict each token than the natural one [arXiv 2605.07260].

    Routes have as many experts as the natural one. They are drawn for each token by Gumbel-top-k (``Plan.gumbel``),
    with the seeds ``seed`` to ``seed + routes - 1``. The best of R routes is better than the natural one by chance
    alone; ``by_chance``, ``held_out`` and ``random`` tell how much of the regret that is.

    Args:
        language_model: the model.
        texts: their groups are the groups of the result.
        routes: number of routes, at least 2.
        temperature: of the draw; small values stay close to the natural route.
        layers: layers in which routes are drawn; by default all.
        confidence: increasing limits of the classes of confidence, between 0 and 1.
        routed, batch_size, max_length, resamples, permutations, progress, kept: as in ``knockout``.
        seed: of the routes, the intervals and the tests.

    Raises ``ValueError`` for fewer than two routes, limits that do not increase, or texts without a predicted token,
    and ``PlanError`` for a temperature or layers that cannot be.
    """
    if routes < 2:
        raise ValueError(f"{routes} routes have no best one: draw at least 2")
    limits = [float(limit) for limit in confidence]
    if sorted({0.0, 1.0, *limits}) != [0.0, *limits, 1.0]:
        raise ValueError(f"limits of confidence must increase, between 0 and 1, not {limits}")
    plans = [Plan.gumbel(seed + route, temperature=temperature, layers=layers) for route in range(routes)]
    with TextRun(language_model, texts, routed, batch_size, max_length, progress, kept) as run:
        gains = [np.zeros((routes, int(tokens))) for tokens in run.tokens]
        natural = run.natural()
        for route, text, nats in run.under(plans, "drawn routes"):
            gains[text][route] = natural.nats[text] - nats
    measured = [_measures(of_text) for of_text in gains]
    sums, counts = _by_class(measured, [np.digitize(values, limits) for values in natural.confidence], len(limits) + 1)
    groups, effects = run.effects(sums, counts, resamples=resamples, permutations=permutations, seed=seed)
    ends = [0.0, *limits, 1.0]
    classes = [f"{low:g}-{high:g}" for low, high in pairwise(ends)]
    best, by_chance, excess, held_out, random, share = (effects.part((..., place)) for place in range(len(_MEASURES)))
    measures = (best, by_chance, excess, held_out, random, share)
    return Regret(groups, (*classes, "all"), routes, *measures, temperature, plans[0].rules[0].layers, run.texts.note)


def _measures(gains: np.ndarray) -> np.ndarray:
    """The measures of each token, float64 [tokens, 6], from the gains of the routes [R, tokens]."""
    best, chance = gains.max(0), expected_maximum(gains.T)
    held_out = np.zeros(gains.shape[1])
    for half in (0, 1):
        elsewhere = gains[:, 1 - half :: 2]
        if elsewhere.shape[1]:
            total = elsewhere.sum(1)
            held_out[half::2] = gains[(total >= total.max() - ROUNDING).argmax(), half::2]  # of ties, the first route
        else:  # a single token: no evidence for any route
            held_out[half::2] = gains[:, half::2].mean(0)
    return np.stack([best, chance, best - chance, held_out, gains.mean(0), best > ROUNDING], axis=1)


def _by_class(
    measured: Sequence[np.ndarray], kinds: Sequence[np.ndarray], classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of each text by class of its tokens, and over all of them, float64 [texts, classes + 1, 6]."""
    sums = np.zeros((len(measured), classes + 1, len(_MEASURES)))
    counts = np.zeros(sums.shape)
    for text, (values, kind) in enumerate(zip(measured, kinds, strict=True)):
        np.add.at(sums[text], kind, values)
        np.add.at(counts[text], kind, 1.0)
        sums[text, -1], counts[text, -1] = values.sum(0), len(values)
    return sums, counts
