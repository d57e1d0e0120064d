"""`moe-route plan`: make, read, compare and try plans. Each module here holds several verbs."""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any) -> None:
    from moe_route.cli.plan import make, read, share, trial

    verb = verbs.add_parser(
        "plan",
        help="make, read, compare and try steering plans",
        description="Make, read, compare and try steering plans.",
        epilog="example:\n  moe-route plan activate 5:3,17 --strength 0.5 --out plan.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parts = verb.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in (make, read, trial, share):
        module.add(parts)
