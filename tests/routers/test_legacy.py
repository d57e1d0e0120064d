"""The forms that decisions had in older versions of transformers, as small classes of this file.

What these versions really do is walked by `make test-matrix` (docs/versions.csv).
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from harness.exhaustive import exhaustive_but
from harness.model_decisions import watch_experts
from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route import reference
from moe_route.calls import Labels
from moe_route.ops import StatisticsTables, SteeringTables
from moe_route.patching import Attachment
from moe_route.routers import ModelNotSupportedError, find_routers
from moe_route.routers.adapter import order_of
from moe_route.routers.check import check_router
from moe_route.steering import LayerShape

E, K, H = 8, 2, 16


# ---------------------------------------------------------------------------------------------------------------
# Routers that return the same in another order, or without their logits.


def order(kind: str, logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    known = {
        "logits": logits,
        "probabilities": logits.float().softmax(-1),
        "weights": weights,
        "scores": torch.zeros_like(logits, dtype=weights.dtype).scatter(1, ids, weights),
        "ids": ids,
    }
    return tuple(known[part] for part in kind.split())


ORDERS = (
    "probabilities weights ids",
    "logits ids weights",
    "ids weights logits",
    "ids weights",
    "weights ids",
    "scores ids",
)


def reordered(kind: str) -> nn.Module:
    """A Qwen3-MoE whose routers return `kind`, and whose blocks know it."""
    model = tiny_model("qwen3_moe")
    router, block = type(model.layers[0].mlp.gate), type(model.layers[0].mlp)

    class Router(router):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
            logits = F.linear(hidden, self.weight)
            weights, ids = logits.softmax(-1).topk(K, dim=-1)
            return order(kind, logits, weights / weights.sum(1, keepdim=True), ids)

    class Block(block):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Tensor) -> Tensor:
            flat = hidden.view(-1, hidden.shape[-1])
            parts = dict(zip(kind.split(), self.gate(flat), strict=True))
            weights = parts["weights"] if "weights" in parts else parts["scores"].gather(1, parts["ids"])
            return self.experts(flat, parts["ids"], weights).view(hidden.shape)

    for layer in model.layers:
        layer.mlp.__class__, layer.mlp.gate.__class__ = Block, Router
    return model


def counted(attachment: Attachment) -> list[StatisticsTables]:
    tables = [StatisticsTables.zeros(router.num_experts, groups=1) for router in attachment.routers]
    attachment.set_statistics(tables)
    return tables


def bias(router: Any) -> SteeringTables:
    generator = torch.Generator().manual_seed(router.layer)
    return SteeringTables(1, router.num_experts, bias=torch.randn((1, router.num_experts), generator=generator) * 3)


@pytest.mark.parametrize("kind", ORDERS)
def test_a_known_router_is_read_in_the_form_that_its_class_returns(kind: str) -> None:
    usual, model, ids = tiny_model("qwen3_moe"), reordered(kind), tokens(2, 6)
    seen = []
    for each in (usual, model):
        with torch.no_grad():
            plain = each(input_ids=ids)[0]
            attachment = Attachment(each, engine="hook" if each is usual else "fused")
            tables = counted(attachment)
            assert torch.equal(each(input_ids=ids)[0], plain)
            attachment.listener.labels_of = lambda call: Labels(steering_row=0)
            attachment.set_steering([bias(router) for router in attachment.routers])
            steered = each(input_ids=ids)[0]
            attachment.flush()
            seen.append((steered, [table.groups.clone() for table in tables]))
            attachment.detach()
            assert torch.equal(each(input_ids=ids)[0], plain)
    assert all(router.family.returns == tuple(kind.split()) for router in attachment.routers)
    assert {router.engine for router in attachment.routers} == {"hook"}
    (usually, expected), (steered, tables) = seen
    torch.testing.assert_close(steered, usually)
    for a, b in zip(expected, tables, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=2.0**14)  # the tables are fixed point


def test_the_form_is_seen_without_the_weights() -> None:
    model = reordered("ids weights").to("meta")
    assert {router.family.returns for router in find_routers(model)} == {("ids", "weights")}


def test_looking_at_the_form_disturbs_nothing() -> None:
    model = reordered("weights ids").train()
    calls: list[object] = []
    for layer in model.layers:
        layer.mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    before, state = torch.get_rng_state(), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    find_routers(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not calls
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_parts_that_cannot_be_told_apart() -> None:
    logits, weights, ids = torch.randn(5, E), torch.rand(5, K), torch.zeros(5, K, dtype=torch.int64)
    assert order_of((ids, logits, weights)) == ("ids", "logits", "weights")
    assert order_of((weights, ids)) == ("weights", "ids")
    assert order_of((logits, ids)) == ("scores", "ids")
    for output in (logits, (logits, weights), (ids, ids), (weights, weights, ids), (logits, weights, ids[None])):
        assert order_of(output) is None


def test_more_choices_than_the_routers_own_where_nothing_stands_against_it() -> None:
    model = reordered("scores ids")
    with mr.attach(model) as routed, torch.no_grad():
        given = [watch_experts(router) for router in routed.routers]
        with routed.record() as recorder, routed.steer(mr.Plan.top_k(K + 1)):
            model(input_ids=tokens(1, 4))
        assert recorder.statistics().scalar("slots").tolist() == [[4 * (K + 1)] * 3]
    assert all(runs[0][0].sum(1).tolist() == [K + 1] * 4 for runs in given)


# ---------------------------------------------------------------------------------------------------------------
# Blocks that choose themselves.


class Loops(nn.Module):
    """The block of transformers 4: a linear gate, a choice inside its forward, a loop over a list of experts."""

    def __init__(self, norm: bool, experts: int = E) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.norm_topk_prob = experts, K, norm
        self.gate = nn.Linear(H, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(experts))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, _ = hidden.shape
        hidden = hidden.view(-1, H)
        logits = self.gate(hidden)
        weights = F.softmax(logits, dim=1, dtype=torch.float)
        weights, ids = torch.topk(weights, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(hidden.dtype)
        result = torch.zeros_like(hidden)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slots, rows = torch.where(mask[number])
            result.index_add_(0, rows, expert(hidden[None, rows].reshape(-1, H)) * weights[rows, slots, None])
        return result.view(batch, length, H), logits


class ByMethod(Loops):
    """The block of transformers 5.0 to 5.6: the same choice, in a method."""

    def __init__(self, form: str) -> None:
        super().__init__(norm=True)
        self.form, linear = form, self.experts
        del self.experts
        self.experts = Stacked(linear)

    def route_tokens_to_experts(self, router_logits: Tensor) -> tuple[Tensor, ...]:
        weights, ids = router_logits.softmax(-1).topk(self.top_k, dim=-1)
        return order(self.form, router_logits, weights / weights.sum(-1, keepdim=True), ids)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.view(-1, H)
        parts = dict(zip(self.form.split(), self.route_tokens_to_experts(self.gate(flat)), strict=True))
        weights = parts["weights"] if "weights" in parts else parts["scores"].gather(1, parts["ids"])
        return self.experts(flat, parts["ids"], weights).view(hidden.shape)


class Stacked(nn.Module):
    """Experts in one tensor."""

    def __init__(self, linear: nn.ModuleList) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([each.weight for each in linear]).detach())

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (torch.einsum("th,tkoh->tko", hidden, self.weight[ids]) * weights[..., None]).sum(1)


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.mlp(hidden)
        return hidden + (output[0] if isinstance(output, tuple) else output)


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(64, H), nn.ModuleList(Layer(block) for block in blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def named(block: type[nn.Module], name: str) -> type[nn.Module]:
    """The class under a name and in a module of transformers, as the table knows it."""
    return type(name, (block,), {"__module__": "transformers.models.of_a_test"})


def looping(norm: bool = True, name: str = "OlmoeSparseMoeBlock") -> nn.Module:
    torch.manual_seed(0)
    block = named(Loops, name)
    return Model(block(norm), block(norm)).eval()


def choosing(form: str) -> nn.Module:
    torch.manual_seed(0)
    block = named(ByMethod, "HunYuanMoEV1Moe")
    return Model(block(form), block(form)).eval()


BLOCKS = ("looping", "looping without norm", "weights ids", "ids weights", "ids scores")


def model_of(kind: str) -> nn.Module:
    return looping("without" not in kind) if kind.startswith("looping") else choosing(kind)


@pytest.fixture(params=BLOCKS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return model_of(request.param)


def test_a_block_stands_for_its_router(model: nn.Module) -> None:
    routers = find_routers(model)
    assert [(router.name, router.num_experts, router.top_k) for router in routers] == [
        ("layers.0.mlp", E, K),
        ("layers.1.mlp", E, K),
    ]
    assert [check_router(router) for router in routers] == ["", ""]


def test_a_block_is_recorded_and_no_bit_changes(model: nn.Module) -> None:
    ids = tokens(2, 7) % 64
    with torch.no_grad():
        plain = model(ids)
        with mr.attach(model) as routed:
            given = [watch_experts(router) for router in routed.routers]
            with routed.record(trace=True) as recorder:
                assert torch.equal(model(ids), plain)
            counts, trace = recorder.statistics().token_sum("counts")[0], recorder.trace()
        assert torch.equal(model(ids), plain)
    for layer, ((chosen, weights), *_) in enumerate(given):
        assert counts[layer].tolist() == chosen.sum(0).tolist()
        traced = torch.from_numpy(trace.weights[:, layer].astype("float32")).sum(1)
        torch.testing.assert_close(traced, weights.sum(1), rtol=1e-3, atol=1e-3)


class InFloat32(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.float())


class Mixed(Loops):
    """A gate in float32 among bfloat16, after a shared expert."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.gate, self.shared = InFloat32(H, E, bias=False), nn.Linear(H, H)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.shared(hidden)
        output, logits = super().forward(hidden)
        return output + shared, logits


def test_a_block_of_mixed_precision() -> None:
    torch.manual_seed(0)
    model = Model(named(Mixed, "MixtralSparseMoeBlock")()).eval().bfloat16()
    model.layers[0].mlp.gate.float()
    ids = tokens(2, 7) % 64
    with torch.no_grad():
        plain = model(ids)
        with mr.attach(model) as routed, routed.record(trace=True) as recorder:
            given = watch_experts(routed.routers[0])
            assert torch.equal(model(ids), plain)
    counts = recorder.statistics().token_sum("counts")[0, 0]
    assert counts.tolist() == given[0][0].sum(0).tolist()


PLANS = {
    "bias": mr.Plan.bias({0: [1], 1: [2]}, strength=4.0),
    "forbid": mr.Plan.forbid({0: [1, 2, 3], 1: [2]}),
    "force on": mr.Plan.force_on({0: [5], 1: [6]}),
    "weights": mr.Plan.scale_weights(
        {0: [0, 1, 2, 3], 1: [4, 5]}, strength=3.0, when="after"
    ),  # which no normalization takes back
    "one slot": mr.Plan.top_k(1),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_block_is_steered_as_the_reference_says(model: nn.Module, plan: mr.Plan) -> None:
    """The experts get what a route over the block's own logits gives, weights included."""
    ids = tokens(2, 7) % 64
    with mr.attach(model) as routed, torch.no_grad():
        logits: list[Tensor] = []
        for layer in model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, output: logits.append(output))
        given = [watch_experts(router) for router in routed.routers]
        with routed.steer(plan):
            model(ids)
        tables = plan.compile([LayerShape(E, K)] * 2).tables
        for router, table, own, ((chosen, weights),) in zip(routed.routers, tables, logits, given, strict=True):
            expected, picked = reference.route(
                own, K, router.spec, steering=table, tokens=mr.ops.token_table(len(own), steering_row=0)
            )
            dense = torch.zeros(len(own), E).scatter_add(
                1, picked.clamp(min=0).long(), expected.float() * (picked >= 0)
            )
            torch.testing.assert_close(weights, dense)
            assert torch.equal(chosen & (weights != 0), dense > 0)


def test_a_gradient_goes_through_a_steered_block(model: nn.Module) -> None:
    attachment = Attachment(model.train())
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    learned = torch.zeros(1, E, requires_grad=True)
    attachment.set_steering([SteeringTables(1, E, bias=learned)] * 2)
    model(tokens(2, 7) % 64).square().sum().backward()
    assert learned.grad is not None
    assert bool(learned.grad.any())
    assert all(bool(layer.mlp.gate.weight.grad.any()) for layer in model.layers)
    attachment.detach()


@pytest.mark.parametrize("kind", exhaustive_but(BLOCKS[:1], [*BLOCKS, "ids weights, from the router"]))
def test_what_is_caught_is_caught_by_a_compiled_model(kind: str) -> None:
    model = reordered("ids weights") if "router" in kind else model_of(kind)
    ids = tokens(2, 7) % 64
    with mr.attach(model) as routed, torch.no_grad(), routed.steer(PLANS["bias"]):
        seen = []
        for run in (model, torch.compile(model, backend="aot_eager")):
            with routed.record() as recorder:
                run(input_ids=ids)
                output = run(input_ids=ids)
            seen.append((output if isinstance(output, Tensor) else output[0], recorder.statistics()))
    (expected, statistics), (output, compiled) = seen
    torch.testing.assert_close(output, expected)
    assert (compiled.token_sum("counts") == statistics.token_sum("counts")).all()
    assert compiled.scalar("steered").sum() > 0


def test_copies_of_an_attached_block_are_free_of_it(model: nn.Module) -> None:
    ids = tokens(1, 5) % 64
    with mr.attach(model) as routed, torch.no_grad():
        plain, other = model(ids), copy.deepcopy(model)
        with routed.record(), routed.steer(PLANS["forbid"]):
            assert not torch.equal(model(ids), plain)
            assert torch.equal(other(ids), plain)


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model = looping()
    with mr.attach(model) as routed, torch.no_grad(), routed.record():
        with pytest.raises(RuntimeError):
            model.layers[0](torch.randn(1, 3, H + 1))
        assert not torch.overrides._get_current_function_mode_stack()
        model(tokens(1, 4) % 64)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_interrupt_leaves_no_watch_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch runs no hook after one."""
    model = reordered("ids weights")
    router = type(model.layers[0].mlp.gate)
    forward, interrupts = router.forward, []

    def interrupted(self: nn.Module, hidden: Tensor) -> Any:
        output = forward(self, hidden)
        if interrupts:
            raise interrupts.pop()
        return output

    monkeypatch.setattr(router, "forward", interrupted)
    with mr.attach(model) as routed, torch.no_grad():
        interrupts.append(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt), routed.record():
            model(tokens(1, 4))
        with routed.record() as recorder:
            model(tokens(1, 4))
        assert recorder.statistics().tokens().tolist() == [[4, 4, 4]]
        assert not torch.overrides._get_current_function_mode_stack()
        interrupts.append(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt), routed.record():
            model(tokens(1, 4))
    assert not torch.overrides._get_current_function_mode_stack()


def test_nothing_is_watched_while_nothing_is_asked() -> None:
    model, modes = looping(), []
    with mr.attach(model), torch.no_grad():
        model.layers[0].mlp.gate.register_forward_hook(
            lambda *_: modes.append(torch.overrides._get_current_function_mode_stack())
        )
        model(tokens(1, 4) % 64)
    assert modes == [[]]


def test_a_block_that_loops_has_no_more_slots_than_its_own() -> None:
    with mr.attach(looping()) as routed:
        refused = pytest.raises(ValueError, match=r"cannot take a top_k above its own.*plan\.only")
        with refused, routed.steer(mr.Plan.top_k(K + 1)):
            pass
    with mr.attach(choosing("weights ids")) as routed, routed.steer(mr.Plan.top_k(K + 1)), routed.record() as recorder:
        routed.model(tokens(1, 4) % 64)
    assert recorder.statistics().scalar("slots").tolist() == [[4 * (K + 1)] * 2]


class Experts(nn.Module):
    """Experts that choose, and have room for as many choices as their configuration says."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(moe_topk=K, moe_num_experts=E)
        self.weight = nn.Parameter(torch.randn(E, H))

    def route_tokens_to_experts(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        logits, ids = router_logits.topk(self.config.moe_topk, dim=1)
        return ids, logits.softmax(-1)

    def forward(self, hidden: Tensor, router_logits: Tensor) -> Tensor:
        ids, weights = self.route_tokens_to_experts(router_logits)
        return hidden * (self.weight[ids] * weights.view(-1, self.config.moe_topk, 1)).sum(1)


class AboveExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(H, E, bias=False), named(Experts, "AriaExperts")()

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.view(-1, H)
        return self.experts(flat, self.router(flat)).view(hidden.shape)


def test_experts_that_choose_stand_for_their_router() -> None:
    torch.manual_seed(0)
    model = Model(AboveExperts())
    with mr.attach(model) as routed, torch.no_grad():
        (router,) = routed.routers
        assert (router.name, router.num_experts, router.top_k) == ("layers.0.mlp.experts", E, K)
        with routed.record() as recorder, routed.steer(mr.Plan.forbid({0: [3]})):
            model(tokens(2, 7) % 64)
        assert recorder.statistics().token_sum("counts")[0, 0, 3] == 0
        with pytest.raises(ValueError, match="cannot take a top_k above its own"), routed.steer(mr.Plan.top_k(K + 1)):
            pass


def test_a_block_that_chooses_otherwise_is_refused() -> None:
    class Dense(Loops):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            return self.experts[0](hidden), self.gate(hidden)

    class Doubled(Loops):
        def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
            self.norm_topk_prob = False
            return super().forward(hidden)

    for block, message in ((Dense, "ended without a choice"), (Doubled, "does not weigh")):
        known = named(block, "MixtralSparseMoeBlock")
        with pytest.raises(ModelNotSupportedError, match=message):
            Attachment(Model(known(True)))


def test_a_router_that_keeps_its_logits_and_scores_them_unseen_is_refused() -> None:
    model = reordered("ids weights")
    known = type(model.layers[0].mlp.gate)

    class Unseen(known):  # type: ignore[misc, valid-type]
        def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
            logits = F.linear(hidden, self.weight)
            ids = logits.argsort(-1, descending=True)[:, :K]
            return ids, logits.exp().gather(1, ids)

    for layer in model.layers:
        layer.mlp.gate.__class__ = Unseen
    with pytest.raises(ModelNotSupportedError, match="no logits over 8 experts were scored"):
        Attachment(model)


def test_a_block_whose_forward_is_changed_later_says_so() -> None:
    model = looping()
    with mr.attach(model) as routed, torch.no_grad():
        with routed.record():
            model.layers[0].mlp.forward = lambda hidden: (hidden, hidden)
            with pytest.raises(RuntimeError, match="made no choice that is seen"):
                model(tokens(1, 4) % 64)
        with pytest.raises(RuntimeError, match="was replaced after attach"):
            routed.record().__enter__()


def test_groups_left_out_are_filled_as_the_class_says() -> None:
    """Older versions of a class give the experts of groups left out a score of 0, later ones minus infinity."""
    from moe_route.ops import RouterSpec
    from moe_route.routers.family import fill_of_left_out

    class Zero(nn.Module):
        @torch.no_grad()
        def get_topk_indices(self, scores: Tensor, mask: Tensor) -> Tensor:
            return scores.masked_fill(mask, 0.0)

    class Infinity(nn.Module):
        def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
            return scores.masked_fill(mask, float("-inf"))

    spec = RouterSpec(score="sigmoid", groups=4, top_groups=2)
    assert fill_of_left_out(Zero(), spec).group_fill == 0.0
    assert fill_of_left_out(Infinity(), spec) == spec
    assert fill_of_left_out(nn.Linear(1, 1), spec) == spec
