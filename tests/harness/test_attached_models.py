"""The plugin of `make test-transformers`, on a small suite of our own that is written as those of transformers are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

TESTS = Path(__file__).parents[1]
SUITE = """
import unittest

import torch
from transformers import LlamaConfig, LlamaModel, OlmoeConfig, OlmoeModel

SIZES = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)


def olmoe():
    return OlmoeModel(OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2))


class ModelTest(unittest.TestCase):
    def test_called(self):
        model = olmoe().eval()
        for length in (3, 4):
            with self.subTest(length=length), torch.no_grad():
                self.assertEqual(model(torch.ones(5, length, dtype=int))[0].shape[1], length)

    def test_evaluated_and_not_called(self):
        model = olmoe().eval().train().eval()
        self.assertFalse(model.layers[0].training)

    def test_trained(self):
        olmoe().train()(torch.ones(5, 3, dtype=int))

    def test_dense(self):
        LlamaModel(LlamaConfig(**SIZES)).eval()(torch.ones(5, 3, dtype=int))

    def test_fails(self):
        self.assertTrue(olmoe().eval().training)

    def test_is_not_attached(self):
        from moe_route.patching.attachment import attachment_of

        self.assertIsNone(attachment_of(olmoe().eval()))
"""


def outcomes(folder: Path, attached: str) -> tuple[list[str], str]:
    """What the plugin wrote of every test, and what the run printed."""
    written = folder / f"{attached}.txt"
    options = ["-p", "harness.attached_models", "--attached", attached, "--outcomes", str(written)]
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), *options, str(folder)]
    paths = os.pathsep.join([str(TESTS), *sys.path])
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return written.read_text().splitlines(), done.stdout


@pytest.mark.exhaustive
def test_outcomes_of_both_runs_differ_where_attaching_makes_a_difference(tmp_path: Path) -> None:
    (tmp_path / "test_suite.py").write_text(SUITE)
    alone, said = outcomes(tmp_path, "off")
    assert "0 models recorded, 0 choices counted" in said
    assert len(alone) == 8  # two subtests
    assert {line.split("::")[-1] for line in alone if line.endswith("failed")} == {"test_fails  call failed"}
    attached, said = outcomes(tmp_path, "on")
    # two layers, two experts a token, and five sequences of three tokens and of four
    assert f"4 models recorded, {2 * 2 * 5 * (3 + 4)} choices counted, 1 models without routers" in said
    [(before, after)] = [pair for pair in zip(alone, attached, strict=True) if pair[0] != pair[1]]
    assert before.endswith("test_is_not_attached  call passed")
    assert after.endswith("test_is_not_attached  call failed")
