"""The experts of sums, found in English, are switched off: what happens to sums, to other tasks of digits and to text.

A task has experts of its own only if others are spared, so copying a number and counting on stand beside sums, and the
text that experts are found against holds numbers. Experts of copying, found by the same rule, are switched off too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moe_route.analysis import Difference, RandomControl, expert_difference, random_control
from moe_route.analysis.inputs import selection
from moe_route.analysis.overlap import above, first
from moe_route.analysis.result import plain
from moe_route.base.table import number_of
from moe_route.data import Corpus, Task
from moe_route.demo.measurement import (
    PIVOT,
    Measurement,
    Reading,
    pick_questions,
    random_sets,
    sample_corpus,
    sample_task,
    shares_of,
)
from moe_route.demo.wording import bar, columns, name, paragraph, told
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan

ONE_IN = 10  # one in so many of a model's experts is taken, whatever comes of it: 13 of 128
THRESHOLDS = (0.3, 0.2, 0.1)  # published ones are between 0.25 and 0.5; experts above these stand beside
SAMPLED = 12  # sums of each subset, and sentences, on which random sets are measured; half as many of other tasks
CONTROLS = {"copying": "copying a number", "counting": "counting on"}  # the tasks beside sums
OTHER_HALF = slice(1, None, 2)  # of the items to copy: the experts of copying were not found in these
_MEASURES = {  # what is compared with random sets -> task or text, and its values
    "exact match": ("sums", "correct"),
    "answer": ("sums", "nats"),
    "copying": ("copying", "correct"),
    "counting": ("counting", "correct"),
    "text": ("text", "nats"),
}
_ABLE = 0.5  # exact match of a task that has enough to lose
_NO_SKILL = 0.05  # exact match below which there is hardly anything to lose


@dataclass(frozen=True)
class TaskExperts:
    """The experts that are chosen more often in English problems than in English text, one in `ONE_IN` of all.

    Attributes:
        experts: those with the largest differences over all layers.
        threshold: the smallest of these differences; NaN without experts.
        total: number of experts of the model, over all layers.
        others: the experts above each of `THRESHOLDS` that finds some.
    """

    experts: ExpertSelection
    threshold: float
    total: int
    others: Mapping[float, ExpertSelection] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {
            "threshold": plain(self.threshold),
            "experts": {str(layer): list(ids) for layer, ids in self.experts.items()},
            "counts": {f"{one:g}": len(self.others.get(one, ())) for one in THRESHOLDS},
            "total": self.total,
        }


def find_task_experts(task: RoutingStatistics, contrast: RoutingStatistics) -> TaskExperts:
    """Find the task experts of English. Only routing of English text decides: no loss and no other language.

    Their number is fixed before anything is seen: of seeds alike in skill, one may have its task in two experts above a
    threshold of 0.3, another in ten above 0.2.
    """
    difference = expert_difference(task, contrast, group=PIVOT)
    total = sum(contrast.num_experts)

    def selected(chosen: np.ndarray, threshold: float | None, text: str) -> ExpertSelection:
        return selection(chosen, difference, contrast, threshold=threshold, description=f"task experts, {text}")

    number = max(1, round(total / ONE_IN))
    chosen = first(difference, number)
    least = float(difference[chosen].min()) if chosen.any() else float("nan")
    others = {one: selected(above(difference, one), one, f"above {one:g}") for one in THRESHOLDS}
    return TaskExperts(
        selected(chosen, None, f"the {number} strongest"), least, total, {t: one for t, one in others.items() if one}
    )


@dataclass(frozen=True)
class TaskExpertsOff:
    """Tasks and texts with the experts of sums and without them.

    Attributes:
        task_experts: the experts of sums.
        languages: of the tasks and of general text.
        subsets: the subset of each sum.
        before, after: tasks "sums", "copying" and "counting", texts "text" and "numbers" (English, with numbers).
        copying_experts: the experts of copying, found in every second item of it.
        copying_after: the same without these experts; "copying" has the other items alone.
        sampled: task or text -> places of the items on which random sets are measured.
        sets: "exact match" and "answer" (nats) of sums, "copying" and "counting" (exact match) and "text" (nats per
            token) beside random sets of as many experts, on these items; empty if there are no other experts.
        shares: float64 [sets], the share of the experts of sums that each set holds.
        matches: change of the exact match of sums on these items, float64 [1 + sets, languages]; first the experts of
            sums.
    """

    task_experts: TaskExperts
    languages: tuple[str, ...]
    subsets: tuple[str, ...]
    before: Reading
    after: Reading
    copying_experts: TaskExperts
    copying_after: Reading
    sampled: Mapping[str, np.ndarray] = field(default_factory=dict)
    sets: Mapping[str, RandomControl] = field(default_factory=dict)
    shares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    matches: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    @cached_property
    def changes(self) -> dict[str, Difference]:
        """task or text -> change of its exact match, or of its nats per token, mean over languages."""
        return {one: self.after.change(one, self.before) for one in (*self.before.tasks, *self.before.texts)}

    @cached_property
    def by_language(self) -> dict[str, list[Difference]]:
        """task, or "text" -> its change in each language."""
        places = range(len(self.languages))
        return {one: [self.after.change(one, self.before, i) for i in places] for one in (*self.before.tasks, "text")}

    @cached_property
    def copying_before(self) -> Reading:
        """`before`, on the items of `copying_after`."""
        copying = self.before.tasks["copying"].of(OTHER_HALF)
        return Reading({**self.before.tasks, "copying": copying}, self.before.texts)

    @cached_property
    def copying_changes(self) -> dict[str, Difference]:
        """`changes` without the experts of copying."""
        return {one: self.copying_after.change(one, self.copying_before) for one in self.changes}

    @property
    def unable(self) -> list[str]:
        """The tasks beside sums that the model is too poor at to lose anything."""
        return [one for one in CONTROLS if self.before.match(one) < _ABLE]

    @property
    def also_lost(self) -> list[str]:
        """The tasks beside sums that fall as well, by their intervals."""
        return [one for one in CONTROLS if self.changes[one].verdict == "lower"]

    @property
    def as_selective(self) -> int:
        """Number of random sets that lower sums as far and cost general text no more."""
        if not self.sets:
            return 0
        match, text = (self.sets[measure] for measure in ("exact match", "text"))
        pairs = zip(match.random, text.random, strict=True)
        return sum(lost <= match.plan and cost <= text.plan for lost, cost in pairs)

    @property
    def as_random(self) -> bool:
        """Whether more random sets are as selective than one in twenty of all sets."""
        return self.as_selective > 0 and (1 + self.as_selective) / (1 + len(self.shares)) > 0.05

    @property
    def selective(self) -> bool:
        """Whether sums fall, and the other tasks, which the model can do, do not, by their intervals."""
        spared = not self.unable and not self.also_lost
        return self.changes["sums"].verdict == "lower" and spared and not self.as_random

    @property
    def double(self) -> bool:
        """Whether the experts of copying take copying and spare sums, beside `selective`."""
        taken = self.copying_changes
        return self.selective and taken["copying"].verdict == "lower" and taken["sums"].verdict != "lower"

    @property
    def title(self) -> str:
        """What these are experts of, as far as it was shown."""
        if self.changes["sums"].verdict != "lower":
            return "No sums lost" if self.changes["sums"].verdict == "higher" else "Unclear"
        if self.as_random:
            return "As random sets"
        return "Number tasks" if self.also_lost else "Sums or digits" if self.unable else "Sums"

    @property
    def sentence(self) -> str:
        """What was found, from the intervals."""
        if not self.task_experts.experts:
            return "No task expert was found in English, so there is none to switch off."
        before, after, change = self.before.match("sums"), self.after.match("sums"), self.changes["sums"]
        over = f"on average over {number_of(len(self.languages), 'language')}"
        match change.verdict:
            case "lower" | "higher":
                verb = "lowers" if change.verdict == "lower" else "raises"
                effect = f"{verb} the exact match of sums from {before:.2f} to {after:.2f} {over}: {told(change)}"
            case _:
                effect = (
                    f"changes the exact match of sums ({before:.2f} {over}) by no more than these problems can show"
                )
                effect += f": {told(change)}"
        number = number_of(len(self.task_experts.experts), "expert")
        poor = " The model hardly solves these problems, so there is little to lose." if before < _NO_SKILL else ""
        return f"Switching off the {number} of sums found in English {effect}.{poor} {self._other_tasks()}"

    def _other_tasks(self) -> str:
        """What becomes of copying and counting on, from the intervals."""
        able = [one for one in CONTROLS if one not in self.unable]
        parts = [f"{CONTROLS[one].capitalize()} changes by {told(self.changes[one])}." for one in able]
        if self.also_lost:
            parts.append("So these are experts of number tasks.")
        if self.unable:
            levels = " and ".join(f"{self.before.match(one):.2f} at {CONTROLS[one]}" for one in self.unable)
            parts.append(f"Sums are not told from digits: the model scores {levels}, too little to lose.")
        return " ".join(parts)

    def __str__(self) -> str:
        """The text for a terminal: a line for each language, below them random sets and the experts of copying."""
        number = len(self.task_experts.experts)
        if not number:
            return paragraph(self.sentence)
        cells = max(6, min(30, columns() - 63))
        marks = f"sums {bar(1, 1, 1)} kept {bar(0, 1, 1)} lost"
        lines = [
            paragraph(
                f"{self.title}: sums {self.before.match('sums'):.2f} -> {self.after.match('sums'):.2f} without "
                f"{number} of {self.task_experts.total} experts found against text with numbers."
            ),
            f"{'':<12}{marks:<{cells + 7}}off   copying       counting on   text, nats",
        ]
        for i, language in enumerate(self.languages):
            now, then = ({one: of.correct[:, i].mean() for one, of in read.tasks.items()} for read in self._both)
            controls = "  ".join(f"{now[one]:.2f} -> {then[one]:.2f}" for one in CONTROLS)
            shown = f"{now['sums']:.2f} {bar(then['sums'], now['sums'], cells)} {then['sums']:.2f}"
            text = f"{self.by_language['text'][i].value:+.3f}"
            lines.append(f"{name(language):<12}{shown}   {controls}  {text}")
        return "\n".join([*lines, paragraph(self._beside_sets()), paragraph(self._beside_copying())])

    @property
    def _both(self) -> tuple[Reading, Reading]:
        return self.before, self.after

    def _beside_sets(self) -> str:
        """What random sets do, in a line."""
        if not self.sets:
            return "There are no other experts in these layers to compare with."
        match, text = self.sets["exact match"], self.sets["text"]
        levels = np.array(match.random) + self.before.tasks["sums"].correct[self.sampled["sums"]].mean()
        as_far = "none as far"
        if match.rank > 1:
            as_far = f"{match.rank - 1} as far, {self.as_selective} as kind to text"
        return (
            f"{len(levels)} {'other' if match.enumerated else 'random'} sets, same layers: sums {levels.mean():.2f} "
            f"({levels.min():.2f} to {levels.max():.2f}), text {np.mean(text.random):+.2f}; {as_far}."
        )

    def _beside_copying(self) -> str:
        """What the experts of copying do, in a line."""
        if self.unable:
            return f"Sums are not told from digits: the model itself is below {_ABLE:g} at {' and '.join(self.unable)}."
        before, after = self.copying_before, self.copying_after
        both = ", ".join(f"{one} {before.match(one):.2f} -> {after.match(one):.2f}" for one in ("copying", "sums"))
        shared = len(self.copying_experts.experts & self.task_experts.experts)
        dissociation = "a double dissociation" if self.double else "no double dissociation"
        return f"Copying's own off ({shared} shared): {both}: {dissociation}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        content: dict[str, Any] = {"sentence": self.sentence, "task_experts": self.task_experts.to_dict()}
        if not self.task_experts.experts:
            return content
        names = {"sums": "exact_match", "copying": "copying", "counting": "counting", "text": "text_nats_per_token"}
        before, after = (one.tasks["sums"] for one in self._both)
        answers = after.change_of_nats(before)
        levels = {
            when: {
                one: dict(zip(self.languages, plain(of.correct.mean(0)), strict=True)) for one, of in read.tasks.items()
            }
            for when, read in (("before", self.before), ("after", self.after))
        }
        return content | {
            "title": self.title,
            "selective": self.selective,
            "double": self.double,
            "too_poor_at": self.unable,
            "problems": len(before.correct),
            "sentences": len(self.before.texts["text"].nats),
            "before": levels["before"].pop("sums"),
            "after": levels["after"].pop("sums"),
            "other_tasks": levels,
            "by_language": {
                language: {key: self.by_language[one][i].to_dict() for one, key in names.items()}
                for i, language in enumerate(self.languages)
            },
            "mean": {names.get(one, one): change.to_dict() for one, change in self.changes.items()}
            | {"answer_nats": answers.to_dict()},
            "copying_experts": self.copying_experts.to_dict()
            | {"changes": {names.get(one, one): change.to_dict() for one, change in self.copying_changes.items()}},
            "sampled": {one: len(places) for one, places in self.sampled.items()},
            "random_sets": {measure: one.to_dict() for measure, one in self.sets.items()},
            "random_sets_as_selective": self.as_selective,
            "shares_of_task_experts": plain(self.shares),
        }


def switch_task_experts_off(
    run: Measurement,
    task_experts: TaskExperts,
    copying_experts: TaskExperts,
    tasks: Mapping[str, Task],
    texts: Mapping[str, Corpus],
    before: Reading,
    draws: int,
) -> TaskExpertsOff:
    """Do tasks and read texts without the experts of sums, those of copying, and random sets of as many as of sums.

    Args:
        run: the model.
        task_experts: the experts of sums.
        copying_experts: the experts of copying, found in every second item from the first.
        tasks: "sums", other ones than those that experts were found in, "copying" and "counting".
        texts: "text", general and in the languages of the tasks, and "numbers", English; with other sentences than
            those that experts were found in.
        before: how the model does them as it is.
        draws: number of random sets. They are measured on a sample, because there are many.
    """
    sums = tasks["sums"]
    subsets = tuple(q.subset for q in sums.questions[: len(before.tasks["sums"].correct)])
    if not task_experts.experts:
        return TaskExpertsOff(task_experts, sums.languages, subsets, before, before, copying_experts, before)
    plan = Plan.forbid(task_experts.experts)
    after = run.read(tasks, texts, "experts of sums off", plan)
    halved = {**tasks, "copying": pick_questions(tasks["copying"], OTHER_HALF)}
    copying_after = run.read(halved, texts, "experts of copying off", Plan.forbid(copying_experts.experts))
    result = (task_experts, sums.languages, subsets, before, after, copying_experts, copying_after)
    numbers = {one: SAMPLED if one == "sums" else SAMPLED // 2 for one in tasks}
    chosen: dict[str, Any] = {one: sample_task(task, numbers[one]) for one, task in tasks.items()}
    chosen["text"] = sample_corpus(texts["text"], SAMPLED)
    at = {one: places for one, (_, places) in chosen.items()}
    few, some = {one: chosen[one][0] for one in tasks}, {"text": chosen["text"][0]}
    base, off = before.of(at), after.of(at)
    plans, enumerated = random_sets(plan, draws)
    if not plans:
        return TaskExpertsOff(*result, at)
    random = [run.read(few, some, f"random set {i}", one) for i, one in enumerate(plans, 1)]
    sets = {}
    for measure, (name_of, values) in _MEASURES.items():
        ours, natural, *drawn = (getattr(one[name_of], values) for one in (off, base, *random))
        weights = base.texts[name_of].tokens if name_of in base.texts else np.ones_like(natural)
        sets[measure] = random_control(
            ours, np.stack(drawn), natural, weights, enumerated=enumerated, larger=values == "nats"
        )
    matches = np.stack([one.tasks["sums"].correct.mean(0) for one in (off, *random)])
    changes = matches - base.tasks["sums"].correct.mean(0)
    return TaskExpertsOff(*result, at, sets, shares_of(plans, task_experts.experts), changes)
