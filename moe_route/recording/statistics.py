"""The result of a recording: immutable integer sums per (group, layer, expert), which merge exactly.

There are two kinds of sums, both int64. *Token sums* are the tables of the gate (`csrc/include/moe_route/gate.h`), one
set per phase. *Sequence sums* add up the averages of finished sequences, each rounded once to a multiple of 2^-32: q_i
(arXiv 2510.04694 eq. 1), a_i / L_i (its eq. 3), H(q_i), and the mean of H(p_t) over the tokens of the sequence. Sums of
integers do not depend on order, so two runs merge exactly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moe_route.base import files, hub
from moe_route.base.identity import same_weights
from moe_route.calls.call import PHASES, Phase
from moe_route.contract.tables import FIXED_POINT, METRICS, SCALARS
from moe_route.recording.arrays import (
    ACCUMULATED,
    SIZE_UNIT,
    broken_array,
    checked_array,
    frozen,
    ratio,
    selected_array,
    widths_of,
)
from moe_route.recording.conservation import Conservation, broken_law, conservation, missing
from moe_route.recording.metadata import config_hash_of, merge_metadata
from moe_route.recording.store import SequenceStore

if TYPE_CHECKING:
    import pandas as pd
from moe_route.base.table import WIDTH, Table, data_frame, number_of, printable, wrapped

Kind = Literal["full", "topk", "count"]
By = Literal["sequence", "token"]

# Axis 0 of the sequence sums. "all" is needed because an average over both phases is not the sum of two averages.
VIEWS = ("prefill", "decode", "all")
SEQUENCE_KINDS = ("full", "topk", "count", "frequency")
# Number of finished sequences seen by a layer; of those with a q_i of each kind (an all-zero row has none); fixed-point
# sums in nats of H(q_i), and of the mean of H(p_t) over the scored tokens. Both sums have a term per "full" sequence.
SEQUENCE_SCALARS = ("sequences", "full", "topk", "count", "entropy", "mean_token_entropy")
_SEQUENCE_NATS = ("entropy", "mean_token_entropy")
KIND_METRIC = {"full": "probability", "topk": "weight_share", "count": "counts", "frequency": "counts"}
_COUNTED = ("counts", "natural_counts")  # metrics that are integers, not fixed point
IMPORTED = "imported"  # metadata["source"] of sums from another recorder
_FILE_KIND = "statistics"
_ACCUMULATED = "accumulated."  # prefix of accumulated arrays in a file
logger = logging.getLogger(__name__)


class RecordingError(RuntimeError):
    """Raised for a recording that breaks a conservation law, or for misuse that would spoil it; names the fix."""


class MergeError(ValueError):
    """Raised for statistics that cannot be merged because model, layers or metrics differ."""


class RoutingStatistics:
    """Routing of one or more runs as integer sums, with named accessors over ``[group, layer, expert]``.

    Built by ``Recorder.statistics()``, ``load`` and ``from_token_sums``. Arrays are read-only. ``a + b`` merges
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
        tolerance: float = 0.0,
        store: SequenceStore | None = None,
        accumulated: Mapping[str, np.ndarray] | None = None,
    ):
        """Store int64 arrays. Axis 0 is ``PHASES`` or ``VIEWS``, and E is the size of the widest layer.

        ``scalars [2, G, L, 8]`` are ``ops.SCALARS``; ``metrics`` maps a name to ``[2, G, L, E]``; ``sequence_scalars
        [3, G, L, 6]`` are ``SEQUENCE_SCALARS``; ``sequence_sums`` maps a kind to ``[3, G, L, E]``. ``accumulated`` maps
        a name from ``accumulated.ACCUMULATED`` to an array of the axes and dtype that are given there. ``tolerance`` is
        the relative gap that ``verify`` accepts.

        Raises ``ValueError`` for a wrong shape, an unknown metric, or a group named twice.
        """
        self.groups = tuple(groups)
        self.layers = tuple(layers)
        self.num_experts = tuple(int(n) for n in num_experts)
        self.top_k = tuple(int(k) for k in top_k)
        self.phases = PHASES
        self.metrics = tuple(name for name in METRICS if name in metrics)
        self.has_entropy = bool(entropy)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.tolerance = float(tolerance)
        self.store = store
        _check_axes(self, metrics, sequence_sums)
        cell = (len(self.groups), len(self.layers))
        widest = max(self.num_experts, default=0)
        self._scalars = frozen(scalars, (2, *cell, len(SCALARS)), "scalars")
        self._metrics = {name: frozen(metrics[name], (2, *cell, widest), name) for name in self.metrics}
        self._sequence_scalars = frozen(sequence_scalars, (3, *cell, len(SEQUENCE_SCALARS)), "sequence_scalars")
        self._sequence_sums = {
            kind: frozen(sequence_sums[kind], (3, *cell, widest), kind)
            for kind in SEQUENCE_KINDS
            if kind in sequence_sums
        }
        self.accumulated: Mapping[str, np.ndarray] = {
            name: checked_array(name, array, *cell, widest) for name, array in (accumulated or {}).items()
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
        num_experts: int | Sequence[int] | None = None,
        phase: Phase = "prefill",
        tolerance: float = 1e-3,
        metadata: Mapping[str, Any] | None = None,
        **metrics: np.ndarray,
    ) -> RoutingStatistics:
        """Build statistics from the token sums of another recorder, without sequences; use ``by="token"`` with them.

        Args:
            counts: int ``[G, L, E]``, how many tokens chose each expert.
            tokens: int ``[G]`` or ``[G, L]``, number of tokens.
            probability, weight, weight_share: optional float ``[G, L, E]`` sums over tokens.
            num_experts: experts of each layer, if some layers have fewer than E. Without it, experts at the end of a
                layer that no group chose count as experts, with a warning.
            tolerance: relative error that the sums may have, such as from rounding to bfloat16. It is kept with the
                statistics, as is ``metadata["source"] = "imported"``. ``conservation()`` shows the gaps.

        Raises:
            RecordingError: the sums miss by more than the tolerance.
            ValueError: a wrong shape.
        """
        counts = np.rint(np.asarray(counts)).astype(np.int64)
        tokens = np.asarray(tokens)
        num_groups, num_layers, _ = counts.shape
        names = list(layers or [str(layer) for layer in range(num_layers)])
        ks = [top_k] * num_layers if isinstance(top_k, int) else list(top_k)
        widths = widths_of(counts, names, num_experts)
        of_phase = PHASES.index(phase)
        columns = np.zeros((num_groups, num_layers, len(SCALARS)), np.int64)
        columns[..., SCALARS.index("tokens")] = tokens if tokens.ndim == 2 else tokens[:, None]
        columns[..., SCALARS.index("slots")] = columns[..., SCALARS.index("tokens")] * np.asarray(ks)
        if "probability" not in metrics:
            columns[..., SCALARS.index("unscored")] = columns[..., SCALARS.index("tokens")]
        scalars = np.zeros((len(PHASES), *columns.shape), np.int64)
        scalars[of_phase] = columns
        tables = {"counts": counts} | {
            name: np.rint(np.asarray(metric) / FIXED_POINT) for name, metric in metrics.items()
        }
        stacked = {}
        for name, table in tables.items():
            stacked[name] = np.zeros((len(PHASES), num_groups, num_layers, max(widths, default=0)), np.int64)
            stacked[name][of_phase] = table[..., : max(widths, default=0)]
        statistics = cls(
            groups=groups,
            layers=names,
            num_experts=widths,
            top_k=ks,
            scalars=scalars,
            metrics=stacked,
            sequence_scalars=np.zeros((len(VIEWS), num_groups, num_layers, len(SEQUENCE_SCALARS)), np.int64),
            sequence_sums={},
            entropy=False,
            tolerance=tolerance,
            metadata={"source": IMPORTED, **(metadata or {})},
        )
        statistics.verify()
        return statistics

    # ---- token sums

    def token_sum(self, metric: str, phase: Phase | None = None) -> np.ndarray:
        """Sum of one metric over tokens, ``[G, L, E]``.

        int64 for ``counts`` and ``natural_counts``; float64 in units of one token for ``probability``, ``weight`` and
        ``weight_share``. Raises ``ValueError`` for a metric that was not recorded.
        """
        table = self._metric(metric)
        if metric in _COUNTED:
            return table.sum(0) if phase is None else table[_phase_index(phase)].copy()
        scaled = table * FIXED_POINT
        return scaled.sum(0) if phase is None else scaled[_phase_index(phase)]

    def scalar(self, name: str, phase: Phase | None = None) -> np.ndarray:
        """Sum of one of ``ops.SCALARS`` over tokens, ``[G, L]``.

        int64, or float64 for ``entropy`` (nats) and ``moved`` (share of weight).
        """
        if name not in SCALARS:
            raise ValueError(f"no scalar {name!r}: one of {', '.join(SCALARS)}")
        column = self._scalars[..., SCALARS.index(name)]
        values = column if name not in ("entropy", "moved") else column * FIXED_POINT
        return values.sum(0) if phase is None else values[_phase_index(phase)].copy()

    def tokens(self, phase: Phase | None = None) -> np.ndarray:
        """Number of tokens counted, int64 ``[G, L]``."""
        return self.scalar("tokens", phase)

    # ---- sequence sums

    def sequences(self, phase: Phase | None = None) -> np.ndarray:
        """Number of finished sequences, int64 ``[G]``: those with a counted token in this phase, in any layer."""
        seen = self.sequence_scalar("sequences", phase)
        return seen.max(axis=1, initial=0)

    def sequence_scalar(self, name: str, phase: Phase | None = None) -> np.ndarray:
        """One of ``SEQUENCE_SCALARS``, ``[G, L]``: int64 numbers of sequences, or float64 sums over sequences, in nats.

        The latter are ``entropy`` (H(q_i)) and ``mean_token_entropy`` (mean of H(p_t) over the tokens of a sequence).
        """
        if name not in SEQUENCE_SCALARS:
            raise ValueError(f"no sequence scalar {name!r}: one of {', '.join(SEQUENCE_SCALARS)}")
        values = self._sequence_scalars[_view_index(phase), ..., SEQUENCE_SCALARS.index(name)]
        return values * FIXED_POINT if name in _SEQUENCE_NATS else values.copy()

    # ---- averages

    def mean_distribution(self, kind: Kind = "full", phase: Phase | None = None, by: By = "sequence") -> np.ndarray:
        """Mean routing distribution, float64 ``[G, L, E]``; rows sum to 1 and are NaN without tokens.

        ``kind``: ``full`` uses the scores over all experts, ``topk`` the weights of the chosen experts divided by their
        sum, ``count`` the selections. ``by="sequence"`` is the mean of q_i (arXiv 2510.04694 eq. 1); ``by="token"``
        weighs every token equally. Sequences and tokens with an all-zero row are left out; ``sequence_scalar`` and
        ``scalar("unscored")`` give their number.
        """
        if kind not in KIND_METRIC or kind == "frequency":
            raise ValueError(f"no distribution kind {kind!r}: full, topk or count")
        sums = (
            self._sequence_sum(kind, phase) if _check_by(by) == "sequence" else self.token_sum(KIND_METRIC[kind], phase)
        )
        return ratio(sums, sums.sum(-1, keepdims=True))

    def frequency(self, phase: Phase | None = None, by: By = "sequence") -> np.ndarray:
        """Mean number of times that a token chooses each expert, float64 ``[G, L, E]``; NaN without tokens.

        Rows sum to k, minus the mean number of empty slots. ``by="sequence"`` is the mean of a_i / L_i (the terms of
        arXiv 2510.04694 eq. 3); ``by="token"`` is counts / tokens.
        """
        if _check_by(by) == "token":
            return ratio(self.token_sum("counts", phase), self.tokens(phase)[..., None])
        sums = self._sequence_sum("frequency", phase)
        return ratio(sums * FIXED_POINT, self.sequence_scalar("sequences", phase)[..., None])

    def entropy(
        self, of: Literal["token", "sequence"] = "token", phase: Phase | None = None, by: By = "token"
    ) -> np.ndarray:
        """Mean entropy in nats, float64 ``[G, L]``; NaN without tokens.

        ``of="token"`` is the mean of H(p_t). With ``by="token"`` all tokens have equal weight. With ``by="sequence"``
        the mean is over the tokens of each sequence, then over sequences, which is comparable with H(q_i).
        ``of="sequence"`` is the mean of H(q_i) over sequences, whatever ``by``.

        Raises ``ValueError`` if the entropy was not recorded.
        """
        if of == "sequence":
            self._sequence_sum("full", phase)
            return ratio(self.sequence_scalar("entropy", phase), self.sequence_scalar("full", phase))
        if of != "token":
            raise ValueError(f'entropy of "token" or "sequence", not {of!r}')
        if not self.has_entropy:
            raise ValueError("token entropy was not recorded: record(entropy=True)")
        if _check_by(by) == "sequence":
            return ratio(self.sequence_scalar("mean_token_entropy", phase), self.sequence_scalar("full", phase))
        return ratio(self.scalar("entropy", phase), self.tokens(phase) - self.scalar("unscored", phase))

    # ---- what was asked for beside the tables

    def consistency(self) -> np.ndarray:
        """Mean Jaccard index of the experts of two tokens of one sequence, float64 ``[G, L]``, over both phases.

        It is the mean over finished sequences; NaN without sequences of two tokens. Raises ``ValueError`` without
        ``record(consistency=...)``.
        """
        return ratio(self._accumulated("consistency") * FIXED_POINT, self._accumulated("consistency_sequences"))

    @property
    def co_selection(self) -> np.ndarray:
        """Number of tokens that chose both experts, int64 ``[G, L, E, E]``; the diagonal counts those that chose one.

        Raises ``ValueError`` without ``record(pairs=True)``.
        """
        return self._accumulated("co_selection")

    @property
    def transitions(self) -> np.ndarray:
        """Number of tokens that chose expert e in layer l and e' in layer l + 1, int64 ``[G, L-1, E, E]``.

        Zeros where the two layers are routers of two kinds (an encoder's and its decoder's). Raises ``ValueError``
        without ``record(pairs=True)``, and after ``select`` of layers that are not neighbors.
        """
        return self._accumulated("transitions")

    def expert_outputs(self, name: Literal["weighted_norm", "norm", "peak", "first"]) -> np.ndarray:
        """Sizes of the outputs f_e(x_t) of experts over the tokens t that chose them, ``[G, L, E]``, over both phases.

        "weighted_norm" is the sum of g_e(t) * |f_e(x_t)|, with the routing weight g_e; "norm" the sum of |f_e(x_t)|;
        "peak" the largest absolute element (float64, in units of the hidden states). "first" is the number of first
        tokens of a sequence that chose e (int64). Zeros where no token chose e. Raises ``ValueError`` without
        ``record(expert_outputs=True)``.
        """
        if name not in ("weighted_norm", "norm", "peak", "first"):
            raise ValueError(f"no expert outputs {name!r}: weighted_norm, norm, peak or first")
        values = self._accumulated(name)
        return values * SIZE_UNIT if name in ("weighted_norm", "norm") else values

    @property
    def hidden(self) -> np.ndarray:
        """Mean over finished sequences of the mean router input, float64 ``[G, L, H]``; NaN without sequences.

        Raises ``ValueError`` without ``record(hidden=True)``.
        """
        return ratio(self._accumulated("hidden") * SIZE_UNIT, self._accumulated("hidden_sequences")[..., None])

    def _accumulated(self, name: str) -> np.ndarray:
        if name not in self.accumulated:
            of = ACCUMULATED[name]
            lost = (
                "; select(layers=...) keeps them for a run of neighboring layers only" if of.axes[0] == "pair" else ""
            )
            flag = of.option.partition("=")[0].replace("_", "-")
            raise ValueError(
                f"{name} was not recorded: record({of.option}), in a shell moe-route record --{flag}{lost}"
            )
        return self.accumulated[name]

    # ---- selecting and merging

    def select(
        self, groups: Sequence[str] | None = None, layers: Sequence[str | int] | range | None = None
    ) -> RoutingStatistics:
        """Select groups by name, and layers by name or index, in the given order.

        The store, if any, keeps the sequences of all groups, in the selected layers.
        """
        rows = (
            list(range(len(self.groups)))
            if groups is None
            else [_position(g, self.groups, "group") for g in _listed(groups)]
        )
        columns = (
            list(range(len(self.layers))) if layers is None else [self._layer_index(layer) for layer in _listed(layers)]
        )
        widest = max((self.num_experts[i] for i in columns), default=0)

        chosen = {name: selected_array(name, array, rows, columns, widest) for name, array in self.accumulated.items()}

        def part(array: np.ndarray, width: int | None = None) -> np.ndarray:
            return array[:, rows][:, :, columns][..., :width]

        return self._with(
            groups=[self.groups[i] for i in rows],
            layers=[self.layers[i] for i in columns],
            num_experts=[self.num_experts[i] for i in columns],
            top_k=[self.top_k[i] for i in columns],
            scalars=part(self._scalars),
            metrics={name: part(table, widest) for name, table in self._metrics.items()},
            sequence_scalars=part(self._sequence_scalars),
            sequence_sums={kind: part(table, widest) for kind, table in self._sequence_sums.items()},
            store=self.store if self.store is None or layers is None else self.store.select(columns),
            accumulated={name: array for name, array in chosen.items() if array is not None},
        )

    def merge(self, other: RoutingStatistics, *, any_model: bool = False) -> RoutingStatistics:
        """Merge two runs exactly: integers are added and groups are united. The same as ``self + other``.

        ``any_model`` merges recordings of two models with the same layers, such as two checkpoints of one
        configuration. Where the weights of a run are unknown (see ``identity.checkpoint_of``), configuration and
        routers decide.

        Raises ``MergeError`` if model, layers or metrics differ, and ``RecordingError`` if a sum would overflow.
        """
        if "natural_counts" in {*self.metrics} ^ {*other.metrics}:
            return self._with_natural_counts().merge(other._with_natural_counts(), any_model=any_model)
        if not any_model:
            self._refuse_other_model(other)
        self._refuse_to_merge(other)
        groups = self.groups + tuple(group for group in other.groups if group not in self.groups)
        mine, theirs = self._spread(groups), other._spread(groups)
        added = {name: _merged(mine[name], theirs[name], name) for name in mine}
        if (self.store is None) != (other.store is None):
            logger.warning("only one of the two runs kept its sequences: the merged statistics have no store")
        return self._with(
            groups=groups,
            scalars=added["scalars"],
            metrics={name: added[f"metric.{name}"] for name in METRICS if f"metric.{name}" in added},
            sequence_scalars=added["sequence_scalars"],
            sequence_sums={kind: added[f"sequence.{kind}"] for kind in SEQUENCE_KINDS if f"sequence.{kind}" in added},
            metadata=merge_metadata(self.metadata, other.metadata),
            tolerance=max(self.tolerance, other.tolerance),
            store=None if self.store is None or other.store is None else self.store.merge(other.store),
            accumulated={name: added[_ACCUMULATED + name] for name in self.accumulated},
        )

    @classmethod
    def join_layers(cls, parts: Sequence[RoutingStatistics]) -> RoutingStatistics:
        """Join statistics of one run whose layers were recorded apart, such as stages of pipeline parallelism.

        ``merge`` is the other direction: the same layers, other tokens. Layers come in the order of the parts.

        Raises ``MergeError`` if the parts did not see the same tokens or were recorded differently, if a layer is in
        two of them, or for arrays that ``record`` accumulates (consistency, pairs, expert outputs, hidden states).
        """
        first, *others = parts
        for other in others:
            _check_same_run(first, other)
        widest = max(max(part.num_experts, default=0) for part in parts)

        def joined(name: str) -> np.ndarray:
            tables = [part._tables()[name] for part in parts]
            if name not in ("scalars", "sequence_scalars"):
                tables = [np.pad(table, [(0, 0)] * 3 + [(0, widest - table.shape[3])]) for table in tables]
            return np.concatenate(tables, axis=2)

        stores = [part.store for part in parts if part.store is not None]
        return first._with(
            layers=_without_repeats([name for part in parts for name in part.layers]),
            num_experts=[number for part in parts for number in part.num_experts],
            top_k=[number for part in parts for number in part.top_k],
            scalars=joined("scalars"),
            metrics={name: joined(f"metric.{name}") for name in first.metrics},
            sequence_scalars=joined("sequence_scalars"),
            sequence_sums={kind: joined(f"sequence.{kind}") for kind in first._sequence_sums},
            metadata={**first.metadata, **_of_all(parts)},
            tolerance=max(part.tolerance for part in parts),
            store=SequenceStore.join_layers(stores) if stores else None,
        )

    def __add__(self, other: object) -> RoutingStatistics:
        return self.merge(other) if isinstance(other, RoutingStatistics) else NotImplemented

    def __radd__(self, other: object) -> RoutingStatistics:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum([a, b, c]) starts from 0

    def __eq__(self, other: object) -> bool:
        """Whether layers, sums, model and data are equal, whatever the order of the groups.

        Stores and versions are not compared.
        """
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

    # ---- files and data frames

    def file_bytes(self, sequences: int) -> int:
        """Bytes of the file that `save` would write with this number of kept sequences, names left out.

        Those that are kept now are read to know their size. Without kept sequences, the number does not matter.
        """
        sums = sum(array.nbytes for array in self._arrays().values())
        return sums + (0 if self.store is None else self.store.file_bytes(sequences))

    def save(self, path: str | os.PathLike[str], *, sequences: bool = True) -> None:
        """Write one file (``moe_route.base.files``, kind "statistics"), with the sequences unless ``sequences=False``.

        docs/files.md describes the format for other programs. The file is written, or replaced, whole or not at all.
        Other statistics that still read sequences from a replaced file are refused from then on. Raises ``OSError`` if
        ``path`` cannot be written.
        """
        header: dict[str, Any] = {
            "groups": list(self.groups),
            "layers": list(self.layers),
            "num_experts": list(self.num_experts),
            "top_k": list(self.top_k),
            "entropy": self.has_entropy,
            "tolerance": self.tolerance,
            "metadata": self.metadata,
            "sequences": None,
        }
        blocks: Sequence[files.Block] = ()
        if sequences and self.store is not None:
            header["sequences"], blocks = self.store.content()
        files.write(path, self._arrays(), header, _FILE_KIND, blocks=blocks)
        if self.store is not None and blocks and self.store.lies_in(path):
            saved = _read(path)[2]
            assert saved is not None
            self.store.read_from(saved)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sequences: bool = True, partial: bool = False) -> RoutingStatistics:
        """Read a file that ``save`` wrote. Sequences are read when they are used; ``sequences=False`` omits them.

        ``partial``: also read what a server wrote that knows of a gap in it, see ``verify``.

        Raises ``files.FileRefusedError`` for a missing, truncated, altered or foreign file, and ``RecordingError`` for
        sums that break a conservation law.
        """
        tensors, header, store = _read(path)
        with files.expected_content(path):
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
                tolerance=header["tolerance"],
                metadata=header["metadata"],
                store=store if sequences else None,
                accumulated={
                    name: tensors[_ACCUMULATED + name] for name in ACCUMULATED if _ACCUMULATED + name in tensors
                },
            )
        statistics.verify(partial=partial)
        return statistics

    def push_to_hub(self, repo_id: str, filename: str = "statistics.safetensors", **options: Any) -> str:
        """Save the statistics in a repository of the Hugging Face hub, and return their address there.

        A repository without README gets one with metadata and a summary. ``options`` are those of ``hub.publish``:
        private, revision, token, commit_message, repo_type. Raises ``hub.HubError``.
        """
        use = f'import moe_route as mr\n\nstatistics = mr.RoutingStatistics.from_hub("{repo_id}", "{filename}")'
        name = (self.metadata.get("model") or {}).get("name")
        readme = hub.card(
            "Routing statistics", repr(self), use, base_model=name, tags=("mixture-of-experts", "routing")
        )
        return hub.publish(self.save, repo_id, filename, readme, **options)

    @classmethod
    def from_hub(cls, repo_id: str, filename: str = "statistics.safetensors", **options: Any) -> RoutingStatistics:
        """Load statistics from the Hugging Face hub, or from the client's cache.

        ``options`` are those of ``hub.fetch``: revision, token, local_files_only, repo_type. Raises ``hub.HubError``,
        and the errors of ``load``.
        """
        return cls.load(hub.fetch(repo_id, filename, **options))

    def to_pandas(self) -> pd.DataFrame:
        """Return token sums as a tidy data frame with a row per (group, phase, layer, expert).

        Columns: ``router`` (module name), ``tokens`` of the (group, phase, layer), one per metric, and ``frequency``
        (counts / tokens, NaN without tokens). Padding experts are left out.
        """
        experts = range(max(self.num_experts, default=0))
        # arrays are [phase, group, layer, expert]; rows of the frame start with the group
        columns = {name: np.stack([self.token_sum(name, p) for p in PHASES], 1).reshape(-1) for name in self.metrics}
        frame = data_frame(columns, {**self._axes, "expert": experts})
        tokens = np.stack([self.tokens(p) for p in PHASES], 1).reshape(-1)
        frame.insert(4, "tokens", np.repeat(tokens, len(experts)))
        frame.insert(3, "router", np.asarray(self.layers, dtype=object)[frame["layer"]])
        if "counts" in self.metrics:
            frame["frequency"] = ratio(frame["counts"].to_numpy(), frame["tokens"].to_numpy())
        return frame[frame["expert"] < np.asarray(self.num_experts)[frame["layer"]]].reset_index(drop=True)

    def scalars_to_pandas(self) -> pd.DataFrame:
        """Return scalars as a tidy data frame with a row per (group, phase, layer).

        Columns: every name of ``ops.SCALARS`` summed over tokens, ``sequences``, and ``sequence_entropy`` (mean).
        """
        columns = {name: np.stack([self.scalar(name, p) for p in PHASES], 1).reshape(-1) for name in SCALARS}
        counted = [self.sequence_scalar("sequences", p) for p in PHASES]
        columns["sequences"] = np.stack(counted, 1).reshape(-1)
        if "full" in self._sequence_sums:
            columns["sequence_entropy"] = np.stack([self.entropy("sequence", p) for p in PHASES], 1).reshape(-1)
        return data_frame(columns, self._axes)

    @property
    def _axes(self) -> dict[str, Sequence[Any]]:
        return {"group": self.groups, "phase": self.phases, "layer": range(len(self.layers))}

    def conservation(self, phase: Phase | None = None) -> Conservation:
        """Compare the slots that the tokens need with the slots found (choices and empty ones), by group and layer.

        The result gives the largest relative gap. Raises ``ValueError`` if counts were not recorded.
        """
        return conservation(self, phase)

    def verify(self, *, partial: bool = False) -> None:
        """Check the conservation laws; raises ``RecordingError`` naming the first (group, layer) that breaks one.

        Counts + empty slots = slots. No sum is negative (an overflow). Probabilities add up to the number of scored
        tokens within rounding. Weight shares add up to at most one per token. ``tolerance`` is an accepted relative
        gap, set by ``from_token_sums``. ``partial``: accept what ``metadata`` says is missing.
        """
        broken = broken_law(self, self._tables()) or broken_array(self.accumulated)
        if broken is None:
            if not partial and (gap := missing(self.metadata)):
                raise RecordingError(f"{gap}: partial=True reads what was counted all the same")
            return
        if self.metadata.get("source") == IMPORTED:
            raise RecordingError(
                f"{broken}, beyond the tolerance of {self.tolerance:g}: check the sums (statistics.conservation()), or "
                "allow what the other recorder loses by from_token_sums(tolerance=...)"
            )
        raise RecordingError(
            f"{broken}: the tables were written by something else, or the model was interrupted inside a layer; "
            "record again"
        )

    def __repr__(self) -> str:
        shown = []
        for group, sequences, tokens in self._sizes()[:8]:
            each = f", {tokens / sequences:.1f} each" if sequences and self._complete else ""
            shown.append(f"{group} ({number_of(sequences, 'sequence')}, {number_of(tokens, 'token')}{each})")
        more = len(self.groups) - len(shown)
        groups = f"  groups: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}"
        if len(groups) > WIDTH:
            groups = "\n    ".join(["  groups:", *shown, *([f"and {more} more"] if more > 0 else [])])
        title, *facts = self._facts()
        return printable("\n".join([title, groups, *(wrapped(fact, "  ") for fact in facts)]))

    def _repr_html_(self) -> str:
        title, *facts = self._facts()
        rows = [[*size, f"{size[2] / size[1]:.1f}" if size[1] and self._complete else ""] for size in self._sizes()]
        return Table(("group", "sequences", "tokens", "tokens each"), rows, title, "\n".join(facts))._repr_html_()

    @property
    def _complete(self) -> bool:
        """Whether all tokens belong to finished sequences, so that their ratio is the mean length of a sequence."""
        unfinished = ("running_sequences", "abandoned_sequences", "aborted_requests")
        return not any(self.metadata.get(key) for key in unfinished)

    def _sizes(self) -> list[tuple[str, int, int]]:
        """Each group's name, number of sequences, and number of tokens in the layer that counted most."""
        tokens = self.tokens().max(axis=1, initial=0)
        return list(zip(self.groups, self.sequences().tolist(), tokens.tolist(), strict=True))

    def _facts(self) -> list[str]:
        """Facts for a reader, one line each, the size first."""
        experts = "/".join(map(str, sorted(set(self.num_experts))))
        chosen = "/".join(map(str, sorted(set(self.top_k))))
        size = f"{number_of(len(self.groups), 'group')} x {number_of(len(self.layers), 'layer')} x {experts} experts"
        lines = [
            f"RoutingStatistics: {size}, top-{chosen}",
            f"metrics: {', '.join(self.metrics)}{', entropy' if self.has_entropy else ''}",
        ]
        running = self.metadata.get("running_sequences")
        if running:
            lines.append(
                f"{number_of(running, 'sequence')} still running: tokens so far are counted, the sequences are not"
            )
        model = self.metadata.get("model") or {}
        if model.get("name") or model.get("class"):
            lines.append(f"model: {model.get('name') or model.get('class')}")
        if model.get("weights_changed"):
            lines.append("checkpoint: the weights changed during the recording")
        elif model.get("config_hash") and not model.get("weights_hash"):
            lines.append("checkpoint: not known (recorded without the hash of the weights)")
        if self.metadata.get("plans"):
            lines.append(f"steered by: {', '.join(self.metadata['plans'])}")
        if self.metadata.get("cut_texts"):
            limits = "/".join(map(str, self.metadata["cut_to_tokens"]))
            lines.append(f"cut: {number_of(self.metadata['cut_texts'], 'text')} to {limits} tokens")
        if self.store is not None:
            lines.append(f"kept one by one: {number_of(len(self.store), 'sequence')}")
        return lines

    # ---- internal

    def _with_natural_counts(self) -> RoutingStatistics:
        """The same statistics with the natural choice as a metric; if no plan steered, it is the choice itself."""
        if "natural_counts" in self.metrics:
            return self
        if self.metadata.get("plans") or "counts" not in self.metrics:
            raise MergeError("only one of the two runs recorded natural_counts: record both with the same metrics")
        return self._with(metrics={**self._metrics, "natural_counts": self._metrics["counts"]})

    def _with(self, **changes: Any) -> RoutingStatistics:
        """A copy with other values for these arguments of the constructor."""
        return RoutingStatistics(
            **{
                "groups": self.groups,
                "layers": self.layers,
                "num_experts": self.num_experts,
                "top_k": self.top_k,
                "scalars": self._scalars,
                "metrics": self._metrics,
                "sequence_scalars": self._sequence_scalars,
                "sequence_sums": self._sequence_sums,
                "entropy": self.has_entropy,
                "metadata": self.metadata,
                "tolerance": self.tolerance,
                "store": self.store,
                "accumulated": self.accumulated,
                **changes,
            }
        )

    def _metric(self, name: str) -> np.ndarray:
        if name not in self._metrics:
            if name not in METRICS:
                raise ValueError(f"no metric {name!r}: one of {', '.join(METRICS)}")
            raise ValueError(f"metric {name!r} was not recorded: record(metrics={[*self.metrics, name]!r})")
        return self._metrics[name]

    def _sequence_sum(self, kind: str, phase: Phase | None) -> np.ndarray:
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

    def _refuse_other_model(self, other: RoutingStatistics) -> None:
        """Raise ``MergeError`` if the two runs are of two models, as far as their metadata tell."""
        ours, theirs = config_hash_of(self.metadata), config_hash_of(other.metadata)
        if ours and theirs and ours != theirs:
            raise MergeError(
                f"these are statistics of two models (configuration {ours[:12]} and {theirs[:12]}): merge runs of the "
                "same model only"
            )
        for name in ("router_hash", "weights_hash"):
            mine, its = ((run.metadata.get("model") or {}).get(name) for run in (self, other))
            if same_weights(mine, its) is False:
                raise MergeError(
                    f"these are statistics of two checkpoints of one configuration (their {name.replace('_', ' ')} "
                    "differs): keep them apart, or add them by merge(other, any_model=True)"
                )

    def _refuse_to_merge(self, other: RoutingStatistics) -> None:
        """Raise ``MergeError`` unless the two runs have the same layers and the same sums."""
        for name, what in (("layers", "layers"), ("num_experts", "numbers of experts"), ("top_k", "top-k")):
            if getattr(self, name) != getattr(other, name):
                raise MergeError(
                    f"the two runs have different {what}: merge runs of the same model, or select() the same layers "
                    "first"
                )
        mine, its = set(self._arrays()), set(other._arrays())
        if mine != its or self.has_entropy != other.has_entropy:
            different = sorted({_asked_for(name) for name in mine ^ its}) or ["entropy"]
            raise MergeError(
                f"only one of the two runs recorded {', '.join(different)}: record both with the same options"
            )

    def _arrays(self) -> dict[str, np.ndarray]:
        """All arrays, by their names in a file."""
        return self._tables() | {_ACCUMULATED + name: array for name, array in self.accumulated.items()}

    def _tables(self) -> dict[str, np.ndarray]:
        """The arrays that have an axis before the groups."""
        arrays = {"scalars": self._scalars, "sequence_scalars": self._sequence_scalars}
        arrays |= {f"metric.{name}": table for name, table in self._metrics.items()}
        return arrays | {f"sequence.{kind}": table for kind, table in self._sequence_sums.items()}

    def _spread(self, groups: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays with a row per name in ``groups``, zero for groups that these statistics lack."""
        place = {group: index for index, group in enumerate(groups)}
        rows = [place[group] for group in self.groups]
        spread = {}
        for name, array in self._arrays().items():
            axis = 0 if name.startswith(_ACCUMULATED) else 1
            wide = np.zeros((*array.shape[:axis], len(groups), *array.shape[axis + 1 :]), array.dtype)
            wide[(slice(None),) * axis + (rows,)] = array
            spread[name] = wide
        return spread


def _check_same_run(a: RoutingStatistics, b: RoutingStatistics) -> None:
    """Raise ``MergeError`` unless the two describe the same tokens, recorded alike."""
    for what in ("groups", "metrics", "has_entropy"):
        if getattr(a, what) != getattr(b, what):
            raise MergeError(f"the parts have different {what}: join parts that were recorded alike")
    if (a.store is None) != (b.store is None):
        raise MergeError("only one of the parts kept its sequences: join parts that were recorded alike")
    if a.accumulated or b.accumulated:
        option = ACCUMULATED[next(iter({**a.accumulated, **b.accumulated}))].option
        raise MergeError(f"arrays of record({option}) are not joined: record without it, or all layers together")
    for key in sorted({*a.metadata, *b.metadata} - {"versions", "backends", "unbalanced", "gaps"}):
        if a.metadata.get(key) != b.metadata.get(key):
            raise MergeError(f"the parts are of two runs (their {key} differs): join layers of the same run")


def _without_repeats(layers: list[str]) -> list[str]:
    repeated = sorted({name for name in layers if layers.count(name) > 1})
    if repeated:
        raise MergeError(f"layer {repeated[0]} is in two of the parts: join parts with different layers")
    return layers


def _of_all(parts: Sequence[RoutingStatistics]) -> dict[str, Any]:
    """Entries of the metadata that differ between the machines of one run."""
    names = ("versions", "unbalanced", "gaps")
    return reduce(merge_metadata, ({n: part.metadata[n] for n in names if n in part.metadata} for part in parts), {})


def _asked_for(array: str) -> str:
    """The option of ``record`` that asks for an array."""
    kind, _, name = array.partition(".")
    return ACCUMULATED[name].option if kind == "accumulated" else name or array


def _check_axes(statistics: RoutingStatistics, metrics: Iterable[str], kinds: Iterable[str]) -> None:
    for name, known in ((set(metrics) - set(METRICS), METRICS), (set(kinds) - set(SEQUENCE_KINDS), SEQUENCE_KINDS)):
        if name:
            raise ValueError(f"unknown {sorted(name)}: one of {', '.join(known)}")
    if len(set(statistics.groups)) != len(statistics.groups):
        raise ValueError("a group is named twice: group names must differ")
    lengths = {len(statistics.layers), len(statistics.num_experts), len(statistics.top_k)}
    if len(lengths) != 1:
        raise ValueError("layers, num_experts and top_k must have one entry per layer")


def _merged(a: np.ndarray, b: np.ndarray, name: str) -> np.ndarray:
    """The array ``name`` of two runs together."""
    rule = ACCUMULATED.get(name.removeprefix(_ACCUMULATED)) if name.startswith(_ACCUMULATED) else None
    if rule is not None and rule.merge == "max":
        return np.maximum(a, b)
    return a + b if a.dtype == np.float64 else _checked_sum(a, b, name)


def _checked_sum(a: np.ndarray, b: np.ndarray, name: str) -> np.ndarray:
    total = a + b
    if (((a ^ total) & (b ^ total)) < 0).any():
        raise RecordingError(f"{name} of the two runs adds up past 63 bits: keep the runs apart")
    return total


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


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any], SequenceStore | None]:
    """Read the arrays, header and sequences of a file."""
    tensors, header, blocks = files.read_blocks(path, _FILE_KIND)
    with files.expected_content(path):
        names = header["sequences"]
        store = None if names is None else SequenceStore.of_file(header["layers"], header["num_experts"], names, blocks)
    return tensors, header, store
