"""What the plug-in adds to stock vLLM: whole steps of two engines of one process, in turns.

    python -m bench.serving    # in the environment of `make test-vllm`, with its variables; writes results/serving.json

A model of 12 layers, 32 experts and top-4 with random weights (154 million parameters, bfloat16), eager. One engine is
stock, the other has moe-route; a step of the one follows a step of the other, and ratios are taken inside such a pair.
Where two engines lie in the memory of their process moves all its ratios by 1 %, so there are several processes, and
every other one makes the engine with moe-route first. Processor time of the whole process decides, and time on the wall
stands beside it, which a neighbor who takes a core lengthens. The median of all pairs has an interval from resampling
the processes, and the pairs inside each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

import moe_route as mr
from bench import RESULTS
from moe_route.bench.results import BenchmarkResults, Fact, Measured, Target, machine, rows
from moe_route.bench.timing import Contender, Race, race

NAME = "serving"
SECTION, WALL = "Serving", "Serving, wall"
STOCK, OURS = "stock vLLM", "moe-route"
LAYERS = 12
MODES = ("idle", "record", "steer and record")
WANTED = {
    ("idle", "decode of 32"): 0.5,
    ("record", "decode of 32"): 1.5,
    ("record", "decode of 1"): 3.0,
    ("steer and record", "decode of 32"): 2.5,
}
"""Percent of processor time that a mode may add to a step."""
TOLERANCE = 0.2
PREFILL_TOKENS, PROMPT_TOKENS = 2048, 256
PROCESSES = 16
ROUNDS = {"prefill": 2, "decode of 32": 40, "decode of 1": 40}
"""Pairs of steps in each process."""
Timed = dict[tuple[str, str], tuple[Race, Race]]
"""Processor time, and time on the wall, of the pairs of a mode and case."""


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
        max_model_len=1024,
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


class BothTimes:
    """Processor time of all threads of the process; `wall` has the seconds on the wall of the same calls."""

    name = "processor time of the process"

    def __init__(self) -> None:
        self.wall: list[list[float]] = []

    def timer(self, contender: Contender) -> Callable[[range], float]:
        wall: list[float] = []
        self.wall.append(wall)

        def timed(turns: range) -> float:
            start, began = time.process_time(), time.perf_counter()
            for each in turns:
                contender(each)
            took = time.process_time() - start
            wall.append(time.perf_counter() - began)
            return took

        return timed


def in_turns(stock: Contender, ours: Contender, rounds: int, warmup: int) -> tuple[Race, Race]:
    """Processor time, and time on the wall, of the same pairs."""
    clock = BothTimes()
    found = race({STOCK: stock, OURS: ours}, rounds=rounds, warmup=warmup, clock=clock)
    return found, Race({name: wall[warmup:] for name, wall in zip(found.seconds, clock.wall, strict=True)})


def decode(stock: Requests, ours: Requests, count: int, rounds: int) -> tuple[Race, Race]:
    """Decode steps of `count` requests each, whose prompts have run."""
    for requests in (stock, ours):
        requests.add(count, PROMPT_TOKENS, rounds + 30)
        for _ in range(count * PROMPT_TOKENS // PREFILL_TOKENS + 2):
            requests.step()
    found = in_turns(stock.step, ours.step, rounds, warmup=10)
    for requests in (stock, ours):
        requests.end()
    return found


def prefill(stock: Requests, ours: Requests, rounds: int) -> tuple[Race, Race]:
    """Steps of 2048 prompt tokens, of requests that end with them."""

    def run(requests: Requests) -> Callable[[int], None]:
        def one(_: int) -> None:
            requests.add(PREFILL_TOKENS // PROMPT_TOKENS, PROMPT_TOKENS, 1)
            requests.end()

        return one

    return in_turns(run(stock), run(ours), rounds, warmup=2)


def added(runs: Sequence[Race]) -> tuple[float, float, float]:
    """Percent that ours adds to a step: the median over all pairs, and a 95 % interval of it by bootstrap.

    ``runs``: one of each process.
    """
    ratios = [np.divide(run.seconds[OURS], run.seconds[STOCK]) for run in runs]
    draw = np.random.default_rng(0)

    def drawn() -> float:
        processes = draw.integers(0, len(ratios), len(ratios))
        return float(np.median(np.concatenate([draw.choice(ratios[one], len(ratios[one])) for one in processes])))

    medians = [drawn() for _ in range(4000)]
    median, low, high = np.median(np.concatenate(ratios)), *np.quantile(medians, [0.025, 0.975])
    return float(median - 1) * 100, float(low - 1) * 100, float(high - 1) * 100


def together(runs: Sequence[Race]) -> Race:
    """The pairs of all processes."""
    return Race({name: [each for run in runs for each in run.seconds[name]] for name in (STOCK, OURS)})


def target(what: str, wanted: float, median: float, low: float, high: float) -> Target:
    """Met where the whole interval lies below `wanted` and `TOLERANCE`; a cost below 0 is noise and meets nothing."""
    noise = ", below 0: noise" if median < 0 else ""
    measured = f"{median:.1f} % [{low:.1f}, {high:.1f}]{noise}"
    return Target(what, f"<= {wanted} %", measured, median >= 0 and high < wanted + TOLERANCE)


def measure(folder: str, ours_first: bool) -> Timed:
    """Every mode of an engine with moe-route beside the stock engine, in this process."""
    made = {}
    for with_ours in (ours_first, not ours_first):
        options = {"additional_config": {"moe_route": {"groups": ["a", "b"]}}} if with_ours else {}
        made[with_ours] = Requests(engine(folder, **options), ours=with_ours)
    stock, ours = made[False], made[True]
    found: Timed = {}
    for mode in MODES:
        if mode.startswith("steer"):
            plan = mr.Plan.activate({layer: [1, 2] for layer in range(LAYERS)}, strength=0.01)
            mr.vllm.steer(ours.llm, plan)
        if mode != "idle":
            mr.vllm.record(ours.llm)
        for case, rounds in ROUNDS.items():
            if case == "prefill":
                found[mode, case] = prefill(stock, ours, rounds)
            else:
                found[mode, case] = decode(stock, ours, int(case.split()[-1]), rounds)
        if mode != "idle":
            statistics = mr.vllm.statistics(ours.llm)
            assert statistics.tokens().sum() > 0  # it did count
    return found


def measured_by_processes(folder: str) -> list[Timed]:
    """``measure`` in one new process after the other."""
    spawn, found = multiprocessing.get_context("spawn"), []
    for number in range(PROCESSES):
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            found.append(process.submit(measure, folder, number % 2 == 1).result())
    return found


def summary(found: Sequence[Timed]) -> Measured:
    """The rows, facts and targets of what all processes measured."""
    made = Measured()
    for mode, case in found[0]:
        named = f"{mode}, {case}"
        runs, walls = zip(*(one[mode, case] for one in found), strict=True)
        for section, of_section in ((SECTION, runs), (WALL, walls)):
            made.rows += rows(section, named, together(of_section), peers={OURS: STOCK})
        median, low, high = added(runs)
        for what, value in (("added", median), ("lower end", low), ("upper end", high)):
            made.facts.append(Fact(SECTION, named, what, value, "%"))
        print(f"{named}: {median:+.1f} % [{low:.1f}, {high:.1f}], wall {added(walls)[0]:+.1f} %", flush=True)
        if (mode, case) in WANTED:
            wanted = WANTED[mode, case]
            made.targets.append(target(f"{named}: added to a step", wanted, median, low, high))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import vllm

    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        measured = summary(measured_by_processes(folder))
    about = {**machine("python -m bench.serving"), "vllm": vllm.__version__}
    print(BenchmarkResults(about, measured).save(options.out))


if __name__ == "__main__":
    main()
