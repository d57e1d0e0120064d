"""Corrections for short texts: against plain loops, and on samples of one distribution (the null experiment)."""

from __future__ import annotations

import numpy as np
import pytest
from harness.short_texts import LAW, LAYERS, E, kept

import moe_route as mr
from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.estimators import random_partners
from moe_route.recording import Trace


def plain_entropy(counts):
    total = sum(counts)
    return -sum(a / total * np.log(a / total) for a in counts if a)


def plain_d(a, b, normalized=True):
    p, q = np.array(a) / sum(a), np.array(b) / sum(b)
    mean = (plain_entropy(a) + plain_entropy(b)) / 2
    found = plain_entropy((p + q) / 2) - mean
    return found / (np.log(len(a)) - mean) if normalized else found


def selections(counts):
    return [e for e, a in enumerate(counts) for _ in range(int(a))]


def without(counts, expert):
    left = list(counts)
    left[expert] -= 1
    return left


COUNTS = (
    np.random.default_rng(0).multinomial(14, LAW[0], (3, LAYERS)),
    np.random.default_rng(1).multinomial(9, LAW[1], (3, LAYERS)),
)


def test_entropies_against_loops():
    found, jackknife = analysis.miller_madow(COUNTS[0]), analysis.jackknife_entropy(COUNTS[0])
    for index in np.ndindex(3, LAYERS):
        counts = COUNTS[0][index].tolist()
        h, n = plain_entropy(counts), sum(counts)
        assert found[index] == pytest.approx(h + (sum(map(bool, counts)) - 1) / (2 * n))
        left = [plain_entropy(without(counts, e)) for e in selections(counts)]
        assert jackknife[index] == pytest.approx(n * h - (n - 1) * np.mean(left))
    assert np.isnan(analysis.jackknife_entropy([[0, 0], [1, 0]])).all()
    assert np.isnan(analysis.miller_madow([0, 0]))
    assert analysis.miller_madow([3, 0, 0], 2) == 0, "never less than the plain estimate"


@pytest.mark.parametrize("normalized", [True, False])
def test_divergence_by_the_jackknife_against_loops(normalized):
    found = analysis.jackknife_divergence(*COUNTS, E if normalized else None)
    for index in np.ndindex(3, LAYERS):
        a, b = (one[index].tolist() for one in COUNTS)
        d = plain_d(a, b, normalized)
        first = np.mean([plain_d(without(a, e), b, normalized) for e in selections(a)])
        second = np.mean([plain_d(a, without(b, e), normalized) for e in selections(b)])
        assert found[index] == pytest.approx(d - (sum(a) - 1) * (first - d) - (sum(b) - 1) * (second - d))
    assert np.isnan(analysis.jackknife_divergence([1, 0], [2, 3], 2))


def test_corrected_entropies_of_top_k_choices_lie_nearer_the_truth():
    """Tokens that choose 4 different experts: the bias is that of Miller and Madow with (S - k)."""
    rng = np.random.default_rng(0)
    law = rng.dirichlet(np.ones(32))
    choices = np.argsort(rng.gumbel(size=(4000, 20, 32)) + np.log(law), -1)[..., -4:]
    counts = (choices[..., None] == np.arange(32)).sum((1, 2))
    share = counts.sum(0) / counts.sum()
    truth = -(share * np.log(share)).sum()
    plain = np.mean([plain_entropy(row) for row in counts[:500]]) - truth
    corrected = analysis.miller_madow(counts, 4).mean() - truth
    assert plain < -0.1
    assert abs(corrected) < 0.35 * abs(plain)


def test_rarefied_counts_are_a_sample_without_replacement():
    rng = np.random.default_rng(0)
    counts = np.broadcast_to(np.array([5, 0, 3, 12]), (20_000, 4))
    drawn = analysis.rarefied(counts, 8, rng)
    assert (drawn.sum(1) == 8).all()
    assert (drawn <= counts).all()
    np.testing.assert_allclose(drawn.mean(0), [2.0, 0.0, 1.2, 4.8], atol=0.03)
    p = counts[0] / 20  # variance of the hypergeometric distribution
    np.testing.assert_allclose(drawn.var(0), 8 * p * (1 - p) * 12 / 19, atol=0.05)
    with pytest.raises(AnalysisError, match="fewer tokens"):
        analysis.rarefied([1, 2], 4, rng)
    with pytest.raises(AnalysisError, match="whole numbers"):
        analysis.rarefied([0.5, 2], 1, rng)


def test_partners_are_derangements():
    for items in (2, 3, 4, 30):
        partners = random_partners(items, 4, seed=items)
        assert len(partners) == max(1, min(4, (items - 1) // 2))
        for row in partners:
            assert sorted(row) == list(range(items))
            assert (row != np.arange(items)).all()
    with pytest.raises(AnalysisError, match="two items"):
        random_partners(1, 4, 0)


# -- the null experiment: all groups are samples of one distribution


LENGTHS = {"en": 25, "short": 15, "same": 25, "long": 150}


def test_the_length_of_texts_moves_divergence_and_no_longer_after_a_correction():
    statistics = kept(LENGTHS)
    raw = analysis.divergence(statistics, "en", kind="count")
    assert raw.of("short").mean() - raw.of("long").mean() > 0.05
    assert raw.tokens.tolist() == [15, 25, 150]
    assert raw.reference_tokens == 25
    found = {
        how: analysis.divergence(statistics, "en", kind="count", correct=how).values
        for how in ("floor", "rarefy", "jackknife", "rarefy+floor", "jackknife+floor")
    }
    assert np.abs(found["floor"][1]).max() < 0.015, "of equal lengths, the floor is all there is"
    assert (np.abs(found["floor"]) < 0.25 * raw.values).all()
    assert (found["jackknife"] < 0.85 * raw.values).all()
    assert np.ptp(found["rarefy"], axis=0).max() < 0.02, "length does not move it"
    for how in ("rarefy+floor", "jackknife+floor"):
        assert np.abs(found[how]).max() < 0.02, how
        assert np.ptp(found[how], axis=0).max() < 0.02, how


def test_two_samples_of_one_distribution_diverge_by_the_floor():
    raw = analysis.divergence(kept({"en": 25, "sw": 25}), "en", kind="count")
    assert raw.values.min() > 0.1
    np.testing.assert_allclose(raw.expected_floor, raw.values, atol=0.015)


def test_the_floor_is_subtracted_and_reported():
    statistics = kept(LENGTHS, items=40)
    raw, less = (analysis.divergence(statistics, "en", kind="count", correct=how) for how in (None, "floor"))
    np.testing.assert_array_equal(less.raw, raw.values)
    np.testing.assert_allclose(less.values, raw.values - (raw.floor + raw.reference_floor) / 2)
    np.testing.assert_allclose(less.pair_values.mean(1), less.values, atol=1e-12)
    assert repr(less).count("floor") >= 2
    assert "less the floor" in repr(less)
    assert {"raw", "floor", "reference_floor", "tokens"} <= set(less.to_pandas().columns)
    shape = analysis.u_shape(less)
    assert np.isfinite(shape.interval()).all()


def test_the_floor_against_a_loop_over_pairs():
    statistics = kept({"en": 20, "sw": 30}, items=7)
    found = analysis.divergence(statistics, "en", kind="count", seed=5)
    partners = random_partners(7, 4, 5)
    for group, values in (("en", found.reference_floor), ("sw", found.floor[0])):
        counts = [statistics.store.counts(f"s{item}", group) for item in range(7)]
        for layer in range(LAYERS):
            pairs = [
                plain_d(counts[i][layer].tolist(), counts[row[i]][layer].tolist()) for row in partners for i in range(7)
            ]
            assert values[layer] == pytest.approx(np.mean(pairs))


def test_the_interval_of_a_corrected_divergence_covers_zero():
    held = 0
    for seed in range(40):
        found = analysis.divergence(
            kept({"en": 20, "sw": 20}, items=30, seed=seed), "en", kind="count", correct="floor", seed=seed
        )
        low, high = found.interval(0.9, resamples=300)
        held += int(((low <= 0) & (high >= 0)).sum())
    assert held >= 0.8 * 40 * LAYERS


def trace_of(chosen):
    """A trace of s0, s1, ... in groups "en" and "sw", from the ids [token, layer, k] of each item and group."""
    rows = [(2 * i + g, g) for i, item in enumerate(chosen) for g, ids in enumerate(item) for _ in ids]
    ids = np.concatenate([ids for item in chosen for ids in item])
    sequence, group = np.array(rows).T
    zeros = np.zeros(len(ids), np.int32)
    items = tuple(f"s{i // 2}" for i in range(2 * len(chosen)))
    return Trace(
        ("0", "1"), (0, 1), ("en", "sw"), items, sequence, group, zeros, zeros, zeros, ids.astype(np.int8),
        np.ones(ids.shape, np.float16),
    )  # fmt: skip


def test_rarefaction_from_a_trace_draws_whole_tokens():
    rng = np.random.default_rng(0)
    chosen = [[np.argsort(rng.random((tokens, LAYERS, E)), -1)[..., :2] for tokens in (6, 12)] for _ in range(3)]
    statistics, trace = kept({"en": 6, "sw": 12}, items=3), trace_of(chosen)
    how = {"kind": "count", "correct": "rarefy"}
    found = analysis.divergence(statistics, "en", trace=trace, **how)
    assert np.isfinite(found.values).all()
    assert (found.values > 0).all()
    twins = analysis.divergence(statistics, "en", trace=trace_of([[ids, ids[::-1]] for ids, _ in chosen]), **how)
    assert (twins.values == 0).all(), "all six of six are drawn"
    with pytest.raises(AnalysisError, match="lacks layer 1"):
        analysis.divergence(statistics, "en", trace=Trace(("0",), (0,), *list(vars(trace).values())[2:]), **how)
    with pytest.raises(AnalysisError, match="lacks item 's3'"):
        analysis.divergence(kept({"en": 6, "sw": 6}, items=4), "en", kind="count", correct="rarefy", trace=trace)


def test_matrix_has_floors_and_intervals():
    statistics = kept(LENGTHS, items=30)
    raw = analysis.divergence_matrix(statistics, kind="count")
    less = analysis.divergence_matrix(statistics, kind="count", correct="floor")
    np.testing.assert_allclose(raw.values[:, 0, 1:], analysis.divergence(statistics, "en", kind="count").values.T)
    for i, j in ((0, 1), (1, 3)):
        expected = raw.values[:, i, j] - (raw.floor[i] + raw.floor[j]) / 2
        np.testing.assert_allclose(less.values[:, i, j], expected, atol=1e-12)
    low, high = raw.interval(0.9)
    beside = ~np.eye(4, dtype=bool)
    assert ((low < raw.mean()) & (raw.mean() < high))[beside].all()
    assert (low.diagonal() == 0).all()
    assert "tokens" in repr(raw)
    pooled = analysis.divergence_matrix(statistics, pairing="pooled", by="token", kind="count")
    with pytest.raises(AnalysisError, match="single sentences are not here"):
        pooled.interval()


def test_large_groups_are_read_in_portions(monkeypatch):
    statistics = kept(LENGTHS, items=12)
    whole = analysis.divergence(statistics, "en"), analysis.divergence_matrix(statistics)
    monkeypatch.setattr("moe_route.analysis.resampling._BATCH_BYTES", 1)
    np.testing.assert_array_equal(analysis.divergence(statistics, "en").values, whole[0].values)
    np.testing.assert_array_equal(analysis.divergence_matrix(statistics).values, whole[1].values)


def test_entropy_of_selections_is_corrected_and_has_an_interval():
    statistics = kept({"short": 15, "long": 150}, items=200)
    truth = -(LAW * np.log(LAW)).sum(1)
    plain = analysis.entropy(statistics, kind="count")
    counts = statistics.store.counts("s0", "short")[0].tolist()
    assert plain.sequence_values[0][0, 0] == pytest.approx(plain_entropy(counts))
    for correct in ("miller_madow", "jackknife"):
        found = analysis.entropy(statistics, kind="count", correct=correct)
        assert (np.abs(found.sequence - truth) < 0.6 * np.abs(plain.sequence - truth)).all()
        low, high = found.interval(0.95)
        assert ((low < found.sequence) & (found.sequence < high)).all()
        assert found.token is None
        assert "sequence entropy (nats), of selections, " in repr(found)
    cases = [
        ({"correct": "miller_madow"}, 'kind="count"'),
        ({"kind": "count", "of": "token"}, "is of sequences"),
        ({"kind": "count", "phase": "prefill"}, "leave phase out"),
        ({"correct": "floor"}, "no correction"),
    ]
    for arguments, message in cases:
        with pytest.raises(AnalysisError, match=message):
            analysis.entropy(statistics, **arguments)
    statistics.store = None
    with pytest.raises(AnalysisError, match=r"record\(sequences=True\)"):
        analysis.entropy(statistics, kind="count")


def test_corrections_refuse_with_the_fix():
    statistics = kept(LENGTHS, items=4)
    array = np.ones((3, LAYERS, E))
    cases = [
        (lambda: analysis.divergence(statistics, "en", correct="loess"), "no correction 'loess'"),
        (lambda: analysis.divergence(statistics, "en", correct="jackknife"), "--kind count"),
        (lambda: analysis.divergence(statistics, "en", correct="rarefy"), "--kind count"),
        (
            lambda: analysis.divergence(statistics, "en", correct="jackknife", kind="count", measure="cosine"),
            'use "rarefy"',
        ),
        (lambda: analysis.divergence(statistics, "en", correct="floor", pairing="pooled"), "pairing='paired'"),
        (lambda: analysis.divergence(array, array, correct="floor"), "pairing='paired'"),
        (lambda: analysis.divergence(statistics, "en", trace=object()), "leave trace out"),
        (
            lambda: analysis.divergence(statistics, "en", pairing="pooled", by="token", kind="count").expected_floor,
            "needs paired",
        ),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()


def test_the_difference_of_two_depths_has_an_interval():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.1, (50, 9))
    bend = np.isin(np.arange(9), range(3, 6)) * 0.2
    pairs = np.stack([0.5 + shared, 0.5 + shared - bend + rng.normal(0, 0.01, (50, 9))])
    found = mr.analysis.Divergence(
        pairs.mean(1), ("a", "b"), "en", tuple("abcdefghi"), "jsd", "paired", 50, pair_values=pairs
    )
    difference = analysis.u_shape(found).difference("b", "a")
    assert difference.value == pytest.approx(0.2, abs=0.01)
    assert difference.high - difference.low < 0.03, "the sentences are the same, so what they share cancels"
    assert difference.p_value < 0.01
    with pytest.raises(AnalysisError, match="no group 'c'"):
        analysis.u_shape(found).difference("b", "c")
