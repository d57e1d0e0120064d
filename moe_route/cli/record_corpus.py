"""`moe-route record --corpus`: a resumable recording of a corpus of any size, alone or as one of several ranks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import attached_model, positive
from moe_route.cli.interrupt import INTERRUPTED, deferred_interrupt

if TYPE_CHECKING:
    from moe_route.base.ranks import ModelParallelGroup
    from moe_route.data import CorpusStream
    from moe_route.runs.corpus import Progress, TextRunner
    from moe_route.steering import Plan

__all__ = ["arguments", "refuse_mixture", "run"]

_OF_CORPUS = (
    "text_column",
    "group_column",
    "item_column",
    "split",
    "chat_template",
    "checkpoint_seconds",
    "tensor_parallel",
    "expert_parallel",
)
_NOT_IN_VLLM = ("consistency", "pairs", "no_special_tokens", "expert_outputs", "hidden", "device", "device_map")
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
    group.add_argument("--split", metavar="NAME", help="split of a dataset (default: devtest)")
    group.add_argument("--chat-template", action="store_true", help="put texts into the tokenizer's chat template")
    group.add_argument(
        "--checkpoint-seconds", type=float, default=300.0, metavar="S", help="time between checkpoints (default: 300)"
    )
    together = group.add_mutually_exclusive_group()
    for how in ("tensor", "expert"):
        together.add_argument(
            f"--{how}-parallel",
            type=positive,
            metavar="N",
            help=f"N ranks of a launcher (or workers of vLLM) hold one model together, by {how} parallelism, and are "
            "counted once",
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
    if options.engine == "vllm":
        if options.corpus is None:
            raise ValueError("--engine vllm records corpora: give the texts by --corpus")
        ignored = [name for name in _NOT_IN_VLLM if getattr(options, name) != options.verb.get_default(name)]
        if ignored:
            raise ValueError(f"--engine vllm does not know --{ignored[0].replace('_', '-')}: leave it out")
        if _number("WORLD_SIZE", 1) > 1:
            raise ValueError(
                "--engine vllm starts its workers itself: leave the launcher out, and use --tensor-parallel N"
            )


def run(options: argparse.Namespace, asked_for: Callable[[argparse.Namespace, Any], dict[str, Any]]) -> Answer:
    from moe_route.base import files
    from moe_route.data import CorpusError, CorpusStream
    from moe_route.runs.corpus import RESULT, CorpusRecording
    from moe_route.steering import Plan

    if options.trace is not None or options.trace_layers is not None:
        raise ValueError("--trace keeps every token, and a corpus has no end: use --data for the texts to trace")
    _place(options)
    plan = None if options.plan is None else Plan.load(options.plan)
    corpus = CorpusStream(
        options.corpus,
        text=options.text_column,
        group=options.group_column,
        item=options.item_column,
        split=options.split,
        groups=options.languages,
        limit=options.limit,
    )
    # loading a model takes minutes: what cannot be read or written is refused before; a run that began is not read
    # again for this, because parts that were copied together are added up where the corpus may be missing
    if not any(options.out.glob("rank-*")) and next(iter(corpus), None) is None:
        raise CorpusError(f"{options.corpus} holds no text" + (" in these languages" if options.languages else ""))
    files.make_folder(options.out)
    with ExitStack() as stack:
        runner, group, record, share = _runner(options, stack, corpus, plan, asked_for)
        recording = CorpusRecording(
            options.out,
            corpus,
            batch_size=options.batch_size,
            max_length=options.max_length,
            chat_template=options.chat_template,
            group=group,
            checkpoint_seconds=options.checkpoint_seconds,
            record=record,
        )
        again = "the same command goes on from the last checkpoint"
        stop = stack.enter_context(deferred_interrupt(terminate=True, second=again))
        with _resumable(again):
            progress = recording.run_with(runner, stop=stop, report=_Shown(group))
    code = 0 if progress.finished else INTERRUPTED
    result = options.out / RESULT
    complete = progress.finished and result.is_file()
    data = {"out": options.out, "rank": group.number, "ranks": group.groups, "complete": complete, **asdict(progress)}
    if not group.writes:
        return Answer(data | {"member": group.member}, "", code=code)
    lines = [f"{_name(group)}{progress}"]
    if group.how is not None:
        data["share_of_weights"] = share
        lines.append(f"each rank held {100 * share:.0f} % of the weights, as transformers' plans divide this model")
    if progress.cut:
        lines.append(f"{progress.cut} texts were cut: {options.out / 'cut.jsonl'} names them when all is done")
    if progress.empty:
        lines.append(f"{progress.empty} blank texts were left out")
    if not progress.finished:
        lines.append(f"interrupted: {again}")
    else:
        lines.append(f"written to {result}" if complete else "this part is done; the last one writes the sum")
    return Answer(data, "\n".join(lines), code=code)


def _runner(
    options: argparse.Namespace,
    stack: ExitStack,
    corpus: CorpusStream,
    plan: Plan | None,
    asked_for: Callable[[argparse.Namespace, Any], dict[str, Any]],
) -> tuple[TextRunner, ModelParallelGroup, dict[str, Any], float]:
    """What runs the texts, the group of this rank, what is recorded, and the share of the weights that it holds."""
    from moe_route.base.ranks import ALONE, model_parallel_group, share_of_weights
    from moe_route.runs.corpus import AttachedTexts

    if options.engine == "vllm":
        from moe_route.integrations.vllm.corpus import EngineTexts

        groups = options.languages or list(dict.fromkeys(text.group for text in corpus))
        size, how = _together(options)
        sequences = not options.no_sequences
        engine = EngineTexts(
            options.model,
            groups=groups,
            sequences=sequences,
            plan=plan,
            dtype=options.dtype,
            tensor_parallel_size=size,
            enable_expert_parallel=how == "expert",
        )
        return engine, ALONE, {"sequences": sequences}, 1.0
    group = stack.enter_context(model_parallel_group(*_together(options)))
    language_model, routed = stack.enter_context(attached_model(options, group=group))
    if plan is not None:
        stack.enter_context(routed.steer(plan))
    share = 1.0 if group.how is None else share_of_weights(language_model.model)
    record = asked_for(options, language_model.tokenizer)
    return AttachedTexts(language_model, routed, options.batch_size, record), group, record, share


@contextmanager
def _resumable(again: str) -> Iterator[None]:
    """Say `again` after the error of a full disk."""
    from moe_route.base import files

    try:
        yield
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        raise OSError(error.errno, f"{error.strerror}; {again}") from error


def _number(name: str, default: int) -> int:
    """An environment variable that torchrun and accelerate launch set."""
    return int(os.environ.get(name, default))


def _together(options: argparse.Namespace) -> tuple[int, Literal["tensor", "expert"]]:
    """How many ranks hold one model together, and how it is divided."""
    return (options.expert_parallel, "expert") if options.expert_parallel else (options.tensor_parallel or 1, "tensor")


def _place(options: argparse.Namespace) -> None:
    """Give each rank of a machine a GPU of its own, where nothing else was asked for."""
    import torch

    alone = _together(options)[0] == 1  # else transformers places the model
    if alone and _number("WORLD_SIZE", 1) > 1 and options.device is None and options.device_map is None:
        options.device = f"cuda:{_number('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None


def _name(group: ModelParallelGroup) -> str:
    """What begins the lines of a group's ranks."""
    if group.how is not None:
        return f"group {group.number} of {group.groups}, {group.size} ranks: "
    return f"rank {group.number} of {group.groups}: " if group.groups > 1 else ""


class _Shown:
    """Shows progress on standard error: one line that changes on a terminal, else a line per minute."""

    def __init__(self, group: ModelParallelGroup):
        self._name, self._writes = _name(group), group.writes
        self._terminal = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if not self._writes:
            return
        if self._terminal:
            sys.stderr.write(f"\r\033[K{self._name}{progress}")
        elif time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            sys.stderr.write(f"{self._name}{progress}\n")
            self._last = time.monotonic()
        sys.stderr.flush()
