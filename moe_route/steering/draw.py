"""Counter-based random permutations and Gumbel noise (SplitMix64), reproducible across devices and batch splits.

A draw depends on the seed, the layer, and the token (its position in the sequence and its id). It depends neither on
the state of a generator nor on the rest of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gumbel_noise", "permutations", "stream_of", "token_counter"]

# constants of SplitMix64, as signed numbers
_FIRST, _SECOND, _STEP = (c - (1 << 64) for c in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def token_counter(position: Tensor, token_ids: Tensor | None) -> Tensor:
    """int64: a number per token, made of its position and, if known, its id. The two shapes must broadcast."""
    counter = position.to(torch.int64) << 32
    return counter if token_ids is None else counter | (token_ids.to(torch.int64) & 0xFFFFFFFF)


def permutations(seed: int, layer: int, counter: Tensor, num_experts: int) -> Tensor:
    """int64 [T, E]: a permutation of the experts for each token of ``counter`` [T].

    Indexing a table by it moves any set of n experts onto a uniformly random set of n experts.
    """
    return _random_bits(stream_of(seed, layer), counter, num_experts).argsort(dim=1, stable=True)


def gumbel_noise(stream: Tensor, counter: Tensor, num_experts: int) -> Tensor:
    """float64 [T, E]: independent draws of the standard Gumbel distribution, ``-log(-log(u))``.

    ``stream`` int64 [T] is each token's ``stream_of(seed, layer)``, and ``counter`` int64 [T] its number.
    """
    # 52 random bits and a half are a float64 without rounding, strictly between 0 and 1 after scaling
    bits = _shifted(_random_bits(stream, counter, num_experts), 12)
    return -(-((bits.double() + 0.5) * 2.0**-52).log()).log()


def stream_of(seed: int, layer: int) -> int:
    """Seed and layer mixed into 64 bits, as a signed number."""
    bits = (seed * 0xD1342543DE82EF95 + (layer + 1) * 0x9E3779B97F4A7C15) & ((1 << 64) - 1)
    return bits - (1 << 64) if bits >> 63 else bits


def _random_bits(stream: int | Tensor, counter: Tensor, num_experts: int) -> Tensor:
    """int64 [T, E]: 64 random bits for each token and expert."""
    experts = torch.arange(1, num_experts + 1, device=counter.device) * _STEP
    return _mixed(_mixed(counter ^ stream)[:, None] + experts)


def _mixed(bits: Tensor) -> Tensor:
    """The final step of SplitMix64; int64 wraps around like its unsigned counterpart."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Shift to the right, filling with zeros."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
