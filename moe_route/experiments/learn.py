"""Learned routing from texts: the loss of ``RoutedModel.learn`` is the cross-entropy of the texts themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from moe_route.data.batches import EncodedTexts, Text
from moe_route.experiments.runs import attached, encoded_texts
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import LearnedRouting

__all__ = ["learn_routing"]


def learn_routing(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    *,
    routed: RoutedModel | None = None,
    layers: Iterable[int] | int | None = None,
    what: Literal["bias", "scale", "temperature"] = "bias",
    by_group: bool = False,
    steps: int = 20,
    lr: float = 0.01,
    batch_size: int = 16,
    max_length: int | None = None,
) -> LearnedRouting:
    """Train the routing on texts by cross-entropy, with the model frozen [Rewiring, arXiv 2510.14853].

    Each step takes one batch, in the same order over and over. The loss is in nats per token of the batch, so the
    losses of the result differ between batches; compare held-out texts with ``strength_sweep(..., strengths=[1])``.

    Args:
        routed: the attached model; without it, the model is attached for the training.
        layers, what, steps, lr: as in ``RoutedModel.learn``.
        by_group: train numbers for each group of the texts; the plan then steers these groups only.

    Raises the errors of ``RoutedModel.learn``, and ``ValueError`` if no text has a token to predict.
    """
    encoded = encoded_texts(language_model, texts, max_length)
    long_enough = [place for place, ids in enumerate(encoded.ids) if len(ids) > 1]
    batches = itertools.cycle(list(language_model.batches(encoded.only(long_enough), batch_size=batch_size)))
    groups = sorted({encoded.texts[place].group for place in long_enough}) if by_group else None

    def loss() -> Tensor:
        batch = next(batches)
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        with model.labels(groups=[text.group for text in batch.texts]):
            logits = language_model.model(**batch.inputs, use_cache=False).logits
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)  # padding is not predicted
        found: Tensor = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
        return found

    with attached(language_model, routed) as model:
        return model.learn(loss, layers=layers, what=what, groups=groups, steps=steps, lr=lr)
