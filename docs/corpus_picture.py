"""Draw docs/images/corpus.png from bench/results/corpus.json, which `python -m bench.corpus` writes.

`python docs/corpus_picture.py` needs `pip install 'moe-route[plot]'`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moe_route.bench.results import BenchmarkResults
from moe_route.plots import frame
from moe_route.plots.frame import INK, legend_above, line_width, new_figure, plain_frame, save

HERE = Path(__file__).parent
COMMITTED = HERE.parent / "bench" / "results" / "corpus.json"
IMAGE = HERE / "images" / "corpus.png"


def samples(results: BenchmarkResults, what: str) -> tuple[list[float], list[float]]:
    """Seconds, and the values of a fact that is named "`what`, at s = seconds"."""
    found = [fact for fact in results.measured.facts if fact.what.startswith(f"{what}, at s = ")]
    return [float(fact.what.rpartition(" ")[2]) for fact in found], [fact.value for fact in found]


def draw(results: BenchmarkResults, path: Path) -> Path:
    """Tokens in the last checkpoint of the undisturbed run, where the other run was killed, and resident memory."""
    figure = new_figure(8.0, 2.9)
    tokens, memory = figure.subplots(1, 2)
    seconds, values = samples(results, "tokens")
    kills = [fact.value / 1e6 for fact in results.measured.facts if "before kill" in fact.what]
    tokens.step(
        seconds,
        [value / 1e6 for value in values],
        where="post",
        color=frame.COLORS[0],
        label="undisturbed",
        linewidth=line_width(),
    )
    tokens.hlines(
        kills, 0, max(seconds), colors=INK, linestyles=":", linewidth=line_width() / 2, label="other run: killed"
    )
    tokens.set_ylabel("million tokens in the checkpoint")
    plain_frame(tokens, "progress")
    legend_above(tokens)
    seconds, values = samples(results, "resident memory")
    memory.plot(seconds, values, color=frame.COLORS[1], linewidth=line_width())
    memory.set_ylim(bottom=0)
    memory.set_ylabel("MB")
    plain_frame(memory, "resident memory")
    for axis in (tokens, memory):
        axis.set_xlabel("s")
    return save(figure, path, dpi=110)


if __name__ == "__main__":
    sys.stdout.write(f"{draw(BenchmarkResults.load(COMMITTED), IMAGE)}\n")
