"""Find the experts of a task as ESFT does, by token scores or gate scores [arXiv 2407.01906]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, Frequencies, Statistics, as_array, group_index, selection

if TYPE_CHECKING:
    from moe_route.steering import ExpertSelection

__all__ = ["esft_experts", "esft_scores"]

_ROUNDING = 1e-12  # larger than the rounding error of a float64 sum of shares
_PRINTED = 0.99  # scores printed with four decimals may add up to a little less


def esft_scores(statistics: Statistics, *, kind: str = "token", group: str | None = None) -> np.ndarray:
    """Scores by which ESFT selects the experts of a task, float64 [layer, expert]; NaN in layers without tokens.

    Args:
        statistics: ``RoutingStatistics`` of the task's texts.
        kind: "token": share of the selections that go to the expert, ``a / (k T)`` with T tokens, so that a layer sums
            to 1. "gate": mean weight of the expert over all tokens, ``sum of weights / T``, 0 where it was not chosen;
            a layer sums to the mean sum of a token's weights. It needs ``record(metrics=[..., "weight"])``.
        group: the group of the task; by default the only one.

    The expert scores that ESFT published are means over all tokens, as here; its paper averages over samples first.
    """
    row = group_index(statistics, group)
    if kind == "token":
        return statistics.mean_distribution("count", None, "token")[row]
    if kind != "gate":
        raise AnalysisError(f'ESFT scores are of kind "token" or "gate", not {kind!r}')
    tokens = statistics.tokens()[row].astype(np.float64)[:, None]
    sums: Any = statistics  # weights are the one thing that the protocol does not ask for
    total = sums.token_sum("weight")[row]
    return np.divide(total, tokens, out=np.full(total.shape, np.nan), where=tokens > 0)


def esft_experts(
    scores: Frequencies, *, top_p: float = 0.2, kind: str = "token", group: str | None = None
) -> ExpertSelection:
    """Select ESFT's experts of a task: in each layer the fewest, most used first, whose scores add up to ``top_p``.

    Args:
        scores: scores [layer, expert], or ``RoutingStatistics``, of which ``esft_scores`` are taken.
        top_p: sum of scores to reach, in (0, 1]; ESFT uses 0.2 with token scores and 0.1 with gate scores.
        kind, group: as in ``esft_scores``, for statistics.

    Raises ``AnalysisError`` if the scores of a layer do not add up to ``top_p``.
    """
    if not 0 < top_p <= 1:
        raise AnalysisError(f"top_p must be above 0 and at most 1, not {top_p}")
    if isinstance(scores, Statistics):
        values = esft_scores(scores, kind=kind, group=group)
    else:
        values = as_array(scores, "the scores")
    if values.ndim != 2:
        raise AnalysisError("ESFT scores must be [layer, expert]")
    known = np.nan_to_num(values)
    total = known.sum(-1)
    short = np.flatnonzero((total > 0) & (total < top_p * _PRINTED))
    if short.size:
        raise AnalysisError(
            f"the scores of layer {short[0]} add up to {total[short[0]]:.3g}, less than top_p {top_p:g}: pass a "
            "smaller top_p, or scores divided by their sum"
        )
    order = np.argsort(-known, axis=-1, kind="stable")
    reached = np.cumsum(np.take_along_axis(known, order, -1), -1)
    before = np.concatenate([np.zeros((len(values), 1)), reached[:, :-1]], axis=1)
    chosen = np.zeros(values.shape, dtype=bool)
    # 0.7 + 0.1 is below 0.8 by a rounding error only, and counts as reaching it
    np.put_along_axis(chosen, order, before < top_p - _ROUNDING, axis=-1)
    chosen &= known > 0
    text = f"ESFT experts{'' if group is None else f' of {group}'}, top_p {top_p:g}"
    return selection(chosen, values, scores, threshold=top_p, description=text)
