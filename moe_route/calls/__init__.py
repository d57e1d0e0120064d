"""One forward call of a model: its tokens, phase, padding and labels. Knows no router and changes no model."""

from moe_route.calls.call import PHASES, Call, Phase
from moe_route.calls.token_table import Labels

__all__ = ["PHASES", "Call", "Labels", "Phase"]
