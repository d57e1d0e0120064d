"""Selections as JSON that a person can edit."""

from __future__ import annotations

import json

import pytest

from moe_route.base import files
from moe_route.steering import ExpertSelection, PlanModel

SELECTION = ExpertSelection(
    {2: [3, 1], 5: [0]},
    scores={2: {1: 0.45, 3: 0.5}},
    threshold=0.4,
    description="made by hand",
    model=PlanModel("a model", "abc", (8,) * 6),
)


def test_json_is_read_as_it_was_written_and_as_it_was_edited(tmp_path):
    path = tmp_path / "experts.json"
    SELECTION.save(path)
    assert '    "2": [1, 3],\n' in path.read_text()
    assert ExpertSelection.load(path).to_dict() == SELECTION.to_dict()
    content = json.loads(path.read_text())
    content["experts"] = {"2": [1, 7], "0": [4]}
    path.write_text(json.dumps(content))
    edited = ExpertSelection.load(path)
    assert edited == {0: (4,), 2: (1, 7)}
    assert edited.scores == {2: {1: 0.45}}, "only experts that stayed have scores"
    assert edited.model == SELECTION.model
    path.write_text('{"moe_route": "selection", "schema": 2, "experts": {"1": [2]}}')
    assert ExpertSelection.load(path) == {1: (2,)}, "the experts alone are enough"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a selection"),
        ('{"moe_route": "plan", "schema": 2}', "is not a selection"),
        ('{"moe_route": "selection", "schema": 99}', "upgrade moe-route"),
        ('{"moe_route": "selection", "schema": 2}', 'lacks "experts"'),
        ('{"moe_route": "selection", "schema": 2, "experts": {"first": [1]}}', r"experts\.first"),
        ('{"moe_route": "selection", "schema": 2, "experts": {"0": ["1"]}}', r"experts\.0\[0\] is"),
        ('{"moe_route": "selection", "schema": 2, "experts": {"0": [9]}, "num_experts": 8}', "has 8 experts"),
    ],
)
def test_other_json_is_refused(tmp_path, text, message):
    path = tmp_path / "experts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        ExpertSelection.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(files.FileRefusedError, match="does not exist"):
        ExpertSelection.load(tmp_path / "experts.json")
