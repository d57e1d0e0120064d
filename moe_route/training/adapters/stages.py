"""Stages of a training, as data: which parts of a model are trained, and which are frozen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from moe_route.training.adapters.config import AdapterError
from moe_route.training.adapters.handle import adapter_names

__all__ = ["PARTS", "STAGES", "Stage", "freeze"]

PARTS = ("embeddings", "body", "head", "adapters", "routers")
"""Parts of a model.

"embeddings": the input embeddings. "body": the rest of the model without its head. "head": what stands outside the
base model (the output embeddings, a classifier). "adapters" and "routers": those of `add_adapters`.
"""


@dataclass(frozen=True)
class Stage:
    """What one stage trains; all the rest is frozen.

    Attributes:
        name: for people.
        trains: names of `PARTS`, or patterns of parameter names ("*.lm_head.*").
    """

    name: str
    trains: tuple[str, ...]


STAGES = (
    Stage("embeddings", ("embeddings", "head")),
    Stage("body", ("body", "head")),
    Stage("adapters", ("adapters", "routers", "head")),
)
"""The three stages of MT4CrossOIE (arXiv 2308.06552 section 3.3), in order."""


def freeze(model: nn.Module, stage: Stage | Iterable[str]) -> dict[str, int]:
    """Train what `stage` names, and freeze all other parameters of `model`.

    Parameters that two parts share (tied embeddings) belong to the first of them.

    Returns the number of parameters that are trained, by part. Raises `AdapterError` if an entry names nothing; the
    model is then as before.
    """
    wanted = stage.trains if isinstance(stage, Stage) else tuple(stage)
    parts = _parts(model)
    trained = {}
    for name, part in parts.items():
        trained[name] = part in wanted or any(fnmatchcase(name, entry) for entry in wanted)
    for entry in wanted:
        if not any(part == entry or fnmatchcase(name, entry) for name, part in parts.items()):
            has = ", ".join(part for part in PARTS if part in parts.values())
            raise AdapterError(f"nothing of the model is called {entry!r}: its parts are {has}")
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
        counts[parts[name]] += parameter.numel() if trained[name] else 0
    return {part: number for part, number in counts.items() if number}


def _parts(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> its part."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    of_embeddings = {id(p) for p in embeddings.parameters()} if isinstance(embeddings, nn.Module) else set()
    prefix = getattr(model, "base_model_prefix", "")
    has_head = bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
    of_adapters, parts = adapter_names(model), {}
    for name, parameter in model.named_parameters():
        if name in of_adapters:
            parts[name] = "routers" if ".router." in name else "adapters"
        elif id(parameter) in of_embeddings:
            parts[name] = "embeddings"
        else:
            parts[name] = "head" if has_head and not name.startswith(f"{prefix}.") else "body"
    return parts
