"""Published settings: each makes the plan that its publication describes, and refuses other models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import moe_route as mr
from moe_route.analysis import AnalysisError
from moe_route.analysis.recipes import RECIPES, Recipe
from moe_route.recording import RoutingStatistics
from moe_route.steering import Plan, PlanError


class Frequencies:
    """Statistics of one group with the given frequencies [L, E], both per sequence and per token."""

    def __init__(self, frequency: np.ndarray, top_k: int, config_hash: str = "abc") -> None:
        self.groups: tuple[str, ...] = ("eng_Latn",)
        self.values = frequency
        self.layers = tuple(str(layer) for layer in range(len(frequency)))
        self.num_experts = (frequency.shape[1],) * len(frequency)
        self.top_k = (top_k,) * len(frequency)
        self.metadata: dict[str, Any] = {"model": {"name": "m", "config_hash": config_hash}}
        self.store = None

    def tokens(self, phase: Any = None) -> np.ndarray:
        return np.full((1, len(self.layers)), 100)

    def mean_distribution(self, kind: Any = "full", phase: Any = None, by: Any = "sequence") -> np.ndarray:
        return (self.values / self.values.sum(-1, keepdims=True))[None]

    def frequency(self, phase: Any = None, by: Any = "sequence") -> np.ndarray:
        return self.values[None]


def two(entry: Recipe, seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    shape = (entry.num_layers, entry.num_experts)
    return Frequencies(rng.random(shape), entry.top_k), Frequencies(rng.random(shape), entry.top_k)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("paper/")])
@pytest.mark.parametrize("base", [0, 1])
def test_the_papers_settings(name: str, base: Any) -> None:
    entry = mr.recipe(name)
    task, general = two(entry)
    plan = entry(task, general, layer_base=base)
    delta = task.values - general.values
    assert entry.first is not None
    assert entry.last is not None
    wanted = {
        layer: tuple(expert for expert in range(entry.num_experts) if delta[layer, expert] > entry.threshold)
        for layer in range(entry.first - base, entry.last - base + 1)
    }
    (rule,) = plan.rules
    found = {layer: tuple(e for e, _ in rule.in_layer(layer)) for layer in rule.touched_layers or ()}
    assert found == {layer: experts for layer, experts in wanted.items() if experts}
    assert (rule.kind, rule.mode) == (("activate", "population") if entry.kind == "soft" else ("force_on", "paper"))
    assert rule.strength == (entry.strength if entry.kind == "soft" else 1.0)
    assert plan.model.config_hash == "abc"
    assert name in plan.description


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("steermoe/")])
def test_the_numbers_of_steermoe(name: str) -> None:
    entry = mr.recipe(name)
    show, hide = two(entry)
    plan = entry(show, hide)
    delta = (show.values - hide.values).ravel()
    order = sorted(range(len(delta)), key=lambda i: -delta[i])
    assert entry.activations is not None
    assert entry.deactivations is not None
    raised: dict[int, list[int]] = {}
    for i in order[: entry.activations]:
        layer, expert = divmod(i, entry.num_experts)
        if len(raised.setdefault(layer, [])) < entry.top_k:  # no more can be forced on: dropped, not replaced
            raised[layer].append(expert)
    lowered = {divmod(i, entry.num_experts) for i in order[::-1][: entry.deactivations]}
    on = {(rule.kind, layer, e) for rule in plan.rules for layer, pairs in rule.experts for e, _ in pairs}
    assert {(layer, e) for kind, layer, e in on if kind == "force_on"} == {
        (layer, e) for layer, of in raised.items() for e in of
    }
    assert {(layer, e) for kind, layer, e in on if kind == "force_off"} == lowered
    assert {rule.mode for rule in plan.rules} == {"steermoe"}


def test_the_published_numbers() -> None:
    safe, unsafe = RECIPES["steermoe/qwen3-30b-a3b/safe"], RECIPES["steermoe/qwen3-30b-a3b/unsafe"]
    assert (safe.activations, safe.deactivations) == (15, 0)
    assert (unsafe.activations, unsafe.deactivations) == (5, 480)
    assert len(RECIPES) == 6 + 18
    # numbers of experts that the repository of SteerMoE states beside them
    totals = {"qwen3-30b-a3b": 6144, "olmoe-1b-7b": 1024, "phi-3.5-moe": 512, "mixtral-8x7b": 256}
    totals |= {"gpt-oss-120b": 4608, "gpt-oss-20b": 768}
    for entry in RECIPES.values():
        assert entry.num_layers * entry.num_experts == totals[entry.name.split("/")[1]]
        if entry.first is not None and entry.last is not None:
            assert 0 < entry.first < entry.last < entry.num_layers
    assert "paper/gpt-oss-20b/mgsm" in repr(RECIPES)
    assert "layers 4-19, tau 0.3, hard" in repr(RECIPES)
    assert json.dumps(RECIPES.to_dict())


def test_other_models_and_names_are_refused() -> None:
    entry = mr.recipe("paper/qwen3-30b-a3b/mgsm")
    task, general = two(entry)
    other = Frequencies(np.full((24, 32), 0.1), 4)
    with pytest.raises(
        AnalysisError, match=r"is for Qwen/Qwen3-30B-A3B .*task statistics have 24 layers of 32 experts"
    ):
        entry(other, general)
    with pytest.raises(AnalysisError, match="the baseline statistics have 48 layers of 128 experts, top-4"):
        entry(task, Frequencies(general.values, 4))
    with pytest.raises(AnalysisError, match="must be RoutingStatistics, not list"):
        entry([1], general)
    with pytest.raises(PlanError, match="lower its threshold"):
        entry(task, Frequencies(0.999 * task.values, entry.top_k))
    with pytest.raises(AnalysisError, match="no expert differs"):
        mr.recipe("steermoe/olmoe-1b-7b/safe")(*(Frequencies(np.full((16, 64), f), 8) for f in (0.1, 0.2)))
    with pytest.raises(ValueError, match=r"no recipe 'paper/qwen3'.*paper/qwen3-30b-a3b/mgsm"):
        mr.recipe("paper/qwen3")
    with pytest.raises(ValueError, match="base must be 0 or 1"):
        entry(task, general, layer_base=2)  # type: ignore[arg-type]


def test_recorded_statistics_are_taken() -> None:
    entry = mr.recipe("steermoe/mixtral-8x7b/safe")
    rng = np.random.default_rng(1)

    def recorded() -> RoutingStatistics:
        counts = np.stack([np.bincount(rng.integers(0, 8, 40), minlength=8) for _ in range(32)])[None]
        return RoutingStatistics.from_token_sums(["x"], counts=counts, tokens=np.array([20]), top_k=2, num_experts=8)

    plan = entry(recorded(), recorded())
    assert isinstance(plan, Plan)
    assert sum(len(pairs) for rule in plan.rules for _, pairs in rule.experts) <= 20
