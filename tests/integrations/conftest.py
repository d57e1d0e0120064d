"""What is computed once for all engines of the tests."""

from __future__ import annotations

from typing import Any

import pytest
from harness.vllm_demo import GROUPS, PLAN, Answers, Row, in_transformers

from moe_route.data import demo_corpus, load_demo_model


@pytest.fixture(scope="session")
def demo() -> Any:
    model, tokenizer = load_demo_model()
    return model.float(), tokenizer


@pytest.fixture(scope="session")
def rows(demo: Any) -> list[Row]:
    corpus = demo_corpus().subset(GROUPS[:4], limit=6)
    found = []
    for group in GROUPS[:4]:
        for number, (item, text) in enumerate(zip(corpus.items, corpus[group], strict=True)):
            ids = demo[1](text).input_ids
            found.append(Row(group, item, ids[:12] if number % 2 else ids[: 2 * len(ids) // 3]))
    return found


@pytest.fixture(scope="session")
def expected(demo: Any, rows: list[Row]) -> dict[str, Answers]:
    return {"free": in_transformers(demo[0], rows, None), "steered": in_transformers(demo[0], rows, PLAN)}
