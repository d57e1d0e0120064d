"""Tests of a change of the loss: against the choice of texts, and against steering random experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moe_route.analysis.bootstrap import RESAMPLES, draw_items, interval_of, p_value_of
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.result import plain
from moe_route.texttable import interval

__all__ = ["Difference", "RandomControl", "paired_difference", "random_control"]


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
