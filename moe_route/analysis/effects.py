"""Effects per token of a change to a model: differences, random controls, and means with intervals and tests."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError, check_draws
from moe_route.analysis.measures import ratio
from moe_route.analysis.result import plain
from moe_route.analysis.stats import RESAMPLES, draw_items, interval_of, p_value_of
from moe_route.base.table import interval

# ---- tests of a change of the loss: against the choice of texts, and against steering random experts


@dataclass(frozen=True, repr=False)
class Difference:
    """A difference of two means over the same items, with its 95 % interval from a paired bootstrap over items.

    Differences of losses are in nats per token. ``p_value`` is the two-sided p-value of the same bootstrap, for
    corrections over many differences (``analysis.holm``). Interval and p-value are NaN with a single item, whose
    difference says nothing about others.
    """

    value: float
    low: float
    high: float
    p_value: float = float("nan")

    @classmethod
    def of(cls, value: float, resampled: np.ndarray, items: int) -> Difference:
        """A value with the interval and the p-value of its ``resampled`` values [resamples], from so many items."""
        low, high = interval_of(resampled, items, 0.95)
        return cls(value, float(low), float(high), p_value_of(resampled, items))

    def __str__(self) -> str:
        ends = interval(self.low, self.high, digits=4, none="no interval")
        return f"{self.value:+.4f} {ends} ({self.verdict})"

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content with the verdict (NaN as None)."""
        return plain({**asdict(self), "verdict": self.verdict})

    @property
    def verdict(self) -> str:
        """ "lower", "higher", or "unclear" if the interval contains zero or does not exist."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "unclear"


def paired_difference(
    nats: np.ndarray, base: np.ndarray, tokens: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Change of the loss per token between two runs on the same texts, with its 95 % bootstrap interval.

    Arrays are [items] or [items, languages]: the summed loss of a text with the plan (``nats``) and without it
    (``base``), and its number of predicted tokens. Items are drawn with replacement, with all languages of an item
    together, because they are translations of one another. With several languages the value is the mean over languages.

    Raises ``AnalysisError`` for shapes that differ, values that are not finite, and a language without a token.
    """
    nats, base, tokens = _checked(nats, base, tokens)
    weights = draw_items(len(tokens), resamples, seed)
    change = nats - base
    return Difference.of(
        float(_per_token(change.sum(0), tokens.sum(0))),
        _per_token(weights @ change, weights @ tokens),
        len(tokens),
    )


@dataclass(frozen=True, repr=False)
class RandomControl:
    """Comparison of a plan with the same plan on random experts, such as of losses in nats per token.

    Attributes:
        plan: change by the plan, against no plan.
        random: change by each random set of experts, against no plan.
        difference: the plan's change minus the mean of the random ones. Its 95 % interval holds for other items and, if
            random sets were drawn, for other draws.
        enumerated: whether ``random`` are all other sets of experts, not draws.
        larger: whether larger changes are the stronger effect; by default smaller ones are, as of losses.
    """

    plan: float
    random: tuple[float, ...]
    difference: Difference
    enumerated: bool
    larger: bool = False

    @property
    def rank(self) -> int:
        """Rank of the plan among itself and the random sets, 1 for the strongest effect; ties count against it."""
        return 1 + sum(change >= self.plan if self.larger else change <= self.plan for change in self.random)

    @property
    def p_value(self) -> float:
        """One-sided p-value: probability that a random set has as strong an effect as the plan.

        It is rank / (number of random sets + 1), so at least 1 / (number + 1).
        """
        return self.rank / (len(self.random) + 1)

    @property
    def strongest(self) -> float:
        """The strongest effect of a random set."""
        return max(self.random) if self.larger else min(self.random)

    def __repr__(self) -> str:
        sets = f"all {len(self.random)} other sets" if self.enumerated else f"{len(self.random)} random sets"
        return (
            f"{self.plan:+.4f} nats per token, rank {self.rank} among {sets} of experts (p = {self.p_value:.3f}); "
            f"minus their mean: {self.difference}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return plain(
            {
                "plan": self.plan,
                "random": self.random,
                "enumerated": self.enumerated,
                "larger": self.larger,
                "difference": self.difference.to_dict(),
                "rank": self.rank,
                "p_value": self.p_value,
            }
        )


def random_control(
    nats: np.ndarray,
    random: np.ndarray,
    base: np.ndarray,
    tokens: np.ndarray,
    *,
    enumerated: bool = False,
    larger: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RandomControl:
    """Compare a plan with the same plan on random experts, on the same texts.

    Args:
        nats, base, tokens: as in ``paired_difference``: losses with the plan and without, and predicted tokens.
        random: summed loss of every text under each random set of experts, [sets, items] or [sets, items, languages].
        enumerated: whether ``random`` are all other sets of experts. If not, they are draws, and the interval holds for
            other draws too: sets are drawn with replacement, independently of the items.
        larger: whether larger changes are the stronger effect, as of exact match; by default smaller ones are.

    Raises ``AnalysisError`` if there is no random set, and as ``paired_difference`` does.
    """
    given, shape = np.asarray(random, float), np.shape(tokens)
    nats, base, tokens = _checked(nats, base, tokens)
    if not len(given):
        raise AnalysisError("there is no random set to compare with: measure the plan on other experts of its layers")
    if given.shape[1:] != shape or not np.isfinite(given).all():
        raise AnalysisError(f"random must be finite, of shape [sets, {str(list(shape))[1:]}, not {list(given.shape)}")
    sets = given.reshape(-1, *tokens.shape)
    of_items = draw_items(len(tokens), resamples, seed)
    of_sets = np.ones((resamples, len(sets))) if enumerated else draw_items(len(sets), resamples, seed + 1)
    tokens_drawn = of_items @ tokens
    plan = _per_token(of_items @ (nats - base), tokens_drawn)
    others = np.stack([_per_token(of_items @ (one - base), tokens_drawn) for one in sets], axis=1)
    drawn = plan - (of_sets * others).sum(1) / of_sets.sum(1)
    fewest = len(tokens) if enumerated else min(len(tokens), len(sets))
    change = float(_per_token((nats - base).sum(0), tokens.sum(0)))
    changes = tuple(_per_token((sets - base).sum(1), tokens.sum(0)).tolist())
    difference = Difference.of(change - float(np.mean(changes)), drawn, fewest)
    return RandomControl(change, changes, difference, enumerated, larger)


def _checked(*given: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses with a plan and without, and tokens, float64 [items, languages] each."""
    nats, base, tokens = (np.asarray(one, float) for one in given)
    if not nats.shape == base.shape == tokens.shape or nats.ndim not in (1, 2) or not nats.size:
        raise AnalysisError(
            "losses and tokens are [items] or [items, languages] alike, not "
            f"{', '.join(str(list(one.shape)) for one in (nats, base, tokens))}"
        )
    if not all(np.isfinite(one).all() for one in (nats, base, tokens)):
        raise AnalysisError("losses and numbers of tokens must be finite: leave out texts that have none")
    if (tokens < 0).any() or not (tokens.sum(0) > 0).all():
        raise AnalysisError("no token was predicted, so there is no loss per token: give longer texts")
    shape = (len(nats), -1)
    return nats.reshape(shape), base.reshape(shape), tokens.reshape(shape)


def _per_token(nats: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Nats per token, averaged over languages (the last axis)."""
    return (nats / tokens).mean(-1)


# ---- mean effects per token, in arrays

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

    The interval is a bootstrap over items of the ratio (see ``stats.interval_of``). Resamples without a token are
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
    mean = ratio(total, tokens)
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
    by_group = []
    for name in names:
        texts = [i for i, group in enumerate(groups) if group == name]
        place = {item: at for at, item in enumerate(dict.fromkeys(items[i] for i in texts))}
        at = [place[items[i]] for i in texts]
        added = np.zeros((2, len(place), *np.shape(sums)[1:]))
        for target, values in zip(added, (np.asarray(sums, np.float64), np.asarray(counts, np.float64)), strict=True):
            np.add.at(target, at, values[texts])
        by_group.append(mean_effects(*added, level=level, resamples=resamples, permutations=permutations, seed=seed))
    if not by_group:
        raise AnalysisError("there are no texts: name languages that the corpus has")
    stacked = (np.stack([getattr(effects, name) for effects in by_group]) for name in _ARRAYS)
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
