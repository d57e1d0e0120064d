"""Routers of low-rank adapters (`moe_route.training.add_adapters`), which stand beside the model's own routers."""

from __future__ import annotations

from torch import Tensor

from moe_route.routers.adapter import Adapter
from moe_route.routers.family import Family, Gate, own_spec


class OfAdapters(Adapter):
    """Reads a router that decides for each token, or once for each sequence, which is counted at its first token."""

    output_is_complete = False  # the tokens that it decided for are known only while it runs
    added = True

    @property
    def role(self) -> str:
        """These routers are numbered after those of the model itself."""
        return "adapter"

    def token_subset(self) -> Tensor | None:
        """The tokens that the router decided for."""
        rows: Tensor | None = self.module.rows
        return rows


FAMILY = Family(
    "moe_route",
    ("AdapterRouter",),
    adjust=own_spec,
    gate=Gate(bias="bias"),
    adapter=OfAdapters,
    notes=("chooses low-rank adapters, not experts of the model",),
)
