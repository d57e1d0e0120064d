"""One self-contained HTML file with what was recorded and found, to open in any browser, without a network.

    import moe_route as mr

    mr.report.write("report.html", ["general.safetensors", "trace.safetensors"], tokenizer=tokenizer)

``read`` reads files into ``Inputs``, ``record_inputs`` records them from a model, and ``write`` writes the page.
docs/plots.md shows how to read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_route.base import files
from moe_route.report.content import Figure, Inputs, content_of, read
from moe_route.report.from_model import record_inputs
from moe_route.report.page import page_of
from moe_route.report.result_tables import ResultTable

__all__ = ["Figure", "Inputs", "ResultTable", "content_of", "page_of", "read", "record_inputs", "write"]


def write(
    path: str | os.PathLike[str],
    sources: Inputs | Iterable[str | os.PathLike[str]],
    *,
    reference: str | None = None,
    tokenizer: Any = None,
    title: str | None = None,
    lead: str | None = None,
) -> Path:
    """Write a report to ``path``, whole or not at all, and return the path.

    Args:
        sources: ``Inputs``, or files: statistics, traces, selections, plans, scores per group, tables of results.
        reference, tokenizer, title, lead: as in ``content_of``.

    Raises the errors of ``read`` and ``content_of``, and ``OSError`` if the file cannot be written.
    """
    inputs = sources if isinstance(sources, Inputs) else read(sources)
    content = content_of(inputs, reference=reference, tokenizer=tokenizer, title=title, lead=lead)
    files.write_text(path, page_of(content))
    return Path(path)
