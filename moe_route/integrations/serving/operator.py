"""``moe_route_serving::reroute``: steer and count the choice of one router, on tables whose addresses never change.

It always runs, and data on the device switch it: a token whose rows are -1 keeps the engine's own choice bit for bit,
and is not counted. So a CUDA graph that captured it steers and counts whatever the tables hold at replay. On a CPU
nothing is captured, and the host leaves out what a step does not need: see ``Work``.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

from moe_route.contract.tables import NEUTRAL, ROW_PARAMETERS, STEERING_PLANES, SteeringTables
from moe_route.integrations.serving.counts import PendingTokens, StepCounts
from moe_route.integrations.serving.sites import Site

_ALL_PLANES = (1 << len(STEERING_PLANES)) - 1


class Work(Enum):
    """What the operator does in a step, other than on a CPU always ``ROUTE``."""

    ROUTE = "steer and count in every layer"
    STEER = "steer and count in the layers of the plans, and keep the choice of the others"
    KEEP = "keep the choice, which is counted after the step"
    NOTHING = "nothing"


_sites: list[Site] = []  # of the one engine that this process serves; the operator names them by index
_counts: StepCounts | None = None
_pending: PendingTokens | None = None
_work = Work.ROUTE


def connect(sites: list[Site], counts: StepCounts | None = None, pending: PendingTokens | None = None) -> None:
    """Let the operator act on these sites, in place of those of an earlier engine of this process."""
    global _sites, _counts, _pending, _work
    _sites, _counts, _pending, _work = sites, counts, pending, Work.ROUTE


def set_work(work: Work) -> None:
    """Say what the next step needs."""
    global _work
    _work = work


def connected(sites: list[Site]) -> bool:
    """Whether the operator acts on these sites."""
    return _sites is sites


def neutral_tables(rows: int, num_experts: int, device: torch.device) -> SteeringTables:
    """Steering tables with every plane, all neutral."""
    planes = torch.empty(rows, len(STEERING_PLANES), num_experts, device=device)
    params = torch.empty(rows, len(ROW_PARAMETERS), device=device)
    remap = torch.empty(rows, num_experts, dtype=torch.int32, device=device)
    tables = SteeringTables.from_packed(planes, _ALL_PLANES, params, remap, num_experts)
    copy_plan(tables, 0, SteeringTables(rows, num_experts))
    return tables


def copy_plan(target: SteeringTables, first: int, plan: SteeringTables) -> None:
    """Write a plan's rows into rows ``first`` on of tables made by ``neutral_tables``."""
    planes, _, params, remap = target.packed
    assert planes is not None  # `neutral_tables` made all of them
    assert params is not None
    assert remap is not None
    here = slice(first, first + plan.rows)
    for number, name in enumerate(STEERING_PLANES):
        planes[here, number] = NEUTRAL[name]
    for number, name in enumerate(ROW_PARAMETERS):
        params[here, number] = NEUTRAL[name]
    remap[here] = torch.arange(target.num_experts, dtype=torch.int32, device=remap.device)
    for name, table in plan.tables.items():
        if name == "remap":
            remap[here] = table.to(remap.device)
        elif name in STEERING_PLANES:
            planes[here, STEERING_PLANES.index(name)] = table.to(planes.device)
        else:
            params[here, ROW_PARAMETERS.index(name)] = table.to(params.device)


def reroute(logits: Tensor, weights: Tensor, ids: Tensor, site_index: int) -> None:
    """Steer and count the choice of a router, in place. Where nothing is traced, this saves 10 us of dispatcher."""
    site = _sites[site_index]
    site.reached += 1
    if _work is Work.NOTHING:
        return
    if ids.shape[1] != site.top_k:  # fused shared experts take columns after the chosen ones
        weights, ids = weights[:, : site.top_k], ids[:, : site.top_k]
    if _pending is not None:
        _pending.keep(site_index, logits, ids, weights)
    later = _work is Work.KEEP or (_work is Work.STEER and not site.steers)
    if later and _counts is not None and _counts.keep(site_index, logits, ids, weights):
        return
    tokens = logits.shape[0]
    if len(site.rows) != tokens:
        site.rows = site.tokens[:tokens]
    own = ids.to(torch.int32), weights.to(torch.float32)  # kernels of an engine may want ids as uint32
    new_weights, new_ids = site.route(logits, *own, site.rows, site.numbers)
    if site.traced is not None:
        for kept, new in zip(site.traced, (new_ids, new_weights), strict=True):
            kept[:tokens].copy_(new)
    weights.copy_(new_weights)
    ids.copy_(new_ids.clamp_(min=0))  # a kernel needs an id in every slot: an empty one gets expert 0, with weight 0


def _reroute_fake(logits: Tensor, weights: Tensor, ids: Tensor, site_index: int) -> None:
    return None


_library = torch.library.Library("moe_route_serving", "FRAGMENT")
_library.define("reroute(Tensor logits, Tensor(a!) weights, Tensor(b!) ids, int site_index) -> ()")
_library.impl("reroute", reroute, "CompositeExplicitAutograd")
torch.library.register_fake("moe_route_serving::reroute", _reroute_fake, lib=_library)
