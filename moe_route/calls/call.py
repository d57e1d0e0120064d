"""One forward call of a model: its shape, its tokens, its phase, the groups named for it, the logits it computes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
"""Prefill: tokens given to the model. Decode: tokens it generated. Tables have one row of each phase per group."""


@dataclass(slots=True, eq=False)
class Call:
    """One forward call of the model. Token s of sequence b has the number `b * length + s`."""

    batch: int
    length: int  # tokens per sequence in this call
    past_length: int  # tokens per sequence that the cache already holds
    valid: Tensor | None  # bool [batch, length]: tokens that count, padding excluded; None: all of them
    phase: Phase
    device: torch.device
    input_ids: Tensor | None = None  # token ids [batch, length]; None where embeddings were passed
    continues: bool = False  # belongs to the same sequences as the previous call (a decoder after its encoder)
    mask: Tensor | None = None  # the attention mask, if it is a tensor
    position_ids: Tensor | None = None
    counter: Tensor | None = None  # length of a static cache, kept on the device; replays of a CUDA graph read it again
    again: Tensor | None = None  # bool [batch, length]: real tokens that an earlier call already ran; not in `valid`
    prompt: int = 0  # number of leading columns that are prefill in a call that is otherwise decode
    denoises: bool = False  # the tokens are a block that a diffusion model runs again at every step
    ahead: bool = False  # a vision tower runs now, before the model is called with these tokens
    drafted: int = 0  # number of trailing columns that are drafts; `generate` reports later how many were rejected
    beside: bool = False  # not counted: runs for a text without being part of it (assistant model, guidance)

    def positions(self) -> Tensor:
        """int64 [batch or 1, length]: the position of each token in its sequence, padding not counted.

        Call this before the model runs, because running it changes the counter.
        """
        given, mask = self.position_ids, self.mask
        if given is not None and given.dim() == 2 and given.shape[1] == self.length:
            return given.to(torch.int64)
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= self.length:
            return (mask.bool().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - self.length :]
        here = torch.arange(self.length, device=self.device)[None]
        return here + (self.past_length if self.counter is None else self.counter)

    def tokens_before(self) -> Tensor:
        """int64 [batch or 1, length]: number of real tokens before each token in its row.

        A trace records this number as the position. Unlike `positions`, it does not restart where several texts are
        packed into one row. Call this before the model runs.
        """
        if self.past_length or self.counter is not None:
            return self.positions()
        if self.valid is None:
            return torch.arange(self.length, device=self.device)[None]
        real = self.valid if self.again is None else self.valid | self.again
        return (real.cumsum(1) - 1).clamp(min=0)


def recomputing() -> bool:
    """Whether a checkpointed layer is running again in the backward pass; its tokens were counted already."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0


# ---- the groups that the user has named for a batch, for modules that choose by group without a router
#
# `labels(groups=...)` of an attached model, of a recording and of adapters all name them here, so one block of labels
# reaches all three.


class NamedGroups(NamedTuple):
    """Names, and int64 indices into them: for all sequences [], per sequence [N], or per token [N, S]."""

    names: Sequence[str]
    codes: np.ndarray


_named: ContextVar[NamedGroups | None] = ContextVar("moe_route groups", default=None)


def name_groups(groups: NamedGroups | None, *, named: ContextVar[NamedGroups | None] = _named) -> None:
    """Name the groups of the calls that follow in this thread; None ends it.

    Works at the end of a program too, when the names of this module are gone.
    """
    named.set(groups)


def named_groups() -> NamedGroups | None:
    """The groups named last, or None."""
    return _named.get()


def fewer_logits(model: nn.Module, positions: Tensor) -> dict[str, Any]:
    """Arguments with which ``model`` computes logits at ``positions`` alone, int64 [P]; none if it always computes all.

    Every token runs through every layer in either case. Fewer positions save the product with the vocabulary, which
    costs a small model as much as its layers.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    # A tensor, because some models (Gemma 4) drop tokens from their last layers for a number; on the CPU, whose indices
    # fit hidden states on every device.
    return {"logits_to_keep": positions.cpu()}
