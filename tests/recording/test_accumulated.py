"""What is added up beside the tables of the gate, against plain loops over a trace of the same run."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import inputs, tiny_model, tokens

import moe_route as mr
from moe_route.recording import MergeError, RecordingError, RoutingStatistics, Trace
from moe_route.recording.accumulators import drawn_pairs

ALL = {"consistency": True, "pairs": True, "trace": True, "sequences": True}


def chosen(trace: Trace, token: int, layer: int) -> set[int]:
    return {int(expert) for expert in trace.ids[token, layer] if expert >= 0}


def jaccard(sets: list[set[int]], pairs: Any = None) -> float:
    """Mean over pairs of sets (indices among all of them); pairs with an empty set are left out."""
    pairs = itertools.combinations(range(len(sets)), 2) if pairs is None else pairs
    found = [len(sets[i] & sets[j]) / len(sets[i] | sets[j]) for i, j in pairs if sets[i] and sets[j]]
    return sum(found) / len(found) if found else float("nan")


def by_hand(trace: Trace, segments: list[tuple[int, int]]) -> np.ndarray:
    """Consistency of (sequence, group) segments, [n, L]."""
    values = []
    for sequence, group in segments:
        mine = np.flatnonzero((trace.sequence == sequence) & (trace.group == group))
        layers = range(len(trace.layers))
        values.append([jaccard([chosen(trace, token, layer) for token in mine]) for layer in layers])
    return np.array(values)


def pairs_by_hand(trace: Trace, roles: list[str]) -> tuple[Counter, Counter]:
    within: Counter = Counter()
    across: Counter = Counter()
    for token, layer in itertools.product(range(len(trace)), range(len(trace.layers))):
        group = int(trace.group[token])
        for pair in itertools.product(chosen(trace, token, layer), repeat=2):
            within[(group, layer, *pair)] += 1
        if layer + 1 < len(trace.layers) and roles[layer] == roles[layer + 1]:
            for pair in itertools.product(chosen(trace, token, layer), chosen(trace, token, layer + 1)):
                across[(group, layer, *pair)] += 1
    return within, across


def as_counter(array: np.ndarray) -> Counter:
    return Counter({tuple(map(int, place)): int(array[tuple(place)]) for place in np.argwhere(array)})


def same_as_by_hand(statistics: RoutingStatistics, trace: Trace, routed: mr.RoutedModel) -> None:
    """All arrays of one block of labels are those of plain loops."""
    segments = sorted(set(zip(trace.sequence.tolist(), trace.group.tolist(), strict=True)))
    values, groups = by_hand(trace, segments), np.array([group for _, group in segments])
    for group in range(len(statistics.groups)):
        expected = np.nanmean(values[groups == group], 0) if not np.isnan(values).all() else np.nan
        np.testing.assert_allclose(statistics.consistency()[group], expected, atol=1e-9)
    assert statistics.store is not None
    keys = statistics.store.keys()
    assert len(keys) == len(segments)
    for key, value in zip(keys, values, strict=True):
        np.testing.assert_allclose(statistics.store.consistency(*key), value, atol=1e-12)
    within, across = pairs_by_hand(trace, [router.role for router in routed.routers])
    assert as_counter(statistics.co_selection) == within
    assert as_counter(statistics.transitions) == across
    diagonal = np.diagonal(statistics.co_selection, axis1=2, axis2=3)
    np.testing.assert_array_equal(diagonal, statistics.token_sum("counts"))
    np.testing.assert_array_equal(statistics.co_selection, statistics.co_selection.transpose(0, 1, 3, 2))


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize(
    "name",
    ["qwen3_moe", "gpt_oss", "deepseek_v3", "switch_transformers", "nllb-moe_with_capacity", "jetmoe"],
)
def test_it_is_what_the_trace_gives(name: str, engine: str) -> None:
    model = tiny_model(name)
    given = inputs(name, model, 3, 9)
    with mr.attach(model, engine=engine) as routed, torch.no_grad():
        with routed.record(**ALL) as rec, rec.labels(["x", "y", "x"], items=[1, 2, 3]):
            model(**given, attention_mask=(torch.arange(9) < torch.tensor([[9], [5], [1]])).long())
        same_as_by_hand(rec.statistics(), rec.trace(), routed)


@pytest.fixture(scope="module")
def routed() -> Iterator[mr.RoutedModel]:
    model: Any = tiny_model("qwen3_moe", torch.float64, head=True)  # in float64, so that no choice hangs on rounding
    model.set_experts_implementation("eager")
    with mr.attach(model) as routed, torch.no_grad():
        yield routed


def made(routed: mr.RoutedModel, **more: Any) -> Any:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    return routed.model.generate(**(options | more))


def test_generation_with_padding_and_groups_by_token(routed: mr.RoutedModel) -> None:
    mask = (torch.arange(6) >= torch.tensor([[0], [3]])).long()
    groups = [["a", "a", "b", "b", "b", "a"], ["b", "b", "b", "b", "a", "c"]]
    with routed.record(**ALL) as rec, rec.labels(groups, items=[1, 2]):
        made(routed, inputs=tokens(2, 6) * mask, attention_mask=mask)
    same_as_by_hand(rec.statistics(), rec.trace(), routed)


def test_steering_that_changes_the_number_of_experts(routed: mr.RoutedModel) -> None:
    plan = mr.Plan.top_k(1, layers=[1]).only(groups="x") + mr.Plan.top_k(4, layers=[2])
    with routed.record(**ALL) as rec:
        for number, used in enumerate((None, plan)):
            with rec.labels(["x", "y"], items=[number, number]):
                if used is None:
                    routed.model(tokens(2, 7))
                else:
                    with routed.steer(used):
                        routed.model(tokens(2, 7))
    same_as_by_hand(rec.statistics(), rec.trace(), routed)
    sizes = {len(chosen(rec.trace(), token, layer)) for token in range(28) for layer in (1, 2)}
    assert sizes == {1, 2, 4}


def test_masks_and_pauses(routed: mr.RoutedModel) -> None:
    mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    with routed.record(**ALL, phases=["prefill"]) as rec, rec.labels(["x", "y"], items=[1, 2], count_mask=mask):
        first = routed.model(tokens(2, 4), use_cache=True)
        with rec.pause():
            routed.model(tokens(3, 5, 9))
        routed.model(tokens(2, 3, 2), past_key_values=first.past_key_values)
    same_as_by_hand(rec.statistics(), rec.trace(), routed)


@pytest.mark.parametrize("way", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str)
def test_drafts_count_as_the_text_that_they_become(routed: mr.RoutedModel, way: dict[str, int]) -> None:
    prompt = tokens(1, 4).repeat(1, 3)
    found = []
    for options in ({}, way):
        with routed.record(**ALL) as rec, rec.labels("x", items=[1]):
            made(routed, inputs=prompt, **options)
        same_as_by_hand(rec.statistics(), rec.trace(), routed)
        found.append(rec.statistics())
    assert found[0].accumulated.keys() == found[1].accumulated.keys()
    for name, array in found[0].accumulated.items():
        np.testing.assert_array_equal(found[1].accumulated[name], array)


def recorded(routed: mr.RoutedModel, batches: list[list[int]], **options: Any) -> RoutingStatistics:
    """Six texts of different lengths, in these batches."""
    lengths, texts = [9, 4, 7, 1, 8, 12], tokens(6, 12, 5)
    with routed.record(groups=["x", "y"], sequences=True, **options) as rec:
        for batch in batches:
            longest = max(lengths[i] for i in batch)
            mask = torch.stack([torch.arange(longest) < lengths[i] for i in batch]).long()
            with rec.labels([i % 2 for i in batch], items=batch):
                routed.model(texts[batch, :longest] * mask, attention_mask=mask)
    return rec.statistics()


@pytest.mark.parametrize("consistency", [True, 5])
def test_batches_do_not_matter(routed: mr.RoutedModel, consistency: bool | int) -> None:
    one = recorded(routed, [[i] for i in range(6)], consistency=consistency, pairs=True)
    other = recorded(routed, [[3, 0, 5, 1], [4, 2]], consistency=consistency, pairs=True)
    for name, array in one.accumulated.items():
        np.testing.assert_array_equal(other.accumulated[name], array, err_msg=name)
    assert one.accumulated["consistency_sequences"].tolist() == [[3] * 3, [2] * 3]  # the text of one token has none
    assert one.store is not None
    assert np.isnan(one.store.consistency(3, "y")).all()


def test_drawn_pairs(routed: mr.RoutedModel) -> None:
    with routed.record(consistency=40, sequences=True, trace=True) as rec, rec.labels("x", items=["a", "b"]):
        routed.model(tokens(2, 30))
    trace, statistics = rec.trace(), rec.statistics()
    assert statistics.store is not None
    drawn = {}
    for sequence, item in enumerate(("a", "b")):
        name = f'["{item}",["x"]]'.encode()
        first, second = drawn_pairs(30, 40, name)
        assert (first != second).all()
        drawn[item] = list(zip(first.tolist(), second.tolist(), strict=True))
        mine = np.flatnonzero(trace.sequence == sequence)
        for layer in range(3):
            expected = jaccard([chosen(trace, token, layer) for token in mine], drawn[item])
            assert statistics.store.consistency(item, "x")[layer] == pytest.approx(expected, abs=1e-12)
    assert drawn["a"] != drawn["b"]
    places = np.concatenate(drawn_pairs(7, 70_000, b"x"))
    assert np.bincount(places, minlength=7) == pytest.approx(20_000, rel=0.05)


def test_two_runs_merge_and_parts_are_selected(routed: mr.RoutedModel, tmp_path: Path) -> None:
    options = {"consistency": True, "pairs": True}
    whole = recorded(routed, [[0, 1], [2, 3], [4, 5]], **options)
    parts = [recorded(routed, batches, **options) for batches in ([[4, 5]], [[0, 1], [2, 3]])]
    assert parts[0] + parts[1] == whole
    assert parts[0] != parts[1]
    whole.save(tmp_path / "s.safetensors")
    loaded = RoutingStatistics.load(tmp_path / "s.safetensors")
    assert loaded == whole
    assert loaded.store is not None
    np.testing.assert_array_equal(loaded.store.consistency(2, "x"), whole.store.consistency(2, "x"))  # type: ignore[union-attr]
    some = loaded.select(groups=["y"], layers=[1, 2])
    np.testing.assert_array_equal(some.consistency(), whole.consistency()[1:, 1:])
    np.testing.assert_array_equal(some.co_selection, whole.co_selection[1:, 1:])
    np.testing.assert_array_equal(some.transitions, whole.transitions[1:, 1:])
    np.testing.assert_array_equal(some.store.consistency(1, "y"), whole.store.consistency(1, "y")[1:])  # type: ignore[union-attr]
    for layers in ([0, 2], [1, 0]):
        with pytest.raises(ValueError, match="neighboring layers only"):
            _ = loaded.select(layers=layers).transitions
    assert loaded.select(layers=[1]).transitions.shape == (2, 0, 8, 8)


def test_runs_that_recorded_different_things_do_not_merge(routed: mr.RoutedModel) -> None:
    with_pairs, without = recorded(routed, [[0]], pairs=True), recorded(routed, [[1]])
    with pytest.raises(
        MergeError, match="only one of the two runs recorded pairs=True: record both with the same options"
    ):
        _ = with_pairs + without


def test_what_was_not_recorded_is_named(routed: mr.RoutedModel) -> None:
    statistics = recorded(routed, [[0]])
    assert statistics.accumulated == {}
    with pytest.raises(ValueError, match=r"record\(consistency=True\)"):
        statistics.consistency()
    with pytest.raises(ValueError, match=r"record\(pairs=True\)"):
        _ = statistics.co_selection
    with pytest.raises(ValueError, match=r"record\(sequences=True, consistency=True\)"):
        statistics.store.consistency(0, "x")  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [0, -3, 2.5, "all", None])
def test_a_number_of_pairs_is_checked(routed: mr.RoutedModel, value: Any) -> None:
    with pytest.raises(ValueError, match="number of pairs from 1"):
        routed.record(consistency=value)


def test_arrays_are_checked(routed: mr.RoutedModel) -> None:
    statistics = recorded(routed, [[0]], pairs=True)
    pairs = statistics.co_selection
    with pytest.raises(ValueError, match="unknown array"):
        statistics._with(accumulated={"nothing": pairs})
    with pytest.raises(ValueError, match=r"has shape \[2, 2, 8, 8\], not \[2, 3, 8, 8\]"):
        statistics._with(accumulated={"co_selection": pairs[:, 1:]})
    with pytest.raises(ValueError, match="must hold int64"):
        statistics._with(accumulated={"co_selection": pairs.astype(np.float64)})
    with pytest.raises(RecordingError, match="co_selection holds a negative sum"):
        statistics._with(accumulated={"co_selection": pairs - 1}).verify()
    with pytest.raises(ValueError, match="read-only"):
        pairs[0] = 1


def test_sequences_that_broke_off(routed: mr.RoutedModel) -> None:
    """Their tokens are counted up to the call that failed, and they have no consistency."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with routed.record(**ALL) as rec:
        with rec.labels("x", items=[1]):
            routed.model(tokens(1, 6))
        handle = None
        with pytest.raises(ZeroDivisionError), rec.labels("y", items=[2]):  # noqa: PT012 (the block is left by it)
            first = routed.model(tokens(1, 6), use_cache=True)
            handle = routed.model.model.layers[1].register_forward_hook(fail)
            routed.model(tokens(1, 6, 3), past_key_values=first.past_key_values)
        assert handle is not None
        handle.remove()
        with rec.labels("z", items=[3]):
            routed.model(tokens(1, 5))
    statistics, trace = rec.statistics(), rec.trace()
    assert statistics.accumulated["consistency_sequences"].tolist() == [[1] * 3, [0] * 3, [1] * 3]
    assert np.isnan(statistics.consistency()[1]).all()
    assert as_counter(statistics.co_selection) == pairs_by_hand(trace, ["", "", ""])[0]


def test_a_snapshot_inside_a_block(routed: mr.RoutedModel) -> None:
    with routed.record(consistency=True, pairs=True) as rec, rec.labels("x"):
        routed.model(tokens(2, 6))
        inside = rec.statistics()
    assert np.isnan(inside.consistency()).all()
    assert (np.diagonal(inside.co_selection, axis1=2, axis2=3).sum(-1) == 24).all()
    assert not np.isnan(rec.statistics().consistency()).any()


def test_groups_that_come_later(routed: mr.RoutedModel) -> None:
    names = [f"g{number}" for number in range(11)]
    with routed.record(**ALL) as rec:
        for name in names:
            with rec.labels(name, items=[0]):
                routed.model(tokens(1, 5, len(name)))
    same_as_by_hand(rec.statistics(), rec.trace(), routed)


def test_a_compiled_model() -> None:
    model = tiny_model("olmoe")
    with mr.attach(model) as routed, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        with routed.record(**ALL) as rec, rec.labels(["x", "y"], items=[1, 2]):
            compiled(tokens(2, 6))
        same_as_by_hand(rec.statistics(), rec.trace(), routed)


def test_a_captured_graph_is_refused(routed: mr.RoutedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with routed.record(pairs=True, consistency=True) as rec:
        routed.model(tokens(1, 3))
        monkeypatch.setattr("moe_route.recording.counting.capturing", lambda device: True)
        with pytest.raises(RecordingError, match="consistency=, pairs= is read call by call"):
            rec._counting._note_capture()


def test_the_mean_length_of_a_sequence_is_said(routed: mr.RoutedModel) -> None:
    with routed.record() as rec:
        with rec.labels("x"):
            routed.model(tokens(2, 5))
        assert "x (2 sequences, 10 tokens, 5.0 each)" in repr(rec.statistics())
        assert ">5.0</td>" in rec.statistics()._repr_html_()
        with rec.labels("x"):
            routed.model(tokens(1, 3))
            assert "x (2 sequences, 13 tokens)" in repr(rec.statistics())  # one of them has not ended
