"""What rules that look at single tokens need of a step: numbers that seed their draws, and rows in tables of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moe_route.devices import upload
from moe_route.integrations.vllm.requests import Request, RequestTable, positions_of
from moe_route.steering.draw import token_counter
from moe_route.steering.model import PlanError

if TYPE_CHECKING:
    from moe_route.integrations.vllm.plans import PlanTables
    from moe_route.integrations.vllm.runners import Batch

__all__ = ["TokenValues"]


class TokenValues:
    """The numbers of the tokens of one step.

    Attributes:
        counter: int64 [T], made of a token's position and id; None if no plan draws.
        entries: int64 [T, M], its row in each of M tables, -1 for none; None if no plan has one.
        present: whether the step has tokens that such rules may reach.
    """

    def __init__(self, plans: PlanTables, requests: RequestTable, device: torch.device, fail: Callable[[str], None]):
        """``fail`` is told of a request that its plan has no values for."""
        self._plans, self._requests, self._device, self._fail = plans, requests, device, fail
        self.clear()

    def clear(self) -> None:
        """The next step needs none."""
        self.counter: Tensor | None = None
        self.entries: Tensor | None = None
        self.present = False

    def lay_out(self, rows: np.ndarray, batch: Batch) -> None:
        """Make the numbers of a step; ``rows``: int32 [T], the steering rows of its tokens."""
        self.clear()
        if not np.isin(rows, self._plans.by_token).any():
            return
        self.present = True
        positions = positions_of(batch.counts, batch.starts)
        if self._plans.draws:
            self.counter = token_counter(upload(torch.from_numpy(positions), self._device), batch.token_ids)
        if self._plans.sequence_tables:
            first, length, step = self._starts(batch)
            place = positions[:, None] * step
            self.entries = upload(torch.from_numpy(np.where(place < length, first + place, -1)), self._device)

    def _starts(self, batch: Batch) -> np.ndarray:
        """int64 [3, T, M]: ``PlanTables.starts`` of each token's request."""
        nowhere = np.zeros((3, len(self._plans.sequence_tables)), np.int64)
        requests = [self._requests.running.get(name) for name in batch.names]
        starts = [nowhere if request is None else self._starts_of(request, nowhere) for request in requests]
        return np.repeat(np.stack(starts, 1), batch.counts, axis=1)

    def _starts_of(self, request: Request, nowhere: np.ndarray) -> np.ndarray:
        if request.starts is None:
            try:
                request.starts = self._plans.starts(request)
            except PlanError as error:  # refused at admission, but the plan changed while it ran
                request.starts = nowhere
                self._fail(f"request {request.name} runs without its plan: {error}")
        return request.starts
