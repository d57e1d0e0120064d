"""Studies: what is recorded, found, steered, compared and asked, as a TOML file.

study = read_study("demo")                  # shipped
study = read_study("my.toml", {"steer.strength": 1.0})
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moe_route.base import files
from moe_route.base.schema import FileRefusedError, Kind, meant, read_text
from moe_route.data import shipped_studies

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_COMMIT = 40  # hexadecimal digits of a commit hash

ControlName = Literal["before", "after", "multilingual", "deactivation", "off", "other layer base"]
CONTROLS: tuple[ControlName, ...] = get_args(ControlName)
"""Controls beside the random ones: see `conditions`."""


class StudyError(FileRefusedError):
    """Raised for a study that cannot be used; the message names the key and how to fix it."""


@dataclass(frozen=True)
class ModelSettings:
    """The model.

    Attributes:
        id: checkpoint folder, name on the hub, or "demo".
        revision: commit hash (40 hexadecimal digits) of a model on the hub; nothing else pins its weights.
        dtype: dtype of the weights, or "auto".
        device: where to put the model; by default where it loads.
        engine: how to attach.
        dequantize: load MXFP4 weights (gpt-oss) as dtype; in MXFP4 the router is bypassed.
    """

    id: str
    revision: str = ""
    dtype: str = "auto"
    device: str | None = None
    engine: Literal["hook", "fused"] = "hook"
    dequantize: bool = False

    def __post_init__(self) -> None:
        digits = set(self.revision) <= set("0123456789abcdef")
        if self.revision and not (digits and len(self.revision) == _COMMIT):
            raise ValueError(f"revision {self.revision!r} is no commit hash: branches move, give the 40 digits")

    def check_pinned(self) -> None:
        """Raise `StudyError` for a model on the hub without a commit hash, and a folder with one."""
        local = self.id == "demo" or Path(self.id).is_dir()
        if local and self.revision:
            raise StudyError(f"model.revision is for the hub, and {self.id} is a folder: leave it out")
        if not local and not self.revision:
            raise StudyError(
                f"model.revision is missing: name the commit of {self.id} whose weights are meant "
                "(--set model.revision=HASH, 40 digits, as the hub lists them), or the folder of a checkpoint "
                "(--set model.id=FOLDER)"
            )


@dataclass(frozen=True)
class ChatSettings:
    """How prompts are put to the model.

    Attributes:
        template: put each prompt into the tokenizer's chat template, as a message of the user.
        add_special_tokens: whether the tokenizer adds its special tokens to prompts. Required, because a template
            holds them already.
        enable_thinking: given to the template (Qwen3); not given if left out.
        reasoning_effort: given to the template (gpt-oss); not given if left out.
        date: the day, as 2025-01-31, that the template names as today's (gpt-oss).
        answer_prefix: text after the template, before an answer that is not generated (gpt-oss: the marks of the
            channel "final").
        channel: read a generated answer from this channel of the output only (gpt-oss: "final").
    """

    template: bool
    add_special_tokens: bool
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    date: str | None = None
    answer_prefix: str = ""
    channel: str | None = None

    def __post_init__(self) -> None:
        if self.date is not None:
            datetime.date.fromisoformat(self.date)
        if not self.template and (self.answer_prefix or self.date):
            raise ValueError("date and answer_prefix belong to a chat template: set template = true")
        if not self.template and (self.enable_thinking is not None or self.reasoning_effort is not None):
            raise ValueError("enable_thinking and reasoning_effort are read by a chat template: set template = true")
        if self.template and self.add_special_tokens:
            raise ValueError(
                "a chat template holds its special tokens itself, and they would come twice: set "
                "add_special_tokens = false"
            )


@dataclass(frozen=True)
class CorpusSource:
    """Texts whose routing is recorded.

    Attributes:
        format: "shipped" (the sentences that moe-route brings), "problems" (its problems with their answers),
            "flores" (a folder `SPLIT/LANGUAGE.SPLIT`), "table" (tab-separated, an item per row), "records" (JSON lines
            or a JSON list, in the reference language).
        path: file or folder, relative to the folder of the data.
        split: of "flores".
        fields: of "records", joined by line breaks; missing and empty ones are left out.
        subset: of "problems".
        languages: by default all. "problems" and "records" are read in the reference language.
        skip, limit: leave out the first items, and take this many.
        sha256: of the texts as they are read; others are refused. By default none is asked for.
    """

    format: Literal["shipped", "problems", "flores", "table", "records"]
    path: str = ""
    split: str = "dev"
    fields: tuple[str, ...] = ("question", "answer")
    subset: str = "seen"
    languages: tuple[str, ...] | None = None
    skip: int = 0
    limit: int | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        _check_source(self.format in ("shipped", "problems"), self.path, self.skip, self.limit)


@dataclass(frozen=True)
class CorporaSettings:
    """The two corpora: parallel general text, and text of the task in the reference language.

    Attributes:
        general, task: see `CorpusSource`; no task if the study steers nothing.
        add_special_tokens: whether the tokenizer adds its special tokens to texts. Required.
        reference: language in which experts are found, and from which divergence is measured.
        max_length: texts are cut to this many tokens.
        batch_size: texts per batch.
    """

    general: CorpusSource
    add_special_tokens: bool
    task: CorpusSource | None = None
    reference: str = "eng_Latn"
    max_length: int = 1024
    batch_size: int = 16

    def __post_init__(self) -> None:
        _check_positive(max_length=self.max_length, batch_size=self.batch_size)


@dataclass(frozen=True)
class FindSettings:
    """How experts are found: `analysis.task_experts`.

    Attributes:
        tau: threshold of the difference of frequencies; of several, the first that finds an expert in the steered
            layers.
        top: largest number of experts per layer.
        by: mean over "sequence" or "token".
    """

    tau: float | tuple[float, ...]
    top: int | None = None
    by: Literal["sequence", "token"] = "sequence"

    @property
    def taus(self) -> tuple[float, ...]:
        """The thresholds, in the order in which they are tried."""
        return self.tau if isinstance(self.tau, tuple) else (self.tau,)

    def __post_init__(self) -> None:
        _check_thresholds(self.tau, self.taus)
        if not self.taus:
            raise ValueError("tau is empty: name a threshold")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top is {self.top}: give 1 or more, or leave it out")


@dataclass(frozen=True)
class SteerSettings:
    """How experts are steered.

    Attributes:
        kind: "soft" (`Plan.activate`) or "hard" (`Plan.force_on`).
        layers: first and last steered layer, both included, as published.
        strength: of soft activation, in standard deviations of a token's logits.
        std: of the "population" or of a "sample".
        layer_base: number of the first MoE layer in `layers`, 0 or 1.
    """

    kind: Literal["soft", "hard"]
    layers: tuple[int, int]
    strength: float = 0.5
    std: Literal["population", "sample"] = "population"
    layer_base: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        _check_layers(self.layers, self.layer_base)


@dataclass(frozen=True)
class ControlSettings:
    """Which controls are run.

    Attributes:
        random: number of plans with random experts.
        random_per_token: number of plans with new random experts for each token.
        run: names out of `CONTROLS`; by default all.
    """

    random: int = 5
    random_per_token: int = 5
    run: tuple[ControlName, ...] = CONTROLS

    def __post_init__(self) -> None:
        if self.random < 0 or self.random_per_token < 0:
            raise ValueError("random and random_per_token are numbers of plans, 0 or more")


@dataclass(frozen=True)
class SweepSettings:
    """Settings to try on the even items; every combination is one point. An empty list keeps the study's setting.

    Attributes:
        tau, strength, layers: values to try.
        task: name of the task whose accuracy decides; by default the first.
    """

    tau: tuple[float, ...] = ()
    strength: tuple[float, ...] = ()
    layers: tuple[tuple[int, int], ...] = ()
    task: str | None = None

    def __post_init__(self) -> None:
        _check_thresholds(self.tau, self.tau)

    def __bool__(self) -> bool:
        """Whether there is something to try."""
        return bool(self.tau or self.strength or self.layers)


@dataclass(frozen=True)
class TaskSource:
    """Questions, parallel in several languages.

    Attributes:
        format: "problems" (those that moe-route brings), "mgsm", "gsm8k", "belebele", "global_mmlu", "table" (a table
            of `Task.read_tsv`) or "questions" (JSON lines); docs/evaluation.md describes each.
        path: file or folder, relative to the folder of the data.
        kind: "answer" (is the right answer the greedy continuation; read by teacher forcing), "choice" (the most
            probable of several continuations) or "generate" (free text, from which an answer is extracted). By
            default that of the format.
        subset: of "problems" and of tables with a column `subset`: take this part only.
        category: of "global_mmlu": take this `subject_category` only.
        languages: by default all.
        skip, limit: leave out the first items of each language, and take this many.
        batch_size: prompts per batch.
        max_new_tokens: limit of "generate".
        until: texts that end an output, for "generate".
        sha256: of the questions as they are read; others are refused. By default none is asked for.
    """

    format: Literal["problems", "mgsm", "gsm8k", "belebele", "global_mmlu", "table", "questions"]
    path: str = ""
    kind: Literal["answer", "choice", "generate"] | None = None
    subset: str | None = None
    category: str | None = None
    languages: tuple[str, ...] | None = None
    skip: int = 0
    limit: int | None = None
    batch_size: int = 32
    max_new_tokens: int = 512
    until: tuple[str, ...] = ()
    sha256: str | None = None

    def __post_init__(self) -> None:
        _check_source(self.format == "problems", self.path, self.skip, self.limit)
        _check_positive(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class SeedSettings:
    """Seeds.

    Attributes:
        random: of the first plan with random experts; the others count on from it.
        bootstrap: of intervals and p-values.
    """

    random: int = 0
    bootstrap: int = 0

    def __post_init__(self) -> None:
        if self.random < 0 or self.bootstrap < 0:
            raise ValueError("random and bootstrap are seeds, 0 or more")


@dataclass(frozen=True)
class Study:
    """A whole evaluation. `title` is one sentence for the report; the other attributes are the tables of the file.

    A study without `find`, `steer` and `corpora.task` steers nothing: it asks the model alone, and holds its accuracy
    against the divergence of the languages.
    """

    title: str
    model: ModelSettings
    chat: ChatSettings
    corpora: CorporaSettings
    tasks: Mapping[str, TaskSource]
    find: FindSettings | None = None
    steer: SteerSettings | None = None
    controls: ControlSettings = field(default_factory=ControlSettings)
    sweep: SweepSettings = field(default_factory=SweepSettings)
    seeds: SeedSettings = field(default_factory=SeedSettings)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("there is no task: add a table [tasks.NAME]")
        parts = {"find": self.find, "steer": self.steer, "corpora.task": self.corpora.task}
        missing = [name for name, given in parts.items() if given is None]
        if 0 < len(missing) < len(parts):
            raise ValueError(
                f"{' and '.join(missing)} is missing: add it to steer, or leave out all of {', '.join(parts)}"
            )
        if missing and self.sweep:
            raise ValueError("sweep tries settings of steering, and nothing is steered: leave it out, or add steer")
        for name in self.tasks:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"the task {name!r} needs a name of letters, digits, - and _")
        if self.sweep.task is not None and self.sweep.task not in self.tasks:
            raise ValueError(f"sweep.task is {self.sweep.task!r}: there are {', '.join(self.tasks)}")
        for layers in self.sweep.layers:
            _check_layers(layers, self.steering.layer_base)

    @property
    def steering(self) -> SteerSettings:
        """How experts are steered, in a study that steers."""
        assert self.steer is not None
        return self.steer

    @property
    def finding(self) -> FindSettings:
        """How experts are found, in a study that steers."""
        assert self.find is not None
        return self.find

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, JSON-able."""
        tables: dict[str, Any] = _lists(asdict(self))
        return tables


STUDY = Kind("study", Study, mark="")
"""Files of studies."""


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_study(name: str | Path, changes: Mapping[str, Any] | None = None) -> Study:
    """Read the shipped study with this name, or the TOML file at this path.

    `changes` maps dotted keys, such as "model.revision", to values that replace those of the file. Raises `StudyError`
    for a file that is no study, and for unknown names.
    """
    shipped = shipped_studies()
    path = shipped.get(str(name), Path(name))
    if not path.is_file():
        near = meant(str(name), shipped, "or a shipped one:")
        raise StudyError(f"there is no study {str(name)!r}: give a TOML file, {near}")
    try:
        table = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StudyError(f"{path} is no TOML file ({error}): correct it there") from error
    for key, value in (changes or {}).items():
        _assign(table, key, value)
    study: Study = STUDY.read(table, str(path), StudyError)
    return study


def parse_assignment(text: str) -> tuple[str, Any]:
    """Parse "steer.strength=0.5" to a key and a value of TOML; what is no TOML is a text. Raises `StudyError`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise StudyError(f"{text!r} assigns nothing: write KEY=VALUE, such as steer.strength=0.5")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _assign(table: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for part in outer:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise StudyError(f"{key} cannot be set: {part} is a value, not a table")
    table[last] = value


def fingerprint(content: Any) -> str:
    """SHA-256 (hex) of JSON-able content."""
    return files.content_hash({}, content)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}: give 1 or more")


def _check_source(shipped: bool, path: str, skip: int, limit: int | None) -> None:
    if shipped and path:
        raise ValueError(f"path is {path!r}, but this format is shipped with moe-route: leave path out")
    if not shipped and not path:
        raise ValueError("path is missing: name the file or folder, relative to the folder of the data")
    if skip < 0 or (limit is not None and limit < 1):
        raise ValueError("skip must be 0 or more, and limit 1 or more")


def _check_thresholds(shown: object, thresholds: tuple[float, ...]) -> None:
    if not all(0 <= tau < 1 for tau in thresholds):
        raise ValueError(f"tau is {shown}: thresholds lie from 0 to 1, published ones from 0.25 to 0.5")


def _check_layers(layers: tuple[int, int], base: int) -> None:
    first, last = layers
    if first < base or last < first:
        raise ValueError(f"layers are {list(layers)}: give the first and the last, counted upwards from {base}")
