"""Commands around consistency, pairs of experts and special tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness.commands import SMALL, refused

import moe_route as mr


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moe_route.cli import main

    out = tmp_path_factory.mktemp("consistency") / "s.safetensors"
    given = ("--consistency", "--pairs", "--no-special-tokens")
    assert main(["record", "--out", str(out), *given, *SMALL]) == 0
    return out


def test_what_was_asked_for_is_recorded(recorded: Path) -> None:
    statistics = mr.RoutingStatistics.load(recorded)
    assert statistics.accumulated.keys() == {"consistency", "consistency_sequences", "co_selection", "transitions"}
    assert statistics.metadata["masked"] == ["padding", "special tokens"]


def test_special_tokens_are_counted_by_default(answer, recorded: Path, tmp_path: Path) -> None:
    answer("record", "--out", tmp_path / "s.safetensors", *SMALL)
    with_them = mr.RoutingStatistics.load(tmp_path / "s.safetensors")
    assert with_them.accumulated == {}
    difference = with_them.tokens() - mr.RoutingStatistics.load(recorded).tokens()
    assert (difference == 4).all()  # the beginning of each of four sentences


def test_analyze(answer, moe_route, recorded: Path) -> None:
    found = answer("analyze", "layers", recorded, "--of", "consistency")
    values, low, high = (np.array(found[name]) for name in ("values", "low", "high"))
    assert values.shape == (3, 8)
    assert ((low < values) & (values < high)).all()
    assert found["sequences"] == [4, 4, 4]
    code, out, _ = moe_route("analyze", "layers", recorded, "--of", "consistency")
    assert code == 0
    assert "mean Jaccard index" in out


def test_plot(answer, recorded: Path, tmp_path: Path) -> None:
    answer("plot", "consistency", recorded, "--out", tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_bytes().startswith(b"<?xml")


def test_drawn_pairs_and_what_is_refused(answer, moe_route, tmp_path: Path) -> None:
    out = tmp_path / "s.safetensors"
    answer("record", "--out", out, "--consistency", "50", "--no-sequences", *SMALL)
    assert "low" not in answer("analyze", "layers", out, "--of", "consistency")
    answer("record", "--out", out, "--force", *SMALL)
    refused(moe_route("analyze", "layers", out, "--of", "consistency"), "consistency was not recorded")
    assert moe_route("record", "--out", out, "--consistency", "0", *SMALL)[0] == 2
