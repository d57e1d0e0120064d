"""Routed experts in the answers of requests that ask: those that a trace has, with weights, over HTTP too."""

from __future__ import annotations

import base64
import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
from harness.vllm_demo import GROUPS, NEW, PLAN, Row, engine

import moe_route as mr
from moe_route.integrations.serving.returned import layer_number
from moe_route.integrations.vllm.returned import packed, split

if os.environ.get("MOE_ROUTE_REQUIRE_VLLM"):
    import vllm
else:
    vllm = pytest.importorskip("vllm", reason="needs vLLM in an environment of its own: make test-vllm")


def test_answers_hold_the_experts_of_requests_that_ask(rows: list[Row]) -> None:
    """Those that a trace has of the same request; steered, in chunks, and not from the prefix cache."""
    options = {"groups": GROUPS, "routed_experts": True, "trace": True}
    llm = engine(options, enable_prefix_caching=True, block_size=32)
    mr.vllm.steer(llm, PLAN)
    mr.vllm.record(llm)
    asked = ["float32", "float16", "ids", None]
    chosen = [rows[0], rows[2], rows[-2], rows[1]]
    extra = [
        {"moe_route_group": row.group, "moe_route_item": row.item, "moe_route_experts": what, "moe_route_from": 3}
        for row, what in zip(chosen, asked, strict=True)
    ]
    extra[-1] = {"moe_route_group": chosen[-1].group}
    params = [vllm.SamplingParams(temperature=0, max_tokens=NEW, extra_args=one) for one in extra]
    prompts = [{"prompt_token_ids": row.ids} for row in chosen]
    for _ in range(2):  # the second time, their prefixes are cached
        outputs = [one.outputs[0] for one in llm.generate(prompts, params, use_tqdm=False)]
    trace = mr.vllm.trace(llm)
    for row, what, output in zip(chosen[:3], asked[:3], outputs[:3], strict=True):
        ids, weights = mr.vllm.routed_experts(llm, output)
        mine = (np.array(trace.items, object) == row.item)[trace.sequence] & (
            np.array(trace.groups)[trace.group] == row.group
        )
        of_one = trace.sequence[mine] == trace.sequence[mine].max()
        order = np.argsort(trace.position[mine][of_one])
        there = trace.ids[mine][of_one][order][3:]
        assert ids.shape == (len(row.ids) + len(output.token_ids) - 1 - 3, *trace.ids.shape[1:])
        assert ids.dtype == np.uint8
        np.testing.assert_array_equal(ids, np.maximum(there, 0))
        if what == "ids":
            assert weights is None
            continue
        assert weights is not None
        assert weights.dtype == what
        np.testing.assert_allclose(weights, trace.weights[mine][of_one][order][3:], atol=1e-3)
    with pytest.raises(ValueError, match="did not ask"):
        mr.vllm.routed_experts(llm, outputs[3])
    stopped = vllm.SamplingParams(stop=["x"], extra_args={"moe_route_group": GROUPS[0], "moe_route_experts": "ids"})
    with pytest.raises(vllm.exceptions.VLLMValidationError, match="stop_token_ids"):
        llm.generate(prompts[:1], stopped, use_tqdm=False)


@pytest.mark.parametrize("asked", ["float32", "float16", "ids"])
def test_answers_over_http_have_weights_beside_the_ids(asked: str) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 300, (5, 2, 3)).astype(np.uint16)
    weights = generator.random((5, 2, 3)).astype(np.float32)
    file = io.BytesIO()
    np.save(file, packed(ids, weights, asked))
    choice = SimpleNamespace(routed_experts=base64.b64encode(file.getvalue()).decode())
    split(choice, 300)

    def read(text: str) -> np.ndarray:
        return np.load(io.BytesIO(base64.b64decode(text)))

    found = read(choice.routed_experts)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, ids)
    if asked == "ids":
        assert not hasattr(choice, "moe_route")
    else:
        np.testing.assert_array_equal(read(choice.moe_route["weights"]), weights.astype(asked))


def test_a_layer_has_the_number_in_its_name() -> None:
    assert [layer_number(f"model.layers.{n}.mlp.experts") for n in (0, 13)] == [0, 13]
