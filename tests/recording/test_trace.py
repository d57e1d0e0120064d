"""The trace: every counted token's experts and weights, who it was, and the bound on how many are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny_models import EVERY, inputs, tiny_model, tokens

import moe_route as mr
from moe_route.base import files
from moe_route.recording import RecordingError, Trace


@pytest.fixture(scope="module")
def routed() -> Iterator[mr.RoutedModel]:
    with mr.attach(tiny_model("qwen3_moe", head=True)) as routed:
        yield routed


def recorded(routed: mr.RoutedModel, **options: object) -> tuple[Trace, mr.RoutingStatistics, torch.Tensor]:
    """Two left-padded sequences of 6 and 4 tokens that generate 3 more."""
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    with routed.record(**options) as rec, rec.labels(["x", "y"], items=["a", 7]):
        out = routed.model.generate(
            tokens(2, 6) * mask, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    return rec.trace(), rec.statistics(), out


def test_a_trace_holds_what_was_counted(routed: mr.RoutedModel) -> None:
    trace, statistics, _ = recorded(routed, trace=True)
    assert len(trace) == 6 + 4 + 2 * 2
    assert trace.layers == statistics.layers
    assert (trace.ids.dtype, trace.weights.dtype) == (np.int8, np.float16)
    for layer in range(3):
        for group in range(2):
            kept = trace.group == group
            counts = np.bincount(trace.ids[kept, layer].reshape(-1), minlength=8)
            np.testing.assert_array_equal(counts, statistics.token_sum("counts")[group, layer])
            weight = np.zeros(8)
            np.add.at(weight, trace.ids[kept, layer], trace.weights[kept, layer])
            np.testing.assert_allclose(weight, statistics.token_sum("weight")[group, layer], atol=1e-2)


def test_tokens_know_who_they_are(routed: mr.RoutedModel) -> None:
    trace, _, _ = recorded(routed, trace=True)
    assert trace.items == ("a", 7)
    assert trace.groups == ("x", "y")
    for sequence, length in ((0, 6), (1, 4)):
        kept = trace.sequence == sequence
        assert trace.position[kept].tolist() == list(range(length + 2))
        assert trace.phase[kept].tolist() == [0] * length + [1] * 2
        assert (trace.group[kept] == sequence).all()


def test_positions_go_on_over_chunks(routed: mr.RoutedModel) -> None:
    ids = tokens(2, 6)
    with routed.record(trace=[1], trace_weights="float32") as rec:
        first = routed.model(ids[:, :4], use_cache=True)
        routed.model(ids[:, 4:], past_key_values=first.past_key_values)
        routed.model(ids[:1])
    trace = rec.trace()
    assert trace.items == (None,) * 3
    assert [trace.position[trace.sequence == s].tolist() for s in range(3)] == [[*range(6)]] * 3
    assert trace.ids.shape == (18, 1, 2)
    assert trace.weights.dtype == np.float32
    np.testing.assert_array_equal(trace.ids[trace.sequence == 0], trace.ids[trace.sequence == 2])


def test_positions_are_those_of_the_text_where_its_beginning_is_not_traced(routed: mr.RoutedModel) -> None:
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with routed.record(trace=True, phases=["decode"]) as rec, rec.labels("x", items=[1, 2]):
        routed.model.generate(ids, attention_mask=mask, **options)
    trace = rec.trace()
    assert [trace.position[trace.sequence == s].tolist() for s in range(2)] == [[4, 5, 6], [6, 7, 8]]


def test_beams_share_their_sequence(routed: mr.RoutedModel) -> None:
    with routed.record(trace=True) as rec, rec.labels("x", items=[1, 2]):
        routed.model.generate(tokens(2, 4), num_beams=3, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    trace = rec.trace()
    assert len(trace) == 2 * 3 * (4 + 2)
    assert np.bincount(trace.sequence).tolist() == [18, 18]
    assert trace.position.max() == 5


def test_the_limit_is_kept_and_said(routed: mr.RoutedModel, caplog: pytest.LogCaptureFixture) -> None:
    trace, statistics, _ = recorded(routed, trace=True, trace_limit=7)
    assert len(trace) == 7
    assert trace.truncated
    assert "the trace is full (7 tokens)" in caplog.text
    assert statistics.tokens()[:, 0].tolist() == [8, 6]


def test_paused_and_masked_tokens_are_not_traced(routed: mr.RoutedModel) -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    with routed.record(trace=True) as rec, rec.labels("x", count_mask=mask):
        routed.model(tokens(2, 4))
        with rec.pause():
            routed.model(tokens(2, 4))
    assert rec.trace().position.tolist() == [0, 1, 3]


def test_a_call_that_failed_leaves_no_trace(routed: mr.RoutedModel) -> None:
    model = routed.model

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with routed.record(trace=True) as rec:
        handle = model.model.layers[1].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(tokens(2, 4))
        handle.remove()
        model(tokens(2, 4))
    assert len(rec.trace()) == 8
    assert (rec.trace().ids >= 0).all()


def test_files_and_frames(routed: mr.RoutedModel, tmp_path: Path) -> None:
    trace, _, _ = recorded(routed, trace=[2, 0])
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    for name in ("layers", "layer_numbers", "groups", "items", "truncated"):
        assert getattr(again, name) == getattr(trace, name)
    assert trace.layer_numbers == (0, 2)
    for name in ("sequence", "group", "position", "token", "phase", "ids", "weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
    frame = again.to_pandas()
    assert len(frame) == len(trace) * 2 * 2
    row = frame[(frame["item"] == 7) & (frame["position"] == 5) & (frame["layer"] == 2)]
    assert row["router"].unique().tolist() == [trace.layers[1]]
    assert row["phase"].unique().tolist() == ["decode"]
    assert row["weight"].sum() == pytest.approx(1, abs=1e-3)
    with pytest.raises(files.FileRefusedError, match="'trace', not 'statistics'"):
        mr.RoutingStatistics.load(tmp_path / "t.safetensors")


def test_frames_of_a_trace_join_those_of_the_statistics(routed: mr.RoutedModel) -> None:
    trace, statistics, _ = recorded(routed, trace=True)
    frame, sums = trace.to_pandas(), statistics.to_pandas()
    keys = ["group", "phase", "layer", "router", "expert"]
    counts = frame.groupby(keys).size().rename("traced").reset_index()
    joined = sums.merge(counts, on=keys, how="left").fillna({"traced": 0})
    assert len(joined) == len(sums)
    assert (joined["traced"] == joined["counts"]).all()
    assert frame["layer"].unique().tolist() == [0, 1, 2]


def test_tokens_have_their_ids(routed: mr.RoutedModel) -> None:
    """Left-padded prompts and what was generated after them: the ids of the text, without the padding."""
    trace, _, texts = recorded(routed, trace=True)
    for sequence, first in ((0, 0), (1, 2)):
        kept = trace.sequence == sequence
        assert trace.token[kept].tolist() == texts[sequence, first:-1].tolist()
    frame = trace.to_pandas()
    sent = frame[(frame["layer"] == 1) & (frame["expert"] == 7)]
    expected = np.bincount(trace.token[(trace.ids[:, 1] == 7).any(1)], minlength=128)
    assert np.bincount(sent["token"], minlength=128).tolist() == expected.tolist()


def test_ids_of_tokens_are_copied_and_may_be_unknown(routed: mr.RoutedModel) -> None:
    ids = tokens(1, 4)
    given = ids.clone()
    with routed.record(trace=True) as rec:
        routed.model(given)
        given.zero_()  # callers may reuse their buffer
        routed.model(inputs_embeds=routed.model.get_input_embeddings()(ids).detach())
    assert rec.trace().token.tolist() == [*ids[0].tolist(), -1, -1, -1, -1]


def test_a_trace_must_be_asked_for(routed: mr.RoutedModel) -> None:
    with routed.record() as rec:
        routed.model(tokens(1, 4))
    with pytest.raises(RecordingError, match="no trace was asked for"):
        rec.trace()


# ---- logits


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_logits_of_a_trace_are_those_the_model_returns(engine: str, tmp_path: Path) -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        own = model(**given, output_router_logits=True).router_logits  # one [12, E] per layer
    with mr.attach(model, engine=engine) as routed, routed.record(trace=[0, 2], logits="float32") as rec:
        with torch.no_grad():
            model(**given)
        trace = rec.trace()
    kept = mask.bool().flatten()
    assert trace.logits is not None
    assert trace.logits.dtype == np.float32
    for place, layer in enumerate((0, 2)):
        bound = 0 if engine == "hook" else 1e-5  # the choice of a fused router moves the layers after it by rounding
        np.testing.assert_allclose(trace.logits[:, place], own[layer][kept].numpy(), atol=bound, rtol=0)
        expected = torch.softmax(own[layer][kept].double(), -1).numpy()
        np.testing.assert_allclose(trace.probabilities[:, place], expected, atol=1e-5)
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    assert again.logits is not None
    assert again.scores == ("softmax", "softmax")
    np.testing.assert_array_equal(again.logits, trace.logits)


def test_logits_are_bounded_and_their_size_is_said_before(
    routed: mr.RoutedModel, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = routed.record(trace=True, logits=True, trace_limit=7)
    assert "24 logits per token, 48 bytes" in caplog.text  # 3 layers of 8 experts in float16
    with recorder, torch.no_grad():
        routed.model(tokens(2, 6))
    trace = recorder.trace()
    assert trace.logits is not None
    assert (trace.logits.shape, trace.logits.dtype, trace.truncated) == ((7, 3, 8), np.float16, True)
    assert recorded(routed, trace=True)[0].logits is None
    with pytest.raises(ValueError, match="trace=True"):
        routed.record(logits=True)
    with pytest.raises(ValueError, match="float64"):
        routed.record(trace=True, logits="float64")
    with pytest.raises(ValueError, match="no logits"):
        assert recorded(routed, trace=True)[0].probabilities is None


def test_logits_of_a_steered_token_are_those_before_the_plan(routed: mr.RoutedModel) -> None:
    ids, traces = tokens(1, 5), []
    for plan in (mr.Plan(), mr.Plan.bias({0: [1]}, strength=9.0)):
        with routed.record(trace=[0], logits="float32") as rec, routed.steer(plan), torch.no_grad():
            routed.model(ids)
        traces.append(rec.trace())
    natural, steered = traces
    np.testing.assert_array_equal(np.asarray(natural.logits), np.asarray(steered.logits))
    assert not np.array_equal(natural.ids, steered.ids)


@pytest.mark.parametrize("name", list(EVERY))
def test_probabilities_of_tokens_add_up_to_what_was_counted(name: str) -> None:
    model = tiny_model(name)
    given = inputs(name, model)
    with mr.attach(model) as routed, torch.no_grad():
        text = [router.layer for router in routed.routers if not router.adapter.patches]
        if not text:
            pytest.skip("only pictures are routed, and a trace leaves them out")
        with routed.record(trace=text, logits="float32") as rec:
            model(**given)
        statistics, trace = rec.statistics(), rec.trace()
        sums = statistics.token_sum("probability")[0, text]
        np.testing.assert_allclose(
            np.nansum(trace.probabilities, 0), sums[:, : trace.probabilities.shape[2]], atol=1e-4
        )


@pytest.mark.parametrize("name", list(EVERY))
def test_router_logits_of_one_call(name: str) -> None:
    model = tiny_model(name)
    given = inputs(name, model)
    with mr.attach(model) as routed:
        with routed.router_logits() as logits:
            model(**given)
        seen = {router.layer: router for router in routed.routers if not router.adapter.patches}
        assert logits.keys() <= seen.keys()
        unseen = {seen[layer].role for layer in seen.keys() - logits.keys()}
        assert unseen <= {"vision"}  # experts of pictures, of which this text has none
        for layer, values in logits.items():
            decoder = seen[layer].role == "decoder"
            first = given["decoder_input_ids"] if decoder else next(iter(given.values()))
            shape = (first.shape[0], 1 if "grid_thw" in given else first.shape[1])  # a vision tower alone: patches
            assert values.shape == (*shape, seen[layer].num_experts)
            given_to_it = ~values.isnan().all(-1)  # some layers are given the tokens of a text without its pictures
            assert values[given_to_it].isfinite().all()
        kept = dict(logits)
        with torch.no_grad():
            model(**given)
        assert all(logits[layer] is values for layer, values in kept.items())  # nothing is seen after the block


def test_router_logits_have_a_gradient_and_keep_the_model(routed: mr.RoutedModel) -> None:
    ids = tokens(2, 6)
    with torch.no_grad():
        before = routed.model(ids).logits
    with routed.router_logits() as logits:
        assert torch.equal(routed.model(ids).logits, before)
    loss = logits[1].float().logsumexp(-1).square().mean()
    (slope,) = torch.autograd.grad(loss, routed.routers[1].module.weight)
    assert bool(slope.any())
    with routed.record() as rec, routed.router_logits() as logits, torch.no_grad():
        routed.model(ids)
        routed.model(ids[:, :3])  # the latest call, although small calls are counted later
    assert logits[0].shape == (2, 3, 8)
    assert rec.statistics().tokens().tolist() == [[18] * 3]
