"""Functions that torch.compile calls without tracing them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_route.modules.intercept import untraced

MANY = 12  # more than Dynamo's limit of compilations of one piece of code


def compiled_calls(decorator: Callable[..., Any]) -> tuple[set[tuple[bool, bool]], int]:
    """Run a compiled model with hooks: whether a hook and what it calls were traced, and how many graphs were made."""
    torch.compiler.reset()
    seen = set()

    def inner() -> bool:
        return torch.compiler.is_compiling()

    def hook(number: int) -> Callable[..., None]:
        @decorator
        def seen_outputs(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen.add((torch.compiler.is_compiling(), inner()))

        return seen_outputs

    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    for number in range(MANY):
        model[0].register_forward_hook(hook(number))
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(model, backend="eager")
    for rows in (1, 2, 5):
        compiled(torch.zeros(rows, 3))
    return seen, torch._dynamo.utils.counters["stats"]["unique_graphs"] - made


def test_an_untraced_function_is_called_as_a_disabled_one(recwarn: pytest.WarningsRecorder) -> None:
    assert compiled_calls(lambda function: function)[0] == {(True, True)}
    disabled = compiled_calls(torch.compiler.disable)
    assert compiled_calls(untraced) == disabled
    assert disabled[0] == {(False, False)}


def test_a_torch_without_that_entry_disables_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "_FrameExecStrategy")
    assert compiled_calls(untraced)[0] == {(False, False)}


ACTIONS = SimpleNamespace(SKIP=0, DEFAULT=1)
OTHERS = {
    "in another module": SimpleNamespace(),
    "of other arguments": SimpleNamespace(
        eval_frame=SimpleNamespace(_FrameAction=ACTIONS, _FrameExecStrategy=lambda action: action)
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_torch_whose_entry_is_another_disables_at_once(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "disable", lambda function: "disabled")
    monkeypatch.setattr(torch._C, "_dynamo", OTHERS[other])
    assert untraced(len) == "disabled"


def test_nothing_is_disabled_before_dynamo_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object) -> None:
        raise AssertionError("applied before anything could be traced")

    double = untraced(lambda number: 2 * number)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    monkeypatch.setattr(torch.compiler, "disable", refuse)
    assert double(21) == 42
