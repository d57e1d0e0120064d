"""Commands about which experts matter: saliency, super experts, pruning and its export, geometry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from harness.commands import SMALL, refused

pytest.importorskip("transformers")

from moe_route import analysis
from moe_route.cli import main
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan, PlanModel


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "general.safetensors"
    assert main(["record", "--expert-outputs", "--hidden", "--out", str(path), *SMALL, "--limit", "5"]) == 0
    return path


def test_saliency_and_super_experts(answer, moe_route, recorded: Path) -> None:
    found = answer("analyze", "saliency", recorded, "--pool")
    want = analysis.saliency(RoutingStatistics.load(recorded), pool=True)
    np.testing.assert_array_equal(np.array(found["saliency"], dtype=float), want.values)
    assert "most salient" in moe_route("analyze", "saliency", recorded)[1]
    found = answer("analyze", "experts", recorded, "--rule", "super", "--quantile", 0.9)
    assert found["super_experts"]
    assert all(expert["peak"] > found["threshold"] for expert in found["super_experts"])
    refused(moe_route("analyze", "experts", recorded, "--rule", "super", "--share", 2), "share")


def test_super_experts_of_some_groups_are_written(answer, recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "super.safetensors"
    answer("analyze", "experts", recorded, "--rule", "super", "--quantile", 0.9, "--group", "deu_Latn", "--out", out)
    statistics = RoutingStatistics.load(recorded)
    assert ExpertSelection.load(out) == analysis.super_experts(statistics, quantile=0.9, groups=["deu_Latn"]).selection
    found = answer("analyze", "saliency", recorded, "--groups", "deu_Latn")
    assert found["groups"] == ["deu_Latn"]


def test_what_was_not_recorded_is_named_as_an_option(moe_route, tmp_path: Path, recorded: Path) -> None:
    sums = tmp_path / "sums.safetensors"
    assert moe_route("record", "--no-sequences", "--out", sums, *SMALL)[0] == 0
    refused(moe_route("analyze", "saliency", sums), "moe-route record --expert-outputs")
    refused(moe_route("analyze", "pairs", sums), "moe-route record --pairs")
    refused(moe_route("analyze", "similarity", sums), "without --no-sequences")
    refused(moe_route("analyze", "saliency", sums, recorded), "expert_outputs=True, hidden=True", "same options")
    refused(moe_route("prune", recorded, "--keep", 0.5, "--criterion", "difference"), "(--reference)")
    refused(moe_route("prune", recorded, "--keep", 0.01), "leaves 1 expert in layer 0")


def test_prune_to_a_smaller_checkpoint(answer, moe_route, recorded: Path, tmp_path: Path) -> None:
    dropped, plan, folder = tmp_path / "dropped.safetensors", tmp_path / "plan.json", tmp_path / "smaller"
    found = answer("prune", recorded, "--keep", 0.5, "--selection", dropped, "--resamples", 5)
    selection = ExpertSelection.load(dropped)
    assert found["dropped"]["experts"] == selection.to_dict()["experts"]
    assert found["stability"]["resamples"] == 5
    answer("plan", "make", "forbid", dropped, "--out", plan)
    assert Plan.load(plan) == Plan.forbid(selection)
    written = answer("prune", dropped, "--out", folder)
    assert written["dropped"]["experts"] == selection.to_dict()["experts"]
    assert written["bytes"] == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    small = ("--languages", "eng_Latn", "--limit", 4)
    smaller = answer("record", folder, "--out", tmp_path / "s.safetensors", *small)
    assert set(smaller["experts"]) == {8}
    refused(moe_route("prune", recorded, "--keep", 0.75, "--out", folder), "--force")
    model = PlanModel(None, "0" * 64, selection.num_experts)
    ExpertSelection(selection, num_experts=selection.num_experts, model=model).save(dropped)
    other = ("prune", dropped, "--out", tmp_path / "other")
    refused(moe_route(*other), "made for another model (configuration", "--any-model")
    assert answer(*other, "--any-model")["bytes"] == written["bytes"]
    refused(moe_route("prune", recorded, "--keep", 0.01), "keep at least")


def test_a_pruning_curve(answer, moe_route, recorded: Path) -> None:
    small = ("--languages", "eng_Latn", "--limit", 2)
    options = ("--measure", "--criterion", "reap,random", "--keep", "0.75,0.5")
    found = answer("prune", recorded, *options, *small)
    assert np.shape(found["loss"]) == (2, 2, 1)
    code, _, err = moe_route("prune", recorded, "--keep", "half")
    assert code == 2
    assert "list of numbers" in err


def test_geometry(answer, moe_route, recorded: Path, files: dict[str, Path]) -> None:
    found = answer("analyze", "geometry", recorded, "--weights")
    assert found["groups"] == ["deu_Latn", "swh_Latn"]
    assert 0 < found["row_share"][0][0] < 1
    assert "row_share" not in answer("analyze", "geometry", recorded)
    refused(moe_route("analyze", "geometry", files["general"]), "hidden=True")
    refused(moe_route("analyze", "saliency", files["general"]), "expert_outputs=True")
