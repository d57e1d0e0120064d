"""Adapters on the shipped model, on its ten languages: who mixes them, where their factors come from, in which order.

    python examples/neighbours/adapters.py --out RESULTS.json --page docs/training.md     # three seeds, an hour
    python examples/neighbours/adapters.py --steps 2 --seeds 1                            # a short form

Each seed draws which sentences are held out, in all languages the same ones. All are trained on the same batches.
Measured are nats per token of the held-out sentences, by language.

Mixtures are compared with one LoRA of exactly as many trainable parameters, shards with one LoRA of 8 times as many and
one of as many. The stages of MT4CrossOIE train embeddings and head, then the rest, then adapters, routers and head, a
third of the steps each; the joint training trains all of it in all steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from seeds import add_outputs, interval, span, told, write

import moe_route as mr
from moe_route.data.batches import Text
from moe_route.runs.language_model import LanguageModel
from moe_route.training import STAGES, AdaptedModel, AdapterConfig, ShardPool, add_adapters, freeze

HELD_OUT, BATCH = 24, 16  # sentences of each language; texts of a step
RATE, WHOLE_RATE = 5e-4, 1e-4  # of adapters and routers; of the model's own weights
LANGUAGES = mr.data.demo_corpus().languages


def lora(rank: int, **options: Any) -> AdapterConfig:
    return AdapterConfig(rank=rank, alpha=2.0 * rank, **options)


LORA, LARGE, SMALL = "LoRA, rank 20", "LoRA, rank 16", "LoRA, rank 2"
BY_SEQUENCE = "8 by sequence, first token"
MIXED = {
    LORA: lora(20),
    "8 by token": lora(2, experts=8, router="token"),
    BY_SEQUENCE: lora(2, experts=8, router="sequence"),
    "8 by sequence, prefix": lora(2, experts=8, router="sequence", pooling="prefix"),
    "10 by language": lora(2, router="group", groups=LANGUAGES),
}
SHARED = {
    LARGE: lora(16),
    "shards, rank 8 for 2": lora(8, pool=ShardPool(rank=2)),
    SMALL: lora(2),
}
# The shipped model has no head of its own: it shares its weights with the embeddings.
STAGED = [tuple(part for part in stage.trains if part != "head") for stage in STAGES]
ORDERED = {"joint": [("embeddings", "body", "adapters", "routers")], "in three stages": STAGED}


def one(
    config: AdapterConfig,
    texts: Sequence[Text],
    held_out: Sequence[Text],
    steps: int,
    seed: int,
    stages: Sequence[tuple[str, ...]] = (),
) -> dict[str, Any]:
    """Train, in stages or adapters and routers only, and measure held-out loss by language."""
    started = time.perf_counter()
    language_model = LanguageModel.load()
    adapted = add_adapters(language_model.model, replace(config, seed=seed))
    torch.manual_seed(seed)
    trained = []
    for number in range(max(len(stages), 1)):
        if stages:
            freeze(adapted.model, stages[number])
        trained.append(adapted.trainable_parameters().trainable)
        first, last = (round(each * steps / max(len(stages), 1)) for each in (number, number + 1))
        train(language_model, adapted, texts, last - first)
    language_model.model.eval()
    return {
        "trainable": max(trained),
        "seconds": time.perf_counter() - started,
        "loss": {language: loss(language_model, adapted, held_out, language) for language in LANGUAGES},
    }


def train(language_model: LanguageModel, adapted: AdaptedModel, texts: Sequence[Text], steps: int) -> None:
    own = adapted.adapter_parameters()
    rest = [p for name, p in adapted.model.named_parameters() if name not in own and p.requires_grad]
    groups = [{"params": [p for p in own.values() if p.requires_grad], "lr": RATE}, {"params": rest, "lr": WHOLE_RATE}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    adapted.model.train()
    for _ in range(steps):
        drawn = [texts[i] for i in torch.randperm(len(texts))[:BATCH]]
        (batch,) = language_model.batches(language_model.encode(drawn), batch_size=BATCH)
        ids = batch.inputs["input_ids"]
        labels = ids.masked_fill(batch.inputs["attention_mask"] == 0, -100)
        optimizer.zero_grad()
        with adapted.labels([text.group for text in drawn]):
            adapted.model(**batch.inputs, labels=labels).loss.backward()
        optimizer.step()


def loss(language_model: LanguageModel, adapted: AdaptedModel, texts: Iterable[Text], language: str) -> float:
    with adapted.labels(language):
        nats, tokens = language_model.losses([text for text in texts if text.group == language]).sum(0)
    return float(nats / tokens)


def split(seed: int) -> tuple[list[Text], list[Text]]:
    """Texts to train on, and those held out."""
    corpus = mr.data.demo_corpus()
    numbers = np.random.default_rng(seed).permutation(len(corpus[LANGUAGES[0]]))
    parts = numbers[HELD_OUT:], numbers[:HELD_OUT]
    train_on, held_out = (
        [Text(language, str(number), corpus[language][number]) for language in LANGUAGES for number in part]
        for part in parts
    )
    return train_on, held_out


def one_seed(seed: int, steps: int) -> dict[str, Any]:
    texts, held_out = split(seed)
    results = {"the shipped model": {**one(lora(1), texts, held_out, 0, seed), "trainable": 0}}
    for name, config in {**MIXED, **SHARED}.items():
        results[name] = one(config, texts, held_out, steps, seed)
    for name, stages in ORDERED.items():
        results[name] = one(MIXED[BY_SEQUENCE], texts, held_out, steps, seed, stages)
    return results


def mean_loss(result: dict[str, Any]) -> float:
    return float(np.mean(list(result["loss"].values())))


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: three comparisons, then the losses by language."""
    seeds = results["seeds"]
    parts = []
    for title, names, reference in (
        ("Who mixes", ["the shipped model", *MIXED], LORA),
        ("Where the factors come from", list(SHARED), SMALL),
        ("In which order", list(ORDERED), "joint"),
    ):
        lines = [
            f"**{title}**",
            "",
            f"| adapters | trainable parameters | held-out loss | minus {reference} | seconds |",
            "|---|---|---|---|---|",
        ]
        for name in names:
            losses = [mean_loss(seed[name]) for seed in seeds]
            minus = interval([mean_loss(seed[name]) - mean_loss(seed[reference]) for seed in seeds])
            shown = "" if name == reference else f"{minus[0]:+.3f}{span(minus[1], minus[2], '+.3f')}"
            seconds = np.mean([seed[name]["seconds"] for seed in seeds])
            trainable = f"{seeds[0][name]['trainable']:,}"
            lines.append(f"| {name} | {trainable} | {told(losses, '.3f')} | {shown} | {seconds:.0f} |")
        parts.append("\n".join(lines))
    names = [*MIXED, *SHARED]
    lines = [
        "**Held-out loss by language, mean over seeds**",
        "",
        f"| language | the shipped model | {' | '.join(names)} |",
        f"|---|---{'|---' * len(names)}|",
    ]
    for language in LANGUAGES:
        means = [np.mean([seed[name]["loss"][language] for seed in seeds]) for name in ("the shipped model", *names)]
        lines.append(f"| {language} | {' | '.join(f'{value:.2f}' for value in means)} |")
    return "\n\n".join([*parts, "\n".join(lines)])


BEGIN, END = "<!-- adapters: begin -->", "<!-- adapters: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    add_outputs(parser)
    options = parser.parse_args()
    results = {"steps": options.steps, "seeds": [one_seed(seed, options.steps) for seed in range(options.seeds)]}
    write(options, results, table(results), BEGIN, END)


if __name__ == "__main__":
    main()
