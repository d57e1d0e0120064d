"""One forward call of a model: its shape, its tokens, its phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
"""Tokens that were given to a model, and tokens that it generated. Tables have one row of each per group."""


@dataclass(slots=True, eq=False)
class Call:
    """One forward call of the model. Tokens are numbered `b * length + s`."""

    batch: int
    length: int  # tokens per sequence
    past_length: int  # tokens per sequence that the cache holds already
    valid: Tensor | None  # bool [batch, length]: tokens that count; None: all of them. Padding does not count
    phase: Phase
    device: torch.device
    input_ids: Tensor | None = None  # token ids [batch, length]; None where embeddings were passed
    continues: bool = False  # runs on with the sequences of the call before it (a decoder after its encoder)
    mask: Tensor | None = None  # the attention mask, where it is a tensor
    position_ids: Tensor | None = None
    counter: Tensor | None = None  # length of a static cache, kept on the device: replays of a graph read it anew
    again: Tensor | None = None  # bool [batch, length]: real tokens that an earlier call ran already; not in `valid`
    prompt: int = 0  # the first columns that are prefill in a call that is otherwise decode
    denoises: bool = False  # the tokens are a block that a diffusion model runs anew at every step
    ahead: bool = False  # a vision tower runs now; the model is called with these tokens later
    drafted: int = 0  # the last columns are drafts of `generate`, which says afterwards how many were rejected
    beside: bool = False  # runs for a text without being part of it (an assistant's call, guidance): not counted

    def positions(self) -> Tensor:
        """int64 [batch or 1, length]: the place of each token in its sequence, padding not counted. To be asked before
        the model runs."""
        given, mask = self.position_ids, self.mask
        if given is not None and given.dim() == 2 and given.shape[1] == self.length:
            return given.to(torch.int64)
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= self.length:
            return (mask.bool().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - self.length :]
        here = torch.arange(self.length, device=self.device)[None]
        return here + (self.past_length if self.counter is None else self.counter)

    def tokens_before(self) -> Tensor:
        """int64 [batch or 1, length]: how many real tokens of its row come before each token.

        A trace calls this the position. Unlike `positions` it counts on where texts are packed into one row. To be
        asked before the model runs.
        """
        if self.past_length or self.counter is not None:
            return self.positions()
        if self.valid is None:
            return torch.arange(self.length, device=self.device)[None]
        real = self.valid if self.again is None else self.valid | self.again
        return (real.cumsum(1) - 1).clamp(min=0)
