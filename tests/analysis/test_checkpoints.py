"""Comparisons of recordings against plain formulas, the hand values of the literature, outcomes, and prediction."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness.kept_sequences import random_counts, statistics_of
from scipy.special import rel_entr

import moe_route as mr
from moe_route import analysis, convert
from moe_route.analysis import AnalysisError
from moe_route.demo import published_u

SIZES = (6, 4)
TASTE = np.array([[3, 2, 1, 1, 1, 1], [2, 1, 1, 1, 0, 0]], float)
LATER = np.array([[1, 2, 3, 1, 1, 4], [1, 1, 1, 2, 0, 0]], float)
ITEMS = [f"s{number}" for number in range(20)]


@pytest.fixture(scope="module")
def both():
    first = random_counts(ITEMS, "en", TASTE, seed=1) | random_counts(ITEMS, "sw", LATER, seed=2)
    second = random_counts(ITEMS, "en", TASTE, seed=3) | random_counts(ITEMS, "sw", TASTE, seed=4)
    return [statistics_of(counts, 2, SIZES) for counts in (first, second)]


# ---- two recordings


def jsd(p, q):
    m = (p + q) / 2
    return (rel_entr(p, m).sum(-1) + rel_entr(q, m).sum(-1)) / 2


def normalized_jsd(p, q, size):
    entropies = [-rel_entr(one, np.ones_like(one)).sum(-1) for one in (p, q)]
    return jsd(p, q) / (np.log(size) - np.mean(entropies, axis=0))


def test_the_comparison_is_that_of_plain_formulas(both):
    found = analysis.compare(*both, kind="count")
    assert found.items.tolist() == [20, 20]
    for g, group in enumerate(("en", "sw")):
        counts = [np.stack([one.store.counts(item, group) for item in ITEMS]).astype(float) for one in both]
        q = [one / one.sum(-1, keepdims=True) for one in counts]
        mean = [one.mean(0) for one in q]
        tokens = [np.stack([one.store.tokens(item, group) for item in ITEMS]) for one in both]
        for layer, size in enumerate(SIZES):
            pair = [one[layer] for one in mean]
            assert found.values[g, layer] == pytest.approx(normalized_jsd(*pair, size), rel=1e-9)
            assert found.jsd[g, layer] == pytest.approx(jsd(*pair), rel=1e-9)
            texts = [normalized_jsd(a, b, size) for a, b in zip(q[0][:, layer], q[1][:, layer], strict=True)]
            assert found.by_text[g, layer] == pytest.approx(np.mean(texts), rel=1e-9)
        frequency = [c / t[..., None] for c, t in zip(counts, tokens, strict=True)]
        change = (frequency[1] - frequency[0]).mean(0)
        np.testing.assert_allclose(found.change[g], change, atol=1e-12)
    assert (found.low < found.values).all()
    assert (found.values < found.high).all()
    json.dumps(found.to_dict(), allow_nan=False)
    assert "Experts that moved" in repr(found)


def test_what_changed_is_told_from_noise(both):
    found = analysis.compare(*both, kind="count")
    en, sw = found.groups.index("en"), found.groups.index("sw")
    assert (found.low[sw] > found.floor[sw]).all()
    assert found.values[en].mean() < 2 * found.floor[en].mean(), "other texts of one taste"
    assert (0, 5) in {cell[:2] for cell in found.moved("sw")}
    assert len(found.moved("en")) <= 1
    same = analysis.compare(both[0], both[0], kind="count")
    assert not same.values.any()
    assert not same.by_text.any()
    assert (same.overlap == 1).all()
    assert not same.moved("sw")


def test_a_paired_t_test_decides_what_moved(both):
    from scipy import stats

    found = analysis.compare(*both, kind="count")
    frequency = [
        np.stack([one.store.counts(item, "sw") / one.store.tokens(item, "sw")[:, None] for item in ITEMS])
        for one in both
    ]
    real = np.arange(6) < np.asarray(SIZES)[:, None]
    p = stats.ttest_rel(frequency[1], frequency[0], axis=0).pvalue
    adjusted = stats.false_discovery_control(p[real])
    np.testing.assert_allclose(found.moved_p[found.groups.index("sw")][real], adjusted, atol=1e-12)


def test_recordings_of_other_shapes_and_groups_are_refused(both):
    other = statistics_of(random_counts(ITEMS, "en", TASTE, seed=1), 1, SIZES)
    with pytest.raises(AnalysisError, match="one configuration"):
        analysis.compare(both[0], other)
    with pytest.raises(AnalysisError, match="group in common"):
        analysis.compare(both[0].select(groups=["en"]), both[1].select(groups=["sw"]))


# ---- several checkpoints


@pytest.mark.parametrize(
    ("counts", "share"), [([[8, 0], [0, 8]], 1.0), ([[4, 4], [4, 4]], 0.0), ([[6, 2], [2, 6]], 0.1887)]
)
def test_specialization_has_its_hand_values(counts, share):
    assert analysis.specialization_of(counts) == pytest.approx(share, abs=5e-5)


def test_unequal_samples_shift_specialization_only_as_the_authors_weigh():
    counts = np.array([[6, 2], [2, 6]])
    more = counts * np.array([[10], [1]])
    assert analysis.specialization_of(more) == pytest.approx(analysis.specialization_of(counts))
    assert analysis.specialization_of(more, weigh="tokens") != pytest.approx(0.1887, abs=0.01)


def test_a_series_has_the_formulas_of_the_paper(both):
    third = statistics_of(
        random_counts(ITEMS, "en", TASTE, seed=5) | random_counts(ITEMS, "sw", LATER * 2, seed=6), 2, SIZES
    )
    found = analysis.checkpoint_series({"a": both[0], "b": both[1], "c": third}, alpha=0.05)
    for place, one in enumerate((*both, third)):
        counts = one.token_sum("counts").astype(float)
        q = counts / counts.sum(-1, keepdims=True)
        np.testing.assert_allclose(found.jsd[place], jsd(q[0], q[1]), rtol=1e-9)
        expected = [analysis.specialization_of(counts[:, layer]) for layer in range(2)]
        np.testing.assert_allclose(found.specialization[place], expected, rtol=1e-9)
        gap = np.abs(q[0] - q[1])
        assert found.gap_experts[place].tolist() == (gap >= 0.05).sum(-1).tolist()
        mine = analysis.gap_experts(one, alpha=0.05, shared=1)
        for g, group in enumerate(("en", "sw")):
            cells = {(int(a), int(b)) for a, b in np.argwhere((gap >= 0.05) & (q.argmax(0) == g))}
            assert set(mine[group].pairs) == cells
        assert set(mine.shared.pairs) == {(layer, int(q.mean(0)[layer].argmax())) for layer in range(2)}
    assert not found.moved[0].any()
    assert len(mr.plots.checkpoints(found).get_lines()) == 3
    assert len(found.to_pandas()) == 3 * 2
    with pytest.raises(AnalysisError, match="two checkpoints"):
        analysis.checkpoint_series({"a": both[0]})


def test_narrowing_of_the_published_routing():
    """Effective experts of Qwen3-30B-A3B: the ratio falls in German and Chinese, too."""
    found = analysis.narrowing(convert.published_routing(published_u._SHIPPED), "en", kind="topk")
    assert found.last_layers == (44, 45, 46, 47)
    expected = {"en": (75, 52, 56, 68), "de": (56, 49, 27, 25), "zh": (60, 54, 33, 29)}
    expected |= {"sw": (43, 37, 22, 25), "bn": (39, 40, 13, 10)}
    for group, numbers in expected.items():
        row = found.groups.index(group)
        parts = (found.first_layers, found.middle_layers, found.last_layers)
        means = [found.mean(part)[row] for part in parts] + [found.effective[row, -1]]
        assert tuple(round(float(value)) for value in means) == numbers
    against = dict(zip(found.groups, found.against.round(2).tolist(), strict=True))
    assert against == {"en": 1.0, "de": 0.51, "zh": 0.57, "sw": 0.56, "bn": 0.3} | {"sw": against["sw"]}
    assert against["sw"] == pytest.approx(0.565, abs=0.006)
    assert found.ratio[0] == pytest.approx(1.07, abs=0.005)


# ---- outcomes


def answers():
    right = {"a": "111000", "b": "110100"}
    return {(str(i), group): mark == "1" for group, marks in right.items() for i, mark in enumerate(marks)}


def test_outcomes_are_sorted_by_language_and_by_run(tmp_path):
    table = analysis.outcomes(answers(), reference="a")
    assert table.languages == ("b",)
    assert dict(zip(table.outcomes, table.counts[0].tolist(), strict=True)) == {"cc": 2, "ci": 1, "ic": 1, "ii": 2}
    assert table.of["2", "b"] == "ci"
    other = {key: not right for key, right in answers().items()}
    runs = analysis.outcomes(answers(), other)
    assert runs.counts.tolist() == [[0, 3, 3, 0], [0, 3, 3, 0]]
    assert "16.7%" in repr(table)
    with pytest.raises(AnalysisError, match="answer in eng_Latn"):
        analysis.outcomes(answers())
    path = tmp_path / "base.jsonl"
    lines = [
        {"task": "t", "language": group, "item": item, "correct": {"x": False, "exact": right}}
        for (item, group), right in answers().items()
    ]
    path.write_text("\n".join(json.dumps(one) for one in [{"condition": "base"}, *lines]), encoding="utf-8")
    assert analysis.read_answers(path) == answers()
    path.write_text('{"condition": "base"}\n', encoding="utf-8")
    with pytest.raises(AnalysisError, match="item, language and correct"):
        analysis.read_answers(path)


def test_risk_experts_by_outcome(both):
    marks = {item: number % 2 == 0 for number, item in enumerate(ITEMS)}
    table = analysis.outcomes(
        {(item, "eng"): True for item in ITEMS} | {(item, "sw"): right for item, right in marks.items()},
        reference="eng",
    )
    apart = analysis.by_outcome(both[0], table, "sw")
    assert apart.groups == ("cc", "ci")
    store = both[0].store
    sums = [sum(store.counts(item, "sw") for item in ITEMS if marks[item] is wanted) for wanted in (True, False)]
    tokens = [sum(store.tokens(item, "sw") for item in ITEMS if marks[item] is wanted) for wanted in (True, False)]
    expected = sums[0] / tokens[0][:, None] - sums[1] / tokens[1][:, None]
    risk = analysis.risk_experts(apart, apart, group="cc", baseline_group="ci", top_n=3)
    np.testing.assert_allclose(risk.values, expected, atol=1e-12)
    with pytest.raises(AnalysisError, match="outcomes of 'sw'"):
        analysis.by_outcome(both[0], analysis.outcomes({("x", "eng"): True, ("x", "sw"): True}, reference="eng"), "sw")


# ---- prediction


def trace_of(sequences):
    """A trace of one layer, top-1, of (token id, expert) lists."""
    lengths = [len(one) for one in sequences]
    flat = [pair for one in sequences for pair in one]
    number = len(flat)
    return mr.Trace(
        layers=("gate",),
        layer_numbers=(3,),
        groups=("x",),
        items=tuple(f"i{n}" for n in range(len(sequences))),
        sequence=np.repeat(np.arange(len(sequences)), lengths).astype(np.int32),
        group=np.zeros(number, np.int32),
        position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        token=np.array([token for token, _ in flat], np.int32),
        phase=np.zeros(number, np.uint8),
        ids=np.array([expert for _, expert in flat], np.int8)[:, None, None],
        weights=np.ones((number, 1, 1), np.float32),
    )


def test_what_predicts_the_expert_is_recalled():
    rng = np.random.default_rng(0)
    by_token, by_pair = [], []
    for _ in range(40):
        tokens = rng.integers(0, 4, 30).tolist()
        by_token.append([(token, token) for token in tokens])
        before = [0, *tokens[:-1]]
        by_pair.append([(token, (token + last) % 2) for token, last in zip(tokens, before, strict=True)])
    found = analysis.predict(trace_of(by_token))
    at = found.features.index
    np.testing.assert_allclose(found.mean[at("token")], 1.0)
    assert found.chance[0] == pytest.approx(0.25, abs=0.03)
    assert found.mean[at("language"), 0] == pytest.approx(found.chance[0], abs=1e-9)
    assert found.contexts[3, 2][0][1] == 2
    paired = analysis.predict(trace_of(by_pair))
    assert paired.mean[at("token"), 0] < 0.65
    assert paired.mean[at("previous and token"), 0] > 0.95
    json.dumps(paired.to_dict(), allow_nan=False)


def test_recall_of_tied_tokens_is_its_expectation():
    """Two texts: in one, id 0 chooses expert 0 in 2 of 4 tokens; in the other, all four tokens tie."""
    sequences = [[(0, 0), (0, 0), (0, 1), (0, 1)], [(0, 0), (0, 1), (0, 1), (0, 1)]]
    found = analysis.predict(trace_of(sequences), features=["token"])
    held = {4: 0.5, 2: 0.25}  # of four equal tokens, the one (or two) of the expert are drawn by chance
    assert found.recall[0, 0, 0] in held.values()
    with pytest.raises(AnalysisError, match="two items"):
        analysis.predict(trace_of(sequences[:1]))
    with pytest.raises(AnalysisError, match="there is no color"):
        analysis.predict(trace_of(sequences), features=["color"])
