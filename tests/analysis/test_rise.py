"""RISE's experts: against its formulas in plain loops, its budget, and what is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from harness.kept_sequences import random_counts, statistics_of

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.language_experts import _zone_layers, _zone_numbers

SIZES = (6, 6, 4, 6, 6, 6, 5, 6)
ITEMS = [f"s{number}" for number in range(5)]
GROUPS = ("en", "sw", "bn")


@pytest.fixture(scope="module")
def statistics():
    counts = {}
    for seed, group in enumerate(GROUPS):
        taste = np.random.default_rng(seed).random((8, 6)) * (np.arange(6) < np.array(SIZES)[:, None])
        taste[4, 5] = 0  # an expert that no language chooses
        counts |= random_counts(ITEMS, group, taste, seed=seed)
    return statistics_of(counts, 2, SIZES)


def test_experts_are_those_of_the_formulas(statistics):
    alpha, top_n = 10.0, 20
    found = analysis.rise_experts(statistics, top_n=top_n)
    assert found.zones == ((0, 1, 2), (3, 4), (5, 6, 7))
    frequency = statistics.frequency(by="token")
    for g, group in enumerate(GROUPS):
        ranked = {zone: [] for zone in range(3)}
        for layer, size in enumerate(SIZES):
            zone = 0 if layer < 3 else 1 if layer < 5 else 2
            for expert in range(size):
                a = [float(frequency[row, layer, expert]) for row in range(3)]
                mean = sum(a) / 3
                if mean == 0:
                    continue
                if zone == 1:
                    cv = math.sqrt(sum((x - mean) ** 2 for x in a) / 3) / mean
                    score = (1 + alpha * mean) / (1 + cv)
                    assert found.overlap[layer, expert] == pytest.approx(score)
                else:
                    score = a[g] / mean * (1 + alpha * a[g])
                    assert found.specificity[g, layer, expert] == pytest.approx(score)
                ranked[zone].append((-score, layer, expert))
        expected = {
            (layer, expert)
            for zone, number in ((0, 7), (1, 5), (2, 8))
            for _, layer, expert in sorted(ranked[zone])[:number]
        }
        assert set(found[group].pairs) == expected
        layer, expert = next(iter(expected))
        assert math.isfinite(found[group].scores[layer][expert])
    assert (4, 5) not in set(found["en"].pairs)


def test_middle_experts_are_the_same_for_all_languages(statistics):
    found = analysis.rise_experts(statistics, top_n=20, groups=["en", "sw"])
    assert list(found) == ["en", "sw"]
    assert found["en"].restrict([3, 4]) == found["sw"].restrict([3, 4])
    assert found["en"].restrict([0, 1, 2]) != found["sw"].restrict([0, 1, 2])


@pytest.mark.parametrize(
    ("top_n", "shares", "room", "expected"),
    [
        (20, (0.35, 0.25, 0.4), (18, 12, 18), [7, 5, 8]),
        (10, (0.35, 0.25, 0.4), (18, 12, 18), [3, 2, 5]),
        (10, (0.35, 0.25, 0.4), (18, 0, 18), [5, 0, 5]),  # nothing fits in the middle: the first zone has most room
        (30, (0.35, 0.25, 0.4), (5, 40, 6), [5, 19, 6]),
    ],
)
def test_the_budget_is_spent(top_n, shares, room, expected):
    assert _zone_numbers(top_n, shares, room) == expected
    assert sum(expected) == top_n


def test_zones_of_the_published_models():
    first, middle, last = _zone_layers(48, (0.375, 0.25, 0.375))
    assert (first[-1], middle[0], middle[-1], last[0]) == (17, 18, 29, 30)
    assert [len(zone) for zone in _zone_layers(32, (0.375, 0.25, 0.375))] == [12, 8, 12]


def test_ids_are_written_for_tuning(statistics, tmp_path):
    found = analysis.rise_experts(statistics, top_n=6)
    found.save_ids(tmp_path / "ids.json")
    read = json.loads((tmp_path / "ids.json").read_text())
    assert {int(layer): tuple(ids) for layer, ids in read["sw"].items()} == dict(found["sw"].items())
    json.dumps(found.to_dict(), allow_nan=False)
    assert "layers 0-2" in repr(found)


def test_rise_refuses_and_says_how_to_fix_it(statistics):
    cases = [
        (lambda: analysis.rise_experts(statistics, top_n=4, groups=["en"]), "two groups or more"),
        (lambda: analysis.rise_experts(statistics, top_n=4, groups=["en", "fr"]), "no group 'fr'"),
        (lambda: analysis.rise_experts(statistics, top_n=0), "between 1 and 45"),
        (lambda: analysis.rise_experts(statistics, top_n=46), "between 1 and 45"),
        (lambda: analysis.rise_experts(statistics, top_n=4, alpha=-1), "alpha must"),
        (lambda: analysis.rise_experts(statistics, top_n=4, zones=(0.5, 0.5)), "zones must be three shares"),
        (lambda: analysis.rise_experts(statistics, top_n=4, budget=(0.5, 0.5, 0.5)), "budget must be three shares"),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()
