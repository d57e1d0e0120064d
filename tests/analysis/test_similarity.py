"""Similarity of languages against loops, trees against scipy, and published similarities of mPLM-Sim."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.cluster.hierarchy as hierarchy
from harness.routing_data import FOLDER, needs_data
from harness.short_texts import kept
from scipy.spatial.distance import squareform

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.similarity import leaves

LENGTHS = {"en": 25, "de": 30, "sw": 20}


@pytest.fixture(scope="module")
def statistics():
    return kept(LENGTHS, items=12)


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_against_loops(statistics):
    names = list(LENGTHS)
    q = {
        g: np.stack([statistics.store.distributions(f"s{i}", g, "full") for i in range(12)]) for g in names
    }  # [n, L, E]
    q = {g: one / one.sum(-1, keepdims=True) for g, one in q.items()}
    moved = {g: one - one.mean(0) for g, one in q.items()}
    for center, vectors in ((True, moved), (False, q)):
        found = {
            method: analysis.similarity(statistics, method=method, center=center).values
            for method in ("cosine", "mexa", "retrieval")
        }
        for layer in range(2):
            for a, first in enumerate(names):
                for b, second in enumerate(names):
                    if a == b:
                        continue
                    c = np.array([[cosine(x, y) for y in vectors[second][:, layer]] for x in vectors[first][:, layer]])
                    row = [all(c[i, i] > c[i, j] for j in range(12) if j != i) for i in range(12)]
                    column = [all(c[i, i] > c[j, i] for j in range(12) if j != i) for i in range(12)]
                    assert found["cosine"][layer, a, b] == pytest.approx(np.diag(c).mean())
                    assert found["retrieval"][layer, a, b] == pytest.approx(np.mean(row))
                    assert found["mexa"][layer, a, b] == pytest.approx(np.mean(np.logical_and(row, column)))


def test_what_a_result_gives(statistics):
    found = analysis.similarity(statistics, method="mexa")
    assert found.chance == pytest.approx(1 / 12)
    assert set(found.order()) == set(LENGTHS)
    assert [len(one) for one in found.clusters(3)] == [1, 1, 1]
    assert found.clusters(1) == (tuple(LENGTHS),)
    assert list(found.ranking("en").values()) == sorted(found.ranking("en").values(), reverse=True)
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.to_pandas()) == 2 * 9
    assert "by chance: 0.083" in repr(found)


def test_the_same_sentences_are_found(statistics):
    copy = kept({"en": 25, "twin": 25}, items=12, seed=1)
    shard = next(copy.store.shards())
    shard.arrays["full"][12:] = shard.arrays["full"][:12]
    for method in ("cosine", "mexa"):
        assert analysis.similarity(copy, method=method).values == pytest.approx(1.0)


def test_trees_are_those_of_scipy():
    for seed in range(5):
        d = np.random.default_rng(seed).random((9, 9))
        d = (d + d.T) / 2
        np.fill_diagonal(d, 0)
        expected = hierarchy.linkage(squareform(d), "average")
        found = analysis.average_linkage(d)
        np.testing.assert_allclose(found, expected)
        assert sorted(leaves(found)) == list(range(9))
    with pytest.raises(AnalysisError, match="symmetric"):
        analysis.average_linkage(np.arange(4.0).reshape(2, 2))


def test_matrix_correlation_against_all_orders():
    from itertools import permutations

    rng = np.random.default_rng(0)
    a, b = (x + x.T for x in rng.random((2, 5, 5)))
    beside = np.triu_indices(5, 1)
    found = analysis.matrix_correlation(a, b)
    r = np.corrcoef(a[beside], b[beside])[0, 1]
    drawn = [np.corrcoef(a[beside], b[np.ix_(o, o)][beside])[0, 1] for o in permutations(range(5))]
    assert found.value == pytest.approx(r)
    assert found.p_value == pytest.approx((np.abs(drawn) >= abs(r) - 1e-12).mean())
    rows = [np.corrcoef(np.delete(a[i], i), np.delete(b[i], i))[0, 1] for i in range(5)]
    assert found.by_row == pytest.approx(np.mean(rows))
    drawn = analysis.matrix_correlation(a, b, permutations=60)
    assert drawn.p_value == pytest.approx(found.p_value, abs=0.2)
    assert "by row" in str(found)
    for wrong in (a[:4], a[:3, :3], np.full((5, 5), np.nan)):
        with pytest.raises(AnalysisError):
            analysis.matrix_correlation(wrong, b if wrong.shape == (4, 5) else wrong)


def test_refuses_with_the_fix(statistics, tmp_path):
    cases = [
        (lambda: analysis.similarity(statistics, method="kl"), "no method 'kl'"),
        (lambda: analysis.similarity(statistics, groups=["en"]), "two groups"),
        (lambda: analysis.similarity(kept(LENGTHS, items=5), method="mexa"), "at least 10"),
        (lambda: analysis.similarity(statistics).clusters(4), "1 to 3 clusters"),
        (lambda: analysis.similarity(statistics).ranking("fr"), "no group 'fr'"),
        (lambda: analysis.matrix_correlation(np.eye(5), np.eye(5), method="kendall"), "pearson"),
    ]
    path = tmp_path / "m.tsv"
    path.write_text("\ta\tb\na\t\t1\nb\t0.5\t\n")
    np.testing.assert_array_equal(analysis.read_matrix(path, ["b", "a"]), [[np.nan, 0.5], [1.0, np.nan]])
    cases.append((lambda: analysis.read_matrix(path, ["a", "c"]), "no row and column c"))
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()


@needs_data
@pytest.mark.parametrize(
    ("similarities", "other", "pearson", "spearman"),
    [
        ("glot500-base_flores200_layer6.tsv", "genetic.tsv", 0.4463, 0.3920),
        ("glot500-base_flores200_layer6.tsv", "geographic.tsv", 0.2738, None),
        ("glot500-base_flores200_layer0.tsv", "edit_flores200.tsv", 0.6745, None),
        ("xlm-roberta-base_flores200_layer2.tsv", "genetic.tsv", 0.3744, None),
    ],
)
def test_published_correlations_of_mplm_sim(similarities, other, pearson, spearman):
    folder = FOLDER / "mplm_sim"
    heads = [(folder / name).read_text().splitlines()[0].split("\t")[1:] for name in (similarities, other)]
    groups = [group for group in heads[0] if group in set(heads[1])]
    first, second = (analysis.read_matrix(folder / name, groups) for name in (similarities, other))
    for method, value in (("pearson", pearson), ("spearman", spearman)):
        if value is not None:
            found = analysis.matrix_correlation(first, second, method=method, permutations=20)
            assert found.by_row == pytest.approx(value, abs=2e-4)
    nearest = analysis.average_linkage(1 - np.where(np.isnan(first), 1.0, (first + first.T) / 2))
    assert len(nearest) == len(groups) - 1
