"""The digit problems of `demo_problems` as data of lm-eval tasks; the folder ``tasks`` holds their configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moe_route.data import demo_problems

if TYPE_CHECKING:
    from datasets import DatasetDict


def questions(language: str, subset: str | None = None, **_: Any) -> DatasetDict:
    """The problems in one language, as split "test" with columns item, language, subset, prompt and answer.

    `subset` takes one part of them; lm-eval passes it from ``--metadata subset=seen``, with other metadata, which is
    not used. Raises ``ValueError`` for an unknown language or part.
    """
    from datasets import Dataset, DatasetDict

    task = demo_problems().subset(*([] if subset is None else [subset]), languages=[language])
    rows = [
        {"item": q.item, "language": q.language, "subset": q.subset, "prompt": q.prompt, "answer": q.answer}
        for q in task.questions
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})
