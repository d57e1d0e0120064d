"""The routing of a live model in numbers: read the weights of its routers, and train what steers them.

The loss of ``learn_routing`` is the cross-entropy of texts, for ``RoutedModel.learn``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe_route.data.batches import EncodedTexts, Text
from moe_route.experiments.text_run import TextRun
from moe_route.modules.intercept import resident
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import LearnedRouting


def router_weights(routed: RoutedModel) -> list[np.ndarray]:
    """The gate matrix of every router, float64 [E, H], in forward order; for ``analysis.geometry``.

    Raises ``ValueError`` for a router whose logits are not one matrix product of its input, with the reason.
    """
    weights = []
    for router in routed.routers:
        gate = router.family.gate
        weight = None if gate is None else resident(router.module, gate.weight)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            why = "its weight is packed or sharded" if gate is not None else router.family.unfused
            raise ValueError(
                f"{type(router.module).__name__} of layer {router.layer} has no gate matrix to read: {why}. Leave "
                "weights= out"
            )
        weights.append(weight.detach().double().cpu().numpy())
    return weights


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
    run = TextRun(language_model, texts, routed, batch_size, max_length)
    few = run.texts.only(run.tokens.nonzero()[0].tolist())
    batches = itertools.cycle(list(language_model.batches(few, batch_size=batch_size)))
    groups = sorted({text.group for text in few.texts}) if by_group else None

    def loss() -> Tensor:
        batch = next(batches)
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        with run.routed.labels(groups=[text.group for text in batch.texts]):
            logits = language_model.model(**batch.inputs, use_cache=False).logits
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)  # padding is not predicted
        nats: Tensor = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
        return nats

    with run:
        return run.routed.learn(loss, layers=layers, what=what, groups=groups, steps=steps, lr=lr)
