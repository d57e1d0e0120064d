"""`python -m bench.device`: measure the kernels on a CUDA device and write the results (about three minutes)."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench import RESULTS
from bench.cpu import experts
from bench.cpu.dispatch import Shape as DispatchShape
from bench.device import chain, dispatch, environment, floors, gate, layers, model, place, predictions, sweep, targets
from bench.device.shapes import MODELS, ModelShape
from moe_route.bench import results
from moe_route.bench.results import BenchmarkResults, Fact, Measured, Row, Target
from moe_route.bench.timing import Shape as GateShape
from moe_route.bench.timing import race

BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Work:
    """The cases of a run: by default those that the targets name."""

    rounds: int = 16
    gates: Sequence[GateShape] = tuple(
        GateShape(128, 8, dtype, tokens) for dtype in (F32, BF16) for tokens in (1, 16, 128, 1024, 4096, 16384, 65536)
    )
    moves: Sequence[tuple[str, DispatchShape]] = (
        (dispatch.DISPATCH, DispatchShape(16384, 7168, dtype=BF16)),
        (dispatch.PERMUTE, DispatchShape(4096, 7168, dtype=BF16)),
        (dispatch.COMBINE, DispatchShape(2048, 4096, k=2, dtype=BF16)),
    )
    chains: Sequence[DispatchShape] = tuple(DispatchShape(tokens, 2048, dtype=BF16) for tokens in (1, 16, 64, 1024))
    models: Sequence[ModelShape] = MODELS
    model_tokens: Sequence[int] = (64, 4096)
    model: model.Work = field(default_factory=model.Work)
    expert_layers: Sequence[experts.Layer] = experts.LAYERS
    expert_tokens: Sequence[int] = (1, 4, 16, 64, 256, 2048)
    sweep: sweep.Work = field(default_factory=sweep.Work)


SMALL = Work(
    rounds=2,
    gates=(GateShape(16, 4, F32, 8), GateShape(16, 4, BF16, 8)),
    moves=tuple((operator, DispatchShape(16, 32, experts=8, k=2, dtype=BF16)) for operator in dispatch.PEERS),
    chains=(DispatchShape(4, 32, experts=8, k=2, dtype=BF16),),
    models=MODELS[:1] + MODELS[7:8],
    model_tokens=(4,),
    model=model.Work(F32, 2, 8, {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 8}),
    expert_layers=tuple(experts.Layer(f"small {kind}", kind, 64, 32, 8, 2) for kind in ("qwen3_moe", "gpt_oss")),
    expert_tokens=(4,),
    sweep=sweep.SMALL,
)


class Report:
    """Rows, facts and targets so far; saved after every section, so that a run that is cut short leaves what it has.

    `add`: to what the file holds already, which other sections of the same run measured.
    """

    def __init__(self, folder: Path, where: place.Place, bandwidth: float, add: bool = False):
        self.folder, self.where, self.bandwidth = folder, where, bandwidth
        self.rows: list[Row] = []
        self.facts: list[Fact] = []
        self.targets: list[Target] = []
        self.predicted: dict[tuple[str, str], predictions.Prediction] = {}
        self.first_new_row = 0
        if add and (folder / f"{where.name}.json").exists():
            held = BenchmarkResults.load(folder / f"{where.name}.json").measured
            self.rows, self.facts, self.targets = held.rows, held.facts, held.targets
            self.first_new_row = len(self.rows)

    def predict(self, case: str, name: str, prediction: predictions.Prediction | None) -> None:
        """Say what is expected of a row."""
        if prediction is not None:
            self.predicted[case, name] = prediction

    def surprises(self) -> list[predictions.Surprise]:
        """Rows of this process beside what was expected of them."""
        return predictions.beside(self.rows[self.first_new_row :], self.predicted)

    def write_surprises(self) -> None:
        """Put them among the facts, once measuring is done."""
        for each in self.surprises():
            title = f"{each.name}: measured over predicted {each.prediction.seconds * 1e6:.2f} us"
            what = f"{title} ({each.prediction.source})"
            self.facts.append(Fact(f"Predicted, {each.section}", each.case, what, each.ratio, "times"))

    def save(self) -> Path:
        about = environment.describe() | {
            "device copy, read and written": f"{self.bandwidth / 1e9:.0f} GB/s",
            "command": " ".join(["python -m bench.device", *sys.argv[1:]]),
        }
        if self.where.device.type != "cuda":
            about = {"rehearsal": "on the CPU with small sizes: these figures mean nothing", **about}
        found = BenchmarkResults(about, Measured(self.rows, self.facts, self.targets))
        return found.save(self.folder / f"{self.where.name}.json")


def measure_gates(report: Report, work: Work) -> None:
    where, races = report.where, {}
    for mode in where.clocks:
        for shape in work.gates:
            run = gate.DeviceGate(shape, where, mode).race(mode, work.rounds)
            races[mode, shape] = run
            peers = {name: peer for name, peer in gate.PEERS.items() if name in run.seconds}
            floor = dict.fromkeys(peers, gate.floor_of(shape))
            for name in run.seconds:
                report.predict(shape.title, name, predictions.of_gate(shape, name, report.bandwidth))
            report.rows += results.rows(f"Gate, {mode}", shape.title, run, peers=peers, floors=floor)
            rate = gate.moved_bytes(shape) / run.timing(gate.COUNTED).median
            report.facts.append(Fact(f"Gate, {mode}", shape.title, f"{gate.COUNTED}: bytes moved", rate / 1e9, "GB/s"))
    report.targets += targets.gate_targets(races, next(iter(where.clocks)), report.bandwidth)


def measure_moves(report: Report, work: Work) -> None:
    where, races = report.where, {}
    for mode in where.clocks:
        for operator, shape in work.moves:
            run = dispatch.measure(operator, shape, where, mode, work.rounds)
            races[mode, operator, shape] = run
            section = f"Dispatch, permute, combine, {mode}"
            expected = predictions.of_moving(operator, shape, report.bandwidth)
            report.predict(f"{operator}: {shape.title}", operator, expected)
            report.rows += dispatch_rows(section, operator, shape.title, run)
            rate = dispatch.moved_bytes(operator, shape) / run.timing(operator).median
            report.facts.append(Fact(section, f"{operator}: {shape.title}", "bytes moved", rate / 1e9, "GB/s"))
    report.targets += targets.moving_targets(races, next(iter(where.clocks)), report.bandwidth)


def measure_chains(report: Report, work: Work) -> None:
    for mode in report.where.clocks:
        for shape in work.chains:
            run = chain.measure(shape, report.where, mode, work.rounds)
            peers = {chain.OVERLAPPED: chain.APART} if chain.OVERLAPPED in run.seconds else {}
            report.rows += results.rows(f"Launches in a row, {mode}", shape.title, run, peers=peers)


def dispatch_rows(section: str, operator: str, case: str, run: results.Race) -> list[Row]:
    peers = {operator: dispatch.PEERS[operator]}
    return results.rows(section, f"{operator}: {case}", run, peers=peers, floors={operator: floors.COPY})


def measure_layers(report: Report, work: Work) -> None:
    """Layers of public models, by the clock that times kernels alone."""
    where = report.where
    mode = next(iter(where.clocks))
    rounds = max(2, work.rounds // 2)
    for shape in work.models:
        for tokens in work.model_tokens:
            run = layers.measure(shape, tokens, where, mode, rounds)
            peers = {layers.ROUTE: layers.PEER} if layers.PEER in run.seconds else {}
            floor = {layers.ROUTE: floors.LAUNCH if tokens < gate.LAUNCH_BOUND_TOKENS else floors.COPY}
            case = f"{shape.title} T={tokens}"
            report.rows += results.rows(f"Layers of public models, {mode}", case, run, peers=peers, floors=floor)
        tokens = max(work.model_tokens)
        size = DispatchShape(tokens, shape.hidden, shape.experts, shape.k, BF16)
        for operator in dispatch.PEERS:
            run = dispatch.measure(operator, size, where, mode, rounds)
            case = f"{shape.title} T={tokens}"
            report.rows += dispatch_rows(f"Layers of public models, {mode}", operator, case, run)


def measure_model(report: Report, work: Work) -> None:
    section = "A model that runs"
    measured, inside = model.measure(report.where, work.model, max(2, work.rounds // 3))
    for title, run in measured.items():
        report.rows += results.rows(section, title, run, peers=model.PEERS)
        for name in model.PEERS:
            slower = run.ratio(name, model.ALONE)
            report.facts.append(Fact(section, title, f"{name}: time over the model alone", slower, "times"))
    for name, (seconds, hooks) in inside.items():
        what = f"{name}: the host's time inside its {hooks} hooks, a decode step"
        report.facts.append(Fact(section, work.model.title, what, seconds * 1e6, "us"))


MOST_STREAMED = 2048  # slots up to which both paths of ours are compared


def measure_experts(report: Report, work: Work) -> None:
    for layer in work.expert_layers:
        for dtype in experts.DTYPES:
            measure_expert_layer(report, work, layer, dtype)


def measure_expert_layer(report: Report, work: Work, layer: experts.Layer, dtype: torch.dtype) -> None:
    """One layer in one dtype; its weights are gone at the end."""
    where, inputs = report.where, report.where.most_calls
    limits = experts.Limits(where.memory_bytes // 4, math.inf)
    for routed in experts.cases(layer, dtype, work.expert_tokens, limits, where.device, inputs=inputs):
        copying = floors.copying(int(routed.hit_bytes()), where)
        for mode, clock in where.clocks.items():
            names = limits.implementations(layer, routed.tokens, dtype)
            if mode == place.GRAPH:  # what waits for the device cannot be captured: eager, and products in float32
                names = tuple(name for name in names if name != experts.EAGER) if dtype == BF16 else ()
            if not names:
                continue
            if routed.tokens * layer.k <= MOST_STREAMED:
                names = (*names, *experts.PATHS)
            contenders = routed.contenders(names, (floors.COPY, copying))
            burst = where.calls(mode, len(routed))
            with torch.inference_mode():
                run = race(contenders, rounds=max(2, work.rounds // 4), warmup=1, burst=burst, clock=clock)
            if dtype == BF16 and "Qwen3-30B-A3B" in layer.model:
                for name, path in experts.PATHS.items():
                    report.predict(routed.title, name, predictions.of_experts(path, routed.tokens))
            found = experts.compared(f"{experts.SECTION}, {mode}", routed, run, floors.COPY)
            report.rows, report.facts = report.rows + found.rows, report.facts + found.facts


def measure_sweep(report: Report, work: Work) -> None:
    mode = next(iter(report.where.clocks))
    report.facts += sweep.measure(report.where, work.sweep, mode)


def measure_decode(report: Report, work: Work) -> None:
    mode = next(iter(report.where.clocks))
    report.facts += sweep.decode(report.where, work.sweep, mode)


MEASURES: dict[str, Callable[[Report, Work], None]] = {
    "gate": measure_gates,
    "dispatch": measure_moves,
    "chain": measure_chains,
    "decode": measure_decode,
    "sweep": measure_sweep,
    "layers": measure_layers,
    "model": measure_model,
    "expert-layers": measure_experts,  # "experts" is the check
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu: a rehearsal (default: cuda)")
    parser.add_argument("--sections", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure")
    parser.add_argument("--rounds", type=int, help="measurements of every contender (default: 16)")
    parser.add_argument(
        "--add", action="store_true", help="keep what the results file holds: other sections of this run"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results file")
    options = parser.parse_args(argv)
    try:
        where = place.named(options.device)
    except (RuntimeError, ValueError) as problem:
        parser.error(str(problem))
    work = SMALL if options.small or where.device.type == "cpu" else Work()
    if options.rounds is not None:
        work = replace(work, rounds=options.rounds)
    report = Report(options.out, where, floors.bandwidth(where, work.rounds), options.add)
    path = report.save()  # what an earlier run left there is gone, even if this one fails
    for section in options.sections:
        try:
            MEASURES[section](report, work)
        finally:
            path = report.save()
        print(f"{section}: measured", flush=True)
    report.write_surprises()
    path = report.save()
    print(predictions.table(report.surprises()))
    print(targets.summary(report.targets))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
