"""`moe-route experiment transplant`."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    command,
    layers,
    load_language_model,
    model_arguments,
    seed_argument,
    shown_options,
    text_arguments,
    texts,
)

KINDS = ("own", "pooled", "choice", "other", "scores")


def add(experiments: Any) -> None:
    parser = command(
        experiments,
        "transplant",
        run,
        "loss of every language with the routes of another one, or of another checkpoint",
        "moe-route experiment transplant --languages eng_Latn,deu_Latn --limit 20 --band middle=2-5",
    )
    parser.add_argument(
        "--reference", default="eng_Latn", metavar="GROUP", help="language that routes come from (default: eng_Latn)"
    )
    parser.add_argument(
        "--kinds",
        default=",".join(KINDS[:4]),
        metavar="A,B",
        help=f"routes, from {', '.join(KINDS)} (default: all but scores)",
    )
    parser.add_argument("--donor", metavar="NAME", help="checkpoint whose routes are used too")
    parser.add_argument(
        "--band", type=_band, action="append", metavar="NAME=A-B", help="also use the routes in these layers only"
    )
    seed_argument(parser)
    model_arguments(parser)
    text_arguments(parser)


def _band(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, numbers = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} has no name: write it as middle=2-5")
    return name, layers(numbers)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.experiments import record_trace, transplant

    work = texts(options)
    given = shown_options(options)
    routes = {}
    if options.donor is not None:
        donor = load_language_model(argparse.Namespace(**{**vars(options), "model": options.donor}))
        routes = {"donor": record_trace(donor, work, **given)}
        del donor
    with attached_model(options) as (language_model, routed):
        found = transplant(
            language_model,
            work,
            reference=options.reference,
            kinds=[kind.strip() for kind in options.kinds.split(",") if kind.strip()],
            routes=routes,
            bands=dict(options.band or ()),
            routed=routed,
            seed=options.seed,
            **given,
        )
    return Answer(found.to_dict(), repr(found))
