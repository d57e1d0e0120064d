"""What recording costs a model that decodes: 16 layers of 64 experts, batch 1, by moe-route and by hand in torch.

`python -m moe_route.bench.recording` prints what each option of `record` adds to a prefill and to a decode step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

import moe_route as mr
from moe_route.recording.recorder import LAG

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
            logits = self.model(**self.inputs(), **arguments).logits
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
        self.routers = [router.module for router in mr.find_routers(model)]
        experts = mr.find_routers(model)[0].num_experts
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
    routers = mr.find_routers(decoding.model)
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
        self.seconds = 0.0

    def wrap(self) -> int:
        """Wrap what is new; how many hooks that was."""
        new = [
            (table, key) for table, old in zip(self.tables, self.before, strict=True) for key in table if key not in old
        ]
        for table, key in new:
            table[key] = self._timed(table[key])
        return len(new)

    def _timed(self, hook: Callable[..., object]) -> Callable[..., object]:
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


def seconds_in_hooks(decoding: Decoding, recording: Callable[[], Any], steps: int) -> tuple[float, int]:
    """Time per step inside the hooks that `recording()` adds, and how many hooks that are.

    Steps are counted together in windows, so a step's time is the mean over a window; of the windows, the median.
    """
    clock = HookClock(decoding.model)
    took = []
    with recording():
        hooks = clock.wrap()
        for turn in range(-(-steps // WINDOW) + 1):
            clock.seconds = 0.0
            for step in range(WINDOW):
                decoding.step(turn * WINDOW + step)
            took.append(clock.seconds / WINDOW)
    return statistics.median(took[1:]), hooks


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


def cost_of_options(
    rounds: int, length: int, steps: int = 96, dtype: torch.dtype = torch.float32
) -> list[tuple[str, float, float]]:
    """What each option costs: (name, prefill, decode).

    ``prefill`` is the median ratio of a call on ``length`` tokens to the model alone, taken in turns. ``decode`` is the
    time inside hooks as a share of a step, which is exact where ratios of whole steps are noise.
    """
    model = decoder(dtype)
    decoding = Decoding(model)
    ids = torch.randint(0, SIZES["vocab_size"], (1, length), generator=torch.Generator().manual_seed(2))
    kinds: dict[str, dict[str, Any] | None] = {"alone": None, **OPTIONS}
    prefill: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, options in kinds.items():
            prefill[name].append(prefill_seconds(model, ids, options))
    step = step_seconds(decoding, steps)

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(prefill[name], prefill["alone"], strict=True))

    def share(options: dict[str, Any]) -> float:
        return seconds_in_hooks(decoding, lambda: recorded(decoding, **options), steps)[0] / step

    return [(name, ratio(name), share(options)) for name, options in OPTIONS.items()]


def step_seconds(decoding: Decoding, steps: int) -> float:
    """Median time of a step of the model alone."""
    took = []
    for step in range(steps):
        start = time.perf_counter()
        decoding.step(step)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


if __name__ == "__main__":
    for option, at_prefill, at_decode in cost_of_options(rounds=5, length=512):
        print(f"{option:24} prefill of 512 tokens x {at_prefill:.3f}   hooks at decode {at_decode:.2%} of a step")
