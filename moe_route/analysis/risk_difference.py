"""Find the experts of a behavior by risk difference, as SteerMoE does."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moe_route.analysis.expert_difference import expert_difference
from moe_route.analysis.expert_masks import first
from moe_route.analysis.inputs import AnalysisError, Frequencies, Statistics, selection
from moe_route.analysis.measures import places
from moe_route.analysis.result import plain
from moe_route.analysis.stability import stability_selection
from moe_route.recording.frames import data_frame

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.steering import ExpertSelection

__all__ = ["RiskExperts", "risk_experts"]


class RiskExperts(NamedTuple):
    """Experts to activate and to deactivate, and the risk differences [L, E] by which they were ranked."""

    activate: ExpertSelection
    deactivate: ExpertSelection
    values: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        both = {"activate": self.activate.to_dict(), "deactivate": self.deactivate.to_dict()}
        return both | {"values": plain(self.values)}

    def to_pandas(self) -> pd.DataFrame:
        """A row per layer and expert: risk difference ``value``, and ``choice``, "activate", "deactivate" or ""."""
        layer, expert = np.indices(self.values.shape).reshape(2, -1)
        choice = np.full(self.values.shape, "", object)
        for name in ("activate", "deactivate"):
            for number, experts in getattr(self, name).items():
                choice[number, list(experts)] = name
        columns = {"layer": layer, "expert": expert, "value": self.values.reshape(-1), "choice": choice.reshape(-1)}
        return data_frame(columns)

    def __repr__(self) -> str:
        return f"activate: {self.activate}\ndeactivate: {self.deactivate}"

    def _repr_html_(self) -> str:
        return "".join(
            f"<p>{name}</p>{found._repr_html_()}"
            for name, found in (("activate", self.activate), ("deactivate", self.deactivate))
        )


def risk_experts(
    positive: Frequencies,
    negative: Frequencies,
    *,
    top_n: int | None = None,
    activations: int | None = None,
    deactivations: int | None = None,
    per_layer: int | None = None,
    group: str | None = None,
    baseline_group: str | None = None,
    phase: str | None = None,
    resamples: int | None = None,
    keep: float = 0.8,
    seed: int = 0,
) -> RiskExperts:
    """Select SteerMoE's experts by risk difference, the difference of token-pooled frequencies [arXiv 2509.09660].

    Give either ``activations`` and ``deactivations``, as SteerMoE does (published settings are 15 and 0, or 5 and 480),
    or ``top_n``. These numbers are for all layers together. Activations beyond ``per_layer`` in a layer are then
    dropped without replacement, so fewer may remain.

    Args:
        positive, negative: routing on tokens that show the behavior and on tokens that do not (as in
            ``expert_difference``).
        top_n: number of experts with the largest absolute difference.
        activations: number of experts with the largest positive difference; none by default.
        deactivations: number of experts with the largest negative difference; none by default.
        per_layer: largest number of activations per layer; by default the layer's top-k, since no more can be forced
            on.
        resamples: select in this many resamples of the items, and keep the experts that are selected in a share of
            ``keep`` of them (``stability_selection``); their scores are these shares. Needs kept sequences.
        keep, seed: as in ``stability_selection``.

    Activated experts have a positive difference, deactivated ones a negative one. Ties go to the lower layer and
    expert. Raises ``AnalysisError`` if the numbers are given in neither of the two ways.
    """
    rule = partial(
        _of_all_items,
        top_n=top_n,
        activations=activations,
        deactivations=deactivations,
        per_layer=per_layer,
        group=group,
        baseline_group=baseline_group,
        phase=phase,
    )
    whole = rule(positive, negative)
    if resamples is None:
        return whole
    if not isinstance(positive, Statistics) or not isinstance(negative, Statistics):
        raise AnalysisError("resamples need statistics with kept sequences: record(sequences=True)")
    on, off = (
        stability_selection(one, positive, negative, resamples=resamples, keep=keep, seed=seed)
        for one in (lambda p, n: rule(p, n).activate, lambda p, n: rule(p, n).deactivate)
    )
    # resamples that activate different experts of a layer may together keep more than can be forced on
    room = places(on.share) < _activation_limits(positive, per_layer, len(on.share))[:, None]
    text = on.selection.description
    kept = selection((on.share >= keep) & room, on.share, positive, threshold=keep, description=text)
    return RiskExperts(kept, off.selection, whole.values)


def _of_all_items(
    positive: Frequencies,
    negative: Frequencies,
    *,
    top_n: int | None,
    activations: int | None,
    deactivations: int | None,
    per_layer: int | None,
    group: str | None,
    baseline_group: str | None,
    phase: str | None,
) -> RiskExperts:
    """``risk_experts`` without resamples."""
    values = expert_difference(positive, negative, group=group, baseline_group=baseline_group, phase=phase, by="token")
    limits = _activation_limits(positive, per_layer, len(values))
    signed = np.nan_to_num(values)
    if (top_n is None) == (activations is None and deactivations is None):
        raise AnalysisError("say how many experts in one of two ways: activations= and deactivations=, or top_n=")
    if top_n is None:
        on = first(signed, _count(activations or 0, "activations", 0))
        off = first(-signed, _count(deactivations or 0, "deactivations", 0))
        text = f"risk difference, {activations or 0} activations and {deactivations or 0} deactivations"
    else:
        largest = first(np.abs(signed), _count(top_n, "top_n", 1))
        on, off = largest & (signed > 0), largest & (signed < 0)
        text = f"risk difference, {top_n} largest"
    on &= places(signed) < limits[:, None]
    raised, lowered = (selection(part, values, positive, threshold=None, description=text) for part in (on, off))
    return RiskExperts(raised, lowered, values)


def _count(number: int, name: str, least: int) -> int:
    if number < least:
        raise AnalysisError(f"{name} must be {least} or more, not {number}")
    return number


def _activation_limits(given: Frequencies, per_layer: int | None, layers: int) -> np.ndarray:
    if per_layer is not None:
        return np.full(layers, _count(per_layer, "per_layer", 0))
    if not isinstance(given, Statistics):
        raise AnalysisError("per_layer is needed with arrays: the model's top-k")
    return np.asarray(given.top_k)
