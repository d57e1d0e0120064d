"""The content of a report: what it is made from, read from files, and everything that the page shows, as JSON."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_route import __version__, analysis, plots
from moe_route.analysis import AnalysisError, Divergence
from moe_route.analysis.inputs import read_scores
from moe_route.analysis.result import plain
from moe_route.base import files, schema
from moe_route.base.schema import FileRefusedError
from moe_route.recording import RoutingStatistics, Trace
from moe_route.recording.metadata import config_hash_of
from moe_route.report.page import packed_numbers, rounded
from moe_route.report.result_tables import TABLES_FILE, ResultTable, is_results, read_results
from moe_route.report.token_view import Pieces, chosen_sequences, pieces_by_id, pieces_of, token_view
from moe_route.steering import ExpertSelection, Plan

logger = logging.getLogger(__name__)

_LEVEL = 0.95
_MIN_GROUPS = 4  # fewer scores give a correlation of no meaning
_DEFAULT_REFERENCE = "eng_Latn"
_TRACE_BYTES = 1_200_000  # of all traces together
_CHOICES = 300_000_000  # tokens times layers times experts that are counted for the cards of experts
_CONTEXTS = 12_000  # contexts on the cards of experts, at most 5 of each
_LOADERS: dict[str, tuple[str, Any]] = {
    "statistics": ("recordings", RoutingStatistics.load),
    "trace": ("traces", Trace.load),
    "selection": ("selections", ExpertSelection.load),
    "plan": ("plans", Plan.load),
}


@dataclass(frozen=True)
class Figure:
    """A section with one figure of results.

    Attributes:
        name: of the section, a word of letters and hyphens.
        title, text, caption: heading, what the figure shows, and how to read it.
        kind: "lines" (``rows``: name -> value of each layer), "bars" (name -> [before, after, [value of each random
            draw]], from 0 to 1), or "matrix" (name -> value of each column; the cell of a row's own name is framed).
        rows: the values by name, from top to bottom.
        axis: what the values are, in a few words.
        columns: names of a matrix's columns.
        labels: of bars, what stands before, after, and what is drawn.
    """

    name: str
    title: str
    text: str
    kind: Literal["lines", "bars", "matrix"]
    rows: Mapping[str, Sequence[Any]]
    axis: str = ""
    caption: str = ""
    columns: Sequence[str] = ()
    labels: Sequence[str] = ("before", "after", "random")


@dataclass(frozen=True)
class Inputs:
    """What a report shows, each thing under a name of its own.

    Attributes:
        recordings: recorded statistics.
        traces: experts of single tokens. Two traces of the same texts are shown side by side, such as with and without
            a plan.
        selections, plans: experts to mark.
        scores: name of a measure of performance -> group -> score.
        results: tables of results, such as those of an evaluation.
        figures: figures of results, which stand first.
    """

    recordings: Mapping[str, RoutingStatistics] = field(default_factory=dict)
    traces: Mapping[str, Trace] = field(default_factory=dict)
    selections: Mapping[str, ExpertSelection] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    results: tuple[ResultTable, ...] = ()
    figures: tuple[Figure, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is anything to show; scores are shown with a recording only."""
        return any((self.recordings, self.traces, self.selections, self.plans, self.results, self.figures))


def read(paths: Iterable[str | os.PathLike[str]]) -> Inputs:
    """Read files of any of these kinds, and folders with a ``tables.json``; the content tells the kind.

    Each thing gets the name of its file without suffix. Raises ``files.FileRefusedError`` for a damaged file, and
    ``ValueError`` for one that a report cannot show.
    """
    named: dict[str, Any] = {name: {} for name in ("recordings", "traces", "selections", "plans", "scores")}
    results: list[ResultTable] = []
    for path in map(Path, paths):
        where, thing = _read(path)
        if where == "results":
            results.extend(thing)
        else:
            named[where][_free_name(path, named[where])] = thing
    return Inputs(**named, results=tuple(results))


def _read(path: Path) -> tuple[str, Any]:
    if path.is_dir():
        # `moe-route eval` writes its tables into the folder of its last stage
        tables = next((one for one in (path / TABLES_FILE, path / "report" / TABLES_FILE) if one.is_file()), None)
        if tables is None:
            raise ValueError(f"{path} has no {TABLES_FILE}: name files, or a folder of results")
        return "results", read_results(tables)
    if path.suffix in (".tsv", ".txt"):
        return "scores", _scores(path)
    if not files.is_json(path):
        kind = files.read_header(path)["kind"]
        if kind not in _LOADERS:
            raise ValueError(f"{path} is a file of kind {kind!r}, which a report does not show: leave it out")
        where, load = _LOADERS[kind]
        return where, load(path)
    content = schema.load_json(path)
    if is_results(content):
        return "results", read_results(path)
    kind = content.get("moe_route") if isinstance(content, dict) else None
    if kind in _LOADERS:
        where, load = _LOADERS[kind]
        return where, load(path)
    return "scores", _scores(path)


def _scores(path: Path) -> dict[str, float]:
    try:
        scores = read_scores(path)
    except (TypeError, ValueError) as error:
        raise FileRefusedError(f"{path} is neither results nor a score per group ({error}): leave it out") from error
    if not scores:
        raise ValueError(f"{path} holds no score: write a group, a tab and a score per line")
    return scores


def _free_name(path: Path, taken: Mapping[str, Any]) -> str:
    """The file's name without suffix; with its folder, then with a number, if it is taken."""
    for name in (path.stem, f"{path.parent.name}/{path.stem}", *(f"{path.stem} ({n})" for n in range(2, 1000))):
        if name not in taken:
            return name
    raise ValueError(f"too many files are named {path.stem}: rename some")


def _facts(statistics: RoutingStatistics) -> dict[str, Any]:
    """Model, versions, groups with tokens and sequences, what was left out, and the conservation of slots."""
    metadata = statistics.metadata
    tokens, sequences = statistics.tokens(), statistics.sequences()
    held = statistics.conservation() if "counts" in statistics.metrics else None
    return {
        "model": {**(metadata.get("model") or {}), "config_hash": config_hash_of(metadata)},
        "source": metadata.get("source", "moe-route"),
        "versions": metadata.get("versions", {}),
        "engines": metadata.get("engines", []),
        "backends": metadata.get("backends", []),
        "layers": len(statistics.layers),
        "routers": list(statistics.layers),
        "experts": list(statistics.num_experts),
        "topK": list(statistics.top_k),
        "metrics": list(statistics.metrics),
        "groups": [
            {"name": name, "tokens": int(of.max(initial=0)), "sequences": int(number)}
            for name, of, number in zip(statistics.groups, tokens, sequences, strict=True)
        ],
        "masked": metadata.get("masked", []),
        "specialTokens": len(metadata.get("special_tokens", [])),
        "cutTexts": metadata.get("cut_texts", 0),
        "cutTo": metadata.get("cut_to_tokens", []),
        "plans": metadata.get("plans", []),
        "abandoned": metadata.get("abandoned_sequences", 0),
        "keptSequences": statistics.store is not None,
        "conservation": None
        if held is None
        else {"holds": held.holds, "largestGap": _finite(held.largest_gap), "slots": int(held.expected.sum())},
    }


def _weighting(statistics: RoutingStatistics) -> str:
    """ "sequence" where sequences were counted, else "token"."""
    return "sequence" if statistics.sequences().any() else "token"


def _frequencies(statistics: RoutingStatistics) -> dict[str, Any] | None:
    """How often a token chooses each expert, [group, layer, expert], packed; None without counts."""
    if "counts" not in statistics.metrics:
        return None
    by = _weighting(statistics)
    values = statistics.frequency(by=by)  # type: ignore[arg-type]
    beyond = np.arange(values.shape[2]) >= np.asarray(statistics.num_experts)[:, None]
    return {"by": by, "values": packed_numbers(np.where(beyond, np.nan, values))}


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _divergence(statistics: RoutingStatistics, reference: str) -> tuple[Divergence, dict[str, Any]]:
    """Divergence of all groups from the reference: paired, with floor and intervals, where sequences were kept."""
    diverging = analysis.divergence(statistics, reference, pairing="auto", by=_weighting(statistics))
    paired = diverging.pair_values is not None and diverging.pairs > 1
    low, high = diverging.interval(_LEVEL) if paired else (None, None)
    return diverging, {
        "reference": diverging.reference,
        "groups": list(diverging.groups),
        "measure": diverging.measure,
        "pairing": diverging.pairing,
        "pairs": diverging.pairs,
        "level": _LEVEL,
        "values": rounded(diverging.values),
        "low": rounded(low),
        "high": rounded(high),
        "floor": rounded(diverging.expected_floor) if paired else None,
        "undefined": int(diverging.undefined.sum()),
        "even": list(diverging.even_layers),
    }


def _correlation(diverging: Divergence, scores: Mapping[str, float]) -> dict[str, Any] | None:
    """Correlation by layer of divergence with scores over the groups that have one; None with too few groups."""
    groups = [group for group in diverging.groups if group in scores]
    if len(groups) < _MIN_GROUPS:
        return None
    result = analysis.correlation(diverging, scores, groups=groups)
    low, high = result.interval(_LEVEL) if diverging.pair_values is not None else (None, None)
    return {
        "groups": groups,
        "reference": diverging.reference,
        "level": _LEVEL,
        "orders": result.orders,
        "pearson": rounded(result.pearson),
        "spearman": rounded(result.spearman),
        "p": rounded(result.p_value),
        "pCorrected": rounded(result.p_corrected),
        "low": rounded(low),
        "high": rounded(high),
        "scores": rounded(np.array([scores[group] for group in groups])),
    }


def _balance(statistics: RoutingStatistics) -> dict[str, Any]:
    """Load over experts and entropy of the router, [group, layer] each; only measures that were recorded."""
    measures: dict[str, dict[str, Any]] = {}
    if "counts" in statistics.metrics:
        load = analysis.load_balance(statistics)
        measures["Entropy of the load / log E"] = {"values": rounded(load.entropy)}
        measures["Largest share of the load"] = {"values": rounded(load.max_share)}
        measures["Effective number of experts"] = {"values": rounded(load.effective)}
        measures["Share of experts never chosen"] = {"values": rounded(load.dead)}
    if statistics.has_entropy:
        token = statistics.entropy("token") / np.log(np.maximum(statistics.num_experts, 2))
        measures["Entropy of the router per token / log E"] = {"values": rounded(token)}
    if statistics.sequences().any():
        sequence = statistics.entropy("sequence") / np.log(np.maximum(statistics.num_experts, 2))
        measures["Entropy of the mean over a sequence / log E"] = {"values": rounded(sequence)}
    return {"groups": list(statistics.groups), "measures": measures}


def content_of(
    inputs: Inputs,
    *,
    reference: str | None = None,
    tokenizer: Any = None,
    title: str | None = None,
    lead: str | None = None,
) -> dict[str, Any]:
    """Compute what a report shows.

    Args:
        reference: the group that others are compared with; by default eng_Latn, or the first group.
        tokenizer: gives the texts of token ids; without it, the ids are shown.
        title: heading of the page; by default the name of the model.
        lead: the line below it; by default what the page is made from.

    Raises ``ValueError`` if there is nothing to show, or no recording has the reference.
    """
    if not inputs:
        raise ValueError("there is nothing to report: pass a recording, a trace, or another result")
    if reference is not None and not any(reference in of.groups for of in inputs.recordings.values()):
        held = sorted({group for of in inputs.recordings.values() for group in of.groups})
        raise ValueError(f"no recording has the reference {reference!r}: there are {', '.join(held) or 'no groups'}")
    pieces = pieces_by_id if tokenizer is None else pieces_of(tokenizer)
    with _warnings() as warned:
        recordings = {name: _recording(one, reference, inputs.scores) for name, one in inputs.recordings.items()}
        traces = _traces(inputs, pieces)
        cards = _cards(inputs, pieces)
    return {
        "title": title or f"Expert routing of {_model_name(inputs)}",
        "lead": lead,
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "recordings": recordings,
        "styles": _styles(inputs),
        "marks": _marks(inputs),
        "results": [table.to_dict() for table in inputs.results],
        "figures": [plain(asdict(figure)) for figure in inputs.figures],
        "traces": traces,
        "cards": cards,
        "hasTexts": tokenizer is not None,
        "warnings": list(dict.fromkeys(warned)),
    }


def _recording(
    given: RoutingStatistics, reference: str | None, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    seen = given.tokens().max(axis=1, initial=0) > 0
    statistics = given.select(groups=[name for name, some in zip(given.groups, seen, strict=True) if some])
    content: dict[str, Any] = {
        "facts": _facts(given),
        "groups": list(statistics.groups),
        "frequency": _frequencies(statistics) if statistics.groups else None,
        "balance": _balance(statistics) if statistics.groups else None,
        "divergence": None,
        "correlations": [],
    }
    base = _reference(statistics, reference)
    content["reference"] = base
    if base is not None and len(statistics.groups) > 1:
        diverging, content["divergence"] = _divergence(statistics, base)
        correlations = {name: _correlation(diverging, of) for name, of in scores.items()}
        content["correlations"] = [{"name": name, **of} for name, of in correlations.items() if of is not None]
        for name in (name for name, of in correlations.items() if of is None):
            logger.warning(
                "scores %s: too few of the groups of a recording have one, a correlation needs %d", name, _MIN_GROUPS
            )
    return content


def _reference(statistics: RoutingStatistics, wanted: str | None) -> str | None:
    for name in (wanted, _DEFAULT_REFERENCE, *statistics.groups[:1]):
        if name in statistics.groups:
            return name
    return None


def _marks(inputs: Inputs) -> list[dict[str, Any]]:
    """Sets of experts to mark: of selections, and those that plans name."""
    sizes = next((of.num_experts for of in inputs.recordings.values()), ())
    marks = [_mark(name, "selection", selection) for name, selection in inputs.selections.items()]
    every = {layer: range(size) for layer, size in enumerate(sizes)}
    for name, plan in inputs.plans.items():
        experts = every or {layer: range(size) for layer, size in enumerate(plan.model.num_experts or ())}
        marks.append(_mark(name, "plan", plan.touching(experts), plan))
    return marks


def _mark(name: str, kind: str, experts: ExpertSelection, plan: Plan | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "description": experts.description if plan is None else plan.describe(),
        "hash": None if plan is None else plan.hash,
        "experts": [list(pair) for pair in experts.pairs],
    }


def _traces(inputs: Inputs, pieces: Pieces) -> list[dict[str, Any]]:
    room = _TRACE_BYTES // max(len(inputs.traces), 1)
    return [
        {"name": name, **token_view(trace, pieces, chosen_sequences(trace, room))}
        for name, trace in inputs.traces.items()
        if len(trace)
    ]


def _cards(inputs: Inputs, pieces: Pieces) -> dict[str, Any] | None:
    """The contexts that choose each expert most surely, of the first trace that can tell; None without one."""
    for name, trace in inputs.traces.items():
        try:
            predicted = analysis.predict(_part(trace), features=("token", "previous and token"))
        except AnalysisError as error:
            logger.info("the trace %s gives no cards of experts: %s", name, error)
            continue
        most = max(1, _CONTEXTS // max(len(predicted.contexts), 1))
        text = cache(lambda token: "" if token < 0 else pieces([token])[0][0])
        cards = [
            {
                "layer": layer,
                "expert": expert,
                "recall": rounded(predicted.recall[:, predicted.layers.index(layer), expert], 3),
                "contexts": [
                    [text(previous), text(token), rounded(np.array([share]), 3)[0], tokens]
                    for previous, token, share, tokens in contexts[:most]
                ],
            }
            for (layer, expert), contexts in predicted.contexts.items()
        ]
        return {"trace": name, "layers": list(predicted.layers), "tokens": list(predicted.tokens), "cards": cards}
    return None


def _part(trace: Trace) -> Trace:
    """The texts of a trace on which counting takes seconds: the first of every group, then the second, and so on."""
    tokens = _CHOICES // max(len(trace.layers) * (int(trace.ids.max(initial=0)) + 1), 1)
    if len(trace) <= tokens:
        return trace
    kept = np.isin(trace.sequence, chosen_sequences(trace, tokens * int(np.prod(trace.ids.shape[1:])) * 4))
    by_token = {name: getattr(trace, name)[kept] for name in ("sequence", "group", "position", "token", "phase")}
    return replace(trace, ids=trace.ids[kept], weights=trace.weights[kept], logits=None, scores=(), **by_token)


def _styles(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Color and dashes of each group, the same as in the figures of ``plots``."""
    groups = dict.fromkeys(group for of in inputs.recordings.values() for group in of.groups)
    of_group: dict[str, dict[str, Any]] = {}
    for group, style in plots.styles(groups).items():
        dashes = () if style["linestyle"] == "-" else style["linestyle"][1]
        width = style["linewidth"]
        of_group[group] = {"color": style["color"], "dash": " ".join(f"{width * d:g}" for d in dashes) or None}
    return of_group


def _model_name(inputs: Inputs) -> str:
    names = [(of.metadata.get("model") or {}).get("name") for of in inputs.recordings.values()]
    names += [plan.model.name for plan in inputs.plans.values()]
    return next((str(name) for name in names if name), "a model")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collect the warnings of this library, which the report repeats; they are logged and shown as well."""
    collected: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected.append(record.getMessage())

    handler = Collect(logging.WARNING)
    log = logging.getLogger("moe_route")
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield collected
    finally:
        log.removeHandler(handler)
    collected.extend(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
