"""What a recording must hold: counted from what the experts of the live model were given, without the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from harness.model_decisions import Dense, look_last, watch_experts
from torch import Tensor, nn

import moe_route as mr
from moe_route.routers import RouterInfo
from paths.subject import run

# What counts of the n-th run of a router: bool of as many elements as it has tokens, or None for all of them.
Valid = Callable[[RouterInfo, int], Tensor | None]
Runs = Callable[[RouterInfo, int], bool]  # which runs of a router are meant
Seen = list[list[Dense]]


@contextmanager
def watching(routers: Sequence[RouterInfo]) -> Iterator[Seen]:
    """For each router, the dense choices that its experts are given inside, run by run."""
    modules = [module for router in routers for module in (*router.block.modules(), *router.module.modules())]
    before = {id(m): (set(m._forward_hooks), set(m._forward_pre_hooks)) for m in modules}
    try:
        yield [_watch(router) for router in routers]
    finally:
        for module in modules:
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            for now, then in zip(hooks, before[id(module)], strict=True):
                for key in [key for key in now if key not in then]:
                    del now[key]


def _watch(router: RouterInfo) -> list[Dense]:
    if type(getattr(router.block, "experts", None)) is not nn.ModuleDict:
        return watch_experts(router)
    seen: list[Dense] = []  # transformers 4: the block loops over the experts by the router's one-hot mask

    def look(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        mask, weights = output[0].flatten(0, -2) > 0, output[1].flatten(0, -2).float()
        seen.append((mask | (weights > 0) if mask.shape == weights.shape else mask, mask * weights))

    look_last(router.module, look)
    return seen


def every_run(router: RouterInfo, number: int) -> bool:
    return True


def first_run(router: RouterInfo, number: int) -> bool:
    return number == 0


def counts(routers: Sequence[RouterInfo], seen: Seen, valid: Valid, runs: Runs = every_run) -> np.ndarray:
    """int64 [L, E]: how often each expert was chosen by the tokens that count."""
    widest = max(router.num_experts for router in routers)
    total = np.zeros((len(routers), widest), np.int64)
    for router, choices in zip(routers, seen, strict=True):
        for number, (chosen, _) in enumerate(choices):
            if not runs(router, number):
                continue
            keep = valid(router, number)
            if keep is not None:
                chosen = chosen[keep.reshape(-1)]
            total[router.layer, : router.num_experts] += chosen.sum(0).numpy()
    return total


def everything(router: RouterInfo, number: int) -> None:
    """Every token counts."""


def assert_counted(
    statistics: mr.RoutingStatistics, routers: Sequence[RouterInfo], seen: Seen, valid: Valid = everything
) -> None:
    """All that was recorded, in whatever group and phase, is what the experts got of the tokens that count."""
    np.testing.assert_array_equal(statistics.token_sum("counts").sum(0), counts(routers, seen, valid))


def assert_phases(
    statistics: mr.RoutingStatistics,
    routers: Sequence[RouterInfo],
    seen: Seen,
    valid: Valid = everything,
    prefill: Runs = first_run,
) -> None:
    """The runs of `prefill` are of that phase, all others are decode steps."""
    for phase, runs in (("prefill", prefill), ("decode", lambda router, number: not prefill(router, number))):
        recorded = statistics.token_sum("counts", phase).sum(0)
        np.testing.assert_array_equal(recorded, counts(routers, seen, valid, runs), err_msg=phase)


def favorites(routers: Sequence[RouterInfo], seen: Seen) -> dict[int, list[int]]:
    """For each layer that can be steered, the expert chosen most often."""
    total = counts(routers, seen, everything)
    return {
        router.layer: [int(total[router.layer].argmax())]
        for router in routers
        if router.steerable and total[router.layer].any()
    }


def assert_forbidden(
    routers: Sequence[RouterInfo], seen: Seen, experts: dict[int, list[int]], valid: Valid, runs: Runs = every_run
) -> None:
    """No token that counts was given a forbidden expert."""
    total = counts(routers, seen, valid, runs)
    for layer, (expert,) in experts.items():
        assert total[layer, expert] == 0, f"layer {layer}: the forbidden expert {expert} was given to the experts"


def same_outputs(a: Any, b: Any) -> None:
    assert torch.equal(a, b), "the model's output is not what it was unattached"


def assert_recorded_and_steered(
    routed: mr.RoutedModel, model: nn.Module, given: dict[str, Tensor], plain: Tensor
) -> None:
    """A recorded call gives `plain` and counts what the experts are given; a steered one gives them no forbidden
    expert."""
    with watching(routed.routers) as seen, routed.record() as recorder:
        same_outputs(run(model, given), plain)
    assert_counted(recorder.statistics(), routed.routers, seen, everything)
    experts = favorites(routed.routers, seen)
    if not experts:
        return
    with watching(routed.routers) as steered, routed.record() as recorder, routed.steer(mr.Plan.forbid(experts)):
        run(model, given)
    assert_counted(recorder.statistics(), routed.routers, steered, everything)
    assert_forbidden(routed.routers, steered, experts, everything)
