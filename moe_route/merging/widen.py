"""WIDEN: weights of each column by how far it moved in size and in direction (arXiv 2408.03092)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["widen"]


def widen(base: Tensor, differences: Tensor) -> Tensor:
    """Merge the differences of several models from one matrix.

    Args:
        base: float32 [out, in], or a vector [n].
        differences: float32 [models, out, in], or [models, n].

    For a matrix, each model ranks the columns by the change of their norm and by the change of their direction. A rank
    above the model's mean gives weight 1, another one the softmax over the models; both weights are averaged. For a
    vector, the sizes of the differences take the place of the ranks. Weights need not add up to 1.
    """
    if base.dim() < 2:
        return base + (_weights(differences.abs()) * differences).sum(0)
    models = base + differences
    before, after = base.norm(dim=0), models.norm(dim=1)
    cosine = (models * base).sum(1) / (before * after).clamp(min=1e-12)
    same = (differences == 0).all(1)
    turned = torch.where(same, 0.0, 1.0 - cosine)
    weights = (_weights(_ranks((after - before).abs())) + _weights(_ranks(turned))) / 2
    return base + (weights[:, None] * differences).sum(0)


def _ranks(changes: Tensor) -> Tensor:
    """[models, columns]: rank of each column in its model, divided by the number of columns; ties in order."""
    number = changes.shape[1]
    ranks = torch.empty_like(changes)
    values = (torch.arange(number, dtype=changes.dtype) / number).expand_as(changes)
    return ranks.scatter_(1, changes.argsort(dim=1, stable=True), values)


def _weights(importance: Tensor) -> Tensor:
    return torch.where(importance > importance.mean(1, keepdim=True), 1.0, importance.softmax(0))
