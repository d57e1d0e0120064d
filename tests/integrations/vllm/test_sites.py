"""How routers of vLLM are read, by stand-ins with their attributes: specs, the check on probes, refusals by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.integrations.serving import operator
from moe_route.integrations.serving.options import EngineNotSupportedError
from moe_route.integrations.vllm import sites

EXPERTS, TOP_K = 8, 2


class BaseRouter:
    def __init__(self, **attributes: Any):
        self.top_k = TOP_K
        given = {"renormalize": True, "scoring_func": "softmax", "e_score_correction_bias": None}
        self.__dict__.update({**given, **attributes})
        self.routes_as = RouterSpec(renormalize="sum")
        self.capture_fn: Any = None

    def set_capture_fn(self, capture_fn: Any) -> None:
        self.capture_fn = capture_fn

    def _compute_routing(
        self, hidden: torch.Tensor, logits: torch.Tensor, indices_type: Any = None, *, input_ids: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.route(logits, self.top_k, self.routes_as)


class FusedTopKRouter(BaseRouter):
    pass


class GroupedTopKRouter(BaseRouter):
    pass


class OtherRouter(BaseRouter):
    pass


class MoERunner(nn.Module):
    def __init__(
        self,
        router: Any,
        *,
        monolithic: bool = False,
        split: bool = False,
        gathered: bool = False,
        scale: float = 1.0,
    ):
        super().__init__()
        self.do_naive_dispatch_combine = gathered
        self.layer_name, self.router, self.is_monolithic = "model.layers.0.mlp.experts", router, monolithic
        self.moe_config = SimpleNamespace(
            num_experts=EXPERTS,
            num_logical_experts=EXPERTS,
            hidden_dim=4,
            moe_parallel_config=SimpleNamespace(is_sequence_parallel=split),
        )
        self.routed_experts = SimpleNamespace(quant_method=SimpleNamespace())
        self.routed_scaling_factor = scale
        self.weight = nn.Parameter(torch.zeros(1))


@pytest.fixture(autouse=True)
def _classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "find", lambda place: BaseRouter if place.endswith("BaseRouter") else MoERunner)


def test_specs_are_read_from_attributes() -> None:
    bias = torch.zeros(EXPERTS)
    grouped = GroupedTopKRouter(
        scoring_func="sigmoid",
        e_score_correction_bias=bias,
        num_expert_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    found = sites.find_sites(nn.ModuleList([MoERunner(FusedTopKRouter()), MoERunner(grouped, scale=2.5)]), "qwen3_moe")
    assert [site.spec for site in found] == [
        RouterSpec(renormalize="sum"),
        RouterSpec(score="sigmoid", renormalize="sum", groups=4, top_groups=2, group_score="top2_sum", scale=2.5),
    ]
    assert found[1].correction_bias is bias
    assert (found[1].output_scale, found[0].name) == (2.5, "model.layers.0.mlp.gate")


@pytest.mark.parametrize(
    ("runner", "words"),
    [
        (MoERunner(FusedTopKRouter(), monolithic=True), "start with --moe-backend triton"),
        (MoERunner(FusedTopKRouter(), split=True), "leave out --enable-expert-parallel"),
        (MoERunner(FusedTopKRouter(), gathered=True), "one engine per replica"),
        (MoERunner(object()), "a router of its own"),
        (MoERunner(OtherRouter()), "a router of class OtherRouter"),
        (MoERunner(FusedTopKRouter(custom_routing_function=max)), r"a function of its own \(max\)"),
        (MoERunner(FusedTopKRouter(hash_indices_table=1)), "by token id"),
    ],
)
def test_what_cannot_be_followed_is_refused(runner: nn.Module, words: str) -> None:
    with pytest.raises(EngineNotSupportedError, match=words):
        sites.find_sites(nn.ModuleList([runner]), "qwen3_moe")


@pytest.mark.parametrize(
    ("routes_as", "words"),
    [(RouterSpec(), "weights differ"), (RouterSpec(score="sigmoid", groups=4, top_groups=1), "other experts")],
)
def test_a_router_that_does_something_else_is_refused(routes_as: RouterSpec, words: str) -> None:
    router = FusedTopKRouter()
    (site,) = sites.find_sites(MoERunner(router), "qwen3_moe")
    sites.check(site)
    router.routes_as = routes_as
    with pytest.raises(EngineNotSupportedError, match=words):
        sites.check(site)


@pytest.mark.parametrize("eager", [True, False])
def test_the_operator_is_switched_by_the_tables_alone(eager: bool) -> None:
    """As a replayed graph has it: the call stays the same, the contents of the tables change."""
    from moe_route.contract.tables import StatisticsTables, SteeringTables

    router = FusedTopKRouter()
    (site,) = sites.find_sites(MoERunner(router), "qwen3_moe")
    site.tokens = torch.tensor([[-1, -1, -1, 1]], dtype=torch.int32).repeat(6, 1)
    site.steering = operator.neutral_tables(3, EXPERTS, torch.device("cpu"))
    site.statistics = StatisticsTables.zeros(EXPERTS, groups=2, metrics=("counts",), entropy=True, device="cpu")
    operator.connect([site])
    sites.hook(site, 0, eager=eager)
    logits = torch.randn(4, EXPERTS, generator=torch.Generator().manual_seed(1))
    natural = ops.route(logits, TOP_K, site.spec)

    def routed() -> tuple[torch.Tensor, torch.Tensor]:
        return router._compute_routing(torch.zeros(4, 4), logits)

    for given, own in zip(routed(), natural, strict=True):
        assert given.equal(own)
    assert not site.statistics.groups.any()

    plan = SteeringTables(1, EXPERTS, force=torch.tensor([[0, 0, 0, 0, 0, -4, 0, 2]]))
    operator.copy_plan(site.steering, 2, plan)
    site.tokens[:2, 0], site.tokens[:, 1] = 2, 1
    weights, ids = routed()
    rows = torch.tensor([[0, 1, 0, 1]] * 4, dtype=torch.int32)
    rows[2:, 0] = -1
    expected = ops.route(logits, TOP_K, site.spec, steering=plan, tokens=rows)
    assert ids.equal(expected[1])
    assert weights.equal(expected[0])
    assert site.statistics.scalar("tokens").tolist() == [0, 4]
    assert site.statistics.scalar("steered").tolist() == [0, 2]


@pytest.mark.parametrize("eager", [True, False])
def test_an_empty_slot_has_expert_0_with_weight_zero(eager: bool) -> None:
    """Kernels need an id in every slot."""
    from moe_route.contract.tables import SteeringTables

    router = FusedTopKRouter()
    (site,) = sites.find_sites(MoERunner(router), "qwen3_moe")
    site.tokens = torch.tensor([[0, -1, -1, 1]], dtype=torch.int32)
    site.steering = operator.neutral_tables(1, EXPERTS, torch.device("cpu"))
    operator.copy_plan(site.steering, 0, SteeringTables(1, EXPERTS, top_k=1))
    operator.connect([site])
    sites.hook(site, 0, eager=eager)
    logits = torch.arange(float(EXPERTS))[None]
    weights, ids = router._compute_routing(torch.zeros(1, 4), logits)
    assert ids.tolist() == [[EXPERTS - 1, 0]]
    assert weights.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(("ids", "weights"), [(torch.int32, torch.float32), (torch.uint32, torch.bfloat16)])
def test_a_choice_of_any_dtype_is_changed_in_place(ids: torch.dtype, weights: torch.dtype) -> None:
    """Columns of fused shared experts stand behind the chosen ones, and stay."""
    from moe_route.contract.tables import SteeringTables

    (site,) = sites.find_sites(MoERunner(FusedTopKRouter()), "qwen3_moe")
    site.tokens = torch.tensor([[0, -1, -1, 1], [-1, -1, -1, 1]], dtype=torch.int32)
    site.steering = operator.neutral_tables(1, EXPERTS, torch.device("cpu"))
    plan = SteeringTables(1, EXPERTS, force=torch.tensor([[0, 0, 0, 0, 0, 0, 0, -4]]))
    operator.copy_plan(site.steering, 0, plan)
    operator.connect([site])
    logits = torch.arange(float(EXPERTS)).repeat(2, 1)
    own_weights, own_ids = (
        one.to(to) for one, to in zip(ops.route(logits, TOP_K, site.spec), (weights, ids), strict=True)
    )
    shared = torch.full((2, 1), 9)
    given_weights, given_ids = torch.hstack([own_weights, shared.to(weights)]), torch.hstack([own_ids, shared.to(ids)])
    operator.reroute(logits, given_weights, given_ids, 0)
    steered = ops.route(logits, TOP_K, site.spec, steering=plan, tokens=site.tokens[:, :4])
    assert given_ids.tolist() == [[*steered[1][0].tolist(), 9], [*own_ids[1].tolist(), 9]]
    assert given_weights[0, :-1].equal(steered[0][0].to(weights))
    assert given_weights[1].tolist() == [*own_weights[1].tolist(), 9]
