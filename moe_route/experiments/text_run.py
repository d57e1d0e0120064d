"""What experiments share: a model and texts, run as the model routes them and under plans, with losses per token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import torch

from moe_route.analysis import effects_by_group
from moe_route.analysis.effects import Effects
from moe_route.data.batches import Batch, EncodedTexts, Text
from moe_route.recording import Recorder
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.lines import KeptRuns
from moe_route.runs.record import record_texts
from moe_route.steering import Plan, PlanError, Reach
from moe_route.steering.layers import as_layers
from moe_route.steering.tables import SequenceTable


@dataclass(frozen=True, eq=False)
class NaturalRun:
    """What n texts gave without steering, a list entry per text of S tokens.

    Attributes:
        nats: float64 [S - 1], loss of each predicted token; entry t is the prediction at token t, of token t + 1.
        confidence: float64 [S - 1], probability of the most likely token at the same places.
        ids: int64 [S, L, k], the experts that each token chose; -1 is an empty slot.
    """

    nats: list[np.ndarray]
    confidence: list[np.ndarray]
    ids: list[np.ndarray]


class TextRun:
    """A model and n texts, which run inside a ``with`` block; the model is attached there if it is not already.

    Attributes:
        language_model: the model.
        texts: the n texts as tokens.
        routed: the attached model.
        batch_size: rows of a batch.
        progress: whether bars are shown on standard error.
        kept: keeps the losses of every batch under a plan, and has those of a run that was interrupted.

    Raises ``ValueError`` if no text has a token to predict, and when entered, if ``routed`` is another model or steers
    already.
    """

    routed: RoutedModel

    def __init__(
        self,
        language_model: LanguageModel,
        texts: Sequence[Text] | EncodedTexts,
        routed: RoutedModel | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        progress: bool = False,
        kept: KeptRuns | None = None,
    ) -> None:
        if not isinstance(texts, EncodedTexts) and not all(isinstance(text, Text) for text in texts):
            raise ValueError("texts must be Text(group, item, text): texts_of(corpus) makes them")
        self.language_model, self.batch_size, self.progress, self.kept = language_model, batch_size, progress, kept
        self.texts = language_model.encode(texts, max_length=max_length)
        if not any(len(row) > 1 for row in self.texts.ids):
            raise ValueError("no text has a second token, so there is nothing to predict: give longer texts")
        self._given = routed
        if kept is not None:
            kept.check(language_model.model)

    def __enter__(self) -> TextRun:
        if self._given is None:
            self.routed = self.language_model.attach()
            return self
        if self._given.model is not self.language_model.model:
            raise ValueError(
                "routed is attached to another model: pass routed=language_model.attach(), or leave it out"
            )
        if self._given.plan is not None:
            raise ValueError("the model is steered already, so there is no natural run: leave the steer block first")
        self.routed = self._given
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._given is None:
            self.routed.detach()

    @cached_property
    def groups(self) -> list[str]:
        """The group of each text."""
        return [text.group for text in self.texts.texts]

    @cached_property
    def tokens(self) -> np.ndarray:
        """float64 [n]: number of predicted tokens of each text."""
        return np.array([max(len(row) - 1, 0) for row in self.texts.ids], np.float64)

    def layers(self, layers: Iterable[int] | int) -> tuple[int, ...]:
        """Layers as a user gives them, in increasing order; raises ``PlanError`` for layers that the model lacks."""
        asked, number = as_layers(layers), len(self.routed.routers)
        if not asked or asked[-1] >= number:
            raise PlanError(f"the model has {number} MoE layers, 0 to {number - 1}, and {list(asked)} are asked for")
        return asked

    def record(self, caption: str, **options: Any) -> Recorder:
        """Record every text under its group and item; ``options`` are those of ``RoutedModel.record``."""
        with self.routed.record(**options) as recorder:
            shown = caption if self.progress else None
            record_texts(recorder, self.language_model, self.texts, batch_size=self.batch_size, progress=shown)
        return recorder

    def losses(self, plan: Plan | None = None, caption: str = "losses") -> np.ndarray:
        """Loss of each text, float64 [n], summed over its predicted tokens in nats; under a plan if one is given.

        Texts run under their groups and items, also for a recording that is open.
        """
        sums = np.zeros(len(self.texts.ids))
        if plan is not None:
            plan.check_groups(self.groups)
        reach = Reach(() if plan is None else plan.rules)
        with nullcontext() if plan is None else self.routed.steer(plan, reach=reach):
            for batch in self._batches(caption):
                nats = self._nats(batch, [text.group for text in batch.texts], plan)
                mask = batch.inputs["attention_mask"][:, 1:].cpu().numpy()
                sums[list(batch.positions)] = (nats * mask).sum(1)
        self._warn_of(reach)
        return sums

    def natural(self) -> NaturalRun:
        """Run the texts without steering, and keep losses and choices of every token."""
        ids = self.texts.ids
        run = NaturalRun(*([np.zeros(0)] * len(ids) for _ in range(3)))
        tokens = sum(map(len, ids))
        with self.routed.record(trace=True, trace_limit=tokens, entropy=False) as recorder:
            for batch in self._batches("natural routing"):
                with recorder.labels(items=list(batch.positions)):
                    nats, confidence = token_losses(self.language_model.run(batch), batch.inputs["input_ids"])
                for row, text in enumerate(batch.positions):
                    predicted = slice(max(len(ids[text]) - 1, 0))
                    run.nats[text], run.confidence[text] = (
                        values[row, predicted].numpy() for values in (nats, confidence)
                    )
        trace = recorder.trace()
        first = np.cumsum([0, *map(len, ids)])
        chosen = np.full((tokens, *trace.ids.shape[1:]), -1, np.int64)
        chosen[first[np.asarray(trace.items, np.int64)[trace.sequence]] + trace.position] = trace.ids
        run.ids[:] = np.split(chosen, first[1:-1])
        return run

    def under(self, plans: Sequence[Plan], caption: str) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield (index of the plan, index of the text, loss float64 [S - 1] of its predicted tokens) for every pair.

        Rows of a batch hold the same texts under several plans, so that ``batch_size`` rows run together also if there
        are few texts. Plans act under their own conditions on groups; the plan ``Plan()`` is the natural run. If there
        are no more plans than ``batch_size``, every text runs under all of them in one batch, so with the same padding.
        """
        alike = max(1, self.batch_size // len(plans))  # texts per batch
        together = max(1, self.batch_size // alike)  # plans per batch
        groups = list(dict.fromkeys(self.groups))
        for plan in plans:
            plan.check_groups(groups)
        reach = Reach((rule for plan in plans for rule in plan.rules), group_of=_group_of_copy)
        starts = range(0, len(plans), together)
        for number, start in enumerate(starts, 1):
            copies = range(start, min(start + together, len(plans)))
            plan = sum((_of_copies(plans[copy], copy, groups) for copy in copies), Plan())
            shown = caption if len(starts) == 1 else f"{caption} ({number} of {len(starts)})"
            with self.routed.steer(plan, reach=reach):
                for batch in self._batches(shown, alike):
                    repeated = _repeated(batch, len(copies))
                    labels = [_copy(copy, text.group) for copy in copies for text in batch.texts]
                    for row, values in enumerate(self._nats(repeated, labels, plan)):
                        text = batch.positions[row % len(batch.texts)]
                        yield copies[row // len(batch.texts)], text, values[: int(self.tokens[text])]
        self._warn_of(reach)

    def _warn_of(self, reach: Reach) -> None:
        """Warn of rules that reached no token, unless batches of an earlier run were not run again."""
        reach.partial = self.kept is not None and self.kept.resumed > 0
        reach.warn(stacklevel=3)

    def effects(
        self, sums: np.ndarray, counts: np.ndarray, *, resamples: int, permutations: int, seed: int
    ) -> tuple[tuple[str, ...], Effects]:
        """Groups, and mean effects with intervals over items, from sums and counts of tokens [n, ...] of each text."""
        items = [text.item for text in self.texts.texts]
        options = {"resamples": resamples, "permutations": permutations, "seed": seed}
        return effects_by_group(self.groups, items, sums, counts, **options)

    def loss_of(self, groups: Sequence[str], nats: Sequence[float] | np.ndarray) -> np.ndarray:
        """float64 [G]: loss per token of each group, from the summed losses of the texts; NaN without tokens."""
        of_group = np.array([groups.index(group) for group in self.groups])
        tokens = np.bincount(of_group, self.tokens)
        return np.asarray(np.bincount(of_group, nats) / np.where(tokens > 0, tokens, np.nan))

    def _nats(self, batch: Batch, groups: Sequence[str], plan: Plan | None) -> np.ndarray:
        """Loss of each predicted token of a batch whose rows have these groups, float64 [B, S - 1]."""

        def run() -> np.ndarray:
            with self.routed.labels(groups=groups, items=[text.item for text in batch.texts]):
                nats, _ = token_losses(self.language_model.run(batch), batch.inputs["input_ids"])
            return nats.numpy()

        if plan is None or self.kept is None:  # the natural run may be recorded
            return run()
        return self.kept(f"{plan.hash} {','.join(map(str, batch.positions))}", run)

    def _batches(self, caption: str, batch_size: int | None = None) -> Iterator[Batch]:
        shown = caption if self.progress else None
        return self.language_model.batches(self.texts, batch_size=batch_size or self.batch_size, progress=shown)


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss in nats of each predicted token, and probability of the most likely one, float64 [B, S - 1] each.

    Args:
        logits: [B, S, V].
        ids: token ids, [B, S].
    """
    ahead = logits[:, :-1].float()
    log_total = ahead.logsumexp(-1)
    nats = log_total - ahead.gather(-1, ids[:, 1:, None])[..., 0]
    return nats.double().cpu(), (ahead.amax(-1) - log_total).exp().double().cpu()


def _copy(number: int, group: str) -> str:
    """Group of the copies of a text that run under one plan."""
    return f"{number}\0{group}"


def _group_of_copy(name: str) -> str:
    return name.partition("\0")[2]


def _of_copies(plan: Plan, number: int, groups: Sequence[str]) -> Plan:
    """The plan for its copies of the texts only, under its own conditions on groups."""
    rules = []
    for rule in plan.rules:
        keys = rule.table.keys if isinstance(rule.table, SequenceTable) else None
        if any(group is not None for _, group in keys or ()):
            raise PlanError(
                "several plans run as groups of their own, and this one finds its sequences by group: give them items "
                "only, Plan.replay(ids, items=[...])"
            )
        kept = [_copy(number, group) for group in groups if rule.groups is None or group in rule.groups]
        # a rule for groups that no text has stays, so that it is seen to reach nothing
        kept = kept or [_copy(number, group) for group in rule.groups or ()]
        rules.append(replace(rule, groups=tuple(sorted(kept))))
    return Plan(rules, model=plan.model)


def _repeated(batch: Batch, times: int) -> Batch:
    inputs = {name: values.repeat(times, 1) for name, values in batch.inputs.items()}
    return Batch(batch.texts * times, batch.positions * times, inputs)
