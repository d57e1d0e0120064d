"""``PlanModel``: identity of the model that a selection or a plan was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from moe_route.base.identity import UNKNOWN, same_weights
from moe_route.base.schema import FileRefusedError

_SHOWN_DIGITS = 12  # of a hash, as `describe` shows it


CHECKPOINT = ("router_hash", "weights_hash")
"""Hashes that tell checkpoints of one configuration apart."""


class PlanError(ValueError):
    """Raised for an invalid plan, or one that does not fit the model; the message names the fix."""


class PlanFileError(PlanError, FileRefusedError):
    """Raised for a file of a plan or a selection with keys, types or values that it cannot have."""


@dataclass(frozen=True, slots=True)
class PlanModel:
    """The model that a plan was made for; what is unknown is null.

    Attributes:
        name: of the model.
        config_hash: hash of its configuration.
        num_experts: number of experts of each MoE layer.
        router_hash: hash of its routers, as `identity.checkpoint_of` gives it; null in files of before.
        weights_hash: hash of all its weights, likewise.
    """

    name: str | None = None
    config_hash: str | None = None
    num_experts: tuple[int, ...] | None = None
    router_hash: str | None = None
    weights_hash: str | None = None

    def __post_init__(self) -> None:
        if self.num_experts is not None:
            object.__setattr__(self, "num_experts", tuple(index(size) for size in self.num_experts))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "config_hash": self.config_hash,
            "num_experts": None if self.num_experts is None else list(self.num_experts),
            **{name: value for name in CHECKPOINT if (value := getattr(self, name)) is not None},
        }

    @classmethod
    def of_recording(cls, metadata: Mapping[str, Any], num_experts: tuple[int, ...]) -> PlanModel:
        """The model from which statistics with this ``metadata`` were recorded."""
        model = metadata.get("model") or {}
        return cls(model.get("name"), model.get("config_hash"), num_experts, *map(model.get, CHECKPOINT))

    def merged(self, other: PlanModel) -> PlanModel:
        """Combine what is known of both models; raises ``PlanError`` if they contradict each other."""
        fields = {}
        for field, shown in (("name", "name"), ("config_hash", "configuration"), ("num_experts", "layers and experts")):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine is not None and theirs is not None and mine != theirs:
                digits = _SHOWN_DIGITS if field == "config_hash" else None
                raise PlanError(
                    f"made for another model ({shown}: {_short(mine[:digits])}, here {_short(theirs[:digits])}): "
                    "make the plan from this model's statistics, or lift the check with plan.for_model(), "
                    "`moe-route plan add PLAN --any-model --out FILE`"
                )
            fields[field] = theirs if mine is None else mine
        for field in CHECKPOINT:
            mine, theirs = getattr(self, field), getattr(other, field)
            if same_weights(mine, theirs) is False:
                raise PlanError(
                    f"made for another checkpoint of this configuration ({field.replace('_', ' ')} "
                    f"{_short(mine.rpartition('-')[2][:_SHOWN_DIGITS])}, here "
                    f"{_short(theirs.rpartition('-')[2][:_SHOWN_DIGITS])}): make the plan from this model's "
                    "statistics, or lift the check with plan.for_model(), `moe-route plan add PLAN --any-model --out "
                    "FILE`"
                )
            fields[field] = theirs if mine in (None, UNKNOWN) else mine
        return PlanModel(**fields)

    def __str__(self) -> str:
        if self.num_experts is None:
            return self.name or "any model"
        sizes = sorted(set(self.num_experts))
        experts = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}"
        return f"{self.name or 'a model'} ({len(self.num_experts)} MoE layers of {experts} experts)"


def _short(value: str | tuple[int, ...]) -> str:
    if isinstance(value, str):
        return repr(value)
    return str(PlanModel(num_experts=value)).removeprefix("a model (").removesuffix(")")
