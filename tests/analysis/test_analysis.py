"""moe_route.analysis: formulae against plain rewritings, laws of divergence, published figures, clear refusals."""

from __future__ import annotations

import json
import warnings
from itertools import combinations, permutations
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from harness.routing_data import FOLDER, esft, esft_ids, needs_data, published_routing, routing
from harness.tiny_models import tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import moe_route as mr
from moe_route import analysis
from moe_route.analysis import AnalysisError, Divergence
from moe_route.analysis.measures import cosine_distance, jaccard_distance
from moe_route.contract.tables import SCALARS
from moe_route.recording import RoutingStatistics
from moe_route.recording.store import SequenceStore
from moe_route.recording.tables import TableSums
from moe_route.recording.vectors import SequencePool
from moe_route.steering import ExpertSelection, Plan

GROUPS = ("en", "sw", "bn")
SIZES = (6, 4)  # the second layer has fewer experts: its rows are padded with zeros
LAYERS, WIDEST, TOP_K = 2, 6, 2
ITEMS = 12


def entropy_of(q):
    return -sum(x * np.log(x) for x in q if x > 0)


def divergence_of(q1, q2, num_experts):
    """Appendix A.4 as it is written."""
    middle, mean = entropy_of((q1 + q2) / 2), (entropy_of(q1) + entropy_of(q2)) / 2
    return (middle - mean) / (np.log(num_experts) - mean)


def sequences(seed=0, groups=GROUPS, items=ITEMS):
    """(item, group) -> counts int64 [L, E]: each sequence has 10 to 39 tokens that choose two experts a layer."""
    rng = np.random.default_rng(seed)
    found = {}
    for g, group in enumerate(groups):
        for item in range(items):
            counts = np.zeros((LAYERS, WIDEST), dtype=np.int64)
            tokens = rng.integers(10, 40)
            for layer, size in enumerate(SIZES):
                taste = rng.dirichlet(np.ones(size) * 3) + 0.4 * g * np.eye(size)[g]
                for _ in range(tokens):
                    counts[layer, rng.choice(size, TOP_K, replace=False, p=taste / taste.sum())] += 1
            found[item, group] = counts
    return found


def statistics(found, groups=GROUPS, keep=True):
    """Real ``RoutingStatistics`` of these sequences (item, group), whose router mass is their share of selections."""
    counts = np.stack([sum(c for (_, g), c in found.items() if g == group) for group in groups])
    tokens = counts.sum(-1) // TOP_K
    mass = np.stack([sum(c / TOP_K for (_, g), c in found.items() if g == group) for group in groups])
    stats = RoutingStatistics.from_token_sums(
        groups,
        counts=counts,
        tokens=tokens,
        top_k=TOP_K,
        probability=mass,
        num_experts=SIZES,
        metadata={"model": {"name": "demo", "config_hash": "abc"}},
    )
    if keep:
        store = SequenceStore(stats.layers, SIZES)
        arrays = {
            "tokens": np.stack([c.sum(-1) // TOP_K for c in found.values()]),
            "counts": np.stack(list(found.values())).astype(np.int32),
            "full": np.stack([c / c.sum(-1, keepdims=True) for c in found.values()]).astype(np.float32),
        }
        store.append([(item if isinstance(item, str) else f"s{item}", group) for item, group in found], arrays)
        stats.store = store
    return stats


@pytest.fixture(scope="module")
def found():
    return sequences()


@pytest.fixture(scope="module")
def stats(found):
    return statistics(found)


# -- measures

MEASURES = {
    "normalized_jsd": lambda a, b: analysis.normalized_jensen_shannon(a, b, a.shape[-1]),
    "jsd": analysis.jensen_shannon,
    "cosine": cosine_distance,
    "jaccard": lambda a, b: jaccard_distance(a, b, 2),
}
positive = st.floats(1e-12, 1e6)
pairs = (
    st.integers(2, 12)
    .flatmap(
        lambda size: st.tuples(
            hnp.arrays(np.float64, size, elements=st.just(0.0) | positive),
            hnp.arrays(np.float64, size, elements=st.just(0.0) | positive),
        )
    )
    .filter(lambda pair: min(pair[0].sum(), pair[1].sum()) > 0)
)


@pytest.mark.parametrize("measure", MEASURES)
@given(pair=pairs)
def test_measures_are_symmetric_bounded_and_zero_on_equal(measure, pair):
    one, two = (q / q.sum() for q in pair)
    value = MEASURES[measure](one, two)
    np.testing.assert_array_equal(value, MEASURES[measure](two, one))
    assert np.isnan(value) or 0 <= value <= 1
    same = MEASURES[measure](one, one)
    assert same == 0 or np.isnan(same)
    if measure == "jsd":
        assert value <= np.log(2) + 1e-12


@given(pair=pairs)
def test_normalized_divergence_is_equation_two(pair):
    one, two = (q / q.sum() for q in pair)
    bound = np.log(len(one)) - (entropy_of(one) + entropy_of(two)) / 2
    value = analysis.normalized_jensen_shannon(one, two, len(one))
    if bound > 1e-6:
        assert value == pytest.approx(divergence_of(one, two, len(one)), abs=1e-9 / bound)
    assert analysis.entropy_of(one) == pytest.approx(entropy_of(one), abs=1e-12)
    assert analysis.jensen_shannon(one, two) == pytest.approx(
        scipy.stats.entropy(one, (one + two) / 2) / 2 + scipy.stats.entropy(two, (one + two) / 2) / 2, abs=1e-12
    )


@given(pair=pairs, scale=st.floats(0.01, 100))
@pytest.mark.filterwarnings("ignore:experts .* are never used")
def test_rows_need_not_be_normalized(pair, scale):
    one, two = pair
    value = analysis.divergence(one[None], two[None]).values
    np.testing.assert_allclose(value, analysis.divergence(one[None] * scale, two[None]).values, rtol=1e-6, atol=1e-12)


def test_extremes_of_normalized_divergence():
    one, two = np.eye(4)[0], np.eye(4)[1]
    assert analysis.normalized_jensen_shannon(one, one, 4) == 0
    # two sharp routers that share nothing: log 2 over log E, the bound the paper names
    assert analysis.normalized_jensen_shannon(one, two, 4) == pytest.approx(np.log(2) / np.log(4))
    assert analysis.normalized_jensen_shannon(
        np.array([0.5, 0.5, 0, 0]), np.array([0, 0, 0.5, 0.5]), 4
    ) == pytest.approx(1.0)


@pytest.mark.parametrize("size", range(2, 40, 2))
def test_uniform_halves_never_pass_one(size):
    halves = np.repeat(np.eye(2), size // 2, axis=1) / (size // 2)
    value = analysis.normalized_jensen_shannon(halves[0], halves[1], size)
    assert 1 - 1e-12 < value <= 1


def test_uniform_but_for_rounding_is_undefined():
    rng = np.random.default_rng(0)
    for size in (8, 128, 1000):
        stored = (np.full((2, size), 1 / size) * (1 + rng.uniform(-1, 1, (2, size)) * 2.0**-24)).astype(np.float32)
        assert np.isnan(analysis.divergence(stored[:1], stored[1:]).values).all()
        almost = np.full((1, size), 1000.0)
        other = almost.copy()
        other[0, 0] += 1
        assert np.isfinite(analysis.divergence(almost, other).values).all()


def test_both_uniform_is_undefined_and_counted():
    uniform = np.full((1, 4), 0.25)
    both = analysis.divergence(uniform, uniform)
    assert np.isnan(both.values).all()
    assert both.undefined.tolist() == [[1]]
    stored = (np.full(100, 1 / 100, dtype=np.float32)).astype(np.float64)[None]
    assert np.isnan(analysis.divergence(stored, stored).values).all()
    assert np.isnan(analysis.divergence(np.ones((1, 1)), np.ones((1, 1))).values).all(), "one expert is always uniform"
    pairs = analysis.divergence(np.stack([uniform, np.eye(4)[:1]]), np.stack([uniform, np.eye(4)[1:2]]))
    assert pairs.values[0, 0] == pytest.approx(0.5)
    assert pairs.undefined.tolist() == [[1]]
    assert "1 undefined" in repr(pairs)


def test_jaccard_takes_the_lower_index_of_equals():
    assert jaccard_distance(np.array([0.4, 0.2, 0.2, 0.2]), np.array([0.4, 0.2, 0.2, 0.2]), 2) == 0
    assert jaccard_distance(np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.4, 0.1, 0.2, 0.3]), 2) == pytest.approx(2 / 3)


def test_padding_that_is_not_named_is_warned_of():
    """Zeros at the end of a narrow layer change D, which depends on the number of experts."""
    rng = np.random.default_rng(0)
    q = rng.dirichlet(np.ones(8), (2, 3, 2))
    q[..., 1, 4:] = 0
    with pytest.warns(UserWarning, match="experts 4 to 7 of layer 1 are never used.*pass num_experts") as warned:
        padded = analysis.divergence(q[0], q[1])
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = analysis.divergence(q[0], q[1], num_experts=[8, 4])
        q[0, 0, 1, 6] = 1e-9
        analysis.divergence(q[0], q[1])  # one unused expert at the end is nothing unusual
    assert padded.values[0, 1] < named.values[0, 1]


# -- divergence of recordings


def test_paired_divergence_is_the_mean_over_parallel_sequences(found, stats):
    result = analysis.divergence(stats, reference="en")
    assert (result.pairing, result.groups, result.reference, result.pairs) == ("paired", ("sw", "bn"), "en", ITEMS)
    assert f"paired over {ITEMS} items" in repr(result)
    for g, group in enumerate(result.groups):
        for layer, size in enumerate(SIZES):
            expected = []
            for item in range(ITEMS):
                one, two = (found[item, name][layer] for name in ("en", group))
                expected.append(divergence_of(one / one.sum(), two / two.sum(), size))
            assert result.values[g, layer] == pytest.approx(np.mean(expected), rel=1e-5)


def test_pooled_divergence_is_of_the_mean_distributions(found, stats):
    result = analysis.divergence(stats, "en", pairing="pooled", by="token")
    for g, group in enumerate(result.groups):
        for layer, size in enumerate(SIZES):
            one, two = (sum(c[layer] for (_, name), c in found.items() if name == n) for n in ("en", group))
            assert result.values[g, layer] == pytest.approx(divergence_of(one / one.sum(), two / two.sum(), size))
    assert (result.pairs, result.pair_values) == (0, None)
    assert "pooled" in repr(result)


def test_divergence_is_paired_unless_another_estimand_is_asked_for(found, stats):
    pooled = statistics(found, keep=False)
    with pytest.raises(AnalysisError, match=r"sequences were not kept.*pairing='pooled'"):
        analysis.divergence(pooled, "en")
    with pytest.raises(AnalysisError, match="leave phase out"):
        analysis.divergence(stats, "en", phase="prefill")


def test_auto_warns_where_it_pools(found, stats):
    with pytest.warns(UserWarning, match=r"pooled divergence.*leave by at") as warned:
        result = analysis.divergence(stats, "en", by="token", pairing="auto")
    assert result.pairing == "pooled"
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match=r"sequences were not kept: record\(sequences=True\)"):
        analysis.divergence_matrix(statistics(found, keep=False), by="token", pairing="auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert analysis.divergence(stats, "en", pairing="auto").pairing == "paired"


def test_groups_are_compared_over_the_items_that_all_of_them_have(found):
    """Swahili has other sentences than Bengali: each is compared with English over what all three have."""
    part = {(i, g): c for (i, g), c in found.items() if not (g == "sw" and i < 3) and not (g == "bn" and i > 9)}
    result = analysis.divergence(statistics(part), "en")
    assert result.pairs == 7
    common = statistics({(i, g): c for (i, g), c in found.items() if 3 <= i <= 9})
    np.testing.assert_array_equal(result.values, analysis.divergence(common, "en").values)
    assert analysis.divergence(statistics(part), "en", groups=["sw"]).pairs == 9
    matrix, expected = analysis.divergence_matrix(statistics(part)), analysis.divergence_matrix(common)
    assert matrix.pairs == 7
    np.testing.assert_array_equal(matrix.values, expected.values)


def test_too_few_common_items_are_refused_with_the_share(found):
    few = {(i if g == "en" or i < 2 else f"own {i}", g): c for (i, g), c in found.items() if g != "sw" or i > 0}
    stats = statistics(few)
    message = r"1 items are common to all groups, 8% of the 12 sequences of 'en', and min_common asks for 50%; 'sw' has"
    with pytest.raises(AnalysisError, match=message):
        analysis.divergence(stats, "en")
    assert analysis.divergence(stats, "en", min_common=0.05).pairs == 1
    with pytest.raises(AnalysisError, match="min_common must be above 0"):
        analysis.divergence(stats, "en", min_common=0)


def test_any_reference_any_groups_and_every_measure(stats):
    for measure in analysis.MEASURES:
        result = analysis.divergence(stats, "sw", groups=["en"], measure=measure)
        assert result.groups == ("en",)
        np.testing.assert_allclose(result.values, analysis.divergence(stats, "en", groups="sw", measure=measure).values)
        assert np.isfinite(result.values).all()


def test_an_empty_finding_names_a_threshold_to_try(stats):
    given = {"group": "sw", "baseline_group": "en", "by": "token"}
    difference = analysis.expert_difference(stats, stats, **given)
    empty = analysis.task_experts(stats, stats, **given, threshold=0.9)
    assert not empty
    assert f"{np.nanmax(difference):.3g}" in repr(empty)
    threshold = float(empty.description.rsplit("threshold ")[-1].split()[0])
    assert analysis.task_experts(stats, stats, **given, threshold=threshold)
    several = analysis.multilingual_experts(stats, "en", threshold=0.9, layers=[1], by="token")
    threshold = float(several.description.rsplit("threshold ")[-1].split()[0])
    assert set(analysis.multilingual_experts(stats, "en", threshold=threshold, layers=[1], by="token")) == {1}


@pytest.mark.parametrize("groups", ["en", ["sw", "en"]])
def test_a_group_is_not_compared_with_itself(stats, groups):
    with pytest.raises(AnalysisError, match="itself"):
        analysis.divergence(stats, "en", groups=groups)
    with pytest.raises(AnalysisError, match="itself"):
        analysis.multilingual_experts(stats, "en", groups=groups, threshold=0.1, by="token")
    with pytest.raises(AnalysisError, match="itself"):
        analysis.task_experts(stats, stats, group="en", threshold=0.1, by="token")


def test_matrix_agrees_with_each_divergence(stats):
    matrix = analysis.divergence_matrix(stats)
    assert matrix.pairing == "paired"
    assert matrix.values.shape == (LAYERS, 3, 3)
    np.testing.assert_array_equal(matrix.values, matrix.values.transpose(0, 2, 1))
    assert (matrix.values[:, range(3), range(3)] == 0).all()
    for i, reference in enumerate(GROUPS):
        one = analysis.divergence(stats, reference)
        for group in one.groups:
            np.testing.assert_allclose(matrix.values[:, i, GROUPS.index(group)], one.of(group))
    np.testing.assert_allclose(matrix.mean([1]), matrix.values[1])
    pooled = analysis.divergence_matrix(stats, by="token", pairing="pooled")
    assert pooled.pairing == "pooled"


def test_interval_holds_the_mean_and_is_seeded(stats):
    result = analysis.divergence(stats, "en")
    low, high = result.interval(0.95, seed=1)
    assert (low < result.values).all()
    assert (result.values < high).all()
    np.testing.assert_array_equal(low, result.interval(0.95, seed=1)[0])
    narrow = result.interval(0.5, seed=1)
    assert (narrow[0] >= low).all()
    assert (narrow[1] <= high).all()


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        values = rng.beta(2, 5, (40, 1))
        result = Divergence(
            values.mean(0)[None], ("g",), "en", ("0",), pairing="paired", pairs=40, pair_values=values[None]
        )
        low, high = result.interval(0.9, resamples=300)
        covered += low[0, 0] <= 2 / 7 <= high[0, 0]
    assert 165 <= covered <= 195


def test_u_shape_takes_the_ends_and_the_middle():
    layers = 48
    values = np.abs(np.linspace(-1, 1, layers))[None]
    shape = analysis.u_shape(Divergence(values, ("sw",), "en", tuple(map(str, range(layers)))))
    assert (shape.first_layers, shape.middle_layers, shape.last_layers) == (
        (0, 1, 2, 3),
        tuple(range(16, 32)),
        (44, 45, 46, 47),
    )
    assert shape.first[0] == pytest.approx(values[0, :4].mean())
    assert shape.depth[0] == pytest.approx((shape.first[0] + shape.last[0]) / 2 - shape.middle[0])
    assert shape.depth[0] > 0
    one = analysis.u_shape(Divergence(values[:, :1], ("sw",), "en", ("0",)))
    assert one.first == one.middle == one.last
    assert "no interval" in repr(shape)
    assert "lower" not in repr(shape)
    with pytest.raises(AnalysisError, match="needs paired"):
        shape.interval()


def test_the_middle_is_the_middle_third_with_ends_of_one_size():
    assert [analysis.middle_layers(layers) for layers in (1, 2, 3, 4, 8)] == [(0,), (0, 1), (1,), (1, 2), (2, 3, 4, 5)]
    assert analysis.middle_layers(48) == tuple(range(16, 32))
    assert all(
        layers - 1 - analysis.middle_layers(layers)[-1] == analysis.middle_layers(layers)[0] for layers in range(1, 70)
    )


def paired_u(depth, items, seed=0, spread=0.05):
    """Paired divergence of two groups over 12 layers with this much of a U, of noisy items that the groups share."""
    rng = np.random.default_rng(seed)
    middle = np.isin(np.arange(12), analysis.middle_layers(12))
    values = 0.4 - depth * middle + rng.normal(0, spread, (items, 12))
    pairs = np.stack([values, values + 0.1])
    return Divergence(
        pairs.mean(1), ("sw", "bn"), "en", tuple("abcdefghijkl"), "jsd", "paired", items, pair_values=pairs
    )


def test_the_depth_of_the_u_has_an_interval_over_items():
    shape = analysis.u_shape(paired_u(0.1, 30))
    low, high = shape.interval()
    assert ((low < shape.depth) & (shape.depth < high) & (low > 0)).all()
    np.testing.assert_allclose(shape.mean_interval(), (low[0], high[0]))  # the groups differ by a constant
    assert repr(shape).count("lower") == 2
    assert repr(analysis.u_shape(paired_u(0.0, 30))).count("unclear") == 2
    assert repr(analysis.u_shape(paired_u(-0.1, 30))).count("higher") == 2
    json.dumps(shape.to_dict(), allow_nan=False)
    assert list(shape.to_pandas().columns) == ["group", "first", "middle", "last", "depth", "low", "high"]
    missing = paired_u(0.1, 30)
    missing.pair_values[0, 3, :] = np.nan
    assert np.isfinite(analysis.u_shape(missing).interval()).all()
    assert np.isnan(analysis.u_shape(paired_u(0.1, 1)).interval()).all(), "a single item says nothing of others"


def test_the_interval_of_the_depth_covers_the_truth():
    held = sum(
        low <= 0.1 <= high
        for low, high in (analysis.u_shape(paired_u(0.1, 10, seed)).mean_interval(0.9) for seed in range(200))
    )
    assert 166 <= held <= 194


def test_layers_that_saw_nothing_are_nan_and_counted(found):
    blank = {key: counts.copy() for key, counts in found.items()}
    for (item, group), counts in blank.items():
        if group == "sw" and item < 5:
            counts[1] = 0
    with np.errstate(invalid="ignore"):
        result = analysis.divergence(statistics(blank), "en")
    assert result.undefined.tolist() == [[0, 5], [0, 0]]
    assert np.isfinite(result.values).all()
    with np.errstate(invalid="ignore"):
        rest = analysis.divergence(statistics({k: v for k, v in found.items() if k[0] >= 5}), "en")
    assert result.of("sw")[1] == pytest.approx(rest.of("sw")[1])


def test_divergence_refuses_and_says_how_to_fix_it(found, stats):
    pooled = statistics(found, keep=False)
    empty = statistics(
        {**found, **{(i, "xx"): np.zeros((LAYERS, WIDEST), np.int64) for i in range(2)}}, (*GROUPS, "xx"), keep=False
    )
    lonely = statistics(found)
    lonely.store = SequenceStore(lonely.layers, SIZES)
    cases = [
        (
            lambda: analysis.divergence(stats, "fr"),
            r"no reference group 'fr' was recorded: these statistics hold 'en', 'sw', 'bn'",
        ),
        (lambda: analysis.divergence(stats, "en", groups=["fr"]), "no group 'fr'"),
        (lambda: analysis.divergence(empty, "en", pairing="pooled"), "group 'xx' is empty"),
        (lambda: analysis.divergence(empty, "xx", pairing="pooled"), "reference group 'xx' is empty"),
        (lambda: analysis.divergence(pooled, "en", pairing="paired"), r"record\(sequences=True\)"),
        (lambda: analysis.divergence(lonely, "en", pairing="paired"), "0 items are common to all groups"),
        (lambda: analysis.divergence(stats, "en", pairing="paired", phase="decode"), "leave phase out"),
        (lambda: analysis.divergence(stats, "en", pairing="best"), "pairing must be"),
        (lambda: analysis.divergence(stats, "en", measure="kl"), "no measure 'kl'"),
        (lambda: analysis.divergence(stats, np.ones((2, 6))), "name the reference group"),
        (lambda: analysis.divergence(np.ones((2, 6)), "en"), "two arrays"),
        (lambda: analysis.divergence(np.ones((2, 6)), np.ones((2, 5))), "one shape"),
        (lambda: analysis.divergence(np.ones(6), np.ones(6)), "layer, expert"),
        (lambda: analysis.divergence(-np.ones((2, 6)), np.ones((2, 6))), "not logits"),
        (lambda: analysis.divergence(np.ones((2, 6)), np.ones((2, 6)), num_experts=4), "beyond num_experts"),
        (lambda: analysis.divergence(np.ones((2, 6)), np.ones((2, 6)), num_experts=9), "between 1 and 6"),
        (lambda: analysis.divergence(np.ones((2, 6)), np.ones((2, 6)), measure="jaccard"), "needs top"),
        (lambda: analysis.divergence(stats, "en", measure="jaccard", top=0), "top must be"),
        (lambda: analysis.divergence(pooled, "en", by="token", pairing="pooled").interval(), "needs paired"),
        (lambda: analysis.divergence_matrix(stats, measure="kl"), "no measure 'kl'"),
        (lambda: analysis.divergence(stats, "en").interval(1.5), "between 0 and 1"),
        (lambda: analysis.divergence(stats, "en").of("fr"), "no group 'fr'"),
        (lambda: analysis.divergence_matrix(stats, groups=["en"]), "two groups"),
        (lambda: analysis.divergence(stats.select(["en"]), "en"), "nothing to compare"),
        (lambda: analysis.u_shape(analysis.divergence(stats, "en"), middle=range(1, 9)), "of the 2 layers"),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()


# -- entropy, consistency


class WithEntropy:
    """What ``entropy`` reads of statistics, with known values."""

    groups, layers, num_experts, top_k, store, metadata = ("en", "sw"), ("a", "b"), (4, 2), (1, 1), None, {}

    def tokens(self, phase=None):
        return np.array([[5, 5], [7, 7]])

    def mean_distribution(self, kind="full", phase=None, by="sequence"):
        return np.full((2, 2, 4), 0.25)

    def frequency(self, phase=None, by="sequence"):
        return np.full((2, 2, 4), 0.25)

    def entropy(self, of="token", phase=None, by="token"):
        """Long sequences are the sharper ones: a token is sharper than a sequence's mean token."""
        return np.array([[0.5, 0.25], [0.4, 0.2]]) * (2 if of == "sequence" else 1.5 if by == "sequence" else 1)


def test_entropy_of_tokens_and_sequences_and_their_gap():
    result = analysis.entropy(WithEntropy())
    np.testing.assert_allclose(result.gap, 0.5 * result.token)
    np.testing.assert_allclose(result.normalized("sequence"), result.sequence / np.log([4, 2]))
    assert "token entropy" in repr(result)
    assert "sequence entropy" in repr(result)
    only = analysis.entropy(WithEntropy(), of="token", groups=["sw"])
    assert only.groups == ("sw",)
    assert only.to_dict()["token"] == [[0.4, 0.2]]
    assert list(result.to_pandas().columns) == ["group", "layer", "router", "token", "sequence", "within"]
    with pytest.raises(AnalysisError, match="both"):
        _ = only.gap
    with pytest.raises(AnalysisError, match="no sequence entropy"):
        only.normalized("sequence")
    with pytest.raises(AnalysisError, match="of must be"):
        analysis.entropy(WithEntropy(), of="word")


def of_sequences(tokens):
    """Statistics of one group from sequences of known distributions, [tokens, experts] each, one layer."""
    num_experts = tokens[0].shape[-1]
    unit = 1 << 32
    sums = TableSums(len(tokens), 1, num_experts, ["probability"])
    for row, p in enumerate(tokens):
        nats = sum(entropy_of(q) for q in p)
        sums.metrics["probability"][0, row, 0] = np.rint(p * unit).sum(0)
        for name, value in (("tokens", len(p)), ("slots", len(p)), ("empty", len(p)), ("entropy", round(nats * unit))):
            sums.scalars[0, row, 0, SCALARS.index(name)] = value
    pool = SequencePool(1, 1, num_experts, ["probability"], entropy=True)
    pool.add(sums, np.zeros(len(tokens), int))
    return RoutingStatistics(
        groups=["en"],
        layers=["a"],
        num_experts=[num_experts],
        top_k=[1],
        scalars=sums.scalars.sum(1, keepdims=True),
        metrics={"probability": sums.metrics["probability"].sum(1, keepdims=True)},
        sequence_scalars=pool.scalars,
        sequence_sums=pool.sums,
    )


def test_the_gap_is_zero_where_the_tokens_of_each_sequence_are_alike():
    """99 identical uniform tokens and a sequence of one sharp token: weighing tokens alike gives -0.68 for it."""
    found = analysis.entropy(of_sequences([np.full((99, 4), 0.25), np.eye(4)[:1]]))
    assert found.gap[0, 0] == 0
    assert found.sequence[0, 0] - found.token[0, 0] == pytest.approx(-0.679, abs=1e-3)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 2**16))
def test_the_gap_is_the_mean_divergence_within_sequences(lengths, seed):
    rng = np.random.default_rng(seed)
    tokens = [rng.dirichlet(np.ones(5), size) for size in lengths]
    expected = np.mean([entropy_of(p.mean(0)) - np.mean([entropy_of(q) for q in p]) for p in tokens])
    gap = analysis.entropy(of_sequences(tokens)).gap[0, 0]
    assert gap == pytest.approx(expected, abs=1e-8)
    assert gap > -1e-8


def test_the_gap_of_imported_sums_is_refused(found):
    with pytest.raises(ValueError, match="token"):
        analysis.entropy(statistics(found, keep=False))


@given(st.lists(st.sets(st.integers(0, 6), min_size=0, max_size=3), min_size=2, max_size=9), st.integers(1, 4))
def test_consistency_is_the_mean_jaccard_of_all_pairs(sets, chunk):
    ids = np.array([[*chosen, *[-1] * (3 - len(chosen))] for chosen in sets])
    found = [len(a & b) / len(a | b) for a, b in combinations(filter(None, sets), 2)]
    expected = np.mean(found) if found else np.nan
    assert analysis.consistency(ids, chunk=chunk) == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_consistency_of_one_token_is_undefined():
    assert np.isnan(analysis.consistency(np.array([[1, 2]])))
    with pytest.raises(AnalysisError, match="integers"):
        analysis.consistency(np.ones((3, 2)))


# -- experts


def test_expert_difference_is_equation_three(found, stats):
    frequencies = {
        g: np.stack([c / (c.sum(-1, keepdims=True) / TOP_K) for (_, n), c in found.items() if n == g]) for g in GROUPS
    }
    delta = analysis.expert_difference(frequencies["sw"], frequencies["en"])
    np.testing.assert_allclose(delta, frequencies["sw"].mean(0) - frequencies["en"].mean(0))
    np.testing.assert_allclose(delta.sum(-1), 0, atol=1e-12)
    of_tokens = analysis.expert_difference(stats, stats, group="sw", baseline_group="en", by="token")
    pooled = [sum(c for (_, n), c in found.items() if n == g) for g in ("sw", "en")]
    np.testing.assert_allclose(
        of_tokens, TOP_K * (pooled[0] / pooled[0].sum(-1, keepdims=True) - pooled[1] / pooled[1].sum(-1, keepdims=True))
    )
    assert (np.abs(delta) <= 1).all()


@given(
    hnp.arrays(np.float64, (3, 5), elements=st.floats(0, 1)),
    hnp.arrays(np.float64, (3, 5), elements=st.floats(0, 1)),
    st.floats(0, 0.9),
)
def test_task_experts_are_those_above_the_threshold(task, base, threshold):
    selection = analysis.task_experts(task, base, threshold=threshold)
    expected = [tuple(pair) for pair in np.argwhere(task - base > threshold).tolist()]
    assert list(selection.pairs) == expected
    assert all(
        selection.scores[layer][expert] == task[layer, expert] - base[layer, expert] for layer, expert in expected
    )
    assert selection.num_experts == (5, 5, 5)
    top = analysis.task_experts(task, base, threshold=threshold, top=2, layers=[1, 2])
    assert set(top.pairs) <= set(expected)
    assert max(top.counts.values(), default=0) <= 2
    assert 0 not in top
    lower = analysis.task_experts(task, base, threshold=threshold / 2)
    assert set(selection.pairs) <= set(lower.pairs)


def test_task_experts_carry_model_and_layers_into_a_plan(stats):
    selection = analysis.task_experts(stats, stats, threshold=0.1, group="sw", baseline_group="en", by="token")
    assert 1 in selection[0]
    plan = Plan.activate(selection)
    assert (plan.model.name, plan.model.config_hash, plan.model.num_experts) == ("demo", "abc", SIZES)
    assert analysis.task_experts(
        stats, stats, threshold=0.1, group="sw", baseline_group="en", by="token", layers=[0]
    ) == (selection.restrict([0]))


def test_multilingual_experts_are_above_the_threshold_in_any_language(stats):
    delta = [analysis.expert_difference(stats, stats, group=g, baseline_group="en", by="token") for g in ("sw", "bn")]
    selection = analysis.multilingual_experts(stats, "en", threshold=0.1, by="token")
    assert list(selection.pairs) == [tuple(pair) for pair in np.argwhere(np.maximum(*delta) > 0.1).tolist()]
    one = analysis.multilingual_experts(stats, "en", threshold=0.1, groups=["sw"], by="token")
    assert set(one.pairs) <= set(selection.pairs)
    assert "multilingual experts against en" in repr(selection)


def test_risk_experts_rank_by_absolute_difference_with_room_per_layer():
    positive = np.array([[0.9, 0.8, 0.7, 0.0], [0.5, 0.1, 0.2, 0.2]])
    negative = np.array([[0.1, 0.1, 0.1, 0.95], [0.4, 0.3, 0.2, 0.3]])
    result = analysis.risk_experts(positive, negative, top_n=5, per_layer=2)
    # the largest five are 3, 0, 1, 2 of layer 0 and 1 of layer 1; of three activations in layer 0 the last is dropped
    assert result.activate == {0: (0, 1)}
    assert result.deactivate == {0: (3,), 1: (1,)}
    assert analysis.risk_experts(positive, negative, top_n=99, per_layer=9).deactivate == {0: (3,), 1: (1, 3)}
    assert "deactivate" in repr(result)


def test_risk_experts_become_a_table_and_json():
    positive, negative = np.array([[0.9, 0.1, 0.2, 0.1]]), np.array([[0.1, 0.8, 0.2, 0.0]])
    found = analysis.risk_experts(positive, negative, activations=1, deactivations=1, per_layer=1)
    frame = found.to_pandas()
    assert frame["choice"].tolist() == ["activate", "deactivate", "", ""]
    np.testing.assert_allclose(frame["value"], (positive - negative)[0])
    assert json.loads(json.dumps(found.to_dict()))["values"][0] == pytest.approx((positive - negative)[0].tolist())


def test_a_difference_and_a_control_show_themselves():
    base, tokens = np.array([10.0, 12.0, 9.0]), np.array([5.0, 6.0, 4.0])
    control = analysis.random_control(base - 1, np.stack([base + 1, base + 2]), base, tokens, enumerated=True)
    assert repr(control).startswith("-0.2000 nats per token, rank 1 among all 2 other sets of experts (p = 0.333)")
    assert repr(control.difference) == str(control.difference) in repr(control)
    assert control.to_dict()["difference"] == control.difference.to_dict()
    assert control.difference.to_dict()["verdict"] == "lower"


def test_risk_experts_takes_the_settings_of_steermoe():
    """The first n of each sign over all layers; what a layer has too many of is dropped, not refilled."""
    positive = np.array([[0.9, 0.8, 0.7, 0.0], [0.5, 0.1, 0.2, 0.2]])
    negative = np.array([[0.1, 0.1, 0.1, 0.95], [0.4, 0.3, 0.2, 0.3]])
    only = analysis.risk_experts(positive, negative, activations=3, deactivations=0, per_layer=2)
    assert (only.activate, only.deactivate) == ({0: (0, 1)}, {}), "layer 1 does not take the place of expert 2"
    both = analysis.risk_experts(positive, negative, activations=4, deactivations=2, per_layer=2)
    assert (both.activate, both.deactivate) == ({0: (0, 1), 1: (0,)}, {0: (3,), 1: (1,)})
    assert analysis.risk_experts(positive, negative, deactivations=480, per_layer=2).activate == {}


def test_risk_experts_of_statistics_use_the_models_top_k(stats):
    result = analysis.risk_experts(stats, stats, top_n=12, group="bn", baseline_group="en")
    assert max(result.activate.counts.values()) <= TOP_K
    np.testing.assert_allclose(
        result.values, analysis.expert_difference(stats, stats, group="bn", baseline_group="en", by="token")
    )


def table(frequency, groups=GROUPS):
    """Statistics in which tokens of a group choose experts with these frequencies [G, L, E] (multiples of 1 / 1000)."""
    counts = np.rint(np.asarray(frequency) * 1000).astype(np.int64)
    tokens = np.full(len(groups), 1000)
    return RoutingStatistics.from_token_sums(groups, counts=counts, tokens=tokens, top_k=TOP_K, tolerance=1)


def test_frequency_share_rule():
    stats = table([[[0.8, 0.6, 0.5, 0.1]], [[0.1, 0.6, 0.7, 0.6]], [[0.1, 0.6, 0.1, 1.0]]])
    result = analysis.frequency_share_experts(stats, top=2, threshold=0.6)
    frame = result.to_pandas()
    assert list(frame.columns) == ["group", "layer", "expert", "score"]
    of_en = frame[frame["group"] == "en"]
    assert set(zip(of_en["layer"], of_en["expert"], strict=True)) == set(result["en"].pairs)
    assert len(frame) == sum(map(len, result.values())) + len(result.shared)
    # kept: en 0, 1; sw 1 and 2; bn 3 and 1. Expert 1 is shared by three, the others have a share of 1
    assert result["en"] == {0: (0,)}
    assert result["sw"] == {0: (2,)}
    assert result["bn"] == {0: (3,)}
    assert result.shared == {0: (1,)}
    assert list(result) == list(GROUPS)
    assert "(shared)" in repr(result)


def test_original_entropy_rule():
    frequency = np.full((3, 1, 8), 0.01)
    frequency[0, 0, 1] = frequency[1, 0, 2] = frequency[2, 0, 3] = 0.9
    frequency[0, 0, 4] = frequency[1, 0, 4] = 0.9  # two groups use it
    frequency[:, 0, 5] = 0.9
    found = {share: analysis.entropy_experts(table(frequency), share=share, percentile=60) for share in (1 / 8, 1 / 2)}
    assert {group: dict(experts) for group, experts in found[1 / 8].items()} == {"en": {0: (1,)}, "sw": {}, "bn": {}}
    assert {group: dict(experts) for group, experts in found[1 / 2].items()} == {
        "en": {0: (1, 4)},
        "sw": {0: (2, 4)},
        "bn": {0: (3,)},
    }


@pytest.mark.parametrize(("share", "percentile"), [(0.13, 95), (0.27, 93), (0.065, 61.3)])
def test_the_original_entropy_rule_rounds_as_its_authors_do(share, percentile):
    """LAPE in torch: the bar is the value at a rounded place, and the number of experts is rounded, not cut off."""
    frequency = np.random.default_rng(3).dirichlet(np.full(11, 0.4), (3, 5))
    values = torch.from_numpy(frequency).permute(1, 2, 0)  # layer, expert, language
    bar = values.flatten().kthvalue(round(values.numel() * percentile / 100)).values
    entropy = torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1)
    entropy[(values > bar).sum(-1) == 0] = torch.inf
    lowest = set(entropy.flatten().topk(round(entropy.numel() * share), largest=False).indices.tolist())
    expected = {
        group: {(cell // 11, cell % 11) for cell in lowest if values[cell // 11, cell % 11, g] > bar}
        for g, group in enumerate(GROUPS)
    }
    found = analysis.entropy_experts(table(frequency), share=share, percentile=percentile)
    assert {group: set(experts.pairs) for group, experts in found.items()} == expected
    assert round(55 * share) != int(55 * share) or round(165 * percentile / 100) != 165 * percentile / 100


def test_equal_count_entropy_rule():
    frequency = np.full((3, 1, 8), 0.01)
    frequency[0, 0, 1] = frequency[1, 0, 2] = frequency[2, 0, 3] = 0.9
    frequency[:, 0, 5] = 0.9
    result = analysis.entropy_experts(table(frequency), top_n=1, percentile=75)
    assert {group: dict(found) for group, found in result.items()} == {
        "en": {0: (1,)},
        "sw": {0: (2,)},
        "bn": {0: (3,)},
    }
    assert len(analysis.entropy_experts(table(frequency), top_n=2, percentile=70)["en"]) == 2
    json.dumps(result.to_dict())


def test_esft_rule_is_the_shortest_prefix():
    selection = analysis.esft_experts(np.array([[0.1, 0.5, 0.3, 0.1], [0.25, 0.25, 0.25, 0.25]]), top_p=0.5)
    assert selection == {0: (1,), 1: (0, 1)}
    assert analysis.esft_experts(np.array([[0.1, 0.5, 0.4, 0.0]]), top_p=1.0) == {0: (0, 1, 2)}
    # 0.7 + 0.1 is 0.7999999999999999
    assert analysis.esft_experts(np.array([[0.7, 0.1, 0.1, 0.1]]), top_p=0.8) == {0: (0, 1)}


def test_finding_experts_refuses_and_says_how_to_fix_it(stats):
    ones = np.ones((2, 6))
    cases = [
        (lambda: analysis.task_experts(stats, stats, threshold=0.1, by="token"), "name the task group"),
        (lambda: analysis.task_experts(stats, stats, threshold=0.1, group="fr", by="token"), "no task group 'fr'"),
        (lambda: analysis.task_experts(ones, np.ones((3, 6)), threshold=0.1), "same layers"),
        (lambda: analysis.task_experts(ones, ones, threshold=float("nan")), "threshold must be"),
        (lambda: analysis.task_experts(ones, ones, threshold=0.1, top=0), "top must be"),
        (lambda: analysis.task_experts(ones, ones, threshold=0.1, layers=[7]), "some of the 2 layers"),
        (lambda: analysis.multilingual_experts(stats, "fr", threshold=0.1, by="token"), "no reference group 'fr'"),
        (lambda: analysis.risk_experts(ones, ones, top_n=3), "per_layer is needed"),
        (lambda: analysis.risk_experts(ones, ones, top_n=0, per_layer=2), "top_n must be"),
        (lambda: analysis.risk_experts(ones, ones, per_layer=2), "say how many"),
        (lambda: analysis.risk_experts(ones, ones, top_n=1, activations=1, per_layer=2), "one of two ways"),
        (lambda: analysis.risk_experts(ones, ones, activations=-1, per_layer=2), "activations must be 0 or more"),
        (lambda: analysis.frequency_share_experts(stats, top=2, threshold=1.5), "between 0 and 1"),
        (lambda: analysis.entropy_experts(stats, top_n=0), "top_n must be"),
        (lambda: analysis.entropy_experts(stats), "either top_n"),
        (lambda: analysis.entropy_experts(stats, top_n=1, share=0.5), "either top_n"),
        (lambda: analysis.entropy_experts(stats, share=1e-6), "is none: use"),
        (lambda: analysis.esft_experts(ones, top_p=0), "top_p must be"),
        (lambda: analysis.esft_experts(np.ones((1, 2, 6))), "layer, expert"),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()
    with pytest.raises(ValueError, match='by="token"'):
        analysis.task_experts(stats, stats, threshold=0.1, group="sw")


# -- correlation


def some_divergence(values):
    groups = tuple(f"g{i}" for i in range(len(values)))
    return Divergence(np.asarray(values), groups, "en", tuple(map(str, range(np.shape(values)[1]))))


@given(
    hnp.arrays(np.float64, (6, 2), elements=st.integers(0, 20).map(lambda n: n / 20)),
    st.lists(st.integers(0, 20).map(lambda n: n / 20), min_size=6, max_size=6),
)
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_correlation_is_scipys(values, scores):
    result = analysis.correlation(some_divergence(values), {f"g{i}": s for i, s in enumerate(scores)}, permutations=10)
    for layer in range(2):
        expected = scipy.stats.pearsonr(values[:, layer], scores).statistic
        np.testing.assert_allclose(result.pearson[layer], expected, atol=1e-9)
        np.testing.assert_allclose(
            result.spearman[layer], scipy.stats.spearmanr(values[:, layer], scores).statistic, atol=1e-9
        )


def test_permutation_p_value_is_exact_for_few_groups_and_close_for_drawn_orders():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 6))
    scores = {f"g{i}": value for i, value in enumerate(y)}
    exact = analysis.correlation(some_divergence(x[:, None]), scores, permutations=1000).p_value[0]
    expected = scipy.stats.permutation_test(
        (x,),
        lambda a: np.abs(scipy.stats.pearsonr(a, y).statistic),
        permutation_type="pairings",
        n_resamples=np.inf,
        alternative="greater",
    ).pvalue
    assert exact == pytest.approx(expected)
    drawn = analysis.correlation(some_divergence(x[:, None]), scores, permutations=700).p_value[0]
    assert drawn == pytest.approx(exact, abs=0.06)


def test_correlation_finds_a_perfect_line_and_leaves_nan_out():
    values = np.array([[0.1, 0.5, np.nan], [0.2, 0.5, 0.3], [0.3, 0.5, 0.2], [0.4, 0.5, np.nan]])
    scores = {"g0": 0.9, "g1": 0.8, "g2": 0.7, "g3": 0.6, "unused": 1.0}
    result = analysis.correlation(some_divergence(values), scores)
    assert result.pearson[0] == pytest.approx(-1)
    assert result.spearman[0] == pytest.approx(-1)
    assert result.p_value[0] == pytest.approx(2 / 24)
    assert np.isnan(result.pearson[1:]).all(), "a constant layer, and a layer with two groups"
    assert result.number.tolist() == [4, 4, 2]
    assert result.p_corrected[0] == pytest.approx(2 / 24), "only one layer is defined"
    assert np.isnan(result.p_corrected[1:]).all()
    assert "Pearson r" in repr(result)
    with pytest.raises(AnalysisError, match="no score for g1, g2"):
        analysis.correlation(some_divergence(values), {"g0": 1, "g3": 2})
    with pytest.raises(AnalysisError, match="at least three"):
        analysis.correlation(some_divergence(values), scores, groups=["g0", "g1"])
    with pytest.raises(AnalysisError, match="finite"):
        analysis.correlation(some_divergence(values), {**scores, "g1": float("nan")})


def test_the_corrected_p_value_is_of_the_largest_r_of_all_layers():
    """By hand, over all 120 orders of the scores; a layer with a missing group takes part with the others."""
    rng = np.random.default_rng(5)
    values, y = rng.random((5, 3)), rng.random(5)
    values[2, 1] = np.nan
    scores = {f"g{i}": value for i, value in enumerate(y)}
    result = analysis.correlation(some_divergence(values), scores, permutations=120)

    def r(layer, order):
        seen = ~np.isnan(values[:, layer])
        return abs(scipy.stats.pearsonr(values[seen, layer], y[list(order)][seen]).statistic)

    largest = [[r(layer, order) for layer in range(3)] for order in permutations(range(5))]
    for layer in range(3):
        observed = abs(result.pearson[layer]) - 1e-12
        assert result.p_value[layer] == pytest.approx(np.mean([row[layer] >= observed for row in largest]))
        assert result.p_corrected[layer] == pytest.approx(np.mean([max(row) >= observed for row in largest]))
    assert (result.p_corrected >= result.p_value).all()


def test_the_corrected_p_value_keeps_its_promise_over_correlated_layers():
    """Nine languages and 24 layers without any effect: some layer is below 0.05 about half the time, uncorrected."""
    rng = np.random.default_rng(0)
    alone = corrected = 0
    for seed in range(60):
        shared = rng.normal(size=(9, 4))
        values = shared @ rng.normal(size=(4, 24)) + 0.3 * rng.normal(size=(9, 24))
        scores = {f"g{i}": value for i, value in enumerate(rng.normal(size=9))}
        result = analysis.correlation(some_divergence(values), scores, permutations=400, seed=seed)
        alone += (result.p_value < 0.05).any()
        corrected += (result.p_corrected < 0.05).any()
    assert alone >= 15
    assert corrected <= 7


# -- results show themselves


def test_results_are_jsonable_and_tidy(stats):
    div = analysis.divergence(stats, "en")
    results = [
        div,
        analysis.divergence_matrix(stats),
        analysis.u_shape(div),
        analysis.correlation(
            some_divergence(np.random.default_rng(0).random((4, 2))),
            dict.fromkeys(("g0", "g1", "g2"), 0.5) | {"g3": 0.7},
        ),
    ]
    for result in results:
        json.dumps(result.to_dict(), allow_nan=False)
        assert isinstance(result.to_pandas(), pd.DataFrame)
        assert len(repr(result).splitlines()) > 2
    frame = div.to_pandas()
    columns = ["group", "reference", "layer", "router", "divergence", "undefined", "floor", "reference_floor", "tokens"]
    assert list(frame.columns) == [*columns, "jsd", "load_entropy"]
    assert frame.loc[(frame.group == "bn") & (frame.layer == 1), "divergence"].item() == div.of("bn")[1]
    matrix = analysis.divergence_matrix(stats).to_pandas()
    assert matrix.layer.tolist() == [layer for layer in range(LAYERS) for _ in range(9)]
    assert set(matrix.router) == set(stats.layers)
    many = Divergence(np.random.default_rng(0).random((2, 48)), ("a", "b"), "en", tuple(map(str, range(48))))
    assert max(map(len, repr(many).splitlines())) < 100


def jsd_of(q1, q2):
    return entropy_of((q1 + q2) / 2) - (entropy_of(q1) + entropy_of(q2)) / 2


@pytest.mark.parametrize("pairing", ["paired", "pooled"])
def test_the_divergence_in_nats_and_the_evenness_of_the_load_stand_beside_it(stats, found, pairing):
    div = analysis.divergence(stats, "en", pairing=pairing, by="sequence" if pairing == "paired" else "token")
    shares = {key: counts / counts.sum(-1, keepdims=True) for key, counts in found.items()}
    pooled = {group: sum(c for (_, g), c in found.items() if g == group) for group in GROUPS}
    pooled = {group: counts / counts.sum(-1, keepdims=True) for group, counts in pooled.items()}
    for g, group in enumerate(("sw", "bn")):
        for layer in range(LAYERS):
            pairs = [(shares[i, "en"], shares[i, group]) for i in range(ITEMS)]
            pairs = pairs if pairing == "paired" else [(pooled["en"], pooled[group])]
            expected = np.mean([jsd_of(one[layer], other[layer]) for one, other in pairs])
            assert div.jsd[g, layer] == pytest.approx(expected, abs=1e-6)  # kept in float32
    for layer, size in enumerate(SIZES):
        entropies = [entropy_of(pooled[group][layer]) / np.log(size) for group in GROUPS]
        assert div.load_entropy[layer] == pytest.approx(np.mean(entropies), abs=1e-12)
    assert analysis.divergence(stats, "en", measure="cosine").jsd is None


def test_layers_with_an_even_load_are_marked():
    rng = np.random.default_rng(1)
    one, other = rng.dirichlet(np.full(8, 0.5), (2, 4))
    one[2], other[2] = (1 / 8 + rng.uniform(-0.005, 0.005, 8) for _ in range(2))
    div = analysis.divergence(one, other)
    assert div.even_layers == (2,)
    assert div.to_dict()["even_layers"] == [2]
    assert div.jsd[0, 2] < 0.001 < 0.1 < div.values[0, 2]
    head = repr(div).splitlines()[1]
    assert head.split() == ["layer", "0", "1", "2*", "3", "nats"]
    assert "nats, not normalized" in repr(div)
    bands = [patch for patch in mr.plots.divergence(div).patches if patch.get_hatch()]
    assert [(band.get_x(), band.get_width()) for band in bands] == [(1.5, 1.0)]
    assert "*" not in repr(analysis.divergence(one[:2], other[:2]))


@needs_data
@pytest.mark.data
def test_the_published_counts_of_mixtral_are_marked():
    """Its load is even, so that .553 of the greatest divergence is a thousandth of a nat."""
    domains = []
    for domain in ("c4", "arxiv"):
        content = json.loads(routing("olmoe", "mistral", "expert_counts", f"{domain}.json").read_text("utf-8"))
        domains.append([[layer.get(str(e), 0) for e in range(8)] for layer in content.values()])
    div = analysis.divergence(*np.array(domains, float))
    np.testing.assert_allclose(div.values[0], [0.179, 0.553, 0.160], atol=5e-4)
    np.testing.assert_allclose(div.jsd[0], [0.00108, 0.00119, 0.00352], atol=5e-6)
    assert div.even_layers == (0, 1, 2)


def test_results_show_themselves_in_a_notebook(stats):
    """As HTML with the numbers of the text, whatever characters the names are made of."""
    named = RoutingStatistics.from_token_sums(
        ["<en>", "a&b"], counts=np.array([[[3, 1]], [[1, 3]]]), tokens=np.array([4, 4]), top_k=1
    )
    html = analysis.divergence(named, "<en>", pairing="pooled", kind="count", by="token")._repr_html_()
    assert "&lt;en&gt;" in html
    assert "a&amp;b" in html
    assert "<en>" not in html
    div = analysis.divergence(stats, "en")
    scores = dict(zip(("g0", "g1", "g2", "g3"), (0.1, 0.4, 0.2, 0.3), strict=True))
    shown = [
        div,
        analysis.divergence_matrix(stats),
        analysis.u_shape(div),
        analysis.entropy(WithEntropy()),
        analysis.correlation(some_divergence(np.random.default_rng(0).random((4, 2))), scores),
        analysis.task_experts(stats, stats, threshold=0.1, group="sw", baseline_group="en", by="token"),
        analysis.risk_experts(stats, stats, top_n=4, group="sw", baseline_group="en"),
        analysis.frequency_share_experts(stats, top=2, threshold=0.6),
    ]
    for result in shown:
        html = result._repr_html_()
        tree = ElementTree.fromstring(f"<div>{html.replace('<br>', '')}</div>")  # every tag is closed
        cells = [cell.text for cell in tree.iter("td")]
        assert cells
        assert all(cell in repr(result) for cell in cells if cell)
    assert "ExpertSelection(empty" in ExpertSelection({})._repr_html_()


# -- published and measured figures


@needs_data
def test_divergence_of_qwen3_on_mgsm():
    stats = published_routing().read(FOLDER)
    gates = stats.token_sum("weight_share")
    shape = analysis.u_shape(analysis.divergence(stats, "en", pairing="pooled", kind="topk", by="token"))
    assert shape.groups == ("de", "zh", "bn", "sw")
    np.testing.assert_allclose(shape.first, [0.164, 0.260, 0.313, 0.326], atol=5e-4)
    np.testing.assert_allclose(shape.middle, [0.051, 0.061, 0.139, 0.139], atol=5e-4)
    np.testing.assert_allclose(shape.last, [0.234, 0.392, 0.298, 0.298], atol=5e-4)
    for g in range(1, 5):  # the same from two arrays
        np.testing.assert_allclose(
            analysis.u_shape(analysis.divergence(gates[g], gates[0])).middle, shape.middle[g - 1], atol=1e-9
        )


@needs_data
def test_the_published_routing_is_printed_and_drawn(tmp_path, capsys):
    picture = tmp_path / "divergence.png"
    published_routing().main(["--data", str(FOLDER), "--out", str(picture)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["de", "0.164", "0.051", "0.234", "0.148"] in rows
    assert ["sw", "0.326", "0.139", "0.298", "0.173"] in rows
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "mgsm_en.json does not exist"),
        ('{"0": {"0": 1}}', "it is not counts and gate sums"),
        ("{", "not whole JSON"),
    ],
)
def test_the_published_routing_is_refused_where_it_is_not_whole(content, message, tmp_path):
    recording = tmp_path / "routing" / "qwen3_30b_a3b_mgsm" / "mgsm_en.json"
    if content is not None:
        recording.parent.mkdir(parents=True)
        recording.write_text(content)
    with pytest.raises(SystemExit, match=message):
        published_routing().main(["--data", str(tmp_path), "--out", str(tmp_path / "divergence.png")])
    assert not (tmp_path / "divergence.png").exists()


@needs_data
@pytest.mark.parametrize("task", ["intent", "translation"])
def test_esft_experts_are_the_published_ones(task):
    scores, published = esft(task)
    selection = analysis.esft_experts(scores, top_p=0.2)
    assert {layer + 1: set(experts) for layer, experts in selection.items()} == {
        layer: set(e) for layer, e in published.items()
    }


@needs_data
@pytest.mark.parametrize("layer", [1, 14, 26])
def test_esft_experts_come_out_of_the_recorded_ids(layer):
    scores, published = esft("translation")
    ids = esft_ids("translation", layer)
    counts = np.bincount(ids.reshape(-1), minlength=64)[None, None]
    stats = RoutingStatistics.from_token_sums(["translation"], counts=counts, tokens=np.array([len(ids)]), top_k=6)
    np.testing.assert_allclose(stats.mean_distribution("count", by="token")[0, 0], scores[layer - 1], atol=5.1e-5)
    assert set(analysis.esft_experts(stats)[0]) == set(published[layer])


# -- from a model


def test_paired_divergence_of_a_model_is_that_of_its_own_router_logits():
    model, batches = tiny_model("qwen3_moe", head=True), [tokens(2, 9, seed) for seed in range(4)]
    expected = []
    with mr.attach(model) as routed, routed.record(groups=["en", "sw"], sequences=True) as recorder:
        for item, ids in enumerate(batches):
            with recorder.labels(groups=["en", "sw"], items=[item, item]), torch.no_grad():
                logits = model(input_ids=ids, output_router_logits=True).router_logits
            q = [layer.double().softmax(-1).reshape(2, 9, -1).mean(1).numpy() for layer in logits]
            expected.append([divergence_of(one, two, len(one)) for one, two in q])
    result = analysis.divergence(recorder.statistics(), "en")
    assert (result.pairing, result.pairs) == ("paired", 4)
    np.testing.assert_allclose(result.values[0], np.mean(expected, axis=0), rtol=1e-4)
    found = analysis.entropy(recorder.statistics())
    assert (found.gap > 0).all()
