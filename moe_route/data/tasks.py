"""Tasks: questions with one right answer, in several languages, for judging a model by exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_route.data.corpus import Corpus
from moe_route.data.languages import spaces_words
from moe_route.data.reader import CorpusError, table


@dataclass(frozen=True, slots=True)
class Question:
    """One question in one language.

    Attributes:
        item: key of the question, the same in every language.
        language: its language, such as a FLORES code.
        prompt: text to continue.
        answer: right continuation, with the space before it where the language has spaces.
        subset: part of the task that it belongs to, "" if the task has no parts.
        choices: all continuations to choose from, empty if the answer is free.
    """

    item: str
    language: str
    prompt: str
    answer: str
    subset: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """Questions that are the same in every language.

    Attributes:
        name: of the task.
        questions: language by language, in the same order of items.
    """

    name: str
    questions: tuple[Question, ...]

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages in the order of the questions."""
        return tuple(dict.fromkeys(question.language for question in self.questions))

    @property
    def subsets(self) -> tuple[str, ...]:
        """Names of the parts, in the order of the questions."""
        return tuple(dict.fromkeys(question.subset for question in self.questions))

    def subset(self, *names: str, languages: Sequence[str] | None = None, limit: int | None = None) -> Task:
        """The questions of these parts (all parts without names), of these languages, the first `limit` of each.

        `limit` counts the questions of every part and language by themselves. Raises `ValueError` for an unknown part
        or language.
        """
        for given, known, what in ((names, self.subsets, "part"), (languages or (), self.languages, "language")):
            for name in given:
                if name not in known:
                    raise ValueError(f"the task {self.name} has no {what} {name!r}: choose among {', '.join(known)}")
        kept, count = [], dict.fromkeys(((q.subset, q.language) for q in self.questions), 0)
        for question in self.questions:
            key = (question.subset, question.language)
            if (names and question.subset not in names) or (
                languages is not None and question.language not in languages
            ):
                continue
            count[key] += 1
            if limit is None or count[key] <= limit:
                kept.append(question)
        return Task(self.name, tuple(kept))

    def corpus(self) -> Corpus:
        """The questions with their answers, as texts that are parallel in all languages."""
        items = tuple(dict.fromkeys(question.item for question in self.questions))
        texts: dict[str, list[str]] = {language: [] for language in self.languages}
        for question in self.questions:
            texts[question.language].append(question.prompt + question.answer)
        return Corpus(self.languages, items, {language: tuple(column) for language, column in texts.items()}, self.name)

    @classmethod
    def read_tsv(cls, path: str | Path) -> Task:
        """Read a table of free answers: columns ``item``, ``answer`` and one per language; ``subset`` may be there.

        Other columns whose name holds no underscore are left out. The answer follows a space, except in Japanese and
        Chinese. Raises `CorpusError` for a table without these columns, with rows of other lengths or empty cells.
        """
        read = table(path)
        languages = [name for name in read.header if "_" in name]
        if "item" not in read.header or "answer" not in read.header or not languages:
            raise CorpusError(f"{path} is no table of a task: it needs the columns item, answer and one per language")
        rows = []
        for row in read.rows():
            if empty := next((name for name, cell in row.fields.items() if not cell.strip()), None):
                raise CorpusError(f"{row.where}: the column {empty!r} is empty, and every cell needs text: fill it in")
            rows.append({name: cell.strip() for name, cell in row.fields.items()})
        return cls(
            Path(path).stem,
            tuple(
                Question(
                    row["item"],
                    language,
                    row[language],
                    f" {row['answer']}" if spaces_words(language) else row["answer"],
                    row.get("subset", ""),
                )
                for language in languages
                for row in rows
            ),
        )
