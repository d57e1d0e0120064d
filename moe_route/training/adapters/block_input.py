"""What the routers of one block read: the hidden states that the block is given, one decision for all its adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from moe_route.calls.call import recomputing
from moe_route.training.adapters.call_state import CallState, Sequences, valid_tokens
from moe_route.training.adapters.config import AdapterError

__all__ = ["BlockInput"]


class BlockInput:
    """The hidden states that one block of layers is given in the running call, and the sequences that they belong to.

    A layer that gradient checkpointing runs again reads them once more, in the backward pass. They are therefore
    remembered, without being kept alive: the checkpoint does that.
    """

    def __init__(self, name: str, number: int, state: CallState) -> None:
        self.name, self.number, self.state = name, number, state
        self._hidden: Tensor | None = None
        self._pooled: Tensor | None = None
        self._sequences: Sequences | None = None
        self._graphs: list[tuple[TensorWeakRef, Sequences]] = []  # calls whose backward pass may come
        self._with_gradient = False

    def __deepcopy__(self, memo: dict[int, object]) -> BlockInput:
        """That of a copied model, without hidden states."""
        copied = BlockInput(self.name, self.number, copy.deepcopy(self.state, memo))
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockInput, (self.name, self.number, self.state)

    def see(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """The forward pre-hook of the block."""
        if not self.state.enabled:
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        self._hidden = self._pooled = None
        sequences = self.sequences() if recomputing() else self.state.of_layer(self.name)
        call = sequences.call
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (call.batch, call.length):
            given = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise AdapterError(
                f"block {self.name!r} is given {given}, and not hidden states [{call.batch}, {call.length}, H] of the "
                "call: its adapters cannot tell the sequences apart. Leave its layers out by target_modules="
            )
        self._hidden, self._sequences = hidden, sequences
        self._with_gradient = torch.is_grad_enabled()
        if self._with_gradient and module.training and not recomputing():
            self._graphs = [(ref, of) for ref, of in self._graphs if ref() is not None]
            self._graphs.append((TensorWeakRef(hidden), sequences))

    def forget(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """The forward hook of the block: keeps nothing alive."""
        self._hidden = self._pooled = self._sequences = None

    def sequences(self) -> Sequences:
        """The sequences of the call that the block runs in, or runs again in."""
        return self._given()[1]

    def of_tokens(self) -> Tensor:
        """What each token's decision reads, [B, S, H]."""
        hidden = self._given()[0]
        if self.state.config.router == "token":
            return hidden
        if self._pooled is None:
            self._pooled = self._prefix_means(hidden)
        return self._pooled

    def of_sequences(self) -> Tensor:
        """What each sequence's decision reads, [B, H]."""
        if self._pooled is None:
            hidden, (call, first, _) = self._given()
            if self.state.config.pooling == "mean":
                valid = valid_tokens(call).to(hidden.device)[..., None]
                total = hidden.float().masked_fill(~valid, 0).sum(1)
                self._pooled = (total / valid.sum(1).clamp(min=1)).to(hidden.dtype)
            else:
                self._pooled = hidden[torch.arange(call.batch, device=hidden.device), first.to(hidden.device)]
        return self._pooled

    def first_rows(self) -> Tensor:
        """Numbers of the first tokens of all sequences in the call, int64 [B]."""
        hidden, (call, first, _) = self._given()
        return torch.arange(call.batch, device=hidden.device) * call.length + first.to(hidden.device)

    def no_tokens(self) -> Tensor:
        """Hidden states of no token, [0, H]."""
        return self._given()[0][0, :0]

    def no_rows(self) -> Tensor:
        """Numbers of no token, int64 [0]."""
        return torch.empty(0, dtype=torch.int64, device=self._given()[0].device)

    def _given(self) -> tuple[Tensor, Sequences]:
        if self._hidden is not None and self._sequences is not None:
            if self._with_gradient and not torch.is_grad_enabled():
                raise AdapterError(
                    "reentrant gradient checkpointing loses the gradient of what the adapters read: use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            return self._hidden, self._sequences
        if not recomputing():
            raise AdapterError(f"a layer of block {self.name!r} ran outside it: call the model, not its layers")
        waiting = [(hidden, of) for ref, of in self._graphs if (hidden := ref()) is not None]
        if len(waiting) != 1:
            raise AdapterError(
                f"gradient checkpointing runs block {self.name!r} again, and the model was called {len(waiting)} times "
                "since the latest backward pass: call backward() after each call"
            )
        return waiting[0]

    def _prefix_means(self, hidden: Tensor) -> Tensor:
        """Mean of the real tokens up to each one, those of earlier calls included, [B, S, H]."""
        text, call = self.state.text, self.sequences().call
        valid = valid_tokens(call).to(hidden.device)[..., None]
        totals = hidden.float().masked_fill(~valid, 0).cumsum(1)
        counts = valid.cumsum(1)
        if text is not None and call.past_length > 0:
            total, count = text.sums[self.number]
            totals, counts = totals + total[:, None], counts + count[:, None]
        if text is not None and not recomputing():
            text.sums[self.number] = totals[:, -1], counts[:, -1]
        return (totals / counts.clamp(min=1)).to(hidden.dtype)
