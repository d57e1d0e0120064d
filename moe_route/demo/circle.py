"""The demonstration from attaching to restoring: six findings on a model, each with its controls.

It follows "Multilingual Routing in Mixture-of-Experts" (arXiv 2510.04694), and begins with what a small model can show:
experts found in English text alone are switched off (1), then those of each language (2); exact match by what was seen
in training (3); divergence of every language from English by layer (4), and its correlation with exact match (5); the
paper's soft activation of task experts (6). What is found is found in other texts than those it is measured on. The
report gives the result, whatever it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from moe_route.base import files
from moe_route.data import Corpus, Task, demo_problems
from moe_route.data.batches import Text
from moe_route.demo.association import LOSS, SHARE, associate
from moe_route.demo.depth import Depth, profile_of, untrained_model
from moe_route.demo.language_experts import find_language_experts, switch_language_experts_off
from moe_route.demo.measurement import PIVOT, Losses, Measurement, Scores, pick_items
from moe_route.demo.pictures import draw
from moe_route.demo.raising import raise_task_experts
from moe_route.demo.report import DemoReport
from moe_route.demo.skill import HELD_OUT, Skill, shares_in_training
from moe_route.demo.task_experts import find_task_experts, switch_task_experts_off
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import read_corpus

__all__ = ["DRAWS", "demo"]

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
        data: general text, as for `read_corpus`.
        languages: of the corpus; English must be among them, because all are compared with it. The problems are taken
            in those of the languages that they have.
        limit: use the first sentences, and of each kind of problems the first ones, as many.
        draws: number of random sets of experts beside the first finding, which take half of the time; beside others
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
    corpus = read_corpus(data, languages=languages, limit=limit)
    if PIVOT not in corpus.languages or len(corpus.languages) < 2:
        found = ", ".join(corpus.languages)
        raise ValueError(f"the demo compares languages with {PIVOT}: take it and at least one more, not {found}")
    if len(corpus) < 2:
        raise ValueError(
            "the demo finds experts in one half of the sentences and measures on the other: take two or more"
        )
    problems = demo_problems()
    shared = [language for language in problems.languages if language in corpus.languages]
    study = _Study(corpus, problems.subset(languages=shared, limit=limit), draws, engine)
    language_model = language_model or LanguageModel.load()
    before = _fingerprint(language_model, corpus)
    routed = language_model.attach(engine)
    try:
        report = study.report(Measurement(language_model, routed, batch_size, max_length, progress))
    finally:
        routed.detach()
    report.restored = _fingerprint(language_model, corpus) == before
    if out is not None:
        report.pictures = draw(report, Path(out))
    report.seconds = time.perf_counter() - start
    if out is not None:
        _write(Path(out), report)
    return report


class _Study:
    """The findings of one demonstration, in order."""

    def __init__(self, corpus: Corpus, problems: Task, draws: int, engine: Literal["hook", "fused"]) -> None:
        self.corpus, self.problems, self.draws, self.engine = corpus, problems, draws, engine
        # Experts are found in every second sentence, and measured on the others.
        self.finding, self.measured = (pick_items(corpus, range(half, len(corpus), 2)) for half in (0, 1))
        first = problems.questions[: len(problems.questions) // len(problems.languages)]
        self.subsets = np.array([question.subset for question in first])

    def report(self, run: Measurement) -> DemoReport:
        routed: RoutedModel = run.routed
        encoded = run.encode(self.corpus)
        scores = run.answers(self.problems, "problems")
        losses = run.losses(self.measured, "general text")
        shared = np.array([self.corpus.languages.index(language) for language in self.problems.languages])
        found = find_task_experts(
            run.record(self.problems.subset("seen", languages=[PIVOT]).corpus(), "routing of English problems"),
            run.record(self.finding.subset([PIVOT]), "routing of English text"),
        )
        task_experts_off = switch_task_experts_off(
            run,
            found,
            self.problems.subset(*HELD_OUT),
            self.of(scores, *HELD_OUT),
            self.measured.subset(self.problems.languages),
            losses.of(slice(None), shared),
            self.draws,
        )
        language_experts_off = switch_language_experts_off(
            run,
            find_language_experts(run.record(self.finding, "routing of half of the text")),
            self.measured,
            losses,
            self.draws,
        )
        skill = Skill(
            self.problems.languages,
            {subset: self.of(scores, subset) for subset in self.problems.subsets},
            shares_in_training(run.language_model.name),
        )
        english_only = self.problems.subset("english_only")
        routers = routed.routers
        return DemoReport(
            model=run.language_model.name,
            layers=len(routers),
            experts=max(router.num_experts for router in routers),
            top_k=max(router.top_k for router in routers),
            languages=self.corpus.languages,
            sentences=len(self.corpus),
            problems=len(self.subsets),
            cut=[encoded.note] if encoded.note else [],
            task_experts_off=task_experts_off,
            language_experts_off=language_experts_off,
            skill=skill,
            depth=self.depth(run),
            association=associate(
                run.record(english_only.corpus(), "routing of problems"),
                {language: share.value for language, share in skill.match("english_only").items()},
                {SHARE: skill.shares, LOSS: self.nats_per_sentence(losses)},
            ),
            raising=raise_task_experts(
                run, found.experts, len(routers), english_only, self.of(scores, "english_only"), self.draws
            ),
        )

    def of(self, scores: Scores, *subsets: str) -> Scores:
        """The scores of some subsets."""
        return scores.of(np.isin(self.subsets, subsets))

    def nats_per_sentence(self, losses: Losses) -> dict[str, float]:
        """Loss by language. Sentences are translations, so unlike nats per token it does not depend on tokens."""
        return dict(zip(self.corpus.languages, losses.nats.mean(0).tolist(), strict=True))

    def depth(self, run: Measurement) -> Depth:
        """Divergence by layer of the model, and of an untrained one if one can be made."""
        trained = profile_of(run.record(self.corpus, "routing of all text"))
        blank, reason = untrained_model(run.language_model)
        if blank is None:
            return Depth(trained, None, reason)
        with blank.attach(self.engine) as routed:
            other = replace(run, language_model=blank, routed=routed)
            return Depth(trained, profile_of(other.record(self.corpus, "routing of an untrained model")))


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


def _write(folder: Path, report: DemoReport) -> None:
    """Write the report beside its pictures, as text and as JSON."""
    files.write_text(folder / "report.txt", f"{report}\n")
    files.write_text(folder / "report.json", f"{json.dumps(report.to_dict(), indent=1)}\n")
