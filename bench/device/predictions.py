"""What was expected of a figure before anybody measured it, beside the figure, so that a surprise shows.

The gate and dispatch: from the counted machine code (bench/results/sass.json) as the longest of three times: of its
longest warp, of issuing all instructions, and of moving the bytes at the measured copy bandwidth; and the launch of a
node in a graph. Moving rows: from the bytes alone. Experts: arithmetic on the bytes of the weights that are hit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from bench import RESULTS
from bench.device import dispatch, gate
from bench.device.place import GRAPH, REHEARSED
from moe_route.bench.results import Row

CLOCK = 1.755e9  # cycles a second, H100 SXM under load
ISSUED = 132 * 4 * CLOCK  # warp instructions a second: four schedulers on each of 132 multiprocessors
NODE = 1.2e-6  # seconds of a kernel's launch inside a graph
SHARE = {dispatch.PERMUTE: 0.87, dispatch.COMBINE: 0.83}  # of the copy bandwidth
STATISTICS = {
    gate.ROUTE: "counts nothing",
    gate.COUNTED: "counts",
    gate.ALL: "counts all",
    gate.ALL_SOFT: "steered, counts all",
}
# Qwen3-30B-A3B, one layer, bfloat16, in a graph on an H100: tokens to seconds by path.
EXPERTS = {
    "streamed": {1: 33e-6, 16: 320e-6, 64: 470e-6, 256: 490e-6},
    "grouped, one activation": {1: 70e-6, 16: 410e-6, 64: 560e-6, 256: 575e-6, 4096: 1000e-6},
}


@dataclass(frozen=True)
class Prediction:
    """Seconds a call, and where they come from."""

    seconds: float
    source: str


@cache
def counted_code() -> dict[str, dict[str, float]]:
    """Figures of the machine code by case."""
    return json.loads((RESULTS / "sass.json").read_text(encoding="utf-8"))["cases"]


def kernel(name: str, rows: int, moved_bytes: float, bandwidth: float, launches: int = 1) -> Prediction | None:
    """Of a case of sass.json, from its entry with the most rows up to `rows`."""
    sizes = sorted(
        (int(title.rsplit(", ", 1)[1].split()[0]), title)
        for title in counted_code()
        if title.rsplit(", ", 1)[0] == name
    )
    fitting = [(size, title) for size, title in sizes if size <= rows]
    if not fitting:
        return None
    counted = counted_code()[fitting[-1][1]]
    times = {
        "longest warp": counted["cycles"] / CLOCK,
        "issue": counted["instructions_a_row"] * rows / ISSUED,
        "bytes": moved_bytes / bandwidth,
    }
    limit = max(times, key=lambda each: times[each])
    return Prediction(launches * NODE + times[limit], f"sass.json, {fitting[-1][1]}; limit: {limit}")


def of_gate(shape: gate.Shape, name: str, bandwidth: float) -> Prediction | None:
    """Of a contender of the gate stage."""
    if name not in STATISTICS:
        return None
    dtype = str(shape.dtype).removeprefix("torch.")
    case = f"gate E={shape.experts} k={shape.k} {dtype}, {STATISTICS[name]}"
    return kernel(case, shape.tokens, gate.moved_bytes(shape), bandwidth)


def of_moving(operator: str, shape: dispatch.Shape, bandwidth: float) -> Prediction | None:
    """Of dispatch, permute or combine."""
    moved = dispatch.moved_bytes(operator, shape)
    if operator == dispatch.DISPATCH:
        name = f"dispatch E={shape.experts} k={shape.k}"
        return kernel(name, shape.tokens * shape.k, moved, bandwidth, launches=2)
    return Prediction(NODE + moved / bandwidth / SHARE[operator], f"bytes at {SHARE[operator]:.0%} of a copy")


def of_experts(path: str, tokens: int) -> Prediction | None:
    """Of a path of `moe_route.ops.expert_paths` on that layer."""
    seconds = EXPERTS.get(path, {}).get(tokens)
    return None if seconds is None else Prediction(seconds, "bytes of the weights hit, at 75 to 80 % of a copy")


@dataclass(frozen=True)
class Surprise:
    """A measured figure beside its prediction."""

    section: str
    case: str
    name: str
    measured: float
    prediction: Prediction

    @property
    def ratio(self) -> float:
        """Measured over predicted: above 1 is slower than expected."""
        return self.measured / self.prediction.seconds


def beside(rows: Iterable[Row], predicted: dict[tuple[str, str], Prediction]) -> list[Surprise]:
    """Rows that have a prediction by (case, name): kernels alone, as a graph times them, or a rehearsal of that."""
    return [
        Surprise(row.section, row.case, row.name, row.median, predicted[row.case, row.name])
        for row in rows
        if (row.case, row.name) in predicted and row.section.endswith((GRAPH, REHEARSED))
    ]


def table(surprises: Sequence[Surprise]) -> str:
    """One line each, the greatest surprise first."""
    lines = [
        f"{each.ratio:8.2f}  {each.measured * 1e6:10.2f} us, predicted {each.prediction.seconds * 1e6:8.2f}  "
        f"{each.case}: {each.name} ({each.prediction.source})"
        for each in sorted(surprises, key=lambda each: -max(each.ratio, 1 / each.ratio))
    ]
    return "\n".join(["measured over predicted", *lines]) if lines else "no figure here has a prediction"
