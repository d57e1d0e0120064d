"""What recording and steering cost a model that runs on the device: 16 layers of 64 experts, prefill and decode.

The model is small and its weights are random, so the host's share of a step is as large as it gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import moe_route as mr
from bench.cpu.recording import SIZES, WINDOW, ByHand, Decoding, decoder, race_in_hooks
from bench.device.place import LAUNCHED, REHEARSED, Place
from moe_route.bench.timing import Contender, Race, race

ALONE, RECORDED, STEERED, BOTH, BY_HAND = (
    "model alone",
    "moe-route records",
    "moe-route steers",
    "moe-route records and steers",
    "by hand in torch",
)
PEERS = dict.fromkeys((RECORDED, STEERED, BOTH, BY_HAND), ALONE)


@dataclass(frozen=True)
class Work:
    """Sizes of one measurement; `changes` are those of the model's configuration."""

    dtype: torch.dtype = torch.bfloat16
    batch: int = 8
    length: int = 512
    changes: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        sizes = SIZES | self.changes
        dtype = str(self.dtype).removeprefix("torch.")
        return f"qwen3_moe, {sizes['num_hidden_layers']} layers, {sizes['num_experts']} experts, {dtype}"


class Contexts:
    """What may be around a call: nothing, a recording, a plan, both, or hooks written by hand."""

    def __init__(self, decoding: Decoding):
        self.decoding, self.model = decoding, decoding.model
        self.by_hand = ByHand(decoding)

    @contextmanager
    def attached(self, record: bool, steer: bool) -> Iterator[None]:
        """Past the first step, which is counted otherwise than those that follow."""
        routed = mr.attach(self.model, verify=False)
        with ExitStack() as stack:
            stack.callback(routed.detach)
            if steer:  # four experts of each layer raised by half a standard deviation
                stack.enter_context(routed.steer(mr.Plan.activate([0, 1, 2, 3], range(len(routed.routers)))))
            if record:
                recorder = stack.enter_context(routed.record(groups=["text"]))
                stack.enter_context(recorder.labels(groups="text"))
            self.decoding.step(0)
            yield

    def around(self) -> dict[str, Callable[[], Any]]:
        return {
            ALONE: self.decoding.alone,
            RECORDED: lambda: self.attached(record=True, steer=False),
            STEERED: lambda: self.attached(record=False, steer=True),
            BOTH: lambda: self.attached(record=True, steer=True),
            BY_HAND: self.by_hand.recording,
        }


class Prefill:
    """One call on `batch` sequences of `length` new tokens."""

    def __init__(self, model: Any, work: Work):
        self.model = model
        shape = (8, work.batch, work.length)
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)

    def call(self, index: int) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(input_ids=self.tokens[index % 8], use_cache=False).logits


def measure(place: Place, work: Work, rounds: int) -> tuple[dict[str, Race], dict[str, tuple[float, int]]]:
    """Races over prefill and decode, by title; and what the hooks of a decode step take, with their number."""
    clock = place.clocks[LAUNCHED if LAUNCHED in place.clocks else REHEARSED]
    decoding = Decoding(decoder(work.dtype, place.device, **work.changes))
    around = Contexts(decoding).around()
    # a whole window of steps, so that one of them pays for counting all
    cases: dict[str, tuple[Contender, int]] = {
        f"{work.title}: decode, batch 1, a step": (decoding.step, WINDOW),
        f"{work.title}: prefill, {work.batch} x {work.length} tokens": (Prefill(decoding.model, work).call, 4),
    }
    out = {}
    for title, (call, burst) in cases.items():
        contenders = dict.fromkeys(around, call)
        out[title] = race(contenders, rounds=rounds, warmup=1, burst=burst, around=around, clock=clock)
    race_inside, hooks = race_in_hooks(decoding, {name: around[name] for name in PEERS}, 2)
    return out, {name: (race_inside.timing(name).median, hooks[name]) for name in PEERS}
