"""Ceilings of the walks that a newcomer takes through the package."""

from __future__ import annotations

from harness.tiny_models import tiny_model
from walks import rooms, walk

import moe_route as mr


def test_attach_enters_few_modules() -> None:
    mr.attach(tiny_model("olmoe")).detach()  # what is made once
    stops = walk(lambda: mr.attach(tiny_model("olmoe")))
    assert {"routed", "patching.attachment", "routers.discovery"} <= set(stops)
    assert len(set(stops)) <= 20
    assert len(rooms(stops)) <= 10
