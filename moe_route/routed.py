"""The user's object: an attached model that records, steers and lets go.

    routed = attach(model)
    with routed.record(groups=["eng_Latn", "swh_Latn"]) as rec, rec.labels(groups=languages, items=sentences):
        model(**inputs)
    with routed.steer(plan):
        model.generate(**inputs)
    routed.detach()

It joins the floors below: the attachment asks it for the labels of every call, the recorder knows groups and
sequences, the plan's tables say which steering row a (phase, group) takes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe_route.calls.call import PHASES, Call, Phase
from moe_route.calls.token_rows import broadcast_rows, columns, in_phases, rows_on_device
from moe_route.calls.token_table import Labels
from moe_route.devices import upload
from moe_route.experts.interface import experts_implementations
from moe_route.identity import identity_of, library_versions
from moe_route.patching.attachment import Attachment
from moe_route.patching.context import CallListener
from moe_route.recording import LabelBlock, Recorder, RoutingStatistics
from moe_route.recording.recorder import DEFAULT_GROUP, RecordOptions
from moe_route.routers.discovery import RouterInfo
from moe_route.steering import CompiledPlan, Plan
from moe_route.steering.draw import token_counter

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RoutedModel", "attach"]


def attach(
    model: nn.Module,
    *,
    engine: Literal["hook", "fused"] = "hook",
    experts_implementation: Literal["moe_route"] | None = None,
    verify: bool = True,
) -> RoutedModel:
    """Attach to a loaded model. Its outputs stay bit for bit what they were until something steers.

    Args:
        engine: ``"hook"`` or ``"fused"``, see ``patching.Attachment``.
        experts_implementation: ``None`` keeps the model's own; ``"moe_route"`` runs its experts by this package's
            dispatch and combine (equal within bounds), until ``detach`` puts back what was set before.
        verify: check every kind of router against its specification on random hidden states first.

    Raises ``ModelNotSupportedError`` for a model without routers that can be attached to, ``AlreadyAttachedError`` for
    one that is attached; nothing is changed then.
    """
    return RoutedModel(Attachment(model, engine=engine, experts_implementation=experts_implementation, verify=verify))


class RoutedModel:
    """An attached model. As a context manager it detaches at the end."""

    def __init__(self, attachment: Attachment):
        self.attachment = attachment
        self.model = attachment.model
        self._recorder: Recorder | None = None  # the one that is on, or was last
        self._block: LabelBlock | None = None  # labels without a recording
        self._plans: list[Plan] = []  # of the steer blocks that are on
        self._steering: _Steering | None = None
        attachment.listener = _Listener(self)

    @property
    def routers(self) -> Sequence[RouterInfo]:
        """The routers, one per MoE layer, in forward order."""
        return self.attachment.routers

    @property
    def plan(self) -> Plan | None:
        """The plan that steers now (nested plans added up), or None."""
        return _added(self._plans)

    @property
    def recorder(self) -> Recorder | None:
        """The recorder that is on, or was last."""
        return self._recorder

    # ---- record

    def record(self, groups: Sequence[str] | None = None, **options: Unpack[RecordOptions]) -> Recorder:
        """A ``Recorder`` for this model, on inside its ``with`` block; ``options`` are the recorder's: ``sequences``,
        ``trace``, ``metrics``, ``entropy``, ``phases``, ``progress``, ``trace_limit``, ``trace_weights``,
        ``memory_bytes``.

        Entering it raises ``RuntimeError`` while another recording is on, or after ``detach``.
        """
        self._require_attached("record")
        return _RoutedRecorder(self, groups=groups, metadata=self._metadata(), **options)

    def statistics(self) -> RoutingStatistics:
        """``Recorder.statistics()`` of the recording that is on, or was last. Raises ``RuntimeError`` where there was
        none."""
        if self._recorder is None:
            raise RuntimeError("nothing was recorded yet: `with routed.record() as rec:` and call the model inside")
        return self._recorder.statistics()

    def labels(
        self, groups: Any = None, items: Any = None, *, count_mask: Any = None
    ) -> contextlib.AbstractContextManager[None]:
        """Say what the sequences of a batch are, as ``Recorder.labels`` does; without a recording only steering by
        group and replays by item use it, and groups are names."""
        self._require_attached("labels")
        if self._recording:
            assert self._recorder is not None
            return self._recorder.labels(groups, items, count_mask=count_mask)
        if groups is None and items is None:
            raise ValueError(
                "labels() without a recording needs groups, the names that the plan steers by, or items, those that it "
                "replays"
            )
        return self._labeled(LabelBlock.parse(DEFAULT_GROUP if groups is None else groups, items, count_mask, None))

    @contextlib.contextmanager
    def _labeled(self, block: LabelBlock) -> Iterator[None]:
        if self._block is not None:
            raise RuntimeError(
                "labels() inside labels(): leave the first block first, a sequence has one set of labels"
            )
        self._block = block
        try:
            yield
        finally:
            self._block = None

    # ---- steer

    @contextlib.contextmanager
    def steer(self, plan: Plan) -> Iterator[RoutedModel]:
        """Route by ``plan`` inside; plans of nested blocks add up. What is recorded meanwhile carries the plan's hash
        and counts the natural choice beside the steered one.

        Raises ``steering.PlanError`` for a plan that was made for another model or names layers and experts that this
        one lacks, ``ValueError`` for a router that cannot be steered, ``RuntimeError`` after ``detach``; the model is
        then steered as before.
        """
        self._require_attached("steer")
        if not isinstance(plan, Plan):
            raise TypeError(f"steer takes a Plan, not {type(plan).__name__}: Plan.activate(experts), Plan.load(path)")
        self._apply([*self._plans, plan])
        try:
            yield self
        finally:  # blocks may end in any order
            left = list(self._plans)
            left.remove(plan)
            self._apply(left)

    def _apply(self, plans: list[Plan]) -> None:
        plan = _added(plans)
        steering = _Steering(plan, self) if plan else None
        self.attachment.set_steering(None if steering is None else steering.compiled.tables)
        self._plans, self._steering = plans, steering
        if steering is not None and self._recording:
            assert self._recorder is not None
            self._recorder.note_plan(steering.compiled.plan_hash)

    # ---- let go

    def detach(self) -> None:
        """Take every hook away; the model is bit for bit what it was. Harmless twice. Raises ``RuntimeError`` inside
        ``record`` or ``steer``."""
        if self._recording or self._plans:
            what = "record()" if self._recording else "steer()"
            raise RuntimeError(f"detach() inside a {what} block: leave the block first")
        self.attachment.detach()

    def __enter__(self) -> RoutedModel:
        self._require_attached("use")
        return self

    def __exit__(self, *failure: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attachment.attached else "detached"
        doing = [what for what, on in (("recording", self._recording), ("steering", bool(self._plans))) if on]
        return f"RoutedModel({type(self.model).__name__}, {len(self.routers)} MoE layers, {', '.join([state, *doing])})"

    # ---- what the attachment asks

    def labels_of(self, call: Call) -> Labels:
        """Steering row, group and segment of the tokens of a call that is about to run."""
        group, segment = self._recorder.rows(call) if self._recording and self._recorder else (-1, -1)
        if self._steering is None:
            return Labels(-1, group, segment)
        recorded = self._recorder.block if self._recording and self._recorder else None
        block = recorded or self._block
        row = self._steering.rows(call, block)
        return Labels(row, group, segment, self._steering.counter(call), self._steering.entries(call, block))

    def after_call(self, call: Call) -> None:
        """The call went through."""
        if self._recording and self._recorder is not None:
            self._recorder.after_call()

    def reject_drafts(self, count: int) -> None:
        """The last ``count`` drafted tokens of the latest call were rejected."""
        if self._recorder is not None:
            self._recorder.reject_drafts(count)

    # ---- inside

    @property
    def _recording(self) -> bool:
        return self._recorder is not None and self._recorder.on

    def _begin(self, recorder: Recorder) -> None:
        self._require_attached("record")
        if self._recording:
            raise RuntimeError("a recording is on already: leave its block first, or give it more groups")
        self._recorder = recorder

    def _note_plan(self, recorder: Recorder) -> None:
        if self._steering is not None:
            recorder.note_plan(self._steering.compiled.plan_hash)

    def _require_attached(self, verb: str) -> None:
        if not self.attachment.attached:
            raise RuntimeError(f"cannot {verb}: this model was detached; attach(model) again")

    def _metadata(self) -> dict[str, Any]:
        return {
            "model": identity_of(self.model),
            "versions": library_versions(),
            "engines": sorted({s.engine for s in self.routers}),
            "experts": sorted({name for s in self.routers for name in experts_implementations(s.block)}),
        }


def _added(plans: list[Plan]) -> Plan | None:
    return sum(plans[1:], plans[0]) or None if plans else None


class _Listener(CallListener):
    """Passes what the attachment asks on to its ``RoutedModel``. A compiled model calls it as it is: bookkeeping in
    Python is no part of a graph."""

    def __init__(self, routed: RoutedModel) -> None:
        self.labels_of = torch.compiler.disable(routed.labels_of)  # type: ignore[method-assign]
        self.after_call = torch.compiler.disable(routed.after_call)  # type: ignore[method-assign]
        self.reject_drafts = routed.reject_drafts  # type: ignore[method-assign]


class _RoutedRecorder(Recorder):
    """A recorder that its ``RoutedModel`` knows of while it is on."""

    def __init__(self, routed: RoutedModel, **options: Any):
        super().__init__(routed.attachment, **options)
        self._routed = weakref.ref(routed)  # which knows this one: no cycle keeps a model alive

    def __enter__(self) -> Recorder:
        routed = self._routed()
        if routed is None:
            raise RuntimeError("cannot record: this model was detached; attach(model) again")
        if not self.on:
            routed._begin(self)
            routed._note_plan(self)
        return super().__enter__()


class _Steering:
    """A plan compiled for the live model, and the steering row of every token of a call."""

    def __init__(self, plan: Plan, routed: RoutedModel):
        identity = identity_of(routed.model)
        experts = [router.num_experts for router in routed.routers]
        plan.check_model(identity["name"], config_hash=identity["config_hash"], num_experts=experts)
        # groups that the plan does not name take the row of tokens without a group
        groups = tuple(dict.fromkeys(group for rule in plan.rules for group in rule.groups or ()))
        self.compiled: CompiledPlan = plan.compile(routed.routers, groups)
        self._index = {group: index for index, group in enumerate(groups)}
        self._rows = self.compiled.rows.tolist()
        self._block: LabelBlock | None = None
        self._cache: dict[tuple[int, int, torch.device], int | Tensor] = {}
        self._starts: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def rows(self, call: Call, block: LabelBlock | None) -> int | Tensor:
        """Steering row of the tokens of a call: an int, ``[N]`` or ``[N, length]``; -1 leaves a token alone."""
        if not call.prompt:
            return self._rows_in(call.phase, call, block)
        return in_phases(self._rows_in("prefill", call, block), self._rows_in("decode", call, block), call)

    def _rows_in(self, phase_name: Phase, call: Call, block: LabelBlock | None) -> int | Tensor:
        self._follow(block)
        phase, bounds = PHASES.index(phase_name), self.compiled.bounds
        found = self._rows_at(0, phase, call, block)
        if not bounds:
            return found
        position, found = call.positions(), broadcast_rows(found, call, "steering_row")
        for at, bound in enumerate(bounds, 1):
            after = broadcast_rows(self._rows_at(at, phase, call, block), call, "steering_row")
            found = torch.where(position >= bound, after, found)
        assert isinstance(found, Tensor)
        return found.expand(call.batch, call.length)

    def _follow(self, block: LabelBlock | None) -> None:
        """What is kept on a device is of one label block."""
        if block is not self._block:
            self._block, self._cache, self._starts = block, {}, {}

    def _rows_at(self, at: int, phase: int, call: Call, block: LabelBlock | None) -> int | Tensor:
        """Rows by the group of the token, for the class of positions ``at``."""
        if block is None:
            return self._rows[phase][0][at]
        key = (phase, at, call.device)
        if key not in self._cache:
            of_name = [self._rows[phase][self._index.get(name, -1) + 1][at] for name in block.names]
            self._cache[key] = rows_on_device(block.values(of_name), call.device)
        return columns(self._cache[key], call)

    def counter(self, call: Call) -> Tensor | None:
        """What tells tokens apart, where the plan draws experts for each."""
        if not self.compiled.draws:
            return None
        ids = call.input_ids
        shaped = ids is not None and ids.shape == (call.batch, call.length)
        return token_counter(call.positions(), ids if shaped else None)

    def entries(self, call: Call, block: LabelBlock | None) -> Tensor | None:
        """int64 ``[batch, length, M]``: which entry of each replayed table is a token's, -1 for none.

        None where the plan replays nothing. What runs beside a text (guidance, an assistant) has none.
        """
        tables = self.compiled.replays
        if not tables:
            return None
        if call.beside:
            return torch.full((1, 1, len(tables)), -1, device=call.device)
        self._follow(block)
        key = (call.batch, call.device)
        if key not in self._starts:
            self._starts[key] = self._starts_of(call, block)
        first, length = self._starts[key]
        place = call.tokens_before()[..., None]
        return torch.where(place < length, first + place, -1)

    def _starts_of(self, call: Call, block: LabelBlock | None) -> tuple[Tensor, Tensor]:
        """int64 ``[batch, 1, M]`` twice: where each row's sequence begins in each table, and how long it is."""
        items, groups = (None, None) if block is None else (block.items, block.sequence_groups)
        rows = [table.sequences(call.batch, items, groups) for table in self.compiled.replays]
        first = [table.first[row] for table, row in zip(self.compiled.replays, rows, strict=True)]
        length = [np.asarray(table.lengths)[row] for table, row in zip(self.compiled.replays, rows, strict=True)]
        starts, lengths = (torch.from_numpy(np.stack(of, 1))[:, None] for of in (first, length))
        return upload(starts, call.device), upload(lengths, call.device)
