"""The sections of `moe-route bench`: what each measures, and the targets that the project set itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_route import _C
from moe_route.bench import dispatch, experts, gate, growth, models, recording, results
from moe_route.bench.results import Fact, Row, Target
from moe_route.bench.timing import Race, race

KERNELS = ("gate", "one-row", "dispatch", "recording")
Measured = tuple[list[Row], list[Fact], list[Target]]


def gate_races(rounds: int, shapes: Sequence[gate.Shape]) -> dict[gate.Shape, Race]:
    return {shape: race(gate.Gate(shape).contenders(), rounds=rounds) for shape in shapes}


def gate_rows(section: str, races: dict[gate.Shape, Race]) -> list[Row]:
    out = []
    for shape, run in races.items():
        peers = {name: "torch" for name in run.seconds if name.startswith("route")}
        peers["route + counts + probability"] = "torch + p.sum(0)"
        peers["route + counts + probability + weight + entropy"] = "torch + p.sum(0)"
        peers["route + counts, soft steering"] = "torch, soft steering"
        peers["route + counts, forced"] = "torch, forced"
        out += results.rows(section, shape.title, run, peers=peers, floors=dict.fromkeys(peers, "read the logits"))
    return out


def gate_targets(run: Race, instruction_set: str) -> list[Target]:
    wanted = {"avx512": 8.0, "avx2": 4.0}.get(instruction_set.removesuffix("_bf16"))
    counts = run.ratio("torch", "route + counts")
    mass = run.ratio("torch + p.sum(0)", "route + counts + probability")
    out = []
    case = gate.Shape().title
    if wanted is not None:
        out.append(
            Target(
                f"{case}: route with counts against torch", f">= {wanted:g} times", f"{counts:.2f}", counts >= wanted
            )
        )
    if instruction_set.startswith("avx512"):
        out.append(
            Target(f"{case}: with exact mass against torch with p.sum(0)", ">= 7 times", f"{mass:.2f}", mass >= 7)
        )
    for what, name, limit in (
        ("soft steering adds", "route + counts, soft steering", 0.10),
        ("forcing adds", "route + counts, forced", 0.10),
        ("mass, weight and entropy add", "route + counts + probability + weight + entropy", 0.20),
    ):
        extra = run.ratio(name, "route + counts") - 1
        out.append(Target(f"{case}: {what} to route with counts", f"<= {limit:.0%}", f"{extra:.1%}", extra <= limit))
    return out


def one_row(rounds: int) -> tuple[list[Row], list[Target]]:
    shape = gate.Shape(tokens=1)
    contenders = gate.Gate(shape).contenders()
    names = ("torch", "route", "route + counts")
    run = race({name: contenders[name] for name in names}, rounds=rounds, warmup=10, burst=20)
    ratio = run.ratio("torch", "route + counts")
    rows = results.rows("One row a call", shape.title, run, peers=dict.fromkeys(("route", "route + counts"), "torch"))
    target = Target(f"{shape.title}: a call of route with counts", "<= 1/2 of torch's", f"1/{ratio:.2f}", ratio >= 2)
    return rows, [target]


def dispatch_rows(rounds: int) -> list[Row]:
    peers = {
        "dispatch": "torch argsort + bincount + inverse",
        "permute": "torch index_select",
        "combine": "torch multiply + index_add",
    }
    floors = {"permute": "write T * k rows", "combine": "read T * k rows"}
    out = []
    for shape in dispatch.SHAPES:
        run = race(dispatch.Dispatching(shape).contenders(), rounds=rounds)
        out += results.rows("Dispatch, permute, combine", shape.title, run, peers=peers, floors=floors)
    return out


def recording_rows(rounds: int, dtype: torch.dtype) -> tuple[list[Row], list[Fact], list[Target]]:
    """Decode steps of the model alone, recorded by moe-route and by hand; then the exact time inside the hooks."""
    section = "Recording while decoding"
    case = f"qwen3_moe, 16 layers, 64 experts, batch 1, {str(dtype).removeprefix('torch.')}"
    model = recording.decoder(dtype)
    decoding = recording.Decoding(model)
    by_hand = recording.ByHand(decoding)
    around = {"moe-route": lambda: recording.recorded(decoding), "by hand in torch": by_hand.recording}
    run = race(
        dict.fromkeys(("model alone", *around), decoding.step),
        rounds=rounds,
        around={"model alone": decoding.alone, **around},
    )
    idle, hooks = recording.seconds_in_hooks(decoding, lambda: recording.empty_hooks(decoding), rounds)
    facts = [Fact(section, case, f"{hooks} hooks that do nothing", idle * 1e6, "us a step")]
    shares = {}
    for name, recording_of in around.items():
        inside, hooks = recording.seconds_in_hooks(decoding, recording_of, rounds)
        shares[name] = inside / run.timing("model alone").median
        facts += [
            Fact(section, case, f"{name}: time inside its {hooks} hooks", inside * 1e6, "us a step"),
            Fact(section, case, f"{name}: that as a share of the model's step", 100 * shares[name], "%"),
            Fact(
                section,
                case,
                f"{name}: time of a step over the model alone",
                run.ratio(name, "model alone"),
                "times",
            ),
        ]
    share = shares["moe-route"]
    target = Target(
        f"{case}: time inside the recording hooks", "<= 0.5 % of a decode step", f"{share:.2%}", share <= 0.005
    )
    return results.rows(section, case, run), facts, [target]


def kernels(sections: Sequence[str], rounds: int) -> Measured:
    rows: list[Row] = []
    facts: list[Fact] = []
    targets: list[Target] = []
    if "gate" in sections:
        races = gate_races(rounds, gate.SHAPES)
        rows += gate_rows("Gate", races)
        targets += gate_targets(races[gate.Shape()], _C.instruction_set())
    if "one-row" in sections:
        more, wanted = one_row(rounds * 5)
        rows, targets = rows + more, targets + wanted
    if "dispatch" in sections:
        rows += dispatch_rows(rounds)
    if "recording" in sections:
        for dtype in (torch.float32, torch.bfloat16):
            more, said, wanted = recording_rows(rounds, dtype)
            rows, facts, targets = rows + more, facts + said, targets + wanted
    return rows, facts, targets


def expert_layers(rounds: int) -> Measured:
    found: list[Row] = []
    facts: list[Fact] = []
    for layer in experts.LAYERS:
        for dtype in experts.DTYPES:
            more, said = experts.measure(layer, dtype, rounds)
            found, facts = found + more, facts + said
    return found, facts, []


def measure(sections: Sequence[str], rounds: int, out: Path) -> list[Path]:
    """Measure these sections and write their files into a folder; the files."""
    name = f"cpu-{_C.instruction_set().removesuffix('_bf16')}"
    files: list[Path] = []
    if set(sections) & set(KERNELS):
        files += save(out, name, kernels(sections, rounds))
    if "experts" in sections:
        files += save(out, f"{name}-experts", expert_layers(rounds))
    if "models" in sections:
        files += save(out, f"{name}-models", models.measure(max(rounds // 20, 2)))
    if "growth" in sections:
        files += save(out, f"{name}-growth", growth.measure())
    return files


def save(folder: Path, name: str, measured: Measured) -> tuple[Path, Path]:
    return results.save(folder, name, results.machine(_C.instruction_set()), *measured)
