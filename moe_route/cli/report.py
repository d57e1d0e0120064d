"""`moe-route report` writes one HTML file with what was recorded, and `moe-route demo` runs the demonstration."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import load_language_model, load_plan, output, shown_options, texts
from moe_route.cli.options import (
    add,
    command,
    existing,
    model_arguments,
    out_argument,
    positive,
    refuse,
    text_arguments,
)

if TYPE_CHECKING:
    from moe_route.report import Inputs


def add_report(verbs: Any) -> None:
    parser = command(
        verbs,
        "report",
        run_report,
        "write one HTML file with figures, expert tables and the experts of single tokens; it works offline",
        "moe-route report --data general --limit 12 --out report.html\n"
        "moe-route report --data general --limit 12 --plan plan.safetensors --out steered.html\n"
        "moe-route report general.safetensors trace.safetensors results --tokenizer demo --out report.html",
    )
    parser.add_argument(
        "files",
        type=existing,
        nargs="*",
        metavar="FILE",
        help="statistics, traces (for the experts of tokens), selections, plans, scores per group (.tsv, .json), and "
        "folders or files with tables of results, such as that of eval; without any, the texts of --data are recorded "
        "with --model",
    )
    out_argument(parser, "HTML page to write, such as report.html", required=True, suffixes=(".html", ".htm"))
    add(
        parser,
        "reference",
        "title",
        "tokenizer",
        "plan",
        reference="group to compare with (default: eng_Latn, or the first)",
        title="heading of the page (default: the name of the model)",
        plan="without files: also record under this plan",
    )
    parser.add_argument(
        "--trace-items",
        type=positive,
        metavar="N",
        help="without files: show the tokens of the first N sentences of every language (default: 4)",
    )
    parser.checks.append(_refuse_ignored)  # before texts and model get their defaults
    model_arguments(parser, positional=False)
    text_arguments(parser)


# What a report of files does not look at: its texts were recorded before.
_OF_RECORDING = (
    "plan",
    "trace_items",
    "device",
    "device_map",
    "dtype",
    "engine",
    "data",
    "columns",
    "quotes",
    "split",
    "languages",
    "limit",
    "batch_size",
    "max_length",
)


def _refuse_ignored(options: argparse.Namespace) -> None:
    options.tokenizer_of_model = options.tokenizer or options.model
    if options.files:
        refuse(options, _OF_RECORDING, "is for a report that records by itself, without files")
        options.model, options.data = options.model or "demo", "general"  # not read, nor is the environment asked
    elif options.tokenizer is not None:
        raise ValueError("--tokenizer is for a report of files: a recorded model brings its own, so leave it out")


def run_report(options: argparse.Namespace) -> Answer:
    from moe_route import report

    output(options.out)
    inputs, tokenizer = _of_files(options) if options.files else _of_model(options)
    report.write(options.out, inputs, reference=options.reference, tokenizer=tokenizer, title=options.title)
    size = options.out.stat().st_size
    written = f"written to {options.out} ({size / 1e6:.2f} MB): open it in a browser"
    if not inputs.traces:
        written += (
            "\nNo trace was given, so it shows no tokens: record one by `moe-route record --trace trace.safetensors`"
        )
    elif tokenizer is None:
        written += "\nNo tokenizer was given, so it shows token ids: name one by --tokenizer"
    data = {
        "out": options.out,
        "bytes": size,
        "recordings": list(inputs.recordings),
        "traces": list(inputs.traces),
        "selections": list(inputs.selections),
        "plans": list(inputs.plans),
        "scores": list(inputs.scores),
        "results": [table.title for table in inputs.results],
    }
    return Answer(data, written)


def _of_files(options: argparse.Namespace) -> tuple[Inputs, Any]:
    from moe_route import report
    from moe_route.cli.inputs import tokenizer_of

    name = options.tokenizer_of_model
    return report.read(options.files), None if name is None else tokenizer_of(name)


def _of_model(options: argparse.Namespace) -> tuple[Inputs, Any]:
    from moe_route import report

    plan = None if options.plan is None else load_plan(options.plan)
    work = texts(options)
    language_model = load_language_model(options)
    inputs = report.record_inputs(
        language_model,
        work,
        plan=plan,
        traced_items=options.trace_items or 4,
        engine=options.engine,
        **shown_options(options),
    )
    return inputs, language_model.tokenizer


def add_demo(verbs: Any) -> None:
    parser = command(
        verbs,
        "demo",
        run_demo,
        "show the routing of a large model, and switch experts of a small one off, beside random ones (a minute)",
        "moe-route demo --out demo\n"
        "moe-route demo --limit 4 --draws 3 --languages eng_Latn,deu_Latn,swh_Latn      # a quick look",
    )
    out_argument(parser, "folder for the page index.html, report.txt and report.json (default: none)", metavar="FOLDER")
    parser.add_argument(
        "--draws",
        type=positive,
        metavar="N",
        default=19,
        help="random sets of experts, 19 at most for a language (default: 19)",
    )
    model_arguments(parser)
    text_arguments(parser)


def run_demo(options: argparse.Namespace) -> Answer:
    from moe_route.base import files
    from moe_route.data import Corpus
    from moe_route.demo import demo

    if options.out is not None:
        output(files.make_folder(options.out) / "report.json")
    how = {name: getattr(options, name) for name in ("columns", "quotes", "limit", "split")}
    report = demo(
        load_language_model(options),
        data=Corpus.read(options.data, options.languages, **how),
        limit=options.limit,
        draws=options.draws,
        out=options.out,
        engine=options.engine,
        **shown_options(options),
    )
    return Answer(report.to_dict(), str(report), code=0 if report.restored else 1, paint=_painted)


def _painted(text: str) -> str:
    """The first line of each finding in bold and what is lost in red, on a terminal and unless NO_COLOR is set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    return re.sub(r"(?m)^\d\. .*", "\033[1m\\g<0>\033[0m", re.sub("░+", "\033[31m\\g<0>\033[0m", text))
