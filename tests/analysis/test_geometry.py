"""Geometry of hidden states: cosines, projections and partial correlation against plain formulae."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_route import analysis
from moe_route.analysis import AnalysisError, Geometry
from moe_route.recording import RoutingStatistics
from moe_route.recording.store import SequenceStore

GROUPS, ITEMS, L, E, H, K = ("en", "de", "sw"), 5, 2, 4, 7, 2


def recorded(hidden: bool = True) -> tuple[RoutingStatistics, dict]:
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 9, (len(GROUPS), L, E))
    counts[..., 0] += counts.sum(-1) % K
    tokens = counts.sum(-1) // K
    made = RoutingStatistics.from_token_sums(GROUPS, counts=counts, tokens=tokens, top_k=K)
    store, kept = SequenceStore(made.layers, made.num_experts), {}
    for group in GROUPS:
        for item in range(ITEMS):
            kept[item, group] = rng.normal(size=(L, H)).astype(np.float32)
            q = rng.dirichlet(np.ones(E), L).astype(np.float32)
            arrays = {"tokens": np.ones((1, L), np.int64), "full": q[None]}
            store.append([(item, group)], arrays | ({"hidden": kept[item, group][None]} if hidden else {}))
    return made._with(store=store), kept


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))


def test_cosines_and_projections() -> None:
    given, hidden = recorded()
    weights = [np.random.default_rng(layer).normal(size=(E, H)) for layer in range(L)]
    weights[1][3] = weights[1][0] + weights[1][1]  # rank 3
    found = analysis.geometry(given, "en", weights=weights)
    assert found.groups == ("de", "sw")
    assert found.pairs == ITEMS
    np.testing.assert_allclose(found.divergence, analysis.divergence(given, "en").values)
    for g, group in enumerate(found.groups):
        for layer, weight in enumerate(weights):
            pairs = [
                (hidden[i, group][layer].astype(float), hidden[i, "en"][layer].astype(float)) for i in range(ITEMS)
            ]
            projector = np.linalg.pinv(weight, rcond=1e-10) @ weight
            seen = [(projector @ a, projector @ b) for a, b in pairs]
            rest = [(a - p, b - q) for (a, b), (p, q) in zip(pairs, seen, strict=True)]
            assert found.cosine[g, layer] == pytest.approx(np.mean([cosine(a, b) for a, b in pairs]))
            assert found.row_cosine[g, layer] == pytest.approx(np.mean([cosine(a, b) for a, b in seen]))
            assert found.null_cosine[g, layer] == pytest.approx(np.mean([cosine(a, b) for a, b in rest]))
            shares = [(p @ p) / (a @ a) for (a, _), (p, _) in zip(pairs, seen, strict=True)]
            assert found.row_share[g, layer] == pytest.approx(np.mean(shares))
    assert "share of the hidden state that the router sees" in repr(found)
    assert len(found.to_pandas()) == 2 * L
    without = analysis.geometry(given, "en", groups="sw")
    assert without.row_share is None
    assert "row_share" not in without.to_dict()


def test_partial_correlation_is_that_of_residuals() -> None:
    rng = np.random.default_rng(0)
    names = tuple("abcdefg")
    distance, similar = rng.normal(size=(7, L)), rng.normal(size=(7, L))
    found = Geometry(names, ("0", "1"), "en", distance, similar, None, None, None, 3)
    accuracy = dict(zip(names, rng.normal(size=7), strict=True))
    values = np.array(list(accuracy.values()))
    for layer, r in enumerate(found.partial(accuracy)):
        design = np.stack([np.ones(7), similar[:, layer]], 1)
        rest = [y - design @ np.linalg.lstsq(design, y, rcond=None)[0] for y in (values, distance[:, layer])]
        assert r == pytest.approx(cosine(*rest))
    with pytest.raises(AnalysisError, match="no accuracy is given for g"):
        found.partial(dict.fromkeys("abcdef", 1.0))


def test_geometry_refuses() -> None:
    given, _ = recorded()
    with pytest.raises(AnalysisError, match="4 groups"):
        analysis.geometry(given, "en").partial({"de": 0.1, "sw": 0.2})
    with pytest.raises(AnalysisError, match="weights must be one"):
        analysis.geometry(given, "en", weights=[np.ones((E, H))])
    with pytest.raises(AnalysisError, match="pass the weights of the recorded model"):
        analysis.geometry(given, "en", weights=[np.eye(E, H + 1)] * L)
    with pytest.raises(ValueError, match="hidden=True"):
        analysis.geometry(recorded(hidden=False)[0], "en")
    with pytest.raises(AnalysisError, match="sequences"):
        analysis.geometry(given._with(store=None), "en")
