"""What the plug-in adds to a step of stock vLLM: token table and operator, timed inside one run beside the whole.

    python -m bench.serving        in the environment of `make test-vllm`, with its variables

A model of 12 layers, 32 experts and top-4 with random weights (154 million parameters, bfloat16), eager. Two runs of
separate engines differ by 10 to 25 % on a shared machine, so the parts are timed inside a run instead.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import moe_route as mr

LAYERS = 12
WORKLOADS = {"prefill of 2048": (24, 400, 1), "decode of 32": (32, 16, 48), "decode of 1": (1, 16, 64)}
"""Name -> requests, tokens of a prompt, new tokens."""
REPEATS = 3


def save_model(folder: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


class Clock:
    """Adds up the seconds of the calls of a function."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            answer = function(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return answer

        return call


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    from moe_route.integrations.vllm import worker

    table, operators = Clock(), Clock()
    worker.Session._laid_out = table.timed(worker.Session._laid_out)  # type: ignore[method-assign]
    torch.ops.moe_route_vllm.__dict__["reroute"] = operators.timed(torch.ops.moe_route_vllm.reroute)  # dispatch too
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        llm = vllm.LLM(
            model=folder,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
            additional_config={"moe_route": {"groups": ["a", "b"]}},
        )
        print(
            "| | a step (ms) | token table (us) | operator, all layers (us) | share of the step |",
            "|---" * 5 + "|",
            sep="\n",
        )
        for mode in ("record", "steer and record"):
            if mode != "record":
                mr.vllm.steer(llm, mr.Plan.activate({layer: [1, 2] for layer in range(LAYERS)}, strength=0.01))
            mr.vllm.record(llm)
            for name, workload in WORKLOADS.items():
                measure(llm, f"{mode}, {name}", workload, table, operators)


def measure(llm: Any, name: str, workload: tuple[int, int, int], table: Clock, operators: Clock) -> None:
    import vllm

    count, length, new = workload
    generator = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": generator.integers(10, 4000, length).tolist()} for _ in range(count)]
    params = [
        vllm.SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            extra_args={"moe_route_group": "ab"[i % 2]},
        )
        for i in range(count)
    ]
    rows = []
    for repeat in range(REPEATS + 1):
        table.seconds = operators.seconds = 0.0
        table.calls = 0
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        whole = time.perf_counter() - start
        if repeat:  # the first one warms up
            steps = table.calls
            rows.append((whole / steps, table.seconds / steps, operators.seconds / steps))
    step, tables, gates = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"| {name} | {step * 1e3:.1f} | {tables * 1e6:.0f} | {gates * 1e6:.0f} | {(tables + gates) / step:.1%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
