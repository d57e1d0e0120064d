"""`moe-route analyze experts`: find experts, and write a plan for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers, merged_statistics, output

KINDS = ("activate", "deactivate", "force-on", "force-off", "forbid")


def add(questions: Any) -> None:
    parser = command(
        questions,
        "experts",
        run,
        "experts that a task uses more than a baseline does",
        "moe-route analyze experts --task task.safetensors --baseline general.safetensors \\\n"
        "    --group eng_Latn --layers 2-5 --out plan.safetensors",
    )
    parser.add_argument("--task", type=Path, nargs="+", required=True, metavar="FILE", help="statistics of task texts")
    parser.add_argument(
        "--baseline", type=Path, nargs="+", required=True, metavar="FILE", help="statistics of general texts"
    )
    parser.add_argument("--group", metavar="GROUP", help="group to compare, such as eng_Latn (default: the only one)")
    parser.add_argument(
        "--threshold", type=float, default=0.3, metavar="X", help="difference of frequency (default: 0.3)"
    )
    parser.add_argument("--layers", type=layers, metavar="A-B", help="MoE layers to look at, counted from 0")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a plan for these experts")
    parser.add_argument(
        "--kind", default="activate", choices=KINDS, help="what the plan does to them (default: activate)"
    )
    parser.add_argument(
        "--strength", type=float, default=0.5, metavar="X", help="in standard deviations of the logits (default: 0.5)"
    )


def run(options: argparse.Namespace) -> Answer:
    from moe_route import analysis

    output(options.out)
    task = merged_statistics(options.task)
    if options.group is None and len(task.groups) != 1:
        raise ValueError(f"the task statistics hold {len(task.groups)} groups ({', '.join(task.groups)}): pass --group")
    selection = analysis.task_experts(
        task,
        merged_statistics(options.baseline),
        threshold=options.threshold,
        group=options.group,
        layers=options.layers,
    )
    data, text = selection.to_dict(), repr(selection)
    if options.out is not None:
        plan = _plan(options.kind, selection, options.strength)
        model = task.metadata.get("model") or {}
        plan = plan.for_model(config_hash=model.get("config_hash"), num_experts=task.num_experts)
        plan.save(options.out)
        data, text = (
            {**data, "out": options.out, "plan": plan.hash},
            f"{text}\n{plan.describe()}\nwritten to {options.out}",
        )
    return Answer(data, text)


def _plan(kind: str, selection: Any, strength: float) -> Any:
    from moe_route.steering import Plan

    if not selection:
        raise ValueError("no expert passes the threshold, so there is no plan to write: take a smaller --threshold")
    make = getattr(Plan, kind.replace("-", "_"))
    return make(selection, strength=strength) if kind in ("activate", "deactivate") else make(selection)
