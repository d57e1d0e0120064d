"""Alignment with a pivot against loops, on random and hand-made matrices with ties and duplicates."""

from __future__ import annotations

import json
import sys
from itertools import permutations

import numpy as np
import pytest
from harness.short_texts import kept

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.alignment import RULES, Side, cosines, judge
from moe_route.recording import SentenceVectors
from moe_route.recording.store import SequenceStore

N, LAYERS, WIDTH = 14, 3, 5


def by_loops(c: np.ndarray, rule: str, neighbors: int = 4) -> list[float]:
    """The rule, said slowly."""
    n = len(c)
    if rule == "cosine":
        return [c[i][i] for i in range(n)]
    if rule == "margin":
        rows = [sum(sorted(c[i])[-neighbors:]) / neighbors for i in range(n)]
        columns = [sum(sorted(c[:, j])[-neighbors:]) / neighbors for j in range(n)]
        c = np.array([[2 * c[i][j] / (rows[i] + columns[j]) for j in range(n)] for i in range(n)])
    wins = []
    for i in range(n):
        others = [c[i][j] for j in range(n) if j != i]
        if rule == "mexa":
            others += [c[j][i] for j in range(n) if j != i]
        wins.append(float(all(c[i][i] > other for other in others)))
    return wins


def matrices():
    rng = np.random.default_rng(0)
    yield "random", rng.random((N, N))
    yield "aligned", rng.random((N, N)) * 0.8 + np.eye(N) * 0.5
    yield "ties", (rng.integers(1, 5, (N, N)) / 4)
    doubled = rng.random((N, N)) + np.eye(N)
    doubled[3] = doubled[7]  # one sentence twice in the first language
    doubled[:, 10] = doubled[:, 2]  # and one in the other
    yield "duplicates", doubled
    hub = rng.random((N, N))
    hub[:, 0] = 2.0  # nearest to all
    yield "hub", hub
    yield "constant", np.ones((N, N))


MATRICES = dict(matrices())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MATRICES)
def test_rules_against_loops(name: str, rule: str) -> None:
    np.testing.assert_allclose(judge(MATRICES[name], rule).values, by_loops(MATRICES[name], rule), rtol=1e-12)


def test_rules_on_a_matrix_made_by_hand() -> None:
    c = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.3, 0.4, 0.4]])
    assert judge(c, "retrieval").values.tolist() == [1, 0, 0]  # 0.8 > 0.7; 0.4 ties with 0.4
    assert judge(c, "mexa").values.tolist() == [1, 0, 0]
    assert judge(c.T, "retrieval").values.tolist() == [1, 1, 1]
    # neighbors of rows: .9 .8 .4, of columns: .9 .7 .4; row 1: 1.6/1.7, 1.4/1.5, .2/1.2; row 2: .6/1.3, .8/1.1, 1
    assert judge(c, "margin", 1).values.tolist() == [1, 0, 1]
    assert judge(c, "cosine").values.tolist() == [0.9, 0.7, 0.4]
    assert judge(c, "cosine").chance == pytest.approx(c.mean())
    assert judge(c, "retrieval").chance == pytest.approx(2 / 9)
    assert judge(c, "mexa").chance == pytest.approx(1 / 9)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MATRICES)
def test_chance_is_the_mean_over_all_pairings(name: str, rule: str) -> None:
    c = MATRICES[name][:6, :6]
    every = [judge(c[:, list(order)], rule).values.mean() for order in permutations(range(6))]
    assert judge(c, rule).chance == pytest.approx(np.mean(every))


def vectors(seed: int = 0) -> np.ndarray:
    """Vectors [item, group, layer, width]: the second group near the first, the third unrelated."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(N, 3, LAYERS, WIDTH))
    found[:, 1] = found[:, 0] + 0.6 * found[:, 1]
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("center", [False, True])
def test_alignment_against_loops(rule: str, center: bool) -> None:
    given = np.abs(vectors()) if rule == "margin" else vectors()
    given[5, 0] = given[2, 0]  # a sentence twice in the pivot
    given[9, 2] = given[8, 2]
    found = analysis.alignment(given, "b", groups=["a", "b", "c"], rule=rule, center=center)
    assert found.groups == ("a", "c")
    moved = given - given.mean(0) if center else given
    for row, g in enumerate((0, 2)):
        for layer in range(LAYERS):
            x, y = (moved[:, k, layer] for k in (1, g))
            c = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in y] for a in x])
            np.testing.assert_allclose(found.pair_values[row, :, layer], by_loops(c, rule), atol=1e-12)
            assert found.values[row, layer] == pytest.approx(np.mean(by_loops(c, rule)))
    assert found.duplicates == {"a": (2, 5), "c": (8, 9)}


def test_a_sentence_that_occurs_twice_never_wins_whatever_the_rounding() -> None:
    rng = np.random.default_rng(0)
    for width in (3, 64, 129, 500):  # sizes at which a product of matrices takes different paths for its last rows
        a = rng.normal(size=(101, width))
        a[100] = a[0]
        side, other = Side.of(a / np.linalg.norm(a, axis=1)[:, None]), Side.of(a[::-1] / 7)
        c = cosines(side, other)
        np.testing.assert_array_equal(c[100], c[0])
        values = judge(cosines(side, side), "mexa").values
        assert values[[0, 100]].tolist() == [0, 0]
        assert values[1:100].all()


def routing():
    return kept({"en": 25, "de": 30, "sw": 20}, items=12)


def test_the_routing_twin_is_similarity_with_the_pivot() -> None:
    statistics = routing()
    for rule in RULES[:2] + RULES[3:]:
        found = analysis.alignment(statistics, "en", rule=rule)
        pairs = analysis.similarity(statistics, rule=rule)
        assert found.centered
        for group in found.groups:
            expected = pairs.values[:, 0, pairs.groups.index(group)]
            np.testing.assert_allclose(found.of(group), expected, rtol=1e-12)
    assert found.fertility.tolist() == [30 / 25, 20 / 25]
    assert "fertility" in repr(found)


def stored(given: np.ndarray, names: str = "abc", layers: int = LAYERS, portion: int = 4) -> SentenceVectors:
    store = SequenceStore(["embedding", *(f"layer {i}" for i in range(1, layers))], [0] * layers, memory_bytes=600)
    keys = [(item, name) for item in range(len(given)) for name in names]
    rows = given.reshape(-1, *given.shape[2:]).astype(np.float32)
    for start in range(0, len(keys), portion):  # several shards
        here = slice(start, start + portion)
        tokens = np.full((len(keys[here]), layers), 7)
        store.append(keys[here], {"tokens": tokens, "hidden": rows[here]})
    return SentenceVectors(store, tuple(names), tuple(range(len(given))), "mean", {})


def test_vectors_from_disk_a_layer_at_a_time_are_those_of_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    given = vectors().astype(np.float32)
    on_disk = stored(given)
    plain = analysis.alignment(given, "a", groups=list("abc"), rule="retrieval")
    whole = analysis.alignment(on_disk, "a", rule="retrieval")
    monkeypatch.setattr(sys.modules["moe_route.analysis.alignment"], "_PORTION_BYTES", 1)
    portions = analysis.alignment(on_disk, "a", rule="retrieval", groups=["b", "c"])
    for found in (whole, portions):
        np.testing.assert_array_equal(found.pair_values, plain.pair_values)
        assert found.layers == ("embedding", "layer 1", "layer 2")
        assert found.tokens.tolist() == [7, 7]


def test_summaries_intervals_and_rankings() -> None:
    found = analysis.alignment(stored(vectors()), "a", rule="mexa")
    np.testing.assert_allclose(found.summary(), found.values.mean(1))
    np.testing.assert_allclose(found.summary("max"), found.values.max(1))
    np.testing.assert_allclose(found.summary(layers=[0, 2]), found.values[:, [0, 2]].mean(1))
    assert list(found.ranking()) == ["b", "c"]
    assert found.estimate(0.5) == {name: value / 2 for name, value in found.ranking().items()}
    low, high = found.interval()
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, N, (4000, N))
    expected = found.pair_values[0][drawn].mean(1)
    np.testing.assert_allclose(np.stack([low[0], high[0]]), np.quantile(expected, [0.014, 0.986], axis=0), atol=0.05)
    assert ((low <= found.values) & (found.values <= high)).all()
    for how in ("mean", "max"):
        low, high = found.interval(of=how)
        assert ((low <= found.summary(how)) & (found.summary(how) <= high + 1e-12)).all()
    wider, narrower = found.interval(0.99, of="mean"), found.interval(0.5, of="mean")
    assert (wider[0] <= narrower[0]).all()
    assert (found.chance <= 1 / N + 1e-12).all()
    language_ranker = analysis.alignment(stored(vectors()), "a", rule="cosine")
    np.testing.assert_allclose(language_ranker.summary(), language_ranker.values[:, 1:].mean(1))  # no embedding
    assert "over layers 1 to 2" in repr(language_ranker)
    assert len(found.to_pandas()) == 2 * LAYERS
    assert {"low", "high", "chance", "fertility"} <= set(found.to_pandas().columns)
    json.dumps(found.to_dict(), allow_nan=False)
    assert "random pairs of the same sentences" in repr(found)


def test_unrelated_sentences_are_at_chance() -> None:
    rng = np.random.default_rng(3)
    found = analysis.alignment(rng.normal(size=(400, 2, 2, 16)), "a", groups=["a", "b"])
    low, high = found.interval()
    assert (low <= found.chance).all()
    assert (found.chance <= high).all()
    assert "never win" not in repr(found)


def test_duplicates_are_named() -> None:
    given = vectors()
    given[4, 1] = given[6, 1]
    found = analysis.alignment(given, "a", groups=list("abc"))
    assert found.duplicates == {"b": (4, 6)}
    assert "2 items occur twice in a language, and can never win: 4, 6" in repr(found)


def test_correlation_takes_an_alignment() -> None:
    rng = np.random.default_rng(0)
    given = rng.normal(size=(30, 6, LAYERS, WIDTH))
    for g in range(1, 6):
        given[:, g] = given[:, 0] + 0.4 * g * given[:, g]
    names = list("abcdef")
    found = analysis.alignment(given, "a", groups=names)
    scores = {name: -float(i) for i, name in enumerate(names)}
    result = analysis.correlation(found, scores)
    expected = [np.corrcoef(found.values[:, layer], [scores[g] for g in found.groups])[0, 1] for layer in range(LAYERS)]
    np.testing.assert_allclose(result.pearson, expected)
    assert (result.pearson > 0.8).all()
    low, high = result.interval(resamples=200)
    assert (low <= high).all()
    assert "Correlation of scores with MEXA alignment with a" in repr(result)


def test_refuses_with_the_fix() -> None:
    given, names, statistics = vectors(), list("abc"), routing()
    found = analysis.alignment(given, "a", groups=names)
    few = kept({"en": 25, "de": 30}, items=9)
    apart = stored(given)
    apart.store = stored(given[:3, :2], "bc").store.merge(stored(given[:, :1], "a").store)
    opposite = given[:, :2].copy()
    opposite[:, 0, :, 0], opposite[:, 1, :, 0] = 100, -100  # every cosine is near -1
    broken = given.copy()
    broken[0, 0, 0, 0] = np.nan
    cases = [
        (lambda: analysis.alignment(given, "a", groups=names, rule="best"), "no rule 'best'"),
        (lambda: analysis.alignment(given, "z", groups=names), "no reference 'z'"),
        (lambda: analysis.alignment(given, "a"), "needs groups="),
        (lambda: analysis.alignment(given[..., 0], "a", groups=names), r"\[item, group, layer, width\]"),
        (lambda: analysis.alignment(given, "a", groups=["a", "a", "b"]), "named twice"),
        (lambda: analysis.alignment(broken, "a", groups=names), "must be finite"),
        (lambda: analysis.alignment(given[:9], "a", groups=names, rule="cosine"), "at least 10"),
        (lambda: analysis.alignment(few, "en"), "at least 10"),
        (
            lambda: analysis.alignment(given, "a", groups=names, rule="margin", neighbors=15),
            "must be 1 to 14",
        ),
        (lambda: analysis.alignment(opposite, "a", groups=["a", "b"], rule="margin"), 'rule="retrieval"'),
        (lambda: analysis.alignment(stored(given), "a", kind="count"), "leave it out"),
        (lambda: analysis.alignment(statistics, "en", kind="logits"), "no kind 'logits'"),
        (lambda: analysis.alignment(stored(given), "z"), "no group 'z'"),
        (lambda: analysis.alignment(statistics, "en", groups=["en"]), "with itself"),
        (lambda: analysis.alignment(apart, "a"), "min_common"),
        (lambda: found.of("z"), "no group 'z'"),
        (lambda: found.summary("median"), '"mean" or the "max"'),
        (lambda: found.interval(of="median"), 'of must be "layers"'),
        (lambda: found.summary(layers=[9]), "layers must name"),
        (lambda: found.estimate(1.5), "between 0 and 1"),
        (lambda: analysis.alignment(given, "a", groups=names, rule="cosine").estimate(0.5), 'rule="mexa"'),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()
    with pytest.raises(ValueError, match="hidden=True"):
        analysis.alignment(statistics, "en", kind="hidden")
