"""How a model was upcycled: kept in its configuration, so that it is saved and loaded with the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from moe_route.contract.spec import RouterSpec
from moe_route.nn import ACTIVATIONS, SparseMoE
from moe_route.training.dense import UpcyclingError

__all__ = ["Recipe"]

_KEY = "moe_route_upcycling"  # name of the attribute in a transformers configuration


@dataclass(frozen=True)
class Recipe:
    """The shape of the sparse blocks of an upcycled model, and whose expert is whose."""

    layers: tuple[int, ...]  # indices of the model's layers that are sparse
    stack: str  # dotted name of the list of layers
    block: str  # name of the block in its layer
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    renormalize: str  # "sum" or "none"
    activation: str
    gated: bool
    bias: bool
    stock_class: bool  # whether the model is of a stock transformers class
    families: dict[str, int]  # group -> its expert

    def write(self, model: nn.Module) -> None:
        """Keep this recipe in the model's configuration."""
        config = getattr(model, "config", None)
        if config is not None:
            setattr(config, _KEY, {**asdict(self), "layers": list(self.layers)})

    @classmethod
    def read(cls, config: object) -> Recipe | None:
        """The recipe that a configuration keeps, None if it keeps none.

        Raises `UpcyclingError` for one that does not fit together.
        """
        kept = getattr(config, _KEY, None)
        if kept is None:
            return None
        try:
            recipe = cls(**{**kept, "layers": tuple(kept["layers"])})
            recipe._check()
        except (TypeError, KeyError, ValueError) as error:
            raise UpcyclingError(
                f"{_KEY} of the configuration is damaged ({error}): upcycle the dense model again"
            ) from error
        return recipe

    def _check(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), str(field.type)
            wanted: Any = {"int": int, "str": str, "bool": bool}.get(kind)
            if wanted is not None and type(value) is not wanted:
                raise ValueError(f"{field.name} is {value!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"no activation {self.activation!r}")
        if not all(type(layer) is int and layer >= 0 for layer in self.layers):
            raise ValueError(f"layers are {self.layers}")
        if not isinstance(self.families, Mapping) or not all(
            isinstance(group, str) and type(own) is int and 0 <= own < self.num_experts
            for group, own in self.families.items()
        ):
            raise ValueError("families are no mapping from group to expert")

    @property
    def names(self) -> list[str]:
        """Dotted names of the sparse blocks."""
        return [f"{self.stack}.{layer}.{self.block}" for layer in self.layers]

    @property
    def spec(self) -> RouterSpec:
        """The routing function: softmax over all experts, then top-k."""
        return RouterSpec(score="softmax", renormalize="sum" if self.renormalize == "sum" else "none")

    def sparse_block(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> SparseMoE:
        """A new block with weights at random."""
        return SparseMoE(
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            top_k=self.top_k,
            intermediate_size=self.intermediate_size,
            spec=self.spec,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            dtype=dtype,
            device=device,
        )

    def install(self, model: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
        """Put these blocks in the place of the model's own."""
        for name, block in blocks.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, block)
