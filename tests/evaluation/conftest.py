"""A small evaluation of the shipped model: a study with every stage and control, in several batches a condition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_route.evaluation import Evaluation, Study, evaluate, read_study
from moe_route.runs.language_model import LanguageModel

SMALL = """
title = "A small evaluation"
model = { id = "demo" }
chat = { template = false, add_special_tokens = true }
find = { tau = [0.3, 0.2, 0.1, 0.05, 0.0] }
steer = { kind = "soft", layers = [2, 5] }
controls = { random = 2, random_per_token = 1 }
sweep = { strength = [2.0] }

[corpora]
add_special_tokens = true
batch_size = 1
general = { format = "shipped", languages = ["eng_Latn", "deu_Latn", "fra_Latn", "swh_Latn"], limit = 5 }
task = { format = "problems", limit = 12 }

[tasks.sums]
format = "problems"
subset = "seen"
languages = ["eng_Latn", "deu_Latn", "fra_Latn", "swh_Latn"]
skip = 60
limit = 4
batch_size = 6

[tasks.written]
format = "problems"
subset = "seen"
languages = ["eng_Latn", "swh_Latn"]
skip = 60
limit = 2
kind = "generate"
max_new_tokens = 4
batch_size = 4
"""


@pytest.fixture(scope="session")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small(small_file: Path) -> Study:
    return read_study(small_file)


@pytest.fixture(scope="session")
def language_model() -> LanguageModel:
    return LanguageModel.load()


@pytest.fixture(scope="session")
def undisturbed(small: Study, language_model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The small evaluation, run at once."""
    return evaluate(small, tmp_path_factory.mktemp("undisturbed") / "results", language_model=language_model)


@pytest.fixture(scope="session")
def content_of() -> Callable[[Path], dict[str, bytes]]:
    """The files of a folder, by path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    return read
