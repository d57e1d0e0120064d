"""Transplants: run texts with routes that were recorded elsewhere, and measure what it costs by group and layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_route.analysis import AnalysisError
from moe_route.analysis.effects import PERMUTATIONS, Effects
from moe_route.analysis.result import Result, plain
from moe_route.analysis.stats import RESAMPLES
from moe_route.base.table import Table, interval
from moe_route.data.batches import EncodedTexts, Text
from moe_route.experiments.text_run import TextRun
from moe_route.recording import Recorder
from moe_route.recording.trace import Trace
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.lines import KeptRuns
from moe_route.steering import Plan

ROUTES = ("own", "pooled", "choice", "other", "scores")
ALL = "all"


@dataclass(frozen=True, eq=False, repr=False)
class Transplant(Result, hidden=("effect",)):
    """Change of the loss under transplanted routes, in nats per token; positive: the transplanted route is worse.

    Attributes:
        groups, routes, bands: names of the G groups, R routes and B bands of layers; the first band is all layers.
        effect: effects [G, R, B] of the route in the layers of the band, with the model's own routing elsewhere.
        loss: float64 [G], loss under the model's own routing.
        layers: the layers of each band.
        reference: the group that the routes "choice", "other" and "scores" come from.
        note: which texts were cut, "" if none was.
    """

    groups: tuple[str, ...]
    routes: tuple[str, ...]
    bands: tuple[str, ...]
    effect: Effects
    loss: np.ndarray
    layers: tuple[tuple[int, ...], ...]
    reference: str
    note: str = ""

    @property
    def mediated(self) -> np.ndarray:
        """float64 [G, R, B]: effect of each band as a share of the total effect; NaN where the total is 0.

        Shares of bands that make up the model need not add up to 1, since the effects of layers interact. Divide only
        where the interval of the total effect leaves out 0.
        """
        total = np.broadcast_to(self.effect.mean[..., :1], self.effect.mean.shape)
        return np.divide(self.effect.mean, total, out=np.full(total.shape, np.nan), where=total != 0)

    def _measured(self) -> dict[str, np.ndarray]:
        return {"tokens": self.effect.tokens, **self.effect.columns("effect"), "mediated": self.mediated}

    def columns(self) -> dict[str, Any]:
        """``group``, ``route``, ``band``, ``tokens``, the effect with its interval and p-value, ``mediated``."""
        return self.over("group route band", self._measured())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        return {**super().to_dict(), **plain(self._measured())}

    def tables(self) -> list[Table]:
        """A row per route and group, a column per band."""
        rows = [
            [route, group, float(self.loss[g]), *(self._cell(g, r, b) for b in range(len(self.bands)))]
            for r, route in enumerate(self.routes)
            for g, group in enumerate(self.groups)
        ]
        title = "Transplanted routes: change of the loss by the layers that use them, nats per token [95 % interval]"
        return [Table(("route", "group", "loss", *self.bands), rows, title, self.note)]

    def _cell(self, *at: int) -> str:
        ends = interval(self.effect.low[at], self.effect.high[at], none="no interval")
        return f"{self.effect.mean[at]:+.3f} {ends}"


def transplant(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    *,
    reference: str = "eng_Latn",
    kinds: Sequence[str] = ROUTES[:4],
    routes: Mapping[str, Trace | Plan] | None = None,
    bands: Mapping[str, Iterable[int] | int] | None = None,
    routed: RoutedModel | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    progress: bool = False,
    kept: KeptRuns | None = None,
) -> Transplant:
    """Run every text with transplanted routes, and measure the change of its loss.

    The total effect of a route is the change of the loss if all layers use it. If only the layers of a band use it, the
    change is the part of the effect that these layers mediate. Weights always are the model's own scores of the
    experts, except for the route "scores".

    | kind | route of a text |
    |---|---|
    | "own" | its own experts, token by token: the change is 0, which tests the machinery [R3, arXiv 2510.11370] |
    | "pooled" | for all tokens, the top k of its own average scores: what one choice per text costs |
    | "choice" | for all tokens, the top k of the average scores of the item's text in ``reference`` |
    | "other" | the same of another item, as a control: what the item's content is worth |
    | "scores" | for all tokens, these average scores instead of the router's, also as weights [arXiv 2504.07964] |

    The effect of "choice" minus that of "pooled" is the cost of the language of the route, that of "other" minus
    "choice" the worth of the content.

    Args:
        language_model: the model.
        texts: every item needs a text in ``reference``, and one text per group at most.
        reference: a group.
        kinds: built-in routes, from the table above. SparseMixer routers refuse "scores".
        routes: more routes by name: a ``Trace`` of the same texts, such as ``record_trace`` of another checkpoint (same
            tokenizer and shape of MoE layers), or a ``Plan``.
        bands: name -> layers. The band "all" always comes first.
        routed, batch_size, max_length, resamples, permutations, seed, progress, kept: as in ``knockout``.

    Raises ``AnalysisError`` for items without a text in ``reference``, ``ValueError`` for unknown kinds, names given
    twice, a band "all" and texts that share item and group, and ``PlanError`` for routes or layers that do not fit the
    model.
    """
    unknown = [kind for kind in kinds if kind not in ROUTES]
    if unknown or set(kinds) & set(routes or {}) or not (kinds or routes):
        raise ValueError(f"kinds are different ones of {', '.join(ROUTES)}, and other routes have other names")
    if ALL in (bands or {}):
        raise ValueError(f"the band {ALL!r} is all layers already: name yours otherwise")
    more = {name: _plan(name, route) for name, route in (routes or {}).items()}
    with TextRun(language_model, texts, routed, batch_size, max_length, progress, kept) as run:
        _check_items(run.texts.texts, reference, kinds)
        where = {ALL: tuple(range(len(run.routed.routers)))}
        where |= {name: run.layers(layers) for name, layers in (bands or {}).items()}
        with run.routed.record(**_trace_options(run)) as recorder:
            natural = run.losses(caption="natural routing")
        recorded = _Routes(run, recorder, reference)
        built = {**{kind: recorded.route(kind) for kind in kinds}, **more}
        sums = np.zeros((len(natural), len(built), len(where)))
        for r, (name, plan) in enumerate(built.items()):
            for b, (band, layers) in enumerate(where.items()):
                caption = f"route {name}, layers {band}"
                sums[:, r, b] = run.losses(plan.only(layers=layers), caption) - natural
    tokens = np.broadcast_to(run.tokens[:, None, None], sums.shape)
    groups, effect = run.effects(sums, tokens, resamples=resamples, permutations=permutations, seed=seed)
    loss = run.loss_of(groups, natural)
    return Transplant(
        groups, tuple(built), tuple(where), effect, loss, tuple(where.values()), reference, run.texts.note
    )


def record_trace(
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    *,
    routed: RoutedModel | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: bool = False,
) -> Trace:
    """Record the experts of every token of ``texts``, to be transplanted into another checkpoint."""
    with TextRun(language_model, texts, routed, batch_size, max_length, progress) as run:
        return run.record("recording routes", **_trace_options(run)).trace()


def _trace_options(run: TextRun) -> dict[str, Any]:
    """Options of a recording that keeps the experts of every token, and each text as a sequence."""
    keys = {(text.group, text.item) for text in run.texts.texts}
    if len(keys) != len(run.texts.texts):
        raise ValueError("two texts share their group and item: give each text of a group an item of its own")
    return {"sequences": True, "trace": True, "trace_limit": sum(map(len, run.texts.ids))}


def _check_items(texts: Sequence[Text], reference: str, kinds: Sequence[str]) -> None:
    """Raise ``AnalysisError`` for items that lack what the routes are taken from."""
    if not set(kinds) - {"own", "pooled"}:
        return
    known = {text.item for text in texts if text.group == reference}
    missing = [text.item for text in texts if text.item not in known]
    if missing:
        raise AnalysisError(
            f"item {missing[0]!r} has no text in {reference!r}, from which routes are taken: add it, or name another "
            "reference="
        )
    if "other" in kinds and len(known) < 2:
        raise AnalysisError('there is one item only, so no "other" one: leave that kind out')


def _plan(name: str, route: Trace | Plan) -> Plan:
    if not isinstance(route, (Trace, Plan)):
        raise TypeError(f"route {name!r} is a {type(route).__name__}: give a Trace (record_trace) or a Plan")
    return route if isinstance(route, Plan) else Plan.replay(route)


class _Routes:
    """The built-in routes of texts, from the recording of their natural run."""

    def __init__(self, run: TextRun, recorder: Recorder, reference: str) -> None:
        self.texts, self.routers, self.reference = run.texts.texts, run.routed.routers, reference
        self.trace, store = recorder.trace(), recorder.statistics().store
        assert store is not None
        self.store = store

    def route(self, kind: str) -> Plan:
        """The plan of a built-in route."""
        if kind == "scores":
            items = list(dict.fromkeys(text.item for text in self.texts))
            scores = np.stack([self.store.distributions(item, self.reference, "full") for item in items])
            return Plan.replace_scores(scores, items=items, per="sequence")
        if kind == "own":
            return Plan.replay(self.trace)
        averages = self._averages(kind)
        choice = np.full((len(averages), *self.trace.ids.shape[1:]), -1, np.int16)
        for layer, router in enumerate(self.routers):
            order = np.argsort(-averages[:, layer, : router.num_experts], axis=1, kind="stable")
            choice[:, layer, : router.top_k] = order[:, : router.top_k]
        return Plan.replay(replace(self.trace, ids=choice[self.trace.sequence]))

    def _averages(self, kind: str) -> np.ndarray:
        """float64 [n, L, E]: the average scores that choose the experts of each sequence of the trace."""
        items = [str(item) for item in self.trace.items]
        _, first = np.unique(self.trace.sequence, return_index=True)
        groups = [self.trace.groups[group] for group in self.trace.group[first]]
        if kind != "pooled":
            groups = [self.reference] * len(items)
        if kind == "other":
            known = sorted(set(items))
            items = [known[known.index(item) - 1] for item in items]
        return np.stack([self.store.distributions(*key, "full") for key in zip(items, groups, strict=True)])
