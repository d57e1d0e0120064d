"""`moe-route steer`: show the effect of a plan on a model, as losses by language and strength, or as generated text."""

from __future__ import annotations

import argparse
from typing import Any

import moe_route as mr
from moe_route.base.table import data_frame, interval, table
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import attached_model, load_plan, shown_options, texts
from moe_route.cli.options import (
    add,
    command,
    model_arguments,
    numbers,
    positive,
    refuse,
    table_argument,
    text_arguments,
)
from moe_route.cli.plan import plan_file

_OF_TEXTS = ("data", "columns", "quotes", "split", "languages", "limit", "batch_size", "max_length")


def add_steer(verbs: Any) -> None:
    parser = command(
        verbs,
        "steer",
        run,
        "compare a model with and without a plan",
        "moe-route steer --plan plan.safetensors --languages eng_Latn,deu_Latn --limit 30\n"
        "moe-route steer --plan plan.safetensors --strengths 0.5,1,2 --controls 4 --limit 30\n"
        'moe-route steer --plan plan.safetensors --prompt "Anna has five"',
    )
    parser.add_argument(
        "--plan", type=plan_file, required=True, metavar="PLAN", help="plan: a file, or hub:OWNER/NAME/FILE"
    )
    add(parser, "strength", strength="multiply the plan by X (default: 1)")
    parser.add_argument(
        "--strengths", type=numbers, metavar="A,B", help="losses at several strengths of the plan, such as 0.5,1,2"
    )
    parser.add_argument(
        "--controls", type=int, default=0, metavar="N", help="--strengths: random sets of experts per strength (none)"
    )
    add(parser, "seed", seed="--controls: of what is drawn (default: 0)")
    parser.add_argument("--prompt", metavar="TEXT", help="generate from this text instead of measuring losses")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="--prompt: tokens to generate (default: 32)"
    )
    table_argument(parser)
    model_arguments(parser)
    parser.checks.append(_refuse_ignored)  # before texts get their default
    text_arguments(parser)


def _refuse_ignored(options: argparse.Namespace) -> None:
    if options.prompt is not None:
        refuse(options, (*_OF_TEXTS, "strengths", "out"), "is not for --prompt")
        options.data = "general"  # not read, so the environment is not asked either
    else:
        refuse(options, ("max_new_tokens",), "is for --prompt")
    if options.strengths is None:
        refuse(options, ("controls", "seed"), "is for --strengths")
    else:
        refuse(options, ("strength",), "stands beside --strengths")


def run(options: argparse.Namespace) -> Answer:
    plan = load_plan(options.plan)
    if options.strength is not None:
        plan = plan * options.strength
    work = [] if options.prompt is not None else texts(options)
    if work:
        plan.check_groups(text.group for text in work)
    with attached_model(options) as (language_model, routed):
        with routed.steer(plan):
            pass  # refuse a plan that does not fit before the long run without it
        if options.prompt is not None:
            return _prompt(options, language_model, routed, plan)
        if options.strengths is not None:
            return _strengths(options, language_model, routed, plan, work)
        return _losses(options, language_model, routed, plan, work)


def _prompt(options: argparse.Namespace, language_model: Any, routed: Any, plan: Any) -> Answer:
    natural = language_model.generate(options.prompt, options.max_new_tokens)
    with routed.steer(plan):
        steered = language_model.generate(options.prompt, options.max_new_tokens)
    data = {"prompt": options.prompt, "plan": plan.hash, "natural": natural, "steered": steered}
    return Answer(data, f"without the plan: {natural}\nwith the plan:    {steered}")


def _strengths(options: argparse.Namespace, language_model: Any, routed: Any, plan: Any, work: list[Any]) -> Answer:
    return Answer.of(
        mr.experiments.strength_sweep(
            language_model,
            work,
            plan,
            options.strengths,
            routed=routed,
            controls=options.controls,
            seed=options.seed,
            **shown_options(options, "sweep"),
        )
    )


def _losses(options: argparse.Namespace, language_model: Any, routed: Any, plan: Any, work: list[Any]) -> Answer:
    import numpy as np

    base = language_model.losses(work, **shown_options(options, "without the plan"))
    with routed.steer(plan):
        steered = language_model.losses(work, **shown_options(options, "with the plan"))
    groups = np.array([text.group for text in work])
    rows: list[dict[str, Any]] = []
    for group in dict.fromkeys(groups):
        mine = groups == group
        tokens = base[mine, 1]
        change = mr.analysis.paired_difference(steered[mine, 0], base[mine, 0], tokens)
        loss = float(base[mine, 0].sum() / tokens.sum())
        rows.append(
            {
                "language": str(group),
                "texts": int(mine.sum()),
                "loss": loss,
                "steered": loss + change.value,
                "change": change.value,
                "low": change.low,
                "high": change.high,
                "verdict": change.verdict,
            }
        )
    head = ("language", "texts", "loss", "steered", "change", "95 % interval", "")
    shown_rows = [
        (
            r["language"],
            r["texts"],
            r["loss"],
            r["steered"],
            f"{r['change']:+.4f}",
            interval(r["low"], r["high"], digits=4),
            r["verdict"],
        )
        for r in rows
    ]
    text = f"Loss in nats per token, without and with the plan\n{table(head, shown_rows)}"
    data = {"plan": plan.hash, "unit": "nats per token", "languages": rows}
    return Answer(data, text, frame=lambda: data_frame({name: [row[name] for row in rows] for name in rows[0]}))
