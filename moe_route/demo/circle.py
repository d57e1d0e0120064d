"""The demonstration: a finding on the published routing of a large model, and two on a small one, attached to restored.

On the small one, experts that are found in English text alone are switched off (2), then those of each language (3).
What is found is found in other texts than those it is measured on. The report gives the result, whatever it is.
`examples/findings` has the tables of both, and goes on from here with what a larger model can show.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moe_route.base import files
from moe_route.data import Corpus, Task, demo_controls, demo_numbers, demo_problems
from moe_route.data.batches import Text
from moe_route.demo.language_experts import LanguageExpertsOff, find_language_experts, switch_language_experts_off
from moe_route.demo.measurement import (
    HELD_OUT,
    PIVOT,
    Losses,
    Measurement,
    Reading,
    Scores,
    pick_items,
    pick_questions,
)
from moe_route.demo.page import FILE, write_page
from moe_route.demo.published_u import published_u
from moe_route.demo.report import DemoReport
from moe_route.demo.task_experts import TaskExperts, TaskExpertsOff, find_task_experts, switch_task_experts_off
from moe_route.runs.language_model import LanguageModel

DRAWS = 19  # random sets beside each finding; the smallest p-value is 0.05


def demo(
    language_model: LanguageModel | None = None,
    *,
    data: str | Path | Corpus | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    draws: int = DRAWS,
    out: str | Path | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    engine: Literal["hook", "fused"] = "hook",
    progress: bool = False,
) -> DemoReport:
    """Run the demonstration on a language model (by default the shipped one) and the corpus at `data` (likewise).

    Args:
        language_model: the model. Any model answers the shipped digit problems; where it has no skill, the findings say
            so.
        data: general text, a corpus or a source for `Corpus.read`, by default the shipped sentences.
        languages: of the corpus; English must be among them, because all are compared with it. The problems are taken
            in those of the languages that they have.
        limit: use the first sentences, and of each kind of problems the first ones, as many.
        draws: number of random sets of experts beside task experts, and 19 at most beside those of a language.
        out: folder for the report and its page, `index.html`; created if missing (none without it).
        batch_size: sentences per call; of problems, four times as many.
        max_length: longest sentence in tokens, by default what the model reads.
        engine: see `moe_route.attach`.
        progress: show progress bars on standard error.

    Raises `ValueError` for a corpus with nothing to compare: without English, another language and two sentences. Also
    raises the errors of loading and attaching.
    """
    start = time.perf_counter()
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}: an effect needs random sets beside it")
    if out is not None:
        files.check_writable(files.make_folder(out) / "report.json")
    study = DemoTexts.read(data, languages, limit)
    language_model = language_model or LanguageModel.load()
    before = _fingerprint(language_model, study.corpus)
    routed = language_model.attach(engine)
    try:
        run = Measurement(language_model, routed, batch_size, max_length, progress)
        report = _report(study, run, draws)
        if out is not None:
            report.page = write_page(Path(out) / FILE, report, run, study.tasks["sums"])
    finally:
        routed.detach()
    report.restored = _fingerprint(language_model, study.corpus) == before
    report.seconds = time.perf_counter() - start
    if out is not None:
        report.write(Path(out))
    return report


@dataclass(frozen=True)
class Natural:
    """The model as it is on the texts of a study, which every finding compares with.

    Attributes:
        reading: of the tasks and texts of `DemoTexts`.
        losses: of the measured sentences, in all languages.
        task_experts, copying_experts: the experts of sums and of copying, found in English.
    """

    reading: Reading
    losses: Losses
    task_experts: TaskExperts
    copying_experts: TaskExperts


class DemoTexts:
    """Sentences and problems in several languages, in parts that experts are found in and parts they are measured on.

    Attributes:
        corpus: general sentences.
        problems: sums, in those of its languages that they have.
        finding, measured: every second general sentence, and the others.
        contrast: half of the English sentences with numbers, which experts of a task are found against.
        tasks: "sums" with other numbers than experts are found in, "copying" and "counting".
        texts: "text", the measured sentences in the languages of the tasks, and "numbers", the other half of those.
        subsets: the subset of each of the sums, the same in every language.
    """

    def __init__(self, corpus: Corpus, problems: Task, controls: Task, numbers: Corpus) -> None:
        self.corpus, self.problems = corpus, problems
        self.finding, self.measured = (pick_items(corpus, range(half, len(corpus), 2)) for half in (0, 1))
        self.contrast, others = (pick_items(numbers, range(half, len(numbers), 2)) for half in (0, 1))
        self.tasks = {
            "sums": problems.subset(*HELD_OUT),
            "copying": controls.subset("copy"),
            "counting": controls.subset("count"),
        }
        self.texts = {"text": self.measured.subset(problems.languages), "numbers": others}
        first = self.tasks["sums"].subset(languages=[PIVOT]).questions
        self.subsets = np.array([question.subset for question in first])

    @classmethod
    def read(cls, data: str | Path | Corpus | None, languages: Sequence[str] | None, limit: int | None) -> DemoTexts:
        """Read a corpus as `Corpus.read` does, or take one, and the shipped problems.

        Raises `ValueError` for a corpus with nothing to compare.
        """
        corpus = data if isinstance(data, Corpus) else Corpus.read(data or "general", languages, limit=limit)
        if PIVOT not in corpus.languages or len(corpus.languages) < 2:
            given = ", ".join(corpus.languages)
            raise ValueError(f"the demo compares languages with {PIVOT}: take it and at least one more, not {given}")
        if len(corpus) < 2 or (limit is not None and limit < 2):
            raise ValueError(
                "the demo finds experts in one half of the sentences and measures on the other: take two or more"
            )
        problems = demo_problems()
        shared = [language for language in problems.languages if language in corpus.languages]
        sums, controls = (task.subset(languages=shared, limit=limit) for task in (problems, demo_controls()))
        return cls(corpus, sums, controls, demo_numbers().subset(limit=limit))

    def natural(self, run: Measurement) -> Natural:
        """Do the tasks and read the measured sentences as the model is, and find its task experts."""
        losses = run.losses(self.measured, "as it is: text")
        reading = run.read(self.tasks, {"numbers": self.texts["numbers"]}, "as it is")
        shared = np.array([self.corpus.languages.index(language) for language in self.problems.languages])
        reading = replace(reading, texts={"text": losses.of(slice(None), shared), **reading.texts})
        contrast = run.record(self.contrast, "routing of English sentences with numbers")
        sums = self.problems.subset("seen", languages=[PIVOT])
        copies = pick_questions(self.tasks["copying"].subset(languages=[PIVOT]), slice(0, None, 2))
        return Natural(
            reading,
            losses,
            *(
                find_task_experts(run.record(task.corpus(), f"routing of English {what}"), contrast)
                for what, task in (("sums", sums), ("copying", copies))
            ),
        )

    def of(self, scores: Scores, *subsets: str) -> Scores:
        """The scores of some subsets of the sums."""
        return scores.of(np.isin(self.subsets, subsets))


def measure(
    study: DemoTexts, natural: Natural, run: Measurement, draws: int = DRAWS
) -> tuple[TaskExpertsOff, LanguageExpertsOff]:
    """Switch the experts of tasks off, then those of languages."""
    task_experts_off = switch_task_experts_off(
        run, natural.task_experts, natural.copying_experts, study.tasks, study.texts, natural.reading, draws
    )
    experts = find_language_experts(run.record(study.finding, "routing of half of the text"))
    return task_experts_off, switch_language_experts_off(run, experts, study.measured, natural.losses, draws)


def _report(study: DemoTexts, run: Measurement, draws: int) -> DemoReport:
    """Measure both findings."""
    note = run.on(study.corpus).texts.note
    task_experts_off, language_experts_off = measure(study, study.natural(run), run, draws)
    routers = run.routed.routers
    return DemoReport(
        model=run.language_model.name,
        layers=len(routers),
        experts=max(router.num_experts for router in routers),
        top_k=max(router.top_k for router in routers),
        languages=study.corpus.languages,
        sentences=len(study.corpus),
        problems=len(study.subsets),
        cut=[note] if note else [],
        published_u=published_u(),
        task_experts_off=task_experts_off,
        language_experts_off=language_experts_off,
    )


def _fingerprint(language_model: LanguageModel, corpus: Corpus) -> str:
    """SHA-256 over every tensor of the model and over its output on one text; equal only if all bits are equal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(language_model.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    (batch,) = language_model.batches([Text(PIVOT, "probe", corpus[PIVOT][0])])
    digest.update(_bytes(language_model.run(batch)))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
