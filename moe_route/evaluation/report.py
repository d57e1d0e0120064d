"""The report of a study: Markdown, and tables in the form that `moe_route.report` draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from moe_route.base.table import interval
from moe_route.evaluation.conditions import AGAIN, BASE, NULL
from moe_route.steering.layers import show_numbers

_OFTEN_CUT = 0.02  # share of answers that hit the limit of new tokens, from which a report warns


def markdown(content: Mapping[str, Any]) -> str:
    """The report of `report.json`, one sentence per line."""
    results = content["results"]
    parts = [f"# {content['title']}", _model(content["model"])]
    parts += [_settings(results), _experts(results)] if results["settings"]["chosen"] else []
    parts += [_sweep(results)] if results["sweep"] else []
    for name, task in results["tasks"].items():
        parts += _task(name, task, results["settings"]["tuned_on_even_items"])
    parts += [_left_out(results["left_out"])] if results["left_out"] else []
    parts += _routing(results["routing"]) if results["routing"] else []
    return "\n\n".join(parts) + "\n"


def _model(model: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in model["versions"].items())
    revision = f" at {model['revision']}" if model["revision"] else ""
    return (
        f"Model: {model['id']}{revision} ({model['class']}, {model['dtype']} on {model['device']}, engine "
        f"{model['engine']}), configuration {model['config_hash'][:12]}, weights {model['weights'][:12]}.\n"
        f"Versions: {versions}."
    )


def _settings(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    text = f"Setting of the study: {settings['published']['shown']}."
    if settings["tuned_on_even_items"]:
        text += (
            f"\nSetting chosen on the even items, and steered with below: {settings['chosen']['shown']}."
            "\nOnly the odd items are free of that choice."
        )
    return text


def _experts(results: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{entry['tau']:g}",
            entry["task"],
            entry["task_in_layers"],
            entry["multilingual"],
            entry["multilingual_in_layers"],
            entry["shared"],
        )
        for entry in results["experts"]
    ]
    head = ("tau", "task experts", "in steered layers", "multilingual experts", "in steered layers", "in both sets")
    return f"## Experts\n\n{_table(head, rows)}"


def _sweep(results: Mapping[str, Any]) -> str:
    rows = [
        (point["name"], "" if point["experts"] is None else point["experts"], _percent(point["accuracy"]))
        for point in results["sweep"]
    ]
    return (
        "## Sweep\n\nAccuracy on the even items, which decides the setting.\n\n"
        f"{_table(('setting', 'experts', 'accuracy'), rows)}"
    )


def _task(name: str, task: Mapping[str, Any], tuned: bool) -> list[str]:
    words = {
        "answer": "exact match of the greedy continuation",
        "choice": "the most probable choice",
        "generate": "the number extracted from generated text",
    }
    parts = [
        f"## Task {name}\n\n{task['items']} items in {len(task['languages'])} languages; scored: {words[task['kind']]}."
        + (
            f"\n{task['left_out_items']} items are not there in every language and left out."
            if task["left_out_items"]
            else ""
        )
    ]
    for scorer in reversed(task["scorers"]):
        main = task["comparisons"][task["main_items"]][scorer]
        whole = task["comparisons"]["all"][scorer]
        label = "all items (tuned on test)" if tuned else "all items"
        note = "odd items" if task["main_items"] == "odd" else label
        parts.append(f"### Accuracy in percent, {scorer}, {note}\n\n{_changes(main, whole, label)}")
        parts.append(_languages(main, task["languages"]))
    parts += _limited(name, task)
    parts.append(_noise(task))
    return parts


def _limited(name: str, task: Mapping[str, Any]) -> list[str]:
    """Share of generated answers that hit the limit of new tokens, by condition and language, and a warning."""
    whole = task["comparisons"]["all"][task["main_scorer"]]
    if task["kind"] != "generate":
        return []
    cut = {row: [whole[one]["hit_the_limit"] for one in of] for row, of in _together(whole).items()}
    shares = {row: {one: _average(of[one] for of in shown) for one in task["languages"]} for row, shown in cut.items()}
    rows = [(row, *map(_percent, [_average(of.values()), *of.values()])) for row, of in shares.items()]
    text = f"### Answers that hit the limit of {task['max_new_tokens']} new tokens, in percent, all items\n\n"
    text += _table(("condition", "hit the limit", *task["languages"]), rows)
    often = {one: max(of[one] for of in shares.values()) for one in task["languages"]}
    listed = ", ".join(f"{one} {_percent(share)} %" for one, share in often.items() if share > _OFTEN_CUT)
    if listed:
        text += (
            f"\n\nWarning: answers are cut before they end ({listed}), and such an answer counts by its last number."
            f"\nAccuracy there is partly that of short answers: raise `tasks.{name}.max_new_tokens`."
        )
    return [text]


def _changes(main: Mapping[str, Any], whole: Mapping[str, Any], label: str) -> str:
    """Each condition with its change against the base run, and against random experts; random draws together."""
    rows = []
    for name, names in _together(main).items():
        entry = main[names[0]]
        change, control = entry.get("change"), entry.get("against_random")
        changes = [main[one]["change"]["value"] for one in names] if change is not None else []
        ends = f"draws from {_points(min(changes))} to {_points(max(changes))}" if len(names) > 1 else ""
        nats = [main[one]["nats"] for one in names if main[one]["nats"] is not None]
        rows.append(
            (
                name,
                _percent(_average(main[one]["accuracy"] for one in names)),
                "" if change is None else _points(_average(changes)),
                ends or ("" if change is None else _interval(change)),
                "" if control is None else f"{_points(control['difference'])} {_interval(control)}",
                f"{_average(nats):.3f}" if nats else "",
                _percent(_average(whole[one]["accuracy"] for one in names)),
            )
        )
    head = ["condition", "accuracy", "change", "95 % interval", "minus random experts", "nats per answer", label]
    shown = [place for place in range(len(head)) if any(row[place] for row in rows)]
    drawn = any(name.startswith("random ") for name in main)
    return (
        f"{_table([head[i] for i in shown], [[row[i] for i in shown] for row in rows])}\n\nChange: percentage points "
        f"against `{BASE}`, mean over languages; intervals from a bootstrap over items, with all languages of an item "
        "together."
        + (
            "\nRandom experts are as many as `steered` has in each of its layers, steered as these are."
            if drawn
            else ""
        )
        + ("\nEvery draw of random experts is in `report.json`." if drawn else "")
    )


def _together(main: Mapping[str, Any]) -> dict[str, list[str]]:
    """Name of each row -> its conditions: the draws of random experts share one."""
    rows: dict[str, list[str]] = {}
    for name in main:
        kind = next((kind for kind in ("random per token", "random") if name.startswith(f"{kind} ")), None)
        rows.setdefault(name if kind is None else kind, []).append(name)
    return {name if len(of) == 1 else f"{name} (mean of {len(of)})": of for name, of in rows.items()}


def _languages(main: Mapping[str, Any], languages: Sequence[str]) -> str:
    rows = [
        (name, *(_cell([main[one]["by_language"][language] for one in names]) for language in languages))
        for name, names in _together(main).items()
        if name not in (AGAIN, NULL)
    ]
    return (
        f"{_table(('condition', *languages), rows)}\n\n"
        "Bold: McNemar's exact test against the base run gives p < .05 after Holm's correction over the languages."
    )


def _cell(entries: Sequence[Mapping[str, Any]]) -> str:
    shown = _percent(_average(entry["accuracy"] for entry in entries))
    return f"**{shown}**" if len(entries) == 1 and entries[0].get("p_holm", 1.0) < 0.05 else shown


def _noise(task: Mapping[str, Any]) -> str:
    noise, power = task["noise"], task["power"]
    text = (
        f"### Noise{' and power' if power else ''}\n\nThe base run was repeated: {noise['lines_changed']} of "
        f"{noise['lines']} lines differ ({noise['lost']} answers lost, {noise['gained']} gained)."
    )
    if not power:
        return text
    changed = (
        f"Of {power['questions']} questions, {power['discordant'] * 100:.1f} % are answered by the base run or the "
        "steered one alone.\n"
        f"With that, a change of {power['detectable'] * 100:.1f} points of the mean is found in four of five "
        "evaluations if translations are independent, and one of "
        f"{power['detectable_one_language'] * 100:.1f} points if they are all alike (or in one language alone)."
        if power["discordant"]
        else f"Steering changed none of {power['questions']} answers from right to wrong or back."
    )
    return f"{text}\nThe null plan changed {noise['lines_changed_by_null_plan']} lines.\n{changed}"


def _left_out(left_out: Mapping[str, str]) -> str:
    return "## Conditions that cannot be run here\n\n" + _table(("condition", "because"), left_out.items())


def _routing(routing: Mapping[str, Any]) -> list[str]:
    measured = routing["divergence"]
    layers = len(measured["layers"])
    parts = _depths(layers)
    rows = [
        (name, *(_mean(values[part.start : part.stop]) for part in parts))
        for name, values in zip(measured["groups"], measured["values"], strict=True)
    ]
    rows += [
        (
            "floor (mean)",
            *(_mean([v for row in measured["expected_floor"] for v in row[p.start : p.stop]]) for p in parts),
        )
    ]
    head = ("language", *(f"layers {show_numbers(part)}" if len(part) > 1 else f"layer {part.start}" for part in parts))
    texts = [
        f"## Divergence from {measured['reference']}\n\n{_table(head, rows)}\n\n"
        "Floor: divergence of unrelated sentences of one language."
    ]
    for name, correlated in routing["correlation"].items():
        if "left_out" in correlated:
            texts.append(f"Correlation with {name}: not computed ({correlated['left_out']}).")
            continue
        rows = [
            (layer, *(_number(correlated[key][layer]) for key in ("pearson", "p_value", "p_corrected", "spearman")))
            for layer in range(layers)
        ]
        head = ("layer", "Pearson r", "p", "p over all layers", "Spearman rho")
        texts.append(
            f"### Correlation of divergence with accuracy in {name}, {len(correlated['groups'])} languages\n\n"
            f"{_table(head, rows)}\n\nLanguages with more training text are both nearer to English and better "
            "answered, so a correlation says nothing about cause."
        )
    return texts


def _depths(layers: int, columns: int = 8) -> list[range]:
    """Runs of layers, one per column."""
    ends = [round(i * layers / min(columns, layers)) for i in range(min(columns, layers) + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def _mean(values: Iterable[float | None]) -> str:
    seen = [value for value in values if value is not None]
    return _number(_average(seen) if seen else None)


def _average(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{share * 100:.1f}"


def _points(change: float) -> str:
    return f"{round(change * 100, 1) + 0.0:+.1f}"  # no negative zero


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["low"] is None or entry["high"] is None:
        return "-"
    low, high = (round(entry[end] * 100, 1) + 0.0 for end in ("low", "high"))
    return interval(low, high, digits=1)


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown that can be read in a terminal, too: columns are padded, and numbers stand to the right."""
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, *rows)]
    columns = [_padded(*column) for column in zip(*lines, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


def _padded(*column: str) -> list[str]:
    """The cells of a column in one width, with the rule below its head."""
    head, *cells = column
    width = max(3, *map(len, column))
    if all(cell[:1] in "+-[*0123456789" for cell in cells):  # "" is in every string: a cell may be empty
        return [head.rjust(width), "-" * (width - 1) + ":", *(cell.rjust(width) for cell in cells)]
    return [head.ljust(width), "-" * width, *(cell.ljust(width) for cell in cells)]


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
