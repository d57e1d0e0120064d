"""Mean effects per token of a change to a model, with bootstrap intervals and permutation tests over items."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from moe_route.analysis.bootstrap import RESAMPLES, draw_items, interval_of
from moe_route.analysis.inputs import AnalysisError, check_draws

__all__ = ["PERMUTATIONS", "Effects", "effects_by_group", "mean_effects"]

PERMUTATIONS = 10_000
_ARRAYS = ("mean", "low", "high", "p_value", "tokens", "items")
_BLOCK = 1 << 22  # largest number of resampled values at a time


@dataclass(frozen=True, eq=False)
class Effects:
    """Mean effects per token, in arrays of one shape.

    Attributes:
        mean: float64, sum of the changes over their number of tokens; NaN without tokens.
        low, high: ends of the bootstrap interval over items; NaN with fewer than two items.
        p_value: two-sided, of no change, by flipping the sign of each item's change; NaN without tokens.
        tokens: float64, number of tokens (of whatever the changes were divided by).
        items: int64, number of items with a token.
        level: level of the interval.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray
    tokens: np.ndarray
    items: np.ndarray
    level: float = 0.95

    def part(self, index: Any) -> Effects:
        """The effects at an index of the arrays."""
        return _effects((getattr(self, name)[index] for name in _ARRAYS), self.level)

    def columns(self, name: str) -> dict[str, np.ndarray]:
        """The arrays by the names that results give them: ``name``, ``name_low``, ``name_high``, ``name_p``."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high, f"{name}_p": self.p_value}


def mean_effects(
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Effects:
    """Compute ``sum of sums / sum of counts`` over items, with its interval and the p-value of no effect.

    The interval is a bootstrap over items of the ratio (see ``bootstrap.interval_of``). Resamples without a token are
    left out. The p-value compares the absolute sum with those after random changes of the items' signs. If there are no
    more than ``permutations`` such changes, all are used.

    Args:
        sums, counts: float [items, ...]: each item's summed change, and its number of tokens (0: nothing measured).
        level: level of the interval.
        resamples, permutations, seed: of the bootstrap and of the test.

    Raises ``AnalysisError`` for no items, shapes that differ, negative counts, and values that are not finite.
    """
    sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if sums.shape != counts.shape or not sums.shape or not len(sums):
        raise AnalysisError(f"sums and counts are [items, ...] alike, not {list(sums.shape)} and {list(counts.shape)}")
    if not (np.isfinite(sums).all() and np.isfinite(counts).all()):
        raise AnalysisError("sums and counts must be finite: give items without a measurement the count 0")
    if (counts < 0).any():
        raise AnalysisError("counts must be 0 or more")
    check_draws(permutations, "permutations")
    flat_sums, flat_counts = sums.reshape(len(sums), -1), counts.reshape(len(sums), -1)
    total, tokens = flat_sums.sum(0), flat_counts.sum(0)
    items = (flat_counts > 0).sum(0)
    low, high, p_value = np.full((3, len(total)), np.nan)
    weights, (signs, exact) = draw_items(len(sums), resamples, seed), _signs(len(sums), permutations, seed)
    for cells in _blocks(len(total), max(resamples, len(signs))):
        here = slice(cells.start, cells.stop)
        drawn_tokens = weights @ flat_counts[:, here]
        drawn = np.full(drawn_tokens.shape, np.nan)
        np.divide(weights @ flat_sums[:, here], drawn_tokens, out=drawn, where=drawn_tokens > 0)
        low[here], high[here] = _intervals(drawn, items[here], level)
        reached = (np.abs(signs @ flat_sums[:, here]) >= np.abs(total[here]) * (1 - 1e-12)).sum(0)
        # with random signs, the observed ones count too
        p_value[here] = reached / len(signs) if exact else (reached + 1) / (len(signs) + 1)
    p_value[tokens == 0] = np.nan
    mean = np.divide(total, tokens, out=np.full(len(total), np.nan), where=tokens > 0)
    arrays = (mean, low, high, p_value, tokens, items)
    return _effects((array.reshape(sums.shape[1:]) for array in arrays), level)


def effects_by_group(
    groups: Sequence[str],
    items: Sequence[Hashable],
    sums: np.ndarray,
    counts: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> tuple[tuple[str, ...], Effects]:
    """Compute ``mean_effects`` of the texts of each group; texts of one item are added up.

    Args:
        groups, items: group and item of each of n texts.
        sums, counts: float [n, ...].

    Returns:
        the G groups in the order of their first text, and effects of shape [G, ...].
    """
    if not len(groups) == len(items) == len(sums) or np.shape(sums) != np.shape(counts):
        raise AnalysisError("give a group and an item for each text, and sums and counts of one shape")
    names = tuple(dict.fromkeys(groups))
    found = []
    for name in names:
        texts = [i for i, group in enumerate(groups) if group == name]
        place = {item: at for at, item in enumerate(dict.fromkeys(items[i] for i in texts))}
        at = [place[items[i]] for i in texts]
        added = np.zeros((2, len(place), *np.shape(sums)[1:]))
        for target, values in zip(added, (np.asarray(sums, np.float64), np.asarray(counts, np.float64)), strict=True):
            np.add.at(target, at, values[texts])
        found.append(mean_effects(*added, level=level, resamples=resamples, permutations=permutations, seed=seed))
    if not found:
        raise AnalysisError("there are no texts: name languages that the corpus has")
    stacked = (np.stack([getattr(effects, name) for effects in found]) for name in _ARRAYS)
    return names, _effects(stacked, level)


def _effects(arrays: Iterable[np.ndarray], level: float) -> Effects:
    """Effects of arrays in the order of ``_ARRAYS``."""
    mean, low, high, p_value, tokens, items = arrays
    return Effects(mean, low, high, p_value, tokens, items, level)


def _signs(items: int, draws: int, seed: int) -> tuple[np.ndarray, bool]:
    """Signs of the items, float64 [number, items], and whether these are all combinations."""
    if 2**items <= draws:
        return np.array(list(product((1.0, -1.0), repeat=items))), True
    return np.random.default_rng(seed).choice((1.0, -1.0), (draws, items)), False


def _blocks(cells: int, rows: int) -> Iterator[range]:
    step = max(1, _BLOCK // rows)
    yield from (range(first, min(first + step, cells)) for first in range(0, cells, step))


def _intervals(drawn: np.ndarray, items: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval of each column of resampled values [resamples, cells], for its number of items."""
    low, high = np.full((2, drawn.shape[1]), np.nan)
    undefined = np.isnan(drawn).any(0)
    for number in np.unique(items[items > 1]):
        cells = np.flatnonzero((items == number) & ~undefined)
        low[cells], high[cells] = interval_of(drawn[:, cells], int(number), level)
    for cell in np.flatnonzero(undefined & (items > 1)):
        values = drawn[~np.isnan(drawn[:, cell]), cell]
        low[cell], high[cell] = interval_of(values, int(items[cell]), level)
    return low, high
