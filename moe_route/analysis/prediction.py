"""How well a token's id, its context, language or place predicts which experts it chooses: the floor for explanations.

An explanation of an expert that predicts its tokens no better than the token's id explains the token. RouterInterp
(ICLR 2026 workshops) compares its features with a bigram in this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.measures import ratio
from moe_route.analysis.result import Result, by_depth
from moe_route.analysis.tokens import expert_numbers, layer_places, token_rows
from moe_route.base.table import Table
from moe_route.recording import Trace

FEATURES = ("language", "position", "token", "previous and token")
_PLACES = 16  # classes of positions: 0, 1, 2-3, 4-7, ...
_CONTEXTS = 5
_SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Result, hidden=("contexts",)):
    """How well each feature predicts the choice of each expert, on texts that it was not counted in.

    Attributes:
        recall: float64 [feature, layer, expert], share of the expert's tokens among the tokens that the feature ranks
            first, as many as the expert has ("recall at the expert's own rate"); NaN for experts without held-out
            tokens.
        mean: float64 [feature, layer], mean over experts, each weighed by its tokens.
        chance: float64 [layer], the same for a random ranking.
        features, layers: names of the axes.
        num_experts: experts of each layer.
        contexts: (layer, expert) -> the (previous id, id, share of its tokens that choose the expert, tokens) that
            choose it most surely, -1 for the beginning of a text.
        tokens: numbers of tokens counted and held out.
    """

    recall: Annotated[np.ndarray, "feature layer expert"]
    mean: Annotated[np.ndarray, "feature layer"]
    chance: np.ndarray
    features: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    contexts: Mapping[tuple[int, int], tuple[tuple[int, int, float, int], ...]]
    tokens: tuple[int, int]
    names: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None), with the contexts of each expert as a list."""
        listed = [
            {"layer": layer, "expert": expert, "contexts": [list(one) for one in found]}
            for (layer, expert), found in self.contexts.items()
        ]
        return {**super().to_dict(), "contexts": listed}

    def tables(self) -> list[Table]:
        rows = {"by chance": self.chance, **dict(zip(self.features, self.mean, strict=True))}
        title = (
            f"Recall at the expert's own rate on {self.tokens[1]} held-out tokens, features counted in {self.tokens[0]}"
        )
        shown = [by_depth(rows, layers=self.layers, title=title)]
        of_token = self.features.index("token") if "token" in self.features else 0
        best = np.argsort(-np.nan_to_num(self.recall[of_token], nan=-1.0), axis=None, kind="stable")
        cells = [divmod(int(cell), self.recall.shape[2]) for cell in best]
        lines = [
            [self.layers[row], expert, float(self.recall[of_token, row, expert]), ", ".join(map(self._shown, found))]
            for row, expert in cells
            if (found := self.contexts.get((self.layers[row], expert)))
        ][:_SHOWN]
        head = ("layer", "expert", "recall", "surest contexts: previous, token (share of its tokens)")
        shown.append(Table(head, lines, f"Experts that {self.features[of_token]} predicts best"))
        return shown

    def _shown(self, context: tuple[int, int, float, int]) -> str:
        previous, token, share, _ = context
        return f"{self._text(previous)} {self._text(token)} ({share:.2f})"

    def _text(self, token: int) -> str:
        if token < 0:
            return "^"
        return repr(self.names[token]) if self.names is not None and token < len(self.names) else str(token)


def predict(
    trace: Trace,
    *,
    features: Sequence[str] = FEATURES,
    layers: Iterable[int] | None = None,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    num_experts: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Prediction:
    """Measure how well features of tokens predict their experts, counted in half of the texts, on the other half.

    A feature predicts expert e for a token by the share of the tokens with its value that chose e in the first half;
    values that did not occur there back off, to the share of the token's id and then of all tokens. The tokens of the
    second half are ranked by it. Recall at the expert's own rate is the share of the expert's tokens among the first
    n, where n is their number; tokens with equal shares count by their expectation in random order. Texts of one item,
    such as translations, are in the same half.

    Args:
        features: out of "language" (the group), "position" (in powers of two), "token" (the id), and "previous and
            token" (two ids, the bigram).
        layers, groups, phase, num_experts: as in ``vocabulary``.
        names: text of each token id, for the table of contexts.

    Raises ``AnalysisError`` for a trace without token ids, or with fewer than two texts.
    """
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        raise AnalysisError(f"features are {', '.join(FEATURES)}: there is no {', '.join(unknown) or 'feature'}")
    numbers, places = layer_places(trace, layers)
    sizes = expert_numbers(trace, places, num_experts)
    rows = token_rows(trace, groups, phase)
    if (trace.token[rows] < 0).any():
        raise AnalysisError("some tokens have no ids, as where a model is called with embeddings: trace calls with ids")
    previous = _previous(trace)[rows]
    held = _held_out(trace, rows, seed)
    values = _values(trace, rows, previous)
    recall = np.full((len(features), len(numbers), max(sizes)), np.nan)
    chance = np.full(len(numbers), np.nan)
    mean = np.full(recall.shape[:2], np.nan)
    contexts: dict[tuple[int, int], tuple[tuple[int, int, float, int], ...]] = {}
    for row, (place, width) in enumerate(zip(places, sizes, strict=True)):
        chosen = _chosen(trace.ids[rows, place], width)
        shares = {name: _shares(values[name], chosen, held) for name in ("token", "previous and token")}
        base = chosen[~held].mean(0)
        own = chosen[held].astype(np.float64)
        total = own.sum(0)
        for f, name in enumerate(features):
            score = _score(name, values, chosen, held, shares, base)
            recall[f, row, :width] = [_recall(score[:, e], own[:, e]) for e in range(width)]
            mean[f, row] = float(np.nansum(recall[f, row, :width] * total) / max(total.sum(), 1))
        chance[row] = float((total / len(own) * total).sum() / max(total.sum(), 1))
        contexts |= _contexts(numbers[row], previous, trace.token[rows], chosen)
    return Prediction(
        recall,
        mean,
        chance,
        tuple(features),
        numbers,
        sizes,
        contexts,
        (int((~held).sum()), int(held.sum())),
        None if names is None else tuple(names),
    )


def _previous(trace: Trace) -> np.ndarray:
    """int64 [N]: the id of the token before each one of its text, -1 at the beginning."""
    order = np.lexsort((trace.position, trace.sequence))
    here, before = order[1:], order[:-1]
    follows = (trace.sequence[here] == trace.sequence[before]) & (trace.position[here] == trace.position[before] + 1)
    previous = np.full(len(trace.token), -1, np.int64)
    previous[here[follows]] = trace.token[before[follows]]
    return previous


def _held_out(trace: Trace, rows: np.ndarray, seed: int) -> np.ndarray:
    """bool [n]: tokens of the second half of the texts; texts of one item are together."""
    names: dict[Any, int] = {}
    of_sequence = [
        names.setdefault(("#", number) if item is None else item, len(names)) for number, item in enumerate(trace.items)
    ]
    used = np.unique(np.asarray(of_sequence)[trace.sequence[rows]])
    if len(used) < 2:
        raise AnalysisError("features are counted in some texts and tested on others: trace two items or more")
    later = np.random.default_rng(seed).permutation(used)[len(used) // 2 :]
    return np.isin(np.asarray(of_sequence)[trace.sequence[rows]], later)


def _values(trace: Trace, rows: np.ndarray, previous: np.ndarray) -> dict[str, np.ndarray]:
    """Feature -> a number for each value that occurs, int64 [n]."""
    token = trace.token[rows].astype(np.int64)
    position = np.minimum(np.frexp(trace.position[rows].astype(np.float64))[1], _PLACES)  # 0, 1, 2-3, 4-7, ...
    pair = (previous + 1) * (int(token.max()) + 1) + token
    given = {"language": trace.group[rows], "position": position, "token": token, "previous and token": pair}
    return {name: np.unique(value, return_inverse=True)[1] for name, value in given.items()}


def _chosen(ids: np.ndarray, width: int) -> np.ndarray:
    """float32 [n, E]: 1 where a token chose the expert."""
    chosen = np.zeros((len(ids), width + 1), np.float32)
    np.put_along_axis(chosen, np.where(ids >= 0, ids, width).astype(np.int64), 1, axis=1)
    return chosen[:, :width]


def _shares(value: np.ndarray, chosen: np.ndarray, held: np.ndarray) -> np.ndarray:
    """float64 [values, E]: share of the counted tokens with each value that chose each expert; NaN if none has it."""
    sums = np.zeros((int(value.max()) + 1, chosen.shape[1]))
    np.add.at(sums, value[~held], chosen[~held])
    return ratio(sums, np.bincount(value[~held], minlength=len(sums))[:, None])


def _score(
    name: str,
    values: Mapping[str, np.ndarray],
    chosen: np.ndarray,
    held: np.ndarray,
    shares: Mapping[str, np.ndarray],
    base: np.ndarray,
) -> np.ndarray:
    """float64 [held-out tokens, E]; values that were not counted back off."""
    of_value = shares[name] if name in shares else _shares(values[name], chosen, held)
    score = of_value[values[name][held]]
    if name == "previous and token":
        score = np.where(np.isnan(score), shares["token"][values["token"][held]], score)
    return np.where(np.isnan(score), base, score)


def _recall(score: np.ndarray, own: np.ndarray) -> float:
    """Expected share of an expert's tokens among the first so many by score, ties in random order."""
    number = int(own.sum())
    if not number:
        return float("nan")
    bar = np.partition(score, len(score) - number)[len(score) - number]
    above, equal = score > bar, score == bar
    room = number - int(above.sum())
    return float((own[above].sum() + own[equal].sum() * room / equal.sum()) / number)


def _contexts(
    layer: int, previous: np.ndarray, token: np.ndarray, chosen: np.ndarray
) -> dict[tuple[int, int], tuple[tuple[int, int, float, int], ...]]:
    """The contexts of two tokens or more that choose each expert most surely; ties go to the more frequent one."""
    pairs, index, sizes = np.unique(
        np.stack([previous, token.astype(np.int64)], axis=1), axis=0, return_inverse=True, return_counts=True
    )
    sums = np.zeros((len(pairs), chosen.shape[1]))
    np.add.at(sums, index.reshape(-1), chosen)
    often = np.flatnonzero(sizes > 1)
    share = sums[often] / sizes[often, None]
    surest: dict[tuple[int, int], tuple[tuple[int, int, float, int], ...]] = {}
    for expert in np.flatnonzero(chosen.any(0)).tolist():
        order = np.lexsort((-sizes[often], -share[:, expert]))[:_CONTEXTS]
        best = []
        for i in order.tolist():
            before, here = pairs[often[i]].tolist()
            if share[i, expert] > 0:
                best.append((int(before), int(here), float(share[i, expert]), int(sizes[often[i]])))
        surest[layer, expert] = tuple(best)
    return surest
