"""Readers of tasks and corpora: local files in the form in which they are distributed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_route.data import CorpusError
from moe_route.evaluation import StudyError
from moe_route.evaluation.study import CorpusSource, TaskSource
from moe_route.evaluation.tasks import kind_of, read_source, read_task, task_fingerprint

DATA = Path(os.environ.get("MOE_ROUTE_DATA", ""))
needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(not os.environ.get("MOE_ROUTE_DATA"), reason="MOE_ROUTE_DATA is not set"),
]


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_mgsm(tmp_path: Path):
    for language, question in (("en", "How many?"), ("sw", "Ngapi?"), ("bn", "কত?")):
        (tmp_path / f"mgsm_{language}.tsv").write_text(f"{question}\t1,018\n{question} 2\t7\n", encoding="utf-8")
    source = TaskSource("mgsm", path=".")
    task = read_task("mgsm", source, tmp_path)
    assert task.languages == ("eng_Latn", "ben_Beng", "swh_Latn")  # English first
    assert task.questions[0].prompt == "Question: How many?\nStep-by-Step Answer:"
    assert task.questions[-1].prompt == "Swali: Ngapi? 2\nJibu la Hatua kwa Hatua:"
    assert [q.answer for q in task.questions[:2]] == ["1,018", "7"]
    assert kind_of(source, task.questions) == "generate"
    second = read_task("mgsm", TaskSource("mgsm", path=".", languages=("swh_Latn",), skip=1), tmp_path)
    assert [q.item for q in second.questions] == ["mgsm-002"]


def test_gsm8k(tmp_path: Path):
    lines(tmp_path / "g.jsonl", [{"question": "Q?", "answer": "Because.\n#### 18"}])
    (question,) = read_task("g", TaskSource("gsm8k", path="g.jsonl"), tmp_path).questions
    assert (question.language, question.answer) == ("eng_Latn", "18")
    lines(tmp_path / "g.jsonl", [{"question": "Q?", "answer": "18"}])
    with pytest.raises(CorpusError, match="no ####"):
        read_task("g", TaskSource("gsm8k", path="g.jsonl"), tmp_path)


def test_belebele_in_both_forms(tmp_path: Path):
    flat = {"flores_passage": "P", "question": "Q?", "link": "L", "question_number": 1, "correct_answer_num": "3"}
    flat |= {f"mc_answer{i}": f"answer {i}" for i in (1, 2, 3, 4)}
    lines(tmp_path / "flat" / "swh_Latn.jsonl", [flat])
    answers = [{"text": f"answer {i}", "correct": i == 3} for i in (1, 2, 3, 4)]
    lines(tmp_path / "grouped" / "swh_Latn.jsonl", [{"text": "P", "items": [{"question": "Q?", "answers": answers}]}])
    (one,) = read_task("b", TaskSource("belebele", path="flat"), tmp_path).questions
    (other,) = read_task("b", TaskSource("belebele", path="grouped"), tmp_path).questions
    assert one.prompt == other.prompt == "P: P\nQ: Q?\nA: answer 1\nB: answer 2\nC: answer 3\nD: answer 4\nAnswer:"
    assert one.answer == other.answer == " C"
    assert one.choices == (" A", " B", " C", " D")


def test_global_mmlu_takes_one_category(tmp_path: Path):
    def row(item: str, category: str) -> dict[str, object]:
        options = {f"option_{letter}": letter for letter in "abcd"}
        return {"sample_id": item, "subject_category": category, "question": "Q?", "answer": "B", **options}

    lines(tmp_path / "m" / "sw.jsonl", [row("1", "Medical"), row("2", "STEM")])
    task = read_task("m", TaskSource("global_mmlu", path="m", category="Medical"), tmp_path)
    assert [(q.item, q.language, q.answer) for q in task.questions] == [("1", "swh_Latn", " B")]
    with pytest.raises(StudyError, match="no question left"):
        read_task("m", TaskSource("global_mmlu", path="m", category="Law"), tmp_path)


def test_questions_with_choices_and_checks(tmp_path: Path):
    row = {"item": "1", "language": "eng_Latn", "prompt": "Sky?", "answer": " blue", "choices": [" blue", " red"]}
    lines(tmp_path / "q.jsonl", [row])
    source = TaskSource("questions", path="q.jsonl")
    task = read_task("q", source, tmp_path)
    assert kind_of(source, task.questions) == "choice"
    digest = task_fingerprint(task.questions)
    assert read_task("q", TaskSource("questions", path="q.jsonl", sha256=digest), tmp_path) == task
    with pytest.raises(StudyError, match=r"tasks\.q\.sha256 is 00"):
        read_task("q", TaskSource("questions", path="q.jsonl", sha256="00"), tmp_path)
    lines(tmp_path / "q.jsonl", [row, row])
    with pytest.raises(StudyError, match="item '1' comes twice"):
        read_task("q", source, tmp_path)
    lines(tmp_path / "q.jsonl", [{**row, "answer": " green"}])
    with pytest.raises(StudyError, match=r"tasks\.q\.kind is choice"):
        read_task("q", source, tmp_path)
    with pytest.raises(StudyError, match=r"--set tasks\.q\.path=PATH"):
        read_task("q", TaskSource("questions", path="elsewhere.jsonl"), tmp_path)
    with pytest.raises(StudyError, match="no questions in deu_Latn"):
        read_task("problems", TaskSource("problems", languages=("xxx_Latn", "deu_Latn")[1:], subset="none"), tmp_path)


def test_records_join_fields_and_read_lists(tmp_path: Path):
    rows = [{"instruction": "Do.", "input": "", "output": "Done."}, {"instruction": "Do.", "input": "x", "output": "y"}]
    (tmp_path / "list.json").write_text(json.dumps(rows), encoding="utf-8")
    source = CorpusSource("records", path="list.json", fields=("instruction", "input", "output"))
    corpus = read_source("task", source, tmp_path, "eng_Latn")
    assert corpus["eng_Latn"] == ("Do.\nDone.", "Do.\nx\ny")
    with pytest.raises(CorpusError, match="none of the fields text"):
        read_source("task", CorpusSource("records", path="list.json", fields=("text",)), tmp_path, "eng_Latn")


def test_problems_to_find_experts_are_not_those_to_answer():
    corpus = read_source("task", CorpusSource("problems", limit=60), Path(), "eng_Latn")
    task = read_task("sums", TaskSource("problems", subset="seen", skip=60), Path())
    assert corpus.languages == ("eng_Latn",)
    assert not set(corpus.items) & {q.item for q in task.questions}


def test_a_corpus_needs_the_reference_language():
    with pytest.raises(StudyError, match=r"corpora\.general has no text in eng_Latn"):
        read_source("general", CorpusSource("shipped", languages=("deu_Latn",)), Path(), "eng_Latn")


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(TaskSource("mgsm", path="mgsm"), marks=needs_data),
        pytest.param(TaskSource("gsm8k", path="gsm8k/test_first660.jsonl"), marks=needs_data),
        pytest.param(TaskSource("belebele", path="belebele"), marks=needs_data),
        pytest.param(TaskSource("global_mmlu", path="global_mmlu_dev", category="Medical"), marks=needs_data),
    ],
    ids=lambda source: source.format,
)
def test_published_files_can_be_read(source: TaskSource):
    task = read_task("task", source, DATA)
    by_language = {language: [q for q in task.questions if q.language == language] for language in task.languages}
    assert len({len(questions) for questions in by_language.values()}) == 1
    assert all(q.prompt.strip() and q.answer.strip() for q in task.questions)
