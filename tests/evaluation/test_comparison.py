"""Comparisons: McNemar against known values, planted effects, random controls, power."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from moe_route.analysis import AnalysisError
from moe_route.evaluation.results import Answered, compare, mcnemar, power

LANGUAGES = ("eng_Latn", "deu_Latn", "swh_Latn")


def answered(correct: np.ndarray) -> Answered:
    return Answered(tuple(map(str, range(len(correct)))), LANGUAGES, {"exact": correct}, None, 0.0)


def test_mcnemar_has_known_values():
    base = np.array([True] * 9 + [False] * 1 + [True] * 5 + [False] * 4)
    other = np.array([False] * 9 + [True] * 1 + [True] * 5 + [False] * 4)
    assert mcnemar(base, other) == (9, 1, pytest.approx(22 / 1024))  # 2 (1 + 10) / 2^10
    assert mcnemar(base, base) == (0, 0, 1.0)


@pytest.mark.parametrize(("lost", "gained"), [(3, 3), (0, 6), (40, 20), (1, 0)])
def test_mcnemar_tosses_a_fair_coin(lost: int, gained: int):
    base = np.array([True] * lost + [False] * gained)
    tail = sum(comb(lost + gained, k) for k in range(min(lost, gained) + 1)) / 2 ** (lost + gained)
    assert mcnemar(base, ~base)[2] == pytest.approx(min(1, 2 * tail))


def test_a_planted_effect_in_one_language_is_found_there_only():
    rng = np.random.default_rng(0)
    base = rng.random((200, 3)) < 0.5
    other = base.copy()
    other[:40, 2] = True  # a tenth gained in Swahili
    found = compare(answered(base), {"steered": answered(other)}, (), (), "exact", 0)["steered"]
    gained = int((~base[:40, 2]).sum())
    assert found["by_language"]["swh_Latn"]["gained"] == gained
    assert found["by_language"]["swh_Latn"]["p_holm"] < 0.001
    assert found["by_language"]["deu_Latn"]["p_holm"] == 1.0
    assert found["change"]["value"] == pytest.approx(gained / 600)
    assert found["change"]["low"] > 0
    assert found["change"]["verdict"] == "higher"


def test_p_values_are_corrected_over_languages():
    rng = np.random.default_rng(1)
    base, other = rng.random((60, 3)) < 0.5, rng.random((60, 3)) < 0.6
    entry = compare(answered(base), {"steered": answered(other)}, (), (), "exact", 0)["steered"]["by_language"]
    smallest = min(entry.values(), key=lambda one: one["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 3 * smallest["p"]))


def test_a_plan_is_compared_with_random_experts_and_higher_is_better():
    rng = np.random.default_rng(2)
    base = rng.random((80, 3)) < 0.5
    better = base | (rng.random((80, 3)) < 0.4)
    draws = {f"random {i}": answered(base ^ (rng.random((80, 3)) < 0.05)) for i in range(4)}
    conditions = {"base again": answered(base), "steered": answered(better), **draws}
    found = compare(answered(base), conditions, tuple(draws), ("base again",), "exact", 0)
    control = found["steered"]["against_random"]
    assert control["draws"] == 4
    assert control["rank"] == 1
    assert 0 < control["low"] < control["difference"] < control["high"]
    expected = better.mean() - np.mean([one.correct["exact"].mean() for one in draws.values()])
    assert control["difference"] == pytest.approx(expected)
    assert "against_random" not in found["base again"]
    assert "against_random" not in found["random 0"]


def test_power_is_that_of_the_note():
    # at 10 % discordance, 11 x 250 questions have a standard error of .6 points, one language of 2.0
    base = np.zeros((250, 11), bool)
    other = base.copy()
    base[:12], other[12:25] = True, True  # 25 of 250 items differ, about as many in either direction
    found = power(base, other)
    assert found["discordant"] == pytest.approx(0.1)
    assert found["detectable"] / 2.8 == pytest.approx(0.006, abs=2e-4)
    assert found["detectable_one_language"] / 2.8 == pytest.approx(0.02, abs=1e-3)


def test_a_missing_answer_is_an_error():
    record = {"language": "eng_Latn", "item": "1", "correct": {"exact": True}, "nats": None, "tokens": 0}
    with pytest.raises(AnalysisError, match="no answer to item '2'"):
        Answered.of([record], ["1", "2"], ["exact"])
