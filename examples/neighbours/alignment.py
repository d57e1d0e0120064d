"""Does alignment find the languages that a model knows well? On languages that are clones of each other.

    python examples/neighbours/alignment.py --out RESULTS.json --page docs/groups.md     # three seeds, minutes
    python examples/neighbours/alignment.py --steps 20 --seeds 1                            # a short form

One synthetic language is cloned [arXiv 2404.07982]: a clone has the same sentences with other token ids, apart from
some frequent tokens that all clones share. A model is trained on the clones in very unequal shares, so it knows them
unequally well, for no other reason. Alignment with the first clone, over sentences that were held out, should then rank
the others as their losses do. A dense and a sparse model are tried; of the sparse one, routing is aligned too.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from seeds import add_outputs, write
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_route as mr
from moe_route import recording
from moe_route.data.batches import Batch, Text

SHARES = (0.55, 0.25, 0.10, 0.05, 0.03, 0.02)  # of the clones in the training data
CLONES = len(SHARES)
WORDS, SHARED, LENGTH, BATCH = 300, 60, 20, 64
HELD_OUT = 100  # sentences, as in MEXA
CHOICES = 12  # tokens that may follow a token
BEGIN = WORDS + (CLONES - 1) * (WORDS - SHARED)  # id of the token before every sentence


class Clones:
    """Sentences of one language, and the same sentences in its clones."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        frequency = 1 / torch.arange(1.0, WORDS + 1)  # Zipf: token 0 is the most frequent
        follow = torch.multinomial(frequency.repeat(WORDS, 1), CHOICES, generator=self.generator)
        self.rules = torch.zeros(WORDS, WORDS)
        weights = torch.rand(WORDS, CHOICES, generator=self.generator) ** 2 + 0.02
        self.rules.scatter_(1, follow, weights)
        self.frequency = frequency

    def sentences(self, number: int) -> Tensor:
        """Token ids [number, LENGTH] of the language itself, the beginning left out."""
        tokens = torch.multinomial(self.frequency, number, replacement=True, generator=self.generator)[:, None]
        while tokens.shape[1] < LENGTH:
            following = torch.multinomial(self.rules[tokens[:, -1]], 1, generator=self.generator)
            tokens = torch.cat([tokens, following], 1)
        return tokens

    @staticmethod
    def cloned(sentences: Tensor, clone: Tensor | int) -> Tensor:
        """The sentences in a clone (of each), with the token before them."""
        clone = torch.as_tensor(clone).expand(len(sentences))
        shift = clone[:, None] * (WORDS - SHARED)
        ids = torch.where(sentences < SHARED, sentences, sentences + shift)
        return torch.cat([torch.full((len(ids), 1), BEGIN), ids], 1)


def new_model(seed: int, sparse: bool) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": BEGIN + 1,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if not sparse:
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, router_aux_loss_coef=0.01, output_router_logits=True))


def train(model: Any, clones: Clones, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    shares = torch.tensor(SHARES)
    model.train()
    for _ in range(steps):
        languages = torch.multinomial(shares, BATCH, replacement=True, generator=clones.generator)
        ids = clones.cloned(clones.sentences(BATCH), languages)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def one_seed(seed: int, steps: int, sparse: bool) -> dict[str, Any]:
    """Loss of every clone, and of every other one its alignment with the first, by each measure."""
    clones = Clones(seed)
    model: Any = new_model(seed, sparse)
    with torch.enable_grad():
        train(model, clones, steps)
    model.eval()
    model.config.output_router_logits = False
    held_out = clones.sentences(HELD_OUT)
    names = [f"clone {clone}" for clone in range(CLONES)]
    batches, losses = [], []
    for clone, name in enumerate(names):
        ids = clones.cloned(held_out, clone)
        losses.append(float(model(input_ids=ids, labels=ids).loss))
        texts = tuple(Text(name, item, "") for item in range(HELD_OUT))
        batches.append(Batch(texts, tuple(range(HELD_OUT)), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    vectors = recording.sentence_vectors(model, None, batches)
    measures = {rule: mr.analysis.alignment(vectors, names[0], rule=rule) for rule in ("mexa", "cosine")}
    if sparse:
        with mr.attach(model) as routed, routed.record(sequences=True) as recorder:
            for name, batch in zip(names, batches, strict=True):
                with recorder.labels(groups=name, items=range(HELD_OUT)):
                    model(**batch.inputs)
        measures["routing"] = mr.analysis.alignment(recorder.statistics(), names[0])
    found: dict[str, Any] = {"loss": losses}
    for name, measure in measures.items():
        found[name] = [float(measure.summary()[measure.groups.index(clone)]) for clone in names[1:]]
        found[f"{name}, rank correlation"] = spearman(found[name], [-loss for loss in losses[1:]])
    return found


def spearman(first: list[float], second: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(np.nan_to_num(spearmanr(first, second).statistic))  # 0 where all are alike


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: means over seeds."""
    lines = [
        "| model | measure | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | rank correlation with -loss |"
    ]
    lines.append("|---|---|" + "---|" * CLONES + "---|")
    for kind, seeds in results["models"].items():
        for measure in ("loss", "mexa", "cosine", "routing"):
            if measure not in seeds[0]:
                continue
            values = np.mean([seed[measure] for seed in seeds], axis=0)
            cells = [f"{value:.2f}" for value in values]
            row = cells if measure == "loss" else ["", *cells]
            ranks = [seed.get(f"{measure}, rank correlation") for seed in seeds]
            last = "" if measure == "loss" else f"{np.mean(ranks):.2f} ({', '.join(f'{rank:.1f}' for rank in ranks)})"
            title = {"loss": "loss", "mexa": "MEXA", "cosine": "cosine", "routing": "MEXA of routing"}[measure]
            lines.append(f"| {kind} | {title} | {' | '.join(row)} | {last} |")
    return "\n".join(lines)


FIRST, LAST = "<!-- clones: begin -->", "<!-- clones: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    add_outputs(parser)
    options = parser.parse_args()
    models = {
        kind: [one_seed(seed, options.steps, kind == "sparse") for seed in range(options.seeds)]
        for kind in ("dense", "sparse")
    }
    results = {"steps": options.steps, "models": models}
    write(options, results, table(results), FIRST, LAST)


if __name__ == "__main__":
    main()
