"""Map each image patch to the token it is merged into, so that vision-tower routers can use that token's labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["placeholder_ids", "tokens_of_patches"]

_NAMES = ("image_token_id", "video_token_id")


def placeholder_ids(model: nn.Module) -> tuple[int, ...]:
    """Token ids that stand for pictures and videos in a text, from the model's configuration."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _NAMES)
    return tuple(token for token in found if isinstance(token, int))


def tokens_of_patches(ids: Tensor | None, placeholders: Sequence[int], num_patches: int) -> Tensor | None:
    """int64 [P]: for each of P patches, the index of the call's token that it becomes part of, in row-major order.

    Patches come in the order of the placeholder tokens in `ids`, equally many for each. None unless exactly one kind of
    placeholder divides the number of patches evenly.
    """
    if ids is None:
        return None
    fitting = []
    for token in placeholders:
        places = (ids.flatten() == token).nonzero().flatten()
        if len(places) and num_patches % len(places) == 0:
            fitting.append(places)
    return torch.repeat_interleave(fitting[0], num_patches // len(fitting[0])) if len(fitting) == 1 else None
