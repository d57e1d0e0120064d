"""Count the routers of small calls together, after the calls.

In a decode step the weights of a whole layer pass through the caches between two routers. Counting code that runs there
meets cold caches and takes up to ten times as long as in a loop. So in small calls the hooks only keep references. The
rows that a router returned in several calls are then joined, and one operator call counts them for all layers.

This is possible only if nothing changes a router's output in place after the router ran. The first small call is
counted router by router and tests this: at its end the tensors must be unchanged. The host does not wait for a device's
answer; until it has arrived, calls are counted router by router. From then on the version counters of kept tensors are
checked whenever they are counted. Tensors of inference mode have no version counter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from moe_route import ops
from moe_route.base.devices import Answers
from moe_route.calls.token_table import Tables, on_device
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables
from moe_route.routers.discovery import RouterInfo

# Tokens of a small call; with more, counting costs more than the call itself. Also the most tokens kept over calls.
MOST_TOKENS = 64

Output = tuple[Tensor, ...]


class Counted(Protocol):
    """A router whose output may be counted after the call (`engine.HookEngine`)."""

    router: RouterInfo
    spec: RouterSpec
    statistics: StatisticsTables | None
    cohort: int  # routers with equal numbers are counted together
    parts: Callable[[Output], tuple[Tensor, ...]]  # router logits, weights and ids of an output

    def may_defer(self, keeps_output: bool) -> None:
        """Called once it is known whether the router's outputs may be kept."""


class Watched(NamedTuple):
    """The output of one router in the first small call, with a copy from when the router returned it."""

    engine: Counted
    output: Output
    copies: Output

    def fits(self, tokens: int) -> bool:
        """Whether the output has one row per token of the call and a form that the operator for several layers takes.

        That operator takes no float64 weights.
        """
        logits, weights, _ = self.output
        return logits.shape[0] == tokens and weights.dtype is not torch.float64

    def unchanged(self) -> Tensor:
        """0-dimensional bool tensor: whether the model left the output unchanged."""
        return torch.stack([_same(now, then) for now, then in zip(self.output, self.copies, strict=True)]).all()


def _same(a: Tensor, b: Tensor) -> Tensor:
    return ((a == b) | ((a != a) & (b != b))).all()


class Judged(NamedTuple):
    """Engines whose outputs were compared, and the answers, whether those are unchanged."""

    engines: list[Counted]
    answers: Answers


KeptOutput = tuple["Counted", Output, int | None]
"""A router, its output, and the `versions` of that output; None in inference mode."""

KeptCall = tuple[list[KeptOutput], Tables]
"""The router outputs of one call, and its token table on each device."""


class Waiting(NamedTuple):
    """What one router chose in the calls with these numbers."""

    calls: list[int]
    decisions: list[Output]


class DeferredCounts:
    """Router outputs that are not counted yet; hooks add those of the running call to `kept`."""

    __slots__ = ("_calls", "_judged", "_tokens", "_watched", "kept", "lag")

    def __init__(self) -> None:
        self.lag = 0  # number of calls that may wait after the latest one
        self.kept: list[KeptOutput] = []
        self._calls: list[KeptCall] = []
        self._tokens = 0
        self._watched: list[Watched] = []
        self._judged: list[Judged] = []

    @property
    def waits(self) -> bool:
        """Whether calls are waiting to be counted."""
        return bool(self._calls)

    def watch(self, engine: Counted, output: Output) -> None:
        """Check at the end of the call whether the model has left this output unchanged."""
        if any(engine is other for judged in self._judged for other in judged.engines):
            return  # an earlier call is still being checked
        self._watched.append(Watched(engine, output, tuple(tensor.detach().clone() for tensor in output)))

    def end_call(self, tokens: int, tables: Tables) -> None:
        """End a call of `tokens` tokens: count it, or let it wait. `tables` holds its token table on each device.

        Raises the errors of `count`.
        """
        if self._watched:
            self._judge(tokens)
        if self._judged:
            self._tell_engines()
        if not self.kept:
            return
        self._calls.append((self.kept, tables))
        self.kept = []
        self._tokens += tokens
        if len(self._calls) > self.lag or self._tokens >= MOST_TOKENS:
            self.count()

    def _judge(self, tokens: int) -> None:
        """Ask each device whether the outputs on it are unchanged."""
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
        """Notify the engines whose answers have arrived."""
        waiting = []
        for judged in self._judged:
            answers = judged.answers.read()
            if answers is None:
                waiting.append(judged)
                continue
            for engine, unchanged in zip(judged.engines, answers, strict=True):
                engine.may_defer(unchanged)
        self._judged = waiting

    def drop_call(self) -> None:
        """Drop the outputs of the running call, which failed."""
        self.kept.clear()
        self._watched.clear()

    def count(self) -> None:
        """Count all waiting calls. Raises `RuntimeError` if a router's output was changed meanwhile."""
        if not self._calls:
            return
        calls, self._calls, self._tokens = self._calls, [], 0
        waiting: dict[Counted, Waiting] = {}
        for number, (kept, _) in enumerate(calls):
            for engine, output, before in kept:
                if before is not None and versions(output) != before:
                    _refuse_changed(engine, calls)
                one = waiting.get(engine)
                if one is None:
                    one = waiting[engine] = Waiting([], [])
                one.calls.append(number)
                one.decisions.append(engine.parts(output))
        alike: dict[tuple[int, ...], list[Counted]] = {}
        for engine, (numbers, _) in waiting.items():
            alike.setdefault((engine.cohort, *numbers), []).append(engine)
        for (_, *numbers), engines in alike.items():
            outputs = [[_joined(parts) for parts in zip(*waiting[engine].decisions, strict=True)] for engine in engines]
            table = _joined([on_device(calls[number][1], outputs[0][0].device) for number in numbers])
            logits, weights, ids = zip(*outputs, strict=True)
            statistics = [engine.statistics for engine in engines if engine.statistics is not None]
            ops.observe_layers(logits, ids, weights, engines[0].spec, tokens=table, statistics=statistics)


def _joined(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    # detached, and not made without grad mode: an interrupt could leave the mode of the whole process switched
    return parts[0] if len(parts) == 1 else torch.cat(parts).detach()


def _refuse_changed(engine: Counted, calls: Sequence[KeptCall]) -> NoReturn:
    for kept, _ in calls:
        for other, _, _ in kept:
            other.may_defer(False)
    raise RuntimeError(
        f"the output of router {engine.router.name!r} was changed in place after the router ran, though not in the "
        f"first small call; {len(calls)} calls are not counted. Record again: later calls are counted router by router."
    )


def versions(output: Output) -> int:
    """Number of in-place changes of the first three tensors, in total; 0 for tensors of inference mode."""
    first, second, third = output[:3]
    try:
        return first._version + second._version + third._version
    except RuntimeError:  # asking each tensor beforehand costs more in every call
        return 0
