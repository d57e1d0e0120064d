"""Loss of a model against the share of experts that it keeps, by criterion and language."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.effects import paired_difference
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.pruning import CRITERIA, prune
from moe_route.analysis.result import plain
from moe_route.base.table import ShownAsTables, Table, data_frame
from moe_route.experiments.runs import attached
from moe_route.steering import Plan

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.data.batches import EncodedTexts, Text
    from moe_route.recording import RoutingStatistics
    from moe_route.routed import RoutedModel
    from moe_route.runs.language_model import LanguageModel

__all__ = ["PruningCurve", "pruning_curve"]


@dataclass(frozen=True, eq=False, repr=False)
class PruningCurve(ShownAsTables):
    """Loss in nats per token by criterion, share of experts kept, and group; it is exact for the texts that ran.

    Attributes:
        loss: float64 [C, K, G], with the other experts forbidden.
        low, high: float64 [C, K, G], 95 % interval of ``loss - base`` for other texts; NaN for a single text.
        base: float64 [G], loss of the whole model.
        criteria, keep, groups: the axes.
        texts: int64 [G], number of texts per group.
    """

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray
    base: np.ndarray
    criteria: tuple[str, ...]
    keep: tuple[float, ...]
    groups: tuple[str, ...]
    texts: np.ndarray

    @property
    def increase(self) -> np.ndarray:
        """Loss minus that of the whole model, float64 [C, K, G]."""
        return self.loss - self.base

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (criterion, share kept, group)."""
        columns = {"loss": self.loss, "increase": self.increase, "low": self.low, "high": self.high}
        axes = {"criterion": self.criteria, "keep": self.keep, "group": self.groups}
        return data_frame({name: values.reshape(-1) for name, values in columns.items()}, axes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        axes = {"criteria": list(self.criteria), "keep": list(self.keep), "groups": list(self.groups)}
        values = {name: plain(getattr(self, name)) for name in ("loss", "increase", "low", "high", "base", "texts")}
        return {"unit": "nats per token", **axes, **values}

    def tables(self) -> list[Table]:
        whole = [["(whole)", 1.0, *map(float, self.base)]]
        rows = [
            [criterion, share, *map(float, self.loss[c, k])]
            for c, criterion in enumerate(self.criteria)
            for k, share in enumerate(self.keep)
        ]
        return [Table(("criterion", "kept", *self.groups), [*whole, *rows], "loss in nats per token")]


def pruning_curve(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    statistics: RoutingStatistics,
    *,
    criteria: Sequence[str] = ("reap", "frequency", "random"),
    keep: Sequence[float] = (0.75, 0.5, 0.25),
    group: str | None = None,
    reference: str | None = None,
    allocation: str = "uniform",
    seed: int = 0,
    routed: RoutedModel | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
) -> PruningCurve:
    """Measure the loss of texts while experts are pruned, by criterion and by share kept [arXiv 2605.28042].

    The experts of ``analysis.prune`` are forbidden (``Plan.forbid``), which gives the losses of the exported model
    (``export_pruned``). Measure on other texts than those of ``statistics``.

    Args:
        criteria, group, reference, allocation, seed: as in ``analysis.prune``; ``reference`` is for "difference".
        keep: shares of experts to keep.
        routed: the attached model, if it is attached already.
        batch_size, max_length: as in ``LanguageModel.losses``.
        progress: show a bar per run.

    Raises ``AnalysisError`` for what ``prune`` refuses, before the model runs.
    """
    unknown = [name for name in criteria if name not in CRITERIA]
    if unknown or not criteria or not keep:
        raise AnalysisError(f"criteria are some of {', '.join(CRITERIA)}, and keep some shares; not {list(criteria)}")
    with attached(language_model, routed) as routed:
        spec = routed.routers[0].spec
        options: dict[str, Any] = {"group": group, "allocation": allocation, "seed": seed}
        options |= {"n_group": spec.groups, "topk_group": spec.top_groups}
        dropped = [
            prune(
                statistics,
                keep=share,
                criterion=criterion,  # type: ignore[arg-type]
                reference=reference if criterion == "difference" else None,
                **options,
            )
            for criterion in criteria
            for share in keep
        ]
        encoded = language_model.encode(texts, max_length=max_length)
        losses = []
        for name, selection in zip(["whole", *_names(criteria, keep)], [None, *dropped], strict=True):
            with routed.steer(Plan.forbid(selection)) if selection else nullcontext():
                shown = name if progress else None
                losses.append(language_model.losses(encoded, batch_size=batch_size, progress=shown))
    return _curve(np.stack(losses), [text.group for text in encoded.texts], criteria, keep)


def _names(criteria: Sequence[str], keep: Sequence[float]) -> list[str]:
    return [f"{criterion}, {share:.0%}" for criterion in criteria for share in keep]


def _curve(losses: np.ndarray, of_text: Sequence[str], criteria: Sequence[str], keep: Sequence[float]) -> PruningCurve:
    """The curve from losses [1 + C * K, texts, 2], of which the first are those of the whole model."""
    groups = tuple(dict.fromkeys(of_text))
    labels = np.asarray(of_text, dtype=object)
    shape = (len(criteria), len(keep), len(groups))
    loss, low, high = np.empty((3, len(losses) - 1, len(groups)))
    base, texts = np.empty(len(groups)), np.empty(len(groups), np.int64)
    for g, group in enumerate(groups):
        mine = losses[:, labels == group]
        tokens = mine[0, :, 1]
        base[g], texts[g] = mine[0, :, 0].sum() / tokens.sum(), mine.shape[1]
        for run in range(1, len(losses)):
            change = paired_difference(mine[run, :, 0], mine[0, :, 0], tokens)
            loss[run - 1, g], low[run - 1, g], high[run - 1, g] = base[g] + change.value, change.low, change.high
    loss, low, high = (values.reshape(shape) for values in (loss, low, high))
    return PruningCurve(loss, low, high, base, tuple(criteria), tuple(keep), groups, texts)
