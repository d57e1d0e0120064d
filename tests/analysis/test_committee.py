"""The committee of all groups, against plain loops and by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness.routing_data import needs_data, routing

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.recording import RoutingStatistics

COUNTS = np.array(
    [
        [[10, 6, 4, 0], [5, 5, 5, 5], [9, 9, 2, 0]],
        [[8, 2, 10, 0], [14, 6, 0, 0], [2, 1, 17, 0]],
    ]
)
SIZES = (4, 4, 3)


def statistics(counts=COUNTS, groups=("eng", "deu")):
    return RoutingStatistics.from_token_sums(
        groups, counts=counts, tokens=counts.sum(-1) // 2, top_k=2, num_experts=SIZES
    )


def gini(counts):
    """Mean absolute difference over twice the mean."""
    size, mean = len(counts), sum(counts) / len(counts)
    return sum(abs(a - b) for a in counts for b in counts) / (2 * size * size * mean)


def test_members_are_most_used_everywhere():
    found = analysis.committee(statistics())
    # layer 0: {0, 1} and {2, 0}; layer 1: {0, 1} (ties: the lower index) and {0, 1}; layer 2: {0, 1} and {2, 0}
    assert dict(found.experts.items()) == {0: (0,), 1: (0, 1), 2: (0,)}
    assert found.sizes.tolist() == [1, 2, 1]
    assert found.experts.scores[0][0] == pytest.approx(8 / 20)
    assert found.experts.num_experts == SIZES


def test_shares_and_gini_are_those_of_plain_loops():
    found = analysis.committee(statistics())
    total = (COUNTS / COUNTS.sum(-1, keepdims=True)).sum(0)
    for g in range(2):
        for layer, size in enumerate(SIZES):
            counts = COUNTS[g, layer, :size].tolist()
            assert found.gini[g, layer] == pytest.approx(gini(counts), abs=1e-12)
            leading = sorted(range(size), key=lambda e, layer=layer: (-total[layer, e], e))[:2]
            assert found.coverage[g, layer] == pytest.approx(sum(counts[e] for e in leading) / sum(counts))
            members = found.experts.get(layer, ())
            assert found.share[g, layer] == pytest.approx(sum(counts[e] for e in members) / sum(counts))


def test_an_expert_that_a_group_never_chose_is_no_member():
    counts = COUNTS.copy()
    counts[1, 0] = [0, 0, 20, 0]
    assert 0 not in analysis.committee(statistics(counts)).experts


def test_top_is_an_option():
    assert analysis.committee(statistics(), top=1).sizes.tolist() == [0, 1, 0]
    assert analysis.committee(statistics(), top=1).top == (1, 1, 1)


@needs_data
def test_the_domains_of_olmoe_share_experts():
    domains = ("arxiv", "c4", "github")
    files = [json.loads(routing("olmoe", "olmoe", "expert_counts", f"{name}.json").read_text()) for name in domains]
    layers = ("0", "7", "15")
    counts = np.array([[[of[layer].get(str(e), 0) for e in range(64)] for layer in layers] for of in files])
    statistics = RoutingStatistics.from_token_sums(
        domains, counts=counts, tokens=counts.sum(-1) // 8, top_k=8, layers=layers, num_experts=64
    )
    found = analysis.committee(statistics)
    for row in range(3):
        leading = [set(sorted(range(64), key=lambda e, c=of[row]: (-c[e], e))[:8]) for of in counts]
        assert set(found.experts.get(row, ())) == set.intersection(*leading)
        assert found.gini[0, row] == pytest.approx(gini(counts[0, row].tolist()))
    balance = analysis.load_balance(statistics)
    assert balance.max_violation[:, 1] == pytest.approx(counts[:, 1].max(-1) * 64 / counts[:, 1].sum(-1) - 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"groups": ["eng"]}, "two groups"), ({"top": 4}, "top must be"), ({"groups": ["eng", "x"]}, "no group 'x'")],
)
def test_bad_input(options, words):
    with pytest.raises(AnalysisError, match=words):
        analysis.committee(statistics(), **options)


def test_shown_and_saved():
    found = analysis.committee(statistics())
    assert found.to_dict()["experts"]["experts"]["1"] == [0, 1]
    assert "Gini" in repr(found)
    assert "layer 1: 0" in repr(found)
    pytest.importorskip("pandas")
    assert len(found.to_pandas()) == 6
