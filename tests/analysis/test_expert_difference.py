"""Intervals of the difference of frequency: against plain loops, by their coverage, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness.kept_sequences import random_counts, statistics_of

import moe_route as mr
from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.analysis.resampling import Sequences, draw_together, resampled_statistics
from moe_route.analysis.stats import t_of_normal

SIZES = (6, 4)
TASTE = np.array([[3, 2, 1, 1, 1, 1], [2, 1, 1, 1, 0, 0]], float)
OTHER = np.array([[1, 2, 3, 1, 1, 1], [1, 1, 1, 2, 0, 0]], float)
ITEMS = [f"s{number}" for number in range(12)]


@pytest.fixture(scope="module")
def task():
    return statistics_of(random_counts([f"t{n}" for n in range(9)], "en", OTHER, seed=5), 2, SIZES)


@pytest.fixture(scope="module")
def general():
    counts = random_counts(ITEMS, "en", TASTE, seed=1) | random_counts(ITEMS, "sw", OTHER, seed=2)
    return statistics_of(counts, 2, SIZES)


def frequency_of(statistics, group, by, drawn):
    """Frequency of the drawn items of a group, in plain loops: the mean over sequences, or over tokens."""
    store, items = statistics.store, statistics.store.items(group)
    found = np.zeros(store.counts(items[0], group).shape)
    weight = np.zeros(len(found))
    for item, times in zip(items, drawn, strict=True):
        counts, tokens = store.counts(item, group), store.tokens(item, group)
        for layer in range(len(found)):
            found[layer] += times * (counts[layer] / tokens[layer] if by == "sequence" else counts[layer])
            weight[layer] += times * (1 if by == "sequence" else tokens[layer])
    return found / weight[:, None]


@pytest.mark.parametrize("by", ["sequence", "token"])
@pytest.mark.parametrize("paired", [True, False])
def test_intervals_and_p_values_are_those_of_plain_loops(task, general, by, paired):
    resamples, level = 60, 0.9
    if paired:
        ours, theirs = (general, "sw"), (general, "en")
        found = analysis.expert_difference_interval(
            general, general, group="sw", baseline_group="en", by=by, level=level, resamples=resamples, seed=3
        )
    else:
        ours, theirs = (task, "en"), (general, "en")
        found = analysis.expert_difference_interval(
            task, general, group="en", by=by, level=level, resamples=resamples, seed=3
        )
    assert (found.items, found.shared) == (((12, 12), 12) if paired else ((9, 12), 0))
    ids = [
        [item if paired else (side, item) for item in s.store.items(g)] for side, (s, g) in enumerate((ours, theirs))
    ]
    drawn = draw_together(ids, resamples, 3)
    away = np.array([frequency_of(*ours, by, a) - frequency_of(*theirs, by, b) for a, b in zip(*drawn, strict=True)])
    ones = [frequency_of(s, g, by, np.ones(len(s.store.items(g)))) for s, g in (ours, theirs)]
    value = ones[0] - ones[1]
    np.testing.assert_allclose(found.values, value, atol=1e-9)
    fewest = min(found.items)
    spread, largest, every = np.zeros(value.shape), np.zeros(resamples), {}
    for layer, size in enumerate(SIZES):
        for expert in range(size):
            column = away[:, layer, expert]
            sd = np.sqrt(np.mean((column - column.mean()) ** 2))
            z = np.abs(column - value[layer, expert]) / sd
            every[layer, expert] = z
            largest = np.maximum(largest, z)
            spread[layer, expert] = sd * np.sqrt(fewest / (fewest - 1))
    joint = t_of_normal(np.quantile(largest, level), fewest - 1)
    for (layer, expert), z in every.items():
        alone, t = t_of_normal(np.quantile(z, level), fewest - 1), t_of_normal(z, fewest - 1)
        cell, centre, scale = (layer, expert), value[layer, expert], spread[layer, expert]
        assert found.low[cell] == pytest.approx(centre - scale * alone, abs=1e-8)
        assert found.high[cell] == pytest.approx(centre + scale * alone, abs=1e-8)
        assert found.joint_low[cell] == pytest.approx(centre - scale * joint, abs=1e-8)
        reach = abs(centre) / scale
        assert found.p_value[cell] == pytest.approx((1 + (t >= reach - 1e-9).sum()) / (resamples + 1))
        as_large = t_of_normal(largest, fewest - 1) >= reach - 1e-9
        assert found.p_adjusted[cell] == pytest.approx((1 + as_large.sum()) / (resamples + 1))
    padding = found.low[1, 4:], found.high[1, 4:], found.p_adjusted[1, 4:]
    assert [part.tolist() for part in padding] == [[0, 0], [0, 0], [1, 1]]


def test_common_items_are_drawn_together_and_others_apart():
    both = draw_together([["a", "b", "c"], ["c", "a", "b"]], 50, 0)
    assert (both[0] == both[1][:, [1, 2, 0]]).all()
    part = draw_together([["a", "b", "x"], ["y", "a", "b"]], 50, 0)
    assert (part[0][:, :2] == part[1][:, 1:]).all()
    assert part[0][:, 2].std() > 0.5, "an item alone in its kind varies too"
    apart = draw_together([list("abcdef"), list("uvwxyz")], 400, 0)
    assert abs(np.corrcoef(apart[0][:, 0], apart[1][:, 0])[0, 1]) < 0.2
    assert all((weights.sum(1) == weights.shape[1]).all() for weights in (*both, *apart))
    assert all(weights.any(1).all() for weights in part)


def test_joint_intervals_hold_all_true_differences_about_as_often_as_they_say():
    """Items of unequal tastes, no difference in truth: the share of samples in which some joint interval misses 0."""
    rng = np.random.default_rng(0)
    missed = single = 0
    for _ in range(120):
        ours, theirs = (rng.beta(2, 6, (20, 2, 8)) for _ in range(2))
        found = analysis.expert_difference_interval(ours, theirs, resamples=300, seed=1)
        missed += ((found.joint_low > 0) | (found.joint_high < 0)).any()
        single += ((found.low > 0) | (found.high < 0)).mean()
        assert ((found.p_adjusted < 0.05) <= ((found.joint_low > 0) | (found.joint_high < 0))).all()
    assert missed / 120 < 0.12
    assert 0.02 < single / 120 < 0.09


def test_an_expert_that_never_varies_has_an_interval_without_width():
    task = np.zeros((6, 1, 3))
    base = np.zeros((6, 1, 3))
    task[..., 0], base[..., 1] = 1.0, 1.0
    base[:3, 0, 2] = task[:2, 0, 2] = 0.5
    found = analysis.expert_difference_interval(task, base, resamples=99)
    assert (found.low[0, 0], found.joint_high[0, 0]) == (1, 1)
    assert found.p_adjusted[0, :2].tolist() == [0.01, 0.01]
    assert found.low[0, 2] < found.values[0, 2] < found.high[0, 2]


def test_task_experts_by_the_lower_end(task, general):
    found = analysis.expert_difference_interval(general, general, group="sw", baseline_group="en")
    chosen = analysis.task_experts(
        general, general, group="sw", baseline_group="en", threshold=0.02, lower=True, layers=[0]
    )
    expected = [tuple(cell) for cell in np.argwhere(found.joint_low > 0.02).tolist() if cell[0] == 0]
    assert list(chosen.pairs) == expected
    assert (
        0 < len(chosen) < len(analysis.task_experts(general, general, group="sw", baseline_group="en", threshold=0.02))
    )
    assert "lower end of the joint 95 % interval" in repr(chosen)


def test_resampled_statistics_have_the_frequencies_of_the_drawn_items(general):
    (one,), *_ = resampled_statistics([general], 3, 7)
    items = [Sequences.of_group(general, group, group).items for group in general.groups]
    drawn = draw_together(items, 3, 7)
    for by in ("sequence", "token"):
        expected = [frequency_of(general, g, by, w[0]) for g, w in zip(general.groups, drawn, strict=True)]
        np.testing.assert_allclose(one.frequency(by=by), expected)
    share = one.mean_distribution("count", by="token")
    np.testing.assert_allclose(share[0], expected[0] / 2)
    assert isinstance(one, analysis.inputs.Statistics)
    counts = sum(w * general.store.counts(i, "en") for w, i in zip(drawn[0][0], general.store.items("en"), strict=True))
    np.testing.assert_allclose(one.token_sum("counts")[0], counts)
    assert one.tokens()[0].tolist() == (counts.sum(-1) / 2).tolist()
    for call, message in (
        (lambda: one.frequency("prefill"), "leave phase out"),
        (lambda: one.mean_distribution("full"), 'kind="count"'),
        (lambda: one.token_sum("weight"), "token scores"),
        (lambda: one.frequency(by="word"), "by must be"),
    ):
        with pytest.raises(AnalysisError, match=message):
            call()


def test_intervals_refuse_with_the_mend(task, general):
    array = np.ones((6, 2, 6))
    interval = analysis.expert_difference_interval
    few = statistics_of(random_counts(["a", "b"], "en", TASTE), 2, SIZES)
    pooled = statistics_of(random_counts(ITEMS, "en", TASTE), 2, SIZES)
    pooled.store = None
    cases = [
        (lambda: interval(array[0], array), "single items"),
        (lambda: interval(array[:4], array), "4 items of the task are too few"),
        (lambda: interval(few, general, group="en"), "2 kept items of group 'en' are too few"),
        (lambda: interval(pooled, general, group="en"), r"record\(sequences=True\)"),
        (lambda: interval(general, general), "name the task group"),
        (lambda: interval(general, general, group="bn"), "no task group 'bn'"),
        (lambda: interval(array, array, level=1.0), "level must"),
        (lambda: interval(array, array, resamples=0), "resamples must"),
        (lambda: interval(array, np.ones((6, 3, 6))), "same layers"),
        (lambda: interval(-array, array), "0 or more"),
        (
            lambda: analysis.task_experts(task, general, group="en", threshold=0.1, lower=True, phase="prefill"),
            "leave phase out",
        ),
    ]
    for make, message in cases:
        with pytest.raises(AnalysisError, match=message):
            make()


def test_layers_without_tokens_are_nan():
    array = np.random.default_rng(0).random((8, 2, 4))
    array[:, 1] = 0
    found = analysis.expert_difference_interval(array, array + 0.01, resamples=50)
    assert np.isnan(found.p_adjusted[1]).all()
    assert np.isfinite(found.joint_low[0]).all()


def test_the_result_shows_itself(task, general):
    found = analysis.expert_difference_interval(task, general, group="en", resamples=50)
    frame = found.to_pandas()
    assert len(frame) == 12
    assert frame.loc[3, "difference"] == found.values[0, 3]
    assert "9 and 12 items (0 shared)" in repr(found)
    assert all(float(p) > 0 for row in found.tables()[0].rows for p in row[-2:])  # no p-value is shown as 0
    json.dumps(found.to_dict(), allow_nan=False)


# ---- what else differs, and digits matched


def traced(rng, lengths, share, prefer):
    """A trace of one layer of 4 experts, top-1, of token ids 0 to 9 (digits below 5): expert 3 takes digits."""
    tokens = [np.where(rng.random(n) < share, rng.integers(0, 5, n), rng.integers(5, 10, n)) for n in lengths]
    token = np.concatenate(tokens)
    ids = np.where(token < 5, 3, np.where(rng.random(len(token)) < prefer, 1, 0))
    return mr.Trace(
        layers=("gate",),
        layer_numbers=(2,),
        groups=("en",),
        items=tuple(range(len(lengths))),
        sequence=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        group=np.zeros(len(token), np.int32),
        position=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        token=token.astype(np.int32),
        phase=np.zeros(len(token), np.uint8),
        ids=ids[:, None, None].astype(np.int8),
        weights=np.ones((len(token), 1, 1), np.float32),
    )


CLASSES = ["digit"] * 5 + ["latin"] * 4 + ["punctuation"]


@pytest.mark.parametrize("by", ["token", "sequence"])
def test_matched_digits_are_compared_among_themselves(by):
    rng = np.random.default_rng(0)
    task = traced(rng, [8, 20, 31], 0.6, 0.9)
    plain = traced(rng, [15, 4, 40, 22], 0.1, 0.2)
    found = mr.analysis.task_experts(task, plain, threshold=-2.0, by=by, matched="digits", classes=CLASSES)

    def of_class(trace, digit):
        """Frequencies of the experts at tokens of one class, and the share of the class."""
        rows = [trace.sequence == s for s in range(len(trace.items))] if by == "sequence" else [trace.sequence >= 0]
        kept = [row & ((trace.token < 5) == digit) for row in rows]
        seen = [trace.ids[k, 0, 0] for k in kept if k.any()]
        frequency = np.mean([[np.mean(ids == e) for e in range(4)] for ids in seen], axis=0)
        return frequency, np.mean([k.sum() / row.sum() for k, row in zip(kept, rows, strict=True)])

    expected = np.zeros(4)
    for digit in (True, False):
        frequency, share = of_class(task, digit)
        expected += share * (frequency - of_class(plain, digit)[0])
    scores = found.scores[2]
    np.testing.assert_allclose([scores[e] for e in range(4)], expected, atol=1e-12)
    assert abs(scores[3]) < 1e-12, "the expert of digits is no expert of the task"
    assert scores[1] > 0.2
    unmatched = [np.mean(t.ids == 3) for t in (task, plain)]
    assert unmatched[0] - unmatched[1] > 0.3
    assert f"digits {np.mean(task.token < 5):.1%} / {np.mean(plain.token < 5):.1%}" in found.description
    assert f"tokens per text {59 / 3:.1f} / {81 / 4:.1f}" in found.description


def test_matched_digits_refuse_with_the_mend(task):
    rng = np.random.default_rng(0)
    some, none = traced(rng, [9], 0.5, 0.5), traced(rng, [9], 0.0, 0.5)
    arguments = {"threshold": 0.1, "matched": "digits", "classes": CLASSES}
    with pytest.raises(AnalysisError, match="baseline has no digits"):
        mr.analysis.task_experts(some, none, **arguments)
    with pytest.raises(AnalysisError, match="classes=token_classes"):
        mr.analysis.task_experts(some, none, threshold=0.1, matched="digits")
    with pytest.raises(AnalysisError, match='matched="digits"'):
        mr.analysis.task_experts(some, none, threshold=0.1)
    with pytest.raises(AnalysisError, match="give a Trace"):
        mr.analysis.task_experts(task, task, **arguments)


def test_what_else_differs_is_counted_when_texts_are_recorded():
    language_model = mr.LanguageModel.load()
    tokenizer = language_model.tokenizer
    texts = {"task": ["7 + 12 = 19.", "It is 3, or 4."], "plain": ["She reads a long book, slowly.", "No."]}
    made = []
    with language_model.attach() as routed:
        for name in texts:
            with routed.record() as recorder:
                work = [mr.data.batches.Text("en", str(i), text) for i, text in enumerate(texts[name])]
                for one in work:  # in two calls, whose numbers add up
                    mr.record_texts(recorder, language_model, [one])
            made.append(recorder.statistics())
    expected = {}
    for name, sentences in texts.items():
        ids = [i for text in sentences for i in tokenizer(text)["input_ids"]]
        shown = [tokenizer.decode([i]).strip() for i in ids]
        expected[name] = sum(text.isdigit() for text in shown) / len(ids), len(ids) / len(sentences)
    experts = mr.analysis.task_experts(*made, threshold=0.1)
    assert expected["task"][0] > 0.2
    assert f"digits {expected['task'][0]:.1%} / {expected['plain'][0]:.1%}" in experts.description
    assert f"tokens per text {expected['task'][1]:.1f} / {expected['plain'][1]:.1f}" in experts.description
    both = (made[0] + made[1]).metadata["token_classes"]["en"]
    assert sum(both.values()) == made[0].tokens().max() + made[1].tokens().max()
    risk = mr.analysis.risk_experts(*made, top_n=3)
    assert "what else differs" in risk.activate.description
    made[1].metadata.pop("token_classes")
    assert "digits not recorded" in mr.analysis.task_experts(*made, threshold=0.1).description
