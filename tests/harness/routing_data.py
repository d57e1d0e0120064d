"""Recorded routing of real models for tests: read from the folder that MOE_ROUTE_DATA names, where there is one."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(os.environ["MOE_ROUTE_DATA"]) if os.environ.get("MOE_ROUTE_DATA") else None

needs_data = pytest.mark.skipif(
    FOLDER is None, reason="MOE_ROUTE_DATA is not set: the recorded routing is not part of the source"
)


def routing(*parts: str) -> Path:
    assert FOLDER is not None
    return FOLDER.joinpath("routing", *parts)


def published_routing() -> ModuleType:
    """The example that reads and draws the recorded routing of Qwen3-30B-A3B: the reader has its home there."""
    path = Path(__file__).parents[2] / "examples" / "study" / "published_routing.py"
    if not path.is_file():
        pytest.skip("examples/study/published_routing.py is not here (a source checkout has it)")
    pytest.importorskip("matplotlib", reason="the example draws with matplotlib")
    spec = importlib.util.spec_from_file_location("published_routing", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def esft(task: str) -> tuple[np.ndarray, dict[int, list[int]]]:
    """Published token scores [26, 64], and the experts chosen from them: layer (counted from 1) -> experts."""
    published = json.loads(routing("esft_deepseek_v2_lite", "expert_scores", task, "summary.json").read_text())
    chosen = json.loads(routing("esft_deepseek_v2_lite", "expert_configs", f"{task}.json").read_text())["experts"]
    scores = published["token_scores"]
    table = np.array([[scores[str(layer)][str(expert)] for expert in range(64)] for layer in range(1, 27)])
    return table, {int(layer): experts for layer, experts in chosen.items()}


def esft_ids(task: str, layer: int) -> np.ndarray:
    """int64 [T, 6]: the experts that each token of a task's sample chose in one layer (counted from 1)."""
    text = routing("esft_deepseek_v2_lite", "expert_scores", task, f"expert_weights_{layer}.txt").read_text()
    rows = [np.array(line.split("\t\t")[0].split("\t"), dtype=np.int64).reshape(-1, 6) for line in text.splitlines()]
    return np.concatenate(rows)
