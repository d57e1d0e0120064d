"""What the plug-in adds to stock vLLM: whole steps of two engines of one process, in turns.

    python -m bench.serving    # in the environment of `make test-vllm`, with its variables; writes results/serving.json

A model of 12 layers, 32 experts and top-4 with random weights (154 million parameters, bfloat16), eager. One engine is
stock, the other has moe-route; a step of the one follows a step of the other, and ratios are taken inside such a pair.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_route as mr
from bench import RESULTS
from moe_route.bench.results import BenchmarkResults, Measured, Target, machine, rows
from moe_route.bench.timing import Race, WallTime, race

NAME = "serving"
SECTION = "Serving"
LAYERS = 12
MODES = ("idle", "record", "steer and record")
WANTED = {("record", "prefill"): 1, ("record", "decode of 32"): 2, ("steer and record", "decode of 32"): 3}
"""Percent that a mode may add to a step."""
PREFILL_TOKENS, PROMPTS = 2048, 8
ROUNDS = {"prefill": 15, "decode of 32": 100, "decode of 1": 200}


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


def engine(folder: str, **options: Any) -> Any:
    import vllm

    return vllm.LLM(
        model=folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=32,
        max_num_batched_tokens=PREFILL_TOKENS,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **options,
    )


class Requests:
    """Requests of one engine: the same prompts for every engine."""

    def __init__(self, llm: Any, *, ours: bool):
        self.llm, self.engine, self._ours, self._number = llm, llm.llm_engine, ours, 0

    def add(self, count: int, length: int, new: int) -> None:
        import vllm

        draw = np.random.default_rng(0)
        for i in range(count):
            self._number += 1
            params = vllm.SamplingParams(
                temperature=0,
                max_tokens=new,
                ignore_eos=True,
                detokenize=False,
                extra_args={"moe_route_group": "ab"[i % 2]} if self._ours else None,
            )
            prompt = {"prompt_token_ids": draw.integers(10, 4000, length).tolist()}
            self.engine.add_request(str(self._number), prompt, params)

    def step(self, _: int = 0) -> None:
        self.engine.step()

    def end(self) -> None:
        while self.engine.has_unfinished_requests():
            self.engine.step()


def decode(stock: Requests, ours: Requests, count: int, rounds: int) -> Race:
    """Decode steps of `count` requests each."""
    both = {"stock vLLM": stock, "moe-route": ours}
    for requests in both.values():
        requests.add(count, 16, rounds + 20)
        requests.step()
    found = race({name: requests.step for name, requests in both.items()}, rounds=rounds, warmup=10, clock=WallTime())
    for requests in both.values():
        requests.end()
    return found


def prefill(stock: Requests, ours: Requests, rounds: int) -> Race:
    """Steps of 2048 prompt tokens, of requests that end with them."""

    def run(requests: Requests) -> Callable[[int], None]:
        def one(_: int) -> None:
            requests.add(PROMPTS, PREFILL_TOKENS // PROMPTS, 1)
            requests.end()

        return one

    return race({"stock vLLM": run(stock), "moe-route": run(ours)}, rounds=rounds, warmup=2, clock=WallTime())


def measure(folder: str) -> Measured:
    """Every mode beside the stock engine, with the targets."""
    stock = Requests(engine(folder), ours=False)
    ours = Requests(engine(folder, additional_config={"moe_route": {"groups": ["a", "b"]}}), ours=True)
    found = Measured()
    for mode in MODES:
        if mode.startswith("steer"):
            plan = mr.Plan.activate({layer: [1, 2] for layer in range(LAYERS)}, strength=0.01)
            mr.vllm.steer(ours.llm, plan)
        if mode != "idle":
            mr.vllm.record(ours.llm)
        for case, rounds in ROUNDS.items():
            if case == "prefill":
                run = prefill(stock, ours, rounds)
            else:
                run = decode(stock, ours, int(case.split()[-1]), rounds)
            found.rows += rows(SECTION, f"{mode}, {case}", run, peers={"moe-route": "stock vLLM"})
            added = (run.ratio("moe-route", "stock vLLM") - 1) * 100
            print(f"{mode}, {case}: {added:+.1f} %", flush=True)
            if (mode, case) in WANTED:
                wanted = WANTED[mode, case]
                found.targets.append(
                    Target(f"{mode}, {case}: added to a step", f"<= {wanted} %", f"{added:.1f} %", added <= wanted)
                )
        if mode != "idle":
            statistics = mr.vllm.statistics(ours.llm)
            assert statistics.tokens().sum() > 0  # it did count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        measured = measure(folder)
        gc.collect()
    about = {**machine("python -m bench.serving"), "vllm": vllm.__version__}
    print(BenchmarkResults(about, measured).save(options.out))


if __name__ == "__main__":
    main()
