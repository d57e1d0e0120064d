"""How much more often a task's tokens choose each expert than a baseline's, with intervals over items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.bootstrap import RESAMPLES, t_of_normal
from moe_route.analysis.inputs import (
    AnalysisError,
    Frequencies,
    Statistics,
    as_array,
    check_one_model,
    group_index,
)
from moe_route.analysis.resampled_statistics import Sequences, draw_together
from moe_route.analysis.result import mean_of_seen, plain
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ExpertDifference", "expert_difference", "expert_difference_interval"]

_ROUNDING = 1e-12  # a difference that varies by less is constant
_SHOWN = 10


def _frequency(given: Frequencies, group: str | None, role: str, phase: str | None, by: str) -> np.ndarray:
    """Mean number of times that a token of the group chooses each expert, float64 [L, E]; arrays average over items."""
    if isinstance(given, Statistics):
        return given.frequency(phase, by)[group_index(given, group, role, phase)]
    values = as_array(given, f"the {role}")
    if values.ndim == 2:
        return values
    return mean_of_seen(values)[0]


def expert_difference(
    task: Frequencies,
    baseline: Frequencies,
    *,
    group: str | None = None,
    baseline_group: str | None = None,
    phase: str | None = None,
    by: str = "sequence",
) -> np.ndarray:
    """Difference in how often tokens choose each expert, task minus baseline [arXiv 2510.04694, eq. 3].

    ``Delta = mean_i(a_i / L_i | task) - mean_j(a_j / L_j | baseline)``, in [-1, 1].

    Args:
        task, baseline: ``RoutingStatistics``, or frequencies [L, E] or [sequence, L, E] (each in [0, 1]).
        group: the group of the task, if the statistics hold several; also that of the baseline unless
            ``baseline_group`` is given.
        phase: "prefill", "decode" or both.
        by: mean over "sequence" (the paper's) or "token".

    Returns float64 [L, E], NaN in layers without tokens, 0 for padding experts.
    """
    ours = _frequency(task, group, "task group", phase, by)
    theirs = _frequency(baseline, _other_group(baseline, group, baseline_group), "baseline group", phase, by)
    if isinstance(task, Statistics) and isinstance(baseline, Statistics):
        if task.num_experts != baseline.num_experts:
            raise AnalysisError(
                "task and baseline come from models with other numbers of experts: record both with one model"
            )
        check_one_model(task, baseline)
    if ours.shape != theirs.shape:
        raise AnalysisError(
            f"task and baseline have shapes {list(ours.shape)} and {list(theirs.shape)}: give the same layers"
        )
    return ours - theirs


def _other_group(baseline: Frequencies, group: str | None, baseline_group: str | None) -> str | None:
    if baseline_group is not None or not isinstance(baseline, Statistics):
        return baseline_group
    return group if len(baseline.groups) > 1 else None


@dataclass(frozen=True, eq=False, repr=False)
class ExpertDifference(ShownAsTables):
    """Difference in how often tokens choose each expert, with intervals and p-values from a bootstrap over items.

    Attributes:
        values: float64 [layer, expert], task minus baseline; NaN in layers without tokens.
        low, high: float64 [layer, expert], interval of each expert by itself.
        joint_low, joint_high: float64 [layer, expert], intervals that hold for all experts of all layers together.
        p_value: float64 [layer, expert], two-sided, of no difference, for each expert by itself.
        p_adjusted: float64 [layer, expert], the same, corrected for all experts of all layers.
        level: level of the intervals.
        items: number of items of the task and of the baseline.
        shared: number of items that both have, which are drawn together.
    """

    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    joint_low: np.ndarray
    joint_high: np.ndarray
    p_value: np.ndarray
    p_adjusted: np.ndarray
    level: float
    items: tuple[int, int]
    shared: int

    def _columns(self) -> dict[str, np.ndarray]:
        names = ("low", "high", "joint_low", "joint_high", "p_value", "p_adjusted")
        return {"difference": self.values, **{name: getattr(self, name) for name in names}}

    def to_pandas(self) -> pd.DataFrame:
        """A row per layer and expert."""
        layers, experts = self.values.shape
        columns = {name: values.reshape(-1) for name, values in self._columns().items()}
        return data_frame(columns, {"layer": range(layers), "expert": range(experts)})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        about = {"level": self.level, "items": list(self.items), "shared": self.shared}
        return plain({**self._columns(), **about})  # type: ignore[no-any-return]

    def tables(self) -> list[Table]:
        """The experts with the largest differences."""
        order = np.argsort(-np.abs(np.nan_to_num(self.values)), axis=None, kind="stable")[:_SHOWN]
        cells = [divmod(int(cell), self.values.shape[1]) for cell in order]
        rows: list[list[object]] = []
        for cell in cells:
            *ends, p, p_of_all = (float(values[cell]) for values in self._columns().values())
            rows.append([*cell, *ends, f"{p:.4f}", f"{p_of_all:.4f}"])
        head = ("layer", "expert", "difference", "low", "high", "joint low", "joint high", "p", "p (all experts)")
        title = f"Difference of frequency over {self.items[0]} and {self.items[1]} items ({self.shared} shared)"
        note = f"{self.level * 100:g} % intervals; joint: for all {self.values.size} experts together"
        return [Table(head, rows, f"{title}: the {len(rows)} largest", note)]


def expert_difference_interval(
    task: Frequencies,
    baseline: Frequencies,
    *,
    group: str | None = None,
    baseline_group: str | None = None,
    by: str = "sequence",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ExpertDifference:
    """``expert_difference`` with intervals and p-values from a bootstrap over items.

    Items are drawn with replacement. Items that task and baseline share, such as translations, are drawn together; if
    there are none, both are drawn independently. With ``t = |resampled - observed| / standard deviation`` of each
    expert, an interval reaches ``t``'s quantile to both sides. The quantile of the largest t of all experts gives the
    joint intervals, and its distribution the adjusted p-values (single-step max-T of Westfall and Young 1993). t is
    widened as Student's t is wider than a normal variable, by the smaller number of items.

    An expert whose difference is the same in every resample has an interval without width.

    Args:
        task, baseline, group, baseline_group, by: as in ``expert_difference``. Statistics need
            ``record(sequences=True)``; arrays must be [item, layer, expert], and their items are drawn independently.
        level: level of the intervals, in (0, 1).
        resamples: number of resamples; p-values are at least 1 / (resamples + 1).

    Raises ``AnalysisError`` for sequences that were not kept, and fewer than five items on either side.
    """
    if not 0 < level < 1:
        raise AnalysisError(f"level must lie between 0 and 1, not {level}")
    if resamples < 1:
        raise AnalysisError(f"resamples must be 1 or more, not {resamples}")
    values = expert_difference(task, baseline, group=group, baseline_group=baseline_group, by=by)
    ours = _sequences(task, group, "task")
    theirs = _sequences(baseline, _other_group(baseline, group, baseline_group), "baseline")
    drawn = draw_together([ours.items, theirs.items], resamples, seed)
    fewest = min(len(ours.items), len(theirs.items))
    spread, quantile, p_value = np.full((3, *values.shape), np.nan)
    reached, largest = np.full(values.shape, np.nan), np.zeros(resamples)
    for layer, value in enumerate(values):  # one layer at a time, to bound memory
        means = [_drawn_means(one, weights, layer, by) for one, weights in zip((ours, theirs), drawn, strict=True)]
        difference = means[0] - means[1]
        spread[layer] = difference.std(0)
        varies = spread[layer] > _ROUNDING
        scale = np.where(varies, spread[layer], 1.0)
        t = t_of_normal(np.where(varies, np.abs(difference - value), 0.0) / scale, fewest - 1)
        spread[layer] *= np.sqrt(fewest / (fewest - 1))
        constant = np.where(np.abs(value) > _ROUNDING, np.inf, 0.0)
        reached[layer] = np.where(varies, np.abs(value) / np.where(varies, spread[layer], 1.0), constant)
        quantile[layer] = np.quantile(t, level, axis=0)
        p_value[layer] = _share_of(t, reached[layer])
        largest = np.fmax(largest, t.max(1))
    undefined = np.isnan(spread)
    p_value[undefined] = np.nan
    p_adjusted = np.where(undefined, np.nan, _share_of(largest[:, None], reached.reshape(-1)).reshape(values.shape))
    half, joint = spread * quantile, spread * np.quantile(largest, level)
    return ExpertDifference(
        values,
        values - half,
        values + half,
        values - joint,
        values + joint,
        p_value,
        p_adjusted,
        level,
        (len(ours.items), len(theirs.items)),
        len(set(ours.items) & set(theirs.items)),
    )


def _sequences(given: Frequencies, group: str | None, role: str) -> Sequences:
    if isinstance(given, Statistics):
        name = given.groups[group_index(given, group, f"{role} group")]
        return Sequences.of_group(given, name, role)
    values = as_array(given, f"the {role}")
    if values.ndim != 3:
        raise AnalysisError(f"an interval needs the single items: give the {role} as [item, layer, expert]")
    return Sequences.of_array(values, role)


def _drawn_means(sequences: Sequences, drawn: np.ndarray, layer: int, by: str) -> np.ndarray:
    """Frequencies of one layer in every resample, float64 [resample, expert]; NaN without tokens."""
    terms, weights = sequences.terms(by)
    total, weight = drawn @ terms[:, layer], (drawn @ weights[:, layer])[:, None]
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)


def _share_of(resampled: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """p-values float64 [expert]: share of ``resampled`` [resample, expert or 1] that reaches ``reached`` [expert]."""
    ordered = np.sort(resampled, axis=0)
    columns = range(len(reached))
    below = [np.searchsorted(ordered[:, c % ordered.shape[1]], reached[c] - _ROUNDING) for c in columns]
    return (1 + len(ordered) - np.asarray(below)) / (len(ordered) + 1)
