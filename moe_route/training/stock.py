"""Stock transformers classes that can hold an upcycled model. A further class is a row of `CLASSES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moe_route.training.recipe import Recipe

__all__ = ["converted"]

_PROBES = 8  # tokens


@dataclass(frozen=True)
class Stock:
    """A sparse class that computes what a dense one does, apart from its sparse blocks."""

    dense: str  # class of the dense model
    sparse: str  # class of the sparse one
    router: str  # name of the router in its block
    settings: Callable[[Recipe, int], dict[str, Any]]  # what the sparse configuration says of the blocks
    every_layer: bool = False  # whether it has no dense layers
    renormalizes: bool = False  # whether it always divides the weights by their sum


def _qwen3_moe(recipe: Recipe, layers: int) -> dict[str, Any]:
    return {
        "num_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.top_k,
        "moe_intermediate_size": recipe.intermediate_size,
        "norm_topk_prob": recipe.renormalize == "sum",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(layers) if layer not in recipe.layers],
    }


def _mixtral(recipe: Recipe, layers: int) -> dict[str, Any]:
    return {"num_local_experts": recipe.num_experts, "num_experts_per_tok": recipe.top_k}


CLASSES = (
    Stock("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "gate", _qwen3_moe),
    Stock("MistralForCausalLM", "MixtralForCausalLM", "gate", _mixtral, every_layer=True, renormalizes=True),
    Stock("LlamaForCausalLM", "MixtralForCausalLM", "gate", _mixtral, every_layer=True, renormalizes=True),
)


def converted(model: nn.Module, recipe: Recipe) -> nn.Module | str:
    """The upcycled model as a stock class, or the reason why none can hold it.

    Both run on a few tokens. A class that computes anything else (other attention windows, say) is not used.
    """
    row = next((row for row in CLASSES if row.dense == type(model).__name__), None)
    if row is None or not type(model).__module__.startswith("transformers."):
        return f"there is none for {type(model).__name__}"
    layers = len(model.get_submodule(recipe.stack))  # type: ignore[arg-type]
    if row.every_layer and len(recipe.layers) < layers:
        return f"{row.sparse} has no dense layers: choose all {layers} layers"
    if row.renormalizes and recipe.renormalize != "sum":
        return f"{row.sparse} always renormalizes"
    if recipe.bias or not recipe.gated:
        return f"experts of {row.sparse} are gated and have no bias"
    held = _built(model, row, recipe)
    state = {_renamed(name, row, recipe): tensor for name, tensor in model.state_dict().items()}
    missing = {name for name, _ in held.named_parameters()} ^ state.keys()
    if missing - set(getattr(held, "_tied_weights_keys", None) or ()):
        return f"{row.sparse} has other parameters: {', '.join(sorted(missing)[:3])}"
    held.load_state_dict(state, strict=False, assign=True)
    held.tie_weights()  # type: ignore[operator]
    if not _alike(model, held):
        return f"{row.sparse} computes something else with this configuration"
    held.train(model.training)
    replace(recipe, stock_class=True).write(held)
    return held


def _built(model: Any, row: Stock, recipe: Recipe) -> Any:
    """A model of the sparse class with weights of its own."""
    import transformers

    kind = getattr(transformers, row.sparse)
    left_out = ("model_type", "architectures", "transformers_version", "dtype")
    kept = {name: value for name, value in model.config.to_dict().items() if name not in left_out}
    layers = len(model.get_submodule(recipe.stack))
    config = kind.config_class(**{**kept, **row.settings(recipe, layers)})
    return kind._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation).to(
        model.device
    )


def _renamed(name: str, row: Stock, recipe: Recipe) -> str:
    for block in recipe.names:
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
