"""Layers of one run that were recorded apart are joined into what one recording of all of them holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route.recording import MergeError, RoutingStatistics, SequenceStore
from moe_route.recording.trace import Trace


@pytest.fixture(scope="module")
def run() -> tuple[RoutingStatistics, Trace]:
    """Three layers, four sequences of two groups, two without an item."""
    model = tiny_model("qwen3_moe")
    with (
        mr.attach(model) as routed,
        torch.no_grad(),
        routed.record(groups=["a", "b"], sequences=True, trace=True) as rec,
    ):
        for block, items in enumerate((["x", "y"], None)):
            with rec.labels(groups=["a", "b"], items=items):
                model(tokens(2, 6 + block))
    return rec.statistics(), rec.trace()


def part(trace: Trace, layers: list[int]) -> Trace:
    return replace(
        trace,
        layers=tuple(trace.layers[layer] for layer in layers),
        layer_numbers=tuple(trace.layer_numbers[layer] for layer in layers),
        ids=trace.ids[:, layers],
        weights=trace.weights[:, layers],
    )


@pytest.mark.parametrize("cut", [[[0], [1, 2]], [[0, 1], [2]], [[0], [1], [2]], [[0, 1, 2]]])
def test_joined_parts_are_the_whole(run: Any, cut: list[list[int]]) -> None:
    statistics, trace = run
    parts = [statistics.select(layers=layers) for layers in cut]
    found = RoutingStatistics.join_layers(parts)
    assert found == statistics
    assert found.metadata == statistics.metadata
    assert found.store.content_hash() == statistics.store.content_hash()
    assert found.store.keys() == statistics.store.keys()
    joined = Trace.join_layers([part(trace, layers) for layers in cut])
    for name, values in vars(trace).items():
        np.testing.assert_array_equal(getattr(joined, name), values, err_msg=name)


def test_shards_of_parts_may_end_anywhere(run: Any) -> None:
    """A part of few layers keeps more sequences in a shard."""
    store = run[0].store
    whole = list(store.shards())
    assert sum(shard.rows for shard in whole) == 4

    def cut(layers: list[int], ends: list[int]) -> SequenceStore:
        made = SequenceStore([store.layers[n] for n in layers], [store.num_experts[n] for n in layers])
        keys = [key for shard in whole for key in shard.keys]
        arrays = {name: np.concatenate([s.arrays[name] for s in whole])[:, layers] for name in whole[0].arrays}
        for first, end in zip([0, *ends], [*ends, 4], strict=True):
            made.append(keys[first:end], {name: array[first:end] for name, array in arrays.items()})
            made.flush()
        return made

    found = SequenceStore.join_layers([cut([0], [1, 3]), cut([1, 2], [2])])
    assert found.content_hash() == store.content_hash()
    assert found.keys() == store.keys()
    assert found.next_unnamed() not in {item for item, _ in store}


def test_layers_of_different_widths_are_padded() -> None:
    def made(experts: int, layer: str) -> RoutingStatistics:
        counts = np.full((1, 1, experts), 40 // experts)
        return RoutingStatistics.from_token_sums(["a"], counts=counts, tokens=np.array([20]), top_k=2, layers=[layer])

    found = RoutingStatistics.join_layers([made(4, "first"), made(8, "second")])
    assert (found.layers, found.num_experts) == (("first", "second"), (4, 8))
    assert found.token_sum("counts").tolist() == [[[10] * 4 + [0] * 4, [5] * 8]]
    found.verify()


def test_fewer_slots_are_empty(run: Any) -> None:
    trace = run[1]
    narrow = replace(part(trace, [0]), ids=trace.ids[:, :1, :1], weights=trace.weights[:, :1, :1])
    found = Trace.join_layers([narrow, part(trace, [1])])
    assert found.ids.shape == (len(trace), 2, trace.ids.shape[2])
    assert (found.ids[:, 0, 1:] == -1).all()
    assert not found.weights[:, 0, 1:].any()
    np.testing.assert_array_equal(found.ids[:, 1], trace.ids[:, 1])


def test_parts_of_other_runs_are_refused(run: Any) -> None:
    statistics, trace = run
    first, second = statistics.select(layers=[0]), statistics.select(layers=[1])

    def changed(**metadata: Any) -> RoutingStatistics:
        return second._with(metadata={**second.metadata, **metadata})

    for other, words in (
        (first, r"layer .* is in two of the parts"),
        (changed(fingerprint="0" * 32), r"of two runs \(their fingerprint differs\)"),
        (changed(plans=["x"]), r"of two runs \(their plans differs\)"),
        (second.select(groups=["b", "a"]), "different groups"),
        (second._with(store=None), "only one of the parts kept its sequences"),
    ):
        with pytest.raises(MergeError, match=words):
            RoutingStatistics.join_layers([first, other])
    versions = changed(versions={**second.metadata["versions"], "torch": "other"})
    assert "other" in RoutingStatistics.join_layers([first, versions]).metadata["versions"]["torch"]
    with pytest.raises(ValueError, match="a layer is in two"):
        Trace.join_layers([part(trace, [0]), part(trace, [0])])
    with pytest.raises(ValueError, match="different tokens"):
        Trace.join_layers([part(trace, [0]), replace(part(trace, [1]), position=trace.position + 1)])
    with pytest.raises(ValueError, match="different sequences"):
        SequenceStore.join_layers([first.store, SequenceStore(second.layers, second.num_experts)])


def test_accumulated_arrays_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    with mr.attach(model) as routed, torch.no_grad(), routed.record(pairs=True) as rec:
        model(tokens(1, 6))
    made = rec.statistics()
    with pytest.raises(MergeError, match=r"record\(pairs=True\) are not joined"):
        RoutingStatistics.join_layers([made.select(layers=[0]), made.select(layers=[1])])
