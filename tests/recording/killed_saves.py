"""Saves over an older recording, each killed at another line: `python killed_saves.py FOLDER [EVERY]`.

The recording must be the old or the new one each time, whole, and the next save must leave nothing but its file.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from moe_route.contract.tables import SCALARS
from moe_route.recording import RoutingStatistics, SequenceStore

SEQUENCES = 40


def recording(seed: int) -> RoutingStatistics:
    """Statistics with a store of several shards."""
    rng = np.random.default_rng(seed)
    store = SequenceStore(("a",), (4,))
    for item in range(SEQUENCES):
        arrays = {"tokens": np.ones((1, 1), np.int64), "full": rng.dirichlet(np.ones(4), (1, 1)).astype(np.float32)}
        store.append([(f"{seed}-{item}", "x")], arrays)
        if item % 10 == 9:
            store._end_growing()
    made = RoutingStatistics(
        groups=["x"],
        layers=["a"],
        num_experts=[4],
        top_k=[1],
        scalars=np.zeros((2, 1, 1, len(SCALARS)), np.int64),
        metrics={},
        sequence_scalars=np.full((3, 1, 1, 6), seed),
        sequence_sums={"full": rng.integers(0, 1 << 40, (3, 1, 1, 4))},
        store=store,
    )
    assert len(list(store.shards())) == SEQUENCES // 10
    return made


def same(a: RoutingStatistics, b: RoutingStatistics) -> bool:
    assert a.store is not None
    assert b.store is not None
    return a == b and a.store.keys() == b.store.keys() and a.store.content_hash() == b.store.content_hash()


def killed_at_line(number: int) -> Any:
    """A trace function that kills this process before the given line of the library."""
    left = number

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if "moe_route" not in frame.f_code.co_filename:
            return None
        left -= event == "line"
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def saved_in_a_child(new: RoutingStatistics, path: Path, line: int | None, seconds: float = 0.0) -> bool:
    """Whether a child saved ``new`` to the end: it is killed at a line, or after some time."""
    child = os.fork()
    if not child:
        if line is not None:
            sys.settrace(killed_at_line(line))
        new.save(path)
        os._exit(0)
    if line is None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == 0


def main(folder: Path, every: int) -> None:
    old, new = recording(1), recording(2)
    path, killed = folder / "run", {"old": 0, "new": 0}
    old.save(path)

    def check() -> None:
        found = RoutingStatistics.load(path)
        which = "new" if same(found, new) else "old"
        assert which == "new" or same(found, old), "neither the old nor the new recording"
        killed[which] += 1
        if which == "new":
            old.save(path)

    line = 0
    while not saved_in_a_child(new, path, line):
        check()
        line += every
    old.save(path)
    for step in range(12):
        saved_in_a_child(new, path, None, step * 0.003)
        check()
    old.save(path)
    assert os.listdir(folder) == ["run"], "leftovers of killed saves are there after a save"
    assert min(killed.values()) > 0, "every kill left the same recording: the line numbers miss the rename"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 9)
