"""Similarity of languages and their trees against loops, and published similarities of mPLM-Sim."""

from __future__ import annotations

import json
from itertools import combinations, permutations

import numpy as np
import pytest
from harness.routing_data import FOLDER, needs_data
from harness.short_texts import kept
from scipy import stats

from moe_route import analysis
from moe_route.analysis import AnalysisError, Similarity
from moe_route.analysis.matrices import names_in
from moe_route.analysis.stats import clusters, leaves

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
            rule: analysis.similarity(statistics, rule=rule, center=center).values
            for rule in ("cosine", "mexa", "retrieval", "margin")
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
                    near = [np.sort(line)[-4:].mean() for line in (*c, *c.T)]
                    margin = [[2 * c[i, j] / (near[i] + near[12 + j]) for j in range(12)] for i in range(12)]
                    best = [all(margin[i][i] > margin[i][j] for j in range(12) if j != i) for i in range(12)]
                    assert found["margin"][layer, a, b] == pytest.approx(np.mean(best))
                    assert found["mexa"][layer, a, b] == pytest.approx(np.mean(np.logical_and(row, column)))


def test_what_a_result_gives(statistics):
    found = analysis.similarity(statistics, rule="mexa")
    assert found.chance <= 1 / 12
    assert set(found.order()) == set(LENGTHS)
    assert [len(one) for one in found.clusters(3)] == [1, 1, 1]
    assert found.clusters(1) == (tuple(LENGTHS),)
    assert list(found.ranking("en").values()) == sorted(found.ranking("en").values(), reverse=True)
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.to_pandas()) == 2 * 9
    assert f"random pairs of items: {found.chance:.3f}" in repr(found)


def test_the_same_sentences_are_found(statistics):
    copy = kept({"en": 25, "twin": 25}, items=12, seed=1)
    shard = next(copy.store.shards())
    shard.arrays["full"][12:] = shard.arrays["full"][:12]
    for rule in ("cosine", "mexa"):
        assert analysis.similarity(copy, rule=rule).values == pytest.approx(1.0)


def merged_by_hand(distance, between):
    """The two nearest clusters, again and again: their members and distance; ``between`` the distances of members."""
    clusters, merges = [[i] for i in range(len(distance))], []
    while len(clusters) > 1:
        pairs = [(between(distance[np.ix_(a, b)]), a, b) for a, b in combinations(clusters, 2)]
        nearest, a, b = min(pairs, key=lambda pair: pair[0])
        clusters = [one for one in clusters if one not in (a, b)] + [a + b]
        merges.append((nearest, sorted(a + b)))
    return merges


def test_trees_merge_the_nearest_clusters():
    between = {"complete": np.max, "average": np.mean, "single": np.min}
    for seed in range(3):
        d = np.random.default_rng(seed).random((9, 9))
        d = (d + d.T) / 2
        np.fill_diagonal(d, 0)
        for method, distance in between.items():
            expected, tree = merged_by_hand(d, distance), analysis.linkage(d, method)
            np.testing.assert_allclose(tree[:, 2], [nearest for nearest, _ in expected])
            assert tree[:, 3].tolist() == [len(members) for _, members in expected]
            order = leaves(tree)
            assert sorted(order) == list(range(9))
            for _, members in expected:  # no branches cross: the members of a cluster stand side by side
                places = sorted(order.index(member) for member in members)
                assert places == list(range(places[0], places[0] + len(members)))
            three = {tuple(one) for one in clusters(tree, 3)}
            assert len(three) == 3
            assert three <= {tuple(members) for _, members in expected[:-2]} | {(i,) for i in range(9)}
    assert analysis.linkage(np.zeros((1, 1))).shape == (0, 4)
    assert leaves(np.zeros((0, 4))) == [0]
    assert clusters(np.zeros((0, 4)), 1) == [[0]]
    with pytest.raises(AnalysisError, match="symmetric"):
        analysis.linkage(np.arange(4.0).reshape(2, 2))


def test_matrix_correlation_against_all_orders():
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
        (lambda: analysis.similarity(statistics, rule="kl"), "no rule 'kl'"),
        (lambda: analysis.similarity(statistics, groups=["en"]), "two groups"),
        (lambda: analysis.similarity(kept(LENGTHS, items=5), rule="mexa"), "at least 10"),
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


def names_of(number: int) -> list[str]:
    return [f"l{i}" for i in range(number)]


def test_compare_against_loops_with_rows_that_do_not_vary():
    rng = np.random.default_rng(0)
    values = rng.random((3, 6, 6)).round(1)  # ties
    table = rng.random((6, 6)).round(1)
    table = np.round(table + table.T, 6)
    values[1, 2, :] = values[1, :, 2] = 0.5  # one row of one layer
    table[4, :] = table[:, 4] = 0.0  # a language without relatives in the table
    found = Similarity.of(values, names_of(6)).compare(table, permutations=50)
    for layer, of_layer in enumerate(values):
        a, r, rho = (of_layer + of_layer.T) / 2, [], []
        for i in range(6):
            x, y = (np.delete(one[i], i) for one in (a, table))
            if np.ptp(x) > 0 and np.ptp(y) > 0:
                r.append(stats.pearsonr(x, y)[0])
                rho.append(stats.spearmanr(x, y)[0])
        assert found.rows[layer] == len(r)
        assert found.pearson[layer] == pytest.approx(np.mean(r), abs=1e-12)
        assert found.spearman[layer] == pytest.approx(np.mean(rho), abs=1e-12)
        single = analysis.matrix_correlation(of_layer, table, permutations=50)
        assert found.p_value[layer] == single.p_value
    assert found.rows.tolist() == [5, 4, 5]
    assert found.constant == ("l4",)
    assert found.best_layer == int(np.argmax(found.pearson))
    assert "left out, as a row does not vary: 1 group" in repr(found)
    assert len(found.to_pandas()) == 3
    json.dumps(found.to_dict(), allow_nan=False)


def test_compare_on_a_table_made_by_hand(tmp_path):
    """Three languages in a chain and one apart: the correlations can be worked out on paper."""
    near = np.array([[1, 3, 1, 0], [3, 1, 2, 0], [1, 2, 1, 0], [0, 0, 0, 1]]) / 3
    table = {"a": {"b": 1, "c": 1, "d": 0}, "b": {"c": 0, "d": 0}, "c": {"d": 0}, "d": {}}
    found = Similarity.of(near, "abcd").compare(table)
    # a: (3, 1, 0) with (1, 1, 0); b: (3, 2, 0) with (1, 0, 0); c: (1, 2, 0) with (1, 0, 0); d: constant in both
    by_hand = [4 / np.sqrt(14 * 2), 4 / np.sqrt(14 * 2), 0.0]
    assert found.pearson[0] == pytest.approx(np.mean(by_hand), abs=1e-9)
    assert found.spearman[0] == pytest.approx(np.mean([np.sqrt(3) / 2, np.sqrt(3) / 2, 0.0]), abs=1e-9)
    assert found.constant == ("d",)
    assert found.p_value[0] == pytest.approx(_mantel(near, table))
    lines = ["\t".join(["", "a", "b", "c", "d"])]
    for x in "abcd":
        values = ["" if x == y else str(table[x].get(y, table[y].get(x))) for y in "abcd"]
        lines.append("\t".join([x, *values]))
    (tmp_path / "table.tsv").write_text("\n".join(lines))
    of_file = Similarity.of(np.pad(near, (0, 1), constant_values=0.5), "abcde").compare(tmp_path / "table.tsv")
    assert of_file.missing == ("e",)
    assert of_file.pearson[0] == found.pearson[0]


def _mantel(values, table):
    """p over all 24 orders."""
    names, beside = "abcd", np.triu_indices(4, 1)
    other = np.array([[0 if x == y else table[x].get(y, table[y].get(x)) for y in names] for x in names])
    r = [abs(np.corrcoef(values[beside], other[np.ix_(o, o)][beside])[0, 1]) for o in permutations(range(4))]
    return np.mean(np.array(r) >= r[0] - 1e-12)


def test_sources_clusters_and_trees():
    values = np.array([[1, 0.9, 0.2, 0.1], [0.9, 1, 0.3, 0.1], [0.2, 0.3, 1, 0.7], [0.1, 0.1, 0.7, 1]])
    found = Similarity.of(np.stack([np.eye(4), values]), ["deu", "nld", "hin", "ben"], ["first", "last"])
    assert found.best_source("nld", 1) == "deu"
    assert found.best_source("nld", 1, among=["hin", "ben"]) == "hin"
    assert found.clusters(2, 1) == (("deu", "nld"), ("hin", "ben"))
    np.testing.assert_allclose(found.tree(1), [[0, 1, 0.1, 2], [2, 3, 0.3, 2], [4, 5, 0.9, 4]])
    np.testing.assert_allclose(found.tree(1, "single"), [[0, 1, 0.1, 2], [2, 3, 0.3, 2], [4, 5, 0.7, 4]])
    assert "given similarities, mean over 2 layers" in repr(found)
    cases = [
        (lambda: found.best_source("nld", among=["nld"]), "other than 'nld'"),
        (lambda: found.best_source("fra"), "no group 'fra'"),
        (lambda: found.tree(1, "ward"), "no linkage 'ward'"),
        (lambda: found.compare(np.eye(3)), r"must be \[4, 4\]"),
        (lambda: found.compare({"deu": {}}), "four of the groups"),
        (lambda: found.compare({name: {} for name in found.groups}), "no value for deu and nld"),
        (lambda: Similarity.of(np.eye(3), ["a", "b"]), r"\[layer, group, group\]"),
        (lambda: Similarity.of(np.eye(2), ["a", "a"]), "different groups"),
        (lambda: Similarity.read(), "no file"),
        (lambda: Similarity.of(np.full((4, 4), np.nan), "abcd").best_source("a"), "other layers"),
        (lambda: Similarity.of(np.ones((4, 4)), "abcd").compare(np.ones((4, 4))).best_layer, "another table"),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()


def test_a_table_with_an_empty_diagonal_has_a_tree(tmp_path):
    path = tmp_path / "table.tsv"
    path.write_text("\ta\tb\tc\na\t\t0.9\t0.2\nb\t0.9\t\t0.3\nc\t0.2\t0.3\t\n")
    found = Similarity.read(path)
    assert np.diag(found.mean()).tolist() == [1, 1, 1]
    assert found.clusters(2) == (("a", "b"), ("c",))
    nowhere = np.full((2, 2), np.nan)
    with pytest.raises(AnalysisError, match="finite distances"):
        Similarity.of(nowhere, ["a", "b"]).tree()
    assert np.isnan(nowhere).all()


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
    found = Similarity.read(folder / similarities).compare(folder / other, permutations=20)
    assert found.pearson[0] == pytest.approx(pearson, abs=1e-4)
    if spearman is not None:
        assert found.spearman[0] == pytest.approx(spearman, abs=1e-4)
    if similarities.startswith("glot500") and other == "genetic.tsv":
        assert found.rows[0] == 164
        assert len(found.constant) == len(found.groups) - 164
    assert found.p_value[0] == pytest.approx(1 / 21)


_NAMED = "eng deu nld fra spa por ita rus ukr pol hin ben tur fin jpn cmn kor arb heb ind vie swh sna tam"


@needs_data
def test_nearest_languages_of_the_published_similarities():
    path = FOLDER / "mplm_sim" / "glot500-base_flores200_layer5.tsv"
    codes = {name[:3]: name for name in names_in(path) if name[:3] in _NAMED.split() and name != "arb_Latn"}
    assert sorted(codes) == sorted(_NAMED.split())
    found = Similarity.read(path, groups=list(codes.values()))
    for pair in ("deu nld", "spa por", "rus ukr", "hin ben", "jpn kor", "arb heb"):
        a, b = (codes[name] for name in pair.split())
        assert (found.best_source(a), found.best_source(b)) == (b, a)
    assert found.best_source(codes["fra"]) == codes["ita"]
    assert found.best_source(codes["sna"]) == codes["swh"]
