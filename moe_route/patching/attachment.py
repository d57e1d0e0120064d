"""The attachment: the only object that touches the modules of a live model."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from moe_route.devices import capturing, finish
from moe_route.ops import StatisticsTables, SteeringTables
from moe_route.patching.adapter import Removable
from moe_route.patching.engines import Engine, Fused, Observed, Steers, Trace
from moe_route.patching.experts import ExpertsSwitch
from moe_route.patching.family import at
from moe_route.patching.generation import finished_tokens, listen_to_generate
from moe_route.patching.graphs import forget_graphs
from moe_route.patching.patches import placeholders_of
from moe_route.patching.selfcheck import check_site, unreadable
from moe_route.patching.sites import RouterSite, find_sites
from moe_route.patching.tokens import Call, CallReader, Labels, TokenContext

logger = logging.getLogger(__name__)

ENGINES = ("auto", "observed", "fused")
EXPERTS = ("keep", "moe_route")

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


class AlreadyAttached(RuntimeError):  # noqa: N818 (a state, said by its name)
    """A router of the model has an attachment already."""


class Attachment:
    """Hooks on a live model that count and steer its routers.

    Args:
        engine: "observed" (a forward hook; every bit of an unsteered model stays), "fused" (gate matrix and one `route`
            call; same ids where scores differ by more than 4 units in the last place, weights within 4), or "auto",
            which is "observed". A router that cannot be fused is observed; its site says why.
        experts: "keep" the model's own, or "moe_route": run by this package's dispatch and combine until `detach`
            (`patching.experts`; equal within the bounds of docs/experts.md, not bit for bit).
        check: compare every kind of router with its specification on random probes first.

    Raises `ModelNotSupported`, or `AlreadyAttached`; nothing of the model is changed then.

    The hooks stay from here to `detach`, so that a model compiled in between sees what is set later; they do nothing,
    beyond one test, while neither statistics, steering nor trace is set.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        engine: Literal["auto", "observed", "fused"] = "auto",
        experts: Literal["keep", "moe_route"] = "keep",
        check: bool = True,
    ) -> None:
        _choose("engine", engine, ENGINES)
        _choose("experts", experts, EXPERTS)
        self.model = model
        self.sites: list[RouterSite] = find_sites(model)
        for site in self.sites:
            if attachment_of(site.module) is not None:
                raise AlreadyAttached(
                    f"router {site.name!r} is attached to already; detach() that attachment first "
                    "(moe_route.patching.attachment_of(model), where nothing else holds it)"
                )
            _choose_engine(site, engine)
        if check:
            _check(self.sites)
        self.label: Callable[[Call], Labels | None] | None = None
        self.after_call: Callable[[Call], None] | None = None
        self.settle: Callable[[int], None] | None = None  # told of the drafts of a call that were refused
        self._trace: Trace | None = None
        self._steering: list[Steers | None] | None = None
        self._statistics: list[StatisticsTables] | None = None
        self._captured: list[object] = []
        self._context = TokenContext(self._labels, self._after, partial(finished_tokens, model), self._settle)
        self._context.placeholders = placeholders_of(model)
        kinds = {"observed": Observed, "fused": Fused}
        self._engines: list[Engine] = [kinds[site.engine](site, self._context) for site in self.sites]
        self._handles: list[Removable] = []
        self._experts = ExpertsSwitch(model) if experts == "moe_route" else None
        self._install()

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    @property
    def trace(self) -> Trace | None:
        """Called by every router with its layer, ids [T, k] (-1 = empty slot) and weights [T, k], after steering."""
        return self._trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._trace = trace
        self._configure()

    def set_steering(self, tables: Sequence[Steers | None] | None) -> None:
        """Steer with one table per site (None = leave that router alone), or with none at all.

        Tables that steer nothing count as None. Raises `ValueError` where number or shape does not fit the model.
        """
        if tables is not None:
            self._refuse_replaced()
            self._fits("steering tables", tables)
            for site, table in zip(self.sites, tables, strict=True):
                if table is not None and not site.steerable:
                    raise ValueError(
                        f"router {site.name!r} (layer {site.layer}) cannot be steered: {site.family.unsteerable}. "
                        "Leave that layer out: plan.only(layers=[...])"
                    )
            tables = [None if t is None or _steers_nothing(t) else t for t in tables]
            tables = [_fitted(table, site) for table, site in zip(tables, self.sites, strict=True)]
            tables = tables if any(table is not None for table in tables) else None
        self._steering = tables
        self._configure()

    def set_statistics(self, tables: Sequence[StatisticsTables] | None, *, lag: int = 0) -> None:
        """Count into one table per site, or not at all. Raises `ValueError` where number or shape does not fit.

        Small calls (decode steps) are counted together, up to `lag` of them behind: `flush` before the tables are read.
        """
        if tables is not None:
            self._refuse_replaced()
            self._fits("statistics tables", tables)
        self.flush()
        if self._statistics is None or tables is None:  # a recording begins or ends: no call is running
            self._context.forget_call()
        self._context.deferred.lag = lag
        self._statistics = None if tables is None else list(tables)
        self._configure()

    def flush(self) -> None:
        """Count the calls that wait, so that the statistics tables hold every call that went through. Waits for the
        devices where there are such calls: they may have been made on other streams."""
        if self._context.deferred.waits:
            for device in {table.device for table in self._statistics or ()}:
                finish(device)
        self._context.deferred.count()

    def detach(self) -> None:
        """Take every hook away and restore every class. The model is bit for bit what it was. Harmless twice."""
        self.flush()
        for handle in self._handles:
            handle.remove()
        if self._handles:
            for engine in self._engines:
                engine.remove()
                _attached.pop(engine.site.module, None)
        if self._experts is not None:
            self._experts.restore()
        self._handles = []
        self._context.release()

    def _install(self) -> None:
        forget_graphs(self.model)
        for module, reader in call_readers(self.model, self.sites):
            enter = partial(_enter, self._context, reader)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            leave = partial(_leave, self._context)
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        self._handles.extend(listen_to_generate(self.model, self._context))
        for engine in self._engines:
            engine.install()
            _attached[engine.site.module] = weakref.ref(self)

    def _configure(self) -> None:
        nothing = [None] * len(self.sites)
        columns = (self._engines, self._statistics or nothing, self._steering or nothing)
        kinds: dict[object, int] = {}
        for engine, statistics, steering in zip(*columns, strict=True):
            engine.configure(statistics, steering, self._trace)
            if statistics is not None:
                layout = (statistics.planes, statistics.entropy, statistics.segments is None)
                kind = (engine.spec, *layout, statistics.device)
                engine.cohort = kinds.setdefault(kind, len(kinds))
        idle = self._statistics is None and self._steering is None and self._trace is None
        if self._context.idle and not idle:
            self._context.lengths.forget()  # calls went by unseen
        self._context.idle = idle

    def _refuse_replaced(self) -> None:
        """Raise `RuntimeError` where a router has left the model: it would count and steer nothing."""
        if not self._context.idle:
            return
        present = set(self.model.modules())
        for site in self.sites:
            if site.module not in present:
                raise RuntimeError(
                    f"router {site.name!r} is no part of the model any more (its layer was replaced after attach): "
                    "detach(), and attach(model) again"
                )

    def _fits(self, what: str, tables: Sequence[Steers | StatisticsTables | None]) -> None:
        if len(tables) != len(self.sites):
            raise ValueError(f"{len(tables)} {what} for {len(self.sites)} routers; give one per site")
        for site, table in zip(self.sites, tables, strict=True):
            if table is not None and table.num_experts != site.num_experts:
                raise ValueError(
                    f"{what} of layer {site.layer} have {table.num_experts} experts, router {site.name!r} has "
                    f"{site.num_experts}"
                )

    def _labels(self, call: Call) -> Labels | None:
        labels = None if self.label is None else self.label(call)
        if capturing(call.device):  # the graph reads and writes these as long as it is replayed
            self._captured.append((labels, self._statistics, [engine.steering for engine in self._engines]))
        return labels

    def _after(self, call: Call) -> None:
        if self.after_call is not None:
            self.after_call(call)

    def _settle(self, refused: int) -> None:
        if self.settle is not None:
            self.settle(refused)


def attachment_of(module: nn.Module) -> Attachment | None:
    """The attachment that holds `module` (a router, or a model with routers), or None."""
    for inner in module.modules():
        found = _attached.get(inner)
        attachment = None if found is None else found()
        if attachment is not None:
            return attachment
    return None


def call_readers(model: nn.Module, sites: list[RouterSite]) -> list[tuple[nn.Module, CallReader]]:
    """The modules above the routers that are given token ids or embeddings by name: any of them may be what is called.
    Of a model with an encoder and a decoder, those two. Where there is none, `model` itself, whose first tensor
    argument then says what the tokens are."""
    found = []
    for name, module in model.named_modules():
        if not name or any(site.name.startswith(name + ".") for site in sites):
            reader = CallReader(module)
            if reader.places.keys() & {"input_ids", "inputs_embeds"} and not reader.holds_two:
                found.append((module, reader))
    return found or [(model, CallReader(model, first_tensor=True))]


def _enter(
    context: TokenContext, reader: CallReader, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> None:
    context.enter(reader, module, args, kwargs)


def _leave(context: TokenContext, module: nn.Module, args: tuple[object, ...], output: object) -> None:
    context.leave(module, output)


def _choose(what: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, not {given!r}")


def _choose_engine(site: RouterSite, engine: str) -> None:
    site.engine = "observed"
    if engine != "fused":
        site.reason = "keeps every bit of the model's own choice"
        return
    obstacle = _not_fusable(site)
    if obstacle is None:
        site.engine, site.reason = "fused", "asked for"
    else:
        site.reason = f"fused was asked for, but {obstacle}"


def _not_fusable(site: RouterSite) -> str | None:
    """Why the router's forward cannot be replaced, or None."""
    gate = site.family.gate
    if gate is None:
        return f"{type(site.module).__name__} is more than a gate matrix: {site.family.unfused}"
    if "forward" in vars(site.module):
        return (
            "the router's forward was replaced already (offloaded or kernelised), and a class's forward is not called"
        )
    weight = at(site.module, gate.weight)
    if not isinstance(weight, torch.Tensor) or type(weight) not in (nn.Parameter, torch.Tensor):
        return f"the gate matrix is a {type(weight).__name__} (sharded or quantised)"
    return None


def _check(sites: list[RouterSite]) -> None:
    seen: dict[object, str] = {}
    for site in sites:
        why = unreadable(site)
        if why is not None:
            site.notes = (*site.notes, f"not checked: {why}")
            continue
        dtype = None if site.parameter is None else site.parameter.dtype
        kind = (type(site.module), site.spec, site.num_experts, site.top_k, site.engine, dtype)
        if kind not in seen:
            seen[kind] = check_site(site)
        if seen[kind]:
            site.engine, site.reason = "observed", f"fused was asked for, but {seen[kind]}"
    logger.debug("checked %d kinds of router of %d", len(seen), len(sites))


def _fitted(tables: Steers | None, site: RouterSite) -> Steers | None:
    """The steering for this very router. Raises `ValueError` where it cannot do it."""
    if tables is None or isinstance(tables, SteeringTables):
        return tables
    if tables.wide and not site.adapter.widens:
        raise ValueError(
            f"router {site.name!r} (layer {site.layer}) cannot take a top_k above its own: {type(site.module).__name__}"
            " has no more slots. Leave that layer out: plan.only(layers=[...])"
        )
    return tables.fitted(site.name, site.spec)


def _steers_nothing(tables: Steers) -> bool:
    return not tables.trained and tables.is_null
