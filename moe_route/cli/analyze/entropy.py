"""`moe-route analyze entropy`."""

from __future__ import annotations

import argparse
from typing import Any, Literal

from moe_route.cli.analyze.arguments import groups_argument, interval_argument, phase_argument, statistics_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics


def add(questions: Any) -> None:
    parser = command(
        questions,
        "entropy",
        run,
        "how spread the routing is, by group and layer",
        "moe-route analyze entropy general.safetensors --normalized",
    )
    statistics_argument(parser)
    groups_argument(parser)
    parser.add_argument(
        "--kind",
        default="full",
        choices=("full", "topk", "count"),
        help="sequence entropy of all scores, of the chosen experts' weights, or of choices (default: full)",
    )
    parser.add_argument(
        "--correct", choices=("miller_madow", "jackknife"), help="correct for short texts; needs --kind count"
    )
    parser.add_argument("--normalized", action="store_true", help="divide by log E, so that uniform routing is 1")
    interval_argument(parser, "sequences")
    phase_argument(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.analysis.result import by_depth, plain

    found = analysis.entropy(
        merged_statistics(options.files),
        groups=options.groups,
        phase=options.phase,
        kind=options.kind,
        correct=options.correct,
    )
    data, parts = found.to_dict(), [repr(found)]
    if options.normalized:
        present = [name for name in ("token", "sequence") if getattr(found, name) is not None]
        values = {name: found.normalized(name) for name in present}  # type: ignore[arg-type]
        data["normalized"] = plain(values)
        parts = [str(by_depth(found.groups, rows, title=f"{name} entropy / log E")) for name, rows in values.items()]
    if options.interval is not None:
        data["level"] = options.interval
        kinds: tuple[Literal["token", "sequence", "gap"], ...] = ("token", "sequence", "gap")
        for of in kinds if found.token_values is not None else kinds[1:2]:
            low, high = found.interval(options.interval, of=of)
            data |= {f"{of}_low": plain(low), f"{of}_high": plain(high)}
            for name, ends in (("low", low), ("high", high)):
                what = of if of == "gap" else f"{of} entropy"
                title = f"{what} (nats), {name} end of the {options.interval * 100:g} % interval"
                parts.append(str(by_depth(found.groups, ends, title=title)))
    return Answer(data, "\n".join(parts))
