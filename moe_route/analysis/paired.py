"""Whether a change of the loss is more than the choice of texts: a paired bootstrap over items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Difference", "paired_difference"]

RESAMPLES = 4000


@dataclass(frozen=True)
class Difference:
    """Mean change of the loss, nats a token, with the 95 % interval of a paired bootstrap over items; NaN ends where
    there was a single item, whose change says nothing of others."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.low:+.4f}, {self.high:+.4f}] ({self.verdict})"

    @property
    def verdict(self) -> str:
        """ "lower", "higher", or "unclear" where the interval holds zero or there is none."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "unclear"


def paired_difference(
    nats: np.ndarray, base: np.ndarray, tokens: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Change of the loss per token between two runs over the same texts, with its 95 % percentile bootstrap interval.

    Arrays are [items] or [items, languages]: summed loss of a text under the plan and without it, and its number of
    predicted tokens. Items are drawn with replacement, all languages of an item together, since they are translations
    of one another. With several languages the value is the mean over languages.
    """
    nats, base, tokens = (np.atleast_2d(np.asarray(a, float).T).T for a in (nats, base, tokens))
    change = nats - base
    value = float((change.sum(0) / tokens.sum(0)).mean())
    if len(change) < 2:
        return Difference(value, float("nan"), float("nan"))
    drawn = np.random.default_rng(seed).integers(0, len(change), (resamples, len(change)))
    means = (change[drawn].sum(1) / tokens[drawn].sum(1)).mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(value, float(low), float(high))
