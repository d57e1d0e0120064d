"""ESFT's scores and experts: hand-computed, and as published for DeepSeek-V2-Lite."""

from __future__ import annotations

import json

import numpy as np
import pytest
from harness.kept_sequences import statistics_of
from harness.routing_data import needs_data, routing

from moe_route import analysis
from moe_route.analysis import AnalysisError
from moe_route.recording import RoutingStatistics

FOLDER = "esft_deepseek_v2_lite"


def test_scores_of_hand_made_counts():
    counts = {("a", "task"): np.array([[3, 2, 1, 0]]), ("b", "task"): np.array([[1, 0, 0, 1]])}
    weights = {("a", "task"): np.array([[1.5, 0.5, 0.25, 0]]), ("b", "task"): np.array([[0.5, 0, 0, 0.25]])}
    statistics = statistics_of(counts, 2, (4,), weights)
    np.testing.assert_allclose(analysis.esft_scores(statistics), [[4 / 8, 2 / 8, 1 / 8, 1 / 8]])
    gate = analysis.esft_scores(statistics, kind="gate")
    np.testing.assert_allclose(gate, [[2 / 4, 0.5 / 4, 0.25 / 4, 0.25 / 4]], atol=1e-9)
    assert analysis.esft_experts(statistics, kind="gate", top_p=0.6) == {0: (0, 1)}
    assert analysis.esft_experts(statistics, top_p=0.75) == {0: (0, 1)}


@pytest.mark.parametrize(
    ("scores", "top_p", "experts"),
    [
        ([0.7, 0.1, 0.1, 0.1], 0.8, (0, 1)),  # 0.7 + 0.1 is 0.7999999999999999
        ([0.1] * 10, 0.3, (0, 1, 2)),  # 0.1 + 0.1 + 0.1 is 0.30000000000000004
        ([0.1] * 10, 1.0, tuple(range(10))),  # ten times 0.1 is 0.9999999999999999
        ([0.6, 0.2, 0.1, 0.1], 0.8, (0, 1)),
        ([0.6, 0.2, 0.1, 0.1], 0.8001, (0, 1, 2)),
    ],
)
def test_the_shortest_prefix_does_not_depend_on_rounding(scores, top_p, experts):
    assert analysis.esft_experts(np.array([scores]), top_p=top_p) == {0: experts}


def test_esft_refuses_and_says_how_to_fix_it():
    statistics = statistics_of({("a", "task"): np.array([[3, 2, 1, 0]])}, 2, (4,))
    cases = [
        (lambda: analysis.esft_scores(statistics, kind="gates"), '"token" or "gate"'),
        (lambda: analysis.esft_scores(statistics, kind="gate"), r"record\(metrics="),
        (lambda: analysis.esft_scores(statistics, group="law"), "no group 'law'"),
        (lambda: analysis.esft_experts(np.array([[0.2, 0.1]]), top_p=0.5), "layer 0 add up to 0.3"),
        (lambda: analysis.esft_experts(np.array([[0.2, -0.1]]), top_p=0.1), "0 or more"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert isinstance(raised.value, AnalysisError) or "record" in message


def test_layers_without_tokens_have_no_experts():
    assert analysis.esft_experts(np.array([[0.0, 0.0], [0.5, 0.5]]), top_p=0.5) == {1: (0,)}


def recorded(task: str, layer: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Selections int64 [64], sums of weight float64 [64] and tokens of a task's sample in a layer (from 1)."""
    counts, weights, tokens = np.zeros(64, np.int64), np.zeros(64), 0
    text = routing(FOLDER, "expert_scores", task, f"expert_weights_{layer}.txt").read_text()
    for line in text.splitlines():
        ids, gates = (part.split("\t") for part in line.split("\t\t"))
        np.add.at(counts, np.array(ids, np.int64), 1)
        np.add.at(weights, np.array(ids, np.int64), np.array(gates, np.float64))
        tokens += len(ids) // 6
    return counts, weights, tokens


@needs_data
def test_recorded_scores_come_out_to_their_four_decimals():
    """Token and gate scores of all 26 layers are printed as published, and give the published experts."""
    task = "translation"  # the one task of which the choice of every token is in the data folder
    folder = routing(FOLDER, "expert_scores", task)
    layers = sorted(int(path.stem.rsplit("_", 1)[1]) for path in folder.glob("expert_weights_*.txt"))
    sums = [recorded(task, layer) for layer in layers]
    statistics = RoutingStatistics.from_token_sums(
        [task],
        counts=np.stack([counts for counts, _, _ in sums])[None],
        tokens=np.array([[tokens for _, _, tokens in sums]]),
        top_k=6,
        weight=np.stack([weights for _, weights, _ in sums])[None],
    )
    published = json.loads((folder / "summary.json").read_text())
    for kind in ("token", "gate"):
        scores = analysis.esft_scores(statistics, kind=kind)
        expected = [[published[f"{kind}_scores"][str(layer)][str(e)] for e in range(64)] for layer in layers]
        assert [[float(f"{score:.4f}") for score in row] for row in scores] == expected
    chosen = json.loads(routing(FOLDER, "expert_configs", f"{task}.json").read_text())["experts"]
    experts = analysis.esft_experts(statistics)
    assert [set(experts[row]) for row in range(len(layers))] == [set(chosen[str(layer)]) for layer in layers]
