"""Stock vLLM on a CPU beside transformers, the shipped model in float32: counts, texts, fingerprints, refusals.

`make test-vllm` runs this in an environment of its own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from harness.vllm_demo import GROUPS, NEW, PLAN, Answers, Row, assert_same, engine, in_transformers, in_vllm

import moe_route as mr

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

SOFT = mr.Plan.activate({2: [1, 5], 3: [0]}, strength=0.7)
HARD = mr.Plan.force_off({6: [2, 4]})


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One engine for the tests up to the first one that starts its own, which takes the operator over."""
    file = tmp_path_factory.mktemp("plans") / "hard.safetensors"
    HARD.save(file)
    made = engine({"groups": GROUPS, "sequences": True, "plans": {"hard": str(file), "soft": None}})
    assert made.collective_rpc("moe_route_report")[0]["plans"] == {"hard": HARD.hash}
    mr.vllm.steer(made, None, name="hard")
    yield made
    del made
    gc.collect()


def test_a_recording_equals_that_of_transformers(llm: Any, rows: list[Row], expected: dict[str, Answers]) -> None:
    found = in_vllm(llm, rows)
    assert_same(found, expected["free"])
    assert found.statistics.metadata["engines"] == ["vllm"]
    assert found.statistics.metadata["versions"]["vllm"] == vllm.__version__


def test_a_plan_steers_its_groups_as_in_transformers(llm: Any, rows: list[Row], expected: dict[str, Answers]) -> None:
    mr.vllm.steer(llm, PLAN)
    try:
        found = in_vllm(llm, rows)
    finally:
        mr.vllm.steer(llm, None)
    assert_same(found, expected["steered"])
    assert found.statistics.scalar("flipped").sum() > 0
    assert found.texts != expected["free"].texts


def test_after_a_plan_ends_nothing_is_steered(llm: Any, rows: list[Row], expected: dict[str, Answers]) -> None:
    assert_same(in_vllm(llm, rows), expected["free"])


def test_a_recording_goes_on_when_a_plan_ends(llm: Any, rows: list[Row], expected: dict[str, Answers]) -> None:
    """Steps of the second half are counted in another way, by all layers at once."""
    mr.vllm.steer(llm, PLAN)
    mr.vllm.record(llm)
    first = in_vllm(llm, rows, record=False)
    mr.vllm.steer(llm, None)
    second = in_vllm(llm, rows, record=False)
    assert [first.texts, second.texts] == [expected["steered"].texts, expected["free"].texts]
    steered, free = (expected[name].statistics for name in ("steered", "free"))
    for name, parts in {"counts": (steered, free), "natural_counts": (steered,)}.items():
        plain = free.token_sum("counts") if name == "natural_counts" else 0
        there = sum(part.token_sum(name) for part in parts) + plain
        np.testing.assert_array_equal(second.statistics.token_sum(name), there)
    for name in ("tokens", "slots", "empty", "steered", "flipped"):
        np.testing.assert_array_equal(second.statistics.scalar(name), steered.scalar(name) + free.scalar(name))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"moe_route_group": "klingon"}, "none of the groups of this engine: eng_Latn"),
        ({"moe_route_group": ["eng_Latn"]}, "none of the groups"),
        ({"moe_route_plan": "other"}, "none of the plans of this engine: default, hard, soft, none"),
        ({"moe_route_group": "free", "moe_route_item": 1.5}, "a text or a whole number"),
        ({"moe_route_grup": "free"}, "no argument of moe_route"),
    ],
)
def test_a_wrong_request_is_refused_and_the_next_one_served(
    llm: Any, rows: list[Row], extra: dict[str, Any], words: str
) -> None:
    prompt = {"prompt_token_ids": rows[0].ids}
    with pytest.raises(vllm.exceptions.VLLMValidationError, match=words):
        llm.generate([prompt], vllm.SamplingParams(max_tokens=1, extra_args=extra), use_tqdm=False)
    assert llm.generate([prompt], vllm.SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs


def test_requests_choose_their_plan(llm: Any, demo: Any, rows: list[Row]) -> None:
    """Two plans and none in one batch: each request gets what it asks for."""
    for name, plan in {"soft": SOFT, "hard": HARD}.items():
        mr.vllm.steer(llm, plan, name=name)
    params = [
        vllm.SamplingParams(
            temperature=0, max_tokens=NEW, extra_args={"moe_route_group": "eng_Latn", "moe_route_plan": plan}
        )
        for plan in ("soft", "hard", "none")
    ]
    prompt = {"prompt_token_ids": rows[0].ids}
    together = [list(o.outputs[0].token_ids) for o in llm.generate([prompt] * 3, params, use_tqdm=False)]
    alone = [in_transformers(demo[0], rows[:1], plan).texts[0] for plan in (SOFT, HARD, None)]
    assert together == alone
    with pytest.raises(Exception, match="no plan is called 'other' here"):
        mr.vllm.steer(llm, SOFT, name="other")
    for name in ("soft", "hard"):
        mr.vllm.steer(llm, None, name=name)


def test_every_sequence_is_kept_as_in_transformers(llm: Any, demo: Any, rows: list[Row]) -> None:
    found, there = in_vllm(llm, rows[:6]), in_transformers(demo[0], rows[:6], None, sequences=True)
    stores = found.statistics.store, there.statistics.store
    assert [len(store) for store in stores] == [6, 6]
    for row in rows[:6]:
        np.testing.assert_array_equal(*(store.counts(row.item, row.group) for store in stores))
        np.testing.assert_allclose(*(store.distributions(row.item, row.group) for store in stores), atol=1e-6)
    repeated = [rows[0], rows[0]._replace(ids=rows[1].ids)]
    assert in_vllm(llm, repeated).statistics.metadata["repeated_items"] == 1


def test_a_compiled_engine_equals_transformers(rows: list[Row], expected: dict[str, Answers]) -> None:
    llm = engine(enforce_eager=False)
    assert_same(in_vllm(llm, rows), expected["free"])
    mr.vllm.steer(llm, PLAN)
    assert_same(in_vllm(llm, rows), expected["steered"])


def test_drafts_are_steered_and_not_recorded(demo: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    # in a process of its own: what drafting imports makes vLLM 0.32 fail to start another engine beside it
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = engine(speculative_config=drafts, disable_log_stats=False)
    mr.vllm.steer(llm, PLAN)
    repeating = [row._replace(ids=(row.ids[:8] * 6)[:44]) for row in rows[::3]]  # so that drafts are right at times
    params = [
        vllm.SamplingParams(temperature=0, max_tokens=NEW, extra_args={"moe_route_group": row.group})
        for row in repeating
    ]
    out = llm.generate([{"prompt_token_ids": row.ids} for row in repeating], params, use_tqdm=False)
    texts = [list(o.outputs[0].token_ids) for o in out]
    assert texts == in_transformers(demo[0], repeating, PLAN).texts
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafted, accepted = (found[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert drafted > accepted > 0, (drafted, accepted)
    with pytest.raises(Exception, match="without --speculative-config"):
        mr.vllm.record(llm)


def test_preempted_requests_count_once() -> None:
    llm = engine(
        {"groups": ["a", "b"]}, max_num_seqs=8, max_num_batched_tokens=128, num_gpu_blocks_override=6, block_size=32
    )
    generator = np.random.default_rng(3)
    rows = [Row("ab"[i % 2], str(i), generator.integers(10, 4000, 20).tolist()) for i in range(4)]
    params = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=70,
            ignore_eos=True,
            extra_args={"moe_route_group": row.group, "moe_route_item": row.item},
        )
        for row in rows
    ]

    def run(batches: list[list[int]]) -> Answers:
        mr.vllm.record(llm)
        texts = []
        for batch in batches:
            prompts = [{"prompt_token_ids": rows[i].ids} for i in batch]
            out = llm.generate(prompts, [params[i] for i in batch], use_tqdm=False)
            texts += [list(o.outputs[0].token_ids) for o in out]
        return Answers(mr.vllm.statistics(llm), texts)

    together, alone = run([[0, 1, 2, 3]]), run([[0], [1], [2], [3]])
    assert together.statistics.metadata["tokens_run_again"] > 0
    assert alone.statistics.metadata["tokens_run_again"] == 0
    assert together.texts == alone.texts
    for name in ("tokens", "slots"):
        np.testing.assert_array_equal(together.statistics.scalar(name), alone.statistics.scalar(name))
    np.testing.assert_array_equal(together.statistics.token_sum("counts"), alone.statistics.token_sum("counts"))
    np.testing.assert_array_equal(together.statistics.sequences(), alone.statistics.sequences())
    assert together.statistics.metadata["fingerprint"] == alone.statistics.metadata["fingerprint"]
