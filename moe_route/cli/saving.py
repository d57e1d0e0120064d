"""Saving results of long work: the disk is looked at early, a full one does not lose them, a folder is resumed."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.base.table import data_frame
from moe_route.cli.answer import Answer, one_line, plain
from moe_route.runs.job import Job

if TYPE_CHECKING:
    from moe_route.recording import Recorder
    from moe_route.runs.lines import KeptRuns

_SECONDS_BETWEEN_TRIES = 2.0
_SECONDS_OF_WAITING = 3600.0
_RESULT = ("result.csv", "result.json")  # of a folder that is resumed


def check_room_after_first_batch(
    recorder: Recorder, out: Path, sequences: int, stop: Callable[[], bool]
) -> Callable[[], bool]:
    """`stop` for `record_texts`, which before the second batch also checks that the result will fit on the disk.

    Sequences beyond the memory limit of a recording lie in a temporary folder until it ends, so its disk is checked,
    too. The check raises the error of `files.check_room`.
    """
    from moe_route.base import files
    from moe_route.recording import RecordingError

    calls, is_checked = 0, False

    def checked() -> bool:
        nonlocal calls, is_checked
        calls += 1
        if calls > 1 and not is_checked:
            with contextlib.suppress(RecordingError):  # the first batch may hold no token that counts
                found = recorder.statistics()
                is_checked = True
                files.check_room(out, found.file_bytes(sequences))
                if found.store is not None and (kept := found.store.file_bytes(sequences)) > found.store.memory_bytes:
                    files.check_room(Path(tempfile.gettempdir()) / "sequences (TMPDIR names another folder)", kept)
        return stop()

    return checked


def resumed(
    options: argparse.Namespace,
    command: str,
    asked: Mapping[str, Any],
    work: Sequence[Any],
    measured: Callable[[KeptRuns | None], Answer],
) -> Answer:
    """What ``measured`` answers; if ``--out`` is a folder, it gets the runs that are kept there, and so goes on.

    ``asked`` and ``work`` (dataclasses: texts, pairs) are what the answer follows from, beside the model. The folder
    also gets the answer as JSON, and its table as CSV.
    """
    if options.out is not None and options.out.suffix.lower() != ".json":
        data_frame({})  # tables need pandas, and that is said before hours of work
    if options.out is None or options.out.suffix:
        return measured(None)
    from moe_route.base.files import content_hash
    from moe_route.runs.lines import KeptRuns

    how = {name: getattr(options, name, None) for name in ("model", "dtype", "engine", "batch_size", "max_length")}
    inputs = {**how, **asked, "items": content_hash({}, {"items": [asdict(item) for item in work]})}
    with Job(options.out, command, plain(inputs), force=options.force) as job:
        step = job.step("runs", {})
        kept = KeptRuns(step.folder / "runs.jsonl")
        answer = measured(kept)
        step.finish()
        for name in _RESULT:
            answer.kept(options.out / name)
        job.finish(_RESULT)
    there = f"resumed: {kept.resumed:,} runs were there\n" if job.resumed else ""
    text = f"{there}{answer.text}\nwritten to {options.out}"
    return Answer({**answer.data, "out": options.out, "resumed": kept.resumed}, text)


def save(write: Callable[[], None]) -> OSError | None:
    """Write a result; returns the error of a full disk, after which it can be written once there is room."""
    from moe_route.base import files

    try:
        write()
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        return error
    return None


def save_when_there_is_room(write: Callable[[], None], error: OSError) -> None:
    """Write a result that `save` could not write, as soon as the disk has room; Ctrl-C gives it up.

    Raises the error of a full disk after an hour.
    """
    end = time.monotonic() + _SECONDS_OF_WAITING
    print(
        f"moe-route: {one_line(error)}\n"
        "moe-route: the result is kept in memory for an hour and written as soon as there is room; Ctrl-C drops it",
        file=sys.stderr,
        flush=True,
    )
    while (full := save(write)) is not None:
        if time.monotonic() > end:
            raise full
        time.sleep(_SECONDS_BETWEEN_TRIES)
