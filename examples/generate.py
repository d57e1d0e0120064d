"""Generate text with a stock model, and with moe-route attached to it: tokens per second of both, in turns.

    python examples/generate.py                                  # random weights, four layers as in Qwen3-30B-A3B
    python examples/generate.py --model Qwen/Qwen3-30B-A3B       # a model of your own, in bfloat16 on the CPU

The stock script is the `generate` below; moe-route adds the two marked lines. Needs `pip install 'moe-route[hf]'`.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import pairwise
from statistics import median
from typing import Any

# Before torch starts its threads: one that spins while it waits takes the core from others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import moe_route as mr  # the first line
from moe_route.routers import find_routers


def random_model(layers: int) -> Any:
    """`layers` of the 48 layers of Qwen3-30B-A3B, 1.2 GB each, with as small a part of its vocabulary."""
    config = Qwen3MoeConfig(
        vocab_size=151936 * layers // 48,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)


class Clock:
    """A streamer of `generate`: the moments at which the prompt and each token arrive."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to print."""


def seconds_per_token(model: Any, prompt: torch.Tensor, tokens: int) -> float:
    """Median time of a decode step, of `tokens` greedy steps after `prompt [1, S]`."""
    clock, new = Clock(), tokens + 1  # the first token comes with the prompt
    model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, streamer=clock)
    _, *moments = clock.moments
    return median(later - earlier for earlier, later in pairwise(moments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or folder of a model (default: random weights)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the random model (default: 4)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens to generate (default: 24)")
    parser.add_argument("--rounds", type=int, default=5, help="times that both take turns (default: 5)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).eval()
    else:
        model = random_model(options.layers).eval()
    routers = find_routers(model)
    prompt = torch.arange(1, 33)[None]
    plan = mr.Plan.activate({layer: [0, 1] for layer in range(len(routers))}, strength=0.5)

    times: dict[str, list[float]] = {"stock": [], "attached": [], "attached, recording and steering": []}
    for _ in range(options.rounds):
        times["stock"].append(seconds_per_token(model, prompt, options.tokens))
        routed = mr.attach(model, experts_implementation="moe_route")  # the second line
        times["attached"].append(seconds_per_token(model, prompt, options.tokens))
        with routed.record(groups=["text"]) as recorder, recorder.labels(groups="text"), routed.steer(plan):
            busy = seconds_per_token(model, prompt, options.tokens)
        times["attached, recording and steering"].append(busy)
        routed.detach()
    print(f"{len(routers)} MoE layers, {torch.get_num_threads()} threads, medians of {options.rounds} rounds")
    for name, each in times.items():
        ratio = median(stock / other for stock, other in zip(times["stock"], each, strict=True))
        print(f"{name:33} {1 / median(each):6.1f} tokens/s  {ratio:.2f} x")


if __name__ == "__main__":
    main()
