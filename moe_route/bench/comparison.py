"""Compare a run with earlier ones by ratios inside each run: to a peer and to a floor. Times are never compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from moe_route.base.table import ShownAsTables, Table, number_of
from moe_route.bench.results import BenchmarkResults, Measured, Row

TOLERANCE = 0.10
REGRESSED, IMPROVED, UNCHANGED = "regressed", "improved", "within the tolerance"

# Facts about a machine in which two runs of one machine differ as a matter of course.
_MAY_DIFFER = {"commit", "load", "command", "moe_route"}

Key = tuple[str, str, str, str]  # section, case, contender, what it is compared with


@dataclass(frozen=True)
class Ratio:
    """A median with its quartiles over the rounds of one run; higher is better."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """One ratio of one contender in both runs.

    Attributes:
        against: what the contender is compared with, in both runs.
        verdict: REGRESSED if the upper quartile lies more than `TOLERANCE` below the lower one of before, IMPROVED the
            other way round, else UNCHANGED.
    """

    section: str
    case: str
    name: str
    against: str
    before: Ratio
    now: Ratio

    @property
    def factor(self) -> float:
        return self.now.median / self.before.median

    @property
    def verdict(self) -> str:
        if self.now.high < self.before.low * (1 - TOLERANCE):
            return REGRESSED
        if self.now.low * (1 - TOLERANCE) > self.before.high:
            return IMPROVED
        return UNCHANGED


@dataclass(frozen=True, repr=False)
class Comparison(ShownAsTables):
    """Two runs beside each other.

    Attributes:
        changes: every ratio of moe-route's contenders that both runs have.
        only_now, only_before: ratios that one run has alone.
        machines: what differs between the machines: before and now.
    """

    changes: Sequence[Change]
    only_now: Sequence[Key]
    only_before: Sequence[Key]
    machines: Mapping[str, tuple[str, str]]

    def of(self, verdict: str) -> list[Change]:
        return [change for change in self.changes if change.verdict == verdict]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing regressed."""
        return bool(self.changes) and not self.of(REGRESSED)

    def to_dict(self) -> dict[str, Any]:
        return {
            "tolerance": TOLERANCE,
            "changes": [{**asdict(each), "factor": each.factor, "verdict": each.verdict} for each in self.changes],
            "only_now": self.only_now,
            "only_before": self.only_before,
            "machines": self.machines,
        }

    def tables(self) -> Sequence[Table]:
        return [self._changed(), *self._missing(), *self._machines()]

    def _changed(self) -> Table:
        if not self.changes:
            return Table(
                (), (), "Compared with the earlier run: no ratio is in both runs; choose the --sections it has"
            )
        regressed, improved, unchanged = (len(self.of(each)) for each in (REGRESSED, IMPROVED, UNCHANGED))
        counts = f"{regressed} regressed, {improved} improved, {unchanged} {UNCHANGED}"
        title = f"Compared with the earlier run: {number_of(len(self.changes), 'ratio')}, {counts}"
        note = (
            f"A ratio changed if more than {TOLERANCE:.0%} lie between the quartiles of both runs; higher is better. "
            "Medians with their quartiles."
        )
        cells = [
            (each.verdict, each.section, each.case, each.name, each.against, *map(_shown, (each.before, each.now)))
            for each in (*self.of(REGRESSED), *self.of(IMPROVED))
        ]
        head = ("", "section", "case", "contender", "ratio to", "before", "now") if cells else ()
        return Table(head, cells, title, note)

    def _missing(self) -> Iterator[Table]:
        both = {change.section for change in self.changes}
        for where, keys in (("this run", self.only_now), ("the earlier run", self.only_before)):
            cells = {
                (section, *rest) if section in both else (section, "every case", "", "") for section, *rest in keys
            }
            if cells:
                title = f"Only in {where}, so not compared"
                yield Table(("section", "case", "contender", "ratio to"), sorted(cells), title)

    def _machines(self) -> Iterator[Table]:
        if self.machines:
            cells = [(name, *values) for name, values in self.machines.items()]
            note = "Ratios of different machines, threads or versions differ for other reasons than the code."
            yield Table(("differs", "before", "now"), cells, title="The runs were not made alike", note=note)


def compare(now: BenchmarkResults, earlier: Sequence[BenchmarkResults]) -> Comparison:
    """Compare the ratios of moe-route's contenders, in the order of this run.

    Of a ratio in several earlier runs the quartiles that lie farthest apart count, and the median of the medians: so
    what differs from process to process is part of the spread.
    """
    here, ratios = _ratios(now.measured), [_ratios(each.measured) for each in earlier]
    there = {
        key: Ratio(
            median(each[key].median for each in ratios if key in each),
            min(each[key].low for each in ratios if key in each),
            max(each[key].high for each in ratios if key in each),
        )
        for key in dict.fromkeys(key for each in ratios for key in each)
    }
    before = BenchmarkResults.joined(earlier).machine
    return Comparison(
        [Change(*key, there[key], ratio) for key, ratio in here.items() if key in there],
        [key for key in here if key not in there],
        [key for key in there if key not in here],
        {
            name: (before.get(name, "not said"), now.machine.get(name, "not said"))
            for name in dict.fromkeys((*before, *now.machine))
            if name not in _MAY_DIFFER and before.get(name) != now.machine.get(name)
        },
    )


def _ratios(measured: Measured) -> dict[Key, Ratio]:
    """The ratios of moe-route's contenders."""
    rows = {(row.section, row.case, row.name): row for row in measured.rows}
    ratios: dict[Key, Ratio] = {}
    for (section, case, name), row in rows.items():
        if row.ours and row.peer is not None and row.times_peer is not None:
            peer = rows[section, case, row.peer]
            ratio = _ratio(row.times_peer, row.times_peer_low, row.times_peer_high, peer, row)
            ratios[section, case, name, row.peer] = ratio
        if row.ours and row.floor is not None and row.floor_fraction is not None:
            floor = rows[section, case, row.floor]
            ratio = _ratio(row.floor_fraction, row.floor_fraction_low, row.floor_fraction_high, floor, row)
            ratios[section, case, name, f"floor: {row.floor}"] = ratio
    return ratios


def _ratio(middle: float, low: float | None, high: float | None, slow: Row, fast: Row) -> Ratio:
    """A ratio with its quartiles. A file without them gives wider ones, which the quartiles of the times allow."""
    if low is None or high is None:
        low, high = slow.low / fast.high, slow.high / fast.low
    return Ratio(middle, low, high)


def _shown(ratio: Ratio) -> str:
    return f"{ratio.median:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"
