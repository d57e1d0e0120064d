"""Average the router inputs of every sequence, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_route.recording.accumulated import SIZE_UNIT
from moe_route.recording.accumulators import Accumulator
from moe_route.recording.choices import ObservedCall
from moe_route.recording.sequences import RunningSequences
from moe_route.recording.statistics import RecordingError
from moe_route.recording.tables import RecordedRouter

__all__ = ["HiddenStates"]


class HiddenStates(Accumulator):
    """Mean router input of each sequence, and its sum over the finished sequences of a group.

    - ``hidden``: sum over sequences of the mean over tokens, in multiples of `SIZE_UNIT`;
    - ``hidden_sequences``: number of sequences with a token in the layer.

    Sums over tokens are float64 on the device. The number of elements H is that of the first router that runs.
    """

    option = "hidden"

    def __init__(self, routers: Sequence[RecordedRouter], groups: int) -> None:
        super().__init__(routers, groups, {})
        self._call: ObservedCall | None = None
        self._inputs: dict[int, Tensor] = {}  # of the running call: sums by segment, or the inputs of drafts
        self._sums: dict[int, Tensor] = {}  # layer -> [segments, H + 1], the last column counts tokens
        self._segments = 0
        self._width: int | None = None
        self._totals: dict[str, np.ndarray] = {}

    def needs(self, layer: int) -> bool:
        return False

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        super().begin_sequences(sequences, groups)
        self._segments, self._sums = sequences.segments, {}

    def begin_call(self, observed: ObservedCall) -> None:
        self._call, self._inputs = observed, {}

    def drop_call(self) -> None:
        self._call, self._inputs = None, {}

    def add_input(self, layer: int, hidden: Tensor) -> None:
        """Add the input of one router, [..., H] for all tokens of the call, without waiting for the device."""
        call = self._call
        if call is None:
            return
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        if len(rows) != call.batch * call.length:
            raise RecordingError(
                f"layer {layer} is given {len(rows)} of {call.batch * call.length} tokens, so they cannot be told "
                "apart: record without hidden"
            )
        self._width = self._width or rows.shape[1]
        if rows.shape[1] != self._width:
            raise RecordingError(
                f"the router of layer {layer} is given {rows.shape[1]} elements per token, others {self._width}: "
                "record without hidden"
            )
        # which of the drafts are text is known only later
        found = rows.clone() if call.drafted else self._summed(call, rows)
        self._inputs[layer] = found

    def _summed(self, observed: ObservedCall, rows: Tensor) -> Tensor:
        segments = observed.segments(rows.device)
        sums = torch.zeros((self._segments + 1, rows.shape[1] + 1), dtype=torch.float64, device=rows.device)
        counted = torch.cat([rows.double(), torch.ones_like(rows[:, :1], dtype=torch.float64)], dim=1)
        sums.index_add_(0, torch.where(segments < 0, self._segments, segments), counted)
        return sums[:-1]

    def take(self, observed: ObservedCall) -> None:
        inputs = self._inputs
        self.drop_call()
        for layer, found in inputs.items():
            sums = self._summed(observed, found) if observed.drafted else found
            self._sums[layer] = sums if layer not in self._sums else self._sums[layer].to(sums.device) + sums

    def sequence_values(self, sequences: RunningSequences) -> Mapping[str, np.ndarray]:
        if self._width is None:
            return {}
        means = np.full((sequences.segments, len(self.routers), self._width), np.nan)
        for layer, sums in self._sums.items():
            table = sums.cpu().numpy()
            tokens = table[:, -1:]
            np.divide(table[:, :-1], tokens, out=means[:, layer], where=tokens > 0)
        return {"hidden": means.astype(np.float32)}

    def end_sequences(self, sequences: RunningSequences, values: Mapping[str, np.ndarray] | None) -> None:
        self._sums = {}
        if values is None or self._width is None:
            return
        means = values["hidden"].astype(np.float64)
        seen = ~np.isnan(means[..., 0])
        terms = np.rint(np.nan_to_num(means) / SIZE_UNIT).astype(np.int64)
        totals = self._grown()
        np.add.at(totals["hidden"], sequences.segment_group, terms)
        np.add.at(totals["hidden_sequences"], sequences.segment_group, seen.astype(np.int64))

    def _grown(self) -> dict[str, np.ndarray]:
        """The sums, with room for all groups."""
        assert self._width is not None
        shape = (self._capacity, len(self.routers), self._width)
        old = self._totals
        self._totals = {"hidden": np.zeros(shape, np.int64), "hidden_sequences": np.zeros(shape[:2], np.int64)}
        for name, array in old.items():
            self._totals[name][: len(array)] = array
        return self._totals

    def arrays(self, groups: int) -> dict[str, np.ndarray]:
        return {} if self._width is None else {name: array[:groups] for name, array in self._grown().items()}
