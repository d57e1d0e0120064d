"""`moe-route plan`: plans are made, read, compared and tried from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.commands import refused

from moe_route.cli.plan import experts_of
from moe_route.steering import Plan

TINY = ("--languages", "eng_Latn,swh_Latn", "--limit", "2", "--batch-size", "8")


def test_experts_are_parsed() -> None:
    assert experts_of(["5:3,17", "5:4", "8:1"]) == {5: {3: 1.0, 17: 1.0, 4: 1.0}, 8: {1: 1.0}}
    assert experts_of(["8:0-2,5=0.5"]) == {8: {0: 1.0, 1: 1.0, 2: 1.0, 5: 0.5}}


@pytest.mark.parametrize("text", ["5", "5:", ":3", "5:a", "5:3-1", "5:3=x", "x:1"])
def test_what_names_no_experts_is_refused(moe_route: Any, text: str) -> None:
    code, out, err = moe_route("plan", "make", "activate", text)
    assert (code, out) == (2, "")
    assert "write LAYER:EXPERT,EXPERT" in err


@pytest.mark.parametrize(
    ("words", "plan"),
    [
        (("activate", "5:3,17", "8:1", "--strength", "0.25"), Plan.activate({5: [3, 17], 8: [1]}, strength=0.25)),
        (("activate", "5:3", "--strength", "1,0.5"), Plan.activate({5: [3]}, strength=[1.0, 0.5])),
        (("deactivate", "5:3", "5:4"), Plan.deactivate({5: [3, 4]})),
        (("force-on", "5:3", "--weight", "steermoe"), Plan.force_on({5: [3]}, weight="steermoe")),
        (("force-off", "5:3"), Plan.force_off({5: [3]})),
        (("forbid", "5:0-2", "--groups", "a,b"), Plan.forbid({5: [0, 1, 2]}).only(groups=["a", "b"])),
        (("bias", "5:3=0.5"), Plan.bias({5: {3: 0.5}})),
        (("magnitude", "5:3"), Plan.magnitude({5: [3]})),
        (("scale-logits", "5:3", "--strength", "2"), Plan.scale_logits({5: [3]}, strength=2.0)),
        (("scale-weights", "5:3", "--strength", "2"), Plan.scale_weights({5: [3]}, strength=2.0)),
        (("temperature", "--value", "2", "--layers", "4-7"), Plan.temperature(2.0, layers=range(4, 8))),
        (("top-k", "--value", "3", "--phase", "decode"), Plan.top_k(3).only(phase="decode")),
        (
            ("activate", "5:3", "--positions", "0-3", "--absent"),
            Plan.activate({5: [3]}).only(positions=range(4), absent=True),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_plans_are_made(answer: Any, tmp_path: Path, words: tuple[str, ...], plan: Plan) -> None:
    found = answer("plan", "make", *words, "--out", tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert found["hash"] == plan.hash
    assert answer("plan", "show", tmp_path / "plan.json")["hash"] == plan.hash


def test_plans_are_added_and_compared(answer: Any, moe_route: Any, tmp_path: Path) -> None:
    one, two = Plan.activate({5: [3]}), Plan.activate({5: [4]}, strength=0.25)
    one.save(tmp_path / "one.json")
    two.save(tmp_path / "two.safetensors")
    answer(
        "plan",
        "add",
        tmp_path / "one.json",
        tmp_path / "two.safetensors",
        "--times",
        "2",
        "--out",
        tmp_path / "sum.json",
    )
    assert Plan.load(tmp_path / "sum.json") == (one + two) * 2
    changes = answer("plan", "show", tmp_path / "one.json", tmp_path / "two.safetensors")["changes"]
    assert [(change["experts"], change["before"], change["after"]) for change in changes] == [
        ([3], 0.5, None),
        ([4], None, 0.25),
    ]
    _, out, _ = moe_route("plan", "show", tmp_path / "one.json", tmp_path / "one.json")
    assert out.strip() == "the plans are equal"
    code, _, err = moe_route("plan", "show", tmp_path / "none.json")
    assert code == 2
    assert "does not exist" in err


def test_a_plan_of_another_model_is_refused_with_the_command_that_lifts_it(answer: Any, moe_route: Any, tmp_path: Path):
    plan = Plan.activate({5: [3]}).for_model("other", config_hash="a" * 64)
    plan.save(tmp_path / "other.safetensors")
    two = Plan.activate({5: [4]}).for_model("third", config_hash="b" * 64)
    two.save(tmp_path / "third.safetensors")
    steer = ("steer", "--languages", "eng_Latn", "--limit", "2", "--plan")
    refused(moe_route(*steer, tmp_path / "other.safetensors"), "moe-route plan add PLAN --any-model --out FILE")
    files = (tmp_path / "other.safetensors", tmp_path / "third.safetensors")
    refused(moe_route("plan", "add", *files), "made for another model")
    answer("plan", "add", *files, "--any-model", "--out", tmp_path / "any.safetensors")
    assert Plan.load(tmp_path / "any.safetensors") == plan.for_model() + two.for_model()
    answer(*steer, tmp_path / "any.safetensors")


def test_recipes_are_listed_and_made(answer: Any, moe_route: Any, files: dict[str, Path]) -> None:
    names = [entry["name"] for entry in answer("plan", "make")["recipes"]["recipes"]]
    assert "paper/qwen3-30b-a3b/mgsm" in names
    assert "steermoe/gpt-oss-20b/safe" in names
    given = ("--task", files["task"], "--baseline", files["general"], "--group", "eng_Latn")
    code, _, err = moe_route("plan", "make", names[0], *given)
    assert code == 2
    assert "is for Qwen/Qwen3-30B-A3B" in err
    code, _, err = moe_route("plan", "make", "paper/other", *given)
    assert code == 2
    assert "there is no recipe 'paper/other'" in err


def test_a_plan_is_explained(answer: Any, moe_route: Any, files: dict[str, Path], tmp_path: Path) -> None:
    found = answer("plan", "show", files["plan"], "--on", files["general"], "--groups", "eng_Latn")
    assert found["groups"] == ["eng_Latn"]
    assert all(effect["certainty"] == "estimate" for effect in found["effects"])
    code, _, err = moe_route("plan", "show", files["plan"], "--on", files["general"], "--groups", "xyz")
    assert code == 2
    assert "no group 'xyz' was recorded" in err


def test_a_plan_is_swept_and_one_is_learned(answer: Any, files: dict[str, Path], tmp_path: Path) -> None:
    found = answer("steer", "--plan", files["plan"], "--strengths", "1,2", "--controls", "1", *TINY)
    assert found["strengths"] == [1, 2]
    assert [len(row) for row in found["loss"]] == [2, 2]
    out = tmp_path / "learned.json"
    learned = answer("plan", "learn", "--layers", "2-3", "--steps", "2", "--by-group", "--out", out, *TINY)
    assert len(learned["losses"]) == 2
    assert Plan.load(out).hash == learned["plan"]
    assert json.loads(out.read_text())["rules"][0]["groups"]


def test_neighbors_make_a_plan(answer: Any, moe_route: Any, files: dict[str, Path], tmp_path: Path) -> None:
    listed = tmp_path / "good.txt"
    given = ("--solved", files["general"], "--new", files["general"], "--group", "eng_Latn")
    out = tmp_path / "plan.safetensors"
    found = answer("plan", "neighbors", *given, "--neighbors", "2", "--layers", "3", "--out", out)
    assert [len(names) for names in found["neighbors"]] == [2] * 4
    assert Plan.load(out).hash == found["plan"]
    listed.write_text("general-001\nnobody\n")
    code, _, err = moe_route("plan", "neighbors", *given, "--successful", listed)
    assert code == 2
    assert "'nobody' was not recorded" in err


def test_plans_are_shared(answer: Any, moe_route: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(Plan, "push_to_hub", lambda *given, **options: asked.append((given, options)) or "there")
    monkeypatch.setattr(Plan, "from_hub", lambda *given, **options: asked.append((given, options)) or PLAN)
    PLAN.save(tmp_path / "plan.json")
    assert (
        answer("plan", "add", tmp_path / "plan.json", "--out", "hub:me/plans/plan.json", "--private")["out"] == "there"
    )
    answer("plan", "add", "hub:me/plans@v1", "--out", tmp_path / "pulled.json")
    assert asked == [
        ((PLAN, "me/plans", "plan.json"), {"private": True, "revision": None}),
        (("me/plans", "plan.safetensors"), {"revision": "v1"}),
    ]
    assert Plan.load(tmp_path / "pulled.json") == PLAN


PLAN = Plan.forbid({1: [2]})


def test_a_plan_that_reaches_nothing_says_so_in_a_line(moe_route, tmp_path: Path):
    Plan.activate({0: [1]}).only(phase="decode").save(tmp_path / "plan.json")
    texts = ("--languages", "eng_Latn,deu_Latn", "--limit", "2", "--batch-size", "2")
    steer = ("steer", "--plan", tmp_path / "plan.json")
    record = ("record", "--out", tmp_path / "a.safetensors", "--plan", tmp_path / "plan.json")
    folder = ("record", "--out", tmp_path / "folder", "--plan", tmp_path / "plan.json")
    report = ("report", "--out", tmp_path / "a.html", "--plan", tmp_path / "plan.json")
    twice = (*steer, *texts, "--strengths", "1,2")
    # the folder is complete when it is recorded again: what it holds is looked at
    for command in (
        (*steer, *texts),
        twice,
        (*record, *texts),
        (*folder, *texts),
        (*folder, *texts),
        (*report, *texts),
    ):
        code, _, err = moe_route(*command)
        assert code == 0
        (line,) = [line for line in err.splitlines() if "reached no token" in line]
        assert line.startswith("moe-route: ")
        assert "phase prefill" in line
