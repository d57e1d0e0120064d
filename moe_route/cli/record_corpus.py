"""`moe-route record --corpus`: a resumable recording of a corpus of any size, alone or as one of several ranks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import attached_model
from moe_route.cli.interrupt import INTERRUPTED, deferred_interrupt

if TYPE_CHECKING:
    from moe_route.corpus_recording import Progress

__all__ = ["arguments", "refuse_mixture", "run"]

_OF_CORPUS = ("text_column", "group_column", "item_column", "split", "chat_template", "checkpoint_seconds")
_SECONDS_BETWEEN_LINES = 60.0  # of progress, where standard error is no terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("corpora of any size (--out is a folder, and the same command resumes)")
    group.add_argument(
        "--corpus",
        metavar="SOURCE",
        help="read this as a stream: folder like FLORES, .tsv, .csv, .jsonl, .parquet, folder of these, or dataset",
    )
    for column in ("text", "group", "item"):
        group.add_argument(f"--{column}-column", default=column, metavar="NAME", help=f"column of the {column}")
    group.add_argument("--split", default="devtest", metavar="NAME", help="split of a dataset (default: devtest)")
    group.add_argument("--chat-template", action="store_true", help="put texts into the tokenizer's chat template")
    group.add_argument(
        "--checkpoint-seconds", type=float, default=300.0, metavar="S", help="time between checkpoints (default: 300)"
    )


def refuse_mixture(options: argparse.Namespace) -> None:
    """Refuse options of `--corpus` without it, and `--data` beside it: they would be ignored."""
    given = {name for name in ("data", *_OF_CORPUS) if getattr(options, name) != options.verb.get_default(name)}
    if options.corpus is None and (without := sorted(given & set(_OF_CORPUS))):
        raise ValueError(
            f"--{without[0].replace('_', '-')} belongs to --corpus: give the texts by --corpus, not --data"
        )
    if options.corpus is not None and "data" in given:
        raise ValueError("--data and --corpus both name texts: give one of them")


def run(options: argparse.Namespace, asked_for: Callable[[argparse.Namespace, Any], dict[str, Any]]) -> Answer:
    from contextlib import ExitStack

    from moe_route import files
    from moe_route.corpus_recording import RESULT, CorpusRecording
    from moe_route.data import CorpusError, CorpusStream
    from moe_route.steering import Plan

    if options.trace is not None or options.trace_layers is not None:
        raise ValueError("--trace keeps every token, and a corpus has no end: use --data for the texts to trace")
    rank, ranks = _number("RANK", 0), _number("WORLD_SIZE", 1)
    _place(options, ranks)
    plan = None if options.plan is None else Plan.load(options.plan)
    corpus = CorpusStream(
        options.corpus,
        text=options.text_column,
        group=options.group_column,
        item=options.item_column,
        split=options.split,
        groups=options.languages,
    )
    # loading a model takes minutes: what cannot be read or written is refused before; a run that began is not read
    # again for this, because parts that were copied together are added up where the corpus may be missing
    if not any(options.out.glob("rank-*")) and next(iter(corpus), None) is None:
        raise CorpusError(f"{options.corpus} holds no text" + (" in these languages" if options.languages else ""))
    files.make_folder(options.out)
    with attached_model(options) as (language_model, routed), ExitStack() as stack:
        if plan is not None:
            stack.enter_context(routed.steer(plan))
        recording = CorpusRecording(
            options.out,
            corpus,
            batch_size=options.batch_size,
            max_length=options.max_length,
            limit=options.limit,
            chat_template=options.chat_template,
            rank=rank,
            ranks=ranks,
            checkpoint_seconds=options.checkpoint_seconds,
            record=asked_for(options, language_model.tokenizer),
        )
        again = "the same command goes on from the last checkpoint"
        stop = stack.enter_context(deferred_interrupt(terminate=True, second=again))
        with _resumable(again):
            progress = recording.run(language_model, routed, stop=stop, report=_Shown(rank, ranks))
    result = options.out / RESULT
    complete = progress.finished and result.is_file()
    data = {"out": options.out, "rank": rank, "ranks": ranks, "complete": complete, **asdict(progress)}
    lines = [f"rank {rank} of {ranks}: {progress}" if ranks > 1 else str(progress)]
    if progress.cut:
        lines.append(f"{progress.cut} texts were cut: {options.out / 'cut.jsonl'} names them when all is done")
    if progress.empty:
        lines.append(f"{progress.empty} blank texts were left out")
    if not progress.finished:
        lines.append(f"interrupted: {again}")
    else:
        lines.append(f"written to {result}" if complete else "this rank is done; the last one writes the sum")
    return Answer(data, "\n".join(lines), code=0 if progress.finished else INTERRUPTED)


@contextmanager
def _resumable(again: str) -> Iterator[None]:
    """Say `again` after the error of a full disk."""
    from moe_route import files

    try:
        yield
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        raise OSError(error.errno, f"{error.strerror}; {again}") from error


def _number(name: str, default: int) -> int:
    """An environment variable that torchrun and accelerate launch set."""
    return int(os.environ.get(name, default))


def _place(options: argparse.Namespace, ranks: int) -> None:
    """Give each rank of a machine a GPU of its own, where nothing else was asked for."""
    import torch

    if ranks > 1 and options.device is None and options.device_map is None and torch.cuda.is_available():
        options.device = f"cuda:{_number('LOCAL_RANK', 0)}"


class _Shown:
    """Shows progress on standard error: one line that changes on a terminal, else a line per minute."""

    def __init__(self, rank: int, ranks: int):
        self._name = f"rank {rank}: " if ranks > 1 else ""
        self._terminal = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if self._terminal:
            sys.stderr.write(f"\r\033[K{self._name}{progress}")
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            sys.stderr.write(f"{self._name}{progress}\n")
            self._last = time.monotonic()
        sys.stderr.flush()
