"""Recorded routing of real models for tests: read from the folder that MOE_ROUTE_DATA names, where there is one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(os.environ["MOE_ROUTE_DATA"]) if os.environ.get("MOE_ROUTE_DATA") else None

needs_data = pytest.mark.skipif(
    FOLDER is None, reason="MOE_ROUTE_DATA is not set: the recorded routing is not part of the source"
)


def routing(*parts: str) -> Path:
    assert FOLDER is not None
    return FOLDER.joinpath("routing", *parts)


def qwen3_mgsm() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Languages, selections [G, L, E], gate sums [G, L, E] and tokens [G, L] of Qwen3-30B-A3B on MGSM prompts."""
    languages = ["en", "de", "zh", "bn", "sw"]
    counts, gates = np.zeros((2, len(languages), 48, 128))
    tokens = np.zeros((len(languages), 48), dtype=np.int64)
    for g, language in enumerate(languages):
        record = json.loads(routing("qwen3_30b_a3b_mgsm", f"mgsm_{language}.json").read_text())
        for layer in range(48):
            tokens[g, layer] = record[str(layer)]["total_tokens"]
            for expert in range(128):
                entry = record[str(layer)][str(expert)]
                counts[g, layer, expert], gates[g, layer, expert] = entry["activation_tokens"], entry["gate_values_sum"]
    return languages, counts, gates, tokens


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
