"""The demonstration: record, analyze and steer a small real model in a minute. See `demo`."""

from moe_route.demo.circle import demo
from moe_route.demo.report import DemoReport, Finding

__all__ = ["DemoReport", "Finding", "demo"]
