"""Check at attach that a router does what its row of the table says.

The router's own forward runs on random hidden states, in evaluation mode, without touching any random state. Its
decision is then recomputed from its own logits. Ids must be equal wherever scores are not tied: a row may differ only
if nudging its logits by a few units in the last place changes the choice. Weights must agree to the last bits of the
precision in which they were computed. A router without weights at attach is compared so when the model first runs it.

`undecided` says where `route` may choose other experts than a model does from the same logits.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.modules.intercept import at, resident
from moe_route.modules.watch import NothingScoredError
from moe_route.reference import capped
from moe_route.routers.adapter import Decision, Output
from moe_route.routers.discovery import ModelNotSupportedError, RouterInfo
from moe_route.routers.family import TESTED, gate_logits, weight_dtype
from moe_route.routers.recognize import PROBES, random_states, undisturbed, unreadable

ULPS = 16  # tolerance, in units in the last place, for another order of summation
NUDGES = 16
SCORE_UNITS = 4  # `tie_units` where torch and math.h each compute the scores; 3 were measured (docs/describe.md)
_OTHER = f"It is from another version of transformers, or changed; install {TESTED}, which is tested."


def check_router(router: RouterInfo) -> str:
    """Compare the router with its specification.

    Returns why the fused engine cannot be used after all, or an empty string. Raises `ModelNotSupportedError` where
    router and specification disagree.
    """
    with undisturbed(router.module), torch.no_grad():
        hidden, arguments = _probes(router)
        args, output = _probed(router, hidden, arguments)
        decision = _read(router, args, output)
        start = router.adapter.chosen(args, output, decision)
        _compare(router, "its own logits", start, (hidden, *arguments))
        _compare_rewritten(router, args, output, decision, start)
        if router.engine != "fused":
            return ""
        fused = gate_logits(router.module, router.family.gate, hidden)
        dtype = weight_dtype(router.family.weights, hidden, fused)
        if fused.dtype != decision.logits.dtype or dtype != decision.weights.dtype:
            own = f"{decision.logits.dtype} and {decision.weights.dtype}"
            return f"its logits and weights are {own}, the fused ones {fused.dtype} and {dtype}"
        try:
            _compare(router, "fused logits", decision._replace(logits=fused), (hidden, *arguments))
        except ModelNotSupportedError as difference:
            return str(difference)
    return ""


def runs_alone(router: RouterInfo, device: torch.device) -> bool:
    """Whether a router can be compared with its specification where it runs now, on `device`."""
    readable = unreadable(router.module) is None and device.type != "meta"
    return readable and not router.module.training and not torch.is_autocast_enabled(device.type)


def check_output(router: RouterInfo, args: tuple[object, ...], output: object) -> bool:
    """Compare what a router returned in a forward of the model with its specification (`check_router` could not run).

    Returns whether it was compared; else only its form was: in training, under autocast, without a token, and while its
    weights are sharded or on the meta device. Raises `ModelNotSupportedError`.
    """
    with torch.no_grad():
        decision = _read(router, args, output, None)
        logits = decision.logits
        if not len(logits) or not runs_alone(router, logits.device):
            return False
        assert isinstance(output, tuple)
        start = router.adapter.chosen(args, output, decision)
        rows = (~start.logits.isnan().any(1)).nonzero().flatten()[:PROBES]  # of padding, they may be NaN
        _compare(router, "its own logits", Decision(*(part[rows] for part in start)), args)
    return True


def _probed(router: RouterInfo, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
    try:
        return router.adapter.probe(hidden, arguments)
    except (TypeError, ValueError, AttributeError, IndexError, NothingScoredError) as error:
        raise ModelNotSupportedError(
            f"{type(router.module).__name__} at {router.name!r} cannot be run on hidden states as its family says "
            f"({type(error).__name__}: {error}). {_OTHER}"
        ) from error


def _read(router: RouterInfo, args: tuple[object, ...], output: object, tokens: int | None = PROBES) -> Decision:
    """Read the decision on so many tokens (None: any number) from a router's output.

    Raises `ModelNotSupportedError` where the output has another form.
    """
    kind, fix = type(router.module).__name__, f"Install {TESTED}, or a version whose routers return the same."
    wrong = ModelNotSupportedError(f"{kind} at {router.name!r} does not return what its family says. {fix}")
    if not isinstance(output, tuple):
        raise wrong
    try:
        decision = router.adapter.read(args, output)
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise wrong from error
    if not all(isinstance(tensor, Tensor) for tensor in decision):
        raise wrong
    logits, weights, ids = decision
    shapes = (tuple(logits.shape), tuple(weights.shape), tuple(ids.shape))
    tokens = logits.shape[0] if tokens is None and logits.dim() else tokens
    expected = ((tokens, router.num_experts), (tokens, router.top_k), (tokens, router.top_k))
    if shapes != expected or ids.is_floating_point() or not weights.is_floating_point():
        raise ModelNotSupportedError(
            f"{kind} at {router.name!r} returns shapes {shapes} (ids {ids.dtype}), not {expected}. {fix}"
        )
    return decision


def _compare_rewritten(
    router: RouterInfo, args: tuple[object, ...], output: Output, decision: Decision, start: Decision
) -> None:
    """Raise `ModelNotSupportedError` unless writing the router's own choice reproduces its own output."""
    if not router.adapter.changes_choice:
        return
    _, weights, ids = router.adapter.write(args, output, decision, start.weights, start.ids)
    room = 4 * torch.finfo(decision.weights.dtype).eps
    if not torch.equal(ids, decision.ids) or not torch.allclose(weights, decision.weights, rtol=room, atol=room):
        raise ModelNotSupportedError(
            f"{type(router.module).__name__} at {router.name!r} does not drop tokens or share weight as its "
            f"family says. {_OTHER}"
        )


def _probes(router: RouterInfo) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Random hidden states, and the correction bias where the block passes one as an argument."""
    family, block = router.family, router.block
    name = "weight" if family.gate is None else family.gate.weight
    weight = at(router.module, name)
    if not isinstance(weight, Tensor):
        matrices = chain(router.module.parameters(), router.block.parameters())
        weight = next(p for p in matrices if p.dim() == 2)
    size = _hidden_size(router, weight)
    shape = (1, PROBES, size) if family.input_rank == 3 else (PROBES, size)
    hidden = random_states(shape, 0).to(weight.device if not weight.is_meta else "cpu", _model_dtype(router))
    if family.bias_argument is None:
        return hidden, ()
    biases = (resident(block, name) for name in ("e_score_correction_bias", "expert_bias"))
    found = next((bias for bias in biases if bias is not None), None)
    return hidden, (() if found is None else (found,))


def _model_dtype(router: RouterInfo) -> torch.dtype:
    """The dtype of the hidden states, taken from the experts, because a gate may be kept in float32."""
    experts = (
        at(owner, "experts") for owner in (router.block, router.module)
    )  # a block that chooses is the module itself
    inside = chain.from_iterable(each.parameters() for each in experts if isinstance(each, nn.Module))
    parameters = chain(inside, router.module.parameters(), router.block.parameters())  # some may be quantized
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return next((parameter.dtype for parameter in parameters if parameter.dtype in floats), torch.float32)


def _hidden_size(router: RouterInfo, weight: Tensor) -> int:
    """Width of the router's first matrix. A linear layer states it, because its weight may be packed."""
    linear = next((module for module in router.module.modules() if hasattr(module, "in_features")), None)
    return int(weight.shape[1] if linear is None else getattr(linear, "in_features"))  # noqa: B009 (no known attribute)


def _compare(router: RouterInfo, source: str, decision: Decision, inputs: tuple[object, ...]) -> None:
    """Raise `ModelNotSupportedError` unless recomputing from the logits gives the router's weights and ids."""
    logits, weights, ids = decision
    family, k = router.family, ids.shape[1]
    scale = family.scale_of(router.module)
    bias = family.bias_of(router.module, inputs)
    again, chosen = ops.route(logits, k, router.spec, correction_bias=bias, expert_scale=scale)
    kind = f"{type(router.module).__name__} at {router.name!r}"
    differ = (chosen.long().sort(1).values != ids.sort(1).values).any(1)
    unit = torch.finfo(torch.float32).eps
    if family.low_precision:
        unit = max(torch.finfo(tensor.dtype).eps for tensor in (logits, weights))
    if family.chosen_by == "logits" and bool(differ.any()):
        clear = differ & ~_tied(router, logits, k, bias, scale, ULPS * unit)
        if bool(clear.any()):
            raise ModelNotSupportedError(
                f"{kind} does not choose as its specification says: {int(clear.sum())} of {len(ids)} probes differ "
                f"when recomputed from {source} ({router.spec}). {_OTHER}"
            )
    again, _ = ops.route(
        logits, k, router.spec, choice=ids, choice_mode="replay", correction_bias=bias, expert_scale=scale
    )
    error = (again - weights.float()).abs() / weights.float().abs().clamp(min=torch.finfo(torch.float32).tiny)
    room = ULPS * unit + torch.finfo(weights.dtype).eps * 2
    worst = (
        float(error.nan_to_num(0.0, posinf=0.0).max()) if error.numel() else 0.0
    )  # weights that are all NaN leave nothing to compare
    if worst > room:
        raise ModelNotSupportedError(
            f"{kind} does not weigh as its specification says: weights recomputed from {source} are off by {worst:.2g} "
            f"(room {room:.2g}, {router.spec}). {_OTHER}"
        )


def _tied(router: RouterInfo, logits: Tensor, k: int, bias: Tensor | None, scale: Tensor | None, size: float) -> Tensor:
    """bool [T]: rows whose choice changes when their logits are nudged by `size`, relative to 1 + |z|."""
    generator = torch.Generator().manual_seed(1)
    first = ops.route(logits.float(), k, router.spec, correction_bias=bias, expert_scale=scale)[1].sort(1).values
    tied = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for _ in range(NUDGES):
        nudge = torch.rand(logits.shape, generator=generator, device="cpu").to(logits.device) * 2 - 1
        moved = logits.float() + nudge * size * (1 + logits.float().abs())
        ids = ops.route(moved, k, router.spec, correction_bias=bias, expert_scale=scale)[1]
        tied |= (ids.sort(1).values != first).any(1)
    return tied


# ---- where the fused engine may choose otherwise


def tie_units(spec: RouterSpec, has_bias: bool) -> int:
    """Units in the last place by which deciding scores of a model differ at most where `route` chooses other experts.

    0 for logits that are compared themselves, and for their softmax: only exact ties differ. A unit is that of the
    dtype in which the model scores, at the size of the score and of the largest correction bias.
    """
    compares_logits = spec.order == "topk_then_score" or spec.score in ("softmax", "identity")
    return 0 if compares_logits and not has_bias and spec.top_groups == spec.groups else SCORE_UNITS


def undecided(logits: Tensor, k: int, spec: RouterSpec, bias: Tensor | None, low_precision: bool) -> Tensor:
    """bool []: whether scores of some row, as torch computes them, are too close for `route` to choose alike for sure.

    These are the k-th and the next score, and the last group that stays with the first that does not. NaN is too close.
    """
    logits = capped(logits, spec)
    scores = _scores(logits if low_precision else logits.float(), spec)
    limits, value = torch.finfo(scores.dtype), scores if bias is None else scores + bias
    least = limits.tiny if bias is None else bias.abs().max() + limits.tiny
    room = (tie_units(spec, bias is not None) * limits.eps, least)
    close = torch.zeros((), dtype=torch.bool, device=logits.device)
    if spec.top_groups < spec.groups:
        grouped = value.unflatten(-1, (spec.groups, -1))
        best = min(2, grouped.shape[-1]) if spec.group_score == "top2_sum" else 1
        of_groups = grouped.topk(best).values.sum(-1)
        close |= _close(of_groups, spec.top_groups, *room)
        kept = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, of_groups.topk(spec.top_groups).indices, True)
        value = grouped.masked_fill(~kept[..., None], spec.group_fill).flatten(-2)
    return close if k == logits.shape[1] else close | _close(value, k, *room)


def _scores(z: Tensor, spec: RouterSpec) -> Tensor:
    """What the model compares, before a bias."""
    if spec.order == "topk_then_score":
        return z
    match spec.score:
        case "softmax":
            return z.softmax(-1)
        case "sigmoid":
            return z.sigmoid()
        case "sqrt_softplus":
            return F.softplus(z).sqrt()
        case _:
            return z


def _close(values: Tensor, k: int, unit: float, least: Tensor | float) -> Tensor:
    """Whether in some row the k-th largest value and the next lie within `unit`, relative to them and `least`."""
    best = values.topk(k + 1).values[:, k - 1 :].float()
    return ~(best[:, 0] - best[:, 1] > unit * (best.abs().amax(1) + least)).all()
