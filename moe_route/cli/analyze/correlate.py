"""`moe-route analyze correlate`."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.arguments import (
    divergence_arguments,
    divergence_options,
    interval_argument,
    reference_argument,
    statistics_argument,
)
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics


def add(questions: Any) -> None:
    parser = command(
        questions,
        "correlate",
        run,
        "whether groups that are routed like the reference score better, by layer",
        "moe-route analyze correlate general.safetensors --scores accuracy.tsv --covariates languages.tsv --fertility",
    )
    statistics_argument(parser)
    reference_argument(parser)
    divergence_arguments(parser)
    parser.add_argument(
        "--scores",
        type=Path,
        required=True,
        metavar="FILE",
        help="a score per group: JSON {group: score}, or tab-separated lines of group and score",
    )
    parser.add_argument(
        "--covariates",
        type=Path,
        metavar="FILE",
        help="hold these constant: tab-separated, a line per group, names of the columns in the first line",
    )
    parser.add_argument("--fertility", action="store_true", help="hold constant the tokens per sequence, too")
    parser.add_argument(
        "--blocks", metavar="COLUMN", help="column of --covariates, such as the family, in which scores are exchanged"
    )
    parser.add_argument(
        "--exchange",
        default="within",
        choices=("within", "blocks"),
        help="exchange scores within blocks, or whole blocks of equal size (default: within)",
    )
    interval_argument(parser, "groups and items, of r")


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.analysis.inputs import read_scores
    from moe_route.analysis.result import plain
    from moe_route.base.table import Table

    found = analysis.divergence(merged_statistics(options.files), options.reference, **divergence_options(options))
    columns = {} if options.covariates is None else read_columns(options.covariates)
    blocks = None
    if options.blocks is not None:
        if options.blocks not in columns:
            raise ValueError(
                f"--blocks names a column of --covariates: {', '.join(columns) or 'there is no such file'}"
            )
        blocks = columns.pop(options.blocks)
    if options.fertility:
        columns["tokens"] = {} if found.tokens is None else dict(zip(found.groups, found.tokens.tolist(), strict=True))
    result = analysis.correlation(
        found, read_scores(options.scores), covariates=columns, blocks=blocks, exchange=options.exchange
    )
    data, text = result.to_dict(), repr(result)
    if options.interval is not None:
        low, high = result.interval(options.interval)
        data |= {"level": options.interval, "low": plain(low), "high": plain(high)}
        rows = [[layer, *ends] for layer, ends in enumerate(zip(low.tolist(), high.tolist(), strict=True))]
        text += f"\n{Table(('layer', 'low', 'high'), rows, f'{options.interval * 100:g} % interval of Pearson r')}"
    return Answer(data, text)


def read_columns(path: Path) -> dict[str, dict[str, float | str]]:
    """column -> (group -> value) of a tab-separated table; a column of numbers throughout holds numbers."""
    head, *lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(head) < 2 or any(len(line) != len(head) for line in lines):
        raise ValueError(f"{path} must be a tab-separated table: groups in the first column, names in the first line")
    columns: dict[str, dict[str, float | str]] = {}
    for place, name in enumerate(head[1:], 1):
        values: dict[str, float | str] = {line[0]: line[place] for line in lines}
        with contextlib.suppress(ValueError):  # labels
            values = {group: float(value) for group, value in values.items()}
        columns[name] = values
    return columns
