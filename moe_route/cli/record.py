"""`moe-route record`: run texts through a model and save statistics of its routing, or the vectors of its sentences.

`--out` names a file, or a folder. Into a folder, a corpus of any size is recorded with checkpoints, alone or as one of
several ranks, and the same command resumes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import moe_route as mr
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    load_language_model,
    load_plan,
    output,
    shown_options,
    text_source,
    texts,
)
from moe_route.cli.interrupt import INTERRUPTED, deferred_interrupt
from moe_route.cli.options import (
    add,
    command,
    layers,
    made_by_a_model,
    model_arguments,
    out_argument,
    positive,
    refuse,
    text_arguments,
    writable,
)
from moe_route.cli.saving import check_room_after_first_batch, save, save_when_there_is_room

if TYPE_CHECKING:
    from moe_route.base.ranks import ModelParallelGroup
    from moe_route.runs.corpus import Progress, TextRunner
    from moe_route.steering import Reach

_OF_FOLDER = (
    "text_column",
    "group_column",
    "item_column",
    "chat_template",
    "checkpoint_seconds",
    "tensor_parallel",
    "expert_parallel",
)
_OF_ROUTING = (
    "no_sequences",
    "consistency",
    "pairs",
    "no_special_tokens",
    "expert_outputs",
    "hidden",
    "plan",
    "trace",
    "trace_layers",
    "trace_logits",
    "metrics",
    "engine",
)
_NOT_IN_VLLM = ("consistency", "pairs", "no_special_tokens", "expert_outputs", "hidden", "device", "device_map")
_SHOWN = 8  # groups, each with five series a layer
_SECONDS_BETWEEN_LINES = 60.0  # of progress, where standard error is no terminal


def add_record(verbs: Any) -> None:
    parser = command(
        verbs,
        "record",
        run,
        "record the routing of a model over texts, by language",
        "moe-route record --data texts.tsv --languages eng_Latn,deu_Latn --out general.safetensors\n"
        "moe-route record --data corpus/ --out recording/           # a folder: the same command resumes\n"
        "moe-route record --vectors position --out vectors.safetensors",
    )
    out_argument(
        parser,
        "statistics file, or a folder (a name without a suffix, or with / at its end), to write",
        required=True,
        metavar="FILE|FOLDER/",
        type=str,
    )
    parser.checks.append(_choose_place)
    made_by_a_model(parser, "record", "trace")
    what = parser.add_argument_group("what is recorded")
    what.add_argument(
        "--no-sequences", action="store_true", help="keep sums only, not each sentence (no paired divergence)"
    )
    what.add_argument(
        "--consistency",
        type=positive,
        nargs="?",
        const=True,
        default=False,
        metavar="N",
        help="average the overlap of the experts of two tokens over each sequence, by all pairs or N drawn ones",
    )
    what.add_argument("--pairs", action="store_true", help="count pairs of experts, within and across layers")
    what.add_argument(
        "--no-special-tokens", action="store_true", help="leave out the tokenizer's special tokens (begin, end, ...)"
    )
    what.add_argument(
        "--expert-outputs", action="store_true", help="add up the sizes of the experts' outputs (runs experts twice)"
    )
    what.add_argument("--hidden", action="store_true", help="average the inputs of the routers")
    what.add_argument(
        "--trace", type=writable, metavar="FILE", help="also write the experts of every token, up to a million tokens"
    )
    what.add_argument(
        "--metrics", type=writable, metavar="FILE", help="also write what a server's /metrics shows, for Prometheus"
    )
    what.add_argument("--trace-layers", type=layers, metavar="A-B", help="MoE layers to trace (default: all)")
    what.add_argument(
        "--trace-logits", choices=("float16", "float32"), help="also keep the router's logits in the trace, as these"
    )
    what.add_argument(
        "--vectors",
        choices=("position", "reversed", "mean", "last"),
        help="instead, pool the hidden states of each sentence in every layer, with these weights of its tokens: 1 to "
        "S (MEXA), S to 1 (mPLM-Sim on decoders), alike, or the last one alone; the model needs no experts",
    )
    add(what, "plan")
    model_arguments(parser, engines=("hook", "fused", "vllm"))
    text_arguments(parser)
    _add_folder_options(parser)


def _choose_place(options: argparse.Namespace) -> None:
    """Tell a folder (``/`` at the end, no suffix, or one that is there) from a file."""
    text = options.out
    try:
        options.out = writable(text.rstrip("/") or "/")
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from error
    options.in_folder = text.endswith("/") or options.out.is_dir() or not options.out.suffix


def _add_folder_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recording into a folder")
    for column in ("text", "group", "item"):
        group.add_argument(f"--{column}-column", default=column, metavar="NAME", help=f"column of the {column}")
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


def run(options: argparse.Namespace) -> Answer:
    if options.vectors is not None:
        refuse(options, (*_OF_ROUTING, *_OF_FOLDER), "is not for --vectors")
        if options.in_folder:
            raise ValueError(
                f"vectors are one file, and {options.out} is a folder: name a file such as vectors.safetensors"
            )
        return _run_vectors(options)
    if options.trace_layers is not None and options.trace is None:
        raise ValueError("--trace-layers chooses the layers of a trace: name its file with --trace")
    if options.trace_logits is not None and options.trace is None:
        raise ValueError("--trace-logits keeps logits in a trace: name its file with --trace")
    if options.in_folder:
        return _run_folder(options)
    refuse(options, _OF_FOLDER, f"is for a folder, and --out {options.out} is a file")
    if options.engine == "vllm":
        raise ValueError("--engine vllm records into a folder: give --out FOLDER/")
    return _run_file(options)


def _asked_for(options: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """What to record, as arguments of `record`."""
    return {
        "sequences": not options.no_sequences,
        "trace": options.trace is not None and (options.trace_layers or True),
        "logits": options.trace_logits or False,
        "consistency": options.consistency,
        "pairs": options.pairs,
        "expert_outputs": options.expert_outputs,
        "hidden": options.hidden,
        "special_tokens": list(tokenizer.all_special_ids) if options.no_special_tokens else True,
    }


# ---- into a file


def _run_file(options: argparse.Namespace) -> Answer:
    output(options.out, options.trace, options.metrics)
    plan = None if options.plan is None else load_plan(options.plan)
    work = texts(options)
    groups = list(dict.fromkeys(text.group for text in work))
    if plan is not None:
        plan.check_groups(groups)
    with attached_model(options) as (language_model, routed), ExitStack() as until_saved:
        with ExitStack() as stack:
            if plan is not None:
                stack.enter_context(routed.steer(plan))
            recorder = stack.enter_context(routed.record(groups, **_asked_for(options, language_model.tokenizer)))
            stop = until_saved.enter_context(deferred_interrupt())
            checked = check_room_after_first_batch(recorder, options.out, len(work), stop)
            ran = mr.record_texts(recorder, language_model, work, stop=checked, **shown_options(options, "recording"))
        done = len(ran.texts)
        if not done:
            raise KeyboardInterrupt  # before the first batch there is nothing to save
        statistics = recorder.statistics()
        results = [partial(statistics.save, options.out)]
        if options.trace is not None:
            results.append(partial(recorder.trace().save, options.trace))
        if options.metrics is not None:
            results.append(partial(_write_metrics, options.metrics, statistics))
        unsaved = [(write, error) for write in results if (error := save(write)) is not None]
    for write, error in unsaved:
        save_when_there_is_room(write, error)
    tokens = statistics.tokens().max(axis=1)
    data = {
        "out": options.out,
        "groups": dict(zip(statistics.groups, tokens.tolist(), strict=True)),
        "layers": len(statistics.layers),
        "experts": list(statistics.num_experts),
        "sequences": statistics.sequences().tolist(),
        "texts": done,
        "cut": ran.cut,
        "trace": options.trace,
        "interrupted": done < len(work),
    }
    paths = [options.out, *(path for path in (options.trace, options.metrics) if path is not None)]
    written = f"written to {' and '.join(map(str, paths))}"
    text = "\n".join(filter(None, (repr(statistics), ran.note, written)))
    if done < len(work):
        text += f"\ninterrupted: these are {done} of {len(work)} texts"
    return Answer(data, text, code=INTERRUPTED if done < len(work) else 0)


def _run_vectors(options: argparse.Namespace) -> Answer:
    from moe_route.recording import sentence_vectors

    output(options.out)
    work = texts(options)
    language_model = load_language_model(options)
    vectors = sentence_vectors(
        language_model.model,
        language_model.tokenizer,
        work,
        pooling=options.vectors,
        **shown_options(options, "vectors"),
    )
    write = partial(vectors.save, options.out)
    if (error := save(write)) is not None:
        save_when_there_is_room(write, error)
    cut = vectors.metadata.get("cut_texts", 0)
    data = {
        "out": options.out,
        "groups": vectors.groups,
        "items": len(vectors.items),
        "layers": vectors.layers,
        "pooling": vectors.pooling,
        "cut": cut,
    }
    note = [f"{cut} of {len(work)} texts cut"] if cut else []
    return Answer(data, "\n".join([repr(vectors), *note, f"written to {options.out}"]))


# ---- into a folder


def _write_metrics(path: str, statistics: mr.recording.RoutingStatistics) -> None:
    """Write what a dashboard shows, over all groups and of each one, unless these are many."""
    from moe_route.analysis.load import metrics_text
    from moe_route.base import files

    files.write_text(path, metrics_text(statistics, statistics.groups if len(statistics.groups) <= _SHOWN else ()))


def _run_folder(options: argparse.Namespace) -> Answer:
    from moe_route.base import files
    from moe_route.runs.corpus import RESULT, CorpusRecording
    from moe_route.steering import Reach

    if options.trace is not None:
        raise ValueError("--trace keeps every token, and a corpus has no end: record the texts to trace into a file")
    if options.engine == "vllm":
        refuse(options, _NOT_IN_VLLM, "is unknown to --engine vllm")
        if _number("WORLD_SIZE", 1) > 1:
            raise ValueError(
                "--engine vllm starts its workers itself: leave the launcher out, and use --tensor-parallel N"
            )
    _place(options)
    plan = None if options.plan is None else load_plan(options.plan)
    columns = {name: getattr(options, f"{name}_column") for name in ("text", "group", "item")}
    # loading a model takes minutes: what cannot be read or written is refused before; a run that began is not read
    # again for this, because parts that were copied together are added up where the corpus may be missing
    begun = any(options.out.glob("rank-*")) and not Path(options.data).exists()
    corpus = text_source(options, opened=not begun, **columns)
    if not begun and next(iter(corpus), None) is None:
        raise mr.data.CorpusError(
            f"{options.data} holds no text" + (" in these languages" if options.languages else "")
        )
    if plan is not None and not begun and corpus.languages is not None:
        plan.check_groups(corpus.languages)
    files.make_folder(options.out)
    with ExitStack() as stack:
        reach = Reach(() if plan is None else plan.rules)
        runner, group, record, share = _runner(options, stack, corpus, plan, reach)
        recording = CorpusRecording(
            options.out,
            corpus,
            batch_size=options.batch_size,
            max_length=options.max_length,
            chat_template=options.chat_template,
            group=group,
            checkpoint_seconds=options.checkpoint_seconds,
            record=record,
            force=options.force,
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
    if plan is not None and complete:
        _warn_of_unreached(plan, Reach(()) if progress.resumed or group.groups > 1 else reach, result)
    if complete and options.metrics is not None:
        _write_metrics(options.metrics, mr.recording.RoutingStatistics.load(result))
    lines = [f"{_name(group)}{progress}"]
    if progress.resumed:
        lines.insert(0, progress.resumed)
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
    options: argparse.Namespace, stack: ExitStack, corpus: mr.data.CorpusStream, plan: mr.Plan | None, reach: Reach
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
        stack.enter_context(routed.steer(plan, reach=reach))
    share = 1.0 if group.how is None else share_of_weights(language_model.model)
    record = _asked_for(options, language_model.tokenizer)
    return AttachedTexts(language_model, routed, options.batch_size, record), group, record, share


def _warn_of_unreached(plan: mr.Plan, reach: Reach, result: Path) -> None:
    """Warn of rules that reached no token: as this run saw it, or as the sum of all runs counted groups and phases."""
    import numpy as np

    from moe_route.steering import Reach

    if not reach.calls:
        counted = mr.RoutingStatistics.load(result, sequences=False)
        tokens = np.stack([counted.tokens(phase).max(1) for phase in counted.phases])
        reach = Reach.of_counts(plan.rules, counted.groups, tokens)
    reach.warn()


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
    from moe_route.base.devices import accelerator

    alone = _together(options)[0] == 1  # else transformers places the model
    if alone and _number("WORLD_SIZE", 1) > 1 and options.device is None and options.device_map is None:
        kind = accelerator()
        options.device = None if kind is None else f"{kind}:{_number('LOCAL_RANK', 0)}"


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
