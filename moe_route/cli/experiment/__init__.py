"""`moe-route experiment`: run a model under interventions. Each module here holds one experiment."""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    from moe_route.cli.experiment import knockout, patch, pruning, regret, transplant

    verb = verbs.add_parser(
        "experiment",
        help="measure what experts and routes do, by changing them",
        description="Measure what experts and routes do, by changing them.",
        epilog="example:\n  moe-route experiment knockout --languages eng_Latn --limit 20 --layers 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    experiments = verb.add_subparsers(title="experiments", metavar="EXPERIMENT", required=True)
    for module in (knockout, patch, regret, transplant, pruning):
        module.add(experiments)
