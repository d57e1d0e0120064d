"""Running requests, and the token table of a step, in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moe_route.calls.call import PHASES

_PROMPT, _GROUP, _SEGMENT, _DONE, _PLAN = range(5)
_UNKNOWN = 0, -1, -1, 0, -1  # of a request that was not told


@dataclass(frozen=True)
class PlanRows:
    """Steering rows of all plans.

    Attributes:
        rows: int32 [P + 1, 2, G + 1, C]: row by plan, phase, group + 1 and class of positions; plan P steers nothing.
        bounds: the C - 1 positions at which a new class begins.
    """

    rows: np.ndarray
    bounds: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @classmethod
    def none(cls, plans: int, groups: int) -> PlanRows:
        """No plan steers."""
        return cls(np.full((plans + 1, 2, groups + 1, 1), -1, np.int32))

    @cached_property
    def steers(self) -> bool:
        """Whether some token gets a row."""
        return bool((self.rows >= 0).any())


@dataclass(slots=True, eq=False)
class Request:
    """One request. Its numbers stand in row ``slot`` of ``RequestTable.numbers``.

    Attributes:
        group: index of its group; -1: counted in none.
        segment: row of the segment tables; -1: began while nothing was recorded.
        first: position of its first token that is routed here; earlier ones came from a cache.
        plan: index of its plan; -1 for none.
        tokens: ids of its tokens, kept where the runner is about to forget them.
        ids: ids of its tokens as the engine core told them, where the runner does not hold them.
        starts: int64 [3, M], where its values begin in the plans' tables, see ``PlanTables.starts``; None: look it up.
    """

    name: str
    item: str | int | None
    group: int
    segment: int
    first: int
    slot: int
    plan: int = -1
    tokens: np.ndarray | None = None
    ids: list[int] | None = None
    starts: np.ndarray | None = None


class RequestTable:
    """Who the running requests are, and which token of a step belongs to whom.

    A preempted request runs again from its beginning. Positions below its high-water mark are steered as before and not
    counted again. Pending tokens, of which it is not known yet whether they become text, do not raise the mark.

    Attributes:
        ahead: whether a step is laid out before the outcome of the one before it is known.
        tokens_run_again: tokens that were counted before.
        tokens_rejected: tokens of counted requests that did not become text.
        tokens_lost: tokens that were pending, and of which nothing was told. What was counted is then incomplete.
        laid_out: int64 [phases * group capacity], by row of the tables: tokens that steps gave a group and a segment.
            Every layer must count as many.
        ungrouped_tokens: tokens that ran for requests without a group.
    """

    def __init__(self, groups: int, plans: int, capacity: int):
        self.running: dict[str, Request] = {}
        self.plan_rows = PlanRows.none(plans, groups)
        self.group_capacity = self.segment_capacity = 0  # second phase begins here in the tables
        self.counts = False  # whether tokens are counted
        self.ahead = False
        self.tokens_run_again = self.tokens_rejected = self.tokens_lost = self.ungrouped_tokens = 0
        self.laid_out = np.zeros(0, np.int64)
        self._numbers = np.array([_UNKNOWN] * (max(capacity, 1) + 1), np.int64)  # the last row stays
        self._free: list[int] = list(range(len(self._numbers) - 2, -1, -1))

    def begin(
        self,
        name: str,
        *,
        prompt: int,
        group: int,
        segment: int,
        plan: int,
        item: str | int | None = None,
        first: int = 0,
    ) -> Request:
        """A request that runs for the first time; ``prompt``: its length in tokens; ``plan``: -1 for none."""
        if not self._free:
            size = len(self._numbers) - 1
            self._numbers = np.concatenate([self._numbers, [_UNKNOWN] * size])
            self._free = list(range(2 * size - 1, size - 1, -1))
        request = Request(name, item, group, segment, first, self._free.pop(), plan)
        self._numbers[request.slot] = (prompt, group, segment, first, plan)
        self.running[name] = request
        return request

    def end(self, names: Iterable[str]) -> list[Request]:
        """Take the requests out that are known by these names."""
        ended = [self.running.pop(name) for name in names if name in self.running]
        self._free += [request.slot for request in ended]
        return ended

    def routed(self, request: Request) -> int:
        """Number of positions that a request has routed, its cached ones included."""
        return int(self._numbers[request.slot, _DONE])

    def advance(self, name: str, end: int) -> None:
        """The positions of a request below ``end`` are counted from now on."""
        slot = self._slot(name)
        if slot >= 0:
            fresh = end - int(self._numbers[slot, _DONE])
            if self.counts and fresh > 0 and self._numbers[slot, _GROUP] < 0:
                self.ungrouped_tokens += fresh
            self._numbers[slot, _DONE] += max(fresh, 0)

    def tails(
        self, names: Sequence[str], counts: np.ndarray, starts: np.ndarray, drafts: np.ndarray | None
    ) -> np.ndarray:
        """How many of the last tokens of each request in a step are pending, int64 [requests]."""
        if self.ahead:  # its last token may stand behind the end of its text, unless it is of the prompt
            prompts = self._numbers[[self._slot(name) for name in names], _PROMPT]
            return (starts + counts > prompts).astype(np.int64)
        return np.zeros(len(names), np.int64) if drafts is None else drafts

    def forget(self) -> None:
        """A new recording begins: requests that run now are not part of it."""
        self.counts = False
        self.tokens_run_again = self.tokens_rejected = self.tokens_lost = self.ungrouped_tokens = 0
        self.laid_out = np.zeros(len(PHASES) * self.group_capacity, np.int64)
        self._numbers[:, _SEGMENT] = -1
        for request in self.running.values():
            request.segment = -1

    def fill(
        self,
        table: np.ndarray,
        names: Sequence[str],
        counts: np.ndarray,
        starts: np.ndarray,
        tails: np.ndarray | None = None,
    ) -> int:
        """Write the rows of a step to ``table``, int32 [T, 4]; returns the number of its tokens.

        Args:
            names: requests in the order of the batch. One that is unknown is neither steered nor counted.
            counts: tokens of each in this step.
            starts: position of the first of them.
            tails: how many of the last of them are pending; none by default.
        """
        known = map(self.running.get, names)
        slots = [-1 if request is None else request.slot for request in known]  # -1, the last row: it is unknown
        counts, starts = np.asarray(counts, np.int64), np.asarray(starts, np.int64)
        of_request = self._numbers[slots]
        if (counts == 1).all():
            numbers, positions = of_request, starts
        else:
            numbers, positions = np.repeat(of_request, counts, axis=0), positions_of(counts, starts)
        prompt, group, segment, done, plan = numbers.T
        phase = (positions >= prompt).astype(np.int64)
        rows = table[: len(positions)]
        rows[:, :3], rows[:, 3] = -1, 1
        if self.plan_rows.steers:
            place = np.searchsorted(self.plan_rows.bounds, positions, side="right")
            rows[:, 0] = self.plan_rows.rows[plan, phase, group + 1, place]
        routed = of_request[:, _DONE]
        ends = starts + counts if tails is None else starts + counts - tails
        if self.counts:
            again = positions < done
            counted = ~again & (group >= 0) & (segment >= 0)
            capacities = self.group_capacity, self.segment_capacity
            tables = phase[:, None] * capacities + numbers[:, _GROUP : _SEGMENT + 1]
            rows[:, 1:3] = np.where(counted[:, None], tables, -1)
            self.tokens_run_again += int(np.count_nonzero(again))
            if of_request[:, _GROUP].min(initial=0) < 0:
                fresh = ends - np.maximum(starts, routed)
                ungrouped = (of_request[:, _GROUP] < 0) & (np.asarray(slots) >= 0) & (fresh > 0)
                self.ungrouped_tokens += int(fresh[ungrouped].sum())
        self._numbers[slots, _DONE] = np.maximum(routed, ends)
        self._numbers[-1] = _UNKNOWN
        return len(positions)

    def expect(self, rows: np.ndarray) -> None:
        """Every layer is about to count the tokens of these rows of a token table, int32 [T, 4]."""
        counted = rows[:, 1]
        self.laid_out += np.bincount(counted[counted >= 0], minlength=len(self.laid_out))

    def _slot(self, name: str) -> int:
        request = self.running.get(name)
        return -1 if request is None else request.slot


def positions_of(counts: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Position of every token of a step in its request."""
    return np.arange(int(counts.sum())) + np.repeat(starts - np.cumsum(counts) + counts, counts)


class Batch(NamedTuple):
    """Requests of a step in the order of the batch."""

    names: Sequence[str]
    counts: np.ndarray  # tokens of each
    starts: np.ndarray  # position of the first of them
    token_ids: Tensor  # int32 [T or more], of all tokens, on the device
    drafts: np.ndarray | None = None  # how many of the last tokens of each are drafts; None: there are none
