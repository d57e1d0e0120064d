"""Means of router inputs by sequence and group, against plain float64 means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route.recording import RecordingError

MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])


def router_inputs(model, routed, **batch) -> list[torch.Tensor]:
    """What every router is given, [T, H] per layer."""
    found: list[torch.Tensor] = []
    hooks = [
        router.module.register_forward_pre_hook(lambda _, args: found.append(args[0].double().flatten(0, -2)))
        for router in routed.routers
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "afmoe", "gemma4_text"])
@torch.no_grad()
def test_means_over_the_tokens_of_each_sequence(name: str) -> None:
    model = tiny_model(name)
    batch = {"input_ids": tokens(3, 6), "attention_mask": MASK}
    groups, items = ["a", "b", "a"], ["x", "x", "y"]
    with mr.attach(model) as routed:
        given = router_inputs(model, routed, **batch)
        options = {"hidden": True, "sequences": True}
        with routed.record(["a", "b"], **options) as recorder, recorder.labels(groups=groups, items=items):
            model(**batch)
    statistics = recorder.statistics()
    means = np.zeros((3, len(given), given[0].shape[1]))
    for layer, hidden in enumerate(given):
        for i in range(3):
            rows = [hidden[i * 6 + t] for t in range(6) if MASK[i, t]]
            means[i, layer] = sum(row.numpy() for row in rows) / len(rows)
    for i, (group, item) in enumerate(zip(groups, items, strict=True)):
        np.testing.assert_allclose(statistics.store.hidden(item, group), means[i], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(statistics.hidden, [(means[0] + means[2]) / 2, means[1]], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_chunks_and_groups_within_a_sequence() -> None:
    """A sequence that spans two calls, with one group per token."""
    model, ids = tiny_model("qwen3_moe", head=True), tokens(1, 6)
    labels = [["a", "a", "b", "b", "b", "a"]]
    with mr.attach(model) as routed:
        given = router_inputs(model, routed, input_ids=ids)
        with routed.record(hidden=True) as recorder, recorder.labels(groups=labels):
            past = model(ids[:, :4], use_cache=True).past_key_values
            model(ids[:, 4:], past_key_values=past)
    statistics = recorder.statistics()
    for layer, hidden in enumerate(given):
        for group, positions in (("a", [0, 1, 5]), ("b", [2, 3, 4])):
            mean = hidden[positions].mean(0).numpy()
            found = statistics.hidden[statistics.groups.index(group), layer]
            np.testing.assert_allclose(found, mean, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_failed_call_and_tokens_that_are_not_told_apart() -> None:
    model = tiny_model("qwen3_moe")
    with mr.attach(model) as routed, routed.record(hidden=True) as recorder:
        model(tokens())
        before = recorder.statistics().hidden
        with pytest.raises(IndexError):
            model(torch.full((2, 7), 10**6))
    np.testing.assert_array_equal(recorder.statistics().hidden.shape, before.shape)
    with mr.attach(model) as routed, routed.record(hidden=True):
        model.layers[0].mlp.gate.register_forward_pre_hook(lambda _, args: args[0][:3])
        with pytest.raises((RecordingError, RuntimeError)):  # a router that is given some of the tokens
            model(tokens())
