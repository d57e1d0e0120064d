"""Upcycling against its alternatives, on four synthetic language families whose rules conflict.

    python examples/neighbours/upcycling.py --out RESULTS.json --page docs/training.md     # three seeds, minutes
    python examples/neighbours/upcycling.py --steps 20 --seeds 1                           # a short form

A dense model is trained by this script. Then it is trained on in several ways, on the same batches: dense; upcycled
under the family plan (hybrid-k, k = 2); upcycled with plain top-k (k = 2); upcycled and routed by the label (k = 1).
Loss is measured on held-out sequences, without the plan but for the last. Families share 64 tokens. Each has its own
rule for the next token, given the last two: softmax(A[last] + B[one before] + C) with A, B and C at random. C is how
often a family uses each token, so it tells families apart; the second setting leaves it out. The entropy of the rules
is the loss that no model can beat.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from seeds import add_outputs, told, write
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import moe_route as mr
from moe_route.training import upcycle

FAMILIES, TOKENS, LENGTH, BATCH = 4, 64, 32, 32
HIDDEN, INTERMEDIATE, LAYERS = 48, 96, 2
RULE_SCALE = 1.5  # standard deviation of A and B
SETTINGS = {"families use tokens unequally often": 1.0, "families cannot be told by their tokens": 0.0}  # ... and of C


class Languages:
    """Sequences of the families."""

    def __init__(self, seed: int, use_scale: float) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.last, self.before = RULE_SCALE * torch.randn(2, FAMILIES, TOKENS, TOKENS, generator=self.generator)
        self.use = use_scale * torch.randn(FAMILIES, TOKENS, generator=self.generator)

    def batch(self, size: int = BATCH) -> tuple[Tensor, Tensor]:
        """Tokens [size, LENGTH] and the family of each sequence."""
        family = torch.arange(size) % FAMILIES
        tokens = torch.randint(TOKENS, (size, 2), generator=self.generator)
        for _ in range(LENGTH - 2):
            rules = self.rules(family, tokens)
            tokens = torch.cat([tokens, torch.multinomial(rules, 1, generator=self.generator)], 1)
        return tokens, family

    def rules(self, family: Tensor, tokens: Tensor) -> Tensor:
        """Probabilities of the next token."""
        logits = self.last[family, tokens[:, -1]] + self.before[family, tokens[:, -2]] + self.use[family]
        return torch.softmax(logits, -1)

    def entropy(self, tokens: Tensor, family: Tensor) -> float:
        """Mean surprise of the rules themselves at these tokens, in nats, where two tokens are known."""
        nats = [
            -self.rules(family, tokens[:, :end]).gather(1, tokens[:, end : end + 1]).log()
            for end in range(2, tokens.shape[1])
        ]
        return float(torch.cat(nats).mean())


def dense_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HIDDEN // 4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Nats per token, from the third on: the rules need two."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, 1:-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())


def train(model: Any, batches: list[tuple[Tensor, Tensor]], plan: mr.Plan | None = None) -> float:
    """Train on the batches, under a plan if there is one. Returns seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    model.train()
    start = time.perf_counter()

    def step(tokens: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
        schedule.step()

    if plan is None:
        for tokens, _ in batches:
            step(tokens)
    else:
        with mr.attach(model) as routed, routed.steer(plan):
            for tokens, family in batches:
                with routed.labels(groups=[str(int(each)) for each in family]):
                    step(tokens)
    return time.perf_counter() - start


@torch.no_grad()
def measure(model: Any, held_out: tuple[Tensor, Tensor], plan: mr.Plan | None = None) -> dict[str, float]:
    """Held-out loss, and for a sparse model the share of tokens that choose their own family's expert."""
    model.eval()
    tokens, family = held_out
    if not any("experts" in name for name, _ in model.named_parameters()):
        return {"loss": float(loss_of(model, tokens))}
    groups = [str(int(each)) for each in family]
    with mr.attach(model) as routed, routed.record() as recorder, routed.labels(groups=groups):
        if plan is None:
            loss = float(loss_of(model, tokens))
        else:
            with routed.steer(plan):
                loss = float(loss_of(model, tokens))
    statistics = recorder.statistics()
    counts, of_group = statistics.token_sum("counts"), statistics.tokens()
    own = [
        counts[index, :, int(group)] / of_group[index]
        for index, group in enumerate(statistics.groups)
        if group.isdigit()
    ]
    return {"loss": loss, "own": float(np.mean(own))}


def flops(layers: int, experts_run: int) -> float:
    """Multiplications per token in the matrices of a model whose last `layers` layers run `experts_run` experts."""
    attention = LAYERS * 4 * HIDDEN * HIDDEN
    dense = (LAYERS - layers) * 3 * HIDDEN * INTERMEDIATE
    router = layers * HIDDEN * FAMILIES
    return attention + dense + layers * experts_run * 3 * HIDDEN * INTERMEDIATE + router + HIDDEN * TOKENS


def one_seed(seed: int, steps: int, use_scale: float) -> dict[str, dict[str, float]]:
    """Every way of training on, from one dense model."""
    languages = Languages(seed, use_scale)
    first = [languages.batch() for _ in range(steps)]
    more = [languages.batch() for _ in range(2 * steps)]
    held_out = languages.batch(512)
    start = dense_model(seed)
    seconds = train(start, first)
    families = {str(family): family for family in range(FAMILIES)}
    results = {
        "rules": {"loss": languages.entropy(*held_out)},
        "dense, before": {**measure(start, held_out), "seconds": seconds, "tokens": 0, "flops": flops(0, 0)},
    }

    def again() -> Any:
        model = dense_model(seed)
        model.load_state_dict(start.state_dict())
        return model

    def add(name: str, make: Callable[[], tuple[Any, mr.Plan | None]], cost: float, count: int, label: bool) -> None:
        model, plan = make()
        seconds = train(model, more[:count], plan)
        found = measure(model, held_out, plan if label else None)
        results[name] = {**found, "seconds": seconds, "tokens": count * BATCH * LENGTH, "flops": cost}

    def sparse(plan: bool = True, **options: Any) -> Callable[[], tuple[Any, mr.Plan | None]]:
        def make() -> tuple[Any, mr.Plan | None]:
            made = upcycle(again(), families=families, layers=[LAYERS - 1], seed=seed, **options)
            return made.model, made.plan if plan else None

        return make

    two, one = flops(1, 2), flops(1, 1)
    add("dense", lambda: (again(), None), flops(0, 0), steps, False)
    add("dense, as many FLOPs as k = 2", lambda: (again(), None), flops(0, 0), round(steps * two / flops(0, 0)), False)
    add("hybrid-k, k = 2", sparse(), two, steps, False)
    add("plain top-k, k = 2", sparse(plan=False), two, steps, False)
    add("by label, k = 1", sparse(top_k=1, fixed_by_label=True), one, steps, True)
    return results


# Names of two ways, and what is expected of the first minus the second.
COMPARED = (
    ("by label, k = 1", "dense", "loss", "equal FLOPs"),
    ("hybrid-k, k = 2", "dense", "loss", "equal tokens"),
    ("hybrid-k, k = 2", "dense, as many FLOPs as k = 2", "loss", "equal FLOPs"),
    ("hybrid-k, k = 2", "plain top-k, k = 2", "loss", "equal tokens"),
    ("hybrid-k, k = 2", "plain top-k, k = 2", "own", "own expert at inference"),
)


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """The results of one setting as Markdown."""
    names = list(seeds[0])
    base = flops(0, 0)
    lines = ["| trained on as | loss | own expert | FLOPs per token | tokens | seconds |", "|---|---|---|---|---|---|"]
    for name in names:
        rows = [seed[name] for seed in seeds]
        loss = told([row["loss"] for row in rows], ".3f")
        own = f"{np.mean([row['own'] for row in rows]):.2f}" if "own" in rows[0] else ""
        cost = f"{rows[0]['flops'] / base:.2f}" if "flops" in rows[0] else ""
        tokens = f"{rows[0]['tokens']:,}" if "tokens" in rows[0] else ""
        seconds = f"{np.median([row['seconds'] for row in rows]):.0f}" if "seconds" in rows[0] else ""
        lines.append(f"| {name} | {loss} | {own} | {cost} | {tokens} | {seconds} |")
    lines += ["", "| difference | at | mean over seeds |", "|---|---|---|"]
    for one, other, what, at in COMPARED:
        values = [seed[one][what] - seed[other][what] for seed in seeds]
        lines.append(f"| {what}: {one} minus {other} | {at} | {told(values, '+.3f')} |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    return "\n\n".join(
        f"**{name[0].upper()}{name[1:]}**\n\n{table(seeds)}" for name, seeds in results["settings"].items()
    )


BEGIN, END = "<!-- upcycling: begin -->", "<!-- upcycling: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the dense model, and again afterwards")
    parser.add_argument("--seeds", type=int, default=3)
    add_outputs(parser)
    options = parser.parse_args()
    settings = {
        name: [one_seed(seed, options.steps, scale) for seed in range(options.seeds)]
        for name, scale in SETTINGS.items()
    }
    results = {"steps": options.steps, "settings": settings}
    write(options, results, tables(results), BEGIN, END)


if __name__ == "__main__":
    main()
