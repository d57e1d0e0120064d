"""What `generate` knows and the calls it makes do not say: which ids are fed to sequences of a batch that have ended
(they may be given to `generate` alone), and, without a cache, which tokens of a text ran in earlier steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from moe_route.patching.replaced import ReplacedMethod, taken

if TYPE_CHECKING:
    from moe_route.patching.tokens import Call

_IDS = ("pad_token_id", "eos_token_id")


class Listener(Protocol):
    """Who is told of a generation that runs (`TokenContext`)."""

    generation: Generation | None


@dataclass(slots=True)
class _Text:
    batch: int
    prompt: int  # columns of the first call
    length: int  # columns of the latest call


class Generation:
    """One run of `generate`. A sequence of its batch ends with one of the ids `ends`, which it is fed while others go
    on, and padding after that. With beams, rows change places and only the ends themselves tell."""

    def __init__(self, ends: tuple[int, ...], beams: bool) -> None:
        self._ends, self._beams = ends, beams
        self._texts: dict[nn.Module, _Text] = {}
        self._ended: Tensor | None = None  # bool [batch]

    def follow(self, module: nn.Module, call: Call) -> None:
        """Mark the tokens of a call that an earlier call ran already: without a cache, the text so far runs again."""
        if call.input_ids is None:
            return
        if call.past_length:
            if call.length == 1:
                self._leave_out_ended(call, call.input_ids)
            return
        text = self._texts.get(module)
        if text is None or text.batch != call.batch or text.length >= call.length:
            self._texts[module] = _Text(call.batch, call.length, call.length)
            return
        columns = torch.arange(call.length, device=call.device)
        real = torch.ones_like(call.input_ids, dtype=torch.bool) if call.valid is None else call.valid
        call.valid, call.again = real & (columns >= text.length), real & (columns < text.length)
        self._leave_out_ended(call, call.input_ids[:, -1:])
        call.phase = "decode" if call.length - text.length == 1 else "prefill"
        call.continues, call.prompt = True, text.prompt
        text.length = call.length

    def _leave_out_ended(self, call: Call, latest: Tensor) -> None:
        """A sequence that runs alone is never fed its end: a batch counts the same as its sequences one by one."""
        if call.batch == 1 or not self._ends:
            return
        ended = torch.stack([latest[:, 0] == token for token in self._ends]).any(0)
        if not self._beams:
            ended = ended if self._ended is None else ended | self._ended
            self._ended = ended
        running = ~ended[:, None].expand(-1, call.length)
        call.valid = running if call.valid is None else call.valid & running


def listen_to_generate(model: nn.Module, listener: Listener) -> list[ReplacedMethod]:
    """Let `listener` know of every `generate` of `model` and of the modules in it, until they are removed."""
    modules = [m for m in model.modules() if callable(getattr(type(m), "generate", None)) and not taken(m, "generate")]
    return [ReplacedMethod(module, "generate", partial(_generate, module, listener)) for module in modules]


def _generate(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    own: Callable[..., Any] = type(module).generate
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = (given, getattr(module, "generation_config", None))
    ends, beams = (_setting(name, kwargs, *configs) for name in ("eos_token_id", "num_beams"))
    outer, listener.generation = listener.generation, Generation(_once(ends), beams not in ([], [1]))
    try:
        return own(module, *args, **kwargs)
    finally:
        listener.generation = outer


def finished_tokens(model: nn.Module) -> tuple[int, ...]:
    """Token ids that sequences of a batch are fed when they have ended, by the model's own configuration: padding, and
    the end itself (which a sequence that runs alone is never fed, so that a batch counts the same as its sequences one
    by one)."""
    config = getattr(model, "generation_config", None)
    return _once([token for name in _IDS for token in _setting(name, {}, config)])


def _once(ids: list[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))


def _setting(name: str, kwargs: Mapping[str, Any], *configs: Any) -> list[int]:
    """Ids as `generate` resolves them: its own argument, then the configuration it was given, then the model's."""
    found = [kwargs[name]] if name in kwargs else [getattr(config, name, None) for config in configs]
    value = next((value for value in found if value is not None), None)
    value = value.tolist() if isinstance(value, Tensor) else value
    return [] if value is None else [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
