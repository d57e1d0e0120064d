"""Two plans compared, and plans as JSON that people edit."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import pytest
import torch

from moe_route.steering import ExpertSelection, Plan


def test_changes_are_told_expert_by_expert() -> None:
    before = Plan.activate({3: [1, 2], 5: [7]}, strength=0.5) + Plan.forbid({2: [0]})
    after = Plan.activate({3: [1, 2], 5: [8]}, strength=0.5) + Plan.activate({3: [2]}, strength=0.25) + Plan.top_k(4)
    found = {(c.kind, c.layer, c.experts): (c.before, c.after) for c in before.diff(after).changes}
    assert found == {
        ("forbid", 2, (0,)): ("yes", None),
        ("activate (population)", 3, (2,)): (0.5, 0.75),
        ("activate (population)", 5, (7,)): (0.5, None),
        ("activate (population)", 5, (8,)): (None, 0.5),
        ("top_k", None, ()): (None, 4.0),
    }
    assert "every" in repr(before.diff(after))
    assert json.dumps(before.diff(after).to_dict())


def test_the_same_effect_is_no_difference() -> None:
    one = Plan.bias({1: [2]}, strength=0.5) + Plan.bias({1: [2]}, strength=0.25)
    other = Plan.bias({1: [2]}, strength=0.75)
    assert not one.diff(other)
    assert repr(one.diff(other)) == "the plans are equal"
    assert one.diff(other.only(groups="x")).changes[0].where == ""
    factors = Plan.scale_weights({1: [2]}, strength=2.0) + Plan.scale_weights({1: [2]}, strength=3.0)
    assert not factors.diff(Plan.scale_weights({1: [2]}, strength=6.0))


def test_another_model_and_other_tables_are_told() -> None:
    plan = Plan.forbid(ExpertSelection({0: [1]}, num_experts=[8]))
    assert plan.diff(plan.for_model()).model == ("a model (1 MoE layers of 8 experts)", "any model")
    ids = torch.arange(12).reshape(1, 3, 2, 2)
    changes = Plan.replay(ids).diff(Plan.replay(ids.flip(-1))).changes
    assert len(changes) == 1
    assert changes[0].before != changes[0].after


def test_json_has_a_line_for_each_layer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "plan.json"
    plan = Plan.activate({layer: [1, 2, 3] for layer in range(4)}, strength=0.5) + Plan.temperature(2.0)
    plan.save(path)
    lines = path.read_text().splitlines()
    assert '        "2": [1, 2, 3],' in lines
    edited = [line.replace("[1, 2, 3]", "[1, 2, 9]") if '"2"' in line else line for line in lines]
    path.write_text("\n".join(edited))
    again = Plan.load(path)
    assert "was edited" in caplog.text
    assert [c.experts for c in plan.diff(again).changes] == [(3,), (9,)]
    again.save(path)
    changed = [line for line in difflib.unified_diff(lines, path.read_text().splitlines(), n=0) if line[0] in "+-"]
    assert len(changed) == 2 + 2 + 2  # names of the files, the hash, the layer


def test_json_of_tables_keeps_a_line_for_each_token(tmp_path: Path) -> None:
    plan = Plan.replay(torch.arange(12).reshape(3, 2, 2))
    plan.save(tmp_path / "plan.json")
    assert "[0, 1]," in (tmp_path / "plan.json").read_text()
    assert Plan.load(tmp_path / "plan.json") == plan
