"""Trainers of transformers for tests: texts in their order, plain steps, nothing printed or saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers


class InOrder:
    """Mixed into a Trainer: texts come in the order of the data."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    """One epoch of stochastic gradient descent on a CPU, four texts a step, gradients not clipped."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**{**given, **options})
