"""Results as JSON lines that are appended and synced, whole again after any kill: of questions, and of single runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from moe_route.base import files
from moe_route.base.identity import weights_hash
from moe_route.base.schema import parse_json
from moe_route.runs.job import ForeignFolderError

Key = tuple[str, str, str]  # task, language, item


class ResultLines:
    """The file of one condition: a header, then a line per question, in the fixed order of the batches.

    A batch is appended at once and synced. When the file is opened, a line without its end and the lines of an
    unfinished batch are cut, so that the file is always the beginning of what an undisturbed run writes.

    Args:
        path: the file; it is created with its header if it is not there.
        header: what the results depend on. An existing file with another header is refused.
        batches: keys (task, language, item) of the questions of each batch.

    Raises `ForeignFolderError` for another header and for whole lines that are not the expected ones, and the errors
    of `files.replacing`.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], batches: Sequence[Sequence[Key]]) -> None:
        self.path, self.batches = path, batches
        self.done = 0  # number of whole batches in the file
        self._header = {"moe_route": "evaluation", "schema": 1, **header}
        content = path.read_bytes() if path.is_file() else b""
        head, end, rest = content.partition(b"\n")
        if not end:  # not even the header is whole
            with files.replacing(path) as stream:
                stream.write(_line(self._header))
            return
        self._check_header(head)
        kept = len(head) + 1 + self._whole_batches(rest)
        if kept < len(content):
            _cut(path, kept)

    @property
    def complete(self) -> bool:
        """Whether every batch is there."""
        return self.done == len(self.batches)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the records of the next batch, and wait until they are on the disk.

        Raises `ValueError` for records of other questions.
        """
        if [_key(record) for record in records] != [tuple(key) for key in self.batches[self.done]]:
            raise ValueError(f"these are not the questions of batch {self.done} of {self.path}")
        files.append(self.path, b"".join(_line(record) for record in records))
        self.done += 1

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines after the header."""
        with open(self.path, encoding="utf-8") as stream:
            next(stream)
            for line in stream:
                yield parse_json(line, str(self.path))

    def _check_header(self, head: bytes) -> None:
        said, wanted = _parsed(head), json.loads(files.canonical_json(self._header))
        if not isinstance(said, dict) or said.get("moe_route") != "evaluation":
            raise ForeignFolderError(f"{self.path} is not a file of results: choose another --out")
        for key in [*wanted, *said]:
            if said.get(key) != wanted.get(key):
                raise ForeignFolderError(
                    f"{self.path} was made with another {key} ({said.get(key)!r}, now {wanted.get(key)!r}): choose "
                    "another --out, or start again with --force"
                )

    def _whole_batches(self, rest: bytes) -> int:
        """Count the whole batches in `rest`; returns their size in bytes."""
        *lines, _torn = rest.split(b"\n")
        size, start = 0, 0
        for batch in self.batches:
            part = lines[start : start + len(batch)]
            keys = [_key(_parsed(line)) for line in part]
            if keys != [tuple(key) for key in batch[: len(part)]]:
                # a system that lost its power may leave a last batch whose bytes never reached the disk
                if start + len(part) < len(lines) or all(key is not None for key in keys):
                    raise ForeignFolderError(
                        f"{self.path} was altered: its lines from {start + 2} on are not those of the run; start again "
                        "with --force"
                    )
                return size
            if len(part) < len(batch):
                return size
            size += sum(len(line) + 1 for line in part)
            start += len(batch)
            self.done += 1
        if lines[start:]:
            raise ForeignFolderError(f"{self.path} has more lines than questions: start again with --force")
        return size


class KeptRuns:
    """What single runs gave, in one file: work that is begun again goes on after the last run that ended.

    Args:
        path: the file; a line without its end is cut.

    Attributes:
        resumed: number of runs that were there.

    Raises `ForeignFolderError` for a file of other content.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.is_file() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            _cut(path, len(whole))
        self._values: dict[str, np.ndarray] = {}
        for line in whole.splitlines():
            said = _parsed(line)
            if not isinstance(said, dict) or said.keys() != {"run", "values"}:
                raise ForeignFolderError(f"{path} was altered: start again with --force")
            self._values[str(said["run"])] = np.asarray(said["values"], np.float64)
        self.resumed = len(self._values.keys() - {"weights"})

    def check(self, model: nn.Module) -> None:
        """Refuse, by `ForeignFolderError`, a model with other weights than the one whose runs are kept."""
        weights = np.frombuffer(bytes.fromhex(weights_hash(model)), np.uint8)
        if not np.array_equal(self("weights", lambda: weights), weights):
            raise ForeignFolderError(f"{self.path} holds runs of other weights: start again with --force")

    def __call__(self, name: str, run: Callable[[], np.ndarray]) -> np.ndarray:
        """The numbers of the run of this name, float64 [...]: as kept, or what `run` gives, which is kept then."""
        if name not in self._values:
            values = np.asarray(run(), np.float64)
            files.append(self.path, json.dumps({"run": name, "values": values.tolist()}).encode() + b"\n")
            self._values[name] = values
        return self._values[name]


def _cut(path: Path, size: int) -> None:
    with open(path, "rb+") as stream:
        stream.truncate(size)
        os.fsync(stream.fileno())


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True, allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None


def _key(record: Any) -> Key | None:
    try:
        return record["task"], record["language"], record["item"]
    except (KeyError, TypeError):
        return None
