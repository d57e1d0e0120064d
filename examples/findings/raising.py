"""The task experts are raised, as the paper does, with every control: does the task gain?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from words import span, standing, verdicts

from moe_route.analysis import RandomControl, middle_layers, random_control
from moe_route.base.table import number_of, table
from moe_route.data import Task
from moe_route.demo.measurement import Measurement, Scores, random_sets, sample_task
from moe_route.demo.wording import paragraph, told
from moe_route.steering import ExpertSelection, Plan

STRENGTHS = (0.5, 1.0)  # in standard deviations of a token's logits; 0.5 is the published one
DRAWS = 19  # random sets at most; a plan better than all of them has p = 0.05
_SAMPLED = 24  # problems on which they are measured


@dataclass(frozen=True)
class Raising:
    """Problems with the task experts raised, forced on and lowered.

    Attributes:
        experts: the task experts.
        languages: of the problems.
        before: how these are answered.
        after: plan -> how they are answered under it; the first is the published strength. Empty without task experts.
        sets: "exact match" and "answer" (nats) of the first plan beside random sets, on the sampled problems.
        sampled: their number.
    """

    experts: ExpertSelection
    languages: tuple[str, ...]
    before: Scores
    after: Mapping[str, Scores] = field(default_factory=dict)
    sets: Mapping[str, RandomControl] = field(default_factory=dict)
    sampled: int = 0

    @property
    def sentence(self) -> str:
        """What was found, from the interval."""
        if not self.after:
            return "There is no task expert to raise."
        plan, scores = next(iter(self.after.items()))
        change = scores.change_of_match(self.before)
        start = f"Raising the {number_of(len(self.experts), 'task expert')} ({plan})"
        match change.verdict:
            case "higher":
                effect = "raises exact match"
            case "lower":
                effect = "lowers exact match"
            case _:
                effect = "changes exact match by no more than these problems can show"
        return (
            f"{start} {effect}: {told(change, 3)} from {self.before.correct.mean():.3f}{self._beyond(change.verdict)}."
        )

    def _beyond(self, verdict: str) -> str:
        if not self.sets or verdict != "higher":
            return ""
        more = self.sets["exact match"].difference.verdict == "higher"
        return f", {'' if more else 'not clearly '}more than random experts do"

    def __str__(self) -> str:
        if not self.after:
            return paragraph(self.sentence)
        rows: list[tuple[object, ...]] = []
        for plan, scores in self.after.items():
            match, nats = scores.change_of_match(self.before), scores.change_of_nats(self.before)
            columns = np.arange(len(self.languages))[:, None]
            items = slice(None)
            each = [scores.of(items, one).change_of_match(self.before.of(items, one)) for one in columns]
            rows.append((plan, told(match, 3), verdicts(each), told(nats)))
        note = paragraph(
            f"Changes of exact match and of nats per answer, means over languages, on {len(self.before.correct)}",
            "problems whose numbers English alone saw. languages: in how many of them exact match changes.",
            "A strength is in standard deviations of a token's logits.",
        )
        parts = [
            paragraph(self.sentence),
            f"{table(('task experts', 'exact match', 'languages', 'nats per answer'), rows)}\n{note}",
        ]
        return "\n\n".join([*parts, self._random()] if self.sets else parts)

    def _random(self) -> str:
        match, nats = self.sets["exact match"], self.sets["answer"]
        return paragraph(
            f"Beside {number_of(len(match.random), 'random set')} of as many experts raised in the same way, on "
            f"{self.sampled} of these problems: task experts {match.plan:+.3f} exact match and {nats.plan:+.2f} "
            f"nats, the sets {np.mean(match.random):+.3f} and {np.mean(nats.random):+.2f} on average, "
            f"{match.strongest:+.3f} and {nats.strongest:+.2f} at best.",
            f"Of exact match, {standing(match)}; of nats, {standing(nats)}.",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {
            "sentence": self.sentence,
            "plans": {
                plan: {
                    "exact_match": scores.change_of_match(self.before).to_dict(),
                    "answer_nats": scores.change_of_nats(self.before).to_dict(),
                }
                for plan, scores in self.after.items()
            },
            "problems": len(self.before.correct),
            "sampled": self.sampled,
            "random_sets": {measure: one.to_dict() for measure, one in self.sets.items()},
        }


def raising_plans(experts: ExpertSelection, layers: int, top_k: int) -> dict[str, Plan]:
    """The plans to measure by name, the published strength in all layers first; empty without experts.

    A token has no room for more than `top_k` forced experts per layer: those with the lowest ids are forced on.

    Plans of the middle layers, which the paper steers, and of the others are left out where these hold no expert, or
    all of them.
    """
    if not experts:
        return {}
    soft = STRENGTHS[0]
    plans = {f"+{strength:g}": Plan.activate(experts, strength=strength) for strength in STRENGTHS}
    plans["forced on"] = Plan.force_on({layer: ids[:top_k] for layer, ids in experts.items()})
    middle = middle_layers(layers)
    others = [layer for layer in range(layers) if layer not in middle]
    parts: dict[str, Sequence[int]] = {f"layers {span(middle)}": middle, "other layers": others}
    for place, part in parts.items():
        kept = experts.restrict(part)
        if kept and len(kept) < len(experts):
            plans[f"+{soft:g}, {place}"] = Plan.activate(kept, strength=soft)
    plans[f"-{soft:g}"] = Plan.deactivate(experts, strength=soft)
    return plans


def raise_task_experts(
    run: Measurement, experts: ExpertSelection, layers: int, problems: Task, before: Scores, draws: int = DRAWS
) -> Raising:
    """Measure problems under every plan of `raising_plans`, and under random sets.

    Args:
        run: the model.
        experts: the task experts.
        layers: number of MoE layers.
        problems: other problems than those that the experts were found in.
        before: how these are answered.
        draws: number of random sets, at most `DRAWS`.
    """
    plans = raising_plans(experts, layers, min(router.top_k for router in run.routed.routers))
    after = {plan: run.answers(problems, f"task experts {plan}", made) for plan, made in plans.items()}
    if not plans:
        return Raising(experts, problems.languages, before)
    first, scores = next(iter(plans.values())), next(iter(after.values()))
    sets, enumerated = random_sets(first, min(draws, DRAWS))
    if not sets:
        return Raising(experts, problems.languages, before, after)
    few, at = sample_task(problems, _SAMPLED)
    random = [run.answers(few, f"random set {i} raised", one) for i, one in enumerate(sets, 1)]
    base, raised = before.of(at), scores.of(at)
    ones = np.ones_like(base.correct)
    beside = {
        "exact match": random_control(
            raised.correct,
            np.stack([one.correct for one in random]),
            base.correct,
            ones,
            enumerated=enumerated,
            larger=True,
        ),
        "answer": random_control(
            raised.nats, np.stack([one.nats for one in random]), base.nats, ones, enumerated=enumerated
        ),
    }
    return Raising(experts, problems.languages, before, after, beside, len(at))
