"""Listen to the model's calls while a recording is on: label the tokens, and feed tables and accumulators.

The label block assigns each token to a group and a sequence. The token table carries this to the gate, and the gate
adds to int64 tables on the device. Nothing is copied to the host before a label block ends.
"""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moe_route.base.devices import capturing, refuse_capture
from moe_route.base.identity import UNKNOWN
from moe_route.base.table import number_of
from moe_route.calls.call import PHASES, Call, Phase
from moe_route.calls.token_table import CallListener, Labels, as_table, in_phases
from moe_route.contract.tables import METRICS, StatisticsTables
from moe_route.modules.intercept import untraced
from moe_route.recording.accumulators import Accumulator, ExpertOutputs, HiddenStates, PairCounts, SequenceConsistency
from moe_route.recording.choices import ChoiceCollector
from moe_route.recording.labels import LabelBlock
from moe_route.recording.metadata import add_fingerprints, merge_metadata
from moe_route.recording.sequences import RunningSequences
from moe_route.recording.special_tokens import SpecialTokens
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.recording.store import Item, SequenceStore
from moe_route.recording.tables import RecordedRouter, TableSet
from moe_route.recording.trace import Trace, TraceWriter
from moe_route.recording.vectors import SequenceAverages, SequencePool

DEFAULT_METRICS = ("counts", "probability", "weight", "weight_share")
DEFAULT_GROUP = "all"
LAG = 31
"""Number of decode steps that may wait to be counted together (`Attachment.set_statistics`)."""
logger = logging.getLogger(__name__)


class RecordedModel(Protocol):
    """The part of an attachment that the recorder uses (`patching.Attachment`)."""

    on_choice: Callable[[int, Tensor, Tensor], None] | None

    @property
    def routers(self) -> Sequence[RecordedRouter]: ...

    def set_statistics(self, tables: Sequence[StatisticsTables] | None, *, lag: int = 0) -> None: ...

    def flush(self) -> None: ...

    def watch_logits(self, callback: Callable[[int, Tensor], None]) -> None: ...

    def unwatch_logits(self, callback: Callable[[int, Tensor], None]) -> None: ...

    def watch(self, *, outputs: ExpertOutputs | None = None, inputs: HiddenStates | None = None) -> None: ...


class _Drafts(NamedTuple):
    """Drafted tokens of one call, counted apart from the groups until it is known which of them are text.

    Token i is counted in row ``first + i`` of the group tables. The rows that it belongs to are ``[drafts]``, -1 for
    none.
    """

    first: int
    groups: Tensor
    segments: Tensor


class RecordOptions(TypedDict, total=False):
    """What a recording keeps, and what it leaves out.

    Attributes:
        sequences: keep the averages of every sequence (q_i and a_i) by (item, group): True (in memory, beyond
            ``memory_bytes`` in a temporary folder), or the path of a folder.
        trace: keep the experts and weights of every token: True, or layers as indices from 0.
        logits: keep the router's own logits of every token in the trace, as float16 (True or "float16") or "float32":
            as many numbers per token and layer as there are experts. The log says how large that may become.
        metrics: names from ``ops.METRICS``.
        entropy: whether to sum the entropy of the router's distribution.
        consistency: average the Jaccard index of the experts of two tokens over each sequence: True for all pairs of
            tokens, or a number of pairs to draw per sequence.
        pairs: count pairs of experts that a token chose in one layer, and in two neighboring layers (twice E x E x 8
            bytes per group and layer).
        special_tokens: True counts them. False leaves out those that the model's configuration names (beginning, end,
            padding). Ids, such as ``tokenizer.all_special_ids``, name the tokens to leave out.
        phases: count only the tokens of these phases, "prefill" and "decode".
        progress: show a bar of finished sequences.
        trace_limit: largest number of tokens in a trace.
        trace_weights: dtype of the weights in a trace.
        memory_bytes: limit for sequences kept in memory.
        expert_outputs: add up norms and peaks of the outputs of chosen experts
            (``RoutingStatistics.expert_outputs``). The experts run once more, and outputs stay bit for bit the same.
        hidden: average the inputs of the routers, by sequence (with ``sequences``) and group
            (``RoutingStatistics.hidden``).
    """

    sequences: bool | str | os.PathLike[str]
    trace: bool | Iterable[int]
    logits: bool | Literal["float16", "float32"]
    metrics: Sequence[str]
    entropy: bool
    consistency: bool | int
    pairs: bool
    special_tokens: bool | Iterable[int]
    phases: Sequence[Phase]
    progress: bool
    trace_limit: int
    trace_weights: Literal["float16", "float32"]
    memory_bytes: int
    expert_outputs: bool
    hidden: bool


RECORD_DEFAULTS = RecordOptions(
    sequences=False,
    trace=False,
    logits=False,
    metrics=DEFAULT_METRICS,
    entropy=True,
    consistency=False,
    pairs=False,
    special_tokens=True,
    phases=PHASES,
    progress=False,
    trace_limit=1_000_000,
    trace_weights="float16",
    memory_bytes=256 << 20,
    expert_outputs=False,
    hidden=False,
)


class Counting(CallListener):
    """Counts the calls of one attached model.

    It owns the tables that the gate counts into, tracks running sequences, and adds them up when they end.

    Attributes:
        on: whether calls are counted, but for pauses.
        groups: group name -> row of the tables, as far as seen.
        block: the active label block, if any.
        running: the sequences that go on, if any.
        calls: number of calls counted.
    """

    def __init__(
        self,
        model: RecordedModel,
        groups: Sequence[str] | None,
        metadata: Mapping[str, Any] | None,
        options: RecordOptions,
    ):
        """``options`` are complete."""
        metrics, entropy, trace = options["metrics"], options["entropy"], options["trace"]
        _check_names(metrics, METRICS, "metric")
        _check_names(options["phases"], PHASES, "phase")
        if groups is not None and (isinstance(groups, str) or not groups or len(set(groups)) != len(groups)):
            raise ValueError("groups must be a list of different names, or None to take names as they come")
        self._model = model
        self._known = None if groups is None else tuple(groups)
        self.groups: dict[str, int] = {name: index for index, name in enumerate(groups or ())}
        self._phases = tuple(options["phases"])
        self._tables = TableSet(model.routers, groups=len(self.groups), metrics=metrics, entropy=entropy)
        widest = max(router.num_experts for router in model.routers)
        self._pool = SequencePool(len(self.groups), len(model.routers), widest, self._tables.metrics, entropy=entropy)
        self._store = self._new_store(options["sequences"], options["memory_bytes"])
        layers = trace if isinstance(trace, bool) else tuple(trace)
        if options["logits"] and not trace:
            raise ValueError("logits are kept with the tokens of a trace: record(trace=True, logits=True)")
        self._trace = (
            TraceWriter(
                model.routers,
                layers,
                limit=options["trace_limit"],
                weights=options["trace_weights"],
                logits=options["logits"],
            )
            if trace
            else None
        )
        self._outputs = ExpertOutputs(model.routers, len(self.groups)) if options["expert_outputs"] else None
        self._hidden = HiddenStates(model.routers, len(self.groups)) if options["hidden"] else None
        self._accumulators = self._new_accumulators(options["consistency"], options["pairs"])
        observers = [*self._accumulators, *([] if self._trace is None else [self._trace])]
        self._choices = ChoiceCollector(model.routers, observers) if observers else None
        keeps_logits = self._choices is not None and self._choices.logits_dtype is not None
        self._add_logits = untraced(self._choices.add_logits) if self._choices is not None and keeps_logits else None
        self._metadata = dict(metadata or {})
        self._special = None if options["special_tokens"] is True else SpecialTokens(options["special_tokens"])
        self._masked = {"padding"} | {f"{phase} tokens" for phase in PHASES if phase not in self._phases}
        if self._special is not None:
            self._masked.add("special tokens")
            self._metadata["special_tokens"] = list(self._special.ids)
        self._plans: set[str] = set()
        self._fingerprint: str | None = None
        self.calls = self._countable_calls = self._abandoned = self._captured = 0
        self._program_ends = False
        self.block: LabelBlock | None = None
        self.running: RunningSequences | None = None
        self._open = False  # a call was begun and has not gone through
        self._drafts: _Drafts | None = None  # drafts of the latest call
        self.on = self._paused = False
        self._progress = options["progress"]
        self._bar: tqdm | None = None  # one that is not shown would take the lock that all bars share
        self._process = os.getpid()  # the process that entered the block

    def _new_store(self, sequences: bool | str | os.PathLike[str], memory_bytes: int) -> SequenceStore | None:
        if sequences is False or sequences is None:
            return None
        routers = self._model.routers
        folder = None if sequences is True else sequences
        names, experts = [router.name for router in routers], [router.num_experts for router in routers]
        return SequenceStore(names, experts, folder=folder, memory_bytes=memory_bytes)

    def _new_accumulators(self, consistency: bool | int, pairs: bool) -> tuple[Accumulator, ...]:
        """What is added up beside the tables of the gate."""
        routers, groups = self._model.routers, len(self.groups)
        chosen: list[Accumulator] = [part for part in (self._outputs, self._hidden) if part is not None]
        if consistency is not False:
            chosen.append(SequenceConsistency(routers, groups, _number_of_pairs(consistency)))
        if pairs:
            chosen.append(PairCounts(routers, groups))
        return tuple(chosen)

    # ---- the block of the recording

    @property
    def layers(self) -> int:
        """Number of routers."""
        return len(self._model.routers)

    @property
    def keeps_sequences(self) -> bool:
        """Whether sequences are kept one by one."""
        return self._store is not None

    @property
    def paused(self) -> bool:
        """Whether counting is stopped for a while; sequences go on afterwards."""
        return self._paused

    @paused.setter
    def paused(self, paused: bool) -> None:
        self._paused = paused
        if self.on and paused:
            self._disconnect()
        elif self.on:
            self._connect()

    def begin(self) -> None:
        """Count from now on."""
        self._process = os.getpid()
        _on_now.add(self)
        self.on, self._open = True, False
        self._connect()
        self._bar = tqdm(unit=" sequences", desc="recording") if self._progress else None

    def end(self, *, finished: bool) -> None:
        """Add up the running sequences, and stop counting. Safe to call twice."""
        try:
            self._end_sequences(finished=finished)
            if self._store is not None:
                self._store.close()
        finally:
            self.let_go()

    def let_go(self) -> None:
        """Stop counting, whatever state an interrupt left behind."""
        self.on, self.block = False, None
        self._disconnect()
        if self._bar is not None:
            self._bar.close()
        _on_now.discard(self)

    def end_with_program(self) -> None:
        """End the recording before the interpreter shuts down, since counting during shutdown aborts the process.

        It says nothing of sequences that broke off, as nobody reads the averages any more.
        """
        self._program_ends = True
        if self._process == os.getpid():
            self.end(finished=False)
        else:  # in a forked child, the recording and the folder of its sequences belong to the parent
            self.on, self.running, self._drafts = False, None, None

    # ---- label blocks

    def begin_labels(self, groups: Any, items: Any, count_mask: Any) -> LabelBlock:
        """Check the labels of a block that is about to begin, and end the sequences before it."""
        block = LabelBlock.parse(self._default_group() if groups is None else groups, items, count_mask, self._known)
        self._refuse_repeats(block)
        self._end_sequences()
        return block

    def end_labels(self, finished: bool) -> None:
        """End the block and its sequences. Safe to call twice."""
        try:
            self._end_sequences(finished=finished)
        finally:
            self.block = None

    # ---- what was counted

    def add_metadata(self, entries: Mapping[str, Any]) -> None:
        """Add entries to the metadata of the statistics."""
        self._metadata = merge_metadata(self._metadata, entries)

    def note_checkpoint(self, hashes: Mapping[str, str]) -> None:
        """Keep the hashes of the model's weights as they are now; those that change during a recording are unknown."""
        model = dict(self._metadata.get("model") or {})
        for name, value in hashes.items():
            if model.setdefault(name, value) not in (value, UNKNOWN):
                model |= {name: UNKNOWN, "weights_changed": True}
        self._metadata["model"] = model

    def statistics(self) -> RoutingStatistics:
        """See ``Recorder.statistics``."""
        if not self.calls:
            raise RecordingError(
                "nothing was recorded: the attached model was not called inside the recording; call that very object "
                "(a model that was compiled, wrapped or replaced after attach() is another one)"
            )
        count = len(self.groups)
        sums = self._counted().read_groups(count)
        self._refuse_silence(sums.scalar("tokens").sum(axis=(0, 1)))
        routers = self._model.routers
        statistics = RoutingStatistics(
            groups=tuple(self.groups),
            layers=[router.name for router in routers],
            num_experts=[router.num_experts for router in routers],
            top_k=[router.top_k for router in routers],
            scalars=sums.scalars,
            metrics=sums.metrics,
            sequence_scalars=self._pool.scalars,
            sequence_sums=self._pool.sums,
            entropy=self._tables.entropy,
            metadata={**self._all_metadata(), "running_sequences": 0 if self.running is None else self.running.count},
            store=None if self._store is None else self._store.snapshot(),
            accumulated={name: array for part in self._accumulators for name, array in part.arrays(count).items()},
        )
        statistics.verify()
        return statistics

    def trace(self) -> Trace:
        """See ``Recorder.trace``."""
        if self._trace is None:
            raise RecordingError("no trace was asked for: record(trace=True) or record(trace=[layers])")
        trace = self._trace.snapshot(tuple(self.groups))
        return replace(trace, backends=tuple(self._all_metadata().get("backends", ())))

    # ---- the calls of the model

    def labels_of(self, call: Call) -> Labels:
        """Labels of the tokens of a call about to run, without a steering row."""
        return Labels(-1, *self._rows(call))

    def _rows(self, call: Call) -> tuple[int | Tensor, int | Tensor]:
        """Rows of the group tables and of the segment tables for the tokens of a call about to run; -1: not counted."""
        if call.beside:
            return -1, -1
        if self._choices is not None:
            self._choices.drop_call()
        self.reject_drafts()
        self._note_failure()
        first, end = self._columns(call)
        if not self.on or self._paused or first == end:
            return -1, -1
        running = self._sequences_of(call)
        captured = capturing(call.device)
        if captured:
            self._note_capture()
        if call.drafted:
            self._make_room(len(self.groups) + call.drafted, running.segments)
        decided = not call.drafted or end < call.length
        if self._choices is not None:
            group = self._by_phase(call, running.group_rows, 0)
            segment = self._by_phase(call, running.segment_rows, 0)
            self._choices.begin_call(call, group, segment, drafted=0 if decided else call.drafted)
        groups, segments = self._table_rows(running, call)
        if not decided:
            groups, segments = self._hold_drafts(call, groups, segments)
        if call.ahead:
            return groups, segments
        if not captured:
            running.keep_tokens(call, first, end)
        self.calls += 1
        self._countable_calls += running.block.mask is None and self._special is None
        self._open = True
        return groups, segments

    def _table_rows(self, running: RunningSequences, call: Call) -> tuple[int | Tensor, int | Tensor]:
        """Rows of the group tables and of the segment tables; kept where they are the same in every call of a phase."""
        group_capacity, segment_capacity = self._tables.group_capacity, self._tables.segment_capacity
        key = (call.phase, call.device, group_capacity, segment_capacity)
        if key in running.fixed_rows and not call.drafted:
            return running.fixed_rows[key]
        groups = self._by_phase(call, running.group_rows, group_capacity)
        segments = self._by_phase(call, running.segment_rows, segment_capacity)
        if running.by_sequence and not call.drafted:
            running.fixed_rows[key] = groups, segments
        return groups, segments

    def _columns(self, call: Call) -> tuple[int, int]:
        """The columns of a call that are in a recorded phase: index of the first, and index after the last."""
        prompt = call.prompt if call.drafted else 0
        first = 0 if prompt and "prefill" in self._phases else prompt
        return first, call.length if call.phase in self._phases else max(first, prompt)

    def _by_phase(self, call: Call, rows_at: Callable[[Call, int], int | Tensor], capacity: int) -> int | Tensor:
        """Rows of a call's tokens, offset by ``capacity`` for the second phase."""
        now = rows_at(call, PHASES.index(call.phase) * capacity) if call.phase in self._phases else -1
        if not (call.drafted and call.prompt):
            return now
        before = rows_at(call, PHASES.index("prefill") * capacity) if "prefill" in self._phases else -1
        return in_phases(before, now, call)

    def _hold_drafts(
        self, call: Call, groups: int | Tensor, segments: int | Tensor
    ) -> tuple[int | Tensor, int | Tensor]:
        """Count each drafted token in a row of its own, outside all groups, until it is known to be text or not."""
        if call.batch != 1:
            raise RecordingError(
                f"drafts of a batch of {call.batch}: which of them become text is known for one sequence at a time"
            )
        groups, segments = (as_table(rows, call) for rows in (groups, segments))
        first = PHASES.index("decode") * self._tables.group_capacity + len(self.groups)
        rows = torch.arange(first, first + call.drafted, dtype=groups.dtype, device=groups.device)
        self._drafts = _Drafts(first, groups[0, -call.drafted :], segments[0, -call.drafted :])
        held = torch.where(self._drafts.groups >= 0, rows, -1)
        groups, segments = groups.clone(), segments.clone()
        groups[0, -call.drafted :], segments[0, -call.drafted :] = held, -1
        return groups, segments

    def reject_drafts(self, count: int | None = None) -> None:
        """Assign the drafted tokens of the latest call: the last ``count`` were rejected, those before them are text.

        With None, nothing is known about any of them, so none is counted.
        """
        drafts, self._drafts = self._drafts, None
        if drafts is None:
            return
        refused = len(drafts.groups) if count is None else count
        self._counted().hand_over(drafts.first, drafts.groups, drafts.segments, len(drafts.groups) - refused)
        if refused and self.running is not None:
            self.running.drop_last(refused)
        if self._choices is not None:
            self._choices.reject_drafts(refused)

    def _note_failure(self) -> None:
        """Mark the sequences of a failed call as incomplete."""
        if self._open and self.running is not None:
            self.running.broken = True
        self._open = False

    def _note_capture(self) -> None:
        """Fix the tables in place, because the call is captured into a CUDA graph whose replays count into them."""
        if self._choices is not None:
            raise RecordingError(
                f"a CUDA graph is being captured, and {self._choices.options} is read call by call: record without, "
                "or pause()"
            )
        self._captured += 1
        self._tables.fixed = True

    def after_call(self, call: Call) -> None:
        """Complete the call for which ``labels_of`` was called."""
        self._open = False
        if self._choices is not None:
            self._choices.end_call()

    def note_plan(self, plan_hash: str) -> None:
        """Keep the hash of a plan that steers from now on, and count the natural choice too."""
        self._plans.add(plan_hash)
        if self._counted().add_natural_counts() and self.on and not self._paused:
            self._connect()

    # ---- internal

    def _counted(self) -> TableSet:
        """The tables, after counting every completed call."""
        self._model.flush()
        return self._tables

    def _connect(self) -> None:
        self._tables.follow()
        self._model.set_statistics(self._tables.layers, lag=LAG)
        self._model.on_choice = None if self._choices is None else untraced(self._choices.add)
        if self._add_logits is not None:
            self._model.unwatch_logits(self._add_logits)
            self._model.watch_logits(self._add_logits)
        if self._watches:
            self._model.watch(outputs=self._outputs, inputs=self._hidden)

    def _disconnect(self) -> None:
        self._model.set_statistics(None)
        self._model.on_choice = None
        if self._add_logits is not None:
            self._model.unwatch_logits(self._add_logits)
        if self._watches:
            self._model.watch()

    @property
    def _watches(self) -> bool:
        """Whether more is seen of the model than its choices."""
        return self._outputs is not None or self._hidden is not None

    def _sequences_of(self, call: Call) -> RunningSequences:
        """The running sequences that this call continues, or new ones."""
        named = None if self.block is None else self.block.sequences
        if named is not None and call.batch % named:
            raise RecordingError(
                f"the label block names {named} sequences, this call has a batch of {call.batch}: give one label per "
                "sequence, and each batch a block of its own (texts packed into one row: a label per token)"
            )
        running = self.running
        goes_on = named is not None or call.past_length > 0 or call.continues
        if running is not None and goes_on and running.fits(call.batch):
            return running
        return self._begin_sequences(call)

    def _begin_sequences(self, call: Call) -> RunningSequences:
        refuse_capture(call.device, "the beginning of a sequence")
        self._end_sequences()
        block = self.block or LabelBlock.parse(self._default_group(), None, None, self._known)
        for name in block.names:
            self.groups.setdefault(name, len(self.groups))
        self._pool.reserve(len(self.groups))
        running = RunningSequences(block, call.batch, self.groups, self._special)
        self._make_room(len(self.groups), running.segments)
        if block.mask is not None:
            self._masked.add("tokens outside the masks of the labels")
        if self._choices is not None:
            self._choices.begin_sequences(running, len(self.groups))
        self.running = running
        return running

    def _make_room(self, groups: int, segments: int) -> None:
        if self._counted().reserve(groups=groups, segments=segments):
            self._connect()

    def _end_sequences(self, *, finished: bool = True) -> None:
        """Add the running sequences to the pool and the store, or discard them if they are incomplete."""
        self.reject_drafts()
        self._note_failure()
        running = self.running
        if running is None:
            return
        complete = finished and not running.broken and running.begun
        values = self._choices.sequence_values(running) if complete and self._choices is not None else {}
        sums = self._counted().take_segments(running.segments)
        self.running = None  # last, so that after an earlier interrupt they are ended again
        if self._choices is not None:
            self._choices.end_sequences(running, values if complete else None)
        if not complete:
            self._abandoned += running.count
            if not self._program_ends:
                logger.warning(
                    "%s broke off, and %s left out of the averages; the tokens were counted up to there",
                    number_of(running.count, "sequence"),
                    "is" if running.count == 1 else "are",
                )
            return
        averages = self._pool.add(sums, running.segment_group)
        self._fingerprint = add_fingerprints(self._fingerprint, f"{running.fingerprint():x}")
        if self._store is not None:
            self._keep(running, averages, values)
        if self._bar is not None:
            self._bar.update(running.count)

    def _keep(self, running: RunningSequences, averages: SequenceAverages, values: Mapping[str, np.ndarray]) -> None:
        assert self._store is not None
        seen = np.flatnonzero(averages.tokens.any(axis=1))  # segments without a counted token are not kept
        names = list(self.groups)
        sequences = dict.fromkeys(running.segment_sequence[seen])
        unnamed = {sequence: self._store.next_unnamed() for sequence in sequences if running.item(sequence) is None}
        keys: list[tuple[Item, str]] = []
        for part in seen:
            sequence = running.segment_sequence[part]
            item = running.item(sequence)
            keys.append((unnamed[sequence] if item is None else item, names[running.segment_group[part]]))
        kept = {name: array[seen] for name, array in values.items()}
        self._store.append(keys, averages.stored(seen) | kept)

    def _refuse_repeats(self, block: LabelBlock) -> None:
        """Raise, before the model runs, if the store could not accept the sequences of a block."""
        if self._store is None or block.items is None:
            return
        codes = np.broadcast_to(block.codes, len(block.items)) if block.codes.ndim == 0 else block.codes
        seen: set[tuple[Item, str]] = set()
        for item, of_item in zip(block.items, codes, strict=True):
            for key in {(item, block.names[code]) for code in np.unique(of_item)}:
                if key in seen or key in self._store:
                    raise ValueError(
                        f"item {key[0]!r} of group {key[1]!r} was given already: every sequence of a group needs an "
                        "item id of its own"
                    )
                seen.add(key)

    def _default_group(self) -> str:
        if self._known is None:
            return DEFAULT_GROUP
        if len(self._known) == 1:
            return self._known[0]
        raise RecordingError(
            f"which of {', '.join(self._known)}? Wrap the call in `with rec.labels(groups=...):`, or in `with "
            "rec.pause():` to leave it out"
        )

    def _refuse_silence(self, tokens: np.ndarray) -> None:
        """Raise if a layer counted nothing although the model ran. ``tokens [L]``: number counted by each layer."""
        if self._countable_calls and not tokens.any():
            raise RecordingError(
                f"{self.calls} calls of the model reached no router: something bypasses them (a kernel, "
                "torch.compile before attach, an inner model that was replaced); mr.describe(model) shows the "
                "engines, attach() again after the last change to the model"
            )
        routers = list(zip(self._model.routers, tokens, strict=True))
        reached = {router.role for router, count in routers if count}  # a vision tower may count nothing
        silent = [router.name for router, count in routers if not count and router.role in reached]
        if silent:
            logger.warning("%d of %d layers counted no token: %s", len(silent), len(tokens), ", ".join(silent[:4]))

    def _all_metadata(self) -> dict[str, Any]:
        return {
            **self._metadata,
            "fingerprint": self._fingerprint or add_fingerprints(None, None),
            "masked": sorted(self._masked),
            "plans": sorted(self._plans),
            "calls": self.calls,
            "captured_calls": self._captured,
            "abandoned_sequences": self._abandoned,
        }


_on_now: weakref.WeakSet[Counting] = weakref.WeakSet()


@atexit.register
def _end_recordings() -> None:
    for counting in list(_on_now):
        counting.end_with_program()


def _number_of_pairs(consistency: bool | int) -> int | None:
    """Number of pairs to draw per sequence, None for all."""
    if consistency is True:
        return None
    if not isinstance(consistency, int) or consistency < 1:
        raise ValueError(
            f"consistency is True for all pairs of tokens, or a number of pairs from 1, not {consistency!r}"
        )
    return consistency


def _check_names(given: Sequence[str], known: Sequence[str], what: str) -> None:
    unknown = [name for name in given if name not in known]
    if isinstance(given, str) or unknown or not given:
        raise ValueError(f"{what}s are some of {', '.join(known)}, not {given!r}")
