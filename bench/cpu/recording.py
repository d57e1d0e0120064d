"""What recording costs a model that decodes: 16 layers of 64 experts, batch 1, by moe-route and by hand in torch."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any, Protocol

import torch

import moe_route as mr
from moe_route.bench.results import Fact, Measured, Target, rows
from moe_route.bench.timing import Effort, Race, race
from moe_route.recording.counting import LAG
from moe_route.routers import find_routers

WINDOW = LAG + 1  # steps that the recorder counts together
PAST = 64  # tokens in the cache before every step
STEPS = 1024  # different tokens to step on


SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


def decoder(dtype: torch.dtype, device: torch.device | str = "cpu", **changes: int) -> torch.nn.Module:
    """A random qwen3_moe: hidden size 512, 16 layers, 64 experts of 256, top-8; 0.4 G parameters."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = {**SIZES, **changes}
    config = Qwen3MoeConfig(**options, norm_topk_prob=True, tie_word_embeddings=True, dtype=dtype)
    model: torch.nn.Module = Qwen3MoeForCausalLM(config).eval()
    return model.to(device=device, dtype=dtype)


class Decoding:
    """One decode step after `PAST` tokens of `batch` sequences, on new random tokens each time."""

    def __init__(self, model: Any, batch: int = 1):
        from transformers import DynamicCache

        self.model = model
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, model.config.vocab_size, (PAST + STEPS, batch), generator=generator).to(model.device)
        self.tokens = ids[PAST:, :, None]
        self.turn = 0
        self.cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=ids[:PAST].T, past_key_values=self.cache, use_cache=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nothing but the step before, which the recorded steps have too."""
        self.step(0)
        yield

    def step(self, _: int, **arguments: Any) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(**self.inputs(), **arguments).logits
        self.cache.crop(-1)
        return logits

    def inputs(self) -> dict[str, Any]:
        """Arguments of the next step; `cache.crop(-1)` takes it back."""
        token = self.tokens[self.turn % STEPS]
        self.turn += 1
        return {"input_ids": token, "past_key_values": self.cache, "use_cache": True}


class Stepping(Protocol):
    """A model, and calls of it."""

    @property
    def model(self) -> Any: ...
    @property
    def step(self) -> Callable[[int], object]: ...


class ByHand:
    """Counts, mass of the scores, weight of the chosen and entropy, as a careful user of torch would write them."""

    def __init__(self, decoding: Stepping):
        self.decoding, model = decoding, decoding.model
        self.routers = [router.module for router in find_routers(model)]
        experts = find_routers(model)[0].num_experts
        self.counts = torch.zeros(len(self.routers), experts, dtype=torch.int64, device=model.device)
        self.mass, self.weight = torch.zeros(2, len(self.routers), experts, dtype=torch.float64, device=model.device)
        self.entropy = torch.zeros(len(self.routers), dtype=torch.float64, device=model.device)

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = [r.register_forward_hook(self._hook(layer)) for layer, r in enumerate(self.routers)]
        try:
            self.decoding.step(0)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
            logits, weights, ids = output
            scores = torch.softmax(logits.float(), dim=-1)
            self.counts[layer] += torch.bincount(ids.flatten(), minlength=self.counts.shape[1])
            self.mass[layer] += scores.sum(0)
            self.weight[layer].index_add_(0, ids.flatten(), weights.flatten().double())
            self.entropy[layer] -= torch.special.xlogy(scores, scores).sum()

        return hook


@contextmanager
def empty_hooks(decoding: Decoding) -> Iterator[None]:
    """A hook on every router that does nothing: what any recorder pays."""
    routers = find_routers(decoding.model)
    handles = [router.module.register_forward_hook(lambda *_: None) for router in routers]
    try:
        decoding.step(0)
        yield
    finally:
        for handle in handles:
            handle.remove()


class HookClock:
    """Exact time inside hooks: wraps every forward hook that was added to the model since the clock was made."""

    def __init__(self, model: torch.nn.Module):
        self.tables = [
            table for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self.before = [set(table) for table in self.tables]
        self.wrapped: list[tuple[Any, int, Callable[..., object]]] = []
        self.seconds = 0.0

    def wrap(self) -> int:
        """Wrap what is new; how many hooks that was. Call `unwrap` before whoever installed them removes them."""
        new = [
            (table, key) for table, old in zip(self.tables, self.before, strict=True) for key in table if key not in old
        ]
        for table, key in new:
            self.wrapped.append((table, key, table[key]))
            table[key] = self._timed(table[key])
        return len(new)

    def unwrap(self) -> None:
        """Put the hooks back: `detach` knows its own, and would leave the wrapped ones on the model."""
        for table, key, hook in self.wrapped:
            table[key] = hook
        self.wrapped.clear()

    def _timed(self, hook: Callable[..., object]) -> Callable[..., object]:
        @wraps(hook)
        def timed(*args: object, **kwargs: object) -> object:
            start = time.perf_counter()
            result = hook(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        return timed


@contextmanager
def recorded(decoding: Decoding, **options: Any) -> Iterator[None]:
    """Attached and recording every metric and the entropy of one labeled sequence, past its first step."""
    routed = mr.attach(decoding.model, verify=False)
    try:
        with routed.record(groups=["text"], **options) as recorder, recorder.labels(groups="text"):
            decoding.step(0)
            yield
    finally:
        routed.detach()


Around = Callable[[], AbstractContextManager[None]]


def race_in_hooks(decoding: Decoding, recordings: Mapping[str, Around], windows: int) -> tuple[Race, dict[str, int]]:
    """Time per step inside the hooks that each recording adds, in turns of a window; and how many hooks that are.

    Steps are counted together in windows, so a step's time is the mean over a window. The first window of a turn, which
    makes what later ones find there, is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in recordings}
    hooks: dict[str, int] = {}
    order = random.Random(0)
    for _ in range(windows):
        for name in order.sample(list(recordings), len(recordings)):
            clock = HookClock(decoding.model)
            with recordings[name]():
                hooks[name] = clock.wrap()
                for _ in range(2):
                    clock.seconds = 0.0
                    for step in range(WINDOW):
                        decoding.step(step)
                seconds[name].append(clock.seconds / WINDOW)
                clock.unwrap()
    return Race(seconds), hooks


ALONE, OURS, BY_HAND, IDLE = "model alone", "moe-route", "by hand in torch", "hooks that do nothing"
STEP, INSIDE = "Recording while decoding", "Time inside the hooks of a decode step"
SHARE, OF_BY_HAND = 0.004, 0.12  # goals: of a decode step, and of the same statistics by hand


def measure(effort: Effort) -> Measured:
    """Decode steps of the model alone, recorded by moe-route and by hand; and the exact time inside the hooks."""
    measured = Measured()
    for dtype in (torch.float32, torch.bfloat16):
        measured += measure_decoding(dtype, effort)
    return measured


def layers(effort: Effort) -> int:
    return 2 if effort.quick else SIZES["num_hidden_layers"]


def windows(effort: Effort) -> int:
    """Windows of steps that are timed in the place of as many rounds."""
    return max(3, effort.rounds // 10)


def measure_decoding(dtype: torch.dtype, effort: Effort) -> Measured:
    name = str(dtype).removeprefix("torch.")
    case = f"qwen3_moe, {layers(effort)} layers, {SIZES['num_experts']} experts, batch 1, {name}"
    decoding = Decoding(decoder(dtype, num_hidden_layers=layers(effort)))
    recordings: dict[str, Around] = {OURS: lambda: recorded(decoding), BY_HAND: ByHand(decoding).recording}
    around = {ALONE: decoding.alone, **recordings}
    steps = race(dict.fromkeys(around, decoding.step), rounds=effort.rounds, around=around)
    inside, hooks = race_in_hooks(decoding, {IDLE: lambda: empty_hooks(decoding), **recordings}, windows(effort))
    shares = {name: inside.timing(name).median / steps.timing(ALONE).median for name in recordings}
    facts = []
    for name in recordings:
        what = f"{name}: time inside its {hooks[name]} hooks"
        facts.append(Fact(STEP, case, what, inside.timing(name).median * 1e6, "us a step"))
        facts.append(Fact(STEP, case, f"{name}: that as a share of the model's step", 100 * shares[name], "%"))
    of_a_step = f"{shares[OURS]:.2%}"
    of_by_hand = 1 / inside.ratio(BY_HAND, OURS)
    what = f"{case}: time inside the recording hooks"
    targets = [
        Target(what, f"<= {SHARE:.1%} of a decode step", of_a_step, shares[OURS] <= SHARE),
        Target(what, f"<= {OF_BY_HAND} of that by hand", f"{of_by_hand:.2f}", of_by_hand <= OF_BY_HAND),
    ]
    measured = Measured(facts=facts, targets=targets)
    measured.rows += rows(STEP, case, steps, floors=dict.fromkeys(recordings, ALONE), others=(BY_HAND,))
    floors = dict.fromkeys(recordings, IDLE)
    measured.rows += rows(INSIDE, case, inside, peers={OURS: BY_HAND}, floors=floors, others=(BY_HAND,))
    return measured


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "special_tokens=[...]": {"special_tokens": list(range(16))},
    "trace=True": {"trace": True},
    "consistency=1000": {"consistency": 1000},
    "consistency=True": {"consistency": True},
    "pairs=True": {"pairs": True},
    "hidden=True": {"hidden": True},
}


def prefill_seconds(model: Any, ids: torch.Tensor, options: dict[str, Any] | None) -> float:
    """Time of one call on ``ids [B, S]``, with its label block and the end of its sequences; None: not attached."""
    if options is None:
        start = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        return time.perf_counter() - start
    with mr.attach(model, verify=False) as routed, routed.record(groups=["text"], **options) as recorder:
        start = time.perf_counter()
        with recorder.labels(groups="text", items=range(len(ids))), torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        return time.perf_counter() - start


def measure_options(effort: Effort) -> Measured:
    """What each option of `record` adds to a prefill, and to the time inside the hooks of a decode step."""
    length = 512
    model = decoder(torch.float32, num_hidden_layers=layers(effort))
    decoding = Decoding(model)
    ids = torch.randint(0, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(2))
    kinds: dict[str, dict[str, Any] | None] = {ALONE: None, **OPTIONS}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    order = random.Random(0)
    for number in range(-1, windows(effort)):
        for name in order.sample(list(kinds), len(kinds)):
            took = prefill_seconds(model, ids, kinds[name])
            if number >= 0:  # the first one warms up
                seconds[name].append(took)
    prefill = f"prefill of {length} tokens, {layers(effort)} layers, float32"
    measured = Measured(rows("Options of record", prefill, Race(seconds), floors=dict.fromkeys(OPTIONS, ALONE)))
    recordings = {name: partial(recorded, decoding, **options) for name, options in OPTIONS.items()}
    inside, _ = race_in_hooks(decoding, recordings, windows(effort))
    plain = next(iter(OPTIONS))
    floors = {name: plain for name in OPTIONS if name != plain}
    decode = f"time inside the hooks of a decode step, {layers(effort)} layers, float32"
    measured.rows += rows("Options of record", decode, inside, floors=floors)
    return measured
