"""A transformers ``Trainer`` with routing: its balance in the logs, and training under a plan.

`RoutingCallback` logs the balance:

    trainer = Trainer(model, ...)
    trainer.add_callback(RoutingCallback(trainer, every=100))
    trainer.train()

The scalars go through ``Trainer.log``, so TensorBoard, W&B and the log history get them as they get the loss.

`PlanTrainer` trains an attached model under a plan, on rows that name their group:

    with mr.attach(model) as routed:
        PlanTrainer(routed, plan=plan, train_dataset=rows, args=arguments).train()

`AdapterTrainer` trains adapters (`moe_route.training.add_adapters`), with a balancing loss for their routers, or on
rows that name their group:

    adapted = mr.training.add_adapters(model, mr.training.AdapterConfig(rank=8, experts=4, router="token"))
    AdapterTrainer(adapted, balance=0.01, train_dataset=rows, args=arguments).train()
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch

from moe_route.analysis import load_balance
from moe_route.analysis.load import layer_metrics
from moe_route.recording import Recorder, all_reduce
from moe_route.routed import RoutedModel, attach
from moe_route.steering import Plan, Reach
from moe_route.training import AdaptedModel

try:
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
        default_data_collator,
    )
except ImportError as error:
    raise ImportError("training by the Trainer needs transformers: pip install 'moe-route[hf]'") from error


_Part = Literal["training", "evaluation"]


class RoutingCallback(TrainerCallback):
    """Log how evenly the tokens of the last steps were spread over the experts.

    The names are those of ``LoadBalance.scalars`` ("moe/max_vio", "moe/dead_expert_frac", ...). Each value is of a
    window of its own: the steps since the last one. An evaluation during training is counted apart, and logged under
    "eval_moe/...". A layer that gradient checkpointing runs again counts once, every batch of an accumulated step
    counts, and padding does not count. In several processes, the tokens of all of them are added up.

    The model is attached while it trains; its outputs stay bit for bit the same.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        every: int | None = None,
        by_layer: bool = False,
        engine: Literal["hook", "fused"] = "hook",
    ) -> None:
        """Prepare; add it by ``trainer.add_callback``.

        Args:
            trainer: the trainer that logs. It is not kept alive.
            every: steps per window; by default ``logging_steps`` of the trainer.
            by_layer: also log entropy and largest share of every layer, and what a server's ``/metrics`` shows of it,
                under the same names: "moe_route_dead_experts/3".
            engine: how to attach, see `moe_route.attach`.

        Raises ``ValueError`` if `every` is less than 1. Training raises the errors of `moe_route.attach`.
        """
        if every is not None and every < 1:
            raise ValueError(f"every={every} is no number of steps: give 1 or more")
        self._trainer = weakref.ref(trainer)
        self._every, self._by_layer, self._engine = every, by_layer, engine
        self._routed: RoutedModel | None = None
        self._windows: dict[_Part, Recorder] = {}
        self._part: _Part | None = None  # whose window is open
        self._block = ExitStack()  # that of the open window
        self._ran: set[_Part] = set()  # parts with tokens since they were logged

    def detach(self) -> None:
        """Let go of the model. The end of training does this; call it after a training that an error has ended."""
        self._stop()
        routed, self._routed = self._routed, None
        self._windows, self._ran = {}, set()
        if routed is not None:
            routed.detach()

    # ---- events of the trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.detach()
        self._routed = attach(kwargs["model"], engine=self._engine)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._count("training")
        self._ran.add("training")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._count("evaluation")  # all other calls until the next step
        if state.global_step % (self._every or max(1, int(state.logging_steps))) == 0:
            self._log("training")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._ran.add("evaluation")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._log("evaluation")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._log("training")  # the steps of an unfinished window
        self.detach()

    # ---- windows

    def _count(self, part: _Part) -> None:
        """Count the calls that follow in the window of `part`."""
        if self._routed is None:
            return
        self._stop()
        if part not in self._windows:
            self._windows[part] = self._routed.record(metrics=("counts",), entropy=False)
        self._block.enter_context(self._windows[part])
        self._part = part

    def _stop(self) -> None:
        self._part = None
        self._block.close()

    def _log(self, part: _Part) -> None:
        """Log the window of `part`, if it has tokens, and end it."""
        if self._routed is None:
            return
        window, ran, was_open = self._windows.pop(part, None), part in self._ran, part == self._part
        self._ran.discard(part)
        if was_open:
            self._stop()
        statistics = window.statistics() if window is not None and ran else None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            statistics = all_reduce(statistics)  # on every process, also on one without tokens
        if was_open:
            self._count(part)
        trainer = self._trainer()
        if statistics is None or trainer is None:
            return
        scalars = load_balance(statistics).scalars(by_layer=self._by_layer)
        if self._by_layer:
            for name, values in layer_metrics(statistics).items():
                scalars |= {f"moe_route_{name}/{layer}": float(value) for layer, value in enumerate(values)}
        prefix = "eval_" if part == "evaluation" else ""
        control, due = trainer.control, trainer.control.should_log
        trainer.log({f"{prefix}{name}": value for name, value in scalars.items()})
        control.should_log = due  # a log ends the request for one, and that of the loss is still to come


class _GroupTrainer(Trainer):
    """A ``Trainer`` on rows that name their group in `column`, which the model does not get; "" for no groups."""

    def __init__(self, model: Any, column: str, **options: Any) -> None:
        super().__init__(model, **options)
        self.column = column
        if column:
            self.data_collator = _Grouped(self.data_collator or default_data_collator, column)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: list[str] = self._signature_columns or []
        self._signature_columns = [*kept, *([self.column] if self.column else [])]  # type: ignore[assignment]


class PlanTrainer(_GroupTrainer):
    """A ``Trainer`` that steers every training step by a plan, with the groups that its rows name.

    A family plan (`moe_route.training.family_plan`) makes this the hybrid-k training of arXiv 2410.10626. Evaluation is
    not steered: it measures the model as it will be used.
    """

    def __init__(self, routed: RoutedModel, *, plan: Plan, column: str = "group", **options: Any) -> None:
        """Prepare.

        Args:
            routed: the attached model; it stays attached when the training ends.
            plan: what every training step is steered by.
            column: name of the group in each row of the data. The model does not get it.
            options: what ``Trainer`` takes (`args`, `train_dataset`, `data_collator`, ...).
        """
        super().__init__(routed.model, column, **options)
        self.routed, self.plan = routed, plan
        self._reach = Reach(plan.rules)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, and warn at the end of the rules of the plan that reached no token."""
        self._reach = Reach(self.plan.rules)
        done = super().train(*arguments, **options)
        self._reach.warn()
        return done

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> torch.Tensor:
        """One step, backward pass included, so that layers that run again are steered alike."""
        groups = inputs.pop(self.column)
        with self.routed.steer(self.plan, reach=self._reach), self.routed.labels(groups=groups):
            return super().training_step(model, inputs, *arguments, **options)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """One batch of an evaluation, as the model routes by itself."""
        inputs.pop(self.column, None)
        return super().prediction_step(model, inputs, *arguments, **options)


class AdapterTrainer(_GroupTrainer):
    """A ``Trainer`` for the adapters of a model, and for whatever else of it is not frozen.

    Adapters that are chosen by group need rows that name theirs, in training and in evaluation. Save them by
    ``adapted.save``: a checkpoint of the trainer holds the whole model, to resume the training from.
    """

    def __init__(
        self, adapted: AdaptedModel, *, balance: float = 0.0, column: str | None = None, **options: Any
    ) -> None:
        """Prepare.

        Args:
            adapted: the model with adapters.
            balance: factor on ``adapted.balance_loss()``, which is added to the loss in training.
            column: name of the group in each row of the data; by default "group" for adapters that are chosen by it,
                and none for others.
            options: what ``Trainer`` takes.

        Raises ``ValueError`` for `balance` without routers.
        """
        if balance and not adapted.config.routed:
            raise ValueError(f"balance={balance}: the adapters have no routers to balance, leave it out")
        by_group = adapted.config.router == "group"
        super().__init__(adapted.model, column or ("group" if by_group else ""), **options)
        self.adapted, self.balance = adapted, balance

    def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> torch.Tensor:
        """One step, with the groups of its rows."""
        with self._labeled(inputs):
            return super().training_step(model, inputs, *arguments, **options)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **options: Any) -> Any:
        """One batch of an evaluation, with the groups of its rows."""
        with self._labeled(inputs):
            return super().prediction_step(model, inputs, *arguments, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, *arguments: Any, **options: Any
    ) -> Any:
        """The model's loss, and in training the balancing loss."""
        result: Any = super().compute_loss(model, inputs, return_outputs, *arguments, **options)
        if not self.balance or not model.training:
            return result
        added = self.balance * self.adapted.balance_loss()
        return (result[0] + added, result[1]) if return_outputs else result + added

    def _labeled(self, inputs: dict[str, Any]) -> AbstractContextManager[None]:
        groups = inputs.pop(self.column, None) if self.column else None
        return nullcontext() if groups is None else self.adapted.labels(groups)


class _Grouped:
    """A data collator for rows with a group: it is kept out of the tensors, and added as a list of names."""

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], column: str) -> None:
        self.collator, self.column = collator, column

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        if missing := sum(self.column not in row for row in rows):
            raise ValueError(
                f"{missing} of {len(rows)} rows have no {self.column!r}: name the group of every row, or give column="
            )
        batch = self.collator([{name: value for name, value in row.items() if name != self.column} for row in rows])
        return {**batch, self.column: [str(row[self.column]) for row in rows]}
