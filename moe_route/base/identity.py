"""Identity of a model: name, class, hash of its configuration, and versions of the libraries that run it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch
from torch import nn

from moe_route import __version__
from moe_route.base import files

_SAMPLED = 1024  # elements per tensor that enter the hash of the weights

# settings of a configuration that affect how a model is run, not which model it is
_RUN_OPTIONS = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
    "architectures",
    "distributed_config",
)
_LIBRARIES = ("torch", "transformers", "accelerate", "numpy")


def config_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the model's configuration, the same for the same architecture and sizes on any machine.

    Settings that only affect how the model is run (dtype, caching, library version, names) are left out. Without a
    configuration, class and parameter shapes are hashed.
    """
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        content: Any = _what_it_is(config.to_dict())
    else:
        content = [[name, list(parameter.shape)] for name, parameter in model.named_parameters()]
    text = files.canonical_json([type(model).__name__, content])
    return hashlib.sha256(text.encode()).hexdigest()


def _what_it_is(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {
            str(k): v for k, v in value.items() if not str(k).startswith(("_", "output_")) and k not in _RUN_OPTIONS
        }
        return {key: _what_it_is(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_what_it_is(item) for item in value]
    # JSON has no infinities
    return value if value is None or isinstance(value, (str, bool, int)) else repr(value)


def identity_of(model: nn.Module) -> dict[str, Any]:
    """``name`` (None if the model was not loaded by name), ``class`` and ``config_hash``."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return {"name": name, "class": type(model).__name__, "config_hash": config_hash(model)}


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) of the weights: name, dtype and shape of each tensor, and up to 1024 evenly spaced elements of it.

    So that it takes seconds for any model, a change of few elements may stay unseen; another checkpoint does not.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(files.canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, -(-flat.numel() // _SAMPLED))].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) of what a tokenizer does to texts: vocabulary, rules and special tokens, without its name.

    How its last call was padded or cut, which a tokenizer keeps, is left out.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([content, special], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of python, moe-route, and the related libraries that are loaded."""
    versions = {"python": platform.python_version(), "moe-route": __version__}
    for name in _LIBRARIES:
        if name in sys.modules:
            versions[name] = importlib.metadata.version(name)
    return versions
