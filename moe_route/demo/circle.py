"""The demonstration from attaching to restoring: two findings on a model, each with its controls.

Experts that are found in English text alone are switched off (1), then those of each language (2). What is found is
found in other texts than those it is measured on. The report gives the result, whatever it is. `examples/findings` goes
on from here with what a larger model can show.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moe_route.base import files
from moe_route.data import Corpus, Task, demo_problems
from moe_route.data.batches import Text
from moe_route.demo import pictures
from moe_route.demo.language_experts import find_language_experts, switch_language_experts_off
from moe_route.demo.measurement import HELD_OUT, PIVOT, Losses, Measurement, Scores, pick_items
from moe_route.demo.report import DemoReport
from moe_route.demo.task_experts import TaskExperts, find_task_experts, switch_task_experts_off
from moe_route.runs.language_model import LanguageModel

DRAWS = 99  # random sets beside the first finding; the smallest p-value is 0.01


def demo(
    language_model: LanguageModel | None = None,
    *,
    data: str | Path | None = None,
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
        data: general text, as for `Corpus.read`, by default the shipped sentences.
        languages: of the corpus; English must be among them, because all are compared with it. The problems are taken
            in those of the languages that they have.
        limit: use the first sentences, and of each kind of problems the first ones, as many.
        draws: number of random sets of experts beside the first finding, which take half of the time; beside the second
            19 at most.
        out: folder for the pictures and the report, created if missing (none without it).
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
    study = Study.read(data, languages, limit)
    language_model = language_model or LanguageModel.load()
    before = _fingerprint(language_model, study.corpus)
    routed = language_model.attach(engine)
    try:
        report = _report(study, Measurement(language_model, routed, batch_size, max_length, progress), draws)
    finally:
        routed.detach()
    report.restored = _fingerprint(language_model, study.corpus) == before
    if out is not None:
        drawn = {
            "task_experts_off": pictures.task_experts_off(report.task_experts_off),
            "language_experts_off": pictures.language_experts_off(report.language_experts_off),
        }
        report.pictures = pictures.save(drawn, Path(out))
    report.seconds = time.perf_counter() - start
    if out is not None:
        report.write(Path(out))
    return report


@dataclass(frozen=True)
class Natural:
    """The model as it is on the texts of a study, which every finding compares with.

    Attributes:
        scores: how all problems are answered.
        losses: of the sentences that are measured.
        task_experts: the experts of the problems, found in English.
    """

    scores: Scores
    losses: Losses
    task_experts: TaskExperts


class Study:
    """Sentences and problems in several languages, in parts that experts are found in and parts they are measured on.

    Attributes:
        corpus: all sentences.
        problems: the problems, in those of its languages that they have.
        finding, measured: every second sentence, and the others.
        subsets: the subset of each problem, the same in every language.
    """

    def __init__(self, corpus: Corpus, problems: Task) -> None:
        self.corpus, self.problems = corpus, problems
        self.finding, self.measured = (pick_items(corpus, range(half, len(corpus), 2)) for half in (0, 1))
        first = problems.questions[: len(problems.questions) // len(problems.languages)]
        self.subsets = np.array([question.subset for question in first])

    @classmethod
    def read(cls, data: str | Path | None, languages: Sequence[str] | None, limit: int | None) -> Study:
        """Read a corpus as `Corpus.read` does, and the shipped problems.

        Raises `ValueError` for a corpus with nothing to compare.
        """
        corpus = Corpus.read(data or "general", languages, limit=limit)
        if PIVOT not in corpus.languages or len(corpus.languages) < 2:
            given = ", ".join(corpus.languages)
            raise ValueError(f"the demo compares languages with {PIVOT}: take it and at least one more, not {given}")
        if len(corpus) < 2:
            raise ValueError(
                "the demo finds experts in one half of the sentences and measures on the other: take two or more"
            )
        problems = demo_problems()
        shared = [language for language in problems.languages if language in corpus.languages]
        return cls(corpus, problems.subset(languages=shared, limit=limit))

    def natural(self, run: Measurement) -> Natural:
        """Answer the problems and read the measured sentences as the model is, and find its task experts."""
        scores = run.answers(self.problems, "problems")
        losses = run.losses(self.measured, "general text")
        task_experts = find_task_experts(
            run.record(self.problems.subset("seen", languages=[PIVOT]).corpus(), "routing of English problems"),
            run.record(self.finding.subset([PIVOT]), "routing of English text"),
        )
        return Natural(scores, losses, task_experts)

    def of(self, scores: Scores, *subsets: str) -> Scores:
        """The scores of some subsets."""
        return scores.of(np.isin(self.subsets, subsets))


def _report(study: Study, run: Measurement, draws: int) -> DemoReport:
    """Measure both findings."""
    note = run.on(study.corpus).texts.note
    natural = study.natural(run)
    shared = np.array([study.corpus.languages.index(language) for language in study.problems.languages])
    task_experts_off = switch_task_experts_off(
        run,
        natural.task_experts,
        study.problems.subset(*HELD_OUT),
        study.of(natural.scores, *HELD_OUT),
        study.measured.subset(study.problems.languages),
        natural.losses.of(slice(None), shared),
        draws,
    )
    language_experts_off = switch_language_experts_off(
        run,
        find_language_experts(run.record(study.finding, "routing of half of the text")),
        study.measured,
        natural.losses,
        draws,
    )
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
