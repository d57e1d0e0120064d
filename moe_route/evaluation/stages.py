"""Stages of an evaluation: each is a folder with `stage.json`, which tells from which inputs its results were made."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_route.base import files
from moe_route.runs.job import ForeignFolderError

__all__ = ["STAGES", "Stage", "remove_stages", "results_folder", "write_json"]

STAGES = ("record", "find", "sweep", "evaluate", "analyze", "report")

# stages that run no model: with other inputs they are made again without asking
_CHEAP = ("find", "analyze", "report")


class Stage:
    """The folder of one stage.

    Args:
        out: folder of all results.
        name: one of `STAGES`.
        inputs: JSON-able content from which the results follow.

    Raises `ForeignFolderError` if the folder holds results of other inputs that took a model to make.
    """

    def __init__(self, out: Path, name: str, inputs: Mapping[str, Any]) -> None:
        self.name, self.folder = name, out / name
        self.inputs = json.loads(files.canonical_json(inputs))
        self.hash = files.content_hash({}, self.inputs)
        found = self._found()
        if found is not None and found.get("hash") != self.hash:
            if name not in _CHEAP:
                raise ForeignFolderError(
                    f"{self.folder} holds results of other inputs ({_difference(found.get('inputs'), self.inputs)}): "
                    "choose another --out, or start again with --fresh"
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        self.done = self._is_whole(found)
        if not self.done:
            self._write({})

    def finish(self) -> None:
        """Note that the stage is whole, with the SHA-256 of each of its files."""
        self._write({path.relative_to(self.folder).as_posix(): _sha256(path) for path in self._results()})
        self.done = True

    @property
    def results_hash(self) -> str:
        """SHA-256 (hex) of the inputs and of all results of a stage that is done."""
        found = self._found()
        assert found is not None
        return files.content_hash({}, found)

    def _write(self, results: Mapping[str, str]) -> None:
        content = {"stage": self.name, "hash": self.hash, "done": bool(results), "inputs": self.inputs}
        write_json(self.folder / "stage.json", {**content, "results": results})

    def _found(self) -> dict[str, Any] | None:
        path = self.folder / "stage.json"
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ForeignFolderError(f"{path} is damaged: start again with --fresh")
        return found

    def _is_whole(self, found: Mapping[str, Any] | None) -> bool:
        """Whether the stage is done; raises `ForeignFolderError` if one of its files was lost or altered since."""
        if found is None or found.get("hash") != self.hash or not found.get("done"):
            return False
        for name, digest in found["results"].items():
            path = self.folder / name
            if not path.is_file() or _sha256(path) != digest:
                raise ForeignFolderError(f"{path} was removed or altered: restore it, or start again with --fresh")
        return True

    def _results(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob("*") if p.is_file() and p != self.folder / "stage.json")


@contextlib.contextmanager
def results_folder(out: Path) -> Iterator[None]:
    """Make the folder of the results, and keep other processes out of it inside the block.

    Raises `ForeignFolderError` for a folder with other content, and if another process is writing there.
    """
    files.make_folder(out)
    others = [path.name for path in sorted(out.iterdir()) if not path.name.startswith(".")]
    if others and "recipe.json" not in others:
        raise ForeignFolderError(f"{out} is no folder of results (it holds {others[0]}): name an empty or new folder")
    descriptor = os.open(out, os.O_RDONLY)
    try:
        if files.lock(descriptor) is False:
            raise ForeignFolderError(f"another process is writing to {out}: wait for it, or choose another --out")
        yield
    finally:
        os.close(descriptor)


def remove_stages(out: Path) -> None:
    """Remove the folders of all stages, and nothing else."""
    for name in STAGES:
        if (out / name).is_dir():
            shutil.rmtree(out / name)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and programs, whole or not at all. NaN is refused with `ValueError`."""
    files.write_text(path, f"{json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)}\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _difference(before: Any, now: Any, where: str = "") -> str:
    """Where two JSON values first differ, and how."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                return _difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    return f"{where}: {_short(before)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
