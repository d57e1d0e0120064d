"""Knock-outs: the effect of each expert on the loss of the tokens that chose it, by switching it off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route.analysis import AnalysisError, RankAgreement, benjamini_hochberg, rank_agreement
from moe_route.analysis.effects import PERMUTATIONS, Effects
from moe_route.analysis.result import Result, plain
from moe_route.analysis.stats import RESAMPLES
from moe_route.base.table import Table, interval
from moe_route.data.batches import EncodedTexts, Text
from moe_route.experiments.text_run import TextRun
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.lines import KeptRuns
from moe_route.steering import ExpertSelection, Plan, PlanError, PlanModel

_SHOWN = 10


@dataclass(frozen=True, eq=False, repr=False)
class Knockout(Result):
    """Change of the loss when an expert is switched off, in nats per token; positive: the expert was of use.

    Arrays are float64 [G, L, E] over groups, MoE layers and experts; NaN where not tested.

    Attributes:
        groups: names of the G groups.
        num_experts: number of experts of each layer.
        effect: over the tokens that chose the expert; NaN where none did.
        total: over all tokens.
        adjusted: p-values of ``effect``, for each group adjusted for the number of experts (Benjamini-Hochberg).
        total_adjusted: the same of ``total``.
        frequency: share of the tokens that chose the expert.
        loss: [G], loss without a knock-out.
        note: which texts were cut, "" if none was.
    """

    groups: tuple[str, ...]
    num_experts: tuple[int, ...]
    effect: Effects
    total: Effects
    adjusted: np.ndarray
    total_adjusted: np.ndarray
    frequency: np.ndarray
    loss: np.ndarray
    note: str = ""

    def needed(self, group: str | None = None, *, limit: float = 0.05) -> ExpertSelection:
        """Experts of a group whose knock-out raises the loss of their tokens, with an adjusted p-value up to ``limit``.

        Their scores are ``effect``. Without ``group``: that of the only group.
        """
        at = self._index(group)
        scores = self.effect.mean[at]
        with np.errstate(invalid="ignore"):
            chosen = (scores > 0) & (self.adjusted[at] <= limit)
        needed: dict[int, dict[int, float]] = {}
        for layer, expert in np.argwhere(chosen).tolist():
            needed.setdefault(layer, {})[expert] = float(scores[layer, expert])
        model = PlanModel(num_experts=self.num_experts)
        description = f"knock-out raises the loss of {self.groups[at]}, adjusted p up to {limit:g}"
        return ExpertSelection(needed, scores=needed, description=description, model=model)

    def agreement(
        self, metrics: Mapping[str, np.ndarray] | None = None, *, permutations: int = 2000, seed: int = 0
    ) -> RankAgreement:
        """Compute how well observed metrics rank the total effects of experts (``analysis.rank_agreement``).

        The frequency among the tested tokens is always included. ``metrics``: name -> float [L, E] or [G, L, E], such
        as ``analysis.expert_difference``.
        """
        observed = {"frequency": self.frequency, **(metrics or {})}
        return rank_agreement(observed, self.total.mean, groups=self.groups, permutations=permutations, seed=seed)

    def _index(self, group: str | None) -> int:
        if group is None and len(self.groups) == 1:
            return 0
        if group not in self.groups:
            raise AnalysisError(f"no group {group!r} was tested: name one of {', '.join(map(repr, self.groups))}")
        return self.groups.index(group)

    def _measured(self) -> dict[str, np.ndarray]:
        columns = {"frequency": self.frequency, "tokens": self.effect.tokens}
        columns |= self.effect.columns("effect") | {"effect_adjusted_p": self.adjusted}
        return columns | self.total.columns("total") | {"total_adjusted_p": self.total_adjusted}

    def columns(self) -> dict[str, Any]:
        """A row per group, layer and expert tested, with effects, intervals, p-values and the frequency."""
        group, layer, expert = np.nonzero(~np.isnan(self.total.mean))
        keys = {"group": np.asarray(self.groups, object)[group], "layer": layer, "expert": expert}
        return keys | {name: values[group, layer, expert] for name, values in self._measured().items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        axes = {"groups": list(self.groups), "num_experts": list(self.num_experts), "loss": self.loss}
        return plain(axes | self._measured() | {"note": self.note})

    def tables(self) -> list[Table]:
        """The ten experts of largest total effect in any group."""
        strength = np.nan_to_num(np.abs(self.total.mean), nan=-1.0).reshape(-1)
        largest = np.argsort(-strength, kind="stable")[: min(_SHOWN, int((strength >= 0).sum()))]
        rows = []
        for g, layer, expert in zip(*np.unravel_index(largest, self.total.mean.shape), strict=True):
            at = (g, layer, expert)
            ends = interval(self.effect.low[at], self.effect.high[at])
            before, after = (self.frequency, self.effect.mean), (self.adjusted, self.total.mean)
            left, right = ([float(values[at]) for values in part] for part in (before, after))
            rows.append([self.groups[g], int(layer), int(expert), *left, ends, *right])
        tested = (~np.isnan(self.effect.p_value)).sum((1, 2))
        with np.errstate(invalid="ignore"):
            clear = (self.adjusted <= 0.05).sum((1, 2))
        counted = [f"{name} {c} of {n}" for name, c, n in zip(self.groups, clear, tested, strict=True)]
        note = f"experts with an adjusted p up to 0.05: {', '.join(counted)}"
        return [
            Table(
                ("group", "layer", "expert", "chosen by", "effect", "95 % interval", "adjusted p", "total effect"),
                rows,
                "Knock-outs: change of the loss, in nats per token that chose the expert, and per token (total)",
                "\n".join(part for part in (note, self.note) if part),
            )
        ]


def knockout(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    *,
    experts: Mapping[int, Iterable[int]] | None = None,
    layers: Iterable[int] | int | None = None,
    routed: RoutedModel | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: bool = False,
    kept: KeptRuns | None = None,
) -> Knockout:
    """Switch off one expert at a time, and measure the change of the loss by group.

    The effect of expert e of layer l on group g is ``E[loss(do(e off)) - loss]`` over the tokens t of g that chose e in
    layer l: the interventional counterpart of frequencies and their differences, of which arXiv 2606.10703 finds that
    none predicts it. The loss of token t is that of its prediction of token t + 1. ``do(e off)`` is
    ``Plan.forbid({l: [e]})`` for all tokens: the next best expert takes the slot. The total effect is the mean over all
    tokens, which includes those that are reached through attention.

    Intervals are a bootstrap over items, and p-values flip signs by item (``analysis.mean_effects``).

    Args:
        language_model: the model.
        texts: their groups are the groups of the result.
        experts: layer -> ids to switch off, such as an ``ExpertSelection``; by default all experts.
        layers: layers to test; by default all.
        routed: the attached model, if it is attached already.
        batch_size: rows that run together, each a text with one knock-out.
        max_length: as in ``LanguageModel.encode``.
        resamples, permutations, seed: of the intervals and tests.
        progress: show bars on standard error.
        kept: keeps every batch under a plan, so that a call that was interrupted goes on (``runs.lines.KeptRuns``).

    Raises ``PlanError`` for layers or experts that the model lacks, ``ValueError`` for texts without a predicted token,
    for an expert that is the only one of its layer, and for a ``routed`` of another model.
    """
    with TextRun(language_model, texts, routed, batch_size, max_length, progress, kept) as run:
        sizes = tuple(router.num_experts for router in run.routed.routers)
        tested = _tested(experts, None if layers is None else run.layers(layers), sizes)
        natural = run.natural()
        changes, counts = np.zeros((2, len(run.tokens), len(sizes), max(sizes), 2))  # tokens that chose it, all tokens
        plans = [Plan.forbid({layer: [expert]}) for layer, expert in tested]
        for number, text, nats in run.under(plans, "knock-outs"):
            layer, expert = tested[number]
            chose = (natural.ids[text][: len(nats), layer] == expert).any(1)
            change = nats - natural.nats[text]
            changes[text, layer, expert] = change[chose].sum(), change.sum()
            counts[text, layer, expert] = chose.sum(), len(nats)
    groups, effects = run.effects(changes, counts, resamples=resamples, permutations=permutations, seed=seed)
    effect, total = effects.part((..., 0)), effects.part((..., 1))
    adjusted, total_adjusted = (
        np.stack([benjamini_hochberg(of_group) for of_group in each.p_value]) for each in (effect, total)
    )
    frequency = np.divide(effect.tokens, total.tokens, out=np.full(total.tokens.shape, np.nan), where=total.tokens > 0)
    loss = run.loss_of(groups, [values.sum() for values in natural.nats])
    return Knockout(groups, sizes, effect, total, adjusted, total_adjusted, frequency, loss, run.texts.note)


def _tested(
    experts: Mapping[int, Iterable[int]] | None, layers: Sequence[int] | None, sizes: Sequence[int]
) -> list[tuple[int, int]]:
    """(layer, expert) of every knock-out."""
    asked: Mapping[int, Iterable[int]] = (
        {layer: range(size) for layer, size in enumerate(sizes)} if experts is None else experts
    )
    knocked_out = [
        (layer, int(expert))
        for layer in sorted(asked)
        if layers is None or layer in layers
        for expert in sorted(asked[layer])
    ]
    if not knocked_out:
        raise ValueError("there is no expert to switch off: name experts of the layers that are tested")
    for layer, expert in knocked_out:  # before the long run
        if not 0 <= layer < len(sizes):
            raise PlanError(f"there is no layer {layer}: the model has {len(sizes)} MoE layers, 0 to {len(sizes) - 1}")
        if not 0 <= expert < sizes[layer]:
            raise PlanError(f"layer {layer} has no expert {expert}: it has {sizes[layer]} experts, from 0")
    return knocked_out
