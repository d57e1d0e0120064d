"""The page of a report: one HTML file with its style, its script and its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files as resources
from string import Template
from typing import Any

__all__ = ["page_of", "safe_json"]

_SCRIPTS = ("page.js", "chart.js", "by_layer.js", "experts.js", "tokens.js", "start.js")


def page_of(content: Mapping[str, Any]) -> str:
    """The HTML of a report. It needs no other file and no network."""
    return Template(_asset("page.html")).substitute(
        title=escape(str(content["title"])),
        style=_asset("report.css"),
        data=safe_json(content),
        script="\n".join(_asset(name) for name in _SCRIPTS),
    )


def safe_json(content: Any) -> str:
    """Compact JSON that can stand inside a ``<script>`` element: it holds no ``<``, ``>`` or ``&``."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    for character, code in escaped.items():  # these can occur in strings only
        text = text.replace(character, code)
    return "".join(c if not 0xD800 <= ord(c) <= 0xDFFF else f"\\u{ord(c):04x}" for c in text)


def _asset(name: str) -> str:
    return (resources("moe_route.report") / "assets" / name).read_text(encoding="utf-8")
