"""`moe-route plan show | add | diff | explain`: read plan files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, merged_statistics, names, output
from moe_route.cli.plan.make import out_argument, written


def add(parts: Any) -> None:
    parser = command(parts, "show", run_show, "show what a plan does", "moe-route plan show plan.json")
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan file")
    parser = command(
        parts, "add", run_add, "add plans up", "moe-route plan add first.json second.safetensors --out both.json"
    )
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN", help="plan files")
    parser.add_argument("--times", type=float, default=1.0, metavar="X", help="multiply the sum by X (default: 1)")
    parser.add_argument("--any-model", action="store_true", help="the sum may steer any model, whatever they are for")
    out_argument(parser)
    parser = command(
        parts, "diff", run_diff, "compare two plans, expert by expert", "moe-route plan diff before.json after.json"
    )
    parser.add_argument("before", type=Path, metavar="PLAN", help="plan file")
    parser.add_argument("after", type=Path, metavar="PLAN", help="plan file")
    parser = command(
        parts,
        "explain",
        run_explain,
        "what a plan will do to recorded tokens, without running it",
        "moe-route plan explain plan.json general.safetensors --groups eng_Latn",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan file")
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="statistics (several are added up), or one trace"
    )
    parser.add_argument("--groups", type=names, metavar="A,B", help="explain these groups (default: all)")


def run_show(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    return written(Plan.load(options.plan), None)


def run_add(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    output(options.out)
    plans = [Plan.load(path) for path in options.plans]
    plan = sum((plan.for_model() for plan in plans) if options.any_model else plans, Plan())
    return written(plan if options.times == 1 else plan * options.times, options.out)


def run_diff(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    found = Plan.load(options.before).diff(Plan.load(options.after))
    return Answer(found.to_dict(), repr(found))


def run_explain(options: argparse.Namespace) -> Answer:
    from moe_route.base import files
    from moe_route.recording.trace import Trace
    from moe_route.steering import Plan

    plan = Plan.load(options.plan)
    traced = len(options.files) == 1 and files.read_header(options.files[0])["kind"] == "trace"
    given = Trace.load(options.files[0]) if traced else merged_statistics(options.files)
    found = plan.explain(given, options.groups)
    return Answer(found.to_dict(), repr(found))
