"""Single tokens of a trace: which token ids and classes of tokens go to which experts, and whether neighbors agree.

Every analysis of traces starts with the functions that choose its tokens, layers and experts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from moe_route.analysis.inputs import AnalysisError, normalized
from moe_route.analysis.measures import normalized_jensen_shannon, ratio
from moe_route.analysis.result import Result, by_depth, plain
from moe_route.base.table import Table
from moe_route.calls.call import PHASES
from moe_route.recording import Trace
from moe_route.steering.layers import as_layers, show_numbers

# ---- which tokens, layers and experts


def token_rows(trace: Trace, groups: Sequence[str] | str | None = None, phase: str | None = None) -> np.ndarray:
    """int64 [n]: the tokens of these groups (by default all) and this phase.

    Raises ``AnalysisError`` if there are none, naming the group that has none.
    """
    if phase is not None and phase not in PHASES:
        raise AnalysisError(f"no phase {phase!r}: prefill, decode, or None for both")
    kept = np.ones(len(trace.sequence), bool) if phase is None else trace.phase == PHASES.index(phase)
    if groups is not None:
        names = [groups] if isinstance(groups, str) else list(groups)
        for name in names:
            if name not in trace.groups or not (kept & (trace.group == trace.groups.index(name))).any():
                held = ", ".join(map(repr, trace.groups)) or "no groups"
                raise AnalysisError(f"the trace has no tokens of group {name!r} (its groups: {held})")
        kept &= np.isin(trace.group, [trace.groups.index(name) for name in names])
    rows = np.flatnonzero(kept)
    if not rows.size:
        raise AnalysisError("the trace has no tokens of this phase" if len(trace.sequence) else "the trace is empty")
    return rows


def check_trace(trace: object) -> None:
    """Refuse what is no trace."""
    if not hasattr(trace, "layer_numbers"):
        raise AnalysisError(f"give a Trace (record(trace=True), recorder.trace()), not {type(trace).__name__}")


def layer_places(trace: Trace, layers: Iterable[int] | int | None) -> tuple[tuple[int, ...], list[int]]:
    """The layers (by default all that were traced), and their places along the layer axis of the trace."""
    check_trace(trace)
    numbers = trace.layer_numbers if layers is None else as_layers(layers)
    missing = [number for number in numbers if number not in trace.layer_numbers]
    if missing or not numbers:
        traced = show_numbers(trace.layer_numbers) or "none"
        wanted = f"layer {missing[0]} was not traced" if missing else "there is no layer to look at"
        raise AnalysisError(f"{wanted}: the trace holds layers {traced}; record(trace=[...]) chooses them")
    return tuple(numbers), [trace.layer_numbers.index(number) for number in numbers]


def expert_numbers(trace: Trace, places: Sequence[int], num_experts: int | Sequence[int] | None) -> tuple[int, ...]:
    """Number of experts of the layers at these places: as given for all traced layers, or up to the largest id."""
    largest = [int(trace.ids[:, place].max(initial=-1)) + 1 for place in places]
    if num_experts is None:
        return tuple(max(number, 1) for number in largest)
    traced = len(trace.layer_numbers)
    given = [num_experts] * traced if isinstance(num_experts, int) else [int(size) for size in num_experts]
    if len(given) != traced:
        raise AnalysisError(f"num_experts must be one number, or one for each of the {traced} traced layers")
    sizes = tuple(given[place] for place in places)
    for place, size, found in zip(places, sizes, largest, strict=True):
        if size < max(found, 1):
            layer = trace.layer_numbers[place]
            raise AnalysisError(f"the trace holds expert {found - 1} of layer {layer}: num_experts is not {size}")
    return sizes


def strongest_experts(ids: np.ndarray, weights: np.ndarray, k: int | None) -> np.ndarray:
    """The k experts of each token with the largest weights, [..., k]; None: all slots. Ties go to the earlier slot."""
    if k is None or k == ids.shape[-1]:
        return ids
    ranked = np.where(ids >= 0, weights, -np.inf)
    if k == 1:
        return np.take_along_axis(ids, ranked.argmax(-1)[..., None], -1)
    order = np.argsort(-ranked, axis=-1, kind="stable")[..., :k]
    return np.take_along_axis(ids, order, -1)


def chunks(rows: np.ndarray, size: int = 1 << 15) -> Iterator[np.ndarray]:
    """The rows, ``size`` at a time, so that memory does not grow with the trace."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def check_k(trace: Trace, k: int | None) -> None:
    """Refuse a number of experts per token that the trace does not hold."""
    check_trace(trace)
    slots = trace.ids.shape[-1]
    if k is not None and not 1 <= k <= slots:
        raise AnalysisError(f"k must be between 1 and {slots}, the experts of a token in this trace, not {k}")


def text_order(trace: Trace, rows: np.ndarray) -> np.ndarray:
    """The rows in the order of the text: by sequence, then by position.

    Raises ``AnalysisError`` if a position of a sequence occurs twice, so that the text has no order.
    """
    ordered = rows[np.lexsort((trace.position[rows], trace.sequence[rows]))]
    sequence, position = trace.sequence[ordered], trace.position[ordered]
    twice = np.flatnonzero((sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1]))
    if twice.size:
        raise AnalysisError(
            f"sequence {sequence[twice[0]]} has position {position[twice[0]]} twice, as with beams or with an encoder "
            "and its decoder: trace without beams, and either the encoder's layers or the decoder's"
        )
    return ordered


def class_index(trace: Trace, rows: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """int64 [n], the class of each of these tokens, and the names of the classes; ids outside are "other"."""
    names, numbers = np.unique(np.asarray([*classes, "other"], dtype=np.str_), return_inverse=True)
    token = trace.token[rows].astype(np.int64)
    known = (token >= 0) & (token < len(classes))
    return numbers[np.where(known, token, len(classes))], tuple(names.tolist())


# ---- token ids at experts

_CHUNK = 1 << 18  # number of tokens that are counted together
_SHOWN = 16  # number of experts that the text lists


class TokenShare(NamedTuple):
    """A token id at an expert: N_xe, ``share`` = N_xe / N_x, and ``of_expert`` = N_xe / N_e."""

    token: int
    tokens: int
    share: float
    of_expert: float


_LEADING = ("layer", "expert", *TokenShare._fields, "text")


@dataclass(frozen=True, eq=False, repr=False)
class Vocabulary(Result, hidden=("top", "names")):
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

    def columns(self) -> dict[str, Any]:
        """A row per (layer, expert, token) of the leading ids: the fields of ``TokenShare``, and the ``text``."""
        rows = [(*key, *share, self._text(share.token)) for key, shares in self.top.items() for share in shares]
        columns = zip(*rows, strict=True) if rows else [()] * len(_LEADING)
        return dict(zip(_LEADING, columns, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None), the leading ids as a list."""
        columns = self.columns()
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return {**super().to_dict(), "top": plain(rows)}

    def tables(self) -> list[Table]:
        name = {"input": "input tokens", "next": "the next token of the text"}.get(self.of, "the given tokens")
        title = f"Vocabulary specialization, {name}: {self.ids} ids of {self.tokens} tokens"
        note = f"ids with {self.min_tokens} tokens or more; shuffled: ids shuffled over the tokens"
        rows = {"specialization": self.by_layer, "shuffled": self.chance}
        shown = by_depth(rows, layers=self.layers, title=title, note=note)
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
        share = ratio(counts, total)
        by_layer[row] = _mean(share.max(1))
        shuffled = _routed(trace, here, random.permutation(token), place, k, len(ids), width)
        chance[row] = _mean(ratio(shuffled, total).max(1))
        by_expert[row] = ratio((counts * np.nan_to_num(share)).sum(0), counts.sum(0))
        top |= {(numbers[row], e): leading for e, leading in _leading(counts, share, ids, order, keep)}
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
    following = np.full(trace.token.shape, -1, trace.token.dtype)
    following[here[follows]] = trace.token[after[follows]]
    return following


def _routed(
    trace: Trace, rows: np.ndarray, index: np.ndarray, place: int, k: int | None, size: int, experts: int
) -> np.ndarray:
    """int64 [size, E]: number of tokens of each index that chose each expert."""
    counts = np.zeros(size * experts, np.int64)
    for part, of in zip(chunks(rows, _CHUNK), chunks(index, _CHUNK), strict=True):
        chosen = strongest_experts(trace.ids[part, place], trace.weights[part, place], k)
        cells = of[:, None] * experts + chosen
        counts += np.bincount(cells[chosen >= 0], minlength=counts.size)
    return counts.reshape(size, experts)


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


# ---- classes of tokens at experts


@dataclass(frozen=True, eq=False, repr=False)
class ClassRouting(Result):
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

    frequency: Annotated[np.ndarray, "class layer expert"]
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
        frequency[:, row] = ratio(counts, total[:, None])[order]
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


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else float("nan")


# ---- nearby tokens

_RUNS = 1 << 12  # number of runs that are counted together


@dataclass(frozen=True, eq=False, repr=False)
class LocalConsistency(Result):
    """Segment routing best performance (SRP) of each layer and expert.

    Attributes:
        values: float64 [L], SRP of the experts of a layer together, in [0, 1]; NaN without segments.
        size_ratio: float64 [L], experts that the best segment router activates over those that the model activates.
        by_expert: float64 [L, E], SRP of single experts; NaN for experts that were never chosen.
        segment: m, the number of tokens in a segment.
        segments: int64 [L], number of segments.
        layers: the L layers, as indices among the MoE layers.
    """

    values: Annotated[np.ndarray, "layer as srp"]
    size_ratio: Annotated[np.ndarray, "layer"]
    by_expert: np.ndarray
    segment: int
    segments: Annotated[np.ndarray, "layer"]
    layers: tuple[int, ...]

    def tables(self) -> list[Table]:
        title = f"Segment routing best performance, segments of {self.segment} tokens"
        rows = {"SRP": self.values, "size ratio": self.size_ratio}
        return [by_depth(rows, layers=self.layers, title=title)]


def local_consistency(
    trace: Trace,
    *,
    segment: int = 16,
    layers: Iterable[int] | None = None,
    groups: Sequence[str] | None = None,
    phase: Literal["prefill", "decode"] | None = None,
    num_experts: int | Sequence[int] | None = None,
) -> LocalConsistency:
    """Measure how well one set of experts can serve m consecutive tokens: SRP [arXiv 2505.16056, eq. 3 to 6].

    A segment router chooses, for every run of m consecutive tokens of a sequence, experts that it uses for all m. SRP
    is the largest F1 score that such a router can reach against the model's own choices. With f the number of tokens in
    a run that chose an expert, it is reached by choosing the experts with f of at least some threshold a:

    ``SRP = max_a 2 sum_{f >= a} f / (sum_{f >= a} m + sum f)``, sums over runs and experts.

    Runs overlap: one begins at every token. Runs with a missing token (a gap in the positions) are left out.

    Args:
        segment: m.
        layers, groups, phase: what to look at; by default everything that was traced.
        num_experts: experts of the traced layers; by default up to the largest id that was chosen.

    Raises ``AnalysisError`` if no sequence has m consecutive tokens.
    """
    if segment < 1:
        raise AnalysisError(f"segment must be 1 token or more, not {segment}")
    numbers, places = layer_places(trace, layers)
    sizes = expert_numbers(trace, places, num_experts)
    rows = token_rows(trace, groups, phase)
    histograms = np.zeros((len(numbers), max(sizes), segment + 1), np.int64)
    for row, place in enumerate(places):
        ordered = text_order(trace, rows[(trace.ids[rows, place] >= 0).any(-1)])
        if len(ordered) >= segment:
            histograms[row] = _histogram(trace, ordered, place, segment, histograms.shape[1])
    segments = histograms.sum(-1)[:, 0]
    if not segments.any():
        raise AnalysisError(f"no sequence has {segment} consecutive tokens in the trace: pass a smaller segment")
    together = histograms.sum(1)
    values, threshold = _best(together)
    active = np.take_along_axis(_from_above(together), threshold[:, None], -1)[:, 0] * segment
    chosen = (together * np.arange(segment + 1)).sum(-1)
    return LocalConsistency(
        values=values,
        size_ratio=ratio(active, chosen),
        by_expert=_best(histograms)[0],
        segment=segment,
        segments=segments,
        layers=numbers,
    )


def _histogram(trace: Trace, ordered: np.ndarray, place: int, segment: int, experts: int) -> np.ndarray:
    """int64 [E, m + 1]: number of runs in which f tokens chose an expert."""
    last = len(ordered) - segment + 1
    first, end = ordered[:last], ordered[segment - 1 :]
    unbroken = (trace.sequence[first] == trace.sequence[end]) & (
        trace.position[end] - trace.position[first] == segment - 1
    )
    counts = np.zeros(experts * (segment + 1), np.int64)
    offset = np.arange(experts) * (segment + 1)
    for starts in chunks(np.arange(last), _RUNS):
        tokens = ordered[starts[0] : starts[-1] + segment]
        member = np.zeros((len(tokens) + 1, experts), np.int32)
        ids = trace.ids[tokens, place]
        of_token, slots = np.nonzero(ids >= 0)
        member[of_token + 1, ids[of_token, slots]] = 1
        before = np.cumsum(member, axis=0, dtype=np.int32)
        f = (before[segment:] - before[: len(starts)])[unbroken[starts]]
        counts += np.bincount((f + offset).reshape(-1), minlength=counts.size)
    return counts.reshape(experts, segment + 1)


def _best(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest F1 over thresholds, and that threshold, for histograms [..., m + 1]; NaN where nothing was chosen."""
    counts = np.arange(histogram.shape[-1])
    right = _from_above(histogram * counts)
    below = (histogram.shape[-1] - 1) * _from_above(histogram) + right[..., :1]
    f1 = ratio(2.0 * right, below, empty=0.0)
    f1[..., 0] = -1.0  # choosing experts that no token of a run chose is never better
    threshold = f1.argmax(-1)
    best = np.take_along_axis(f1, threshold[..., None], -1)[..., 0]
    return np.where(right[..., 0] > 0, best, np.nan), threshold


def _from_above(values: np.ndarray) -> np.ndarray:
    """Sums from each place to the last, over the last axis."""
    return np.cumsum(values[..., ::-1], axis=-1)[..., ::-1]
