"""Steering: which experts, what is done to them, and the tables that carry it into ``route``.

``ExpertSelection`` says which experts; ``Plan`` says what is done to them, where and when; ``Plan.compile`` turns it
into one ``SteeringTables`` per layer (``TokenSteering`` where a rule looks at more than a token's row) and a lookup
from (phase, group, position) to the row of a token.
"""

from moe_route.steering.compiled import CompiledPlan, LayerShape
from moe_route.steering.model import PlanError, PlanModel
from moe_route.steering.plan import Plan
from moe_route.steering.rule import Rule
from moe_route.steering.selection import ExpertSelection
from moe_route.steering.token_steering import TokenSteering

__all__ = [
    "CompiledPlan",
    "ExpertSelection",
    "LayerShape",
    "Plan",
    "PlanError",
    "PlanModel",
    "Rule",
    "TokenSteering",
]
