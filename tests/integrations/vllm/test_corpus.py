"""``moe-route record --engine vllm``: the counts of transformers, checkpoints, resuming, refusals."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_route as mr
from moe_route.cli import main
from moe_route.data import CorpusStream, demo_corpus
from moe_route.recording import RoutingStatistics

vllm: Any = None
if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
needs_vllm = pytest.mark.skipif(vllm is None, reason="needs vLLM in an environment of its own: make test-vllm")
LANGUAGES = ["eng_Latn", "swh_Latn", "jpn_Jpan"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 texts of three languages, in the order of their items."""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    texts = demo_corpus().subset(LANGUAGES, limit=22)
    lines = [
        {"group": language, "item": item, "text": texts[language][number]}
        for number, item in enumerate(texts.items)
        for language in LANGUAGES
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("given", "out", "words"),
    [
        (["--pairs"], "run/", "--pairs is unknown to --engine vllm"),
        (["--device", "cpu"], "run/", "--device is unknown to --engine vllm"),
        ([], "run.safetensors", "--out FOLDER/"),
    ],
)
def test_what_an_engine_does_not_know_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], out: str, words: str
) -> None:
    assert main(["record", "--engine", "vllm", "--data", str(corpus), *given, "--out", f"{tmp_path}/{out}"]) != 0
    assert words in capsys.readouterr().err


def test_a_launcher_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["record", "--engine", "vllm", "--data", str(corpus), "--out", f"{tmp_path}/run/"]) != 0
    assert "leave the launcher out, and use --tensor-parallel N" in capsys.readouterr().err


@pytest.mark.skipif(vllm is not None, reason="vLLM is here")
def test_without_vllm_the_command_says_what_it_needs(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("moe_route.integrations.vllm.corpus")
    assert main(["record", "--engine", "vllm", "--data", str(corpus), "--out", f"{tmp_path}/run/"]) != 0
    assert "--engine vllm needs vLLM beside moe-route" in capsys.readouterr().err


def assert_same(found: RoutingStatistics, expected: RoutingStatistics) -> None:
    assert {*found.groups} == {*expected.groups}
    found = found.select(groups=expected.groups)
    np.testing.assert_array_equal(found.token_sum("counts"), expected.token_sum("counts"))
    np.testing.assert_array_equal(found.tokens(), expected.tokens())
    np.testing.assert_array_equal(found.sequences(), expected.sequences())
    np.testing.assert_allclose(found.mean_distribution("full"), expected.mean_distribution("full"), atol=1e-6)
    for name in ("fingerprint", "plans", "cut_texts", "cut_to_tokens"):
        assert found.metadata.get(name) == expected.metadata.get(name), name
    assert found.metadata["model"]["config_hash"] == expected.metadata["model"]["config_hash"]
    assert found.metadata["model"]["name"] == expected.metadata["model"]["name"] == "demo"
    stores = found.store, expected.store
    assert None not in stores
    keys = [store.keys() for store in stores]
    assert {*keys[0]} == {*keys[1]}
    for item, group in keys[1]:
        np.testing.assert_array_equal(*(store.counts(item, group) for store in stores))


@pytest.fixture(scope="module")
def runner() -> Iterator[Any]:
    from moe_route.integrations.vllm.corpus import EngineTexts

    made = EngineTexts("demo", groups=LANGUAGES, sequences=True, max_num_seqs=16)
    yield made
    del made
    gc.collect()


@needs_vllm
def test_a_run_that_was_stopped_goes_on(runner: Any, corpus: Path, tmp_path: Path) -> None:
    """Against transformers, in two parts, with texts that are cut."""
    from moe_route.runs.corpus import CorpusRecording

    assert "VLLM_LOGGING_LEVEL" not in os.environ  # the engine of `runner` is quiet, and no other
    settings = {"batch_size": 1, "max_length": 24, "checkpoint_seconds": 0.0}
    made = CorpusRecording(tmp_path / "run", CorpusStream(str(corpus)), record={"sequences": True}, **settings)
    calls: list[None] = []

    def stop() -> bool:
        calls.append(None)
        return len(calls) == 3

    first = made.run_with(runner, stop=stop)
    assert not first.finished
    assert first.texts == 32  # two windows of 16
    last = made.run_with(runner)
    assert last.finished
    assert last.texts == 66
    assert last.cut > 0
    arguments = ["--data", str(corpus), "--batch-size", "1", "--max-length", "24"]
    assert main(["record", *arguments, "--out", f"{tmp_path}/there/"]) == 0
    found, expected = (RoutingStatistics.load(tmp_path / name / "statistics.safetensors") for name in ("run", "there"))
    assert_same(found, expected)
    sums = [
        RoutingStatistics.load(tmp_path / name / "statistics.safetensors", sequences=False) for name in ("run", "there")
    ]
    assert (sums[0] + sums[1]).tokens().sum() == 2 * expected.tokens().sum()
    cut = [(tmp_path / name / "cut.jsonl").read_text(encoding="utf-8") for name in ("run", "there")]
    assert sorted(cut[0].splitlines()) == sorted(cut[1].splitlines())
    other = CorpusRecording(tmp_path / "there", CorpusStream(str(corpus)), record={"sequences": True}, **settings)
    with pytest.raises(ValueError, match='engine: "transformers" there'):
        other.run_with(runner)


@needs_vllm
def test_the_command_steers_and_records(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = mr.Plan.activate({2: [1, 5], 4: [7]}, strength=0.7).only(groups=["swh_Latn"])
    plan.save(tmp_path / "plan.safetensors")
    arguments = ["--data", str(corpus), "--plan", str(tmp_path / "plan.safetensors")]
    assert main(["record", *arguments, "--engine", "vllm", "--out", f"{tmp_path}/here/"]) == 0
    assert "66 texts" in capsys.readouterr().out
    gc.collect()
    assert main(["record", *arguments, "--out", f"{tmp_path}/there/"]) == 0
    found, expected = (RoutingStatistics.load(tmp_path / name / "statistics.safetensors") for name in ("here", "there"))
    assert_same(found, expected)
    assert expected.scalar("flipped").sum() > 0
    np.testing.assert_array_equal(found.select(groups=expected.groups).scalar("flipped"), expected.scalar("flipped"))
