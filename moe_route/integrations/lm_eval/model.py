"""`MoeRouteLM`: lm-eval's model for Hugging Face checkpoints, with a plan that steers it and a record of its routing.

What differs from ``hf``: padding is masked, so it is neither steered nor counted; batches have the same content in
every run (from long to short, then by task, document and request); a sequence that has reached its stop string has
ended, also while others of its batch go on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import MultiTokenEOSCriteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor, nn
from tqdm import tqdm
from transformers import StoppingCriteriaList

from moe_route.base import files
from moe_route.base.devices import accelerator
from moe_route.base.identity import library_versions, tokenizer_hash
from moe_route.data import demo_model_folder
from moe_route.experts.interface import experts_implementations
from moe_route.recording import Recorder, RecordingError, RoutingStatistics
from moe_route.runs.language_model import DEMO_MODEL, LanguageModel
from moe_route.steering import Plan, Reach

# ---- what an answer of a model depends on beside the request, for the name of lm-eval's cache of answers.
#
# lm-eval keys its cache by type and arguments of a request alone, so one file would serve the answers of one model or
# plan to another (EleutherAI/lm-evaluation-harness, issue 4063).


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and values of all weights; reads one tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(files.content_hash({name: tensor}, None).encode())
    return digest.hexdigest()


def key_of(content: Any) -> str:
    """SHA-256 (hex) of JSON-able content; anything else counts as its text."""
    return hashlib.sha256(files.canonical_json(_plain(content)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, bool, int)) else repr(value)


# ---- requests of lm-eval as rows of batches: which group and item a row counts for, and in which order rows run.

Grouping = Literal["task", "language"]
GROUPS: tuple[Grouping, ...] = ("task", "language")

_FLORES = re.compile(r"(?<![A-Za-z])[a-z]{3}_[A-Z][a-z]{3}(?![A-Za-z])")
_ISO_639_1 = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo "
    "es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka "
    "kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng "
    "nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su "
    "sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)


def language_of(task: str, document: Any) -> str:
    """The language of a request: field ``language`` of its document, or the code in the name of its task.

    A FLORES code counts anywhere in the name, a code of two letters at its end. Raises ``ValueError`` for a task
    without either.
    """
    said = document.get("language") if isinstance(document, Mapping) else None
    if isinstance(said, str) and said:
        return said
    codes = _FLORES.findall(task)
    last = task.rpartition("_")[2]
    if codes:
        return str(codes[-1])
    if last in _ISO_639_1.split():
        return last
    raise ValueError(
        f"the language of task {task!r} is unknown: its name has no language code at the end and its documents have no "
        "field language; use groups=task"
    )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request comes from.

    Attributes:
        group: the group that it counts for.
        task: name of its task.
        document: index of its document in the task.
        index: index of the request among those of its document.
        item: key of the document. Documents with a field ``item`` have the same key in every language of a task.
    """

    group: str
    task: str
    document: int
    index: int
    item: str

    @classmethod
    def of(cls, request: Any, by: Grouping) -> Place:
        """The place of an ``Instance`` of lm-eval. Raises ``ValueError`` if its language is asked for and unknown."""
        task, document = str(request.task_name), int(request.doc_id or 0)
        group = task if by == "task" else language_of(task, request.doc)
        key = request.doc.get("item") if isinstance(request.doc, Mapping) else None
        item = f"{task}/{document}" if key is None else f"{_without_language(task, request.doc)}/{key}"
        return cls(group, task, document, int(request.idx or 0), item)


def _without_language(task: str, document: Mapping[str, Any]) -> str:
    try:
        return task.replace(language_of(task, document), "").strip("_").replace("__", "_")
    except ValueError:
        return task


@dataclass(frozen=True, slots=True)
class Row:
    """One input of the model, which answers one or more requests.

    Attributes:
        place: of the first request.
        ids: the input tokens: context and continuation, without the last token.
        context: number of input tokens that belong to the context of the first request.
        requests: indices of the requests, and the continuation of each.
    """

    place: Place
    ids: tuple[int, ...]
    context: int
    requests: tuple[tuple[int, tuple[int, ...]], ...]


def rows_of(
    requests: Sequence[tuple[Place, Sequence[int], Sequence[int]]], max_length: int, *, shared: bool = True
) -> list[Row]:
    """The rows that answer `requests` (place, context, continuation), from long to short, then by place.

    The order depends on nothing else, so batches are the same in every run. Contexts are cut on the left, so that a row
    has at most `max_length` tokens. If `shared`, requests of one document with the same input share a row, as the
    choices A to D after one question do.
    """
    rows: dict[Any, Row] = {}
    for number, (place, context, continuation) in enumerate(requests):
        whole = tuple([*context, *continuation][-(max_length + 1) :])
        if not continuation or len(continuation) > max_length or len(whole) < 2:
            raise ValueError(
                f"a request of task {place.task} has {len(context)} tokens of context and {len(continuation)} to "
                f"score, and the model reads 1 to {max_length}: leave the document out"
            )
        ids = whole[:-1]
        key: Any = (place.task, place.document, ids) if shared else number
        answer = (number, tuple(continuation))
        row = rows.get(key)
        if row is None:
            rows[key] = Row(place, ids, len(whole) - len(continuation), (answer,))
        else:
            rows[key] = Row(row.place, ids, row.context, (*row.requests, answer))
    return sorted(rows.values(), key=lambda row: (-len(row.ids), row.place.task, row.place.document, row.place.index))


class RowNames:
    """Names of rows for a recording: an item names one sequence of a group, so repetitions get a number."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[str, str]] = Counter()

    def name(self, place: Place) -> str:
        """The item of the next row of this place."""
        key = (place.group, place.item)
        self._seen[key] += 1
        return place.item if self._seen[key] == 1 else f"{place.item}/{self._seen[key]}"


CONTINUATION = " (continuation)"  # appended to the group of continuation tokens, if they are counted apart


class MoeRouteLM(HFLM):
    """A causal language model for lm-eval whose routing is recorded and steered."""

    def __init__(
        self,
        pretrained: Any = DEMO_MODEL,
        *,
        plan: str | os.PathLike[str] | Plan | None = None,
        record: str | os.PathLike[str] | None = None,
        groups: Grouping = "task",
        sequences: bool = True,
        parts: bool = False,
        engine: Any = "hook",
        device: str | None = None,
        batch_size: int | str | None = 1,
        **options: Any,
    ) -> None:
        """Load a model and attach to it.

        Args:
            pretrained: name or folder of a checkpoint, "demo" for the shipped model, or a loaded model.
            plan: a plan, or the file of one, that steers every request.
            record: file for the statistics of the routing. It is written when lm-eval has its results; see `finish`.
            groups: what a group of the recording, and of a plan, is: the "task" of a request, or its "language".
            sequences: also keep the averages of every sequence.
            parts: count the tokens of a continuation apart, in groups named "... (continuation)". Generated tokens are
                apart without it: their phase is decode.
            engine: "hook" or "fused", see `moe_route.attach`.
            device: by default the first GPU, if there is one.
            batch_size: rows a batch. "auto" is refused while recording, because its trials would be counted.
            options: those of lm-eval's ``hf``.

        Raises ``ValueError`` for options that exclude each other, ``OSError`` for a file that cannot be written, and
        the errors of `moe_route.attach`, `Plan.load` and `RoutedModel.steer`.
        """
        if groups not in GROUPS:
            raise ValueError(f"groups={groups!r} is unknown: choose {' or '.join(GROUPS)}")
        if record is not None:
            if str(batch_size).startswith("auto"):
                raise ValueError("batch_size=auto runs trials that would be counted: give a number while recording")
            files.check_writable(record)
        shipped = isinstance(pretrained, str) and pretrained == DEMO_MODEL
        if shipped:
            pretrained = str(demo_model_folder())
            options.setdefault("dtype", "float32")  # as LanguageModel.load computes
        device = device or accelerator() or "cpu"
        try:
            super().__init__(pretrained, device=device, batch_size=batch_size, **options)
        except TypeError as error:  # transformers hands what it does not know to the model
            if "unexpected keyword argument" in str(error):
                raise ValueError(f"an argument of the model is unknown: {error}; leave it out") from error
            raise
        if self.backend != "causal":
            raise ValueError("only causal language models are supported: use lm-eval's own model hf")
        if record is not None and self.world_size > 1:
            raise ValueError(
                "a recording is of one process: lm-eval repeats requests to fill the batches of several, and they "
                "would be counted; start it without accelerate launch"
            )
        if shipped:
            self.model.config._name_or_path = DEMO_MODEL
        self._grouping: Grouping = groups
        self._sequences, self._parts, self._engine = sequences, parts, engine
        self._plan = plan if plan is None or isinstance(plan, Plan) else Plan.load(plan)
        self._record = None if record is None else Path(record)
        self._recorder: Recorder | None = None
        self._finished = False
        self._groups: dict[str, None] = {}  # in the order of the tasks
        self._names = RowNames()
        self._places: list[Place] = []  # of the requests that run now
        self._seed = torch.initial_seed()
        if parts and self._plan is not None and any(rule.groups for rule in self._plan.rules):
            raise ValueError("parts=True renames groups that the plan steers by: leave it out")
        self.routed = LanguageModel(str(self.model.config._name_or_path), self.model, self.tokenizer).attach(engine)
        self._reach = Reach(() if self._plan is None else self._plan.rules)
        if self._plan is not None:
            with self.routed.steer(self._plan):
                pass  # refuses a plan that does not fit, before the requests are built

    # ---- made by lm-eval

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> Any:
        """Make a model from the arguments of a command line; ``cache`` is a folder for answers (see `cache_path`)."""
        given = dict(arg_dict) | {k: v for k, v in (additional_config or {}).items() if v is not None}
        folder = given.pop("cache", None)
        model = cls(**given)
        return model if folder is None else CachingLM(model, f"{model.cache_path(folder)}_rank{model.rank}.db")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """As `create_from_arg_obj`, from "key=value,key=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- the cache of answers

    @property
    def cache_key(self) -> str:
        """SHA-256 (hex) over everything but the request that an answer depends on; reads all weights.

        Prompts (with the chat template applied) and generation arguments are part of a request, by which lm-eval tells
        answers apart.
        """
        config = self.model.config
        return key_of(
            {
                "revision": self.revision,
                "weights": weights_fingerprint(self.model),
                "config": {k: v for k, v in config.to_dict().items() if not k.startswith("_")},
                "generation": self.model.generation_config.to_dict() if self.model.can_generate() else None,
                "dtype": [self.model.dtype, self.softmax_dtype, self.mixed_precision_dtype],
                "attention": getattr(config, "_attn_implementation", None),
                "experts": [experts_implementations(router.block) for router in self.routed.routers],
                "engine": self._engine,
                "device": self.device.type,
                "versions": {**library_versions(), "lm_eval": importlib.metadata.version("lm_eval")},
                "plan": None if self._plan is None else self._plan.hash,
                "groups": self._grouping,
                "tokenizer": tokenizer_hash(self.tokenizer),
                "chat_template": [getattr(self.tokenizer, "chat_template", None), self.chat_template_args],
                "reading": [self.add_bos_token, self.custom_prefix_token_id, self.max_length, self.truncation],
                "thinking": [self.enable_thinking, self.think_end_token],
                "batch_size": self.batch_size,
                "seed": self._seed,
            }
        )

    def cache_path(self, folder: str | os.PathLike[str]) -> str:
        """A path in `folder` for ``simple_evaluate(use_cache=...)``, of which every other model or plan has another."""
        return str(Path(folder) / f"{self.cache_key}")

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Accept a cache of answers, if its name holds `cache_key`.

        Raises ``ValueError`` for any other file, and while recording.
        """
        if cache_hook.dbdict is not None:
            used = Path(cache_hook.dbdict.filename)
            if self._record is not None:
                cache_hook.dbdict.close()
                raise ValueError("answers from a cache are not routed and cannot be recorded: leave the cache out")
            if self.cache_key not in used.name:
                cache_hook.dbdict.close()
                raise ValueError(
                    f"the cache {used} would serve answers of other models and plans: leave out use_cache, and give "
                    "cache=FOLDER among the model's arguments, or in Python use_cache=model.cache_path(FOLDER)"
                )
        super().set_cache_hook(cache_hook)

    # ---- requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score the continuation of each request: log-probability in nats, and whether greedy search gives it."""
        with self._running(requests):
            scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of the model's context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            reach = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for window in map(make_disjoint_window, reach):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        with self._running([requests[number] for number in owners]):
            for number, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
                totals[number] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue the context of each request up to one of its stop strings."""
        answers = [""] * len(requests)
        with self._running(requests), self._fixed_batch_size(), self._bar(len(requests), disable_tqdm) as bar:
            for chunk in self._generation_batches(requests):
                with self._labels([self._places[number] for number in chunk]):
                    texts = super().generate_until([requests[number] for number in chunk], disable_tqdm=True)
                for number, text in zip(chunk, texts, strict=True):
                    answers[number] = text
                bar.update(len(chunk))
        return answers

    def _generation_batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Indices of requests that run together: with the same arguments, from long to short.

        The superclass sorts each batch by length and text again, and keeps the order of equal ones.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        keys = [
            (-len(self.tok_encode(request.args[0])), request.args[0], place.task, place.document, place.index)
            for request, place in zip(requests, self._places, strict=True)
        ]
        for numbers in alike.values():
            numbers.sort(key=keys.__getitem__)
            for first in range(0, len(numbers), self.batch_size):
                yield numbers[first : first + self.batch_size]

    @contextmanager
    def _running(self, requests: Sequence[Instance]) -> Iterator[None]:
        """Steer and record while requests run."""
        self._places = [Place.of(request, self._grouping) for request in requests]
        self._groups |= dict.fromkeys(place.group for place in self._places)
        with ExitStack() as stack:
            if self._plan is not None:
                stack.enter_context(self.routed.steer(self._plan, reach=self._reach))
            if self._record is not None:
                stack.enter_context(self._recording())
            yield

    def _recording(self) -> Recorder:
        if self._finished:
            raise RecordingError(
                f"the recording of this model was written to {self._record}: make another model for another evaluation"
            )
        if self._recorder is None:
            self._recorder = self.routed.record(sequences=self._sequences)
        return self._recorder

    def _labels(self, places: Sequence[Place], groups: Any = None) -> Any:
        """The labels of the rows of a batch, for the recording and for a plan that steers by group or item."""
        if self._record is None and self._plan is None:
            return nullcontext()
        items = [self._names.name(place) for place in places]
        return self.routed.labels(groups=groups or [place.group for place in places], items=items)

    @contextmanager
    def _fixed_batch_size(self) -> Iterator[None]:
        """A number in place of batch_size=auto, found by trials as the superclass finds it."""
        asked: Any = self.batch_size
        if asked != "auto":
            yield
            return
        self.batch_size_per_gpu = self.batch_sizes[0] = self._detect_batch_size()
        try:
            yield
        finally:
            self.batch_size_per_gpu = asked

    def _bar(self, total: int, disable: bool) -> Any:
        return tqdm(total=total, disable=disable or self.rank != 0, desc="Running requests")

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        given = [
            (place, context, continuation)
            for place, (_, context, continuation) in zip(self._places, requests, strict=True)
        ]
        rows = rows_of(given, self.max_length, shared=self.logits_cache)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._fixed_batch_size(), self._bar(len(requests), disable_tqdm) as bar:
            for first in range(0, len(rows), self.batch_size):
                batch = rows[first : first + self.batch_size]
                for row, logits in zip(batch, self._logits(batch), strict=True):
                    for number, continuation in row.requests:
                        answers[number] = self._score(logits[: len(row.ids)], continuation)
                        if requests[number][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                    bar.update(len(row.requests))
        return answers

    def _logits(self, batch: Sequence[Row]) -> Tensor:
        """Logits [B, S, V] of rows that are padded on the right."""
        longest = len(batch[0].ids)
        ids = torch.full((len(batch), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(batch):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
        groups = None
        if self._parts:  # the columns of the padding get some known group, and do not count
            parts = [(row.place.group, row.place.group + CONTINUATION, row.context) for row in batch]
            groups = [[context] * n + [continued] * (longest - n) for context, continued, n in parts]
        with self._labels([row.place for row in batch], groups):
            return self._model_call(ids.to(self.device), attn_mask=mask.to(self.device))

    def _score(self, logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of a continuation in nats, and whether it is the greedy one, from logits [S, V] of a row."""
        wanted = torch.tensor(continuation, device=logits.device)
        scores = torch.log_softmax(logits[-len(continuation) :], dim=-1, dtype=self.softmax_dtype)
        nats = scores.gather(1, wanted[:, None]).sum()
        return float(nats), bool((scores.argmax(-1) == wanted).all())

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [B, S, V]; without a mask, no token is padding."""
        with torch.no_grad(), self._autocast():
            logits: Tensor = self.model(input_ids=inps, attention_mask=attn_mask, use_cache=False).logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        given = dict(generation_kwargs)
        temperature = given.setdefault("temperature", 0.0)
        if temperature == 0.0 and not given.get("do_sample"):  # as the superclass reads them
            given["do_sample"] = False
            del given["temperature"]
        stops = [_RowStop(text, self.tokenizer, context.shape[1], context.shape[0]) for text in stop]
        with self._autocast():
            ids: Tensor = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList(stops),
                pad_token_id=self.tokenizer.pad_token_id,
                use_cache=True,
                **given,
            )
        return ids

    def _autocast(self) -> Any:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    # ---- results

    def finish(self) -> RoutingStatistics | None:
        """Write the recording of a finished evaluation, once; returns the statistics, or None without a recording.

        Warns of the rules of the plan that reached no token.
        ``simple_evaluate`` and the command line do this by `get_model_info`. Call it yourself after ``evaluate``.
        """
        self._reach.warn()
        self._reach = Reach(())  # said once
        if self._record is None or self._recorder is None or self._finished:
            return None
        self._recorder.add_metadata({"evaluation": [{"groups_are": self._grouping, "parts": self._parts}]})
        statistics = self._recorder.statistics()
        names = [name for group in self._groups for name in (group, group + CONTINUATION)]
        ordered = statistics.select(groups=[name for name in names if name in statistics.groups])
        ordered.save(self._record)
        self._finished = True
        return ordered

    def get_model_info(self) -> dict[str, Any]:
        """Facts for the results of lm-eval, which asks for them when an evaluation is over: the recording is written.

        They have ``moe_route``: version, engine, hash of the plan, and what was recorded where.
        """
        local = isinstance(self.pretrained, str) and Path(self.pretrained).is_dir()
        info = (
            {  # the superclass would ask the hub for a model of this name
                "model_num_parameters": self.model.num_parameters(),
                "model_dtype": self.model.dtype,
                "model_revision": self.revision,
                "model_sha": "",
            }
            if local
            else super().get_model_info()
        )
        statistics = self.finish()
        facts: dict[str, Any] = {
            "version": library_versions()["moe-route"],
            "engine": self._engine,
            "plan": None if self._plan is None else self._plan.hash,
            "groups_are": self._grouping,
            "recorded": None,
        }
        if statistics is not None:
            facts["recorded"] = {
                "file": str(self._record),
                "layers": len(statistics.layers),
                "tokens": dict(zip(statistics.groups, statistics.tokens().max(axis=1).tolist(), strict=True)),
            }
        return {**info, "moe_route": facts}


class _RowStop(MultiTokenEOSCriteria):
    """Ends each sequence at the stop string by itself, where the superclass waits for all of the batch."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        super().__call__(input_ids, scores, **kwargs)
        return torch.tensor(self.done_tracker, device=input_ids.device)
