"""The recordings of the data folder, through the public commands, give the measured figures (where the folder is)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness.routing_data import esft, needs_data, routing

import moe_route as mr
from moe_route import analysis, convert, recording
from moe_route.cli import main

pytestmark = needs_data

LANGUAGES = ("de", "zh", "bn", "sw")
BANDS = {  # mean divergence from English over layers 0-3, 16-31, 44-47
    "de": (0.164, 0.051, 0.234),
    "zh": (0.260, 0.061, 0.392),
    "bn": (0.313, 0.139, 0.298),
    "sw": (0.326, 0.139, 0.298),
}
LAYERS = (slice(0, 4), slice(16, 32), slice(44, 48))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> dict:
        capsys.readouterr()
        code = main([*map(str, arguments), "--json"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out)

    return run


@pytest.fixture
def qwen3(run, tmp_path: Path) -> Path:
    path = tmp_path / "qwen3.safetensors"
    folder = routing("qwen3_30b_a3b_mgsm")
    said = run("convert", *(folder / f"mgsm_{g}.json" for g in ("en", *LANGUAGES)), "--to", "statistics", "--out", path)
    assert list(said["groups"]) == ["en", *LANGUAGES]
    assert 1e-5 < said["largest_gap"] < 3.1e-4  # that recorder summed in bfloat16: up to 0.03 %
    return path


def test_divergence_of_qwen3_on_mgsm(qwen3):
    found = analysis.divergence(mr.RoutingStatistics.load(qwen3), "en", kind="topk", by="token", pairing="pooled")
    values = dict(zip(found.groups, found.values, strict=True))
    for language, bands in BANDS.items():
        means = [float(values[language][layers].mean()) for layers in LAYERS]
        np.testing.assert_allclose(means, bands, atol=5e-4, err_msg=language)


def test_divergence_of_qwen3_on_mgsm_through_the_command(qwen3, run):
    options = ["--reference", "en", "--pairing", "pooled", "--kind", "topk", "--by", "token"]
    found = run("analyze", "divergence", qwen3, *options)
    values = dict(zip(found["groups"], np.array(found["values"], float), strict=True))
    for language, bands in BANDS.items():
        means = [float(values[language][layers].mean()) for layers in LAYERS]
        np.testing.assert_allclose(means, bands, atol=5e-4, err_msg=language)


def test_esft_scores_and_experts(run, tmp_path):
    task = routing("esft_deepseek_v2_lite", "expert_scores", "translation")
    said = run("convert", task, "--to", "statistics", "--out", tmp_path / "s.safetensors")
    assert (said["largest_gap"], said["groups"]) == (0.0, {"translation": 8251})
    statistics = mr.RoutingStatistics.load(tmp_path / "s.safetensors")
    published, experts = esft("translation")
    scores = statistics.mean_distribution("count", by="token")[0]  # selections / (6 * tokens)
    np.testing.assert_allclose(scores, published, atol=5.1e-5)
    gates = json.loads((task / "summary.json").read_text())["gate_scores"]
    table = [[gates[str(layer)][str(expert)] for expert in range(64)] for layer in range(1, 27)]
    found = statistics.token_sum("weight")[0] / statistics.tokens()[0][:, None]  # gate weights / tokens
    np.testing.assert_allclose(found, table, atol=5.1e-5)
    chosen = analysis.esft_experts(statistics)
    assert chosen == {layer - 1: tuple(sorted(ids)) for layer, ids in experts.items()}
    assert chosen == convert.read(routing("esft_deepseek_v2_lite", "expert_configs", "translation.json"))


@pytest.mark.parametrize("task", ["intent", "translation"])
def test_esft_experts_come_out_of_the_published_scores(task, run):
    folder = routing("esft_deepseek_v2_lite")
    chosen = run("convert", folder / "expert_scores" / task / "summary.json")
    config = run("convert", folder / "expert_configs" / f"{task}.json")
    assert chosen["experts"] == config["experts"]


def test_gpt_oss_generations_and_means(run, tmp_path):
    folder = routing("gpt_oss_20b")
    files = [folder / "fact_checking" / f"True_{end}_examples.json" for end in ("True", "False")]
    said = run("convert", *files, "--out", tmp_path / "trace.safetensors")
    assert (said["kind"], said["sequences"], len(said["layers"]), said["slots"]) == ("trace", 2, 24, 4)
    trace = recording.Trace.load(tmp_path / "trace.safetensors")
    np.testing.assert_allclose(trace.weights.sum(axis=2), 1, atol=0.02)
    assert run("convert", *files, "--to", "statistics")["largest_gap"] == 0
    for path in sorted(folder.glob("mmlu_test/*/*.json")):
        found = convert.read(path)
        assert isinstance(found, mr.RoutingStatistics)
        found.save(tmp_path / "means.safetensors")
        again = mr.RoutingStatistics.load(tmp_path / "means.safetensors")
        mean = again.frequency(by="sequence").sum(-1)
        assert ((mean > 3.5) & (mean < 4.0001)).all()


@pytest.mark.parametrize(("model", "experts", "top_k"), [("olmoe", 64, 8), ("mistral", 8, 2)])
def test_olmoe_and_mixtral_counts(model, experts, top_k, run, tmp_path):
    folder = routing("olmoe", model)
    files = [folder / "expert_counts" / f"{domain}.json" for domain in ("arxiv", "c4", "github")]
    said = run("convert", *files, "--top-k", top_k, "--out", tmp_path / "s.safetensors")
    assert said["groups"] == dict.fromkeys(("arxiv", "c4", "github"), 208896)
    assert (said["layers"], said["experts"]) == (["0", "7", "15"], [experts] * 3)
    first = run("convert", folder / "expert_counts_top1" / "c4.json", "--top-k", 1)
    assert first["groups"] == {"c4": 208896}
    mr.RoutingStatistics.load(tmp_path / "s.safetensors")


def test_layers_of_another_model_do_not_mix():
    folder = routing("olmoe")
    paths = [folder / model / "expert_counts_top1" / "c4.json" for model in ("olmoe", "mistral")]
    with pytest.raises(ValueError, match="different numbers of experts"):
        convert.read(paths, top_k=1)
