"""`moe-route demo`: run the demonstration on the demo model, or on a model and texts of your own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    command,
    load_language_model,
    model_arguments,
    output,
    positive,
    shown_options,
    text_arguments,
)


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "demo",
        run,
        "switch experts of a task and of languages off, beside random ones (a few minutes)",
        "moe-route demo --out demo\n"
        "moe-route demo --limit 4 --draws 3 --languages eng_Latn,deu_Latn,swh_Latn      # a quick look",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for the pictures and report.json (default: none)"
    )
    parser.add_argument(
        "--draws",
        type=positive,
        metavar="N",
        default=99,
        help="random sets of experts beside the first finding (default: 99)",
    )
    model_arguments(parser)
    text_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.base import files
    from moe_route.demo import demo

    if options.out is not None:
        output(files.make_folder(options.out) / "report.json")
    report = demo(
        load_language_model(options),
        data=options.data,
        languages=options.languages,
        limit=options.limit,
        draws=options.draws,
        out=options.out,
        engine=options.engine,
        **shown_options(options),
    )
    return Answer(report.to_dict(), str(report), code=0 if report.restored else 1)
