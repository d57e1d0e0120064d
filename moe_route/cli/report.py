"""`moe-route report`: write one HTML file with what was recorded, to open in a browser."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    command,
    load_language_model,
    model_arguments,
    output,
    positive,
    shown_options,
    text_arguments,
    texts,
    tokenizer_argument,
)

if TYPE_CHECKING:
    from moe_route.report import Inputs


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "report",
        run,
        "write one HTML file with figures, expert tables and the experts of single tokens; it works offline",
        "moe-route report --data general --limit 12 --out report.html\n"
        "moe-route report --data general --limit 12 --plan plan.safetensors --out steered.html\n"
        "moe-route report general.safetensors trace.safetensors results --tokenizer demo --out report.html",
    )
    parser.add_argument(
        "files",
        type=Path,
        nargs="*",
        metavar="FILE",
        help="statistics, traces (for the experts of tokens), selections, plans, scores per group (.tsv, .json), and "
        "folders or files with tables of results, such as that of eval; without any, the texts of --data are recorded "
        "with --model",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="HTML page to write, such as report.html"
    )
    parser.add_argument("--reference", metavar="GROUP", help="group to compare with (default: eng_Latn, or the first)")
    parser.add_argument("--title", help="heading of the page (default: the name of the model)")
    tokenizer_argument(parser)
    parser.add_argument("--plan", type=Path, metavar="FILE", help="without files: also record under this plan")
    parser.add_argument(
        "--trace-items",
        type=positive,
        metavar="N",
        help="without files: show the tokens of the first N sentences of every language (default: 4)",
    )
    model_arguments(parser)
    text_arguments(parser)
    parser.set_defaults(model=None)


# What a report of files does not look at: its texts were recorded before.
_OF_RECORDING = (
    "plan",
    "trace_items",
    "device",
    "dtype",
    "engine",
    "data",
    "languages",
    "limit",
    "batch_size",
    "max_length",
)


def run(options: argparse.Namespace) -> Answer:
    from moe_route import report

    if options.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(
            f"--out {options.out} would not open in a browser: a report is an HTML page, such as report.html"
        )
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

    for name in _OF_RECORDING:
        if getattr(options, name) != options.verb.get_default(name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} is for a report that records by itself: leave out the files, or --{flag}")
    name = options.tokenizer or options.model
    return report.read(options.files), None if name is None else tokenizer_of(name)


def _of_model(options: argparse.Namespace) -> tuple[Inputs, Any]:
    from moe_route import report
    from moe_route.steering import Plan

    if options.tokenizer is not None:
        raise ValueError("--tokenizer is for a report of files: a recorded model brings its own, so leave it out")
    options.model = options.model or "demo"
    plan = None if options.plan is None else Plan.load(options.plan)
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
