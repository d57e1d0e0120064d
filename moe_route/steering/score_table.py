"""``ScoreTable``: router scores for each token of some sequences, to replace the router's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from moe_route.steering.model import PlanError
from moe_route.steering.sequence_table import Item, SequenceTable, as_keys, layer_order

__all__ = ["ScoreTable"]


class ScoreTable(SequenceTable):
    """Given scores, as float32 ``[n, L, E]``: those of each token; a row of NaN has no scores."""

    field: ClassVar[str] = "scores"
    does: ClassVar[str] = "replaces scores"
    __slots__ = ()

    @staticmethod
    def _checked(values: np.ndarray) -> np.ndarray:
        if values.ndim != 3 or values.dtype.kind not in "fiuO" or not values.size:
            raise PlanError(
                f"there are no scores: they must be numbers of tokens, layers and experts, not {values.dtype} "
                f"{list(values.shape)}"
            )
        with np.errstate(over="ignore"):
            kept = values.astype(np.float32, order="C")  # None, as NaN is written in JSON, becomes NaN
        missing = np.isnan(kept)
        wrong = (missing.any(2) & ~missing.all(2)) | np.isinf(kept).any(2) | (np.nan_to_num(kept) < 0).any(2)
        wrong |= (kept == 0).all(2)
        if wrong.any():
            token, layer = np.argwhere(wrong)[0]
            raise PlanError(
                f"the scores of token {token}, layer {layer} of the table must be finite, 0 or more, and one of them "
                "above 0; a row of NaN leaves the token to the router"
            )
        kept.flags.writeable = False
        return kept

    @staticmethod
    def _has_value(values: np.ndarray) -> np.ndarray:
        return ~np.isnan(values[:, :, 0])

    @staticmethod
    def _renamed(values: np.ndarray, to: np.ndarray) -> np.ndarray:
        renamed = values.copy()
        renamed[:, to] = values[:, : len(to)]
        return renamed

    @staticmethod
    def _largest(values: np.ndarray) -> int:
        return int(np.nonzero(np.nan_to_num(values).any(0))[0].max())

    @classmethod
    def of_scores(
        cls,
        scores: Any,
        layers: Sequence[int] | None = None,
        items: Sequence[Item] | None = None,
        *,
        per: str = "token",
    ) -> ScoreTable:
        """Scores by token, ``[B, T, L, E]`` (``[T, L, E]`` of one sequence), or by sequence, ``[B, L, E]``."""
        array = np.asarray(scores.detach().cpu() if hasattr(scores, "detach") else scores)
        if per not in ("token", "sequence"):
            raise PlanError(f'scores are per "token" or per "sequence", not {per!r}')
        shape = "[batch, tokens, layers, experts] (or [tokens, layers, experts] of one sequence)"
        dims: tuple[int, ...] = (3, 4)
        if per == "sequence":
            shape, dims = "[batch, layers, experts]", (3,)
        if array.dtype.kind not in "fiu" or array.ndim not in dims:
            raise PlanError(
                f"replace_scores takes {{layer: {{expert: score}}}}, or scores per {per} {shape}, not {array.dtype} "
                f"{list(array.shape)}"
            )
        batch = array.shape[0] if array.ndim == 4 or per == "sequence" else 1
        flat = array.reshape(-1, *array.shape[-2:])
        names, order = layer_order(layers, flat.shape[1], "scores")
        lengths = [len(flat) // batch if batch else 0] * batch
        return cls(flat[:, order], lengths, names, as_keys(items), constant=per == "sequence")
