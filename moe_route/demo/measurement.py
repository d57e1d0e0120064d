"""What the demonstration runs, and how: texts and problems in several languages, under a plan or random ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from moe_route.analysis import Difference, paired_difference
from moe_route.data import Corpus, Task
from moe_route.data.batches import texts_of
from moe_route.experiments.text_run import TextRun
from moe_route.recording import RoutingStatistics
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import ExpertSelection, Plan, PlanError

PIVOT = "eng_Latn"
SUBSETS = ("seen", "english_only", "unseen")  # of the problems, by who saw their numbers in training
HELD_OUT = SUBSETS[1:]
_QUESTIONS = 4  # questions are so much shorter than texts that a batch holds more of them


@dataclass(frozen=True)
class Scores:
    """How problems are answered, float64 [items, languages] each.

    Attributes:
        correct: 1 for an exact match, else 0.
        nats: negative log-probability of the right answer.
    """

    correct: np.ndarray
    nats: np.ndarray

    def of(self, items: np.ndarray | slice, languages: np.ndarray | slice = slice(None)) -> Scores:
        """Some of the items and languages."""
        return Scores(self.correct[items][:, languages], self.nats[items][:, languages])

    def change_of_match(self, before: Scores) -> Difference:
        """Change of exact match from `before`, mean over languages; its interval is over items."""
        return paired_difference(self.correct, before.correct, np.ones_like(self.correct))

    def change_of_nats(self, before: Scores) -> Difference:
        """Change of the nats per answer from `before`, likewise."""
        return paired_difference(self.nats, before.nats, np.ones_like(self.nats))


@dataclass(frozen=True)
class Losses:
    """Loss of texts: summed nats, and number of predicted tokens, float64 [items, languages] each."""

    nats: np.ndarray
    tokens: np.ndarray

    def of(self, items: np.ndarray | slice, languages: np.ndarray | slice = slice(None)) -> Losses:
        """Some of the items and languages."""
        return Losses(self.nats[items][:, languages], self.tokens[items][:, languages])

    def change(self, before: Losses) -> Difference:
        """Change of the nats per token from `before`, mean over languages; its interval is over items."""
        return paired_difference(self.nats, before.nats, before.tokens)


@dataclass(frozen=True)
class Reading:
    """How a model does every task and reads every text, as it is or under a plan; by the name of the task or text."""

    tasks: Mapping[str, Scores]
    texts: Mapping[str, Losses]

    def __getitem__(self, name: str) -> Scores | Losses:
        """Of a task or of a text."""
        return self.tasks[name] if name in self.tasks else self.texts[name]

    def match(self, task: str) -> float:
        """Exact match of a task, mean over languages."""
        return float(self.tasks[task].correct.mean())

    def change(self, name: str, before: Reading, language: int | slice = slice(None)) -> Difference:
        """Change of a task's exact match, or of a text's nats per token; mean over languages, or of the one there."""
        columns = language if isinstance(language, slice) else slice(language, language + 1)
        if name in self.tasks:
            ours, theirs = (one.tasks[name].of(slice(None), columns) for one in (self, before))
            return ours.change_of_match(theirs)
        read, other = (one.texts[name].of(slice(None), columns) for one in (self, before))
        return read.change(other)

    def of(self, items: Mapping[str, np.ndarray]) -> Reading:
        """Some of the items: those that are given by the name of their task or text, which others lack."""
        tasks = {name: scores.of(items[name]) for name, scores in self.tasks.items() if name in items}
        return Reading(tasks, {name: one.of(items[name]) for name, one in self.texts.items() if name in items})


@dataclass(frozen=True)
class Measurement:
    """A model under observation, with the options of its runs."""

    language_model: LanguageModel
    routed: RoutedModel
    batch_size: int = 16
    max_length: int | None = None
    progress: bool = False

    def on(self, corpus: Corpus) -> TextRun:
        """The texts of a corpus, language by language, to be run."""
        texts = texts_of(corpus)
        return TextRun(self.language_model, texts, self.routed, self.batch_size, self.max_length, self.progress)

    def record(self, corpus: Corpus, what: str) -> RoutingStatistics:
        """Record the routing of a corpus, with all sequences; `what` is the caption of the progress bar."""
        with self.on(corpus) as run:
            return run.record(what, groups=list(corpus.languages), sequences=True).statistics()

    def answers(self, task: Task, what: str, plan: Plan | None = None) -> Scores:
        """Answer the questions of a task."""
        shown = what if self.progress else None
        with nullcontext() if plan is None else self.routed.steer(plan):
            answers = self.language_model.answers(
                task.questions, batch_size=_QUESTIONS * self.batch_size, progress=shown
            )
        shape = (len(task.languages), -1)
        return Scores(answers.correct.astype(float).reshape(shape).T, answers.nats.reshape(shape).T)

    def losses(self, corpus: Corpus, what: str, plan: Plan | None = None) -> Losses:
        """Compute the loss of each text of a corpus."""
        with self.on(corpus) as run:
            nats, shape = run.losses(plan, what), (len(corpus.languages), -1)
        return Losses(nats.reshape(shape).T, run.tokens.reshape(shape).T)

    def read(
        self, tasks: Mapping[str, Task], texts: Mapping[str, Corpus], what: str, plan: Plan | None = None
    ) -> Reading:
        """Do every task and read every text, under a plan if one is given."""
        return Reading(
            {name: self.answers(task, f"{what}: {name}", plan) for name, task in tasks.items()},
            {name: self.losses(corpus, f"{what}: {name}", plan) for name, corpus in texts.items()},
        )


def sample_task(task: Task, number: int) -> tuple[Task, np.ndarray]:
    """Draw `number` items of each subset (all if there are no more), with their places among the items; always alike.

    A draw, because neighboring items may alternate between kinds of problems.
    """
    per_language = len(task.questions) // len(task.languages)
    first = task.questions[:per_language]
    places: list[int] = []
    for subset in task.subsets:
        own = [place for place, question in enumerate(first) if question.subset == subset]
        places += sorted(random.Random(0).sample(own, min(number, len(own))))
    starts = range(0, len(task.questions), per_language)
    chosen = (task.questions[start + place] for start in starts for place in places)
    return Task(task.name, tuple(chosen)), np.array(places)


def pick_questions(task: Task, items: slice) -> Task:
    """Some of the items of a task, in every language."""
    of = {language: task.subset(languages=[language]).questions[items] for language in task.languages}
    return Task(task.name, tuple(question for questions in of.values() for question in questions))


def sample_corpus(corpus: Corpus, number: int) -> tuple[Corpus, np.ndarray]:
    """Draw `number` items of a corpus (all if there are no more), with their places; always the same ones."""
    places = sorted(random.Random(0).sample(range(len(corpus)), min(number, len(corpus))))
    return pick_items(corpus, places), np.array(places)


def pick_items(corpus: Corpus, places: Iterable[int]) -> Corpus:
    """The items of a corpus at these places."""
    kept = list(places)
    texts = {language: tuple(corpus[language][place] for place in kept) for language in corpus.languages}
    return Corpus(corpus.languages, tuple(corpus.items[place] for place in kept), texts, corpus.name)


def random_sets(plan: Plan, number: int) -> tuple[list[Plan], bool]:
    """The plan on `number` random sets of as many experts of each layer, and whether these are all other sets.

    All are taken if there are no more than `number`. A draw may hold experts of the plan: see `shares_of`.
    """
    try:
        return plan.all_random(number), True
    except PlanError:  # more sets than that
        return [plan.random(seed) for seed in range(number)], False


def shares_of(sets: Sequence[Plan], experts: ExpertSelection) -> np.ndarray:
    """float64 [sets]: the share of `experts` that each set holds."""
    return np.array([len(plan.touching(experts)) / len(experts) for plan in sets])
