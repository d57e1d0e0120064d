"""`moe-route merge` on tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import tiny_models

from moe_route import merging
from moe_route.cli import main
from moe_route.cli.models import _SWAPS, _TAKES
from moe_route.steering import ExpertSelection

pytest.importorskip("transformers", reason="needs the extra hf")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """base, and two fine-tunes of it."""
    root = tmp_path_factory.mktemp("checkpoints")
    for number in range(3):
        model = tiny_models.tiny_model("qwen3_moe", head=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 0.1 * number
        model.save_pretrained(root / str(number))
    return [str(root / str(number)) for number in range(3)]


def test_the_options_are_those_of_the_methods():
    methods = {name: set(options) for name, options in merging.METHODS.items()}
    assert {name: takes for name, takes in _TAKES.items() if name not in (*_SWAPS, "difference")} == methods


def test_methods_and_swaps_write_what_python_writes(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base, a, b = folders
    selection = ExpertSelection({0: [1]})
    selection.save(tmp_path / "s.json")
    for words, expected in (
        (["--method", "linear", "--weights", "0.5,0.5"], merging.merge([a, b])),
        (["--method", "widen", "--base", base], merging.merge([a, b], base=base, method="widen")),
        (
            ["--method", "layers", "--bottom", "1", "--top", "0"],
            merging.swap_layers(task=a, language=b, bottom=1, top=0),
        ),
        (
            ["--method", "experts", "--selection", str(tmp_path / "s.json"), "--router", "expert"],
            merging.swap_experts(a, b, selection, router="expert"),
        ),
    ):
        out = tmp_path / words[1]
        assert main(["merge", a, b, *words, "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["out"] == str(out)
        assert merging.Checkpoint(out).sha256() == expected.sha256()


def test_the_difference_is_printed_and_drawn(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base, a, _ = folders
    picture = tmp_path / "change.png"
    assert main(["merge", a, "--base", base, "--method", "difference", "--picture", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(value == pytest.approx(0.1, rel=1e-4) for value in found["by_layer"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "widen", "--out", "x"], "name base="),
        (["--method", "linear"], "--out FOLDER"),
        (["--density", "0.5", "--out", "x"], "does not read --density"),
        (["--method", "experts", "--out", "x"], "--selection and --router"),
        (["--method", "difference"], "one model and --base"),
    ],
)
def test_refusals_name_the_option(
    folders: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["merge", *folders[1:], *words]) == 2
    assert message in capsys.readouterr().err
