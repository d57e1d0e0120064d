"""Ask a model the questions of a task: fixed batches, prompts with or without a chat template, three kinds of tasks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np
import torch

from moe_route.data import Question
from moe_route.evaluation.study import ChatSettings, StudyError, TaskSource
from moe_route.evaluation.tasks import NUMBER_SCORERS, channel_of, until_first
from moe_route.runs.language_model import LanguageModel

# the call of a chat template that gives today's date
_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True)
class AskedTask:
    """A task as a model is asked it.

    Attributes:
        name: of the task in the study.
        kind: "answer", "choice" or "generate".
        questions: with prompts as the model reads them, chat template included.
        batches: the questions in fixed batches.
        source, chat: the study's settings.
    """

    name: str
    kind: str
    questions: tuple[Question, ...]
    batches: tuple[tuple[Question, ...], ...]
    source: TaskSource
    chat: ChatSettings

    @classmethod
    def prepare(
        cls,
        name: str,
        kind: str,
        questions: Sequence[Question],
        source: TaskSource,
        chat: ChatSettings,
        language_model: LanguageModel,
    ) -> AskedTask:
        """Render the prompts and fix the batches. Raises `StudyError` for a chat template that is not there."""
        prefix = "" if kind == "generate" else chat.answer_prefix
        asked = tuple(_rendered(question, chat, prefix, language_model.tokenizer) for question in questions)
        return cls(name, kind, asked, fixed_batches(asked, language_model, source.batch_size), source, chat)

    def only(self, items: Sequence[str], language_model: LanguageModel) -> AskedTask:
        """The questions of these items, in batches of their own."""
        kept = tuple(question for question in self.questions if question.item in set(items))
        return replace(self, questions=kept, batches=fixed_batches(kept, language_model, self.source.batch_size))

    @property
    def items(self) -> tuple[str, ...]:
        """The items that every language has, in the order of the first language."""
        languages = dict.fromkeys(question.language for question in self.questions)
        of = {one: dict.fromkeys(q.item for q in self.questions if q.language == one) for one in languages}
        first, *others = of.values()
        return tuple(item for item in first if all(item in other for other in others))


def scorers_of(kind: str) -> tuple[str, ...]:
    """Names of the ways an answer of this kind is judged; the last one is the main one."""
    return tuple(scorer.name for scorer in NUMBER_SCORERS) if kind == "generate" else ("exact",)


def fixed_batches(
    questions: Sequence[Question], language_model: LanguageModel, batch_size: int
) -> tuple[tuple[Question, ...], ...]:
    """Batches that depend on the questions alone: sorted by length in tokens (the longest first), item and language.

    Results of a model in bfloat16 change with the composition of batches, so conditions are compared on equal ones.
    """
    lengths = [len(row) for row in language_model.tokenizer([q.prompt + q.answer for q in questions])["input_ids"]]
    order = sorted(range(len(questions)), key=lambda i: (-lengths[i], questions[i].item, questions[i].language))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return tuple(tuple(questions[i] for i in chunk) for chunk in chunks)


def ask(language_model: LanguageModel, task: AskedTask, batch: Sequence[Question]) -> list[dict[str, Any]]:
    """Ask the questions of one batch together; a JSON-able record for each."""
    answers = {"answer": _judged, "choice": _chosen, "generate": _generated}[task.kind](language_model, task, batch)
    return [
        {
            "task": task.name,
            "language": question.language,
            "item": question.item,
            "prompt": hashlib.sha256(question.prompt.encode()).hexdigest()[:16],
            **answer,
        }
        for question, answer in zip(batch, answers, strict=True)
    ]


def _rendered(question: Question, chat: ChatSettings, prefix: str, tokenizer: Any) -> Question:
    """The question with its prompt in the chat template; without one, as it is."""
    if not chat.template:
        return question
    if not getattr(tokenizer, "chat_template", None):
        raise StudyError("chat.template is true, and the tokenizer has no chat template: set it to false")
    options: dict[str, Any] = {"chat_template": _dated(tokenizer.get_chat_template(), chat.date)}
    if chat.enable_thinking is not None:
        options["enable_thinking"] = chat.enable_thinking
    if chat.reasoning_effort is not None:
        options["reasoning_effort"] = chat.reasoning_effort
    message = [{"role": "user", "content": question.prompt.strip()}]
    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, **options) + prefix
    # a new turn begins without a space
    choices = tuple(choice.lstrip() for choice in question.choices)
    return replace(question, prompt=prompt, answer=question.answer.lstrip(), choices=choices)


def _dated(template: str, day: str | None) -> str:
    """The template with a fixed date in place of today's, which would change prompts every day."""
    if not _TODAY.search(template):
        return template
    if day is None:
        raise StudyError("the chat template names today's date, so prompts change every day: fix it by chat.date")
    given = date.fromisoformat(day)
    return _TODAY.sub(lambda call: f'"{given.strftime(call["format"])}"', template)


def _judged(language_model: LanguageModel, task: AskedTask, batch: Sequence[Question]) -> list[dict[str, Any]]:
    """Whether the right answer is the greedy continuation, and its negative log-probability; nothing is generated."""
    judged = language_model.answers(batch, batch_size=len(batch))
    return [
        {"output": None, "extracted": {}, "correct": {"exact": bool(right)}, "tokens": 0, "nats": float(nats)}
        for right, nats in zip(judged.correct, judged.nats, strict=True)
    ]


def _chosen(language_model: LanguageModel, task: AskedTask, batch: Sequence[Question]) -> list[dict[str, Any]]:
    """The most probable of the choices of each question."""
    records = []
    for question, nats in zip(batch, _choice_nats(language_model, batch), strict=True):
        best = question.choices[int(np.argmin(nats))]
        records.append(
            {
                "output": best,
                "extracted": {"exact": best.strip()},
                "correct": {"exact": best == question.answer},
                "tokens": 0,
                "nats": float(nats[question.choices.index(question.answer)]),
                "choices": [float(value) for value in nats],
            }
        )
    return records


def _choice_nats(language_model: LanguageModel, batch: Sequence[Question]) -> list[np.ndarray]:
    """Negative log-probability of each choice of each question, float64 [choices] each.

    If all choices differ in their last token alone, as letters do, one call reads all of them; else each choice is read
    by itself.
    """
    every = [replace(question, answer=choice) for question in batch for choice in question.choices]
    rows = language_model.tokenizer(
        [q.prompt + q.answer for q in every], add_special_tokens=language_model.add_special_tokens
    )
    ids = iter(rows["input_ids"])
    of = [[next(ids) for _ in question.choices] for question in batch]
    if not all(len({tuple(row[:-1]) for row in choices}) == 1 for choices in of):
        nats = iter(language_model.answers(every, batch_size=len(batch)).nats.tolist())
        return [np.array([next(nats) for _ in question.choices]) for question in batch]
    inputs = _padded(language_model, [choices[0][:-1] for choices in of], "right")
    with torch.inference_mode(), language_model.labeled(batch):
        logits = language_model.model(**inputs, use_cache=False).logits
    last = inputs["attention_mask"].sum(1) - 1
    at_last = logits[torch.arange(len(batch), device=logits.device), last].float().log_softmax(-1).cpu().double()
    return [
        -at_last[i, torch.tensor([row[-1] for row in choices])].numpy()  # a letter is one token
        for i, choices in enumerate(of)
    ]


def _generated(language_model: LanguageModel, task: AskedTask, batch: Sequence[Question]) -> list[dict[str, Any]]:
    """Continue the prompts by greedy search, and judge the number that is extracted by each of the scorers."""
    tokenizer, source = language_model.tokenizer, task.source
    options = {"add_special_tokens": language_model.add_special_tokens}
    inputs = _padded(language_model, tokenizer([q.prompt for q in batch], **options)["input_ids"], "left")
    stopping: dict[str, Any] = {"stop_strings": list(source.until), "tokenizer": tokenizer} if source.until else {}
    with torch.inference_mode(), language_model.labeled(batch):
        ids = language_model.model.generate(
            **inputs,
            max_new_tokens=source.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            **stopping,
        )
    ends = _end_tokens(language_model)
    records = []
    for question, row in zip(batch, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        size = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        ended = row[size - 1] in ends
        # the marks of a channel are special tokens
        written = tokenizer.decode(row[:size], skip_special_tokens=task.chat.channel is None)
        output = until_first(
            written if task.chat.channel is None else channel_of(written, task.chat.channel), source.until
        )
        extracted = {scorer.name: scorer.extract(output) for scorer in NUMBER_SCORERS}
        right = {scorer.name: scorer.equal(extracted[scorer.name], question.answer) for scorer in NUMBER_SCORERS}
        cut = size == source.max_new_tokens and not ended and not any(text in written for text in source.until)
        record = {"output": written, "extracted": extracted, "correct": right, "tokens": size, "cut": cut, "nats": None}
        records.append(record)
    return records


def _end_tokens(language_model: LanguageModel) -> set[int]:
    """The tokens that end a text, and padding."""
    configured = getattr(language_model.model.generation_config, "eos_token_id", None)
    ends = set(configured if isinstance(configured, (list, tuple)) else [configured])
    return {
        token
        for token in (*ends, language_model.tokenizer.eos_token_id, language_model.tokenizer.pad_token_id)
        if token is not None
    }


def _padded(language_model: LanguageModel, rows: Sequence[Sequence[int]], side: str) -> Mapping[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, S], padded on one side."""
    size, fill = max(map(len, rows)), language_model.tokenizer.pad_token_id
    ids = torch.full((len(rows), size), fill, dtype=torch.int64)
    mask = torch.zeros((len(rows), size), dtype=torch.int64)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(size - len(row), size)
        ids[i, part] = torch.tensor(row, dtype=torch.int64)
        mask[i, part] = 1
    device = language_model.model.device
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
