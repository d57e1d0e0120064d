"""Commands on the structure of routing: statistics and trace files of the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness.commands import SMALL, refused

import moe_route as mr
from moe_route.cli import main
from moe_route.data import demo_corpus
from moe_route.data.batches import texts_of
from moe_route.recording import RoutingStatistics, Trace
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    out = folder / "trace.safetensors"
    assert main(["record", "--out", str(folder / "statistics.safetensors"), "--trace", str(out), *SMALL]) == 0
    return out


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics with pairs of experts."""
    out = tmp_path_factory.mktemp("paired") / "pairs.safetensors"
    language_model = LanguageModel.load()
    texts = texts_of(demo_corpus().subset(["eng_Latn", "deu_Latn"], limit=4))
    with language_model.attach() as routed, routed.record(pairs=True) as recorder:
        record_texts(recorder, language_model, texts)
    recorder.statistics().save(out)
    return out


def plain(found):
    return json.loads(json.dumps(found.to_dict()))


def test_record_writes_a_trace(traced: Path):
    trace, statistics = Trace.load(traced), RoutingStatistics.load(traced.with_name("statistics.safetensors"))
    assert trace.layer_numbers == tuple(range(8))
    assert len(trace) == statistics.tokens()[:, 0].sum()
    counts = np.stack([np.bincount(trace.ids[:, layer].reshape(-1), minlength=16) for layer in range(8)])
    assert (counts == statistics.token_sum("counts").sum(0)).all()


def test_record_traces_some_layers(answer, tmp_path: Path):
    out = tmp_path / "trace.safetensors"
    told = answer("record", "--out", tmp_path / "s.safetensors", "--trace", out, "--trace-layers", "2-3", *SMALL)
    assert told["trace"] == str(out)
    assert Trace.load(out).layer_numbers == (2, 3)


def test_layers_without_a_trace_are_refused(moe_route, tmp_path: Path):
    refused(moe_route("record", "--out", tmp_path / "s.safetensors", "--trace-layers", "2"), "--trace")


def test_balance(answer, files):
    statistics = RoutingStatistics.load(files["general"])
    assert answer("analyze", "balance", files["general"]) == plain(mr.analysis.load_balance(statistics))
    pooled = answer("analyze", "balance", files["general"], "--pool", "--groups", "eng_Latn,deu_Latn")
    assert pooled == plain(mr.analysis.load_balance(statistics, pool=True, groups=["eng_Latn", "deu_Latn"]))


def test_committee(answer, files, tmp_path):
    out = tmp_path / "committee.json"
    found = answer("analyze", "committee", files["general"], "--top", "4", "--by", "sequence", "--out", out)
    expected = mr.analysis.committee(RoutingStatistics.load(files["general"]), top=4, by="sequence")
    assert found == plain(expected) | {"out": str(out)}
    assert mr.ExpertSelection.load(out) == expected.experts


@pytest.mark.parametrize("question", ["coactivation", "transitions"])
def test_pairs(answer, paired, question):
    measure = getattr(mr.analysis, question)
    found = answer("analyze", question, paired, "--groups", "deu_Latn")
    assert found == plain(measure(RoutingStatistics.load(paired), group="deu_Latn"))
    assert found["strongest"]


def test_expert_flow(answer, moe_route, files, paired, tmp_path):
    out = tmp_path / "flow.png"
    answer("plot", "expert-flow", paired, "--reference", "eng_Latn", "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")
    refused(moe_route("plot", "expert-flow", files["general"], "--out", out), "record(pairs=True)")


def test_paths(answer, traced):
    trace = Trace.load(traced)
    found = answer("analyze", "paths", traced, "--layers", "2-5", "--window", "2", "--experts", "2")
    assert found == plain(mr.analysis.paths(trace, layers=range(2, 6), window=2, k=2))
    by_class = answer("analyze", "paths", traced, "--tokenizer", "demo", "--classes", "script", "--min-tokens", "2")
    assert {"latin", "digit", "punctuation"} <= set(by_class["classes"])


def test_saturation(answer, traced):
    found = answer("analyze", "saturation", traced, "--final", traced)
    assert found["values"] == [[1.0] * 8] * 2


def test_vocabulary(answer, traced):
    found = answer("analyze", "vocabulary", traced, "--tokenizer", "demo", "--of", "next", "--layers", "3")
    expected = mr.analysis.vocabulary(Trace.load(traced), of="next", layers=[3])
    assert found["by_layer"] == expected.by_layer.tolist()
    assert all(row["text"] for row in found["top"])


def test_token_classes(answer, traced):
    found = answer("analyze", "token-classes", traced, "--tokenizer", "demo", "--classes", "start")
    assert set(found["classes"]) <= {"word start", "inside", "special", "other"}
    assert sum(found["tokens"]) == len(Trace.load(traced))


def test_locality(answer, traced):
    found = answer("analyze", "locality", traced, "--segment", "4")
    assert found == plain(mr.analysis.local_consistency(Trace.load(traced), segment=4))


@pytest.mark.parametrize(
    ("question", "title"),
    [("balance", "coefficient of variation"), ("committee", "most used of each of 3 groups")],
)
def test_text(moe_route, files, question, title):
    code, out, _ = moe_route("analyze", question, files["general"])
    assert code == 0
    assert title in out


def test_what_a_user_can_get_wrong(moe_route, files, traced):
    refused(moe_route("analyze", "paths", files["general"]), "trace")
    refused(moe_route("analyze", "paths", traced, "--classes", "script"), "--tokenizer")
    refused(moe_route("analyze", "token-classes", traced), "--tokenizer")
    refused(moe_route("analyze", "paths", traced, "--layers", "9"), "layer 9 was not traced")
    refused(moe_route("analyze", "locality", traced, "--segment", "4000"), "smaller segment")
    refused(moe_route("analyze", "balance", files["general"], "--groups", "fra_Latn"), "fra_Latn")
    refused(moe_route("analyze", "coactivation", files["general"]), "record(pairs=True)")
