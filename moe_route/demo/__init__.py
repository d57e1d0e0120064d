"""The demonstration: record, analyze and steer a small real model in a minute or two. See `demo`."""

from moe_route.demo.circle import demo
from moe_route.demo.report import DemoReport, Outcome

__all__ = ["DemoReport", "Outcome", "demo"]
