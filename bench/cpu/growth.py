"""How a recording grows: with tokens, groups, experts, chosen experts, layers and the size of a call.

The models are small and random, because what a recording costs depends on their routers only; their routers, hooks and
operators are the real ones. Times are taken inside the hooks and around the label blocks, where all of the work is.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import moe_route as mr
from bench.cpu.models import model_of
from bench.cpu.recording import Around, Decoding, HookClock, race_in_hooks, recorded
from moe_route.bench.results import Fact, Measured
from moe_route.bench.timing import Effort, Pool
from moe_route.patching.deferred import MOST_TOKENS
from moe_route.recording.counting import DEFAULT_METRICS
from moe_route.recording.tables import TableSet
from moe_route.routers import find_routers

SECTION = "Growth of a recording"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 1024,
}
LAYERS = 4
TOKENS, GROUPS = 1_000_000, 200
BATCH, LENGTH = 32, 64  # sequences of a call, and their tokens
SAMPLES = 20  # measurements of memory and disk
MEMORY_BYTES = 8 << 20  # of sequences, before they go to disk
# Against the number of tokens in a call, of experts, of chosen experts, and of layers.
CURVES: dict[str, tuple[int, ...]] = {
    "T": (1, 8, 64, 512),
    "E": (16, 64, 128, 256, 512),
    "k": (1, 2, 4, 8, 16),
    "layers": (1, 4, 16),
}
STEPS = 9  # of calls too large to be counted together
LONG = 512  # tokens of a call in the curves against E and k


@dataclass
class Grown:
    """A recording of many tokens: seconds of its own, and (tokens, resident MB, MB on disk) as it went on."""

    seconds: float
    samples: list[tuple[int, float, float]]
    file_bytes: int
    read_seconds: float


def million(sequences: bool, tokens: int = TOKENS, groups: int = GROUPS) -> Grown:
    """Record `tokens` tokens of sequences that take turns in `groups` groups, pooled or with every sequence kept.

    Samples begin when every group was seen once, because memory of the tables is not resident before it is used.
    """
    model = model_of(LAYERS, **SMALL)
    names = [f"group {number}" for number in range(groups)]
    generator = torch.Generator().manual_seed(3)
    calls = max(tokens // (BATCH * LENGTH), 1)
    clock, samples, blocks = HookClock(model), [], 0.0
    with tempfile.TemporaryDirectory() as folder, _fast(model) as routed:
        stored = Path(folder) / "sequences" if sequences else False
        with routed.record(groups=names, sequences=stored, memory_bytes=MEMORY_BYTES) as recorder:
            clock.wrap()
            for call in range(calls):
                ids = torch.randint(0, SMALL["vocab_size"], (BATCH, LENGTH), generator=generator)
                first = call * BATCH
                labels = [names[(first + i) % groups] for i in range(BATCH)]
                start = time.perf_counter()
                block = recorder.labels(labels, items=range(first, first + BATCH))
                block.__enter__()
                blocks += time.perf_counter() - start
                with torch.inference_mode():
                    model(input_ids=ids, use_cache=False)
                start = time.perf_counter()
                block.__exit__(None, None, None)
                blocks += time.perf_counter() - start
                if first >= groups and (call % max(calls // SAMPLES, 1) == 0 or call == calls - 1):
                    samples.append(((call + 1) * BATCH * LENGTH, _resident(), _stored(Path(folder))))
            clock.unwrap()
        start = time.perf_counter()
        counted = recorder.statistics()
        read = time.perf_counter() - start
        path = Path(folder) / "statistics.safetensors"
        counted.save(path)
        return Grown(clock.seconds + blocks, samples, path.stat().st_size, read)


def _fast(model: torch.nn.Module) -> mr.RoutedModel:
    """Attached with experts that take less of the benchmark's time; the recording is the same."""
    return mr.attach(model, verify=False, experts_implementation="moe_route")


def _resident() -> float:
    """Resident memory in MB after freed memory went back, or 0 where /proc does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS:"))


def _stored(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def million_facts(tokens: int = TOKENS, groups: int = GROUPS) -> list[Fact]:
    """Both recordings of a million tokens."""
    facts = []
    for kind, sequences in (("pooled", False), ("every sequence", True)):
        grown = million(sequences, tokens, groups)
        case = f"{kind}, {groups} groups, {LAYERS} layers, 128 experts"
        per_million = 1e6 / grown.samples[-1][0]
        facts += [
            Fact(SECTION, case, "seconds of the recording per million tokens", grown.seconds * per_million, "s"),
            Fact(SECTION, case, "seconds to read the statistics", grown.read_seconds, "s"),
            Fact(SECTION, case, "statistics file", grown.file_bytes / 1e6, "MB"),
        ]
        before = grown.samples[0][1]
        for at, resident, stored in grown.samples:
            since = f"memory since all groups were seen, tokens = {at}"
            facts.append(Fact(SECTION, case, since, resident - before, "MB"))
            facts.append(Fact(SECTION, case, f"on disk, tokens = {at}", stored, "MB"))
    return facts


def window_seconds(decoding: Decoding, recording: Around) -> float:
    """Time of a step inside the hooks, where steps are counted together."""
    inside, _ = race_in_hooks(decoding, {"recording": recording}, windows=2)
    return inside.timing("recording").median


def seconds_per_token(tokens: int, layers: int = LAYERS, **changes: int) -> float:
    """Time inside the hooks of a decode step with `tokens` sequences, per token and layer."""
    decoding = Decoding(model_of(layers, **(SMALL | changes)), tokens)
    if tokens <= MOST_TOKENS:  # steps are counted together
        return window_seconds(decoding, lambda: recorded(decoding)) / tokens / layers
    clock, took = HookClock(decoding.model), []
    with recorded(decoding):
        clock.wrap()
        for step in range(STEPS):
            clock.seconds = 0.0
            decoding.step(step)
            took.append(clock.seconds)
        clock.unwrap()
    return statistics.median(took[1:]) / tokens / layers


def reading_seconds(tokens: int, experts: int) -> float:
    """The limit: time per token in which torch adds up as many logits, cold."""
    pool = Pool((tokens, experts), torch.float32)
    start = time.perf_counter()
    for number in range(len(pool)):
        pool[number].sum()
    return (time.perf_counter() - start) / len(pool) / tokens


def curves() -> list[Fact]:
    """Seconds per million tokens and layer, and the limit, against each size with the others fixed."""
    facts = []
    for name, values in CURVES.items():
        for value in values:
            tokens, layers, changes = LONG if name in ("E", "k") else 1, LAYERS, {}
            if name == "T":
                tokens = value
            elif name == "layers":
                layers = value
            else:
                changes[{"E": "num_experts", "k": "num_experts_per_tok"}[name]] = value
            if name == "E":
                changes["num_experts_per_tok"] = min(SMALL["num_experts_per_tok"], value)
            took = seconds_per_token(tokens, layers, **changes)
            limit = reading_seconds(tokens, changes.get("num_experts", SMALL["num_experts"]))
            case = f"seconds per million tokens and layer against {name}"
            facts.append(Fact(SECTION, case, f"recording, {name} = {value}", took * 1e6, "s"))
            facts.append(Fact(SECTION, case, f"limit: reading the logits, {name} = {value}", limit * 1e6, "s"))
    return facts


def group_facts(numbers: tuple[int, ...] = (1, 10, 100, 1000)) -> list[Fact]:
    """Time inside the hooks of a decode step, and bytes of the tables on the device, against the number of groups."""
    facts = []
    case = "groups, at batch-1 decode"
    decoding = Decoding(model_of(LAYERS, **SMALL))
    routers = find_routers(decoding.model)
    for groups in numbers:
        names = [f"group {number}" for number in range(groups)]
        took = window_seconds(decoding, partial(_labeled, decoding, names)) / LAYERS
        tables = TableSet(routers, groups=groups, metrics=DEFAULT_METRICS, entropy=True)
        held = sum(table.groups.nbytes for table in tables.layers)
        facts.append(Fact(SECTION, case, f"recording per token and layer, groups = {groups}", took * 1e6, "us"))
        facts.append(Fact(SECTION, case, f"tables, groups = {groups}", held / 1e6, "MB"))
    return facts


@contextmanager
def _labeled(decoding: Decoding, names: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        routed = stack.enter_context(mr.attach(decoding.model, verify=False))
        recorder = stack.enter_context(routed.record(groups=names))
        stack.enter_context(recorder.labels(groups=names[-1]))
        decoding.step(0)
        yield


def measure(effort: Effort) -> Measured:
    """A million tokens (a fiftieth of them if quick), and cost against each size."""
    tokens = TOKENS // 50 if effort.quick else TOKENS
    return Measured(facts=million_facts(tokens) + curves() + group_facts())
