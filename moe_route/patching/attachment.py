"""The attachment: the only object that touches the modules of a live model."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import nn

from moe_route.ops import StatisticsTables, SteeringTables
from moe_route.patching.engines import Engine, Fused, Observed, Trace
from moe_route.patching.families import at
from moe_route.patching.selfcheck import check_site, unreadable
from moe_route.patching.sites import RouterSite, find_sites
from moe_route.patching.tokens import Call, CallReader, Labels, TokenContext

logger = logging.getLogger(__name__)

ENGINES = ("auto", "observed", "fused")
EXPERTS = ("keep",)

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = weakref.WeakKeyDictionary()


class AlreadyAttached(RuntimeError):  # noqa: N818 (a state, said by its name)
    """A router of the model has an attachment already."""


class Attachment:
    """Hooks on a live model that count and steer its routers.

    Args:
        engine: "observed" (a forward hook; every bit of an unsteered model stays), "fused" (gate matrix and one `route`
            call; same ids where scores differ by more than 4 units in the last place, weights within 4), or "auto",
            which is "observed". A router that cannot be fused is observed; its site says why.
        experts: "keep" the model's own experts.
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
        experts: Literal["keep"] = "keep",
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
        self._trace: Trace | None = None
        self._steering: list[SteeringTables | None] | None = None
        self._statistics: list[StatisticsTables] | None = None
        self._context = TokenContext(self._labels, self._after, partial(finished_tokens, model))
        kinds = {"observed": Observed, "fused": Fused}
        self._engines: list[Engine] = [kinds[site.engine](site, self._context) for site in self.sites]
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
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

    def set_steering(self, tables: Sequence[SteeringTables | None] | None) -> None:
        """Steer with one table per site (None = leave that router alone), or with none at all.

        Tables that steer nothing count as None. Raises `ValueError` where number or shape does not fit the model.
        """
        if tables is not None:
            self._fits("steering tables", tables)
            for site, table in zip(self.sites, tables, strict=True):
                if table is not None and not site.steerable:
                    raise ValueError(f"router {site.name!r} cannot be steered: {'; '.join(site.notes)}")
            tables = [None if table is None or _steers_nothing(table) else table for table in tables]
            tables = tables if any(table is not None for table in tables) else None
        self._steering = tables
        self._configure()

    def set_statistics(self, tables: Sequence[StatisticsTables] | None, *, lag: int = 0) -> None:
        """Count into one table per site, or not at all. Raises `ValueError` where number or shape does not fit.

        Small calls (decode steps) are counted together, up to `lag` of them behind: `flush` before the tables are read.
        """
        if tables is not None:
            self._fits("statistics tables", tables)
        self.flush()
        if self._statistics is None or tables is None:  # a recording begins or ends: no call is running
            self._context.forget_call()
        self._context.deferred.lag = lag
        self._statistics = None if tables is None else list(tables)
        self._configure()

    def flush(self) -> None:
        """Count the calls that wait, so that the statistics tables hold every call that went through."""
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
        self._handles = []

    def _install(self) -> None:
        for module, reader in call_readers(self.model, self.sites):
            enter = partial(_enter, self._context, reader)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            leave = partial(_leave, self._context)
            self._handles.append(module.register_forward_hook(leave, always_call=True))
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
                kind = (engine.spec, statistics.planes, statistics.entropy, statistics.segments is None)
                engine.cohort = kinds.setdefault(kind, len(kinds))
        self._context.idle = self._statistics is None and self._steering is None and self._trace is None

    def _fits(self, what: str, tables: Sequence[SteeringTables | StatisticsTables | None]) -> None:
        if len(tables) != len(self.sites):
            raise ValueError(f"{len(tables)} {what} for {len(self.sites)} routers; give one per site")
        for site, table in zip(self.sites, tables, strict=True):
            if table is not None and table.num_experts != site.num_experts:
                raise ValueError(
                    f"{what} of layer {site.layer} have {table.num_experts} experts, router {site.name!r} has "
                    f"{site.num_experts}"
                )

    def _labels(self, call: Call) -> Labels | None:
        return None if self.label is None else self.label(call)

    def _after(self, call: Call) -> None:
        if self.after_call is not None:
            self.after_call(call)


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
    Where there is none, `model` itself, whose first tensor argument then says what the tokens are."""
    found = []
    for name, module in model.named_modules():
        if not name or any(site.name.startswith(name + ".") for site in sites):
            reader = CallReader(module)
            if reader.places.keys() & {"input_ids", "inputs_embeds"}:
                found.append((module, reader))
    return found or [(model, CallReader(model, first_tensor=True))]


def finished_tokens(model: nn.Module) -> tuple[int, ...]:
    """Token ids that `generate` feeds to sequences of a batch that have ended: padding, and the end itself (which a
    sequence that runs alone is never fed, so that a batch counts the same as its sequences one by one)."""
    config = getattr(model, "generation_config", None)
    ids: list[int] = []
    for name in ("pad_token_id", "eos_token_id"):
        value = at(config, name) if config is not None else None
        ids.extend(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return tuple(dict.fromkeys(int(i) for i in ids))


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


def _steers_nothing(tables: SteeringTables) -> bool:
    packed = tables.packed
    learning = any(t is not None and t.requires_grad for t in (packed[0], packed[2]))
    return tables.is_null and not learning
