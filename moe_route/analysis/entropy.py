"""Sharpness of routing: entropy of tokens and of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from moe_route.analysis.estimators import jackknife_entropy, miller_madow
from moe_route.analysis.inputs import AnalysisError, normalized, pick_groups
from moe_route.analysis.measures import entropy_of, ratio
from moe_route.analysis.resampling import GroupSequences, blocks, groups_of, tokens_per_sequence
from moe_route.analysis.result import Result, by_depth, mean_of_seen, token_column
from moe_route.analysis.stats import draw_items, interval_of, resampled_means
from moe_route.base.table import Table
from moe_route.recording import RoutingStatistics

_ENTROPIES = ("token", "sequence", "within")


@dataclass(frozen=True, eq=False, repr=False)
class Entropy(Result, hidden=("sequence_values", "token_values", "sequence_tokens")):
    """Mean routing entropy in nats, float64 [G, L].

    Attributes:
        token: mean of H(p_t) over tokens, all with equal weight; None if not requested.
        sequence: mean over sequences of H(q_i), with q_i the mean distribution of a sequence; None if not requested.
        groups, layers: names of the axes.
        num_experts: experts of each layer; its logarithm is the largest possible entropy.
        within: mean over sequences of the mean of H(p_t) over a sequence's tokens, all sequences with equal weight;
            None unless both of the above were requested.
        kind: the router scores of ``sequence``: "full", "topk" or "count".
        correct: the correction for short texts in ``sequence``: "miller_madow", "jackknife" or None.
        tokens: float64 [G], mean number of tokens per sequence; NaN where sequences were not counted.
        sequence_values: per group, float64 [sequences, L]: the values of which ``sequence`` is the mean; None if
            sequences were not kept.
        token_values: the same for ``within``; None unless ``within`` and sequences were kept.
        sequence_tokens: per group, int64 [sequences, L], the tokens of these sequences; None where the above is.
    """

    token: Annotated[np.ndarray, "group layer"] | None
    sequence: Annotated[np.ndarray, "group layer"] | None
    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    within: Annotated[np.ndarray, "group layer"] | None = None
    kind: str = "full"
    correct: str | None = None
    tokens: np.ndarray | None = None
    sequence_values: tuple[np.ndarray, ...] | None = None
    token_values: tuple[np.ndarray, ...] | None = None
    sequence_tokens: tuple[np.ndarray, ...] | None = None

    @property
    def gap(self) -> np.ndarray:
        """Differences between the tokens of one sequence, float64 [G, L], in nats.

        It is ``sequence - within``: the mean over sequences of the Jensen-Shannon divergence of their tokens. It is not
        negative, except for rounding (1e-6). ``sequence - token`` would be another quantity, since ``token`` gives long
        sequences more weight.
        """
        if self.within is None or self.sequence is None:
            raise AnalysisError('the gap needs both entropies: entropy(statistics, of="both")')
        return self.sequence - self.within

    def normalized(self, of: Literal["token", "sequence"] = "token") -> np.ndarray:
        """Entropy divided by log E, float64 [G, L], in [0, 1]; NaN for a layer with one expert."""
        values = self.values(of)
        most = np.log(np.asarray(self.num_experts, dtype=np.float64))
        return ratio(values, most)

    def interval(
        self,
        level: float = 0.95,
        *,
        of: Literal["sequence", "token", "gap"] = "sequence",
        resamples: int = 1000,
        seed: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap interval (low, high) of ``sequence``, ``token`` or ``gap`` over sequences, float64 [G, L] each.

        Sequences of each group are drawn with replacement, with all layers together. A drawn sequence counts in the
        token entropy by its number of tokens. NaN with a single sequence.
        """
        if of not in ("sequence", "token", "gap"):
            raise AnalysisError(f'of must be "sequence", "token" or "gap", not {of!r}')
        if self.sequence_values is None:
            raise AnalysisError("an interval needs the sequence entropy of kept sequences: record(sequences=True)")
        if of != "sequence" and (self.token_values is None or self.sequence_tokens is None):
            raise AnalysisError(
                f"an interval of the {of} entropy needs the token entropy of kept sequences: record(sequences=True, "
                'entropy=True), and entropy(statistics, of="both")'
            )
        ends = []
        for group, values in enumerate(self.sequence_values):
            weights = draw_items(len(values), resamples, seed)
            ends.append(interval_of(self._resampled(group, of, weights), len(values), level))
        low, high = np.stack(ends, axis=1)
        return low, high

    def _resampled(self, group: int, of: str, weights: np.ndarray) -> np.ndarray:
        """Values of one group under weights [R, sequences], float64 [R, L]."""
        assert self.sequence_values is not None
        if of == "sequence":
            return resampled_means(weights, self.sequence_values[group])
        assert self.token_values is not None
        assert self.sequence_tokens is not None
        within = self.token_values[group]
        if of == "gap":
            return resampled_means(weights, self.sequence_values[group] - within)
        tokens = np.where(np.isnan(within), 0, self.sequence_tokens[group])
        number = weights @ tokens
        return ratio(weights @ (tokens * np.nan_to_num(within)), number)

    def values(self, of: str) -> np.ndarray:
        """The "token" or the "sequence" entropy. Raises ``AnalysisError`` for one that was not requested."""
        values = {"token": self.token, "sequence": self.sequence}.get(of)
        if values is None:
            raise AnalysisError(f'there is no {of} entropy here: entropy(statistics, of="both")')
        return values

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None), without the entropies that were not requested."""
        present = dict(self._present())
        content = super().to_dict()
        return {name: content[name] for name in content if name not in _ENTROPIES or name in present}

    def _present(self) -> list[tuple[str, np.ndarray]]:
        return [(name, values) for name in _ENTROPIES if (values := getattr(self, name)) is not None]

    def tables(self) -> list[Table]:
        titles = {"token": "token entropy (nats)", "sequence": f"sequence entropy (nats){self._how()}"}
        before = token_column(self.tokens)
        shown = [
            by_depth(self.groups, values, title=titles[name], before=before)
            for name, values in self._present()
            if name != "within"
        ]
        if self.within is None:
            return shown
        title = "gap (nats): how much the tokens of one sequence differ"
        return [*shown, by_depth(self.groups, self.gap, title=title)]

    def _how(self) -> str:
        of = {"full": "", "topk": ", of the chosen experts' weights", "count": ", of selections"}[self.kind]
        return of + {None: "", "miller_madow": ", corrected (Miller-Madow)", "jackknife": ", jackknife"}[self.correct]


def entropy(
    statistics: RoutingStatistics,
    *,
    of: Literal["both", "token", "sequence"] = "both",
    groups: Sequence[str] | str | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    kind: Literal["full", "topk", "count"] = "full",
    correct: Literal["miller_madow", "jackknife"] | None = None,
) -> Entropy:
    """Mean routing entropy of tokens and of sequences, by group and layer.

    The gap between them needs ``of="both"`` and sequence sums. Every recording has these; imported token sums do not.

    Args:
        statistics: ``RoutingStatistics``.
        of: "token", "sequence" or "both".
        groups: by default all.
        phase: "prefill", "decode" or both; for the sums alone.
        kind: the router scores of the sequence entropy. "topk" and "count" need kept sequences, and give the sequence
            entropy alone.
        correct: for ``kind="count"``, remove the bias of short sequences, whose entropy is too low: "miller_madow"
            (``analysis.miller_madow``) or "jackknife" (``analysis.jackknife_entropy``).

    Raises ``AnalysisError`` for unknown or empty groups and for corrections without counts, ``ValueError`` for an
    entropy that was not recorded.
    """
    if of not in ("both", "token", "sequence"):
        raise AnalysisError(f'of must be "both", "token" or "sequence", not {of!r}')
    if correct not in (None, "miller_madow", "jackknife"):
        raise AnalysisError(f'no correction {correct!r}: use "miller_madow", "jackknife" or None')
    names = pick_groups(statistics, groups, phase=phase)
    axes = names, tuple(statistics.layers), tuple(statistics.num_experts)
    tokens = tokens_per_sequence(statistics, names)
    if kind != "full" or correct is not None:
        values = _values_of_kind(statistics, names, of, phase, kind, correct)
        means = np.stack([mean_of_seen(one)[0] for one in values])
        return Entropy(None, means, *axes, kind=kind, correct=correct, tokens=tokens, sequence_values=values)
    rows = [statistics.groups.index(name) for name in names]
    token = statistics.entropy("token", phase)[rows] if of in ("both", "token") else None
    sequence = statistics.entropy("sequence", phase)[rows] if of in ("both", "sequence") else None
    within = statistics.entropy("token", phase, by="sequence")[rows] if of == "both" else None
    kept: dict[str, Any] = {}
    if of != "token" and phase is None:
        kept = _kept(statistics, names, with_tokens=within is not None)
    return Entropy(token, sequence, *axes, within, tokens=tokens, **kept)


def _values_of_kind(
    statistics: Any, names: Sequence[str], of: str, phase: str | None, kind: str, correct: str | None
) -> tuple[np.ndarray, ...]:
    """The sequence entropies of a kind that sums do not give, corrected; raises ``AnalysisError`` with the reason."""
    if correct is not None and kind != "count":
        raise AnalysisError(
            f'correct="{correct}" works on whole selections, and kind="{kind}" is a mean of router scores: pass '
            'kind="count" (--kind count)'
        )
    if of == "token":
        raise AnalysisError(f'kind="{kind}" is of sequences: leave of out, or pass of="sequence"')
    if phase is not None:
        raise AnalysisError("kept sequences join prefill and decode: leave phase out")
    if statistics.store is None:
        raise AnalysisError(f'kind="{kind}" needs kept sequences: record(sequences=True)')
    every = groups_of(statistics, names, _items_of(statistics, names), kind)
    return tuple(_entropies(one, statistics.top_k, correct) for one in every)


def _kept(statistics: Any, names: Sequence[str], *, with_tokens: bool) -> dict[str, tuple[np.ndarray, ...]]:
    """The values of every sequence, as attributes of ``Entropy``, if all were kept."""
    store = statistics.store
    if store is None or "probability" not in getattr(statistics, "metrics", ()):
        return {}
    counted = statistics.sequences()
    if any(not len(store.items(name)) == counted[statistics.groups.index(name)] > 0 for name in names):
        return {}
    values, groups = [], []
    for one in groups_of(statistics, names, _items_of(statistics, names), "full"):
        values.append(_entropies(one, statistics.top_k, None))
        groups.append((one.token_entropy, one.tokens))
    kept = {"sequence_values": tuple(values)}
    if with_tokens and not any(np.isnan(token[tokens > 0]).all() for token, tokens in groups):
        kept |= {
            "token_values": tuple(token for token, _ in groups),
            "sequence_tokens": tuple(tokens for _, tokens in groups),
        }
    return kept


def _items_of(statistics: Any, names: Sequence[str]) -> dict[str, list[Any]]:
    """The items of the kept sequences of each group."""
    items: dict[str, list[Any]] = {name: [] for name in names}
    for item, group in statistics.store:
        if group in items:
            items[group].append(item)
    if empty := [name for name in names if not items[name]]:
        raise AnalysisError(f"no sequence of {empty[0]!r} was kept: record it with sequences=True, or leave it out")
    return items


def _entropies(sequences: GroupSequences, top_k: Sequence[int], correct: str | None) -> np.ndarray:
    """Entropies of the sequences of one group, float64 [sequences, L]."""
    entropies = np.empty(sequences.tokens.shape)
    for part in blocks(sequences.values.shape):
        values = sequences.values[part]
        if correct == "miller_madow":
            entropies[part] = miller_madow(values, np.asarray(top_k))
        elif correct == "jackknife":
            entropies[part] = jackknife_entropy(values)
        else:
            entropies[part] = entropy_of(normalized(values.astype(np.float64)))
    return entropies
