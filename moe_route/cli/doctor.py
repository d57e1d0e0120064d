"""`moe-route doctor`: show the installation and the kernels in use, and check their results."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command


def add(verbs: Any) -> None:
    command(verbs, "doctor", run, "say which kernels are at work and why, and check them", "moe-route doctor --json")


def run(options: argparse.Namespace) -> Answer:
    from moe_route.description import doctor

    found = doctor()
    return Answer(found.to_dict(), str(found), code=0 if found.ok else 1)
