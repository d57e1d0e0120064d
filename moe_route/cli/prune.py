"""`moe-route prune`: write a smaller model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, load_language_model, model_arguments


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "prune",
        run,
        "write a model without some experts",
        "moe-route analyze prune general.safetensors --keep 0.5 --out dropped.safetensors\n"
        "moe-route prune --selection dropped.safetensors --out smaller",
    )
    parser.add_argument(
        "--selection", type=Path, required=True, metavar="FILE", help="experts to drop, as `analyze prune --out` writes"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the checkpoint")
    model_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.base.files import check_new_folder
    from moe_route.experiments.pruning import export_pruned
    from moe_route.steering import ExpertSelection

    selection = ExpertSelection.load(options.selection)
    check_new_folder(options.out)  # before the model is loaded
    language_model = load_language_model(options)
    export_pruned(language_model.model, selection, options.out, tokenizer=language_model.tokenizer)
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    data = {"out": options.out, "dropped": len(selection), "bytes": size}
    return Answer(data, f"{len(selection)} experts dropped; {size / 2**20:.1f} MiB written to {options.out}")
