"""Tell which tokens of a call are real, from any form of attention mask."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def valid_tokens(mask: object, batch: int, length: int, past: int) -> Tensor | None:
    """bool [B, S]: which tokens are real, from any form of attention mask; None where the mask excludes none.

    Forms: None; [B, past + S]; 4-D bool or additive float; a dict of those by kind of attention. Raises `ValueError`
    for any other mask.
    """
    if mask is not None and isinstance(mask, Mapping):
        mask = _full_attention(mask)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        if length == 1 and past > 0:
            return None
        raise ValueError(
            f"an attention_mask of type {type(mask).__name__} does not say which tokens are padding. "
            'Pass the 2-D mask [batch, length], or load the model with attn_implementation="sdpa".'
        )
    if mask.dim() == 2:
        if mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {length} tokens; pass [batch, past + length]"
            )
        return _rows(mask[:, mask.shape[1] - length :].bool(), batch)
    if length == 1 and past > 0:
        return None  # a generated token attends at least to itself
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if allowed.dim() == 4:
        allowed = allowed[:, 0]
    keys = allowed.shape[-1]
    first = past if past + length <= keys else keys - length
    # A real token attends to itself, and a padding token is masked in its own column. This holds for full and for
    # sliding attention.
    return _rows(allowed[:, :, first : first + length].diagonal(dim1=1, dim2=2), batch)


def _full_attention(masks: Mapping[str, object]) -> object:
    """From a dict of masks by kind of attention, the mask that shows padding best."""
    flat = next((m for m in masks.values() if isinstance(m, Tensor) and m.dim() == 2), None)
    if flat is not None:
        return flat
    full = masks.get("full_attention")
    return full if full is not None else next((m for m in masks.values() if m is not None), None)


def _rows(valid: Tensor, batch: int) -> Tensor:
    return valid.expand(batch, -1) if valid.shape[0] == 1 else valid


def all_or_mask(valid: Tensor | None) -> Tensor | None:
    """None for a mask that is all true, if that can be found without waiting for a device."""
    if valid is not None and valid.device.type == "cpu" and bool(valid.all()):
        return None
    return valid
