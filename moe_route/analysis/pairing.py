"""Pair the sequences of groups by their items, such as a sentence and its translations."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from moe_route.analysis.inputs import NOT_KEPT, AnalysisError, Statistics

if TYPE_CHECKING:
    from moe_route.recording import SentenceVectors

__all__ = ["Pairing", "common_items", "paired_items"]

Pairing = Literal["paired", "pooled", "auto"]


def common_items(
    statistics: Statistics, groups: Sequence[str], pairing: str, min_common: float, phase: str | None, by: str
) -> list[Any] | None:
    """The items that every group has, by which to pair; None if divergence is to be pooled."""
    if pairing not in ("paired", "pooled", "auto"):
        raise AnalysisError(f'pairing must be "paired", "pooled" or "auto", not {pairing!r}')
    if not 0 < min_common <= 1:
        raise AnalysisError(f"min_common must be above 0 and at most 1, not {min_common}")
    if pairing == "pooled":
        return None
    try:
        return paired_items(statistics, groups, min_common, phase, by)
    except AnalysisError as error:
        if pairing == "paired":
            raise AnalysisError(
                f"no paired divergence: {error}; or pass pairing='pooled' (--pairing pooled), which estimates "
                "something else"
            ) from None
        warnings.warn(f"pooled divergence, not paired: {error}", stacklevel=3)
        return None


def paired_items(
    statistics: Statistics | SentenceVectors,
    groups: Sequence[str],
    min_common: float,
    phase: str | None = None,
    by: str = "sequence",
) -> list[Any]:
    """The items that every group has; raises ``AnalysisError`` with the reason if pairing is impossible."""
    store = statistics.store
    if store is None:
        raise AnalysisError(NOT_KEPT)
    if phase is not None:
        raise AnalysisError("kept sequences join prefill and decode: leave phase out")
    if by != "sequence":
        raise AnalysisError('pairs weigh sequences alike: leave by at "sequence"')
    items: list[Any] = store.paired_items(*groups)
    sequences = Counter(group for _, group in store)
    sizes = {group: sequences[group] for group in groups}
    largest = max(sizes, key=sizes.__getitem__)
    share = len(items) / max(sizes[largest], 1)
    if items and share >= min_common:
        return items
    shares = {group: len(store.paired_items(groups[0], group)) for group in groups[1:]}
    fewest = min(shares, key=shares.__getitem__)
    raise AnalysisError(
        f"{len(items)} items are common to all groups, {share:.0%} of the {sizes[largest]} sequences of {largest!r}, "
        f"and min_common asks for {min_common:.0%}; {fewest!r} has the fewest in common with {groups[0]!r} "
        f"({shares[fewest]}): give labels(items=...) one id for a sentence and its translations, leave groups out "
        "with groups=, or pass a smaller min_common"
    )
