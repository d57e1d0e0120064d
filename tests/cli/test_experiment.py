"""`moe-route experiment`: its answers as text and JSON, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.commands import refused

import moe_route as mr
from moe_route.cli import main
from moe_route.runs import lines

pytest.importorskip("transformers")

SMALL = ("--languages", "eng_Latn,swh_Latn", "--limit", "3")
PROMPT = "{} said that"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    try:
        code = main(["experiment", *map(str, arguments)])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def test_knockout(capsys):
    found = answer(capsys, "knockout", *SMALL, "--layers", "5")
    assert found["groups"] == ["eng_Latn", "swh_Latn"]
    assert found["total"][0][0][0] is None
    assert sum(value is not None for value in found["total"][0][5]) == 16
    assert found["agreement"]["metrics"] == ["frequency"]


def test_regret(capsys):
    found = answer(capsys, "regret", *SMALL, "--routes", "2", "--temperature", "0.1", "--layers", "2-5", "--seed", "3")
    assert (found["routes"], found["temperature"], found["layers"]) == (2, 0.1, [2, 3, 4, 5])
    assert len(found["regret"]) == 2


def test_transplant(capsys):
    bands = ("--band", "middle=2-5", "--band", "last=6,7")
    found = answer(capsys, "transplant", *SMALL, "--kinds", "own,choice", "--donor", "demo", *bands)
    assert found["routes"] == ["own", "choice", "donor"]
    assert found["bands"] == ["all", "middle", "last"]
    assert found["effect"][1][0] == found["effect"][1][2] == [0, 0, 0]  # the donor is the same model
    assert found["effect"][1][1][0] > 0


def test_patch(capsys, tmp_path: Path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(f"{PROMPT.format('Mary')}\t{PROMPT.format('Tom')}\t she\t he\n\n")
    found = answer(capsys, "patch", "--pairs", pairs, "--positions", "last", "--layers", "6")
    assert found["pairs"] == [1]
    assert [len(layer) for layer in found["restored"][0]] == [16] * 8
    code, out, _ = run(capsys, "patch", "--pairs", pairs, "--weight", "own", "--layers", "6")
    assert code == 0
    assert "Share of the contrast" in out


@pytest.mark.parametrize("name", ["knockout", "patch", "prune"])
def test_goes_on_in_its_folder_after_an_interrupt(name: str, tmp_path: Path, monkeypatch, moe_route, files):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{PROMPT.format(one)}\t{PROMPT.format('Tom')}\t she\t he\n" for one in ("Mary", "Tom")))
    small = (*SMALL, "--batch-size", "4")
    words = {
        "knockout": ("experiment", name, *small, "--layers", "5"),
        "patch": ("experiment", name, "--pairs", pairs, "--layers", "6"),
        "prune": (name, files["general"], "--measure", "--keep", "0.5", "--criterion", "frequency,random", *small),
    }[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert moe_route(*words, "--out", whole)[0] == 0
    kept, calls = (whole / "runs" / "runs.jsonl").read_text().splitlines(), []
    append = lines.files.append

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == len(kept):  # the last run
            raise KeyboardInterrupt
        append(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lines.files, "append", interrupted)
        assert moe_route(*words, "--out", cut)[0] != 0
    assert not (cut / "result.json").exists()
    with open(cut / "runs" / "runs.jsonl", "a") as stream:
        stream.write(kept[-1][:20])  # a line without its end
    code, out, _ = moe_route(*words, "--out", cut)
    assert code == 0
    assert f"resumed: {len(kept) - 2} runs were there" in out  # one line is of the weights
    for made in ("result.json", "result.csv", "runs/runs.jsonl"):
        assert (cut / made).read_bytes() == (whole / made).read_bytes()
    refused(moe_route(*words, "--seed", "3", "--out", cut), "seed: 0 there, 3 now", "--force")
    with monkeypatch.context() as patch:
        patch.setattr(lines, "weights_hash", lambda model: "00" * 32)  # a folder that was trained on
        refused(moe_route(*words, "--out", cut), "other weights", "--force")
    refused(moe_route("upcycle", "demo", "--languages", "eng_Latn,swh_Latn", "--out", cut), words[0])


@pytest.mark.parametrize("out", ["table.csv", "table.parquet", "folder"])
def test_a_table_without_pandas_is_refused_before_the_work(out: str, tmp_path: Path, monkeypatch, moe_route):
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(mr.LanguageModel, "load", load)
    monkeypatch.setitem(sys.modules, "pandas", None)
    refused(moe_route("experiment", "knockout", *SMALL, "--out", tmp_path / out), "moe-route[analysis]")
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("knockout", *SMALL, "--layers", "9"), "8 MoE layers"),
        (("regret", *SMALL, "--routes", "1"), "at least 2"),
        (("transplant", *SMALL, "--kinds", "mean"), "kinds are"),
        (("transplant", *SMALL, "--band", "2-5"), "has no name"),
        (("patch", "--pairs", "missing.tsv"), "missing.tsv"),
    ],
)
def test_refused(capsys, arguments, words):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_files_are_read_before_the_model_is_loaded(capsys):
    for arguments in (("patch", "--pairs", "missing.tsv"), ("knockout", "--data", "missing.tsv")):
        code, _, err = run(capsys, *arguments, "--model", "no/such/model")
        assert code == 2
        assert err.startswith("moe-route: ")
        assert "missing.tsv does not exist: check the name" in err
        assert err.count("\n") == 1


def test_a_line_of_pairs_needs_four_cells(capsys, tmp_path: Path):
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("clean\tcorrupt\n")
    code, _, err = run(capsys, "patch", "--pairs", pairs)
    assert code == 2
    assert "line 1" in err
