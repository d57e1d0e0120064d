"""Measure on one model what the study asks: routing of parallel text and of digit problems, skill, and steering.

Every function returns plain numbers and lists for JSON. Arrays over items are [items, languages].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route import ExpertSelection, Plan, RoutingStatistics, analysis
from moe_route.data import Corpus, Task
from moe_route.data.batches import texts_of
from moe_route.demo.task_experts import find_task_experts
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts

PIVOT = "eng_Latn"
TAUS = (0.5, 0.4, 0.3, 0.2, 0.1)  # published thresholds lie between 0.25 and 0.5
TAU = 0.3  # from which on the paper's sets of experts do not meet
STRENGTH = 0.5  # the published strength of soft steering, in standard deviations of the logits
FINDING, MEASURING = "seen", ("english_only", "unseen")  # subsets of the problems: to find experts, to measure skill
RESAMPLES = 100  # of the expert sets

# Names of the plans that the findings speak of.
RAISED = "task experts raised"
RANDOM = "random experts raised"
OTHER_LAYERS = "task experts of the other layers raised"
MULTILINGUAL = "multilingual experts raised"
LOWERED = "task experts lowered"
FORCED_OFF = "task experts forced off"


@dataclass(frozen=True)
class Material:
    """What a model is run on: parallel general text, and digit problems in the same languages."""

    general: Corpus
    problems: Task
    random_sets: int

    @property
    def languages(self) -> tuple[str, ...]:
        return self.general.languages

    @property
    def finding(self) -> Corpus:
        """The problems, with answers, in whose routing task experts are looked for."""
        return self.problems.subset(FINDING).corpus()

    @property
    def measuring(self) -> Task:
        """The problems on which skill is measured; their pairs of numbers are not those of `finding`."""
        return self.problems.subset(*MEASURING)


def record(language_model: LanguageModel, corpus: Corpus, progress: str | None = None) -> RoutingStatistics:
    """The routing of a corpus, sentence by sentence, with the consistency of each sentence."""
    with (
        language_model.attach() as routed,
        routed.record(groups=corpus.languages, sequences=True, consistency=True) as recorder,
    ):
        record_texts(recorder, language_model, texts_of(corpus), progress=progress)
    return recorder.statistics()


# ---- skill


def answers(language_model: LanguageModel, task: Task, progress: str | None = None) -> dict[str, np.ndarray]:
    """Wrong answers (1 or 0) and nats of the right answer, float64 [items, languages] each."""
    found = language_model.answers(task.questions, progress=progress)
    shape = (len(task.languages), -1)
    return {"errors": 1.0 - found.correct.reshape(shape).T, "nats": found.nats.reshape(shape).T}


def skill(language_model: LanguageModel, problems: Task) -> dict[str, Any]:
    """Exact match by subset and language."""
    found = {}
    for subset in problems.subsets:
        errors = answers(language_model, problems.subset(subset))["errors"]
        found[subset] = dict(zip(problems.languages, (1 - errors.mean(0)).tolist(), strict=True))
    return found


# ---- routing


def routing(
    recordings: Mapping[str, RoutingStatistics], skill: Mapping[str, Mapping[str, float]], training: Mapping[str, Any]
) -> dict[str, Any]:
    """Findings 1 to 4, which need no run of the model.

    `recordings` are "general", "problems" and "untrained"; `training` holds "pairs", the sentence pairs per language,
    and "shares", the shares of number pairs seen, each None if it is not known.
    """
    general, problems, base = (recordings[name] for name in ("general", "problems", "untrained"))
    scores = {name: sum(skill[subset][name] for subset in MEASURING) / len(MEASURING) for name in general.groups}
    found = divergences(general, problems, base)
    per_sequence = general.tokens()[:, 0] / general.sequences()
    return {
        "languages": list(general.groups),
        "layers": len(general.layers),
        "experts": list(general.num_experts),
        "tokens": dict(zip(general.groups, per_sequence.tolist(), strict=True)),
        "load": analysis.load_balance(general, pool=True).entropy[0].tolist(),
        "depth": depth(found),
        "performance": performance(found, scores, training["shares"]),
        "entropy": sharpness(general),
        "consistency": likeness(general, training["pairs"]),
        "experts_by_threshold": expert_sets(problems, general),
        "untrained": {
            "entropy": sharpness(base),
            "consistency": likeness(base, training["pairs"]),
            "multilingual": multilingual_only(base),
        },
    }


def change(new: np.ndarray, old: np.ndarray) -> dict[str, Any]:
    """Mean of new - old over items and languages, with its 95 % interval from a bootstrap over items."""
    new, old = np.broadcast_arrays(new, old)
    return analysis.paired_difference(new, old, np.ones_like(old, dtype=float)).to_dict()


def divergences(
    general: RoutingStatistics, task: RoutingStatistics, untrained: RoutingStatistics
) -> dict[str, analysis.Divergence]:
    """Divergence from English on general text (also less its floor), on problems, and in the untrained model."""
    recorded = {"general": general, "problems": task, "untrained": untrained}
    found = {name: analysis.divergence(statistics, PIVOT) for name, statistics in recorded.items()}
    return found | {"less the floor": analysis.divergence(general, PIVOT, correct="floor")}


def depth(found: Mapping[str, analysis.Divergence]) -> dict[str, Any]:
    """Finding 1: how much lower divergence is in the middle layers than at both ends, also against no training."""
    rows: dict[str, Any] = {}
    for name, one in found.items():
        shape = analysis.u_shape(one)
        rows[name] = shape.to_dict() | {
            "mean": _value(shape.depth.mean(), *shape.mean_interval()),
            "by_layer": one.values.mean(0).tolist(),
            "floor_by_layer": one.expected_floor.mean(0).tolist(),
            "pairs": one.pairs,
        }
    trained, base = (_item_depth(found[name]) for name in ("general", "untrained"))
    rows["above_untrained"] = change(trained, base)
    return rows


def _item_depth(found: analysis.Divergence) -> np.ndarray:
    """The depth of each sentence, [items, languages]; its mean is the depth of `u_shape`."""
    shape = analysis.u_shape(found)
    assert found.pair_values is not None
    first, middle, last = (
        found.pair_values[..., list(part)].mean(-1)
        for part in (shape.first_layers, shape.middle_layers, shape.last_layers)
    )
    return ((first + last) / 2 - middle).T


def performance(
    found: Mapping[str, analysis.Divergence], scores: Mapping[str, float], shares: Mapping[str, float] | None
) -> dict[str, Any]:
    """Finding 2: correlation over languages of exact match with divergence, by layer and in the middle layers.

    `shares` are the shares of pairs of numbers that each language saw in training, None if they are not known.
    """
    rows: dict[str, Any] = {}
    for name in ("general", "problems"):
        one = found[name]
        middle = over_layers(one, analysis.middle_layers(len(one.layers)))
        rows[name] = {
            "by_layer": analysis.correlation(one, scores).to_dict(),
            "middle": _correlated(middle, scores),
            "given_share": None if shares is None else _correlated(middle, scores, {"share": shares}),
        }
    rows["scores"] = dict(scores)
    rows["shares"] = None if shares is None else dict(shares)
    return rows


def over_layers(found: analysis.Divergence, layers: Sequence[int] | range) -> analysis.Divergence:
    """The mean over some layers as the only layer of a divergence."""
    picked = list(layers)
    pairs = None if found.pair_values is None else found.pair_values[..., picked].mean(-1, keepdims=True)
    values, undefined = (x[:, picked] for x in (found.values, found.undefined))
    return dataclasses.replace(
        found,
        values=values.mean(1, keepdims=True),
        undefined=undefined.sum(1, keepdims=True),
        layers=(f"mean of {picked[0]}-{picked[-1]}",),
        pair_values=pairs,
        floor=None,
        reference_floor=None,
    )


def _correlated(
    found: analysis.Divergence, scores: Mapping[str, float], covariates: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Pearson r of a divergence with one layer."""
    result = analysis.correlation(found, scores, covariates=covariates)
    ends = result.interval() if found.pair_values is not None else (np.array([np.nan]), np.array([np.nan]))
    return _value(result.pearson[0], ends[0][0], ends[1][0], result.p_value[0]) | {
        "spearman": _number(result.spearman[0]),
        "languages": len(result.groups),
    }


def sharpness(general: RoutingStatistics) -> dict[str, Any]:
    """Finding 3, first half: entropy of tokens and of sentences by layer, and how it changes with depth."""
    found = analysis.entropy(general)
    rows: dict[str, Any] = {"groups": list(found.groups)}
    for of, values in (("token", found.token_values), ("sequence", found.sequence_values)):
        assert values is not None
        by_item = _aligned(general, found.groups, values)
        half = by_item.shape[-1] // 2
        step = by_item[..., -1] - by_item[..., -2]
        others = [i for i, name in enumerate(found.groups) if name != PIVOT]
        rows[of] = {
            "by_layer": found.normalized(of).tolist(),  # type: ignore[arg-type]
            "second_half": change(by_item[..., half:].mean(-1), by_item[..., :half].mean(-1)),
            "last_step": change(step[:, others], np.zeros(1)),
            "last_step_above_english": change(step[:, others], step[:, [found.groups.index(PIVOT)]]),
        }
    return rows


def _aligned(statistics: RoutingStatistics, groups: Sequence[str], values: Sequence[np.ndarray]) -> np.ndarray:
    """Values of the kept sequences [items, groups, layers]; each group was recorded in an order of its own."""
    store = statistics.store
    assert store is not None
    items = store.paired_items(*groups)
    columns = []
    for group, of_group in zip(groups, values, strict=True):
        place = {item: row for row, item in enumerate(store.items(group))}
        columns.append(of_group[[place[item] for item in items]])
    return np.stack(columns, axis=1)


def likeness(general: RoutingStatistics, resources: Mapping[str, float] | None) -> dict[str, Any]:
    """Finding 3, second half: consistency of the tokens of a sentence, and its correlation with the amount of text."""
    found = analysis.consistency(general)
    low, high = found.interval()
    rows: dict[str, Any] = {
        "groups": list(found.groups),
        "by_layer": found.values.tolist(),
        "mean": found.values.mean(1).tolist(),
        "widest": float((high - low).max() / 2),
        "resources": None,
        "correlation": None,
    }
    if resources is not None:
        known = [name for name in found.groups if name in resources]
        values = found.values[[found.groups.index(name) for name in known]]
        scores = {name: float(np.log(resources[name])) for name in known}
        # correlation() takes a divergence: any value of groups by layers can stand in its place
        layered = analysis.Divergence(values, tuple(known), "log amount of text", found.layers)
        rows["resources"] = {name: resources[name] for name in known}
        rows["by_layer_correlation"] = analysis.correlation(layered, scores).to_dict()
        rows["correlation"] = _correlated(over_mean(layered), scores)
    return rows


def over_mean(found: analysis.Divergence) -> analysis.Divergence:
    """The mean over all layers as the only layer; for values without single sentences."""
    return analysis.Divergence(found.values.mean(1, keepdims=True), found.groups, found.reference, ("mean",))


def expert_sets(task: RoutingStatistics, general: RoutingStatistics) -> dict[str, Any]:
    """Finding 4: task and multilingual experts by threshold, and in how many resamples they do not meet at `TAU`."""
    english = task.select(groups=[PIVOT])
    swept = analysis.sweep(english, general, reference=PIVOT, group=PIVOT, thresholds=TAUS)

    def both(task: RoutingStatistics, general: RoutingStatistics) -> ExpertSelection:
        ours = analysis.task_experts(task, general, group=PIVOT, threshold=TAU)
        return ours & analysis.multilingual_experts(general, PIVOT, threshold=TAU)

    stability = analysis.stability_selection(both, english, general, resamples=RESAMPLES)
    return swept.to_dict() | {"apart": float((stability.sizes == 0).mean()), "resamples": stability.resamples}


def multilingual_only(general: RoutingStatistics) -> dict[str, int]:
    """Number of multilingual experts by threshold."""
    return {f"{tau:g}": len(analysis.multilingual_experts(general, PIVOT, threshold=tau)) for tau in sorted(TAUS)}


# ---- steering


def choose(task: RoutingStatistics, general: RoutingStatistics, middle: Sequence[int]) -> float | None:
    """The largest threshold with a task expert in the middle layers; None if there is none at any.

    It depends on the routing of English text alone, so no result of steering has a say in it.
    """
    for tau in TAUS:
        if analysis.task_experts(task, general, group=PIVOT, threshold=tau, layers=middle):
            return tau
    return None


def plans(
    task: RoutingStatistics, general: RoutingStatistics, tau: float, middle: Sequence[int]
) -> tuple[dict[str, tuple[Plan, ExpertSelection]], dict[str, str]]:
    """The published plan, variants and controls by name, with their experts; and why other controls cannot be made."""
    others = [layer for layer in range(len(general.layers)) if layer not in middle]
    ours = analysis.task_experts(task, general, group=PIVOT, threshold=tau)
    multilingual = analysis.multilingual_experts(general, PIVOT, threshold=tau)
    inner = ours.restrict(middle)
    published = Plan.activate(inner, strength=STRENGTH)
    found = {
        RAISED: (published, inner),
        f"{RAISED}, strength {2 * STRENGTH:g}": (Plan.activate(inner, strength=2 * STRENGTH), inner),
        "task experts forced on": (Plan.force_on(inner), inner),
    }
    for lower in TAUS[TAUS.index(tau) + 1 :]:
        more = analysis.task_experts(task, general, group=PIVOT, threshold=lower, layers=middle)
        found[f"{RAISED}, threshold {lower:g}"] = (Plan.activate(more, strength=STRENGTH), more)
    missing = {}
    for name, experts in ((OTHER_LAYERS, ours.restrict(others)), (MULTILINGUAL, multilingual.restrict(middle))):
        if experts:
            found[name] = (Plan.activate(experts, strength=STRENGTH), experts)
        else:
            missing[name] = f"there is no such expert at threshold {tau:g}"
    found[LOWERED] = (-published, inner)
    found[FORCED_OFF] = (Plan.force_off(inner), inner)
    # One in ten of all experts, as in the demo: above the threshold of a published plan there may be one alone.
    everywhere = find_task_experts(task, general).experts
    found["task experts of all layers forced off"] = (Plan.force_off(everywhere), everywhere)
    return found, missing


def steering(
    language_model: LanguageModel,
    task: RoutingStatistics,
    general: RoutingStatistics,
    material: Material,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Findings 5 and 6: what steering does to exact match and to the nats of the right answer."""
    english = task.select(groups=[PIVOT])
    middle = analysis.middle_layers(len(general.layers))
    tau = choose(english, general, middle)
    rows: dict[str, Any] = {"middle": list(middle), "threshold": tau, "strength": STRENGTH, "plans": {}, "missing": {}}
    if tau is None:
        rows["missing"] = {RAISED: f"there is no task expert in the middle layers at threshold {min(TAUS):g}"}
        return rows
    asked, rows["missing"] = plans(english, general, tau, middle)
    measuring = material.measuring
    base = answers(language_model, measuring)
    with language_model.attach() as routed:

        def under(plan: Plan) -> dict[str, np.ndarray]:
            with routed.steer(plan):
                return answers(language_model, measuring)

        runs = {}
        for name, (plan, experts) in asked.items():
            say(f"  {name}")
            runs[name] = under(plan)
            found = outcome(runs[name], base, measuring.languages)
            rows["plans"][name] = found | {"experts": [list(pair) for pair in experts.pairs]}
        say(f"  {material.random_sets} sets of {RANDOM}")
        sets = [under(asked[RAISED][0].random(seed)) for seed in range(material.random_sets)]
        rows["random"] = against_random(runs[RAISED], sets, base)
    again = answers(language_model, measuring)
    rows["restored"] = bool(np.array_equal(again["nats"], base["nats"]))
    return rows


def outcome(new: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], languages: Sequence[str]) -> dict[str, Any]:
    """Change of exact match, on average and by language, and of the nats of the right answer."""
    match = {name: 1 - run["errors"] for name, run in (("new", new), ("base", base))}
    columns = [change(match["new"][:, [i]], match["base"][:, [i]]) for i in range(len(languages))]
    return {
        "exact_match": change(match["new"], match["base"]),
        "nats": change(new["nats"], base["nats"]),
        "by_language": dict(zip(languages, columns, strict=True)),
    }


def against_random(
    plan: Mapping[str, np.ndarray], sets: Sequence[Mapping[str, np.ndarray]], base: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The published plan against random experts, in errors and in nats (of both, lower is better)."""
    rows = {}
    for measure in ("errors", "nats"):
        drawn = np.stack([one[measure] for one in sets])
        ones = np.ones_like(base[measure])
        rows[measure] = analysis.random_control(plan[measure], drawn, base[measure], ones).to_dict()
        # the unsteered model in the plan's place: how far it lies from the mean of the random sets
        none = analysis.random_control(base[measure], drawn, base[measure], ones).difference
        rows[measure]["mean_of_random"] = _value(-none.value, -none.high, -none.low, none.p_value)
    return rows


def _value(value: float, low: float = np.nan, high: float = np.nan, p: float = np.nan) -> dict[str, Any]:
    return {"value": _number(value), "low": _number(low), "high": _number(high), "p_value": _number(p)}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
