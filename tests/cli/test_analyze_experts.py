"""`moe-route analyze experts | overlap` on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness.commands import refused

import moe_route as mr
from moe_route.cli import main
from moe_route.steering import ExpertSelection


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recorded")
    made = {name: folder / f"{name}.safetensors" for name in ("general", "task")}
    short = ["--limit", "6", "--batch-size", "6"]
    assert main(["record", "--languages", "eng_Latn,swh_Latn", *short, "--out", str(made["general"])]) == 0
    one = ["--data", "arithmetic", "--languages", "eng_Latn", *short]
    assert main(["record", *one, "--out", str(made["task"])]) == 0
    return made


@pytest.fixture
def both(recorded):
    return (recorded["task"], "--baseline", recorded["general"], "--group", "eng_Latn")


def loaded(recorded):
    return [mr.RoutingStatistics.load(recorded[name]) for name in ("task", "general")]


def test_every_rule_finds_what_the_library_finds(answer, recorded, both):
    task, general = loaded(recorded)
    one = ("analyze", "experts", recorded["general"])
    cases = [
        (
            (*both, "--by", "token", "--threshold", "0.1", "--layers", "2-5", "--per-layer", "2"),
            mr.analysis.task_experts(
                task, general, group="eng_Latn", threshold=0.1, by="token", top=2, layers=range(2, 6)
            ),
        ),
        (
            (*both, "--lower", "--threshold", "0.1"),
            mr.analysis.task_experts(task, general, group="eng_Latn", threshold=0.1, lower=True),
        ),
        (
            (*one[2:], "--rule", "multilingual", "--threshold", "0.2"),
            mr.analysis.multilingual_experts(general, "eng_Latn", threshold=0.2),
        ),
        (
            (*one[2:], "--rule", "esft", "--group", "swh_Latn", "--scores", "gate", "--top-p", "0.3"),
            mr.analysis.esft_experts(general, kind="gate", top_p=0.3, group="swh_Latn"),
        ),
    ]
    for arguments, expected in cases:
        result = answer("analyze", "experts", *arguments)
        assert result == json.loads(json.dumps(expected.to_dict()))
    by_language = [
        (
            ("share", "--per-layer", "3", "--threshold", "0.7"),
            mr.analysis.frequency_share_experts(general, top=3, threshold=0.7),
        ),
        (
            ("entropy", "--top-n", "5", "--percentile", "80"),
            mr.analysis.entropy_experts(general, top_n=5, percentile=80),
        ),
        (("rise", "--top-n", "9", "--alpha", "5"), mr.analysis.rise_experts(general, top_n=9, alpha=5)),
    ]
    for arguments, expected in by_language:
        result = answer(*one, "--rule", *arguments)
        assert result["groups"] == json.loads(json.dumps(expected.to_dict()))["groups"]
    risk = answer("analyze", "experts", *both, "--rule", "risk", "--activations", "4", "--deactivations", "3")
    expected = mr.analysis.risk_experts(task, general, group="eng_Latn", activations=4, deactivations=3)
    assert risk["activate"]["experts"] == expected.activate.to_dict()["experts"]
    assert risk["deactivate"]["experts"] == expected.deactivate.to_dict()["experts"]


@pytest.mark.parametrize("rule", ["task", "difference", "risk", "share", "committee"])
def test_every_rule_keeps_a_table(answer, recorded, both, rule: str, tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    words = both if rule in ("task", "difference", "risk") else (recorded["general"],)
    more = {"task": ("--threshold", "0.1"), "risk": ("--top-n", "4")}.get(rule, ())
    answer("analyze", "experts", *words, "--rule", rule, *more, "--table", tmp_path / "table.csv")
    assert {"layer", "expert"} & set(pandas.read_csv(tmp_path / "table.csv").columns)


def test_stable_experts(answer, recorded, both):
    task, general = loaded(recorded)
    found = answer("analyze", "experts", *both, "--threshold", "0.2", "--stability", "15", "--keep", "0.9")
    stable = mr.analysis.stability_selection(
        lambda a, b: mr.analysis.task_experts(a, b, group="eng_Latn", threshold=0.2),
        task,
        general,
        resamples=15,
        keep=0.9,
    )
    assert found["jaccard"] == stable.jaccard
    assert found["selection"]["experts"] == stable.selection.to_dict()["experts"]
    language = ("analyze", "experts", recorded["general"], "--rule", "rise", "--stability", "5")
    assert answer(*language, "--group", "swh_Latn")["whole"]["experts"]
    risk = answer("analyze", "experts", *both, "--rule", "risk", "--top-n", "6", "--stability", "9")
    assert set(risk) == {"activate", "deactivate", "values"}


def test_a_selection_is_written_edited_and_made_a_plan(answer, both, tmp_path: Path):
    selection, out = tmp_path / "experts.json", tmp_path / "plan.safetensors"
    answer("analyze", "experts", *both, "--threshold", "0.2", "--out", selection)
    content = json.loads(selection.read_text())
    content["experts"] = {"3": [1, 5], "9": [2]} if "9" in content["experts"] else {"3": [1, 5]}
    selection.write_text(json.dumps(content))
    made = answer("analyze", "experts", selection, "--kind", "force-off", "--plan", out)
    plan = mr.Plan.load(out)
    assert made["plan_hash"] == plan.hash
    expected = mr.Plan.force_off(ExpertSelection.load(selection))
    assert plan.rules == expected.rules
    assert plan.model.config_hash == content["model"]["config_hash"]
    assert answer("analyze", "experts", selection, "--layers", "0-2")["experts"] == {}


def test_risk_makes_a_plan_of_both_signs(answer, moe_route, both, tmp_path: Path):
    out = tmp_path / "plan.safetensors"
    risk = (*both, "--rule", "risk", "--activations", "2", "--deactivations", "3")
    answer("analyze", "experts", *risk, "--kind", "force-on", "--plan", out)
    assert {rule.kind for rule in mr.Plan.load(out).rules} == {"force_on", "force_off"}
    refused(moe_route("analyze", "experts", *risk, "--kind", "forbid", "--plan", out), "--deactivations 0")
    refused(moe_route("analyze", "experts", *risk, "--out", tmp_path / "s.json"), "of one sign")
    answer("analyze", "experts", *both, "--rule", "risk", "--deactivations", "3", "--out", tmp_path / "s.json")
    assert len(ExpertSelection.load(tmp_path / "s.json")) == 3


def test_ids_of_every_language(answer, moe_route, recorded, tmp_path: Path):
    rise = ("analyze", "experts", recorded["general"], "--rule", "rise", "--top-n", "10")
    answer(*rise, "--ids", tmp_path / "ids.json", "--group", "swh_Latn", "--out", tmp_path / "swh.json")
    ids = json.loads((tmp_path / "ids.json").read_text())
    assert set(ids) == {"eng_Latn", "swh_Latn"}
    assert ids["swh_Latn"] == json.loads((tmp_path / "swh.json").read_text())["experts"]
    refused(moe_route(*rise, "--out", tmp_path / "x.json"), "pass --group")
    refused(moe_route(*rise, "--out", tmp_path / "x.json", "--group", "fra_Latn"), "'fra_Latn'", "eng_Latn")


def test_difference_has_intervals(answer, recorded, both):
    task, general = loaded(recorded)
    result = answer("analyze", "experts", *both, "--rule", "difference", "--resamples", "200", "--interval", "0.9")
    found = mr.analysis.expert_difference_interval(task, general, group="eng_Latn", resamples=200, level=0.9)
    np.testing.assert_allclose(result["joint_low"], found.joint_low)
    assert result["items"] == [6, 6]


def test_thresholds_and_overlap(answer, recorded, both, tmp_path: Path):
    swept = answer("analyze", "experts", *both, "--threshold", "0.1,0.3", "--picture", tmp_path / "sweep.png")
    names = {}
    for name, rule in (("task", both), ("others", (recorded["general"], "--rule", "multilingual"))):
        names[name] = tmp_path / f"{name}.json"
        answer("analyze", "experts", *rule, "--threshold", "0.1", "--out", names[name])
    found = answer("analyze", "overlap", *names.values(), "--picture", tmp_path / "overlap.svg")
    assert found["names"] == ["task", "others"]
    assert np.sum(found["shared"][0][1]) == np.sum(swept["both"][0])
    assert found["expected"][0][1] == pytest.approx(swept["expected"][0])
    assert (tmp_path / "sweep.png").exists()
    assert (tmp_path / "overlap.svg").exists()


def test_what_a_user_gets_wrong(moe_route, recorded, files, both, tmp_path: Path):
    experts = ("analyze", "experts")
    ExpertSelection({0: [1]}, num_experts=(16,) * 8).save(tmp_path / "s.json")
    cases = [
        ((*experts, recorded["task"]), ("task needs --baseline",)),
        ((*experts, *both, "--rule", "esft"), ("esft takes no --baseline",)),
        ((*experts, *both, "--top-p", "0.2"), ("task takes no --top-p",)),
        ((*experts, *both, "--layers", "5-9"), ("8 layers",)),
        ((*experts, *both, "--rule", "risk"), ("say how many",)),
        ((*experts, *both, "--threshold", "0.99", "--plan", tmp_path / "p"), ("smaller --threshold",)),
        ((*experts, *both, "--ids", tmp_path / "i"), ("every language",)),
        ((*experts, *both, "--lower", "--phase", "decode"), ("leave phase out",)),
        ((*experts, tmp_path / "s.json", "--group", "eng_Latn"), ("takes no --group",)),
        ((*experts, *both, "--baseline-group", "fra_Latn"), ("no baseline group 'fra_Latn'",)),
        (("analyze", "correlation", files["general"], "--scores", tmp_path / "no.tsv"), ("no.tsv does not exist",)),
        (("analyze", "divergence", files["general"], "--measure", "jaccard", "--top", "16"), ("below 16",)),
        ((*experts, tmp_path / "no.json"), ("does not exist",)),
        ((*experts, tmp_path / "s.json", "--threshold", "0.2"), ("takes no --threshold",)),
        (("analyze", "overlap", tmp_path / "s.json", tmp_path / "s.json"), ("named twice",)),
        ((*experts, recorded["task"], "--task", recorded["task"]), ("named twice",)),
        (experts, ("nothing to find experts in",)),
        ((*experts, *both, "--threshold", "0.1,0.2", "--reference", "fra_Latn"), ("no baseline group 'fra_Latn'",)),
        (
            (*experts, files["task"], "--baseline", files["general"], "--group", "eng_Latn", "--rule", "difference"),
            ("4 kept items of group 'eng_Latn' are too few",),
        ),
    ]
    for arguments, words in cases:
        refused(moe_route(*arguments), *words)
    code, _, err = moe_route(*experts, *both, "--threshold", "a")
    assert (code, "list of numbers" in err) == (2, True)


def test_multilingual_experts_of_one_group(answer, files):
    found = answer(
        "analyze", "experts", files["general"], "--rule", "multilingual", "--group", "deu_Latn",
        "--threshold", "0.1",
    )  # fmt: skip
    statistics = mr.RoutingStatistics.load(files["general"])
    alone = mr.analysis.multilingual_experts(statistics, "eng_Latn", groups=["deu_Latn"], threshold=0.1)
    assert found["experts"] == alone.to_dict()["experts"]
    assert alone != mr.analysis.multilingual_experts(statistics, "eng_Latn", threshold=0.1)
