"""`moe-route convert`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness.commands import refused

import moe_route as mr


@pytest.fixture
def dump(tmp_path):
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"logical_count": [[[4, 2], [3, 3]]]}))
    return path


def test_reads_shows_and_writes(answer, dump, tmp_path):
    shown = answer("convert", dump, "--top-k", 2)
    assert shown["kind"] == "statistics"
    assert (shown["groups"], shown["experts"], shown["largest_gap"]) == ({"dump": 3}, [2, 2], 0)
    own = tmp_path / "own.safetensors"
    written = answer("convert", dump, "--from", "sglang", "--top-k", 2, "--group", "all", "--out", own)
    assert (written["out"], written["groups"]) == (str(own), {"all": 3})
    answer("convert", own, "--to", "eplb", "--out", tmp_path / "w.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), [[4, 2], [3, 3]])


def test_recordings_of_this_library_are_exported(answer, files, tmp_path):
    found = answer(
        "convert", files["general"], "--to", "eplb", "--groups", "eng_Latn,deu_Latn", "--out", tmp_path / "w.npy"
    )
    weights = np.load(tmp_path / "w.npy")
    assert weights.shape == (len(found["layers"]), found["experts"][0])
    assert answer("convert", files["plan"], "--to", "plan", "--out", tmp_path / "p.json")["kind"] == "plan"


def test_text_says_what_was_read(moe_route, dump):
    code, out, _ = moe_route("convert", dump, "--top-k", 2)
    assert code == 0
    assert "RoutingStatistics: 1 group x 2 layers x 2 experts, top-2" in out
    assert "choices fill the slots of the tokens exactly" in out


def test_formats_are_listed(answer, moe_route):
    listed = answer("convert", "--formats")
    assert {"sglang", "eplb", "replay", "steermoe"} <= set(listed["read"])
    assert {"eplb", "replay", "csv"} <= set(listed["written"])
    assert "vllm-response" in moe_route("convert", "--formats")[1]


def test_bad_input_is_refused(moe_route, dump, tmp_path):
    refused(moe_route("convert"), "no file to read", "--formats")
    refused(moe_route("convert", dump), "pass top_k (--top-k)")
    refused(moe_route("convert", dump, "--from", "eplb"), "check --from, it looks like sglang")
    refused(moe_route("convert", dump, "--top-k", 2, "--to", "epbl"), "no format 'epbl' to write")
    refused(moe_route("convert", dump, "--top-k", 2, "--to", "plan"), "sglang gives no plan")
    refused(moe_route("convert", dump, "--top-k", 2, "--to", "eplb", "--out", tmp_path / "x.txt"), "is written as .npy")
    refused(moe_route("convert", tmp_path / "none.json"), "does not exist")
    refused(moe_route("convert", dump, "--top-k", 4), "not a multiple of top_k 4")


def test_a_selection_becomes_a_plan_of_a_kind(answer, moe_route, tmp_path: Path) -> None:
    selection, plan = tmp_path / "selection.json", tmp_path / "plan.json"
    mr.ExpertSelection({3: [1, 2]}, num_experts=(16,) * 8).save(selection)
    answer("convert", selection, "--to", "plan", "--kind", "force-off", "--out", plan)
    assert mr.Plan.load(plan).rules == mr.Plan.force_off({3: [1, 2]}).rules  # by its own layers, not ESFT's from 1
    code, _, err = moe_route("convert", selection, "--to", "json", "--groups", "a,b", "--out", tmp_path / "s.json")
    assert (code, "json takes no groups=" in err) == (2, True)


def test_sequences_of_several_groups_cannot_be_told_apart_in_a_replay(moe_route, tmp_path: Path) -> None:
    statistics, trace = tmp_path / "s.safetensors", tmp_path / "t.safetensors"
    assert (
        moe_route("record", "--trace", trace, "--out", statistics, "--languages", "eng_Latn,deu_Latn", "--limit", 2)[0]
        == 0
    )
    code, _, err = moe_route("convert", trace, "--to", "replay", "--out", tmp_path / "ids.npz")
    assert (code, "record a trace of each group by itself" in err) == (2, True)
