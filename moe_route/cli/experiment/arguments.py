"""Arguments and options that several experiments share."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moe_route.cli.inputs import language_model

if TYPE_CHECKING:
    from moe_route.workload import LanguageModel

__all__ = ["attached_model", "options_of", "seed_argument"]


def seed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default: 0)")


@contextlib.contextmanager
def attached_model(options: argparse.Namespace) -> Iterator[tuple[LanguageModel, Any]]:
    """The model of the options, and the attached model, detached at the end."""
    spoken = language_model(options)
    with spoken.attach(options.engine) as routed:
        yield spoken, routed


def options_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options that every experiment on texts takes."""
    return {
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "seed": options.seed,
        "progress": sys.stderr.isatty(),
    }
