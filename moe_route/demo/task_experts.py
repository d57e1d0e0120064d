"""The experts of a task, found in English, are switched off: what happens to the task and to other text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from moe_route.analysis import Difference, RandomControl, random_control, task_experts
from moe_route.analysis.result import plain
from moe_route.base.table import number_of, table
from moe_route.data import Corpus, Task
from moe_route.demo.measurement import (
    PIVOT,
    Losses,
    Measurement,
    Scores,
    random_sets,
    sample_corpus,
    sample_task,
    shares_of,
)
from moe_route.demo.wording import name, paragraph, standing, starred, told, verdicts
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan

# Published thresholds are between 0.25 and 0.5. A lower one serves only where 0.3 finds fewer than `FEWEST` experts:
# of training seeds alike in skill, one may have its task in two experts above 0.3, another in ten above 0.2.
THRESHOLDS = (0.3, 0.2, 0.1)
FEWEST = 5
SAMPLED = 12  # problems of each subset, and sentences, on which random sets are measured
_NO_SKILL = 0.05  # exact match below which there is hardly anything to lose


@dataclass(frozen=True)
class TaskExperts:
    """Experts chosen more often in English problems than in general English text, in all layers.

    Attributes:
        experts: those above the threshold.
        threshold: the largest of `THRESHOLDS` that finds `FEWEST`, else the largest that finds one, else the smallest.
        counts: threshold -> number of experts above it.
        total: number of experts of the model, over all layers.
        others: the experts above each other threshold that finds some.
    """

    experts: ExpertSelection
    threshold: float
    counts: Mapping[float, int]
    total: int
    others: Mapping[float, ExpertSelection] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} above {threshold:g}" for threshold, count in self.counts.items())
        places = ", ".join(f"L{layer}E{expert}" for layer, ids in self.experts.items() for expert in ids)
        chosen = ""
        if self.experts:
            rule = f", the largest threshold that finds {FEWEST}" if len(self.experts) >= FEWEST else ""
            chosen = f"Taken are those above {self.threshold:g}{rule}: {places}."
        return paragraph(
            "A task expert is chosen more often in English problems that every language saw than in general English,",
            f"by more than a threshold: {counts}, of {self.total}.",
            chosen,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {
            "threshold": self.threshold,
            "experts": {str(layer): list(ids) for layer, ids in self.experts.items()},
            "counts": {f"{threshold:g}": count for threshold, count in self.counts.items()},
            "total": self.total,
        }


def find_task_experts(task: RoutingStatistics, general: RoutingStatistics) -> TaskExperts:
    """Find the task experts of English. Only routing of English text decides: no loss and no other language."""
    found = {t: task_experts(task, general, threshold=t, group=PIVOT) for t in THRESHOLDS}
    enough = [t for t, experts in found.items() if len(experts) >= FEWEST]
    some = [t for t, experts in found.items() if experts]
    threshold = next(iter(enough or some), THRESHOLDS[-1])
    counts = {t: len(experts) for t, experts in found.items()}
    others = {t: found[t] for t in some if t != threshold}
    return TaskExperts(found[threshold], threshold, counts, sum(general.num_experts), others)


@dataclass(frozen=True)
class TaskExpertsOff:
    """Problems and general text with the task experts and without them.

    Attributes:
        task_experts: the task experts.
        languages: of the problems and of the text.
        subsets: the subset of each item of the problems.
        before, after: how the problems are answered.
        text_before, text_after: loss of general text.
        sets: "exact match", "answer" (nats) and "text" (nats per token) beside random sets of as many experts, on the
            sampled items; empty if there are no other experts.
        shares: float64 [sets], the share of the task experts that each set holds.
        sampled: number of problems, and of sentences, on which random sets are measured.
        matches: change of exact match on the sampled items, float64 [1 + sets, languages]; first the task experts.
        others: threshold -> change of exact match, and of the loss of general text in nats per token, on the sampled
            items with the experts above another threshold off.
    """

    task_experts: TaskExperts
    languages: tuple[str, ...]
    subsets: tuple[str, ...]
    before: Scores
    after: Scores
    text_before: Losses
    text_after: Losses
    sets: Mapping[str, RandomControl] = field(default_factory=dict)
    shares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    sampled: tuple[int, int] = (0, 0)
    matches: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    others: Mapping[float, tuple[Difference, Difference]] = field(default_factory=dict)

    @cached_property
    def change(self) -> Difference:
        """Change of exact match, mean over languages."""
        return self.after.change_of_match(self.before)

    @cached_property
    def text_change(self) -> Difference:
        """Change of the loss of general text in nats per token, mean over languages."""
        return self.text_after.change(self.text_before)

    @cached_property
    def by_language(self) -> list[tuple[Difference, Difference, Difference]]:
        """Changes of exact match, of nats per answer and of nats per token of text, for each language."""
        items, changes = slice(None), []
        for column in np.arange(len(self.languages))[:, None]:
            before, after = self.before.of(items, column), self.after.of(items, column)
            text = self.text_after.of(items, column).change(self.text_before.of(items, column))
            changes.append((after.change_of_match(before), after.change_of_nats(before), text))
        return changes

    @property
    def sentence(self) -> str:
        """What was found, from the intervals."""
        experts = self.task_experts.experts
        if not experts:
            return "No task expert was found in English, so there is none to switch off."
        before, after = self.before.correct.mean(), self.after.correct.mean()
        number = number_of(len(experts), "task expert")
        of = f"Switching off the {number} found in English"
        over = f"on average over {number_of(len(self.languages), 'language')}"
        match self.change.verdict:
            case "lower":
                effect = f"lowers exact match from {before:.2f} to {after:.2f} {over}: {told(self.change)}"
            case "higher":
                effect = f"raises exact match from {before:.2f} to {after:.2f} {over}: {told(self.change)}"
            case _:
                effect = f"changes exact match ({before:.2f} {over}) by no more than these problems can show"
                effect += f": {told(self.change)}"
        poor = " The model hardly solves these problems, so there is little to lose." if before < _NO_SKILL else ""
        return f"{of} {effect}.{poor}"

    def __str__(self) -> str:
        if not self.task_experts.experts:
            return f"{paragraph(self.sentence)}\n\n{self.task_experts}"
        parts = [
            f"{paragraph(self.sentence)}\n{paragraph(self._selectivity(), self._against_sets())}",
            str(self.task_experts),
            self._table(),
            self._by_subset(),
            *self._at_other_thresholds(),
        ]
        return "\n\n".join([*parts, self._sets_table()] if self.sets else parts)

    def _selectivity(self) -> str:
        answers = self.after.change_of_nats(self.before)
        hit = verdicts(match for match, _, _ in self.by_language)
        return (
            f"By language, exact match is {hit}. Right answers change by {told(answers)} nats, general text by "
            f"{told(self.text_change, 3)} nats per token."
        )

    @property
    def as_selective(self) -> int:
        """Number of random sets that lower exact match as far and cost general text no more."""
        match, text = (self.sets[measure] for measure in ("exact match", "text"))
        pairs = zip(match.random, text.random, strict=True)
        return sum(lost <= match.plan and cost <= text.plan for lost, cost in pairs)

    def _against_sets(self) -> str:
        if not self.sets:
            return "There are no other experts in these layers to compare with."
        match = self.sets["exact match"]
        kind = "all other" if match.enumerated else "random"
        problems, sentences = self.sampled
        return (
            f"Beside {len(match.random)} {kind} sets of as many experts of the same layers, measured on {problems} of "
            f"the problems and {sentences} of the sentences in each language, {standing(match)}." + self._sparing_text()
        )

    def _sparing_text(self) -> str:
        """What the sets that come as far in the task cost general text."""
        match, text = (self.sets[measure] for measure in ("exact match", "text"))
        as_far = [cost for lost, cost in zip(match.random, text.random, strict=True) if lost <= match.plan]
        if not as_far:
            return ""
        own, least = f"{text.plan:+.3f} nats per token", f"{min(as_far):+.3f}"
        p_value = f"p = {(1 + self.as_selective) / (len(match.random) + 1):.3f} for both"
        if len(as_far) == 1:
            return f" It costs general text {least}, the task experts cost it {own} ({p_value})."
        return (
            f" Of those, {self.as_selective} cost general text as little: the task experts {own}, the least of those "
            f"{least} ({p_value})."
        )

    def _table(self) -> str:
        columns = zip(self.languages, self.by_language, range(len(self.languages)), strict=True)
        text = self.text_before.nats.sum(0) / self.text_before.tokens.sum(0)
        rows: list[tuple[object, ...]] = []
        for language, (match, nats, loss), i in columns:
            levels = (f"{one.correct[:, i].mean():.2f}" for one in (self.before, self.after))
            own = (f"{self.before.nats[:, i].mean():.2f}", starred(nats), f"{text[i]:.2f}", starred(loss, 3))
            rows.append((name(language), *levels, told(match), *own))
        levels = (f"{one.correct.mean():.2f}" for one in (self.before, self.after))
        answers = self.after.change_of_nats(self.before)
        own = (f"{self.before.nats.mean():.2f}", starred(answers), f"{text.mean():.2f}", starred(self.text_change, 3))
        rows.append(("mean", *levels, told(self.change), *own))
        head = ("language", "match", "off", "change and 95 % interval", "answer", "change", "text", "change")
        note = (
            f"match: exact match of {len(self.before.correct)} problems whose numbers English alone saw, or nobody. "
            "answer: nats per right answer. text: nats per token of "
            f"{number_of(len(self.text_before.nats), 'sentence')}. Intervals are bootstraps over items, with all "
            "languages of an item together. *: zero lies outside the interval."
        )
        return f"{table(head, rows)}\n{paragraph(note)}"

    def _by_subset(self) -> str:
        parts = []
        for subset in dict.fromkeys(self.subsets):
            at = np.array(self.subsets) == subset
            parts.append(f"{subset} {told(self.after.of(at).change_of_match(self.before.of(at)))}")
        return paragraph(f"Change of exact match by subset: {', '.join(parts)}.")

    def _at_other_thresholds(self) -> list[str]:
        parts = [
            f"{number_of(self.task_experts.counts[threshold], 'expert')} above {threshold:g} off, "
            f"exact match {told(match)}, text {told(text, 3)}"
            for threshold, (match, text) in self.others.items()
        ]
        return [paragraph(f"At other thresholds, on the sampled items: {'; '.join(parts)}.")] if parts else []

    def _sets_table(self) -> str:
        measures = list(self.sets.values())
        random = np.array([one.random for one in measures])
        holding = self.shares > 0
        digits = (2, 2, 3)
        rows: list[tuple[object, ...]] = [("task experts", 1, "1.00", *_signed([one.plan for one in measures], digits))]
        for label, at in (
            ("random", np.ones_like(holding)),
            ("  with a task expert", holding),
            ("  without one", ~holding),
        ):
            if at.any():
                share = f"{self.shares[at].mean():.2f}"
                rows.append((label, int(at.sum()), share, *_signed(random[:, at].mean(1), digits)))
        rows.append(("  the strongest of each", "", "", *_signed([one.strongest for one in measures], digits)))
        rows.append(("p, task experts", "", "", *(f"{one.p_value:.3f}" for one in measures)))
        head = ("experts off", "sets", "share", "exact match", "answer", "text")
        note = paragraph(
            "Mean changes on the sampled items. share: of the task experts that a set holds.",
            f"Task experts minus the mean of the sets: exact match {told(self.sets['exact match'].difference)}, "
            f"answer {told(self.sets['answer'].difference)}, text {told(self.sets['text'].difference, 3)}.",
            "p: rank of the task experts among the sets and themselves, by the stronger harm.",
        )
        return f"{table(head, rows)}\n{note}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        content: dict[str, Any] = {"sentence": self.sentence, "task_experts": self.task_experts.to_dict()}
        if not self.task_experts.experts:
            return content
        names = ("exact_match", "answer_nats", "text_nats_per_token")
        by_language = {
            language: {key: change.to_dict() for key, change in zip(names, changes, strict=True)}
            for language, changes in zip(self.languages, self.by_language, strict=True)
        }
        mean = (self.change, self.after.change_of_nats(self.before), self.text_change)
        return content | {
            "problems": len(self.before.correct),
            "sentences": len(self.text_before.nats),
            "before": dict(zip(self.languages, plain(self.before.correct.mean(0)), strict=True)),
            "after": dict(zip(self.languages, plain(self.after.correct.mean(0)), strict=True)),
            "by_language": by_language,
            "mean": {key: change.to_dict() for key, change in zip(names, mean, strict=True)},
            "sampled": {"problems": self.sampled[0], "sentences": self.sampled[1]},
            "random_sets": {measure: one.to_dict() for measure, one in self.sets.items()},
            "random_sets_as_selective": self.as_selective if self.sets else None,
            "shares_of_task_experts": plain(self.shares),
            "other_thresholds": {
                f"{threshold:g}": dict(zip((names[0], names[2]), (one.to_dict() for one in changes), strict=True))
                for threshold, changes in self.others.items()
            },
        }


def switch_task_experts_off(
    run: Measurement,
    task_experts: TaskExperts,
    problems: Task,
    before: Scores,
    general: Corpus,
    text_before: Losses,
    draws: int,
) -> TaskExpertsOff:
    """Measure problems and general text without the task experts, and without random sets of as many.

    Args:
        run: the model.
        task_experts: the task experts.
        problems: other problems than those that the experts were found in.
        before: how these are answered.
        general: other sentences than those that the experts were found in, in the same languages.
        text_before: their loss.
        draws: number of random sets. They are measured on a sample, because there are many.
    """
    subsets = tuple(q.subset for q in problems.questions[: len(before.correct)])
    if not task_experts.experts:
        return TaskExpertsOff(task_experts, problems.languages, subsets, before, before, text_before, text_before)
    plan = Plan.forbid(task_experts.experts)
    after = run.answers(problems, "task experts off", plan)
    text_after = run.losses(general, "task experts off, text", plan)
    result = (task_experts, problems.languages, subsets, before, after, text_before, text_after)
    few, at = sample_task(problems, SAMPLED)
    some, text_at = sample_corpus(general, SAMPLED)
    others = {}
    for threshold, experts in task_experts.others.items():
        scored = run.answers(few, f"experts above {threshold:g} off", Plan.forbid(experts))
        lost = run.losses(some, f"experts above {threshold:g} off, text", Plan.forbid(experts))
        others[threshold] = (scored.change_of_match(before.of(at)), lost.change(text_before.of(text_at)))
    sampled = (len(at), len(text_at))
    plans, enumerated = random_sets(plan, draws)
    if not plans:
        return TaskExpertsOff(*result, sampled=sampled, others=others)
    scores = [run.answers(few, f"random set {i}", one) for i, one in enumerate(plans, 1)]
    texts = [run.losses(some, f"random set {i}, text", one) for i, one in enumerate(plans, 1)]
    ones = np.ones_like(before.correct[at])
    matches = np.stack([one.correct for one in scores])
    base, off = before.of(at), after.of(at)
    tokens, text = text_before.tokens[text_at], np.stack([one.nats for one in texts])
    asked = (
        ("exact match", off.correct, matches, base.correct, ones, False),
        ("answer", off.nats, np.stack([one.nats for one in scores]), base.nats, ones, True),
        ("text", text_after.nats[text_at], text, text_before.nats[text_at], tokens, True),
    )
    sets = {
        measure: random_control(changed, random, natural, weights, enumerated=enumerated, larger=larger)
        for measure, changed, random, natural, weights, larger in asked
    }
    changes = np.concatenate([off.correct[None], matches]).mean(1) - base.correct.mean(0)
    return TaskExpertsOff(*result, sets, shares_of(plans, task_experts.experts), sampled, changes, others)


def _signed(values: Any, digits: tuple[int, ...]) -> list[str]:
    return [f"{value:+.{places}f}" for value, places in zip(values, digits, strict=True)]
