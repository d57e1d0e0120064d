"""Items drawn for several groups together: each group's means vary as much as those of its items drawn alone."""

from __future__ import annotations

import numpy as np
import pytest

from moe_route.analysis.resampling import draw_together


@pytest.mark.parametrize(("groups", "missing"), [(2, 0.0), (2, 0.3), (6, 0.3), (8, 0.5)])
def test_means_vary_as_those_of_single_groups(groups, missing):
    rng = np.random.default_rng(0)
    items = [[item for item in range(30) if rng.random() >= missing] for _ in range(groups)]
    ratios = []
    for weights in draw_together(items, 2000, 0):
        values = rng.normal(size=weights.shape[1])
        drawn = weights @ values / weights.sum(1)
        ratios.append(drawn.std() / (values.std() / np.sqrt(len(values))))
    assert np.mean(ratios) == pytest.approx(1, abs=0.08)


def test_an_item_is_drawn_for_all_its_groups_and_no_group_is_empty():
    items = [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    weights = draw_together(items, 500, 0)
    np.testing.assert_array_equal(weights[0][:, 4], weights[1][:, 0])
    np.testing.assert_array_equal(weights[1][:, 4], weights[2][:, 0])
    assert all((of_group.sum(1) > 0).all() for of_group in weights)
