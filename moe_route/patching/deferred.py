"""Count the routers of small calls together, after the calls.

At a decode step the weights of a whole layer pass through the caches between two routers, so whatever runs there meets
cold caches and costs up to ten times what it costs in a loop. Here the hooks of a step only keep references; all
layers, and those of a few steps, are counted in one operator call.

A router's output may be kept only if nobody changes it in place after the router ran. The first small call, which is
counted router by router, tells: its tensors must be unchanged at its end. On a device the answer is not waited for:
calls are counted router by router until it has arrived. From then on the tensors' version counters are checked
whenever kept ones are counted (tensors of inference mode have none).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables
from moe_route.devices import Answers
from moe_route.routers.discovery import RouterInfo

# Tokens of a small call: above, counting costs more than calling. Nor are more kept, over several calls.
MOST_TOKENS = 64

Output = tuple[Tensor, ...]


class Counted(Protocol):
    """A router whose output may be counted after the call (`hook.HookEngine`)."""

    router: RouterInfo
    spec: RouterSpec
    statistics: StatisticsTables | None
    cohort: int  # routers with an equal one are counted together

    def parts(self, output: Output) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits, weights and ids."""

    def may_defer(self, keeps_output: bool) -> None:
        """It is known now whether the router's outputs may be kept."""


class Watched(NamedTuple):
    """The output of one router in the first small call, and what it was when the router returned it."""

    engine: Counted
    output: Output
    copies: Output

    def fits(self, tokens: int) -> bool:
        """Whether the call's token table speaks of this output's rows, and an operator for several layers takes it
        (there is none for float64 weights)."""
        logits, weights, _ = self.output
        return logits.shape[0] == tokens and weights.dtype is not torch.float64

    def unchanged(self) -> Tensor:
        """0-dimensional: whether the model left the output as it was."""
        return torch.stack([_same(now, then) for now, then in zip(self.output, self.copies, strict=True)]).all()


def _same(a: Tensor, b: Tensor) -> Tensor:
    return ((a == b) | ((a != a) & (b != b))).all()


class Judged(NamedTuple):
    """Engines whose outputs were compared, and whether those were left as they were."""

    engines: list[Counted]
    answers: Answers


class KeptCall(NamedTuple):
    """Router outputs of one call, and its token table on each device."""

    outputs: list[tuple[Counted, Output, int]]
    table_on: Callable[[torch.device], Tensor]


class DeferredCounts:
    """Router outputs that are not counted yet: `kept` are those of the running call, to which the hooks add."""

    __slots__ = ("_calls", "_judged", "_tokens", "_watched", "kept", "lag")

    def __init__(self) -> None:
        self.lag = 0  # calls that may wait after the call that was just made
        self.kept: list[tuple[Counted, Output, int]] = []  # engine, what the router returned, its `versions` then
        self._calls: list[KeptCall] = []
        self._tokens = 0
        self._watched: list[Watched] = []
        self._judged: list[Judged] = []

    @property
    def waits(self) -> bool:
        """Whether calls wait to be counted."""
        return bool(self._calls)

    def watch(self, engine: Counted, output: Output) -> None:
        """See whether the model leaves this output as it is until the call ends."""
        if any(engine is other for judged in self._judged for other in judged.engines):
            return  # an earlier call is asked about it
        self._watched.append(Watched(engine, output, tuple(tensor.detach().clone() for tensor in output)))

    def end_call(self, tokens: int, table_on: Callable[[torch.device], Tensor]) -> None:
        """The call of so many tokens went through: count it, or let it wait for more. `table_on` gives its token table.

        Raises what `count` raises.
        """
        if self._watched:
            self._judge(tokens)
        if self._judged:
            self._tell_engines()
        if not self.kept:
            return
        self._calls.append(KeptCall(self.kept, table_on))
        self.kept = []
        self._tokens += tokens
        if len(self._calls) > self.lag or self._tokens >= MOST_TOKENS:
            self.count()

    def _judge(self, tokens: int) -> None:
        """Ask each device whether the outputs that lie on it are what they were."""
        alike: dict[torch.device, list[Watched]] = {}
        for watched in self._watched:
            if watched.fits(tokens):
                alike.setdefault(watched.output[0].device, []).append(watched)
            else:
                watched.engine.may_defer(False)
        self._watched.clear()
        for watched_there in alike.values():
            answers = Answers(torch.stack([watched.unchanged() for watched in watched_there]))
            self._judged.append(Judged([watched.engine for watched in watched_there], answers))

    def _tell_engines(self) -> None:
        """Tell the engines whose answers have arrived."""
        waiting = []
        for judged in self._judged:
            found = judged.answers.read()
            if found is None:
                waiting.append(judged)
                continue
            for engine, unchanged in zip(judged.engines, found, strict=True):
                engine.may_defer(unchanged)
        self._judged = waiting

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
        for kept, table_on in calls:
            for engine, whole, before in kept:
                if versions(whole) != before:
                    for other, _, _ in kept:
                        other.may_defer(False)
                    raise RuntimeError(
                        f"the output of router {engine.router.name!r} was changed in place after the router ran, "
                        f"though not in the first small call; {len(calls)} calls are not counted. Record again: "
                        "later calls are counted router by router."
                    )
                output = engine.parts(whole)
                table = table_on(output[0].device)
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
