"""Results of a study: comparisons by task, noise, power, experts, divergence, its correlation with accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from moe_route.analysis import correlation, divergence, holm, paired_difference, random_control
from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.result import plain
from moe_route.evaluation.conditions import AGAIN, BASE, NULL, STEERED, Conditions, FoundExperts, Setting, Steering
from moe_route.evaluation.measure import AskedTask, scorers_of
from moe_route.evaluation.study import Study
from moe_route.recording import RoutingStatistics

_NORMAL = 1.96 + 0.84  # two-sided level .05, power .8


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers of one condition to one task, on the items that every language has.

    Attributes:
        items: the items, in the order of the task.
        languages: in the order of the task.
        correct: scorer -> bool [items, languages].
        nats: float64 [items, languages], negative log-probability of the right answer; None for generated answers.
        tokens: mean number of new tokens per question.
        cut: bool [items, languages], answers that ended at the limit of new tokens; None if nothing was generated.
    """

    items: tuple[str, ...]
    languages: tuple[str, ...]
    correct: Mapping[str, np.ndarray]
    nats: np.ndarray | None
    tokens: float
    cut: np.ndarray | None = None

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], items: Sequence[str], scorers: Sequence[str]) -> Answered:
        """From the result lines of one task. Raises `AnalysisError` if an answer is missing."""
        languages = tuple(
            sorted({record["language"] for record in records}, key=lambda name: (name != "eng_Latn", name))
        )
        by_key = {(record["item"], record["language"]): record for record in records}
        missing = [(item, language) for item in items for language in languages if (item, language) not in by_key]
        if missing:
            raise AnalysisError(
                f"no answer to item {missing[0][0]!r} in {missing[0][1]}: run the evaluation to its end"
            )
        table = [[by_key[item, language] for language in languages] for item in items]
        correct = {name: np.array([[one["correct"][name] for one in row] for row in table], bool) for name in scorers}
        nats = None
        if records and records[0]["nats"] is not None:
            nats = np.array([[one["nats"] for one in row] for row in table], float)
        tokens = float(np.mean([one["tokens"] for row in table for one in row]))
        cut = None
        if records and "cut" in records[0]:
            cut = np.array([[one["cut"] for one in row] for row in table], bool)
        return cls(tuple(items), languages, correct, nats, tokens, cut)

    def rows(self, which: np.ndarray) -> Answered:
        """The answers to some of the items, chosen by a bool [items]."""
        return Answered(
            tuple(item for item, kept in zip(self.items, which, strict=True) if kept),
            self.languages,
            {name: values[which] for name, values in self.correct.items()},
            None if self.nats is None else self.nats[which],
            self.tokens,
            None if self.cut is None else self.cut[which],
        )


def mcnemar(base: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test of two runs on the same questions, bool arrays of one shape.

    Returns (lost, gained, p): questions that only the base run answers, questions that only the other run answers, and
    the two-sided p-value of a fair coin tossed once for each of them; 1 without any.
    """
    from scipy.stats import binomtest

    lost, gained = int((base & ~other).sum()), int((~base & other).sum())
    return lost, gained, float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def compare(
    base: Answered,
    others: Mapping[str, Answered],
    random: Sequence[str],
    repeats: Sequence[str],
    scorer: str,
    seed: int,
) -> dict[str, Any]:
    """Accuracy of the base run, and change of it by each condition; JSON-able.

    The change is the mean over languages, with its interval from a bootstrap over items with all languages of an item
    together, because they are translations of one another. By language: McNemar's test, corrected by Holm for the
    number of languages. `random` names the conditions with random experts; every other condition is compared with them,
    except those of `repeats`, which have no experts of their own.
    """
    right, ones = base.correct[scorer].astype(float), np.ones(base.correct[scorer].shape)
    results: dict[str, Any] = {"base": _accuracy(base, scorer)}
    for name, answered in others.items():
        mine = answered.correct[scorer].astype(float)
        tests = [
            mcnemar(base.correct[scorer][:, i], answered.correct[scorer][:, i]) for i in range(len(base.languages))
        ]
        adjusted = holm([p for _, _, p in tests])
        entry = _accuracy(answered, scorer)
        entry["change"] = paired_difference(mine, right, ones, seed=seed).to_dict()
        entry["by_language"] = {
            language: {
                "accuracy": float(mine[:, i].mean()),
                "change": float(mine[:, i].mean() - right[:, i].mean()),
                "lost": lost,
                "gained": gained,
                "p": p,
                "p_holm": float(adjusted[i]),
            }
            for i, (language, (lost, gained, p)) in enumerate(zip(base.languages, tests, strict=True))
        }
        if base.nats is not None and answered.nats is not None:
            entry["nats_change"] = paired_difference(answered.nats, base.nats, ones, seed=seed).to_dict()
        drawn = [others[one] for one in random if one in others and one != name]
        if drawn and name not in (*random, *repeats):
            # errors in place of hits, since random_control ranks the lowest first
            control = random_control(
                1 - mine, np.stack([1 - one.correct[scorer].astype(float) for one in drawn]), 1 - right, ones, seed=seed
            )
            entry["against_random"] = {
                "draws": len(drawn),
                "change_of_draws": [0.0 - value for value in control.random],
                "difference": 0.0 - control.difference.value,
                "low": 0.0 - control.difference.high,
                "high": 0.0 - control.difference.low,
                "rank": control.rank,
                "p": control.p_value,
            }
        results[name] = plain(entry)
    return results


def _accuracy(answered: Answered, scorer: str) -> dict[str, Any]:
    values = answered.correct[scorer]
    by_language = {language: {"accuracy": float(values[:, i].mean())} for i, language in enumerate(answered.languages)}
    nats = None if answered.nats is None else float(answered.nats.mean())
    cut = None if answered.cut is None else dict(zip(answered.languages, answered.cut.mean(0).tolist(), strict=True))
    return {
        "items": len(answered.items),
        "accuracy": float(values.mean()),
        "by_language": by_language,
        "nats": nats,
        "tokens": answered.tokens,
        "hit_the_limit": cut,
    }


def power(base: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """What a comparison of two runs can show, bool [items, languages] each; JSON-able.

    `discordant` is the share of questions that only one of them answers, `detectable` the smallest true change of the
    mean accuracy that a test at level .05 finds in four of five evaluations, if questions were independent of each
    other, and `detectable_one_language` that of one language. Translations of an item are alike, so that the true
    figures lie between the two.
    """
    items, languages = base.shape
    share = float((base != other).mean())
    shift = float(other.mean() - base.mean())
    spread = sqrt(max(share - shift**2, 0.0))
    return {
        "questions": items * languages,
        "discordant": share,
        "detectable": _NORMAL * spread / sqrt(items * languages),
        "detectable_one_language": _NORMAL * spread / sqrt(items),
    }


Lines = Mapping[str, Sequence[Mapping[str, Any]]]  # condition -> result lines


def results_of(
    study: Study,
    tasks: Sequence[AskedTask],
    lines: Lines,
    compared: Conditions,
    steering: Steering | None,
    general: RoutingStatistics,
) -> dict[str, Any]:
    """All results, JSON-able; docs/evaluation.md describes them. ``steering`` is None if nothing is steered."""
    swept = steering is not None and bool(steering.points)
    decided = next(task for task in tasks if task.name == (study.sweep.task or tasks[0].name)).items[0::2]
    by_task = {task.name: _task_results(task, lines, study.seeds.bootstrap, decided if swept else ()) for task in tasks}
    return {
        "settings": {
            "published": None if steering is None else _shown(steering.published),
            "chosen": None if steering is None else _shown(steering.chosen),
            "tuned_on_even_items": swept,
        },
        "experts": [] if steering is None else _experts(steering.selected, steering.chosen),
        "sweep": [] if steering is None else list(steering.points),
        "conditions": {
            name: {"plan": None if plan is None else plan.hash, "rules": "" if plan is None else repr(plan)}
            for name, plan in compared.plans.items()
        },
        "left_out": dict(compared.left_out),
        "tasks": by_task,
        "routing": _routing(general, study.corpora.reference, by_task),
    }


def _shown(setting: Setting) -> dict[str, Any]:
    return {**setting.to_dict(), "shown": str(setting)}


def _experts(selected: FoundExperts, chosen: Setting) -> list[dict[str, Any]]:
    """Numbers of experts by threshold."""
    entries = []
    for tau, task in selected.task.items():
        other = selected.multilingual[tau]
        entries.append(
            {
                "tau": tau,
                "task": len(task),
                "multilingual": len(other),
                "shared": len(task & other),
                "task_in_layers": len(task.restrict(chosen.range)),
                "multilingual_in_layers": len(other.restrict(chosen.range)),
                "task_by_layer": {str(layer): list(ids) for layer, ids in task.items()},
                "multilingual_by_layer": {str(layer): list(ids) for layer, ids in other.items()},
            }
        )
    return entries


def _task_results(task: AskedTask, lines: Lines, seed: int, decided: Sequence[str]) -> dict[str, Any]:
    """Results of one task; `decided` are the items that chose the setting, empty without a sweep."""
    scorers = scorers_of(task.kind)
    mine = {name: [one for one in records if one["task"] == task.name] for name, records in lines.items()}
    answered = {name: Answered.of(records, task.items, scorers) for name, records in mine.items()}
    seen = set(decided)  # another task may hold the same items, at other places
    odd = np.array([place % 2 == 1 and item not in seen for place, item in enumerate(task.items)], bool)
    per_token = [name for name in answered if name.startswith("random per token ")]
    random = [name for name in answered if name.startswith("random ") and name not in per_token]
    repeats = (AGAIN, NULL, *per_token)
    parts = {"all": np.ones(len(task.items), bool)} | ({"odd": odd} if odd.any() else {})
    main = "odd" if decided and "odd" in parts else "all"
    results: dict[str, Any] = {
        "kind": task.kind,
        "scorers": list(scorers),
        "main_scorer": scorers[-1],
        "main_items": main,
        "items": len(task.items),
        "left_out_items": len({question.item for question in task.questions}) - len(task.items),
        "languages": list(answered[BASE].languages),
        "max_new_tokens": task.source.max_new_tokens if task.kind == "generate" else None,
        "comparisons": {},
    }
    for part, which in parts.items():
        rows = {name: one.rows(which) for name, one in answered.items()}
        base = rows.pop(BASE)
        results["comparisons"][part] = {name: compare(base, rows, random, repeats, name, seed) for name in scorers}
    right = {name: one.correct[scorers[-1]] for name, one in answered.items()}
    lost, gained, p_value = mcnemar(right[BASE], right[AGAIN])
    results["noise"] = {
        "lost": lost,
        "gained": gained,
        "p": p_value,
        "lines_changed": _changed(mine[BASE], mine[AGAIN]),
        "lines_changed_by_null_plan": _changed(mine[BASE], mine[NULL]) if NULL in mine else None,
        "lines": len(mine[BASE]),
    }
    results["power"] = power(right[BASE][parts[main]], right[STEERED][parts[main]]) if STEERED in right else None
    return results


def _changed(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def _routing(general: RoutingStatistics, reference: str, tasks: Mapping[str, Any]) -> dict[str, Any] | None:
    """Divergence from the reference language, and its correlation with the accuracy of the model alone."""
    if len(general.groups) < 2:
        return None
    measured = divergence(general, reference)
    correlations: dict[str, Any] = {}
    for name, task in tasks.items():
        base = task["comparisons"]["all"][task["main_scorer"]][BASE]["by_language"]
        shared = [group for group in measured.groups if group in base]
        try:
            scores = {group: base[group]["accuracy"] for group in shared}
            correlations[name] = {**correlation(measured, scores, groups=shared).to_dict(), "scores": scores}
        except AnalysisError as error:
            correlations[name] = {"left_out": str(error)}
    entry = {**measured.to_dict(), "expected_floor": plain(measured.expected_floor)}
    return {"divergence": entry, "correlation": correlations}
