"""Stores that are larger than memory: merged and analyzed under a limit that the kernel keeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.store import Shape, measure, recording, sequences
from moe_route import analysis
from moe_route.recording import RoutingStatistics

LARGE = Shape(groups=80, items=1600, layers=24, experts=64, top_k=4, tokens=12)
SEVERAL_SHARDS = Shape(groups=16, items=800, layers=8, experts=256, top_k=4, tokens=4)
LIMIT = 330 << 20  # bytes beside what the process has after its imports; the arrays of the store have 786 MB
WORK = """
import resource, sys, warnings
import numpy as np
from moe_route import analysis
from moe_route.analysis import resampling
from moe_route.recording import RoutingStatistics

resampling._BATCH_BYTES = int(sys.argv[3])
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]),) * 2)
first, second = (RoutingStatistics.load(f"{sys.argv[1]}/{name}.safetensors") for name in "ab")
(first + second).save(f"{sys.argv[1]}/whole.safetensors")
whole = RoutingStatistics.load(f"{sys.argv[1]}/whole.safetensors")
found = analysis.divergence(whole, "0", kind="count")
np.save(f"{sys.argv[1]}/found.npy", found.values)
"""


def parts(shape: Shape, folder: Path) -> list[RoutingStatistics]:
    pool, half = sequences(shape), shape.groups // 2
    names = [str(number) for number in range(shape.groups)]
    made = [recording(shape, names[first : first + half], first, pool) for first in (0, half)]
    for name, part in zip("ab", made, strict=True):
        part.save(folder / f"{name}.safetensors")
    return made


@pytest.mark.exhaustive
def test_merging_and_analysis_need_less_memory_than_the_store_has(tmp_path: Path):
    first, second = parts(LARGE, tmp_path)
    assert sum(shard.nbytes for part in (first, second) for shard in part.store.shards()) > 2 * LIMIT

    def run(batch: int) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", WORK, str(tmp_path), str(LIMIT), str(batch)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    done = run(16 << 20)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = analysis.divergence(first + second, "0", kind="count").values
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)
    assert "MemoryError" in run(1 << 40).stderr  # with all groups in memory: the limit is one


def test_the_statistics_are_those_of_the_sequences(tmp_path: Path):
    """What the benchmark makes up passes the checks of a recording, and groups differ."""
    first, second = parts(Shape(4, 6, 3, 16, 2, 5), tmp_path)
    whole = first + second
    counts = [whole.store.counts(item, "3") for item in range(6)]
    np.testing.assert_array_equal(whole.token_sum("counts")[3], np.sum(counts, axis=0))
    assert whole.conservation().largest_gap == 0
    assert (analysis.divergence(whole, "0", kind="count").values > 0).all()
    for kind, message in (("full", "'full' was not recorded"), ("all", "no distribution kind 'all'")):
        with pytest.raises(ValueError, match=message):
            analysis.divergence(whole, "0", kind=kind)


def test_shards_without_a_wanted_sequence_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Groups that follow one another are read once, however they are divided into batches."""
    from moe_route.base.files import StoredBlock

    parts(SEVERAL_SHARDS, tmp_path)
    store = RoutingStatistics.load(tmp_path / "a.safetensors").store
    blocks = len(store._blocks())
    assert blocks > 3
    reads: list[int] = []
    read = StoredBlock.read
    monkeypatch.setattr(StoredBlock, "read", lambda self: reads.append(1) or read(self))
    for group in store.groups():
        wanted = {(item, group) for item in store.items(group)}
        found = [key for shard in store.shards(wanted) for key in shard.keys if key in wanted]
        assert set(found) == wanted
    assert len(reads) <= blocks + len(store.groups())  # a shard may hold the end of one and the begin of the next
    assert not list(store.shards(set()))


@pytest.mark.exhaustive
def test_the_benchmark_runs(tmp_path: Path):
    found = {fact.what: fact.value for fact in measure(tmp_path, Shape(2, 4, 2, 16, 2, 5)).facts}
    assert found["paired divergence of all groups: largest resident memory"] > 0
