"""Stability selection: shares and Jaccard against plain loops, and what is refused."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from harness.kept_sequences import random_counts, statistics_of

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.resampling import draw_together
from moe_route.steering import ExpertSelection

SIZES = (6, 4)
FLAT = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], float)
SHARP = np.array([[9, 1, 1, 1.3, 1, 1], [1, 1, 1, 3, 0, 0]], float)
ITEMS = [f"s{number}" for number in range(10)]


@pytest.fixture(scope="module")
def shown():
    return statistics_of(random_counts(ITEMS, "en", SHARP, seed=3), 2, SIZES)


@pytest.fixture(scope="module")
def plain():
    return statistics_of(random_counts([f"p{n}" for n in range(7)], "en", FLAT, seed=4), 2, SIZES)


def rule(ours, theirs):
    return analysis.task_experts(ours, theirs, threshold=0.05)


def test_shares_and_jaccard_are_those_of_plain_loops(shown, plain):
    found = analysis.stability_selection(rule, shown, plain, resamples=25, keep=0.6, seed=2)
    stores = [shown.store, plain.store]
    drawn = draw_together([store.items("en") for store in stores], 25, 2)
    sets = []
    for weights in zip(*drawn, strict=True):
        means = []
        for store, times in zip(stores, weights, strict=True):
            every = [store.frequency(item, "en") for item in store.items("en")]
            means.append(sum(w * one for w, one in zip(times, every, strict=True)) / times.sum())
        sets.append({tuple(cell) for cell in np.argwhere(means[0] - means[1] > 0.05).tolist()})
    share = np.zeros((2, 6))
    for chosen in sets:
        for cell in chosen:
            share[cell] += 1 / 25
    np.testing.assert_allclose(found.share, share)
    kept = [tuple(cell) for cell in np.argwhere(share > 0.6 - 1e-9).tolist()]
    assert list(found.selection.pairs) == kept
    assert found.selection.scores[0][0] == found.share[0, 0] == 1
    assert found.whole == rule(shown, plain)
    assert found.sizes.tolist() == [len(chosen) for chosen in sets]
    pairs = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in combinations(sets, 2)]
    assert found.jaccard == pytest.approx(np.mean(pairs))
    assert 0 < found.jaccard < 1


def test_any_rule_can_be_resampled(shown, plain):
    counts = random_counts(ITEMS, "en", SHARP, seed=3) | random_counts(ITEMS, "sw", FLAT, seed=4)
    both = statistics_of(counts, 2, SIZES)
    rules = [
        lambda s: analysis.multilingual_experts(s, "en", threshold=0.05),
        lambda s: analysis.frequency_share_experts(s, top=2, threshold=0.6)["en"],
        lambda s: analysis.entropy_experts(s, top_n=2, percentile=50)["en"],
        lambda s: analysis.esft_experts(s, group="en", top_p=0.5),
        lambda s: analysis.rise_experts(s, top_n=3, zones=(0.5, 0, 0.5))["en"],
    ]
    for one in rules:
        found = analysis.stability_selection(one, both, resamples=5)
        assert found.whole == one(both)
        assert found.sizes.max() > 0
    none = analysis.stability_selection(lambda s: ExpertSelection({}), both, resamples=5)
    assert (none.jaccard, len(none.selection)) == (1, 0)


def test_risk_experts_that_are_stable(shown, plain):
    given = {"activations": 3, "deactivations": 2, "per_layer": 2}
    found = analysis.risk_experts(shown, plain, **given, resamples=20, keep=0.7, seed=1)
    for name in ("activate", "deactivate"):
        stable = analysis.stability_selection(
            lambda a, b, name=name: getattr(analysis.risk_experts(a, b, **given), name),
            shown,
            plain,
            resamples=20,
            keep=0.7,
            seed=1,
        )
        assert getattr(found, name) == stable.selection
    np.testing.assert_array_equal(found.values, analysis.risk_experts(shown, plain, **given).values)
    assert (0, 0) in found.activate.pairs


def test_stable_activations_stay_within_what_can_be_forced_on(shown, plain):
    """Each resample activates one expert of the layer; two are kept at this share, and the first stays."""
    tie = np.array([[1, 1, 1e-9, 1e-9, 1e-9, 1e-9], [1, 1, 1, 1, 0, 0]])
    ours = statistics_of(random_counts(ITEMS, "en", np.where(tie == 1, [[30], [1]], tie), seed=8), 2, SIZES)
    one = {"activations": 2, "per_layer": 1, "resamples": 60}
    often = analysis.risk_experts(ours, plain, **one, keep=0.05)
    assert often.activate.counts[0] == 1
    share = analysis.stability_selection(
        lambda a, b: analysis.risk_experts(a, b, activations=2, per_layer=1).activate, ours, plain, resamples=60
    ).share
    assert (share[0] >= 0.05).sum() == 2
    assert often.activate[0] == (int(share[0].argmax()),)


def test_stability_refuses_and_says_how_to_fix_it(shown, plain):
    pooled = statistics_of(random_counts(ITEMS, "en", FLAT), 2, SIZES)
    pooled.store = None
    few = statistics_of(random_counts(ITEMS[:3], "en", FLAT), 2, SIZES)
    stable = analysis.stability_selection
    cases = [
        (lambda: stable(rule, shown, pooled), r"record\(sequences=True\)"),
        (lambda: stable(rule, shown, few), "3 kept items of group 'en' are too few"),
        (lambda: stable(rule, shown, plain, keep=0), "keep must"),
        (lambda: stable(rule, shown, plain, resamples=1), "resamples must"),
        (lambda: stable(rule), "pass the statistics"),
        (lambda: stable(lambda a, b: analysis.risk_experts(a, b, top_n=2), shown, plain), "take one of its selections"),
        (lambda: stable(lambda s: analysis.esft_experts(s, kind="gate"), shown), "'weight' was not recorded"),
        (
            lambda: analysis.risk_experts(np.ones((2, 6)), np.ones((2, 6)), top_n=1, per_layer=2, resamples=9),
            "resamples need statistics",
        ),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert isinstance(raised.value, AnalysisError) or "weight" in message


def test_the_result_shows_itself(shown, plain):
    found = analysis.stability_selection(rule, shown, plain, resamples=10)
    assert "of 10 resamples" in repr(found)
    frame = found.to_pandas()
    assert frame["share"].is_monotonic_decreasing
    assert frame["kept"].sum() == len(found.selection)
    json.dumps(found.to_dict(), allow_nan=False)
