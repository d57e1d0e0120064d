"""Tables of an evaluation in the form that `moe_route.report` draws: effects with their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_route.evaluation.conditions import AGAIN, BASE, NULL

__all__ = ["effect_tables"]


def effect_tables(content: Mapping[str, Any]) -> dict[str, Any]:
    """One table per task and scorer from the content of `report.json`: the change of accuracy under each condition."""
    tasks: Mapping[str, Any] = content["results"]["tasks"]
    tuned = content["results"]["settings"]["tuned_on_even_items"]
    return {"tables": [table for name, task in tasks.items() for table in _of_task(name, task, tuned)]}


def _of_task(name: str, task: Mapping[str, Any], tuned: bool) -> Iterator[dict[str, Any]]:
    items = "all items (tuned on test)" if tuned else "all items"
    if task["main_items"] == "odd":
        items = "odd items, which chose no setting"
    for scorer in task["scorers"]:
        entries = task["comparisons"][task["main_items"]][scorer]
        rows = [
            [condition, entry["accuracy"], *(entry["change"][key] for key in ("value", "low", "high"))]
            for condition, entry in entries.items()
            if condition not in (BASE, AGAIN, NULL)
        ]
        yield {
            "title": f"Task {name}: change of accuracy ({scorer})",
            "note": (
                f"Against the base run, which has {entries[BASE]['accuracy']:.3f}; mean over "
                f"{len(task['languages'])} languages, {items}. Intervals are bootstraps over items, with all languages "
                "of an item together."
            ),
            "columns": ["condition", "accuracy", "change", "low", "high"],
            "rows": rows,
            "effect": {"label": "condition", "value": "change", "low": "low", "high": "high", "better": "higher"},
        }
