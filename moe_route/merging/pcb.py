"""PCB merging: parameters compete within a model and between models (arXiv 2410.02396).

The differences of a model from its base are one long row of N numbers. The method needs order statistics of that row,
so every tensor is read six times: once to count, twice for those of the sizes, twice for those of the scores, and once
to merge. They are found exactly, by counting the high and then the low 16 bits of float32 numbers; only one tensor of
each model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Scores", "order_statistics", "pcb_scores"]

_CLAMPED = 1e-4  # share of the sizes that is clamped at each end
_HALF = 1 << 16


@dataclass(frozen=True)
class Scores:
    """What the merge of a tensor needs to know of the whole model; each is float32 [models, 1]."""

    low: Tensor  # sizes of differences are clamped to low and high
    high: Tensor
    least: Tensor  # scores below are set to it
    greatest: Tensor

    def merge(self, differences: Tensor) -> Tensor:
        """[models, n] -> [n]: the merged difference, where no score is above the least zero."""
        sizes = differences.abs().clamp(self.low, self.high)
        scores = _scaled(torch.maximum(_raw(differences, self.low, self.high), self.least), self.least, self.greatest)
        return (differences.sign() * sizes * scores).sum(0) / scores.sum(0).clamp(min=1e-12)


def pcb_scores(read: Callable[[], Iterable[Tensor]], ratio: float) -> Scores:
    """Thresholds of the merge of all differences; ``read`` yields them in portions, float32 [models, n]."""
    total = sum(portion.shape[1] for portion in read())
    low, high = order_statistics(
        lambda: (portion.abs() for portion in read()), [int(total * _CLAMPED), int(total * (1 - _CLAMPED) - 1)]
    )
    place = min(int(total * (1 - ratio)), total - 1)
    least, greatest = order_statistics(lambda: (_raw(portion, low, high) for portion in read()), [place, total - 1])
    return Scores(low, high, least, greatest)


def _raw(differences: Tensor, low: Tensor, high: Tensor) -> Tensor:
    sizes = _scaled(differences.abs().clamp(low, high), low, high)
    return (len(differences) * sizes.square()).exp() * (differences * differences.sum(0)).tanh()


def _scaled(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(high > low, (values - low) / (high - low), 0.0)


def order_statistics(read: Callable[[], Iterable[Tensor]], places: list[int]) -> list[Tensor]:
    """The values at some places of every sorted row, each float32 [rows, 1].

    ``read`` yields the rows in portions, float32 [rows, n], and is called twice.
    """
    high: dict[int, Tensor] = {}
    for portion in read():
        for row, values in enumerate(portion):
            high[row] = high.get(row, 0) + torch.bincount(_keys(values) >> 16, minlength=_HALF)
    buckets = {(row, place): _place(counts, place) for row, counts in high.items() for place in places}
    low = {(row, bucket): torch.zeros(_HALF, dtype=torch.int64) for (row, _), (bucket, _) in buckets.items()}
    for portion in read():
        for row, values in enumerate(portion):
            keys = _keys(values)
            for of_row, bucket in low:
                if of_row == row:
                    low[row, bucket] += torch.bincount(keys[keys >> 16 == bucket] & (_HALF - 1), minlength=_HALF)
    found = {key: bucket << 16 | _place(low[key[0], bucket], rest)[0] for key, (bucket, rest) in buckets.items()}
    return [_values(torch.tensor([found[row, place] for row in high]))[:, None] for place in places]


def _place(counts: Tensor, place: int) -> tuple[int, int]:
    """The bucket that holds the place of a sorted list, and the place within the bucket."""
    upto = counts.cumsum(0)
    bucket = int(torch.searchsorted(upto, place, right=True))
    return bucket, place - (int(upto[bucket - 1]) if bucket else 0)


def _keys(values: Tensor) -> Tensor:
    """int64 in [0, 2^32) that order as the float32 numbers do."""
    bits = (values.contiguous() + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def _values(keys: Tensor) -> Tensor:
    bits = torch.where(keys < 1 << 31, -1 - keys, keys - (1 << 31))
    return bits.to(torch.int32).view(torch.float32)
