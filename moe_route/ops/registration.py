"""Register the operators with torch: schemas, torch's own kernels, the shapes of results, and gradients.

`register` does this for one operator namespace, so that another library with the same operators can be registered in
the same way. ``moe_route`` is what users call; in ``moe_route_torch`` torch serves every device, which kernels hand
calls on to and are compared with. The tests add a namespace for the CUDA kernels on an emulated device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_route.contract.limits import MAX_CHOSEN
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import SteeringTables
from moe_route.ops import library, torch_backend
from moe_route.ops.schemas import SCHEMAS
from moe_route.ops.self_check import CUDA, Checked

_LIBRARIES: list[torch.library.Library] = []  # the registrations live as long as these objects
_DEVICES = ("CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1", "PrivateUse2", "PrivateUse3", "Other")
_AUTOGRAD_KEYS = [
    torch._C.DispatchKey.__members__[name]
    for name in (*(f"Autograd{device}" for device in _DEVICES), "ADInplaceOrView")
]


def register(namespace: str, kernels: Checked | None = None) -> None:
    """Define ``torch.ops.<namespace>.*``, with torch as its backend wherever no library brings kernels.

    ``kernels`` are those of a device, which call ``check_kernels`` before they serve.
    """
    definitions = torch.library.Library(namespace, "DEF")
    if kernels is not None:
        definitions.define("check_kernels(int device, int experts) -> ()")
        definitions.impl("check_kernels", kernels.operator, "CompositeExplicitAutograd")
    for name, schema in SCHEMAS.items():
        definitions.define(f"{name}{schema}")
        kernel = torch_backend.OPERATORS[name]
        if namespace == "moe_route" and library.asked() == "native":
            kernel = partial(_refused, kernel)
        # Not implicit: an operator that mutates cannot decompose under autograd, and a compiler would trace into it.
        definitions.impl(name, kernel, "CompositeExplicitAutograd")
    _LIBRARIES.append(definitions)
    fakes: dict[str, Callable[..., Any]] = {
        "route": _route_fake,
        "observe": _observe_fake,
        "observe_layers": _observe_layers_fake,
        "route_weights": _route_weights_fake,
        "dispatch": _dispatch_fake,
        "permute": _permute_fake,
        "combine": _combine_fake,
        "expert_rows": _expert_rows_fake,
        "expert_activation": _expert_activation_fake,
        "pack_expert_weight": _pack_expert_weight_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", _on_one_device(name, fake))
    # route and observe have no gradient, since an operator that mutates an argument cannot have one. Autograd passes
    # them through, and their results do not require grad. If a gradient is wanted, `ops.route` uses the weights of
    # route_weights.
    for name in ("route", "observe", "observe_layers"):
        definitions.impl(name, torch.library.fallthrough_kernel, "Autograd")
    operators = getattr(torch.ops, namespace)
    gradients: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "route_weights": (_weights_backward, _keep_inputs),
        "permute": (partial(_permute_backward, operators), _keep_order),
        "combine": (partial(_combine_backward, operators), _keep_combine),
    }
    for name, (backward, keep) in gradients.items():
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=keep)
    for name in ("expert_rows", "expert_activation", "pack_expert_weight"):
        torch.library.register_autograd(f"{namespace}::{name}", partial(_no_gradient, name))


def _refused(kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    leading = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
    library.refuse_torch(leading.device)
    return kernel(*args, **kwargs)


# ---- shapes of results ------------------------------------------------------------------------------------------


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse tensors on different devices before calling `fake`.

    torch calls the fake function as soon as one tensor is on the meta device. The result would then be on a device
    whose values are read.
    """

    def checked(*args: Any, **kwargs: Any) -> Any:
        lists = [value if isinstance(value, (list, tuple)) else [value] for value in (*args, *kwargs.values())]
        places = sorted({str(value.device) for values in lists for value in values if isinstance(value, Tensor)})
        where = " and ".join(places)
        torch._check_value(len(places) < 2, lambda: f"the tensors of {name} lie on {where}: move them to one")
        return fake(*args, **kwargs)

    return checked


def _new_weights(logits: Tensor, k: Any) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((logits.shape[0], k), dtype=dtype)


def _route_fake(logits: Tensor, k: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    torch._check_value(logits.dim() == 2, lambda: f"logits must be [tokens, experts], got {list(logits.shape)}")
    torch._check_value(
        1 <= k <= min(logits.shape[1], MAX_CHOSEN), lambda: f"k = {k} is outside 1..min(experts, {MAX_CHOSEN})"
    )
    return _new_weights(logits, k), logits.new_empty((logits.shape[0], k), dtype=torch.int32)


def _observe_fake(logits: Tensor, ids: Tensor, *_: Any, **__: Any) -> None:
    torch._check_value(ids.dim() == 2, lambda: f"ids must be [tokens, k], got {list(ids.shape)}")


def _observe_layers_fake(logits: list[Tensor], ids: list[Tensor], *_: Any, **__: Any) -> None:
    torch._check_value(len(logits) == len(ids), lambda: f"{len(logits)} layers of logits, {len(ids)} of ids")


def _route_weights_fake(logits: Tensor, ids: Tensor, *_: Any, **__: Any) -> Tensor:
    torch._check_value(ids.dim() == 2, lambda: f"ids must be [tokens, k], got {list(ids.shape)}")
    return _new_weights(logits, ids.shape[1])


def _dispatch_fake(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch._check_value(ids.dim() == 2, lambda: f"ids must be [tokens, k], got {list(ids.shape)}")
    tokens, k = ids.shape
    sizes = ((num_experts + 1,), (num_experts,), (tokens * k + num_experts * (block - 1),), (tokens, k))
    offsets, counts, order, inverse = (ids.new_empty(size, dtype=torch.int64) for size in sizes)
    return offsets, ids.new_empty(num_experts, dtype=torch.int32), counts, order, inverse


def _permute_fake(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    torch._check_value(x.dim() == 2, lambda: f"x must be [tokens, hidden], got {list(x.shape)}")
    return x.new_empty((order.shape[0], x.shape[1]))


def _combine_fake(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, *_: Any, **__: Any) -> Tensor:
    torch._check_value(rows.dim() == 2, lambda: f"rows must be [dispatched rows, hidden], got {list(rows.shape)}")
    return rows.new_empty((inverse.shape[0], rows.shape[1]))


def _expert_rows_fake(
    x: Tensor, offsets: Tensor, counts: Tensor, order: Tensor, k: int, up: Tensor, down: Tensor, *_: Any
) -> Tensor:
    torch._check_value(x.dim() == 2, lambda: f"x must be [tokens, hidden], got {list(x.shape)}")
    torch._check_value(down.dim() == 3, lambda: f"down must be [experts, out, in], got {list(down.shape)}")
    return x.new_empty((order.shape[0], down.shape[1]))


def _pack_expert_weight_fake(weight: Tensor, pairing: int) -> Tensor:
    torch._check_value(weight.dim() == 3, lambda: f"weight must be [experts, out, in], got {list(weight.shape)}")
    experts, rows, columns = weight.shape
    panels, words = -(-rows // 64), -(-columns * weight.element_size() // 16) * 4
    return weight.new_empty((experts, panels, words, 64), dtype=torch.int32)


def _expert_activation_fake(
    rows: Tensor, offsets: Tensor, bias: Tensor | None, activation: int, pairing: int, *_: Any
) -> Tensor:
    torch._check_value(rows.dim() == 2, lambda: f"rows must be [dispatched rows, columns], got {list(rows.shape)}")
    return rows.new_empty((rows.shape[0], rows.shape[1] // (1 if pairing == 0 else 2)))


# ---- gradients of route_weights ---------------------------------------------------------------------------------


@contextmanager
def _recording() -> Iterator[None]:
    """Record gradients inside an operator's kernel, where torch has disabled the autograd keys."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        keys = keys.remove(key)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, keys), torch.enable_grad():
        yield


@torch.library.custom_op("moe_route::route_weights_backward", mutates_args=())
def _route_weights_backward(
    grad: Tensor,
    logits: Tensor,
    ids: Tensor,
    policy: int,
    tokens: Tensor | None,
    group_fill: float,
    eps: float,
    norm_p: float,
    scale: float,
    jitter: float,
    softcap: float,
    expert_scale: Tensor | None,
    steering: Tensor | None,
    steering_planes: int,
    row_params: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `route_weights` in logits, expert_scale, steering and row_params; empty tensors for missing inputs.

    They are recomputed through the reference under autograd, so the forward pass keeps only its inputs. This is an
    operator of its own so that torch.compile does not trace into the reference, which may read tensor values.
    """
    from moe_route import reference

    spec = RouterSpec.from_packed(policy, group_fill, eps, norm_p, scale, jitter, softcap)
    optional = (expert_scale, steering, row_params)
    with _recording():
        leaf = logits.detach().requires_grad_()
        scales, planes, params = [None if value is None else value.detach().requires_grad_() for value in optional]
        tables = None
        if planes is not None or params is not None:
            tables = SteeringTables.from_packed(planes, steering_planes, params, None, logits.shape[1])
        weights = reference.route_weights(leaf, ids, spec, expert_scale=scales, steering=tables, tokens=tokens)
        present = [value for value in (leaf, scales, planes, params) if value is not None]
        gradients = torch.autograd.grad(weights, present, grad, allow_unused=True, materialize_grads=True)
    remaining = iter(gradients[1:])
    made = [grad.new_empty(0) if value is None else next(remaining).contiguous() for value in optional]
    return gradients[0].contiguous(), made[0], made[1], made[2]


@_route_weights_backward.register_fake
def _route_weights_backward_fake(
    grad: Tensor, logits: Tensor, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, expert_scale, steering, _, row_params = rest
    made = [grad.new_empty(0) if v is None else v.new_empty(v.shape) for v in (expert_scale, steering, row_params)]
    return logits.new_empty(logits.shape), made[0], made[1], made[2]


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, ids, policy, tokens, *numbers, expert_scale, steering, planes, row_params = inputs
    ctx.save_for_backward(logits, ids, tokens, expert_scale, steering, row_params)
    ctx.policy, ctx.numbers, ctx.planes = policy, tuple(numbers), planes


def _weights_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, ids, tokens, *optional = ctx.saved_tensors
    of_logits, *made = _route_weights_backward(
        grad.contiguous(), logits, ids, ctx.policy, tokens, *ctx.numbers, *optional[:2], ctx.planes, optional[2]
    )
    of_scale, of_steering, of_params = (
        None if value is None else gradient for value, gradient in zip(optional, made, strict=True)
    )
    return (of_logits, None, None, None, *(None for _ in ctx.numbers), of_scale, of_steering, None, of_params)


# ---- gradients of permute and combine ---------------------------------------------------------------------------


def _keep_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, order, inverse = inputs
    ctx.save_for_backward(order, inverse)


def _permute_backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Sum the gradients of a token's rows: combine with weights of one."""
    order, inverse = ctx.saved_tensors
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    ones = torch.ones(inverse.shape, dtype=dtype, device=grad.device)
    return operators.combine.default(grad.contiguous(), ones, order, inverse, None), None, None


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, order, inverse, residual = inputs
    ctx.save_for_backward(rows, weights, order, inverse)
    ctx.has_residual = residual is not None


def _combine_backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient of a row: its weight times its token's gradient. Gradient of a weight: inner product of the two."""
    rows, weights, order, inverse = ctx.saved_tensors
    of_rows = of_weights = None
    if ctx.needs_input_grad[0]:
        of_rows = (operators.permute.default(grad.contiguous(), order, inverse) * _by_row(weights, order)).to(
            rows.dtype
        )
    if ctx.needs_input_grad[1]:
        of_weights = torch.stack([_product(rows, grad, inverse[:, j]) for j in range(inverse.shape[1])], 1)
        of_weights = of_weights.to(weights.dtype)
    return of_rows, of_weights, None, None, grad if ctx.has_residual else None


def _by_row(weights: Tensor, order: Tensor) -> Tensor:
    """The weight [R, 1] of the slot that each row serves; 0 where it serves none."""
    if weights.numel() == 0:
        return weights.new_zeros(order.shape[0], 1)
    at = order.clamp(0, weights.numel() - 1)
    return torch.where((order >= 0) & (order == at), weights.reshape(-1)[at], 0.0)[:, None]


def _product(rows: Tensor, grad: Tensor, at: Tensor) -> Tensor:
    """Inner products [T] of the rows at ``at`` with grad [T, H]; 0 where ``at`` is -1, without reading a row."""
    if rows.shape[0] == 0:
        return grad.new_zeros(at.shape)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    row = at.clamp(0, rows.shape[0] - 1)
    product = (rows[row].to(wide) * grad.to(wide)).sum(1)
    return torch.where(at == row, product, 0.0)


def _no_gradient(name: str, ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(f"{name} has no gradient: train with moe_route.nn.Experts")


register("moe_route", CUDA)
register("moe_route_torch")
library.serves_cuda()
