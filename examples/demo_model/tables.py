"""Results of judge.py as Markdown tables: for the terminal, and for the model card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from problems import LANGUAGES

Judged = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats have two digits after the point."""
    lines = [[_cell(value) for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (list(head), ["---"] * len(head), *lines))


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def interval(value: Mapping[str, Any]) -> str:
    """Depth of the U with its interval."""
    low, high = value["interval"]
    return f"{value['depth']:+.3f} [{low:+.3f}, {high:+.3f}]"


def gates_table(results: Sequence[Judged]) -> str:
    """Every gate: the value asked for, that of each seed, passed or failed, and that of its untrained model."""
    head = ["gate", "wanted, at least"]
    for result in results:
        head += [f"seed {result['seed']}", "untrained"]
    rows = []
    for number, gate in enumerate(results[0]["gates"]):
        row: list[object] = [gate["gate"], f"{gate['wanted']:g}"]
        for result in results:
            found = result["gates"][number]
            digits = 1 if gate["wanted"] >= 1 else 3
            verdict = "passed" if found["passed"] else "**failed**"
            row += [f"{found['value']:.{digits}f} {verdict}", f"{found['untrained']:.{digits}f}"]
        rows.append(row)
    return table(head, rows)


def following_table(before: Judged, after: Judged) -> str:
    """Every gate of a model and of the one that it goes on from, and the loss of text."""
    rows: list[list[object]] = []
    for old, new in zip(before["gates"], after["gates"], strict=True):
        digits = 1 if new["wanted"] >= 1 else 3
        verdicts = ("passed" if one["passed"] else "**failed**" for one in (old, new))
        values = (f"{one['value']:.{digits}f} {verdict}" for one, verdict in zip((old, new), verdicts, strict=True))
        rows.append([new["gate"], f"{new['wanted']:g}", *values])
    losses = ([found["nats_per_token"] for found in one["trained"]["text"].values()] for one in (before, after))
    rows.append(["text, nats per token, mean of ten languages", "-", *(f"{sum(one) / len(one):.3f}" for one in losses)])
    return table(("gate", "wanted, at least", "before", "after"), rows)


def controls_table(result: Judged) -> str:
    """Exact match of copied and counted numbers by language."""
    found = result["trained"]["controls"]
    rows = ([language, *(found[kind][language]["exact_match"] for kind in found)] for language in LANGUAGES)
    return table(("language", *found), rows)


def skill_table(result: Judged) -> str:
    """Exact match by language and subset, and the share of the pairs of numbers that each language saw."""
    skill = result["trained"]["skill"]
    head = (
        "language",
        "pairs seen, %",
        *(f"{name}, exact match" for name in skill),
        *(f"{name}, nats" for name in skill),
    )
    return table(
        head,
        (
            (
                language,
                f"{100 * result['shares'][language]:.0f}",
                *(found[language]["exact_match"] for found in skill.values()),
                *(found[language]["nats"] for found in skill.values()),
            )
            for language in LANGUAGES
        ),
    )


def text_table(result: Judged) -> str:
    """Loss of held-out sentences, gain of translations in context, and retrieval at the best layer, by language."""
    trained, blank = result["trained"], result["untrained"]
    rows = []
    for language in LANGUAGES:
        text = trained["text"][language]
        row = [language, text["sentences"], text["nats_per_token"], text["bits_per_byte"]]
        row.append(blank["text"][language]["nats_per_token"])
        if language in trained["translation"]:
            ways = trained["translation"][language].values()
            row += [f"{way['gain']:.1f} [{way['interval'][0]:.1f}, {way['interval'][1]:.1f}]" for way in ways]
            row += [max(found[language]) for found in trained["retrieval"].values()]
            row.append(1 / result["pairs"][language])
        else:
            row += ["-"] * 5
        rows.append(row)
    head = (
        "language", "sentences", "nats/token", "bits/byte", "untrained, nats/token", "gain from English, nats/sentence",
        "gain to English", "retrieval by routing, best layer", "retrieval by hidden states, best layer",
        "retrieval by chance",
    )  # fmt: skip
    return table(head, rows)


def load_table(result: Judged) -> str:
    """Entropy of the load, smallest and largest share of an expert, by layer."""
    load = result["trained"]["load"]
    layers = range(len(load["text"]["entropy"]))
    return table(
        ("load", *map(str, layers)),
        (
            (f"{what}, {name}", *(f"{value:.3f}" for value in values))
            for what, found in load.items()
            for name, values in found.items()
        ),
    )


def divergence_table(result: Judged) -> str:
    """Divergence of translations from English by layer, beside unrelated sentences and the untrained model."""
    kinds = {
        "translation": result["trained"]["divergence"]["own"]["by_layer"],
        "unrelated sentence": result["trained"]["divergence"]["unrelated"]["by_layer"],
        "floor, unrelated sentences of one language": result["trained"]["divergence"]["floor"]["by_layer"],
        "translation, untrained model": result["untrained"]["divergence"]["own"]["by_layer"],
    }
    languages = list(kinds["translation"])
    layers = range(len(kinds["translation"][languages[0]]))
    return table(
        ("language", "compared with English", *map(str, layers)),
        ((language, kind, *found[language]) for language in languages for kind, found in kinds.items()),
    )


def depth_table(result: Judged) -> str:
    """Depth of the U with its interval."""
    trained, blank = result["trained"]["divergence"], result["untrained"]["divergence"]
    return table(
        ("language", "translation", "unrelated sentence", "translation, untrained model"),
        (
            (
                language,
                *(interval(found["depth"][language]) for found in (trained["own"], trained["unrelated"], blank["own"])),
            )
            for language in trained["own"]["depth"]
        ),
    )


def changes_table(result: Judged) -> str:
    """What switching the task experts off changes, by language, and in the mean beside random experts."""
    found = result["task_experts"]
    counts = ", ".join(f"{count} at {threshold}" for threshold, count in found["count"].items())
    lines = [f"Task experts by threshold: {counts}."]
    if "off" not in found:
        return f"{lines[0]} At {found['threshold']} there is none to switch off."
    places = ", ".join(f"L{layer}E{expert}" for layer, ids in found["experts"].items() for expert in ids)
    lines += [f"Switched off, those at {found['threshold']}: {places}.", ""]
    rows: list[tuple[object, ...]] = [(name, *_changes(change)) for name, change in found["off"].items()]
    random = found["random_few"]
    if random:
        rows.append(("mean, fewer problems", *_changes(found["off_few"])))
        for name, reduce in (("mean", _mean), ("smallest", min), ("largest", max)):
            row = {key: reduce([one[key] for one in random]) for key in random[0]}
            rows.append((f"{len(random)} random sets, fewer problems: {name}", *_changes(row)))
    head = ("language", "exact match", "answer, nats", "general text, nats/token")
    return "\n".join((*lines, table(head, rows)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _changes(change: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(f"{change[name]:+.3f}" for name in ("exact_match", "nats", "text"))


def singles_table(result: Judged, shown: int = 6) -> str:
    """The single experts whose absence costs most, of those tested."""
    order = sorted(result["single_experts"].items(), key=lambda entry: entry[1]["exact_match"])
    return table(
        ("expert off", "exact match", "answer, nats"),
        ((name, f"{one['exact_match']:+.3f}", f"{one['nats']:+.3f}") for name, one in order[:shown]),
    )
