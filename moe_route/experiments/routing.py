"""The routing of a live model in numbers: read the weights of its routers, and learn what steers them from texts.

The loss of ``learn_routing`` is the cross-entropy of texts, for ``RoutedModel.learn``; ``learn_directions`` takes the
difference of two groups of texts, for ``Plan.add_output``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe_route.analysis.measures import ratio
from moe_route.analysis.result import Result
from moe_route.base.identity import checkpoint_of, identity_of
from moe_route.base.schema import meant
from moe_route.base.table import Table
from moe_route.data.batches import Batch, EncodedTexts, Text
from moe_route.experiments.text_run import TextRun
from moe_route.experts.outputs import expert_outputs, one_module_of
from moe_route.modules.intercept import resident
from moe_route.routed import RoutedModel
from moe_route.routers.discovery import ModelNotSupportedError
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import ExpertSelection, LearnedRouting, Plan, PlanModel


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


@dataclass(frozen=True, eq=False, repr=False)
class LearnedDirections(Result):
    """What single experts compute in one group of texts, less what they compute in another.

    Attributes:
        groups: the two groups; a direction points from the second to the first.
        position: the token of each text that was looked at, from its end: -1 is the last.
        layers, experts: int64 [n], layer and expert of each direction.
        vectors: float64 [n, H], mean output of the expert in the first group less that in the second.
        norms: float64 [n, 2], norm of the mean output in each group.
        agreement: float64 [n], cosine of the directions of two halves of the texts (every other one); NaN if a group
            has one text. A direction that holds of other texts is near 1.
        texts: number of texts of each group.
        left_out: number of texts without such a token.
        model: what the directions are for.
    """

    groups: tuple[str, str]
    position: int
    layers: np.ndarray
    experts: np.ndarray
    vectors: np.ndarray
    norms: np.ndarray
    agreement: np.ndarray
    texts: tuple[int, int]
    left_out: int
    model: PlanModel

    @property
    def directions(self) -> dict[int, dict[int, np.ndarray]]:
        """``directions[layer][expert]``, float64 [H], as ``Plan.add_output`` takes them."""
        return self._by_expert(self.vectors)

    def _by_expert(self, vectors: np.ndarray) -> dict[int, dict[int, np.ndarray]]:
        made: dict[int, dict[int, np.ndarray]] = {}
        for layer, expert, vector in zip(self.layers.tolist(), self.experts.tolist(), vectors, strict=True):
            made.setdefault(layer, {})[expert] = vector
        return made

    def plan(
        self, *, weight: Literal["model", "full"] = "model", strength: float | Sequence[float] = 1.0, unit: bool = False
    ) -> Plan:
        """The plan that adds the directions: towards the first group, or away from it with a negative strength.

        ``unit`` gives each direction the length 1 first. The other arguments are those of ``Plan.add_output``.
        """
        lengths = np.linalg.norm(self.vectors, axis=1, keepdims=True)
        vectors = self.vectors / np.where(lengths > 0, lengths, 1) if unit else self.vectors
        plan = Plan.add_output(self._by_expert(vectors), weight=weight, strength=strength)
        said = f"from {self.groups[1]} to {self.groups[0]}, token {self.position}"
        return Plan(plan.rules, model=self.model, description=said)

    def columns(self) -> dict[str, Any]:
        """A row per direction: layer, expert, its norm, the norms of both mean outputs, and the agreement."""
        return {
            "layer": self.layers,
            "expert": self.experts,
            "norm": np.linalg.norm(self.vectors, axis=1),
            "norm_first": self.norms[:, 0],
            "norm_second": self.norms[:, 1],
            "agreement": self.agreement,
        }

    def tables(self) -> list[Table]:
        """A row per direction, the surest first."""
        first, second = self.groups
        columns = [np.asarray(values) for values in self.columns().values()]
        order = np.argsort(-np.nan_to_num(self.agreement, nan=-1.0), kind="stable")
        rows = [tuple(values[place].item() for values in columns) for place in order.tolist()]
        title = (
            f"Directions from {second} to {first} in the outputs of experts, token {self.position} of "
            f"{self.texts[0]} and {self.texts[1]} texts"
        )
        note = "agreement: cosine of the directions of two halves of the texts"
        note += f"; {self.left_out} texts are too short" if self.left_out else ""
        return [Table(("layer", "expert", "norm", f"in {first}", f"in {second}", "agreement"), rows, title, note)]


def learn_directions(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    experts: Mapping[int, Iterable[int]],
    groups: tuple[str, str],
    *,
    position: int = -1,
    routed: RoutedModel | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> LearnedDirections:
    """Learn a direction for each expert: its mean output in one group less that in another [arXiv 2606.04160].

    Each expert computes what it would if the router of its layer chose it alone, for the token at ``position`` of every
    text; the layers before route as they do. Means are over texts, in float64. A shared expert of the layer is no part
    of it, while the paper takes the output of the whole block.

    The paper compares the last five tokens one by one, and chooses experts and strength by what steering does to held
    out texts: neither the size of a direction nor how often an expert is chosen says whether it works.

    Args:
        experts: layer -> ids, such as an ``ExpertSelection``.
        groups: two groups of the texts: directions point from the second to the first.
        position: which token of each text, counted from its end: -1 is the last.
        routed: the attached model; without it, the model is attached meanwhile.

    Raises ``ValueError`` for groups without texts and positions that no text has, ``PlanError`` for layers and experts
    that the model lacks, and ``ModelNotSupportedError`` for experts whose outputs cannot be computed one by one.
    """
    if position >= 0:
        raise ValueError(f"position counts from the end of each text, -1 for its last token, not {position}")
    run = TextRun(language_model, texts, routed, batch_size, max_length)
    if len(groups) != 2 or len(set(groups)) != 2:
        raise ValueError(f"directions lead from one group to another: give two groups, not {groups!r}")
    for name in groups:
        if name not in run.groups:
            raise ValueError(f"no text is of group {name!r}: {meant(name, sorted(set(run.groups)))}")
    wanted = {layer: sorted(set(ids)) for layer, ids in experts.items() if ids}
    with run:
        collector = _Outputs(run.routed, wanted, position)
        kept = run.texts.only([at for at, name in enumerate(run.groups) if name in groups])
        long_enough = [at for at, ids in enumerate(kept.ids) if len(ids) >= -position]
        of_group = [[at for at in long_enough if kept.texts[at].group == name] for name in groups]
        first, second = map(len, of_group)
        if not first or not second:
            short = groups[0 if not first else 1]
            raise ValueError(f"no text of group {short!r} has {-position} tokens: give longer texts, or position=-1")
        side_of = {at: (side, half % 2) for side, places in enumerate(of_group) for half, at in enumerate(places)}
        collector.read(language_model, kept, side_of, batch_size)
        identity, weights = identity_of(run.routed.model), [router.weights for router in run.routed.routers]
        sizes = tuple(router.num_experts for router in run.routed.routers)
        hashes = checkpoint_of(run.routed.model, weights)
    model = PlanModel(identity["name"], identity["config_hash"], sizes, **hashes)
    return collector.result(groups, (first, second), len(kept.ids) - len(long_enough), model)


class _Outputs:
    """Adds up outputs of experts for one token of each text: by group, and by half of its texts."""

    def __init__(self, routed: RoutedModel, experts: Mapping[int, Sequence[int]], position: int) -> None:
        self.experts, self.position = {layer: experts[layer] for layer in sorted(experts)}, position
        Plan.forbid(ExpertSelection(self.experts)).compile(routed.routers)  # refuses what the model lacks
        self.modules = {layer: one_module_of(routed.routers[layer]) for layer in self.experts}
        self.sums: dict[int, np.ndarray] = {}  # layer -> float64 [2, 2, experts, H], by group and half
        self.counts = np.zeros((2, 2))

    def read(self, language_model: LanguageModel, texts: EncodedTexts, side_of: Any, batch_size: int) -> None:
        """Run the texts; ``side_of`` gives group and half of those that count, by place."""
        for batch in language_model.batches(texts, batch_size=batch_size):
            rows = [row for row, at in enumerate(batch.positions) if at in side_of]
            if not rows:
                continue
            sides = [side_of[batch.positions[row]] for row in rows]
            np.add.at(self.counts, tuple(np.transpose(sides)), 1)
            tokens = self._tokens(batch, rows)
            with ExitStack() as hooks, language_model.labeled(batch.texts):
                for layer, module in self.modules.items():
                    hook = self._hook(layer, tokens, sides, batch.inputs["input_ids"].numel())
                    hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
                language_model.run(batch, positions=tokens.new_zeros(1))

    def _tokens(self, batch: Batch, rows: Sequence[int]) -> Tensor:
        """int64 [n]: index of the token of each row among all B * S."""
        mask = batch.inputs["attention_mask"]
        from_end = mask.flip(1).cumsum(1).flip(1)  # 1 at the last token
        column = ((from_end == -self.position) & (mask != 0)).int().argmax(1)
        return (torch.arange(len(mask), device=mask.device) * mask.shape[1] + column)[list(rows)]

    def _hook(self, layer: int, tokens: Tensor, sides: Sequence[tuple[int, int]], number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given: Tensor = (*args, *kwargs.values())[0]
            hidden = given.detach().reshape(-1, given.shape[-1])
            if len(hidden) != number:
                raise ModelNotSupportedError(
                    f"the experts of layer {layer} are given {len(hidden)} of {number} tokens, so they cannot be told "
                    "apart: leave the layer out"
                )
            rows = hidden[tokens.to(hidden.device)]
            ids = torch.tensor([self.experts[layer]], device=rows.device).expand(len(rows), -1)
            outputs = expert_outputs(module, rows, ids).double().cpu().numpy()
            sums = self.sums.setdefault(layer, np.zeros((2, 2, *outputs.shape[1:])))
            np.add.at(sums, tuple(np.transpose(sides)), outputs)

        return hook

    def result(
        self, groups: tuple[str, str], texts: tuple[int, int], left_out: int, model: PlanModel
    ) -> LearnedDirections:
        sums = np.concatenate([self.sums[layer] for layer in self.experts], axis=2)  # [2, 2, n, H]
        first, second = sums.sum(1) / self.counts.sum(1)[:, None, None]
        halves = sums / np.where(self.counts, self.counts, np.nan)[..., None, None]
        one, other = halves[0] - halves[1]
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        pairs = [(layer, expert) for layer, ids in self.experts.items() for expert in ids]
        layers, experts = np.array(pairs, np.int64).T
        norms = np.stack([np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)], 1)
        agreement = ratio((one * other).sum(1), lengths)
        vectors = first - second
        return LearnedDirections(
            groups, self.position, layers, experts, vectors, norms, agreement, texts, left_out, model
        )
