"""What a recording leaves behind: integer sums per (group, layer, expert), immutable, mergeable to the last bit.

Two kinds of sums, both int64. *Token sums* are the tables of the gate (`csrc/include/moe_route/gate.h`), one set per
phase. *Sequence sums* add up, over finished sequences, the sequence's own averages: q_i (arXiv 2510.04694 eq. 1), a_i
/ L_i (its eq. 3) and H(q_i), each rounded once to a multiple of 2^-32. Sums of integers do not depend on order, so
two runs merge exactly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route import files
from moe_route.calls.call import PHASES, Phase
from moe_route.contract.tables import FIXED_POINT, METRICS, SCALARS
from moe_route.recording.metadata import config_hash_of, merge_metadata

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.recording.store import SequenceStore

__all__ = [
    "SEQUENCE_KINDS",
    "SEQUENCE_SCALARS",
    "VIEWS",
    "RecordingError",
    "RoutingStatistics",
    "MergeError",
]

Kind = Literal["full", "topk", "topk_renorm", "count"]
By = Literal["sequence", "token"]

# Axis 0 of the sequence sums: a sequence's average over both phases is no sum of two averages.
VIEWS = ("prefill", "decode", "all")
SEQUENCE_KINDS = ("full", "topk", "count", "frequency")
# Finished sequences seen by a layer; those with a q_i of each kind (an all-zero row has none); fixed-point sum of
# H(q_i), nats.
SEQUENCE_SCALARS = ("sequences", "full", "topk", "count", "entropy")
KIND_METRIC = {
    "full": "probability",
    "topk": "weight_share",
    "topk_renorm": "weight_share",
    "count": "counts",
    "frequency": "counts",
}
_COUNTED = ("counts", "natural_counts")  # metrics that are plain integers, not fixed point
_OVERFLOW_TOKENS = 1 << 27  # fewer tokens cannot bring terms up to 16 (entropies, weights) past 63 bits
_SCORE_ROUNDING = 1e-6  # scores are float32: how far a token's normalized scores may add up beside 1
_FILE_KIND = "statistics"
logger = logging.getLogger(__name__)


class RecordingError(RuntimeError):
    """A recording that broke a conservation law, or was used in a way that would spoil it; the message names the
    mend."""


class MergeError(ValueError):
    """Two statistics that cannot be merged: another model, other layers, other metrics."""


class RoutingStatistics:
    """Routing of one or more runs as integer sums, with named accessors over ``[group, layer, expert]``.

    Made by ``Recorder.statistics()``, ``load`` and ``from_token_sums``. Arrays are read-only. ``a + b`` merges
    exactly, in any order. Layers with fewer experts than the widest one are padded with zeros.
    """

    def __init__(
        self,
        *,
        groups: Sequence[str],
        layers: Sequence[str],
        num_experts: Sequence[int],
        top_k: Sequence[int],
        scalars: np.ndarray,
        metrics: Mapping[str, np.ndarray],
        sequence_scalars: np.ndarray,
        sequence_sums: Mapping[str, np.ndarray],
        entropy: bool = True,
        metadata: Mapping[str, Any] | None = None,
        store: SequenceStore | None = None,
    ):
        """Take int64 arrays: ``scalars [2, G, L, 8]`` (``ops.SCALARS``), ``metrics`` name -> ``[2, G, L, E]``,
        ``sequence_scalars [3, G, L, 5]`` (``SEQUENCE_SCALARS``), ``sequence_sums`` kind -> ``[3, G, L, E]``; axis 0
        is ``PHASES`` or ``VIEWS``, E the widest layer.

        Raises ``ValueError`` for a wrong shape, an unknown metric or a group named twice.
        """
        self.groups = tuple(groups)
        self.layers = tuple(layers)
        self.num_experts = tuple(int(n) for n in num_experts)
        self.top_k = tuple(int(k) for k in top_k)
        self.phases = PHASES
        self.metrics = tuple(name for name in METRICS if name in metrics)
        self.has_entropy = bool(entropy)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.store = store
        _check_axes(self, metrics, sequence_sums)
        cell = (len(self.groups), len(self.layers))
        widest = max(self.num_experts, default=0)
        self._scalars = _frozen(scalars, (2, *cell, len(SCALARS)), "scalars")
        self._metrics = {name: _frozen(metrics[name], (2, *cell, widest), name) for name in self.metrics}
        self._sequence_scalars = _frozen(sequence_scalars, (3, *cell, len(SEQUENCE_SCALARS)), "sequence_scalars")
        self._sequence_sums = {
            kind: _frozen(sequence_sums[kind], (3, *cell, widest), kind)
            for kind in SEQUENCE_KINDS
            if kind in sequence_sums
        }

    @classmethod
    def from_token_sums(
        cls,
        groups: Sequence[str],
        *,
        counts: np.ndarray,
        tokens: np.ndarray,
        top_k: int | Sequence[int],
        layers: Sequence[str] | None = None,
        phase: Phase = "prefill",
        metadata: Mapping[str, Any] | None = None,
        **metrics: np.ndarray,
    ) -> RoutingStatistics:
        """Statistics from sums that another recorder kept: ``counts`` int ``[G, L, E]``, ``tokens`` int ``[G]`` or
        ``[G, L]``, and optionally ``probability``, ``weight``, ``weight_share`` as float ``[G, L, E]`` sums over tokens. They hold
        no sequences, so accessors need ``by="token"``.
        """
        counts = np.asarray(counts)
        num_groups, num_layers, experts = counts.shape
        of_phase = PHASES.index(phase)
        tables = {
            "counts": np.rint(counts),
            **{name: np.rint(np.asarray(p) / FIXED_POINT) for name, p in metrics.items()},
        }
        scalars = np.zeros((2, num_groups, num_layers, len(SCALARS)), np.int64)
        tokens = np.asarray(tokens)
        scalars[of_phase, ..., SCALARS.index("tokens")] = tokens if tokens.ndim == 2 else tokens[:, None]
        scalars[of_phase, ..., SCALARS.index("slots")] = np.rint(counts).sum(-1)
        if "probability" not in metrics:
            scalars[of_phase, ..., SCALARS.index("unscored")] = scalars[of_phase, ..., SCALARS.index("tokens")]
        stacked = {name: np.zeros((2, *counts.shape), np.int64) for name in tables}
        for name, table in tables.items():
            stacked[name][of_phase] = table
        return cls(
            groups=groups,
            layers=layers or [str(layer) for layer in range(num_layers)],
            num_experts=[experts] * num_layers,
            top_k=[top_k] * num_layers if isinstance(top_k, int) else top_k,
            scalars=scalars,
            metrics=stacked,
            sequence_scalars=np.zeros((3, num_groups, num_layers, len(SEQUENCE_SCALARS)), np.int64),
            sequence_sums={},
            entropy=False,
            metadata=metadata,
        )

    # ---- token sums

    def token_sum(self, metric: str, phase: Phase | None = None) -> np.ndarray:
        """Sum over tokens of one metric, ``[G, L, E]``: int64 for ``counts`` and ``natural_counts``, float64 in units
        of one token for ``probability``, ``weight`` and ``weight_share``. Raises ``ValueError`` for a metric that was not recorded.
        """
        table = self._metric(metric)
        if metric in _COUNTED:
            return table.sum(0) if phase is None else table[_phase_index(phase)].copy()
        scaled = table * FIXED_POINT
        return scaled.sum(0) if phase is None else scaled[_phase_index(phase)]

    def scalar(self, name: str, phase: Phase | None = None) -> np.ndarray:
        """One of ``ops.SCALARS`` summed over tokens, ``[G, L]``: int64, or float64 for ``entropy`` (nats) and
        ``moved`` (share of weight)."""
        if name not in SCALARS:
            raise ValueError(f"no scalar {name!r}: one of {', '.join(SCALARS)}")
        column = self._scalars[..., SCALARS.index(name)]
        values = column if name not in ("entropy", "moved") else column * FIXED_POINT
        return values.sum(0) if phase is None else values[_phase_index(phase)].copy()

    def tokens(self, phase: Phase | None = None) -> np.ndarray:
        """Tokens counted, int64 ``[G, L]``."""
        return self.scalar("tokens", phase)

    # ---- sequence sums

    def sequences(self, phase: Phase | None = None) -> np.ndarray:
        """Finished sequences, int64 ``[G]``: those with at least one counted token in this phase, in any layer."""
        seen = self.sequence_scalar("sequences", phase)
        return seen.max(axis=1, initial=0)

    def sequence_scalar(self, name: str, phase: Phase | None = None) -> np.ndarray:
        """One of ``SEQUENCE_SCALARS``, ``[G, L]``: int64 numbers of sequences, or float64 ``entropy`` (sum of H(q_i),
        nats)."""
        if name not in SEQUENCE_SCALARS:
            raise ValueError(f"no sequence scalar {name!r}: one of {', '.join(SEQUENCE_SCALARS)}")
        values = self._sequence_scalars[_view_index(phase), ..., SEQUENCE_SCALARS.index(name)]
        return values * FIXED_POINT if name == "entropy" else values.copy()

    # ---- averages

    def mean_distribution(self, kind: Kind = "full", phase: Phase | None = None, by: By = "sequence") -> np.ndarray:
        """Mean routing distribution, float64 ``[G, L, E]``; rows sum to 1, NaN where nothing was seen.

        ``kind``: ``full`` scores over all experts, ``topk`` = ``topk_renorm`` weights of the chosen divided by their
        sum (per token the two are the same once normalized), ``count`` selections. ``by="sequence"`` is the mean of
        q_i (arXiv 2510.04694 eq. 1), ``by="token"`` weighs every token alike. Sequences and tokens with an all-zero
        row are left out (``sequence_scalar``, ``scalar("unscored")`` tell how many).
        """
        if kind not in KIND_METRIC or kind == "frequency":
            raise ValueError(f"no distribution kind {kind!r}: full, topk, topk_renorm or count")
        sums = (
            self._sequence_sum(kind, phase) if _check_by(by) == "sequence" else self.token_sum(KIND_METRIC[kind], phase)
        )
        return _ratio(sums, sums.sum(-1, keepdims=True))

    def frequency(self, phase: Phase | None = None, by: By = "sequence") -> np.ndarray:
        """How often a token chooses each expert, float64 ``[G, L, E]``: rows sum to k (less the slots that stayed
        empty).

        ``by="sequence"``: mean of a_i / L_i (the terms of arXiv 2510.04694 eq. 3); ``by="token"``: counts / tokens.
        NaN where nothing was seen.
        """
        if _check_by(by) == "token":
            return _ratio(self.token_sum("counts", phase), self.tokens(phase)[..., None])
        sums = self._sequence_sum("frequency", phase)
        return _ratio(sums * FIXED_POINT, self.sequence_scalar("sequences", phase)[..., None])

    def entropy(self, of: Literal["token", "sequence"] = "token", phase: Phase | None = None) -> np.ndarray:
        """Mean entropy in nats, float64 ``[G, L]``: ``token`` mean over tokens of H(p_t), ``sequence`` mean over
        sequences of H(q_i).

        NaN where nothing was seen. Raises ``ValueError`` when it was not recorded.
        """
        if of == "sequence":
            self._sequence_sum("full", phase)
            return _ratio(self.sequence_scalar("entropy", phase), self.sequence_scalar("full", phase))
        if of != "token":
            raise ValueError(f'entropy of "token" or "sequence", not {of!r}')
        if not self.has_entropy:
            raise ValueError("token entropy was not recorded: record(entropy=True)")
        return _ratio(self.scalar("entropy", phase), self.tokens(phase) - self.scalar("unscored", phase))

    # ---- parts and wholes

    def select(
        self, groups: Sequence[str] | None = None, layers: Sequence[str | int] | range | None = None
    ) -> RoutingStatistics:
        """These groups (by name) and layers (by name or index), in the order given. The store, if any, is kept only
        with all layers."""
        rows = (
            list(range(len(self.groups)))
            if groups is None
            else [_position(g, self.groups, "group") for g in _listed(groups)]
        )
        columns = (
            list(range(len(self.layers))) if layers is None else [self._layer_index(layer) for layer in _listed(layers)]
        )
        widest = max((self.num_experts[i] for i in columns), default=0)

        def part(array: np.ndarray, width: int | None = None) -> np.ndarray:
            return array[:, rows][:, :, columns][..., :width]

        return RoutingStatistics(
            groups=[self.groups[i] for i in rows],
            layers=[self.layers[i] for i in columns],
            num_experts=[self.num_experts[i] for i in columns],
            top_k=[self.top_k[i] for i in columns],
            scalars=part(self._scalars),
            metrics={name: part(table, widest) for name, table in self._metrics.items()},
            sequence_scalars=part(self._sequence_scalars),
            sequence_sums={kind: part(table, widest) for kind, table in self._sequence_sums.items()},
            entropy=self.has_entropy,
            metadata=self.metadata,
            store=self.store if columns == list(range(len(self.layers))) else None,
        )

    def merge(self, other: RoutingStatistics) -> RoutingStatistics:
        """Both runs in one, exactly: integers are added, groups are united. The same as ``self + other``.

        Raises ``MergeError`` for another model, other layers or metrics, and ``RecordingError`` where a sum
        would overflow.
        """
        if "natural_counts" in {*self.metrics} ^ {*other.metrics}:
            return self._with_natural_counts().merge(other._with_natural_counts())
        _check_mergeable(self, other)
        groups = self.groups + tuple(group for group in other.groups if group not in self.groups)
        mine, theirs = self._spread(groups), other._spread(groups)
        added = {name: _checked_sum(mine[name], theirs[name], name) for name in mine}
        if (self.store is None) != (other.store is None):
            logger.warning("only one of the two runs kept its sequences: the merged statistics have no store")
        return RoutingStatistics(
            groups=groups,
            layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            scalars=added["scalars"],
            metrics={name: added[f"metric.{name}"] for name in METRICS if f"metric.{name}" in added},
            sequence_scalars=added["sequence_scalars"],
            sequence_sums={kind: added[f"sequence.{kind}"] for kind in SEQUENCE_KINDS if f"sequence.{kind}" in added},
            entropy=self.has_entropy,
            metadata=merge_metadata(self.metadata, other.metadata),
            store=None if self.store is None or other.store is None else self.store.merge(other.store),
        )

    def __add__(self, other: object) -> RoutingStatistics:
        return self.merge(other) if isinstance(other, RoutingStatistics) else NotImplemented

    def __radd__(self, other: object) -> RoutingStatistics:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum([a, b, c]) starts from 0

    def __eq__(self, other: object) -> bool:
        """The same evidence: layers, sums, model and data, whatever the order of the groups. Stores and versions are
        not compared."""
        if not isinstance(other, RoutingStatistics):
            return NotImplemented
        shape = ("layers", "num_experts", "top_k", "metrics", "has_entropy")
        if any(getattr(self, name) != getattr(other, name) for name in shape) or set(self.groups) != set(other.groups):
            return False
        if any(self.metadata.get(key) != other.metadata.get(key) for key in ("fingerprint", "plans", "masked")):
            return False
        if config_hash_of(self.metadata) != config_hash_of(other.metadata):
            return False
        mine, theirs = self._arrays(), other._spread(self.groups)
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # compared by content, which is large

    # ---- what the user keeps

    def save(self, path: str | os.PathLike[str], *, sequences: bool = True) -> None:
        """Write one file (`moe_route.files`, kind "statistics"); a sequence store goes to the folder ``<path without
        suffix>.sequences`` beside it.

        An existing file is replaced whole; an existing folder of another recording is refused (``FileExistsError``)
        before anything is written.
        """
        header: dict[str, Any] = {
            "groups": list(self.groups),
            "layers": list(self.layers),
            "num_experts": list(self.num_experts),
            "top_k": list(self.top_k),
            "entropy": self.has_entropy,
            "metadata": self.metadata,
            "sequences": None,
        }
        if sequences and self.store is not None:
            folder = _store_folder(path)
            header["sequences"] = {"folder": folder.name, "hash": self.store.save(folder), "keys": len(self.store)}
        files.write(path, self._arrays(), header, _FILE_KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sequences: bool = True) -> RoutingStatistics:
        """Read what ``save`` wrote, with its sequence store unless ``sequences=False``.

        Raises ``files.FileRefusedError`` for a missing, truncated, altered or foreign file or folder, ``RecordingError``
        for sums that break conservation.
        """
        tensors, header = files.read(path, _FILE_KIND)
        store = _load_store(path, header["sequences"]) if sequences and header["sequences"] else None
        statistics = cls(
            groups=header["groups"],
            layers=header["layers"],
            num_experts=header["num_experts"],
            top_k=header["top_k"],
            scalars=tensors["scalars"],
            metrics={name: tensors[f"metric.{name}"] for name in METRICS if f"metric.{name}" in tensors},
            sequence_scalars=tensors["sequence_scalars"],
            sequence_sums={
                kind: tensors[f"sequence.{kind}"] for kind in SEQUENCE_KINDS if f"sequence.{kind}" in tensors
            },
            entropy=header["entropy"],
            metadata=header["metadata"],
            store=store,
        )
        statistics.verify()
        return statistics

    def to_pandas(self) -> pd.DataFrame:
        """Tidy token sums, a row per (group, phase, layer, expert): ``router`` (module name), ``tokens`` of the (group,
        phase, layer), then one column per metric and ``frequency`` (counts / tokens, NaN where nothing was seen).
        Padding experts are left out.
        """
        pandas = _pandas()
        index = pandas.MultiIndex.from_product(
            [self.groups, self.phases, range(len(self.layers)), range(max(self.num_experts, default=0))],
            names=["group", "phase", "layer", "expert"],
        )
        # arrays are [phase, group, layer, expert]; rows are group first
        columns = {name: np.stack([self.token_sum(name, p) for p in PHASES], 1).reshape(-1) for name in self.metrics}
        frame = pandas.DataFrame(columns, index=index).reset_index()
        tokens = np.stack([self.tokens(p) for p in PHASES], 1).reshape(-1)
        frame.insert(4, "tokens", np.repeat(tokens, max(self.num_experts, default=0)))
        frame.insert(3, "router", np.asarray(self.layers, dtype=object)[frame["layer"]])
        if "counts" in self.metrics:
            frame["frequency"] = _ratio(frame["counts"].to_numpy(), frame["tokens"].to_numpy())
        return frame[frame["expert"] < np.asarray(self.num_experts)[frame["layer"]]].reset_index(drop=True)

    def scalars_to_pandas(self) -> pd.DataFrame:
        """Tidy scalars, a row per (group, phase, layer): every name of ``ops.SCALARS`` summed over tokens,
        ``sequences``, ``sequence_entropy`` (mean)."""
        pandas = _pandas()
        index = pandas.MultiIndex.from_product(
            [self.groups, self.phases, range(len(self.layers))], names=["group", "phase", "layer"]
        )
        columns = {name: np.stack([self.scalar(name, p) for p in PHASES], 1).reshape(-1) for name in SCALARS}
        counted = [self.sequence_scalar("sequences", p) for p in PHASES]
        columns["sequences"] = np.stack(counted, 1).reshape(-1)
        if "full" in self._sequence_sums:
            columns["sequence_entropy"] = np.stack([self.entropy("sequence", p) for p in PHASES], 1).reshape(-1)
        return pandas.DataFrame(columns, index=index).reset_index()

    def verify(self) -> None:
        """Check what must hold whatever was recorded; raises ``RecordingError`` naming the first (group, layer) where
        it does not.

        Counts + empty slots = slots; nothing negative (an overflow); mass = scored tokens within rounding; share at
        most one per token.
        """
        self._verify_signs()
        for phase in PHASES:
            self._verify_phase(phase)

    def _verify_signs(self) -> None:
        """Sums of integers are never negative; fixed-point sums may be a little (rounding, negative weights) until
        there are so many tokens that a sum of terms up to 16 could have passed 2^63.
        """
        integers = [i for i, name in enumerate(SCALARS) if name not in ("entropy", "moved")]
        signed = {"scalars": self._scalars[..., integers]}
        signed |= {name: table for name, table in self._arrays().items() if name.removeprefix("metric.") in _COUNTED}
        if self._scalars[..., SCALARS.index("tokens")].max(initial=0) >= _OVERFLOW_TOKENS:
            signed = self._arrays()
        for name, array in signed.items():
            if (array < 0).any():
                raise RecordingError(
                    f"{name} holds a negative sum: it passed 63 bits; record in several runs and keep them apart"
                )

    def _verify_phase(self, phase: Phase) -> None:
        tokens = self.tokens(phase)
        if "counts" in self._metrics:
            chosen = self.token_sum("counts", phase).sum(-1) + self.scalar("empty", phase)
            self._require(
                chosen == self.scalar("slots", phase), phase, "counts and empty slots do not add up to the slots"
            )
        widest = max(self.num_experts, default=1)
        rounding = tokens * (widest * FIXED_POINT + _SCORE_ROUNDING)
        if "probability" in self._metrics:
            error = np.abs(self.token_sum("probability", phase).sum(-1) - (tokens - self.scalar("unscored", phase)))
            self._require(error <= rounding, phase, "probability mass does not add up to the scored tokens")
        if "weight_share" in self._metrics:
            excess = self.token_sum("weight_share", phase).sum(-1) - tokens
            self._require(excess <= rounding, phase, "shares of weight add up to more than the tokens")

    def _require(self, holds: np.ndarray, phase: str, what: str) -> None:
        if holds.all():
            return
        group, layer = np.argwhere(~holds)[0]
        raise RecordingError(
            f"{what} (group {self.groups[group]!r}, layer {self.layers[layer]}, {phase}): the tables were written by "
            "something else, "
            "or the model was interrupted inside a layer; record again"
        )

    def __repr__(self) -> str:
        tokens = self.tokens().max(axis=1, initial=0)
        shown = [
            f"{group} ({int(sequences)} sequences, {int(count)} tokens)"
            for group, sequences, count in list(zip(self.groups, self.sequences(), tokens, strict=True))[:8]
        ]
        more = len(self.groups) - len(shown)
        experts = sorted(set(self.num_experts))
        lines = [
            f"RoutingStatistics: {len(self.groups)} groups x {len(self.layers)} layers x {'/'.join(map(str, experts))} "
            "experts, "
            f"top-{'/'.join(map(str, sorted(set(self.top_k))))}",
            f"  groups: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}",
            f"  metrics: {', '.join(self.metrics)}{', entropy' if self.has_entropy else ''}",
        ]
        model = self.metadata.get("model") or {}
        if model.get("name") or model.get("class"):
            lines.append(f"  model: {model.get('name') or model.get('class')}")
        if self.metadata.get("plans"):
            lines.append(f"  steered by: {', '.join(self.metadata['plans'])}")
        if self.store is not None:
            lines.append(f"  store: {len(self.store)} sequences")
        return "\n".join(lines)

    # ---- inside

    def _with_natural_counts(self) -> RoutingStatistics:
        """The same with the natural choice as a metric: where no plan steered it is the choice itself."""
        if "natural_counts" in self.metrics:
            return self
        if self.metadata.get("plans") or "counts" not in self.metrics:
            raise MergeError("only one of the two runs recorded natural_counts: record both with the same metrics")
        return RoutingStatistics(
            groups=self.groups,
            layers=self.layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            scalars=self._scalars,
            metrics={**self._metrics, "natural_counts": self._metrics["counts"]},
            sequence_scalars=self._sequence_scalars,
            sequence_sums=self._sequence_sums,
            entropy=self.has_entropy,
            metadata=self.metadata,
            store=self.store,
        )

    def _metric(self, name: str) -> np.ndarray:
        if name not in self._metrics:
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}: one of {', '.join(METRICS)}")
            raise ValueError(f"metric {name!r} was not recorded: record(metrics={[*self.metrics, name]!r})")
        return self._metrics[name]

    def _sequence_sum(self, kind: str, phase: Phase | None) -> np.ndarray:
        kind = "topk" if kind == "topk_renorm" else kind
        if kind not in self._sequence_sums:
            if self._sequence_sums or not self._scalars.any():
                self._metric(KIND_METRIC[kind])
            raise ValueError('these statistics hold sums over tokens only, no sequences: pass by="token"')
        return self._sequence_sums[kind][_view_index(phase)]

    def _layer_index(self, layer: str | int) -> int:
        if isinstance(layer, str):
            return _position(layer, self.layers, "layer")
        if not -len(self.layers) <= layer < len(self.layers):
            raise ValueError(f"no layer {layer}: these statistics hold layers 0 to {len(self.layers) - 1}")
        return int(layer) % len(self.layers)

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"scalars": self._scalars, "sequence_scalars": self._sequence_scalars}
        arrays |= {f"metric.{name}": table for name, table in self._metrics.items()}
        return arrays | {f"sequence.{kind}": table for kind, table in self._sequence_sums.items()}

    def _spread(self, groups: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays with their group axis laid out as ``groups``, zero where this one has none."""
        place = {group: index for index, group in enumerate(groups)}
        rows = [place[group] for group in self.groups]
        spread = {}
        for name, array in self._arrays().items():
            wide = np.zeros((array.shape[0], len(groups), *array.shape[2:]), np.int64)
            wide[:, rows] = array
            spread[name] = wide
        return spread


def _check_mergeable(a: RoutingStatistics, b: RoutingStatistics) -> None:
    ours, theirs = config_hash_of(a.metadata), config_hash_of(b.metadata)
    if ours and theirs and ours != theirs:
        raise MergeError(
            f"these are statistics of two models (configuration {ours[:12]} and {theirs[:12]}): merge runs of the "
            "same model only"
        )
    for name, what in (("layers", "layers"), ("num_experts", "numbers of experts"), ("top_k", "top-k")):
        if getattr(a, name) != getattr(b, name):
            raise MergeError(
                f"the two runs have different {what}: merge runs of the same model, or select() the same layers first"
            )
    mine, other = set(a._arrays()), set(b._arrays())
    if mine != other or a.has_entropy != b.has_entropy:
        different = sorted(mine ^ other) or ["entropy"]
        raise MergeError(f"only one of the two runs recorded {', '.join(different)}: record both with the same metrics")


def _check_axes(statistics: RoutingStatistics, metrics: Iterable[str], kinds: Iterable[str]) -> None:
    for name, known in ((set(metrics) - set(METRICS), METRICS), (set(kinds) - set(SEQUENCE_KINDS), SEQUENCE_KINDS)):
        if name:
            raise ValueError(f"unknown {sorted(name)}: one of {', '.join(known)}")
    if len(set(statistics.groups)) != len(statistics.groups):
        raise ValueError("a group is named twice: group names must differ")
    lengths = {len(statistics.layers), len(statistics.num_experts), len(statistics.top_k)}
    if len(lengths) != 1:
        raise ValueError("layers, num_experts and top_k must have one entry per layer")


def _frozen(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, not {list(shape)}")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} must hold integers, not {array.dtype}")
    owned = np.array(array, dtype=np.int64)
    owned.setflags(write=False)
    return owned


def _checked_sum(a: np.ndarray, b: np.ndarray, name: str) -> np.ndarray:
    total = a + b
    if (((a ^ total) & (b ^ total)) < 0).any():
        raise RecordingError(f"{name} of the two runs adds up past 63 bits: keep the runs apart")
    return total


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Division that gives NaN, without a warning, where the denominator is zero."""
    shape = np.broadcast_shapes(numerator.shape, denominator.shape)
    out = np.full(shape, np.nan)
    return np.divide(numerator, denominator, out=out, where=np.broadcast_to(denominator, shape) != 0)


def _phase_index(phase: str) -> int:
    if phase not in PHASES:
        raise ValueError(f"no phase {phase!r}: prefill, decode, or None for both")
    return PHASES.index(phase)


def _view_index(phase: str | None) -> int:
    return VIEWS.index("all") if phase is None else _phase_index(phase)


def _check_by(by: str) -> str:
    if by not in ("sequence", "token"):
        raise ValueError(f'by must be "sequence" or "token", not {by!r}')
    return by


def _listed(names: Any) -> list[Any]:
    return [names] if isinstance(names, (str, int)) else list(names)


def _position(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise ValueError(f"no {what} {name!r}: these statistics hold {', '.join(names)}")
    return list(names).index(name)


def _store_folder(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_suffix(".sequences")


def _load_store(path: str | os.PathLike[str], entry: Mapping[str, Any]) -> SequenceStore:
    from moe_route.recording.store import SequenceStore

    folder = Path(path).parent / entry["folder"]
    if not folder.is_dir():
        raise files.FileRefusedError(
            f"{folder}, the sequences of {path}, is missing: put it back beside the file, or load(..., sequences=False)"
        )
    store = SequenceStore.load(folder)
    if store.files_hash() != entry["hash"]:
        raise files.FileRefusedError(
            f"{folder} does not hold the sequences that belong to {path}: put the right folder back, or load(..., "
            "sequences=False)"
        )
    return store


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("data frames need pandas: pip install 'moe-route[analysis]'") from error
    return pandas
