"""What one worker counted since its recording began: sums by group, averages of sequences, and the trace."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from moe_route.base import files
from moe_route.base.identity import library_versions
from moe_route.calls.call import PHASES
from moe_route.contract.tables import METRICS
from moe_route.integrations.serving.counts import StepTrace
from moe_route.integrations.serving.options import Options
from moe_route.integrations.serving.requests import Request, RequestTable
from moe_route.integrations.serving.sites import Site, Stage
from moe_route.ops import library
from moe_route.recording.counting import DEFAULT_METRICS
from moe_route.recording.metadata import add_fingerprints
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.recording.store import SequenceStore
from moe_route.recording.tables import TableSet, TableSums
from moe_route.recording.trace import Trace
from moe_route.recording.vectors import SequenceAverages, SequencePool

logger = logging.getLogger(__name__)

TokenIds: TypeAlias = Callable[[str, int], "np.ndarray | None"]
"""``token_ids(name, end)`` reads the first ids of a running request; None if the engine does not hold them."""
_COUNTED = tuple(name for name in METRICS if name in (*DEFAULT_METRICS, "natural_counts"))


class Engine(NamedTuple):
    """What serves."""

    name: str  # as the metadata has it
    version: str
    model: dict[str, Any]  # the entry of this name in the metadata: name, class, config_hash


class Recording:
    """The tables that the operator counts in, and what is added up when a request ends.

    Attributes:
        started: whether there ever was a recording.
        steps: number of steps that were counted.
        stop_strings: requests whose text may end at a string, where tokens behind it may have run in the same step.
        aborted: requests of a group that were given up before their text had ended.
        ungrouped: requests without a group.
        used_plans: hashes of the plans that steered while it ran.
        changes: plans that clients changed while it ran: name, hash, time and client of each.
        trace: where the experts of single tokens are kept; None if no one asked for them.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        options: Options,
        requests: RequestTable,
        token_ids: TokenIds,
        stage: Stage,
        *,
        most_requests: int,
        most_tokens: int,
    ):
        """``most_*``: the most that a step holds.

        All tables are made here, of the largest sizes that they can need: their addresses are part of captured graphs.
        """
        self._sites, self._options, self._requests, self._read_token_ids = sites, options, requests, token_ids
        self._most_requests = most_requests
        groups = len(options.groups)
        self._tables = TableSet(sites, groups=groups, metrics=_COUNTED, entropy=True)
        self._tables.reserve(groups=groups, segments=most_requests)
        self._tables.fixed = True
        requests.group_capacity = self._tables.group_capacity
        requests.segment_capacity = self._tables.segment_capacity
        for site, table in zip(sites, self._tables.layers, strict=True):
            site.statistics = table
        traced = stage.within(range(len(stage.layers)) if options.trace is True else options.trace or ())
        self.trace = StepTrace(sites, traced, most_tokens, options.trace_limit, stage.first) if traced else None
        self.started = False
        self.forget()

    def forget(self) -> None:
        """Drop everything. Requests that run now are part of no recording."""
        for table in self._tables.layers:
            table.zero_()
        self._requests.forget()
        widest = max((site.num_experts for site in self._sites), default=0)
        self._pool = SequencePool(len(self._options.groups), len(self._sites), widest, _COUNTED, entropy=True)
        self._free = list(range(self._most_requests - 1, -1, -1))
        names, experts = [site.name for site in self._sites], [site.num_experts for site in self._sites]
        self._store = SequenceStore(names, experts) if self._options.sequences else None
        self._repeated = 0  # sequences whose item and group the store held already
        if self.trace is not None:
            self.trace.forget()
        self.used_plans: set[str] = set()
        self.changes: list[dict[str, str | None]] = []
        self._fingerprint: str | None = None
        self._failures: list[str] = []
        self._logged: set[str] = set()  # layers of which the log says that they are not balanced
        self.steps = self.stop_strings = self.aborted = self.ungrouped = self._cached = self._without_room = 0

    def start(self, plans: Iterable[str]) -> None:
        """Count from the next request on; ``plans``: hashes of those that steer now."""
        self.forget()
        self.used_plans.update(plans)
        self._requests.counts = self.started = True

    # ---- requests

    def row(self, cached: int) -> int:
        """A row of the tables for a request that begins, whose first ``cached`` tokens came from a cache."""
        self._cached += cached
        if not self._free:
            self._without_room += 1  # `statistics` refuses: raising here would end the engine
            return -1
        return self._free.pop()

    def fail(self, reason: str) -> None:
        """Note that a request ran otherwise than asked. Raising here would end the engine: ``refuse_gaps`` does."""
        logger.error("moe_route: %s", reason)
        self._failures.append(reason)

    def begin(self, request: Request) -> None:
        """A request that has a row begins."""
        if self.trace is not None:
            self.trace.begin(request)

    def end(self, names: Iterable[str], aborted: Collection[str] = ()) -> None:
        """Add requests that ended to the averages over sequences; those that were ``aborted`` to none."""
        wanted = set(names)
        if not wanted:
            return
        known = [one for name, one in self._requests.running.items() if name in wanted]  # alike in all stages
        for request in known:
            self.keep_tokens(request)
            if self.trace is not None:
                self.trace.end(request)
        lengths = {request.name: self._requests.routed(request) for request in known}
        ended = [request for request in self._requests.end([r.name for r in known]) if request.segment >= 0]
        self.aborted += sum(request.name in aborted for request in ended)
        if not ended or not self._sites:
            return
        sums = self._as_transformers(self._tables.take_segments([request.segment for request in ended]))
        self._free += [request.segment for request in ended]
        whole = [number for number, request in enumerate(ended) if request.name not in aborted]
        if whole:
            averages = self._pool.add(sums.at(whole), np.array([ended[number].group for number in whole]))
            self._keep([ended[number] for number in whole], averages)
        for request in ended:
            self._fingerprint = add_fingerprints(self._fingerprint, self._identity(request, lengths[request.name]))

    def keep_tokens(self, request: Request | None) -> None:
        """Keep the token ids of a request that the runner is about to forget."""
        if request is not None and request.segment >= 0:
            request.tokens = self._token_ids(request)

    def _token_ids(self, request: Request) -> np.ndarray | None:
        """Ids of the tokens that a request has routed, from position 0."""
        if self._requests.running.get(request.name) is not request:
            return request.tokens
        end = self._requests.routed(request)
        if request.ids is not None:
            return np.array(request.ids[:end], np.int32)
        ids = self._read_token_ids(request.name, end)
        return request.tokens if ids is None else ids

    def _keep(self, ended: Sequence[Request], averages: SequenceAverages) -> None:
        """Add sequences to the store. Raising would end the engine, so a repeated item is kept without its id."""
        if self._store is None:
            return
        seen = np.flatnonzero(averages.tokens.any(axis=1))  # a request that was aborted first may have no token
        keys: dict[tuple[str | int, str], None] = {}
        for row in seen.tolist():
            item, group = ended[row].item, self._options.groups[ended[row].group]
            repeated = item is not None and ((item, group) in keys or (item, group) in self._store)
            self._repeated += repeated
            keys[self._store.next_unnamed() if item is None or repeated else item, group] = None
        self._store.append(list(keys), averages.stored(seen))

    def _identity(self, request: Request, length: int) -> str:
        """The fingerprint that a recording in transformers has for this sequence."""
        group = self._options.groups[request.group]
        made = hashlib.blake2b(files.canonical_json([request.item, [group]]).encode(), digest_size=16)
        routed = request.tokens
        made.update(
            (np.array([length - request.first], np.int32) if routed is None else routed[request.first :]).tobytes()
        )
        return made.hexdigest()

    # ---- answers

    def gaps(self) -> list[str]:
        """What is missing in the recording: a request failed, a layer was never reached, the tables were too small."""
        gaps = []
        if self._failures:
            gaps.append(f"{len(self._failures)} requests were not steered as asked: {self._failures[0]}")
        silent = [site.name for site in self._sites if not site.reached]
        if silent and self.steps:
            gaps.append(
                f"{len(silent)} layers were never reached ({silent[0]}, ...): the engine runs a graph compiled without "
                "moe_route; delete the engine's compile cache, or start it without graphs"
            )
        if self._requests.tokens_lost:
            gaps.append(
                f"of {self._requests.tokens_lost} tokens the engine never told whether they became text: start it with "
                "its own scheduler"
            )
        if self._without_room:
            gaps.append(
                f"{self._without_room} requests found no row in the tables, which have room for those of one step"
            )
        return gaps

    def refuse_gaps(self) -> None:
        """Raise ``RecordingError`` if something is missing."""
        for gap in self.gaps():
            raise RecordingError(gap)

    def _unbalanced(self, sums: TableSums) -> dict[str, dict[str, Any]]:
        """The layers that did not count every token that steps laid out, by name; each is logged once."""
        expected = self._requests.laid_out.reshape(len(PHASES), -1)[:, : len(self._options.groups)]
        counted = sums.scalar("tokens")
        broken: dict[str, dict[str, Any]] = {}
        for layer in np.flatnonzero((counted != expected[..., None]).any(axis=(0, 1))).tolist():
            site = self._sites[layer]
            numbers = {"expected": int(expected.sum()), "counted": int(counted[..., layer].sum())}
            broken[site.name] = {**numbers, "kernel": site.kernel}
            if site.name not in self._logged:
                logger.error(
                    "moe_route: layer %s counted %d of the %d tokens that steps laid out: something went round its "
                    "router (%s); its averages are left out",
                    site.name,
                    numbers["counted"],
                    numbers["expected"],
                    site.kernel,
                )
        self._logged.update(broken)
        return broken

    def statistics(self, engine: Engine, *, sequences: bool = True) -> RoutingStatistics:
        """What was counted. ``sequences``: those that are kept too.

        What is missing stands in the metadata: ``gaps``, and ``unbalanced``, whose layers have no averages.
        """
        sums = self._as_transformers(self._tables.read_groups(len(self._options.groups)))
        unbalanced, gaps = self._unbalanced(sums), self.gaps()
        balanced = np.array([site.name not in unbalanced for site in self._sites])
        metrics = {name: table for name, table in sums.metrics.items() if name != "natural_counts" or self.used_plans}
        return RoutingStatistics(
            groups=self._options.groups,
            layers=[site.name for site in self._sites],
            num_experts=[site.num_experts for site in self._sites],
            top_k=[site.top_k for site in self._sites],
            scalars=sums.scalars,
            metrics=metrics,
            sequence_scalars=self._pool.scalars * balanced[:, None],
            sequence_sums={kind: table * balanced[:, None] for kind, table in self._pool.sums.items()},
            entropy=True,
            metadata={
                "model": engine.model,
                "versions": {**library_versions(), engine.name: engine.version},
                "engines": [engine.name],
                "backends": sorted({library.served(site.device) for site in self._sites}),
                "experts": [engine.name],
                "fingerprint": self._fingerprint or add_fingerprints(None, None),
                "masked": ["padding"],
                "plans": sorted(self.used_plans),
                "calls": self.steps,
                "captured_calls": 0,
                "abandoned_sequences": 0,
                "running_sequences": sum(request.segment >= 0 for request in self._requests.running.values()),
                "aborted_requests": self.aborted,
                "ungrouped_requests": self.ungrouped,
                "ungrouped_tokens": self._requests.ungrouped_tokens,
                "cached_tokens": self._cached,
                "tokens_run_again": self._requests.tokens_run_again,
                "tokens_rejected": self._requests.tokens_rejected,
                **({"stop_strings": self.stop_strings} if self.stop_strings else {}),
                **({} if self._store is None else {"repeated_items": self._repeated}),
                **({"plan_changes": self.changes} if self.changes else {}),
                **({"gaps": gaps} if gaps else {}),
                **({"unbalanced": unbalanced} if unbalanced else {}),
            },
            store=None if self._store is None or not sequences else self._store.snapshot(),
        )

    def traced(self) -> Trace | None:
        """The trace; None if another stage holds the traced layers. Raises ``RecordingError`` if none is kept."""
        if not self._options.trace:
            raise RecordingError('no trace is kept: start the engine with "moe_route": {"trace": true}, or [layers]')
        return None if self.trace is None else self.trace.snapshot(self._options.groups, self._token_ids)

    def _as_transformers(self, sums: TableSums) -> TableSums:
        """Multiply the sums of weights by the factor that the engine applies to the output of a layer instead."""
        scales: Sequence[float] = [site.output_scale for site in self._sites]
        if any(scale != 1.0 for scale in scales):
            table = sums.metrics["weight"]
            table[...] = np.rint(table * np.asarray(scales)[:, None]).astype(np.int64)
        return sums
