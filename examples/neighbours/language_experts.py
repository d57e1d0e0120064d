"""Experts of a language, by two rules: does forbidding them cost the language more than random experts would?

    python examples/neighbours/language_experts.py --out RESULTS.json --page docs/find-experts.md     # minutes
    python examples/neighbours/language_experts.py --draws 3                                          # a short form

On the shipped model. Experts are found in every second sentence of the shipped corpus, by the lowest entropy over
languages (`analysis.entropy_experts`): as many for each language, as in the demo, and by the original rule of LAPE
[arXiv 2402.16438], a share of all experts that go to every language that uses them above the bar. The other sentences
are then read in every language without the experts of each language, and in the language itself without random sets of
as many experts of the same layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from seeds import add_outputs, write

import moe_route as mr
from moe_route.analysis import entropy_experts
from moe_route.analysis.stats import RESAMPLES, draw_items, interval_of
from moe_route.data.languages import language_name
from moe_route.demo.language_experts import find_language_experts
from moe_route.demo.measurement import Losses, Measurement, pick_items, random_sets
from moe_route.runs.language_model import LanguageModel

SHARES = (0.01, 0.1)  # of all experts, for LAPE's rule; 0.01 is published for neurons
EQUAL = "equal numbers"


def found_by(statistics: Any) -> dict[str, Mapping[str, mr.ExpertSelection]]:
    """Rule -> language -> its experts; languages without any are left out."""
    rules = {EQUAL: find_language_experts(statistics)}
    for share in SHARES:
        found = entropy_experts(statistics, share=share, by="sequence")
        rules[f"LAPE, {share:.0%} of experts"] = {code: experts for code, experts in found.items() if experts}
    return rules


def change(after: Losses, before: Losses) -> np.ndarray:
    """Change of nats per token of each language, float64 [language]."""
    return (after.nats - before.nats).sum(0) / before.tokens.sum(0)


def one_rule(run: Measurement, experts: Mapping[str, mr.ExpertSelection], text: Any, draws: int) -> dict[str, Any]:
    """Language -> change of its own text and of all others' without its experts, and of its own without random ones."""
    before = run.losses(text, "as it is")
    items = draw_items(len(text), RESAMPLES, 0)  # how often each sentence is drawn [resample, item]
    results = {}
    for code, selection in experts.items():
        place = text.languages.index(code)
        plan = mr.Plan.forbid(selection)
        after = run.losses(text, f"without the experts of {code}", plan)
        row = change(after, before)
        others = np.delete(np.arange(len(row)), place)
        weighed = (items @ (after.nats - before.nats)) / (items @ before.tokens)
        own, natural = text.subset([code]), before.of(slice(None), np.array([place]))
        sets = random_sets(plan, draws)[0][:draws]
        random = [float(change(run.losses(own, "random experts", one), natural)[0]) for one in sets]
        margin = row[place] - row[others].mean()
        low, high = interval_of(weighed, len(text), 0.95)
        of_margin = interval_of(weighed[:, place] - weighed[:, others].mean(1), len(text), 0.95)
        results[code] = {
            "experts": {str(layer): list(ids) for layer, ids in selection.items()},
            "row": row.tolist(),
            "own": [float(row[place]), float(low[place]), float(high[place])],
            "own minus others": [float(margin), *map(float, of_margin)],
            "random": random,
            "p": (1 + sum(value >= row[place] for value in random)) / (1 + len(random)),
        }
    return results


def cell(values: list[float]) -> str:
    value, low, high = values
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: every rule, then the whole matrix of the first one."""
    languages = results["languages"]
    lines = [
        "| rule | language | experts | own text | own minus others' | random sets, own text | p, of sets | hit first |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for rule, found in results["rules"].items():
        for code, row in found.items():
            first = languages[int(np.argmax(row["row"]))]
            random = f"{np.mean(row['random']):+.2f} (at most {max(row['random']):+.2f})"
            cells = [rule, language_name(code), str(sum(map(len, row["experts"].values()))), cell(row["own"])]
            cells += [
                cell(row["own minus others"]),
                random,
                f"{row['p']:.2f} of {len(row['random'])}",
                language_name(first),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| experts off | " + " | ".join(code.partition("_")[0] for code in languages) + " |"]
    lines.append("|---|" + "---|" * len(languages))
    for code, row in results["rules"][EQUAL].items():
        cells = [
            f"**{value:+.2f}**" if of == code else f"{value:+.2f}"
            for of, value in zip(languages, row["row"], strict=True)
        ]
        lines.append(f"| {language_name(code)} | {' | '.join(cells)} |")
    return "\n".join(lines)


FIRST, LAST = "<!-- language experts: begin -->", "<!-- language experts: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=99, help="random sets for each language")
    add_outputs(parser)
    options = parser.parse_args()
    corpus = mr.data.demo_corpus()
    finding, measured = (pick_items(corpus, range(half, len(corpus), 2)) for half in (0, 1))
    language_model = LanguageModel.load()
    with language_model.attach() as routed:
        run = Measurement(language_model, routed)
        rules = found_by(run.record(finding, "routing"))
        found = {rule: one_rule(run, experts, measured, options.draws) for rule, experts in rules.items()}
    results = {"draws": options.draws, "languages": list(measured.languages), "rules": found}
    write(options, results, table(results), FIRST, LAST)


if __name__ == "__main__":
    main()
