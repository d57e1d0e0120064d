"""What `generate` knows and the calls it makes do not say: which tokens are the prompt, which sequences of a batch have
ended, what is only drafted, and, without a cache, which tokens of a text ran in earlier steps.

All of that is told by the objects that `generate` makes for itself: its stopping criteria (asked once a token was
chosen), its logits processors (which may run the model beside the text, as guidance does) and its generator of
candidates. `listen_to_generate` lets them tell, through methods of the model that make them.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_route.modules.intercept import ReplacedMethod, taken

if TYPE_CHECKING:
    from moe_route.calls.call import Call

_IDS = ("pad_token_id", "eos_token_id")
_DRAFTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
_PAGED = (
    "continuous batching (generate_batch, a ContinuousBatchingManager, cache_implementation='paged') packs several "
    "requests into one row and does not say which token is whose, so they cannot be recorded or steered apart. Use "
    "generate() with a padded batch, or run it outside record() and steer()"
)


class Listener(Protocol):
    """Who is told of the generations that run (`RunningCall`)."""

    idle: bool

    @property
    def generation(self) -> Generation | None: ...
    def begin_generation(self, generation: Generation) -> None: ...
    def end_generation(self, generation: Generation) -> None: ...
    def take_back(self, tokens: int) -> None: ...


class Prompt(NamedTuple):
    """What a generation was given: ids [batch, length], the mask, and the cache that holds the first of them."""

    ids: Tensor
    mask: object
    cache: Any


@dataclass(slots=True)
class _Text:
    batch: int
    prompt: int  # columns of the first call
    length: int  # columns of the latest call


class Generation:
    """One run of `generate`. What it is given is prefill, what it makes is decode. A sequence of its batch has ended
    when the stopping criteria say so; where rows are beams, which change places, when it is fed one of the ids `ends`.

    `chunked`: the prompt may come in several calls. `beside`: all of it is run for another text, as its draft.
    `continues`: it is an assistant's, and goes on with what an earlier one made. `prompt`: what the model will be
    called with first; vision towers may run before that."""

    def __init__(
        self,
        ends: tuple[int, ...] = (),
        *,
        beams: bool = False,
        chunked: bool = False,
        beside: bool = False,
        continues: bool = False,
        prompt: Prompt | None = None,
    ) -> None:
        self.thread = threading.get_ident()
        self.beside, self.prompt = beside, prompt
        self._ends, self._beams, self._chunked, self._continues = ends, beams, chunked, continues
        self._begun: set[nn.Module] = set()
        self._chose = False
        self._drafted = 0  # candidates at the end of the call that comes next
        self._texts: dict[nn.Module, _Text] = {}
        self._ended: Tensor | None = None  # bool [batch]
        self._denoises = False

    def __deepcopy__(self, memo: dict[int, object]) -> Generation:
        """Itself: copies of its stopping criteria tell it too."""
        return self

    def follow(self, module: nn.Module, call: Call) -> None:
        """Say of a call what `generate` knows of it."""
        if self.beside:
            call.beside = True
            return
        first = module not in self._begun and not self._continues
        self._begun.add(module)
        if call.denoises:
            self._denoises = True
            if call.input_ids is not None:
                self._leave_out_ended(call, call.input_ids[:, :0])  # not settled yet
            return
        if call.phase == "decode" and not self._chose and (first or self._chunked):
            call.phase = "prefill"
        if self._drafted:
            call.drafted, call.phase = self._drafted, "decode"
            call.prompt = call.length - call.drafted if first else 0
        elif call.input_ids is not None:
            self._follow_ids(module, call, call.input_ids)

    def _follow_ids(self, module: nn.Module, call: Call, ids: Tensor) -> None:
        """Mark the tokens of a call that an earlier call ran already: without a cache, the text so far runs again."""
        if call.past_length:
            if call.phase == "decode" or self._denoises:
                self._leave_out_ended(call, ids)
            return
        text = self._texts.get(module)
        if text is None or text.batch != call.batch or text.length >= call.length:
            self._texts[module] = _Text(call.batch, call.length, call.length)
            return
        columns = torch.arange(call.length, device=call.device)
        real = torch.ones_like(ids, dtype=torch.bool) if call.valid is None else call.valid
        call.valid, call.again = real & (columns >= text.length), real & (columns < text.length)
        self._leave_out_ended(call, ids[:, -1:])
        call.phase = "decode" if call.length - text.length == 1 else "prefill"
        call.continues, call.prompt = True, text.prompt
        text.length = call.length

    def _leave_out_ended(self, call: Call, latest: Tensor) -> None:
        """A sequence that runs alone is never fed its end: a batch counts the same as its sequences one by one."""
        if call.batch == 1:
            return
        told = self._chose and not self._beams
        ended = self._ended if told else self._fed_their_end(latest)
        if ended is not None and call.batch % len(ended) == 0:
            running = ~ended.repeat_interleave(call.batch // len(ended))[:, None].expand(-1, call.length)
            call.valid = running if call.valid is None else call.valid & running

    def _fed_their_end(self, latest: Tensor) -> Tensor | None:
        if not self._ends:
            return None
        ended = torch.stack([(latest == token).any(1) for token in self._ends]).any(0)
        if self._beams:
            return ended
        self._add(ended)
        return self._ended

    # ---- what its parts tell

    def chose(self, ended: Tensor) -> None:
        """A token was chosen for every row; those of bool [batch] `ended` have ended with it."""
        self._chose = True
        if not self._beams and len(ended) > 1:
            self._add(ended)

    def _add(self, ended: Tensor) -> None:
        before = self._ended  # of other rows where a loop of somebody else's asks about several candidates each
        self._ended = ended if before is None or len(before) != len(ended) else before | ended

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is no part of the text."""
        before, self.beside = self.beside, True
        try:
            yield
        finally:
            self.beside = before

    def draft_with(self, candidates: Any, take_back: Callable[[int], None]) -> None:
        """Follow a generator of candidates (of the class `CandidateGenerator`): what it drafts, and, by way of
        `take_back`, how many of the drafted tokens the model refused."""
        kind, generator = type(candidates), weakref.ref(candidates)

        def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self.aside():
                found = kind.get_candidates(generator(), input_ids, *args, **kwargs)
            self._drafted = found[0].shape[1] - input_ids.shape[1]
            return found

        def update_candidate_strategy(input_ids: Tensor, scores: Tensor, num_matches: int) -> Any:
            take_back(self._drafted - int(num_matches))
            self._drafted = 0
            return kind.update_candidate_strategy(generator(), input_ids, scores, num_matches)

        candidates.get_candidates = get_candidates
        candidates.update_candidate_strategy = update_candidate_strategy


def listen_to_generate(model: nn.Module, listener: Listener) -> list[ReplacedMethod]:
    """Let `listener` know of every `generate` of `model` and of the modules in it, until they are removed."""
    told = {
        "generate": _generate,
        "_get_stopping_criteria": _stopping_criteria,
        "_get_logits_processor": _logits_processor,
        "_get_candidate_generator": _candidate_generator,
        "init_continuous_batching": _refuse_batches,
    }
    return [
        ReplacedMethod(module, name, partial(function, module, listener))
        for module in model.modules()
        if callable(getattr(type(module), "generate", None))
        for name, function in told.items()
        if callable(getattr(type(module), name, None)) and not taken(module, name)
    ]


def refuse_paged(kwargs: Mapping[str, object]) -> None:
    """Raise `RuntimeError` for a call of continuous batching."""
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise RuntimeError(_PAGED)


def _generate(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = (given, getattr(module, "generation_config", None))
    ends, beams, chunk = (
        _setting(name, kwargs, *configs) for name in ("eos_token_id", "num_beams", "prefill_chunk_size")
    )
    outer = listener.generation
    generation = Generation(
        _once(ends),
        beams=beams not in ([], [1]),
        chunked=bool(chunk),
        beside=outer is not None and outer.beside,
        continues=bool(getattr(given, "is_assistant", False)),
        prompt=_prompt(args, kwargs),
    )
    drafts = any(kwargs.get(name) or any(getattr(config, name, None) for config in configs) for name in _DRAFTS)
    if not listener.idle and drafts and not callable(getattr(type(module), "_get_candidate_generator", None)):
        raise RuntimeError(
            f"{type(module).__name__} makes its drafts in a way that this version of moe-route does not know: which of "
            "them become text cannot be told. Generate without an assistant and without prompt lookup"
        )
    if not listener.idle and hasattr(module, "_compile_functions"):
        kwargs["disable_compile"] = True  # each half of a diffusion would be one graph, which asks for no labels
    listener.begin_generation(generation)
    try:
        return type(module).generate(module, *args, **kwargs)
    finally:
        listener.end_generation(generation)


def _prompt(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prompt | None:
    found = (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None)
    ids = next((value for value in found if isinstance(value, Tensor) and value.dim() == 2), None)
    if ids is None or ids.is_floating_point():
        return None
    return Prompt(ids, kwargs.get("attention_mask"), kwargs.get("past_key_values"))


def _stopping_criteria(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    criteria = type(module)._get_stopping_criteria(module, *args, **kwargs)
    return _telling(criteria, listener.generation, _Criteria)


def _logits_processor(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    processors = type(module)._get_logits_processor(module, *args, **kwargs)
    return _telling(processors, listener.generation, _Processors)


def _candidate_generator(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    candidates = type(module)._get_candidate_generator(module, *args, **kwargs)
    generation = listener.generation
    if generation is not None:
        generation.draft_with(candidates, listener.take_back)
    return candidates


def _refuse_batches(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    if not listener.idle:
        raise RuntimeError(_PAGED)
    return type(module).init_continuous_batching(module, *args, **kwargs)


class _Criteria:
    """Stopping criteria that tell a generation what they said."""

    generation: Generation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ended = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if isinstance(ended, Tensor):
            self.generation.chose(ended)
        return ended


class _Processors:
    """Logits processors whose calls of the model, if any, are beside the text."""

    generation: Generation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.generation.aside():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _telling(parts: Any, generation: Generation | None, kind: type) -> Any:
    """A list of criteria or processors, in a class that tells `generation` of its calls."""
    if generation is not None:
        parts = copy.copy(parts)  # it may be a list of the user's own
        parts.__class__ = _mixed(kind, parts.__class__)
        parts.generation = generation
    return parts


@cache
def _mixed(kind: type, original: type) -> type:
    return type(original.__name__, (kind, original), {"__module__": original.__module__})


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
