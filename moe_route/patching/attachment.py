"""Install hooks on a live model, and remove them. Nothing else in this library changes the modules of a model."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NoReturn, Protocol

import torch
from torch import Tensor, nn

from moe_route.base.devices import finish
from moe_route.calls.generation import finished_tokens
from moe_route.calls.reader import CallReader, call_readers, placeholder_ids
from moe_route.calls.token_table import CallListener, Labels
from moe_route.contract.experts import AddedDirections
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.experts.interface import ExpertsSwitch
from moe_route.experts.outputs import OutputSink, add_to_outputs, watch_experts
from moe_route.modules.intercept import (
    Change,
    ForwardHook,
    ForwardPreHook,
    KeptOutput,
    at,
    drop_graphs,
    later_hooks,
    runs_by,
    untraced,
)
from moe_route.modules.watch import WatchedForward
from moe_route.ops import library, load_kernels
from moe_route.ops.token_rules import fitted
from moe_route.patching.context import RunningCall
from moe_route.patching.engine import (
    NOT_CHECKED,
    ChoiceCallback,
    Engine,
    FusedEngine,
    HookEngine,
    LayerSteering,
    LogitsCallback,
)
from moe_route.patching.generate import listen_to_generate
from moe_route.routers.check import check_router
from moe_route.routers.discovery import RouterInfo, find_routers
from moe_route.routers.recognize import unreadable

logger = logging.getLogger(__name__)

ENGINES: Mapping[str, type[Engine]] = {"hook": HookEngine, "fused": FusedEngine}
EXPERTS_IMPLEMENTATIONS = (None, "moe_route")

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


class InputSink(Protocol):
    """What receives the inputs of the routers (`Attachment.watch`)."""

    def add_input(self, layer: int, hidden: Tensor) -> None:
        """Receive the hidden states [..., H] that a router is given."""


class AlreadyAttachedError(RuntimeError):
    """Raised for a model one of whose routers is attached already."""


class Attachment:
    """Hooks on a live model that count and steer its routers.

    The hooks stay until `detach`, so that a model compiled meanwhile responds to later settings. While neither
    statistics nor steering nor `on_choice` is set, they only test for that and do nothing else.

    Args:
        engine, ties: see `moe_route.attach`. A router that cannot be fused gets a hook; its `RouterInfo` gives the
            reason.
        experts_implementation: None keeps the model's own. "moe_route" runs the experts by this package's dispatch and
            combine until `detach` (equal within the bounds of docs/kernels.md, not bit for bit).
        pack: with "moe_route" on a CPU, keep a packed copy of the experts' weights until `detach`: faster, the same
            bits as without, and as much memory as these weights take.
        verify: first compare every kind of router with its specification on random probes.

    Raises `ModelNotSupportedError` or `AlreadyAttachedError`, and then leaves the model unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        engine: Literal["hook", "fused"] = "hook",
        ties: Literal["index", "model"] = "index",
        experts_implementation: Literal["moe_route"] | None = None,
        pack: bool = False,
        verify: bool = True,
    ) -> None:
        _check_option("engine", engine, tuple(ENGINES))
        _check_option("ties", ties, ("index", "model"))
        _check_option("experts_implementation", experts_implementation, EXPERTS_IMPLEMENTATIONS)
        if pack and experts_implementation is None:
            raise ValueError(
                "pack=True packs weights for this package's experts: add experts_implementation='moe_route'"
            )
        if ties == "model" and engine != "fused":
            raise ValueError("ties='model' is for engine='fused': a hook keeps the model's choice anyway, leave it out")
        self.model = model
        self.routers: list[RouterInfo] = find_routers(model)
        for router in self.routers:
            if attachment_of(router.module) is not None:
                raise AlreadyAttachedError(
                    f"router {router.name!r} is attached to already; detach() that attachment first "
                    "(moe_route.patching.attachment_of(model), where nothing else holds it)"
                )
            _choose_engine(router, engine)
        _prepare_kernels(self.routers)
        unchecked = _check(self.routers) if verify else ()
        self._on_choice: ChoiceCallback | None = None
        self._on_logits: tuple[LogitsCallback, ...] = ()
        self._steering: list[LayerSteering | None] | None = None
        self._statistics: list[StatisticsTables] | None = None
        self._directions: list[AddedDirections | None] | None = None
        self._adding: list[Change] = []
        self._captured: list[object] = []
        self._context = RunningCall(
            finished=partial(finished_tokens, model), on_capture=self._keep_for_graph, on_hooks=self._guard
        )
        self._context.placeholders = placeholder_ids(model)
        self._engines = [ENGINES[router.engine](router, self._context) for router in self.routers]
        for each in self._engines:
            each.unchecked = each.router in unchecked
            if isinstance(each, FusedEngine):
                each.asks_model = ties == "model"
        self._changes: list[Change] = []
        self._hooks: list[ForwardHook | None] = []  # by router: the hook that sees what it returns
        self._guards: dict[int, KeptOutput] = {}  # by router: what sees that nobody changes it afterwards
        self._watching: list[Change] = []
        self._sinks: tuple[OutputSink | None, InputSink | None] = (None, None)
        experts = (ExpertsSwitch(model, pack=pack),) if experts_implementation == "moe_route" else ()
        self._forwards: list[tuple[object, ...]] = []  # by router: what runs when it is called
        self._install(chain(experts, self._own_changes()))

    @property
    def attached(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._changes)

    @property
    def listener(self) -> CallListener:
        """The object that gives the labels of every call and is notified after each call."""
        return self._context.listener

    @listener.setter
    def listener(self, listener: CallListener) -> None:
        self._context.listener = listener

    @property
    def on_choice(self) -> ChoiceCallback | None:
        """Called by every router with its layer, ids [T, k] (-1 = empty slot) and weights [T, k], after steering."""
        return self._on_choice

    @on_choice.setter
    def on_choice(self, callback: ChoiceCallback | None) -> None:
        if callback is not None:
            self._settle()
        self._on_choice = callback
        self._configure()

    def watch_logits(self, callback: LogitsCallback) -> None:
        """Call ``callback`` for every router with its layer and its own logits [T, E], NaN for tokens it was not given.

        The logits are those of the model, before any steering, with their gradient. Routers of a vision tower are left
        out, since their patches are not tokens of the call.
        """
        self._settle()
        self._on_logits = (*self._on_logits, callback)
        self._configure()

    def unwatch_logits(self, callback: LogitsCallback) -> None:
        """Stop calling ``callback``. Safe to call twice."""
        self._on_logits = tuple(other for other in self._on_logits if other is not callback)
        self._configure()

    def call_shape(self, tokens: int) -> tuple[int, int]:
        """Batch and length of the running call; (1, tokens) for a router that is called by itself."""
        call = self._context.call
        return (1, tokens) if call is None or call.batch * call.length != tokens else (call.batch, call.length)

    def set_steering(self, tables: Sequence[LayerSteering | None] | None) -> None:
        """Steer with one table per router, where None leaves a router unsteered; or stop steering, with None alone.

        Tables without effect count as None. Raises `ValueError` if their number or a shape does not fit the model.
        """
        if tables is not None:
            self._settle()
            self._fits("steering tables", tables)
            for router, table in zip(self.routers, tables, strict=True):
                if table is not None and not router.steerable:
                    raise ValueError(
                        f"router {router.name!r} (layer {router.layer}) cannot be steered: "
                        f"{router.family.unsteerable}. Leave that layer out: plan.only(layers=[...])"
                    )
            tables = [None if t is None or _steers_nothing(t) else t for t in tables]
            tables = [_fitted(table, router) for table, router in zip(tables, self.routers, strict=True)]
            tables = tables if any(table is not None for table in tables) else None
        self._steering = tables
        self._configure()

    def set_directions(self, directions: Sequence[AddedDirections | None] | None) -> None:
        """Add directions to outputs of experts, by router; or stop, with None alone or for every router.

        Hooks on the experts of those layers stay meanwhile, and graphs that torch.compile made of the model are dropped
        when they come and go. Raises `NoExpertOutputsError` for experts to whose single outputs nothing can be added,
        and then adds nothing.
        """
        given = None if directions is None or not any(part is not None for part in directions) else list(directions)
        if given is self._directions:
            return
        self._end_adding()
        if given is not None:
            self._refuse_replaced()
            adders = zip(self.routers, self._engines, given, strict=True)
            changes = [c for router, engine, part in adders if part for c in add_to_outputs(router, engine)]
            drop_graphs(self.model)
            try:
                for change in changes:
                    self._adding.append(change)  # before installing, as in `_install`
                    change.install()
            except BaseException:
                self._end_adding()
                raise
        self._directions = given
        self._configure()

    def _end_adding(self) -> None:
        if self._adding:
            drop_graphs(self.model)
        while self._adding:
            self._adding[-1].remove()
            self._adding.pop()
        self._directions = None

    def set_statistics(self, tables: Sequence[StatisticsTables] | None, *, lag: int = 0) -> None:
        """Count into one table per router, or stop counting. Raises `ValueError` if number or shape does not fit.

        Small calls (decode steps) are counted together, up to `lag` calls late. Call `flush` before reading the tables.
        """
        if tables is not None:
            self._settle()
            self._fits("statistics tables", tables)
        self.flush()
        if self._statistics is None or tables is None:  # recording starts or stops: no call is running
            self._context.forget_call()
        self._context.deferred.lag = lag
        self._statistics = None if tables is None else list(tables)
        self._configure()

    def watch(self, *, outputs: OutputSink | None = None, inputs: InputSink | None = None) -> None:
        """Show the outputs of chosen experts, or the inputs of the routers, to these objects; with neither, stop.

        The hooks stay only meanwhile, and graphs that torch.compile made of the model are dropped when they come and
        go. Routers of a vision tower are left out, since their patches are not tokens of the call.

        Raises `NoExpertOutputsError` for experts whose single outputs cannot be seen, and then watches nothing.
        """
        if (outputs, inputs) == self._sinks and self.attached:
            return
        self._end_watch()
        if outputs is None and inputs is None:
            return
        routers = [router for router in self.routers if not router.adapter.patches]
        changes: list[Change] = []
        for router in routers:
            changes += (
                [] if inputs is None else [ForwardPreHook(router.module, _input_hook(router, inputs), with_kwargs=True)]
            )
            changes += [] if outputs is None else watch_experts(router, outputs)
        self._sinks = (outputs, inputs)
        drop_graphs(self.model)
        try:
            for change in changes:
                self._watching.append(change)  # before installing, as in `_install`
                change.install()
        except BaseException:
            self._end_watch()
            raise

    def _end_watch(self) -> None:
        if self._watching:
            drop_graphs(self.model)
        while self._watching:
            self._watching[-1].remove()
            self._watching.pop()
        self._sinks = (None, None)

    def flush(self) -> None:
        """Count the calls that are waiting, so that the statistics tables include every completed call.

        Waits for the devices if there are such calls, because these may have run on other streams.
        """
        if self._context.deferred.waits:
            for device in {table.device for table in self._statistics or ()}:
                finish(device)
        self._context.deferred.count()

    def detach(self) -> None:
        """Remove every hook and restore every class. The model is then bit for bit what it was before.

        Attributes that other tools have replaced meanwhile stay. Safe to call twice, and after an interrupt.
        """
        try:
            self.flush()
        finally:
            self._undo()

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        raise TypeError(
            "a RoutedModel, Recorder or Attachment holds the hooks of one model and cannot be copied. Copy the model "
            "itself, which gives a model without hooks, and attach to the copy"
        )

    def _own_changes(self) -> Iterator[Change]:
        """Yield all changes to the model in the order of installation, except the switch of its experts.

        Each is installed before the next one is asked for.
        """
        for engine in self._engines:
            yield _Registered(engine.router.module, self)
        for module, reader in call_readers(self.model, [router.name for router in self.routers]):
            yield ForwardPreHook(module, partial(_enter, self._context, reader), with_kwargs=True)
            yield ForwardHook(module, partial(_leave, self._context), always_call=True)
        yield from listen_to_generate(self.model, self._context)
        for engine in self._engines:
            changes = engine.changes()
            yield from changes
            self._hooks.append(_choice_hook(engine, changes))
        self._forwards = [runs_by(router.module) for router in self.routers]

    def _install(self, changes: Iterable[Change]) -> None:
        """Make all changes, or none of them if one fails or an interrupt comes."""
        try:
            drop_graphs(self.model)
            for change in changes:
                self._changes.append(change)  # before installing, so that a change interrupted halfway is reverted too
                change.install()
        except BaseException:
            self._undo()
            raise

    def _undo(self) -> None:
        """Revert all changes, the latest first."""
        try:
            self._take_back()
        finally:
            self._take_back()  # continues where an interrupt stopped the first attempt

    def _take_back(self) -> None:
        self._end_watch()
        self._end_adding()
        self._end_guards()
        while self._changes:
            self._changes[-1].remove()
            self._changes.pop()
        self._context.release()

    def _configure(self) -> None:
        nothing = [None] * len(self.routers)
        columns = (
            self._engines,
            self._statistics or nothing,
            self._steering or nothing,
            self._directions or nothing,
        )
        kinds: dict[object, int] = {}
        for engine, statistics, steering, directions in zip(*columns, strict=True):
            engine.configure(statistics, steering, self._on_choice, self._on_logits, directions)
            if statistics is not None:
                layout = (statistics.metrics, statistics.entropy, statistics.segments is None)
                kind = (engine.spec, *layout, statistics.device)
                engine.cohort = kinds.setdefault(kind, len(kinds))
        nothing_set = self._statistics is None and self._steering is None and self._on_choice is None
        idle = nothing_set and not self._on_logits and self._directions is None
        if self._context.idle and not idle:
            self._context.lengths.forget()  # calls went by that were not seen
        if idle:
            self._end_guards()
        self._context.idle = idle

    def _settle(self) -> None:
        """Let the hooks run behind those that others have put on the routers since.

        Raises `RuntimeError` if a router is no longer part of the model, or runs another forward than at attach, since
        it would count and steer nothing, or what nobody has checked.
        """
        if self._context.idle:
            self._refuse_replaced()
        self._end_guards()
        moved = [hook.come_last() for hook in self._hooks if hook is not None]
        self._guard()
        if any(moved) or self._guards:
            drop_graphs(self.model)

    def _refuse_replaced(self) -> None:
        present = set(self.model.modules())
        for router, before in zip(self.routers, self._forwards, strict=True):
            again = "detach(), and attach(model) again"
            if router.module not in present:
                raise RuntimeError(
                    f"router {router.name!r} is not part of the model any more (its layer was replaced after attach): "
                    f"{again}"
                )
            if runs_by(router.module) != before:
                raise RuntimeError(
                    f"the forward of router {router.name!r} was replaced after attach, and may choose otherwise: "
                    f"{again}, which checks what it does"
                )

    def _guard(self) -> None:
        """Put a guard on every router whose output hooks of others get after it was seen."""
        for number, (engine, hook) in enumerate(zip(self._engines, self._hooks, strict=True)):
            if number in self._guards or (hook is None and not isinstance(engine, FusedEngine)):
                continue
            module, function = (engine.router.module, None) if hook is None else (hook.module, hook.hook)
            later = later_hooks(module, function)
            if later:
                names = ", ".join(_name_of(module._forward_hooks[number]) for number in later)
                guard = self._guards[number] = KeptOutput(
                    module, function, _CHANGED[engine.router.engine].format(names, engine.router.name)
                )
                guard.install()

    def _end_guards(self) -> None:
        if self._guards:
            drop_graphs(self.model)
        while self._guards:
            number = next(iter(self._guards))
            self._guards[number].remove()
            self._guards.pop(number)

    def _fits(self, what: str, tables: Sequence[LayerSteering | StatisticsTables | None]) -> None:
        if len(tables) != len(self.routers):
            raise ValueError(f"{len(tables)} {what} for {len(self.routers)} routers; give one per router")
        for router, table in zip(self.routers, tables, strict=True):
            if table is not None and table.num_experts != router.num_experts:
                raise ValueError(
                    f"{what} of layer {router.layer} have {table.num_experts} experts, router {router.name!r} has "
                    f"{router.num_experts}"
                )

    def _keep_for_graph(self, labels: Labels) -> None:
        """Keep these labels alive, since a CUDA graph reads and writes their tensors in every replay."""
        self._captured.append((labels, self._statistics, [engine.steering for engine in self._engines]))


_CHANGED = {
    "hook": "hooks that were put on router {1!r} inside record() or steer() ({0}) change its choice after it was seen: "
    "register them before the block, then they run before moe-route",
    "fused": "hooks on router {1!r} ({0}) change its choice after engine='fused' made it: "
    "attach(model, engine='hook'), which counts and steers what they return",
}


def _choice_hook(engine: Engine, changes: Sequence[Change]) -> ForwardHook | None:
    """The hook among the changes of an engine that sees the choice as its module returns it, or None."""
    if not engine.adapter.returns_choice:
        return None
    first = changes[0]
    return first.last if isinstance(first, WatchedForward) else first if isinstance(first, ForwardHook) else None


def _name_of(hook: Callable[..., Any]) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__))


class _Registered:
    """Marks a router as attached, so that `attachment_of` finds its attachment."""

    def __init__(self, module: nn.Module, attachment: Attachment) -> None:
        self.module, self.attachment = module, weakref.ref(attachment)

    def install(self) -> None:
        _attached[self.module] = self.attachment

    def remove(self) -> None:
        if _attached.get(self.module) is self.attachment:
            _attached.pop(self.module, None)


def attachment_of(module: nn.Module) -> Attachment | None:
    """The attachment of `module` (a router, or a model with routers), or None."""
    for inner in module.modules():
        found = _attached.get(inner)
        attachment = None if found is None else found()
        if attachment is not None:
            return attachment
    return None


def _input_hook(router: RouterInfo, sink: InputSink) -> Callable[..., None]:
    @untraced
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sink.add_input(router.layer, (*args, *kwargs.values())[0])

    return hook


def _enter(
    context: RunningCall, reader: CallReader, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    context.enter(reader, module, args, kwargs)


def _leave(context: RunningCall, module: nn.Module, args: tuple[object, ...], output: object) -> None:
    context.leave(module, output)


def _check_option(what: str, given: str | None, choices: tuple[str | None, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, not {given!r}")


def _prepare_kernels(routers: Iterable[RouterInfo]) -> None:
    """Load and check the kernels that the routers need, and say once where torch serves in their place."""
    for device, experts in sorted({(router.device, router.num_experts) for router in routers}, key=str):
        if device.type != "meta":
            load_kernels(experts, device)
            library.refuse_torch(device)
            library.tell(device)


def _choose_engine(router: RouterInfo, engine: str) -> None:
    router.engine = "hook"
    if engine != "fused":
        router.reason = "keeps every bit of the model's own choice"
        return
    obstacle = _not_fusable(router)
    if obstacle is None:
        router.engine, router.reason = "fused", "asked for"
    else:
        router.reason = f"fused was asked for, but {obstacle}"


def _not_fusable(router: RouterInfo) -> str | None:
    """Why the router's forward cannot be replaced, or None."""
    gate = router.family.gate
    if gate is None:
        return f"{type(router.module).__name__} is more than a gate matrix: {router.family.unfused}"
    if "forward" in vars(router.module):
        return (
            "the router's forward was replaced already (offloaded or kernelized), and a class's forward is not called"
        )
    weight = at(router.module, gate.weight)
    if not isinstance(weight, torch.Tensor) or type(weight) not in (nn.Parameter, torch.Tensor):
        return f"the gate matrix is a {type(weight).__name__} (sharded or quantized)"
    return None


def _check(routers: list[RouterInfo]) -> list[RouterInfo]:
    """Check every kind of router; returns those that can only be checked when they run."""
    seen: dict[object, str] = {}
    unchecked: list[RouterInfo] = []
    for router in routers:
        why = unreadable(router.module)
        if why is not None:
            router.notes = (*router.notes, f"{NOT_CHECKED}: {why}")
            unchecked.append(router)
            continue
        dtype = None if router.parameter is None else router.parameter.dtype
        kind = (type(router.module), router.spec, router.num_experts, router.top_k, router.engine, dtype)
        if kind not in seen:
            seen[kind] = check_router(router)
        if seen[kind]:
            router.engine, router.reason = "hook", f"fused was asked for, but {seen[kind]}"
    logger.debug("checked %d kinds of router of %d", len(seen), len(routers))
    return unchecked


def _fitted(tables: LayerSteering | None, router: RouterInfo) -> LayerSteering | None:
    """Fit the steering to this router. Raises `ValueError` if the router cannot be steered so."""
    if tables is None or isinstance(tables, SteeringTables):
        return tables
    if tables.wide and not router.adapter.widens:
        raise ValueError(
            f"router {router.name!r} (layer {router.layer}) cannot take a top_k above its own: "
            f"{type(router.module).__name__} has no more slots. Leave that layer out: plan.only(layers=[...])"
        )
    if (tables.replays or tables.functions) and router.adapter.patches:
        what = "no table of tokens names" if tables.replays else "are no tokens that a function could be told of"
        raise ValueError(
            f"router {router.name!r} (layer {router.layer}) routes patches of images, which {what}: leave the layer "
            "out, plan.only(layers=[...])"
        )
    return fitted(tables, router.name, router.spec)


def _steers_nothing(tables: LayerSteering) -> bool:
    return not tables.trained and tables.is_null
