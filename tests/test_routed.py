"""The user's day: attach, describe, record, steer by group and phase, let go; on real tiny models."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import MAIN, tiny_model, tokens
from torch import nn

import moe_route as mr
from moe_route.base.devices import Block
from moe_route.base.identity import checkpoint_of, config_hash
from moe_route.patching import AlreadyAttachedError
from moe_route.recording import Recorder, RecordingError
from moe_route.routers import ModelNotSupportedError
from moe_route.steering import PlanError


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("qwen3_moe", head=True)


@pytest.fixture
def routed(model: nn.Module) -> Iterator[mr.RoutedModel]:
    with mr.attach(model) as routed:
        yield routed


def logits(model: nn.Module, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the order of sums: the experts' matrix products depend on what else is in the batch."""
    return torch.allclose(a, b, atol=1e-4)


ON = mr.Plan.force_on({0: [3], 2: [5]})


def test_the_users_day(model: nn.Module, tmp_path: Path) -> None:
    batches = [
        SimpleNamespace(language=["eng_Latn", "swh_Latn"], sentence=[i, i], inputs={"input_ids": tokens(2, 6, i)})
        for i in range(4)
    ]
    before = logits(model, tokens(2, 6))
    routed = mr.attach(model)
    with routed.record(groups=["eng_Latn", "swh_Latn"], sequences=True) as rec:
        for batch in batches:
            with rec.labels(groups=batch.language, items=batch.sentence):
                model(**batch.inputs)
    stats = rec.statistics()
    div = mr.analysis.divergence(stats, reference="eng_Latn")
    assert div.values.shape[-1] == 3
    assert np.isfinite(div.values).all()
    stats.save(tmp_path / "stats.safetensors")
    again = mr.RoutingStatistics.load(tmp_path / "stats.safetensors")
    assert again == stats
    np.testing.assert_array_equal(mr.analysis.divergence(again, reference="eng_Latn").values, div.values)
    math, general = stats.select(groups=["swh_Latn"]), stats.select(groups=["eng_Latn"])
    found = mr.analysis.task_experts(math, general, threshold=0.02)
    plan = mr.Plan.activate(found, layers=range(1, 3), strength=4.0)
    with routed.steer(plan):
        assert not torch.equal(logits(model, tokens(2, 6)), before)
        model.generate(input_ids=tokens(2, 6), max_new_tokens=2, do_sample=False)
    routed.detach()
    assert torch.equal(logits(model, tokens(2, 6)), before)


@pytest.mark.parametrize("name", MAIN)
def test_attaching_and_recording_keep_every_bit(name: str) -> None:
    model, ids = tiny_model(name, head=True), tokens(2, 6)
    before, keys = logits(model, ids), list(model.state_dict())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), type(m)) for m in model.modules()]
    with mr.attach(model) as routed:
        assert torch.equal(logits(model, ids), before)
        with routed.record(sequences=True, trace=True):
            assert torch.equal(logits(model, ids), before)
        with routed.steer(mr.Plan.activate({0: [1]}, strength=0.0)):
            assert torch.equal(logits(model, ids), before)
        with routed.steer(mr.Plan.force_on({1: [3]})):
            logits(model, ids)
        assert torch.equal(logits(model, ids), before)
        assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, ids), before)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), type(m)) for m in model.modules()] == hooks


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_forced_experts_are_what_is_counted(model: nn.Module, engine: Any) -> None:
    with mr.attach(model, engine=engine) as routed, routed.steer(ON), routed.record() as rec:
        logits(model, tokens(2, 6))
    stats = rec.statistics()
    assert stats.frequency()[0, 0, 3] == stats.frequency()[0, 2, 5] == 1.0
    assert stats.scalar("steered")[0].tolist() == [12, 0, 12]
    assert stats.metadata["plans"] == [ON.hash]


def test_steering_by_group_touches_only_that_group(model: nn.Module, routed: mr.RoutedModel) -> None:
    ids, before = tokens(4, 6), logits(model, tokens(4, 6))
    with routed.record(groups=["x", "y"]) as rec, routed.steer(ON.only(groups="y")), rec.labels(["x", "y", "y", "x"]):
        steered = logits(model, ids)
    assert same(steered[[0, 3]], before[[0, 3]])
    assert not same(steered[[1, 2]], before[[1, 2]])
    stats = rec.statistics()
    assert stats.scalar("steered")[:, 0].tolist() == [0, 12]
    assert stats.scalar("flipped")[0].tolist() == [0, 0, 0]
    assert stats.frequency()[1, 0, 3] == 1.0
    with routed.record(groups=["x", "y"]) as plain, plain.labels(["x", "y", "y", "x"]):
        logits(model, ids)
    np.testing.assert_array_equal(
        stats.select("x").token_sum("counts"), plain.statistics().select("x").token_sum("counts")
    )
    # layer 0 sees the same hidden states, so its natural choice is the unsteered one
    np.testing.assert_array_equal(stats.token_sum("natural_counts")[:, 0], plain.statistics().token_sum("counts")[:, 0])


def test_labels_without_a_recording_steer_by_group(model: nn.Module, routed: mr.RoutedModel) -> None:
    ids, before = tokens(2, 6), logits(model, tokens(2, 6))
    with routed.steer(ON.only(groups="y")):
        assert torch.equal(logits(model, ids), before)
        with routed.labels(["x", "y"]):
            steered = logits(model, ids)
            with pytest.raises(RuntimeError, match="inside labels"), routed.labels("x"):
                pytest.fail("the block was entered")
        with routed.labels("unheard of"):
            assert torch.equal(logits(model, ids), before)
        with routed.labels([["x"] * 5 + ["y"], ["x"] * 6]):
            last = logits(model, ids)
        with pytest.raises(ValueError, match="needs groups"):
            routed.labels()
    assert same(steered[0], before[0])
    assert not same(steered[1], before[1])
    assert same(last[0, :5], before[0, :5])
    assert same(last[1], before[1])
    assert not same(last[0, 5], before[0, 5])


def test_labels_serve_the_recording_that_is_on(model: nn.Module, routed: mr.RoutedModel) -> None:
    with routed.record() as rec, routed.labels(["x", "y"], items=[1, 1]):
        logits(model, tokens(2, 6))
    assert rec.statistics().groups == ("x", "y")
    assert routed.statistics() == rec.statistics()
    assert routed.recorder is rec


def test_steering_by_phase(model: nn.Module, routed: mr.RoutedModel) -> None:
    with routed.record() as rec, routed.steer(ON.only(phase="decode")):
        model.generate(tokens(2, 5), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    stats = rec.statistics()
    assert stats.scalar("steered", "prefill").sum() == 0
    assert stats.scalar("steered", "decode")[0].tolist() == [6, 0, 6]
    assert stats.frequency("decode")[0, 0, 3] == 1.0


def test_nested_plans_add_up_and_end_in_turn(model: nn.Module, routed: mr.RoutedModel) -> None:
    ids, before = tokens(2, 6), logits(model, tokens(2, 6))
    one, two = mr.Plan.activate({0: [1]}, strength=3.0), mr.Plan.activate({1: [2]}, strength=3.0)
    with routed.steer(one):
        alone = logits(model, ids)
        with routed.steer(two):
            assert routed.plan == one + two
            nested = logits(model, ids)
        assert torch.equal(logits(model, ids), alone)
    assert torch.equal(logits(model, ids), before)
    with routed.steer(one + two):
        assert torch.equal(logits(model, ids), nested)
    assert routed.plan is None


def test_a_plan_that_ends_by_an_exception_ends(model: nn.Module, routed: mr.RoutedModel) -> None:
    before = logits(model, tokens(2, 6))
    with pytest.raises(ZeroDivisionError), routed.steer(ON):
        1 / 0  # noqa: B018
    assert torch.equal(logits(model, tokens(2, 6)), before)


def test_steering_that_begins_while_recording(model: nn.Module, routed: mr.RoutedModel) -> None:
    ids = tokens(2, 6)
    with routed.record(sequences=True) as rec, rec.labels("x", items=[1, 2]):
        logits(model, ids)
        with routed.steer(ON):
            logits(model, ids)
        logits(model, ids)
    stats = rec.statistics()
    assert stats.metrics == ("counts", "probability", "weight", "weight_share", "natural_counts")
    assert stats.scalar("steered")[0].tolist() == [12, 0, 12]
    assert stats.tokens()[0].tolist() == [36] * 3
    with routed.record() as plain:
        logits(model, ids)
    np.testing.assert_array_equal(
        stats.token_sum("natural_counts")[0, 0], 3 * plain.statistics().token_sum("counts")[0, 0]
    )
    assert stats.store is not None
    assert stats.store.tokens(1, "x").tolist() == [18] * 3
    merged = stats + plain.statistics()
    assert merged.metadata["plans"] == [ON.hash]
    assert merged.token_sum("natural_counts").sum() == 48 * 2 * 3


def test_flipped_and_moved_compare_with_the_natural_choice(model: nn.Module, routed: mr.RoutedModel) -> None:
    with routed.steer(mr.Plan.force_on({0: [3]})), routed.record(trace=[0]) as rec:
        logits(model, tokens(2, 6))
    stats = rec.statistics()
    natural = stats.token_sum("natural_counts")[0, 0]
    assert stats.scalar("flipped")[0, 0] == 12 - natural[3]
    trace = rec.trace()
    assert (trace.ids[:, 0] == 3).any(1).all()
    assert 0 < stats.scalar("moved")[0, 0] < 12


def test_plans_for_other_models_are_refused(model: nn.Module, routed: mr.RoutedModel) -> None:
    before = logits(model, tokens(2, 6))
    for plan in (
        mr.Plan.force_on({3: [0]}),
        mr.Plan.force_on({0: [8]}),
        mr.Plan.force_on({0: [1]}).for_model("other", config_hash="0" * 64),
        mr.Plan.force_on({0: [1]}).for_model(num_experts=[16] * 3),
    ):
        with pytest.raises(PlanError), routed.steer(plan):
            pytest.fail("the plan was taken")
    with pytest.raises(TypeError, match="takes a Plan, not dict"), routed.steer({0: [1]}):  # type: ignore[arg-type]
        pytest.fail("the plan was taken")
    assert torch.equal(logits(model, tokens(2, 6)), before)
    with routed.steer(mr.Plan.force_on({0: [1]}).for_model("here", config_hash=config_hash(model))):
        assert not torch.equal(logits(model, tokens(2, 6)), before)


def test_statistics_and_plans_know_their_model(model: nn.Module, routed: mr.RoutedModel) -> None:
    with routed.record() as rec:
        logits(model, tokens(2, 6))
    stats = rec.statistics()
    assert stats.metadata["model"] == {
        "name": None,
        "class": "Qwen3MoeForCausalLM",
        "config_hash": config_hash(model),
        **checkpoint_of(model, [router.weights for router in routed.routers]),
    }
    assert {"torch", "transformers", "moe-route", "python"} <= stats.metadata["versions"].keys()
    other = tiny_model("qwen3_moe", head=True, hidden_size=32)
    with mr.attach(other) as second, second.record() as rec:
        logits(other, tokens(2, 6))
    with pytest.raises(ValueError, match="two models"):
        stats + rec.statistics()


def test_the_configuration_hash_is_of_what_the_model_is(model: nn.Module) -> None:
    same = tiny_model("qwen3_moe", head=True, seed=3, dtype=torch.bfloat16)
    same.config.use_cache = False
    same.config._name_or_path = "elsewhere"
    assert config_hash(same) == config_hash(model)
    assert config_hash(tiny_model("qwen3_moe", head=True, num_experts_per_tok=3)) != config_hash(model)
    assert config_hash(nn.Linear(2, 3)) != config_hash(nn.Linear(2, 4))


def test_describe_prints_and_is_json(model: nn.Module) -> None:
    found = mr.describe(model)
    text = str(found)
    assert text == repr(found)
    assert "Qwen3MoeForCausalLM: 3 MoE layers" in text
    assert "   0-2  Qwen3MoeTopKRouter        8      2  softmax" in text
    content = json.loads(json.dumps(found.to_dict()))
    assert [layer["layer"] for layer in content["layers"]] == [0, 1, 2]
    assert content["layers"][0]["engine"] == "hook"
    assert content["attached"] is False
    with mr.attach(model, engine="fused"):
        live = mr.describe(model)
        assert live.attached
        assert {layer.engine for layer in live.layers} == {"fused"}
    with pytest.raises(ModelNotSupportedError):
        mr.describe(nn.Linear(2, 2))


def test_one_attachment_and_one_recording_at_a_time(model: nn.Module, routed: mr.RoutedModel) -> None:
    with pytest.raises(AlreadyAttachedError):
        mr.attach(model)
    with routed.record() as rec:
        with pytest.raises(RuntimeError, match="a recording is on already"), routed.record():
            pytest.fail("the block was entered")
        with pytest.raises(RecordingError, match="on already"), rec:
            pytest.fail("the block was entered")
        logits(model, tokens(1, 4))
    assert rec.statistics().tokens()[0, 0] == 4


def test_detach_is_final(model: nn.Module) -> None:
    routed = mr.attach(model)
    late = routed.record()
    routed.detach()
    routed.detach()
    assert "detached" in repr(routed)
    with pytest.raises(RuntimeError, match=r"attach\(model\) again"):
        routed.record()
    with pytest.raises(RuntimeError, match=r"attach\(model\) again"), late:
        pytest.fail("the block was entered")
    with pytest.raises(RuntimeError, match=r"attach\(model\) again"), routed.steer(ON):
        pytest.fail("the block was entered")
    with mr.attach(model) as again:
        assert "attached" in repr(again)


def test_statistics_before_any_recording(routed: mr.RoutedModel) -> None:
    with pytest.raises(RuntimeError, match="nothing was recorded yet"):
        routed.statistics()


def test_recordings_whose_names_differ_after_a_dot_keep_their_own_sequences(
    model: nn.Module, routed: mr.RoutedModel, tmp_path: Path
) -> None:
    recorded = {}
    for seed, name in enumerate(("run.x", "run.y", "strength0.5", "strength0.7", "n" * 255)):
        with routed.record(sequences=True) as rec, rec.labels(["x", "y"], items=[1, 1]):
            logits(model, tokens(2, 6, seed))
        recorded[name] = rec.statistics().store
        rec.statistics().save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(recorded)  # a recording is one file
    for name, store in recorded.items():
        (tmp_path / name).rename(tmp_path / "moved")  # and can be moved and renamed as one
        again = mr.RoutingStatistics.load(tmp_path / "moved")
        assert again.store is not None
        assert again.store.content_hash() == store.content_hash()
        assert mr.RoutingStatistics.load(tmp_path / "moved", sequences=False).store is None


def test_plans_may_end_in_any_order() -> None:
    routed = mr.attach(tiny_model("qwen3_moe"))
    one, other = (mr.Plan.forbid({0: [expert]}) for expert in (1, 2))
    first, second = routed.steer(one), routed.steer(other)
    first.__enter__()
    second.__enter__()
    assert routed.plan == one + other
    first.__exit__(None, None, None)
    assert routed.plan == other
    with routed.record() as recorder, torch.no_grad():
        routed.model(input_ids=tokens())
    counts = recorder.statistics().token_sum("counts").sum(0)[0]
    assert counts[2] == 0 < counts[1]
    second.__exit__(None, None, None)
    assert routed.plan is None
    routed.detach()


# ---------------------------------------------------------------------------------------------------------------
# Blocks: entered, forgotten, copied.


def test_a_forgotten_with_says_so(model: nn.Module, routed: mr.RoutedModel) -> None:
    with pytest.warns(RuntimeWarning, match=r"labels\(\.\.\.\) was never entered.*write `with labels"):
        routed.labels("x")
    with pytest.warns(RuntimeWarning, match=r"routed\.steer\(plan\) was never entered"):
        routed.steer(ON)
    with pytest.warns(RuntimeWarning, match=r"routed\.record\(\.\.\.\) was never entered"):
        routed.record()
    with routed.record() as rec:
        with pytest.warns(RuntimeWarning, match="labels"):
            rec.labels("x")
        with pytest.warns(RuntimeWarning, match="pause"):
            rec.pause()
        logits(model, tokens(1, 4))
    assert rec.statistics().groups == ("all",)
    late = routed.record()
    logits(model, tokens(1, 4))
    with pytest.raises(RecordingError, match=r"never entered; write `with routed\.record"):
        late.statistics()
    with pytest.warns(RuntimeWarning, match="never entered"):
        del late


def test_blocks_that_are_entered_are_quiet(model: nn.Module, routed: mr.RoutedModel, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.ExitStack() as stack:
            rec = stack.enter_context(routed.record(groups=["x"]))
            stack.enter_context(routed.steer(ON))
            stack.enter_context(rec.labels("x"))
            logits(model, tokens(1, 4))
        with rec, rec.pause(), pytest.raises(RecordingError, match="on already"), rec:
            pytest.fail("the block was entered")
        with pytest.raises(ValueError, match="metrics are some of"):
            routed.record(metrics=["beauty"])
        with pytest.raises(PlanError), routed.steer(mr.Plan.force_on({99: [3]})):
            pytest.fail("the block was entered")
        del rec
        gc.collect()


def test_the_options_of_record_are_in_its_signature(routed: mr.RoutedModel) -> None:
    """They are those of Recorder, with its defaults, and nothing internal is in the way of completion."""
    of_routed = dict(inspect.signature(mr.RoutedModel.record).parameters)
    of_recorder = dict(inspect.signature(Recorder.__init__).parameters)
    del of_routed["self"], of_recorder["self"], of_recorder["model"], of_recorder["metadata"]
    assert {name: (p.default, p.annotation) for name, p in of_routed.items()} == {
        name: (p.default, p.annotation) for name, p in of_recorder.items()
    }
    with pytest.warns(RuntimeWarning):
        shown = {name for name in dir(routed.record()) if not name.startswith("_")}
    assert shown == {"add_metadata", "groups", "labels", "on", "pause", "statistics", "trace"}
    verbs = {"record", "steer", "learn", "labels", "router_logits", "statistics", "protect", "detach"}
    assert {name for name in dir(routed) if not name.startswith("_")} == verbs | {
        "attachment",
        "model",
        "plan",
        "recorder",
        "routers",
    }


def test_copies_are_of_models_not_of_what_is_attached(model: nn.Module, routed: mr.RoutedModel) -> None:
    with routed.record() as rec:
        for thing in (routed, rec, routed.attachment):
            with pytest.raises(TypeError, match=r"cannot be copied\. Copy the model itself"):
                copy.deepcopy(thing)
        other = copy.deepcopy(model)
        logits(other, tokens(1, 4))
        logits(model, tokens(1, 4))
    assert rec.statistics().tokens()[0, 0] == 4


def test_a_recorder_says_what_it_is_doing(model: nn.Module, routed: mr.RoutedModel) -> None:
    waiting = routed.record()
    assert repr(waiting).startswith("Recorder(not entered yet, 0 calls, 0 groups, 3 layers")
    with waiting as rec:
        logits(model, tokens(1, 6))
        assert repr(rec) == "Recorder(on, 1 call, 1 group, 3 layers, 1 sequence not ended yet)"
        with rec.pause():
            assert repr(rec).startswith("Recorder(paused, 1 call")
    assert repr(rec) == "Recorder(off, 1 call, 1 group, 3 layers)"


def test_threads_are_refused_with_the_reason_and_disturb_nobody(model: nn.Module, routed: mr.RoutedModel) -> None:
    """The refused call neither ends the one that runs nor leaves tokens in the sums."""
    refused: list[str] = []
    went = 0
    gate = threading.Barrier(4)

    def call(seed: int) -> None:
        nonlocal went
        gate.wait()
        for _ in range(6):
            try:
                logits(model, tokens(1, 5, seed))
                went += 1
            except RuntimeError as failure:
                refused.append(str(failure))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with routed.record() as rec:
            threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert refused
    assert {text.split(":")[0] for text in refused} == {
        "the model was called in one thread while another was running it (or was interrupted in it)"
    }
    assert rec.statistics().tokens()[0, 0] == 5 * went


def test_two_models_are_recorded_and_steered_in_two_threads_as_one_after_the_other() -> None:
    models = [tiny_model(name, head=True) for name in ("qwen3_moe", "mixtral")]

    def recorded(number: int) -> mr.RoutingStatistics:
        with mr.attach(models[number]) as routed, routed.steer(mr.Plan.force_on({1: [3]})), routed.record() as rec:
            for seed in range(6):
                with rec.labels(groups=str(number)):
                    logits(models[number], tokens(2, 5, seed))
        return rec.statistics()

    expected = [recorded(number) for number in range(2)]
    found: dict[int, mr.RoutingStatistics] = {}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=lambda n=n: found.update({n: recorded(n)})) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [found[number] for number in range(2)] == expected


ENDS = """
import random, sys
import torch
from harness.tiny_models import tiny_model, tokens
import moe_route as mr
from moe_route.base.devices import Block

random.seed(int(sys.argv[1]))
model = tiny_model("qwen3_moe", head=True)
routed = mr.attach(model)
recorder = routed.record(sequences=True, trace=True)
recorder.__enter__()
with torch.no_grad():
    model(input_ids=tokens(2, 5))
statistics, trace = recorder.statistics(), recorder.trace()
steered = routed.steer(mr.Plan.force_on({0: [3]}))
steered.__enter__()
left = routed.steer(mr.Plan.force_on({0: [3]}))  # never entered
half = Block.__new__(Block)  # whose __init__ never ran
names = ["model", "routed", "recorder", "statistics", "trace", "steered", "left", "half"]
random.shuffle(names)
kept = [globals().pop(name) for name in names]
kept.append(kept)  # a circle, which the collector takes apart in its own order
sys.modules["moe_route.kept"] = kept
print("from here on nothing", file=sys.stderr)  # before it, libraries beside this one may have said something
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 6))])
def test_objects_that_die_in_any_order_at_the_end_print_nothing(seed: int) -> None:
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", ENDS, str(seed)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(mr.__file__).parents[1])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith("from here on nothing\n")


def test_a_block_never_raises_when_it_dies(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", failures.append)
    Block.__new__(Block).__del__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Block("routed.steer(plan)", contextlib.nullcontext())
        gc.collect()
    assert failures == []
    assert "routed.steer(plan) was never entered" in capsys.readouterr().err


def test_a_call_is_over_only_when_its_tokens_are_counted(
    model: nn.Module, routed: mr.RoutedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that calls the model while another one counts is refused; nothing of the other's call is lost."""
    refused: list[str] = []

    def call() -> None:
        try:
            logits(model, tokens(1, 3))
        except RuntimeError as failure:
            refused.append(str(failure))

    with routed.record() as rec:
        recorder = routed.recorder
        assert recorder is not None
        after_call = recorder._counting.after_call

        def call_meanwhile(ended: Any) -> None:
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
            after_call(ended)

        monkeypatch.setattr(recorder._counting, "after_call", call_meanwhile)
        logits(model, tokens(1, 5))
        monkeypatch.undo()
        logits(model, tokens(1, 2))
    assert [text.split(" while")[0] for text in refused] == ["the model was called in one thread"]
    assert rec.statistics().tokens()[0, 0] == 7


def test_detach_ends_what_is_on(model: nn.Module) -> None:
    before = logits(model, tokens(1, 4))
    routed = mr.attach(model)
    with routed.record() as rec, routed.steer(ON):
        with rec.labels("done"):
            logits(model, tokens(1, 4))
        with rec.labels("running"):
            logits(model, tokens(1, 4))
            with pytest.warns(RuntimeWarning, match=r"detach\(\) inside record\(\) and steer\(\): it ends here"):
                routed.detach()
            assert torch.equal(logits(model, tokens(1, 4)), before)
    assert rec.statistics().sequences().tolist() == [1, 0]
    assert rec.statistics().tokens()[:, 0].tolist() == [4, 4]
    assert "detached" in repr(routed)
