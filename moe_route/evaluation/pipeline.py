"""Run a study: record, find experts, sweep settings, evaluate conditions, analyze and report, resuming what was begun.

Every stage is a step of a job (`runs.job`): it writes into a folder of its own and is left alone once it is done.
Results hold neither times nor anything drawn without a seed, so a run that was killed and resumed writes the same bytes
as one that was not.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moe_route.analysis import multilingual_experts, task_experts
from moe_route.base import files
from moe_route.base.identity import identity_of, library_versions, tokenizer_hash, weights_hash
from moe_route.base.schema import load_json, parse_json, read_text
from moe_route.data import Corpus
from moe_route.data.batches import texts_of
from moe_route.evaluation.conditions import (
    AGAIN,
    ALONE,
    BASE,
    NULL,
    Conditions,
    FoundExperts,
    Setting,
    Steering,
    conditions,
    published_setting,
    sweep_settings,
)
from moe_route.evaluation.measure import AskedTask, ask, scorers_of
from moe_route.evaluation.report import effect_tables, markdown
from moe_route.evaluation.results import results_of
from moe_route.evaluation.study import Study
from moe_route.evaluation.tasks import corpus_fingerprint, kind_of, read_source, read_task, task_fingerprint
from moe_route.recording import RoutingStatistics
from moe_route.routed import RoutedModel
from moe_route.runs.corpus import RESULT, CorpusRecording, KeptTexts
from moe_route.runs.job import Job, Step, write_json
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.lines import Key, ResultLines
from moe_route.steering import ExpertSelection, Plan, Reach

STAGES = ("record", "find", "sweep", "evaluate", "analyze", "report")
_CHEAP = ("find", "analyze", "report")  # they run no model: with other inputs they are made again without asking
_RECORDING = 2  # raised when the same inputs give other files of the stage `record`
_GENERATED = 2  # raised when the same inputs give other lines of generated answers


class NullPlanError(ValueError):
    """Raised if a plan that steers no token changes the answers; the message says how many, and what to do."""


class _Stopped(Exception):  # noqa: N818  (ends the run and is no error)
    """The run was asked to end."""


@dataclass(frozen=True)
class Evaluation:
    """What a run did.

    Attributes:
        out: folder of the results.
        stages: name of each stage that was reached -> "made", "kept" (done before) or "interrupted".
        results: content of `report/report.json`; None if the run was interrupted.
    """

    out: Path
    stages: Mapping[str, str]
    results: Mapping[str, Any] | None

    @property
    def interrupted(self) -> bool:
        """Whether the run ended before its end because `stop` asked for it."""
        return self.results is None

    @property
    def report(self) -> str:
        """The report in Markdown; "" if the run was interrupted."""
        return "" if self.interrupted else (self.out / "report" / "report.md").read_text(encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {"out": str(self.out), "interrupted": self.interrupted, "stages": self.stages, "results": self.results}


def evaluate(
    study: Study,
    out: str | Path,
    *,
    data: str | Path = ".",
    force: bool = False,
    language_model: LanguageModel | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> Evaluation:
    """Run a study, or what is left of it, with its results in the folder `out`.

    Args:
        study: what to run.
        out: folder of the results, created if missing (its parent must be there).
        data: folder that relative paths of the study begin in.
        force: remove earlier results first.
        language_model: the loaded model of the study; loaded by its name if left out.
        stop: called before each batch; if it returns True, the run ends there. The next one goes on from that batch.
        progress: show bars on standard error.

    Raises `StudyError` for a study that does not fit the model or the data, `ForeignFolderError` for a folder with
    results of other inputs, `NullPlanError`, and the errors of loading and attaching.
    """
    study.model.check_pinned()
    out = Path(out)
    with Job(out, "eval", {}, force=force) as job:
        write_json(out / "study.json", study.to_dict())
        run = _Run(study, job, Path(data), language_model, stop, progress)
        try:
            run.all()
        except _Stopped:
            return Evaluation(out, run.stages, None)
        if not job.done:
            job.finish()
        content = load_json(out / "report" / "report.json")
        return Evaluation(out, run.stages, content)


class _Run:
    """One run of a study."""

    def __init__(
        self,
        study: Study,
        job: Job,
        data: Path,
        language_model: LanguageModel | None,
        stop: Callable[[], bool],
        progress: bool,
    ) -> None:
        self.study, self.job, self.stop, self.progress = study, job, stop, progress
        self.stages: dict[str, str] = {}
        corpora = study.corpora
        # data are read before the model is loaded, because that takes long and files may be missing
        self.general = read_source("general", corpora.general, data, corpora.reference)
        self.task: Corpus | None = None
        if corpora.task is not None:
            self.task = read_source("task", corpora.task, data, corpora.reference).subset([corpora.reference])
        questions = {name: read_task(name, source, data) for name, source in study.tasks.items()}
        settings = study.model
        self.language_model = language_model or LanguageModel.load(
            settings.id,
            dtype=settings.dtype,
            device=settings.device,
            revision=settings.revision or None,
            dequantize=settings.dequantize,
        )
        self.asking = replace(self.language_model, add_special_tokens=study.chat.add_special_tokens)
        self.tasks = [
            AskedTask.prepare(name, kind_of(source, asked), asked, source, study.chat, self.asking)
            for name, source in study.tasks.items()
            for asked in [questions[name].questions]
        ]
        self.model = self.model_key()

    def all(self) -> None:
        """Run every stage that is not done."""
        routed = self.language_model.attach(self.study.model.engine)
        try:
            recorded = self.record(routed)
            steering, compared = None, ALONE
            if self.study.steer is None:
                after_evaluate = self.evaluate(routed, compared, recorded)
            else:
                selected, published, after_find = self.find(recorded, routed)
                chosen, points, after_sweep = self.sweep(routed, selected, published, after_find)
                steering = Steering(selected, published, chosen, points)
                experts = [router.num_experts for router in routed.routers]
                compared = conditions(
                    chosen, published, selected, self.study.controls, experts, self.study.seeds.random
                )
                after_evaluate = self.evaluate(routed, compared, after_sweep)
        finally:
            routed.detach()
        content, after_analyze = self.analyze(steering, compared, after_evaluate)
        self.report(content, after_analyze)

    def model_key(self) -> dict[str, Any]:
        """What the model's outputs depend on. Its name is left out: a folder may be moved."""
        model, identity = self.language_model.model, identity_of(self.language_model.model)
        return {
            "class": identity["class"],
            "config_hash": identity["config_hash"],
            "weights": weights_hash(model),
            "tokenizer": tokenizer_hash(self.language_model.tokenizer),
            "revision": self.study.model.revision,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "engine": self.study.model.engine,
            "attention": getattr(model.config, "_attn_implementation", None),
            "experts": getattr(model.config, "_experts_implementation", None),
            "versions": library_versions(),
        }

    def stage(self, name: str, inputs: Mapping[str, Any]) -> Step:
        stage = self.job.step(name, inputs, cheap=name in _CHEAP)
        self.stages[name] = "kept" if stage.done else "interrupted"
        return stage

    def finish(self, stage: Step) -> None:
        stage.finish()
        self.stages[stage.name] = "made"

    def check_stop(self) -> None:
        if self.stop():
            raise _Stopped

    def key_of(self, task: AskedTask) -> dict[str, Any]:
        """What the answers to a task depend on beside model and plan."""
        source = task.source
        key: dict[str, Any] = {
            "kind": task.kind,
            "questions": task_fingerprint(task.questions),
            "batch_size": source.batch_size,
            "add_special_tokens": task.chat.add_special_tokens,
        }
        if task.kind == "generate":
            # tokens that end a text, penalties of repetition: what greedy search takes from the checkpoint
            settings = self.language_model.model.generation_config.to_dict()
            key |= {"max_new_tokens": source.max_new_tokens, "until": list(source.until), "channel": task.chat.channel}
            key["generation"] = {name: value for name, value in settings.items() if name != "transformers_version"}
            key["lines"] = _GENERATED
        return key

    # ---- record

    def record(self, routed: RoutedModel) -> Step:
        corpora = self.study.corpora
        stage = self.stage(
            "record",
            {
                "recording": _RECORDING,
                "model": self.model,
                "general": corpus_fingerprint(self.general),
                "task": None if self.task is None else corpus_fingerprint(self.task),
                "add_special_tokens": corpora.add_special_tokens,
                "max_length": corpora.max_length,
                "batch_size": corpora.batch_size,
            },
        )
        for name, corpus in {"general": self.general, "task": self.task}.items():
            if not stage.done and corpus is not None:
                self.record_corpus(stage.folder, name, corpus, routed)
        if not stage.done:
            self.finish(stage)
        return stage

    def record_corpus(self, folder: Path, name: str, corpus: Corpus, routed: RoutedModel) -> None:
        """Record the texts, the longest first, with a checkpoint after every window."""
        target, begun = folder / f"{name}.safetensors", folder / f"{name}.begun"
        corpora = self.study.corpora
        language_model = replace(self.language_model, add_special_tokens=corpora.add_special_tokens)
        limit = getattr(language_model.model.config, "max_position_embeddings", None) or corpora.max_length
        if not target.is_file():
            recording = CorpusRecording(
                begun,
                KeptTexts.by_length(name, texts_of(corpus), language_model.tokenizer, corpora.add_special_tokens),
                batch_size=corpora.batch_size,
                max_length=min(corpora.max_length, limit),
                checkpoint_seconds=0.0,  # the files are then the same whenever the run was killed
                record={"groups": list(corpus.languages), "sequences": True},
            )
            size = len(corpus) * len(corpus.languages)
            with tqdm(total=size, desc=name, disable=not self.progress, leave=False) as bar:
                done = recording.run(
                    language_model, routed, stop=self.stop, report=lambda now: bar.update(now.texts - bar.n)
                )
            if not done.finished:
                raise _Stopped
            (begun / RESULT).replace(target)
        if begun.is_dir():
            shutil.rmtree(begun)

    # ---- find

    def find(self, recorded: Step, routed: RoutedModel) -> tuple[FoundExperts, Setting, Step]:
        study, reference = self.study, self.study.corpora.reference
        settings = study.finding
        taus = sorted({*settings.taus, *study.sweep.tau}, reverse=True)
        given = study.to_dict()
        inputs = {"record": recorded.results_hash, "find": given["find"], "taus": taus, "reference": reference}
        stage = self.stage("find", inputs)
        path = stage.folder / "experts.json"
        if not stage.done:
            general = RoutingStatistics.load(recorded.folder / "general.safetensors")
            task = RoutingStatistics.load(recorded.folder / "task.safetensors")
            how: dict[str, Any] = {"top": settings.top, "by": settings.by}
            several = len(general.groups) > 1
            entries = [
                {
                    "tau": tau,
                    "task": task_experts(task, general, threshold=tau, group=reference, **how).to_dict(),
                    "multilingual": (
                        multilingual_experts(general, reference, threshold=tau, **how).to_dict() if several else None
                    ),
                }
                for tau in taus
            ]
            write_json(path, entries)
            self.finish(stage)
        entries = load_json(path)
        none = ExpertSelection({})
        selected = FoundExperts(
            {entry["tau"]: ExpertSelection.from_dict(entry["task"]) for entry in entries},
            {
                entry["tau"]: none
                if entry["multilingual"] is None
                else ExpertSelection.from_dict(entry["multilingual"])
                for entry in entries
            },
        )
        return selected, published_setting(study, selected, len(routed.routers)), stage

    # ---- sweep

    def sweep(
        self, routed: RoutedModel, selected: FoundExperts, published: Setting, after: Step
    ) -> tuple[Setting, list[dict[str, Any]], Step]:
        """Try every setting of the sweep on the even items, and choose the one with the highest accuracy."""
        points = sweep_settings(self.study, published, selected, len(routed.routers))
        name = self.study.sweep.task or self.tasks[0].name
        (whole,) = (task for task in self.tasks if task.name == name)
        task = whole.only(whole.items[0::2], self.asking)
        plans: dict[str, Plan | None] = {name: point.plan(selected.task[point.tau]) for name, point in points.items()}
        stage = self.stage(
            "sweep",
            {
                "find": after.results_hash,
                "model": self.model,
                "task": self.key_of(task) if points else None,
                "points": {name: plan.hash for name, plan in plans.items() if plan is not None},
            },
        )
        path = stage.folder / "points.json"
        if not stage.done:
            scorer, entries = scorers_of(task.kind)[-1], []
            for point, plan in ({BASE: None, **plans} if points else {}).items():
                lines = self.run_condition(stage, point, plan, [task], routed)
                right = [record["correct"][scorer] for record in lines.records()]
                setting = None if plan is None else points[point].to_dict()
                experts = None if plan is None else len(selected.task[points[point].tau].restrict(points[point].range))
                entries.append(
                    {"name": point, "setting": setting, "experts": experts, "accuracy": sum(right) / len(right)}
                )
            write_json(path, {"task": name, "scorer": scorer, "items": len(whole.items[0::2]), "points": entries})
            self.finish(stage)
        listed = load_json(path)["points"]
        steered = [entry for entry in listed if entry["setting"] is not None]
        # of equals the first, which is the study's own setting
        best = max(steered, key=lambda entry: entry["accuracy"], default=None)
        return published if best is None else points[best["name"]], listed, stage

    # ---- evaluate

    def evaluate(self, routed: RoutedModel, compared: Conditions, after: Step) -> Step:
        stage = self.stage(
            "evaluate",
            {
                after.name: after.results_hash,
                "model": self.model,
                "tasks": {task.name: self.key_of(task) for task in self.tasks},
                "conditions": {name: None if plan is None else plan.hash for name, plan in compared.plans.items()},
            },
        )
        if not stage.done:
            (stage.folder / "plans").mkdir(exist_ok=True)
            for name, plan in compared.plans.items():
                if plan is not None:
                    plan.save(stage.folder / "plans" / f"{file_name(name)}.json")
                self.run_condition(stage, name, plan, self.tasks, routed)
                if name == NULL:
                    _check_null(stage.folder)
            listed = {
                "conditions": {name: file_name(name) for name in compared.plans},
                "left_out": dict(compared.left_out),
            }
            write_json(stage.folder / "conditions.json", listed)
            self.finish(stage)
        return stage

    def run_condition(
        self, stage: Step, name: str, plan: Plan | None, tasks: Sequence[AskedTask], routed: RoutedModel
    ) -> ResultLines:
        """Ask every question that has no line yet, batch by batch."""
        batches = [(task, batch) for task in tasks for batch in task.batches]
        keys: list[list[Key]] = [[(task.name, q.language, q.item) for q in batch] for task, batch in batches]
        header = {"condition": name, "plan": None if plan is None else plan.hash, "stage": stage.hash}
        lines = ResultLines(stage.folder / f"{file_name(name)}.jsonl", header, keys)
        if lines.complete:
            return lines
        bar = tqdm(total=len(batches), initial=lines.done, desc=name, disable=not self.progress, leave=False)
        steered = Plan() if plan is None else plan
        if name != NULL:
            steered.check_groups(question.language for _, batch in batches for question in batch)
        reach = Reach(steered.rules)
        reach.partial = lines.done > 0
        with bar, routed.steer(steered, reach=reach):
            for task, batch in batches[lines.done :]:
                self.check_stop()
                lines.append(ask(self.asking, task, batch))
                bar.update()
        reach.warn()
        return lines

    # ---- analyze and report

    def analyze(self, steering: Steering | None, compared: Conditions, after: Step) -> tuple[dict[str, Any], Step]:
        inputs = {"evaluate": after.results_hash, "bootstrap": self.study.seeds.bootstrap}
        stage = self.stage("analyze", inputs)
        path = stage.folder / "results.json"
        if not stage.done:
            general = RoutingStatistics.load(self.job.folder / "record" / "general.safetensors")
            lines = {name: _records(after.folder, name) for name in compared.plans}
            content = results_of(self.study, self.tasks, lines, compared, steering, general)
            write_json(path, content)
            self.finish(stage)
        return load_json(path), stage

    def report(self, results: Mapping[str, Any], after: Step) -> None:
        study = self.study.to_dict()
        stage = self.stage("report", {"analyze": after.results_hash, "study": study})
        if not stage.done:
            model = {"id": self.study.model.id, **self.model}
            content = {"title": self.study.title, "model": model, "study": study, "results": results}
            write_json(stage.folder / "report.json", content)
            write_json(stage.folder / "tables.json", effect_tables(content))
            files.write_text(stage.folder / "report.md", markdown(content))
            self.finish(stage)


def file_name(condition: str) -> str:
    """The name of the files of a condition or a point, without suffix."""
    return re.sub(r"[^a-z0-9.]+", "-", condition.lower()).strip("-")


def _records(folder: Path, condition: str) -> list[dict[str, Any]]:
    path = folder / f"{file_name(condition)}.jsonl"
    _, *lines = read_text(path).removesuffix("\n").split("\n")
    return [parse_json(line, str(path)) for line in lines]


def _check_null(folder: Path) -> None:
    """Refuse to go on if the null plan gives other lines than the model alone, and the model alone repeats itself."""
    base, again, null = (_records(folder, name) for name in (BASE, AGAIN, NULL))
    changed = sum(one != other for one, other in zip(base, null, strict=True))
    if changed and base == again:
        raise NullPlanError(
            f"a plan that steers no token changed {changed} of {len(base)} answers, so effects of plans cannot be told "
            'from effects of attaching: try model.engine = "hook", run `moe-route doctor`, and report this'
        )
