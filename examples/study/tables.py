"""The tables of the study, as Markdown, from the numbers of study.json. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import measure
from findings import APPEARS, CLAIMS, LEVEL, OPPOSITE, UNCLEAR, UNTESTED, Claim, number, plain, random_sets


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[int] = (0,)) -> str:
    """A Markdown table; all columns but those of `words` are aligned to the right."""
    lines = [head, ["---" if column in words else "---:" for column in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown(study: Mapping[str, Any]) -> str:
    """All tables of the study, as Markdown."""
    models = study["models"]
    parts = [
        f"Made by `{study['command']}`.",
        _material(study),
        "## The findings, one by one\n",
        _summary(models),
        _tally(models),
        "## Skill\n",
        _skill(models),
        "## 1. Divergence by layer\n",
        _depths(models),
        _layers(models),
        "## 2. Divergence and skill\n",
        _correlations(models),
        "## 3. Entropy and consistency\n",
        _entropies(models),
        _consistencies(models),
        "## 4. Task experts and multilingual experts\n",
        _thresholds(models),
        "## 5 and 6. Steering and its controls\n",
        _steering(models),
        "## Recorded routing of Qwen3-30B-A3B\n",
        _recorded(study["recorded"]),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _names(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles of the models' columns."""
    if len(models) == 1:
        return ["the model"]
    seeds = [model["training"]["seed"] for model in models]
    told = None not in seeds and len(set(seeds)) == len(seeds)
    return [f"seed {seed}" for seed in (seeds if told else range(len(models)))]


def _material(study: Mapping[str, Any]) -> str:
    first, number_of = study["models"][0]["routing"], len(study["models"])
    return (
        f"{number_of} model{'s' * (number_of > 1)} of {first['layers']} layers with {max(first['experts'])} experts, "
        f"{study['sentences']} sentences in {len(first['languages'])} languages, {study['questions']} problems per "
        f"language, {study['random_sets']} sets of random experts.\n"
    )


def _summary(models: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for claim in CLAIMS:
        verdict = said([claim.verdict(model) for model in models])
        shown = [claim.shown(model) for model in models]
        rows.append([str(claim.finding), claim.text, claim.measured, *shown, claim.untrained(models), verdict])
    head = ["", "the paper's claim", "measured here", *_names(models), "untrained", "verdict"]
    return table(head, rows, words=(0, 1, 2, len(head) - 1))


def said(verdicts: Sequence[str]) -> str:
    """The verdicts of all models in words: "appears", or "appears in 2 of 3, unclear in 1"."""
    found = {verdict: verdicts.count(verdict) for verdict in (APPEARS, OPPOSITE, UNCLEAR, UNTESTED)}
    found = {verdict: count for verdict, count in found.items() if count}
    if len(found) == 1:
        return next(iter(found))
    return ", ".join(f"{verdict} in {count} of {len(verdicts)}" for verdict, count in found.items())


def _tally(models: Sequence[Mapping[str, Any]]) -> str:
    """In words, which claims appear in every model, which do not, and which cannot be told."""
    every = "in every model" if len(models) > 1 else "in the model"
    groups: dict[str, list[Claim]] = {
        f"Appears {every}": [], f"The opposite appears {every}": [], "Unclear, or not the same in all models": [],
        "Not testable": [],
    }  # fmt: skip
    place = dict(zip((APPEARS, OPPOSITE, UNCLEAR, UNTESTED), groups, strict=True))
    for claim in CLAIMS:
        verdicts = {claim.verdict(model) for model in models}
        groups[place[verdicts.pop() if len(verdicts) == 1 else UNCLEAR]].append(claim)
    lines = []
    for name, claims in groups.items():
        lines.append(f"- {name}:{'' if claims else ' nothing.'}")
        lines += [f"    - ({claim.finding}) {claim.text}." for claim in claims]
    return "\n".join(lines) + "\n"


def _skill(models: Sequence[Mapping[str, Any]]) -> str:
    """Exact match by subset, of each model, for every language."""
    languages = models[0]["routing"]["languages"]
    rows = []
    for subset in models[0]["skill"]:
        for name, model in zip(_names(models), models, strict=True):
            found = model["skill"][subset]
            label = subset if len(models) == 1 else f"{subset}, {name}"
            rows.append([label, *(plain(found[language], 2) for language in languages)])
    shares = [model["training"]["shares"] for model in models]
    for name, share in zip(_names(models), shares, strict=True):
        if share is not None:
            label = "share of pairs seen" if len(models) == 1 else f"share of pairs seen, {name}"
            rows.append([label, *(plain(share.get(language), 2) for language in languages)])
    return "Exact match of the answers:\n\n" + table(["problems", *map(_short, languages)], rows)


def _short(language: str) -> str:
    return language.split("_")[0]


def _depths(models: Sequence[Mapping[str, Any]]) -> str:
    shapes = [model["routing"]["depth"] for model in models]
    groups = shapes[0]["general"]["groups"]
    rows = []
    for i, language in enumerate(groups):
        rows.append([language, *(number(_row(shape["general"], i)) for shape in shapes),
                     *(number(_row(shape["untrained"], i)) for shape in shapes)])  # fmt: skip
    means = [shape[name]["mean"] for name in ("general", "untrained") for shape in shapes]
    rows.append(["mean", *map(number, means)])
    names = _names(models)
    parts = shapes[0]["general"]["layers"]
    where = f"layers {_layers_of(parts['first'])} and {_layers_of(parts['last'])} against {_layers_of(parts['middle'])}"
    untrained = [f"{name}, untrained" for name in names]
    return f"Depth of the U ({where}):\n\n" + table(["language", *names, *untrained], rows)


def _row(shape: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {"value": shape["depth"][i], "low": shape["low"][i], "high": shape["high"][i]}


def _layers_of(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])


def _by_layer(rows: Iterable[tuple[str, Sequence[float | None]]], digits: int = 3) -> str:
    listed = [[name, *(plain(value, digits) for value in values)] for name, values in rows]
    return table(["layer", *map(str, range(len(listed[0]) - 1))], listed)


def _layers(models: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, model in zip(_names(models), models, strict=True):
        shape = model["routing"]["depth"]
        rows += [
            (f"{name}, divergence", shape["general"]["by_layer"]),
            (f"{name}, floor", shape["general"]["floor_by_layer"]),
            (f"{name}, untrained", shape["untrained"]["by_layer"]),
            (f"{name}, on the problems", shape["problems"]["by_layer"]),
            (f"{name}, load entropy / log E", model["routing"]["load"]),
        ]
    return "Divergence from English by layer, mean of nine languages:\n\n" + _by_layer(rows)


def _correlations(models: Sequence[Mapping[str, Any]]) -> str:
    rows: list[tuple[str, Sequence[float | None]]] = []
    for name, model in zip(_names(models), models, strict=True):
        for of, text in (("general", "general text"), ("problems", "problems")):
            found = model["routing"]["performance"][of]["by_layer"]
            rows += [(f"{name}, {text}: r", found["pearson"]), ("p, corrected for all layers", found["p_corrected"])]
    return "Correlation of exact match with divergence over nine languages:\n\n" + _by_layer(rows, 2)


def _entropies(models: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for name, model in zip(_names(models), models, strict=True):
        for training, found in (
            ("", model["routing"]["entropy"]),
            (", untrained", model["routing"]["untrained"]["entropy"]),
        ):
            english = found["groups"].index(measure.PIVOT)
            for of in ("token", "sequence"):
                values = found[of]["by_layer"]
                others = [row for i, row in enumerate(values) if i != english]
                mean = [sum(column) / len(column) for column in zip(*others, strict=True)]
                rows += [
                    (f"{name}{training}, {of}, English", values[english]),
                    (f"{name}{training}, {of}, others", mean),
                ]
    return "Entropy / log E:\n\n" + _by_layer(rows)


def _consistencies(models: Sequence[Mapping[str, Any]]) -> str:
    found = [model["routing"]["consistency"] for model in models]
    languages = found[0]["groups"]
    rows = [[language, *(plain(one["mean"][i]) for one in found)] for i, language in enumerate(languages)]
    rows.append(["widest ±, one layer", *(plain(one["widest"]) for one in found)])
    base = [model["routing"]["untrained"]["consistency"] for model in models]
    rows.append(["untrained, mean", *(plain(sum(one["mean"]) / len(one["mean"])) for one in base)])
    text = "Consistency, mean over layers, from the language with most text to that with least:\n\n"
    return text + table(["language", *_names(models)], rows)


def _thresholds(models: Sequence[Mapping[str, Any]]) -> str:
    rows, notes = [], []
    for name, model in zip(_names(models), models, strict=True):
        found, base = model["routing"]["experts_by_threshold"], model["routing"]["untrained"]["multilingual"]
        for i, tau in enumerate(found["thresholds"]):
            sizes = [str(sum(found[of][i])) for of in ("task", "multilingual", "both")]
            chance = [plain(found["expected"][i], 2), plain(found["p_fewer"][i])]
            rows.append([f"{name}, {tau:g}", *sizes, *chance, str(base[f"{tau:g}"])])
        notes.append(f"- {name}: no expert is in both sets from threshold {plain(found['separate_from'])} on.")
    head = ["threshold", "task", "multilingual", "both", "by chance", "p (fewer)", "multilingual, untrained"]
    return table(head, rows) + "\n" + "\n".join(notes) + "\n"


def _steering(models: Sequence[Mapping[str, Any]]) -> str:
    plans = list(dict.fromkeys(name for model in models for name in model["steering"]["plans"]))
    texts = []
    for of, title in (("exact_match", "exact match"), ("nats", "the nats of the right answer")):
        rows = []
        for plan in plans:
            found = [model["steering"]["plans"].get(plan) for model in models]
            rows.append(
                [plan, *("-" if one is None else f"{number(one[of])} ({len(one['experts'])})" for one in found)]
            )
        rows.append([f"{measure.RANDOM}, mean of the sets", *(_random_cell(model, of) for model in models)])
        texts += [
            f"Change of {title} against the model without steering (number of experts):\n",
            table(["plan", *_names(models)], rows),
        ]
    for name, model in zip(_names(models), models, strict=True):
        texts += [f"- {name}: {note}" for note in _steering_notes(model["steering"])]
    return "\n".join(texts) + "\n"


def _random_cell(model: Mapping[str, Any], of: str) -> str:
    found = model["steering"].get("random")
    if found is None:
        return "-"
    return number((random_sets(model) if of == "exact_match" else found["nats"]["mean_of_random"]) or {})


def _steering_notes(found: Mapping[str, Any]) -> list[str]:
    notes = [f"{plan} could not be tested, because {why}." for plan, why in found["missing"].items()]
    if found["threshold"] is None:
        return notes
    errors = found["random"]["errors"]
    sets = len(errors["random"])
    least = 1 / (sets + 1)  # with so few sets that no rank is significant, a p-value says nothing
    p = f"p {errors['p_value']:.3f}" if least <= LEVEL else f"{sets} sets give no p below {least:.3f}"
    return [
        f"threshold {found['threshold']:g}, layers {_layers_of(found['middle'])}.",
        f"raising task experts has rank {errors['rank']} of {sets + 1} in errors among {sets} random sets (rank 1 has "
        f"the fewest); {p}.",
        f"after steering, the model answers {'as before, bit for bit' if found['restored'] else 'NOT as before'}.",
        *notes,
    ]


def _recorded(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "Not computed: the folder of data holds no routing/qwen3_30b_a3b_mgsm.\n"
    parts = found["parts"]
    head = [f"{name} {_layers_of(layers)}" for name, layers in parts.items()]
    tables = (_pooled_depth, _shared_experts, _recorded_experts, _specific_experts, _load, _pairs)
    return "\n".join(one(found, list(parts), head) for one in tables)


def _pooled_depth(found: Mapping[str, Any], parts: Sequence[str], head: Sequence[str]) -> str:
    shape, order = found["shape"], found["order"]["counts"]
    ranks = [f"rank {place}" for place in range(1, len(order) + 1)]
    rows = [
        [name, *(plain(shape[part][i]) for part in (*parts, "depth")), *map(str, order[i])]
        for i, name in enumerate(shape["groups"])
    ]
    title = "Divergence from English, and in how many layers a language has which rank (1: the closest):\n\n"
    return title + table(["language", *head, "depth", *ranks], rows)


def _shared_experts(found: Mapping[str, Any], parts: Sequence[str], head: Sequence[str]) -> str:
    shared = found["experts_shared"]
    rows = [[name, *(plain(shared["jaccard"][part][i]) for part in parts)] for i, name in enumerate(shared["groups"])]
    rows.append(["experts per layer that all five share", *(plain(shared["common"][part], 2) for part in parts)])
    return "Jaccard index of the eight most used experts with those of English:\n\n" + table(["language", *head], rows)


def _recorded_experts(found: Mapping[str, Any], parts: Sequence[str], head: Sequence[str]) -> str:
    rows = [[tau, *(plain(row[part], 2) for part in parts)] for tau, row in found["multilingual"].items()]
    return "Multilingual experts per layer, by threshold:\n\n" + table(["threshold", *head], rows)


def _specific_experts(found: Mapping[str, Any], parts: Sequence[str], head: Sequence[str]) -> str:
    specific = found["specific"]
    rows = [
        [name, *(str(specific["places"][name][part]) for part in parts), *map(str, specific["shared"][i])]
        for i, name in enumerate(specific["groups"])
    ]
    title = (
        f"The {specific['number']} experts of each language with the lowest entropy over languages: how many lie in "
        "these layers, and how many another language has too:\n\n"
    )
    return title + table(["language", *head, *(f"also of {name}" for name in specific["groups"])], rows)


def _load(found: Mapping[str, Any], parts: Sequence[str], head: Sequence[str]) -> str:
    load = found["load"]
    rows = [
        [name, *(plain(load[of][part][i]) for of in ("entropy", "rare") for part in parts)]
        for i, name in enumerate(load["groups"])
    ]
    title = "Load: entropy / log E, and the share of experts with less than a tenth of the mean load (rare):\n\n"
    return title + table(["language", *head, *(f"rare, {name}" for name in head)], rows)


def _pairs(found: Mapping[str, Any], parts: Sequence[str], head: Sequence[str]) -> str:
    matrix = found["matrix"]
    names = matrix["groups"]
    rows = [[name, *map(plain, row)] for name, row in zip(names, matrix["middle"], strict=True)]
    joined = "; ".join(f"{'+'.join(step['groups'])} at {plain(step['distance'])}" for step in matrix["joined"])
    text = "Divergence of all pairs in the middle layers:\n\n" + table(["", *names], rows)
    return f"{text}\nBy average linkage, languages join in this order: {joined}.\n"
