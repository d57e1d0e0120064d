"""Stock vLLM on a CPU beside transformers, the shipped model in float32: counts, texts, fingerprints, refusals.

`make test-vllm` runs this in an environment of its own.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import moe_route as mr
from moe_route.data import demo_corpus, load_demo_model
from moe_route.recording import RoutingStatistics

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):  # `make test-vllm`: a vLLM that does not load is a failure there
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")

GROUPS = ["eng_Latn", "jpn_Jpan", "rus_Cyrl", "swh_Latn", "free"]
NEW = 12
PLAN = (
    mr.Plan.activate({2: [1, 5], 3: [0], 4: [7]}, strength=0.5)
    + mr.Plan.force_on({5: [7]})
    + mr.Plan.forbid({1: [3]})
    + mr.Plan.scale_logits({6: {1: 1.5}}).only(positions=[(2, 9)])
).only(groups=["eng_Latn", "jpn_Jpan"]) + mr.Plan.force_off({6: [2, 4]}).only(groups=["rus_Cyrl"], phase="decode")


class Answers(NamedTuple):
    statistics: RoutingStatistics
    texts: list[list[int]]


class Row(NamedTuple):
    group: str
    item: str
    ids: list[int]


@pytest.fixture(scope="module")
def demo() -> Any:
    model, tokenizer = load_demo_model()
    return model.float(), tokenizer


@pytest.fixture(scope="module")
def rows(demo: Any) -> list[Row]:
    corpus = demo_corpus().subset(GROUPS[:4], limit=6)
    found = []
    for group in GROUPS[:4]:
        for number, (item, text) in enumerate(zip(corpus.items, corpus[group], strict=True)):
            ids = demo[1](text).input_ids
            found.append(Row(group, item, ids[:12] if number % 2 else ids[: 2 * len(ids) // 3]))
    return found


def in_transformers(model: Any, rows: list[Row], plan: mr.Plan | None, *, sequences: bool = False) -> Answers:
    texts = []
    with mr.attach(model) as routed, torch.no_grad():
        with routed.steer(plan) if plan else nullcontext(), routed.record(groups=GROUPS, sequences=sequences) as rec:
            for row in rows:
                ids = torch.tensor([row.ids])
                with rec.labels(groups=row.group, items=[row.item]):
                    made = model.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
                    )
                texts.append(made[0, len(row.ids) :].tolist())
        return Answers(rec.statistics(), texts)


@pytest.fixture(scope="module")
def expected(demo: Any, rows: list[Row]) -> dict[str, Answers]:
    return {"free": in_transformers(demo[0], rows, None), "steered": in_transformers(demo[0], rows, PLAN)}


def engine(options: dict[str, Any] | None = None, **changes: Any) -> Any:
    from moe_route.data import demo_model_folder

    settings: dict[str, Any] = {
        "model": str(demo_model_folder()),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 48,  # prompts arrive in chunks
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "additional_config": {"moe_route": {"groups": GROUPS} if options is None else options},
    }
    return vllm.LLM(**{**settings, **changes})


def in_vllm(llm: Any, rows: list[Row], *, record: bool = True, **settings: Any) -> Answers:
    params = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=NEW,
            extra_args={"moe_route_group": row.group, "moe_route_item": row.item},
            **settings,
        )
        for row in rows
    ]
    if record:
        mr.vllm.record(llm)
    out = llm.generate([{"prompt_token_ids": row.ids} for row in rows], params, use_tqdm=False)
    return Answers(mr.vllm.statistics(llm), [list(o.outputs[0].token_ids) for o in out])


def assert_same(found: Answers, expected: Answers) -> None:
    """Integers and texts equal; sums of float32 terms within their rounding."""
    assert found.texts == expected.texts
    here, there = found.statistics, expected.statistics
    assert (here.groups, here.layers, here.metrics) == (there.groups, there.layers, there.metrics)
    for name in ("counts", "natural_counts"):
        if name in there.metrics:
            for phase in ("prefill", "decode"):
                np.testing.assert_array_equal(here.token_sum(name, phase), there.token_sum(name, phase))
    for name in ("tokens", "slots", "empty", "steered", "flipped"):
        np.testing.assert_array_equal(here.scalar(name), there.scalar(name), err_msg=name)
    for name in ("probability", "weight", "weight_share"):
        np.testing.assert_allclose(here.token_sum(name), there.token_sum(name), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(here.sequences(), there.sequences())
    np.testing.assert_allclose(here.mean_distribution("full"), there.mean_distribution("full"), atol=1e-6)
    assert here.metadata["fingerprint"] == there.metadata["fingerprint"]
    assert here.metadata["plans"] == there.metadata["plans"]
    assert here.metadata["model"]["config_hash"] == there.metadata["model"]["config_hash"]
    assert (here + there).tokens().sum() == 2 * there.tokens().sum()


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


def test_drafts_are_steered_and_recorded_in_a_process_of_their_own(
    demo: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    llm = engine(speculative_config=drafts, disable_log_stats=False)
    mr.vllm.steer(llm, PLAN)
    repeating = [row._replace(ids=(row.ids[:8] * 6)[:44]) for row in rows[::3]]  # so that drafts are right at times
    assert_same(in_vllm(llm, repeating), in_transformers(demo[0], repeating, PLAN))
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafted, accepted = (found[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    assert drafted > accepted > 0, (drafted, accepted)


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
