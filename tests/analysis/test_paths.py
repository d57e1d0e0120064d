"""Routing paths, against plain loops over tuples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from harness.traces import GROUPS, trace

from moe_route import analysis
from moe_route.analysis import AnalysisError


def path_of(found, token, layers, k):
    """The experts with the k largest weights in each layer, as sorted tuples."""
    path = []
    for layer in layers:
        ids, weights = found.ids[token, layer].tolist(), found.weights[token, layer].tolist()
        slots = sorted(range(len(ids)), key=lambda slot, weights=weights: -weights[slot])[:k]
        path.append(tuple(sorted(ids[slot] for slot in slots)))
    return tuple(path)


def entropy(counts):
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts)


@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3)])
def test_paths_are_those_of_plain_tuples(k, layers):
    traced = trace(texts=40)
    found = analysis.paths(traced, layers=layers, k=k, min_tokens=3, keep=5).windows[0]
    taken = [path_of(traced, token, layers, k) for token in range(len(traced))]
    counts = Counter(taken)
    assert found.layers == layers
    assert (found.tokens, found.distinct) == (len(traced), len(counts))
    assert found.entropy == pytest.approx(entropy(counts.values()))
    for g in range(3):
        of_group = Counter(path for path, group in zip(taken, traced.group, strict=True) if group == g)
        assert found.distinct_by_group[g] == len(of_group)
        assert found.entropy_by_group[g] == pytest.approx(entropy(of_group.values()))
    assert [path.tokens for path in found.frequent] == sorted(counts.values(), reverse=True)[:5]
    for path in found.frequent:
        assert counts[path.experts] == path.tokens
        groups = Counter(GROUPS[g] for p, g in zip(taken, traced.group, strict=True) if p == path.experts)
        assert path.by_group == groups
        assert list(path.by_group.values()) == sorted(groups.values(), reverse=True)


@pytest.mark.parametrize("classes", [None, ["a", "b", "a", "c", "b", "a", "a"]])
def test_purity_is_that_of_plain_counts(classes):
    traced = trace(texts=60)
    found = analysis.paths(traced, layers=[0, 1], classes=classes, min_tokens=4).windows[0]
    of = defaultdict(Counter)
    groups = defaultdict(set)
    for token in range(len(traced)):
        number = int(traced.token[token])
        name = GROUPS[traced.group[token]] if classes is None else classes[number] if number < 7 else "other"
        path = path_of(traced, token, (0, 1), 1)
        of[path][name] += 1
        groups[path].add(traced.group[token])
    kept = {path: counts for path, counts in of.items() if counts.total() >= 4}
    total = sum(counts.total() for counts in kept.values())
    assert found.covered == total
    assert found.purity == pytest.approx(sum(max(counts.values()) for counts in kept.values()) / total)
    assert found.chance == pytest.approx(max(sum(kept.values(), Counter()).values()) / total)
    assert found.spread == pytest.approx(sum(counts.total() * len(groups[p]) for p, counts in kept.items()) / total)


def test_windows_are_runs_of_layers():
    traced = trace()
    found = analysis.paths(traced, window=2)
    assert [window.layers for window in found.windows] == [(0, 1), (1, 2), (2, 3)]
    alone = analysis.paths(traced, layers=[1, 2]).windows[0]
    assert (found.windows[1].distinct, found.windows[1].entropy) == (alone.distinct, alone.entropy)


def test_the_order_of_slots_does_not_matter():
    traced = trace()
    turned = trace(ids=traced.ids[..., ::-1], weights=traced.weights[..., ::-1])
    for k in (1, None):
        ours, theirs = analysis.paths(traced, k=k).windows[0], analysis.paths(turned, k=k).windows[0]
        assert (ours.distinct, ours.entropy) == (theirs.distinct, theirs.entropy)


def test_tokens_without_a_choice_are_left_out():
    ids = trace().ids.copy()
    ids[:7, 2] = -1
    assert analysis.paths(trace(ids=ids)).windows[0].tokens == len(ids) - 7
    assert analysis.paths(trace(ids=ids), layers=[0, 1]).windows[0].tokens == len(ids)
    nothing = analysis.paths(trace(ids=np.full_like(ids, -1))).windows[0]
    assert nothing.tokens == 0
    assert math.isnan(nothing.entropy)
    assert math.isnan(nothing.purity)


def test_groups_and_phases_are_chosen():
    traced = trace()
    assert analysis.paths(traced, groups=["deu"]).windows[0].tokens == (traced.group == 1).sum()
    both = (traced.group == 1) & (traced.phase == 1)
    assert analysis.paths(traced, groups=["deu"], phase="decode").windows[0].tokens == both.sum()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [0, 7]}, "layer 7 was not traced: the trace holds layers 0-3"),
        ({"layers": []}, "no layer to look at"),
        ({"window": 5}, "window must be between 1 and 4"),
        ({"k": 3}, "k must be between 1 and 2"),
        ({"groups": ["fra"]}, "no tokens of group 'fra'"),
        ({"phase": "answer"}, "no phase 'answer'"),
        ({"min_tokens": 0}, "min_tokens"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(AnalysisError, match=words):
        analysis.paths(trace(), **options)


def test_an_empty_trace_is_refused():
    traced = trace()
    nothing = {name: getattr(traced, name)[:0] for name in ("sequence", "group", "position", "token", "phase")}
    with pytest.raises(AnalysisError, match="empty"):
        analysis.paths(trace(**nothing, ids=traced.ids[:0], weights=traced.weights[:0]))


def test_shown_and_saved():
    found = analysis.paths(trace(texts=40))
    assert found.to_dict()["windows"][0]["frequent"][0]["tokens"] == found.windows[0].frequent[0].tokens
    assert "most frequent paths through layers 0-3" in repr(found)
    assert " > " in repr(found)
    pytest.importorskip("pandas")
    assert analysis.paths(trace(), window=1).to_pandas()["last"].tolist() == [0, 1, 2, 3]
