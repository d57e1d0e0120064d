"""`moe-route steer`: show the effect of a plan on a model, as the loss of texts by language or as generated text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    command,
    model_arguments,
    positive,
    shown_options,
    text_arguments,
    texts,
)


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "steer",
        run,
        "compare a model with and without a plan",
        "moe-route steer --plan plan.safetensors --languages eng_Latn,deu_Latn --limit 30",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        required=True,
        metavar="FILE",
        help="plan file, as `analyze experts --plan` writes",
    )
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="multiply the plan by X (default: 1)")
    parser.add_argument("--prompt", metavar="TEXT", help="generate from this text instead of measuring losses")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=32, metavar="N", help="tokens to generate (default: 32)"
    )
    model_arguments(parser)
    text_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.steering import Plan

    plan = Plan.load(options.plan)
    if options.strength != 1:
        plan = plan * options.strength
    work = [] if options.prompt is not None else texts(options)
    with attached_model(options) as (language_model, routed):
        with routed.steer(plan):
            pass  # refuse a plan that does not fit before the long run without it
        if options.prompt is not None:
            return _prompt(options, language_model, routed, plan)
        return _losses(options, language_model, routed, plan, work)


def _prompt(options: argparse.Namespace, language_model: Any, routed: Any, plan: Any) -> Answer:
    natural = language_model.generate(options.prompt, options.max_new_tokens)
    with routed.steer(plan):
        steered = language_model.generate(options.prompt, options.max_new_tokens)
    data = {"prompt": options.prompt, "plan": plan.hash, "natural": natural, "steered": steered}
    return Answer(data, f"without the plan: {natural}\nwith the plan:    {steered}")


def _losses(options: argparse.Namespace, language_model: Any, routed: Any, plan: Any, work: list[Any]) -> Answer:
    import numpy as np

    from moe_route.analysis import paired_difference
    from moe_route.base.table import interval, table

    base = language_model.losses(work, **shown_options(options, "without the plan"))
    with routed.steer(plan):
        steered = language_model.losses(work, **shown_options(options, "with the plan"))
    groups = np.array([text.group for text in work])
    rows: list[dict[str, Any]] = []
    for group in dict.fromkeys(groups):
        mine = groups == group
        tokens = base[mine, 1]
        change = paired_difference(steered[mine, 0], base[mine, 0], tokens)
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
    return Answer({"plan": plan.hash, "unit": "nats per token", "languages": rows}, text)
