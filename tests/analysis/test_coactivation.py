"""Experts chosen together and one after the other, against plain loops over tokens."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from harness.traces import GROUPS, trace

from moe_route import analysis
from moe_route.analysis import AnalysisError

EXPERTS = 6


class Pairs:
    """The accessors of statistics that these measures read, with tables counted from a trace."""

    def __init__(self, found):
        layers = found.ids.shape[1]
        self.trace = found
        self.groups = found.groups
        self.layers = found.layers
        self.num_experts = (EXPERTS,) * layers
        self.top_k = (found.ids.shape[2],) * layers
        self.co_selection = np.zeros((len(GROUPS), layers, EXPERTS, EXPERTS), np.int64)
        self.transitions = np.zeros((len(GROUPS), layers - 1, EXPERTS, EXPERTS), np.int64)
        for group, chosen in zip(found.group, found.ids, strict=True):
            for layer, experts in enumerate(chosen):
                self.co_selection[group, layer][np.ix_(experts, experts)] += 1
                if layer:
                    self.transitions[group, layer - 1][np.ix_(chosen[layer - 1], experts)] += 1

    def tokens(self, phase=None):
        return np.bincount(self.trace.group, minlength=3)[:, None].repeat(len(self.layers), 1)


@pytest.fixture(scope="module")
def pairs():
    return Pairs(trace())


def tokens_of(found, layer, expert, groups):
    return {
        t
        for t in range(len(found))
        if found.groups[found.group[t]] in groups and expert in found.ids[t, layer].tolist()
    }


@pytest.mark.parametrize("groups", [GROUPS, ("deu",)])
def test_measures_are_those_of_sets_of_tokens(pairs, groups):
    found = analysis.coactivation(pairs, groups=groups)
    total = sum(GROUPS[g] in groups for g in pairs.trace.group)
    values = {name: found.values(name) for name in ("probability", "conditional", "lift", "pmi", "jaccard")}
    for layer in range(4):
        sets = [tokens_of(pairs.trace, layer, expert, groups) for expert in range(EXPERTS)]
        for a, b in combinations(range(EXPERTS), 2):
            both, either = len(sets[a] & sets[b]), len(sets[a] | sets[b])
            assert found.pairs[layer, a, b] == both
            assert values["probability"][layer, a, b] == pytest.approx(both / total)
            assert values["jaccard"][layer, a, b] == pytest.approx(both / either)
            assert values["conditional"][layer, a, b] == pytest.approx(both / len(sets[a]))
            assert values["conditional"][layer, b, a] == pytest.approx(both / len(sets[b]))
            lift = both * total / (len(sets[a]) * len(sets[b]))
            assert values["lift"][layer, a, b] == pytest.approx(lift)
            assert values["pmi"][layer, a, b] == pytest.approx(math.log(lift) if both else -math.inf)
        assert np.isnan(np.diagonal(values["jaccard"][layer])).all()


def test_strongest_pairs_are_sorted_and_listed_once(pairs):
    found = analysis.coactivation(pairs)
    for measure in ("jaccard", "conditional", "pmi"):
        listed = found.strongest(1000, measure, min_tokens=3)
        values = found.values(measure)
        assert [pair.value for pair in listed] == sorted((pair.value for pair in listed), reverse=True)
        assert all(pair.value == values[pair.layer, pair.expert, pair.other] for pair in listed)
        assert len({(p.layer, *sorted((p.expert, p.other))) for p in listed}) == len(listed)
        assert len(listed) == sum((found.pairs[layer][np.triu_indices(EXPERTS, 1)] >= 3).sum() for layer in range(4))
        assert all(pair.value >= values[pair.layer, pair.other, pair.expert] for pair in listed)


def test_transitions_are_those_of_a_table_of_pairs(pairs):
    found = analysis.transitions(pairs, group="eng")
    for layer in range(3):
        counts = np.zeros((EXPERTS, EXPERTS))
        for t in np.flatnonzero(pairs.trace.group == 0):
            for a in pairs.trace.ids[t, layer]:
                for b in pairs.trace.ids[t, layer + 1]:
                    counts[a, b] += 1
        joint = counts / counts.sum()
        information, conditional = 0.0, 0.0
        for a in range(EXPERTS):
            for b in range(EXPERTS):
                if joint[a, b]:
                    information += joint[a, b] * math.log(joint[a, b] / (joint[a].sum() * joint[:, b].sum()))
                    conditional -= joint[a, b] * math.log(joint[a, b] / joint[a].sum())
        assert (found.counts[layer] == counts).all()
        assert found.mutual_information[layer] == pytest.approx(information, abs=1e-12)
        assert found.next_entropy[layer] == pytest.approx(conditional, abs=1e-12)
        for a in range(EXPERTS):
            tokens = sum(a in pairs.trace.ids[t, layer] for t in np.flatnonzero(pairs.trace.group == 0))
            assert found.conditional[layer, a] == pytest.approx(counts[a] / tokens)
        used = (counts.any(1).sum() - 1) * (counts.any(0).sum() - 1)
        assert found.chance[layer] == pytest.approx(used / (2 * (pairs.trace.group == 0).sum()))
        assert found.lift[layer, 0, 1] == pytest.approx(joint[0, 1] / (joint[0].sum() * joint[:, 1].sum()))


def test_independent_layers_share_no_information_beyond_chance():
    rng = np.random.default_rng(3)
    found = trace(1, texts=300, layers=2, k=1)
    found = trace(1, texts=300, layers=2, k=1, ids=rng.integers(0, EXPERTS, found.ids.shape).astype(np.int8))
    between = analysis.transitions(Pairs(found))
    assert between.mutual_information[0] == pytest.approx(between.chance[0], rel=0.6)
    assert between.mutual_information[0] < 0.02


def test_experts_that_no_token_chose_are_nan(pairs):
    empty = Pairs(trace(ids=np.zeros_like(pairs.trace.ids[..., :1]), weights=pairs.trace.weights[..., :1]))
    found = analysis.coactivation(empty)
    assert np.isnan(found.values("jaccard")[0, 1:, 1:]).all()
    assert found.strongest() == []
    assert "no pair has enough tokens" in repr(found)
    assert np.isnan(analysis.transitions(empty).conditional[0, 1]).all()


def test_bad_input(pairs):
    with pytest.raises(AnalysisError, match="no group 'fra'"):
        analysis.coactivation(pairs, group="fra")
    with pytest.raises(AnalysisError, match="not both"):
        analysis.coactivation(pairs, group="eng", groups=["deu"])
    with pytest.raises(AnalysisError, match="no measure"):
        analysis.coactivation(pairs).values("correlation")
    with pytest.raises(AnalysisError, match="two layers"):
        analysis.transitions(Pairs(trace(layers=1)))
    with pytest.raises(AnalysisError, match="min_tokens"):
        analysis.transitions(pairs).strongest(min_tokens=0)


def test_shown_and_saved(pairs):
    together, after = analysis.coactivation(pairs), analysis.transitions(pairs)
    assert together.to_dict()["strongest"][0]["tokens"] >= 10
    assert len(after.to_dict()["mutual_information"]) == 3
    assert "strongest pairs" in repr(together)
    assert "mutual information" in repr(after)
    pytest.importorskip("pandas")
    assert len(together.to_pandas()) == 4 * EXPERTS * (EXPERTS - 1)
    assert len(after.to_pandas()) == 3 * EXPERTS * EXPERTS
