"""`moe_route.nn` without transformers: equal to a loop over tokens, trainable, compilable, and safe at the edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_route as mr
from moe_route import ops, reference
from moe_route.nn import ACTIVATIONS, Experts, SparseMoE, TopKRouter, load_balancing_loss
from moe_route.ops import RouterSpec, expert_paths

SUM = RouterSpec(renormalize="sum")
SPECS = {
    "softmax": RouterSpec(),
    "softmax_sum": SUM,
    "topk_then_softmax": RouterSpec(order="topk_then_score"),
    "deepseek": RouterSpec("sigmoid", groups=4, top_groups=2, renormalize="sum", eps=1e-20, scale=2.5),
    "sparsemixer": RouterSpec("sparsemixer", jitter=0.2),
}


def plain_weights(spec: RouterSpec, logits: Tensor, ids: Tensor) -> Tensor:
    """Weights of the choice in differentiable torch, written out per spec."""
    if spec.score == "sparsemixer":
        first, second = ids[:, :1], ids[:, 1:]
        parts, left = [], logits
        for slot in (first, second):
            best = left.gather(1, slot).detach()
            far = (best - logits) / torch.maximum(logits.abs(), best) > 2 * spec.jitter
            parts.append(torch.softmax(left.masked_fill(far, -torch.inf), 1).gather(1, slot))
            left = left.scatter(1, slot, -torch.inf)
        return torch.cat(parts, 1)
    if spec.order == "topk_then_score":
        return torch.softmax(logits.gather(1, ids), 1)
    scores = torch.sigmoid(logits) if spec.score == "sigmoid" else torch.softmax(logits, 1)
    weights = scores.gather(1, ids)
    if spec.renormalize == "sum":
        weights = weights / (weights.sum(1, keepdim=True) + spec.eps)
    return weights * spec.scale


def expert(experts: Experts, e: int, x: Tensor) -> Tensor:
    weight, bias = experts.up
    rows = F.linear(x, weight[e], None if bias is None else bias[e])
    act = ACTIVATIONS[experts.activation]
    if experts.gated:
        gate, up = rows.chunk(2, -1)
        rows = act(gate) * up
    else:
        rows = act(rows)
    bias = experts.down_proj_bias
    return F.linear(rows, experts.down_proj[e], None if bias is None else bias[e])


def loop(block: SparseMoE, hidden: Tensor) -> Tensor:
    """Token by token, slot by slot."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = F.linear(flat, block.router.weight, block.router.bias)
    _, ids = ops.route(
        logits.detach(), block.router.top_k, block.router.spec, correction_bias=block.router.correction_bias
    )
    weights = plain_weights(block.router.spec, logits, ids.long())
    out = []
    for t, x in enumerate(flat):
        y = block.shared_expert(x[None])[0] if block.shared_expert is not None else torch.zeros_like(x)
        for j, e in enumerate(ids[t].tolist()):
            y = y + weights[t, j] * expert(block.experts, e, x[None])[0]
        out.append(y)
    return torch.stack(out).view(hidden.shape)


def block_of(spec: RouterSpec, hidden: int = 24, dtype: torch.dtype = torch.float32, **kwargs: Any) -> SparseMoE:
    return SparseMoE(
        hidden_size=hidden, num_experts=16, top_k=2, intermediate_size=20, spec=spec, dtype=dtype, **kwargs
    )


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "router_bias": True},
        {"gated": False, "activation": "gelu", "bias": True},
        {"shared": True, "activation": "relu", "hidden": 23},
    ],
    ids=["gated", "biased", "plain", "shared"],
)
def test_equals_a_loop_over_tokens(name: str, options: dict[str, Any]) -> None:
    """Output and every gradient, in float64."""
    options = dict(options)
    hidden = options.pop("hidden", 24)
    if options.pop("shared", False):
        options["shared_expert"] = nn.Linear(hidden, hidden, dtype=torch.float64)
    block = block_of(SPECS[name], hidden, torch.float64, **options)
    x = torch.randn(3, 7, hidden, dtype=torch.float64, requires_grad=True)
    mix = torch.randn_like(x)
    results = []
    for run in (block, lambda value: loop(block, value)):
        out = run(x)
        grads = torch.autograd.grad((out * mix).sum(), [x, *block.parameters()], allow_unused=True)
        results.append((out, *grads))
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_float32_is_within_bounds_of_the_loop() -> None:
    block = block_of(SUM)
    x = torch.randn(40, 24)
    torch.testing.assert_close(block(x), loop(block, x), rtol=1e-5, atol=1e-6)


def test_correction_bias_moves_the_choice_and_not_the_weights() -> None:
    router = TopKRouter(hidden_size=24, num_experts=16, top_k=2, spec=RouterSpec("sigmoid"), correction_bias=True)
    x = torch.randn(30, 24)
    logits, _, before = router(x)
    router.correction_bias[5] = 10.0
    _, weights, ids = router(x)
    assert (ids[:, 0] == 5).all()
    assert (before != 5).any()
    torch.testing.assert_close(weights, torch.sigmoid(logits).gather(1, ids))
    assert "correction_bias" in router.state_dict()
    assert "correction_bias" not in dict(router.named_parameters())


def test_router_returns_the_tuple_of_transformers() -> None:
    router = TopKRouter(
        hidden_size=24, num_experts=16, top_k=2, spec=RouterSpec(weight_dtype=torch.float32), dtype=torch.bfloat16
    )
    logits, weights, ids = router(torch.randn(2, 5, 24).to(torch.bfloat16))
    assert (logits.shape, logits.dtype) == ((10, 16), torch.bfloat16)
    assert (weights.shape, weights.dtype) == ((10, 2), torch.float32)
    assert (ids.shape, ids.dtype) == ((10, 2), torch.int64)
    router = TopKRouter(hidden_size=24, num_experts=16, top_k=2, spec=SUM, dtype=torch.bfloat16)
    assert router(torch.randn(1, 24).to(torch.bfloat16))[1].dtype == torch.bfloat16
    with torch.no_grad():
        assert not router(torch.randn(1, 24).to(torch.bfloat16))[1].requires_grad


def test_gradients_or_not_the_weights_are_the_same_bits() -> None:
    router = TopKRouter(hidden_size=24, num_experts=16, top_k=4, spec=SUM)
    x = torch.randn(50, 24)
    with torch.no_grad():
        _, quiet, _ = router(x)
    _, loud, _ = router(x)
    assert loud.requires_grad
    assert torch.equal(quiet, loud)


def test_trains_a_toy_task() -> None:
    """Four clusters, each with its own linear map: one dense network of the size of an expert cannot, the block can."""
    centers, maps = torch.randn(4, 16) * 3, torch.randn(4, 16, 16) / 4

    def batch(size: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(4, (size,))
        offset = torch.randn(size, 16)
        return centers[which] + offset, torch.einsum("tij,tj->ti", maps[which], offset)

    block = SparseMoE(hidden_size=16, num_experts=8, top_k=2, intermediate_size=32, spec=SUM)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        x, y = batch(96)
        out, (logits, _, ids) = block(x, return_routing=True)
        loss = F.mse_loss(out, y)
        (loss + 0.01 * load_balancing_loss(logits, ids)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]
    x, _ = batch(512)
    used = torch.bincount(block.router(x)[2].flatten(), minlength=8)
    assert (used > 0).sum() >= 4


def test_state_dict_round_trip() -> None:
    block, other = block_of(SUM, bias=True, correction_bias=True), block_of(SUM, bias=True, correction_bias=True)
    x = torch.randn(9, 24)
    assert not torch.equal(block(x), other(x))
    missing = other.load_state_dict(block.state_dict())
    assert not missing.missing_keys
    assert torch.equal(block(x), other(x))
    assert set(block.state_dict()) == {
        "router.weight",
        "router.correction_bias",
        "experts.gate_up_proj",
        "experts.gate_up_proj_bias",
        "experts.down_proj",
        "experts.down_proj_bias",
    }


def test_bfloat16() -> None:
    block = block_of(SUM).to(torch.bfloat16)
    x = torch.randn(30, 24).to(torch.bfloat16)
    out = block(x)
    assert out.dtype == torch.bfloat16
    wide = block.float()(x.float())
    torch.testing.assert_close(out.float(), wide, rtol=0.05, atol=0.05 * wide.abs().max().item())


def test_autocast() -> None:
    block = block_of(SUM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(torch.randn(6, 24))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in block.parameters())


def test_no_tokens() -> None:
    block = block_of(SUM, bias=True)
    out = block(torch.zeros(0, 24))
    assert out.shape == (0, 24)
    out.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in block.parameters())


def test_skipped_slots_and_unused_experts() -> None:
    experts = Experts(num_experts=6, hidden_size=8, intermediate_size=12, bias=True)
    hidden = torch.randn(5, 8, requires_grad=True)
    ids = torch.tensor([[1, -1], [-1, -1], [1, 4], [99, 4], [4, -1]])
    weights = torch.rand(5, 2, requires_grad=True)
    out = experts(hidden, ids, weights)
    assert (out[1] == 0).all()
    expected = torch.stack(
        [
            weights[0, 0] * expert(experts, 1, hidden[0]),
            torch.zeros(8),
            weights[2, 0] * expert(experts, 1, hidden[2]) + weights[2, 1] * expert(experts, 4, hidden[2]),
            weights[3, 1] * expert(experts, 4, hidden[3]),
            weights[4, 0] * expert(experts, 4, hidden[4]),
        ]
    )
    torch.testing.assert_close(out, expected)
    mix = torch.randn(5, 8)
    leaves = [hidden, weights, *experts.parameters()]
    one = torch.autograd.grad((out * mix).sum(), leaves)
    other = torch.autograd.grad((expected * mix).sum(), leaves)
    for mine, plain in zip(one, other, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)
    assert (one[1][ids < 0] == 0).all()
    assert (one[2][[0, 2, 3, 5]] == 0).all()  # experts that nobody chose


def test_residual_is_added_once() -> None:
    experts = Experts(num_experts=4, hidden_size=8, intermediate_size=8)
    hidden, residual = torch.randn(3, 8), torch.randn(3, 8)
    ids, weights = torch.tensor([[0], [2], [-1]]), torch.rand(3, 1)
    out = experts(hidden, ids, weights, residual)
    torch.testing.assert_close(out, experts(hidden, ids, weights) + residual)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_in_one_graph(dtype: torch.dtype) -> None:
    block = block_of(SUM, bias=True, shared_expert=nn.Linear(24, 24)).to(dtype)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(10, 24).to(dtype)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(compiled(x), block(x), **tolerance)
    compiled(x).float().sum().backward()
    grads = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    block(x).float().sum().backward()
    for p, grad in zip(block.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad, **tolerance)


def test_load_balancing_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 5.0, 5.0]], requires_grad=True)
    ids = torch.tensor([[0], [1], [2]])
    p = torch.softmax(logits.detach(), 1)
    valid = torch.tensor([True, True, False])
    expected = 3 * (0.5 * p[:2, 0].mean() + 0.5 * p[:2, 1].mean())
    loss = load_balancing_loss(logits, ids, valid)
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert (logits.grad[2] == 0).all()
    assert (logits.grad[:2] != 0).any()
    uniform = load_balancing_loss(torch.zeros(12, 6), torch.arange(24).view(12, 2) % 6)
    assert uniform.item() == pytest.approx(2.0)
    dropped = load_balancing_loss(torch.zeros(1, 6), torch.tensor([[0, -1]]))
    assert dropped.item() == pytest.approx(1.0)
    assert load_balancing_loss(torch.zeros(0, 6), torch.zeros(0, 2, dtype=torch.int64)).item() == 0


def test_load_balancing_loss_is_that_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    logits = torch.randn(60, 16)
    _, ids = ops.route(logits, 4, SUM)
    mask = torch.ones(4, 15, dtype=torch.int64)
    mask[2, 9:] = 0
    for attention, valid in ((None, None), (mask, mask.flatten() > 0)):
        expected = modeling.load_balancing_loss_func((logits,), 16, 4, attention)
        torch.testing.assert_close(load_balancing_loss(logits, ids, valid), expected)


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="top_k"):
        TopKRouter(hidden_size=8, num_experts=4, top_k=5, spec=SUM)
    with pytest.raises(ValueError, match="silu"):
        Experts(num_experts=4, hidden_size=8, intermediate_size=8, activation="swish")
    with pytest.raises(ValueError, match="convert"):
        Experts(num_experts=4, hidden_size=8, intermediate_size=8, dtype=torch.bfloat16)(
            torch.randn(2, 8), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
        )


def test_sizes_are_named() -> None:
    for call in (lambda: SparseMoE(64, 96, 8, 2), lambda: Experts(8, 64, 32), lambda: TopKRouter(8, 4, 2, SUM)):
        with pytest.raises(TypeError, match="positional argument"):
            call()
    with pytest.raises(TypeError, match=r"spec must be a RouterSpec.*score='sigmoid'"):
        SparseMoE(hidden_size=8, num_experts=4, top_k=2, intermediate_size=8, spec="sigmoid")  # type: ignore[arg-type]


# ---- products on a device where torch has no kernel for groups --------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("tokens", [4, 40])
def test_kernels_of_a_device_give_the_experts(
    tokens: int, activation: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few slots in one operator, many around one activation; with a gradient, operations of torch."""
    of_a_device = [path for path in expert_paths.PATHS if path.devices is None or "cuda" in path.devices]
    monkeypatch.setattr(expert_paths, "PATHS", [replace(path, devices=None) for path in of_a_device])
    sizes = {"num_experts": 6, "hidden_size": 24, "intermediate_size": 20}
    block = Experts(**sizes, activation=activation, gated=gated, bias=True)
    hidden, ids = torch.randn(tokens, 24), torch.randint(-1, 7, (tokens, 2))
    weights = torch.rand(tokens, 2)
    ran: list[str] = []
    for name in ("expert_rows", "expert_activation"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, real=real, name=name, **k: (ran.append(name), real(*a, **k))[1])
    expected = block(hidden, ids, weights)
    assert not ran
    with torch.no_grad():
        torch.testing.assert_close(block(hidden, ids, weights), expected, rtol=1e-5, atol=2e-6)
        assert ran == ["expert_rows" if tokens == 4 else "expert_activation"]
        with torch.autocast("cpu", torch.bfloat16):
            block(hidden, ids, weights)
    assert len(ran) == 1


def test_forward_mode_is_refused_by_the_experts() -> None:
    experts = Experts(num_experts=4, hidden_size=8, intermediate_size=8)
    ids, weights, x = torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match=r"backward\(\) or torch.func.vjp"):
        torch.func.jvp(lambda hidden: experts(hidden, ids, weights), (x,), (x,))


def test_representation_says_what_it_is() -> None:
    text = repr(block_of(SUM))
    assert "num_experts=16" in text
    assert "renormalize='sum'" in text


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_a_capped_router_shows_capped_logits(engine: str) -> None:
    """What steers, scores and is recorded are the capped logits; the router returns the product as it is."""
    spec = RouterSpec("sigmoid", renormalize="sum", softcap=0.5)
    block, hidden = block_of(spec), torch.randn(7, 24)
    raw = block.router(hidden)[0]
    with mr.attach(block, engine=engine) as routed, torch.no_grad():
        with routed.router_logits() as logits:
            block(hidden[None])
        (shown,) = logits.values()
        assert torch.equal(shown.view(7, 16), reference.capped(raw, spec))
        assert shown.abs().max() < 0.5 < raw.abs().max()
