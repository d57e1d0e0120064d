"""A positive control for "raising the task experts helps nobody": would the measure show it if it did?

Every language is misled: each expert's logit is shifted by the mean difference between general text and the task, so
that the language routes the task like its own general text. That is the failure that raising task experts is for
[arXiv 2510.04694]. If raising experts that were found in the reference language gives some of the loss back, a null
result on the model as it is says that no language fails in this way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from moe_route.analysis import Difference, RandomControl, paired_difference, random_control
from moe_route.analysis.measures import ratio
from moe_route.analysis.overlap import largest
from moe_route.analysis.resampling import groups_of
from moe_route.analysis.result import Result, plain
from moe_route.base.table import Table, interval
from moe_route.data import Corpus, Task
from moe_route.data.batches import texts_of
from moe_route.experiments.routing import router_weights
from moe_route.experiments.text_run import TextRun
from moe_route.recording import RoutingStatistics
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import ExpertSelection, Plan

DAMAGES = (0.25, 0.5, 0.75, 1.0)
STRENGTHS = (0.5, 1.0)
TASK, MOST_USED, OWN, GENERAL = "task experts", "most used", "the language's own", "general experts"


@dataclass(frozen=True, eq=False, repr=False)
class PositiveControl(Result, hidden=("correct", "others", "sets")):
    """Exact match of misled languages with the task experts raised and without, by damage and strength.

    Attributes:
        languages: the M measured languages, without the reference.
        reference: the language that the experts were found in.
        damages: 0 (the model as it is), then the factors of the shift.
        strengths: 0 (nothing is raised), then the strengths, in standard deviations of a token's logits.
        experts: the task experts of the reference.
        correct: float64 [damage, strength, items, M], 1 for an exact match.
        others: other experts, as many in each layer -> the same as ``correct``, at the damages 0 and the chosen one.
        sets: (damage, strength) -> exact match under random sets of other experts, float64 [sets, sampled, M]; at the
            damages 0 and the chosen one.
        sampled: places of the items on which random sets are measured.
        chosen: places of the damage and the strength with the largest repair in the languages ``chosen_on``.
        chosen_on: the languages that they were chosen on.
        headroom: language -> share of the task's tokens that choose an expert of ``experts``, mean over these.
    """

    languages: tuple[str, ...]
    reference: str
    damages: tuple[float, ...]
    strengths: tuple[float, ...]
    experts: ExpertSelection
    correct: np.ndarray
    others: Mapping[str, np.ndarray]
    sets: Mapping[tuple[int, int], np.ndarray]
    sampled: np.ndarray
    chosen: tuple[int, int]
    chosen_on: tuple[str, ...]
    headroom: Mapping[str, float]

    def match(self, damage: int, strength: int = 0, languages: Sequence[str] | None = None) -> float:
        """Exact match at these places of ``damages`` and ``strengths``, mean over languages (by default all)."""
        return float(self.correct[damage, strength][:, self._columns(languages)].mean())

    def repair(self, damage: int, strength: int, languages: Sequence[str] | None = None) -> Difference:
        """Change of exact match by raising the task experts under a damage, with an interval over items."""
        columns = self._columns(languages)
        after, before = (self.correct[damage, at][:, columns] for at in (strength, 0))
        return paired_difference(after, before, np.ones_like(after))

    def loss(self, damage: int) -> Difference:
        """Change of exact match by a damage alone."""
        return paired_difference(self.correct[damage, 0], self.correct[0, 0], np.ones_like(self.correct[0, 0]))

    def beside(self, damage: int, strength: int) -> RandomControl | None:
        """The task experts beside random sets, on the sampled items; None where no sets were run."""
        sets = self.sets.get((damage, strength))
        if sets is None:
            return None
        after, before = (self.correct[damage, at][self.sampled] for at in (strength, 0))
        return random_control(after, sets, before, np.ones_like(before), larger=True)

    def _columns(self, languages: Sequence[str] | None) -> list[int]:
        return [self.languages.index(name) for name in (self.languages if languages is None else languages)]

    @property
    def told(self) -> tuple[str, ...]:
        """The languages that nothing was chosen on."""
        return tuple(language for language in self.languages if language not in self.chosen_on)

    @property
    def smallest(self) -> int | None:
        """Place of the smallest damage whose repair, at the chosen strength, has an interval above 0; else None."""
        _, strength = self.chosen
        return next(
            (d for d in range(1, len(self.damages)) if self.repair(d, strength).verdict == "higher"),
            None,
        )

    @property
    def sentence(self) -> str:
        """What the control shows, from the intervals."""
        damage, strength = self.chosen
        null = self.repair(0, strength)
        start = f"Raising the task experts of {self.reference} by {self.strengths[strength]:g} changes exact match by "
        start += f"{_shown(null)} where nothing is wrong."
        if self.smallest is None:
            return (
                f"{start} The positive control failed: where every language is misled towards its general text, no "
                f"damage up to {self.damages[-1]:g} is repaired (at {self.damages[damage]:g}: "
                f"{_shown(self.repair(damage, strength))}), so the null result says nothing."
            )
        least, beside = self.smallest, self.beside(damage, strength)
        of = "" if beside is None else f"; {_standing(beside)}"
        told = self.told or self.languages
        return (
            f"{start} The same plan gives back {_shown(self.repair(damage, strength))} where every language is misled "
            f"towards its general text ({self.match(0):.3f} -> {self.match(damage):.3f} -> "
            f"{self.match(damage, strength):.3f}{of}), {self.match(damage, 0, told):.3f} -> "
            f"{self.match(damage, strength, told):.3f} in the {len(told)} languages that nothing was chosen on. The "
            f"smallest damage whose repair it shows is {self.damages[least]:g} of that, a loss of "
            f"{-self.loss(least).value:.3f}."
        )

    def columns(self) -> dict[str, Any]:
        """A row per damage, strength and language: ``exact_match``."""
        damages, strengths, languages = np.indices((len(self.damages), len(self.strengths), len(self.languages)))
        return {
            "damage": np.asarray(self.damages)[damages.ravel()],
            "strength": np.asarray(self.strengths)[strengths.ravel()],
            "language": np.asarray(self.languages, dtype=object)[languages.ravel()],
            "exact_match": self.correct.mean(2).ravel(),
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None): levels and repairs by damage and strength, random sets, other experts."""
        cells = [
            {
                "damage": damage,
                "strength": strength,
                "exact_match": self.match(d, s),
                "by_language": dict(zip(self.languages, self.correct[d, s].mean(0).tolist(), strict=True)),
                "repair": self.repair(d, s).to_dict() if s else None,
                "beside_random": beside.to_dict() if s and (beside := self.beside(d, s)) is not None else None,
            }
            for d, damage in enumerate(self.damages)
            for s, strength in enumerate(self.strengths)
        ]
        content = super().to_dict() | {"sentence": self.sentence, "cells": cells, "other_experts": self._other_rows()}
        return plain(content)

    def _other_rows(self) -> list[dict[str, Any]]:
        rows = []
        for name, values in self.others.items():
            for place, damage in enumerate((0, self.chosen[0])):
                for s in range(1, len(self.strengths)):
                    before = self.correct[damage, 0]
                    change = paired_difference(values[place, s - 1], before, np.ones_like(before))
                    at = {"experts": name, "damage": self.damages[damage], "strength": self.strengths[s]}
                    rows.append({**at, "repair": change.to_dict()})
        return rows

    def tables(self) -> list[Table]:
        rows: list[list[object]] = []
        for d, damage in enumerate(self.damages):
            for s in range(1, len(self.strengths)):
                beside, repair = self.beside(d, s), self.repair(d, s)
                row = [f"{damage:g}", f"+{self.strengths[s]:g}", f"{self.match(d):.3f}", f"{self.match(d, s):.3f}"]
                row += [f"{repair.value:+.3f}", interval(repair.low, repair.high, digits=3), repair.verdict]
                if beside is None:
                    rows.append([*row, "", ""])
                    continue
                spread = f"{np.mean(beside.random):+.3f} [{min(beside.random):+.3f}, {max(beside.random):+.3f}]"
                rows.append([*row, spread, f"{beside.p_value:.3f}"])
        head = ["damage", "raised", "exact match", "then", "change", "95 % interval", "", "random sets", "p"]
        sets = next((len(one) for one in self.sets.values()), 0)
        note = (
            f"damage: share of the shift towards general text, 0 is the model as it is; means over "
            f"{len(self.languages)} languages and {self.correct.shape[2]} problems; random sets: {sets} of as many "
            f"other experts of the same layers, mean and range of their changes on {len(self.sampled)} of the problems"
        )
        shown = [Table(head, rows, f"Raising {len(self.experts)} task experts of {self.reference}", note)]
        others = self._other_rows()
        if others:
            lines = [
                [
                    one["experts"],
                    f"{one['damage']:g}",
                    f"+{one['strength']:g}",
                    f"{one['repair']['value']:+.3f}",
                    interval(one["repair"]["low"], one["repair"]["high"], digits=3),
                ]
                for one in others
            ]
            title = "Other experts raised, as many in each layer"
            shown.append(Table(("experts", "damage", "raised", "change", "95 % interval"), lines, title))
        room = ", ".join(f"{name} {share:.3f}" for name, share in self.headroom.items())
        text = f"headroom, share of the task's tokens that choose a task expert: {room}"
        last = replace(shown[-1], note="\n".join(filter(None, (shown[-1].note, text))))
        return [*shown[:-1], last]


def _shown(change: Difference) -> str:
    return f"{change.value:+.3f} {interval(change.low, change.high, digits=3)}"


def _standing(beside: RandomControl) -> str:
    as_far = beside.rank - 1
    return f"{as_far or 'none'} of {len(beside.random)} random sets as far, p = {beside.p_value:.3f}"


def positive_control(
    language_model: LanguageModel,
    found: Task,
    text: Corpus,
    measured: Task,
    experts: ExpertSelection,
    *,
    reference: str = "eng_Latn",
    chosen_on: Sequence[str] = (),
    damages: Sequence[float] = DAMAGES,
    strengths: Sequence[float] = STRENGTHS,
    damage: Plan | None = None,
    draws: int = 99,
    sampled: int | None = None,
    routed: RoutedModel | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
) -> PositiveControl:
    """Mislead every language but the reference towards its general text, and raise the reference's task experts.

    In language X the logit of every expert gets a share of ``mean logit in X's general text - mean logit in X's task``.
    No text of the reference and no list of experts enters it, and other questions than those that are measured.

    Args:
        found: questions whose routing gives the shift; other ones than ``measured``.
        text: general text in the languages of the task.
        measured: the questions that are answered.
        experts: task experts, found in the reference alone.
        chosen_on: languages on which the damage and the strength that the sentence tells of are chosen, by the largest
            repair; by default the first third of the languages.
        damages: shares of the shift, in increasing order, above 0.
        strengths: of ``Plan.activate``, above 0.
        damage: a plan that takes the place of the shift, in every language; ``damages`` are then factors of it.
        draws: random sets of as many other experts of the same layers, at the damages 0 and the chosen one.
        sampled: number of questions of each language on which these are measured, drawn once; by default all.
        routed: the attached model; without it, the model is attached for the experiment.

    Raises ``ValueError`` for questions in ``found`` and ``measured`` alike, and for a ``damage`` that lowers what is
    raised: it cancels exactly, so its repair is arithmetic and shows nothing about experts.
    """
    languages = tuple(language for language in measured.languages if language != reference)
    _check(found, measured, experts, languages, damages, strengths)
    choosers = tuple(chosen_on) or languages[: max(1, len(languages) // 3)]
    if missing := [name for name in choosers if name not in languages]:
        raise ValueError(f"chosen_on names {missing[0]!r}, and the measured languages are {', '.join(languages)}")
    kept = [language for language in (reference, *languages) if language in text.languages]
    with TextRun(language_model, texts_of(text.subset(kept)), routed, batch_size, max_length, progress) as run:
        options: dict[str, Any] = {"sequences": True, "hidden": damage is None}
        general = run.record("general text", groups=kept, **options).statistics()
        tasks = texts_of(found.corpus())
        with TextRun(language_model, tasks, run.routed, batch_size, max_length, progress) as other:
            task = other.record("task", groups=list(found.languages), **options).statistics()
        cures = [Plan.activate(experts, strength=strength) for strength in strengths]
        if damage is None:
            shifts = _shifts(run.routed, task, general, languages)
        else:
            if any(_opposite(damage, cure, run.routed) for cure in cures):
                raise ValueError(
                    "this damage lowers the experts that are raised, and the two cancel exactly: that the loss comes "
                    "back is arithmetic, and no control (it would be circular). Damage by something else, such as the "
                    "default, which no list of experts enters"
                )
            shifts = dict.fromkeys(languages, damage)
        answering = _Answering(language_model, run.routed, measured, languages, shifts, batch_size, progress)
        factors = (0.0, *map(float, damages))
        raised = (None, *cures)
        cells = [(factor, plan) for factor in factors for plan in raised]
        answers = [answering.of(factor, plan) for factor, plan in answering.shown(cells, "task experts")]
        correct = np.stack(answers).reshape(len(factors), len(raised), *answers[0].shape)
        columns = [languages.index(name) for name in choosers]
        gains = (correct[1:, 1:] - correct[1:, :1])[..., columns].mean((2, 3))
        best = np.unravel_index(int(gains.argmax()), gains.shape)
        chosen = (int(best[0]) + 1, int(best[1]) + 1)
        pair = (0, chosen[0])
        rows = _other_experts(task, general, experts, reference, languages)
        others = {
            name: np.stack([[answering.of(factors[d], by, s) for s in strengths] for d in pair])
            for name, by in answering.shown(list(rows.items()), "other experts")
        }
        sizes = [router.num_experts for router in run.routed.routers]
        number = correct.shape[2]
        some = np.sort(np.random.default_rng(0).permutation(number)[: number if sampled is None else sampled])
        answering.keep(some.tolist())
        sets = {}
        for s, cure in enumerate(cures, 1):
            drawn = [cure.random(seed, num_experts=sizes, exclude=experts) for seed in range(draws)]
            for d in pair if draws else ():
                under = [answering.of(factors[d], plan) for plan in answering.shown(drawn, f"random sets, damage {d}")]
                sets[d, s] = np.stack(under)
    share = task.frequency()
    mask = _mask(experts, share.shape[1:])
    headroom = {name: float(share[task.groups.index(name)][mask].mean()) for name in (reference, *languages)}
    return PositiveControl(
        languages,
        reference,
        factors,
        (0.0, *map(float, strengths)),
        experts,
        correct,
        others,
        sets,
        some,
        chosen,
        choosers,
        headroom,
    )


def _check(
    found: Task,
    measured: Task,
    experts: ExpertSelection,
    languages: Sequence[str],
    damages: Sequence[float],
    strengths: Sequence[float],
) -> None:
    if not languages or not experts:
        raise ValueError("a positive control needs a language beside the reference, and task experts to raise")
    if missing := [name for name in languages if name not in found.languages]:
        raise ValueError(f"the task has no questions in {missing[0]} to find the shift in: leave the language out")
    same = {(q.language, q.prompt) for q in found.questions} & {(q.language, q.prompt) for q in measured.questions}
    if same:
        raise ValueError(f"{len(same)} questions are in found and in measured: measure on other ones")
    for name, values in (("damages", damages), ("strengths", strengths)):
        if not len(values) or min(values) <= 0 or list(values) != sorted(set(values)):
            raise ValueError(f"{name} must be different numbers above 0 in increasing order, not {list(values)}")


class _Answering:
    """Exact match in every language under its own damage and a plan."""

    def __init__(
        self,
        language_model: LanguageModel,
        routed: RoutedModel,
        measured: Task,
        languages: Sequence[str],
        shifts: Mapping[str, Plan],
        batch_size: int,
        progress: bool,
    ) -> None:
        self._model, self._routed, self._shifts, self._progress = language_model, routed, shifts, progress
        self._questions = {language: measured.subset(languages=[language]).questions for language in languages}
        if len({len(questions) for questions in self._questions.values()}) != 1:
            raise ValueError("the measured questions must be the same in every language")
        self._batch = 4 * batch_size  # questions are shorter than texts

    def keep(self, places: Sequence[int]) -> None:
        """Ask only the questions at these places of each language from here on."""
        self._questions = {name: tuple(asked[i] for i in places) for name, asked in self._questions.items()}

    def shown(self, work: Sequence[Any], caption: str) -> Any:
        return tqdm(work, desc=caption, disable=not self._progress, leave=False)

    def of(self, factor: float, raised: Plan | Mapping[str, ExpertSelection] | None, strength: float = 1) -> np.ndarray:
        """float64 [items, M]; ``raised`` is a plan for all languages, or the experts of each."""
        columns = []
        for language, questions in self._questions.items():
            plan = self._shifts[language] * factor if factor else Plan()
            if isinstance(raised, Plan):
                plan += raised
            elif raised is not None:
                plan += Plan.activate(raised[language], strength=strength)
            with self._routed.steer(plan):
                columns.append(self._model.answers(questions, batch_size=self._batch).correct)
        return np.stack(columns, axis=1).astype(float)


def _shifts(
    routed: RoutedModel, task: RoutingStatistics, general: RoutingStatistics, languages: Sequence[str]
) -> dict[str, Plan]:
    """Language -> bias of every expert's logit: its mean in general text minus that in the task."""
    weights = router_weights(routed)
    plans = {}
    for language in languages:
        if language not in general.groups:
            raise ValueError(f"there is no general text in {language} to mislead it towards: leave the language out")
        away = _mean_input(general, language) - _mean_input(task, language)
        shift = {layer: dict(enumerate((weight @ away[layer]).tolist())) for layer, weight in enumerate(weights)}
        plans[language] = Plan.bias(shift)
    return plans


def _mean_input(statistics: RoutingStatistics, group: str) -> np.ndarray:
    """Mean router input over all tokens of a group, float64 [L, H]."""
    assert statistics.store is not None
    (read,) = groups_of(statistics, (group,), statistics.store.items(group), "hidden")
    total = np.einsum("nl,nlh->lh", read.tokens, np.nan_to_num(read.values.astype(np.float64)))
    return ratio(total, read.tokens.sum(0)[:, None])


def _opposite(damage: Plan, cure: Plan, routed: RoutedModel) -> bool:
    """Whether a multiple of one plan undoes the other exactly."""
    sides = []
    for plan in (damage, cure):
        parts: dict[tuple[int, str], np.ndarray] = {}
        for layer, table in enumerate(plan.compile(routed.routers).tables):
            for name, values in {} if table is None else getattr(table, "tables", {}).items():
                parts[layer, name] = values.double().cpu().numpy().ravel()
        sides.append({key: values for key, values in parts.items() if values.any()})
    one, other = sides
    if one.keys() != other.keys():
        return False
    a, b = (np.concatenate([side[key] for key in sorted(one)]) for side in sides)
    return bool(a.shape == b.shape and a @ b <= -(1 - 1e-9) * np.sqrt((a @ a) * (b @ b)))


def _mask(experts: Mapping[int, Sequence[int]], shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for layer, ids in experts.items():
        mask[layer, list(ids)] = True
    return mask


def _other_experts(
    task: RoutingStatistics,
    general: RoutingStatistics,
    experts: ExpertSelection,
    reference: str,
    languages: Sequence[str],
) -> dict[str, dict[str, ExpertSelection]]:
    """Name -> language -> other experts to raise, as many in each layer as ``experts``."""
    used, usual = task.frequency(), general.frequency()

    def of(values: np.ndarray) -> ExpertSelection:
        chosen = {
            layer: np.flatnonzero(largest(values[layer : layer + 1], len(ids))[0]) for layer, ids in experts.items()
        }
        return ExpertSelection({layer: ids.tolist() for layer, ids in chosen.items()})

    def difference(language: str) -> np.ndarray:
        return used[task.groups.index(language)] - usual[general.groups.index(language)]

    rows = {MOST_USED: dict.fromkeys(languages, of(used[task.groups.index(reference)]))}
    rows[OWN] = {language: of(difference(language)) for language in languages}
    if reference in general.groups:
        rows[GENERAL] = dict.fromkeys(languages, of(-difference(reference)))
    return rows
