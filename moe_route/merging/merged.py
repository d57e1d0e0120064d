"""``Merged``: the result of merging, whose tensors are computed when they are read."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_route import files
from moe_route.identity import library_versions
from moe_route.merging.checkpoint import INDEX, Checkpoint, tensors_hash

__all__ = ["RECIPE", "Merged"]

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
