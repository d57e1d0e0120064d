"""Paired differences and comparisons with random sets of experts, on known numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_route.analysis import AnalysisError, paired_difference, random_control


class TestPairedDifference:
    def test_value_is_the_change_per_token(self):
        tokens = np.array([10.0, 30.0])
        found = paired_difference(np.array([12.0, 33.0]), np.array([10.0, 30.0]), tokens)
        assert found.value == pytest.approx(5 / 40)

    def test_a_constant_change_has_no_spread(self):
        base = np.random.default_rng(0).uniform(50, 100, 20)
        tokens = np.full(20, 10.0)
        found = paired_difference(base + 1, base, tokens)
        assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))
        assert found.verdict == "higher"
        assert paired_difference(base - 1, base, tokens).verdict == "lower"

    def test_no_change_is_unclear(self):
        base = np.ones(20)
        assert paired_difference(base, base, base).verdict == "unclear"

    def test_one_text_has_no_interval(self):
        found = paired_difference(np.array([12.0]), np.array([10.0]), np.array([10.0]))
        assert found.value == pytest.approx(0.2)
        assert np.isnan([found.low, found.high]).all()
        assert found.verdict == "unclear"
        assert str(found) == "+0.2000 no interval (unclear)"

    def test_few_texts_hold_the_truth_as_often_as_said(self):
        """Plain percentiles of 15 items hold it in about 92 of 100 cases; of 1200, 1118 is four deviations below."""
        rng = np.random.default_rng(4)
        change = rng.normal(size=(1200, 15))
        zeros, ones = np.zeros(15), np.ones(15)
        found = [paired_difference(row, zeros, ones, resamples=400, seed=i) for i, row in enumerate(change)]
        assert sum(one.verdict == "unclear" for one in found) >= 1118

    def test_noise_is_mostly_unclear(self):
        """95 % intervals of differences without an effect leave zero out in about one case of twenty."""
        rng = np.random.default_rng(1)
        base, tokens = np.zeros(40), np.ones(40)
        clear = sum(
            paired_difference(rng.normal(size=40), base, tokens, resamples=500, seed=i).verdict != "unclear"
            for i in range(200)
        )
        assert 2 <= clear <= 24

    def test_width_is_that_of_the_mean(self):
        change = np.random.default_rng(2).normal(size=400)
        found = paired_difference(change, np.zeros(400), np.ones(400))
        assert found.high - found.low == pytest.approx(2 * 1.96 * change.std() / 20, rel=0.1)

    def test_languages_are_averaged_and_drawn_together(self):
        """Changes that cancel between the languages of each item leave no spread in the mean."""
        change = np.random.default_rng(3).normal(size=50)
        nats = np.stack([change, -change], axis=1)
        found = paired_difference(nats, np.zeros((50, 2)), np.ones((50, 2)))
        assert found.high - found.low == pytest.approx(0, abs=1e-12)


class TestRandomControl:
    """The plan's change, that of each random set, and the two sources of chance: texts and draws."""

    def losses(self, seed, sets=19, items=40, spread=0.0):
        rng = np.random.default_rng(seed)
        base, tokens = rng.uniform(20, 30, (items, 2)), np.full((items, 2), 10.0)
        of_sets = rng.normal(0, spread, sets) if spread else np.zeros(sets)
        random = base + 10 * of_sets[:, None, None] + rng.normal(0, 0.1, (sets, items, 2))
        return base, tokens, random

    def test_numbers_by_hand(self):
        base, tokens, random = self.losses(0)
        found = random_control(base - 1, random, base, tokens)
        changes = ((random - base).sum(1) / tokens.sum(0)).mean(-1)
        assert found.plan == pytest.approx(-0.1)
        np.testing.assert_allclose(found.random, changes)
        assert found.difference.value == pytest.approx(-0.1 - changes.mean())
        assert found.difference.verdict == "lower"
        assert (found.rank, found.p_value) == (1, 1 / 20)
        worst = random_control(base + 1, random, base, tokens)
        assert (worst.rank, worst.p_value) == (20, 1.0)
        higher = random_control(base + 1, random, base, tokens, larger=True)
        assert (higher.rank, higher.strongest, worst.strongest) == (1, max(higher.random), min(higher.random))
        assert random_control(random[3], random, base, tokens).rank > 1, "equal changes count against the plan"
        json.dumps(found.to_dict(), allow_nan=False)
        with pytest.raises(AnalysisError, match="no random set"):
            random_control(base, random[:0], base, tokens)

    def test_p_is_never_below_one_in_the_number_of_sets_and_the_plan(self):
        base, tokens, random = self.losses(0, sets=5)
        assert random_control(base - 9, random, base, tokens).p_value == pytest.approx(1 / 6)

    def test_the_interval_holds_the_draws(self):
        """Plans that are random sets themselves: their mean is not different. Over items alone the interval is too
        narrow, since it is the draws that differ."""
        clear = {False: 0, True: 0}
        for seed in range(60):
            base, tokens, random = self.losses(seed, sets=10, spread=0.05)
            truth = base + np.random.default_rng(seed + 1000).normal(
                0, 0.1, base.shape
            )  # what the sets bring on average
            for enumerated in clear:
                found = random_control(truth, random, base, tokens, enumerated=enumerated, resamples=500)
                clear[enumerated] += found.difference.verdict != "unclear"
        assert clear[False] <= 9
        assert clear[True] >= 40
