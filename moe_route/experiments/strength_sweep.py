"""Strength sweeps: one plan at several strengths, on the same texts and in the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route.analysis import Difference, RandomControl, paired_difference, random_control
from moe_route.analysis.result import Result
from moe_route.base.table import Table, interval
from moe_route.data.batches import EncodedTexts, Text
from moe_route.experiments.text_run import TextRun
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import Plan, PlanError


@dataclass(frozen=True, eq=False, repr=False)
class StrengthSweep(Result):
    """Loss of each group at each strength, in nats per token.

    Attributes:
        groups: names of the G groups (languages).
        strengths: the S factors by which the plan was multiplied.
        loss: float64 [G, S].
        natural: float64 [G], loss without the plan.
        change: G rows of S values, change against no plan, with the 95 % interval of a paired bootstrap over texts;
            intervals of different strengths are not corrected for each other.
        control: G rows of S values, comparison with the same plan on random experts; () without controls.
        texts: [G], number of texts.
        plan: hash of the plan.
        note: which texts were cut, "" if none was.
    """

    groups: tuple[str, ...]
    strengths: tuple[float, ...]
    loss: np.ndarray
    natural: np.ndarray
    change: tuple[tuple[Difference, ...], ...]
    control: tuple[tuple[RandomControl, ...], ...]
    texts: tuple[int, ...]
    plan: str
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {"unit": "nats per token", **super().to_dict()}

    def columns(self) -> dict[str, Any]:
        """``group``, ``strength``, ``loss``, the change with its interval, and ``control_p`` with controls."""
        measured = {"loss": self.loss}
        for name in ("value", "low", "high"):
            measured[f"change_{name}"] = np.array([[getattr(cell, name) for cell in row] for row in self.change])
        if self.control:
            measured["control_p"] = np.array([[cell.p_value for cell in row] for row in self.control])
        return self.over("group strength", measured)

    def tables(self) -> list[Table]:
        head = ["group", "texts", "strength", "loss", "change", "95 % interval", ""]
        head += ["random experts", "p"] if self.control else []
        rows = []
        for g, group in enumerate(self.groups):
            for s, strength in enumerate(self.strengths):
                cell = self.change[g][s]
                row: list[object] = [group, self.texts[g], f"{strength:g}", float(self.loss[g, s])]
                row += [f"{cell.value:+.4f}", interval(cell.low, cell.high, digits=4), cell.verdict]
                if self.control:
                    drawn = self.control[g][s]
                    row += [f"{np.mean(drawn.random):+.4f}", drawn.p_value]
                rows.append(row)
        note = "change: against no plan, nats per token; lower is better"
        if self.control:
            note += f"; p: of {len(self.control[0][0].random) + 1} sets of experts, the share that does as well"
        return [Table(head, rows, "Loss in nats per token by strength", "\n".join(filter(None, (note, self.note))))]


def strength_sweep(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    plan: Plan,
    strengths: Sequence[float],
    *,
    routed: RoutedModel | None = None,
    controls: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
) -> StrengthSweep:
    """Measure the loss of texts under ``plan * strength`` for several strengths, in one pass over the texts.

    Each text runs once per strength and once without the plan, as rows of the same batch that the plan tells apart by
    group. So all strengths are compared under the same padding.

    Args:
        texts: their groups are the languages of the result; conditions of the plan on groups hold.
        strengths: factors for the plan; 1 is the plan itself.
        routed: the attached model; without it, the model is attached for the experiment.
        controls: number of random controls per strength, ``plan.random(seed + i)``.
        batch_size: rows of a batch, each text counted once for each strength and control.
        progress: show bars on standard error.

    Raises ``PlanError`` for a plan without strength (forced experts) unless its only strength is 1, ``ValueError`` for
    no strength or no text that has a token to predict.
    """
    factors = tuple(float(strength) for strength in strengths)
    if not factors or len(set(factors)) != len(factors) or not np.isfinite(factors).all():
        raise ValueError(f"strengths must be different finite numbers, at least one, not {list(strengths)}")
    if controls < 0:
        raise ValueError(f"controls must be 0 or more, not {controls}")
    with TextRun(language_model, texts, routed, batch_size, max_length, progress) as run:
        with run.routed.steer(plan):
            pass  # refuses a plan that does not fit, before controls are drawn from it
        sizes = [router.num_experts for router in run.routed.routers]
        known = plan if plan.model.num_experts else plan.for_model(num_experts=sizes)
        bases = [plan, *(known.random(seed + draw) for draw in range(controls))]
        plans = [Plan(), *(base if factor == 1 else base * factor for base in bases for factor in factors)]
        nats = np.zeros((len(plans), len(run.tokens)))
        for number, text, of_tokens in run.under(plans, "sweep"):
            nats[number, text] = of_tokens.sum()
    return _result(run, nats, factors, controls, plan)


def _result(run: TextRun, nats: np.ndarray, factors: tuple[float, ...], controls: int, plan: Plan) -> StrengthSweep:
    """The sweep from the summed loss of each text under no plan and under each plan, [1 + plans, texts]."""
    tokens, of_text = run.tokens, np.array(run.groups)
    groups = tuple(dict.fromkeys(of_text.tolist()))
    base, steered = nats[0], nats[1:].reshape(1 + controls, len(factors), -1)
    loss, natural, counts = np.zeros((len(groups), len(factors))), np.zeros(len(groups)), []
    change: list[tuple[Difference, ...]] = []
    control: list[tuple[RandomControl, ...]] = []
    for g, group in enumerate(groups):
        mine = (of_text == group) & (tokens > 0)
        if not mine.any():
            raise PlanError(f"no text of {group!r} has a second token, so there is nothing to predict: leave it out")
        counts.append(int(mine.sum()))
        natural[g] = base[mine].sum() / tokens[mine].sum()
        loss[g] = steered[0][:, mine].sum(1) / tokens[mine].sum()
        cells = range(len(factors))
        change.append(tuple(paired_difference(steered[0, s, mine], base[mine], tokens[mine]) for s in cells))
        if controls:
            control.append(
                tuple(
                    random_control(steered[0, s, mine], steered[1:, s][:, mine], base[mine], tokens[mine])
                    for s in cells
                )
            )
    return StrengthSweep(
        groups, factors, loss, natural, tuple(change), tuple(control), tuple(counts), plan.hash, run.texts.note
    )
