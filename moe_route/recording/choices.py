"""The choices of every call, collected once and passed on to all that keep them or add them up.

A trace keeps them token by token (`trace.TraceWriter`); accumulators add them up on the device
(`accumulators.Accumulator`). Both are observers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from moe_route.calls.call import Call
from moe_route.calls.token_table import as_table, broadcast_rows
from moe_route.recording.sequences import RunningSequences
from moe_route.recording.statistics import RecordingError
from moe_route.recording.tables import RecordedRouter


@dataclass(eq=False)
class ObservedCall:
    """One call of the model: the labels of its tokens, and the choices of its layers on their devices.

    Token s of sequence b has the number ``b * length + s``; there are T = batch * length tokens. ``ids`` and
    ``weights`` are copies, so they may be kept.
    """

    call: Call
    valid: Tensor | None  # bool [batch, length]: tokens that are text, neither padding nor rejected drafts; None: all
    group: int | Tensor  # index of the group, int, [N] or [N, length]; -1: not counted
    segment: int | Tensor  # index of the segment of the running sequences, in the same form
    drafted: int  # number of trailing columns of which it is not known yet whether they are text
    ids: dict[int, Tensor] = field(default_factory=dict)  # layer -> int8 or int16 [T, k]; -1: an empty slot
    weights: dict[int, Tensor] = field(default_factory=dict)  # layer -> float [T, k]; empty unless an observer asked
    logits: dict[int, Tensor] = field(default_factory=dict)  # layer -> float [T, E], of the router itself; likewise
    _rows: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.call.batch

    @property
    def length(self) -> int:
        return self.call.length

    def groups(self, device: torch.device) -> Tensor:
        """int64 [T]: index of the group of each token; -1 for padding and tokens that are not counted."""
        return self._per_token("group", self.group, device)

    def segments(self, device: torch.device) -> Tensor:
        """int64 [T]: index of the segment of each token; -1 for padding and tokens that are not counted."""
        return self._per_token("segment", self.segment, device)

    def _per_token(self, what: str, rows: int | Tensor, device: torch.device) -> Tensor:
        key = (what, device)
        if key not in self._rows:
            shape = (self.batch, self.length)
            table = as_table(broadcast_rows(rows, self.call, what), self.call).expand(shape)
            if self.valid is not None:
                table = torch.where(self.valid.to(table.device), table, -1)
            self._rows[key] = table.reshape(-1).to(device=device, dtype=torch.int64)
        return self._rows[key]

    def drop_last(self, columns: int) -> None:
        """Mark the last ``columns`` as no text."""
        text = (torch.arange(self.length, device=self.call.device) < self.length - columns).expand(self.batch, -1)
        self.valid = text if self.valid is None else text & self.valid
        self._rows.clear()


class ChoiceObserver:
    """Receives the choices of a recording, call by call. The methods of this base class ignore them.

    The order is: ``begin_sequences``; for each call ``begin_call`` and, once it has completed and it is known which of
    its tokens are text, ``take``; ``sequence_values`` unless the sequences broke off; ``end_sequences``. Of a call that
    failed, ``take`` is not called; ``drop_call`` then follows before anything else. Nothing is called while the
    recording is paused, and no CUDA graph is captured.
    """

    option = ""  # the argument of `record` that asks for it, for messages
    weights_dtype: torch.dtype | None = None  # least precision of the weights that it reads; None: it reads none
    logits_dtype: torch.dtype | None = None  # the same of the router's own logits

    def needs(self, layer: int) -> bool:
        """Whether the choices of this layer are needed."""
        return True

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        """Begin new sequences; the former ones have ended. There are ``groups`` groups now."""

    def begin_call(self, observed: ObservedCall) -> None:
        """Begin a call. Whatever is measured while it runs counts only once ``take`` is called with it."""

    def drop_call(self) -> None:
        """Drop what was measured in a call that failed."""

    def take(self, observed: ObservedCall) -> None:
        """Take a completed call, without waiting for the device."""

    def sequence_values(self, sequences: RunningSequences) -> Mapping[str, np.ndarray]:
        """Values of the running sequences, name -> [segments, L, ...]. Changes nothing, and may wait for the device."""
        return {}

    def end_sequences(self, sequences: RunningSequences, values: Mapping[str, np.ndarray] | None) -> None:
        """End the running sequences, with the values of all observers; None if they broke off and do not count."""


class ChoiceCollector:
    """Collects the choices of each call and passes them on to the observers."""

    def __init__(self, routers: Sequence[RecordedRouter], observers: Sequence[ChoiceObserver]) -> None:
        self.observers = tuple(observers)
        widest = max((router.num_experts for router in routers), default=0)
        self._ids_dtype = torch.int8 if widest <= 128 else torch.int16
        self._weights_dtype = _widest([observer.weights_dtype for observer in observers])
        self.logits_dtype = _widest([observer.logits_dtype for observer in observers])
        self._current: ObservedCall | None = None
        self._undecided: ObservedCall | None = None  # completed, with drafts of which nothing is known yet

    @property
    def options(self) -> str:
        """The arguments of ``record`` that asked for the observers."""
        return ", ".join(sorted({f"{observer.option}=" for observer in self.observers}))

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        """Begin new sequences; the former ones have ended."""
        for observer in self.observers:
            observer.begin_sequences(sequences, groups)

    def begin_call(self, call: Call, group: int | Tensor, segment: int | Tensor, drafted: int) -> None:
        """Begin a call. ``group`` and ``segment`` are the rows of its tokens; ``drafted`` columns may prove no text."""
        self._current = ObservedCall(call, call.valid, group, segment, drafted)
        for observer in self.observers:
            observer.begin_call(self._current)

    def add(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """Add the choice of one layer, ids ``[T, k]`` and weights ``[T, k]``, without waiting for the device."""
        observed = self._current
        if observed is None or not any(observer.needs(layer) for observer in self.observers):
            return
        if ids.shape[0] != observed.batch * observed.length:
            raise RecordingError(
                f"layer {layer} routed {ids.shape[0]} of {observed.batch * observed.length} tokens, so its tokens "
                f"cannot be told apart: record without {self.options} (a trace may leave the layer out, "
                "record(trace=[...]))"
            )
        observed.ids[layer] = ids.detach().to(self._ids_dtype, copy=True)
        if self._weights_dtype is not None:
            observed.weights[layer] = weights.detach().to(self._weights_dtype, copy=True)

    def add_logits(self, layer: int, logits: Tensor) -> None:
        """Add the router's own logits ``[T, E]`` of one layer, without waiting for the device."""
        observed = self._current
        if observed is None or not any(o.logits_dtype and o.needs(layer) for o in self.observers):
            return
        observed.logits[layer] = logits.detach().to(self.logits_dtype, copy=True)

    def drop_call(self) -> None:
        """Drop the running call, which failed, if there is one."""
        if self._current is not None:
            self._current = None
            for observer in self.observers:
                observer.drop_call()

    def end_call(self) -> None:
        """Complete the running call."""
        observed, self._current = self._current, None
        if observed is None:
            return
        if observed.drafted:
            self._undecided = observed
        else:
            self._pass_on(observed)

    def reject_drafts(self, columns: int) -> None:
        """Decide on the latest call: its last ``columns`` belong to no text."""
        observed, self._undecided = self._undecided, None
        if observed is None:
            return
        if columns:
            observed.drop_last(columns)
        self._pass_on(observed)

    @torch.no_grad()
    def _pass_on(self, observed: ObservedCall) -> None:
        for observer in self.observers:
            observer.take(observed)

    def sequence_values(self, sequences: RunningSequences) -> dict[str, np.ndarray]:
        """Values of the running sequences that the observers found, name -> [segments, L, ...]."""
        values: dict[str, np.ndarray] = {}
        for observer in self.observers:
            values.update(observer.sequence_values(sequences))
        return values

    def end_sequences(self, sequences: RunningSequences, values: Mapping[str, np.ndarray] | None) -> None:
        """End the running sequences; ``values`` are None if they broke off."""
        for observer in self.observers:
            observer.end_sequences(sequences, values)


def _widest(dtypes: Sequence[torch.dtype | None]) -> torch.dtype | None:
    """The least precise dtype that serves all; None if there is none."""
    given = [dtype for dtype in dtypes if dtype is not None]
    return reduce(torch.promote_types, given) if given else None
