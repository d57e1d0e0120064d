"""True evaluations by lm-eval of the shipped model, base and steered: their numbers, recordings and caches."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_route.cli import main
from moe_route.data import demo_problems
from moe_route.recording import RecordingError, RoutingStatistics
from moe_route.runs.language_model import Answers, LanguageModel
from moe_route.steering import Plan

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moe_route.integrations import lm_eval as integration  # noqa: E402
from moe_route.integrations.lm_eval.model import Place, language_of, rows_of  # noqa: E402

LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan")
LIMIT = 7
TASKS = [f"moe_route_problems_{language}" for language in LANGUAGES]


@pytest.fixture(scope="module")
def tasks() -> TaskManager:
    integration.register()
    return TaskManager(include_path=str(integration.TASKS), include_defaults=False)


@pytest.fixture(scope="module", autouse=True)
def no_network():
    """Nothing of this module may ask another machine."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "create_connection", refuse)
        yield


@pytest.fixture(scope="module")
def evaluate(tasks: TaskManager) -> Callable[..., Any]:
    def run(model_args: Mapping[str, Any] | None = None, **options: Any) -> Any:
        given = {"tasks": TASKS, "limit": LIMIT, "batch_size": 4, "bootstrap_iters": 0, "task_manager": tasks}
        return lm_eval.simple_evaluate(model="moe-route", model_args=dict(model_args or {}), **{**given, **options})

    return run


@pytest.fixture(scope="module")
def base(evaluate: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base evaluation: its results and its recording."""
    file = tmp_path_factory.mktemp("base") / "base.safetensors"
    results = evaluate({"pretrained": "demo", "record": str(file), "groups": "language"})
    return SimpleNamespace(results=results, file=file, statistics=RoutingStatistics.load(file))


@pytest.fixture(scope="module")
def busiest(base: Any) -> dict[int, list[int]]:
    """The two experts of every layer that the problems choose most."""
    counts = base.statistics.token_sum("counts").sum(0)
    return {layer: np.argsort(-row)[:2].tolist() for layer, row in enumerate(counts)}


@pytest.fixture(scope="module")
def plan(busiest: dict[int, list[int]]) -> Plan:
    return Plan.forbid(busiest)


@pytest.fixture(scope="module")
def steered(evaluate: Callable[..., Any], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("steered")
    plan.save(folder / "plan.safetensors")
    given = {"plan": str(folder / "plan.safetensors"), "record": str(folder / "steered.safetensors")}
    results = evaluate({**given, "groups": "language"})
    statistics = RoutingStatistics.load(folder / "steered.safetensors")
    return SimpleNamespace(results=results, plan_file=folder / "plan.safetensors", statistics=statistics)


def answers(plan: Plan | None = None) -> Answers:
    """The same questions, asked without lm-eval."""
    language_model = LanguageModel.load()
    with language_model.attach() as routed:
        if plan is None:
            return language_model.answers(questions())
        with routed.steer(plan):
            return language_model.answers(questions())


def questions() -> list[Any]:
    problems = demo_problems()
    return [q for language in LANGUAGES for q in problems.subset(languages=[language]).questions[:LIMIT]]


def scores(results: Any) -> tuple[list[float], list[float]]:
    """(exact match, log-probability) of every document, in the order of `questions`."""
    samples = [sample for task in TASKS for sample in results["samples"][task]]
    return [s["acc"] for s in samples], [s["resps"][0][0][0] for s in samples]


class TestNumbers:
    def test_base_equals_our_own_exact_match(self, base: Any):
        found = answers()
        correct, nats = scores(base.results)
        assert correct == found.correct.tolist()
        assert np.allclose(nats, -found.nats, atol=1e-4)

    def test_steered_equals_our_own_exact_match(self, steered: Any, plan: Plan):
        found = answers(plan)
        correct, nats = scores(steered.results)
        assert correct == found.correct.tolist()
        assert np.allclose(nats, -found.nats, atol=1e-4)

    def test_steered_differs_from_base(self, base: Any, steered: Any):
        assert sum(scores(steered.results)[0]) < sum(scores(base.results)[0])

    def test_base_equals_lm_evals_own_model_without_padding(self, base: Any, tasks: TaskManager):
        own = lm_eval.simple_evaluate(
            HFLM(pretrained=LanguageModel.load().model, tokenizer=LanguageModel.load().tokenizer, batch_size=1),
            tasks=TASKS,
            limit=LIMIT,
            bootstrap_iters=0,
            task_manager=tasks,
        )
        assert own is not None
        assert scores(own)[0] == scores(base.results)[0]
        assert np.allclose(scores(own)[1], scores(base.results)[1], atol=1e-4)

    def test_the_results_say_what_was_done(self, base: Any, steered: Any, plan: Plan):
        facts = steered.results["config"]["moe_route"]
        assert facts["plan"] == plan.hash
        assert base.results["config"]["moe_route"]["plan"] is None
        recorded = base.results["config"]["moe_route"]["recorded"]
        assert recorded["file"] == str(base.file)
        assert recorded["tokens"] == dict(zip(LANGUAGES, base.statistics.tokens().max(1).tolist(), strict=True))
        json.dumps(facts)


class TestRecording:
    @pytest.mark.parametrize("which", ["base", "steered"])
    def test_padding_is_not_counted(self, which: str, request: pytest.FixtureRequest):
        """Every token but the last of a text is an input; the last one is only predicted."""
        statistics = request.getfixturevalue(which).statistics
        tokenizer = LanguageModel.load().tokenizer
        lengths = dict.fromkeys(LANGUAGES, 0)
        for question in questions():
            lengths[question.language] += len(tokenizer(question.prompt + question.answer)["input_ids"]) - 1
        assert statistics.groups == LANGUAGES
        assert statistics.tokens().max(1).tolist() == list(lengths.values())
        assert (statistics.tokens() == statistics.tokens()[:, :1]).all()  # all layers
        assert statistics.sequences().tolist() == [LIMIT] * len(LANGUAGES)

    def test_it_conserves(self, base: Any, steered: Any):
        for statistics in (base.statistics, steered.statistics):
            statistics.verify()
            assert (statistics.token_sum("counts").sum(-1) == 2 * statistics.tokens()).all()

    def test_the_plan_was_kept_to_and_is_in_the_file(self, steered: Any, plan: Plan, busiest: dict[int, list[int]]):
        assert steered.statistics.metadata["plans"] == [plan.hash]
        counts = steered.statistics.token_sum("counts")
        for layer, experts in busiest.items():
            assert not counts[:, layer, experts].any()

    def test_sentences_are_paired_with_their_translations(self, base: Any):
        keys = base.statistics.store.keys()
        assert {item for item, _ in keys} == {f"moe_route_problems/{q.item}" for q in questions()}
        assert len(keys) == LIMIT * len(LANGUAGES)

    def test_groups_are_tasks_by_default_and_the_batch_size_changes_nothing(
        self, evaluate: Callable[..., Any], base: Any, tmp_path: Path
    ):
        results = evaluate({"record": str(tmp_path / "one.safetensors"), "sequences": False}, batch_size=1)
        one = RoutingStatistics.load(tmp_path / "one.safetensors")
        assert list(one.groups) == TASKS
        assert one.store is None
        assert (one.tokens() == base.statistics.tokens()).all()
        assert scores(results)[0] == scores(base.results)[0]
        assert np.abs(one.token_sum("counts") - base.statistics.token_sum("counts")).max() <= 1  # near ties only

    def test_continuations_apart(self, evaluate: Callable[..., Any], base: Any, tmp_path: Path):
        evaluate({"record": str(tmp_path / "parts.safetensors"), "groups": "language", "parts": True})
        parts = RoutingStatistics.load(tmp_path / "parts.safetensors")
        names = [name for language in LANGUAGES for name in (language, f"{language} (continuation)")]
        assert [name for name in names if name in parts.groups] == list(parts.groups)
        together = parts.tokens().max(1)
        by_language = [
            sum(n for name, n in zip(parts.groups, together, strict=True) if name.startswith(language))
            for language in LANGUAGES
        ]
        assert by_language == base.statistics.tokens().max(1).tolist()
        assert parts.select(groups=LANGUAGES).tokens().sum() < base.statistics.tokens().sum()

    def test_a_plan_for_one_language_leaves_the_others_alone(
        self, evaluate: Callable[..., Any], plan: Plan, base: Any, steered: Any
    ):
        results = evaluate({"plan": plan.only(groups=["deu_Latn"]), "groups": "language"})
        mine, natural, all_steered = (np.array(scores(r)[1]) for r in (results, base.results, steered.results))
        german = np.repeat([language == "deu_Latn" for language in LANGUAGES], LIMIT)
        assert np.allclose(mine[~german], natural[~german], atol=1e-4)
        assert np.allclose(mine[german], all_steered[german], atol=1e-4)

    def test_it_is_written_once(self, tasks: TaskManager, tmp_path: Path):
        model = integration.MoeRouteLM(record=tmp_path / "once.safetensors")
        assert model.finish() is None
        given = {"tasks": TASKS[:1], "limit": 2, "bootstrap_iters": 0, "task_manager": tasks}
        lm_eval.simple_evaluate(model, **given)
        written = (tmp_path / "once.safetensors").stat().st_mtime_ns
        assert model.finish() is None
        assert (tmp_path / "once.safetensors").stat().st_mtime_ns == written
        with pytest.raises(RecordingError, match="another model for another evaluation"):
            lm_eval.simple_evaluate(model, **given)

    @pytest.mark.parametrize("batch_size", ["auto", "auto:4"])
    def test_the_automatic_batch_size_is_refused(self, batch_size: str, tmp_path: Path):
        with pytest.raises(ValueError, match="give a number while recording"):
            integration.MoeRouteLM(record=tmp_path / "a.safetensors", batch_size=batch_size)

    def test_other_refusals(self, tmp_path: Path, plan: Plan):
        with pytest.raises(ValueError, match="choose task or language"):
            integration.MoeRouteLM(groups="tasks")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"unknown: .*'nonsense'; leave it out"):
            integration.MoeRouteLM(nonsense=1)
        with pytest.raises(OSError, match="missing"):
            integration.MoeRouteLM(record=tmp_path / "missing" / "a.safetensors")
        with pytest.raises(ValueError, match="renames groups"):
            integration.MoeRouteLM(plan=plan.only(groups=["deu_Latn"]), parts=True)


def test_the_automatic_batch_size_without_a_recording(evaluate: Callable[..., Any], base: Any):
    results = evaluate({"max_length": 64}, batch_size="auto", max_batch_size=8)
    assert scores(results)[0] == scores(base.results)[0]


class TestCache:
    def test_each_plan_has_answers_of_its_own(
        self, evaluate: Callable[..., Any], base: Any, steered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        folder = {"cache": str(tmp_path)}
        first = evaluate(folder)
        second = evaluate({**folder, "plan": str(steered.plan_file)})
        assert scores(first) == scores(base.results)
        assert scores(second) == scores(steered.results)
        assert len(list(tmp_path.glob("*.db"))) == 2

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("the model was run")

        monkeypatch.setattr(integration.MoeRouteLM, "_model_call", refuse)
        assert scores(evaluate(folder)) == scores(first)
        assert scores(evaluate({**folder, "plan": str(steered.plan_file)})) == scores(second)

    def test_a_bare_path_is_refused(self, evaluate: Callable[..., Any], tmp_path: Path):
        with pytest.raises(ValueError, match="cache=FOLDER"):
            evaluate(use_cache=str(tmp_path / "answers"))

    def test_a_recording_takes_no_answers_from_a_cache(self, evaluate: Callable[..., Any], tmp_path: Path):
        with pytest.raises(ValueError, match="leave the cache out"):
            evaluate({"cache": str(tmp_path), "record": str(tmp_path / "a.safetensors")})

    def test_the_key_follows_weights_and_batch_size(self, tasks: TaskManager, tmp_path: Path):
        model, twin = integration.MoeRouteLM(batch_size=4), integration.MoeRouteLM(batch_size=4)
        assert model.cache_key == twin.cache_key != integration.MoeRouteLM(batch_size=8).cache_key
        twin.tokenizer(["padded", "and cut"], padding=True, truncation=True, max_length=3)
        assert model.cache_key == twin.cache_key, "how the last call padded and cut is no part of the model"
        twin.model.lm_head.weight.data[0, 0] += 1
        assert model.cache_key != twin.cache_key
        changed = integration.MoeRouteLM(batch_size=4)
        changed.tokenizer.add_tokens(["plus"])
        assert model.cache_key != changed.cache_key
        given = {"tasks": TASKS[:1], "limit": 1, "bootstrap_iters": 0, "task_manager": tasks}
        assert lm_eval.simple_evaluate(model, use_cache=model.cache_path(tmp_path), **given) is not None


class TestGeneration:
    @pytest.fixture
    def task(self) -> dict[str, Any]:
        from moe_route.integrations.lm_eval.problems import questions as table

        return {
            "task": "continued_problems",
            "custom_dataset": lambda **_: table("eng_Latn"),
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }

    def test_texts_and_counts_do_not_depend_on_the_batch(
        self, evaluate: Callable[..., Any], task: dict[str, Any], tmp_path: Path
    ):
        texts, statistics = [], []
        for batch_size in (1, 5):
            file = tmp_path / f"{batch_size}.safetensors"
            results = evaluate({"record": str(file)}, tasks=[dict(task)], batch_size=batch_size, limit=5)
            texts.append([s["resps"][0][0] for s in results["samples"]["continued_problems"]])
            statistics.append(RoutingStatistics.load(file))
        assert texts[0] == texts[1]
        alone, together = statistics
        language_model = LanguageModel.load()
        prompts = [q.prompt for q in demo_problems().subset(languages=["eng_Latn"]).questions[:5]]
        assert alone.tokens("prefill").max() == sum(len(ids) for ids in language_model.tokenizer(prompts)["input_ids"])
        for phase in ("prefill", "decode"):
            assert (alone.tokens(phase) == together.tokens(phase)).all()
        for prompt, text in zip(prompts, texts[0], strict=True):
            assert language_model.generate(prompt, 8).startswith(text)

    def test_a_plan_steers_it(self, evaluate: Callable[..., Any], task: dict[str, Any], plan: Plan):
        natural, steered = (
            [s["resps"][0][0] for s in evaluate(given, tasks=[dict(task)], limit=5)["samples"]["continued_problems"]]
            for given in ({}, {"plan": plan})
        )
        assert natural != steered


def test_whole_texts_are_scored_and_counted(evaluate: Callable[..., Any], tmp_path: Path):
    from moe_route.integrations.lm_eval.problems import questions as table

    task = {
        "task": "whole_problems",
        "custom_dataset": lambda **_: table("eng_Latn"),
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    file = tmp_path / "rolling.safetensors"
    results = evaluate({"record": str(file), "max_length": 6}, tasks=[task], limit=3)
    tokenizer = LanguageModel.load().tokenizer
    prompts = [q.prompt for q in demo_problems().subset(languages=["eng_Latn"]).questions[:3]]
    assert RoutingStatistics.load(file).tokens().max() >= sum(len(ids) for ids in tokenizer(prompts)["input_ids"])
    assert all(sample["resps"][0][0] < 0 for sample in results["samples"]["whole_problems"])


class TestRows:
    def test_languages_of_tasks(self):
        assert language_of("belebele_swh_Latn", {}) == "swh_Latn"
        assert language_of("mgsm_native_cot_sw", {}) == "sw"
        assert language_of("anything", {"language": "deu_Latn"}) == "deu_Latn"
        for name in ("hellaswag", "sw_hellaswag", "xswh_Latn"):
            with pytest.raises(ValueError, match="groups=task"):
                language_of(name, {})

    def place(self, document: int, index: int = 0) -> Place:
        return Place("a", "task", document, index, f"task/{document}")

    def test_choices_of_one_letter_share_a_row(self):
        rows = rows_of([(self.place(0, i), [1, 2, 3], [i + 4]) for i in range(4)], 10)
        assert [(row.ids, row.context) for row in rows] == [((1, 2, 3), 3)]
        assert [number for number, _ in rows[0].requests] == [0, 1, 2, 3]
        assert len(rows_of([(self.place(0, i), [1, 2, 3], [i + 4]) for i in range(4)], 10, shared=False)) == 4

    def test_equal_documents_do_not_share_a_row(self):
        assert len(rows_of([(self.place(i), [1, 2, 3], [4]) for i in range(2)], 10)) == 2

    def test_the_order_is_that_of_length_and_place(self):
        given = [(self.place(i), [1] * length, [2]) for i, length in enumerate((2, 5, 2, 5))]
        expected = [1, 3, 0, 2]
        assert [row.place.document for row in rows_of(given, 10)] == expected
        assert [row.place.document for row in rows_of(given[::-1], 10)] == expected

    def test_long_contexts_are_cut_on_the_left(self):
        (row,) = rows_of([(self.place(0), [1, 2, 3, 4], [5, 6])], 3)
        assert (row.ids, row.context) == ((3, 4, 5), 2)
        with pytest.raises(ValueError, match="leave the document out"):
            rows_of([(self.place(0), [1], [2] * 4)], 3)


class TestTasks:
    def test_there_is_one_for_every_language(self, tasks: TaskManager):
        languages = demo_problems().languages
        assert set(tasks.all_subtasks) == {f"moe_route_problems_{language}" for language in languages}
        assert tasks.all_groups == ["moe_route_problems"]

    def test_a_part_of_the_problems(self):
        manager = TaskManager(
            include_path=str(integration.TASKS), include_defaults=False, metadata={"subset": "unseen"}
        )
        task = manager.load(TASKS[:1])["tasks"][TASKS[0]]
        assert {doc["subset"] for doc in task.eval_docs} == {"unseen"}
        assert len(task.eval_docs) == len(demo_problems().subset("unseen", languages=["eng_Latn"]).questions)


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    for use in (integration.register, lambda: integration.MoeRouteLM):
        with pytest.raises(ImportError, match=r"moe-route\[hf,eval\]"):
            use()


class TestCommand:
    @pytest.fixture(autouse=True)
    def own_tasks_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the thousands of files of lm-eval's tasks, which take long to read."""
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))

    def test_help_is_ours(self, capsys: pytest.CaptureFixture[str]):
        assert main(["lm-eval", "--help"]) == 0
        shown = capsys.readouterr().out
        assert "plan=FILE" in shown
        assert "record=FILE" in shown

    def test_a_run(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, base: Any):
        file = tmp_path / "run.safetensors"
        words = ["--tasks", ",".join(TASKS), "--limit", str(LIMIT), "--batch_size", "4"]
        words += ["--model_args", f"record={file},groups=language", "--output_path", str(tmp_path / "out")]
        assert main(["lm-eval", *words]) == 0
        out = capsys.readouterr().out
        assert f"routing written to {file}" in out
        assert all(f"|{task}" in out for task in TASKS)
        assert (RoutingStatistics.load(file).tokens() == base.statistics.tokens()).all()
        (results,) = (tmp_path / "out").rglob("results_*.json")
        said = json.loads(results.read_text("utf-8"))
        assert said["config"]["moe_route"]["recorded"]["file"] == str(file)

    def test_refusals_are_one_line(self, capsys: pytest.CaptureFixture[str], tmp_path: Path):
        words = ["--tasks", str(integration.TASKS / f"{TASKS[0]}.yaml"), "--batch_size", "auto"]
        assert main(["lm-eval", *words, "--model_args", f"record={tmp_path / 'a.safetensors'}"]) == 2
        assert "give a number while recording" in capsys.readouterr().err
