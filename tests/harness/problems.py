"""Whole routing problems drawn at random: what the property tests feed to every backend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from harness.backends import Backend
from hypothesis import strategies as st
from torch import Tensor

from moe_route.contract.spec import ChoiceMode, RouterSpec
from moe_route.contract.tables import METRICS, SCALARS, Force, StatisticsTables, SteeringTables, token_table

INF, NAN = float("inf"), float("nan")
SCORES = ("softmax", "sigmoid", "sqrt_softplus", "identity", "sparsemixer")
PLANE_NAMES = ("scale", "bias", "std", "magnitude", "score_bias", "weight_scale", "force")
FORCES = tuple(int(code) for code in Force)
NUM_GROUPS, NUM_SEGMENTS = 3, 4


@dataclass(frozen=True)
class RoutedModel:
    """What a backend made of a problem: weights, ids and the statistics tables it added to."""

    weights: Tensor
    ids: Tensor
    statistics: StatisticsTables

    def bits(self) -> tuple[Tensor, ...]:
        whole = torch.int64 if self.weights.dtype == torch.float64 else torch.int32
        return self.weights.view(whole), self.ids, self.statistics.groups, self.statistics.segments


@dataclass(frozen=True)
class Problem:
    """Arguments of one `route` call."""

    logits: Tensor
    k: int
    spec: RouterSpec = field(default_factory=RouterSpec)
    steering: dict[str, Tensor] | None = None
    tokens: Tensor | None = None
    correction_bias: Tensor | None = None
    expert_scale: Tensor | None = None
    choice: Tensor | None = None
    choice_weights: Tensor | None = None
    choice_mode: ChoiceMode = "natural"
    metrics: tuple[str, ...] = METRICS

    @property
    def num_experts(self) -> int:
        return self.logits.shape[1]

    def statistics(self) -> StatisticsTables:
        return StatisticsTables.zeros(self.num_experts, groups=NUM_GROUPS, segments=NUM_SEGMENTS, metrics=self.metrics)

    def steering_tables(self) -> SteeringTables | None:
        if self.steering is None:
            return None
        rows = next(iter(self.steering.values())).shape[0]
        return SteeringTables(rows, self.num_experts, **self.steering)

    def arguments(self) -> dict[str, Any]:
        return {
            "steering": self.steering_tables(),
            "tokens": self.tokens,
            "correction_bias": self.correction_bias,
            "expert_scale": self.expert_scale,
            "choice": self.choice,
            "choice_weights": self.choice_weights,
            "choice_mode": self.choice_mode,
        }

    def run(self, backend: Backend, statistics: StatisticsTables | None = None) -> RoutedModel:
        statistics = self.statistics() if statistics is None else statistics
        weights, ids = backend.route(self.logits, self.k, self.spec, statistics=statistics, **self.arguments())
        return RoutedModel(weights, ids, statistics)

    def rows(self, begin: int, end: int) -> Problem:
        """The same problem for tokens begin..end."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[begin:end].contiguous()

        return replace(
            self,
            logits=self.logits[begin:end],
            tokens=cut(self.tokens),
            choice=cut(self.choice),
            choice_weights=cut(self.choice_weights),
        )


def assert_same_bits(one: RoutedModel, other: RoutedModel, context: str = "") -> None:
    for name, left, right in zip(("weights", "ids", "groups", "segments"), one.bits(), other.bits(), strict=True):
        if not torch.equal(left, right):
            where = (left != right).nonzero()[:5].tolist()
            raise AssertionError(
                f"{context} {name} differ at {where}: {one.weights} {other.weights} {one.ids} {other.ids}"
            )


def scalar(statistics: StatisticsTables, name: str, of: str = "groups") -> Tensor:
    assert name in SCALARS
    return statistics.scalar(name, of=of)


def check_conservation(routed: RoutedModel) -> None:
    """Sum of counts + empty slots = slots, in every row of both tables."""
    for of in ("groups", "segments"):
        counted = routed.statistics.metric("counts", of=of).sum(1)
        assert torch.equal(counted + scalar(routed.statistics, "empty", of), scalar(routed.statistics, "slots", of))


def check_ids(routed: RoutedModel, num_experts: int) -> None:
    """Ids are unique and in range, and an empty slot weighs nothing."""
    ids = routed.ids
    assert ids.dtype == torch.int32
    assert ((ids >= -1) & (ids < num_experts)).all()
    twice = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]
    assert torch.equal(twice.sum(2), (ids >= 0).long())
    assert (routed.weights[ids < 0] == 0).all()


# ---- drawing ----------------------------------------------------------------------------------------------------


def _draw_spec(draw: st.DrawFn, num_experts: int) -> RouterSpec:
    score = draw(st.sampled_from(SCORES))
    spec: dict[str, Any] = {"score": score, "scale": draw(st.sampled_from([1.0, 2.5]))}
    if score == "sparsemixer":
        return RouterSpec(jitter=draw(st.sampled_from([0.01, 0.1, 0.5])), **spec)
    spec["order"] = draw(st.sampled_from(["score_then_topk", "topk_then_score"]))
    spec["renormalize"] = draw(st.sampled_from(["none", "sum", "clamp", "norm"]))
    spec["eps"] = draw(st.sampled_from([0.0, 1e-20, 1e-6]))
    spec["norm_p"] = draw(st.sampled_from([1.0, 2.0]))
    divisors = [g for g in (1, 2, 4, 8) if num_experts % g == 0 and num_experts // g >= 2] or [1]
    spec["groups"] = draw(st.sampled_from(divisors))
    spec["top_groups"] = draw(st.integers(1, spec["groups"]))
    spec["group_score"] = draw(st.sampled_from(["max", "top2_sum"]))
    spec["group_fill"] = draw(st.sampled_from([-INF, 0.0]))
    return RouterSpec(**spec)


def _draw_steering(draw: st.DrawFn, rows: int, num_experts: int, make: torch.Generator) -> dict[str, Tensor]:
    names = draw(st.sets(st.sampled_from(PLANE_NAMES), max_size=4))
    tables = {}
    for name in sorted(names):
        if name == "force":
            codes = torch.tensor(FORCES)[torch.randint(len(FORCES), (rows, num_experts), generator=make)]
            sparse = torch.rand(rows, num_experts, generator=make) < draw(st.sampled_from([0.05, 0.3, 1.0]))
            tables[name] = torch.where(sparse, codes, 0).float()
        elif name in ("scale", "weight_scale"):
            tables[name] = torch.rand(rows, num_experts, generator=make) + 0.5
        else:
            tables[name] = torch.randn(rows, num_experts, generator=make) * draw(st.sampled_from([0.0, 0.5, 100.0]))
    if draw(st.booleans()):
        tables["temperature"] = torch.rand(rows, generator=make) + 0.5
    if draw(st.booleans()):
        tables["std_correction"] = torch.randint(2, (rows,), generator=make).float()
    if "score_bias" in tables and draw(st.booleans()):
        tables["score_bias_weighs"] = torch.randint(2, (rows,), generator=make).float()
    if "weight_scale" in tables and draw(st.booleans()):
        tables["weight_scale_after"] = torch.randint(2, (rows,), generator=make).float()
    if draw(st.integers(0, 5)) == 0:
        tables["remap"] = torch.randint(-1, num_experts, (rows, num_experts), generator=make).to(torch.int32)
    return tables


def _draw_logits(draw: st.DrawFn, num_tokens: int, num_experts: int, make: torch.Generator, wild: bool) -> Tensor:
    logits = torch.randn(num_tokens, num_experts, generator=make) * draw(st.sampled_from([0.1, 2.0, 40.0]))
    if draw(st.integers(0, 3)) == 0:  # ties
        logits = logits.round()
    if wild:
        for value, share in ((NAN, 0.05), (INF, 0.03), (-INF, 0.05)):
            if draw(st.booleans()):
                logits[torch.rand(logits.shape, generator=make) < share] = value
        if draw(st.booleans()):
            logits[torch.rand(num_tokens, generator=make) < 0.1] = draw(st.sampled_from([NAN, INF, -INF]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    layout = draw(st.sampled_from(["plain", "strided", "offset"]))
    logits = logits.to(dtype)
    if layout == "strided":
        wide = torch.full((num_tokens, num_experts + 5), NAN, dtype=dtype)
        wide[:, :num_experts] = logits
        return wide[:, :num_experts]
    if layout == "offset":
        return torch.cat([torch.full((3,), NAN, dtype=dtype), logits.reshape(-1)])[3:].view(num_tokens, num_experts)
    return logits


def _draw_tokens(draw: st.DrawFn, num_tokens: int, rows: int, make: torch.Generator) -> Tensor | None:
    if draw(st.booleans()):
        return None

    def column(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (num_tokens,), generator=make)

    valid = torch.rand(num_tokens, generator=make) < draw(st.sampled_from([1.0, 0.7]))
    return token_table(
        num_tokens,
        steering_row=column(-1, rows + 1),  # rows itself is outside the table and counts as -1
        group=column(-1, NUM_GROUPS + 1),
        segment=column(-1, NUM_SEGMENTS + 1),
        valid=valid,
    )


@st.composite
def problems(draw: st.DrawFn, wild: bool = True) -> Problem:
    """A whole problem. wild sprinkles NaN and infinities over the logits."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_experts = draw(st.sampled_from([1, 2, 6, 8, 16, 17, 32, 60, 64, 67, 72, 128, 160, 257]))
    num_tokens = draw(st.sampled_from([0, 1, 3, 17, 64]))
    spec = _draw_spec(draw, num_experts)
    most = min(num_experts, 4 if spec.score == "sparsemixer" else 40)
    k = draw(st.one_of(st.integers(1, min(most, 8)), st.integers(1, most)))
    rows = draw(st.integers(1, 3))
    steering = _draw_steering(draw, rows, num_experts, make) if draw(st.booleans()) else None
    if steering is not None and draw(st.booleans()):
        steering["top_k"] = torch.randint(0, k + 1, (rows,), generator=make).float()
    if not steering:
        steering = None
    tokens = _draw_tokens(draw, num_tokens, rows, make)
    if tokens is None and steering is not None:
        tokens = token_table(num_tokens, steering_row=0)
    extra: dict[str, Any] = {}
    if spec.score != "sparsemixer" and draw(st.integers(0, 2)) == 0:
        extra["correction_bias"] = torch.randn(num_experts, generator=make) * 0.3
    if draw(st.integers(0, 3)) == 0:
        extra["expert_scale"] = torch.rand(num_experts, generator=make) + 0.5
    if draw(st.integers(0, 2)) == 0:
        ids = torch.rand(num_tokens, num_experts, generator=make).argsort(1)[:, :k].contiguous()
        ids[torch.rand(num_tokens, generator=make) < 0.2, 0] = -1
        extra["choice"] = ids.to(draw(st.sampled_from([torch.int32, torch.int64])))
        extra["choice_mode"] = draw(st.sampled_from(get_args(ChoiceMode)))
        if extra["choice_mode"] == "natural" and draw(st.booleans()):
            choice_weights = torch.rand(num_tokens, k, generator=make)
            extra["choice_weights"] = choice_weights.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    logits = _draw_logits(draw, num_tokens, num_experts, make, wild)
    metrics = tuple(sorted(draw(st.sets(st.sampled_from(METRICS), min_size=1)) | {"counts"}, key=METRICS.index))
    return Problem(logits, k, spec, steering, tokens, metrics=metrics, **extra)
