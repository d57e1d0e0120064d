"""Counting all routers of a small call at once, when the call ends.

At a decode step the weights of a whole layer pass through the caches between two routers, so that every operator call
meets cold caches and costs several times what it costs in a loop. Here the hooks of a step only keep references; the
hook at the end of the call counts all layers in one operator call.

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

# Tokens of a call: above, counting costs more than calling.
MOST_TOKENS = 64

Output = tuple[Tensor, ...]


class Counted(Protocol):
    """A router whose output may be counted when the call ends (`engines.Observed`)."""

    site: RouterSite
    spec: RouterSpec
    statistics: StatisticsTables | None
    cohort: int  # routers with an equal one are counted together
    versions: int  # of its output's tensors, as the router returns them

    def parts(self, output: Output) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits, weights and ids."""

    def table(self, logits: Tensor) -> Tensor:
        """The token table for the rows of `logits`."""

    def settle(self, keeps_output: bool) -> None:
        """It is known now whether the model leaves the output as it is."""


class Watched(NamedTuple):
    """The output of one router in the first small call, and what it was when the router returned it."""

    engine: Counted
    output: Output
    copies: Output

    def unchanged(self) -> bool:
        """Whether the model left the output as it was (float64 weights have no operator for several layers)."""
        pairs = zip(self.output, self.copies, strict=True)
        return self.output[1].dtype is not torch.float64 and all(
            torch.allclose(now, then, rtol=0, atol=0, equal_nan=True) for now, then in pairs
        )


class DeferredCounts:
    """Router outputs of the running call that are not counted yet: `kept`, to which the hooks add."""

    __slots__ = ("_watched", "kept")

    def __init__(self) -> None:
        self.kept: list[tuple[Counted, Output]] = []
        self._watched: list[Watched] = []

    def watch(self, engine: Counted, output: Output) -> None:
        """See whether the model leaves this output as it is until the call ends."""
        engine.versions = versions(output)
        self._watched.append(Watched(engine, output, tuple(tensor.detach().clone() for tensor in output)))

    def count(self) -> None:
        """Count what was kept since the last time. Raises `RuntimeError` where it was changed meanwhile."""
        for watched in self._watched:
            watched.engine.settle(watched.unchanged())
        self._watched.clear()
        if not self.kept:
            return
        all_kept, self.kept = self.kept, []
        alike: dict[tuple[int, torch.device, int], list[tuple[Counted, Output]]] = {}
        for engine, whole in all_kept:
            output = engine.parts(whole)
            if versions(output) != engine.versions:
                engine.settle(False)
                raise RuntimeError(
                    f"the output of router {engine.site.name!r} was changed in place after the router ran, though not "
                    "in the first small call; this call is not counted. Record again: later calls are counted router "
                    "by router."
                )
            key = (engine.cohort, output[0].device, output[0].shape[0])
            alike.setdefault(key, []).append((engine, output))
        for group in alike.values():
            engines = [engine for engine, _ in group]
            logits, weights, ids = zip(*(output for _, output in group), strict=True)
            ops.observe_layers(
                logits,
                ids,
                weights,
                engines[0].spec,
                tokens=engines[0].table(logits[0]),
                statistics=[engine.statistics for engine in engines if engine.statistics is not None],
            )

    def drop(self) -> None:
        """Forget what was kept: the call failed."""
        self.kept.clear()
        self._watched.clear()


def versions(output: Output) -> int:
    """How often the tensors were changed in place, in all; 0 in inference mode."""
    if output[0].is_inference():
        return 0
    return sum(tensor._version for tensor in output)
