"""Results of an evaluation: comparisons by task, noise, power, experts, divergence, its correlation with accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_route.analysis import correlation, divergence
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.result import plain
from moe_route.evaluation.comparison import Answered, compare, mcnemar, power
from moe_route.evaluation.conditions import AGAIN, BASE, NULL, STEERED, Conditions, FoundExperts, Setting
from moe_route.evaluation.measure import AskedTask, scorers_of
from moe_route.evaluation.recipe import Recipe
from moe_route.recording import RoutingStatistics

__all__ = ["results_of"]

Lines = Mapping[str, Sequence[Mapping[str, Any]]]  # condition -> result lines


def results_of(
    recipe: Recipe,
    tasks: Sequence[AskedTask],
    lines: Lines,
    compared: Conditions,
    found: FoundExperts,
    published: Setting,
    chosen: Setting,
    points: Sequence[Mapping[str, Any]],
    general: RoutingStatistics,
) -> dict[str, Any]:
    """All results, JSON-able; docs/evaluation.md describes them."""
    swept = bool(points)
    decided = next(task for task in tasks if task.name == (recipe.sweep.task or tasks[0].name)).items[0::2]
    by_task = {
        task.name: _task_results(task, lines, recipe.seeds.bootstrap, decided if swept else ()) for task in tasks
    }
    return {
        "settings": {
            "published": {**published.to_dict(), "shown": str(published)},
            "chosen": {**chosen.to_dict(), "shown": str(chosen)},
            "tuned_on_even_items": swept,
        },
        "experts": _experts(found, chosen),
        "sweep": list(points),
        "conditions": {
            name: {"plan": None if plan is None else plan.hash, "rules": "" if plan is None else repr(plan)}
            for name, plan in compared.plans.items()
        },
        "left_out": dict(compared.left_out),
        "tasks": by_task,
        "routing": _routing(general, recipe.corpora.reference, by_task),
    }


def _experts(found: FoundExperts, chosen: Setting) -> list[dict[str, Any]]:
    """Numbers of experts by threshold."""
    entries = []
    for tau, task in found.task.items():
        other = found.multilingual[tau]
        entries.append(
            {
                "tau": tau,
                "task": len(task),
                "multilingual": len(other),
                "shared": len(task & other),
                "task_in_layers": len(task.restrict(chosen.range)),
                "multilingual_in_layers": len(other.restrict(chosen.range)),
                "task_by_layer": {str(layer): list(ids) for layer, ids in task.items()},
                "multilingual_by_layer": {str(layer): list(ids) for layer, ids in other.items()},
            }
        )
    return entries


def _task_results(task: AskedTask, lines: Lines, seed: int, decided: Sequence[str]) -> dict[str, Any]:
    """Results of one task; `decided` are the items that chose the setting, empty without a sweep."""
    scorers = scorers_of(task.kind)
    mine = {name: [one for one in records if one["task"] == task.name] for name, records in lines.items()}
    answered = {name: Answered.of(records, task.items, scorers) for name, records in mine.items()}
    seen = set(decided)  # another task may hold the same items, at other places
    odd = np.array([place % 2 == 1 and item not in seen for place, item in enumerate(task.items)], bool)
    per_token = [name for name in answered if name.startswith("random per token ")]
    random = [name for name in answered if name.startswith("random ") and name not in per_token]
    repeats = (AGAIN, NULL, *per_token)
    parts = {"all": np.ones(len(task.items), bool)} | ({"odd": odd} if odd.any() else {})
    main = "odd" if decided and "odd" in parts else "all"
    found: dict[str, Any] = {
        "kind": task.kind,
        "scorers": list(scorers),
        "main_scorer": scorers[-1],
        "main_items": main,
        "items": len(task.items),
        "left_out_items": len({question.item for question in task.questions}) - len(task.items),
        "languages": list(answered[BASE].languages),
        "comparisons": {},
    }
    for part, which in parts.items():
        rows = {name: one.rows(which) for name, one in answered.items()}
        base = rows.pop(BASE)
        found["comparisons"][part] = {name: compare(base, rows, random, repeats, name, seed) for name in scorers}
    right = {name: one.correct[scorers[-1]] for name, one in answered.items()}
    lost, gained, p_value = mcnemar(right[BASE], right[AGAIN])
    found["noise"] = {
        "lost": lost,
        "gained": gained,
        "p": p_value,
        "lines_changed": _changed(mine[BASE], mine[AGAIN]),
        "lines_changed_by_null_plan": _changed(mine[BASE], mine[NULL]),
        "lines": len(mine[BASE]),
    }
    found["power"] = power(right[BASE][parts[main]], right[STEERED][parts[main]])
    return found


def _changed(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _routing(general: RoutingStatistics, reference: str, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Divergence from the reference language, and its correlation with the accuracy of the model alone."""
    if len(general.groups) < 2:
        return None
    measured = divergence(general, reference)
    correlations: dict[str, Any] = {}
    for name, task in tasks.items():
        base = task["comparisons"]["all"][task["main_scorer"]][BASE]["by_language"]
        shared = [group for group in measured.groups if group in base]
        try:
            scores = {group: base[group]["accuracy"] for group in shared}
            correlations[name] = {**correlation(measured, scores, groups=shared).to_dict(), "scores": scores}
        except AnalysisError as error:
            correlations[name] = {"left_out": str(error)}
    entry = {**measured.to_dict(), "expected_floor": plain(measured.expected_floor)}
    return {"divergence": entry, "correlation": correlations}
