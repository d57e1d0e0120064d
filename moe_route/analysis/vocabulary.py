"""Experts and the vocabulary: which token ids, and which classes of tokens, go to which experts."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from moe_route.analysis.inputs import AnalysisError, normalized
from moe_route.analysis.measures import normalized_jensen_shannon
from moe_route.analysis.result import by_depth, plain
from moe_route.analysis.trace_tokens import (
    check_k,
    chunks,
    class_index,
    expert_numbers,
    layer_places,
    strongest_experts,
    text_order,
    token_rows,
)
from moe_route.recording.frames import data_frame
from moe_route.texttable import ShownAsTables, Table

if TYPE_CHECKING:
    import pandas as pd

    from moe_route.recording import Trace

__all__ = ["ClassRouting", "TokenShare", "Vocabulary", "class_routing", "token_classes", "vocabulary"]

_CHUNK = 1 << 18  # number of tokens that are counted together
_SHOWN = 16  # number of experts that the text lists


class TokenShare(NamedTuple):
    """A token id at an expert: N_xe, ``share`` = N_xe / N_x, and ``of_expert`` = N_xe / N_e."""

    token: int
    tokens: int
    share: float
    of_expert: float


@dataclass(frozen=True, eq=False, repr=False)
class Vocabulary(ShownAsTables):
    """Specialization of experts on token ids.

    N_x is the number of tokens with the id x, N_e those that chose expert e, and N_xe those with both. Only ids with
    ``min_tokens`` tokens or more are counted, in all of these.

    Attributes:
        by_layer: float64 [L], mean over token ids of ``max_e N_xe / N_x``: the share of an id's tokens that its expert
            receives.
        chance: float64 [L], the same with the ids shuffled over the tokens: a router that does not see the id.
        by_expert: float64 [L, E], mean over the tokens of an expert of ``N_xe / N_x``; NaN for experts without tokens.
        top: the leading ids of an expert, by (layer, expert).
        layers: the L layers, as indices among the MoE layers.
        ids: number of token ids that are counted.
        tokens: number of their tokens.
        min_tokens: see above.
        of: "input", "next", or "given".
        names: text of each token id, if given.
    """

    by_layer: np.ndarray
    chance: np.ndarray
    by_expert: np.ndarray
    top: dict[tuple[int, int], tuple[TokenShare, ...]]
    layers: tuple[int, ...]
    ids: int
    tokens: int
    min_tokens: int
    of: str
    names: tuple[str, ...] | None = None

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (layer, expert, token) of the leading ids."""
        rows = [(*key, *share) for key, shares in self.top.items() for share in shares]
        names = ("layer", "expert", "token", "tokens", "share", "of_expert")
        columns: dict[str, Any] = (
            dict(zip(names, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(names, ())
        )
        return data_frame(columns | {"text": [self._text(token) for token in columns["token"]]})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        names = ("by_layer", "chance", "by_expert", "layers", "ids", "tokens", "min_tokens", "of")
        content: dict[str, Any] = plain({name: getattr(self, name) for name in names})
        top = [
            {"layer": layer, "expert": expert, **share._asdict(), "text": self._text(share.token)}
            for (layer, expert), shares in self.top.items()
            for share in shares
        ]
        return content | {"top": top}

    def tables(self) -> list[Table]:
        name = {"input": "input tokens", "next": "the next token of the text"}.get(self.of, "the given tokens")
        title = f"Vocabulary specialization, {name}: {self.ids} ids of {self.tokens} tokens"
        note = f"ids with {self.min_tokens} tokens or more; shuffled: ids shuffled over the tokens"
        rows = {"specialization": self.by_layer, "shuffled": self.chance}
        shown = by_depth(list(rows), np.stack(list(rows.values())), layers=self.layers, title=title, note=note)
        order = np.argsort(-np.nan_to_num(self.by_expert), axis=None, kind="stable")[:_SHOWN]
        places = np.argwhere(np.ones(self.by_expert.shape, bool))[order].tolist()
        experts = [
            [self.layers[row], expert, float(self.by_expert[row, expert]), self._listed(self.layers[row], expert)]
            for row, expert in places
            if (self.layers[row], expert) in self.top
        ]
        head = ["layer", "expert", "specialization", "token ids (share of the id's tokens)"]
        return [shown, Table(head, experts, "most specialized experts")]

    def _listed(self, layer: int, expert: int) -> str:
        shares = self.top[layer, expert][:6]
        names = [repr(self._text(share.token)) if self.names else str(share.token) for share in shares]
        return ", ".join(f"{name} ({share.share:.2f})" for name, share in zip(names, shares, strict=True))

    def _text(self, token: int) -> str:
        return self.names[token] if self.names is not None and 0 <= token < len(self.names) else ""


def vocabulary(
    trace: Trace,
    *,
    of: Literal["input", "next"] | np.ndarray = "input",
    k: int | None = None,
    layers: Iterable[int] | None = None,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    min_tokens: int = 10,
    order: Literal["share", "tokens"] = "share",
    keep: int = 10,
    num_experts: int | Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> Vocabulary:
    """Measure how far experts specialize on token ids: ``N_xe / N_x`` [arXiv 2409.02060, section 5.4].

    Args:
        of: the token id x of a token: its own ("input"), that of the token that follows in the text ("next"), or int
            [N] for all tokens of the trace, such as the ids that the model predicted; -1 leaves a token out.
        k: number of experts per token that count, those with the largest weights; None: all chosen ones.
        layers, groups, phase: what to look at; by default everything that was traced.
        min_tokens: ids with fewer tokens are left out, since the share of a rare id is large by chance.
        order: list the ids of an expert by their share ("share") or by their number of tokens ("tokens").
        keep: number of ids to list for each expert.
        num_experts: experts of the traced layers; by default up to the largest id that was chosen.
        names: text of each token id, for display.

    Raises ``AnalysisError`` if no id has enough tokens, or if the trace has no token ids.
    """
    if order not in ("share", "tokens") or min_tokens < 1 or keep < 0:
        raise AnalysisError('order must be "share" or "tokens", min_tokens 1 or more, keep 0 or more')
    check_k(trace, k)
    numbers, places = layer_places(trace, layers)
    width = max(expert_numbers(trace, places, num_experts))
    rows, index, ids = _counted(trace, token_rows(trace, groups, phase), of, min_tokens)
    random = np.random.Generator(np.random.PCG64(0))
    by_layer, chance = np.empty(len(places)), np.empty(len(places))
    by_expert = np.empty((len(places), width))
    top: dict[tuple[int, int], tuple[TokenShare, ...]] = {}
    for row, place in enumerate(places):
        chose = (trace.ids[rows, place] >= 0).any(-1)
        here, token = rows[chose], index[chose]
        counts = _routed(trace, here, token, place, k, len(ids), width)
        total = np.bincount(token, minlength=len(ids))[:, None]
        share = _ratio(counts, total)
        by_layer[row] = _mean(share.max(1))
        shuffled = _routed(trace, here, random.permutation(token), place, k, len(ids), width)
        chance[row] = _mean(_ratio(shuffled, total).max(1))
        by_expert[row] = _ratio((counts * np.nan_to_num(share)).sum(0), counts.sum(0))
        top |= {(numbers[row], e): found for e, found in _leading(counts, share, ids, order, keep)}
    return Vocabulary(
        by_layer=by_layer,
        chance=chance,
        by_expert=by_expert,
        top=top,
        layers=numbers,
        ids=len(ids),
        tokens=len(rows),
        min_tokens=min_tokens,
        of=of if isinstance(of, str) else "given",
        names=None if names is None else tuple(names),
    )


def _counted(
    trace: Trace, rows: np.ndarray, of: str | np.ndarray, min_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows whose token id counts, the place of each row's id in ``ids``, and these ids in increasing order."""
    token = _token_ids(trace, of)[rows]
    rows, token = rows[token >= 0], token[token >= 0]
    if not rows.size:
        raise AnalysisError("these tokens have no ids, as where a model is called with embeddings: pass of=ids [N]")
    ids, index, counts = np.unique(token, return_inverse=True, return_counts=True)
    kept = counts >= min_tokens
    if not kept.any():
        raise AnalysisError(f"no token id occurs {min_tokens} times in these tokens: trace more, or lower min_tokens")
    new = np.cumsum(kept) - 1
    return rows[kept[index]], new[index[kept[index]]], ids[kept]


def _token_ids(trace: Trace, of: str | np.ndarray) -> np.ndarray:
    """int [N]: the id that stands for each token of the trace, -1 for none."""
    if not isinstance(of, str):
        given = np.asarray(of)
        if given.shape != trace.token.shape or not np.issubdtype(given.dtype, np.integer):
            raise AnalysisError(f"of must hold an integer for each of the {len(trace.token)} tokens of the trace")
        return given
    if of == "input":
        return trace.token
    if of != "next":
        raise AnalysisError(f'of must be "input", "next" or an array of ids, not {of!r}')
    ordered = text_order(trace, np.arange(len(trace.token)))
    here, after = ordered[:-1], ordered[1:]
    follows = (trace.sequence[here] == trace.sequence[after]) & (trace.position[here] + 1 == trace.position[after])
    found = np.full(trace.token.shape, -1, trace.token.dtype)
    found[here[follows]] = trace.token[after[follows]]
    return found


def _routed(
    trace: Trace, rows: np.ndarray, index: np.ndarray, place: int, k: int | None, size: int, experts: int
) -> np.ndarray:
    """int64 [size, E]: number of tokens of each index that chose each expert."""
    found = np.zeros(size * experts, np.int64)
    for part, of in zip(chunks(rows, _CHUNK), chunks(index, _CHUNK), strict=True):
        chosen = strongest_experts(trace.ids[part, place], trace.weights[part, place], k)
        cells = of[:, None] * experts + chosen
        found += np.bincount(cells[chosen >= 0], minlength=found.size)
    return found.reshape(size, experts)


def _leading(
    counts: np.ndarray, share: np.ndarray, ids: np.ndarray, order: str, keep: int
) -> Iterable[tuple[int, tuple[TokenShare, ...]]]:
    """The leading ids of each expert that has tokens; ties go to the more frequent, then to the lower id."""
    for expert in np.flatnonzero(counts.any(0)).tolist() if keep else ():
        here = np.flatnonzero(counts[:, expert])
        if len(here) > keep:
            first = (share if order == "share" else counts)[here, expert]
            here = here[first >= np.partition(first, -keep)[-keep]]
        tokens, shares = counts[here, expert], share[here, expert]
        keys = (here, -tokens, -shares) if order == "share" else (here, -shares, -tokens)
        leading = np.lexsort(keys)[:keep]
        total = int(counts[:, expert].sum())
        yield (
            expert,
            tuple(TokenShare(int(ids[here[i]]), int(tokens[i]), float(shares[i]), tokens[i] / total) for i in leading),
        )


@dataclass(frozen=True, eq=False, repr=False)
class ClassRouting(ShownAsTables):
    """How often the tokens of each class choose each expert.

    Attributes:
        frequency: float64 [C, L, E], share of the tokens of a class that choose an expert; NaN without tokens.
        tokens: int64 [C], tokens of each class.
        divergence: float64 [C, L], entropy-normalized Jensen-Shannon divergence of the choices of a class from those of
            all tokens.
        classes: names of the C classes, the most frequent first.
        layers: the L layers, as indices among the MoE layers.
        num_experts: experts of each layer.
    """

    frequency: np.ndarray
    tokens: np.ndarray
    divergence: np.ndarray
    classes: tuple[str, ...]
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]

    def of(self, name: str) -> np.ndarray:
        """float64 [L, E]: the frequencies of one class."""
        if name not in self.classes:
            raise AnalysisError(f"no class {name!r} here: one of {', '.join(self.classes)}")
        return self.frequency[self.classes.index(name)]

    def to_pandas(self) -> pd.DataFrame:
        """Return a tidy data frame with a row per (class, layer, expert)."""
        axes = {"class": self.classes, "layer": self.layers, "expert": range(self.frequency.shape[-1])}
        frame = data_frame({"frequency": self.frequency.reshape(-1)}, axes)
        sizes = dict(zip(self.layers, self.num_experts, strict=True))
        return frame[frame["expert"] < frame["layer"].map(sizes)].reset_index(drop=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        names = ("classes", "tokens", "divergence", "frequency", "layers", "num_experts")
        content: dict[str, Any] = plain({name: getattr(self, name) for name in names})
        return content

    def tables(self) -> list[Table]:
        names = [f"{name} ({tokens})" for name, tokens in zip(self.classes, self.tokens.tolist(), strict=True)]
        title = "Divergence of each class of tokens from all tokens (number of tokens)"
        return [by_depth(names, self.divergence, layers=self.layers, title=title)]


def class_routing(
    trace: Trace,
    classes: Sequence[str],
    *,
    k: int | None = None,
    layers: Iterable[int] | None = None,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    num_experts: int | Sequence[int] | None = None,
) -> ClassRouting:
    """Measure how often the tokens of each class choose each expert.

    Args:
        classes: class of each token id, a name per id, such as from ``token_classes``. Ids outside are "other".
        k, layers, groups, phase, num_experts: as in ``vocabulary``.
    """
    check_k(trace, k)
    numbers, places = layer_places(trace, layers)
    sizes = expert_numbers(trace, places, num_experts)
    rows = token_rows(trace, groups, phase)
    index, names = class_index(trace, rows, classes)
    tokens = np.bincount(index, minlength=len(names))
    order = [number for number in np.argsort(-tokens, kind="stable").tolist() if tokens[number]]
    frequency = np.empty((len(order), len(places), max(sizes)))
    divergence = np.empty(frequency.shape[:2])
    for row, place in enumerate(places):
        counts = _routed(trace, rows, index, place, k, len(names), max(sizes))
        total = np.bincount(index, (trace.ids[rows, place] >= 0).any(-1), len(names))
        frequency[:, row] = _ratio(counts, total[:, None])[order]
        divergence[:, row] = normalized_jensen_shannon(
            normalized(counts[order].astype(np.float64)), normalized(counts.sum(0).astype(np.float64)), sizes[row]
        )
    return ClassRouting(frequency, tokens[order], divergence, tuple(names[number] for number in order), numbers, sizes)


def token_classes(
    tokens: Sequence[str], *, by: Literal["script", "start"] = "script", special: Iterable[int] = ()
) -> tuple[str, ...]:
    """Class of each token id, by what characters its text has.

    Args:
        tokens: text of each id, such as ``[tokenizer.decode([i]) for i in range(len(tokenizer))]``. "▁" and "Ġ" count
            as a space.
        by: "script" gives "whitespace", "digit", "punctuation", "symbol", "bytes" (part of a character), or the script
            of the first letter ("latin", "devanagari", "cjk", ...). "start" gives "word start" for text after
            whitespace and "inside" for other text.
        special: ids of special tokens, which are "special" (``tokenizer.all_special_ids``).
    """
    if by not in ("script", "start"):
        raise AnalysisError(f'by must be "script" or "start", not {by!r}')
    apart = set(special)
    sort = _script if by == "script" else _start
    spaced = (text.replace("▁", " ").replace("Ġ", " ") for text in tokens)
    return tuple("special" if i in apart else sort(text) for i, text in enumerate(spaced))


def _start(text: str) -> str:
    return "word start" if text[:1].isspace() else "inside"


def _script(text: str) -> str:
    if not text.strip():
        return "whitespace"
    if "�" in text:
        return "bytes"
    kinds = {character: unicodedata.category(character)[0] for character in text.strip()}
    for character, kind in kinds.items():
        if kind in "LM":
            return unicodedata.name(character, "other").split()[0].split("-")[0].lower()
    if "N" in kinds.values():
        return "digit"
    return "punctuation" if "P" in kinds.values() else "symbol"


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(above.shape, below.shape)
    return np.divide(above, below, out=np.full(shape, np.nan), where=np.broadcast_to(below, shape) > 0)


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else float("nan")
