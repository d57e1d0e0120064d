"""Figures of sweeps and overlaps: what is drawn is what was found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from moe_route import analysis, plots
from moe_route.analysis import Sweep
from moe_route.steering import ExpertSelection


@pytest.fixture
def sweep():
    return Sweep(
        thresholds=(0.1, 0.2, 0.3),
        task=np.array([[4, 2, 3], [2, 0, 1], [1, 0, 0]]),
        multilingual=np.array([[5, 1, 2], [2, 1, 1], [0, 1, 0]]),
        both=np.array([[3, 0, 1], [1, 0, 0], [0, 0, 0]]),
        expected=np.array([1.5, 0.5, 0.1]),
        p_more=np.ones(3),
        p_fewer=np.ones(3),
        separate_from=0.26,
        layers=(0, 2),
    )


def rendered(ax):
    ax.figure.canvas.draw()
    return bytes(ax.figure.canvas.buffer_rgba())


def test_a_sweep_by_layer_and_threshold(sweep):
    ax = plots.sweep(sweep, of="both", title="overlap")
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[3, 1], [1, np.nan], [np.nan, np.nan]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "2"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.1", "0.2", "0.3"]
    assert rendered(ax)
    with pytest.raises(ValueError, match="of must be"):
        plots.sweep(sweep, of="none")


def test_sweep_overlap(sweep):
    ax = plots.sweep_overlap(sweep)
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert lines["task experts"].tolist() == [9, 3, 1]
    assert lines["both"].tolist() == [4, 1, 0]
    assert lines["both, by chance"].tolist() == [1.5, 0.5, 0.1]
    assert ax.get_lines()[-1].get_xdata() == [0.26, 0.26]
    assert rendered(ax)


@pytest.mark.parametrize(("first", "shown"), [(0.2904, "0.291"), (0.3, "0.3"), (0.2900001, "0.291"), (0.0, "0")])
def test_the_threshold_without_overlap_is_not_rounded_down(sweep, first: float, shown: str):
    """At a threshold that is smaller than the last difference, an expert is still in both sets."""
    title = plots.sweep_overlap(replace(sweep, separate_from=first)).get_title()
    assert f"no expert in both sets from {shown} on" in " ".join(title.split())


def test_overlap_of_selections():
    sets = {name: ExpertSelection({0: ids}, num_experts=[8]) for name, ids in (("a", [1, 2]), ("b", [2]), ("c", []))}
    found = analysis.overlap(sets)
    ax = plots.overlap(found)
    assert sorted({text.get_text() for text in ax.texts}) == ["0.00", "0.50"]
    assert rendered(ax)
    assert "1.00" in {text.get_text() for text in plots.overlap(found, of="containment").texts}
    with pytest.raises(ValueError, match="of must be"):
        plots.overlap(found, of="cosine")
