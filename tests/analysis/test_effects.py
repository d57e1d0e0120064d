"""Mean effects per token: by hand, against plain loops, and how often tests of nothing find something."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moe_route.analysis import AnalysisError, effects_by_group, mean_effects
from moe_route.analysis.stats import draw_items, interval_of


def test_by_hand():
    """Two items: changes 3 and -1 over 2 and 2 tokens. Signs ++ and -- give |2|, +- and -+ give |4|: all reach 2."""
    found = mean_effects(np.array([3.0, -1.0]), np.array([2.0, 2.0]))
    assert (found.mean, found.tokens, found.items, found.p_value) == (0.5, 4.0, 2, 1.0)


def test_three_items_that_agree_reach_the_smallest_p():
    found = mean_effects(np.array([1.0, 2.0, 0.5]), np.ones(3))
    assert found.p_value == 2 / 8


def test_is_the_plain_loop():
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(size=(7, 3, 2)), rng.integers(0, 4, (7, 3, 2)).astype(float)
    sums[counts == 0] = 0
    found = mean_effects(sums, counts, resamples=300, seed=4)
    drawn = draw_items(7, 300, 4)
    for a, b in product(range(3), range(2)):
        s, n = sums[:, a, b], counts[:, a, b]
        assert found.mean[a, b] == pytest.approx(s.sum() / n.sum())
        values = [(w * s).sum() / (w * n).sum() for w in drawn if (w * n).sum() > 0]
        low, high = interval_of(np.array(values), int((n > 0).sum()), 0.95)
        assert (found.low[a, b], found.high[a, b]) == pytest.approx((low, high))
        reached = [abs(np.dot(signs, s)) >= abs(s.sum()) - 1e-12 for signs in product((1, -1), repeat=7)]
        assert found.p_value[a, b] == pytest.approx(np.mean(reached))


def test_blocks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(1)
    sums, counts = rng.normal(size=(20, 9)), np.ones((20, 9))
    whole = mean_effects(sums, counts, resamples=50, permutations=50)
    monkeypatch.setattr("moe_route.analysis.effects._BLOCK", 100)
    parts = mean_effects(sums, counts, resamples=50, permutations=50)
    for name in ("mean", "low", "high", "p_value"):
        np.testing.assert_allclose(getattr(whole, name), getattr(parts, name), rtol=1e-12)


def test_p_values_of_nothing_are_uniform():
    rng = np.random.default_rng(2)
    found = mean_effects(rng.normal(size=(15, 2000)), np.ones((15, 2000)), permutations=500, resamples=2)
    assert (found.p_value < 0.05).mean() == pytest.approx(0.05, abs=0.015)
    assert np.median(found.p_value) == pytest.approx(0.5, abs=0.03)


def test_cells_without_tokens_and_with_one_item():
    sums, counts = np.array([[0.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 4.0], [0.0, 0.0]])
    found = mean_effects(sums, counts)
    np.testing.assert_array_equal(np.isnan(found.mean), [True, False])
    np.testing.assert_array_equal(np.isnan(found.p_value), [True, False])
    assert np.isnan(found.low).all()
    assert found.items.tolist() == [0, 1]


def test_by_group_adds_the_texts_of_an_item():
    names, found = effects_by_group(
        ["b", "a", "b", "b"], [0, 0, 0, 1], np.array([1.0, 5.0, 2.0, 3.0]), np.array([1.0, 2.0, 1.0, 1.0])
    )
    assert names == ("b", "a")
    np.testing.assert_allclose(found.mean, [2.0, 2.5])
    assert found.items.tolist() == [2, 1]
    alone = mean_effects(np.array([3.0, 3.0]), np.array([2.0, 1.0]))
    assert found.high[0] == alone.high


@pytest.mark.parametrize(
    ("sums", "counts", "message"),
    [
        (np.zeros(0), np.zeros(0), "alike"),
        (np.zeros(2), np.zeros(3), "alike"),
        (np.array([np.nan]), np.ones(1), "finite"),
        (np.ones(1), -np.ones(1), "0 or more"),
    ],
)
def test_bad_input(sums, counts, message):
    with pytest.raises(AnalysisError, match=message):
        mean_effects(sums, counts)
    with pytest.raises(AnalysisError, match="for each text"):
        effects_by_group(["a"], [], np.ones(1), np.ones(1))
    with pytest.raises(AnalysisError, match="no texts"):
        effects_by_group([], [], np.ones(0), np.ones(0))
