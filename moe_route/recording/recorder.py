"""``Recorder``: what a user holds of a recording. ``Counting`` does the work while the model is called."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from moe_route.base.devices import Block, warn_never_entered
from moe_route.base.table import number_of
from moe_route.calls.call import name_groups, named_groups
from moe_route.recording.counting import RECORD_DEFAULTS, Counting, RecordedModel, RecordOptions
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.recording.trace import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_record_options(function: _Function) -> _Function:
    """Show the options of a recording in the signature of ``function``, in place of its ``**options``."""
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = RecordOptions.__annotations__
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in RECORD_DEFAULTS.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
    return function


class Recorder:
    """Counts the routing of one attached model inside its ``with`` block. It can be re-entered to continue recording.

    ``labels`` names the groups. A sequence lasts from its first call to the end of its label block. If no
    label is given per sequence (one name for all, or no block), every call without cached tokens begins new sequences.
    Padding is never counted.

    If the program ends inside the block, the recording ends as after an exception: finished sequences are kept.
    """

    _entered = True  # the value if __init__ raised

    @takes_record_options
    def __init__(
        self,
        model: RecordedModel,
        *,
        groups: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        **options: Unpack[RecordOptions],
    ):
        """Prepare a recording; nothing is counted before the ``with`` block.

        Args:
            groups: the only names allowed, in this order; None accepts any names ("all" if there are none).
            metadata: entries to keep with the statistics.
            options: see ``RecordOptions``; ``special_tokens`` is True or ids here.

        Raises ``TypeError`` for an option that there is not, ``ValueError`` for unknown names.
        """
        unknown = options.keys() - RECORD_DEFAULTS.keys()
        if unknown:
            raise TypeError(f"record() takes no {', '.join(sorted(unknown))}: it takes {', '.join(RECORD_DEFAULTS)}")
        self._counting = Counting(model, groups, metadata, {**RECORD_DEFAULTS, **options})
        self._entered = False

    def __enter__(self) -> Recorder:
        self._entered = True
        self._refuse_entry()
        try:
            self._begin()
            return self
        except BaseException:
            self._counting.let_go()
            raise

    def _refuse_entry(self) -> None:
        """Raise if the block cannot be entered now."""
        if self.on:
            raise RecordingError("this recorder is on already: one with block at a time")

    def _begin(self) -> None:
        self._counting.begin()

    def __exit__(self, *failure: object) -> None:
        if self.on:
            try:
                self._counting.end(finished=failure[0] is None)
            finally:
                self._counting.end(finished=False)  # continues where an interrupt stopped the first attempt

    def __del__(self) -> None:
        if not self._entered:
            warn_never_entered("routed.record(...)")

    @property
    def on(self) -> bool:
        """Whether the ``with`` block is active."""
        return self._counting.on

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups so far."""
        return tuple(self._counting.groups)

    def labels(self, groups: Any = None, items: Any = None, *, count_mask: Any = None) -> Block[None]:
        """Label the sequences of a batch, for all calls inside: chunks of a prefill, steps of ``generate``.

        Columns are positions from the start of the sequence, padding included. An encoder and its decoder each start at
        column 0. Beams and several returned sequences belong to the sequence that they come from. A block left by an
        exception discards its sequences.

        Args:
            groups: one name for all, a name (or index) per sequence ``[B]``, or per token ``[B, S]``. Tokens past the
                last column take the group of the last column.
            items: an id per sequence, which pairs it with its translations.
            count_mask: bool ``[B, S]``: count these tokens only. Tokens past the last column are not counted.

        Raises:
            ValueError: unknown groups, lengths that do not agree, or a sequence that the store already holds.
            RecordingError: outside the ``with`` block, or inside another label block.
        """
        return Block("labels(...)", self._labeled(groups, items, count_mask))

    @contextlib.contextmanager
    def _labeled(self, groups: Any, items: Any, count_mask: Any) -> Iterator[None]:
        counting = self._counting
        if not counting.on:
            raise RecordingError("labels() outside the recording: use it inside `with routed.record(...) as rec:`")
        if counting.block is not None:
            raise RecordingError(
                "labels() inside labels(): leave the first block first, a sequence has one set of labels"
            )
        block = counting.begin_labels(groups, items, count_mask)
        finished, before, name = False, named_groups(), name_groups  # a name of its own: modules may end first
        try:
            try:
                counting.block = block
                name(before if groups is None else block.named)
                yield
                finished = True
            finally:
                name(before)
                counting.end_labels(finished)
        finally:
            name(before)
            counting.end_labels(False)  # continues where an interrupt stopped the first attempt

    def pause(self) -> Block[None]:
        """Stop counting inside; running sequences continue afterwards."""
        return Block("pause()", self._pausing())

    @contextlib.contextmanager
    def _pausing(self) -> Iterator[None]:
        before = self._counting.paused
        try:
            try:
                self._counting.paused = True
                yield
            finally:
                self._counting.paused = before
        finally:
            self._counting.paused = before  # continues where an interrupt stopped the first attempt

    def add_metadata(self, entries: Mapping[str, Any]) -> None:
        """Add entries to the metadata of the statistics; they merge like the metadata of two runs."""
        self._counting.add_metadata(entries)

    def statistics(self) -> RoutingStatistics:
        """Take a snapshot: token sums of all calls so far, and sequence sums of the finished sequences.

        Sequences of a label block that is still active are not included. Raises ``RecordingError`` if nothing was
        counted although the model ran, or if a conservation law is broken.
        """
        if not self._entered:
            raise RecordingError(
                "nothing was recorded: this recording was never entered; write `with routed.record(...) as rec:` and "
                "call the model inside"
            )
        return self._counting.statistics()

    def trace(self) -> Trace:
        """Return the tokens traced so far. Raises ``RecordingError`` if ``trace`` was not requested."""
        return self._counting.trace()

    def __repr__(self) -> str:
        counting = self._counting
        state = "off" if self._entered else "not entered yet"
        if counting.on:
            state = "paused" if counting.paused else "on"
        counts = [(counting.calls, "call"), (len(counting.groups), "group"), (counting.layers, "layer")]
        parts = [state, *(number_of(count, noun) for count, noun in counts)]
        if counting.running is not None:
            parts.append(f"{number_of(counting.running.count, 'sequence')} not ended yet")
        return f"Recorder({', '.join(parts)})"
