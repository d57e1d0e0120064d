"""Load an upcycled model that `save_pretrained` has saved."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from moe_route.training.dense import UpcyclingError
from moe_route.training.recipe import Recipe

__all__ = ["is_upcycled", "load_upcycled", "with_sparse_blocks"]

_OF_CONFIG = ("cache_dir", "local_files_only", "revision", "token")  # options that say where files are


def is_upcycled(config: object) -> bool:
    """Whether a configuration is that of a model made by `upcycle`."""
    return Recipe.read(config) is not None


def with_sparse_blocks(model: nn.Module) -> nn.Module:
    """Give a model made from the configuration of an upcycled one its sparse blocks, with weights at random.

    Other models, and those of a stock class, are returned as they are. `model` itself is changed and returned.
    """
    recipe = Recipe.read(getattr(model, "config", None))
    if recipe is not None and not recipe.stock_class:
        parameter = next(model.parameters())
        recipe.install(model, {name: recipe.sparse_block(parameter.dtype, parameter.device) for name in recipe.names})
    return model


def load_upcycled(folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load a model that `upcycle` made and `save_pretrained` saved.

    A model of a stock class could also be loaded by `AutoModelForCausalLM`. Others have blocks of `moe_route.nn`, which
    transformers would not put in: it would ignore the experts and start dense blocks at random.

    Args:
        folder: the folder, or the name of a repository on the hub.
        options: what `from_pretrained` takes (`dtype`, `device_map`, ...).

    Raises `UpcyclingError` for a model that was not upcycled here, and the errors of transformers.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("loading an upcycled model needs transformers: pip install 'moe-route[hf]'") from error
    of_config = {name: options[name] for name in _OF_CONFIG if name in options}
    config = transformers.AutoConfig.from_pretrained(folder, **of_config)
    recipe = Recipe.read(config)
    if recipe is None:
        raise UpcyclingError(
            f"{os.fspath(folder)} is no upcycled model: load it by AutoModelForCausalLM.from_pretrained"
        )
    (name,) = config.architectures or ("AutoModelForCausalLM",)
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UpcyclingError(f"this transformers {transformers.__version__} has no class {name}: install a newer one")
    loading = kind if recipe.stock_class else _sparse(kind)
    model = loading.from_pretrained(folder, **options)
    model.__class__ = kind
    return model


def _sparse(kind: type[nn.Module]) -> Any:
    """A subclass of a dense class whose instances are made with sparse blocks."""

    class Sparse(kind):  # type: ignore[misc,valid-type]
        def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(config, *arguments, **options)
            with_sparse_blocks(self)

    # from_pretrained looks up what it converts by the name and the module of the class.
    Sparse.__name__, Sparse.__module__ = kind.__name__, kind.__module__
    return Sparse
