"""Read tasks and corpora from local files, and the answer from what a model wrote.

The shipped tasks are read, and the usual data sets as they are distributed. Of two ways to extract a number,
`flexible-extract` is that of lm-eval's MGSM tasks, with its faults: it sees no digits but 0-9, and its comparison drops
punctuation, so that 1.5 equals 15. `normalized` reads numbers in the digits of all scripts, with the usual separators
of thousands and decimals, and compares values. Numbers in words are read by neither.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from moe_route.base.schema import Kind, parse_json, read_text
from moe_route.data import Corpus, CorpusError, Question, Task, demo_problems
from moe_route.data.languages import flores_code
from moe_route.evaluation.study import CorpusSource, StudyError, TaskSource, fingerprint

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class QuestionContent:
    """A question in one language, a line of a file of JSON lines.

    Attributes:
        item: key of the question, the same in every language.
        language: its language, such as a FLORES code.
        prompt: text to continue.
        answer: right continuation, with the space before it where the language has spaces.
        subset: part of the task that it belongs to.
        choices: all continuations to choose from, if the answer is not free.
    """

    item: str | int
    language: str
    prompt: str
    answer: str | int | float
    subset: str | int = ""
    choices: tuple[str | int | float, ...] = ()


QUESTION = Kind("question", QuestionContent, mark="")
"""Lines of a file of questions."""

# language -> (before the question, after it): the native prompts of lm-eval's mgsm_native_cot (there, the Russian one
# lacks the space between its two words)
_NATIVE_STEPS = {
    "ben_Beng": ("প্রশ্ন: ", "\nধাপে ধাপে উত্তর:"),
    "deu_Latn": ("Frage: ", "\nSchritt-für-Schritt-Antwort:"),
    "eng_Latn": ("Question: ", "\nStep-by-Step Answer:"),
    "spa_Latn": ("Pregunta: ", "\nRespuesta paso a paso:"),
    "fra_Latn": ("Question : ", "\nRéponse étape par étape :"),
    "jpn_Jpan": ("問題： ", "\nステップごとの答え:"),
    "rus_Cyrl": ("Задача: ", "\nПошаговое решение:"),
    "swh_Latn": ("Swali: ", "\nJibu la Hatua kwa Hatua:"),
    "tel_Telu": ("ప్రశ్న: ", "\nదశలవారీగా సమాధానం:"),
    "tha_Thai": ("โจทย์: ", "\nคำตอบทีละขั้นตอน:"),
    "zho_Hans": ("问题： ", "\n逐步解答:"),
}


def read_task(name: str, source: TaskSource, data: Path) -> Task:
    """Read the questions of a study's task; paths are relative to the folder `data`.

    Raises `StudyError` for languages and parts that are not there and for a fingerprint that differs, and
    `data.CorpusError` for files in another form.
    """
    path = data / source.path
    if source.format != "problems" and not path.exists():
        raise StudyError(_not_there(f"tasks.{name}.path", source.path, data))
    questions = [q for q in _TASKS[source.format](path, source) if source.subset in (None, q.subset)]
    questions_left = _selected(f"tasks.{name}", questions, source)
    _check_kind(name, kind_of(source, questions_left), questions_left)
    _check_fingerprint(f"tasks.{name}", source.sha256, task_fingerprint(questions_left))
    return Task(name, tuple(questions_left))


def read_source(name: str, source: CorpusSource, data: Path, reference: str) -> Corpus:
    """Read a study's corpus, with the errors of `read_task`."""
    path, where = data / source.path, f"corpora.{name}"
    if source.format not in ("shipped", "problems") and not path.exists():
        raise StudyError(_not_there(f"{where}.path", source.path, data))
    if source.format == "problems":
        corpus = demo_problems().subset(source.subset, languages=[reference]).corpus()
    elif source.format == "records":
        corpus = _records(path, source.fields, reference)
    else:
        split = source.split if source.format == "flores" else None
        corpus = Corpus.read("general" if source.format == "shipped" else path, source.languages, split=split)
    rows = slice(source.skip, None if source.limit is None else source.skip + source.limit)
    kept = {language: corpus[language][rows] for language in corpus.languages}
    if reference not in kept or not kept[reference]:
        raise StudyError(f"{where} has no text in {reference}, the language of corpora.reference: add it")
    part = Corpus(corpus.languages, corpus.items[rows], kept, corpus.name)
    _check_fingerprint(where, source.sha256, corpus_fingerprint(part))
    return part


def task_fingerprint(questions: Iterable[Question]) -> str:
    """SHA-256 (hex) of questions as they are asked, without the task's name."""
    return fingerprint([[q.item, q.language, q.prompt, q.answer, q.subset, list(q.choices)] for q in questions])


def corpus_fingerprint(corpus: Corpus) -> str:
    """SHA-256 (hex) of the texts of a corpus."""
    return fingerprint([list(corpus.items), {language: list(corpus[language]) for language in corpus.languages}])


def kind_of(source: TaskSource, questions: Sequence[Question]) -> str:
    """How the questions are scored: as the study says, else as their form suggests."""
    if source.kind is not None:
        return source.kind
    if source.format in ("mgsm", "gsm8k"):
        return "generate"
    return "choice" if questions and questions[0].choices else "answer"


def _check_kind(name: str, kind: str, questions: Sequence[Question]) -> None:
    for question in questions if kind == "choice" else ():
        if question.answer not in question.choices or len(set(question.choices)) < 2:
            raise StudyError(
                f"tasks.{name}.kind is choice, and question {question.item!r} in {question.language} has no choices "
                "that hold its answer: give them, or take another kind"
            )


def _selected(where: str, questions: Sequence[Question], source: TaskSource) -> list[Question]:
    """The questions of the languages asked for, without the first `skip` items of each, `limit` of each."""
    known = tuple(dict.fromkeys(q.language for q in questions))
    for language in source.languages or ():
        if language not in known:
            raise StudyError(f"{where}.languages: no questions in {language}, there are {', '.join(known) or 'none'}")
    selected: list[Question] = []
    for language in source.languages or known:
        mine = [q for q in questions if q.language == language]
        selected += mine[source.skip : None if source.limit is None else source.skip + source.limit]
    if not selected:
        raise StudyError(f"{where} has no question left: check subset, category, skip and limit")
    seen: set[tuple[str, str]] = set()
    for q in selected:
        if (q.language, q.item) in seen:
            raise StudyError(f"{where}: item {q.item!r} comes twice in {q.language}; give every item a key of its own")
        seen.add((q.language, q.item))
    return selected


def _check_fingerprint(where: str, wanted: str | None, given: str) -> None:
    if wanted is not None and wanted != given:
        raise StudyError(f"{where}.sha256 is {wanted}, and the data here have {given}: take the data that were meant")


def _not_there(where: str, path: str, data: Path) -> str:
    return (
        f"{where}: there is no {path!r} in {data}; name the folder that holds it (--data FOLDER), or its own place "
        f"(--set {where}=PATH)"
    )


# ---- formats of tasks


def _problems(path: Path, source: TaskSource) -> Iterator[Question]:
    yield from demo_problems().questions


def _table(path: Path, source: TaskSource) -> Iterator[Question]:
    yield from Task.read_tsv(path).questions


def _questions(path: Path, source: TaskSource) -> Iterator[Question]:
    for place, row in _json_rows(path):
        said = vars(QUESTION.read(row, place, CorpusError))
        item, language, prompt, answer = (_text(said, name, place) for name in ("item", "language", "prompt", "answer"))
        yield Question(item, language, prompt, answer, str(said["subset"]), tuple(map(str, said["choices"])))


def _mgsm(path: Path, source: TaskSource) -> Iterator[Question]:
    """A folder of `mgsm_LANGUAGE.tsv`: question, tab, answer; line i is the same problem in every language."""
    for file, language in _by_language(path, "mgsm_*.tsv", "mgsm_"):
        before, after = _NATIVE_STEPS.get(language, _NATIVE_STEPS["eng_Latn"])
        lines = [line for line in read_text(file).split("\n") if line.strip()]
        for number, line in enumerate(lines, 1):
            question, tab, answer = line.rpartition("\t")
            if not tab:
                raise CorpusError(f"{file}, line {number}: no tab between question and answer")
            yield Question(f"mgsm-{number:03d}", language, f"{before}{question}{after}", answer.strip())


def _gsm8k(path: Path, source: TaskSource) -> Iterator[Question]:
    """JSON lines with `question`, and `answer` that ends with #### and the number; English."""
    before, after = _NATIVE_STEPS["eng_Latn"]
    for place, row in _json_rows(path):
        _, mark, answer = _text(row, "answer", place).rpartition("####")
        if not mark:
            raise CorpusError(f"{place}: the answer has no #### before the number")
        name = f"gsm8k-{place.rpartition(' ')[2].zfill(4)}"
        yield Question(name, "eng_Latn", f"{before}{_text(row, 'question', place)}{after}", answer.strip())


def _belebele(path: Path, source: TaskSource) -> Iterator[Question]:
    """A folder of `LANGUAGE.jsonl`: the published rows, or rows of a passage with its questions under `items`."""
    for file, language in _by_language(path, "*.jsonl"):
        for place, row in _json_rows(file):
            if "items" not in row:
                answers = [_text(row, f"mc_answer{number}", place) for number in (1, 2, 3, 4)]
                item = f"{_text(row, 'link', place)}#{row.get('question_number')}"
                right = int(_text(row, "correct_answer_num", place)) - 1
                prompt = _read_and_choose(row["flores_passage"], _text(row, "question", place), answers)
                yield Question(item, language, prompt, f" {LETTERS[right]}", choices=_SPACED)
                continue
            number = place.rpartition(" ")[2]
            for order, asked in enumerate(row["items"], 1):
                answers = [answer["text"] for answer in asked["answers"]]
                right = [bool(answer["correct"]) for answer in asked["answers"]].index(True)
                prompt = _read_and_choose(_text(row, "text", place), asked["question"], answers)
                yield Question(f"passage-{number}.{order}", language, prompt, f" {LETTERS[right]}", choices=_SPACED)


def _read_and_choose(passage: str, question: str, answers: Sequence[str]) -> str:
    """The prompt of lm-eval's belebele."""
    listed = "\n".join(f"{letter}: {answer}" for letter, answer in zip(LETTERS, answers, strict=True))
    return f"P: {passage}\nQ: {question.strip()}\n{listed}\nAnswer:"


def _global_mmlu(path: Path, source: TaskSource) -> Iterator[Question]:
    """A folder of `LANGUAGE.jsonl` with the published columns; `category` selects by `subject_category`."""
    for file, language in _by_language(path, "*.jsonl"):
        for place, row in _json_rows(file):
            if source.category not in (None, row.get("subject_category")):
                continue
            options = [f"{letter}. {_text(row, f'option_{letter.lower()}', place)}" for letter in LETTERS]
            prompt = "\n".join([_text(row, "question", place).strip(), *options, "Answer:"])
            answer = f" {_text(row, 'answer', place)}"
            yield Question(_text(row, "sample_id", place), language, prompt, answer, choices=_SPACED)


_SPACED = tuple(f" {letter}" for letter in LETTERS)
_TASKS: Mapping[str, Callable[[Path, TaskSource], Iterator[Question]]] = {
    "problems": _problems,
    "table": _table,
    "questions": _questions,
    "mgsm": _mgsm,
    "gsm8k": _gsm8k,
    "belebele": _belebele,
    "global_mmlu": _global_mmlu,
}


# ---- files


def _records(path: Path, names: Sequence[str], language: str) -> Corpus:
    """Texts of JSON records: some of their fields, joined by line breaks."""
    texts, items = [], []
    for number, (place, row) in enumerate(_json_rows(path), 1):
        parts = [str(row[name]).strip() for name in names if str(row.get(name) or "").strip()]
        if not parts:
            raise CorpusError(f"{place} has none of the fields {', '.join(names)}: name its fields in the study")
        texts.append("\n".join(parts))
        items.append(f"{path.stem}-{number:05d}")
    return Corpus((language,), tuple(items), {language: tuple(texts)}, path.name)


def _by_language(folder: Path, pattern: str, prefix: str = "") -> Iterator[tuple[Path, str]]:
    """The files of a folder, English first, and the FLORES code of each one's language."""
    named = {path.stem.removeprefix(prefix): path for path in sorted(folder.glob(pattern)) if path.is_file()}
    if not named:
        raise CorpusError(f"{folder} has no file {pattern}: give the folder that holds one for each language")
    by_code = {flores_code(name) or name: path for name, path in named.items()}
    for language in sorted(by_code, key=lambda name: (name != "eng_Latn", name)):
        yield by_code[language], language


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each object of a file of JSON lines or a JSON list; a place ends with the number of the row."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        parts: Iterable[tuple[int, Any]] = enumerate(parse_json(text, str(path), CorpusError), 1)
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        parts = ((number, parse_json(line, f"{path}, line {number}", CorpusError)) for number, line in lines)
    for number, row in parts:
        if not isinstance(row, dict):
            raise CorpusError(f"{path}, row {number} is no JSON object: write one per line")
        yield f"{path}, row {number}", row


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    if not str(row.get(name) or "").strip():
        raise CorpusError(f"{place} has no {name!r}: fill it in, or leave the row out")
    return str(row[name])


_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# a space inside a number is a separator only if it is one of those that keep it on one line
_THIN = "\u00a0\u2009\u202f"
_SIGNS = str.maketrans({"\u2212": "-", "\uff0d": "-", "\u066b": ".", "\u066c": ",", "\uff0e": ".", "\uff0c": ","})
_NUMBER = re.compile(rf"(?<![0-9A-Za-z.,)])-?\d+(?:[.,'\u2019{_THIN}]\d+)*|\d+(?:[.,'\u2019{_THIN}]\d+)*")
_GROUP = 3  # digits between separators of thousands


@dataclass(frozen=True)
class Scorer:
    """A way to judge an output.

    Attributes:
        name: as it stands in results.
        extract: output -> what is taken as its answer, "" if there is none.
        equal: (extracted, right answer) -> whether they are the same answer.
    """

    name: str
    extract: Callable[[str], str]
    equal: Callable[[str, str], bool]


def flexible_extract(output: str) -> str:
    """The last number of an output, as lm-eval's filter `flexible-extract` of MGSM finds it; "" if there is none."""
    numbers = _FLEXIBLE.findall(output)
    return next((part.strip() for part in numbers[-1] if part), "") if numbers else ""


def _equal_without_punctuation(extracted: str, answer: str) -> bool:
    """lm-eval's exact match with `ignore_case` and `ignore_punctuation`."""
    mine, right = (text.lower().translate(_PUNCTUATION).strip() for text in (extracted, answer))
    return bool(mine) and mine == right


def normalized_number(output: str) -> str:
    """The last number of an output in plain form, such as "1234.5"; "" if there is none.

    A separator that comes before exactly three digits is one of thousands, unless another kind of separator follows it
    or the number begins with 0. Of two kinds, the last one is that of decimals. So "1.234" and "1,234" are 1234, while
    "12,5", "0.125", "1.234,50" and "1,234.50" have decimals.
    """
    numbers = _NUMBER.findall(_plain_digits(output))
    return str(_value(numbers[-1])) if numbers else ""


def _plain_digits(text: str) -> str:
    """The text with the digits of all scripts as 0-9, and usual minus signs and separators as -, . and ,"""
    digits = ((sign, unicodedata.decimal(sign, None)) for sign in text)
    return "".join(sign if digit is None else str(digit) for sign, digit in digits).translate(_SIGNS)


def _value(number: str) -> str:
    """Plain form of a number with separators."""
    negative, digits = number.startswith("-"), number.removeprefix("-")
    separators = [sign for sign in digits if not sign.isdigit()]
    whole, decimals = digits, ""
    if separators and _is_decimal(digits, separators):
        whole, _, decimals = digits.rpartition(separators[-1])
    value = Decimal("".join(filter(str.isdigit, whole)) + "." + (decimals or "0"))
    shown = format(value, "f").rstrip("0").rstrip(".")
    return f"-{shown}" if negative and value else shown or "0"


def _is_decimal(digits: str, separators: Sequence[str]) -> bool:
    """Whether the last separator of a number begins its decimals."""
    last, kinds = separators[-1], set(separators)
    if last not in ".," or separators.count(last) > 1:
        return False
    if len(kinds) > 1:
        return True
    before, _, after = digits.rpartition(last)
    return len(after) != _GROUP or len(before) > _GROUP or before.startswith("0")


def _equal_values(extracted: str, answer: str) -> bool:
    return bool(extracted) and extracted == normalized_number(answer)


def channel_of(output: str, name: str) -> str:
    """The text of the last message in a channel of the harmony format (gpt-oss); "" if there is none.

    The output must hold its special tokens. An output that was cut before the channel began has no answer.
    """
    _, begin, rest = output.rpartition(f"<|channel|>{name}<|message|>")
    return re.split(r"<\|(?:return|end|start|call)\|>", rest)[0] if begin else ""


def until_first(output: str, stops: Sequence[str]) -> str:
    """The output up to the first of several texts."""
    return output[: min((place for stop in stops if (place := output.find(stop)) >= 0), default=len(output))]


NUMBER_SCORERS = (
    Scorer("flexible-extract", flexible_extract, _equal_without_punctuation),
    Scorer("normalized", normalized_number, _equal_values),
)
