"""Judge a checkpoint of train.py: every gate, passed or failed, beside the same model before training.

    python examples/demo_model/judge.py --model OUT

The untrained model has the same configuration and tokenizer, and seeded random weights: what it has as well, training
did not make. Everything is seeded, and the result is a JSON file, by default OUT/judged.json. It takes a few minutes of
two CPU cores; `--limit 24` is enough to see whether everything runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import OTHERS, Material, held_out_pairs, measure, single_experts_off, task_experts_off
from problems import LANGUAGES, shares
from tables import (
    changes_table,
    depth_table,
    divergence_table,
    gates_table,
    load_table,
    singles_table,
    skill_table,
    text_table,
)
from text import ENGLISH, tag
from transformers.utils.logging import disable_progress_bar

from moe_route.base.files import readable_json, write_text
from moe_route.data import demo_problems
from moe_route.runs.language_model import LanguageModel

Measures = Mapping[str, Any]


def english_only(found: Measures) -> np.ndarray:
    """Exact match on the problems that English alone saw, by language."""
    return np.array([found["skill"]["english_only"][language]["exact_match"] for language in LANGUAGES])


def least_control(found: Measures, kind: str) -> float:
    """Exact match of the language that copies a number ("copy") or counts on ("count") worst."""
    return min(one["exact_match"] for one in found["controls"][kind].values())


def gains(found: Measures) -> list[float]:
    """Translation gain of every language and direction."""
    return [way["gain"] for ways in found["translation"].values() for way in ways.values()]


def best_layer(found: Measures, what: str) -> float:
    """Retrieval at the best layer, mean over languages."""
    return float(np.mean([found["retrieval"][what][language] for language in OTHERS], axis=0).max())


# name, the value asked for, how it is measured
GATES = (
    ("load entropy of text, least layer", 0.9, lambda found: min(found["load"]["text"]["entropy"])),
    ("load entropy of tasks, least layer", 0.9, lambda found: min(found["load"]["tasks"]["entropy"])),
    ("share of the least used expert, text", 0.01, lambda found: min(found["load"]["text"]["least"])),
    ("share of the least used expert, tasks", 0.01, lambda found: min(found["load"]["tasks"]["least"])),
    ("translation gain, nats per sentence, least language and direction", 10.0, lambda found: min(gains(found))),
    ("retrieval by routing, best layer", 0.3, lambda found: best_layer(found, "routing")),
    ("retrieval by hidden states, best layer", 0.3, lambda found: best_layer(found, "hidden")),
    ("exact match in English on english_only", 0.9, lambda found: float(english_only(found)[0])),
    ("spread of exact match over languages on english_only", 0.3, lambda found: float(np.ptp(english_only(found)))),
    ("exact match on english_only, mean of ten languages", 0.75, lambda found: float(english_only(found).mean())),
    ("copying a number, least language", 0.9, lambda found: least_control(found, "copy")),
    ("counting on, least language", 0.9, lambda found: least_control(found, "count")),
)  # fmt: skip
# A model that goes on from another one may take its place if nothing got worse: no gate that was passed fails, no value
# of a gate falls by more than this share of what is wanted, and the loss of text rises by no more than so many nats.
TOLERANCE = 0.1
TEXT_TOLERANCE = 0.05  # nats per token, mean over languages


def worse(before: Measures, after: Measures) -> list[str]:
    """What a model does worse than the one before it, by the rule of `TOLERANCE`; both are results of `judge`."""
    gates_before = {gate["gate"]: gate for gate in before["gates"]}
    found = [
        f"{gate['gate']}: {old['value']:.3f} -> {gate['value']:.3f}"
        for gate in after["gates"]
        for old in [gates_before[gate["gate"]]]
        if (old["passed"] and not gate["passed"]) or gate["value"] < old["value"] - TOLERANCE * gate["wanted"]
    ]
    text = [np.mean([one["nats_per_token"] for one in run["trained"]["text"].values()]) for run in (before, after)]
    return found + [f"loss of text: {text[0]:.3f} -> {text[1]:.3f}"] * bool(text[1] > text[0] + TEXT_TOLERANCE)


def gates(trained: Measures, untrained: Measures) -> list[dict[str, Any]]:
    """Every gate with the value asked for, those of both models, and whether the trained one reaches it."""
    return [
        {
            "gate": name,
            "wanted": wanted,
            "value": value,
            "untrained": measured(untrained),
            "passed": bool(value >= wanted),
        }
        for name, wanted, measured in GATES
        for value in [measured(trained)]
    ]


def judge(folder: Path, limit: int | None, draws: int) -> dict[str, Any]:
    """Everything that is measured, as one JSON-able result."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    language_model = LanguageModel.load(str(folder.resolve()), dtype="float32")
    missing = [tag(language) for language in LANGUAGES if tag(language) not in language_model.tokenizer.get_vocab()]
    if missing:
        raise SystemExit(f"the tokenizer of {folder} has no {', '.join(missing)}: judge a checkpoint of train.py")
    pairs = held_out_pairs(folder, language_model, limit or 100)
    problems = demo_problems().subset(limit=limit)
    material = Material(pairs, problems, few=min(20, limit or 20))
    blank = language_model.untrained(training["seed"])
    with blank.attach() as routed:
        untrained = measure(blank, routed, material)
    with language_model.attach() as routed:
        trained = measure(language_model, routed, material)
        off = task_experts_off(language_model, routed, material, draws)
        single = single_experts_off(language_model, routed, material)
    result = {
        "seed": training["seed"],
        "order": training["order"],
        "shares": shares(training["order"]),
        "steps": training["steps"],
        "tokens": training["tokens"],
        "limit": limit,
        "pairs": {language: len(found) for language, found in pairs.items()},
        "problems": {
            subset: len(problems.subset(subset, languages=[ENGLISH]).questions) for subset in problems.subsets
        },
        "gates": gates(trained, untrained),
        "trained": trained,
        "untrained": untrained,
        "task_experts": off,
        "single_experts": single,
    }
    return rounded(result)


def rounded(values: Any) -> Any:
    """The same with every float rounded to four digits after the point."""
    if isinstance(values, Mapping):
        return {name: rounded(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [rounded(value) for value in values]
    return round(values, 4) if isinstance(values, float) else values


def show(result: Measures) -> str:
    """The result as tables."""
    return "\n\n".join(
        (
            gates_table([result]),
            "Exact match, and share of the pairs of numbers that the language saw in training\n\n"
            + skill_table(result),
            "Held-out sentences\n\n" + text_table(result),
            "Load of the experts by layer\n\n" + load_table(result),
            "Divergence from English by layer\n\n" + divergence_table(result),
            "Depth of the U (no gate), beside unrelated sentences and the untrained model\n\n" + depth_table(result),
            "Task experts off\n\n" + changes_table(result),
            "Single experts of the first layers off\n\n" + singles_table(result),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, help="the JSON file to write (default: judged.json in that folder)")
    parser.add_argument("--draws", type=int, default=19, help="random sets of experts beside the task experts (19)")
    parser.add_argument("--limit", type=int, help="sentences and problems per language, for a trial (at least 12)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.limit is not None and args.limit < 12:
        parser.error("--limit must be at least 12: retrieval among fewer sentences says nothing")
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    began = time.monotonic()
    result = judge(args.model, args.limit, args.draws)
    out = args.out or args.model / "judged.json"
    write_text(out, f"{readable_json(result)}\n")
    print(show(result))
    print(f"\n{time.monotonic() - began:.0f} s; written to {out}")


if __name__ == "__main__":
    main()
