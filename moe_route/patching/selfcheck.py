"""The check on attach: does a router do what its row of the table says?

The router's own forward is run on random hidden states, in evaluation mode and without touching any random state, and
its decision is recomputed from its own logits. Ids must be the same wherever scores are not tied: a differing row is
excused only where moving the logits by a few units in the last place changes the choice. Weights must agree to the
last bits of the precision they were computed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe_route import ops
from moe_route.patching.engines import gate_logits, weight_dtype
from moe_route.patching.families import at
from moe_route.patching.sites import ModelNotSupported, RouterSite

PROBES = 64
ULPS = 16  # room for another order of summation
NUDGES = 16
_OTHER = "It is from another version of transformers, or changed; install transformers 5.23, which is tested."


def unreadable(site: RouterSite) -> str | None:
    """Why the router cannot be run by itself now, or None."""
    for parameter in site.module.parameters():
        if parameter.is_meta and not hasattr(site.module, "_hf_hook"):
            return "its weights are on the meta device"
        if type(parameter).__name__ == "DTensor":
            return "its weights are sharded (DTensor)"
    return None


def check_site(site: RouterSite) -> str:
    """Compare the router with its specification. Raises `ModelNotSupported` where they disagree.

    Returns why the fused engine cannot be used after all, or an empty string.
    """
    with _undisturbed(site.module), torch.no_grad():
        hidden, arguments = _probes(site)
        output = site.module.forward(hidden.clone(), *arguments)
        logits, weights, ids = _parts(site, output)
        _compare(site, "its own logits", logits, weights, ids, (hidden, *arguments))
        if site.engine != "fused":
            return ""
        fused = gate_logits(site.module, site.family.gate, hidden)
        dtype = weight_dtype(site.family.weights, hidden, fused)
        if fused.dtype != output[site.family.logits_at].dtype or dtype != weights.dtype:
            own = f"{logits.dtype} and {weights.dtype}"
            return f"its logits and weights are {own}, the fused ones {fused.dtype} and {dtype}"
        try:
            _compare(site, "fused logits", fused, weights, ids, (hidden, *arguments))
        except ModelNotSupported as difference:
            return str(difference)
    return ""


def _parts(site: RouterSite, output: object) -> tuple[Tensor, Tensor, Tensor]:
    family = site.family
    last = max(family.logits_at, family.weights_at, family.ids_at)
    kind, mend = type(site.module).__name__, "Install transformers 5.23, or a version whose routers return the same."
    if not isinstance(output, tuple) or len(output) <= last or not all(isinstance(t, Tensor) for t in output):
        raise ModelNotSupported(f"{kind} at {site.name!r} does not return (logits, weights, ids). {mend}")
    logits, weights, ids = family.logits_of(output), output[family.weights_at], output[family.ids_at]
    shapes = (tuple(logits.shape), tuple(weights.shape), tuple(ids.shape))
    expected = ((PROBES, site.num_experts), (PROBES, site.top_k), (PROBES, site.top_k))
    if shapes != expected or ids.is_floating_point() or not weights.is_floating_point():
        raise ModelNotSupported(
            f"{kind} at {site.name!r} returns shapes {shapes} (ids {ids.dtype}), not {expected}. {mend}"
        )
    return logits, weights, ids


def _probes(site: RouterSite) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Random hidden states, and the correction bias where the block passes one."""
    family, block = site.family, site.block
    name = "weight" if family.gate is None else family.gate.weight
    weight = at(site.module, name)
    if not isinstance(weight, Tensor):
        weight = next(p for p in site.module.parameters() if p.dim() == 2)
    generator = torch.Generator().manual_seed(0)
    shape = (1, PROBES, weight.shape[1]) if family.input_rank == 3 else (PROBES, weight.shape[1])
    hidden = torch.randn(shape, generator=generator).to(
        weight.device if not weight.is_meta else "cpu", _model_dtype(site)
    )
    if family.correction_bias is None or not family.correction_bias.startswith("argument:"):
        return hidden, ()
    found = next((at(block, n) for n in ("e_score_correction_bias", "expert_bias") if at(block, n) is not None), None)
    return hidden, (() if found is None else (found,))


def _model_dtype(site: RouterSite) -> torch.dtype:
    """The dtype of the hidden states the router is given: that of the experts (a gate may be kept in float32)."""
    experts = at(site.block, "experts")
    inside = experts.parameters() if isinstance(experts, nn.Module) else iter(())
    parameter = next((p for p in inside if p.dtype in (torch.float32, torch.bfloat16, torch.float16)), None)
    of = site.parameter if parameter is None else parameter
    return torch.float32 if of is None else of.dtype


def _compare(
    site: RouterSite, source: str, logits: Tensor, weights: Tensor, ids: Tensor, inputs: tuple[Tensor, ...]
) -> None:
    """Raise `ModelNotSupported` unless the decision recomputed from `logits` is (weights, ids)."""
    family, k = site.family, ids.shape[1]
    scale = family.scale_of(site.module)
    bias = family.bias_of(site.module, inputs)
    again, chosen = ops.route(logits, k, site.spec, correction_bias=bias, expert_scale=scale)
    kind = f"{type(site.module).__name__} at {site.name!r}"
    differ = (chosen.long().sort(1).values != ids.sort(1).values).any(1)
    unit = torch.finfo(logits.dtype if family.low_precision else torch.float32).eps
    if bool(differ.any()):
        clear = differ & ~_tied(site, logits, k, bias, scale, ULPS * unit)
        if bool(clear.any()):
            raise ModelNotSupported(
                f"{kind} does not choose as its specification says: {int(clear.sum())} of {len(ids)} probes differ "
                f"when recomputed from {source} ({site.spec}). {_OTHER}"
            )
    again, _ = ops.route(logits, k, site.spec, given_ids=ids, given="replay", correction_bias=bias, expert_scale=scale)
    error = (again - weights.float()).abs() / weights.float().abs().clamp(min=torch.finfo(torch.float32).tiny)
    room = ULPS * unit + torch.finfo(weights.dtype).eps * 2
    worst = float(error.nan_to_num(0.0, posinf=0.0).max())  # a router full of NaN gives nothing to compare
    if worst > room:
        raise ModelNotSupported(
            f"{kind} does not weigh as its specification says: weights recomputed from {source} are off by {worst:.2g} "
            f"(room {room:.2g}, {site.spec}). {_OTHER}"
        )


def _tied(site: RouterSite, logits: Tensor, k: int, bias: Tensor | None, scale: Tensor | None, size: float) -> Tensor:
    """bool [T]: rows whose choice changes when their logits are nudged by `size`, relative to 1 + |z|."""
    generator = torch.Generator().manual_seed(1)
    first = ops.route(logits.float(), k, site.spec, correction_bias=bias, expert_scale=scale)[1].sort(1).values
    tied = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for _ in range(NUDGES):
        nudge = torch.rand(logits.shape, generator=generator).to(logits.device) * 2 - 1
        moved = logits.float() + nudge * size * (1 + logits.float().abs())
        ids = ops.route(moved, k, site.spec, correction_bias=bias, expert_scale=scale)[1]
        tied |= (ids.sort(1).values != first).any(1)
    return tied


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; training flags and random states as before afterwards."""
    flags = [(inner, inner.training) for inner in module.modules()]
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(d.index for d in devices)):
            for inner, _ in flags:
                inner.training = False
            yield
    finally:
        for inner, training in flags:
            inner.training = training
