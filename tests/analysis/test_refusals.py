"""Inputs that have no answer are refused with the reason: no NaN, no 0, no error from numpy."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from harness.kept_sequences import random_counts, statistics_of
from harness.traces import trace

from moe_route import analysis
from moe_route.analysis import AnalysisError, Divergence, Geometry
from moe_route.analysis.measures import jensen_shannon
from moe_route.base.schema import FileRefusedError
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection

L, E = 3, 8
ITEMS = [f"s{number}" for number in range(12)]
TASTE = np.random.default_rng(0).dirichlet(np.ones(E), L)


def recorded(items: list[str] = ITEMS) -> RoutingStatistics:
    counts = random_counts(items, "en", TASTE, seed=1) | random_counts(items, "de", TASTE, seed=2)
    return statistics_of(counts, 2, [E] * L)


STATISTICS, ONE = recorded(), recorded(ITEMS[:1])
OTHER = recorded()
OTHER.metadata = {"model": {"name": "another", "config_hash": "def"}}
TUNED, BASE = recorded(), recorded()
TUNED.metadata = {"model": {"config_hash": "def", "weights_hash": "a-1"}}
BASE.metadata = {"model": {"config_hash": "def", "weights_hash": "a-2"}}
PAIRED = analysis.divergence(STATISTICS, "en", kind="count")
MATRIX = analysis.divergence_matrix(STATISTICS, kind="count")
SIMILARITY = analysis.similarity(STATISTICS, kind="count")
NAMES = tuple("abcdef")
DIVERGENCE = Divergence(np.random.default_rng(1).random((6, L)), NAMES, "en", tuple("012"))
SCORES = {name: float(number) for number, name in enumerate(NAMES)}
SQUARE = np.random.default_rng(2).random((4, 4))
OF_MODEL = analysis.task_experts(STATISTICS, STATISTICS, group="en", baseline_group="de", threshold=0.0)
FIVE = np.ones(5)


def covariate(**other: Any) -> dict[str, dict[str, Any]]:
    return {"script": dict.fromkeys(NAMES, "latin") | other}


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: PAIRED.interval(resamples=0), "resamples must be 1"),
        (lambda: PAIRED.interval(resamples=-1), "resamples must be 1"),
        (lambda: MATRIX.mean([9]), "layers must name"),
        (lambda: MATRIX.mean([]), "layers must name"),
        (lambda: MATRIX.interval(layers=[9]), "layers must name"),
        (lambda: SIMILARITY.mean([9]), "layers must name"),
        (lambda: analysis.divergence(ONE, "en", kind="count", correct="floor"), "unrelated sentences"),
        (lambda: analysis.similarity(ONE, kind="count"), "single item"),
        (lambda: analysis.divergence(STATISTICS, "en", groups=["de", "de"], kind="count"), "named twice"),
        (lambda: analysis.coactivation(STATISTICS, groups=["de", "de"]), "named twice"),
        (lambda: analysis.divergence([["a"]], [["b"]]), "must hold numbers"),
        (lambda: analysis.divergence([[1, 2], [1]], [[1, 2], [1]]), "rows of one length"),
        (lambda: analysis.jackknife_entropy([np.inf, 1]), "whole numbers"),
        (lambda: analysis.jackknife_divergence(np.ones((2, 3)), np.ones((2, 4))), "same layer"),
        (lambda: analysis.jackknife_divergence([5, 5, 5], [5, 5, 0], 2), "check num_experts"),
        (lambda: analysis.correlation(DIVERGENCE, SCORES | {"a": None}), "scores must be finite"),
        (lambda: analysis.correlation(DIVERGENCE, SCORES, groups=["a", "a", "b"]), "named twice"),
        (lambda: analysis.correlation(DIVERGENCE, SCORES, permutations=0), "permutations must be 1"),
        (lambda: analysis.correlation(DIVERGENCE, SCORES, covariates=covariate(a=np.nan)), "labels and numbers"),
        (lambda: analysis.correlation(DIVERGENCE, SCORES, covariates={"x": dict.fromkeys(NAMES)}), "must be finite"),
        (lambda: analysis.mean_effects(FIVE, FIVE, resamples=0), "resamples must be 1"),
        (lambda: analysis.mean_effects(FIVE, FIVE, permutations=0), "permutations must be 1"),
        (lambda: analysis.effects_by_group(["a"], ["x"], np.ones((1, 2)), np.ones((1, 3))), "one shape"),
        (lambda: analysis.rank_agreement({"m": SQUARE}, SQUARE, permutations=0), "permutations must be 1"),
        (lambda: analysis.matrix_correlation(SQUARE, SQUARE, permutations=0), "permutations must be 1"),
        (lambda: analysis.matrix_correlation(np.full((4, 4), np.inf), SQUARE), "finite"),
        (lambda: analysis.linkage([[0, np.inf], [np.inf, 0]]), "finite"),
        (lambda: analysis.paired_difference(FIVE, FIVE, 0 * FIVE), "no token was predicted"),
        (lambda: analysis.paired_difference(FIVE, FIVE * np.nan, FIVE), "must be finite"),
        (lambda: analysis.paired_difference(FIVE, np.ones(4), FIVE), "alike"),
        (lambda: analysis.paired_difference(np.ones((5, 2)), FIVE, FIVE), "alike"),
        (lambda: analysis.random_control(FIVE, np.ones((2, 10)), FIVE, FIVE), r"of shape \[sets, 5\]"),
        (lambda: analysis.random_control(FIVE, np.full((2, 5), np.nan), FIVE, FIVE), "must be finite"),
        (lambda: analysis.expected_maximum([1, np.nan]), "must be finite"),
        (lambda: analysis.stability_selection(lambda s: OF_MODEL, STATISTICS, resamples=-1), "resamples must be 2"),
        (lambda: analysis.overlap({"a": OF_MODEL, "b": OF_MODEL}, num_experts=64), "leave num_experts out"),
        (lambda: analysis.overlap({"a": OF_MODEL, "b": {0: [1]}}), "not a selection"),  # type: ignore[dict-item]
        (lambda: analysis.overlap([OF_MODEL, OF_MODEL]), "two selections"),  # type: ignore[arg-type]
        (lambda: analysis.overlap(dict.fromkeys("ab", ExpertSelection({0: [1]})), num_experts=8.5), "whole number"),
        (lambda: analysis.prune(STATISTICS, keep=0.5, criterion="frequency", protect={-1: [0]}), "the model lacks"),
        (lambda: analysis.prune(STATISTICS, keep=0.5, criterion="frequency", protect={0: [-1]}), "the model lacks"),
        (lambda: analysis.rise_experts(STATISTICS, top_n=3, zones=(np.nan, 0.5, 0.5)), "add up to 1"),
        (lambda: analysis.risk_experts(SQUARE, SQUARE, activations=1, per_layer=-1), "per_layer must be 0"),
        (lambda: analysis.expert_difference(STATISTICS, OTHER, group="en"), "different configurations"),
        (lambda: analysis.expert_difference(TUNED, BASE, group="en"), "two checkpoints"),
        (lambda: analysis.committee(STATISTICS, phase="decode"), "no token of phase 'decode'"),
        (lambda: analysis.entropy_experts(STATISTICS, top_n=2, phase="decode"), "no token of phase 'decode'"),
        (lambda: analysis.rise_experts(STATISTICS, top_n=2, phase="decode"), "no token of phase 'decode'"),
        (lambda: analysis.task_experts(STATISTICS, STATISTICS, group="en", threshold=0, phase="decode"), "no token of"),
        (lambda: analysis.saturation(trace(), trace(), k=[]), "no number of experts"),
        (lambda: analysis.saturation(STATISTICS, STATISTICS), "give a Trace"),  # type: ignore[arg-type]
        (lambda: analysis.paths(STATISTICS), "give a Trace"),  # type: ignore[arg-type]
        (lambda: analysis.load_balance(trace()), "give RoutingStatistics"),  # type: ignore[arg-type]
        (lambda: analysis.load_balance(SQUARE), "give RoutingStatistics"),  # type: ignore[arg-type]
    ],
)
def test_refused_with_the_reason(call: Callable[[], object], reason: str) -> None:
    with pytest.raises(AnalysisError, match=reason):
        call()


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "matrix.tsv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileRefusedError, match="is not text"):
        analysis.read_matrix(path, ["en"])


def test_numbers_of_numpy_are_numbers():
    np.testing.assert_array_equal(analysis.saturation(trace(), trace(), k=np.int64(1)).values, np.ones((1, 4)))


def geometry_of(divergence: np.ndarray) -> Geometry:
    rest = np.random.default_rng(4).random(divergence.shape)
    names = tuple(f"g{number}" for number in range(len(divergence)))
    return Geometry(names, ("0",), "en", divergence, rest, None, None, None, 5)


def test_partial_correlation_of_constant_values_is_undefined():
    """The mean of equal numbers differs from them by rounding, which is no variation."""
    found = geometry_of(np.full((7, 1), 0.1))
    score = np.random.default_rng(5).random(7)
    assert np.isnan(found.partial(dict(zip(found.groups, score, strict=True)))).all()
    varied = geometry_of(np.random.default_rng(6).random((7, 1)))
    assert np.isnan(varied.partial(dict.fromkeys(varied.groups, 0.7))).all()
    with pytest.raises(AnalysisError, match="accuracies must be finite"):
        varied.partial(dict.fromkeys(varied.groups, float("nan")))


def test_divergence_of_nearly_equal_distributions_keeps_its_digits():
    for one, other in np.random.default_rng(7).integers(500_000, 501_000, (20, 2, 2)):
        q1, q2 = one / one.sum(), other / other.sum()
        pairs = [(Decimal(float(a)), Decimal(float(b))) for a, b in zip(q1, q2, strict=True)]
        terms = [half * (2 * half / (a + b)).ln() / 2 for a, b in pairs for half in (a, b)]
        assert jensen_shannon(q1, q2) == pytest.approx(float(sum(terms)), rel=1e-9, abs=0)
