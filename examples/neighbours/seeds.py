"""Figures over several seeds: intervals, and where results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_route.base.files import replacing


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval over seeds (NaN for a single one)."""
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5) if count > 1 else float("nan")
    return mean, mean - half, mean + half


def span(low: float, high: float, form: str) -> str:
    return "" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]"


def told(values: Sequence[float], form: str) -> str:
    """Mean and interval in one cell of a table."""
    mean, low, high = interval(values)
    return f"{mean:{form}}{span(low, high, form)}"


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--page", type=Path, help="write the table between the marks of a page")


def write(options: argparse.Namespace, results: dict[str, Any], text: str, begin: str, end: str) -> None:
    """Print the table, and write what `add_outputs` asks for."""
    print(text)
    if options.out:
        with replacing(options.out) as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())
    if options.page:
        before, rest = options.page.read_text("utf-8").split(begin)
        with replacing(options.page) as file:
            file.write(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}".encode())
