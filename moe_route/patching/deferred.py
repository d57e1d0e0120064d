"""Counting the routers of small calls together, after the calls.

At a decode step the weights of a whole layer pass through the caches between two routers, so that whatever runs there
meets cold caches and costs up to ten times what it costs in a loop. Here the hooks of a step only keep references; all
layers, and those of a few steps, are counted in one operator call.

A router's output may be kept only if nobody changes it in place after the router ran. The first small call, which is
counted router by router, tells: its tensors must be unchanged at its end. From then on the tensors' version counters
are checked whenever kept ones are counted (tensors of inference mode have none).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_route import ops
from moe_route.ops import RouterSpec, StatisticsTables
from moe_route.patching.sites import RouterSite

# Tokens of a small call: above, counting costs more than calling. Nor are more kept, over several calls.
MOST_TOKENS = 64

Output = tuple[Tensor, ...]


class Counted(Protocol):
    """A router whose output may be counted after the call (`engines.Observed`)."""

    site: RouterSite
    spec: RouterSpec
    statistics: StatisticsTables | None
    cohort: int  # routers with an equal one are counted together

    def parts(self, output: Output) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits, weights and ids."""

    def settle(self, keeps_output: bool) -> None:
        """It is known now whether the router's outputs may be kept."""


class Watched(NamedTuple):
    """The output of one router in the first small call, and what it was when the router returned it."""

    engine: Counted
    output: Output
    copies: Output

    def may_be_kept(self, table: Tensor) -> bool:
        """Whether the model left the output as it was, and `table` is the token table of all its rows.

        float64 weights have no operator for several layers.
        """
        logits, weights, _ = self.output
        if logits.shape[0] != table.shape[0] or logits.device != table.device or weights.dtype is torch.float64:
            return False
        pairs = zip(self.output, self.copies, strict=True)
        return all(torch.allclose(now, then, rtol=0, atol=0, equal_nan=True) for now, then in pairs)


class KeptCall(NamedTuple):
    """Router outputs of one call, and its token table."""

    outputs: list[tuple[Counted, Output, int]]
    table: Tensor


class DeferredCounts:
    """Router outputs that are not counted yet: `kept` are those of the running call, to which the hooks add."""

    __slots__ = ("_calls", "_tokens", "_watched", "kept", "lag")

    def __init__(self) -> None:
        self.lag = 0  # calls that may wait after the call that was just made
        self.kept: list[tuple[Counted, Output, int]] = []  # engine, what the router returned, its `versions` then
        self._calls: list[KeptCall] = []
        self._tokens = 0
        self._watched: list[Watched] = []

    def watch(self, engine: Counted, output: Output) -> None:
        """See whether the model leaves this output as it is until the call ends."""
        self._watched.append(Watched(engine, output, tuple(tensor.detach().clone() for tensor in output)))

    def end_call(self, table: Tensor) -> None:
        """The call with this token table went through: count it, or let it wait for more.

        Raises what `count` raises.
        """
        if self._watched:
            for watched in self._watched:
                watched.engine.settle(watched.may_be_kept(table))
            self._watched.clear()
        if not self.kept:
            return
        self._calls.append(KeptCall(self.kept, table))
        self.kept = []
        self._tokens += table.shape[0]
        if len(self._calls) > self.lag or self._tokens >= MOST_TOKENS:
            self.count()

    def drop_call(self) -> None:
        """Forget what the running call kept: it failed."""
        self.kept.clear()
        self._watched.clear()

    def count(self) -> None:
        """Count all calls that wait. Raises `RuntimeError` where a router's output was changed meanwhile."""
        if not self._calls:
            return
        calls, self._calls, self._tokens = self._calls, [], 0
        alike: dict[tuple[int, int], tuple[Tensor, list[Counted], list[Output]]] = {}
        for kept, table in calls:
            for engine, whole, before in kept:
                if versions(whole) != before:
                    for other, _, _ in kept:
                        other.settle(False)
                    raise RuntimeError(
                        f"the output of router {engine.site.name!r} was changed in place after the router ran, though "
                        f"not in the first small call; {len(calls)} calls are not counted. Record again: later calls "
                        "are counted router by router."
                    )
                output = engine.parts(whole)
                _, engines, outputs = alike.setdefault((engine.cohort, id(table)), (table, [], []))
                engines.append(engine)
                outputs.append(output)
        for table, engines, outputs in alike.values():
            logits, weights, ids = zip(*outputs, strict=True)
            statistics = [engine.statistics for engine in engines if engine.statistics is not None]
            ops.observe_layers(logits, ids, weights, engines[0].spec, tokens=table, statistics=statistics)


def versions(output: Output) -> int:
    """How often the first three tensors were changed in place, in all; 0 for tensors of inference mode."""
    first, second, third = output[:3]
    if first.is_inference() or second.is_inference() or third.is_inference():
        return 0
    return first._version + second._version + third._version
