"""Information that only `generate` has about its calls: prompt length, finished sequences, drafted tokens.

For generation without a cache, it also marks the tokens that earlier steps already ran. `patching.generate` supplies
the information.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_route.calls.call import Call

_IDS = ("pad_token_id", "eos_token_id")


class Prompt(NamedTuple):
    """The prompt of `generate`: ids [batch, length], the mask, and the cache that may already hold the first ids."""

    ids: Tensor
    mask: object
    cache: Any


@dataclass(slots=True)
class _Text:
    batch: int
    prompt: int  # columns of the first call
    length: int  # columns of the latest call


class Generation:
    """One run of `generate`. Prompt tokens count as prefill and generated tokens as decode.

    A sequence of the batch has ended when the stopping criteria say so. With beam search, beams move between rows, so a
    row has ended once one of the ids `ends` is fed to it.

    Args:
        ends: ids that end a sequence.
        beams: whether the rows are beams.
        chunked: whether the prompt may arrive in several calls.
        beside: whether the whole run only drafts tokens for another text, and is not counted.
        continues: whether an assistant model continues an earlier run.
        prompt: ids with which the model will be called first; vision towers may run before that.
    """

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
        self._drafted = 0  # drafted tokens at the end of the next call
        self._texts: dict[nn.Module, _Text] = {}
        self._ended: Tensor | None = None  # bool [batch]
        self._denoises = False

    def __deepcopy__(self, memo: dict[int, object]) -> Generation:
        """Return the object itself, because copies of its stopping criteria report to it too."""
        return self

    def follow(self, module: nn.Module, call: Call) -> Call:
        """A copy of `call`, about to run on `module`, completed with the information that `generate` has."""
        call = replace(call)
        self._mark(module, call)
        return call

    def _mark(self, module: nn.Module, call: Call) -> None:
        if self.beside:
            call.beside = True
            return
        first = module not in self._begun and not self._continues
        self._begun.add(module)
        if call.denoises:
            self._denoises = True
            if call.input_ids is not None:
                self._leave_out_ended(call, call.input_ids[:, :0])  # the tokens of this call are not final yet
            return
        if call.phase == "decode" and not self._chose and (first or self._chunked):
            call.phase = "prefill"
        if self._drafted:
            call.drafted, call.phase = self._drafted, "decode"
            call.prompt = call.length - call.drafted if first else 0
        elif call.input_ids is not None:
            self._follow_ids(module, call, call.input_ids)

    def _follow_ids(self, module: nn.Module, call: Call, ids: Tensor) -> None:
        """Mark tokens that an earlier call already ran: without a cache, every step runs the whole text again."""
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
        """Exclude ended sequences, so that a batch counts the same as its sequences run one by one.

        A sequence that runs alone is never fed its end token.
        """
        if call.batch == 1:
            return
        reported = self._chose and not self._beams
        ended = self._ended if reported else self._fed_their_end(latest)
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

    # ---- reported by the objects of `generate`

    def chose(self, ended: Tensor) -> None:
        """Record that a token was chosen for every row; bool [batch] `ended` marks the rows that ended with it."""
        self._chose = True
        if not self._beams and len(ended) > 1:
            self._add(ended)

    def _add(self, ended: Tensor) -> None:
        before = self._ended  # of another size where a custom loop asks about several candidates per row
        self._ended = ended if before is None or len(before) != len(ended) else before | ended

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Treat the calls inside as not part of the text."""
        before, self.beside = self.beside, True
        try:
            yield
        finally:
            self.beside = before

    def draft_with(self, candidates: Any, reject_drafts: Callable[[int], None]) -> None:
        """Follow a `CandidateGenerator`: how many tokens it drafts, and how many of them the model rejects.

        `reject_drafts` is called with the number of rejected tokens.
        """
        kind, generator = type(candidates), weakref.ref(candidates)

        def get_candidates(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            with self.aside():
                candidates = kind.get_candidates(generator(), input_ids, *args, **kwargs)
            self._drafted = candidates[0].shape[1] - input_ids.shape[1]
            return candidates

        def update_candidate_strategy(input_ids: Tensor, scores: Tensor, num_matches: int) -> Any:
            reject_drafts(self._drafted - int(num_matches))
            self._drafted = 0
            return kind.update_candidate_strategy(generator(), input_ids, scores, num_matches)

        candidates.get_candidates = get_candidates
        candidates.update_candidate_strategy = update_candidate_strategy


def finished_tokens(model: nn.Module) -> tuple[int, ...]:
    """Token ids that ended sequences of a batch are fed, by the model's configuration: padding and end of sequence.

    A sequence that runs alone is never fed its end, so these ids do not count; a batch then counts the same as its
    sequences one by one.
    """
    config = getattr(model, "generation_config", None)
    return without_repeats([token for name in _IDS for token in setting(name, {}, config)])


def without_repeats(ids: list[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(ids))


def setting(name: str, kwargs: Mapping[str, Any], *configs: Any) -> list[int]:
    """Token ids of a setting as `generate` resolves it: its argument, the configuration passed to it, the model's."""
    values = [kwargs[name]] if name in kwargs else [getattr(config, name, None) for config in configs]
    value = next((value for value in values if value is not None), None)
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]
