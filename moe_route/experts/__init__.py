"""An experts implementation for transformers, made of this library's dispatch, grouped products and combine."""

from moe_route.experts.interface import ExpertsSwitch, experts_implementations, register_experts

__all__ = ["ExpertsSwitch", "experts_implementations", "register_experts"]
