"""The committed results as Markdown: docs/site.py puts them at the end of the page on benchmarks.

`python -m bench.pages FILE.json` prints one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.markdown import table
from moe_route.base.table import duration

Row = Mapping[str, Any]


def page(path: Path) -> str:
    """The page of one results file; each kind of file has its own form."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if "cases" in content:
        from bench.sass.report import Figures, markdown

        return markdown(content["build"], {name: Figures(**each) for name, each in content["cases"].items()})
    if "kernels" in content:
        from bench import resources

        return resources.markdown(content["build"], resources.held(content))
    return measured(path.stem, content)


def measured(name: str, content: Mapping[str, Any]) -> str:
    """A run of benchmarks: machine, targets, and by section every median with its spread, ratio and floor."""
    parts = [
        f"# {name}\n",
        "Times are medians with their quartiles; contenders of moe-route are bold.\n"
        "A ratio is the median over rounds of the ratio inside a round, with its quartiles where the file has them.\n"
        "A share of 1 is the floor ([how it is measured](../README.md#how-the-cpu-is-measured)).\n",
        table(("", ""), content["machine"].items()),
    ]
    if content["targets"]:
        cells = ((t["what"], t["wanted"], t["measured"], "yes" if t["met"] else "**no**") for t in content["targets"])
        parts += ["## Targets\n", table(("figure", "wanted", "measured", "met"), cells)]
    sections = dict.fromkeys(each["section"] for kind in ("rows", "facts") for each in content[kind])
    head = ("case", "contender", "median", "quartiles", "times as fast", "as", "share of the floor", "floor")
    for section in sections:
        parts.append(f"## {section}\n")
        if rows := [row for row in content["rows"] if row["section"] == section]:
            parts.append(table(head, map(cells_of, rows)))
        if facts := [fact for fact in content["facts"] if fact["section"] == section]:
            values = ((fact["case"], fact["what"], f"{fact['value']:.3g} {fact['unit']}") for fact in facts)
            parts.append(table(("case", "what", "value"), values))
    return "\n".join(parts)


def cells_of(row: Row) -> tuple[str, ...]:
    return (
        row["case"],
        f"**{row['name']}**" if row.get("ours") else row["name"],
        duration(row["median"]),
        f"{duration(row['low'])} - {duration(row['high'])}",
        _ratio(row, "times_peer"),
        row.get("peer", ""),
        _ratio(row, "floor_fraction"),
        row.get("floor", ""),
    )


def _ratio(row: Row, name: str) -> str:
    if name not in row:
        return ""
    if f"{name}_low" not in row:
        return f"{row[name]:.2f}"
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} - {row[f'{name}_high']:.2f})"


def index(paths: Sequence[Path]) -> str:
    """The section that leads to those of the results files."""
    lines = []
    for path in paths:
        content = json.loads(path.read_text(encoding="utf-8"))
        about = content.get("machine") or content["build"]
        met = [each["met"] for each in content.get("targets", ())]
        lines.append(
            (
                f"[{path.stem}](#{path.stem})",
                about.get("device") or about.get("processor") or f"nvcc {about['nvcc']}",
                about.get("threads used", ""),
                about["commit"],
                f"{sum(met)} of {len(met)}" if met else "",
            )
        )
    return "\n".join(
        [
            "\n## Results\n",
            "Every results file of the repository, as it was measured or counted.\n"
            "[PENDING](PENDING.md) lists what waits for a device.\n",
            table(("file", "made on", "threads", "commit", "targets met"), lines),
        ]
    )


def files() -> list[Path]:
    """The committed results."""
    return sorted(RESULTS.glob("*.json"))


if __name__ == "__main__":
    print(page(Path(sys.argv[1])))
