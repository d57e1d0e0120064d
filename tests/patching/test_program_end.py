"""A program that ends inside record() ends with its own exit code, and keeps what was recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.exhaustive import exhaustive_but

import moe_route as mr
from moe_route import recording

PROGRAM = """
import sys

import torch
from torch import nn

import moe_route as mr


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.moe = mr.nn.SparseMoE(hidden_size=16, num_experts=8, top_k=2, intermediate_size=8)

    def forward(self, input_ids):
        return self.moe(self.embed(input_ids))


model = Model().eval()
ids = torch.arange(12).reshape(2, 6)
routed = mr.attach(model)
"""
SUSPENDED = """
def batches():
    with routed.record({options}) as recorder:
        for at in range(3):
            {labels}:
                model(ids)
                yield at


running = batches()
next(running)
"""
BY_HAND = """
recorder = routed.record({options})
recorder.__enter__()
labels = recorder.labels(["x", "y"])
labels.__enter__()
model(ids)
"""
PLAIN, LABELS = "if True", "with recorder.labels(['x', 'y'], items=[at, at])"
ENDS = {
    "suspended": (SUSPENDED.format(options="", labels=PLAIN), 0),
    "suspended with labels": (SUSPENDED.format(options="sequences=True", labels=LABELS), 0),
    "by hand": (BY_HAND.format(options="trace=True"), 0),
    "exit code": (SUSPENDED.format(options="", labels=LABELS) + "sys.exit(3)", 3),
    "store": (SUSPENDED.format(options="sequences=sys.argv[1]", labels=LABELS) + "next(running)\nsys.exit(4)", 4),
    "forked": (SUSPENDED.format(options="sequences=sys.argv[1]", labels=LABELS)
               + "next(running)\nimport os\nchild = os.fork()\n"
               + "sys.exit(0) if child == 0 else sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))", 0),
    "steered": ("block = routed.steer(mr.Plan.force_on({0: [1]}))\nblock.__enter__()\nmodel(ids)\nsys.exit(5)", 5),
}  # fmt: skip


@pytest.mark.parametrize("end", exhaustive_but(["exit code", "store"], ENDS))
def test_a_program_that_ends_inside_a_recording_has_its_own_exit_code(end: str, tmp_path: Path) -> None:
    program, code = ENDS[end]
    folder = tmp_path / "kept"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + program, str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path(mr.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "never entered" not in done.stderr
    if end in ("store", "forked"):
        store = recording.SequenceStore.load(folder)
        assert sorted(store.keys()) == [(0, "x"), (0, "y")]
