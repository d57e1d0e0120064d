"""Result lines: whole batches survive, torn ones are cut, other results are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_route.runs.job import ForeignFolderError
from moe_route.runs.lines import ResultLines

HEADER = {"condition": "base", "plan": None}
KEYS = [("t", "eng_Latn", str(i)) for i in range(7)]
BATCHES = [KEYS[:3], KEYS[3:6], KEYS[6:]]


def records(batch: int) -> list[dict[str, object]]:
    return [{"task": task, "language": language, "item": item, "nats": 0.1} for task, language, item in BATCHES[batch]]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    lines = ResultLines(tmp_path / "base.jsonl", HEADER, BATCHES)
    assert not lines.complete
    for batch in range(3):
        lines.append(records(batch))
    assert lines.complete
    return lines.path


def test_every_beginning_of_the_file_resumes_to_the_same_bytes(whole: Path):
    content = whole.read_bytes()
    for size in range(0, len(content) + 1, 5):  # a step that meets line ends and the middle of lines
        whole.write_bytes(content[:size])
        lines = ResultLines(whole, HEADER, BATCHES)
        kept = whole.read_bytes()
        assert content.startswith(kept)
        assert kept.count(b"\n") == 1 + sum(map(len, BATCHES[: lines.done]))
        for batch in range(lines.done, 3):
            lines.append(records(batch))
        assert whole.read_bytes() == content


def test_bytes_that_never_reached_the_disk_are_cut(whole: Path):
    content = whole.read_bytes()
    rows = content.splitlines(keepends=True)
    whole.write_bytes(b"".join(rows[:5]) + b"\0" * 40 + b"\n")
    assert ResultLines(whole, HEADER, BATCHES).done == 1


def test_another_header_is_refused(whole: Path):
    with pytest.raises(ForeignFolderError, match=r"another plan \(None, now 'abc'\).*--force"):
        ResultLines(whole, {**HEADER, "plan": "abc"}, BATCHES)
    whole.write_text("something else\n", encoding="utf-8")
    with pytest.raises(ForeignFolderError, match="not a file of results"):
        ResultLines(whole, HEADER, BATCHES)


def test_altered_lines_are_refused(whole: Path):
    rows = whole.read_text(encoding="utf-8").splitlines(keepends=True)
    other = json.dumps({**records(0)[0], "item": "elsewhere"}) + "\n"
    for content in ([*rows[:1], other, *rows[2:]], [*rows[:1], "{}\n", *rows[2:]], [*rows, rows[-1]]):
        whole.write_text("".join(content), encoding="utf-8")
        with pytest.raises(ForeignFolderError, match="--force"):
            ResultLines(whole, HEADER, BATCHES)


def test_only_the_next_batch_can_be_appended(tmp_path: Path):
    lines = ResultLines(tmp_path / "base.jsonl", HEADER, BATCHES)
    with pytest.raises(ValueError, match="not the questions of batch 0"):
        lines.append(records(1))
