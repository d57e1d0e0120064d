"""Record the experts and weights that every single token chose, in selected layers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_route.base import files
from moe_route.base.table import data_frame
from moe_route.calls.call import PHASES
from moe_route.contract.spec import SCORES
from moe_route.recording.choices import ChoiceObserver, ObservedCall
from moe_route.recording.sequences import RunningSequences
from moe_route.recording.store import Item
from moe_route.reference import probabilities

if TYPE_CHECKING:
    import pandas as pd


_FILE_KIND = "trace"
_FLUSH_TOKENS = 1 << 14  # number of tokens that may wait on the device
_FLUSH_BYTES = 64 << 20  # of their logits
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trace:
    """The choices of N counted tokens, in the order in which they ran."""

    layers: tuple[str, ...]  # the L traced layers, by the name of the router's module
    layer_numbers: tuple[int, ...]  # the same layers, as indices among the MoE layers
    groups: tuple[str, ...]
    items: tuple[Item | None, ...]  # item of each sequence
    sequence: np.ndarray  # int32 [N], index into `items`; beams of one sequence share it
    group: np.ndarray  # int32 [N], index into `groups`
    position: np.ndarray  # int32 [N], padding not counted; an encoder's text and its decoder's are numbered apart
    token: np.ndarray  # int32 [N], token id; -1 if the model was called with embeddings
    phase: np.ndarray  # uint8 [N], index into `PHASES`
    ids: np.ndarray  # int8 or int16 [N, L, k], the chosen experts; -1 is an empty slot
    weights: np.ndarray  # float16 or float32 [N, L, k]
    truncated: bool = False  # whether tokens are missing because the limit was reached
    backends: tuple[str, ...] = ()  # what computed the routing: "kernels", "torch"; () if it is not known
    # float16 or float32 [N, L, E], the router's own logits, unsteered; NaN where a layer has fewer experts or did not
    # see the token. None if the trace keeps none
    logits: np.ndarray | None = None
    scores: tuple[str, ...] = ()  # how each layer turns logits into scores (`RouterSpec.score`), with logits only

    @property
    def probabilities(self) -> np.ndarray:
        """float32 [N, L, E]: the router's scores of all experts divided by their sum, before any steering.

        Of a softmax router this is the softmax. NaN where ``logits`` are NaN, and for a token whose scores have no
        finite positive sum. Raises ``ValueError`` if the trace has no logits.
        """
        if self.logits is None:
            raise ValueError("this trace has no logits: record(trace=True, logits=True)")
        layers = [
            probabilities(torch.from_numpy(self.logits[:, place].astype(np.float32)), score).numpy()
            for place, score in enumerate(self.scores)
        ]
        return np.stack(layers, 1)

    def __len__(self) -> int:
        return len(self.sequence)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file (`moe_route.base.files`, kind "trace")."""
        header = {name: getattr(self, name) for name in _HEADER}
        columns = {name: getattr(self, name) for name in _COLUMNS}
        if self.logits is not None:
            header["scores"], columns["logits"] = self.scores, self.logits
        files.write(path, columns, header, _FILE_KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read a file that ``save`` wrote.

        Raises ``files.FileRefusedError`` for a missing, truncated, altered or foreign file.
        """
        columns, header = files.read(path, _FILE_KIND)
        with files.expected_content(path):
            scores = tuple(header.get("scores", ()))
            if not set(scores) <= set(SCORES) or len(scores) != len(header["layers"]) * ("logits" in columns):
                raise ValueError(f"it has logits of {len(scores)} layers with the scores {', '.join(map(str, scores))}")
            trace = cls(
                layers=tuple(header["layers"]),
                layer_numbers=tuple(header["layer_numbers"]),
                groups=tuple(header["groups"]),
                items=tuple(header["items"]),
                truncated=header["truncated"],
                backends=tuple(header.get("backends", ())),
                logits=columns.get("logits"),
                scores=scores,
                **{name: columns[name] for name in _COLUMNS},
            )
            trace._check_axes()
            return trace

    def _check_axes(self) -> None:
        """Raise ``ValueError`` for columns of other axes than [N] and [N, L, k], or that count beyond their names."""
        shape = self.ids.shape
        names: dict[str, Sequence[Any]] = {"sequence": self.items, "group": self.groups, "phase": PHASES}
        if len(shape) != 3 or shape[1] != len(self.layers) or len(self.layer_numbers) != len(self.layers):
            raise ValueError(f"ids are {list(shape)}, with {len(self.layers)} layers")
        for name in _COLUMNS:
            column: np.ndarray = getattr(self, name)
            floating = name == "weights"
            if column.shape != (shape if floating or name == "ids" else shape[:1]) or column.dtype.kind not in (
                "f" if floating else "iu"
            ):
                raise ValueError(f"{name} is {column.dtype} {list(column.shape)}, with ids {list(shape)}")
            if name in names and column.size and not 0 <= int(column.min()) <= int(column.max()) < len(names[name]):
                raise ValueError(f"{name} counts beyond its {len(names[name])} names")

    @classmethod
    def join_layers(cls, parts: Sequence[Trace]) -> Trace:
        """Join traces of the same tokens in different layers, such as stages of pipeline parallelism.

        Layers come in the order of the parts. Where one has fewer slots, the added ones are empty. Logits are kept if
        every part has them.

        Raises ``ValueError`` if the tokens of two parts differ, or a layer is in two of them.
        """
        first, *others = parts
        for other in others:
            same = all(np.array_equal(getattr(first, name), getattr(other, name)) for name in _TOKEN_COLUMNS)
            if not same or any(getattr(first, name) != getattr(other, name) for name in _TOKEN_HEADER):
                raise ValueError("the parts hold different tokens: join traces of the same run")
        numbers = tuple(number for part in parts for number in part.layer_numbers)
        if len(set(numbers)) != len(numbers):
            raise ValueError("a layer is in two of the parts: join parts with different layers")
        slots = max(part.ids.shape[2] for part in parts)
        ids = [_wide(part.ids, slots, -1) for part in parts]
        weights = [_wide(part.weights, slots, 0) for part in parts]
        logits = None
        if all(part.logits is not None for part in parts):
            of_parts = [part.logits for part in parts if part.logits is not None]
            widest = max(values.shape[2] for values in of_parts)
            logits = np.concatenate([_wide(values, widest, np.nan) for values in of_parts], axis=1)
        return replace(
            first,
            logits=logits,
            scores=() if logits is None else tuple(score for part in parts for score in part.scores),
            layers=tuple(name for part in parts for name in part.layers),
            layer_numbers=numbers,
            ids=np.concatenate(ids, axis=1),
            weights=np.concatenate(weights, axis=1),
        )

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (token, layer, slot).

        Columns: item, group, sequence, position, token (its id), phase, layer (index among the MoE layers), router
        (module name), slot, expert, weight.
        """
        tokens, layers, slots = np.indices(self.ids.shape).reshape(3, -1)
        sequence = self.sequence[tokens]
        columns = {
            "item": np.asarray(self.items, dtype=object)[sequence],
            "group": np.asarray(self.groups, dtype=object)[self.group[tokens]],
            "sequence": sequence,
            "position": self.position[tokens],
            "token": self.token[tokens],
            "phase": np.asarray(PHASES, dtype=object)[self.phase[tokens]],
            "layer": np.asarray(self.layer_numbers, dtype=np.int64)[layers],
            "router": np.asarray(self.layers, dtype=object)[layers],
            "slot": slots,
            "expert": self.ids.reshape(-1),
            "weight": self.weights.reshape(-1).astype(np.float32),
        }
        return data_frame(columns)

    def __repr__(self) -> str:
        cut = ", truncated" if self.truncated else ""
        size = f"{len(self)} tokens of {len(self.items)} sequences, {len(self.layers)} layers"
        return f"Trace({size}, top-{self.ids.shape[-1]}{cut})"


_COLUMNS = ("sequence", "group", "position", "token", "phase", "ids", "weights")
_HEADER = ("layers", "layer_numbers", "groups", "items", "truncated", "backends")
_TOKEN_COLUMNS, _TOKEN_HEADER = _COLUMNS[:5], _HEADER[2:5]  # what says which tokens a trace holds


@dataclass
class _TracedCall:
    """One call, with what must be read before it runs."""

    observed: ObservedCall
    past: Tensor | None  # [batch or 1], earlier length of the sequences, if those tokens were not traced
    tokens: Tensor | None  # [batch, length] token ids

    @property
    def size(self) -> int:
        return self.observed.batch * self.observed.length


class TraceWriter(ChoiceObserver):
    """Collects the choices of the traced layers while a recorder is active."""

    option = "trace"

    def __init__(
        self,
        routers: Sequence[Any],
        layers: Iterable[int] | bool,
        *,
        limit: int,
        weights: str = "float16",
        logits: bool | str = False,
    ) -> None:
        """Prepare a trace.

        Args:
            layers: indices among the MoE layers, or True for all.
            limit: largest number of tokens to keep.
            weights: "float16" or "float32".
            logits: whether to keep logits, and as what: True is "float16".
        """
        kept = {True: "float16", False: None}.get(logits, logits) if isinstance(logits, bool) else logits
        if kept not in (None, "float16", "float32"):
            raise ValueError(f'logits of a trace are kept as "float16" or "float32", not {logits!r}')
        if weights not in ("float16", "float32"):
            raise ValueError(f'trace weights are "float16" or "float32", not {weights!r}')
        chosen = range(len(routers)) if layers is True else sorted(set(layers)) if layers else []
        outside = [layer for layer in chosen if not 0 <= layer < len(routers)]
        if outside:
            raise ValueError(
                f"there is no layer {outside[0]} to trace: the model has MoE layers 0 to {len(routers) - 1}"
            )
        self.layers = tuple(chosen)
        self.names = tuple(routers[layer].name for layer in chosen)
        self.limit = limit
        self.slots = max((routers[layer].top_k for layer in chosen), default=0)
        self._ids_dtype = (
            torch.int8 if max((routers[layer].num_experts for layer in chosen), default=0) <= 128 else torch.int16
        )
        self._weights_dtype = self.weights_dtype = torch.float16 if weights == "float16" else torch.float32
        self.logits_dtype: torch.dtype | None = None if kept is None else getattr(torch, kept)
        self._widths = [routers[layer].num_experts for layer in chosen] if kept else []
        self._scores = tuple(routers[layer].spec.score for layer in chosen) if kept else ()
        self._most_waiting = _FLUSH_TOKENS
        if self.logits_dtype is not None and chosen:
            size = len(chosen) * max(self._widths) * self.logits_dtype.itemsize
            self._most_waiting = min(_FLUSH_TOKENS, max(1, _FLUSH_BYTES // size))
            logger.warning(
                "the trace keeps %d logits per token, %s: %s per million tokens, at most %s (trace_limit=%d)",
                sum(self._widths),
                f"{size:,} bytes",
                _readable(size * 10**6),
                _readable(size * limit),
                limit,
            )
        self._current: _TracedCall | None = None
        self._waiting: list[_TracedCall] = []
        self._chunks: list[dict[str, np.ndarray]] = []
        self._items: list[Item | None] = []
        self._first = 0  # number of the first sequence of the running block
        # tokens of each row of the running block so far, by layers that run together (an encoder's, its decoder's)
        self._reached: dict[tuple[int, ...], np.ndarray] = {}
        self._kept = 0
        self.truncated = False

    def needs(self, layer: int) -> bool:
        """Whether this layer is traced, and there is room."""
        return layer in self.layers and not self.truncated

    def begin_sequences(self, sequences: RunningSequences, groups: int) -> None:
        """Begin a new block of sequences; the former one has ended."""
        self.flush()
        self._first = len(self._items)
        self._items.extend(sequences.item(i) for i in range(sequences.count))
        self._reached = {}

    def begin_call(self, observed: ObservedCall) -> None:
        """Begin a call."""
        call = observed.call
        goes_on = call.past_length and not self._reached and not self._waiting  # earlier tokens were not traced
        past = call.tokens_before()[:, 0] if goes_on else None
        ids = call.input_ids
        shaped = ids is not None and ids.shape == (call.batch, call.length)
        # a copy, because callers may reuse their input buffer for the next step
        tokens = ids.to(torch.int32, copy=True) if ids is not None and shaped else None
        self._current = _TracedCall(observed, past, tokens)

    def drop_call(self) -> None:
        """Drop the data of a call that failed."""
        self._current = None

    def take(self, observed: ObservedCall) -> None:
        """Keep the choices of a completed call."""
        call, self._current = self._current, None
        if call is None or not any(self.needs(layer) for layer in observed.ids):
            return
        self._waiting.append(call)
        if sum(call.size for call in self._waiting) >= self._most_waiting:
            self.flush()

    def flush(self) -> None:
        """Copy the waiting data from the device to the host."""
        for call in self._waiting:
            self._take(call)
        self._waiting = []

    def _take(self, call: _TracedCall) -> None:
        observed = call.observed
        rows = np.arange(observed.batch)
        shape = (observed.batch, observed.length)
        valid = np.ones(shape, bool) if observed.valid is None else observed.valid.cpu().numpy()
        repeats = observed.batch // max(len(self._items) - self._first, 1)
        together = tuple(sorted(observed.ids))
        reached = self._reached.get(together)
        if reached is None:
            reached = np.zeros(1, np.int64) if call.past is None else call.past.cpu().numpy()
        reached = np.repeat(reached, observed.batch // len(reached))
        position = reached[:, None] + np.cumsum(valid, axis=1) - 1
        self._reached[together] = reached + valid.sum(1)
        group = observed.groups(observed.call.device).cpu().numpy()
        wanted = group >= 0
        kept = wanted & (np.cumsum(wanted) <= self.limit - self._kept)
        counted = int(kept.sum())
        if counted < int(wanted.sum()):
            self._stop()
        self._kept += counted
        sequence = np.broadcast_to((self._first + rows // repeats)[:, None], shape)
        running = PHASES.index(observed.call.phase)
        phase = np.broadcast_to(np.where(np.arange(observed.length) < observed.call.prompt, 0, running), shape)
        token = np.full(shape, -1) if call.tokens is None else call.tokens.cpu().numpy()
        ids, weights = self._choices(observed, kept)
        logits = {} if self.logits_dtype is None else {"logits": self._logits(observed, kept)}
        self._chunks.append(
            logits
            | {
                "sequence": sequence.reshape(-1)[kept].astype(np.int32),
                "group": group[kept].astype(np.int32),
                "position": position.reshape(-1)[kept].astype(np.int32),
                "token": token.reshape(-1)[kept].astype(np.int32),
                "phase": phase.reshape(-1)[kept].astype(np.uint8),
                "ids": ids,
                "weights": weights,
            }
        )

    def _choices(self, call: ObservedCall, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        traced = {layer: chosen for layer, chosen in call.ids.items() if layer in self.layers}
        self.slots = max(self.slots, *(chosen.shape[1] for chosen in traced.values()))  # a plan may give more slots
        ids = self._empty(int(kept.sum()), self._ids_dtype, -1)
        weights = self._empty(int(kept.sum()), self._weights_dtype, 0)
        alike: dict[tuple[torch.device, int], list[int]] = {}
        for layer, chosen in traced.items():
            alike.setdefault((chosen.device, chosen.shape[1]), []).append(layer)
        for (_, width), layers in alike.items():  # one copy of each, per device
            places = [self.layers.index(layer) for layer in layers]
            for target, source in ((ids, call.ids), (weights, call.weights)):  # a dtype that all observers can use
                choices = torch.stack([source[n] for n in layers], 1).cpu().numpy()[kept]
                target[:, places, :width] = choices.astype(target.dtype)
        return ids, weights

    def _logits(self, call: ObservedCall, kept: np.ndarray) -> np.ndarray:
        """float [n, L, E] of the kept tokens."""
        values = self._no_logits(int(kept.sum()))
        for place, (layer, width) in enumerate(zip(self.layers, self._widths, strict=True)):
            if layer in call.logits:
                values[:, place, :width] = call.logits[layer].cpu().numpy()[kept]
        return values

    def _no_logits(self, tokens: int) -> np.ndarray:
        size = (tokens, len(self.layers), max(self._widths, default=0))
        return torch.full(size, torch.nan, dtype=self.logits_dtype).numpy()

    def _empty(self, tokens: int, dtype: torch.dtype, value: int) -> np.ndarray:
        return torch.full((tokens, len(self.layers), self.slots), value, dtype=dtype).numpy()

    def _widened(self, chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A chunk widened to the largest number of slots; added slots are empty."""
        wider = {"ids": _wide(chunk["ids"], self.slots, -1), "weights": _wide(chunk["weights"], self.slots, 0)}
        return chunk | wider

    def _stop(self) -> None:
        self.truncated = True
        logger.warning(
            "the trace is full (%d tokens): later tokens are not traced; raise record(trace_limit=...)", self.limit
        )

    def snapshot(self, groups: Sequence[str]) -> Trace:
        """The tokens traced so far."""
        self.flush()
        empty: dict[str, np.ndarray] = {
            "sequence": np.zeros(0, np.int32),
            "group": np.zeros(0, np.int32),
            "position": np.zeros(0, np.int32),
            "token": np.zeros(0, np.int32),
            "phase": np.zeros(0, np.uint8),
            "ids": self._empty(0, self._ids_dtype, -1),
            "weights": self._empty(0, self._weights_dtype, 0),
        }
        if self.logits_dtype is not None:
            empty["logits"] = self._no_logits(0)
        chunks = [empty, *(self._widened(chunk) for chunk in self._chunks)]
        columns: dict[str, Any] = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in empty}
        return Trace(
            layers=self.names,
            layer_numbers=self.layers,
            groups=tuple(groups),
            items=tuple(self._items),
            **columns,
            truncated=self.truncated,
            scores=self._scores,
        )


def _wide(values: np.ndarray, width: int, fill: float) -> np.ndarray:
    """``values`` [N, L, n] with ``fill`` in as many further entries as make n the width."""
    missing = width - values.shape[2]
    return values if not missing else np.pad(values, ((0, 0), (0, 0), (0, missing)), constant_values=fill)


def _readable(size: int) -> str:
    """A number of bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
