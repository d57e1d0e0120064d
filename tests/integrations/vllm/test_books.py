"""What an engine keeps when it ends: the file of the option `save`, its lock and its generations, and the law.

Engines run in the test's process; a server of its own is in test_server.py.
"""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.vllm_demo import GROUPS, NEW, Answers, Row, assert_same, engine, in_vllm

import moe_route as mr
from moe_route.base import files
from moe_route.recording import RecordingError, RoutingStatistics

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

from moe_route.integrations.serving.books import added, newest_of, ranked
from moe_route.integrations.serving.options import EngineNotSupportedError
from moe_route.integrations.vllm import books


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def end(llm: Any) -> None:
    """End the engine core as vLLM does at the end of its process."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def params(group: str | None, **settings: Any) -> Any:
    extra = {} if group is None else {"moe_route_group": group}
    return vllm.SamplingParams(temperature=0, **{"max_tokens": NEW, "extra_args": extra, **settings})


def session_of(llm: Any) -> Any:
    return core_of(llm).model_executor.driver_worker.worker.moe_route_session


def test_a_second_run_adds_to_the_file_of_the_first(tmp_path: Path, rows: list[Row]) -> None:
    path = tmp_path / "books.safetensors"
    options = {"groups": GROUPS, "sequences": True, "record": True, "save": str(path), "every": 3600}
    half = len(rows) // 2
    llm = engine(options)
    in_vllm(llm, rows[:half], record=False)
    assert not path.exists()  # it is saved every hour, and at the end
    end(llm)
    first = RoutingStatistics.load(path)
    assert len(first.store) == half
    llm = engine(options)
    in_vllm(llm, [*rows[half:], rows[0]], record=False)
    end(llm)
    both = RoutingStatistics.load(path)
    assert both.metadata["repeated_items"] == 1  # its item is in the file of the first run
    assert len(both.store) == len(rows) + 1
    assert both.tokens().sum() > first.tokens().sum()
    llm = engine({**options, "record": False})
    assert mr.vllm.statistics(llm) == both  # nothing was recorded in this run
    end(llm)
    assert RoutingStatistics.load(path) == both


def test_the_file_of_one_run_holds_what_was_counted(
    tmp_path: Path, rows: list[Row], expected: dict[str, Answers]
) -> None:
    path = tmp_path / "books.safetensors"
    llm = engine({"groups": GROUPS, "record": True, "save": str(path), "every": 0.001})
    found = in_vllm(llm, rows, record=False)
    assert_same(found, expected["free"])
    assert_same(Answers(RoutingStatistics.load(path), found.texts), expected["free"])  # saved after the last step
    mr.vllm.record(llm)  # a new recording adds to the books
    assert_same(Answers(mr.vllm.statistics(llm), found.texts), expected["free"])
    end(llm)


def test_running_aborted_and_ungrouped_requests_are_told_apart(rows: list[Row], caplog: Any) -> None:
    llm = engine({"groups": GROUPS, "record": True})
    front = llm.llm_engine
    whole = params("eng_Latn", ignore_eos=True)
    for name, one in {"a": whole, "b": whole, "c": params(None, ignore_eos=True)}.items():
        front.add_request(name, {"prompt_token_ids": rows[0].ids}, one)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            front.step()
    assert "vllm_xargs" in caplog.text
    running = mr.vllm.statistics(llm)
    length = len(rows[0].ids)
    assert (running.tokens()[0] == 2 * (length + 3)).all()  # both that have a group, so far
    assert not running.sequences().any()
    said = running.metadata
    assert (said["running_sequences"], said["ungrouped_requests"], said["ungrouped_tokens"]) == (2, 1, length + 3)
    front.abort_request([name for name in core_of(llm).scheduler.requests if name.startswith("b")], internal=True)
    while front.has_unfinished_requests():
        front.step()
    ended = mr.vllm.statistics(llm)
    assert (ended.tokens()[0] == 2 * length + NEW - 1 + 3).all()
    assert ended.sequences()[0] == 1
    assert ended.metadata["aborted_requests"] == 1
    assert ended.metadata["running_sequences"] == 0


def test_a_text_that_ends_at_a_stop_string_was_not_aborted(rows: list[Row]) -> None:
    llm = engine({"groups": GROUPS, "record": True})
    text = llm.generate([{"prompt_token_ids": rows[0].ids}], params("eng_Latn"), use_tqdm=False)[0].outputs[0].text
    stopped = params("eng_Latn", stop=[text.strip()[:3]], ignore_eos=True, max_tokens=40)
    out = llm.generate([{"prompt_token_ids": rows[0].ids}], stopped, use_tqdm=False)[0].outputs[0]
    assert out.finish_reason == "stop"
    front = llm.llm_engine
    front.add_request("left", {"prompt_token_ids": rows[0].ids}, params("eng_Latn", stop=["@@@"], ignore_eos=True))
    front.step()
    front.abort_request(["left"])
    found = mr.vllm.statistics(llm)
    assert found.metadata["aborted_requests"] == 1
    assert found.sequences()[0] == 2


def test_a_layer_that_something_goes_round_is_unbalanced(tmp_path: Path, rows: list[Row], caplog: Any) -> None:
    path = tmp_path / "books.safetensors"
    llm = engine({"groups": GROUPS, "record": True, "save": str(path), "every": 3600})
    prompt = {"prompt_token_ids": rows[0].ids}
    llm.generate([prompt], params("eng_Latn"), use_tqdm=False)
    before = mr.vllm.statistics(llm)
    site = session_of(llm).sites[3]
    del site.module.router._compute_routing  # a fast path that does not ask the wrapped router
    with caplog.at_level(logging.ERROR):
        llm.generate([prompt], params("eng_Latn"), use_tqdm=False)
        with pytest.raises(RecordingError, match=r"counted \d+ of the \d+ tokens"):
            mr.vllm.statistics(llm)
        end(llm)
    assert caplog.text.count("went round its router") == 1
    with pytest.raises(RecordingError, match=site.name):
        RoutingStatistics.load(path)
    saved = RoutingStatistics.load(path, partial=True)
    tokens = int(before.tokens()[0, 0])
    law = saved.metadata["unbalanced"]
    assert law == {site.name: {"expected": 2 * tokens, "counted": tokens, "kernel": site.kernel}}
    assert saved.tokens()[0].tolist() == [2 * tokens if layer != 3 else tokens for layer in range(len(saved.layers))]
    assert np.isnan(saved.mean_distribution()[0, 3]).all()
    assert not np.isnan(saved.mean_distribution()[0, 2]).any()
    twice = saved + saved
    assert twice.metadata["unbalanced"][site.name]["expected"] == 4 * tokens


def test_every_router_has_a_capture_function(rows: list[Row]) -> None:
    llm = engine()
    assert all(site.module.router.capture_fn is not None for site in session_of(llm).sites)


def test_a_second_engine_on_the_same_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"record": True, "save": str(tmp_path / "books.safetensors")}
    llm = engine(options)
    monkeypatch.setattr(books, "PATIENCE", 0.5)
    with pytest.raises(EngineNotSupportedError, match="another engine writes to"):
        engine(options)
    end(llm)
    end(engine(options))


def test_a_file_of_another_model_or_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "books.safetensors"
    end(engine({"record": True, "save": str(path)}))
    with pytest.raises(EngineNotSupportedError, match="without sequences"):
        engine({"record": True, "sequences": True, "save": str(path)})
    statistics = RoutingStatistics.load(path)
    statistics.metadata["model"]["config_hash"] = "another"
    statistics.save(path)
    with pytest.raises(EngineNotSupportedError, match="another model"):
        engine({"record": True, "save": str(path)})
    path.write_bytes(b"cut")
    with pytest.raises(files.FileRefusedError):
        engine({"record": True, "save": str(path)})
    with pytest.raises(EngineNotSupportedError, match="no folder"):
        engine({"record": True, "save": str(tmp_path / "missing" / "books.safetensors")})


def test_a_full_disk_keeps_the_last_whole_file(
    tmp_path: Path, rows: list[Row], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    path = tmp_path / "books.safetensors"
    monkeypatch.setattr(books, "BETWEEN_WARNINGS", 1e9)  # a minute, on any machine
    llm = engine({"groups": GROUPS, "record": True, "save": str(path), "every": 0.001})
    in_vllm(llm, rows[:2], record=False)
    kept = path.read_bytes()

    written = files.write

    def full(target: Any, *args: Any, **kwargs: Any) -> None:
        if Path(target) == path:
            raise OSError(28, f"{path} was not written (no space left on device): free some space")
        written(target, *args, **kwargs)

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "vllm.moe_route"):
        patched.setattr(files, "write", full)
        logging.getLogger("vllm").propagate = True
        found = in_vllm(llm, rows[2:4], record=False)
    assert found.texts
    assert path.read_bytes() == kept
    # the handler of a test before may stand beside this one, and see the same records
    assert len({id(record) for record in caplog.records if "free some space" in record.getMessage()}) == 1  # not a step
    end(llm)
    assert RoutingStatistics.load(path).sequences().sum() == 4


# ---- generations, without an engine


def made(tokens: int, generation: int, **metadata: Any) -> RoutingStatistics:
    statistics = RoutingStatistics.from_token_sums(
        ["a"], counts=np.full((1, 2, 4), tokens), tokens=np.array([4 * tokens]), top_k=1
    )
    statistics.metadata = {"generation": str(generation), **metadata}
    return statistics


def test_older_generations_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "books.safetensors"
    assert newest_of(path) == (None, 0)
    made(1, 1).save(path)
    made(10, 2).save(ranked(path, 0))
    made(100, 2, running_sequences=3).save(ranked(path, 1))
    made(1000, 1).save(ranked(path, 2))
    made(10000, 3).save(tmp_path / "other.rank0.safetensors")
    found, newest = newest_of(path)
    assert newest == 2
    assert found is not None
    assert found.tokens().tolist() == [[440, 440]]
    assert (found.metadata["abandoned_sequences"], found.metadata["running_sequences"]) == (3, 0)


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("crash", ["before", "merged", "some", "all"])
def test_nothing_is_counted_twice_whatever_the_ranks_and_the_crash(
    tmp_path: Path, before: int, after: int, crash: str
) -> None:
    """What rank 0 does at a start, and the others after it, interrupted at every point."""
    path = tmp_path / "books.safetensors"

    def target(rank: int, ranks: int) -> Path:
        return path if ranks == 1 else ranked(path, rank)

    for rank in range(before):
        made(10**rank, 1).save(target(rank, before))
    expected = sum(10**rank for rank in range(before))
    total, newest = newest_of(path)
    assert total is not None
    if crash != "before":
        total.metadata["generation"] = str(newest + 1)
        total.save(target(0, after))
        ranks = {"merged": 0, "some": after - 1, "all": after}[crash]
        for rank in range(1, ranks):
            made(1000, newest + 1).save(target(rank, after))
            expected += 1000
    again, _ = newest_of(path)
    assert again is not None
    assert again.token_sum("counts")[0, 0, 0] == expected


def test_repeated_items_of_two_runs_lose_their_id(rows: list[Row]) -> None:
    parts = [made(1, 1), made(2, 1)]
    assert added(*parts).tokens().tolist() == [[12, 12]]
