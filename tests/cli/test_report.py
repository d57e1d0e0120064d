"""`moe-route report`: from a model and texts, from files, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from harness.commands import SMALL, refused

import moe_route as mr


def content(page: Path) -> dict[str, Any]:
    """What a page shows, as its script reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)
    assert found
    shown: dict[str, Any] = json.loads(found[1])
    return shown


def words(shown: dict[str, Any], trace: int, group: str) -> str:
    """The first text of a group, put together from its tokens."""
    texts = shown["traces"][trace]["texts"]
    return "".join(next(text for text in texts if text["group"] == group)["pieces"])


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from moe_route.cli import main

    folder = tmp_path_factory.mktemp("trace")
    path = folder / "trace.safetensors"
    assert main(["record", "--out", str(folder / "again.safetensors"), "--trace", str(path), *SMALL]) == 0
    return path


def test_a_model_is_recorded_and_shown_with_its_texts(answer, tmp_path: Path):
    page = tmp_path / "report.html"
    found = answer("report", *SMALL, "--trace-items", 2, "--title", "Three languages", "--out", page)
    assert found["out"] == str(page)
    assert found["bytes"] == page.stat().st_size
    assert (found["recordings"], found["traces"]) == (["natural"], ["natural"])
    shown = content(page)
    assert shown["title"] == "Three languages"
    assert len(shown["traces"][0]["texts"]) == 2 * 3
    sentence = mr.data.demo_corpus()["deu_Latn"][0]
    assert sentence in words(shown, 0, "deu_Latn")


def test_under_a_plan_both_recordings_are_shown(answer, files, tmp_path: Path):
    page = tmp_path / "report.html"
    found = answer("report", *SMALL, "--trace-items", 1, "--plan", files["plan"], "--out", page)
    assert found["recordings"] == found["traces"] == ["natural", "steered"]
    shown = content(page)
    plans = {name: of["facts"]["plans"] for name, of in shown["recordings"].items()}
    assert plans == {"natural": [], "steered": [mr.Plan.load(files["plan"]).hash]}
    assert words(shown, 0, "swh_Latn") == words(shown, 1, "swh_Latn")


def test_files_of_every_kind_are_told_apart_by_their_content(answer, files, trace: Path, tmp_path: Path):
    scores, results, page = tmp_path / "accuracy.tsv", tmp_path / "results", tmp_path / "report.html"
    scores.write_text("eng_Latn\t0.8\ndeu_Latn\t0.5\nswh_Latn\t0.4\n")
    (results / "report").mkdir(parents=True)  # as `moe-route eval` leaves it
    table = {"title": "Effect", "columns": ["language", "change"], "rows": [["eng_Latn", -0.5]]}
    (results / "report" / "tables.json").write_text(json.dumps({"tables": [table]}))
    given = (files["general"], files["task"], trace, files["plan"], scores, results)
    found = answer("report", *given, "--tokenizer", "demo", "--reference", "deu_Latn", "--out", page)
    assert found["recordings"] == ["general", "task"]
    assert (found["traces"], found["plans"]) == (["trace"], ["plan"])
    assert (found["scores"], found["results"]) == (["accuracy"], ["Effect"])
    shown = content(page)
    assert {of["reference"] for of in shown["recordings"].values()} == {"deu_Latn"}
    assert mr.data.demo_corpus()["eng_Latn"][0] in words(shown, 0, "eng_Latn")


def test_what_a_page_cannot_show_is_said_with_the_option_that_adds_it(moe_route, files, trace: Path, tmp_path: Path):
    page = tmp_path / "report.html"
    code, out, _ = moe_route("report", files["general"], "--out", page)
    assert code == 0
    assert "record --trace" in out
    code, out, _ = moe_route("report", trace, "--out", page)
    assert code == 0
    assert "--tokenizer" in out
    assert "record --trace" not in out
    code, out, _ = moe_route("report", trace, "--tokenizer", "demo", "--out", page)
    assert code == 0
    assert out.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    [
        ("--plan", "plan.json"),
        ("--trace-items", 2),
        ("--data", "arithmetic"),
        ("--languages", "eng_Latn"),
        ("--limit", 4),
        ("--batch-size", 4),
        ("--max-length", 8),
        ("--engine", "fused"),
        ("--dtype", "bfloat16"),
        ("--device", "cpu"),
    ],
)
def test_options_of_a_recording_are_refused_beside_files(moe_route, files, tmp_path: Path, option: tuple[str, object]):
    page = tmp_path / "report.html"
    refused(moe_route("report", files["general"], "--out", page, *option), option[0], "leave it out")
    assert not page.exists()


def test_what_cannot_be_shown_is_refused_with_the_fix(moe_route, files, tmp_path: Path):
    page = tmp_path / "report.html"
    refused(moe_route("report", "--tokenizer", "demo", "--out", page), "--tokenizer", "leave it out")
    refused(moe_route("report", files["general"], "--out", tmp_path / "report.txt"), "report.txt", ".html")
    refused(moe_route("report", files["general"], "--out", tmp_path / "no" / "report.html"), "make it first")
    refused(moe_route("report", tmp_path / "missing.safetensors", "--out", page), "check the name")
    refused(moe_route("report", tmp_path, "--out", page), "tables.json")
    refused(moe_route("report", files["general"], "--reference", "xho_Latn", "--out", page), "xho_Latn", "eng_Latn")
    assert not page.exists()
