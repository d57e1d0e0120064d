"""What a recording must hold: counted from what the experts of the live model were given, without the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from model_decisions import Dense, watch_experts
from torch import Tensor, nn

import moe_route as mr
from moe_route.patching import RouterSite
from paths.subject import run

# What counts of the n-th run of a router: bool of as many elements as it has tokens, or None for all of them.
Valid = Callable[[RouterSite, int], Tensor | None]
Runs = Callable[[RouterSite, int], bool]  # which runs of a router are meant
Seen = list[list[Dense]]


@contextmanager
def watching(sites: Sequence[RouterSite]) -> Iterator[Seen]:
    """For each router, the dense choices that its experts are given inside, run by run."""
    modules = [module for site in sites for module in (*site.block.modules(), *site.module.modules())]
    before = {id(m): (set(m._forward_hooks), set(m._forward_pre_hooks)) for m in modules}
    try:
        yield [_watch(site) for site in sites]
    finally:
        for module in modules:
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            for now, then in zip(hooks, before[id(module)], strict=True):
                for key in [key for key in now if key not in then]:
                    del now[key]


def _watch(site: RouterSite) -> list[Dense]:
    if type(getattr(site.block, "experts", None)) is not nn.ModuleDict:
        return watch_experts(site)
    seen: list[Dense] = []  # transformers 4: the block loops over the experts by the router's one-hot mask

    def look(module: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        mask, weights = output[0].flatten(0, -2) > 0, output[1].flatten(0, -2).float()
        seen.append((mask | (weights > 0) if mask.shape == weights.shape else mask, mask * weights))

    site.module.register_forward_hook(look)
    return seen


def every_run(site: RouterSite, number: int) -> bool:
    return True


def first_run(site: RouterSite, number: int) -> bool:
    return number == 0


def counts(sites: Sequence[RouterSite], seen: Seen, valid: Valid, runs: Runs = every_run) -> np.ndarray:
    """int64 [L, E]: how often each expert was chosen by the tokens that count."""
    widest = max(site.num_experts for site in sites)
    total = np.zeros((len(sites), widest), np.int64)
    for site, choices in zip(sites, seen, strict=True):
        for number, (chosen, _) in enumerate(choices):
            if not runs(site, number):
                continue
            keep = valid(site, number)
            if keep is not None:
                chosen = chosen[keep.reshape(-1)]
            total[site.layer, : site.num_experts] += chosen.sum(0).numpy()
    return total


def everything(site: RouterSite, number: int) -> None:
    """Every token counts."""


def assert_counted(
    statistics: mr.RoutingStatistics, sites: Sequence[RouterSite], seen: Seen, valid: Valid = everything
) -> None:
    """All that was recorded, in whatever group and phase, is what the experts got of the tokens that count."""
    np.testing.assert_array_equal(statistics.token_sum("counts").sum(0), counts(sites, seen, valid))


def assert_phases(
    statistics: mr.RoutingStatistics,
    sites: Sequence[RouterSite],
    seen: Seen,
    valid: Valid = everything,
    prefill: Runs = first_run,
) -> None:
    """The runs of `prefill` are of that phase, all others are decode steps."""
    for phase, runs in (("prefill", prefill), ("decode", lambda site, number: not prefill(site, number))):
        recorded = statistics.token_sum("counts", phase).sum(0)
        np.testing.assert_array_equal(recorded, counts(sites, seen, valid, runs), err_msg=phase)


def favourites(sites: Sequence[RouterSite], seen: Seen) -> dict[int, list[int]]:
    """For each layer that can be steered, the expert chosen most often."""
    total = counts(sites, seen, everything)
    return {
        site.layer: [int(total[site.layer].argmax())] for site in sites if site.steerable and total[site.layer].any()
    }


def assert_forbidden(
    sites: Sequence[RouterSite], seen: Seen, experts: dict[int, list[int]], valid: Valid, runs: Runs = every_run
) -> None:
    """No token that counts was given a forbidden expert."""
    total = counts(sites, seen, valid, runs)
    for layer, (expert,) in experts.items():
        assert total[layer, expert] == 0, f"layer {layer}: the forbidden expert {expert} was given to the experts"


def same_outputs(a: Any, b: Any) -> None:
    assert torch.equal(a, b), "the model's output is not what it was unattached"


def assert_recorded_and_steered(routed: mr.Routed, model: nn.Module, given: dict[str, Tensor], plain: Tensor) -> None:
    """A recorded call gives `plain` and counts what the experts are given; a steered one gives them no forbidden
    expert."""
    with watching(routed.sites) as seen, routed.record() as recorder:
        same_outputs(run(model, given), plain)
    assert_counted(recorder.statistics(), routed.sites, seen, everything)
    experts = favourites(routed.sites, seen)
    if not experts:
        return
    with watching(routed.sites) as steered, routed.record() as recorder, routed.steer(mr.Plan.forbid(experts)):
        run(model, given)
    assert_counted(recorder.statistics(), routed.sites, steered, everything)
    assert_forbidden(routed.sites, steered, experts, everything)
