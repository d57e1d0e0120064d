"""The demonstration as one page: its findings as figures, and the tokens of one problem, natural beside steered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moe_route import report
from moe_route.analysis.result import plain
from moe_route.base.table import number_of
from moe_route.data import Question, Task
from moe_route.data.batches import Text
from moe_route.demo.language_experts import LanguageExpertsOff
from moe_route.demo.measurement import PIVOT, Measurement
from moe_route.demo.published_u import PublishedU
from moe_route.demo.report import DemoReport
from moe_route.demo.task_experts import TaskExpertsOff
from moe_route.demo.wording import name
from moe_route.recording import Trace
from moe_route.report import Figure, Inputs
from moe_route.runs.record import record_texts
from moe_route.steering import Plan

FILE = "index.html"
_NATURAL, _STEERED = "as it is", "task experts off"
_ANSWER = 4  # tokens at most


def write_page(path: Path, results: DemoReport, run: Measurement, sums: Task) -> Path:
    """Write the page, which needs no network, and return its path.

    Args:
        path: of the page.
        results: the findings.
        run: the attached model, which traces one problem with its own answer in every language: the first that English
            solves as the model is and fails without the task experts, else the first of all.
        sums: the problems of the finding on task experts.
    """
    task_off = results.task_experts_off
    figures = (_u(results.published_u), *_task_experts(task_off), *_language_experts(results.language_experts_off))
    return report.write(
        path,
        Inputs(traces=_traces(run, task_off, sums), figures=figures),
        tokenizer=run.language_model.tokenizer,
        title="What moe-route shows in a minute",
        lead=f"First the published routing of {results.published_u.model}, then model {results.model} "
        f"({results.layers} layers of {results.experts} experts), recorded and steered by moe-route demo.",
    )


def _traces(run: Measurement, off: TaskExpertsOff, sums: Task) -> dict[str, Trace]:
    """The traces of the problem, natural and steered; none if there are no task experts."""
    if not off.task_experts.experts:
        return {}
    english = off.languages.index(PIVOT)
    before, after = (reading.tasks["sums"].correct[:, english] for reading in (off.before, off.after))
    item = sums.subset(languages=[PIVOT]).questions[int(np.argmax((before > 0) & (after == 0)))].item
    asked = [question for question in sums.questions if question.item == item]
    natural = _traced(run, asked)
    with run.routed.steer(Plan.forbid(off.task_experts.experts)):
        return {_NATURAL: natural, _STEERED: _traced(run, asked)}


def _traced(run: Measurement, asked: Sequence[Question]) -> Trace:
    answer = run.language_model.generate
    texts = [Text(one.language, one.item, one.prompt + answer(one.prompt, _ANSWER)) for one in asked]
    with run.routed.record([one.language for one in asked], trace=True) as recorder:
        record_texts(recorder, run.language_model, texts)
    return recorder.trace()


def _u(large: PublishedU) -> Figure:
    return Figure(
        "u",
        f"{large.model}: how far from English is the routing?",
        large.sentence,
        "lines",
        {
            name(group): plain(values)
            for group, values in zip(large.divergence.groups, large.divergence.values, strict=True)
        },
        axis="Routing divergence from English",
        caption=f"0: the same experts, 1: none shared. {large.source} {large.limits}",
    )


def _task_experts(off: TaskExpertsOff) -> list[Figure]:
    if not off.task_experts.experts:
        return []
    before, after = (reading.tasks["sums"].correct.mean(0) for reading in (off.before, off.after))
    draws = np.zeros((0, len(off.languages)))
    caption = f"Exact match of {len(off.before.tasks['sums'].correct)} sums other than those that gave the experts."
    if off.sets:
        some = off.sampled["sums"]
        draws = off.before.tasks["sums"].correct[some].mean(0) + off.matches[1:]
        caption += (
            f" Dots: {number_of(len(draws), 'random set')} of as many experts of the same layers, on {len(some)} of "
            "the sums."
        )
    rows = {
        name(language): [*map(float, levels), plain(draws[:, i])]
        for i, (language, *levels) in enumerate(zip(off.languages, before, after, strict=True))
    }
    labels = (_NATURAL, _STEERED, "random experts off")
    title = "Switch off the experts of English sums"
    return [Figure("task-experts", title, off.sentence, "bars", rows, "exact match", caption, labels=labels)]


def _language_experts(off: LanguageExpertsOff) -> list[Figure]:
    if not off.experts:
        return []
    values, columns = off.matrix, [name(language) for language in off.languages]
    caption = (
        "Change of the loss of text in nats per token: a row's experts are off, a column's text is read. Framed: a "
        "language's own text."
    )
    if off.random is not None:
        values, columns = np.c_[values, off.random.mean(0)], [*columns, "random"]
        caption += (
            f" Last column: own text without as many random experts, mean of {number_of(len(off.random), 'set')}."
        )
    rows = {name(language): plain(row) for language, row in zip(off.experts, values, strict=True)}
    title = "Switch off a language's own experts"
    return [
        Figure("language-experts", title, off.sentence, "matrix", rows, "experts off", caption, columns=tuple(columns))
    ]
