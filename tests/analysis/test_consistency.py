"""Consistency by group and layer, with an interval over sequences, and how it is shown and drawn."""

from __future__ import annotations

from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
import torch
from harness.stub_model import StubModel

from moe_route import analysis, plots, recording
from moe_route.recording import RoutingStatistics

mpl.use("Agg")


@pytest.fixture(scope="module")
def recorded() -> tuple[RoutingStatistics, recording.Trace]:
    model, draw = StubModel([16] * 8), torch.Generator().manual_seed(0)
    with recording.Recorder(model, consistency=True, sequences=True, trace=True) as recorder:
        for group in ("eng_Latn", "swh_Latn"):
            with recorder.labels(group, items=range(5)):
                model(recorder, [torch.randn(5, 12, 16, generator=draw) for _ in range(8)])
    return recorder.statistics(), recorder.trace()


def test_by_group_and_layer(recorded) -> None:
    statistics, trace = recorded
    found = analysis.consistency(statistics)
    assert (found.groups, found.values.shape) == (("eng_Latn", "swh_Latn"), (2, 8))
    assert found.sequences.tolist() == [5, 5]
    for group, layer in ((0, 0), (1, 5)):
        values = []
        for sequence in np.unique(trace.sequence[trace.group == group]):
            ids = trace.ids[trace.sequence == sequence, layer]
            sets = [set(row.tolist()) for row in ids]
            values.append(np.mean([len(a & b) / len(a | b) for a, b in combinations(sets, 2)]))
            assert analysis.consistency(ids) == pytest.approx(values[-1], abs=1e-6)
        assert found.values[group, layer] == pytest.approx(np.mean(values), abs=1e-9)
        np.testing.assert_allclose(found.sequence_values[group][:, layer], values, atol=1e-12)
    one = analysis.consistency(statistics, groups=["swh_Latn"])
    np.testing.assert_array_equal(one.values, found.values[1:])


def test_interval(recorded) -> None:
    found = analysis.consistency(recorded[0])
    low, high = found.interval(0.9)
    assert ((low < found.values) & (found.values < high)).all()
    wide_low, wide_high = found.interval(0.99)
    assert ((wide_low <= low) & (high <= wide_high)).all()
    for ends, again in zip(found.interval(0.9), (low, high), strict=True):
        np.testing.assert_array_equal(ends, again)


def test_without_single_sequences(recorded) -> None:
    statistics = recorded[0]._with(store=None)
    found = analysis.consistency(statistics)
    assert found.sequence_values is None
    assert "low" not in found.to_dict()
    with pytest.raises(analysis.AnalysisError, match="sequences=True"):
        found.interval()


def test_shown(recorded) -> None:
    found = analysis.consistency(recorded[0])
    assert found.tables()[0].head[:3] == ["layer", "sequences", "0"]
    assert "95 % intervals up to" in repr(found)
    frame = found.to_pandas()
    assert list(frame.columns) == ["group", "layer", "router", "consistency", "low", "high"]
    assert len(frame) == 16
    assert frame.loc[(frame.group == "swh_Latn") & (frame.layer == 3), "consistency"].item() == found.values[1, 3]
    assert np.array(found.to_dict()["values"]).shape == (2, 8)


def test_undefined_values_are_shown_as_such() -> None:
    found = analysis.Consistency(
        np.array([[np.nan, 0.5]]), ("x",), ("a", "b"), np.array([1]), (np.array([[np.nan, 0.5]]),)
    )
    assert found.to_dict()["values"] == [[None, 0.5]]
    assert found.to_dict()["low"] == [[None, None]]  # one sequence has no interval
    assert "intervals" not in repr(found)


def test_drawn(recorded) -> None:
    found = analysis.consistency(recorded[0])
    ax = plots.consistency(found, interval=0.95, labels={"eng_Latn": "English"}, title="T")
    order = np.argsort(-found.values.mean(1))
    assert [line.get_label() for line in ax.lines] == [("English", "Swahili")[i] for i in order]
    for line, row in zip(ax.lines, order, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), found.values[row])
    assert len(ax.collections) == 2
    assert ax.get_title() == "T\nbands: 95 % interval, bootstrap over 5 sequences per group"


def test_what_cannot_be_answered(recorded) -> None:
    statistics = recorded[0]
    with pytest.raises(analysis.AnalysisError, match="xxx"):
        analysis.consistency(statistics, groups=["xxx"])
    with pytest.raises(ValueError, match=r"record\(consistency=True\)"):
        analysis.consistency(statistics._with(accumulated={}))
