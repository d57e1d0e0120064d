"""The one schema of what people write: whatever is misspelt is refused, in every kind of file.

    python tests/test_schema.py

writes the JSON Schemas in `moe_route/data/schemas` anew.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import moe_route as mr
from moe_route.base import files, schema
from moe_route.base.schema import FileRefusedError, Kind, Range, Tagged
from moe_route.bench.results import BenchmarkResults
from moe_route.cli.plot import _read_sweep
from moe_route.data.reader import CorpusRow
from moe_route.evaluation import read_study
from moe_route.evaluation.study import TaskSource
from moe_route.evaluation.tasks import read_task
from moe_route.integrations.serving.options import EngineNotSupportedError, Options
from moe_route.report.result_tables import read_results
from moe_route.runs.corpus import _load_total
from moe_route.runs.job import Job

SCHEMAS = Path(mr.__file__).parent / "data" / "schemas"

_MODEL = {"name": "a", "config_hash": "b", "num_experts": [4, 4], "router_hash": "c", "weights_hash": "d"}
_WHERE = {"layers": [0], "groups": ["de"], "phase": "decode", "positions": [[0, 4], [9, None]]}
_EXPERTS = {"kind": "", "experts": {"0": [1]}, "absent": True, "draw": 3, **_WHERE}
_SOFT = {**_EXPERTS, "strength": 0.5, "by_position": [1.0, 0.5]}
_TABLE = {"lengths": [1], "layers": [0], "keys": [["one", "de"]], "constant": True, "field": "ids"}
_TABLES = {
    "i": {**_TABLE, "ids": [[[1]]]},
    "s": {**_TABLE, "field": "scores", "scores": [[[0.5, 0.5]]]},
    "d": {"field": "directions", "experts": [[1, 2]], "directions": [[0.5, 1.0]]},
}
_RULES = [
    {**_SOFT, "kind": "activate", "mode": "sample"},
    {**_SOFT, "kind": "bias", "mode": "score"},
    {**_SOFT, "kind": "magnitude"},
    {**_SOFT, "kind": "scale_logits"},
    {**_SOFT, "kind": "scale_weights", "mode": "after"},
    {"kind": "temperature", "value": 2.0, "strength": 1.5, "by_position": [1.0, 0.5], **_WHERE},
    {**_EXPERTS, "kind": "force_on", "mode": "steermoe"},
    {**_EXPERTS, "kind": "force_off", "mode": "natural"},
    {**_EXPERTS, "kind": "forbid"},
    {"kind": "top_k", "value": 1, **_WHERE},
    {"kind": "remap", "experts": {"0": {"1": 2}}, **_WHERE},
    {"kind": "replace_scores", "experts": {"0": {"1": 0.5}}, "draw": 1, **_WHERE},
    {"kind": "replace_scores", "table": "s", **_WHERE},
    {"kind": "reserve_slot", "experts": {"0": [1]}, "draw": 1, **_WHERE},
    {"kind": "fix_choice", "experts": {"0": {"1": 0}}, "draw": 1, **_WHERE},
    {"kind": "replay", "table": "i", "draw": 1, **_WHERE},
    {"kind": "gumbel", "value": 1.0, "draw": 1, **_WHERE},
    {"kind": "apply", "function": "package.module:f", "source": "0", **_WHERE},
    {"kind": "add_output", "table": "d", "mode": "full", "strength": 0.5, "by_position": [1.0, 0.5], **_WHERE},
]
_SOURCE = {"split": "dev", "fields": ["question"], "subset": "seen", "languages": None, "skip": 0, "limit": 2}
_TASK = {"path": "", "kind": None, "subset": "seen", "category": None, "languages": None, "skip": 0, "limit": 1}
_STUDY = {
    "title": "A study.",
    "model": {"id": "demo", "revision": "", "dtype": "auto", "device": None, "engine": "hook", "dequantize": False},
    "chat": {
        "template": True,
        "add_special_tokens": False,
        "enable_thinking": False,
        "reasoning_effort": "low",
        "date": "2025-01-31",
        "answer_prefix": "a",
        "channel": "final",
    },
    "corpora": {
        "general": {"format": "shipped", "path": "", "sha256": None, **_SOURCE},
        "task": {"format": "problems", "path": "", "sha256": None, **_SOURCE},
        "add_special_tokens": False,
        "reference": "eng_Latn",
        "max_length": 64,
        "batch_size": 2,
    },
    "find": {"tau": [0.3, 0.2], "top": 3, "by": "token"},
    "steer": {"kind": "soft", "layers": [1, 2], "strength": 0.5, "std": "sample", "layer_base": 1},
    "tasks": {
        "sums": {
            "format": "problems",
            "batch_size": 2,
            "max_new_tokens": 8,
            "until": ["."],
            "sha256": None,
            **_TASK,
        }
    },
    "controls": {"random": 1, "random_per_token": 1, "run": ["before"]},
    "sweep": {"tau": [0.3], "strength": [0.5], "layers": [[1, 2]], "task": "sums"},
    "seeds": {"random": 1, "bootstrap": 1},
}
_TIMES = ("median", "low", "high", "times_peer", "times_peer_low", "times_peer_high")
_SHARES = ("floor_fraction", "floor_fraction_low", "floor_fraction_high")
_ROW = {"section": "s", "case": "c", "name": "n", "calls": 3, "peer": "peer", "floor": "peer", "ours": True}
_ROW |= dict.fromkeys((*_TIMES, *_SHARES), 0.5)
_EFFECT = {"label": ["a"], "value": "b", "low": "b", "high": "b", "better": "higher"}
_CHANGE = {"value": 0.1, "low": 0.0, "high": 0.2, "p_value": 0.5, "verdict": "unclear"}
_ENVELOPE = {"$schema": "x.json", "format": 1, "written_by": "0.1.0", "needs": "0.1.0"}
_OPTIONAL = ("written_by", "needs")


@dataclass(frozen=True)
class Example:
    """A file with every key that its kind has, and how it is read from `folder`."""

    content: Any
    read: Callable[[Path, Any], object]
    name: str = "x.json"
    marks: Mapping[str, Any] | None = None  # what such a file has beside its content

    def load(self, folder: Path, content: Any) -> object:
        (folder / self.name).write_text(content if isinstance(content, str) else self.text(content), "utf-8")
        return self.read(folder / self.name, content)

    def text(self, content: Any) -> str:
        return "".join(toml(content)) if self.name.endswith(".toml") else json.dumps(content)

    @property
    def whole(self) -> Any:
        return {**_ENVELOPE, **(self.marks or {}), **self.content}


def toml(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
    """A table as TOML; keys without a value are left out."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    for key, value in table.items():
        if key not in inner and value is not None:
            yield f"{json.dumps(key)} = {json.dumps(value)}\n"
    for key, value in inner.items():
        yield f"[{'.'.join(map(json.dumps, (*path, key)))}]\n"
        yield from toml(value, (*path, key))


def _in_job(path: Path, content: Any) -> None:
    with Job(path.parent, "eval", {"a": 1}):
        pass


def _in_step(path: Path, content: Any) -> None:
    folder = path.parent / "job"
    with Job(folder, "eval", {}) as job:
        (folder / "one").mkdir(exist_ok=True)
        (folder / "one" / "step.json").write_text(json.dumps(content))
        job.step("one", {"a": 1})


def _marked(kind: str) -> dict[str, Any]:
    return {"moe_route": kind, "schema": files.SCHEMA}


EXAMPLES: dict[str, Example] = {
    "plan": Example(
        {"rules": _RULES, "model": _MODEL, "description": "d", "tables": _TABLES, "hash": "h"},
        lambda path, _: mr.Plan.load(path),
        marks=_marked("plan"),
    ),
    "selection": Example(
        {
            "experts": {"0": [1]},
            "scores": {"0": {"1": 0.5}},
            "threshold": 0.5,
            "description": "d",
            "num_experts": [4, 4],
            "model": _MODEL,
        },
        lambda path, _: mr.ExpertSelection.load(path),
        marks=_marked("selection"),
    ),
    "study": Example(_STUDY, lambda path, _: read_study(path), "x.toml"),
    "run": Example(
        {"command": "eval", "done": False, "inputs": {"a": 1}, "made": ["b"]},
        _in_job,
        "run.json",
        _marked("run"),
    ),
    "step": Example(
        {
            "step": "one",
            "hash": files.content_hash({}, {"a": 1}),
            "done": False,
            "inputs": {"a": 1},
            "results": {},
        },
        _in_step,
    ),
    "rank": Example(
        {
            "window": 1,
            "checkpoints": 2,
            "finished": False,
            "digest": "d",
            "progress": {
                "texts": 1,
                "tokens": 2,
                "cut": 0,
                "empty": 0,
                "read": 0.5,
                "seconds": 1.0,
                "new_tokens": 2,
                "read_before": 0.0,
                "finished": False,
                "texts_before": 0,
                "all_texts": None,
            },
        },
        lambda path, _: _load_total(path.parent),
        "corpus_run.json",
        _marked("run"),
    ),
    "results": Example(
        {"tables": [{"title": "t", "columns": ["a", "b"], "rows": [["x", 1]], "note": "n", "effect": _EFFECT}]},
        lambda path, _: read_results(path),
    ),
    "steer-answer": Example(
        {
            "plan": "h",
            "unit": "nats",
            "languages": [
                {
                    "language": "de",
                    "texts": 1,
                    "loss": 1.0,
                    "steered": 1.0,
                    "change": 0.0,
                    "low": None,
                    "high": None,
                    "verdict": "",
                }
            ],
        },
        lambda path, _: read_results(path),
    ),
    "strengths-answer": Example(
        {
            "groups": ["de"],
            "strengths": [1.0],
            "change": [[_CHANGE]],
            "texts": [1],
            "unit": "nats",
            "loss": [[1.0]],
            "natural": [1.0],
            "control": [],
            "plan": "h",
            "note": "",
        },
        lambda path, _: _read_sweep([path]),
    ),
    "question": Example(
        {"item": "1", "language": "de", "prompt": "p", "answer": "a", "subset": "s", "choices": ["a", "b"]},
        lambda path, _: read_task("t", TaskSource("questions", path.name), path.parent),
        "x.jsonl",
    ),
    "BenchmarkResults": Example(
        {
            "machine": {"processor": "one"},
            "rows": [_ROW, {**_ROW, "name": "peer", "peer": None}],
            "facts": [{"section": "s", "case": "c", "what": "w", "value": 1.0, "unit": "u"}],
            "targets": [{"what": "w", "wanted": "a", "measured": "b", "met": True}],
        },
        lambda path, _: BenchmarkResults.load(path),
        marks=_marked("BenchmarkResults"),
    ),
    "engine-options": Example(
        {
            "groups": ["a"],
            "plan": "p.json",
            "plans": {"one": None},
            "record": True,
            "sequences": True,
            "trace": [0],
            "trace_limit": 5,
            "count_cached": True,
            "routed_experts": False,
            "rows": 4,
            "any_version": False,
            "save": "s.safetensors",
            "every": 5.0,
            "metrics_groups": ["a"],
            "admin": False,
        },
        lambda _, content: Options.of({"moe_route": content}),
    ),
}
REFUSALS = (FileRefusedError, EngineNotSupportedError)


def misspellings(key: str) -> Iterator[str]:
    """The key with one letter changed, dropped or doubled, and in other cases."""
    for place, letter in enumerate(key):
        yield f"{key[:place]}{'x' if letter != 'x' else 'y'}{key[place + 1 :]}"
        yield key[:place] + key[place + 1 :]
        yield key[: place + 1] + key[place:]
    yield from sorted({key.upper(), key.title(), key.swapcase()} - {key})


def places(hint: Any, content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """Every declared key that a content has: where its table is, the key, and the class that declares it."""
    if isinstance(limit := schema._limit(hint), Tagged):
        hint = limit.cases()[content[limit.key]]
    hint = schema._bare(hint)
    inner = typing.get_args(hint)
    if is_dataclass(hint):
        for one, of in schema._hints(hint).items() if isinstance(content, dict) else ():
            if one in content:
                yield at, one, hint
                yield from places(of, content[one], (*at, one))
    elif typing.get_origin(hint) is tuple and isinstance(content, list):
        for number, item in enumerate(content):
            yield from places(inner[0 if inner[-1] is Ellipsis else number], item, (*at, number))
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        formed = [one for one in inner if schema._has_form(one, content)]
        formed.sort(key=lambda one: len(schema._hints(one).keys() & content.keys()) if is_dataclass(one) else 0)
        yield from places(formed[-1], content, at) if formed else ()
    elif isinstance(content, Mapping) and len(inner) == 2:
        for key, item in content.items():
            yield from places(inner[1], item, (*at, key))


def renamed(content: Any, at: tuple[Any, ...], key: str, other: str) -> Any:
    """The content with one key renamed, at its place."""
    if at:
        parts = dict(content) if isinstance(content, Mapping) else list(content)
        parts[at[0]] = renamed(content[at[0]], at[1:], key, other)
        return parts
    return {other if name == key else name: value for name, value in content.items()}


def declared(hint: Any, seen: dict[Any, None]) -> None:
    """Collect every dataclass below an annotation."""
    limit = schema._limit(hint)
    for one in limit.cases().values() if isinstance(limit, Tagged) else typing.get_args(schema._bare(hint)):
        declared(one, seen)
    if is_dataclass(schema._bare(hint)) and hint not in seen:
        seen[hint] = None
        for one in schema._hints(hint).values():
            declared(one, seen)


def test_every_kind_has_an_example_with_every_key() -> None:
    assert schema.KINDS.keys() == EXAMPLES.keys()
    for name, kind in schema.KINDS.items():
        classes: dict[Any, None] = {}
        declared(kind.content, classes)
        held = {(of, key) for _, key, of in places(kind.content, EXAMPLES[name].content)}
        missing = {(of, one.name) for of in classes for one in fields(of)} - held
        assert not missing, name


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_read(name: str, tmp_path: Path) -> None:
    EXAMPLES[name].load(tmp_path, EXAMPLES[name].whole)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_misspelt_key_is_refused(name: str, step: int, tmp_path: Path) -> None:
    example, kind = EXAMPLES[name], schema.KINDS[name]
    tried, passed = 0, []
    whole = [((), key, None) for key in example.whole if key not in example.content]
    for at, key, of in [*places(kind.content, example.content), *whole]:
        for other in [*misspellings(key)][tried % step :: step]:
            content = renamed(example.whole, at, key, other)
            if (not at and other in example.whole) or example.text(content) == example.text(example.whole):
                continue  # it would stand there twice, or is none, which TOML does not have
            tried += 1
            try:
                example.load(tmp_path, content)
            except REFUSALS:
                continue
            passed.append((at, key, other, of))
    assert not passed
    assert tried > 2 * len(fields(kind.content))


@pytest.mark.parametrize("key", [one.name for one in fields(CorpusRow)])
@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".csv"])
def test_misspelt_columns_of_a_corpus_are_refused(key: str, suffix: str, tmp_path: Path) -> None:
    row = {"text": "One sentence.", "group": "de", "item": "7", "address": "of others"}
    path = tmp_path / f"x{suffix}"

    def read(row: Mapping[str, str]) -> list[Any]:
        mark = "," if suffix == ".csv" else "\t"
        table = f"{mark.join(row)}\n{mark.join(row.values())}\n"
        path.write_text(json.dumps(row) if suffix == ".jsonl" else table)
        return list(mr.data.read_texts(path))

    assert [(text.group, text.item) for text in read(row)] == [("de", "7")]
    for other in misspellings(key):
        with pytest.raises(FileRefusedError):
            read(renamed(row, (), key, other))


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"study", "engine-options"}))
@pytest.mark.parametrize("wrong", ["twice", "NaN", "-Infinity", "1e999", "[" * 100_000, "\udce4"])
def test_json_that_programs_read_in_several_ways_is_refused(name: str, wrong: str, tmp_path: Path) -> None:
    example = EXAMPLES[name]
    first, *_ = example.content
    text = example.text(example.whole)
    again = f'"{first}": {json.dumps(example.content[first])}'
    if wrong != "twice":
        again = f'"{first}_": {wrong}'
    text = f"{text[:-1]}, {again}}}"
    if name == "step":
        (tmp_path / "job").mkdir()
    with pytest.raises(FileRefusedError, match=r"x\.json|run\.json|x\.jsonl|step\.json"):
        _write(tmp_path, example, text.encode("utf-8", "surrogateescape"))


def _write(folder: Path, example: Example, data: bytes) -> None:
    path = folder / example.name
    if example.read is _in_step:
        with Job(folder / "job", "eval", {}) as job:
            (folder / "job" / "one").mkdir()
            (folder / "job" / "one" / "step.json").write_bytes(data)
            job.step("one", {"a": 1})
    path.write_bytes(data)
    example.read(path, None)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_newer_format_is_refused_before_any_key_is_judged(name: str, tmp_path: Path) -> None:
    newer = {"format": 2, "written_by": "0.9.0", "needs": "0.8.0", "keys_of_tomorrow": 1}
    with pytest.raises(REFUSALS, match=r"format 2, written by moe-route 0\.9\.0, needs >= 0\.8\.0"):
        EXAMPLES[name].load(tmp_path, {**EXAMPLES[name].whole, **newer})
    for wrong in ("2", True, 0, 1.5):
        with pytest.raises(REFUSALS, match="format"):
            EXAMPLES[name].load(tmp_path, {**EXAMPLES[name].whole, "format": wrong})


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_file_of_a_newer_format_says_so(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"plan{suffix}"
    kind = schema.KINDS["plan"]
    monkeypatch.setitem(schema.KINDS, "plan", kind)
    replace(kind, format=2, needs="0.7.0")  # enters itself
    mr.Plan.forbid({0: [1]}).save(path)
    assert mr.Plan.load(path) == mr.Plan.forbid({0: [1]})
    monkeypatch.setitem(schema.KINDS, "plan", kind)
    with pytest.raises(FileRefusedError, match=rf"written by moe-route {mr.__version__}, needs >= 0\.7\.0"):
        mr.Plan.load(path)


def test_files_of_before_say_no_format(tmp_path: Path) -> None:
    mr.Plan.forbid({0: [1]}).save(tmp_path / "plan.json")
    assert "format" not in json.loads((tmp_path / "plan.json").read_text())


# ---- what is declared


@dataclass(frozen=True)
class _Inner:
    """What is inside."""

    high: float


@dataclass(frozen=True)
class _Declared:
    """A thing.

    Attributes:
        name: of it.
        sizes, others: numbers of it,
            from 1.
        inner: see below.
    """

    name: typing.Literal["one", "two"]
    sizes: tuple[typing.Annotated[int, Range(1, 9)], ...] = ()
    others: Mapping[schema.Natural, bool | None] | None = None
    inner: _Inner | tuple[str, int] = ("a", 1)


THING = Kind("thing", _Declared, mark="")
schema.KINDS.pop("thing")


def test_values_become_what_is_declared() -> None:
    made = THING.read({"name": "one", "sizes": [1, 9], "others": {"3": None, "0": True}, "inner": {"high": 2}}, "x")
    assert made == _Declared("one", (1, 9), {3: None, 0: True}, _Inner(2.0))
    assert isinstance(made.inner.high, float)
    assert THING.read({"name": "two", "inner": ["b", 2]}, "x") == _Declared("two", inner=("b", 2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, 'x lacks "name": add it ("one" or "two")'),
        ({"nmae": "one"}, 'x has no key "nmae": did you mean "name"?'),
        ({"NAME": "one"}, 'did you mean "name"?'),
        ({"name": "one", "colour": 1}, 'no key "colour": it has inner, name, others, sizes'),
        ({"name": "tow"}, 'x: name is "tow": give "one" or "two" (did you mean "two"?)'),
        ({"name": "one", "sizes": [1, 0]}, "x: sizes[1] is 0: give a whole number from 1 to 9"),
        ({"name": "one", "sizes": [1.0]}, "sizes[0] is 1.0"),
        ({"name": "one", "sizes": [True]}, "sizes[0] is true"),
        ({"name": "one", "sizes": 1}, "sizes is 1: give a list [a whole number from 1 to 9, ...]"),
        ({"name": "one", "others": {"03": True}}, 'the key others.03 is "03": give a whole number from 0'),
        ({"name": "one", "others": {"-1": True}}, "the key others.-1 is -1"),
        ({"name": "one", "others": {"1": "yes"}}, 'others.1 is "yes": give true or false'),
        ({"name": "one", "inner": {"high": float("inf")}}, "inner.high is Infinity: give a number"),
        ({"name": "one", "inner": {"hihg": 1}}, 'x: inner has no key "hihg": did you mean "high"?'),
        ({"name": "one", "inner": ["b"]}, "inner is ["),
        ([], "x is []: give a table"),
    ],
)
def test_a_refusal_names_place_value_and_what_is_allowed(content: Any, words: str) -> None:
    with pytest.raises(FileRefusedError) as error:
        THING.read(content, "x")
    assert words in str(error.value)


def test_a_missing_file_is_both_missing_and_refused(tmp_path: Path) -> None:
    for read in (schema.load_json, schema.read_text, lambda path: mr.Plan.load(path)):
        with pytest.raises(FileRefusedError, match="does not exist") as error:
            read(tmp_path / "x.json")
        assert isinstance(error.value, FileNotFoundError)


# ---- JSON Schema


def test_json_schema_of_a_declaration() -> None:
    made = THING.json_schema()["properties"]
    assert made["sizes"] == {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": 9},
        "description": "numbers of it, from 1.",
    }
    assert made["name"] == {"enum": ["one", "two"], "description": "of it."}
    assert made["others"]["anyOf"][0]["additionalProperties"] is False


def _shown(kind: Kind) -> str:
    return json.dumps(kind.json_schema(), indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("name", EXAMPLES)
def test_shipped_json_schemas_are_those_of_the_declarations(name: str) -> None:
    text = mr.data.shipped_schemas()[name].read_text("utf-8")
    assert text == _shown(schema.KINDS[name]), "write them anew: python tests/test_schema.py"
    assert mr.data.shipped_schemas().keys() == schema.KINDS.keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_editor_sees_the_same_errors(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    example, kind = EXAMPLES[name], schema.KINDS[name]
    validator = jsonschema.Draft202012Validator(kind.json_schema())
    validator.check_schema(validator.schema)
    assert not list(validator.iter_errors(example.whole))
    for at, key, _ in places(kind.content, example.content):
        assert not validator.is_valid(renamed(example.whole, at, key, f"{key}x")), (at, key)


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for name, kind in schema.KINDS.items():
        (SCHEMAS / f"{name}.json").write_text(_shown(kind), "utf-8")
    sys.exit()
