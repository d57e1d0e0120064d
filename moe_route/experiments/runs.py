"""Run texts for their losses per token: as the model routes them, and under several plans at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe_route.data.batches import Batch, EncodedTexts, Text
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import Plan, PlanError
from moe_route.steering.layers import as_layers

__all__ = ["NaturalRun", "attached", "encoded_texts", "layers_of", "natural_run", "runs_under", "token_losses"]


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


@contextlib.contextmanager
def attached(language_model: LanguageModel, routed: RoutedModel | None) -> Iterator[RoutedModel]:
    """The attached model: ``routed`` if given (it stays attached), else attached inside the block only.

    Raises ``ValueError`` if ``routed`` is another model, or steers or records already.
    """
    if routed is None:
        routed = language_model.attach()
        try:
            yield routed
        finally:
            routed.detach()
        return
    if routed.model is not language_model.model:
        raise ValueError("routed is attached to another model: pass routed=language_model.attach(), or leave it out")
    if routed.plan is not None:
        raise ValueError("the model is steered already, so there is no natural run: leave the steer block first")
    yield routed


def layers_of(routed: RoutedModel, layers: Iterable[int] | int) -> tuple[int, ...]:
    """Layers as a user gives them, in increasing order; raises ``PlanError`` for layers that the model lacks."""
    found, number = as_layers(layers), len(routed.routers)
    if not found or found[-1] >= number:
        raise PlanError(f"the model has {number} MoE layers, 0 to {number - 1}, and {list(found)} are asked for")
    return found


def encoded_texts(
    language_model: LanguageModel, texts: Sequence[Text] | EncodedTexts, max_length: int | None
) -> EncodedTexts:
    """Convert texts to tokens; raises ``ValueError`` if none of them has a token to predict."""
    if not isinstance(texts, EncodedTexts) and not all(isinstance(text, Text) for text in texts):
        raise ValueError("texts must be Text(group, item, text): texts_of(corpus) makes them")
    encoded = language_model.encode(texts, max_length=max_length)
    if not any(len(row) > 1 for row in encoded.ids):
        raise ValueError("no text has a second token, so there is nothing to predict: give longer texts")
    return encoded


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


def natural_run(
    language_model: LanguageModel,
    routed: RoutedModel,
    encoded: EncodedTexts,
    *,
    batch_size: int,
    progress: str | None = None,
) -> NaturalRun:
    """Run texts without steering, and keep losses and choices of every token."""
    found = NaturalRun(*([np.zeros(0)] * len(encoded.ids) for _ in range(3)))
    tokens = sum(map(len, encoded.ids))
    with routed.record(trace=True, trace_limit=tokens, entropy=False) as recorder:
        for batch in language_model.batches(encoded, batch_size=batch_size, progress=progress):
            with recorder.labels(items=list(batch.positions)):
                nats, confidence = token_losses(language_model.run(batch), batch.inputs["input_ids"])
            for row, text in enumerate(batch.positions):
                predicted = slice(max(len(encoded.ids[text]) - 1, 0))
                found.nats[text], found.confidence[text] = (
                    values[row, predicted].numpy() for values in (nats, confidence)
                )
    trace = recorder.trace()
    first = np.cumsum([0, *map(len, encoded.ids)])
    ids = np.full((tokens, *trace.ids.shape[1:]), -1, np.int64)
    ids[first[np.asarray(trace.items, np.int64)[trace.sequence]] + trace.position] = trace.ids
    found.ids[:] = np.split(ids, first[1:-1])
    return found


def runs_under(
    language_model: LanguageModel,
    routed: RoutedModel,
    encoded: EncodedTexts,
    plans: Sequence[Plan],
    *,
    batch_size: int,
    progress: str | None = None,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (index of the plan, index of the text, loss float64 [S - 1] of its predicted tokens) for every pair.

    Rows of a batch hold the same texts under several plans, so that ``batch_size`` rows run together also if there are
    few texts. Plans act under their own conditions on groups; the plan ``Plan()`` is the natural run. If there are no
    more plans than ``batch_size``, every text runs under all of them in one batch, so with the same padding.
    """
    alike = max(1, batch_size // len(plans))  # texts per batch
    together = max(1, batch_size // alike)  # plans per batch
    groups = list(dict.fromkeys(text.group for text in encoded.texts))
    starts = range(0, len(plans), together)
    for number, start in enumerate(starts, 1):
        copies = range(start, min(start + together, len(plans)))
        plan = sum((_of_copies(plans[copy], copy, groups) for copy in copies), Plan())
        caption = progress if len(starts) == 1 or progress is None else f"{progress} ({number} of {len(starts)})"
        with routed.steer(plan):
            for batch in language_model.batches(encoded, batch_size=alike, progress=caption):
                repeated = _repeated(batch, len(copies))
                labels = [_copy(copy, text.group) for copy in copies for text in batch.texts]
                with routed.labels(groups=labels, items=[text.item for text in repeated.texts]):
                    nats, _ = token_losses(language_model.run(repeated), repeated.inputs["input_ids"])
                for row, values in enumerate(nats.numpy()):
                    text = batch.positions[row % len(batch.texts)]
                    yield copies[row // len(batch.texts)], text, values[: max(len(encoded.ids[text]) - 1, 0)]


def _copy(number: int, group: str) -> str:
    """Group of the copies of a text that run under one plan."""
    return f"{number}\0{group}"


def _of_copies(plan: Plan, number: int, groups: Sequence[str]) -> Plan:
    """The plan for its copies of the texts only, under its own conditions on groups."""
    rules = []
    for rule in plan.rules:
        if rule.table is not None and any(group is not None for _, group in rule.table.keys or ()):
            raise PlanError(
                "several plans run as groups of their own, and this one finds its sequences by group: give them items "
                "only, Plan.replay(ids, items=[...])"
            )
        kept = [_copy(number, group) for group in groups if rule.groups is None or group in rule.groups]
        if kept:
            rules.append(replace(rule, groups=tuple(sorted(kept))))
    return Plan(rules, model=plan.model)


def _repeated(batch: Batch, times: int) -> Batch:
    inputs = {name: values.repeat(times, 1) for name, values in batch.inputs.items()}
    return Batch(batch.texts * times, batch.positions * times, inputs)
