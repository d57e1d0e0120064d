"""Arguments that several questions share."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_route.cli.inputs import names

__all__ = [
    "by_argument",
    "compared_arguments",
    "groups_argument",
    "phase_argument",
    "reference_argument",
    "statistics_argument",
]


def statistics_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="statistics; several are added up")


def reference_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference", default="eng_Latn", metavar="GROUP", help="group to compare with (default: eng_Latn)"
    )


def compared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", type=Path, nargs="+", required=True, metavar="FILE", help="statistics of task texts")
    parser.add_argument(
        "--baseline", type=Path, nargs="+", required=True, metavar="FILE", help="statistics of general texts"
    )
    parser.add_argument("--group", metavar="GROUP", help="group of the task, such as eng_Latn (default: the only one)")


def by_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by", default="sequence", choices=("sequence", "token"), help="mean over these (default: sequence)"
    )


def phase_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--phase", choices=("prefill", "decode"), help="tokens of this phase only")


def groups_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--groups", type=names, metavar="A,B", help="groups to look at (default: all)")
