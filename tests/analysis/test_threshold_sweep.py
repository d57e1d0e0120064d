"""Task and multilingual experts by threshold: against the rules themselves, and the threshold that separates them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness.kept_sequences import random_counts, statistics_of

from moe_route import analysis
from moe_route.analysis import AnalysisError

SIZES = (6, 4)
TASTE = {
    "en": np.array([[3, 2, 1, 1, 1, 1], [2, 1, 1, 1, 0, 0]], float),
    "sw": np.array([[1, 1, 3, 3, 1, 1], [1, 1, 1, 3, 0, 0]], float),
    "bn": np.array([[1, 3, 1, 1, 4, 1], [1, 3, 1, 1, 0, 0]], float),
}
ITEMS = [f"s{number}" for number in range(8)]
TAUS = (0.4, 0.0, 0.1, 0.2)


@pytest.fixture(scope="module")
def general():
    counts = {}
    for seed, (group, taste) in enumerate(TASTE.items()):
        counts |= random_counts(ITEMS, group, taste, seed=seed)
    return statistics_of(counts, 2, SIZES)


@pytest.fixture(scope="module")
def task():
    return statistics_of(random_counts(["t1", "t2", "t3"], "en", TASTE["sw"], seed=9), 2, SIZES)


@pytest.mark.parametrize("by", ["sequence", "token"])
def test_a_sweep_counts_what_the_rules_select(task, general, by):
    found = analysis.sweep(task, general, reference="en", thresholds=TAUS, by=by)
    assert found.thresholds == (0.0, 0.1, 0.2, 0.4)
    for row, tau in enumerate(found.thresholds):
        ours = analysis.task_experts(task, general, group="en", threshold=tau, by=by)
        others = analysis.multilingual_experts(general, "en", threshold=tau, by=by)
        for values, chosen in ((found.task, ours), (found.multilingual, others), (found.both, ours & others)):
            assert values[row].tolist() == [chosen.counts.get(layer, 0) for layer in (0, 1)]
        either = len(ours | others)
        assert (
            found.jaccard[row] == pytest.approx(len(ours & others) / either) if either else np.isnan(found.jaccard[row])
        )
        table = analysis.overlap({"task": ours, "multilingual": others})
        assert found.expected[row] == table.expected[0, 1]
        assert found.p_more[row] == table.p_more[0, 1]
        assert found.p_fewer[row] == table.p_fewer[0, 1]


def test_the_separating_threshold_is_the_smallest(task, general):
    found = analysis.sweep(task, general, reference="en", thresholds=[0.1])
    edge = found.separate_from
    assert edge > 0

    def both(tau):
        return analysis.sweep(task, general, reference="en", thresholds=[tau]).both.sum()

    assert both(edge) == 0
    assert both(edge - 1e-9) == 1
    apart = analysis.sweep(task, general, reference="en", thresholds=[0.1], layers=[1], languages=["bn"])
    assert apart.layers == (1,)
    assert (apart.task[:, 0] == 0).all()


def test_sweep_refuses_and_says_how_to_fix_it(task, general):
    cases = [
        (lambda: analysis.sweep(task, general, reference="en", thresholds=[]), "thresholds must"),
        (lambda: analysis.sweep(task, general, reference="en", thresholds=[-0.1]), "thresholds must"),
        (lambda: analysis.sweep(task, general, reference="en", thresholds=[float("nan")]), "thresholds must"),
        (lambda: analysis.sweep(task, general, reference="fr"), "no baseline group 'fr'"),
        (lambda: analysis.sweep(task, task, reference="en"), "with itself"),
        (lambda: analysis.sweep(task, general, reference="en", layers=[5]), "some of the 2 layers"),
        (lambda: analysis.sweep(task.select(layers=[0]), general, reference="en"), "other numbers of experts"),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()


def test_the_result_shows_itself(task, general):
    found = analysis.sweep(task, general, reference="en")
    assert "no expert is in both sets from threshold" in repr(found)
    assert len(found.to_pandas()) == len(found.thresholds) * 2
    json.dumps(found.to_dict(), allow_nan=False)
