"""Published steering settings by name, as data, and the plans that they make from statistics of the same model.

    plan = moe_route.recipe("paper/qwen3-30b-a3b/mgsm")(task_statistics, general_statistics)

Two kinds of settings are here: the main results of "Multilingual Routing in Mixture-of-Experts" (arXiv 2510.04694),
which are those of the shipped studies, and the numbers of experts that SteerMoE (arXiv 2509.09660) publishes beside its
code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from moe_route.analysis.experts import risk_experts, task_experts
from moe_route.analysis.inputs import AnalysisError, Statistics
from moe_route.base import schema
from moe_route.base.table import ShownAsTables, Table
from moe_route.data import shipped_studies
from moe_route.steering.layers import layers
from moe_route.steering.plan import Plan
from moe_route.steering.selection import ExpertSelection

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PAPER = "arXiv 2510.04694"
_STEERMOE = "arXiv 2509.09660, activations/num_experts.jsonl of its repository"


class _Model(NamedTuple):
    """A model of the publications: its hub name, number of MoE layers, experts per layer and per token."""

    name: str
    layers: int
    experts: int
    top_k: int


_MODELS = {
    "qwen3-30b-a3b": _Model("Qwen/Qwen3-30B-A3B", 48, 128, 8),
    "phi-3.5-moe": _Model("microsoft/Phi-3.5-MoE-instruct", 32, 16, 2),
    "gpt-oss-20b": _Model("openai/gpt-oss-20b", 24, 32, 4),
    "gpt-oss-120b": _Model("openai/gpt-oss-120b", 36, 128, 4),
    "olmoe-1b-7b": _Model("allenai/OLMoE-1B-7B-0125-Instruct", 16, 64, 8),
    "mixtral-8x7b": _Model("mistralai/Mixtral-8x7B-Instruct-v0.1", 32, 8, 2),
}


@dataclass(frozen=True)
class Recipe:
    """One published setting; calling it makes the plan from statistics.

    Attributes:
        name: such as "paper/qwen3-30b-a3b/mgsm".
        source: where it was published.
        model: hub name of the model; ``num_layers``, ``num_experts`` and ``top_k`` are its MoE layers and experts.
        task: the texts that show what is to be strengthened.
        baseline: the texts that they are compared with.
        kind: "soft" (``Plan.activate``), "hard" (``Plan.force_on``, ``weight="paper"``) or "steermoe"
            (``force_on`` and ``force_off`` with ``weight="steermoe"``).
        strength: of soft activation.
        threshold: of the difference of frequencies, for the paper's recipes.
        first, last: the steered layers as published, both ends included, for the paper's recipes. The paper does not
            say whether it counts from 0 or 1.
        activations, deactivations: numbers of experts over all layers, for SteerMoE's recipes.
        experts: published number of steered experts.
        before, after: published score without and with steering, in percent.
    """

    name: str
    source: str
    model: str
    num_layers: int
    num_experts: int
    top_k: int
    task: str
    baseline: str
    kind: Literal["soft", "hard", "steermoe"]
    strength: float | None = None
    threshold: float | None = None
    first: int | None = None
    last: int | None = None
    activations: int | None = None
    deactivations: int | None = None
    experts: int | None = None
    before: float | None = None
    after: float | None = None

    def __post_init__(self) -> None:
        schema.check(self)

    def __call__(
        self,
        task: Statistics,
        baseline: Statistics,
        *,
        group: str | None = None,
        baseline_group: str | None = None,
        layer_base: Literal[0, 1] = 0,
    ) -> Plan:
        """Select the experts by statistics of ``task`` and ``baseline`` texts, and make the plan.

        Args:
            group: the group of the task, if the statistics hold several; also that of the baseline unless
                ``baseline_group`` is given.
            layer_base: the number that the publication gives the first MoE layer, for recipes with layers.

        Raises ``AnalysisError`` for statistics of a model of another shape, and ``PlanError`` if no expert is selected.
        """
        for statistics, what in ((task, "task"), (baseline, "baseline")):
            self._check(statistics, what)
        given: dict[str, Any] = {"group": group, "baseline_group": baseline_group}
        if self.kind == "steermoe":
            differing = risk_experts(
                task, baseline, activations=self.activations, deactivations=self.deactivations, **given
            )
            parts = [
                make(experts, weight="steermoe")
                for make, experts in ((Plan.force_on, differing.activate), (Plan.force_off, differing.deactivate))
                if experts
            ]
            if not parts:
                raise AnalysisError(f"no expert differs between the two: {self.name} needs {self.task}")
            plan = sum(parts[1:], parts[0])
        else:
            assert self.threshold is not None
            assert self.first is not None
            experts = task_experts(task, baseline, threshold=self.threshold, **given)
            plan = plan_of(experts, layers(self.first, self.last, base=layer_base), self.kind, strength=self.strength)
        return Plan(plan.rules, model=plan.model, description=f"recipe {self.name} ({self.source})")

    def _check(self, statistics: Statistics, what: str) -> None:
        if not isinstance(statistics, Statistics):
            raise AnalysisError(f"the {what} must be RoutingStatistics, not {type(statistics).__name__}")
        wanted = (self.num_experts,) * self.num_layers, (self.top_k,) * self.num_layers
        if (tuple(statistics.num_experts), tuple(statistics.top_k)) != wanted:
            sizes = sorted({*statistics.num_experts})
            raise AnalysisError(
                f"{self.name} is for {self.model} ({self.num_layers} MoE layers, {self.num_experts} experts, top-"
                f"{self.top_k}); the {what} statistics have {len(statistics.num_experts)} layers of "
                f"{', '.join(map(str, sizes))} experts, top-{', '.join(map(str, sorted({*statistics.top_k})))}: take a "
                "recipe of that model, or make a plan with analysis.task_experts or risk_experts"
            )

    @property
    def settings(self) -> str:
        """The setting on one line."""
        if self.kind == "steermoe":
            return f"{self.activations} on, {self.deactivations} off"
        how = f"soft {self.strength:g}" if self.kind == "soft" else "hard"
        return f"layers {self.first}-{self.last}, tau {self.threshold:g}, {how}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return asdict(self)


class Recipes(ShownAsTables, dict[str, Recipe]):
    """Recipes by name."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {"recipes": [entry.to_dict() for entry in self.values()]}

    def tables(self) -> list[Table]:
        rows = [
            (
                entry.name,
                entry.model,
                entry.settings,
                "" if entry.before is None else f"{entry.before:g} -> {entry.after:g}",
                entry.source.partition(",")[0],
            )
            for entry in self.values()
        ]
        return [Table(("recipe", "model", "settings", "published", "source"), rows)]


def plan_of(
    experts: ExpertSelection,
    where: Sequence[int],
    kind: Literal["soft", "hard"],
    *,
    strength: float | None = None,
    correction: Literal[0, 1] = 0,
) -> Plan:
    """Steer experts in the layers `where` as arXiv 2510.04694 does.

    "soft" is `Plan.activate` by `strength` standard deviations of a token's logits, with this `correction` of their
    number; "hard" is `Plan.force_on` with the weights of the paper.
    """
    if kind == "hard":
        return Plan.force_on(experts, where, weight="paper")
    if kind != "soft" or strength is None:
        raise ValueError(f'experts are steered "hard", or "soft" with a strength, not {kind!r} with {strength}')
    return Plan.activate(experts, where, strength=strength, correction=correction)


def recipe(name: str) -> Recipe:
    """The published setting with this name; ``analysis.recipes.RECIPES`` shows all. ``ValueError`` for other names."""
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}: {schema.meant(name, RECIPES)} (moe-route plan make)")
    return RECIPES[name]


# study -> number of steered experts, score before and after; the settings are those of the study
_PAPER_RESULTS = {
    "qwen3-30b-a3b-mgsm": (22, 76.4, 78.0),
    "phi-3.5-moe-mgsm": (12, 57.5, 58.9),
    "gpt-oss-20b-mgsm": (9, 68.9, 71.5),
    "qwen3-30b-a3b-medical": (23, 68.2, 69.1),
    "phi-3.5-moe-medical": (2, 57.8, 58.8),
    "gpt-oss-20b-medical": (6, 63.8, 64.5),
}
_PAPER_TASKS = {
    "mgsm": ("mgsm", "English math problems (the paper evaluates on MGSM)"),
    "medical": ("medicine", "English medical questions (the paper evaluates on Global-MMLU, medicine)"),
}
# model -> (activations, deactivations) that make it faithful to a document, safe, and unsafe
_STEERMOE_NUMBERS = {
    "qwen3-30b-a3b": ((0, 500), (15, 0), (5, 480)),
    "olmoe-1b-7b": ((0, 50), (5, 0), (10, 125)),
    "phi-3.5-moe": ((10, 75), (5, 0), (5, 50)),
    "mixtral-8x7b": ((10, 100), (20, 0), (20, 0)),
    "gpt-oss-120b": ((5, 100), (5, 0), (0, 100)),
    "gpt-oss-20b": ((10, 50), (5, 0), (0, 20)),
}
_STEERMOE_TEXTS = {
    "faithful": ("questions with a document, tokens of the question", "the same questions without the document"),
    "safe": ("refusals of harmful requests, tokens of the answer", "answers that comply with them"),
    "unsafe": ("answers that comply with harmful requests, tokens of the answer", "refusals of them"),
}


def _paper() -> list[Recipe]:
    """The settings of the shipped studies, with what the paper reports of them."""
    recipes = []
    for study, (experts, before, after) in _PAPER_RESULTS.items():
        key, _, task = study.rpartition("-")
        settings = tomllib.loads(schema.read_text(shipped_studies()[study]))
        steer = settings["steer"]
        recipes.append(
            Recipe(
                f"paper/{key}/{_PAPER_TASKS[task][0]}",
                _PAPER,
                *_MODELS[key],
                task=_PAPER_TASKS[task][1],
                baseline="general English",
                kind=steer["kind"],
                strength=steer.get("strength"),
                threshold=settings["find"]["tau"],
                first=steer["layers"][0],
                last=steer["layers"][1],
                experts=experts,
                before=before,
                after=after,
            )
        )
    return recipes


def _steermoe() -> list[Recipe]:
    return [
        Recipe(
            f"steermoe/{key}/{behavior}",
            _STEERMOE,
            *_MODELS[key],
            task=texts[0],
            baseline=texts[1],
            kind="steermoe",
            activations=on,
            deactivations=off,
        )
        for key, numbers in _STEERMOE_NUMBERS.items()
        for (behavior, texts), (on, off) in zip(_STEERMOE_TEXTS.items(), numbers, strict=True)
    ]


RECIPES = Recipes({entry.name: entry for entry in (*_paper(), *_steermoe())})
"""Every recipe, by name."""
