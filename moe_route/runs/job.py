"""Work that can be interrupted: a folder belongs to one command, which goes on with what it finds there.

    with Job(folder, "eval", {"model": model}) as job:
        step = job.step("record", {"texts": fingerprint})
        if not step.done:
            ...  # write into step.folder
            step.finish()

`run.json` in the folder tells which command makes it, and from what. Another command, or other inputs, are refused with
the first difference. Checking a folder (`refuse_made`) imports no torch, so that commands can do it first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_route.base.schema import FileRefusedError, Kind, load_json

_RUN = "run.json"
_STEP = "step.json"
_KIND = "run"
_LONGEST = 80  # characters of a value in a message
_AGAIN = "repeat the command that began it, name another folder, or start again (--force)"


class ForeignFolderError(FileRefusedError):
    """Raised for a folder that holds results of other inputs, or altered ones; the message says what differs."""


@dataclass(frozen=True)
class RunContent:
    """A folder of results that one command makes, in one run or in several.

    Attributes:
        command: that makes it.
        done: whether it is finished.
        inputs: what all results in the folder depend on.
        made: names of the files and folders that it made beside its steps and parts.
    """

    command: str
    done: bool
    inputs: Mapping[str, Any]
    made: tuple[str, ...]


@dataclass(frozen=True)
class StepContent:
    """A step of a run.

    Attributes:
        step: its name.
        hash: SHA-256 (hex) of the inputs.
        done: whether its results are whole.
        inputs: what the results follow from.
        results: file -> SHA-256 (hex).
    """

    step: str
    hash: str
    done: bool
    inputs: Mapping[str, Any]
    results: Mapping[str, str]


RUN, STEP = Kind(_KIND, RunContent), Kind("step", StepContent, mark="")
"""The files `run.json` and `step.json`."""


class Job:
    """A folder that one command makes, in one run or in several; a context in which other processes stay out of it.

    Args:
        folder: made if missing; the folder around it must be there.
        command: that makes it, such as "eval".
        inputs: what all results in the folder depend on, JSON-able.
        force: remove what an earlier job made here, and begin again.
        shared: several processes share the folder, and lock its parts (`lock`) in place of the whole.

    Attributes:
        resumed: whether an earlier run of this job left something here.
        done: whether an earlier run finished it (`finish`).

    Entering it raises `ForeignFolderError` for a folder of another command or of other inputs, for one with content of
    other origin, and if another process writes there.
    """

    def __init__(
        self,
        folder: str | Path,
        command: str,
        inputs: Mapping[str, Any],
        *,
        force: bool = False,
        shared: bool = False,
    ) -> None:
        self.folder, self.command, self.inputs = Path(folder), command, _plain(inputs)
        self.resumed = self.done = False
        self._force, self._shared = force, shared
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> Job:
        from moe_route.base import files

        files.make_folder(self.folder)
        with contextlib.ExitStack() as locks:
            if not self._shared:  # the parts are locked
                locks.enter_context(_locked(self.folder))
            self._claim()
            self._locks = locks.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._locks.close()

    def step(self, name: str, inputs: Mapping[str, Any], *, cheap: bool = False) -> Step:
        """The step in the folder `name`, which follows from `inputs`; it is done if an earlier run finished it.

        A cheap step, which runs no model, is made again from other inputs. Raises `ForeignFolderError` for any other
        step with results of other inputs, and for a finished one whose files were altered.
        """
        return _step(self.folder / name, name, _plain(inputs), cheap)

    def lock(self, name: str) -> Path:
        """Make the folder `name` of a shared job, and keep other processes out of it until the job is left."""
        from moe_route.base import files

        part = files.make_folder(self.folder / name)
        self._locks.enter_context(_locked(part))
        return part

    def finish(self, made: Iterable[str] = ()) -> None:
        """Note that the job is done, and made these files and folders beside its steps and parts."""
        self.done = True
        self._write(sorted(made))

    def _claim(self) -> None:
        """Write what the job is, or compare it with what the folder says."""
        said = _said(self.folder)
        if said is None:
            self._write()
            return
        if self._force:
            _remove_results(self.folder, said)
            self._write()
            return
        _refuse_other(self.folder, said, self.command, self.inputs)
        self.resumed, self.done = True, said.done

    def _write(self, made: Sequence[str] = ()) -> None:
        from moe_route.base import files

        content = {"command": self.command, "done": self.done, "inputs": self.inputs, "made": made}
        files.write_json(self.folder / _RUN, content, _KIND)


@dataclass
class Step:
    """A folder of a job, with `step.json`, which tells from which inputs its results were made.

    Attributes:
        name: of the step.
        folder: of its results.
        inputs: from which they follow.
        done: whether they are whole.
    """

    name: str
    folder: Path
    inputs: Mapping[str, Any]
    done: bool = False
    hash: str = field(default="", repr=False)

    def finish(self) -> None:
        """Note that the step is whole, with the SHA-256 of each of its files."""
        self.write({path.relative_to(self.folder).as_posix(): _sha256(path) for path in self._results()})
        self.done = True

    @property
    def results_hash(self) -> str:
        """SHA-256 (hex) of the inputs and of all results of a step that is done."""
        from moe_route.base import files

        return files.content_hash({}, load_json(self.folder / _STEP))

    def write(self, results: Mapping[str, str]) -> None:
        """Write `step.json` with the hashes of these files; without any, the step is not done."""
        content = {"step": self.name, "hash": self.hash, "done": bool(results), "inputs": self.inputs}
        write_json(self.folder / _STEP, {**content, "results": results})

    def is_whole(self, said: StepContent | None) -> bool:
        """Whether `step.json` says that the step is done; raises `ForeignFolderError` if a file was lost or altered."""
        if said is None or said.hash != self.hash or not said.done:
            return False
        for name, digest in said.results.items():
            path = self.folder / name
            if not path.is_file() or _sha256(path) != digest:
                raise ForeignFolderError(
                    f"{path} was removed or altered: restore it, or start again with another folder or --force"
                )
        return True

    def _results(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file() and path != self.folder / _STEP)


@contextlib.contextmanager
def made_folder(
    folder: str | Path, command: str, inputs: Mapping[str, Any], *, force: bool = False
) -> Iterator[Path | None]:
    """A folder that is written whole, with its `run.json`; None if this same command made it before.

    Write into the folder that is yielded; it takes the name `folder` when the block ends without an exception. Raises
    `ForeignFolderError` for a folder of other content, or from other inputs unless `force` is given.
    """
    from moe_route.base import files

    target = Path(folder)
    refuse_made(target, command, force=force)
    said = _said(target) if target.is_dir() else None
    if said is not None and not force:
        _refuse_other(target, said, command, _plain(inputs))
        if said.done:
            yield None
            return
    with files.new_folder(target, replace=said is not None) as inside:
        yield inside
        Job(inside, command, inputs).finish(path.name for path in _content(inside))
        for path in _content(target) if said is not None else ():
            if said is not None and path.name not in said.made and not (inside / path.name).exists():
                copy: Any = shutil.copytree if path.is_dir() else shutil.copy2  # somebody else's
                copy(path, inside / path.name)


def refuse_made(path: str | Path, command: str, *, force: bool = False) -> None:
    """Refuse to write over a result that took a model to make, before any work, and without importing torch.

    A file that is there is refused by `FileExistsError` unless `force` is given. So is, by `ForeignFolderError`, a
    folder that another command made; one with content that no command made is refused in any case.
    """
    path = Path(path)
    if path.is_dir():
        said = _said(path)
        if said is not None and said.command != command and not force:
            raise ForeignFolderError(f"{path} holds results of `{said.command}`: {_AGAIN}")
    elif path.exists() and not force:
        raise FileExistsError(
            f"{path} exists, and it took a model to make: name another file, or write over it (--force)"
        )


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and programs, whole or not at all. NaN is refused with `ValueError`."""
    from moe_route.base import files

    files.write_text(path, f"{json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False)}\n")


def _step(folder: Path, name: str, inputs: dict[str, Any], cheap: bool) -> Step:
    from moe_route.base import files

    said = _read(folder / _STEP, STEP)
    step = Step(name, folder, inputs, hash=files.content_hash({}, inputs))
    if said is not None and said.hash != step.hash:
        if not cheap:
            where = difference(said.inputs, inputs)
            raise ForeignFolderError(f"{folder} holds results of other inputs ({where}): {_AGAIN}")
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    step.done = step.is_whole(said)
    if not step.done:
        step.write({})
    return step


def _said(folder: Path) -> RunContent | None:
    """What `run.json` says; None for a folder without content."""
    others = _content(folder)
    said: RunContent | None = _read(folder / _RUN, RUN)
    if said is None and others:
        raise ForeignFolderError(
            f"{folder} holds {others[0].name}, and no run.json that says how it was made: name an empty or new folder"
        )
    return said


def _refuse_other(folder: Path, said: RunContent, command: str, inputs: Mapping[str, Any]) -> None:
    if said.command != command:
        raise ForeignFolderError(f"{folder} holds results of `{said.command}`: {_AGAIN}")
    if said.inputs != inputs:
        raise ForeignFolderError(
            f"{folder} holds results of other inputs ({difference(said.inputs, inputs)}): {_AGAIN}"
        )


def _remove_results(folder: Path, said: RunContent) -> None:
    """Remove what a job made, and nothing else."""
    for path in _content(folder):
        if path.name in said.made or (path / _STEP).is_file() or path.name.startswith("rank-"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / _RUN).unlink()


def _content(folder: Path) -> list[Path]:
    """The content of a folder without `run.json` and hidden files."""
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.name != _RUN]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from moe_route.base import files

    descriptor = files.open_folder(folder)
    try:
        if files.lock(descriptor) is False:
            raise ForeignFolderError(f"another process writes to {folder}: wait for its end, or name another folder")
        yield
    finally:
        os.close(descriptor)


def _read(path: Path, kind: Kind) -> Any:
    """What a file of this kind says; None if there is none."""
    if not path.is_file():
        return None
    try:
        content = load_json(path)
        if kind.mark and isinstance(content, dict) and content.get("moe_route") != kind.mark:
            raise FileRefusedError(f'{path} lacks "moe_route": "{kind.name}"')
        return kind.read(content, str(path))
    except FileRefusedError as error:
        raise ForeignFolderError(f"{error} (or name another folder, if it is damaged or of another version)") from error


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(inputs, allow_nan=False))
    return plain


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        digest = hashlib.sha256()
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def difference(before: Any, now: Any, where: str = "") -> str:
    """Where two JSON values first differ, and how: "model.revision: 'a' there, 'b' now"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*now, *before]:
            if before.get(key) != now.get(key):
                return difference(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    return f"{where}: {_short(before)} there, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
