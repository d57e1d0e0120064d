"""Listen to `generate`: report to a `Generation` the information that the calls of the model do not carry.

The reports come from its stopping criteria, logits processors and candidate generators. `generate` makes these objects
in methods of the model, and those methods are replaced while a model is attached.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Protocol

from torch import Tensor, nn

from moe_route.calls.generation import Generation, Prompt, setting, without_repeats
from moe_route.calls.reader import cache_among
from moe_route.modules.intercept import ReplacedMethod, is_overridden

_DRAFTS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
_PAGED = (
    "continuous batching (generate_batch, a ContinuousBatchingManager, cache_implementation='paged') packs several "
    "requests into one row and does not say which token is whose, so they cannot be recorded or steered apart. Use "
    "generate() with a padded batch, or run it outside record() and steer()"
)


class Listener(Protocol):
    """Follows the running generations (`context.RunningCall`)."""

    idle: bool

    @property
    def generation(self) -> Generation | None: ...
    def begin_generation(self, generation: Generation) -> None: ...
    def end_generation(self, generation: Generation) -> None: ...
    def reject_drafts(self, tokens: int) -> None: ...


def listen_to_generate(model: nn.Module, listener: Listener) -> list[ReplacedMethod]:
    """Changes that report every `generate` of `model`, and of the modules in it, to `listener`."""
    replacements = {
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
        for name, function in replacements.items()
        if callable(getattr(type(module), name, None)) and not is_overridden(module, name)
    ]


def refuse_paged(kwargs: Mapping[str, object]) -> None:
    """Raise `RuntimeError` for a call of continuous batching."""
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise RuntimeError(_PAGED)


def _generate(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    configs = (given, getattr(module, "generation_config", None))
    ends, beams, chunk = (
        setting(name, kwargs, *configs) for name in ("eos_token_id", "num_beams", "prefill_chunk_size")
    )
    outer = listener.generation
    generation = Generation(
        without_repeats(ends),
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
            "them become text is unknown. Generate without an assistant and without prompt lookup"
        )
    if not listener.idle and hasattr(module, "_compile_functions"):
        kwargs["disable_compile"] = True  # a compiled half of a diffusion is one graph, without labels
    listener.begin_generation(generation)
    try:
        return type(module).generate(module, *args, **kwargs)
    finally:
        listener.end_generation(generation)


def _prompt(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Prompt | None:
    given = (kwargs.get("input_ids"), kwargs.get("inputs"), args[0] if args else None)
    ids = next((value for value in given if isinstance(value, Tensor) and value.dim() == 2), None)
    if ids is None or ids.is_floating_point():
        return None
    return Prompt(ids, kwargs.get("attention_mask"), cache_among(kwargs))


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
        generation.draft_with(candidates, listener.reject_drafts)
    return candidates


def _refuse_batches(module: Any, listener: Listener, *args: Any, **kwargs: Any) -> Any:
    if not listener.idle:
        raise RuntimeError(_PAGED)
    return type(module).init_continuous_batching(module, *args, **kwargs)


class _Criteria:
    """Stopping criteria that report their result to a generation."""

    generation: Generation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ended = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if isinstance(ended, Tensor):
            self.generation.chose(ended)
        return ended


class _Processors:
    """Logits processors whose own calls of the model, if any, do not count as part of the text."""

    generation: Generation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.generation.aside():
            return super().__call__(*args, **kwargs)  # type: ignore[misc]


def _telling(parts: Any, generation: Generation | None, kind: type) -> Any:
    """A list of criteria or processors, copied and given a class that reports to `generation`."""
    if generation is not None:
        parts = copy.copy(parts)  # the list may belong to the user
        parts.__class__ = _mixed(kind, parts.__class__)
        parts.generation = generation
    return parts


@cache
def _mixed(kind: type, original: type) -> type:
    return type(original.__name__, (kind, original), {"__module__": original.__module__})
