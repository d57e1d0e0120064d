"""Balance of the load, against plain loops and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.load import layer_metrics, metrics_text
from moe_route.recording import RoutingStatistics

COUNTS = np.array(
    [
        [[4, 4, 4, 4], [16, 0, 0, 0], [10, 4, 2, 0]],
        [[8, 8, 0, 0], [9, 5, 1, 1], [2, 14, 0, 0]],
    ]
)
SIZES = (4, 4, 3)


def statistics(counts=COUNTS, groups=("eng", "deu"), sizes=SIZES):
    return RoutingStatistics.from_token_sums(
        groups, counts=counts, tokens=counts.sum(-1) // 2, top_k=2, num_experts=sizes
    )


def expected(counts):
    """The measures of one layer's counts, term by term."""
    experts, total = len(counts), sum(counts)
    share = [count / total for count in counts]
    mean = total / experts
    entropy = -sum(p * math.log(p) for p in share if p)
    return {
        "entropy": entropy / math.log(experts),
        "max_share": max(share),
        "max_violation": (max(counts) - mean) / mean,
        "variation": math.sqrt(sum((count - mean) ** 2 for count in counts) / experts) / mean,
        "dead": sum(count == 0 for count in counts) / experts,
        "rare": sum(count < 0.5 * mean for count in counts) / experts,
        "effective": math.exp(entropy),
    }


def test_measures_are_those_of_plain_loops():
    found = analysis.load_balance(statistics(), rare_below=0.5)
    for g in range(2):
        for layer, size in enumerate(SIZES):
            for name, value in expected(COUNTS[g, layer, :size].tolist()).items():
                assert getattr(found, name)[g, layer] == pytest.approx(value, abs=1e-12), name


def test_pooled_groups_add_their_choices():
    found = analysis.load_balance(statistics(), pool=True)
    assert found.groups == ("all groups",)
    assert found.max_share[0].tolist() == pytest.approx([12 / 32, 25 / 32, 18 / 32])


def test_scalars_have_the_names_of_training_logs():
    found = analysis.load_balance(statistics())
    scalars = found.scalars("eng")
    layers = [expected(COUNTS[0, layer, :size].tolist()) for layer, size in enumerate(SIZES)]
    assert scalars["moe/normalized_entropy_mean"] == pytest.approx(np.mean([layer["entropy"] for layer in layers]))
    assert scalars["moe/normalized_entropy_min"] == 0.0
    assert scalars["moe/max_share_max"] == 1.0
    assert scalars["moe/dead_expert_frac"] == pytest.approx(3 / 11)
    assert scalars["moe/max_vio"] == pytest.approx(np.mean([layer["max_violation"] for layer in layers]))
    assert scalars["moe/expert_diversity"] == pytest.approx(
        np.mean([layer["effective"] / size for layer, size in zip(layers, SIZES, strict=True)])
    )
    assert found.scalars("eng", by_layer=True)["moe/max_share_layer_2"] == pytest.approx(10 / 16)


def test_a_group_without_tokens_in_a_phase_is_nan():
    generated = RoutingStatistics.from_token_sums(
        ("deu",), counts=COUNTS[1:], tokens=COUNTS[1:].sum(-1) // 2, top_k=2, num_experts=SIZES, phase="decode"
    )
    found = analysis.load_balance(statistics(COUNTS[:1], ("eng",)) + generated, phase="decode")
    assert np.isnan(found.entropy[0]).all()
    assert np.isnan(found.dead[0]).all()
    assert not np.isnan(found.dead[1]).any()
    with pytest.raises(AnalysisError, match="leave phase out"):
        found.scalars("eng")
    assert "-" in repr(found)


@pytest.mark.parametrize(
    "question",
    [
        analysis.load_balance,
        analysis.committee,
        analysis.entropy,
        lambda given, phase: analysis.divergence(given, "eng", pairing="pooled", phase=phase),
        lambda given, phase: analysis.divergence_matrix(given, pairing="pooled", phase=phase),
    ],
)
def test_a_phase_without_any_token_is_refused(question):
    with pytest.raises(AnalysisError, match=r"no token of phase 'decode'.*: leave phase out \(--phase\)"):
        question(statistics(), phase="decode")


def test_one_expert_has_no_entropy():
    found = analysis.load_balance(statistics(np.full((1, 1, 1), 4), ("eng",), (1,)))
    assert np.isnan(found.entropy[0, 0])
    assert found.max_violation[0, 0] == 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": ["fra"]}, "no group 'fra'"),
        ({"rare_below": 1.5}, "rare_below"),
        ({"pool": True, "by": "sequence"}, "leave by"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(AnalysisError, match=words):
        analysis.load_balance(statistics(), **options)


def test_several_groups_must_be_named():
    with pytest.raises(AnalysisError, match="pool=True"):
        analysis.load_balance(statistics()).scalars()
    with pytest.raises(AnalysisError, match="no group 'fra'"):
        analysis.load_balance(statistics()).scalars("fra")


def test_shown_and_saved():
    found = analysis.load_balance(statistics())
    assert found.to_dict()["dead"][0][1] == 0.75
    assert "never chosen" in repr(found)
    pytest.importorskip("pandas")
    assert found.to_pandas().set_index(["group", "layer"]).loc[("deu", 0), "dead"] == 0.5


def test_numbers_of_a_dashboard_by_layer_and_since_an_earlier_state():
    now = statistics()
    balance = analysis.load_balance(now, pool=True)
    found = layer_metrics(now)
    np.testing.assert_array_equal(found["tokens"], now.tokens().sum(0))
    np.testing.assert_allclose(found["normalized_entropy"], balance.entropy[0])
    np.testing.assert_allclose(found["top_share"], balance.max_share[0])
    np.testing.assert_allclose(found["dead_experts"], [0, 0, 0])
    assert (found["steered_share"] == 0).all()
    np.testing.assert_allclose(layer_metrics(now, [0])["dead_experts"], [0, 3, 0])
    before = statistics(COUNTS * [[[1], [1], [0]], [[0], [1], [0]]])
    since = layer_metrics(now, None, before)
    np.testing.assert_array_equal(since["tokens"], [8, 0, 16])
    assert np.isnan(since["top_share"][1])
    np.testing.assert_allclose(since["top_share"][[0, 2]], [0.5, 18 / 32])
    np.testing.assert_array_equal(layer_metrics(before, None, now)["tokens"], before.tokens().sum(0))  # a new recording


def test_a_file_for_prometheus_has_escaped_labels():
    made = metrics_text(statistics(groups=('a"b', "c")), ['a"b'])
    lines = made.splitlines()
    assert lines[:3] == [
        "# HELP moe_route_tokens_total Tokens counted.",
        "# TYPE moe_route_tokens_total counter",
        'moe_route_tokens_total{group="",layer="0"} 16.0',
    ]
    assert 'moe_route_dead_experts{group="a\\"b",layer="1"} 3.0' in lines
    assert sum(line.startswith("# TYPE") for line in lines) == 5
    assert len(lines) == 5 * (2 + 2 * 3)
