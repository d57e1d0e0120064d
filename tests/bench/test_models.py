"""The whole-model and growth benchmarks: every contender runs, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.cpu import growth, models

TINY = {**growth.SMALL, "num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 128}


@pytest.fixture(scope="module")
def model() -> Any:
    return models.model_of(2, **TINY)


@pytest.mark.exhaustive
def test_every_contender_runs_and_is_taken_out_again(model: Any) -> None:
    case = models.decode(model, 1)
    names = {models.STOCK, *models.ours(case), *models.others(case)}
    found = models.measure_case(case, 2)
    assert names <= {row.name for row in found.rows}
    said = " ".join(fact.what for fact in found.facts)
    assert all(peer in said for peer in models.PEERS)  # measured, or the reason why not
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert sum(hooks) == 0
    assert len(found.targets) == 2


def test_another_library_that_rebuilds_the_model_is_undone(model: Any) -> None:
    before = {name: type(module) for name, module in model.named_modules()}
    plain = model(input_ids=torch.arange(8)[None]).logits

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    def making(model: Any) -> Any:
        model.lm_head = Doubled(model.lm_head)
        return lambda case: model(input_ids=torch.arange(8)[None]).logits

    rebuilt = models._Restored(model, making)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with rebuilt() as run:
        assert torch.equal(run(models.prefill(model, 8)), 2 * plain)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(model(input_ids=torch.arange(8)[None]).logits, plain)


def test_growth_counts_all_tokens_and_writes_sequences_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SMALL", TINY)
    monkeypatch.setattr(growth, "MEMORY_BYTES", 1 << 16)
    pooled, kept = (growth.million(sequences, 6 * growth.BATCH * growth.LENGTH, 40) for sequences in (False, True))
    assert pooled.samples[-1][0] == kept.samples[-1][0] == 6 * growth.BATCH * growth.LENGTH
    assert pooled.samples[-1][2] == 0
    assert kept.samples[-1][2] > 0
    assert kept.file_bytes > pooled.file_bytes
    assert pooled.seconds > 0
