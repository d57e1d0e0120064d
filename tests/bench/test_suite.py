"""`moe-route bench`, `python -m bench.cpu`: sections, results files, comparison with an earlier run, errors."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench.cpu import SECTIONS, experts, recording, vllm_experts
from bench.cpu.__main__ import main as cpu
from moe_route import _C
from moe_route.base.files import FileRefusedError
from moe_route.bench import gate, results, sections
from moe_route.bench.comparison import IMPROVED, REGRESSED, TOLERANCE, UNCHANGED, Comparison, compare
from moe_route.bench.results import BenchmarkResults, Fact, Measured, Row
from moe_route.bench.sections import measure
from moe_route.bench.timing import Effort, Race, Shape, ThreadTime, WallTime, clock_of_threads, race
from moe_route.cli import main
from moe_route.cli.bench import ROUNDS, SECONDS

ROOT = Path(__file__).resolve().parents[2]
FAMILY = f"cpu-{_C.instruction_set().removesuffix('_bf16')}"


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ---- sections -------------------------------------------------------------------------------------------------------


def test_every_section_names_a_function() -> None:
    for section in SECTIONS.values():
        module, _, function = section.measure.partition(":")
        assert callable(getattr(import_module(module), function))


def test_a_section_that_cannot_run_is_refused_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sections, "find_spec", lambda name: None)
    monkeypatch.setattr(gate, "measure_one_row", lambda effort: run_of(4.0).measured)
    assert cpu(["--sections", "one-row", "experts"]) == 2
    assert "transformers is missing, which experts measures: pip install 'moe-route[hf]'" in capsys.readouterr().err
    assert main(["bench", "--sections", "one-row"]) == 0


def test_a_section_that_is_named_twice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "measure_one_row", lambda effort: run_of(4.0).measured)
    assert len(list(measure(["one-row", "one-row"], Effort(2)))) == 1


def test_a_section_is_measured_into_a_file_and_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["bench", "--sections", "one-row", "--rounds", "2", "--json", "--out", str(tmp_path / "found")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "measuring one-row" in caplog.text
    (path,) = (tmp_path / "found").iterdir()
    assert path.name == f"{FAMILY}.json"
    assert printed["files"] == [str(path)]
    found = BenchmarkResults.load(path)
    assert [row.name for row in found.measured.rows if row.ours] == ["route", "route + counts"]
    assert found.to_dict() == {name: printed[name] for name in ("machine", "rows", "facts", "targets")}
    assert found.machine["threads used"] == "1"
    assert found.machine["clock"] == ThreadTime.name
    assert found.machine["command"] == "moe-route bench --sections one-row --rounds 2 --threads 1"


def test_experts_are_measured_into_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuple(experts.Layer(f"small {kind}", kind, 64, 32, 8, 2) for kind in ("qwen3_moe", "gpt_oss"))
    monkeypatch.setattr(experts, "LAYERS", small)
    assert cpu(["--sections", "experts", "--rounds", "6", "--threads", "2", "--out", str(tmp_path)]) == 0
    found = BenchmarkResults.load(tmp_path / f"{FAMILY}-experts.json")
    assert {"transformers", "load"} <= found.machine.keys()
    assert found.machine["command"] == "python -m bench.cpu --sections experts --rounds 6 --threads 2"
    assert found.machine["clock"] == WallTime.name
    packs = {experts.OURS_PACKED} if _C.instruction_set().startswith("avx512") else set()
    names = {row.name for row in found.measured.rows} - {vllm_experts.NAME}  # where it is installed
    assert names == {*experts.IMPLEMENTATIONS, experts.READ, experts.DENSE, *packs}
    assert {row.name for row in found.measured.rows if row.ours} == {experts.OURS, *packs}
    assert len({row.case for row in found.measured.rows}) == 2 * 2 * len(experts.TOKENS)


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(effort: Effort) -> Measured:
        raise RuntimeError("planted")

    monkeypatch.setattr(gate, "measure", broken)
    with pytest.raises(RuntimeError, match="planted"):
        main(["bench", "--sections", "one-row", "gate", "--rounds", "2", "--out", str(tmp_path)])
    kept = BenchmarkResults.load(tmp_path / f"{FAMILY}.json")
    assert {row.section for row in kept.measured.rows} == {"One row a call"}


def test_the_recorder_is_held_against_statistics_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the exact time inside hooks: the ratio is a row of the results, and so in what is printed."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
    monkeypatch.setattr(recording, "SIZES", recording.SIZES | sizes | {"moe_intermediate_size": 16})
    found = recording.measure_decoding(torch.float32, Effort(2, quick=True))
    (inside,) = (row for row in found.rows if row.section == recording.INSIDE and row.ours)
    by_hand = next(row for row in found.rows if row.section == recording.INSIDE and row.name == recording.BY_HAND)
    assert (inside.name, inside.peer, inside.floor) == (recording.OURS, recording.BY_HAND, recording.IDLE)
    assert inside.times_peer is not None
    assert inside.calls == 3  # windows
    assert inside.times_peer_low <= inside.times_peer <= inside.times_peer_high
    assert by_hand.floor_fraction < 1
    shown = next(str(table) for table in BenchmarkResults({}, found).tables() if table.title == recording.INSIDE)
    assert f"{inside.times_peer:.2f}  {recording.BY_HAND}" in shown
    said = [fact.value for fact in found.facts if fact.what.startswith("moe-route: time inside its ")]
    assert said == [pytest.approx(inside.median * 1e6)]


def test_rounds_that_have_no_quartiles_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for measuring in (lambda: main(["bench", "--rounds", "1"]), lambda: cpu(["--rounds", "1"])):
        with pytest.raises(SystemExit):
            measuring()
        assert "quartiles need 2 rounds or more" in capsys.readouterr().err


def test_one_shape_is_raced_in_the_place_of_those_of_public_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--experts", "96", "--top-k", "6", "--tokens", "64", "--dtype", "bfloat16"]
    assert main(["bench", *asked, "--rounds", "2", "--json", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {row["case"] for row in printed["rows"]} == {"E=96 k=6 T=64 bfloat16", "E=96 k=6 T=1 bfloat16"}
    assert printed["targets"] == []  # the project has none for it
    assert printed["machine"]["command"].endswith(f"--rounds 2 --threads 1 {' '.join(asked)}")


def test_the_rest_of_a_shape_is_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Effort] = []
    monkeypatch.setattr(gate, "measure", lambda effort: seen.append(effort) or run_of(4.0).measured)
    for options in ([], ["--experts", "4"], ["--tokens", "9", "--rounds", "7"]):
        assert main(["bench", "--sections", "gate", *options]) == 0
    usual, few, rows = seen
    assert usual == Effort(ROUNDS)
    assert (few.shape, few.rounds, few.within) == (Shape(4, 4), ROUNDS, SECONDS)
    assert (rows.shape, rows.rounds, rows.within) == (Shape(tokens=9), 7, math.inf)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--experts", "4", "--top-k", "5"], "--top-k 5 is above 4"),
        (["--experts", "200", "--top-k", "65"], "--top-k 65 is above 64"),
        (["--experts", "5000"], "--experts 5000 is above 4096"),
        (["--dtype", "float64"], "'float64' is not one of"),
        (["--tokens", "0"], "--tokens"),
    ],
)
def test_a_shape_that_no_gate_has_is_refused(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):
        assert main(["bench", *options]) == 2
    assert named in capsys.readouterr().err


def test_a_race_ends_in_time_with_the_rounds_of_quartiles() -> None:
    calls: list[int] = []
    run = race({"one": calls.append, "other": calls.append}, rounds=1000, warmup=0, within=0.0)
    assert len(calls) == 4
    assert {len(each) for each in run.seconds.values()} == {2}


def test_pytest_takes_the_options_of_a_shape() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:xdist", "--benchmark-disable"]
    options = ["--experts", "8", "--top-k", "2", "--tokens", "4", "--dtype", "float16"]
    done = subprocess.run([*command, *options, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    cases = {line.partition("[")[2].rpartition("-")[0] for line in done.stdout.splitlines() if "test_gate[" in line}
    assert {case[: len("E=8-k=2-T=4-float16")] for case in cases} == {"E=8-k=2-T=4-float16"}
    one = [*command, *options, "-k", "test_one_row or test_gate and entropy"]
    done = subprocess.run(one, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout


def test_the_package_has_the_first_sections_and_the_project_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(SECTIONS)[:2] == list(sections.SECTIONS) == ["gate", "one-row"]
    with pytest.raises(SystemExit):
        main(["bench", "--sections", "dispatch"])
    assert "dispatch" in capsys.readouterr().err


def test_more_threads_are_timed_on_the_wall() -> None:
    """A thread that waits for others has no processor time."""
    torch.set_num_threads(1)
    assert isinstance(clock_of_threads(), ThreadTime)
    torch.set_num_threads(2)
    assert isinstance(clock_of_threads(), WallTime)


def test_an_installation_inside_another_repository_names_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOE_ROUTE_COMMIT", raising=False)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    assert results.commit(tmp_path) == "unknown"
    monkeypatch.setenv("MOE_ROUTE_COMMIT", "0123456789ab")
    assert results.commit(tmp_path) == "0123456789ab"


@pytest.mark.exhaustive
def test_the_quick_form_measures_every_case(tmp_path: Path) -> None:
    """Its shape, never its times: each section has its cases, each of moe-route's contenders a finite ratio."""
    options = ["--quick", "--threads", "2", "--json", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "bench.cpu", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    files = [tmp_path / f"{FAMILY}{ending}.json" for ending in ("", "-experts", "-models", "-growth")]
    assert printed["files"] == [str(path) for path in files]
    measured = BenchmarkResults.joined([BenchmarkResults.load(path) for path in files]).measured
    assert measured.targets
    cases: dict[str, set[str]] = {}
    for row in measured.rows:
        cases.setdefault(row.section, set()).add(row.case)
    assert cases["Gate"] == {shape.title for shape in gate.SHAPES}
    assert {name: len(each) for name, each in cases.items()} == {
        "Gate": len(gate.SHAPES),
        "Whole models": 3,
        "One row a call": 1,
        "Dispatch, permute, combine": 3,
        recording.STEP: 2,
        recording.INSIDE: 2,
        "Options of record": 2,
        experts.SECTION: len(experts.QUICK_TOKENS),
    }
    ours = [row for row in measured.rows if row.ours]
    assert all((row.times_peer or row.floor_fraction) is not None for row in ours)
    assert all(row.times_peer_low is not None for row in ours if row.peer)


# ---- files ----------------------------------------------------------------------------------------------------------


def run_of(
    ratio: float,
    *,
    spread: float = 0.02,
    case: str = "case",
    floor: float | None = None,
    quartiles: bool = True,
    ours: bool = True,
    **machine: str,
) -> BenchmarkResults:
    """A contender with this ratio to its peer, whose quartiles lie this share of it below and above."""
    low, high = ratio * (1 - spread), ratio * (1 + spread)
    peer = Row("Section", case, "torch", 1.0, 1.0, 1.0, 9, ours=False)
    mine = Row("Section", case, "route", 1 / ratio, 1 / high, 1 / low, 9, peer="torch", times_peer=ratio, ours=ours)
    if quartiles:
        mine = replace(mine, times_peer_low=low, times_peer_high=high)
    rows = [peer, mine]
    if floor is not None:
        rows.append(Row("Section", case, "read", floor / ratio, floor / ratio, floor / ratio, 9, ours=False))
        rows[1] = replace(mine, floor="read", floor_fraction=floor)
    return BenchmarkResults({"processor": "one", **machine}, Measured(rows))


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    found = run_of(3.0, floor=0.5)
    found.measured.facts.append(Fact("Section", "case", "share", 0.4, "%"))
    assert BenchmarkResults.load(found.save(tmp_path / "found.json")) == found


def test_a_number_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_of(float("nan")).save(tmp_path / "found.json")
    assert not list(tmp_path.iterdir())


def damaged(path: Path, fault: str) -> Path:
    run_of(3.0).save(path)
    whole = path.read_text(encoding="utf-8")
    changes = {
        "truncated": whole[: len(whole) // 2],
        "of another kind": whole.replace("BenchmarkResults", "Plan"),
        "not JSON at all": "gate: 3 us\n",
        "without rows": whole.replace('"rows"', '"lines"'),
        "with another field": whole.replace('"median"', '"mean"'),
        "without the peer": whole.replace('"name": "torch"', '"name": "numpy"'),
        "with a number in words": whole.replace('"times_peer": 3.0', '"times_peer": "three"'),
    }
    path.write_text(changes[fault], encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("truncated", "is not JSON"),
        ("of another kind", "is not a BenchmarkResults"),
        ("not JSON at all", "is not JSON"),
        ("without rows", 'no key "lines"'),
        ("with another field", 'no key "mean"'),
        ("without the peer", "route in Section, case is compared with torch, which is missing"),
        ("with a number in words", 'rows[1].times_peer is "three"'),
    ],
)
def test_a_file_that_cannot_be_compared_is_refused_before_measuring(
    fault: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "measure_one_row", lambda effort: pytest.fail("measured"))
    path = damaged(tmp_path / "earlier.json", fault)
    assert main(["bench", "--sections", "one-row", "--compare", str(path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert problem in said
    with pytest.raises(FileRefusedError):
        BenchmarkResults.load(path)


def test_a_file_of_another_program_is_told_how_such_files_are_made(tmp_path: Path) -> None:
    (tmp_path / "foreign.json").write_text('{"rows": []}', encoding="utf-8")
    with pytest.raises(FileRefusedError, match="`moe-route bench --out FOLDER` writes such files"):
        BenchmarkResults.load(tmp_path / "foreign.json")
    with pytest.raises(FileRefusedError, match="does not exist: check the name"):
        BenchmarkResults.load(tmp_path / "missing.json")


# ---- comparison -----------------------------------------------------------------------------------------------------


def verdicts(comparison: Comparison) -> list[str]:
    return [change.verdict for change in comparison.changes]


@pytest.mark.parametrize(
    ("before", "now", "spread", "verdict"),
    [
        (4.0, 3.0, 0.02, REGRESSED),
        (3.0, 4.0, 0.02, IMPROVED),
        (4.0, 3.7, 0.001, UNCHANGED),  # less than the tolerance, however steady
        (4.0, 3.5, 0.02, UNCHANGED),  # more, but less lies between the quartiles
        (4.0, 3.0, 0.20, UNCHANGED),  # the quartiles overlap
        (3.0, 4.0, 0.20, UNCHANGED),
        (4.0, 4.0, 0.02, UNCHANGED),
    ],
)
@pytest.mark.parametrize("quartiles", [True, False])  # without: those that the times allow
def test_a_ratio_regresses_beyond_the_tolerance_and_the_spread(
    before: float, now: float, spread: float, verdict: str, quartiles: bool
) -> None:
    this, earlier = (run_of(ratio, spread=spread, quartiles=quartiles) for ratio in (now, before))
    comparison = compare(this, [earlier])
    assert verdicts(comparison) == [verdict]
    assert comparison.passed == (verdict != REGRESSED)
    (change,) = comparison.changes
    assert change.factor == pytest.approx(now / before)
    if quartiles is False:
        assert change.now.low == pytest.approx(now * (1 - spread))


def test_shares_of_the_floor_are_compared_too() -> None:
    comparison = compare(run_of(4.0, floor=0.4), [run_of(4.0, floor=0.8)])
    assert [(change.against, change.verdict) for change in comparison.changes] == [
        ("torch", UNCHANGED),
        ("floor: read", REGRESSED),
    ]
    assert f"more than {TOLERANCE:.0%} lie between the quartiles" in repr(comparison)


def test_times_are_not_compared() -> None:
    """A machine that is ten times as slow gives the same ratios."""
    now = run_of(4.0)
    slow = [replace(row, median=row.median * 10, low=row.low * 10, high=row.high * 10) for row in now.measured.rows]
    assert verdicts(compare(BenchmarkResults({}, Measured(slow)), [now])) == [UNCHANGED]


def test_implementations_of_others_cannot_regress() -> None:
    assert compare(run_of(1.0, ours=False), [run_of(4.0, ours=False)]).changes == []


def test_cases_of_one_run_alone_are_named() -> None:
    now = BenchmarkResults.joined([run_of(4.0), run_of(4.0, case="new")])
    before = BenchmarkResults.joined([run_of(4.0), run_of(4.0, case="old", floor=0.5)])
    comparison = compare(now, [before])
    assert comparison.only_now == [("Section", "new", "route", "torch")]
    assert comparison.only_before == [("Section", "old", "route", "torch"), ("Section", "old", "route", "floor: read")]
    shown = repr(comparison)
    assert "Only in this run, so not compared" in shown
    assert "Only in the earlier run, so not compared" in shown
    assert comparison.passed


def test_a_section_that_was_not_measured_is_named_once() -> None:
    others = [replace(row, section="Other") for case in "ab" for row in run_of(4.0, case=case).measured.rows]
    before = BenchmarkResults({}, Measured(run_of(4.0).measured.rows + others))
    assert repr(compare(run_of(4.0), [before])).count("Other") == 1


def test_machines_that_differ_are_said() -> None:
    comparison = compare(run_of(4.0, torch="2.13", commit="b"), [run_of(4.0, torch="2.12", commit="a")])
    assert comparison.machines == {"torch": ("2.12", "2.13")}
    assert "The runs were not made alike" in repr(comparison)
    assert comparison.passed


@pytest.mark.parametrize(
    ("ratio", "code", "said"),
    [(4.0, 0, "0 regressed"), (3.0, 1, "1 regressed"), (6.0, 0, "1 improved")],
)
def test_the_command_fails_where_a_ratio_regressed(
    ratio: float,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gate, "measure_one_row", lambda effort: run_of(ratio).measured)
    earlier = run_of(4.0).save(tmp_path / "earlier.json")
    command = ["bench", "--sections", "one-row", "--compare", str(earlier)]
    assert main(command) == code
    assert said in capsys.readouterr().out
    assert main([*command, "--json"]) == code
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["tolerance"] == TOLERANCE
    assert comparison["changes"][0]["factor"] == pytest.approx(ratio / 4.0)


def test_a_comparison_of_nothing_does_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "measure_one_row", lambda effort: run_of(4.0).measured)
    earlier = run_of(4.0, case="another").save(tmp_path / "earlier.json")
    assert main(["bench", "--sections", "one-row", "--compare", str(earlier)]) == 1
    assert "no ratio is in both runs" in capsys.readouterr().out


def test_what_differs_between_earlier_runs_is_spread() -> None:
    """A ratio that three earlier runs put anywhere between 3 and 4 has not regressed at 3."""
    earlier = [run_of(ratio) for ratio in (4.0, 3.1, 3.8)]
    assert verdicts(compare(run_of(3.0), earlier[:1])) == [REGRESSED]
    comparison = compare(run_of(3.0), earlier)
    assert verdicts(comparison) == [UNCHANGED]
    assert comparison.changes[0].before.median == 3.8
    assert verdicts(compare(run_of(2.0), earlier)) == [REGRESSED]


def test_several_files_are_compared_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "measure_one_row", lambda effort: run_of(4.0).measured)
    files = [run_of(9.0, case="another").save(tmp_path / "a.json"), run_of(9.0).save(tmp_path / "b.json")]
    assert main(["bench", "--sections", "one-row", "--compare", *map(str, files)]) == 1


def test_a_race_gives_ratios_with_their_quartiles() -> None:
    race = Race({"torch": [4.0, 8.0, 12.0], "route": [1.0, 1.0, 2.0]})
    (mine,) = (row for row in results.rows("S", "c", race, peers={"route": "torch"}) if row.ours)
    assert mine.times_peer == 6.0
    assert (mine.times_peer_low, mine.times_peer_high) == (4.0, 8.0)


def test_sections_of_one_file_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "measure_one_row", lambda effort: run_of(4.0).measured)
    monkeypatch.setattr(gate, "measure", lambda effort: run_of(5.0, case="more").measured)
    monkeypatch.setattr(experts, "measure", lambda effort: run_of(6.0).measured)
    found = dict(measure(["one-row", "gate", "experts"], Effort(2), SECTIONS))
    assert {name: len(each.measured.rows) for name, each in found.items()} == {FAMILY: 4, f"{FAMILY}-experts": 2}
