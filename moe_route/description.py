"""Describe the routers of a model: how they decide, and how moe-route would attach to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import nn

from moe_route.experts.interface import experts_implementations, experts_paths
from moe_route.identity import identity_of
from moe_route.patching.attachment import attachment_of
from moe_route.routers.discovery import find_routers
from moe_route.texttable import ShownAsTables, Table

__all__ = ["Description", "LayerDescription", "describe"]


@dataclass(frozen=True)
class LayerDescription:
    """One MoE layer of a model: its router, and how moe-route would attach to it."""

    layer: int
    name: str
    router: str
    role: str  # kind of router: "text", "vision", "encoder", ...; "" in a model with one kind
    experts: int
    top_k: int
    family: str
    score: str
    order: str
    engine: str
    experts_implementation: str  # what runs the experts: "grouped_mm", "moe_route", ...; or "own forward"
    experts_paths: str  # where that is "moe_route": its ways, and up to how many slots (tokens times top-k) each
    reason: str
    steerable: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class Description(ShownAsTables):
    """The result of ``describe``; prints as a table, and ``to_dict()`` is JSON-able."""

    model: str
    name: str | None
    config_hash: str
    attached: bool
    layers: tuple[LayerDescription, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> Sequence[Table]:
        """A row for each run of equal layers; below the rows, notes on single layers."""
        name = f" ({self.name})" if self.name else ""
        title = f"{self.model}{name}: {len(self.layers)} MoE layers, configuration {self.config_hash[:12]}"
        head = ("layers", "router", "experts", "top-k", "routing", "engine", "experts run by", "steerable", "why")
        rows = []
        notes: dict[str, list[str]] = {}  # note -> the layers that it is about
        for _, alike in groupby(self.layers, key=_kind_of_layer):
            layers = list(alike)
            first, last = layers[0], layers[-1]
            span = f"{first.layer}" if first is last else f"{first.layer}-{last.layer}"
            router = f"{first.router} ({first.role})" if first.role else first.router
            steerable = "yes" if first.steerable else "no"
            routing = (first.family, first.engine, first.experts_implementation, steerable, first.reason)
            rows.append((span, router, first.experts, first.top_k, *routing))
            paths = [f"without gradients, experts run {first.experts_paths}"] if first.experts_paths else []
            for note in (*first.notes, *paths):
                notes.setdefault(note, []).append(span)
        below = "\n".join(f"{_layers(spans)}: {note}" for note, spans in notes.items())
        return [Table(head, rows, title, below)]


def _layers(spans: Sequence[str]) -> str:
    return f"layer {spans[0]}" if len(spans) == 1 and spans[0].isdecimal() else f"layers {', '.join(spans)}"


def _kind_of_layer(layer: LayerDescription) -> tuple[Any, ...]:
    return tuple(value for key, value in asdict(layer).items() if key not in ("layer", "name"))


def describe(model: nn.Module) -> Description:
    """Describe the routers of a model, attached or not, without changing it.

    Raises ``ModelNotSupportedError`` like ``attach``.
    """
    attachment = attachment_of(model)
    routers = find_routers(model) if attachment is None else attachment.routers
    identity = identity_of(model)
    layers = tuple(
        LayerDescription(
            layer=router.layer,
            name=router.name,
            router=type(router.module).__name__,
            role=router.role,
            experts=router.num_experts,
            top_k=router.top_k,
            family=router.family.name,
            score=router.spec.score,
            order=router.spec.order,
            engine=router.engine,
            experts_implementation=", ".join(experts_implementations(router.block)),
            experts_paths=experts_paths(router.block),
            reason=router.reason or "keeps every bit of the model's own choice",
            steerable=router.steerable,
            notes=tuple(router.notes),
        )
        for router in routers
    )
    return Description(identity["class"], identity["name"], identity["config_hash"], attachment is not None, layers)
