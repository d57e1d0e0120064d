"""The figures of README.md and bench/README.md, from results files.

`python -m bench.summary bench/results/cpu-avx512.json` prints the main figures of one file; without a file,
the committed ones.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.markdown import table
from moe_route.base.table import duration

CASE = "E=128 k=8 T=4096 float32"
COUNTS, ALL = "route + counts", "route + counts + probability + weight + entropy"
MOVING = "Dispatch, permute, combine"
FEW = ("E=8 k=2 T=4096 float32", "E=16 k=2 T=4096 float32")
RECORDING, OURS, BY_HAND = "Recording while decoding", "moe-route", "by hand in torch"
PEER, EXPERTS, PACKED, VLLM = "grouped_mm", "moe_route", "moe_route, pack=True", "vLLM cpu_fused_moe"
STOCK = ("eager", "batched_mm")
HEADLINE = {
    "route + counts": "choosing 8 of 128 experts and counting them",
    "route + counts, soft steering": "steering softly as well",
}
COMMITTED = Path(__file__).parent / "results" / "cpu-avx512.json"
COMMITTED_AVX2 = COMMITTED.with_name("cpu-avx2.json")
COMMITTED_EXPERTS = COMMITTED.with_name("cpu-avx512-experts.json")
COMMITTED_MODELS = COMMITTED.with_name("cpu-avx512-models.json")
COMMITTED_SERVING = COMMITTED.with_name("serving.json")


def summary(content: Mapping[str, Any], avx2: Mapping[str, Any] | None = None) -> str:
    """The main figures of one results file as markdown; beside them those of a run with AVX2 alone."""
    machine = content["machine"]
    intro = (
        f"One thread of a shared {machine['processor']} machine (kernels {machine['instruction set of the kernels']}, "
        f"torch {machine['torch']}), medians, against what one would write in torch, timed in the same run with inputs "
        "that never repeat ([how](#how-the-cpu-is-measured)). 128 experts, top-8, 4096 rows of float32 logits:\n"
    )
    parts = [
        intro,
        table(("", "time", "a row", "torch", "times as fast", "on AVX2"), _gate(content, avx2)),
        "Other sizes, and other operators:\n",
        table(("", "time", "torch", "times as fast", "on AVX2"), _others(content, avx2)),
        "Recording a 16-layer model while it decodes, batch 1:\n",
        table(("", "time inside the hooks", "share of a step", "times as fast as by hand"), _recording(content)),
    ]
    parts.append(_targets(content))
    if avx2 is not None:
        parts += ["With kernels and torch on AVX2 alone (`MOE_ROUTE_ISA`, `ATEN_CPU_CAPABILITY`):\n", _targets(avx2)]
    return "\n".join(parts)


def _targets(content: Mapping[str, Any]) -> str:
    """What the project wants of these figures, as markdown: those that are missed, and how many are met."""
    wanted = content["targets"]
    missed = [(t["what"], t["wanted"], t["measured"]) for t in wanted if not t["met"]]
    said = f"{len(wanted) - len(missed)} of {len(wanted)} targets are met."
    if not missed:
        return said + "\n" if wanted else ""
    said += " Missed ([why](#what-limits-those-that-are-missed)):\n"
    return f"{said}\n{table(('', 'wanted', 'measured'), missed)}"


def experts_summary(content: Mapping[str, Any]) -> str:
    """The experts' figures of one results file as markdown: bfloat16, where most models run."""
    intro = (
        "The experts of one layer in bfloat16 (two threads, random weights), by `grouped_mm` of transformers "
        f"{content['machine']['transformers']} and ours, in place and with `pack=True`; the best of transformers' "
        "other implementations, and vLLM's (`cpu_fused_moe`, packed as well), stand beside. How many times as fast as "
        "`grouped_mm` each of them is, timed in the same run. The floor is reading the weights of the experts hit, by "
        "two threads, or as many multiplications in dense products, whichever takes longer "
        "([all of them](results/cpu-avx512-experts.json)):\n"
    )
    head = ("", "grouped_mm", "moe_route", "times", "pack=True", "eager or batched_mm", "vLLM", "share of the floor")
    return f"{intro}\n{table(head, _experts(content))}\n{_targets(content)}"


def _experts(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    rows = _rows(content)
    for case in dict.fromkeys(case for case, _ in rows if case.endswith(" bfloat16")):
        peer, ours = rows[case, PEER], rows[case, EXPERTS]
        others = [peer["median"] / rows[case, name]["median"] for name in STOCK if (case, name) in rows]
        beside = (rows.get((case, name), {}).get("times_peer") for name in (PACKED, VLLM))
        packed, vllm = (f"{times:.2f}" if times else "-" for times in beside)
        times = f"{ours['times_peer']:.2f}"
        found = (times, packed, f"{max(others):.2f}", vllm, f"{ours['floor_fraction']:.2f}")
        yield case.removesuffix(" bfloat16"), duration(peer["median"]), duration(ours["median"]), *found


def models_summary(content: Mapping[str, Any]) -> str:
    """What a whole model costs, as markdown: how many times as fast as stock each contender is."""
    rows = _rows(content)
    cases, names = (list(dict.fromkeys(part)) for part in zip(*rows, strict=True))
    shares = {fact["case"]: fact["value"] for fact in content["facts"] if fact["unit"] == "%"}
    inside = ", ".join(f"{value:.2f} % ({case})" for case, value in shares.items())
    intro = (
        "Four layers of the size of Qwen3-30B-A3B's in bfloat16, one thread: how many times as fast as the stock "
        "model in the same run each of these is ([what they do](#whole-models)). Below 1 is slower; "
        f"differences of less than 0.1 are noise. Of a step, recording everything takes {inside} inside its hooks:\n"
    )
    stock, *others = names
    body = [(stock, *(duration(rows[case, stock]["median"]) for case in cases))]
    body += [(name, *(f"{rows[case, name]['times_peer']:.2f}" for case in cases)) for name in others]
    return f"{intro}\n{table(('', *cases), body)}\n{_targets(content)}"


def committed() -> str:
    """Everything that the page of figures shows."""
    files = (COMMITTED, COMMITTED_AVX2, COMMITTED_EXPERTS, COMMITTED_MODELS)
    kernels, avx2, experts, models = (json.loads(path.read_text()) for path in files)
    return f"{summary(kernels, avx2)}\n{experts_summary(experts)}\n{models_summary(models)}"


def serving() -> str:
    """What the plug-in adds to steps of stock vLLM, as markdown."""
    content = json.loads(COMMITTED_SERVING.read_text())
    rows = {(row["section"], row["case"], row["ours"]): row for row in content["rows"]}
    added = {(fact["case"], fact["what"]): fact["value"] for fact in content["facts"]}
    lines = []
    for case in dict.fromkeys(case for case, _ in added):
        times = (duration(rows["Serving", case, ours]["median"]) for ours in (False, True))
        median, low, high = (added[case, what] for what in ("added", "lower end", "upper end"))
        wall = (1 / rows["Serving, wall", case, True]["times_peer"] - 1) * 100
        lines.append((case, *times, f"{median:+.1f} %", f"{low:+.1f} to {high:+.1f} %", f"{wall:+.1f} %"))
    targets = [(t["what"], t["wanted"], t["measured"], "yes" if t["met"] else "**no**") for t in content["targets"]]
    machine = content["machine"]
    return "\n".join(
        [
            f"{machine['threads used']} threads of a shared {machine['processor']} machine, vLLM {machine['vllm']}, "
            f"load {machine['load']}, processor time of a step:\n",
            table(("", "stock vLLM", "with moe-route", "added", "95 % interval", "added on the wall"), lines),
            table(("target", "wanted", "measured", "met"), targets),
        ]
    )


def headline() -> str:
    """The few figures of the README: what a user feels, and what an engineer compares."""
    kernels, experts = (json.loads(path.read_text()) for path in (COMMITTED, COMMITTED_EXPERTS))
    share = {name: figures[1] for name, *figures in _recording(kernels)}
    recorded, by_hand = (share[f"{who}, bfloat16"] for who in (OURS, BY_HAND))
    rows = [
        (
            "recording one decode step of 16 layers of 64 experts, bfloat16",
            f"{recorded} of the step",
            f"{by_hand} by hand in torch",
        )
    ]
    measured = {name: (a_row, times) for name, _, a_row, _, times, _ in _gate(kernels)}
    for name, what in HEADLINE.items():
        a_row, times = measured[name]
        rows.append((f"{what}, per token and layer", a_row, f"{times} times as long in torch operations"))
    sizes = list(_experts(experts))
    for what, cost, column in (
        (f"running a layer's experts, {len(sizes)} public sizes, bfloat16, two threads", "no extra memory", 3),
        ("the same with `pack=True`", "a second copy of the weights", 4),
    ):
        found = [float(row[column]) for row in sizes]
        rows.append((what, cost, f"{min(found):.2f} to {max(found):.2f} times as fast as `grouped_mm`"))
    return table(("on a shared " + kernels["machine"]["processor"], "cost", "against"), rows)


def _rows(content: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["case"], row["name"]): row for row in content["rows"]}


def _times(rows: Mapping[tuple[str, str], dict[str, Any]], case: str, name: str) -> str:
    times = rows.get((case, name), {}).get("times_peer")
    return f"{times:.1f}" if times else "-"


def _gate(content: Mapping[str, Any], avx2: Mapping[str, Any] | None = None) -> Iterator[tuple[str, ...]]:
    rows, narrow = _rows(content), {} if avx2 is None else _rows(avx2)
    for (case, name), row in rows.items():
        if case == CASE and "peer" in row:
            peer = rows[case, row["peer"]]
            a_row = f"{row['median'] / 4096 * 1e9:.0f} ns"
            took = duration(row["median"]), a_row, duration(peer["median"])
            yield name, *took, f"{row['times_peer']:.1f}", _times(narrow, case, name)


def _others(content: Mapping[str, Any], avx2: Mapping[str, Any] | None) -> Iterator[tuple[str, ...]]:
    rows, narrow = _rows(content), {} if avx2 is None else _rows(avx2)
    for (case, name), row in rows.items():
        shown = name == COUNTS or (name == ALL and case in FEW) or row["section"] == MOVING
        if "peer" in row and case != CASE and shown:
            took = duration(row["median"]), duration(rows[case, row["peer"]]["median"])
            yield f"{name}, {case}", *took, f"{row['times_peer']:.1f}", _times(narrow, case, name)


def _recording(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Whose recording, time inside its hooks, share of a step, and how many times as fast as by hand that is."""
    said = [
        (*_of_whom(fact), fact) for fact in content["facts"] if fact["section"] == RECORDING and ":" in fact["what"]
    ]
    inside = {(who, dtype): fact["value"] for who, dtype, fact in said if fact["unit"] == "us a step"}
    share = {(who, dtype): fact["value"] for who, dtype, fact in said if fact["unit"] == "%"}
    for (who, dtype), took in inside.items():
        times = inside[BY_HAND, dtype] / took
        yield f"{who}, {dtype}", f"{took:.0f} us", f"{share[who, dtype]:.2f} %", f"{times:.1f}"


def _of_whom(fact: Mapping[str, Any]) -> tuple[str, str]:
    """Whose recording a fact is about, and the dtype of the model."""
    return fact["what"].split(":")[0], fact["case"].rpartition(" ")[2]


if __name__ == "__main__":
    print(summary(json.loads(Path(sys.argv[1]).read_text())) if len(sys.argv) > 1 else committed())
