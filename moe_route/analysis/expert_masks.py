"""Choose experts by scores [layer, expert], as bool arrays of the same shape. Ties go to the lower layer and expert."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.measures import places
from moe_route.steering.layers import as_layers

__all__ = ["above", "first", "in_layers", "largest"]


def above(values: np.ndarray, threshold: float, top: int | None = None) -> np.ndarray:
    """Experts whose score is above the threshold and, with ``top``, among the largest of the layer."""
    if not np.isfinite(threshold):
        raise AnalysisError(f"threshold must be a number, not {threshold}")
    chosen = np.nan_to_num(values, nan=-np.inf) > threshold
    return chosen if top is None else chosen & largest(values, top)


def largest(values: np.ndarray, top: int) -> np.ndarray:
    """The ``top`` experts of each layer with the largest scores."""
    if top < 1:
        raise AnalysisError(f"top must be 1 or more, not {top}")
    return places(np.nan_to_num(values, nan=-np.inf)) < top


def first(values: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` experts of all layers together with the largest positive scores."""
    order = np.argsort(-np.nan_to_num(values), axis=None, kind="stable")[:count]
    chosen = np.zeros(values.size, dtype=bool)
    chosen[order] = True
    return chosen.reshape(values.shape) & (values > 0)


def in_layers(layers_in_all: int, layers: Iterable[int] | None) -> np.ndarray:
    """bool [layer, 1]: the layers named; all if None."""
    kept = np.ones((layers_in_all, 1), dtype=bool)
    if layers is not None:
        numbers = as_layers(layers)
        if not numbers or numbers[-1] >= layers_in_all:
            raise AnalysisError(f"layers must name some of the {layers_in_all} layers (0-{layers_in_all - 1})")
        kept[:] = False
        kept[list(numbers)] = True
    return kept
