"""An interrupt at any line of attach, detach, record and steer leaves nothing half done."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.interrupts import count_lines, interrupt_at
from harness.tiny_models import tiny_model, tokens
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import moe_route as mr
from moe_route.patching import Attachment, attachment_of
from moe_route.recording import Recorder
from moe_route.recording.counting import Counting

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


def state(model: nn.Module) -> list[Any]:
    """Everything of a model that attaching to it may change."""
    own = [
        (name, type(module), sorted(vars(module)), [dict(getattr(module, hooks)) for hooks in HOOKS])
        for name, module in model.named_modules()
    ]
    return [own, model.config._experts_implementation, _get_current_function_mode_stack(), attachment_of(model)]


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(input_ids=tokens(1, 4))[0]


MODELS = {
    "fused": ("qwen3_moe", {"engine": "fused", "experts_implementation": "moe_route"}),
    "hook": ("qwen3_moe", {}),
    "method": ("dbrx", {}),
    "masks": ("ernie4_5_vl_moe", {}),
}


def small(name: str) -> nn.Module:
    return tiny_model(name, head=True, num_hidden_layers=2 if name.startswith("ernie") else 1)


def sampled(lines: int, each: int) -> range:
    assert lines > 100
    return range(0, lines, each)


@pytest.mark.parametrize(("kind", "each"), [("fused", 2), ("hook", 7), ("method", 7), ("masks", 7)])
def test_an_interrupted_attach_leaves_nothing(kind: str, each: int) -> None:
    name, options = MODELS[kind]
    model = small(name)
    before, plain = state(model), run(model)

    def attach() -> None:
        mr.attach(model, verify=False, **options)

    attach()  # fills caches, so that the next ones have as many lines as the one that is counted
    attachment_of(model).detach()
    lines = count_lines(attach, Attachment._install)
    attachment_of(model).detach()
    for line in sampled(lines, each):
        if not interrupt_at(line, attach, Attachment._install):  # a cache made this attach shorter than the counted one
            assert line > 0.9 * lines
            attachment_of(model).detach()
        assert state(model) == before, line
    with mr.attach(model, **options):
        torch.testing.assert_close(run(model), plain)
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("each", [211, pytest.param(7, marks=pytest.mark.exhaustive)])
def test_an_attach_that_is_interrupted_before_or_after_its_changes_leaves_nothing(each: int) -> None:
    model = small("qwen3_moe")
    before = state(model)
    mr.attach(model).detach()  # what is read once and kept
    lines = count_lines(lambda: mr.attach(model), mr.attach)
    attachment_of(model).detach()
    tried = (*range(0, lines, each), *range(lines - 60, lines))
    went_through = 0  # the number of lines is not always the same
    for line in tried:
        if not interrupt_at(line, lambda: mr.attach(model), mr.attach):
            attachment_of(model).detach()
            went_through += 1
        assert state(model) == before, line
    assert went_through < len(tried) // 4


@pytest.mark.parametrize("kind", ["fused", "hook", "method", "masks"])
def test_an_interrupted_detach_ends_attached_or_detached_and_can_be_called_again(kind: str) -> None:
    name, options = MODELS[kind]
    model = small(name)
    before, plain = state(model), run(model)
    lines = count_lines(mr.attach(model, verify=False, **options).detach, mr.RoutedModel.detach)
    ended = 0
    for line in sampled(lines, 1):
        routed = mr.attach(model, verify=False, **options)
        whole = state(model)
        assert interrupt_at(line, routed.detach, mr.RoutedModel.detach)
        assert state(model) == (whole if routed.attachment.attached else before), line
        ended += not routed.attachment.attached
        routed.detach()
        assert state(model) == before, line
    assert ended > lines // 2
    assert torch.equal(run(model), plain)


def test_a_detach_that_is_interrupted_twice_is_completed_by_the_next() -> None:
    model = small("qwen3_moe")
    before = state(model)
    lines = count_lines(mr.attach(model, verify=False).detach, Attachment._take_back)
    for line in range(0, lines, 3):
        routed = mr.attach(model, verify=False)
        undo, routed.attachment._undo = routed.attachment._undo, routed.attachment._take_back
        interrupt_at(line, routed.detach, Attachment._take_back)
        if not routed.attachment.attached:
            continue
        # the registration is taken back last, and may be gone before its entry is
        assert attachment_of(model) is routed.attachment or len(routed.attachment._changes) == 1, line
        routed.attachment._undo = undo
        routed.detach()
        assert state(model) == before, line


def replaced_class(model: nn.Module) -> None:
    gate = model.model.layers[0].mlp.gate
    gate.__class__ = type("Sharded", (type(gate),), {})


OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "generate": lambda model: setattr(model, "generate", len),
    "generate removed": lambda model: delattr(model, "generate"),
    "forward": lambda model: setattr(model.model.layers[0].mlp.gate, "forward", len),
    "class": replaced_class,
    "hooks": lambda model: model.model.layers[0].mlp.gate._forward_hooks.clear(),
    "experts": lambda model: model.set_experts_implementation("batched_mm"),
}


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_another_tool_replaced_meanwhile_is_left_to_it(other: str, engine: Any) -> None:
    model = small("qwen3_moe")
    gate, before = model.model.layers[0].mlp.gate, state(model)
    plain = run(model)
    routed = mr.attach(model, engine=engine, experts_implementation="moe_route")
    OTHERS[other](model)
    replaced = type(gate), vars(gate).get("forward"), vars(model).get("generate")
    routed.detach()
    routed.detach()
    assert (attachment_of(model), model.config._experts_implementation) == (
        None,
        "batched_mm" if other == "experts" else before[1],
    )
    if other == "class":
        assert (type(gate), type(gate).__name__) == (replaced[0], "Sharded")
        assert torch.equal(run(model), plain)  # though the class of the engine is below that of the tool
    elif other == "forward":
        assert gate.forward is len
    elif other == "generate":
        assert model.generate is len
    else:
        assert state(model)[0] == before[0]
    if other not in ("forward", "generate"):
        mr.attach(model).detach()


def test_a_failed_attach_leaves_nothing() -> None:
    model = small("qwen3_moe")
    before = state(model)
    model.set_experts_implementation("eager")
    original = type(model).generate
    model.model.layers[0].mlp.gate.register_forward_hook = None  # whoever breaks a module
    with pytest.raises(TypeError):
        mr.attach(model, experts_implementation="moe_route", verify=False)
    del model.model.layers[0].mlp.gate.register_forward_hook
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation(before[1])
    assert state(model) == before
    assert type(model).generate is original


def test_a_model_that_goes_while_its_experts_are_switched_leaves_nothing() -> None:
    model = small("qwen3_moe")
    mr.attach(model, experts_implementation="moe_route")
    config = weakref.ref(model.config)
    del model
    gc.collect()
    assert config() is None


PLAN = mr.Plan.force_on({0: [3]})


def record(routed: mr.RoutedModel) -> None:
    with routed.record(sequences=True) as rec, rec.labels(["x"]):
        run(routed.model)


def steer(routed: mr.RoutedModel) -> None:
    with routed.steer(PLAN):
        run(routed.model)


def both(routed: mr.RoutedModel) -> None:
    with routed.steer(PLAN), routed.record() as rec, rec.pause(), routed.labels("x"):
        run(routed.model)


ENTERS_AND_EXITS = {
    "record enter": (record, Recorder.__enter__),
    "record exit": (record, Counting.end),
    "labels exit": (record, Counting.end_labels),
    "steer enter": (steer, mr.RoutedModel._apply),
    "steer exit": (steer, mr.RoutedModel._end_steering),
    "pause": (both, Counting.paused.fset),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # interrupted before it was entered
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupted in a __del__
@pytest.mark.parametrize("where", ENTERS_AND_EXITS)
def test_leaving_a_block_by_an_interrupt_lets_go(where: str) -> None:
    act, root = ENTERS_AND_EXITS[where]
    model = small("qwen3_moe")
    plain = run(model)
    routed = mr.attach(model, verify=False)
    lines = count_lines(lambda: act(routed), root)
    each = max(1, lines // 60)
    for line in range(0, lines, each):
        interrupt_at(line, lambda: act(routed), root)
        gc.collect(0)
        assert "recording" not in repr(routed), line
        assert "steering" not in repr(routed), line
        assert routed._calls.block is None, line
        assert routed.attachment._context.idle, line
        assert torch.equal(run(model), plain), line
    with routed.record(sequences=True) as rec, rec.labels(["y"]):
        run(model)
    assert rec.statistics().tokens().tolist() == [[4]]
    assert rec.statistics().sequences().tolist() == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        routed.detach()


def test_detach_lets_go_even_where_an_interrupt_kept_exit_from_beginning() -> None:
    model = small("qwen3_moe")
    before = state(model)
    routed = mr.attach(model)
    recorder = routed.record()
    assert interrupt_at(0, lambda: record(routed), Recorder.__exit__)
    assert "recording" in repr(routed)
    with pytest.raises(RuntimeError, match="a recording is on already"), recorder:
        pytest.fail("the block was entered")
    with pytest.warns(RuntimeWarning, match=r"detach\(\) inside record\(\)"):
        routed.detach()
    assert state(model) == before
    assert routed.statistics().tokens()[0, 0] == 4
