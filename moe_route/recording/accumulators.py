"""Add up arrays per group from the choices of every call, beside the tables of the gate.

`accumulated.ACCUMULATED` lists these arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from moe_route.recording.accumulated import ACCUMULATED
from moe_route.recording.choices import ChoiceObserver
from moe_route.recording.sequences import RunningSequences
from moe_route.recording.tables import RecordedRouter

__all__ = ["Accumulator"]


class Accumulator(ChoiceObserver):
    """Adds up arrays per group from the choices of every call.

    A subclass names its arrays. Token sums are added in ``take``, to the tensors that ``table`` gives, without waiting
    for the device. Sums over finished sequences are added in ``end_sequences``, by ``add_rows``.
    """

    def __init__(self, routers: Sequence[RecordedRouter], groups: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Prepare the arrays. ``shapes``: name from ``ACCUMULATED`` -> shape of the axes after group and layer."""
        self.routers = tuple(routers)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._capacity = groups
        self._tables: dict[tuple[str, int], Tensor] = {}
        self._rows: dict[str, np.ndarray] = {}  # sums that are on the host, [groups, L, ...]

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        self._reserve(groups)

    def table(self, name: str, layer: int, device: torch.device) -> Tensor:
        """The array of one layer (or pair of layers), ``[groups, ...]`` on ``device``; zeros at first.

        Add to it in place, and do not keep it: it is replaced when there are more groups, or the layer moves.
        """
        key = (name, layer)
        found = self._tables.get(key)
        if found is None:
            self._tables[key] = found = self._zeros(name, self._capacity, device)
        elif found.device != device:
            self._tables[key] = self._zeros(name, len(found), device).copy_(found)
            found = self._tables[key]
        return found

    @torch.inference_mode(False)  # the tables outlive the inference mode in which a model may be called
    def _zeros(self, name: str, groups: int, device: torch.device) -> Tensor:
        return torch.zeros((groups, *self._shapes[name]), dtype=_DTYPES[ACCUMULATED[name].dtype], device=device)

    def add_rows(self, name: str, groups: np.ndarray, rows: np.ndarray) -> None:
        """Add row i of ``rows [n, L, ...]``, which are on the host, to group ``groups[i]``."""
        of = ACCUMULATED[name]
        if name not in self._rows:
            shape = (self._capacity, of.rows(len(self.routers)), *self._shapes[name])
            self._rows[name] = np.zeros(shape, of.dtype)
        (np.maximum if of.merge == "max" else np.add).at(self._rows[name], groups, rows)

    def _reserve(self, groups: int) -> None:
        if groups <= self._capacity:
            return
        for (name, layer), table in self._tables.items():
            wide = self._zeros(name, groups, table.device)
            wide[: len(table)] = table
            self._tables[name, layer] = wide
        for name, sums in self._rows.items():
            room = np.zeros((groups - len(sums), *sums.shape[1:]), sums.dtype)
            self._rows[name] = np.concatenate([sums, room])
        self._capacity = groups

    def arrays(self, groups: int) -> dict[str, np.ndarray]:
        """The sums so far, name -> ``[groups, L, ...]`` (or pairs of layers, L - 1). Waits for the device."""
        found = {}
        for name, shape in self._shapes.items():
            rows = ACCUMULATED[name].rows(len(self.routers))
            found[name] = np.zeros((groups, rows, *shape), ACCUMULATED[name].dtype)
        for (name, layer), table in self._tables.items():
            known = min(groups, len(table))
            found[name][:known, layer] = table[:known].cpu().numpy()
        for name, sums in self._rows.items():
            found[name][:] = sums[:groups]
        return found


_DTYPES = {"int64": torch.int64, "float64": torch.float64}
