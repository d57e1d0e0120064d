"""Colors, dashes and markers: a language looks the same in every figure, whatever else is drawn there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from moe_route.languages import codes, flores_code
from moe_route.plots.frame import line_width

__all__ = ["COLORS", "DASHES", "chosen_styles", "level_colors", "level_order", "numbered", "ordered_colors", "styles"]

# Okabe and Ito's set for every color vision (2008), without its yellow, which is too light for lines on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_BLUE, _RED, _GREEN, _PINK, _SKY, _ORANGE, _BLACK = range(7)
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.6)),
    (0, (1.2, 1.2)),
    (0, (6, 1.4, 1.2, 1.4)),
    (0, (9, 1.6)),
    (0, (6, 1.2, 1.2, 1.2, 1.2, 1.2)),
)
_MARKERS = ("", "o", "s", "^", "D", "v")
# Scripts that share dashes -> the order of their colors, and the languages that come first, by frequency in corpora.
# The others follow in the order of the table of languages. The seven colors repeat with the next marker.
_FAMILIES: tuple[tuple[str, tuple[int, ...], str], ...] = (
    (
        "Latn",
        (_BLACK, _RED, _GREEN, _BLUE, _PINK, _ORANGE, _SKY),
        "eng swh deu fra ind spa por ita nld pol tur vie fin yor ces swe hun ron dan nob cat afr zsm tgl hau ibo "
        "zul xho sna som wol bam est lit lvs hrv slk slv",
    ),
    ("Cyrl Grek Armn Geor", (_GREEN, _RED, _BLUE, _PINK, _ORANGE, _SKY, _BLACK), "rus ukr ell kat bul srp hye kaz"),
    ("Arab Hebr Ethi Tfng", (_ORANGE, _BLUE, _RED, _GREEN, _PINK, _SKY, _BLACK), "arb heb amh pes urd tir"),
    ("Hans Hant Jpan Hang", (_BLUE, _PINK, _RED, _GREEN, _SKY, _ORANGE, _BLACK), "zho_Hans jpn kor zho_Hant yue"),
    (
        "Deva Beng Gujr Guru Knda Mlym Orya Sinh Taml Telu Olck",
        (_SKY, _RED, _GREEN, _BLUE, _PINK, _ORANGE, _BLACK),
        "hin ben tam tel npi mar pan guj kan mal",
    ),
    ("Thai Khmr Laoo Mymr Tibt", (_PINK, _BLUE, _GREEN, _ORANGE, _RED, _SKY, _BLACK), "tha khm lao mya bod"),
)
_LEVELS = ("high", "medium", "mid", "middle", "low")  # resource levels by their usual names, in order


def styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Assign a line style to each name, as keyword arguments of ``Axes.plot``.

    A language by any of its codes ("swh_Latn", "swh", "sw") has one color, one marker and the dashes of its script, the
    same in every figure, whatever other names there are. Other names take the remaining styles in alphabetical order,
    so these depend on the set of names: pass ``styles=styles(names)`` to draw results with other groups in the same
    styles. The first seven languages of a script, and the first 42 other names, have no marker.
    """
    wanted = sorted(set(names))
    found: dict[str, tuple[int, int, int]] = {}
    seen: set[str] = set()
    for name in wanted:
        code = flores_code(name)
        if code is not None and code not in seen:  # a second code of one language counts as another name
            seen.add(code)
            found[name] = _places()[code]
    others = [name for name in wanted if name not in found]
    every = [(color, dash, marker) for marker, dash, color in product(*map(range, (len(_MARKERS), len(DASHES), 7)))]
    free = [place for place in every if place not in found.values()]
    found |= {name: free[i % len(free)] for i, name in enumerate(others)}
    return {name: _style(*found[name]) for name in wanted}


def chosen_styles(
    groups: Sequence[str], given: Mapping[str, Any] | None, levels: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """The style of each group of a result; colors of ``levels`` and then ``given`` styles take precedence."""
    chosen = styles(groups)
    if levels is not None:
        shades = level_colors(levels)
        for group in groups:
            if group in levels:
                chosen[group]["color"] = shades[levels[group]]
    for group, style in (given or {}).items():
        if group in chosen:
            chosen[group] |= {"color": style} if isinstance(style, str) else dict(style)
    return chosen


def numbered(number: int) -> dict[str, Any]:
    """The style with this number: first all colors, then the same colors with other dashes."""
    return _style(number % len(COLORS), (number // len(COLORS)) % len(DASHES), 0)


def ordered_colors(number: int) -> list[str]:
    """Colors of an ordered quantity, from dark to light, in order of lightness for any color vision."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.8 * i / max(number - 1, 1))) for i in range(number)]


def level_order(levels: Mapping[str, str]) -> list[str]:
    """The levels in order: high, medium, low by these names, others in the order in which they first occur."""
    names = list(dict.fromkeys(levels.values()))
    return sorted(names, key=lambda name: _LEVELS.index(name.lower()) if name.lower() in _LEVELS else len(_LEVELS))


def level_colors(levels: Mapping[str, str]) -> dict[str, str]:
    """A color for each level, the darkest for the highest."""
    names = level_order(levels)
    return dict(zip(names, ordered_colors(len(names)), strict=True))


def _style(color: int, dash: int, marker: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "color": COLORS[color],
        "linestyle": DASHES[dash],
        "linewidth": line_width(),
        "solid_capstyle": "round",
    }
    if marker:
        found |= {"marker": _MARKERS[marker], "markersize": 2.6 * line_width(), "markevery": 0.15}
    return found


@cache
def _places() -> dict[str, tuple[int, int, int]]:
    """Code of a language as in FLORES -> color, dashes and marker."""
    found: dict[str, tuple[int, int, int]] = {}
    for dash, (scripts, colors, first) in enumerate(_FAMILIES):
        of_family = [code for code in codes() if code.split("_")[1] in scripts.split()]
        common = {code: place for place, code in enumerate(first.split())}
        of_family.sort(key=lambda code: common.get(code, common.get(code.split("_")[0], len(common))))
        for place, code in enumerate(of_family):
            found[code] = (colors[place % 7], dash, place // 7 % len(_MARKERS))
    return found
