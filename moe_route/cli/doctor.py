"""`moe-route doctor`: what is installed, which code is at work and why, and whether it computes what it should."""

from __future__ import annotations

import argparse
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command


def add(verbs: Any) -> None:
    command(verbs, "doctor", run, "say which kernels are at work and why, and check them", "moe-route doctor --json")


def run(options: argparse.Namespace) -> Answer:
    from moe_route import doctor

    found = doctor.report()
    return Answer(found, doctor.text(found), code=0 if all(check["ok"] for check in found["checks"]) else 1)
