"""Record a corpus of any size into a folder: in windows of texts, with checkpoints, over several ranks.

The texts are divided into windows of a fixed number of texts, in the order of the corpus. Rank r of R runs every window
whose number is r modulo R, and batches are made within a window. What is counted depends on neither the moment of a
checkpoint nor the number of ranks, so a run that was killed equals one that was not.

A checkpoint writes the sequences and cut texts since the last one, then replaces the file of the sums. That file says
how far the run is; files of a later number belong to a checkpoint that was killed, and are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from moe_route.base import files
from moe_route.base.identity import config_hash
from moe_route.base.ranks import ALONE, ModelParallelGroup
from moe_route.base.schema import Kind
from moe_route.data.batches import EncodedTexts, Text, token_ids
from moe_route.data.reader import CorpusText
from moe_route.recording import Recorder, RoutingStatistics, SequenceStore
from moe_route.routed import RoutedModel
from moe_route.runs.job import ForeignFolderError, Job
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts

RESULT = "statistics.safetensors"
_TOTAL = "sums.safetensors"
_CUT = "cut.jsonl"
_STATE_KIND = "run"
_STATE = "corpus_run"  # key of the metadata of a checkpoint's sums
_BATCHES_PER_WINDOW = 16
_NUMBERED = re.compile(r"(?:sequences|cut)-(\d+)(?:-\w+)?\.(?:safetensors|jsonl)")


class Texts(Protocol):
    """The texts of a corpus, the same at each iteration; a `data.CorpusStream` or `KeptTexts`."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What tells the corpus from others without reading it, JSON-able."""
        ...

    def __iter__(self) -> Iterator[CorpusText]: ...


@dataclass(frozen=True)
class KeptTexts:
    """Texts in memory, in the order in which they run."""

    name: str
    texts: tuple[Text, ...]

    @classmethod
    def by_length(cls, name: str, texts: Sequence[Text], tokenizer: Any, add_special_tokens: bool) -> KeptTexts:
        """The texts in decreasing number of tokens, so that those of a window are of similar length."""
        lengths = [len(ids) for ids in token_ids(tokenizer, texts, add_special_tokens=add_special_tokens)]
        order = sorted(range(len(texts)), key=lambda i: (-lengths[i], texts[i].item, texts[i].group))
        return cls(name, tuple(texts[i] for i in order))

    @property
    def identity(self) -> dict[str, Any]:
        """A hash of the texts."""
        return {"texts": files.content_hash({}, [[text.group, text.item, text.text] for text in self.texts])}

    def __iter__(self) -> Iterator[CorpusText]:
        for number, text in enumerate(self.texts, start=1):
            yield CorpusText(text.group, text.item, text.text, number / len(self.texts))


class TextRunner(Protocol):
    """What runs the texts of a corpus and counts them: an attached model, or an engine.

    Attributes:
        name: of the model.
        engine: what runs it.
        tokenizer: of transformers.
        config_hash: `identity.config_hash` of the model.
        plan_hash: hash of the plan that steers, or None.
    """

    name: str
    engine: str
    tokenizer: Any
    config_hash: str
    plan_hash: str | None

    def encode(self, texts: Sequence[Text], *, max_length: int | None, add_special_tokens: bool) -> EncodedTexts:
        """Convert texts to tokens, and cut them to this number (None: the model's limit)."""
        ...

    def run(self, encoded: EncodedTexts) -> None:
        """Run texts, and count them."""
        ...

    def take(self) -> RoutingStatistics:
        """What was counted since the last call; later texts are counted anew."""
        ...


class AttachedTexts:
    """A model of transformers that moe-route is attached to."""

    engine = "transformers"

    def __init__(self, language_model: LanguageModel, routed: RoutedModel, batch_size: int, record: Mapping[str, Any]):
        self._model, self._routed, self._batch_size, self._record = language_model, routed, batch_size, record
        self.name, self.tokenizer = language_model.name, language_model.tokenizer
        self.config_hash = config_hash(language_model.model)
        self.plan_hash = None if routed.plan is None else routed.plan.hash
        self._recorder: Recorder | None = None

    def encode(self, texts: Sequence[Text], *, max_length: int | None, add_special_tokens: bool) -> EncodedTexts:
        model = self._model if add_special_tokens else replace(self._model, add_special_tokens=False)
        return model.encode(texts, max_length=max_length)

    def run(self, encoded: EncodedTexts) -> None:
        if self._recorder is None:
            self._recorder = self._routed.record(**self._record)
        with self._recorder:
            record_texts(self._recorder, self._model, encoded, batch_size=self._batch_size)

    def take(self) -> RoutingStatistics:
        assert self._recorder is not None  # texts ran
        recorder, self._recorder = self._recorder, None
        return recorder.statistics()


@dataclass
class Progress:
    """How far this rank is. `read` is the share of the corpus that was read, None if unknown.

    `texts`, `tokens`, `cut` and `empty` count those that this rank recorded in all runs; `seconds` and `new_tokens`
    are of this run of the program. `texts_before` are those that earlier runs recorded, and `all_texts` those that
    this rank has to record, None if that is unknown.
    """

    texts: int = 0
    tokens: int = 0
    cut: int = 0
    empty: int = 0
    read: float | None = None
    seconds: float = 0.0
    new_tokens: int = 0
    read_before: float = 0.0
    finished: bool = False
    texts_before: int = 0
    all_texts: int | None = None

    @property
    def resumed(self) -> str:
        """What earlier runs left: "resumed: 3,200 of 6,000 texts were there"; "" if this is the first run."""
        if not self.texts_before:
            return ""
        of = "" if self.all_texts is None else f" of {self.all_texts:,}"
        return f"resumed: {self.texts_before:,}{of} texts were there"

    def __str__(self) -> str:
        rate = self.new_tokens / self.seconds if self.seconds else 0.0
        parts = [f"{self.texts} texts, {self.tokens} tokens, {rate:.0f} tokens/s"]
        if self.read is not None and self.read > self.read_before:
            left = self.seconds * (1 - self.read) / (self.read - self.read_before)
            parts.append(f"{100 * self.read:.1f} %, {_duration(left)} left")
        return ", ".join(parts)


@dataclass(frozen=True)
class RankContent:
    """How far a rank is: `state.json`, and the same in the file of its sums.

    Attributes:
        window: the next one of the corpus.
        checkpoints: number of those that were written.
        finished: whether all windows of the rank are recorded.
        digest: SHA-256 (hex) of all texts before the window.
        progress: see `Progress`.
    """

    window: int = 0
    checkpoints: int = 0
    finished: bool = False
    digest: str = ""
    progress: Progress = field(default_factory=Progress)


RANK = Kind("rank", RankContent, mark=_STATE_KIND)


@dataclass(frozen=True)
class CorpusRecording:
    """A resumable recording of a corpus into `folder`.

    Attributes:
        folder: the run's folder, made if missing. Ranks share it; one rank of each group writes.
        corpus: the texts; `data.read_texts` opens a file, a folder or a dataset.
        batch_size: texts per batch. A window holds 16 batches.
        max_length: texts are cut to this number of tokens (by default the model's limit).
        chat_template: put each text into the tokenizer's chat template, as a user's message.
        group: the ranks that run one model together with this one. Each group has its share of the windows.
        checkpoint_seconds: least time between two checkpoints, which lie between windows.
        record: arguments of `RoutedModel.record`.
        force: remove what an earlier run left in the folder, and begin again.
    """

    folder: Path
    corpus: Texts
    batch_size: int = 16
    max_length: int | None = None
    chat_template: bool = False
    group: ModelParallelGroup = ALONE
    checkpoint_seconds: float = 300.0
    record: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False

    def run(
        self,
        language_model: LanguageModel,
        routed: RoutedModel,
        *,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> Progress:
        """`run_with` an attached model.

        Raises also `steering.PlanError` where a plan that steers names a group of which the corpus has no text.
        """
        groups = getattr(self.corpus, "languages", None)
        if routed.plan is not None and groups is not None:
            routed.plan.check_groups(groups)
        runner = AttachedTexts(language_model, routed, self.batch_size, self.record)
        return self.run_with(runner, stop=stop, report=report)

    def run_with(
        self,
        runner: TextRunner,
        *,
        stop: Callable[[], bool] = lambda: False,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> Progress:
        """Record this group's windows that no checkpoint holds yet, and merge the groups if it is the last one.

        `stop` is called before each window; if it returns True on any rank of the group, its run ends with a
        checkpoint. `report` is called after each window. All ranks of a group run its windows, and one of them writes.

        Raises:
            ForeignFolderError: the folder holds a run with other settings, or of another model or corpus, or another
                process writes the part of this rank.
            ValueError: two texts of one group have the same item, and sequences are kept; or `force` with several
                ranks, which would remove the parts of each other.
        """
        if self.force and self.group.groups > 1:
            raise ValueError(f"several ranks cannot begin again: remove {self.folder}, or name another folder")
        with contextlib.ExitStack() as open_job:
            state = self.group.of_writer(lambda: self._begin(open_job, runner))
            progress = _Rank(self, state, runner).run(stop, report)
        if progress.finished and self.group.writes and self.merge() is not None:
            self._job(runner).finish((RESULT, _CUT))
        return progress

    def _begin(self, open_job: contextlib.ExitStack, runner: TextRunner) -> RankContent | None:
        """Claim the folder and the part of this group; returns how far the part is."""
        part = open_job.enter_context(self._job(runner)).lock(self.part(self.group.number).name)
        return _load_total(part, sequences=False)[1]

    def merge(self) -> RoutingStatistics | None:
        """Write the sum of all ranks to `folder`/statistics.safetensors and return it; None while a rank is running.

        Sequences are copied from file to file, a portion at a time. If several ranks end at once, each writes the same
        sum.
        """
        parts = [self.part(number) for number in range(self.group.groups)]
        totals = [_load_total(part) for part in parts]
        if any(state is None or not state.finished for _, state in totals):
            return None
        sums = [total for total, _ in totals if total is not None]
        if not sums:
            raise ValueError(f"{self.corpus.name} holds no text that is not blank: give another corpus")
        merged = sums[0]
        for other in sums[1:]:
            merged = merged.merge(other)
        merged.save(self.folder / RESULT)
        with files.replacing(self.folder / _CUT) as stream:
            for path in itertools.chain.from_iterable(sorted(part.glob("cut-*.jsonl")) for part in parts):
                stream.write(path.read_bytes())
        return merged

    def part(self, number: int) -> Path:
        """The folder of a group."""
        return self.folder / f"rank-{number:05d}"

    def _job(self, runner: TextRunner) -> Job:
        """The folder, and what the recording follows from."""
        inputs = {
            "model": runner.config_hash,
            "engine": runner.engine,
            "corpus": self.corpus.identity,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "chat_template": self.chat_template,
            "ranks": self.group.groups,
            "ranks of a model": self.group.size,
            "divided": self.group.how,
            "plan": runner.plan_hash,
            "record": dict(self.record),
        }
        return Job(self.folder, "record", inputs, force=self.force, shared=True)


class _Rank:
    """The part of one group on one of its ranks: its state, and its checkpoints, which one rank writes."""

    def __init__(self, run: CorpusRecording, state: RankContent | None, runner: TextRunner):
        self._run, self._runner = run, runner
        self._group = run.group
        self._part = run.part(run.group.number)
        if run.chat_template and not runner.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of {runner.name} has no chat template: leave it out")
        self._counted = False  # whether texts ran since the last checkpoint
        self._cut: list[dict[str, Any]] = []  # texts that were cut since then
        self._total = _load_total(self._part, sequences=False)[0] if self._group.writes else None
        state = state or RankContent()
        self._window = state.window  # the next window of the corpus
        self._checkpoints = state.checkpoints
        self._digest = state.digest  # of all texts before that window
        self._progress = replace(state.progress, finished=state.finished)
        self._progress.read_before = self._progress.read or 0.0
        self._progress.seconds = self._progress.new_tokens = 0
        self._progress.texts_before, self._progress.all_texts = self._progress.texts, None
        for path in self._part.iterdir() if self._group.writes else ():  # of a checkpoint that was killed
            match = _NUMBERED.fullmatch(path.name)
            if match and int(match[1]) >= self._checkpoints:
                path.unlink()

    def run(self, stop: Callable[[], bool], report: Callable[[Progress], None]) -> Progress:
        if self._progress.finished:
            self._progress.all_texts = self._progress.texts
            return self._progress
        if self._progress.texts_before and self._group.writes:
            self._progress.all_texts = self._count()
            report(self._progress)
        begin = last = time.monotonic()
        stopped = False
        for number, texts, read, digest in self._windows():
            if number % self._group.groups == self._group.number:
                if self._group.any(stop()):
                    stopped = True
                    break
                self._record(texts)
                self._progress.read = read
                self._progress.seconds = time.monotonic() - begin
                report(self._progress)
            self._window, self._digest = number + 1, digest
            if time.monotonic() - last >= self._run.checkpoint_seconds:
                self._checkpoint(finished=False)
                last = time.monotonic()
        self._progress.seconds = time.monotonic() - begin
        self._checkpoint(finished=not stopped)
        return self._progress

    def _count(self) -> int | None:
        """Number of texts that this group has to record; None for a corpus whose size only its end tells."""
        windows = _windows(self._run.corpus, self._run.batch_size)
        count = 0
        for number, texts in enumerate(windows):
            if texts[-1].read is None:
                return None
            if number % self._group.groups == self._group.number:
                count += sum(1 for text in texts if text.text.strip())
        return count

    def _record(self, texts: Sequence[CorpusText]) -> None:
        """Run the texts of one window."""
        some = [Text(text.group, text.item, self._wrapped(text.text)) for text in texts if text.text.strip()]
        self._progress.empty += len(texts) - len(some)
        if not some:
            return
        encoded = self._runner.encode(
            some,
            max_length=self._run.max_length,
            add_special_tokens=not self._run.chat_template,  # the template writes them
        )
        self._runner.run(encoded)
        self._counted = True
        tokens = sum(map(len, encoded.ids))
        self._progress.texts += len(some)
        self._progress.tokens += tokens
        self._progress.new_tokens += tokens
        self._progress.cut += encoded.cut
        cut = [encoded.texts[i] for i in encoded.shortened]
        self._cut += [{"group": text.group, "item": text.item, "tokens": encoded.limit} for text in cut]

    def _wrapped(self, text: str) -> str:
        if not self._run.chat_template:
            return text
        message = [{"role": "user", "content": text}]
        wrapped: str = self._runner.tokenizer.apply_chat_template(message, tokenize=False)
        return wrapped

    def _windows(self) -> Iterator[tuple[int, Sequence[CorpusText], float | None, str]]:
        """Number and texts of each window that is left, the share read at its end, and a digest of all texts so far."""
        windows = itertools.chain(_windows(self._run.corpus, self._run.batch_size), [()])
        seen: set[bytes] | None = set() if self._run.record.get("sequences") else None
        digest = hashlib.blake2b(digest_size=16)
        for number, window in enumerate(windows):
            changed = number == self._window and number and digest.hexdigest() != self._digest
            if changed or (not window and number < self._window):
                raise ForeignFolderError(
                    f"{self._run.corpus.name} is not what it was when {self._run.folder} was begun: restore it, or "
                    "name a new folder"
                )
            if not window:
                return
            for text in window:
                digest.update(files.canonical_json([text.group, text.item, text.text]).encode())
                if seen is not None:
                    _refuse_repeat(seen, text)
            if number >= self._window:
                yield number, window, window[-1].read, digest.hexdigest()

    def _checkpoint(self, *, finished: bool) -> None:
        new, self._counted = self._runner.take() if self._counted else None, False
        if not self._group.writes:  # counted once
            self._cut = []
            self._progress.finished = finished
            return
        if new is not None:
            if new.store is not None and len(new.store):
                new.store.save(self._part / f"sequences-{self._checkpoints:07d}.safetensors")
            new.store = None
            self._total = new if self._total is None else self._total.merge(new)
        if self._cut:
            lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in self._cut)
            files.write_text(self._part / f"cut-{self._checkpoints:07d}.jsonl", lines)
            self._cut = []
        self._progress.finished = finished
        state = {
            "window": self._window,
            "checkpoints": self._checkpoints + 1,
            "finished": finished,
            "digest": self._digest,
            "progress": asdict(self._progress),
        }
        if self._total is None:  # this rank has not run any text yet
            files.write_json(self._part / f"{_STATE}.json", state, _STATE_KIND)
        else:
            self._total.metadata[_STATE] = state
            self._total.save(self._part / _TOTAL)
            del self._total.metadata[_STATE]
        self._checkpoints += 1


def _windows(texts: Iterable[CorpusText], batch_size: int) -> Iterator[list[CorpusText]]:
    """The texts in windows, which hold 16 batches each."""
    rest = iter(texts)
    while window := list(itertools.islice(rest, batch_size * _BATCHES_PER_WINDOW)):
        yield window


def _load_total(part: Path, *, sequences: bool = True) -> tuple[RoutingStatistics | None, RankContent | None]:
    """Sums and state of the last checkpoint of a rank; None for what there is not."""
    if not (part / _TOTAL).is_file():
        only = part / f"{_STATE}.json"
        return None, _state(files.read_json(only, _STATE_KIND), only) if only.is_file() else None
    total = RoutingStatistics.load(part / _TOTAL)
    state = _state(total.metadata.pop(_STATE), part / _TOTAL)
    if sequences and any(part.glob("sequences-*.safetensors")):
        total.store = SequenceStore.load(part)
    return total, state


def _state(content: Any, path: Path) -> RankContent:
    state: RankContent = RANK.read(content, str(path), ForeignFolderError)
    return state


def _refuse_repeat(seen: set[bytes], text: CorpusText) -> None:
    key = hashlib.blake2b(files.canonical_json([text.group, text.item]).encode(), digest_size=12).digest()
    if key in seen:
        raise ValueError(
            f"item {text.item!r} of group {text.group!r} comes twice in the corpus: give every text of a group an item "
            "of its own, or keep no sequences"
        )
    seen.add(key)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02d} s"
    )
