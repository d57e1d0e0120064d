"""``ExpertSelection``: a set of (layer, expert) pairs, with the scores by which they were selected."""

from __future__ import annotations

import os
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from operator import index
from typing import Any

import numpy as np

from moe_route.base import files
from moe_route.base.schema import Kind, Natural
from moe_route.base.table import Table, data_frame, number_of, printable
from moe_route.steering.layers import as_layers, show_numbers
from moe_route.steering.model import PlanFileError, PlanModel

_KIND = "selection"
_SHOWN = 16  # number of layers that repr lists


@dataclass(frozen=True)
class SelectionContent:
    """A selection of experts.

    Attributes:
        experts: MoE layer, counted from 0 -> experts.
        scores: layer -> expert -> score by which it was selected; may be missing or partial.
        threshold: that was applied to the scores.
        description: where the selection comes from, on one line.
        num_experts: experts per layer, one number for all layers or one for each.
        model: the model that the selection is for; without it, any model.
    """

    experts: Mapping[Natural, tuple[Natural, ...]]
    scores: Mapping[Natural, Mapping[Natural, float]] = field(default_factory=dict)
    threshold: float | None = None
    description: str = ""
    num_experts: Natural | tuple[Natural, ...] | None = None
    model: PlanModel = field(default_factory=PlanModel)


SELECTION = Kind(_KIND, SelectionContent)
"""Files of selections."""


def random_permutation(seed: int, layer: int, num_experts: int) -> np.ndarray:
    """int64 [num_experts]: a permutation that depends only on seed, layer and number of experts.

    Renaming experts by it maps any set of n experts to a uniformly random set of n experts of the layer.
    """
    return np.random.Generator(np.random.PCG64([index(seed), layer, num_experts])).permutation(num_experts)


class ExpertSelection(Mapping[int, tuple[int, ...]]):
    """Immutable mapping from layer (index among the MoE layers) to the selected experts, in increasing order.

    Iterating yields the layers with at least one expert; ``len`` is the number of selected *experts*. Selections
    combine like sets of (layer, expert) pairs: ``|``, ``&``, ``-``, ``^``.

    Args:
        experts: layer -> expert ids.
        scores: layer -> {expert: score}, the values by which experts were selected; may be missing or partial.
        threshold: the threshold that was applied to the scores.
        description: the origin of the selection, on one line.
        num_experts: experts per layer, one int for all layers or a sequence over layers. ``random_like`` needs it, and
            ids are checked against it.
        model: the model that the selection was made for; plans made from the selection inherit it.

    Raises ``ValueError`` for a layer or expert out of range.
    """

    _experts: dict[int, tuple[int, ...]]
    _scores: dict[tuple[int, int], float]
    description: str
    model: PlanModel
    num_experts: int | tuple[int, ...] | None
    threshold: float | None
    __slots__ = ("_experts", "_scores", "description", "model", "num_experts", "threshold")

    def __init__(
        self,
        experts: Mapping[int, Iterable[int]],
        *,
        scores: Mapping[int, Mapping[int, float]] | None = None,
        threshold: float | None = None,
        description: str = "",
        num_experts: int | Sequence[int] | None = None,
        model: PlanModel | None = None,
    ) -> None:
        chosen = {as_layers(layer)[0]: {index(expert) for expert in ids} for layer, ids in experts.items()}
        self._experts = {layer: tuple(sorted(chosen[layer])) for layer in sorted(chosen) if chosen[layer]}
        self.model = _model(model, num_experts)
        self.num_experts = self.model.num_experts if num_experts is None else _shape(num_experts)
        self.threshold = None if threshold is None else float(threshold)
        self.description = str(description)
        self._check_range()
        given = {as_layers(layer)[0]: of_layer for layer, of_layer in (scores or {}).items()}
        self._scores = {
            (layer, expert): float(given[layer][expert])
            for layer, expert in self.pairs
            if expert in given.get(layer, {})
        }

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(self, name):
            raise AttributeError("a selection is immutable: make a new one")
        object.__setattr__(self, name, value)

    def _check_range(self) -> None:
        for layer, ids in self._experts.items():
            size = self.experts_in(layer)
            if ids[0] < 0 or (size is not None and ids[-1] >= size):
                wrong = ids[0] if ids[0] < 0 else ids[-1]
                limit = "" if size is None else f": layer {layer} has {size} experts (0-{size - 1})"
                raise ValueError(f"layer {layer} has no expert {wrong}{limit}")

    def experts_in(self, layer: int) -> int | None:
        """Number of experts of ``layer``, or None if unknown; ``ValueError`` for a layer that the model lacks."""
        if self.num_experts is None or isinstance(self.num_experts, int):
            return self.num_experts
        if layer >= len(self.num_experts):
            raise ValueError(
                f"there is no layer {layer}: the model has {len(self.num_experts)} MoE layers "
                f"(0-{len(self.num_experts) - 1}); numbers of a publication may count from 1"
            )
        return self.num_experts[layer]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Every selected (layer, expert), in order."""
        return tuple((layer, expert) for layer, ids in self._experts.items() for expert in ids)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers with at least one selected expert."""
        return tuple(self._experts)

    @property
    def counts(self) -> dict[int, int]:
        """Number of selected experts per layer."""
        return {layer: len(ids) for layer, ids in self._experts.items()}

    @property
    def scores(self) -> dict[int, dict[int, float]]:
        """layer -> {expert: score}, for the selected experts that have a score."""
        return _scores_by_layer(self._scores)

    def to_pandas(self) -> Any:
        """Return a data frame with a row per expert: ``layer``, ``expert`` and ``score`` (NaN without one)."""
        layer, expert = zip(*self.pairs, strict=True) if self else ((), ())
        scores = [self._scores.get(pair, float("nan")) for pair in self.pairs]
        return data_frame({"layer": layer, "expert": expert, "score": scores})

    def __getitem__(self, layer: int) -> tuple[int, ...]:
        return self._experts[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._experts)

    def __len__(self) -> int:
        return sum(map(len, self._experts.values()))

    # the views of a plain dict, because those of Mapping take their length from __len__
    def keys(self) -> KeysView[int]:
        return self._experts.keys()

    def values(self) -> ValuesView[tuple[int, ...]]:
        return self._experts.values()

    def items(self) -> ItemsView[int, tuple[int, ...]]:
        return self._experts.items()

    def __eq__(self, other: object) -> bool:
        """Whether the experts are equal; scores, threshold and description are ignored."""
        if isinstance(other, ExpertSelection):
            return self._experts == other._experts
        return self._experts == other

    def __hash__(self) -> int:
        return hash(self.pairs)

    def __or__(self, other: Mapping[int, Iterable[int]]) -> ExpertSelection:
        return self._combine(other, "|", set.union)

    def __and__(self, other: Mapping[int, Iterable[int]]) -> ExpertSelection:
        return self._combine(other, "&", set.intersection)

    def __sub__(self, other: Mapping[int, Iterable[int]]) -> ExpertSelection:
        return self._combine(other, "-", set.difference)

    def __xor__(self, other: Mapping[int, Iterable[int]]) -> ExpertSelection:
        return self._combine(other, "^", set.symmetric_difference)

    def _combine(
        self,
        other: Mapping[int, Iterable[int]],
        symbol: str,
        operation: Callable[[set[tuple[int, int]], set[tuple[int, int]]], set[tuple[int, int]]],
    ) -> ExpertSelection:
        if not isinstance(other, Mapping):
            return NotImplemented
        right = other if isinstance(other, ExpertSelection) else ExpertSelection(other)
        pairs = operation(set(self.pairs), set(right.pairs))
        names = [side.description for side in (self, right)]
        return ExpertSelection(
            _by_layer(pairs),
            scores=_scores_by_layer({**right._scores, **self._scores}),
            threshold=self.threshold if self.threshold == right.threshold else None,
            description=f"({names[0]}) {symbol} ({names[1]})" if all(names) else "",
            num_experts=self.num_experts if right.num_experts is None else right.num_experts,
            model=self.model.merged(right.model),
        )

    def _with(
        self, experts: Mapping[int, Iterable[int]], description: str, keep_scores: bool = True
    ) -> ExpertSelection:
        return ExpertSelection(
            experts,
            scores=self.scores if keep_scores else None,
            threshold=self.threshold if keep_scores else None,
            description=description,
            num_experts=self.num_experts,
            model=self.model,
        )

    def restrict(self, layers: Iterable[int]) -> ExpertSelection:
        """The part of the selection in ``layers``."""
        kept = set(as_layers(layers))
        return self._with({layer: ids for layer, ids in self.items() if layer in kept}, self.description)

    def random_like(self, seed: int = 0, *, num_experts: int | Sequence[int] | None = None) -> ExpertSelection:
        """Random control: as many experts in each layer, drawn without replacement from all experts of the layer.

        The draw of a layer depends only on ``seed``, the layer and its number of experts. ``num_experts`` is needed if
        the selection does not hold it.
        """
        known = self if num_experts is None else ExpertSelection(self, num_experts=num_experts)
        drawn = {}
        for layer, ids in self.items():
            size = known.experts_in(layer)
            if size is None:
                raise ValueError("how many experts the layers have is not known: pass num_experts")
            drawn[layer] = random_permutation(seed, layer, size)[list(ids)].tolist()
        return known._with(drawn, f"random control (seed {seed}) of: {self.description or 'a selection'}", False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content, from which ``from_dict`` makes an equal selection."""
        return {
            "experts": {str(layer): list(ids) for layer, ids in self.items()},
            "scores": {str(layer): {str(e): s for e, s in of.items()} for layer, of in self.scores.items()},
            "threshold": self.threshold,
            "description": self.description,
            "num_experts": list(self.num_experts) if isinstance(self.num_experts, tuple) else self.num_experts,
            "model": self.model.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ExpertSelection:
        """Rebuild a selection from ``to_dict``; raises ``ValueError`` for anything else."""
        return cls._of_content(content, "the selection", ValueError)

    @classmethod
    def _of_content(cls, content: Any, source: str, error: type[ValueError]) -> ExpertSelection:
        said = SELECTION.read(content, source, error)
        try:
            return cls(**vars(said))
        except ValueError as problem:
            raise error(f"{source}: {problem}") from problem

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the selection to ``path``, whole or not at all.

        A name that ends in ".json" gives JSON, to read, compare and edit; any other name gives safetensors.
        """
        if files.is_json(path):
            files.write_json(path, self.to_dict(), _KIND)
        else:
            files.write(path, {}, self.to_dict(), _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExpertSelection:
        """Read a file that ``save`` wrote; its name tells the format. JSON may have been edited.

        Experts that were added by hand have no score. Raises ``files.FileRefusedError`` for a file that is not a
        selection, and ``PlanFileError``, which is one, for keys, values and experts that it cannot have.
        """
        content = files.read_json(path, _KIND) if files.is_json(path) else files.read(path, _KIND)[1]
        return cls._of_content(content, os.fspath(path), PlanFileError)

    def __repr__(self) -> str:
        title, rows, rest = self._shown()
        lines = [title, *(f"  layer {layer}: {experts}" for layer, experts in rows), *([f"  {rest}"] if rest else [])]
        return printable("\n".join(lines))

    def _repr_html_(self) -> str:
        title, rows, rest = self._shown()
        return Table(("layer", "experts (score)"), rows, title, rest)._repr_html_()

    def _shown(self) -> tuple[str, list[tuple[str, str]], str]:
        """Content to show: title, (layer, experts with scores) for the first layers, and a note on omitted ones."""
        if not self:
            return f"ExpertSelection(empty{_note(self)})", [], ""
        title = f"ExpertSelection({number_of(len(self), 'expert')} in {_layers(self.layers)}{_note(self)})"
        rows = [
            (
                str(layer),
                ", ".join(f"{e} ({self._scores[layer, e]:.3f})" if (layer, e) in self._scores else str(e) for e in ids),
            )
            for layer, ids in list(self.items())[:_SHOWN]
        ]
        rest = len(self.layers) - _SHOWN
        return title, rows, f"and {rest} more layers" if rest > 0 else ""


def _layers(layers: Sequence[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {show_numbers(layers)}"


def _note(selection: ExpertSelection) -> str:
    threshold = "" if selection.threshold is None else f", threshold {selection.threshold:g}"
    return threshold + (f", {selection.description}" if selection.description else "")


def _shape(num_experts: int | Sequence[int]) -> int | tuple[int, ...]:
    if isinstance(num_experts, (int, np.integer)):
        return int(num_experts)
    return tuple(index(size) for size in num_experts)


def _model(model: PlanModel | None, num_experts: int | Sequence[int] | None) -> PlanModel:
    """The model, with the experts of its layers if they are given one by one."""
    shape = None if num_experts is None else _shape(num_experts)
    return (model or PlanModel()).merged(PlanModel(num_experts=shape if isinstance(shape, tuple) else None))


def _by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    by_layer: dict[int, list[int]] = {}
    for layer, expert in pairs:
        by_layer.setdefault(layer, []).append(expert)
    return by_layer


def _scores_by_layer(scores: Mapping[tuple[int, int], float]) -> dict[int, dict[int, float]]:
    by_layer: dict[int, dict[int, float]] = {}
    for (layer, expert), score in scores.items():
        by_layer.setdefault(layer, {})[expert] = score
    return by_layer
