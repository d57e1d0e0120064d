"""Ceilings of the walks that a newcomer takes through the package."""

from __future__ import annotations

from harness.tiny_models import tiny_model
from walks import rooms, walk

import moe_route as mr


def test_attach_enters_few_modules() -> None:
    mr.attach(tiny_model("olmoe")).detach()  # what is made once
    stops = walk(lambda: mr.attach(tiny_model("olmoe")))
    assert {"routed", "patching.attachment", "routers.discovery"} <= set(stops)
    assert len(set(stops)) <= 22
    assert len(rooms(stops)) <= 10


def test_a_rule_becomes_the_table_of_the_kernel_in_six_modules() -> None:
    routed = mr.attach(tiny_model("olmoe"))
    routers = routed.routers
    stops = set(walk(lambda: mr.Plan.activate({0: [1]}).compile(routers)))
    routed.detach()
    way = {"steering.plan", "steering.rule", "steering.kinds", "steering.compile", "steering.cell", "contract.tables"}
    assert stops == way | {
        "steering.model",
        "base.identity",
        "base.files",
    }  # whether the plan is for this model, and its hash
