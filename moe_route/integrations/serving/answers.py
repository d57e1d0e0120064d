"""What the workers of an engine answer to a verb, and how the engine core makes one answer of it.

An error that a worker raised would end the call before an engine has read what the other workers answered, and the
next call would read that instead. So workers hand errors over, and the core raises them once all have answered.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from moe_route.base.files import FileRefusedError
from moe_route.integrations.serving.options import EngineNotSupportedError
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.recording.store import SequenceStore
from moe_route.recording.trace import Trace
from moe_route.steering.model import PlanError

_Made = TypeVar("_Made", RoutingStatistics, Trace)

_KINDS = (EngineNotSupportedError, FileRefusedError, OSError, PlanError, RecordingError)  # raised as they are
logger = logging.getLogger(__name__)


class Failure(NamedTuple):
    """An error of one worker."""

    kind: type[Exception]
    text: str


class StagePart(NamedTuple):
    """What one stage of pipeline parallelism counted: a file's content, and where the file of all layers shall be."""

    kind: type[RoutingStatistics] | type[Trace]
    content: bytes
    path: str | None


def answer(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or the ``Failure`` that it raised."""
    try:
        return call()
    except _KINDS as error:
        kind = next(kind for kind in _KINDS if isinstance(error, kind))
        return Failure(kind, str(error))
    except Exception as error:
        logger.exception("moe_route: a verb failed")  # its traceback stays in this process
        return Failure(RuntimeError, f"{type(error).__name__}: {error}")


def failed(answers: Sequence[Any]) -> bool:
    """Whether a worker handed an error over."""
    return any(isinstance(one, Failure) for one in answers)


def joined(answers: Sequence[Any]) -> list[Any]:
    """The answers of all workers; the parts of stages become one, in the place of the first.

    Raises the first error that a worker handed over.
    """
    for one in answers:
        if isinstance(one, Failure):
            raise one.kind(one.text)
    parts = [one for one in answers if isinstance(one, StagePart)]
    if not parts:
        return list(answers)
    first = parts[0]
    kind: Any = first.kind
    whole = kind.join_layers([loaded(kind, part.content) for part in parts])
    others = [None if isinstance(one, StagePart) else one for one in answers]
    return [saved(whole, first.path) if one is first else other for one, other in zip(answers, others, strict=True)]


def saved(made: RoutingStatistics | Trace, path: str | None) -> str | bytes:
    """The path to which it was written, or the content of such a file."""
    if path is None:
        return content_of(made)
    made.save(path)
    return path


def content_of(made: RoutingStatistics | Trace) -> bytes:
    """The content of a file of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.safetensors"
        made.save(file)
        return file.read_bytes()


def loaded(kind: type[_Made], content: bytes) -> _Made:
    """What was saved in a file of this content."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "answer.safetensors"
        file.write_bytes(content)
        if not issubclass(kind, RoutingStatistics):
            return kind.load(file)
        return held(kind.load(file, partial=True))


def held(statistics: RoutingStatistics) -> RoutingStatistics:
    """Statistics whose sequences are not read from their file any more, which may go."""
    if statistics.store is not None:
        kept = SequenceStore(statistics.layers, statistics.num_experts)
        for shard in statistics.store.shards():
            kept.append(shard.keys, shard.arrays)
        statistics.store = kept
    return statistics


def replica_path(path: str, replica: int) -> str:
    """The file of one replica of data parallelism, beside those of the others: statistics-0.safetensors."""
    given = Path(path)
    return str(given.with_name(f"{given.stem}-{replica}{given.suffix}"))
