"""The demonstration: record, analyze, steer and restore a model, with controls, in a minute or two on two CPU cores.

It follows "Multilingual Routing in Mixture-of-Experts" (arXiv 2510.04694): divergence of every language from English by
layer (eq. 2), the experts of a task found in English text alone (eq. 3), and soft activation of those experts in the
middle layers for every language (eq. 4). Controls steer other layers, random experts, and in the opposite direction.
The loss is measured on task texts that were not used to find the experts. A paired bootstrap tells which differences
exceed those from the choice of texts and of random experts. The report gives the result, whatever it is.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from moe_route import files
from moe_route.analysis import (
    Difference,
    divergence,
    expert_difference,
    middle_layers,
    paired_difference,
    random_control,
    task_experts,
)
from moe_route.data import Corpus, demo_task
from moe_route.demo.pictures import draw
from moe_route.demo.report import DemoReport, Outcome
from moe_route.recording import RoutingStatistics
from moe_route.routed import RoutedModel
from moe_route.steering import ExpertSelection, Plan, PlanError
from moe_route.workload import EncodedTexts, LanguageModel, Text, read_corpus, record_texts, texts_of

__all__ = ["RANDOM_SETS", "THRESHOLDS", "choose_threshold", "demo", "plans", "random_plans"]

# Published thresholds are between 0.25 and 0.5.
THRESHOLDS = (0.5, 0.4, 0.3, 0.2, 0.1)
STRENGTHS = (0.5, 1.0)  # of soft steering, in standard deviations of the logits; 0.5 is the published one
RANDOM_SETS = 19  # a plan better than 19 draws has p = 0.05; if there are fewer sets, all are used
PIVOT = "eng_Latn"


def demo(
    spoken: LanguageModel | None = None,
    *,
    data: str | Path | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    engine: Literal["hook", "fused"] = "hook",
    progress: bool = False,
) -> DemoReport:
    """Run the demonstration on a language model (by default the shipped one) and the corpus at `data` (likewise).

    `languages` and `limit` select a part of the corpus. English must be included, because all languages are compared
    with it. `out` is a folder for the figures, created if missing (none without it). The task texts are the shipped
    arithmetic problems, in the languages that they share with the corpus. Raises `ValueError` for a corpus that leaves
    nothing to compare, and the errors of loading and attaching.
    """
    start = time.perf_counter()
    if out is not None:
        Path(out).mkdir(exist_ok=True)
        files.check_writable(Path(out) / "report.json")
    corpus = read_corpus(data, languages=languages, limit=limit)
    if PIVOT not in corpus.languages or len(corpus.languages) < 2:
        found = ", ".join(corpus.languages)
        raise ValueError(f"the demo compares languages with {PIVOT}: take it and at least one more, not {found}")
    spoken = spoken or LanguageModel.load()
    run = _Run(spoken, corpus, demo_task(), batch_size, max_length, progress)
    before = run.fingerprint()
    routed = spoken.attach(engine)
    try:
        report = run.report(routed, None if out is None else Path(out))
    finally:
        routed.detach()
    report.restored = run.fingerprint() == before
    report.seconds = time.perf_counter() - start
    if out is not None:
        _write(Path(out), report)
    return report


class _Run:
    """The steps of one demonstration."""

    def __init__(
        self,
        spoken: LanguageModel,
        corpus: Corpus,
        task: Corpus,
        batch_size: int,
        max_length: int | None,
        progress: bool,
    ) -> None:
        self.spoken, self.corpus, self.batch_size, self.progress = spoken, corpus, batch_size, progress
        shared = tuple(language for language in task.languages if language in corpus.languages)
        # Every second problem, in English, is used to find the experts; the rest, in every language, to measure the
        # loss.
        finding = _items(task.subset([PIVOT]), slice(0, None, 2))
        self.evaluation = _items(task.subset(shared), slice(1, None, 2))
        self.general, self.finding, self.measured = (
            spoken.encode(texts_of(part), max_length=max_length) for part in (corpus, finding, self.evaluation)
        )

    def fingerprint(self) -> str:
        """SHA-256 over every tensor of the model and over its output on one text; equal only if all bits are equal."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.spoken.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
        (batch,) = self.spoken.batches([Text(PIVOT, "probe", self.corpus[PIVOT][0])])
        digest.update(_bytes(self.spoken.run(batch)))
        return digest.hexdigest()

    def report(self, routed: RoutedModel, out: Path | None) -> DemoReport:
        general = self.record(routed, self.general, "general texts")
        task = self.record(routed, self.finding, "task texts")
        measured = divergence(general, reference=PIVOT)
        middle = middle_layers(len(general.layers))
        found = {t: task_experts(task, general, threshold=t, group=PIVOT) for t in THRESHOLDS}
        threshold = choose_threshold(found, middle)
        base = self.losses("loss without steering")
        report = DemoReport(
            model=self.spoken.name,
            layers=len(general.layers),
            experts=max(general.num_experts),
            top_k=max(general.top_k),
            languages=self.corpus.languages,
            sentences=len(self.corpus),
            divergence=measured,
            unrelated=unrelated_divergence(general),
            all_found=found,
            threshold=threshold,
            middle=middle,
            base=dict(zip(self.evaluation.languages, base[..., 0].sum(0) / base[..., 1].sum(0), strict=True)),
            evaluated=len(self.evaluation),
            cut=[part.note for part in (self.general, self.finding, self.measured) if part.note],
        )
        self.steer(routed, report, found[threshold], base)
        if out is not None:
            report.pictures = draw(report, expert_difference(task, general, group=PIVOT), out)
        return report

    def record(self, routed: RoutedModel, texts: EncodedTexts, what: str) -> RoutingStatistics:
        groups = list(dict.fromkeys(text.group for text in texts.texts))
        with routed.record(groups=groups, sequences=True) as recorder:
            record_texts(recorder, self.spoken, texts, **self.options(what))
        return recorder.statistics()

    def losses(self, what: str) -> np.ndarray:
        """[items, languages, 2]: summed loss, and number of predicted tokens, of every task text used for measuring."""
        found = self.spoken.losses(self.measured, **self.options(what))
        return found.reshape(len(self.evaluation.languages), len(self.evaluation), 2).transpose(1, 0, 2)

    def losses_under(self, routed: RoutedModel, plan: Plan, what: str) -> np.ndarray:
        """[items, languages]: summed loss of the same texts under a plan."""
        with routed.steer(plan):
            return self.losses(what)[..., 0]

    def options(self, what: str) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "progress": what if self.progress else None}

    def steer(self, routed: RoutedModel, report: DemoReport, everywhere: ExpertSelection, base: np.ndarray) -> None:
        """Measure every plan, and the published one against random experts."""
        asked = plans(everywhere, report.middle, report.layers)
        if not asked:
            return
        changed = {name: self.losses_under(routed, plan, name) for name, plan in asked.items()}
        report.outcomes = [self.outcome(name, nats, base) for name, nats in changed.items()]
        report.by_threshold = self.sweep(routed, report, base)
        others, enumerated = random_plans(everywhere, report.middle)
        if others:
            random = np.stack([self.losses_under(routed, plan, f"random {i}") for i, plan in enumerate(others, 1)])
            self.against_random(report, next(iter(changed.values())), random, base, enumerated)

    def against_random(
        self, report: DemoReport, nats: np.ndarray, random: np.ndarray, base: np.ndarray, enumerated: bool
    ) -> None:
        """Compare the published plan's losses with those of random experts, [sets, items, languages]."""

        def change(columns: slice) -> Difference:
            """Mean change of the loss by the random sets, with the interval of the comparison with them."""
            before, tokens = base[:, columns, 0], base[:, columns, 1]
            found = random_control(before, random[..., columns], before, tokens, enumerated=enumerated).difference
            return Difference(-found.value, -found.high, -found.low, found.p_value)

        report.control = random_control(nats, random, base[..., 0], base[..., 1], enumerated=enumerated)
        by_language = {name: change(slice(i, i + 1)) for i, name in enumerate(self.evaluation.languages)}
        report.outcomes.append(Outcome(f"random (mean of {len(random)})", by_language, change(slice(None))))

    def sweep(self, routed: RoutedModel, report: DemoReport, base: np.ndarray) -> dict[float, Difference]:
        """Measure the published plan at every threshold that finds a task expert in the middle layers."""
        measured = {report.selection: report.outcomes[0].mean}
        for threshold, selection in report.found.items():
            if selection and selection not in measured:
                plan = Plan.activate(selection, report.middle, strength=STRENGTHS[0])
                nats = self.losses_under(routed, plan, f"threshold {threshold:g}")
                measured[selection] = paired_difference(nats, base[..., 0], base[..., 1])
        return {threshold: measured[selection] for threshold, selection in report.found.items() if selection}

    def outcome(self, name: str, nats: np.ndarray, base: np.ndarray) -> Outcome:
        by_language = {
            language: paired_difference(nats[:, i], base[:, i, 0], base[:, i, 1])
            for i, language in enumerate(self.evaluation.languages)
        }
        return Outcome(name, by_language, paired_difference(nats, base[..., 0], base[..., 1]))


def unrelated_divergence(statistics: RoutingStatistics) -> np.ndarray:
    """[layers]: divergence of each English sentence from the next one, which has the same language and another content.

    It serves as a baseline for the divergence of translations. NaN if there is one sentence only.
    """
    store = statistics.store
    assert store is not None
    q = np.stack([store.distributions(item, PIVOT, "full") for item in store.items(PIVOT)])
    if len(q) < 2:
        return np.full(len(statistics.layers), np.nan)
    return divergence(q, np.roll(q, 1, axis=0), num_experts=statistics.num_experts).values[0]


def choose_threshold(found: Mapping[float, ExpertSelection], middle: Sequence[int]) -> float:
    """The largest threshold that finds a task expert in the middle layers; the smallest one if none does.

    It depends only on the routing of English text, so no loss influences which experts are steered.
    """
    return next((threshold for threshold, selection in found.items() if selection.restrict(middle)), THRESHOLDS[-1])


def plans(experts: ExpertSelection, middle: Sequence[int], layers: int) -> dict[str, Plan]:
    """The plans to measure, the published one first.

    They are soft activation of task experts in the middle layers (the published plan), a stronger one, and the
    controls, except random experts (:func:`random_plans`). Empty if the middle layers have no task expert. The control
    in the other layers is omitted if those have no task expert.
    """
    if not experts.restrict(middle):
        return {}
    activate = Plan.activate(experts, middle, strength=STRENGTHS[0])
    found = {f"task +{STRENGTHS[0]:g}": activate}
    found |= {f"task +{strength:g}": Plan.activate(experts, middle, strength=strength) for strength in STRENGTHS[1:]}
    found["task forced on"] = Plan.force_on(experts, middle)
    others = sorted(set(range(layers)) - set(middle))
    if experts.restrict(others):
        found[f"other layers +{STRENGTHS[0]:g}"] = activate.in_layers(others)
    found[f"task -{STRENGTHS[0]:g}"] = -activate
    return found


def random_plans(experts: ExpertSelection, middle: Sequence[int]) -> tuple[list[Plan], bool]:
    """The published plan on as many other experts of each middle layer, and whether these are all such sets.

    All sets are used if there are at most ``RANDOM_SETS`` of them; otherwise that many are drawn, with seeds from 0 on.
    """
    activate = Plan.activate(experts, middle, strength=STRENGTHS[0])
    try:
        return activate.all_random(RANDOM_SETS), True
    except PlanError:  # more sets than that
        return [activate.random(seed) for seed in range(RANDOM_SETS)], False


def _items(corpus: Corpus, which: slice) -> Corpus:
    """Some items of a corpus, in all its languages."""
    texts = {language: corpus[language][which] for language in corpus.languages}
    return Corpus(corpus.languages, corpus.items[which], texts, corpus.name)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write(folder: Path, report: DemoReport) -> None:
    """Write the report beside its figures, as text and as JSON."""
    for name, text in (("report.txt", str(report)), ("report.json", json.dumps(report.to_dict(), indent=1))):
        with files.replacing(folder / name) as stream:
            stream.write(f"{text}\n".encode())
