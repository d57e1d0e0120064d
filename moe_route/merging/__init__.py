"""Merging fine-tunes of one Mixture-of-Experts model: layers, experts, or all weights, expert by expert.

Models, state dicts and folders of safetensors go in. Out comes a `Merged`, whose tensors are computed one at a time.
"""

from moe_route.merging.checkpoint import Checkpoint, Merged
from moe_route.merging.difference import Change, Difference, difference
from moe_route.merging.methods import METHODS, merge
from moe_route.merging.swapping import swap_experts, swap_layers

__all__ = [
    "METHODS",
    "Change",
    "Checkpoint",
    "Difference",
    "Merged",
    "difference",
    "merge",
    "swap_experts",
    "swap_layers",
]
