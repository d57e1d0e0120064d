"""Where a tensor belongs (layer, expert, kind), and its matrices [out, in], one per expert.

Experts are stored in two ways. Checkpoints on disk often have one tensor per expert (``experts.3.up_proj.weight``).
Models in memory have one packed tensor [E, ...] per product (``experts.gate_up_proj``), in which gate and up are two
halves or alternate. `matrices` gives the same matrices for both, so a method merges both alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from moe_route.merging.checkpoint import Checkpoint

# Architectures that pack experts as [E, in, out] instead of [E, out, in], by `model_type` of their configuration.
TRANSPOSED = frozenset(("aria", "aria_text", "gpt_oss", "llama4", "llama4_text", "openai_privacy_filter"))
# Architectures that pack gate and up in alternation instead of one after the other.
INTERLEAVED = frozenset(("gpt_oss",))

_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?(?:layers|layer|h|blocks|block))\.(?P<number>\d+)\.")
_EXPERTS = re.compile(r"^(?P<block>(?:.*\.)?)experts\.(?:(?P<expert>\d+)\.)?(?P<rest>.+)$")
_ROUTERS = ("gate", "router")  # first word after the block's name
_CORRECTION = "e_score_correction_bias"
_KINDS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down"}


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs."""

    stack: str | None  # name of the list of layers, None outside of layers
    layer: int | None  # number in the stack
    block: str | None  # prefix of the MoE block that the tensor is part of
    expert: int | None  # of a checkpoint with one tensor per expert
    part: str  # "experts", "router" or "other"
    kind: str  # "gate", "up", "down", or the rest of the name


class Layout:
    """Places of the tensors of a checkpoint.

    ``layers`` are the numbers of all layers of ``stack``, ``moe_layers`` of those with experts: layer i of an
    ``ExpertSelection`` is ``moe_layers[i]``.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.blocks = {m["block"] for name in checkpoint.names if (m := _EXPERTS.match(name))}
        self.places = {name: self._place(name) for name in checkpoint.names}

    def _place(self, name: str) -> Place:
        layer = _LAYER.match(name)
        stack, number = (layer["stack"], int(layer["number"])) if layer else (None, None)
        rest = name[layer.end() :] if layer else name
        block = next((prefix for prefix in self.blocks if prefix and name.startswith(prefix)), None)
        experts = _EXPERTS.match(name)
        if experts:
            words = experts["rest"].removesuffix(".weight").replace(".bias", "_bias")
            stem, bias = words.removesuffix("_bias"), "_bias" if words.endswith("_bias") else ""
            expert = None if experts["expert"] is None else int(experts["expert"])
            return Place(stack, number, experts["block"], expert, "experts", _KINDS.get(stem, stem) + bias)
        if block is not None and layer is not None and block.startswith(layer[0]):
            word = name[len(block) :].split(".")[0]
            if word in _ROUTERS or name.endswith(_CORRECTION):
                return Place(stack, number, block, None, "router", "router")
        return Place(stack, number, block, None, "other", rest.removesuffix(".weight"))

    @cached_property
    def stack(self) -> str:
        """Name of the list of layers: the one with experts, or the only one.

        Raises ``ValueError`` for a model with several, such as an encoder and a decoder.
        """
        with_experts = {place.stack for place in self.places.values() if place.part == "experts"}
        found = sorted((with_experts or {place.stack for place in self.places.values()}) - {None}, key=str)
        if len(found) != 1:
            what = " and ".join(map(str, found)) or "none"
            raise ValueError(f"layers are swapped in models with one list of layers; here are {what}: use merge")
        return str(found[0])

    @cached_property
    def layers(self) -> list[int]:
        numbers = {place.layer for place in self.places.values() if place.stack == self.stack}
        return sorted(number for number in numbers if number is not None)

    @cached_property
    def moe_layers(self) -> list[int]:
        numbers = {place.layer for place in self.places.values() if place.part == "experts"}
        return sorted(number for number in numbers if number is not None)

    def num_experts(self, block: str) -> int:
        """Number of experts of a block, from its router.

        Raises ``ValueError`` for a block whose router is not known or whose experts have no axis of their own.
        """
        names = [n for n, place in self.places.items() if place.block == block and place.part == "router"]
        shapes = [shape for name in names if len(shape := self.checkpoint.shape(name)) == 2 and shape[0] > 1]
        if not shapes:
            raise ValueError(
                f"{block} has experts and no router that is known here (gate, router), so they cannot be told apart: "
                "use swap_layers, which moves whole blocks"
            )
        number = shapes[0][0]
        experts = [n for n, place in self.places.items() if place.block == block and place.part == "experts"]
        single = {self.places[name].expert for name in experts}
        packed = [name for name in experts if self.places[name].expert is None]
        if packed and any(self.checkpoint.shape(name)[0] != number for name in packed):
            raise ValueError(
                f"{packed[0]} has no axis of {number} experts, so they cannot be told apart: use swap_layers, which "
                "moves whole blocks"
            )
        if not packed and single != set(range(number)):
            raise ValueError(f"{block} has a router of {number} experts and tensors of {len(single)}: it is incomplete")
        return number

    def matrices(self, name: str, tensor: Tensor) -> list[tuple[int | None, str, Tensor]]:
        """(expert, kind, view) of every matrix [out, in] or vector of a tensor; writing to a view writes to the tensor.

        Embeddings are turned to [H, V], so that a column belongs to a token. Raises ``ValueError`` for packed experts
        of a state dict whose architecture is not known.
        """
        place = self.places[name]
        if place.part != "experts":
            if tensor.dim() == 2 and "embed" in name:
                return [(None, place.kind, tensor.T)]
            return [(None, place.kind, tensor.flatten(1) if tensor.dim() > 2 else tensor)]
        if place.expert is not None:
            return [(place.expert, place.kind, tensor)]
        if self.checkpoint.model_type is None:
            raise ValueError(
                f"{name} holds all experts of a block, and a state dict does not say how: give the model or its "
                "folder, or Checkpoint(state, model_type=...)"
            )
        assert place.block is not None
        self.num_experts(place.block)
        return [part for expert, matrix in enumerate(tensor) for part in self._of_one(expert, place.kind, matrix)]

    def _of_one(self, expert: int, kind: str, matrix: Tensor) -> list[tuple[int | None, str, Tensor]]:
        if matrix.dim() == 2 and self.checkpoint.model_type in TRANSPOSED:
            matrix = matrix.T
        if not kind.startswith("gate_up"):
            return [(expert, kind, matrix)]
        bias = "_bias" if kind.endswith("_bias") else ""
        half = len(matrix) // 2
        alternate = self.checkpoint.model_type in INTERLEAVED
        gate, up = (matrix[0::2], matrix[1::2]) if alternate else (matrix[:half], matrix[half:])
        return [(expert, f"gate{bias}", gate), (expert, f"up{bias}", up)]
