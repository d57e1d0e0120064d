"""The shipped model in vLLM and in transformers: the same requests, and what must be equal."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

import moe_route as mr
from moe_route.data import demo_model_folder
from moe_route.recording import RoutingStatistics

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


def engine(options: dict[str, Any] | None = None, **changes: Any) -> Any:
    import vllm

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
    """The rows' requests, all at once; their texts, and what the engine counted."""
    import vllm

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
