"""Saliency, super experts and pruning: plain loops over made-up sums, and inputs that are refused."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.recording import RoutingStatistics
from moe_route.recording.arrays import SIZE_UNIT
from moe_route.recording.store import SequenceStore
from moe_route.steering import Plan

GROUPS, SIZES, TOP_K, WIDEST = ("en", "sw"), (8, 6, 8), 2, 8
ITEMS = 12


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """counts [item, G, L, E], tokens [item, G] and accumulated arrays."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 20, (ITEMS, len(GROUPS)))
    counts = np.zeros((ITEMS, len(GROUPS), len(SIZES), WIDEST), np.int64)
    for item, group, layer in itertools.product(range(ITEMS), range(len(GROUPS)), range(len(SIZES))):
        used = SIZES[layer] - 1  # the last expert is never chosen
        taste = rng.dirichlet(np.ones(used)) + 0.3 * np.eye(used)[group]
        for _ in range(tokens[item, group]):
            counts[item, group, layer, rng.choice(used, TOP_K, replace=False, p=taste / taste.sum())] += 1
    chosen = counts.sum(0)
    norm = chosen * rng.uniform(1, 5, chosen.shape)
    accumulated = {
        "weighted_norm": np.rint(norm * rng.uniform(0.1, 1, chosen.shape) / SIZE_UNIT).astype(np.int64),
        "norm": np.rint(norm / SIZE_UNIT).astype(np.int64),
        "peak": np.where(chosen > 0, rng.uniform(0, 1, chosen.shape), 0.0),
        "first": np.minimum(chosen, 3),
    }
    return counts, tokens, accumulated


def statistics(seed: int = 0, store: bool = True, **changed: np.ndarray) -> RoutingStatistics:
    counts, tokens, accumulated = arrays(seed)
    made = RoutingStatistics.from_token_sums(
        GROUPS, counts=counts.sum(0), tokens=tokens.sum(0), top_k=TOP_K, num_experts=SIZES
    )
    kept = None
    if store:
        kept = SequenceStore(made.layers, SIZES)
        keys = [(item, group) for item in range(ITEMS) for group in GROUPS]
        flat = counts.reshape(-1, len(SIZES), WIDEST).astype(np.int32)
        repeated = np.repeat(tokens.reshape(-1, 1), len(SIZES), 1).astype(np.int64)
        kept.append(keys, {"tokens": repeated, "counts": flat})
    return made._with(store=kept, accumulated=accumulated | changed)


def test_saliency_is_the_mean_over_the_tokens_of_an_expert() -> None:
    counts, _, accumulated = arrays()
    found, pooled = analysis.saliency(statistics()), analysis.saliency(statistics(), pool=True)
    for g, layer, e in itertools.product(range(2), range(3), range(WIDEST)):
        times = sum(int(counts[i, g, layer, e]) for i in range(ITEMS))
        total = float(accumulated["weighted_norm"][g, layer, e]) * SIZE_UNIT
        assert (math.isnan(found.values[g, layer, e])) == (times == 0)
        if times:
            assert np.isclose(found.values[g, layer, e], total / times)
    both, times = accumulated["weighted_norm"].sum(0) * SIZE_UNIT, counts.sum((0, 1))
    np.testing.assert_allclose(pooled.values[0][times > 0], both[times > 0] / times[times > 0])
    assert pooled.groups == ("all groups",)
    least, most = found.least(2, "sw"), found.most(1, "sw")
    values = np.nan_to_num(found.values[1])
    for layer, size in enumerate(SIZES):
        assert set(least[layer]) == set(np.argsort(values[layer, :size], kind="stable")[:2].tolist())
        assert size - 1 in least[layer]  # an expert that was never chosen
        assert most[layer] == (int(values[layer].argmax()),)
    assert len(found.to_pandas()) == 2 * sum(SIZES)
    assert "least salient" in repr(found)
    assert found.to_dict()["saliency"][0][0][SIZES[0] - 1] is None


def test_saliency_refuses() -> None:
    found = analysis.saliency(statistics())
    for call in (lambda: found.least(2), lambda: found.least(0, "en"), lambda: found.most(7, "en")):
        with pytest.raises(AnalysisError):
            call()
    with pytest.raises(AnalysisError, match="no group 'de'"):
        found.most(1, "de")
    with pytest.raises(AnalysisError, match="no group 'de'"):
        analysis.saliency(statistics(), groups=["de"])
    with pytest.raises(ValueError, match="expert_outputs=True"):
        analysis.saliency(statistics()._with(accumulated={}))


def test_super_experts_pass_both_bounds() -> None:
    _, _, accumulated = arrays()
    peak = accumulated["peak"].copy()
    peak[0, 1, 2], peak[1, 2, 0], peak[0, 0, 5] = 100.0, 60.0, 9.0
    found = analysis.super_experts(statistics(peak=peak), quantile=0.8)
    every = sorted(float(peak[:, layer, e].max()) for layer, size in enumerate(SIZES) for e in range(size))
    place = 0.8 * (len(every) - 1)
    quantile = every[int(place)] + (place - int(place)) * (every[int(place) + 1] - every[int(place)])
    assert found.threshold == pytest.approx(max(quantile, 10.0))
    assert list(zip(found.layer.tolist(), found.expert.tolist(), strict=True)) == [(1, 2), (2, 0)]
    assert found.selection == {1: (2,), 2: (0,)}
    assert found.peak.tolist() == [100.0, 60.0]
    first = accumulated["first"].sum(0)
    assert found.first[0] == pytest.approx(first[1, 2] / (first[1].sum() / TOP_K))
    assert len(found) == len(found.to_pandas()) == 2
    assert found.to_dict()["super_experts"][0]["peak"] == 100.0
    assert "share of first tokens" in repr(found)
    assert analysis.super_experts(statistics(peak=peak), quantile=0.8, groups="sw").selection == {2: (0,)}


def test_super_experts_refuse() -> None:
    _, _, accumulated = arrays()
    for options in ({"quantile": 1.0}, {"share": -0.1}, {"groups": ["de"]}):
        with pytest.raises(AnalysisError):
            analysis.super_experts(statistics(), **options)
    with pytest.raises(AnalysisError, match="all zero"):
        analysis.super_experts(statistics(peak=accumulated["peak"] * 0))


@pytest.mark.parametrize("criterion", ["frequency", "reap", "difference", "random"])
@pytest.mark.parametrize("keep", [0.5, 0.8, 1.0])
def test_a_uniform_pruning_drops_the_least_important(criterion: str, keep: float) -> None:
    given = statistics()
    counts, tokens, accumulated = arrays()
    options = {"group": "sw", "reference": "en"} if criterion == "difference" else {"group": "sw"}
    dropped = analysis.prune(given, keep=keep, criterion=criterion, **options)
    frequency = counts.sum(0) / tokens.sum(0)[:, None, None]
    times = np.maximum(counts.sum(0)[1], 1)
    values = {
        "frequency": frequency[1],
        "difference": frequency[1] - frequency[0],
        "reap": accumulated["weighted_norm"][1] * SIZE_UNIT / times,
    }
    for layer, size in enumerate(SIZES):
        number = size - math.ceil(keep * size)
        assert len(dropped.get(layer, ())) == number
        if criterion != "random":
            ranked = sorted(range(size), key=lambda e: (values[criterion][layer, e], -e))
            assert set(dropped.get(layer, ())) == set(ranked[:number])
    assert dropped == analysis.prune(given, keep=keep, criterion=criterion, **options)
    assert keep == 1.0 or Plan.forbid(dropped).touching(dropped) == dropped


def test_a_random_pruning_depends_on_its_seed() -> None:
    made = {analysis.prune(statistics(), keep=0.5, criterion="random", seed=seed) for seed in range(5)}
    assert len(made) > 3


def test_a_global_pruning_ranks_all_layers_and_keeps_every_top_k() -> None:
    counts, tokens, _ = arrays()
    frequency = (counts.sum((0, 1)) / tokens.sum()).copy()
    dropped = analysis.prune(statistics(), keep=0.4, criterion="frequency", allocation="global")
    kept = {layer: set(range(size)) - set(dropped.get(layer, ())) for layer, size in enumerate(SIZES)}
    assert sum(map(len, kept.values())) == math.ceil(0.4 * sum(SIZES))
    best = {layer: set(np.argsort(-frequency[layer], kind="stable")[:TOP_K].tolist()) for layer in kept}
    free = sorted(
        (
            (frequency[layer, e], layer, e)
            for layer, size in enumerate(SIZES)
            for e in range(size)
            if e not in best[layer]
        ),
        reverse=True,
    )[: math.ceil(0.4 * sum(SIZES)) - TOP_K * len(SIZES)]
    for _, layer, e in free:
        best[layer].add(e)
    assert kept == best
    scaled = analysis.prune(statistics(), keep=0.5, criterion="reap", allocation="global")
    larger = arrays()[2]["weighted_norm"].copy()
    larger[:, 0] *= 1000  # hidden states of one layer are larger: no reason to keep more of it
    again = analysis.prune(statistics(weighted_norm=larger), keep=0.5, criterion="reap", allocation="global")
    assert scaled == again


def test_protected_experts_and_router_groups_stay() -> None:
    counts, _, _ = arrays()
    least = {layer: [int(counts.sum((0, 1))[layer, :size].argmin())] for layer, size in enumerate(SIZES)}
    for allocation in ("uniform", "global"):
        options = {"keep": 0.6, "criterion": "frequency", "allocation": allocation}
        dropped = analysis.prune(statistics(), protect=least, **options)
        assert not dropped & least
        grouped = analysis.prune(statistics(), n_group=2, topk_group=1, **options)
        for layer, size in enumerate(SIZES):
            kept = set(range(size)) - set(grouped.get(layer, ()))
            sizes = [len([e for e in kept if (e >= size // 2) == upper]) for upper in (False, True)]
            assert min(sizes) >= 2
            assert allocation == "global" or sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": 0}, "above 0"),
        ({"keep": 1.5}, "above 0"),
        ({"keep": 0.1}, "keep at least"),
        ({"keep": 0.1, "allocation": "global"}, "raise keep"),
        ({"keep": 0.5, "criterion": "luck"}, "no criterion"),
        ({"keep": 0.5, "criterion": "difference"}, "reference="),
        ({"keep": 0.5, "criterion": "difference", "reference": "en"}, "group="),
        ({"keep": 0.5, "reference": "en"}, "reference="),
        ({"keep": 0.5, "group": "de"}, "'de'"),
        ({"keep": 0.5, "allocation": "even"}, "allocation"),
        ({"keep": 0.5, "n_group": 3, "topk_group": 1}, "n_group=3"),
        ({"keep": 0.5, "protect": {0: [9]}}, "protect"),
        ({"keep": 0.5, "protect": {9: [0]}}, "protect"),
        ({"keep": 0.5, "protect": {0: range(6)}}, "protected"),
    ],
)
def test_prune_refuses(options: dict, words: str) -> None:
    with pytest.raises(AnalysisError, match=words):
        analysis.prune(statistics(), **options)


def test_stability_over_items() -> None:
    counts, tokens, _ = arrays()
    found = analysis.pruning_stability(statistics(), keep=0.5, group="sw", resamples=50, seed=3)
    drawn = np.random.default_rng(3).integers(0, ITEMS, (50, ITEMS))

    def kept(items: np.ndarray) -> list[set[int]]:
        total = sum(counts[i, 1] for i in items) / sum(tokens[i, 1] for i in items)
        order = [sorted(range(size), key=lambda e, row=total[layer]: (-row[e], e)) for layer, size in enumerate(SIZES)]
        return [set(order[layer][: math.ceil(size / 2)]) for layer, size in enumerate(SIZES)]

    whole, samples = kept(np.arange(ITEMS)), [kept(items) for items in drawn]
    for layer, size in enumerate(SIZES):
        for e in range(size):
            assert found.kept[layer, e] == pytest.approx(sum(e in s[layer] for s in samples) / 50)
            assert found.chosen[layer, e] == (e in whole[layer])
        jaccard = [len(s[layer] & whole[layer]) / len(s[layer] | whole[layer]) for s in samples]
        assert found.jaccard[layer] == pytest.approx(sum(jaccard) / 50)
    assert len(found.to_pandas()) == sum(SIZES)
    assert "resamples" in repr(found)
    assert found.to_dict()["items"] == ITEMS


def test_stability_refuses() -> None:
    with pytest.raises(AnalysisError, match="sequences=True"):
        analysis.pruning_stability(statistics(store=False), keep=0.5)
    with pytest.raises(AnalysisError, match="resamples"):
        analysis.pruning_stability(statistics(), keep=0.5, resamples=0)
