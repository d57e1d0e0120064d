"""How a model was upcycled, and the stock transformers classes that can hold it.

`UpcycledShape` is kept in the model's configuration, so that it is saved and loaded with the model. A further class
is a row of `CLASSES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from moe_route.contract.spec import RouterSpec
from moe_route.nn import ACTIVATIONS, SparseMoE
from moe_route.training.dense import UpcyclingError

_KEY = "moe_route_upcycling"  # name of the attribute in a transformers configuration


@dataclass(frozen=True)
class UpcycledShape:
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
        """Keep this shape in the model's configuration."""
        config = getattr(model, "config", None)
        if config is not None:
            setattr(config, _KEY, {**asdict(self), "layers": list(self.layers)})

    @classmethod
    def read(cls, config: object) -> UpcycledShape | None:
        """The shape that a configuration keeps, None if it keeps none.

        Raises `UpcyclingError` for one that does not fit together.
        """
        kept = getattr(config, _KEY, None)
        if kept is None:
            return None
        try:
            shape = cls(**{**kept, "layers": tuple(kept["layers"])})
            shape.check()
        except (TypeError, KeyError, ValueError) as error:
            raise UpcyclingError(
                f"{_KEY} of the configuration is damaged ({error}): upcycle the dense model again"
            ) from error
        return shape

    def check(self) -> None:
        """Raise `ValueError` for values that do not fit together."""
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


_PROBES = 8  # tokens


@dataclass(frozen=True)
class Stock:
    """A sparse class that computes what a dense one does, apart from its sparse blocks."""

    dense: str  # class of the dense model
    sparse: str  # class of the sparse one
    router: str  # name of the router in its block
    settings: Callable[[UpcycledShape, int], dict[str, Any]]  # what the sparse configuration says of the blocks
    every_layer: bool = False  # whether it has no dense layers
    renormalizes: bool = False  # whether it always divides the weights by their sum


def _qwen3_moe(shape: UpcycledShape, layers: int) -> dict[str, Any]:
    return {
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "moe_intermediate_size": shape.intermediate_size,
        "norm_topk_prob": shape.renormalize == "sum",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(layers) if layer not in shape.layers],
    }


def _mixtral(shape: UpcycledShape, layers: int) -> dict[str, Any]:
    return {"num_local_experts": shape.num_experts, "num_experts_per_tok": shape.top_k}


CLASSES = (
    Stock("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "gate", _qwen3_moe),
    Stock("MistralForCausalLM", "MixtralForCausalLM", "gate", _mixtral, every_layer=True, renormalizes=True),
    Stock("LlamaForCausalLM", "MixtralForCausalLM", "gate", _mixtral, every_layer=True, renormalizes=True),
)


def converted(model: nn.Module, shape: UpcycledShape) -> nn.Module | str:
    """The upcycled model as a stock class, or the reason why none can hold it.

    Both run on a few tokens. A class that computes anything else (other attention windows, say) is not used.
    """
    row = next((row for row in CLASSES if row.dense == type(model).__name__), None)
    if row is None or not type(model).__module__.startswith("transformers."):
        return f"there is none for {type(model).__name__}"
    layers = len(model.get_submodule(shape.stack))  # type: ignore[arg-type]
    if row.every_layer and len(shape.layers) < layers:
        return f"{row.sparse} has no dense layers: choose all {layers} layers"
    if row.renormalizes and shape.renormalize != "sum":
        return f"{row.sparse} always renormalizes"
    if shape.bias or not shape.gated:
        return f"experts of {row.sparse} are gated and have no bias"
    held = _built(model, row, shape)
    state = {_renamed(name, row, shape): tensor for name, tensor in model.state_dict().items()}
    missing = {name for name, _ in held.named_parameters()} ^ state.keys()
    if missing - set(getattr(held, "_tied_weights_keys", None) or ()):
        return f"{row.sparse} has other parameters: {', '.join(sorted(missing)[:3])}"
    held.load_state_dict(state, strict=False, assign=True)
    held.tie_weights()  # type: ignore[operator]
    if not _alike(model, held):
        return f"{row.sparse} computes something else with this configuration"
    held.train(model.training)
    replace(shape, stock_class=True).write(held)
    return held


def _built(model: Any, row: Stock, shape: UpcycledShape) -> Any:
    """A model of the sparse class with weights of its own."""
    import transformers

    kind = getattr(transformers, row.sparse)
    left_out = ("model_type", "architectures", "transformers_version", "dtype")
    kept = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    layers = len(model.get_submodule(shape.stack))
    config = kind.config_class(**{**kept, **row.settings(shape, layers)})
    return kind._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation).to(
        model.device
    )


def _renamed(name: str, row: Stock, shape: UpcycledShape) -> str:
    for block in shape.names:
        name = name.replace(f"{block}.router.", f"{block}.{row.router}.")
    return name


@torch.no_grad()
def _alike(model: Any, held: Any) -> bool:
    """Whether both give the same logits for some tokens."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (1, _PROBES), generator=torch.Generator().manual_seed(0)).to(model.device)
    training = model.training
    try:
        one, other = (each.eval()(input_ids=tokens, use_cache=False).logits.float() for each in (model, held))
    finally:
        model.train(training)
    rounding = 100 * torch.finfo(model.dtype).eps
    return bool((one - other).abs().max() <= rounding * one.abs().max())
