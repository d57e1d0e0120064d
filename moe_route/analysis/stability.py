"""Whether a rule selects the same experts from other items: selections in resamples, and how alike they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, Statistics, selection
from moe_route.analysis.resampled_statistics import resampled_statistics
from moe_route.analysis.result import plain
from moe_route.recording.frames import data_frame
from moe_route.steering import ExpertSelection
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Stability", "stability_selection"]

_SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False)
class Stability(ShownAsTables):
    """How often a rule selects each expert when the items are drawn anew.

    Attributes:
        share: float64 [layer, expert], share of the resamples in which the expert is selected.
        selection: the experts with a share of ``keep`` or more; their scores are the shares.
        whole: the rule's selection from all items.
        jaccard: mean Jaccard index of the selections of two resamples; two empty ones count as equal.
        sizes: int64 [resample], number of experts selected.
        keep: smallest share that is kept.
    """

    share: np.ndarray
    selection: ExpertSelection
    whole: ExpertSelection
    jaccard: float
    sizes: np.ndarray
    keep: float

    @property
    def resamples(self) -> int:
        """Number of resamples."""
        return len(self.sizes)

    def to_pandas(self) -> pd.DataFrame:
        """A row per expert that any resample or the whole recording selects."""
        cells, whole, kept = self._cells(), set(self.whole.pairs), set(self.selection.pairs)
        columns = {
            "layer": [layer for layer, _ in cells],
            "expert": [expert for _, expert in cells],
            "share": [float(self.share[cell]) for cell in cells],
            "whole": [cell in whole for cell in cells],
            "kept": [cell in kept for cell in cells],
        }
        return data_frame(columns)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {
            "share": plain(self.share),
            "selection": self.selection.to_dict(),
            "whole": self.whole.to_dict(),
            "jaccard": self.jaccard,
            "sizes": plain(self.sizes),
            "keep": self.keep,
        }

    def _cells(self) -> list[tuple[int, int]]:
        """Experts that are selected at all, from the most often selected to the least."""
        cells = {(int(layer), int(expert)) for layer, expert in np.argwhere(self.share > 0)} | set(self.whole.pairs)
        return sorted(cells, key=lambda cell: (-self.share[cell], cell))

    def tables(self) -> list[Table]:
        cells, whole = self._cells(), set(self.whole.pairs)
        rows = [[*cell, float(self.share[cell]), "yes" if cell in whole else "no"] for cell in cells[:_SHOWN]]
        title = (
            f"{len(self.selection)} experts are selected in {self.keep:.0%} or more of {self.resamples} resamples; "
            f"{len(self.whole)} from all items"
        )
        sizes = f"{self.sizes.min()} to {self.sizes.max()} experts a resample"
        more = f"; and {len(cells) - _SHOWN} more experts" if len(cells) > _SHOWN else ""
        note = f"mean Jaccard index of two resamples {self.jaccard:.3f}; {sizes}{more}"
        return [Table(("layer", "expert", "share", "from all items"), rows, title, note)]


def stability_selection(
    rule: Callable[..., ExpertSelection],
    *statistics: Statistics,
    resamples: int = 100,
    keep: float = 0.8,
    seed: int = 0,
) -> Stability:
    """Select the experts that a rule selects in most resamples of the items, as SAFEx does [arXiv 2506.17368].

    In each resample, the items of all groups are drawn with replacement. An item that several groups have, such as a
    sentence and its translations, is drawn for all of them together, also in different statistics.

    Args:
        rule: takes as many statistics as are given here, and returns a selection; for example
            ``lambda task, general: task_experts(task, general, group="eng_Latn", threshold=0.3)``.
        statistics: recorded with ``record(sequences=True)``; at least five items in each group.
        resamples: number of resamples.
        keep: smallest share of the resamples in which a kept expert is selected, above 0 and at most 1.

    Raises ``AnalysisError`` for sequences that were not kept, too few items, and a rule that gives no selection.
    """
    if not 0 < keep <= 1:
        raise AnalysisError(f"keep must be above 0 and at most 1, not {keep}")
    if not statistics:
        raise AnalysisError("pass the statistics that the rule takes, after the rule")
    if resamples < 2:
        raise AnalysisError(f"resamples must be 2 or more, not {resamples}")
    whole = _selected(rule, statistics)
    shape = (len(statistics[0].num_experts), max(statistics[0].num_experts))
    drawn = np.zeros((resamples, *shape), dtype=bool)
    for chosen, resampled in zip(drawn, resampled_statistics(statistics, resamples, seed), strict=True):
        for cell in _selected(rule, resampled).pairs:
            chosen[cell] = True
    share = drawn.mean(0)
    text = f"in {keep:.0%} of {resamples} resamples: {whole.description or 'a rule'}"
    kept = selection(share >= keep, share, statistics[0], threshold=keep, description=text)
    return Stability(share, kept, whole, _mean_jaccard(drawn), drawn.sum((1, 2)), keep)


def _selected(rule: Callable[..., ExpertSelection], statistics: tuple[Any, ...]) -> ExpertSelection:
    found = rule(*statistics)
    if not isinstance(found, ExpertSelection):
        raise AnalysisError(
            f"the rule gave a {type(found).__name__}, not a selection: take one of its selections, such as "
            "result['swh_Latn'] or result.activate"
        )
    return found


def _mean_jaccard(drawn: np.ndarray) -> float:
    """Mean over pairs of resamples of |A & B| / |A | B|; 1 for two empty sets."""
    chosen = drawn.reshape(len(drawn), -1).astype(np.float64)
    both = chosen @ chosen.T
    sizes = np.diag(both)
    either = sizes[:, None] + sizes - both
    index = np.divide(both, either, out=np.ones(both.shape), where=either > 0)
    return float(index[np.triu_indices(len(drawn), 1)].mean())
