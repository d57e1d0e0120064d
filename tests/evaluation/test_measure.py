"""Asking questions: fixed batches, choices in one call, chat templates, generation."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from moe_route.data import Question, demo_problems
from moe_route.evaluation import StudyError
from moe_route.evaluation.measure import AskedTask, ask, fixed_batches
from moe_route.evaluation.study import ChatSettings, TaskSource
from moe_route.runs.language_model import LanguageModel

PLAIN = ChatSettings(template=False, add_special_tokens=True)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def prepared(kind: str, questions: list[Question], language_model: LanguageModel, **given: object) -> AskedTask:
    source = TaskSource("problems", **given)  # type: ignore[arg-type]
    return AskedTask.prepare("task", kind, questions, source, PLAIN, language_model)


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return list(demo_problems().subset("seen", languages=["eng_Latn", "hin_Deva", "jpn_Jpan"], limit=5).questions)


def test_batches_do_not_depend_on_the_order_of_questions(questions: list[Question], language_model: LanguageModel):
    batches = fixed_batches(questions, language_model, 4)
    shuffled = random.Random(0).sample(questions, len(questions))
    assert fixed_batches(shuffled, language_model, 4) == batches
    assert sorted(map(len, batches)) == [3, 4, 4, 4]
    lengths = [
        len(ids)
        for batch in batches
        for ids in language_model.tokenizer([q.prompt + q.answer for q in batch]).input_ids
    ]
    assert lengths == sorted(lengths, reverse=True)


def test_answers_do_not_depend_on_the_batch_beyond_rounding(questions: list[Question], language_model: LanguageModel):
    found = {}
    for size in (1, 15):
        task = prepared("answer", questions, language_model, batch_size=size)
        records = [record for batch in task.batches for record in ask(language_model, task, batch)]
        found[size] = {(r["item"], r["language"]): r["nats"] for r in records}
    assert found[1] == pytest.approx(found[15], rel=1e-4, abs=1e-5)


def test_choices_are_read_in_one_call_where_they_are_one_token(
    questions: list[Question], language_model: LanguageModel
):
    # letters are one token each; numbers of two digits share their first token or not
    letters = [replace(q, answer=" B", choices=(" A", " B", " C")) for q in questions if q.language == "eng_Latn"]
    numbers = [replace(q, choices=(q.answer, q.answer + "7", " 5")) for q in questions if q.language == "eng_Latn"]
    for asked in (letters, numbers):
        task = prepared("choice", asked, language_model, batch_size=5)
        (batch,) = task.batches
        for question, record in zip(batch, ask(language_model, task, batch), strict=True):
            alone = [replace(question, answer=choice) for choice in question.choices]
            expected = language_model.answers(alone, batch_size=1).nats
            assert record["choices"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
            assert record["output"] == question.choices[int(np.argmin(expected))]
            assert record["correct"]["exact"] == (record["output"] == question.answer)


def test_generation_in_batches_is_generation_alone(questions: list[Question], language_model: LanguageModel):
    task = prepared("generate", questions, language_model, batch_size=15, max_new_tokens=5)
    (batch,) = task.batches
    for question, record in zip(batch, ask(language_model, task, batch), strict=True):
        assert record["output"] == language_model.generate(question.prompt, 5)
        assert 0 < record["tokens"] <= 5


def test_answers_are_cut_at_the_limit_unless_they_end_there(questions: list[Question], language_model: LanguageModel):
    records = {}
    for limit in (1, 3, 5):
        task = prepared("generate", questions[:3], language_model, batch_size=3, max_new_tokens=limit)
        for record in ask(language_model, task, task.questions):
            records[record["item"], record["language"], limit] = record
    for (item, language, limit), record in records.items():
        longer = records[item, language, 5]
        assert record["cut"] == (record["tokens"] == limit and (limit == 5 or longer["tokens"] > limit))
    assert all(records[item, language, 1]["cut"] for item, language, _ in records)
    assert not any(record["cut"] for (_, _, limit), record in records.items() if limit == 5 > record["tokens"])
    stopped = prepared("generate", questions[:3], language_model, batch_size=3, max_new_tokens=1)
    until = tuple(record["output"] for (_, _, limit), record in records.items() if limit == 1)
    stopped = replace(stopped, source=replace(stopped.source, until=until))
    assert not any(record["cut"] for record in ask(language_model, stopped, stopped.questions))


def test_a_chat_template_is_rendered_once(questions: list[Question], language_model: LanguageModel):
    chat = ChatSettings(template=True, add_special_tokens=False, answer_prefix="final: ")
    source = TaskSource("problems")
    with pytest.raises(StudyError, match="has no chat template"):
        AskedTask.prepare("task", "answer", questions, source, chat, language_model)
    before = language_model.tokenizer.chat_template
    try:
        language_model.tokenizer.chat_template = TEMPLATE
        task = AskedTask.prepare("task", "answer", questions[:1], source, chat, language_model)
        assert task.questions[0].prompt == f"[user] {questions[0].prompt.strip()}[a]final: "
        assert not task.questions[0].answer.startswith(" ")
        language_model.tokenizer.chat_template = TEMPLATE + "{{ strftime_now('%Y-%m-%d') }}"
        with pytest.raises(StudyError, match=r"fix it by chat\.date"):
            AskedTask.prepare("task", "generate", questions[:1], source, chat, language_model)
        dated = replace(chat, date="2025-01-31")
        task = AskedTask.prepare("task", "generate", questions[:1], source, dated, language_model)
        assert task.questions[0].prompt.endswith("[a]2025-01-31")
    finally:
        language_model.tokenizer.chat_template = before


def test_only_items_of_every_language_are_compared(questions: list[Question], language_model: LanguageModel):
    task = prepared("answer", questions[1:], language_model)  # English lacks its first item
    assert questions[0].item not in task.items
    assert len(task.items) == 4
    part = task.only(task.items[0::2], language_model)
    assert {q.item for q in part.questions} == set(task.items[0::2])
