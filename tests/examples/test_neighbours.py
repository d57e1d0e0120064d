"""Scripts that reproduce results of neighbouring systems: a short form runs, and pages show the committed results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the scripts train models of transformers")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "neighbours"
if not FOLDER.is_dir():
    pytest.skip("examples/neighbours is not here (a source checkout has it)", allow_module_level=True)


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_upcycling_in_a_short_form(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- upcycling: begin -->\nold\n<!-- upcycling: end -->\nafter\n")
    options = ["--steps", "3", "--seeds", "2", "--out", str(tmp_path / "out.json"), "--page", str(page)]
    command = [sys.executable, str(FOLDER / "upcycling.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    results = json.loads((tmp_path / "out.json").read_text())
    for seeds in results["settings"].values():
        assert len(seeds) == 2
        for seed in seeds:
            assert seed["by label, k = 1"]["own"] == 1
            assert seed["by label, k = 1"]["flops"] < 1.01 * seed["dense"]["flops"]
            assert 0 < seed["rules"]["loss"] < seed["dense"]["loss"] < 5
    assert page.read_text() == f"before\n<!-- upcycling: begin -->\n{done.stdout}<!-- upcycling: end -->\nafter\n"


def test_the_page_shows_the_committed_results() -> None:
    upcycling = script("upcycling")
    results = json.loads((FOLDER / "results" / "upcycling.json").read_text())
    assert len(next(iter(results["settings"].values()))) == 3
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = page.split(upcycling.BEGIN)[1].split(upcycling.END)[0].strip()
    assert shown == upcycling.tables(results)
