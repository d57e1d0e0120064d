"""The page of a report: one HTML file with its style, its script, and its data as compact JSON.

Arrays are unsigned integers in base64, which the page unpacks in a line.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files as resources
from string import Template
from typing import Any

import numpy as np

_MISSING = 65535  # the code of NaN
_SCRIPTS = ("page.js", "chart.js", "by_layer.js", "figures.js", "experts.js", "tokens.js", "start.js")


def packed_numbers(values: np.ndarray) -> dict[str, Any]:
    """Numbers from 0 as uint16 with one scale: {"scale", "u16"}; the error is at most half of scale.

    NaN is code 65535. Raises ``ValueError`` for negative numbers.
    """
    if np.nanmin(values, initial=0.0) < 0:
        raise ValueError("only numbers from 0 are packed")
    largest = float(np.nanmax(values, initial=0.0))
    scale = largest / (_MISSING - 1) if largest else 1.0
    codes = np.where(np.isnan(values), _MISSING, np.rint(np.nan_to_num(values) / scale))
    return {"scale": scale, "u16": _base64(codes, "<u2")}


def packed_integers(values: np.ndarray) -> dict[str, Any]:
    """Integers from -1 as {"u8"} or {"u16"}; -1 is the largest code, 255 or 65535."""
    if int(values.max(initial=0)) < 255:
        return {"u8": _base64(np.where(values < 0, 255, values), "u1")}
    return {"u16": _base64(np.where(values < 0, _MISSING, values), "<u2")}


def packed_bytes(values: np.ndarray) -> dict[str, Any]:
    """Numbers from 0 as uint8 with one scale: {"scale", "u8"}; the error is at most half of scale."""
    largest = float(values.max(initial=0.0))
    scale = largest / 255 if largest else 1.0
    return {"scale": scale, "u8": _base64(np.rint(values.astype(np.float64) / scale), "u1")}


def rounded(values: np.ndarray | None, digits: int = 5) -> Any:
    """Lists of numbers with so many significant digits, None for NaN; None stays None."""
    if values is None:
        return None
    if values.ndim > 1:
        return [rounded(row, digits) for row in values]
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def _base64(codes: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(codes, dtype=dtype).tobytes()).decode()


def page_of(content: Mapping[str, Any]) -> str:
    """The HTML of a report. It needs no other file and no network."""
    return Template(_asset("page.html")).substitute(
        title=escape(str(content["title"])),
        style=_asset("report.css"),
        data=safe_json(content),
        script="\n".join(_asset(name) for name in _SCRIPTS),
    )


def safe_json(content: Any) -> str:
    """Compact JSON that can stand inside a ``<script>`` element: it holds no ``<``, ``>`` or ``&``.

    The page shows texts of data by ``textContent``, never as HTML; marks that turn their direction are shown as such.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = re.sub("[\u202a-\u202e\u2066-\u2069]", lambda mark: f"\\\\u{ord(mark[0]):04x}", text)
    escaped = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    for character, code in escaped.items():  # these can occur in strings only
        text = text.replace(character, code)
    return "".join(c if not 0xD800 <= ord(c) <= 0xDFFF else f"\\u{ord(c):04x}" for c in text)


def _asset(name: str) -> str:
    return (resources("moe_route.report") / "assets" / name).read_text(encoding="utf-8")
