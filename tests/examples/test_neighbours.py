"""Scripts that reproduce results of neighbouring systems: a short form runs, and pages show the committed results."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.routing_data import FOLDER as DATA
from harness.routing_data import needs_data

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
    sys.path.insert(0, str(FOLDER))  # a script imports its neighbors
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def short_form(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """The results of a short form, which it also wrote between the marks of a page."""
    module = script(name)
    page = folder / "page.md"
    begin, end = MARKS[name](module)
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options, "--out", str(folder / "out.json")]
    done = subprocess.run([*command, "--page", str(page)], capture_output=True, text=True, check=True, cwd=ROOT)
    assert page.read_text() == f"before\n{begin}\n{done.stdout}{end}\nafter\n"
    results: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return results


@pytest.mark.exhaustive
def test_upcycling_in_a_short_form(tmp_path: Path) -> None:
    results = short_form("upcycling", tmp_path, "--steps", "3", "--seeds", "2")
    for seeds in results["settings"].values():
        assert len(seeds) == 2
        for seed in seeds:
            assert seed["by label, k = 1"]["own"] == 1
            assert seed["by label, k = 1"]["flops"] < 1.01 * seed["dense"]["flops"]
            assert 0 < seed["rules"]["loss"] < seed["dense"]["loss"] < 5


@pytest.mark.exhaustive
def test_upcycling_of_text_in_a_short_form(tmp_path: Path) -> None:
    options = ("--steps", "2", "--seeds", "2", "--picture", str(tmp_path / "experts.png"))
    results = short_form("upcycling_text", tmp_path, *options)
    assert results["text"] == "the shipped corpus"
    assert (tmp_path / "experts.png").stat().st_size > 10_000
    ways = script("upcycling_text").WAYS
    for seed in results["seeds"]:
        for name, way in ways.items():
            found = seed[name]
            assert len(found["languages"]) == 10
            assert len(found.get("divergence", [])) == way.layers
            assert found["flops"] == pytest.approx(1, abs=0.02) if way.top_k < 2 else found["flops"] > 1.1
            if way.label:
                assert found["own"] == 1
        before = seed["upcycled, k = 2, all 6 layers, before"]
        assert before["loss"] == pytest.approx(seed["dense, before"]["loss"], abs=1e-5)
    first, second = results["seeds"]
    assert first["dense"]["loss"] != second["dense"]["loss"]


def test_spread_and_costs_of_upcycling_text() -> None:
    module = script("upcycling_text")
    assert module.spread([0.1, 0.2, 0.5, 0.5, 0.4, 0.6]) == pytest.approx(0.35)
    dense = module.flops(100)
    assert module.flops(100, 2, 2) - dense == 2 * module.HIDDEN * (3 * module.INTERMEDIATE + 5)


@pytest.mark.exhaustive
def test_similarity_in_a_short_form(tmp_path: Path) -> None:
    results = short_form("similarity", tmp_path, "--permutations", "99", "--picture", str(tmp_path / "trees.png"))
    ours = results["the shipped model"]
    assert "published" not in results
    assert "genetic" not in ours
    assert (tmp_path / "trees.png").stat().st_size > 10_000
    assert len(ours["script"]) == len(ours["layers"]) == 9
    assert all(row["low"] <= row["pearson"] <= row["high"] for row in ours["script"])
    assert ours["script"][0]["pearson"] > 0.8  # the embedding knows scripts
    assert ["jpn_Jpan", "zho_Hans"] in ours["clusters"]


@needs_data
def test_relatives_are_nearest_in_the_published_similarities() -> None:
    module = script("similarity")
    assert DATA is not None
    results, named = module.published(DATA / "mplm_sim", 19)
    assert all(results["Glot500, layer 6"]["nearest"].values())
    assert results["Glot500, layer 6"]["pearson"] == pytest.approx(0.4463, abs=1e-4)
    assert len(named.groups) == 24


@pytest.mark.exhaustive
def test_language_experts_in_a_short_form(tmp_path: Path) -> None:
    results = short_form("language_experts", tmp_path, "--draws", "1")
    rules = results["rules"]
    assert list(rules) == ["equal numbers", "LAPE, 1% of experts", "LAPE, 10% of experts"]
    assert len(rules["equal numbers"]) == 10
    assert list(rules["LAPE, 1% of experts"]) == ["arb_Arab"]  # 1 of 128 experts
    for found in rules.values():
        for row in found.values():
            own, low, high = row["own"]
            assert low < own < high
            assert row["p"] in (0.5, 1)
    hit = [code for code, row in rules["equal numbers"].items() if max(row["row"]) == row["own"][0]]
    assert len(hit) == 9


@pytest.mark.exhaustive
def test_alignment_in_a_short_form(tmp_path: Path) -> None:
    results = short_form("alignment", tmp_path, "--steps", "3", "--seeds", "1")
    (dense,), (sparse,) = results["models"]["dense"], results["models"]["sparse"]
    assert [len(found["loss"]) for found in (dense, sparse)] == [6, 6]
    assert "routing" in sparse
    assert "routing" not in dense
    assert all(0 <= value <= 1 for found in (dense, sparse) for value in found["mexa"])


@pytest.mark.exhaustive
def test_swapping_in_a_short_form(tmp_path: Path) -> None:
    (seed,) = short_form("swapping", tmp_path, "--steps", "1", "--seeds", "1")["seeds"]
    assert len(seed) == 10
    shipped = seed.pop("the shipped model")
    assert shipped["match"] > 0.5
    assert all(found["answer"] != shipped["answer"] for found in seed.values())  # one step moves every model


@pytest.mark.exhaustive
def test_adapters_in_a_short_form(tmp_path: Path) -> None:
    (seed,) = short_form("adapters", tmp_path, "--steps", "3", "--seeds", "1")["seeds"]
    shipped = seed.pop("the shipped model")
    assert all(found["loss"] != shipped["loss"] for found in seed.values())  # three steps move every model
    mixed = [seed[name]["trainable"] for name in script("adapters").MIXED]
    assert len(set(mixed)) == 1
    large, shards, small = (seed[name]["trainable"] for name in script("adapters").SHARED)
    assert large == 8 * shards == 8 * small


MARKS: dict[str, Callable[[Any], tuple[str, str]]] = {
    "upcycling": lambda module: (module.BEGIN, module.END),
    "upcycling_text": lambda module: (module.BEGIN, module.END),
    "similarity": lambda module: (module.FIRST, module.LAST),
    "language_experts": lambda module: (module.FIRST, module.LAST),
    "alignment": lambda module: (module.FIRST, module.LAST),
    "swapping": lambda module: (module.BEGIN, module.END),
    "adapters": lambda module: (module.BEGIN, module.END),
}
SHOWN = {
    "upcycling": "training.md",
    "upcycling_text": "training.md",
    "similarity": "groups.md",
    "language_experts": "find-experts.md",
    "alignment": "groups.md",
    "swapping": "merging.md",
    "adapters": "training.md",
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_page_shows_the_committed_results(name: str) -> None:
    module = script(name)
    results = json.loads((FOLDER / "results" / f"{name}.json").read_text())
    if name not in ("similarity", "language_experts"):  # one model, no seeds
        seeds = next(iter((results.get("settings") or results.get("models") or {"": results.get("seeds")}).values()))
        assert len(seeds) == 3
    page = (ROOT / "docs" / SHOWN[name]).read_text(encoding="utf-8")
    begin, end = MARKS[name](module)
    shown = page.split(begin)[1].split(end)[0].strip()
    assert shown == (module.tables if name.startswith("upcycling") else module.table)(results)
