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
    more = ("--trace-layers", "2-3", "--trace-logits", "float32")
    told = answer("record", "--out", tmp_path / "s.safetensors", "--trace", out, *more, *SMALL)
    assert told["trace"] == str(out)
    trace = Trace.load(out)
    assert trace.layer_numbers == (2, 3)
    assert trace.logits is not None
    assert trace.logits.shape == (len(trace), 2, 16)


def test_layers_without_a_trace_are_refused(moe_route, tmp_path: Path):
    refused(moe_route("record", "--out", tmp_path / "s.safetensors", "--trace-layers", "2"), "--trace")
    refused(moe_route("record", "--out", tmp_path / "s.safetensors", "--trace-logits", "float16"), "--trace")


def test_balance(answer, files):
    statistics = RoutingStatistics.load(files["general"])
    assert answer("analyze", "layers", files["general"], "--of", "load-balance") == plain(
        mr.analysis.load_balance(statistics)
    )
    options = ("--of", "load-balance", "--pool", "--groups", "eng_Latn,deu_Latn")
    pooled = answer("analyze", "layers", files["general"], *options)
    assert pooled == plain(mr.analysis.load_balance(statistics, pool=True, groups=["eng_Latn", "deu_Latn"]))


def test_committee(answer, files, tmp_path):
    out = tmp_path / "committee.json"
    options = ("--rule", "committee", "--per-layer", "4", "--by", "sequence", "--out", out)
    found = answer("analyze", "experts", files["general"], *options)
    expected = mr.analysis.committee(RoutingStatistics.load(files["general"]), top=4, by="sequence")
    assert found == plain(expected) | {"out": str(out)}
    assert mr.ExpertSelection.load(out) == expected.experts


@pytest.mark.parametrize(("options", "question"), [((), "coactivation"), (("--next",), "transitions")])
def test_pairs(answer, paired, options, question):
    measure = getattr(mr.analysis, question)
    found = answer("analyze", "pairs", paired, *options, "--groups", "deu_Latn")
    assert found == plain(measure(RoutingStatistics.load(paired), groups="deu_Latn"))
    assert found["strongest"]


def test_expert_flow(answer, moe_route, files, paired, tmp_path):
    out = tmp_path / "flow.png"
    answer("plot", "expert-flow", paired, "--reference", "eng_Latn", "--out", out)
    assert out.read_bytes().startswith(b"\x89PNG")
    refused(moe_route("plot", "expert-flow", files["general"], "--out", out), "record(pairs=True)")


def test_paths(answer, traced):
    trace = Trace.load(traced)
    found = answer("analyze", "tokens", traced, "--of", "paths", "--layers", "2-5", "--window", "2", "--k", "2")
    assert found == plain(mr.analysis.paths(trace, layers=range(2, 6), window=2, k=2))
    options = ("--of", "paths", "--tokenizer", "demo", "--classes", "script", "--min-tokens", "2")
    by_class = answer("analyze", "tokens", traced, *options)
    assert {"latin", "digit", "punctuation"} <= set(by_class["classes"])


def test_saturation(answer, traced):
    found = answer("analyze", "tokens", traced, "--of", "saturation", "--final", traced)
    assert found["values"] == [[1.0] * 8] * 2


def test_vocabulary(answer, traced):
    options = ("--of", "vocabulary", "--tokenizer", "demo", "--token", "next", "--layers", "3")
    found = answer("analyze", "tokens", traced, *options)
    expected = mr.analysis.vocabulary(Trace.load(traced), of="next", layers=[3])
    assert found["by_layer"] == expected.by_layer.tolist()
    assert all(row["text"] for row in found["top"])


def test_class_routing(answer, traced):
    found = answer("analyze", "tokens", traced, "--of", "class-routing", "--tokenizer", "demo", "--classes", "start")
    assert set(found["classes"]) <= {"word start", "inside", "special", "other"}
    assert sum(found["tokens"]) == len(Trace.load(traced))


def test_local_consistency(answer, traced):
    found = answer("analyze", "tokens", traced, "--of", "local-consistency", "--segment", "4")
    assert found == plain(mr.analysis.local_consistency(Trace.load(traced), segment=4))


@pytest.mark.parametrize(
    ("question", "title"),
    [
        (("layers", "--of", "load-balance"), "coefficient of variation"),
        (("experts", "--rule", "committee"), "most used of each of 3 groups"),
    ],
)
def test_text(moe_route, files, question, title):
    code, out, _ = moe_route("analyze", *question, files["general"])
    assert code == 0
    assert title in out


def test_what_a_user_can_get_wrong(moe_route, files, traced):
    refused(moe_route("analyze", "tokens", files["general"], "--of", "paths"), "trace")
    refused(moe_route("analyze", "tokens", traced, "--of", "paths", "--classes", "script"), "--tokenizer")
    refused(moe_route("analyze", "tokens", traced, "--of", "class-routing"), "--tokenizer")
    refused(moe_route("analyze", "tokens", traced, "--of", "paths", "--layers", "9"), "layer 9 was not traced")
    refused(moe_route("analyze", "tokens", traced, "--of", "local-consistency", "--segment", "4000"), "smaller segment")
    refused(
        moe_route("analyze", "layers", files["general"], "--of", "load-balance", "--groups", "fra_Latn"), "fra_Latn"
    )
    refused(moe_route("analyze", "pairs", files["general"]), "record(pairs=True)")
    refused(moe_route("analyze", "tokens", traced, "--of", "saturation"), "--final")
    refused(moe_route("analyze", "tokens", traced, "--of", "paths", "--segment", "4"), "--segment", "paths")
