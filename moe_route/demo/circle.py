"""The demonstration: record, analyze, steer and restore a model, with the controls, on two CPU cores in a minute or
two.

It follows "Multilingual Routing in Mixture-of-Experts" (arXiv 2510.04694): divergence of every language from English
by layer (eq. 2), the experts of a task found in English text alone (eq. 3), those experts raised in the middle layers
for every language (eq. 4), and the same done to other layers, to random experts and in reverse. What is measured is
the loss on task texts that had no part in finding the experts. A paired bootstrap says which differences are more
than the choice of texts; the report says what came out, whichever way it fell.
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
from moe_route.analysis import Difference, divergence, expert_difference, paired_difference, task_experts
from moe_route.data import Corpus, demo_task
from moe_route.demo.pictures import draw
from moe_route.demo.report import DemoReport, Outcome
from moe_route.recording import RoutingStatistics
from moe_route.routed import RoutedModel
from moe_route.steering import ExpertSelection, Plan
from moe_route.workload import LanguageModel, Text, read_corpus, record_texts, texts_of

__all__ = ["THRESHOLDS", "choose_threshold", "demo", "middle_layers", "plans"]

# The published thresholds lie between 0.25 and 0.5.
THRESHOLDS = (0.5, 0.4, 0.3, 0.2, 0.1)
STRENGTHS = (0.5, 1.0)  # of soft steering, in standard deviations of the logits; the first is the published one
RANDOM_SEEDS = (0, 1, 2, 3, 4)
PIVOT = "eng_Latn"


def middle_layers(layers: int) -> tuple[int, ...]:
    """The middle half of the layers, where languages share experts [arXiv 2510.04694]: of 8 layers 2 to 5."""
    return tuple(range(layers // 4, layers - layers // 4))


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
    """Run the whole circle on a language model (default: the one moe-route brings) over the corpus at `data` (default:
    the shipped one).

    `languages` and `limit` cut the corpus down; English must be among them, since everything is compared with it. `out`
    is a folder for the pictures (none without it). The task texts are the shipped arithmetic problems, in the languages
    they have in common with the corpus. Raises `ValueError` for a corpus that leaves nothing to compare, and what
    loading and attaching raise.
    """
    start = time.perf_counter()
    corpus = read_corpus(data, languages=languages, limit=limit)
    if PIVOT not in corpus.languages or len(corpus.languages) < 2:
        found = ", ".join(corpus.languages)
        raise ValueError(f"the demo compares languages with {PIVOT}: take it and at least one more, not {found}")
    spoken = spoken or LanguageModel.load()
    options = {"batch_size": batch_size, "max_length": max_length}
    run = _Run(spoken, corpus, demo_task(), options, progress)
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
        self, spoken: LanguageModel, corpus: Corpus, task: Corpus, options: dict[str, Any], progress: bool
    ) -> None:
        self.spoken, self.corpus, self._options, self.progress = spoken, corpus, options, progress
        shared = tuple(language for language in task.languages if language in corpus.languages)
        # Every other problem finds the experts, in English; the rest measures, in every language.
        self.finding = _items(task.subset([PIVOT]), slice(0, None, 2))
        self.evaluation = _items(task.subset(shared), slice(1, None, 2))

    def fingerprint(self) -> str:
        """SHA-256 over every tensor of the model and over its output on one text: equal bits, equal fingerprint."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.spoken.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(_bytes(tensor))
        (batch,) = self.spoken.batches([Text(PIVOT, "probe", self.corpus[PIVOT][0])])
        digest.update(_bytes(self.spoken.run(batch)))
        return digest.hexdigest()

    def report(self, routed: RoutedModel, out: Path | None) -> DemoReport:
        general = self.record(routed, self.corpus, "general texts")
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
        )
        self.steer(routed, report, found[threshold], base)
        if out is not None:
            report.pictures = draw(report, expert_difference(task, general, group=PIVOT), out)
        return report

    def record(self, routed: RoutedModel, corpus: Corpus, what: str) -> RoutingStatistics:
        with routed.record(groups=list(corpus.languages), sequences=True) as recorder:
            record_texts(recorder, self.spoken, texts_of(corpus), **self.options(what))
        return recorder.statistics()

    def losses(self, what: str) -> np.ndarray:
        """[items, languages, 2]: summed loss and predicted tokens of every task text kept for measuring."""
        found = self.spoken.losses(texts_of(self.evaluation), **self.options(what))
        return found.reshape(len(self.evaluation.languages), len(self.evaluation), 2).transpose(1, 0, 2)

    def options(self, what: str) -> dict[str, Any]:
        return {**self._options, "progress": what if self.progress else None}

    def steer(self, routed: RoutedModel, report: DemoReport, everywhere: ExpertSelection, base: np.ndarray) -> None:
        """Measure every plan, and the published one against the random control."""
        changed = {}
        for name, plan in plans(everywhere, report.middle, report.layers).items():
            with routed.steer(plan):
                changed[name] = self.losses(name)[..., 0]
        if not changed:
            return
        report.by_threshold = self.sweep(routed, report, base)
        draws = [changed.pop(name) for name in list(changed) if name.startswith("random")]
        first, random = next(iter(changed.values())), np.mean(draws, axis=0)
        changed[f"random (mean of {len(draws)})"] = random
        report.outcomes = [self.outcome(name, nats, base) for name, nats in changed.items()]
        report.random = [paired_difference(nats, base[..., 0], base[..., 1]) for nats in draws]
        report.against_random = paired_difference(first, random, base[..., 1])

    def sweep(self, routed: RoutedModel, report: DemoReport, base: np.ndarray) -> dict[float, Difference]:
        """The published plan at every threshold that finds a task expert in the middle layers."""
        swept = {}
        for threshold, selection in report.found.items():
            if selection:
                with routed.steer(Plan.activate(selection, report.middle, strength=STRENGTHS[0])):
                    nats = self.losses(f"threshold {threshold:g}")[..., 0]
                swept[threshold] = paired_difference(nats, base[..., 0], base[..., 1])
        return swept

    def outcome(self, name: str, nats: np.ndarray, base: np.ndarray) -> Outcome:
        by_language = {
            language: paired_difference(nats[:, i], base[:, i, 0], base[:, i, 1])
            for i, language in enumerate(self.evaluation.languages)
        }
        return Outcome(name, by_language, paired_difference(nats, base[..., 0], base[..., 1]))


def unrelated_divergence(statistics: RoutingStatistics) -> np.ndarray:
    """[layers]: divergence of each English sentence from the one after it, the same language with another content: what
    the divergence of a translation is to be held against."""
    store = statistics.store
    assert store is not None
    q = np.stack([store.distributions(item, PIVOT, "full") for item in store.items(PIVOT)])
    return divergence(q, np.roll(q, 1, axis=0), num_experts=statistics.num_experts).values[0]


def choose_threshold(found: Mapping[float, ExpertSelection], middle: Sequence[int]) -> float:
    """The largest threshold that finds a task expert in the middle layers; the smallest one if none does.

    It looks at how English text is routed and at nothing else, so no loss has a say in what is steered.
    """
    return next((threshold for threshold, selection in found.items() if selection.restrict(middle)), THRESHOLDS[-1])


def plans(experts: ExpertSelection, middle: Sequence[int], layers: int) -> dict[str, Plan]:
    """The plans to measure, the published one first: task experts of the middle layers raised, then harder, then the
    controls.

    Empty where no task expert lies in the middle layers. The control in the other layers is left out where no task
    expert lies there.
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
    return found | {f"random {seed}": activate.random(seed) for seed in RANDOM_SEEDS}


def _items(corpus: Corpus, which: slice) -> Corpus:
    """Some items of a corpus, in all its languages."""
    texts = {language: corpus[language][which] for language in corpus.languages}
    return Corpus(corpus.languages, corpus.items[which], texts, corpus.name)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write(folder: Path, report: DemoReport) -> None:
    """The report beside its pictures, as text and as JSON."""
    for name, text in (("report.txt", str(report)), ("report.json", json.dumps(report.to_dict(), indent=1))):
        with files.replacing(folder / name) as stream:
            stream.write(f"{text}\n".encode())
