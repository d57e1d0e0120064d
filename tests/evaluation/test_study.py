"""Studies: the shipped ones, and errors that name the key and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_route.analysis.recipes import RECIPES
from moe_route.evaluation import StudyError, parse_assignment, read_study, shipped_studies

PUBLISHED = [name for name in shipped_studies() if name != "demo"]
STEERED = [name for name in PUBLISHED if not name.endswith("-belebele")]


def test_there_is_a_recipe_for_each_model_and_task_of_the_paper():
    models = ("qwen3-30b-a3b", "phi-3.5-moe", "gpt-oss-20b")
    assert set(STEERED) == {f"{model}-{task}" for model in models for task in ("mgsm", "medical")}
    assert set(PUBLISHED) - set(STEERED) == {f"{model}-belebele" for model in (*models, "olmoe-1b-7b")}


@pytest.mark.parametrize("name", [name for name in STEERED if name.endswith("-mgsm")])
def test_answers_with_a_chain_of_thought_have_room(name: str):
    assert read_study(name).tasks["mgsm"].max_new_tokens >= 2048


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in STEERED])
def test_the_studies_of_the_correlation_steer_nothing(name: str):
    study = read_study(name)
    assert study.steer is study.find is study.corpora.task is None
    assert study.tasks["belebele"].languages == study.corpora.general.languages
    assert study.corpora.general.split == "dev"  # devtest holds the passages of Belebele


@pytest.mark.parametrize("name", STEERED)
def test_shipped_recipes_are_the_published_settings(name: str):
    study, published = read_study(name), RECIPES[_published_name(name)]
    assert study.model.id == published.model
    assert study.find.tau == published.threshold
    assert study.steer.layers == (published.first, published.last)
    assert study.steer.kind == published.kind
    assert published.strength in (None, study.steer.strength)
    assert study.controls.random == study.controls.random_per_token == 5
    assert study.find.tau in study.sweep.tau
    assert study.model.dequantize == (study.model.id == "openai/gpt-oss-20b")
    json.dumps(study.to_dict())


def _published_name(name: str) -> str:
    model, _, task = name.rpartition("-")
    return f"paper/{model}/{'medicine' if task == 'medical' else task}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_on_the_hub_must_be_pinned(name: str):
    with pytest.raises(StudyError, match=r"model\.revision is missing.*--set model\.revision"):
        read_study(name).model.check_pinned()
    read_study(name, {"model.revision": "0" * 40}).model.check_pinned()
    with pytest.raises(StudyError, match="no commit hash"):
        read_study(name, {"model.revision": "main"})


def test_the_shipped_model_has_no_revision():
    with pytest.raises(StudyError, match="leave it out"):
        read_study("demo", {"model.revision": "0" * 40}).model.check_pinned()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("steer.strenght", 1.0, 'steer has no key "strenght": did you mean "strength"'),
        ("steer.kind", "harder", 'steer.kind is "harder": give "soft" or "hard"'),
        ("steer.layers", [5], r"steer.layers is \[5\]: give a list"),
        ("steer.layers", [5, 2], "counted upwards from 0"),
        ("steer.layer_base", True, "steer.layer_base is true"),
        ("steer.strength", "strong", 'steer.strength is "strong": give a number'),
        ("steer.strength", float("nan"), "steer.strength is NaN: give"),
        ("sweep.strength", [0.5, float("inf")], r"sweep.strength\[1\] is Infinity"),
        ("sweep.tau", [0.3, float("nan")], r"sweep.tau\[1\] is NaN"),
        ("seeds.random", -5, "seeds: random and bootstrap are seeds"),
        ("find.top", 0, "find: top is 0"),
        ("find.tau", [], "find: tau is empty"),
        ("find.tau", 40, "find: tau is 40"),
        ("tasks", {}, r"add a table \[tasks.NAME\]"),
        ("tasks.sums.limit", 0, "tasks.sums: skip must be 0 or more, and limit 1"),
        ("tasks.sums.format", "mgsm", "tasks.sums: path is missing"),
        ("tasks.sums.path", "x", "leave path out"),
        ("controls.run", ["nothing"], r'controls.run\[0\] is "nothing": give "before"'),
        ("sweep.task", "other", "sweep.task is 'other': there are sums, written"),
        ("chat.enable_thinking", False, "set template = true"),
        ("model", {}, r'demo.toml: model lacks "id": add it \(a text\)'),
        ("corpora.general.format", "flores", "corpora.general: path is missing"),
    ],
)
def test_errors_name_the_key_and_the_fix(key: str, value: object, words: str):
    with pytest.raises(StudyError, match=words):
        read_study("demo", {key: value})


def test_special_tokens_of_a_template_do_not_come_twice():
    with pytest.raises(StudyError, match="would come twice"):
        read_study("demo", {"chat.template": True})


def test_other_names_and_files_are_refused(tmp_path: Path):
    with pytest.raises(StudyError, match=r"there is no study 'dmeo'.*demo"):
        read_study("dmeo")
    (tmp_path / "broken.toml").write_text("title = ", encoding="utf-8")
    with pytest.raises(StudyError, match="is no TOML file"):
        read_study(tmp_path / "broken.toml")


def test_a_study_steers_with_all_that_needs_or_nothing(tmp_path: Path):
    path = tmp_path / "half.toml"
    text = shipped_studies()["qwen3-30b-a3b-belebele"].read_text(encoding="utf-8")
    path.write_text(f"{text}\n[find]\ntau = 0.3\n", encoding="utf-8")
    with pytest.raises(StudyError, match=r"steer and corpora\.task is missing"):
        read_study(path)
    path.write_text(f"{text}\n[sweep]\ntau = [0.3]\n", encoding="utf-8")
    with pytest.raises(StudyError, match="nothing is steered"):
        read_study(path)


def test_assignments():
    assert parse_assignment("steer.strength=1.5") == ("steer.strength", 1.5)
    assert parse_assignment("steer.layers=[1, 2]") == ("steer.layers", [1, 2])
    assert parse_assignment("model.id=some/folder") == ("model.id", "some/folder")
    with pytest.raises(StudyError, match="KEY=VALUE"):
        parse_assignment("steer.strength")
    with pytest.raises(StudyError, match="title is a value"):
        read_study("demo", {"title.x": 1})


def test_whole_numbers_are_numbers():
    assert read_study("demo", {"steer.strength": 1}).steer.strength == 1.0
