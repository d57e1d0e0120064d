"""Weights by name, read one tensor at a time: of a model in memory, of a state dict, or of safetensors on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from moe_route import files

__all__ = ["INDEX", "Checkpoint"]

INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"


class Checkpoint:
    """The weights of a model: names, shapes, and tensors that are read when asked for.

    Args:
        source: a model, a state dict, or a folder as ``save_pretrained`` writes it. A tensor of a folder stays on disk
            until ``read``.
        model_type: architecture of a state dict, as in the configurations of transformers ("gpt_oss"). Models and
            folders name their own.

    Tensors that share their memory with an earlier one (tied embeddings) are left out of ``names``; ``tied`` maps the
    name of each to the one that is kept.

    Raises ``FileNotFoundError`` for a folder without safetensors, ``TypeError`` for another source.
    """

    def __init__(
        self, source: nn.Module | Mapping[str, Tensor] | str | os.PathLike[str], *, model_type: str | None = None
    ) -> None:
        self.folder: Path | None = None
        self.model: nn.Module | None = None
        self.config: dict[str, Any] = {}
        self.tied: dict[str, str] = {}
        self._state: Mapping[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        if isinstance(source, nn.Module):
            self.model = source
            config: Any = getattr(source, "config", None)
            self.config = config.to_dict() if hasattr(config, "to_dict") else {}
            self._hold(source.state_dict())
        elif isinstance(source, Mapping):
            self._hold(source)
        elif isinstance(source, (str, os.PathLike)):
            self._find(Path(source))
        else:
            raise TypeError(f"{type(source).__name__} has no weights: give a model, a state dict or a folder")
        self.model_type: str | None = model_type or self.config.get("model_type")
        self.name = str(source) if self.folder else self.config.get("_name_or_path") or type(source).__name__

    def _hold(self, state: Mapping[str, Tensor]) -> None:
        seen: dict[tuple[Any, ...], str] = {}
        kept = {}
        for name, tensor in state.items():
            key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and not tensor.is_meta and key in seen:
                self.tied[name] = seen[key]
                continue
            seen[key] = name
            kept[name] = tensor.detach()
        self._state = kept

    def _find(self, folder: Path) -> None:
        self.folder = folder
        if (folder / INDEX).is_file():
            shards = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
            self._files = {name: folder / shard for name, shard in shards.items()}
        elif (folder / _ONE_FILE).is_file():
            self._files = dict.fromkeys(self._opened(folder / _ONE_FILE).keys(), folder / _ONE_FILE)
        else:
            raise FileNotFoundError(
                f"{folder} holds neither {_ONE_FILE} nor {INDEX}: name the folder of a checkpoint in safetensors"
            )
        if (folder / "config.json").is_file():
            self.config = json.loads((folder / "config.json").read_text("utf-8"))

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return self._open[path]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(sorted(self._files or self._state))

    @property
    def shards(self) -> dict[str, list[str]]:
        """File of a folder -> sorted names of its tensors."""
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(self._files[name].name, []).append(name)
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if self._files:
            return tuple(self._opened(self._files[name]).get_slice(name).get_shape())
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> str:
        """Dtype of a tensor by its safetensors code ("BF16"), without reading it."""
        if self._files:
            return str(self._opened(self._files[name]).get_slice(name).get_dtype())
        return files.dtype_code(self._state[name].dtype)

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU: of a folder newly read, otherwise the model's own, which must not be written to."""
        if self._files:
            tensor: Tensor = self._opened(self._files[name]).get_tensor(name)
            return tensor
        tensor = self._state[name]
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            what = "offloaded" if tensor.is_meta else f"a {type(tensor).__name__} (sharded or quantized)"
            raise ValueError(f"{name} is {what}: load the model whole, in floating point, or give its folder")
        return tensor.cpu()

    def sha256(self) -> str:
        """SHA-256 (hex) of all tensors with their names, dtypes and shapes."""
        return tensors_hash((name, self.read(name)) for name in self.names)


def tensors_hash(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) of named tensors, one in memory at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(files.canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
