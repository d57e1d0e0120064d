"""`moe-route plan push | pull`: plans on the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, output
from moe_route.cli.plan.make import out_argument, written


def add(parts: Any) -> None:
    parser = command(
        parts, "push", run_push, "put a plan on the Hugging Face hub", "moe-route plan push plan.json owner/plans"
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="plan file")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository, made if it does not exist")
    parser.add_argument("--filename", metavar="NAME", help="name there (default: that of the file)")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--revision", metavar="NAME", help="branch (default: main)")
    parser = command(
        parts,
        "pull",
        run_pull,
        "get a plan from the Hugging Face hub",
        "moe-route plan pull owner/plans --filename plan.json --out plan.json",
    )
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository")
    parser.add_argument("--filename", default="plan.safetensors", metavar="NAME", help="file (plan.safetensors)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: main)")
    out_argument(parser)


def run_push(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    plan, name = Plan.load(options.plan), options.filename or options.plan.name
    address = plan.push_to_hub(options.repo, name, private=options.private or None, revision=options.revision)
    return Answer({"address": address, "plan": plan.hash}, f"{name} is in {options.repo}: {address}")


def run_pull(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    output(options.out)
    return written(Plan.from_hub(options.repo, options.filename, revision=options.revision), options.out)
