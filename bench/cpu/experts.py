"""The experts of one MoE layer, run by the implementations of transformers and by ours, under each one's name.

The modules are transformers' own classes in the sizes of public models, with random weights; on the CPU or a device.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from threading import Barrier
from typing import Any

import torch

from bench.cpu import vllm_experts
from moe_route.bench.results import Fact, Measured, Target, rows
from moe_route.bench.timing import Contender, Effort, Pool, Race, race
from moe_route.experts import packing, register_experts
from moe_route.experts.packing import PackedWeights
from moe_route.ops import expert_paths as paths

log = logging.getLogger(__name__)

SECTION = "Experts of one layer"
EAGER, PEER, BATCHED, OURS = "eager", "grouped_mm", "batched_mm", "moe_route"
IMPLEMENTATIONS = (EAGER, PEER, BATCHED, OURS)
# Ours by one of its paths, whatever the number of slots: where they cross is what `most_slots` should be.
PATHS = {f"{OURS}, {path}": path for path in (paths.STREAMED, paths.ACTIVATED, paths.GROUPED)}
OURS_PACKED = f"{OURS}, pack=True"
READ, DENSE = "read the weights of the experts that were hit", "as many multiplications in two dense products"
DTYPES = (torch.bfloat16, torch.float32)
WANTED = {
    "Qwen3-30B-A3B": {1: 3.3, 16: 2.6, 64: 2.0, 256: 1.5, 2048: 1.15},
    "Mixtral-8x7B": {1: 1.95, 16: 1.6, 64: 1.2, 256: 1.0},
}
"""Model and tokens of a call -> how many times as fast as `grouped_mm` we want to be in place, in bfloat16."""
OF_READING = 0.93  # of one token in place: the part of the floor that is wanted
# Tokens of a call -> the part of the rounds that is spent on it.
TOKENS = {1: 2, 16: 4, 64: 5, 256: 5, 2048: 10}


@dataclass(frozen=True)
class Layer:
    """The experts of a model's MoE layer: `experts` of them, from `hidden` to `width` and back, `k` for a token."""

    model: str
    type: str  # the model's type in transformers
    hidden: int
    width: int
    experts: int
    k: int

    def title(self, tokens: int, dtype: torch.dtype) -> str:
        sizes = f"H={self.hidden} I={self.width} E={self.experts} k={self.k}"
        return f"{self.model}: {sizes} T={tokens} {str(dtype).removeprefix('torch.')}"

    def expert_bytes(self, dtype: torch.dtype) -> int:
        """Gate, up and down of one expert."""
        return 3 * self.hidden * self.width * dtype.itemsize

    def bytes(self, dtype: torch.dtype) -> int:
        return self.experts * self.expert_bytes(dtype)

    def operations(self, tokens: int) -> int:
        """Multiplications and additions of a call."""
        return 2 * tokens * self.k * 3 * self.hidden * self.width


LAYERS = (
    Layer("Qwen3-30B-A3B", "qwen3_moe", 2048, 768, 128, 8),
    Layer("OLMoE-1B-7B", "olmoe", 2048, 1024, 64, 8),
    Layer("Mixtral-8x7B", "mixtral", 4096, 14336, 8, 2),
    Layer("DeepSeek-V2-Lite", "deepseek_v2", 2048, 1408, 64, 6),
    Layer("gpt-oss-20b", "gpt_oss", 2880, 2880, 32, 4),
)
# What takes seconds, not minutes.
QUICK_LAYERS = LAYERS[1:2]
QUICK_TOKENS = {1: 1, 16: 1, 64: 1}


@dataclass(frozen=True)
class Limits:
    """What a machine can be asked for: bytes of weights and their copies, operations of one call."""

    bytes: int
    operations: float

    def too_much(self, layer: Layer, tokens: int, dtype: torch.dtype) -> str | None:
        """Why a case is left out, or None."""
        if layer.bytes(dtype) > self.bytes:
            return f"its weights take {layer.bytes(dtype) / 1e9:.3g} GB of {self.bytes / 1e9:.3g}"
        if layer.operations(tokens) > self.operations:
            return f"a call takes {layer.operations(tokens) / 1e9:.3g} GFLOP, more than {self.operations / 1e9:.3g}"
        return None

    def implementations(self, layer: Layer, tokens: int, dtype: torch.dtype) -> tuple[str, ...]:
        """Those that fit: `batched_mm` copies an expert's weights for every slot."""
        copies = tokens * layer.k * layer.expert_bytes(dtype)
        batched = layer.bytes(dtype) + copies <= self.bytes
        return tuple(name for name in IMPLEMENTATIONS if batched or name != BATCHED)


ON_CPU = Limits(bytes=4 << 30, operations=250e9)


def make(layer: Layer, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A model's experts as transformers makes them, with normal weights."""
    from transformers import CONFIG_MAPPING

    sizes: dict[str, Any] = {
        "hidden_size": layer.hidden,
        "intermediate_size": layer.width,
        "moe_intermediate_size": layer.width,
        "num_experts": layer.experts,
        "num_local_experts": layer.experts,
    }
    config = CONFIG_MAPPING[layer.type](**sizes)
    modeling = import_module(f"transformers.models.{layer.type}.modeling_{layer.type}")
    kind = getattr(modeling, "".join(word.capitalize() for word in layer.type.split("_")) + "Experts")
    with torch.device("meta"):
        module = kind(config)
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(5)
    for parameter in module.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return module


class RoutedModel:
    """Calls of one layer's experts: hidden states and choices in turn, and every way to run them."""

    def __init__(self, layer: Layer, module: Any, tokens: int, *, inputs: int = 16):
        self.layer, self.module, self.tokens = layer, module, tokens
        weight = module.down_proj
        self.dtype, device = weight.dtype, weight.device
        self.hidden = Pool((tokens, layer.hidden), self.dtype, most=inputs, device=device)
        scores = Pool((tokens, layer.experts), torch.float32, most=inputs, seed=1, device=device)
        best = [scores[index].topk(layer.k) for index in range(len(self.hidden))]
        self.ids = [each.indices for each in best]
        self.weights = [torch.softmax(each.values, dim=-1).to(self.dtype) for each in best]
        self.hit = [ids.unique().tolist() for ids in self.ids]
        generator = torch.Generator(device).manual_seed(2)
        slots = tokens * layer.k
        self.dense_rows = [
            torch.randn(slots, size, generator=generator, device=device).to(self.dtype)
            for size in (layer.hidden, layer.width)
        ]

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def title(self) -> str:
        return self.layer.title(self.tokens, self.dtype)

    def implementation(self, name: str) -> Contender:
        """The module with the same weights, set to one implementation."""
        module = copy.copy(self.module)
        module.config = copy.copy(module.config)
        module.config._experts_implementation = name

        def contender(index: int) -> torch.Tensor:
            turn = index % len(self)
            return module(self.hidden[turn], self.ids[turn], self.weights[turn])

        return contender

    def packed(self, weights: PackedWeights) -> Contender:
        """Ours, with a packed copy of the weights."""
        module = copy.copy(self.module)
        module.config = copy.copy(module.config)
        module.config._experts_implementation = OURS
        setattr(module, packing.ATTRIBUTE, weights)

        def contender(index: int) -> torch.Tensor:
            turn = index % len(self)
            return module(self.hidden[turn], self.ids[turn], self.weights[turn])

        return contender

    def vllm(self, experts: vllm_experts.Experts) -> Contender:
        """vLLM's kernel, with its packed copy of the weights."""

        def contender(index: int) -> torch.Tensor:
            turn = index % len(self)
            return experts(self.hidden[turn], self.ids[turn], self.weights[turn])

        return contender

    def on_path(self, path: str) -> Contender:
        """Ours, by one path."""
        ours = self.implementation(OURS)

        def contender(index: int) -> object:
            with paths.only(path):
                return ours(index)

        return contender

    def read(self, index: int) -> list[torch.Tensor]:
        """The floor of few tokens: every weight that takes part is read once, by as many threads as torch has.

        Each reads its part of all weights by itself: threads that meet after every weight would wait most of the time.
        """
        hit = self.hit[index % len(self)]
        reading = [_readers(len(self.parts)).submit(_sum, part, hit) for part in self.parts]
        return [sums for part in reading for sums in part.result()]

    @cached_property
    def parts(self) -> list[list[list[torch.Tensor]]]:
        """By thread and expert: its part of the expert's weights, whose bits are taken for float32, which torch sums
        fastest."""
        threads, weights = torch.get_num_threads(), (self.module.gate_up_proj, self.module.down_proj)
        cut = [weight.flatten(1).view(torch.float32).chunk(threads, 1) for weight in weights]
        return [
            [[weight[number][expert] for weight in cut] for expert in range(self.layer.experts)]
            for number in range(threads)
        ]

    def dense(self, index: int) -> list[torch.Tensor]:
        """The floor of many tokens: products of the same size, all rows with the weights of one expert."""
        expert = index % self.layer.experts
        weights = self.module.gate_up_proj[expert], self.module.down_proj[expert]
        return [
            torch.mm(rows, weight if self.module.is_transposed else weight.T)
            for rows, weight in zip(self.dense_rows, weights, strict=True)
        ]

    def contenders(
        self, implementations: Sequence[str], read: tuple[str, Contender] | None = None
    ) -> dict[str, Contender]:
        """Implementations by name, and the two floors; `read` in the place of our own way to read the weights."""
        register_experts()
        name, reading = read or (READ, self.read)
        return {
            name: reading,
            DENSE: self.dense,
            **{
                name: self.on_path(PATHS[name]) if name in PATHS else self.implementation(name)
                for name in implementations
            },
        }

    def hit_bytes(self) -> float:
        """Weights that a call reads, on average over the inputs."""
        hit = sum(map(len, self.hit)) / len(self.hit)
        return hit * self.layer.expert_bytes(self.dtype)


def compared(section: str, routed: RoutedModel, run: Race, read: str = READ) -> Measured:
    """The rows of one case: each against `grouped_mm`, and against the floor that takes longer."""
    case, took = routed.title, run.timing(OURS).median
    known = (*IMPLEMENTATIONS, OURS_PACKED, vllm_experts.NAME, *PATHS)
    names = [name for name in known if name in run.seconds]
    peers = {name: PEER for name in names if name != PEER}
    floor = max((read, DENSE), key=lambda name: run.timing(name).median)
    operations = routed.layer.operations(routed.tokens)
    facts = [
        Fact(section, case, "weights of the experts that were hit", routed.hit_bytes() / 1e6, "MB"),
        Fact(section, case, f"{OURS}: those a second", routed.hit_bytes() / took / 1e9, "GB/s"),
        Fact(section, case, f"{OURS}: operations a second", operations / took / 1e9, "GFLOP/s"),
    ]
    others = [name for name in names if not name.startswith(OURS)]
    found = rows(section, case, run, peers=peers, floors=dict.fromkeys(names, floor), others=others)
    return Measured(found, facts, targets(routed, run, floor) if read == READ else [])


def targets(routed: RoutedModel, run: Race, floor: str) -> list[Target]:
    """What is wanted of this case on a CPU, in bfloat16."""
    out, case = [], routed.title
    if routed.dtype is not torch.bfloat16:
        return out

    def target(name: str, wanted: float, peer: str, times: float) -> None:
        out.append(Target(f"{case}: {name}", f">= {wanted:g} times {peer}", f"{times:.2f}", times >= wanted))

    wanted = WANTED.get(routed.layer.model, {}).get(routed.tokens)
    if wanted is not None:
        target(OURS, wanted, PEER, run.ratio(PEER, OURS))
    if routed.tokens == 1:
        target(OURS, OF_READING, "the speed of reading the weights", run.ratio(floor, OURS))
    if {OURS_PACKED, vllm_experts.NAME} <= run.seconds.keys():
        target(OURS_PACKED, 1, vllm_experts.NAME, run.ratio(vllm_experts.NAME, OURS_PACKED))
    return out


def _sum(weights: list[list[torch.Tensor]], experts: list[int]) -> list[torch.Tensor]:
    return [weight.sum() for expert in experts for weight in weights[expert]]


@cache
def _readers(threads: int) -> ThreadPoolExecutor:
    """So many threads, each of which works alone, that run before anything is timed."""
    together = Barrier(threads + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        together.wait()

    readers = ThreadPoolExecutor(threads, initializer=alone)
    for _ in range(threads):
        readers.submit(int)
    together.wait()
    torch.set_num_threads(threads)  # the number that new threads begin with, which each of them has set
    return readers


def cases(
    layer: Layer,
    dtype: torch.dtype,
    tokens: Iterable[int],
    limits: Limits,
    device: torch.device | str = "cpu",
    **inputs: int,
) -> Iterator[RoutedModel]:
    """One layer at every number of tokens that fits; what is left out is said."""
    fitting = []
    for number in tokens:
        reason = limits.too_much(layer, number, dtype)
        if reason is None:
            fitting.append(number)
        else:
            log.warning("left out: %s: %s", layer.title(number, dtype), reason)
    module = make(layer, dtype, device) if fitting else None
    for number in fitting:
        yield RoutedModel(layer, module, number, **inputs)


def measure(effort: Effort) -> Measured:
    measured = Measured()
    for layer in QUICK_LAYERS if effort.quick else LAYERS:
        for dtype in DTYPES[:1] if effort.quick else DTYPES:
            measured += measure_layer(layer, dtype, QUICK_TOKENS if effort.quick else TOKENS, effort.rounds)
    return measured


def measure_layer(layer: Layer, dtype: torch.dtype, tokens: Mapping[int, int], rounds: int) -> Measured:
    """One layer on the CPU; its weights are gone at the end."""
    measured = Measured()
    packed: dict[str, Any] = {}  # packed copies of the weights, made once for all numbers of tokens
    for routed in cases(layer, dtype, tokens, ON_CPU):
        contenders = routed.contenders(ON_CPU.implementations(layer, routed.tokens, dtype))
        packed = packed or packed_copies(layer, dtype, routed.module)
        if OURS_PACKED in packed:
            contenders[OURS_PACKED] = routed.packed(packed[OURS_PACKED])
        if vllm_experts.NAME in packed:
            contenders[vllm_experts.NAME] = routed.vllm(packed[vllm_experts.NAME])
        with torch.inference_mode():
            run = race(contenders, rounds=max(3, rounds // tokens[routed.tokens]), warmup=1)
        measured += compared(SECTION, routed, run)
    return measured


def packed_copies(layer: Layer, dtype: torch.dtype, module: Any) -> dict[str, Any]:
    """What reads packed weights, by contender; what is left out is said."""
    ours = packing.packing_obstacle(module)
    theirs = vllm_experts.experts(module)
    for name, why in ((OURS_PACKED, ours), (vllm_experts.NAME, theirs)):
        if isinstance(why, str):
            log.info("left out: %s %s, %s: %s", layer.model, dtype, name, why)
    packed: dict[str, Any] = {} if ours is not None else {OURS_PACKED: PackedWeights(module)}
    return packed if isinstance(theirs, str) else packed | {vllm_experts.NAME: theirs}
