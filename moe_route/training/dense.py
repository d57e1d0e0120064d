"""Find the feed-forward blocks of a dense model, and what each computes.

A block is known by the names of its projections (`FORMS`). What it computes is then checked, on random hidden states
in float32: a block that does anything else is refused. No class of a model is named here.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.nn import ACTIVATIONS

_PROBES = 7
_TOLERANCE = 1e-5  # of the largest output


class UpcyclingError(ValueError):
    """Raised if a model cannot be upcycled as asked; the message names the fix."""


@dataclass(frozen=True)
class Form:
    """The names of the projections of a feed-forward block: `down(act(gate(x)) * up(x))`, or without a gate."""

    up: str
    down: str
    gate: str | None = None
    halves: bool = False  # `up` holds the gate in its first half and up in its second

    @property
    def gated(self) -> bool:
        return self.gate is not None or self.halves

    def fits(self, module: nn.Module) -> bool:
        names = {self.up, self.down, *([self.gate] if self.gate else [])}
        return all(_is_projection(module._modules.get(name)) for name in names)


FORMS = (
    Form(up="up_proj", down="down_proj", gate="gate_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, SmolLM
    Form(up="gate_up_proj", down="down_proj", halves=True),  # Phi-3, GLM-4
    Form(up="up_proj", down="down_proj"),  # Nemotron, Arcee
    Form(up="dense_h_to_4h", down="dense_4h_to_h"),  # GPT-NeoX
    Form(up="c_fc", down="c_proj"),  # GPT-2, StarCoder2
    Form(up="fc1", down="fc2"),  # Phi
)


@dataclass(frozen=True)
class DenseBlock:
    """One feed-forward block of a dense model."""

    stack: str  # dotted name of the list of layers
    layer: int  # index in it, from 0
    inner_name: str  # name of the block in its layer
    module: nn.Module
    form: Form
    activation: str  # a name of `moe_route.nn.ACTIVATIONS`

    @property
    def name(self) -> str:
        """Dotted name in the model."""
        return f"{self.stack}.{self.layer}.{self.inner_name}"

    @property
    def up(self) -> Tensor:
        """The weight of the first product [I, H], or [2I, H] with the gate first."""
        parts = ([self.form.gate] if self.form.gate else []) + [self.form.up]
        return torch.cat([_weight(self.module.get_submodule(name)) for name in parts])

    @property
    def down(self) -> Tensor:
        """The weight of the second product [H, I]."""
        return _weight(self.module.get_submodule(self.form.down))

    @property
    def biases(self) -> tuple[Tensor, Tensor] | None:
        """The biases of both products, zeros where one has none; None where neither has one."""
        parts = ([self.form.gate] if self.form.gate else []) + [self.form.up]
        first = [_bias(self.module.get_submodule(name)) for name in parts]
        second = _bias(self.module.get_submodule(self.form.down))
        if second is None and all(bias is None for bias in first):
            return None
        widths = [_weight(self.module.get_submodule(name)).shape[0] for name in parts]
        zeros = [
            self.down.new_zeros(width) if bias is None else bias for bias, width in zip(first, widths, strict=True)
        ]
        return torch.cat(zeros), self.down.new_zeros(self.down.shape[0]) if second is None else second


def dense_blocks(model: nn.Module, stack: str | None = None) -> list[DenseBlock]:
    """The feed-forward blocks of a dense model, one for each layer of its stack.

    Args:
        stack: dotted name of the `nn.ModuleList` of layers; needed only where a model has several.

    Raises ``UpcyclingError`` if there is no such stack, several, or a block that computes something else.
    """
    found = {name: blocks for name, blocks in _stacks(model).items() if stack in (None, name)}
    if stack is not None and not found:
        known = ", ".join(_stacks(model)) or "none"
        raise UpcyclingError(f"{stack!r} is no stack of layers with one feed-forward block each; known here: {known}")
    if not found:
        raise UpcyclingError(
            f"{type(model).__name__} has no stack of layers with one dense feed-forward block each. Upcycle a dense "
            "model whose blocks keep their projections as plain linear layers (not quantized, not sparse already)."
        )
    if len(found) > 1:
        raise UpcyclingError(f"several stacks of layers: choose one by stack=, of {', '.join(map(repr, found))}")
    ((stack, blocks),) = found.items()
    activations: dict[tuple[type, Form], str] = {}
    described = []
    for layer, (name, module, form) in enumerate(blocks):
        kind = type(module), form
        if kind not in activations:
            activations[kind] = _activation(f"{stack}.{layer}.{name}", module, form)
        described.append(DenseBlock(stack, layer, name, module, form, activations[kind]))
    return described


def _stacks(model: nn.Module) -> dict[str, list[tuple[str, nn.Module, Form]]]:
    """Name of each `nn.ModuleList` of which every entry holds exactly one block -> these blocks."""
    stacks = {}
    for name, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            continue
        inside = [_blocks_in(layer) for layer in layers]
        if all(len(blocks) == 1 for blocks in inside):
            stacks[name] = [blocks[0] for blocks in inside]
    return stacks


def _blocks_in(layer: nn.Module) -> list[tuple[str, nn.Module, Form]]:
    """Blocks inside one layer, with their names in it."""
    blocks = []
    for name, module in layer.named_modules():
        form = next((form for form in FORMS if form.fits(module)), None)
        if form is not None and module is not layer:
            blocks.append((name, module, form))
    return blocks


def _activation(name: str, block: nn.Module, form: Form) -> str:
    """The activation with which the form computes what the block does."""
    if any(parameter.is_meta for parameter in block.parameters()):
        raise UpcyclingError(f"the weights of {name!r} are not loaded: load the model whole, on one device")
    alone = copy.deepcopy(block).float().eval()
    described = [DenseBlock("", 0, "", alone, form, activation) for activation in ACTIVATIONS]
    hidden = torch.randn(_PROBES, described[0].down.shape[0], generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(described[0].down.device)
    # Activations differ where their arguments do: of small ones, all variants of GELU are the same.
    hidden = hidden * 2 / F.linear(hidden, described[0].up).std()
    with torch.no_grad():
        try:
            expected = alone(hidden)
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            raise UpcyclingError(
                f"{type(block).__name__} at {name!r} cannot be run by itself on hidden states ({error}): it is not a "
                "plain feed-forward block"
            ) from error
        errors = {each.activation: (_run(each, hidden) - expected).abs().max().item() for each in described}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] <= _TOLERANCE * expected.abs().max().item():
        raise UpcyclingError(
            f"{type(block).__name__} at {name!r} does not compute down(act(gate(x)) * up(x)) with an activation of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return best


def _run(block: DenseBlock, hidden: Tensor) -> Tensor:
    first, second = block.biases or (None, None)
    rows, act = F.linear(hidden, block.up, first), ACTIVATIONS[block.activation]
    if block.form.gated:
        gate, up = rows.chunk(2, dim=-1)
        rows = act(gate) * up
    else:
        rows = act(rows)
    return F.linear(rows, block.down, second)


def _is_projection(module: nn.Module | None) -> bool:
    """A linear layer that keeps its matrix as a floating-point parameter, also one that keeps it transposed (GPT-2)."""
    weight = None if module is None else module._parameters.get("weight")
    known = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return known and weight is not None and weight.dim() == 2 and weight.is_floating_point()


def _weight(projection: nn.Module) -> Tensor:
    """The matrix [out, in]."""
    weight = projection.get_parameter("weight").detach()
    return weight if isinstance(projection, nn.Linear) else weight.T


def _bias(projection: nn.Module) -> Tensor | None:
    bias = projection._parameters.get("bias")
    return None if bias is None else bias.detach()
