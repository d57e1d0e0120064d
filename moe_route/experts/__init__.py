"""An experts implementation for transformers, made of this library's dispatch, grouped products and combine."""

from moe_route.experts.interface import ExpertsSwitch, experts_implementations, register_experts
from moe_route.experts.outputs import NoExpertOutputsError

__all__ = ["ExpertsSwitch", "NoExpertOutputsError", "experts_implementations", "register_experts"]
