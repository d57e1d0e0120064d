"""Arithmetic in Swahili, from a fine-tune for English arithmetic and one for Swahili text.

    python examples/neighbours/swapping.py --out RESULTS.json --page docs/merging.md     # three seeds, minutes
    python examples/neighbours/swapping.py --steps 2 --seeds 1                           # a short form

Two fine-tunes of the shipped model are merged in every way that moe_route.merging knows. Measured are nats per right
answer in Swahili, on problems whose numbers neither fine-tune saw, and nats per token of held-out Swahili sentences.
Experts are swapped by the rule for task experts, found in English, beside as many experts of the same layers at random.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from seeds import add_outputs, told, write

import moe_route as mr
from moe_route.data import Question
from moe_route.data.batches import Text
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts

LANGUAGE, ENGLISH = "swh_Latn", "eng_Latn"
PROBLEMS, SENTENCES = 240, 48  # for training; the others are held out
BATCH, THRESHOLD = 16, 0.2


def data() -> dict[str, Any]:
    """Texts to train on, and what is held out."""
    problems = mr.data.demo_problems()
    items = list(dict.fromkeys(question.item for question in problems.questions))
    np.random.default_rng(0).shuffle(items)
    known = set(items[:PROBLEMS])
    corpus = mr.data.demo_corpus()
    sentences = {language: corpus[language] for language in (ENGLISH, LANGUAGE)}

    def questions(language: str, trained: bool) -> list[Question]:
        return [q for q in problems.questions if q.language == language and (q.item in known) == trained]

    return {
        "math": [Text(ENGLISH, q.item, q.prompt + q.answer) for q in questions(ENGLISH, True)],
        "language": [Text(LANGUAGE, str(i), text) for i, text in enumerate(sentences[LANGUAGE][:SENTENCES])],
        "general": [Text(ENGLISH, str(i), text) for i, text in enumerate(sentences[ENGLISH][:SENTENCES])],
        "questions": questions(LANGUAGE, False),
        "sentences": [Text(LANGUAGE, str(i), text) for i, text in enumerate(sentences[LANGUAGE][SENTENCES:])],
    }


def fine_tune(texts: list[Text], steps: int, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    tuned = LanguageModel.load()
    tuned.model.train()
    optimizer = torch.optim.AdamW(tuned.model.parameters(), lr=1e-4)
    for _ in range(steps):
        drawn = [texts[i] for i in torch.randperm(len(texts))[:BATCH]]
        (batch,) = tuned.batches(tuned.encode(drawn), batch_size=BATCH)
        ids = batch.inputs["input_ids"]
        labels = ids.masked_fill(batch.inputs["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        tuned.model(**batch.inputs, labels=labels).loss.backward()
        optimizer.step()
    tuned.model.eval()
    return tuned


def measure(weights: Mapping[str, torch.Tensor] | None, held_out: dict[str, Any]) -> dict[str, float]:
    """Losses of the shipped model with these weights."""
    judged = LanguageModel.load()
    if weights is not None:
        judged.model.load_state_dict(weights)
    answers = judged.answers(held_out["questions"])
    nats, tokens = judged.losses(held_out["sentences"]).sum(0)
    return {
        "answer": float(answers.nats.mean()),
        "match": float(answers.correct.mean()),
        "text": float(nats / tokens),
    }


def task_experts(given: dict[str, Any]) -> mr.ExpertSelection:
    """Experts of English arithmetic in the shipped model."""
    base = LanguageModel.load()
    found = []
    for name in ("math", "general"):
        with base.attach() as routed, routed.record(sequences=True) as recorder:
            record_texts(recorder, base, given[name])
        found.append(recorder.statistics())
    return mr.analysis.task_experts(*found, threshold=THRESHOLD, group=ENGLISH)


def at_random(selection: mr.ExpertSelection, experts: int, seed: int) -> mr.ExpertSelection:
    """As many experts of the same layers."""
    drawn = np.random.default_rng(seed)
    return mr.ExpertSelection(
        {layer: drawn.choice(experts, len(own), replace=False).tolist() for layer, own in selection.items()}
    )


def one_seed(seed: int, steps: int) -> dict[str, dict[str, float]]:
    given = data()
    math, language = (fine_tune(given[name], steps, seed).model for name in ("math", "language"))
    base = LanguageModel.load().model
    selection = task_experts(given)
    experts = base.config.num_experts
    merged = {
        "average": mr.merging.merge([math, language], method="linear"),
        "layers swapped": mr.merging.swap_layers(task=math, language=language),
        "task experts swapped": mr.merging.swap_experts(math, language, selection, router="expert", base=base),
        "random experts swapped": mr.merging.swap_experts(
            math, language, at_random(selection, experts, seed), router="expert", base=base
        ),
        "task arithmetic": mr.merging.merge([math, language], base=base, method="task_arithmetic", weights=[1.0, 1.0]),
        "PCB": mr.merging.merge([math, language], base=base, method="pcb"),
        "WIDEN": mr.merging.merge([math, language], base=base, method="widen"),
    }
    weights = {
        "the shipped model": None,
        "fine-tuned on English arithmetic": math.state_dict(),
        "fine-tuned on Swahili text": language.state_dict(),
        **{name: each.state_dict() for name, each in merged.items()},
    }
    return {name: measure(state, given) for name, state in weights.items()}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    seeds = results["seeds"]
    lines = [
        "| model | nats per answer in Swahili | exact match | nats per token of Swahili text |",
        "|---|---|---|---|",
    ]
    for name in seeds[0]:
        cells = [told([seed[name][what] for seed in seeds], ".3f") for what in ("answer", "match", "text")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


BEGIN, END = "<!-- swapping: begin -->", "<!-- swapping: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="of each fine-tune")
    parser.add_argument("--seeds", type=int, default=3)
    add_outputs(parser)
    options = parser.parse_args()
    results = {"steps": options.steps, "seeds": [one_seed(seed, options.steps) for seed in range(options.seeds)]}
    write(options, results, table(results), BEGIN, END)


if __name__ == "__main__":
    main()
