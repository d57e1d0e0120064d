"""What a store of 200 languages costs: bytes of a sequence, compressed too, and memory and time of analyses on it.

    python -m bench.store            # writes results/store.json; minutes, and 10 GB of disk for a while

The sequences are made up: counts of the chosen experts of every layer, as `record(metrics=("counts",))` keeps them,
around a taste of each language. Two recordings of 100 languages are saved, merged file by file, and then analyzed by
the command line in a process of its own, whose largest resident memory is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import RESULTS
from moe_route.bench.results import BenchmarkResults, Fact, Measured, machine
from moe_route.contract.tables import FIXED_POINT, SCALARS
from moe_route.recording import RoutingStatistics, SequenceStore
from moe_route.recording.statistics import SEQUENCE_SCALARS

NAME = "store"
SECTION = "Store of sequences"
GROUPS, ITEMS, LAYERS, EXPERTS, TOP_K, TOKENS = 200, 1000, 48, 128, 8, 25
_POOL = 512  # different sequences; a group shifts their experts
_MEMORY_BYTES = 64 << 20
_MERGE = """
import sys
from moe_route.recording import RoutingStatistics
first, second = (RoutingStatistics.load(path) for path in sys.argv[1:3])
(first + second).save(sys.argv[3])
"""
_COMMAND = """
import sys
from moe_route.cli import main
if main(sys.argv[1:]):
    sys.exit(1)
"""
_ANALYSES = {
    "paired divergence of all groups": ["divergence", "--reference", "group 000", "--kind", "count"],
    "pooled divergence": ["divergence", "--reference", "group 000", "--kind", "count", "--pairing", "pooled"],
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the store."""

    groups: int
    items: int
    layers: int
    experts: int
    top_k: int
    tokens: int  # of a sequence


def sequences(shape: Shape, seed: int = 0) -> np.ndarray:
    """int32 [pool, L, E]: how often each expert was chosen by `tokens` tokens of a sequence, each `top_k` times."""
    draw = np.random.default_rng(seed)
    taste = np.log(draw.dirichlet(np.full(shape.experts, 0.5), shape.layers) + 1e-6).astype(np.float32)
    pool = np.zeros((_POOL, shape.layers, shape.experts), np.int32)
    layer = np.arange(shape.layers)[None, :, None]
    for one in pool:
        scores = taste + draw.gumbel(size=(shape.tokens, shape.layers, shape.experts)).astype(np.float32)
        chosen = np.argpartition(-scores, shape.top_k - 1, axis=2)[:, :, : shape.top_k]
        np.add.at(one, (np.broadcast_to(layer, chosen.shape), chosen), 1)
    return pool


def recording(shape: Shape, names: list[str], first: int, pool: np.ndarray) -> RoutingStatistics:
    """Statistics of these groups, whose sequences are on disk beyond 64 MB."""
    size = (len(names), shape.layers, shape.experts)
    scalars = np.zeros((2, *size[:2], len(SCALARS)), np.int64)
    number = np.zeros((3, *size[:2], len(SEQUENCE_SCALARS)), np.int64)
    counts, frequency = np.zeros((2, *size), np.int64), np.zeros((3, *size), np.int64)
    layers = [f"model.layers.{layer}.mlp.gate" for layer in range(shape.layers)]
    store = SequenceStore(layers, [shape.experts] * shape.layers, memory_bytes=_MEMORY_BYTES)
    tokens = np.full((shape.items, shape.layers), shape.tokens)
    order = np.random.default_rng(first)
    for row, name in enumerate(names):
        chosen = np.roll(pool[order.integers(0, _POOL, shape.items)], first + row, axis=2)
        store.append([(item, name) for item in range(shape.items)], {"tokens": tokens, "counts": chosen})
        counts[0, row] = chosen.sum(0)
        frequency[[0, 2], row] = np.rint(chosen / shape.tokens / FIXED_POINT).astype(np.int64).sum(0)
    for what, value in (("tokens", 1), ("slots", shape.top_k), ("unscored", 1)):
        scalars[0, :, :, SCALARS.index(what)] = value * shape.tokens * shape.items
    for what in ("sequences", "count"):
        number[[0, 2], :, :, SEQUENCE_SCALARS.index(what)] = shape.items
    return RoutingStatistics(
        groups=names,
        layers=layers,
        num_experts=[shape.experts] * shape.layers,
        top_k=[shape.top_k] * shape.layers,
        scalars=scalars,
        metrics={"counts": counts},
        sequence_scalars=number,
        sequence_sums={"frequency": frequency, "count": frequency},
        entropy=False,
        metadata={"model": {"name": "made up", "config_hash": "made up"}},
        store=store,
    )


def in_child(work: str, *arguments: str) -> tuple[float, float]:
    """Seconds of a Python program of its own, and its largest resident memory in MB."""
    code = f"{work}\nimport resource\nprint('', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-4000:]}")
    return time.perf_counter() - start, int(done.stderr.split()[-1]) * 1024 / 1e6


def measure(folder: Path, shape: Shape) -> Measured:
    case = f"{shape.groups} groups, {shape.items} sequences each, {shape.layers} layers, {shape.experts} experts"
    facts: list[Fact] = []

    def fact(what: str, value: float, unit: str) -> None:
        facts.append(Fact(SECTION, case, what, float(f"{value:.4g}"), unit))

    pool = sequences(shape)
    half = shape.groups // 2
    halves = [folder / "a.safetensors", folder / "b.safetensors"]
    for first, path in zip((0, half), halves, strict=True):
        made = recording(shape, [f"group {number:03d}" for number in range(first, first + half)], first, pool)
        start = time.perf_counter()
        made.save(path)
        fact(f"time to save groups {first} to {first + half - 1}", time.perf_counter() - start, "s")
        del made  # with its temporary folder
    count = 2 * half * shape.items
    whole, size = folder / "whole.safetensors", sum(path.stat().st_size for path in halves)
    fact("bytes of a sequence on disk, counts alone", size / count, "B")
    seconds, memory = in_child(_MERGE, *map(str, (*halves, whole)))
    fact("merging two files into one: time of the program", seconds, "s")
    fact("merging two files into one: largest resident memory", memory, "MB")
    for path in halves:
        path.unlink()
    for name, arguments in _ANALYSES.items():
        command, *options = arguments
        seconds, memory = in_child(_COMMAND, "analyze", command, str(whole), *options, "--json")
        fact(f"{name}: time of the program", seconds, "s")
        fact(f"{name}: largest resident memory", memory, "MB")
    fact("file", whole.stat().st_size / 1e6, "MB")
    block = np.ascontiguousarray(pool[:256])
    for level in (1, 6):
        for name, raw in (("int32", block.tobytes()), ("int16", block.astype(np.int16).tobytes())):
            start = time.perf_counter()
            packed = len(zlib.compress(raw, level))
            seconds = time.perf_counter() - start
            fact(f"counts as {name}, zlib level {level}: share of the bytes as int32", packed / block.nbytes, "")
            fact(f"counts as {name}, zlib level {level}: rate", len(raw) / seconds / 1e6, "MB/s")
    return Measured(facts=facts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=__doc__)
    parser.add_argument("--groups", type=int, default=GROUPS)
    parser.add_argument("--items", type=int, default=ITEMS, help="sequences of each group")
    parser.add_argument("--folder", type=Path, help="where the files lie for a while; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="file to write")
    options = parser.parse_args()
    shape = Shape(options.groups, options.items, LAYERS, EXPERTS, TOP_K, TOKENS)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(Path(folder), shape)
    print(BenchmarkResults(machine("python -m bench.store"), measured).save(options.out))


if __name__ == "__main__":
    main()
