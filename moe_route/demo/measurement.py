"""What the demonstration runs, and how: texts and problems in several languages, under a plan or random ones."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from moe_route.analysis import Difference, paired_difference
from moe_route.data import Corpus, Question, Task
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


def sample_task(task: Task, number: int) -> tuple[Task, np.ndarray]:
    """Draw `number` items of each subset (all if there are no more), with their places among the items; always alike.

    A draw, because neighboring items may alternate between kinds of problems.
    """
    by_language: dict[str, list[Question]] = {}
    for question in task.questions:
        by_language.setdefault(question.language, []).append(question)
    first = by_language[task.languages[0]]
    places: list[int] = []
    for subset in task.subsets:
        own = [place for place, question in enumerate(first) if question.subset == subset]
        places += sorted(random.Random(0).sample(own, min(number, len(own))))
    chosen = (questions[place] for questions in by_language.values() for place in places)
    return Task(task.name, tuple(chosen)), np.array(places)


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
