"""Training under a plan by the Trainer: each step equals one by hand, and the model takes the families in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moe_route as mr
from moe_route.training import upcycle

transformers = pytest.importorskip("transformers")

from harness import trainers  # noqa: E402
from harness.trainers import arguments  # noqa: E402

from moe_route.integrations.trainer import PlanTrainer  # noqa: E402

FAMILIES = {"one": 0, "two": 1, "three": 2}


def sparse() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    return upcycle(transformers.Qwen3ForCausalLM(config), families=FAMILIES, noise=0.3)


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    names = list(FAMILIES)
    return [
        {"input_ids": ids, "labels": ids, "group": names[row % 3]}
        for row in range(count)
        for ids in [torch.randint(3, 64, (8,), generator=generator)]
    ]


class InOrder(trainers.InOrder, PlanTrainer):
    pass


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_steps_by_hand(checkpointing: bool, tmp_path: Path) -> None:
    model, plan = sparse()
    data = rows(12)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    args = arguments(tmp_path, **(options if checkpointing else {}))
    with mr.attach(model) as routed, routed.record() as recorder:
        run = InOrder(routed, plan=plan, args=args, train_dataset=data, eval_dataset=data)
        run.train()
        statistics = recorder.statistics()
        evaluated = run.evaluate()["eval_loss"]
    for group, expert in FAMILIES.items():
        assert (statistics.token_sum("counts")[statistics.groups.index(group), :, expert] == 32).all()

    other, plan = sparse()
    other.train()
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-2)
    losses = []
    with mr.attach(other) as routed, routed.steer(plan):
        for first in range(0, 12, 4):
            batch = data[first : first + 4]
            ids = torch.stack([row["input_ids"] for row in batch])
            with routed.labels(groups=[row["group"] for row in batch]):
                loss = other(input_ids=ids, labels=ids).loss
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert [entry["loss"] for entry in run.state.log_history if "loss" in entry] == pytest.approx(losses, abs=1e-4)
    for mine, hand in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-5, atol=1e-6)
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        assert evaluated == pytest.approx(other.eval()(input_ids=ids, labels=ids).loss.item(), abs=1e-4)  # not steered


def test_rows_without_a_group_are_named(tmp_path: Path) -> None:
    model, plan = sparse()
    data = [{name: value for name, value in row.items() if name != "group"} for row in rows(4)]
    with mr.attach(model) as routed, pytest.raises(ValueError, match="4 of 4 rows have no 'group'"):
        InOrder(routed, plan=plan, args=arguments(tmp_path), train_dataset=data).train()
