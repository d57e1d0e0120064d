"""Steering: experts, the changes made to them, and the tables that carry these changes into ``route``.

``ExpertSelection`` is a set of experts. ``Plan`` says what is done to them, where and when. ``Plan.compile`` makes one
``SteeringTables`` per layer, or ``TokenTables`` where a rule depends on more than a token's row. It also makes the
lookup from (phase, group, position) to the row of a token.
"""

from moe_route.steering.cell import LayerShape
from moe_route.steering.compile import CompiledPlan
from moe_route.steering.explain import PlanChange, PlanDifference, PlanExplanation, RuleEffect
from moe_route.steering.learned import LearnedRouting
from moe_route.steering.model import PlanError, PlanModel
from moe_route.steering.plan import Plan
from moe_route.steering.reach import Reach
from moe_route.steering.rule import Rule
from moe_route.steering.selection import ExpertSelection

__all__ = [
    "CompiledPlan",
    "ExpertSelection",
    "LayerShape",
    "LearnedRouting",
    "Plan",
    "PlanChange",
    "PlanDifference",
    "PlanError",
    "PlanExplanation",
    "PlanModel",
    "Reach",
    "Rule",
    "RuleEffect",
]
