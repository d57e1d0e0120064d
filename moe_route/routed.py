"""``RoutedModel``: an attached model that records, steers and detaches.

    routed = attach(model)
    with routed.record(groups=["eng_Latn", "swh_Latn"]) as rec, rec.labels(groups=languages, items=sentences):
        model(**inputs)
    with routed.steer(plan):
        model.generate(**inputs)
    routed.detach()

It connects the packages: the attachment asks it for the labels of every call, the recorder holds groups and sequences,
and the compiled plan gives the steering row of each (phase, group, position).
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from moe_route.base.devices import Block, refuse_capture, upload
from moe_route.base.identity import UNKNOWN, checkpoint_of, identity_of, library_versions, same_weights
from moe_route.calls.call import PHASES, Call, NamedGroups, Phase, name_groups, named_groups
from moe_route.calls.token_table import CallListener, Labels, broadcast_rows, columns, in_phases, rows_on_device
from moe_route.contract.token_tables import entries, starts
from moe_route.experts.interface import experts_implementations
from moe_route.modules.intercept import untraced
from moe_route.ops import library
from moe_route.ops.token_rules import token_counter
from moe_route.patching.attachment import Attachment, attachment_of
from moe_route.recording import LabelBlock, Recorder, RoutingStatistics
from moe_route.recording.counting import DEFAULT_GROUP, Counting, RecordOptions
from moe_route.recording.recorder import takes_record_options
from moe_route.recording.special_tokens import special_ids_of
from moe_route.routers.discovery import RouterInfo
from moe_route.steering import CompiledPlan, ExpertSelection, LearnedRouting, Plan, Reach
from moe_route.steering.learned import RoutingParameters, fit, frozen

if TYPE_CHECKING:
    from typing_extensions import Unpack


def attach(
    model: nn.Module,
    *,
    engine: Literal["hook", "fused"] = "hook",
    ties: Literal["index", "model"] = "index",
    experts_implementation: Literal["moe_route"] | None = None,
    pack: bool = False,
    verify: bool = True,
) -> RoutedModel:
    """Attach to a loaded model. With a hook, its outputs stay bit for bit the same until a plan steers it.

    If attaching fails or is interrupted, the model is unchanged.

    Args:
        engine: ``"hook"`` reads what the router chose: while nothing steers, every bit of the model stays. ``"fused"``
            runs the gate matrix and one ``route`` call in place of the router, with the same logits. Given one input, a
            router then chooses the same experts unless its k-th and next score are tied: equal where it compares
            logits or their softmax, within 4 units in the last place of its scores where it compares sigmoids, adds a
            bias or keeps groups. Weights are rounded once: within 1 unit in the last place of the model's, in float32
            within 8, and within 4 where the model computes scores in bfloat16 or float16. Logits after several layers
            have no bound, since other experts may follow from a tie; docs/describe.md has the whole contract.
        ties: with ``"fused"``, who chooses among tied scores. ``"index"``: the larger logit, then the lower index.
            ``"model"``: the model's own router runs for every call in which a row is tied, so that it chooses the same
            experts throughout. That asks the host in every layer, and is refused under ``torch.compile`` and in CUDA
            graphs.
        experts_implementation: ``None`` keeps the model's own; ``"moe_route"`` runs its experts by this package's
            dispatch and combine (equal within bounds), until ``detach`` restores the former one.
        pack: with ``"moe_route"`` on a CPU, keep a packed copy of the experts' weights until ``detach``: faster from
            about four tokens per expert on, the same bits as without, and as much memory again as these weights take.
        verify: first check every kind of router against its specification on random hidden states.

    Raises ``ModelNotSupportedError`` for a model without routers that can be attached to, ``AlreadyAttachedError`` for
    one that is attached already.
    """
    attachment = None
    try:
        attachment = Attachment(
            model,
            engine=engine,
            ties=ties,
            experts_implementation=experts_implementation,
            pack=pack,
            verify=verify,
        )
        return RoutedModel(attachment)
    except BaseException:
        if attachment is not None:
            attachment.detach()
        raise


class RoutedModel:
    """An attached model. As a context manager it detaches at the end."""

    def __init__(self, attachment: Attachment):
        self.attachment = attachment
        self.model = attachment.model
        self._plans: dict[object, Plan] = {}  # plans of the active steer blocks
        self._reaches: dict[object, Reach] = {}  # and what they have reached
        self._protected: ExpertSelection | None = None
        self._hashed: tuple[list[tuple[int, int]], dict[str, str]] | None = None  # versions of the weights, hashes
        self._unknown: set[str] = set()  # plans that were warned of
        self._applied = True  # whether the attachment steers by these plans
        self._calls = attachment.listener = _Calls()

    @property
    def routers(self) -> Sequence[RouterInfo]:
        """The routers, one per MoE layer, in forward order."""
        return self.attachment.routers

    @property
    def plan(self) -> Plan | None:
        """The plan that steers now (the sum of nested plans), or None."""
        return _added(self._plans.values())

    @property
    def recorder(self) -> Recorder | None:
        """The active recorder, or the last one."""
        return self._calls.recorder

    # ---- record

    @takes_record_options
    def record(
        self,
        groups: Sequence[str] | None = None,
        **options: Unpack[RecordOptions],
    ) -> Recorder:
        """Make a ``Recorder`` for this model, active inside its ``with`` block. It can be re-entered to continue.

        Args:
            groups: the only names that labels may use, in this order; None accepts any names ("all" if there are none).
            options: what to keep besides the sums over tokens, and what to leave out: see ``RecordOptions``.

        Raises ``TypeError`` for an option that there is not, ``ValueError`` for unknown names, ``RuntimeError`` after
        ``detach``. Entering it raises ``RuntimeError`` while another recording is active, and
        ``experts.NoExpertOutputsError`` for experts whose outputs cannot be seen.
        """
        self._require_attached("record")
        if options.get("special_tokens") is False:
            options["special_tokens"] = special_ids_of(self.model)
        return _RoutedRecorder(self._calls, self.attachment, groups=groups, metadata=self._metadata(), **options)

    def statistics(self) -> RoutingStatistics:
        """Return ``Recorder.statistics()`` of the active recorder, or of the last one.

        Raises ``RuntimeError`` if there was none.
        """
        if self.recorder is None:
            raise RuntimeError("nothing was recorded yet: `with routed.record() as rec:` and call the model inside")
        return self.recorder.statistics()

    def labels(self, groups: Any = None, items: Any = None, *, count_mask: Any = None) -> Block[None]:
        """Label the sequences of a batch; see ``Recorder.labels``.

        Without a recording, only steering by group and replays by item use the labels, and groups are names.
        """
        self._require_attached("labels")
        if self._recording:
            assert self.recorder is not None
            return self.recorder.labels(groups, items, count_mask=count_mask)
        if groups is None and items is None:
            raise ValueError(
                "labels() without a recording needs groups, the names that the plan steers by, or items, those that it "
                "replays"
            )
        block = LabelBlock.parse(DEFAULT_GROUP if groups is None else groups, items, count_mask, None)
        return Block("labels(...)", _labeling(self._calls, block, named_groups() if groups is None else block.named))

    def router_logits(self) -> Block[dict[int, Tensor]]:
        """See the logits of every router: ``with routed.router_logits() as logits: model(**inputs)``.

        The dict holds the logits of the latest call by MoE layer, ``[B, T, E]`` in the router's dtype, with their
        gradient, also of models that compute logits and drop them. They are the router's own, before any steering, of
        padding too; NaN for a token that the layer was not given. Routers of a vision tower are left out. A CUDA graph
        that is being captured is refused.

        Raises ``RuntimeError`` after ``detach``.
        """
        self._require_attached("read router logits")
        return Block("routed.router_logits()", self._reading_logits())

    @contextlib.contextmanager
    def _reading_logits(self) -> Iterator[dict[int, Tensor]]:
        seen: dict[int, Tensor] = {}

        @untraced
        def keep(layer: int, logits: Tensor) -> None:
            refuse_capture(logits.device, "reading router logits")
            seen[layer] = logits.unflatten(0, self.attachment.call_shape(len(logits)))

        try:
            try:
                self.attachment.watch_logits(keep)
                yield seen
            finally:
                self.attachment.unwatch_logits(keep)
        finally:
            self.attachment.unwatch_logits(keep)  # continues where an interrupt stopped the first attempt

    # ---- steer

    def steer(self, plan: Plan, *, reach: Reach | None = None) -> Block[RoutedModel]:
        """Steer by ``plan`` inside the block; plans of nested blocks add up.

        A recording meanwhile keeps the plan's hash, and counts the natural choice beside the steered one.

        A block that ends warns (``RuntimeWarning``) of each rule that reached no token of its calls, because its group,
        phase or positions never came. ``reach`` gathers this over several blocks of one plan, which then say nothing:
        ``reach.warn()`` says it after the last.

        Entering the block raises ``steering.PlanError`` for a plan that was made for another model or names layers and
        experts that this one lacks, ``ValueError`` for a router that cannot be steered, and ``RuntimeError`` after
        ``detach``. The model is then steered as before.
        """
        if not isinstance(plan, Plan):
            raise TypeError(f"steer takes a Plan, not {type(plan).__name__}: Plan.activate(experts), Plan.load(path)")
        self._warn_of_protected(plan)
        return Block("routed.steer(plan)", self._steered(plan, reach))

    def protect(self, experts: Mapping[int, Iterable[int]] | None) -> None:
        """Warn from now on when a plan names one of these experts (layer -> ids); None ends it.

        Meant for super experts (``analysis.super_experts(statistics).selection``), whose change breaks the model on any
        text. ``steer`` then gives a ``RuntimeWarning`` that lists them, and steers all the same. Raises
        ``PlanError`` for experts that the model lacks.
        """
        selection = None if experts is None else ExpertSelection(experts)
        if selection:
            self._compiled(Plan.forbid(selection))  # refuses layers and experts that the model lacks
        self._protected = selection

    def _warn_of_protected(self, plan: Plan) -> None:
        touched = self._protected and plan.touching(self._protected)
        if touched:
            listed = ", ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in touched.items())
            warnings.warn(
                f"this plan names protected experts ({listed}): leave them out (experts - protected, or "
                "plan.random(seed, exclude=protected))",
                RuntimeWarning,
                stacklevel=3,
            )

    @contextlib.contextmanager
    def _steered(self, plan: Plan, reach: Reach | None) -> Iterator[RoutedModel]:
        self._require_attached("steer")
        block = object()  # a key per block, since blocks may end in any order
        own = Reach(plan.rules) if reach is None else reach
        try:
            try:
                self._reaches[block] = own
                self._apply({**self._plans, block: plan})
                yield self
                if reach is None:
                    own.warn(stacklevel=5)
            finally:
                self._end_steering(block)
        finally:
            self._end_steering(block)  # continues where an interrupt stopped the first attempt

    def _end_steering(self, block: object, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # A block still open when the interpreter ends is closed after its modules are gone: nothing is left to steer.
        if finalizing():
            return
        self._reaches.pop(block, None)
        if block in self._plans or not self._applied:
            self._apply({other: plan for other, plan in self._plans.items() if other is not block})

    def _apply(self, plans: Mapping[object, Plan]) -> None:
        plan = _added(plans.values())
        self._set(plans, None if plan is None else _ActivePlan(self._compiled(plan)))

    def _compiled(self, plan: Plan) -> CompiledPlan:
        """The plan, checked against the live model and compiled for it."""
        made = self._identity(plan.model.router_hash, plan.model.weights_hash)
        plan.check_model(made.pop("name"), **made)
        if plan.model.weights_hash and same_weights(plan.model.weights_hash, made.get("weights_hash")) is None:
            self._warn_of_unknown(plan)
        # tokens of groups that the plan does not name take the row of tokens without a group
        groups = tuple(dict.fromkeys(group for rule in plan.rules for group in rule.groups or ()))
        return plan.compile(self.routers, groups)

    def _identity(self, *needed: str | None) -> dict[str, Any]:
        """What a plan is compared with: the hashes of the weights only where the plan has one to compare."""
        identity = identity_of(self.model)
        experts = [router.num_experts for router in self.routers]
        made = {"name": identity["name"], "config_hash": identity["config_hash"], "num_experts": experts}
        if set(needed) - {None, UNKNOWN}:
            now = [(id(p), p._version if not p.is_inference() else 0) for p in self.model.parameters()]
            if self._hashed is None or self._hashed[0] != now:
                self._hashed = now, _checkpoint(self.attachment)
            made |= self._hashed[1]
        return made

    def _warn_of_unknown(self, plan: Plan) -> None:
        """Warn once per plan that nothing tells whether it was made for this checkpoint."""
        if plan.hash in self._unknown:
            return
        self._unknown.add(plan.hash)
        warnings.warn(
            "whether this plan was made for these weights is unknown (float16, quantized, offloaded, divided among "
            "ranks, or of another layout): it steers by its layers and experts all the same",
            RuntimeWarning,
            stacklevel=6,
        )

    def _set(self, plans: Mapping[object, Plan], steering: _ActivePlan | None) -> None:
        compiled = None if steering is None else steering.compiled
        self._applied = False
        self.attachment.set_directions(None if compiled is None else compiled.directions)
        self.attachment.set_steering(None if compiled is None else compiled.tables)
        self._plans, self._calls.steering = dict(plans), steering
        self._calls.reaches = tuple(reach for block, reach in self._reaches.items() if block in plans)
        if steering is not None and self._calls.recording is not None:
            self._calls.recording.note_plan(steering.compiled.plan_hash)
        self._applied = True

    # ---- learn

    def learn(
        self,
        loss: Callable[[], Tensor],
        *,
        layers: Iterable[int] | int | None = None,
        what: Literal["bias", "scale", "temperature"] = "bias",
        groups: Sequence[str] | str | None = None,
        steps: int = 20,
        lr: float = 0.01,
    ) -> LearnedRouting:
        """Train a few numbers that change the routing, with the model frozen [Rewiring, arXiv 2510.14853].

        ``loss`` is called once per step, with the model steered by the numbers so far. Its gradient reaches them
        through the weights of the chosen experts; the choice itself has no gradient. The model's weights take none and
        stay bit for bit the same. Afterwards nothing steers; ``result.plan`` holds what was learned.

        Args:
            loss: runs the model, and returns a tensor with one number. To train groups apart, it runs the model inside
                ``routed.labels(groups=...)``.
            layers: MoE layers to train, from 0; by default all.
            what: "bias" adds a number per expert to the logits, ``z + delta``. "scale" multiplies them by a positive
                number per expert. "temperature" divides all logits of a layer by a positive number.
            groups: groups with numbers of their own; other tokens are then routed as usual. None: all tokens share
                them.
            steps: number of updates by Adam.
            lr: its learning rate, in the unit of logits for a bias, of logarithms of factors otherwise.

        Raises ``PlanError`` for layers that the model lacks or that cannot be steered, and for a loss without gradient
        or that is not finite; ``RuntimeError`` inside ``steer``, inside ``record``, and after ``detach``.
        """
        self._require_attached("learn")
        if self._plans or self._recording:
            raise RuntimeError("learn() inside steer() or record(): leave that block first")
        parameters = RoutingParameters(self.routers, layers, groups, what)
        try:
            with frozen(self.model):
                losses = fit(
                    parameters, loss, lambda compiled: self._set({}, _ActivePlan(compiled)), steps=steps, lr=lr
                )
        finally:
            self._apply({})
        made = self._identity("learned")
        plan = parameters.plan().for_model(made.pop("name"), **made)
        return LearnedRouting(plan, tuple(losses), what, parameters.layers, parameters.groups, parameters.found())

    # ---- detach

    def detach(self) -> None:
        """Remove every hook; the model is then bit for bit what it was. Safe to call twice, and after an interrupt.

        An active recording or steering ends here as after an exception, with a ``RuntimeWarning``.
        """
        try:
            self._end_blocks()
        finally:
            self.attachment.detach()

    def _end_blocks(self) -> None:
        on = [what for what, on in (("record()", self._recording), ("steer()", bool(self._plans))) if on]
        if on:
            warnings.warn(f"detach() inside {' and '.join(on)}: it ends here", RuntimeWarning, stacklevel=3)
        try:
            if self._calls.recording is not None:
                self._calls.recording.end(finished=False)
        finally:
            if self._plans or not self._applied:
                self._apply({})

    def __enter__(self) -> RoutedModel:
        self._require_attached("use")
        return self

    def __exit__(self, *failure: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attachment.attached else "detached"
        doing = [what for what, on in (("recording", self._recording), ("steering", bool(self._plans))) if on]
        return f"RoutedModel({type(self.model).__name__}, {len(self.routers)} MoE layers, {', '.join([state, *doing])})"

    # ---- internal

    @property
    def _recording(self) -> bool:
        return self._calls.recording is not None

    def _require_attached(self, verb: str) -> None:
        if not self.attachment.attached:
            raise RuntimeError(f"cannot {verb}: this model was detached; attach(model) again")

    def _metadata(self) -> dict[str, Any]:
        return {
            "model": identity_of(self.model),
            "versions": library_versions(),
            "engines": sorted({s.engine for s in self.routers}),
            "backends": sorted({library.served(s.device) for s in self.routers}),
            "experts": sorted({name for s in self.routers for name in experts_implementations(s.block)}),
        }


def _added(plans: Iterable[Plan]) -> Plan | None:
    """The sum of plans, or None if there are none or they cancel out."""
    return sum(plans) or None


def _checkpoint(attachment: Attachment) -> dict[str, str]:
    return checkpoint_of(attachment.model, [router.weights for router in attachment.routers])


class _Calls(CallListener):
    """Answers the attachment for each call of the model: by the recorder that is on, the labels, and the plan.

    Attributes:
        recorder: the active recorder, or the last one.
        counting: the active recording, or the last one.
        block: labels given without a recording.
        steering: the plan that steers.
        reaches: what the plans of the active steer blocks have reached.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.counting: Counting | None = None
        self.block: LabelBlock | None = None
        self.steering: _ActivePlan | None = None
        self.reaches: tuple[Reach, ...] = ()

    @property
    def recording(self) -> Counting | None:
        """The recording that is on."""
        return self.counting if self.counting is not None and self.counting.on else None

    @property
    def labeled(self) -> bool:
        """Whether a block of labels is active."""
        return self.block is not None or (self.recording is not None and self.recording.block is not None)

    def labels_of(self, call: Call) -> Labels:
        recording, steering = self.recording, self.steering
        labels = Labels(-1, -1, -1) if recording is None else recording.labels_of(call)
        if steering is not None:
            block = (None if recording is None else recording.block) or self.block
            labels.steering_row, labels.entries = steering.rows(call, block), steering.entries(call, block)
            labels.counter, labels.told = steering.counter(call), steering.told(call)
            for reach in self.reaches:
                reach.note(call, block)
        return labels

    def after_call(self, call: Call) -> None:
        if self.recording is not None:
            self.recording.after_call(call)

    def reject_drafts(self, count: int) -> None:
        if self.counting is not None:
            self.counting.reject_drafts(count)


@contextlib.contextmanager
def _labeling(calls: _Calls, block: LabelBlock, named: NamedGroups | None) -> Iterator[None]:
    """Label the calls of a model outside a recording."""
    if calls.block is not None:
        raise RuntimeError("labels() inside labels(): leave the first block first, a sequence has one set of labels")
    before, name = named_groups(), name_groups  # a name of its own: modules may end first
    try:
        try:
            calls.block = block
            name(named)
            yield
        finally:
            name(before)
            calls.block = None
    finally:
        name(before)
        calls.block = None  # again, if an interrupt stopped the first attempt


@contextlib.contextmanager
def labeled_texts(model: nn.Module, groups: Sequence[str], items: Sequence[str | int]) -> Iterator[None]:
    """Label the sequences of a batch of ``model`` by group and item, unless the caller's own labels are active.

    They reach what ``RoutedModel.labels`` reaches: a recording, a plan, and adapters that are chosen by group. A
    recording that keeps sequences keeps these without an item, since one text may run several times.
    """
    attachment = attachment_of(model)
    calls = attachment.listener if attachment is not None and isinstance(attachment.listener, _Calls) else None
    recording = None if calls is None else calls.recording
    if named_groups() is not None or (calls is not None and calls.labeled):
        yield
    elif calls is None:
        name_groups(LabelBlock.parse(groups, None, None, None).named)
        try:
            yield
        finally:
            name_groups(None)
    elif recording is not None and calls.recorder is not None:
        with calls.recorder.labels(groups, None if recording.keeps_sequences else items):
            yield
    else:
        block = LabelBlock.parse(groups, items, None, None)
        with _labeling(calls, block, block.named):
            yield


class _RoutedRecorder(Recorder):
    """A recorder that the calls of its model are told to while it is active."""

    def __init__(self, calls: _Calls, attachment: Attachment, **arguments: Any):
        super().__init__(attachment, **arguments)
        self._attachment = attachment
        self._calls = weakref.ref(calls)  # weak, since a cycle would keep the model alive

    def _refuse_entry(self) -> None:
        super()._refuse_entry()
        calls = self._calls()
        if calls is None or not self._attachment.attached:
            raise RuntimeError("cannot record: this model was detached; attach(model) again")
        if calls.recording is not None:
            raise RuntimeError("a recording is on already: leave its block first, or give it more groups")

    def _begin(self) -> None:
        calls = self._calls()
        assert calls is not None  # `_refuse_entry` ran before
        if calls.steering is not None:
            self._counting.note_plan(calls.steering.compiled.plan_hash)
        self._counting.note_checkpoint(_checkpoint(self._attachment))
        super()._begin()
        calls.recorder, calls.counting = self, self._counting

    def __exit__(self, *failure: object) -> None:
        try:
            super().__exit__(*failure)
        finally:
            if failure[0] is None:
                self._counting.note_checkpoint(_checkpoint(self._attachment))

    def statistics(self) -> RoutingStatistics:
        if self.on:
            self._counting.note_checkpoint(_checkpoint(self._attachment))
        return super().statistics()


class _ActivePlan:
    """A compiled plan that steers the live model, with the steering row of every token of a call."""

    def __init__(self, compiled: CompiledPlan):
        self.compiled = compiled
        self._index = {group: index for index, group in enumerate(compiled.groups)}
        self._rows = self.compiled.rows.tolist()
        self._block: LabelBlock | None = None
        self._cache: dict[tuple[Phase | None, torch.device], int | Tensor] = {}
        self._classes: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._starts: dict[tuple[int, torch.device], Tensor] = {}

    def rows(self, call: Call, block: LabelBlock | None) -> int | Tensor:
        """Steering row of the tokens of a call: an int, ``[N]`` or ``[N, length]``; -1: not steered."""
        if not call.prompt:
            return self._rows_in(call.phase, call, block)
        return in_phases(self._rows_in("prefill", call, block), self._rows_in("decode", call, block), call)

    def _rows_in(self, phase_name: Phase, call: Call, block: LabelBlock | None) -> int | Tensor:
        self._follow(block)
        if not self.compiled.bounds:
            return self._of_groups(call, block, phase_name)
        if call.device not in self._classes:
            bounds = torch.tensor(self.compiled.bounds)
            self._classes[call.device] = upload(self.compiled.rows, call.device), upload(bounds, call.device)
        rows, bounds = self._classes[call.device]
        column = broadcast_rows(self._of_groups(call, block, None), call, "steering_row")
        place = torch.bucketize(call.positions(), bounds, right=True)
        return rows[PHASES.index(phase_name)][column, place].expand(call.batch, call.length)

    def _follow(self, block: LabelBlock | None) -> None:
        """Drop the tensors kept for another label block."""
        if block is not self._block:
            self._block, self._cache, self._starts = block, {}, {}

    def _of_groups(self, call: Call, block: LabelBlock | None, phase: Phase | None) -> int | Tensor:
        """By the group of the token: its row in a phase, at positions of the first class, or its column of `rows`."""

        def value(column: int) -> int:
            return column if phase is None else self._rows[PHASES.index(phase)][column][0]

        if block is None:
            return value(0)
        key = (phase, call.device)
        if key not in self._cache:
            of_name = [value(self._index.get(name, -1) + 1) for name in block.names]
            self._cache[key] = rows_on_device(block.values(of_name), call.device)
        return columns(self._cache[key], call)

    def counter(self, call: Call) -> Tensor | None:
        """A number per token that seeds its random draws, or None if the plan draws none."""
        if not self.compiled.draws:
            return None
        ids = call.input_ids
        shaped = ids is not None and ids.shape == (call.batch, call.length)
        return token_counter(call.positions(), ids if shaped else None)

    def told(self, call: Call) -> Tensor | None:
        """int64 ``[batch, length, 4]``: what functions are told of each token, or None if the plan has none."""
        if not self.compiled.applies:
            return None
        shape, ids = (call.batch, call.length), call.input_ids
        column = torch.arange(call.length, device=call.device)
        decode = (column >= call.prompt) & (call.phase == "decode")
        columns = (
            torch.arange(call.batch, device=call.device)[:, None],
            call.tokens_before(),
            torch.full((1, 1), -1, device=call.device) if ids is None or ids.shape != shape else ids,
            decode[None],
        )
        return torch.stack([values.to(torch.int64).expand(shape) for values in columns], -1)

    def entries(self, call: Call, block: LabelBlock | None) -> Tensor | None:
        """int64 ``[batch, length, M]``: row of each token in each of M tables of values per token, -1 for none.

        None if the plan has no such table. Calls that are not part of a text (guidance, an assistant model) have no
        rows.
        """
        tables = self.compiled.sequence_tables
        if not tables:
            return None
        if call.beside:
            return torch.full((1, 1, len(tables)), -1, device=call.device)
        self._follow(block)
        key = (call.batch, call.device)
        if key not in self._starts:
            items, groups = (None, None) if block is None else (block.items, block.sequence_groups)
            places = starts(tables, call.batch, items, groups)[:, :, None]
            self._starts[key] = upload(torch.from_numpy(places), call.device)
        return entries(self._starts[key], call.tokens_before())
