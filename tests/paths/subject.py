"""A tiny model on its way through a path, and how a path can end."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import pytest
import torch
from harness.tiny_models import inputs, tiny_model
from harness.whole_models import WHOLE, text_inputs, whole_model
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How an architecture fares on a path."""

    kind: Literal["passed", "refused", "none"]
    reason: str = ""


PASSED = Outcome("passed")


class NotApplicableError(Exception):
    """There is no such path for this architecture, or transformers itself fails on it."""


class RefusedByNameError(Exception):
    """The library refused, with an error that names what and why."""


def first_sentence(error: BaseException) -> str:
    """The beginning of an error's message, free of numbers that differ from run to run."""
    text = (
        re.sub(r"'[^']*'|(?<![A-Za-z0-9.])\d+(?![A-Za-z0-9])", "…", " ".join(str(error).split()))
        or type(error).__name__
    )
    text = re.split(r"[.;:] |\(", text)[0][:120]
    return text.replace("|", "/").replace("`", "").rstrip(" .:")


def by_transformers(call: Callable[[], T]) -> T:
    """What `call` gives without moe-route in it. Where that fails, there is nothing to attach to."""
    try:
        return call()
    except NotApplicableError:
        raise
    except Exception as error:
        raise NotApplicableError(
            f"fails unattached, {type(error).__name__}: {first_sentence(error)}".rstrip(": ")
        ) from error


@contextmanager
def refusal(*kinds: type[BaseException], naming: str) -> Any:
    """The body must be refused with an error of one of `kinds` that contains `naming`; that is the path's end."""
    with pytest.raises(kinds, match=re.escape(naming)) as found:
        yield
    raise RefusedByNameError(first_sentence(found.value)) from found.value


class Subject:
    """One architecture: its tiny model with a head where it has one, and what it is called with."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def model(self) -> Any:
        """Shared by the paths that leave a model as it was."""
        return self.fresh()

    def fresh(self, **changes: Any) -> Any:
        """A model of the same weights, for paths that change it."""
        if self.name in WHOLE:
            return whole_model(self.name, **changes)
        try:
            return tiny_model(self.name, head=True, **changes)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            return tiny_model(self.name, **changes)

    def inputs(self, model: nn.Module, batch: int = 2, length: int = 7) -> dict[str, Tensor]:
        if self.name in WHOLE:
            return text_inputs(self.name, batch, length)
        return inputs(self.name, model, batch, length)

    @property
    def encodes(self) -> bool:
        """Whether there is an encoder beside the decoder."""
        return self.takes("decoder_input_ids")

    @property
    def denoises(self) -> bool:
        """Whether the decoder denoises blocks of tokens, again and again, instead of growing a text."""
        return hasattr(self.model.config, "canvas_length")

    def takes(self, argument: str) -> bool:
        return argument in inspect.signature(type(self.model).forward).parameters

    def needs(self, *arguments: str) -> None:
        """Raise `NotApplicableError` unless the model takes every one of `arguments`."""
        for argument in arguments:
            if not self.takes(argument):
                raise NotApplicableError(f"the model takes no {argument}")

    def needs_text(self) -> None:
        if "input_ids" not in self.inputs(self.model):
            raise NotApplicableError("the model takes no token ids")

    def needs_generate(self) -> None:
        if not (hasattr(self.model, "can_generate") and self.model.can_generate()):
            raise NotApplicableError("a part of other models, without generate")
        self.needs_text()


def run(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The first tensor that a call of the model returns."""
    with torch.no_grad():
        return model(**given)[0]
