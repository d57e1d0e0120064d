"""Adapters trained by the Trainer: each step equals one by hand, checkpoints resume, groups reach their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.adapted_models import CONFIGS, adapted_model, model_of

from moe_route.training import AdaptedModel, add_adapters

transformers = pytest.importorskip("transformers")

from harness import trainers  # noqa: E402
from harness.trainers import arguments  # noqa: E402

from moe_route.integrations.trainer import AdapterTrainer  # noqa: E402


def rows(count: int = 8) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": ids, "labels": ids, "group": ("eng", "swh")[row % 2]}
        for row in range(count)
        for ids in [torch.randint(3, 64, (8,), generator=generator)]
    ]


class InOrder(trainers.InOrder, AdapterTrainer):
    pass


def trained(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapted.adapter_parameters().items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "balance"), [("token, two of three", 0.1), ("sequence", 0.0), ("group", 0.0)])
def test_a_step_equals_one_by_hand(name: str, balance: float, checkpointing: bool, tmp_path: Path) -> None:
    adapted = adapted_model(name)
    options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    data = rows() if name == "group" else [{k: v for k, v in row.items() if k != "group"} for row in rows()]
    InOrder(adapted, balance=balance, args=arguments(tmp_path, **options), train_dataset=data).train()
    expected = adapted_model(name)
    optimizer = torch.optim.SGD(expected.adapter_parameters().values(), lr=1e-2)
    expected.model.train()
    for start in (0, 4):
        part = rows()[start : start + 4]
        ids = torch.stack([row["input_ids"] for row in part])
        with expected.labels([row["group"] for row in part]):
            loss = expected.model(input_ids=ids, labels=ids).loss
        (loss + balance * expected.balance_loss() if balance else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, value in trained(expected).items():
        torch.testing.assert_close(trained(adapted)[key], value, rtol=0, atol=1e-6, msg=key)


def test_the_rest_of_the_model_stays_and_evaluation_has_its_groups(tmp_path: Path) -> None:
    adapted = add_adapters(model_of(), CONFIGS["group"])
    before = {name: value.clone() for name, value in model_of().state_dict().items()}
    options = {"eval_strategy": "steps", "eval_steps": 2, "num_train_epochs": 8, "learning_rate": 0.5}
    trainer = AdapterTrainer(adapted, args=arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows())
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    state = adapted.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_training_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    def run(steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        adapted = add_adapters(model_of(), CONFIGS["shards by token"])
        data = [{key: value for key, value in row.items() if key != "group"} for row in rows(16)]
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        InOrder(adapted, args=arguments(tmp_path, **options), train_dataset=data).train(resume_from_checkpoint=resume)
        return trained(adapted)

    run(2)
    resumed = run(4, resume=True)
    whole = run(4)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_balancing_adapters_without_routers_is_refused(tmp_path: Path) -> None:
    adapted = add_adapters(model_of(), CONFIGS["group"])
    with pytest.raises(ValueError, match="no routers to balance"):
        AdapterTrainer(adapted, balance=0.1, args=arguments(tmp_path), train_dataset=rows())


def test_rows_without_a_group_are_refused(tmp_path: Path) -> None:
    adapted = add_adapters(model_of(), CONFIGS["group"])
    bare = [{key: value for key, value in row.items() if key != "group"} for row in rows()]
    with pytest.raises(ValueError, match="name the group of every row"):
        AdapterTrainer(adapted, args=arguments(tmp_path), train_dataset=bare).train()
