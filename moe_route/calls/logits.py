"""Ask a model for the logits of few positions."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

__all__ = ["fewer_logits"]


def fewer_logits(model: nn.Module, positions: Tensor) -> dict[str, Any]:
    """Arguments with which ``model`` computes logits at ``positions`` alone, int64 [P]; none if it always computes all.

    Every token runs through every layer in either case. Fewer positions save the product with the vocabulary, which
    costs a small model as much as its layers.
    """
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    # A tensor, because some models (Gemma 4) drop tokens from their last layers for a number; on the CPU, whose indices
    # fit hidden states on every device.
    return {"logits_to_keep": positions.cpu()}
