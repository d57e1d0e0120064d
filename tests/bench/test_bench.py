"""Benchmarks and checks of a CUDA device, as far as they can be run without one: on the CPU by the CPU's clock, on a
stand-in for `torch.cuda` (standin_cuda.py), and `bench/gpu.sh` in its dry mode."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.standin_cuda import Counting, standin_cuda
from harness.standin_device import move

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs the source tree")
if SCRIPT.is_file():
    sys.path.insert(0, str(ROOT))
    from bench.cpu import experts
    from bench.cpu.dispatch import Shape as DispatchShape
    from bench.device import __main__ as device
    from bench.device import (
        bisection,
        chain,
        checks,
        dispatch,
        environment,
        floors,
        gate,
        layers,
        model,
        place,
        predictions,
        problems,
        shapes,
        stages,
        sweep,
        targets,
    )
    from moe_route import _C, ops
    from moe_route.bench import results
    from moe_route.bench.results import Target
    from moe_route.bench.timing import Pool, Race, race
    from moe_route.bench.timing import Shape as GateShape
    from moe_route.experts import layout as expert_layouts


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements of a device, for tests that look at everything but times."""
    whole = place.cuda
    monkeypatch.setattr(place, "cuda", lambda index=0: replace(whole(index), most_calls=3, fewest_calls=2))
    monkeypatch.setattr(model, "WINDOW", 2)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """A device that is not there; launches without the dispatcher run on the CPU."""

    class Launched(_C.GateArgs):
        def run_cuda(self, stream: int) -> None:
            self.run()

    monkeypatch.setattr(gate, "_C", SimpleNamespace(GateArgs=Launched))
    with standin_cuda(monkeypatch) as devices:
        yield devices


# ---- clocks and places ----------------------------------------------------------------------------------------------


def test_a_race_asks_its_clock() -> None:
    class Steps:
        def timer(self, contender: Any) -> Any:
            return lambda turns: sum(contender(each) for each in turns)

    run = race({"one": lambda _: 1.0, "three": lambda _: 3.0}, rounds=4, burst=5, clock=Steps())
    assert run.seconds == {"one": [1.0] * 4, "three": [3.0] * 4}
    assert run.ratio("three", "one") == 3.0


def test_launches_are_timed_between_events(cuda: Counting) -> None:
    tensor = torch.ones(4, device="cuda:0")
    timed = place.LaunchTime().timer(lambda index: tensor.add_(index))
    assert timed(range(5, 8)) == pytest.approx(4e-3)  # three operations and one more, a millisecond each
    assert tensor.cpu().tolist() == [1.0 + 5 + 6 + 7] * 4


def test_a_graph_holds_every_input_and_is_captured_once(cuda: Counting) -> None:
    inputs = [torch.full((2,), float(index), device="cuda:0") for index in range(5)]
    total = torch.zeros(2, device="cuda:0")
    seen: list[int] = []

    def contender(index: int) -> torch.Tensor:
        seen.append(index)
        return total.add_(inputs[index])

    timed = place.GraphTime().timer(contender)
    timed(range(100, 105))
    assert seen == [0, 1, 2, 0, 1, 2, 3, 4]  # three calls to load what is needed, then the capture
    total.zero_()
    assert timed(range(200, 205)) == pytest.approx(6e-3)
    assert len(seen) == 8
    assert total.cpu().tolist() == [10.0, 10.0]


def test_what_waits_for_the_device_cannot_be_captured(cuda: Counting) -> None:
    ids = torch.ones(4, dtype=torch.int64, device="cuda:0")
    with pytest.raises(RuntimeError, match="bincount"):
        place.capture(lambda _: torch.bincount(ids), range(4))


def test_places(cuda: Counting) -> None:
    where = place.named("cuda")
    assert where.name == "cuda-stand-in-9"
    assert where.device == torch.device("cuda:0")
    assert list(where.clocks) == [place.GRAPH, place.LAUNCHED]
    assert where.number(1 << 10) == 16  # four times a cache of 4 KiB
    assert where.number(1) == place.MOST_CALLS
    assert where.calls(place.GRAPH, 200) == 200
    assert where.calls(place.GRAPH, 8) == where.calls(place.LAUNCHED, 200) == place.FEWEST_CALLS
    with pytest.raises(ValueError, match="no device 'tpu'"):
        place.named("tpu")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
    ],
)
def test_results_are_named_after_the_device(name: str, slug: str) -> None:
    assert place.slug(name) == slug


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_mend_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (device.main, checks.main):
        with pytest.raises(SystemExit) as stopped:
            main(["--device", "cuda"])
        assert stopped.value.code == 2
        assert "there is no CUDA device here" in capsys.readouterr().err


def test_inputs_are_never_zeros() -> None:
    pool = Pool((4, 8), torch.bfloat16, total_bytes=64 * 20, most=16)
    assert len(pool) == 16
    assert all(bool(one.any()) for one in pool.inputs)
    assert not torch.equal(pool[0], pool[1])
    assert torch.equal(pool[0], pool[16])


# ---- the contenders do the same work --------------------------------------------------------------------------------


def test_the_bare_launch_gives_what_the_operator_gives() -> None:
    work = gate.DeviceGate(GateShape(16, 4, torch.bfloat16, 32), place.rehearsal(), place.REHEARSED)
    steering = work.soft_steering()
    for index in range(3):
        for options in ({}, {"steering": steering}):
            weights, ids = work.bare(metrics=("counts",), **options)(index)
            wanted = work.routed(metrics=("counts",), **options)(index)
            assert torch.equal(ids, wanted[1])
            assert torch.equal(weights, wanted[0])


def test_counting_for_a_graph_counts_the_same() -> None:
    counts = []
    for mode in (place.GRAPH, place.LAUNCHED):
        work = gate.DeviceGate(GateShape(16, 4, torch.float32, 32), place.rehearsal(), mode)
        for index in range(3):
            work.torch_gate(index)
        counts.append(work.torch_counts)
    assert torch.equal(*counts)
    assert counts[0].sum() == 3 * 32 * 4


def test_every_contender_of_the_gate_has_a_peer_that_runs() -> None:
    for mode in (place.GRAPH, place.LAUNCHED):
        names = gate.DeviceGate(GateShape(8, 2, torch.float32, 4), place.rehearsal(), mode).contenders()
        compared = {name: peer for name, peer in gate.PEERS.items() if name in names}
        assert set(compared.values()) <= set(names)
        assert {name for name in names if name.startswith("route")} == set(compared)
        assert any(name.endswith(gate.BARE) for name in names) == (mode == place.LAUNCHED)


@pytest.mark.parametrize("mode", ["in a graph", "launched"])
def test_torch_dispatches_permutes_and_combines_the_same(mode: str) -> None:
    shape, where = DispatchShape(64, 32, experts=16, k=4), place.rehearsal()
    routed = dispatch.RoutedModel(shape, where, 2)
    ends, counts, order, inverse = routed.sorted(1, wait=mode == place.LAUNCHED)
    plan = routed.dispatched(1)
    assert torch.equal(plan.offsets[1:], ends)
    assert torch.equal(plan.counts, counts)
    assert torch.equal(plan.order, order)
    assert torch.equal(plan.inverse.flatten(), inverse)
    for operator in (dispatch.PERMUTE, dispatch.COMBINE):
        contenders, inputs = dispatch.MAKERS[operator](shape, where, mode)
        for index in range(inputs):
            ours, theirs = contenders[operator](index), contenders[dispatch.PEERS[operator]](index)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [pytest.param(one, id=one.name) for one in getattr(globals().get("shapes"), "MODELS", ())]
)
def test_models_route_in_torch_as_the_operator_does(shape: shapes.ModelShape) -> None:
    layer = layers.Layer(replace(shape, logits=torch.float32), 64, place.rehearsal())
    weights, ids = layer.route(0)
    assert weights.shape == (64, shape.k)
    assert int(ids.max()) < shape.experts
    if layers.PEER not in layer.contenders():
        assert shape.spec.score == "sparsemixer"
        return
    wanted, wanted_ids = layer.torch(0)
    assert torch.equal(ids.long(), wanted_ids)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe", "mixtral", "gpt_oss"])
def test_every_implementation_of_the_experts_does_the_same_work(kind: str) -> None:
    layer = experts.Layer("small", kind, 64, 32, 8, 2)
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.02)):
        (routed,) = experts.cases(layer, dtype, (24,), experts.ON_CPU)
        contenders = routed.contenders(experts.IMPLEMENTATIONS)
        assert {
            type(contender(0)) for name, contender in contenders.items() if name in (experts.READ, experts.DENSE)
        } == {list}
        for index in range(2):
            wanted = contenders[experts.EAGER](index)
            assert wanted.shape == (24, 64)
            for name in experts.IMPLEMENTATIONS:
                assert (contenders[name](index) - wanted).abs().max() <= bound * wanted.abs().max(), name
        assert not torch.equal(contenders[experts.OURS](0), contenders[experts.OURS](1))
        assert routed.hit[0] == sorted(set(routed.ids[0].flatten().tolist()))
        assert 0 < routed.hit_bytes() <= layer.bytes(dtype)
        read = sum(part.numel() * 4 for weights in routed.parts for expert in routed.hit[0] for part in weights[expert])
        assert read == len(routed.hit[0]) * layer.expert_bytes(dtype)
        held = routed.module.gate_up_proj, routed.module.down_proj
        assert layer.bytes(dtype) == sum(weight.numel() * weight.itemsize for weight in held)


def test_implementations_run_under_their_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = pytest.importorskip("transformers.integrations.moe")
    (routed,) = experts.cases(experts.Layer("small", "olmoe", 64, 32, 8, 2), torch.float32, (4,), experts.ON_CPU)
    contenders = routed.contenders(experts.IMPLEMENTATIONS)
    for name in experts.IMPLEMENTATIONS[1:]:
        called: list[str] = []
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._local_mapping, name, lambda *_, to=called: to.append("called"))
        for each in experts.IMPLEMENTATIONS:
            contenders[each](0)
        assert called == ["called"], name
        monkeypatch.undo()


def test_what_is_too_large_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    layer = experts.Layer("small", "qwen3_moe", 64, 32, 8, 2)
    limits = experts.Limits(bytes=layer.bytes(torch.bfloat16) * 2, operations=layer.operations(16))
    assert limits.implementations(layer, 4, torch.bfloat16) == experts.IMPLEMENTATIONS
    assert experts.BATCHED not in limits.implementations(layer, 5, torch.bfloat16)
    found = [routed.tokens for routed in experts.cases(layer, torch.bfloat16, (1, 16, 17), limits)]
    assert found == [1, 16]
    assert "T=17 bfloat16: a call takes 0.000418 GFLOP, more than 0.000393" in caplog.text
    assert list(experts.cases(layer, torch.float64, (1,), limits)) == []
    assert "its weights take 0.000393 GB" in caplog.text
    large = experts.LAYERS[2]
    assert large.bytes(torch.float32) > experts.ON_CPU.bytes > large.bytes(torch.bfloat16)


def test_experts_are_held_against_the_floor_that_takes_longer() -> None:
    (routed,) = experts.cases(experts.Layer("small", "olmoe", 64, 32, 8, 2), torch.float32, (4,), experts.ON_CPU)
    took = {experts.READ: 2.0, experts.DENSE: 1.0, experts.PEER: 8.0, experts.OURS: 4.0}
    for read, floor in ((2.0, experts.READ), (0.5, experts.DENSE)):
        run = Race({name: [seconds] * 2 for name, seconds in (took | {experts.READ: read}).items()})
        found = experts.compared("section", routed, run)
        rows, facts = found.rows, found.facts
        ours = next(row for row in rows if row.name == experts.OURS)
        assert (ours.peer, ours.times_peer) == (experts.PEER, 2.0)
        assert (ours.floor, ours.floor_fraction) == (floor, max(read, 1.0) / 4.0)
        assert [row.name for row in rows if row.ours] == [experts.OURS]
        assert [row.floor for row in rows if row.name in took and row.name not in experts.IMPLEMENTATIONS] == [
            None,
            None,
        ]
        assert facts[2].value == pytest.approx(routed.layer.operations(4) / 4.0 / 1e9)


def test_bytes_are_counted_once() -> None:
    assert gate.moved_bytes(GateShape(128, 8, torch.float32, 65536)) == 65536 * (128 * 4 + 8 * 8)
    assert gate.floor_of(GateShape(tokens=1024)) == floors.LAUNCH
    assert gate.floor_of(GateShape(tokens=4096)) == floors.COPY
    rows = DispatchShape(4096, 7168, dtype=torch.bfloat16)
    assert dispatch.moved_bytes(dispatch.PERMUTE, rows) == pytest.approx(4096 * 7168 * 2 * 9, rel=1e-3)
    two = DispatchShape(2048, 4096, k=2, dtype=torch.bfloat16)
    assert dispatch.moved_bytes(dispatch.COMBINE, two) == pytest.approx(2048 * 4096 * 2 * 3, rel=2e-3)


def test_a_copy_moves_the_bytes_of_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = floors.copying(1 << 12, place.rehearsal())(0)
    assert copied.numel() * copied.itemsize * 2 == 1 << 12
    fixed = Race({floors.COPY: [0.5, 0.5]})
    monkeypatch.setattr(floors, "race", lambda *arguments, **options: fixed)
    where = place.rehearsal()
    assert floors.bandwidth(where, 2) == pytest.approx(2 * (where.memory_bytes // 16), rel=1e-6)


# ---- targets --------------------------------------------------------------------------------------------------------


def gate_run(microseconds: float, ratio: float = 6.0, steered: float = 1.05, counted: float = 1.05) -> Race:
    """A race over one gate in which `route + counts` takes so long."""
    one = microseconds * 1e-6
    seconds = {
        "torch": one * ratio,
        gate.COUNTED: one,
        gate.ROUTE: one,
        gate.SOFT: one * steered,
        gate.ALL: one * counted,
        gate.ALL_SOFT: one * steered,
    }
    return Race({name: [value] * 3 for name, value in seconds.items()})


def verdicts(found: list[Target]) -> dict[str, bool]:
    return {f"{target.what} {target.wanted}": target.met for target in found}


def test_targets_of_the_gate_take_the_worst_case() -> None:
    few = {tokens: GateShape(128, 8, torch.float32, tokens) for tokens in (1, 1024, 65536)}
    bytes_moved = gate.moved_bytes(few[65536])
    races = {
        ("in a graph", few[1]): gate_run(2.0),
        ("in a graph", few[1024]): gate_run(2.6),
        ("in a graph", few[65536]): gate_run(15, ratio=4.9, steered=1.2),
    }
    found = targets.gate_targets(races, "in a graph", bytes_moved / 9e-6)
    met = verdicts(found)
    assert len(met) == len(found) == 5
    assert [target.measured for target in found if "<= 2.5 us" in target.wanted] == ["2.73 us (T=1024)"]
    assert not next(v for k, v in met.items() if "<= 2.5 us" in k)
    assert next(v for k, v in met.items() if "copy bandwidth" in k)  # 9 of 15 microseconds
    assert not next(v for k, v in met.items() if "soft steering adds" in k)
    assert next(v for k, v in met.items() if "all statistics add" in k)
    assert not next(v for k, v in met.items() if "every T" in k)
    assert "4.90 (T=65536)" in {target.measured for target in found}
    slower = targets.gate_targets(races, "in a graph", bytes_moved / 7e-6)
    assert not next(v for k, v in verdicts(slower).items() if "copy bandwidth" in k)


def test_targets_of_both_clocks_and_dtypes_are_told_apart() -> None:
    cases = [GateShape(128, 8, dtype, 4096) for dtype in (torch.float32, torch.bfloat16)]
    races = {(mode, shape): gate_run(4.0) for mode in ("in a graph", "launched") for shape in cases}
    found = targets.gate_targets(races, "in a graph", 1e12)
    assert len(verdicts(found)) == len(found) == 4
    assert all(target.met for target in found)


def test_targets_of_moving() -> None:
    shape = {
        dispatch.DISPATCH: DispatchShape(16384, 7168),
        dispatch.PERMUTE: DispatchShape(4096, 7168, dtype=torch.bfloat16),
        dispatch.COMBINE: DispatchShape(2048, 4096, k=2, dtype=torch.bfloat16),
    }
    took = {dispatch.DISPATCH: 5.9e-6, dispatch.PERMUTE: 160e-6, dispatch.COMBINE: 16e-6}
    races = {("in a graph", name, one): Race({name: [took[name]] * 2}) for name, one in shape.items()}
    slow = {("launched", name, one): Race({name: [1.0] * 2}) for name, one in shape.items()}
    found = targets.moving_targets(races | slow, "in a graph", 4.3e12)
    assert [target.met for target in found] == [True, True, False]  # 77 % of 70 %, 73 % of 80 %
    assert [target.wanted for target in found] == ["<= 6 us", ">= 70%", ">= 80%"]
    assert targets.summary(found).endswith("2 of 3 targets met")


def test_the_cases_are_those_of_the_targets() -> None:
    work = device.Work()
    assert {(shape.experts, shape.k) for shape in work.gates} == {(128, 8)}
    for dtype in (torch.float32, torch.bfloat16):
        tokens = [shape.tokens for shape in work.gates if shape.dtype == dtype]
        assert tokens == [1, 16, 128, 1024, 4096, 16384, 65536]
    sizes = {name: (shape.tokens, shape.k, shape.hidden, shape.experts) for name, shape in work.moves}
    assert sizes[dispatch.DISPATCH][:2] + sizes[dispatch.DISPATCH][3:] == (16384, 8, 128)
    assert sizes[dispatch.PERMUTE][:3] == (4096, 8, 7168)
    assert sizes[dispatch.COMBINE][:3] == (2048, 2, 4096)
    assert {shape.dtype for name, shape in work.moves if name != dispatch.DISPATCH} == {torch.bfloat16}


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_a_rehearsal_writes_what_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--rounds", "2", "--sections"]
    assert device.main([*arguments, "gate"]) == 0
    assert device.main([*arguments, "dispatch", "layers", "expert-layers", "--add"]) == 0
    content = json.loads((tmp_path / "rehearsal-cpu.json").read_text())
    sections = {row["section"].split(",")[0] for row in content["rows"]}
    assert sections == {"Gate", "Dispatch", "Layers of public models", experts.SECTION}
    assert "figures mean nothing" in content["machine"]["rehearsal"]
    assert len(content["machine"]["hash of the sources"]) == 12
    keys = [(row["section"], row["case"], row["name"]) for row in content["rows"]]
    repeated = {key for key in keys if keys.count(key) > 1}
    assert repeated == set()
    assert [row for row in content["rows"] if "peer" in row and not row["times_peer"] > 0] == []
    assert len(content["targets"]) == 7
    assert device.main([*arguments, "dispatch"]) == 0  # without --add what was there is gone
    left = json.loads((tmp_path / "rehearsal-cpu.json").read_text())
    assert {row["section"].split(",")[0] for row in left["rows"]} == {"Dispatch"}
    assert "targets met" in capsys.readouterr().out


@pytest.mark.usefixtures("few_calls")
def test_experts_are_measured_on_a_stand_in(cuda: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By both clocks in bfloat16; what waits for the device is not captured."""
    make = experts.make
    monkeypatch.setattr(experts, "make", lambda layer, dtype, where: move(make(layer, dtype), where))
    monkeypatch.setattr(
        expert_layouts, "_unfit", lambda weight: None
    )  # the stand-in's tensors are a class of their own
    histogram = torch.histc  # of integers on a device alone
    monkeypatch.setattr(torch, "histc", lambda ids, **options: histogram(ids.float(), **options))
    arguments = ["--device", "cuda", "--small", "--out", str(tmp_path), "--sections", "expert-layers"]
    assert device.main(arguments) == 0
    content = json.loads((tmp_path / "cuda-stand-in-9.json").read_text())
    found = {(row["section"].rpartition(", ")[2], row["case"].rpartition(" ")[2]) for row in content["rows"]}
    assert found == {(place.GRAPH, "bfloat16"), (place.LAUNCHED, "bfloat16"), (place.LAUNCHED, "float32")}
    names = {
        mode: {row["name"] for row in content["rows"] if row["section"].endswith(mode)}
        for mode in (place.GRAPH, place.LAUNCHED)
    }
    assert names[place.LAUNCHED] - names[place.GRAPH] == {experts.EAGER}
    assert names[place.LAUNCHED] == {*experts.IMPLEMENTATIONS, *experts.PATHS, floors.COPY, experts.DENSE}


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = dispatch.measure

    def breaking(operator: str, *arguments: Any) -> Race:
        if operator == dispatch.COMBINE:
            raise RuntimeError("planted")
        return measure(operator, *arguments)

    monkeypatch.setattr(dispatch, "measure", breaking)
    with pytest.raises(RuntimeError, match="planted"):
        device.main(["--device", "cpu", "--out", str(tmp_path), "--sections", "dispatch"])
    content = json.loads((tmp_path / "rehearsal-cpu.json").read_text())
    assert {row["name"] for row in content["rows"] if "peer" in row} == {dispatch.DISPATCH, dispatch.PERMUTE}


@pytest.mark.usefixtures("few_calls")
def test_the_kernels_are_measured_on_a_stand_in(
    cuda: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor on the device, nothing that waits inside a graph."""
    small = replace(device.SMALL, gates=device.SMALL.gates[:1], models=device.SMALL.models[:1])
    monkeypatch.setattr(device, "SMALL", small)
    sections = ["gate", "dispatch", "chain", "layers"]
    assert device.main(["--device", "cuda", "--small", "--out", str(tmp_path), "--sections", *sections]) == 0
    content = json.loads((tmp_path / "cuda-stand-in-9.json").read_text())
    assert content["machine"]["device"] == "NVIDIA Stand-In 9"
    for name in (gate.COUNTED, dispatch.DISPATCH, dispatch.PERMUTE, dispatch.COMBINE, chain.APART):
        modes = {row["section"].rpartition(", ")[2] for row in content["rows"] if row["name"] == name}
        assert modes == {place.GRAPH, place.LAUNCHED}


def test_launches_overlap_in_one_contender_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tunable is set while that one runs, or is captured, and is what it was afterwards."""
    table: dict[str, dict[str, int | str]] = {chain.TUNABLE: {"now": 0}}
    during: list[int | str] = []
    monkeypatch.setattr(chain._C, "tunables", lambda: table)
    monkeypatch.setattr(chain._C, "tune", lambda name, value: table[name].update(now=value))
    route = ops.route
    monkeypatch.setattr(ops, "route", lambda *a, **k: during.append(table[chain.TUNABLE]["now"]) or route(*a, **k))
    run = chain.measure(device.SMALL.chains[0], place.named("cpu"), place.REHEARSED, 2)
    assert {chain.APART, chain.OVERLAPPED} <= set(run.seconds)
    assert set(during) == {0, 1}
    assert table[chain.TUNABLE]["now"] == 0


@pytest.mark.exhaustive
@pytest.mark.usefixtures("few_calls")
def test_a_model_is_measured_on_a_stand_in(cuda: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = model.decoder

    def on_device(dtype: torch.dtype, where: torch.device, **changes: int) -> torch.nn.Module:
        made = make(dtype, "cpu", **changes)
        made.set_experts_implementation("batched_mm")  # the others take operations that only a device has
        return move(made, where)

    monkeypatch.setattr(model, "decoder", on_device)
    monkeypatch.setattr("moe_route.ops.library.serves_cuda", lambda: "")  # the kernels of the CPU are used
    assert device.main(["--device", "cuda", "--small", "--out", str(tmp_path), "--sections", "model"]) == 0
    content = json.loads((tmp_path / "cuda-stand-in-9.json").read_text())
    assert {row["name"] for row in content["rows"]} == {model.ALONE, *model.PEERS}


@pytest.mark.usefixtures("few_calls")
def test_a_model_is_measured_on_the_cpu(tmp_path: Path) -> None:
    assert device.main(["--device", "cpu", "--out", str(tmp_path), "--sections", "model", "--rounds", "2"]) == 0
    content = json.loads((tmp_path / "rehearsal-cpu.json").read_text())
    assert {row["name"] for row in content["rows"]} == {model.ALONE, *model.PEERS}
    assert len({row["case"] for row in content["rows"]}) == 2
    inside = {fact["what"]: fact["value"] for fact in content["facts"] if "hooks" in fact["what"]}
    assert len(inside) == 4
    assert all(value > 0 for value in inside.values())


# ---- checks ---------------------------------------------------------------------------------------------------------


def outcome(name: str, where: str = "cpu") -> dict[str, object]:
    return checks.run(name, torch.device(where), small=True)


@pytest.mark.parametrize("name", ["same-bits-as-cpu", "determinism", "past-2-31", "experts"])
def test_checks_that_the_cpu_can_rehearse(name: str) -> None:
    found = outcome(name)
    assert found["status"] == "ok", found


@pytest.mark.parametrize("name", ["graph-replay", "capture-at-once", "two-streams", "no-waiting"])
def test_checks_of_a_device_are_refused_by_name(name: str, tmp_path: Path) -> None:
    found = outcome(name)
    assert found["status"] == "needs a device"
    assert "there are none on the CPU" in str(found["reason"])
    assert checks.main(["--device", "cpu", "--only", name, "--out", str(tmp_path / "checks.json")]) == stages.NOT_HERE


@pytest.mark.parametrize(
    "name",
    ["same-bits-as-cpu", "determinism", "graph-replay", "capture-at-once", "two-streams", "past-2-31", "no-waiting"],
)
def test_checks_pass_on_a_stand_in(cuda: Counting, name: str) -> None:
    found = outcome(name, "cuda:0")
    assert found["status"] == "ok", found


def changed(tensor: torch.Tensor) -> torch.Tensor:
    """The same but for the last bit of one number."""
    out = tensor.clone()
    out.view(-1)[-1] = torch.nextafter(out.view(-1)[-1], out.new_tensor(9.0))
    return out


def test_checks_find_a_bit_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = ops.combine, []

    def wobbling(*arguments: Any) -> torch.Tensor:
        calls.append(0)
        out = right(*arguments)
        return out if len(calls) == 1 else changed(out.float()).to(out.dtype) + (len(calls) == 2)

    monkeypatch.setattr(ops, "combine", wobbling)
    found = outcome("determinism")
    assert found["status"] == "failed"
    assert "run 1: combined differ" in str(found["reason"])
    with pytest.raises(AssertionError, match="weights differ in 1 places"):
        problems.same([changed(torch.ones(3))], [torch.ones(3)], "one bit", ["weights"])


def test_checks_find_a_graph_that_does_not_follow(cuda: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: None)
    found = outcome("graph-replay", "cuda:0")
    assert found["status"] == "failed"
    assert "replay 0: weights differ" in str(found["reason"])


def test_checks_find_an_operator_that_waits(cuda: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.dispatch

    def waiting(ids: torch.Tensor, experts: int) -> ops.Dispatch:
        plan = right(ids, experts)
        assert int(plan.offsets[-1]) > 0
        return plan

    monkeypatch.setattr(ops, "dispatch", waiting)
    found = outcome("no-waiting", "cuda:0")
    assert found["status"] == "failed"
    assert "waits for the device" in str(found["reason"])


def test_outcomes_of_checks_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checks.json"
    assert checks.main(["--device", "cpu", "--only", "determinism", "--out", str(path)]) == 0

    def broken(where: torch.device, small: bool) -> checks.Facts:
        raise AssertionError("planted")

    monkeypatch.setitem(checks.CHECKS, "past-2-31", broken)
    assert checks.main(["--device", "cpu", "--only", "past-2-31", "--out", str(path)]) == 1
    found = json.loads(path.read_text())
    assert {name: one["status"] for name, one in found.items()} == {"determinism": "ok", "past-2-31": "failed"}
    assert found["past-2-31"]["reason"] == "AssertionError: planted"


def test_problems_cover_every_kind_of_router() -> None:
    found = list(problems.problems(5))
    assert {problem.spec.score for problem in found} == {
        "softmax",
        "sigmoid",
        "sqrt_softplus",
        "identity",
        "sparsemixer",
    }
    assert {problem.logits.dtype for problem in found} == set(problems.DTYPES)
    assert any(problem.spec.groups > 1 for problem in found)
    for steered in (True, False):
        sizes = {problem.logits.shape[1] for problem in found if (problem.steering is not None) == steered}
        assert sizes == {experts for experts, _ in problems.SIZES}


# ---- the record of stages -------------------------------------------------------------------------------------------


def test_stages_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, log = tmp_path / "out" / "gpu.json", tmp_path / "log"
    log.write_text("first\n\x1b[31mred\x1b[0m\n 10%\r100%\n" + "x" * 2000 + "\n")
    assert stages.main([str(record), "begin"]) == 0
    assert stages.main([str(record), "end"]) == 1  # nothing ran, nothing is well
    assert stages.main([str(record), "add", "build", "failed", "3", "1", str(log)]) == 0
    assert stages.main([str(record), "end"]) == 1
    assert stages.main([str(record), "add", "build", "ok", "3", "0", str(log)]) == 0
    assert stages.main([str(record), "add", "racecheck", "not available", "0", "77", str(tmp_path / "none")]) == 0
    assert stages.main([str(record), "end"]) == 0
    content = stages.read(record)
    assert [stage["name"] for stage in content["stages"]] == ["build", "racecheck"]
    assert content["stages"][0]["said"] == ["first", "red", "100%", "x" * 500]
    assert content["machine"]["python"]
    with pytest.raises(ValueError, match="no status 'fine'"):
        stages.add(record, "build", "fine", 0, 0, log)


def test_what_is_missing_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    found = "\n".join(environment.problems(device_needed=False))
    for name in ("nvcc", "cmake", "ninja"):
        assert f"{name} is not on the PATH" in found
    assert "pip install cmake" in found
    monkeypatch.setattr(environment.metadata, "version", lambda name: "69.1.0")
    assert "setuptools 69.1.0 is too old" in environment.problems(device_needed=False)[-1]


def test_the_hash_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "kernel.cu"
    source.write_text("one")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    before = environment.sources_hash()
    (tmp_path / "notes.txt").write_text("no source")
    assert environment.sources_hash() == before
    source.write_text("two")
    assert environment.sources_hash() != before


# ---- bench/gpu.sh ---------------------------------------------------------------------------------------------------


def gpu(out: Path, *arguments: str, seconds: int = 5600, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script under limits ten times as long as usual: no stage is stopped because the machine is busy."""
    names = {"PYTHON": sys.executable, "OUT": str(out), "MOE_ROUTE_GPU_BUILD": str(out / "build"), "MAX_JOBS": "2"}
    environ = {**os.environ, **names, "MOE_ROUTE_GPU_SECONDS": str(seconds), **variables}
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=environ, check=False)


def statuses(out: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in json.loads((out / "gpu.json").read_text())["stages"]}


def test_the_script_parses_and_names_its_stages(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    names = gpu(tmp_path, "--list").stdout.split()
    assert len(set(names)) == len(names)
    assert set(checks.CHECKS) | set(device.MEASURES) | {"build", "tests", "memcheck", "synccheck"} <= set(names)
    for arguments, problem in ((["--fast"], "no option '--fast'"), (["--only", "build,nothing"], "no stage 'nothing'")):
        refused = gpu(tmp_path, *arguments)
        assert refused.returncode == 2
        assert problem in refused.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.exhaustive
def test_a_dry_run_rehearses_and_refuses_the_rest_by_name(tmp_path: Path) -> None:
    wanted = "determinism,graph-replay,dispatch,expert-layers,device-test,memcheck,memcheck-operators"
    done = gpu(tmp_path, "--dry", "--only", wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    needs = dict.fromkeys(("graph-replay", "device-test", "memcheck", "memcheck-operators"), "needs a device")
    assert statuses(tmp_path) == {"determinism": "ok", "dispatch": "ok", "expert-layers": "ok", **needs}
    assert {path.name for path in tmp_path.iterdir()} == {
        "build",
        "checks.json",
        "gpu.json",
        "gpu.log",
        "rehearsal-cpu.json",
    }
    assert json.loads((tmp_path / "checks.json").read_text())["determinism"]["status"] == "ok"


@pytest.mark.exhaustive
@pytest.mark.skipif(_C.build_info()["cuda"], reason="the module here was built with CUDA, so its import passes")
def test_a_failed_stage_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    done = gpu(tmp_path, "--dry", "--only", "import,two-streams")
    assert done.returncode == 1
    assert statuses(tmp_path) == {"import": "failed", "two-streams": "needs a device"}
    assert "the module was built without CUDA" in (tmp_path / "gpu.log").read_text()


def test_three_calls_hold_every_stage() -> None:
    """The checks stand there as one word, all but the one that needs a process of its own."""
    script = SCRIPT.read_text()
    names = set(
        subprocess.run(["bash", str(SCRIPT), "--list"], capture_output=True, text=True, check=True).stdout.split()
    )
    held = re.search(r"^calls=\((.*?)\)$", script, re.DOTALL | re.MULTILINE)
    assert held is not None
    assert names - set(re.split(r"[\s,\"]+", held[1])) == set(checks.CHECKS) - {"capture-at-once"}


@pytest.mark.exhaustive
def test_three_calls_run_every_stage_each_in_order(tmp_path: Path) -> None:
    """Without time to run them: each stage is recorded when its turn comes."""
    names = gpu(tmp_path, "--list").stdout.split()
    seen: set[str] = set()
    for call in ("1", "2", "3"):
        gpu(tmp_path / call, "--dry", "--call", call, seconds=1)
        ran = list(statuses(tmp_path / call))
        assert ran == [name for name in names if name in ran]
        assert {"environment", "build", "import"} <= set(ran)
        assert seen & set(ran) <= {"environment", "build", "import", "device-test-build"}
        seen |= set(ran)
    assert seen == set(names)
    done = gpu(tmp_path, "--dry", "--call", "4")
    assert done.returncode == 2
    assert "--call needs 1, 2 or 3" in done.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["device-test", "memcheck", "ncu"])
def test_a_stage_without_its_program_names_the_stage_that_builds_it(tmp_path: Path, name: str) -> None:
    done = gpu(tmp_path, "--only", name)
    assert done.returncode == 1
    assert statuses(tmp_path) == {name: "failed"}
    assert f"add the stage that builds it, --only device-test-build,{name}" in done.stdout


def test_the_part_at_fault_is_named() -> None:
    """Each switch is tried and put back; the one with which the bits are right again is named."""
    usual = {"gate.tiles_from": 12288, "gate.block_row": 1, "gate.level": 0}
    now = dict(usual)
    found = bisection.culprits(lambda: now["gate.block_row"] == 0, now.__setitem__, usual)
    assert found == ["statistics of a block in shared memory (gate.block_row=0 agrees)"]
    assert now == usual
    assert "at fault: statistics of a block" in bisection.verdict(found)
    assert "no switch" in bisection.verdict(bisection.culprits(lambda: False, now.__setitem__, usual))


def test_figures_stand_beside_what_was_expected() -> None:
    shape = GateShape(128, 8, torch.float32, 65536)
    slow, fast = (predictions.of_gate(shape, gate.COUNTED, bandwidth) for bandwidth in (1e11, 3e12))
    assert slow is not None
    assert fast is not None
    assert slow.seconds == pytest.approx(gate.moved_bytes(shape) / 1e11 + predictions.NODE)
    assert "limit: bytes" in slow.source
    assert fast.seconds < slow.seconds
    assert predictions.of_gate(shape, "torch", 1e12) is None
    rows = [
        results.Row(f"Gate, {mode}", shape.title, gate.COUNTED, 2 * slow.seconds, 0, 0, 1)
        for mode in (place.GRAPH, place.LAUNCHED)
    ]
    (beside,) = predictions.beside(rows, {(shape.title, gate.COUNTED): slow})
    assert beside.ratio == pytest.approx(2)
    assert "2.00" in predictions.table([beside])


def test_a_sweep_puts_its_tunables_back(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = {"rows.blocks": 64}, []
    monkeypatch.setattr(sweep._C, "tunables", lambda: {name: {"now": value} for name, value in now.items()})
    monkeypatch.setattr(sweep._C, "tune", now.__setitem__)
    work = replace(
        sweep.SMALL,
        sweeps=(sweep.Sweep("rows.blocks", (8, 16), ("combine",)), sweep.Sweep("unknown", (0, 1), ("permute",))),
    )
    monkeypatch.setattr(sweep, "timed", lambda *_: seen.append(now["rows.blocks"]) or 1e-6)
    facts = list(sweep.measure(place.rehearsal(), work, place.REHEARSED))
    assert [fact.what for fact in facts] == ["rows.blocks = 8", "rows.blocks = 16", "unknown = untouched"]
    assert seen == [8, 16, 64]
    assert now == {"rows.blocks": 64}


def test_a_run_out_of_time_says_so(tmp_path: Path) -> None:
    done = gpu(tmp_path, "--dry", "--only", "determinism", seconds=1)
    assert done.returncode == 1
    assert statuses(tmp_path) == {"determinism": "no time left"}


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("prints", "code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ok"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "ok"),
        ("========= ERROR SUMMARY: 3 errors", 9, "failed"),
        ("========= Error: Device not supported", 1, "not available"),
        ("nothing of a summary", 0, "failed"),
    ],
)
def test_only_a_sanitizer_that_says_so_passes(tmp_path: Path, prints: str, code: int, status: str) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{prints}'\nexit {code}\n")
    tool.chmod(0o755)
    out = tmp_path / "out"
    # the folder of PYTHON comes first on the script's PATH
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    program = out / "build" / "device_test"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    done = gpu(out, "--only", "racecheck", PYTHON=str(tmp_path / "bin" / "python"))
    assert statuses(out) == {"racecheck": status}
    assert done.returncode == int(status == "failed")
    assert prints in (out / "sanitizers.log").read_text()


@pytest.mark.xdist_group("nvcc")
@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.timeout(9000)
def test_a_dry_run_builds_the_module_with_its_kernels(tmp_path: Path) -> None:
    """The whole of it, with nvcc: what a machine with a device does first."""
    build = Path(os.environ.get("MOE_ROUTE_GPU_BUILD") or ROOT / "build" / "gpu")
    names = ("environment", "build", "import", "tests", "device-test-build")
    archs = "80-real;90"  # as tests/test_packaging.py, which builds in the same folder
    wanted = ("--dry", "--only", ",".join(names))
    done = gpu(tmp_path, *wanted, seconds=8400, MOE_ROUTE_GPU_BUILD=str(build), CUDAARCHS=archs)
    assert statuses(tmp_path) == dict.fromkeys(names, "ok"), done.stdout + done.stderr
    assert (build / "site" / "moe_route" / "data").is_dir()
    assert not list((ROOT / "moe_route").glob("*.new"))
