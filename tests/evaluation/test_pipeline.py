"""A whole small evaluation: what it writes, what it compares, and that interruptions leave no trace."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moe_route.data import Question
from moe_route.evaluation import (
    Evaluation,
    ForeignFolderError,
    NullPlanError,
    Study,
    StudyError,
    evaluate,
    pipeline,
    read_study,
)
from moe_route.evaluation.measure import AskedTask
from moe_route.evaluation.pipeline import STAGES
from moe_route.evaluation.report import markdown
from moe_route.evaluation.results import _task_results
from moe_route.report import read as read_inputs
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import Plan

Content = Callable[[Path], dict[str, bytes]]


def conditions_of(out: Path) -> dict[str, list[dict[str, object]]]:
    listed = json.loads((out / "evaluate" / "conditions.json").read_text(encoding="utf-8"))["conditions"]
    return {
        name: [json.loads(line) for line in (out / "evaluate" / f"{file}.jsonl").read_text("utf-8").splitlines()[1:]]
        for name, file in listed.items()
    }


def test_every_stage_leaves_its_results(undisturbed: Evaluation, content_of: Content):
    assert undisturbed.stages == dict.fromkeys(STAGES, "made")
    names = set(content_of(undisturbed.out))
    assert {f"{stage}/step.json" for stage in STAGES} <= names
    assert {"study.json", "record/general.safetensors", "find/experts.json", "report/report.md"} <= names
    assert not [name for name in names if ".tmp" in name or ".blocks" in name]
    assert str(undisturbed.out) not in "".join(p.read_text("utf-8") for p in undisturbed.out.rglob("*.json"))


def test_the_tables_can_be_read_in_a_terminal(undisturbed: Evaluation):
    text = (undisturbed.out / "report" / "report.md").read_text("utf-8")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(blocks) >= 4
    for block in blocks:
        assert len({len(line) for line in block}) == 1, block[
            0
        ]  # one width, so that the columns stand below each other
        assert {line.replace("\\|", "").count("|") for line in block} == {block[0].count("|")}


def test_all_conditions_answer_the_same_questions_in_the_same_order(undisturbed: Evaluation):
    lines = conditions_of(undisturbed.out)
    keys = {
        name: [(one["task"], one["language"], one["item"], one["prompt"]) for one in of] for name, of in lines.items()
    }
    assert len({tuple(of) for of in keys.values()}) == 1
    left_out = undisturbed.results["results"]["left_out"]
    expected = {"base", "base again", "null plan", "steered", "layers counted from 1", "layers before", "layers after"}
    expected |= {"multilingual experts", "random 0", "random 1", "random per token 0", "deactivation", "experts off"}
    assert expected <= {*lines, *left_out}
    assert all(left_out.values())


def test_the_model_alone_repeats_itself_and_the_null_plan_changes_no_bit(undisturbed: Evaluation):
    lines = conditions_of(undisturbed.out)
    assert lines["base"] == lines["base again"] == lines["null plan"]
    assert lines["base"] != lines["steered"]


def test_plans_are_kept_and_their_hashes_are_in_the_headers(undisturbed: Evaluation):
    folder = undisturbed.out / "evaluate"
    for path in sorted((folder / "plans").glob("*.json")):
        header = json.loads((folder / f"{path.stem}.jsonl").read_text("utf-8").splitlines()[0])
        assert Plan.load(path).hash == header["plan"]
    assert len(list((folder / "plans").glob("*.json"))) == len(list(folder.glob("*.jsonl"))) - 2  # base twice


def test_the_sweep_sees_even_items_and_the_tables_odd_ones(undisturbed: Evaluation, small: Study):
    lines = conditions_of(undisturbed.out)
    items = list(dict.fromkeys(sorted(str(one["item"]) for one in lines["base"] if one["task"] == "sums")))
    swept = (undisturbed.out / "sweep" / "base.jsonl").read_text("utf-8").splitlines()[1:]
    assert {json.loads(line)["item"] for line in swept} == set(items[0::2])
    task = undisturbed.results["results"]["tasks"]["sums"]
    assert task["main_items"] == "odd"
    odd = [one["correct"]["exact"] for one in lines["steered"] if one["task"] == "sums" and one["item"] in items[1::2]]
    assert task["comparisons"]["odd"]["exact"]["steered"]["accuracy"] == pytest.approx(sum(odd) / len(odd))
    assert "tuned on test" in undisturbed.report
    best = max(p["accuracy"] for p in undisturbed.results["results"]["sweep"] if p["setting"])
    chosen = undisturbed.results["results"]["settings"]["chosen"]["shown"]
    assert {p["name"]: p["accuracy"] for p in undisturbed.results["results"]["sweep"]}[chosen] == best


def test_items_that_chose_the_setting_are_reported_in_no_task(undisturbed: Evaluation, small: Study):
    """A second task that holds the same items one place later has its odd items among the even ones of the first."""
    recorded = conditions_of(undisturbed.out)
    items = list(dict.fromkeys(sorted(str(one["item"]) for one in recorded["base"] if one["task"] == "sums")))
    questions = [Question(item, "eng_Latn", "?", "1") for item in ("another", *items)]
    later = AskedTask("sums", "answer", tuple(questions), (), small.tasks["sums"], small.chat)
    made = {"task": "sums", "language": "eng_Latn", "nats": 1.0, "tokens": 0, "correct": {"exact": True}}
    lines = {name: [{**made, "item": q.item} for q in questions] for name in ("base", "base again", "null plan")}
    lines["steered"] = lines["base"]
    whole = _task_results(later, lines, 0, ())
    assert (whole["main_items"], whole["comparisons"]["odd"]["exact"]["base"]["items"]) == ("all", 2)
    kept = _task_results(later, lines, 0, items[0::2])
    assert (kept["main_items"], set(kept["comparisons"])) == ("all", {"all"}), "no item is free of the choice"
    assert _task_results(later, lines, 0, items[1::2])["comparisons"]["odd"]["exact"]["base"]["items"] == 2


def test_teacher_forcing_agrees_with_generation(undisturbed: Evaluation):
    lines = conditions_of(undisturbed.out)["base"]
    forced = {(o["item"], o["language"]): o["correct"]["exact"] for o in lines if o["task"] == "sums"}  # type: ignore[index]
    written = [one for one in lines if one["task"] == "written"]
    assert len(written) == 4
    for one in written:
        assert set(one["correct"]) == {"flexible-extract", "normalized"}  # type: ignore[arg-type]
        if forced[one["item"], one["language"]]:  # the answer comes first, whatever is written after it
            assert str(one["output"]).strip()
            assert 0 < one["tokens"] <= 4  # type: ignore[operator]


def test_a_second_run_keeps_everything(
    undisturbed: Evaluation,
    small: Study,
    language_model: LanguageModel,
    content_of: Content,
    monkeypatch: pytest.MonkeyPatch,
):
    before = content_of(undisturbed.out)
    monkeypatch.setattr(pipeline, "ask", lambda *_: pytest.fail("asked again"))
    again = evaluate(small, undisturbed.out, language_model=language_model)
    assert again.stages == dict.fromkeys(STAGES, "kept")
    assert again.results == undisturbed.results
    assert content_of(undisturbed.out) == before


def test_ending_at_batch_boundaries_leaves_no_trace(
    undisturbed: Evaluation, small: Study, language_model: LanguageModel, content_of: Content, tmp_path: Path
):
    out, ended = tmp_path / "results", 0
    while True:
        checks = iter(range(2 + 3 * ended))
        done = evaluate(
            small, out, language_model=language_model, stop=lambda checks=checks: next(checks, None) is None
        )
        if not done.interrupted:
            break
        assert done.results is None
        assert list(done.stages.values())[-1] == "interrupted"
        ended += 1
    assert ended >= 5
    assert content_of(out) == content_of(undisturbed.out)


def test_errors_in_the_middle_of_a_batch_leave_no_trace(
    undisturbed: Evaluation,
    small: Study,
    language_model: LanguageModel,
    content_of: Content,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    asked, calls = pipeline.ask, [0]

    def failing(*given: object) -> list[dict[str, object]]:
        calls[0] += 1
        if calls[0] % 17 == 0:
            raise KeyboardInterrupt
        return asked(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "ask", failing)
    out, failures = tmp_path / "results", 0
    while True:
        try:
            evaluate(small, out, language_model=language_model)
            break
        except KeyboardInterrupt:
            failures += 1
            torn = max((out / "evaluate").glob("*.jsonl"), key=lambda p: p.stat().st_mtime_ns, default=None)
            if torn is not None:
                with open(torn, "ab") as stream:
                    stream.write(b'{"task": "sums", "langu')
    assert failures >= 3
    assert content_of(out) == content_of(undisturbed.out)


def test_results_of_other_inputs_are_not_overwritten(
    undisturbed: Evaluation, small: Study, language_model: LanguageModel, tmp_path: Path
):
    out = shutil.copytree(undisturbed.out, tmp_path / "results")
    other = replace(small, seeds=replace(small.seeds, random=7))
    with pytest.raises(ForeignFolderError, match=r"evaluate holds results of other inputs \(conditions.*--force"):
        evaluate(other, out, language_model=language_model)
    (out / "sweep" / "base.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ForeignFolderError, match="removed or altered"):
        evaluate(small, out, language_model=language_model)


def test_another_tokenizer_and_other_settings_of_generation_are_other_inputs(
    undisturbed: Evaluation,
    small: Study,
    language_model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Both change what the same weights answer to the same questions."""
    out = shutil.copytree(undisturbed.out, tmp_path / "results")
    tokenizer = copy.deepcopy(language_model.tokenizer)
    tokenizer(["padded", "and cut"], padding=True, truncation=True, max_length=3)
    assert evaluate(small, out, language_model=replace(language_model, tokenizer=tokenizer)).stages["record"] == "kept"
    tokenizer.add_tokens(["plus"])
    with pytest.raises(ForeignFolderError, match=r"record holds results of other inputs \(model\.tokenizer"):
        evaluate(small, out, language_model=replace(language_model, tokenizer=tokenizer))
    monkeypatch.setattr(language_model.model.generation_config, "repetition_penalty", 5.0)
    with pytest.raises(ForeignFolderError, match=r"evaluate holds .*tasks\.written\.generation\.repetition_penalty"):
        evaluate(small, out, language_model=language_model)


def test_analysis_is_made_again_without_the_model(
    undisturbed: Evaluation,
    small: Study,
    language_model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    out = shutil.copytree(undisturbed.out, tmp_path / "results")
    monkeypatch.setattr(pipeline, "ask", lambda *_: pytest.fail("asked again"))
    done = evaluate(replace(small, seeds=replace(small.seeds, bootstrap=1)), out, language_model=language_model)
    assert [name for name, what in done.stages.items() if what == "made"] == ["analyze", "report"]
    assert json.loads((out / "study.json").read_text("utf-8"))["seeds"]["bootstrap"] == 1


def test_force_starts_again_and_removes_nothing_else(
    undisturbed: Evaluation, small: Study, language_model: LanguageModel, tmp_path: Path
):
    out = shutil.copytree(undisturbed.out, tmp_path / "results")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    done = evaluate(small, out, language_model=language_model, force=True, stop=lambda: True)
    assert done.interrupted
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "record", "run.json", "study.json"]


def test_a_folder_with_other_files_is_refused(small: Study, language_model: LanguageModel, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(ForeignFolderError, match=r"holds thesis\.tex"):
        evaluate(small, tmp_path, language_model=language_model, force=True)


def test_a_null_plan_that_changes_answers_ends_the_run(
    small: Study, language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, seen = pipeline.ask, [0]

    def disturbed(*given: object) -> list[dict[str, object]]:
        records = asked(*given)  # type: ignore[arg-type]
        seen[0] += 1
        return (
            [{**one, "nats": seen[0] / 7} for one in records]
            if (tmp_path / "r/evaluate/null-plan.jsonl").exists()
            else records
        )

    monkeypatch.setattr(pipeline, "ask", disturbed)
    with pytest.raises(NullPlanError, match="steers no token changed"):
        evaluate(replace(small, sweep=type(small.sweep)()), tmp_path / "r", language_model=language_model)


def test_without_a_sweep_all_items_are_reported(
    small: Study, language_model: LanguageModel, undisturbed: Evaluation, tmp_path: Path
):
    plain = replace(
        small, sweep=type(small.sweep)(), controls=replace(small.controls, random=0, random_per_token=0, run=())
    )
    done = evaluate(plain, tmp_path / "r", language_model=language_model)
    assert done.results is not None
    assert done.results["results"]["tasks"]["sums"]["main_items"] == "all"
    assert set(done.results["results"]["conditions"]) == {"base", "base again", "null plan", "steered"}
    assert "tuned on test" not in done.report
    mine, whole = (
        r["results"]["tasks"]["sums"]["comparisons"]["all"]["exact"]["base"]
        for r in (done.results, undisturbed.results)
    )
    assert mine == whole


def test_a_study_that_steers_nothing_correlates_divergence_with_scores(language_model: LanguageModel, tmp_path: Path):
    languages = ("eng_Latn", "deu_Latn", "fra_Latn", "swh_Latn")
    (tmp_path / "belebele").mkdir()
    for language in languages:
        row = {"link": "a", "question_number": 1, "flores_passage": "A.", "question": "B?", "correct_answer_num": "2"}
        rows = [{**row, **{f"mc_answer{i}": str(i + n) for i in (1, 2, 3, 4)}, "link": str(n)} for n in range(3)]
        text = "\n".join(json.dumps(one) for one in rows)
        (tmp_path / "belebele" / f"{language}.jsonl").write_text(text, encoding="utf-8")
    changes = {
        "model": {"id": "demo"},
        "chat": {"template": False, "add_special_tokens": True},
        "corpora.general": {"format": "shipped", "languages": list(languages), "limit": 3},
        "tasks.belebele.languages": list(languages),
    }
    study = read_study("qwen3-30b-a3b-belebele", changes)
    done = evaluate(study, tmp_path / "results", data=tmp_path, language_model=language_model)
    assert set(done.stages) == {"record", "evaluate", "analyze", "report"}
    results = done.results["results"]
    assert set(results["conditions"]) == {"base", "base again"}
    assert set(results["routing"]["correlation"]["belebele"]["scores"]) == set(languages[1:])
    assert "Correlation of divergence with accuracy in belebele" in done.report
    assert not (tmp_path / "results" / "record" / "task.safetensors").exists()


def test_answers_that_hit_the_limit_are_told_by_language(undisturbed: Evaluation, small: Study):
    (generated,) = (task for task in undisturbed.results["results"]["tasks"].values() if task["kind"] == "generate")
    base = generated["comparisons"]["all"]["normalized"]["base"]["hit_the_limit"]
    lines = [one for one in conditions_of(undisturbed.out)["base"] if one["task"] == "written"]
    for language in ("eng_Latn", "swh_Latn"):
        mine = [one for one in lines if one["language"] == language]
        assert base[language] == sum(one["cut"] for one in mine) / len(mine)
        assert all(one["tokens"] == 4 for one in mine if one["cut"])
    content = copy.deepcopy(undisturbed.results)
    for entry in content["results"]["tasks"]["written"]["comparisons"]["all"]["normalized"].values():
        entry["hit_the_limit"] = {"eng_Latn": 0.02, "swh_Latn": 0.0}
    assert "hit the limit" in markdown(content)
    assert "Warning" not in markdown(content)
    content["results"]["tasks"]["written"]["comparisons"]["all"]["normalized"]["steered"]["hit_the_limit"] = {
        "eng_Latn": 0.02,
        "swh_Latn": 0.45,
    }
    assert "swh_Latn 45.0 %" in markdown(content)
    assert "eng_Latn 2.0 %" not in markdown(content)


def test_layers_that_the_model_lacks_are_refused(small: Study, language_model: LanguageModel, tmp_path: Path):
    steer = replace(small.steer, layers=(8, 35))
    with pytest.raises(StudyError, match=r"steer\.layers is \[8, 35\].*8 MoE layers"):
        evaluate(replace(small, steer=steer), tmp_path / "r", language_model=language_model)
    with pytest.raises(StudyError, match=r"no task expert in layers 2-5 at find\.tau 0\.99: lower it"):
        evaluate(
            replace(small, find=replace(small.find, tau=0.99), sweep=type(small.sweep)()),
            tmp_path / "s",
            language_model=language_model,
        )


def test_the_html_page_takes_its_tables_from_the_folder(undisturbed: Evaluation):
    """`moe-route report FOLDER` shows the changes that the report of the evaluation has."""
    tables = read_inputs([undisturbed.out]).results
    tasks = undisturbed.results["results"]["tasks"]
    assert len(tables) == sum(len(task["scorers"]) for task in tasks.values())
    task = next(iter(tasks.values()))
    compared = task["comparisons"][task["main_items"]][task["scorers"][0]]
    assert tables[0].effect is not None
    assert tables[0].effect["better"] == "higher"
    rows = {row[0]: row for row in tables[0].rows}
    assert rows.keys() == compared.keys() - {"base", "base again", "null plan"}
    for condition, (_, accuracy, *change) in rows.items():
        assert accuracy == compared[condition]["accuracy"]
        assert change == [compared[condition]["change"][key] for key in ("value", "low", "high")]
