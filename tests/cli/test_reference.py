"""docs/cli.md is what the parser writes."""

from __future__ import annotations

from pathlib import Path

from moe_route.cli.reference import page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_that_of_the_parser() -> None:
    """If it is not: `python -m moe_route.cli.reference > docs/cli.md`."""
    assert (DOCS / "cli.md").read_text("utf-8") == page()
