"""The two findings of `moe-route demo` on the small model, with all their tables and with more random sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from words import standing, starred

from moe_route.analysis import Difference
from moe_route.base.table import number_of, table
from moe_route.data import Corpus, Task
from moe_route.demo.language_experts import LanguageExpertsOff
from moe_route.demo.measurement import Measurement, Reading, sample_corpus, sample_task
from moe_route.demo.task_experts import ONE_IN, SAMPLED, THRESHOLDS, TaskExperts, TaskExpertsOff
from moe_route.demo.wording import name, paragraph, told
from moe_route.steering import Plan


@dataclass(frozen=True)
class TaskTables:
    """The experts of sums switched off, in tables.

    Attributes:
        off: what the demo measures.
        thresholds: threshold -> change of the exact match of sums, and of the loss of general text in nats per token,
            on the sampled items with the experts above this threshold off.
    """

    off: TaskExpertsOff
    thresholds: Mapping[float, tuple[Difference, Difference]] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        return self.off.sentence

    def __str__(self) -> str:
        if not self.off.task_experts.experts:
            return paragraph(self.sentence)
        parts = [paragraph(self.sentence, self._against_sets()), _taken(self.off.task_experts), self._languages()]
        return "\n\n".join([*parts, self._measures(), paragraph(self._by_subset(), self._at_thresholds())])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return self.off.to_dict() | {
            "other_thresholds": {
                f"{threshold:g}": {"exact_match": match.to_dict(), "text_nats_per_token": text.to_dict()}
                for threshold, (match, text) in self.thresholds.items()
            }
        }

    def _against_sets(self) -> str:
        off = self.off
        if not off.sets:
            return "There are no other experts in these layers to compare with."
        match = off.sets["exact match"]
        without = np.array(match.random)[off.shares == 0]
        rest = ""
        if len(without):
            rest = f" The {len(without)} sets without an expert of sums change them by {without.mean():+.2f}."
        return (
            f"Beside {len(match.random)} {'other' if match.enumerated else 'random'} sets of as many experts of the "
            f"same layers, on {len(off.sampled['sums'])} sums and {len(off.sampled['text'])} sentences in each "
            f"language, {standing(match)}, and {off.as_selective} as far and as kind to general text (p = "
            f"{(1 + off.as_selective) / (len(match.random) + 1):.3f} for both).{rest}"
        )

    def _languages(self) -> str:
        off, rows = self.off, []
        both = (off.before.tasks["sums"], off.after.tasks["sums"])
        places = [np.array([i]) for i in range(len(off.languages))]
        for i, language in enumerate(off.languages):
            of = {one: changes[i] for one, changes in off.by_language.items()}
            before, after = (one.of(slice(None), places[i]) for one in both)
            rows.append((name(language), *_cells(before.correct, after.correct, after.change_of_nats(before), of)))
        before, after = both
        rows.append(("mean", *_cells(before.correct, after.correct, after.change_of_nats(before), off.changes)))
        head = ("language", "sums", "off", "change and 95 % interval", "answer", "copying", "counting", "text")
        note = paragraph(
            f"sums: exact match of {len(both[0].correct)} problems whose numbers English alone saw, or nobody. answer:",
            "nats per right answer. copying, counting: exact match. text: nats per token of",
            f"{number_of(len(off.before.texts['text'].nats), 'sentence')}. Intervals are bootstraps over items, with",
            "all languages of an item together. *: zero lies outside the interval.",
        )
        return f"{table(head, rows)}\n{note}"

    def _measures(self) -> str:
        """Every task and text beside random sets and the experts of copying."""
        off, rows = self.off, []
        for one, change in off.changes.items():
            digits = 3 if one in off.before.texts else 2
            control = off.sets.get("exact match" if one == "sums" else one)
            random: tuple[str, ...] = ("", "", "")
            if control is not None:
                ends = (float(np.mean(control.random)), control.strongest)
                random = (*(f"{value:+.{digits}f}" for value in ends), f"{control.p_value:.3f}")
            rows.append((one, told(change, digits), *random, told(off.copying_changes[one], digits)))
        head = ("", "experts of sums off", "random", "strongest", "p", "experts of copying off")
        shared = len(off.copying_experts.experts & off.task_experts.experts)
        note = paragraph(
            "Changes of exact match, and of nats per token (text: general; numbers: English sentences with numbers",
            "that no expert was found in); means over languages. random: mean of the sets; p: rank of the experts of",
            f"sums among the sets and themselves, by the stronger harm. The {len(off.copying_experts.experts)} experts",
            f"of copying were found by the same rule in half of its English items; {shared} are experts of sums, too.",
        )
        return f"{table(head, rows)}\n{note}"

    def _by_subset(self) -> str:
        before, after, parts = self.off.before.tasks["sums"], self.off.after.tasks["sums"], []
        for subset in dict.fromkeys(self.off.subsets):
            at = np.array(self.off.subsets) == subset
            parts.append(f"{subset} {told(after.of(at).change_of_match(before.of(at)))}")
        return f"Change of sums by subset: {', '.join(parts)}."

    def _at_thresholds(self) -> str:
        parts = [
            f"{number_of(len(self.off.task_experts.others[threshold]), 'expert')} above {threshold:g} off, "
            f"sums {told(match)}, text {told(text, 3)}"
            for threshold, (match, text) in self.thresholds.items()
        ]
        return f"By threshold, on the sampled items: {'; '.join(parts)}." if parts else ""


def at_thresholds(
    run: Measurement, experts: TaskExperts, sums: Task, text: Corpus, before: Reading
) -> dict[float, tuple[Difference, Difference]]:
    """Switch the experts above each threshold off, on the items on which random sets are measured."""
    few, places = sample_task(sums, SAMPLED)
    some, text_places = sample_corpus(text, SAMPLED)
    base = before.of({"sums": places, "text": text_places})
    changes = {}
    for threshold, others in experts.others.items():
        caption = f"experts above {threshold:g} off"
        reading = run.read({"sums": few}, {"text": some}, caption, Plan.forbid(others))
        changes[threshold] = (reading.change("sums", base), reading.change("text", base))
    return changes


def _taken(experts: TaskExperts) -> str:
    counts = ", ".join(f"{len(experts.others.get(one, ()))} above {one:g}" for one in THRESHOLDS)
    places = ", ".join(f"L{layer}E{expert}" for layer, ids in experts.experts.items() for expert in ids)
    return paragraph(
        f"Taken are the experts, one in {ONE_IN}, that are chosen most beyond English sentences with numbers: by",
        f"{experts.threshold:.3f} or more of the tokens, {places}. By threshold: {counts}, of {experts.total}.",
    )


def _cells(before: np.ndarray, after: np.ndarray, answer: Difference, of: Mapping[str, Difference]) -> tuple[str, ...]:
    levels = (f"{before.mean():.2f}", f"{after.mean():.2f}", told(of["sums"]), starred(answer))
    return (*levels, starred(of["copying"]), starred(of["counting"]), starred(of["text"], 3))


@dataclass(frozen=True)
class LanguageTables:
    """The experts of each language switched off, in a table."""

    off: LanguageExpertsOff

    @property
    def sentence(self) -> str:
        return self.off.sentence

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return self.off.to_dict()

    def __str__(self) -> str:
        if not self.off.experts:
            return paragraph(self.sentence)
        return "\n\n".join((paragraph(self.sentence, self._against_random()), self._table()))

    def _against_random(self) -> str:
        off = self.off
        if off.random is None:
            return "There are no other experts in these layers to compare with."
        return (
            f"On {number_of(len(off.sampled), 'sentence')}, its own text changes by {off.own_sampled.mean():+.3f} on "
            f"average; by {off.random.mean():+.3f} (at most {off.random.mean(1).max():+.3f}) under "
            f"{number_of(len(off.random), 'random set')} of as many experts of the same layers "
            f"(p = {off.p_value:.3f})."
        )

    def _table(self) -> str:
        off, rows = self.off, []
        control = () if off.random is None else ("random",)
        for i, (language, values) in enumerate(zip(off.experts, off.matrix, strict=True)):
            cells = [
                f"{value:+.2f}{'<' if of == language else ' '}" for of, value in zip(off.languages, values, strict=True)
            ]
            random = () if off.random is None else (f"{off.random[:, i].mean():+.2f}",)
            rows.append((f"{name(language)} ({_short(language)})", *cells, *random))
        sizes = sorted({len(experts) for experts in off.experts.values()})
        experts = number_of(sizes[0], "expert") if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]} experts"
        note = paragraph(
            f"Change of nats per token of {number_of(len(off.before.nats), 'sentence')} per language (columns) when",
            f"the {experts} of a language (rows) are off. <: its own text. Experts: those that few",
            "languages use (lowest entropy over languages), found in other sentences.",
            "" if off.random is None else "random: random sets off, the row's own text.",
        )
        return f"{table(('experts off', *map(_short, off.languages), *control), rows)}\n{note}"


def _short(language: str) -> str:
    """The code of a language without its script, for the head of a narrow column."""
    return language.partition("_")[0]
