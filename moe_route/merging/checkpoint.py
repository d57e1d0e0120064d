"""Weights by name, read one tensor at a time: of a model in memory, of a state dict, or of safetensors on disk."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_route.base import files
from moe_route.base.identity import library_versions
from moe_route.base.schema import FileRefusedError, load_json, reading

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
            try:
                shards = dict(load_json(folder / INDEX, foreign=True)["weight_map"])
                self._files = {name: folder / Path(shard).name for name, shard in shards.items()}
            except (LookupError, TypeError, ValueError) as error:
                raise FileRefusedError(f"{folder / INDEX} names no shards ({error}): copy it again") from error
        elif (folder / _ONE_FILE).is_file():
            self._files = dict.fromkeys(self._opened(folder / _ONE_FILE).keys(), folder / _ONE_FILE)
        else:
            raise FileNotFoundError(
                f"{folder} holds neither {_ONE_FILE} nor {INDEX}: name the folder of a checkpoint in safetensors"
            )
        if (folder / "config.json").is_file():
            self.config = load_json(folder / "config.json", foreign=True)

    def _opened(self, path: Path) -> Any:
        if path not in self._open:
            with reading(path):
                try:
                    self._open[path] = safe_open(path, "pt")
                except SafetensorError as error:
                    raise FileRefusedError(f"{path} is not a whole file of tensors ({error}): copy it again") from error
        return self._open[path]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(sorted(self._files or self._state))

    @property
    def shards(self) -> dict[str, list[str]]:
        """File of a folder -> sorted names of its tensors."""
        names_of: dict[str, list[str]] = {}
        for name in self.names:
            names_of.setdefault(self._files[name].name, []).append(name)
        return names_of

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


# ---- checks that checkpoints can be merged

_QUANTIZED = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F4")
_PROBED = 12  # matrices that are read to see whether two models have one ancestor


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of different architectures, shapes or tokenizers, and quantized ones, by ``ValueError``."""
    first = checkpoints[0]
    for other in checkpoints:
        _refuse_quantized(other)
        pair = f"{first.name} and {other.name}"
        if first.model_type != other.model_type and None not in (first.model_type, other.model_type):
            raise ValueError(
                f"{pair} are a {first.model_type} and a {other.model_type}: merge models of one architecture"
            )
        if first.config.get("tie_word_embeddings", False) != other.config.get("tie_word_embeddings", False) and (
            first.config and other.config
        ):
            raise ValueError(
                f"the output embeddings of one of {pair} are tied to its input embeddings, those of the other are not: "
                "save both alike (tie_word_embeddings)"
            )
        _refuse_names(first, other, pair)
        for name in first.names:
            if first.shape(name) != other.shape(name):
                what = "vocabularies differ" if "embed" in name or "lm_head" in name else "sizes differ"
                raise ValueError(
                    f"{name} of {pair} has shapes {list(first.shape(name))} and {list(other.shape(name))}: {what}, and "
                    "only models of one architecture and one tokenizer can be merged"
                )
        if _vocabulary(first) != _vocabulary(other) and None not in (_vocabulary(first), _vocabulary(other)):
            raise ValueError(f"the tokenizers of {pair} have different vocabularies: merge fine-tunes of one base")


def check_descent(model: Checkpoint, base: Checkpoint) -> None:
    """Refuse a model that was not trained from ``base``, by ``ValueError``.

    Expert 3 of one training has nothing to do with expert 3 of another. Weights of independent trainings lie farther
    apart than the weights are long; fine-tuning moves them by far less. Reads up to 12 matrices.
    """
    names = [n for n in base.names if len(base.shape(n)) >= 2 and min(base.shape(n)) > 1]
    change = size = 0.0
    for name in names[:: max(1, -(-len(names) // _PROBED))]:
        before = base.read(name).double()
        change += float((model.read(name).double() - before).square().sum())
        size += float(before.square().sum())
    if change > size:
        raise ValueError(
            f"{model.name} differs from {base.name} by more than the size of its weights, so one was not trained from "
            "the other and their experts have nothing in common: merge fine-tunes of one base"
        )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    found = next((name for name in checkpoint.names if checkpoint.dtype(name) in _QUANTIZED), None)
    if found is not None or checkpoint.config.get("quantization_config"):
        raise ValueError(
            f"{checkpoint.name} is quantized{f' ({found})' if found else ''}: merge the weights in floating point and "
            "quantize the result"
        )


def _refuse_names(first: Checkpoint, other: Checkpoint, pair: str) -> None:
    different = set(first.names) ^ set(other.names)
    if not different:
        return
    if (first.folder is None) != (other.folder is None):
        raise ValueError(
            f"{pair} name their tensors differently ({min(different)}): give both as folders or both as loaded models"
        )
    raise ValueError(f"only one of {pair} has {min(different)}: merge models of one architecture")


def _vocabulary(checkpoint: Checkpoint) -> object:
    path = checkpoint.folder / "tokenizer.json" if checkpoint.folder else None
    if path is None or not path.is_file():
        return None
    content = load_json(path, foreign=True)
    return content.get("model", {}).get("vocab") if isinstance(content, dict) else None


# ``Merged``: the result of merging, whose tensors are computed when they are read.

RECIPE = "merge_recipe.json"
_SUFFIXES_OF_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


class Merged:
    """Merged weights, of which one tensor at a time is computed.

    ``recipe`` says what was merged and how. The attributes of the first checkpoint (names, dtypes, configuration) are
    those of the result.
    """

    def __init__(
        self,
        sources: Mapping[str, Checkpoint],
        read: Callable[[str], Tensor],
        recipe: Mapping[str, Any],
        template: Checkpoint,
    ) -> None:
        self._sources = dict(sources)
        self._read = read
        self._template = template
        self.recipe: dict[str, Any] = dict(recipe)

    def __iter__(self) -> Iterator[str]:
        return iter(self._template.names)

    def read(self, name: str) -> Tensor:
        """One merged tensor, in the dtype of the result."""
        return self._read(name)

    def state_dict(self) -> dict[str, Tensor]:
        """All merged tensors, in memory of their own; tied names hold the same tensor."""
        state = {name: self._read(name).clone() for name in self}
        return state | {name: state[kept] for name, kept in self._template.tied.items()}

    def save(self, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
        """Write a checkpoint for ``from_pretrained``, with the recipe beside it in ``merge_recipe.json``.

        From folders, one shard is in memory at a time; configuration and tokenizer are copied. From models, all merged
        tensors are in memory, and ``tokenizer`` is saved beside them if given. The recipe has the SHA-256 of every
        source and of the result. The folder appears when everything is written.

        Raises ``FileExistsError`` for a folder that holds something, and ``ValueError`` for merged state dicts, which
        have no configuration to write.
        """
        files.check_new_folder(folder)
        template = self._template
        if template.folder is None and not hasattr(template.model, "save_pretrained"):
            raise ValueError("a state dict has no configuration to write: merge models or folders, or use state_dict()")
        with files.new_folder(folder) as unfinished:
            if template.folder is not None:
                self._write_shards(template, template.folder, unfinished)
            else:
                self._write_model(template.model, unfinished)
            if tokenizer is not None:
                tokenizer.save_pretrained(unfinished)
            written = Checkpoint(unfinished)
            hashes = {role: {"name": c.name, "sha256": c.sha256()} for role, c in self._sources.items()}
            content = {**self.recipe, "sources": hashes, "result": written.sha256(), "versions": library_versions()}
            del written
            files.write_json(unfinished / RECIPE, content, "merge")

    def sha256(self) -> str:
        """SHA-256 (hex) of all merged tensors with their names, dtypes and shapes."""
        return tensors_hash((name, self._read(name)) for name in self)

    def _write_shards(self, template: Checkpoint, source: Path, target: Path) -> None:
        for path in source.iterdir():
            if path.is_file() and not path.name.endswith(_SUFFIXES_OF_WEIGHTS) and path.name != RECIPE:
                shutil.copyfile(path, target / path.name)
        total = 0
        for shard, names in template.shards.items():
            tensors = {name: self._read(name).contiguous() for name in names}
            total += sum(tensor.nbytes for tensor in tensors.values())
            save_file(tensors, target / shard, {"format": "pt"})
        if (source / INDEX).is_file():
            shards = {name: shard for shard, names in template.shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": shards}
            files.write_text(target / INDEX, json.dumps(index, indent=2))

    def _write_model(self, model: Any, target: Path) -> None:
        with torch.device("meta"):
            twin: Any = type(model)(copy.deepcopy(model.config))
        twin.load_state_dict(self.state_dict(), strict=True, assign=True)
        twin.tie_weights()
        twin.generation_config = getattr(model, "generation_config", None)
        twin.save_pretrained(target)
