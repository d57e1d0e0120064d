"""The script that shows a stock model generating, and the same model with moe-route attached."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_route

pytest.importorskip("transformers", reason="the script generates with transformers")

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"
if not SCRIPT.is_file():
    pytest.skip("examples/generate.py is not here (a source checkout has it)", allow_module_level=True)
DEMO_MODEL = Path(moe_route.__file__).parent / "data" / "model"


@pytest.mark.exhaustive
def test_prints_the_speed_of_the_stock_and_of_the_attached_model():
    options = ["--model", str(DEMO_MODEL), "--tokens", "2", "--rounds", "1", "--threads", "1"]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=True)
    head, *lines = done.stdout.splitlines()
    assert head == "8 MoE layers, 1 threads, medians of 1 rounds"
    found = [re.fullmatch(r"(.+?) +[\d.]+ tokens/s +([\d.]+) x", line) for line in lines]
    names = [match and match[1] for match in found]
    assert names == ["stock", "attached", "attached, recording and steering"]
