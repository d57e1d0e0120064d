"""The parser of disassemblies, the cost model, and the comparison with the committed table."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("bench.sass", reason="needs the source tree")

from bench.sass.cost import BARRIER, LATENCY, Schedule, block_cost, warps_at_once, widths
from bench.sass.disassembly import Kernel, jump_tables, kernels, parse
from bench.sass.machine import Launch, Program
from bench.sass.memory import GlobalMemory
from bench.sass.report import Figures, grown, load, names_of_launches, rows
from moe_route import _C

LISTING = """
		Function : _Z5firstv
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                   /* 0x00000a00ff017b82 */
                                                                            /* 0x000fe20000000800 */
        /*0010*/             @!UP0 LDG.E.128 R4, desc[UR4][R2.64+0x10] ;    /* 0x0000000000007919 */
                                                                            /* 0x000e220000002100 */
        /*0020*/                   EXIT ;                                   /* 0x0000000000007919 */
                                                                            /* 0x000fea0003800000 */
        /*0030*/                   BRA 0x30;                                /* 0xfffffffc00fc7947 */
                                                                            /* 0x000fc0000383ffff */
        /*0040*/                   NOP;                                     /* 0x0000000000007918 */
                                                                            /* 0x000fc00000000000 */
		Function : _Z6secondv
        /*0000*/                   IADD3 R0, P1, R2.reuse, -R3, RZ ;        /* 0x0 */
"""


def test_a_listing_is_read() -> None:
    first, second = kernels(LISTING)
    assert (first.name, second.name) == ("_Z5firstv", "_Z6secondv")
    load_wide = first.instructions[1]
    assert (load_wide.mnemonic, load_wide.guard) == ("LDG.E.128", "!UP0")
    assert load_wide.operands == ("R4", "desc[UR4][R2.64+0x10]")
    assert first.code_bytes == 48  # neither the branch to itself nor what follows it
    assert second.instructions[0].operands == ("R0", "P1", "R2", "-R3", "RZ")
    assert Schedule.of(first.instructions[1]) == Schedule(1, 0, 7, ())
    with pytest.raises(ValueError, match="listing cut"):
        list(kernels(LISTING.replace("/*0010*/", "/*0050*/")))


def test_tables_of_jumps_are_read() -> None:
    text = ".nv.constant2._Z5firstv\n0x00000010 0x00000020\n0x00000030\n\n.nv.shared._Z5firstv\n0x00000040\n"
    assert jump_tables(text) == {"_Z5firstv": bytes([16, 0, 0, 0, 32, 0, 0, 0, 48, 0, 0, 0])}


def encoding(stall: int, result: int = 7, waits: int = 0) -> int:
    return (stall | result << 5 | 7 << 8 | waits << 11) << 41


def test_the_model_waits_for_results_and_barriers() -> None:
    """A shuffle's result is waited for by its counter, an addition takes the cycles that it says, a barrier its own."""
    made = [
        replace(parse("SHFL.BFLY PT, R1, R0, 0x1, 0x1f", 0), encoding=encoding(2, result=3)),
        replace(parse("IADD3 R2, R1, R1, RZ", 16), encoding=encoding(5, waits=1 << 3)),
        replace(parse("BAR.SYNC.DEFER_BLOCKING 0x0", 32), encoding=encoding(1)),
        replace(parse("EXIT", 48), encoding=encoding(5)),
    ]
    kernel = Kernel("by_hand", made)
    warps = next(Program(kernel).run(Launch((1, 1, 1), (64, 1, 1), 0, b""), GlobalMemory([])))
    cost = block_cost(kernel, warps)
    assert cost.cycles == LATENCY["SHFL"] + 5 + 1 + BARRIER + 5
    assert (cost.instructions, cost.longest, cost.touched) == (8, 4, 64)


def test_occupancy_and_widths() -> None:
    assert warps_at_once(32, 128, 0) == 64
    assert warps_at_once(80, 128, 9000) == 24  # the registers of six blocks
    assert warps_at_once(32, 128, 100_000) == 8  # the shared memory of two
    assert widths(Counter({16: 830, 4: 170})) == "16 B 83 %, 4 B 17 %"
    assert widths(Counter()) == "none"


ONE = Figures("gate_kernel<4, 0, true>", 1, 128, 500.0, 979, 4693, "4 B 100 %", 512, 80, 24, 9000, 8000, 0)


def test_the_launches_of_a_call_have_different_names() -> None:
    assert names_of_launches(["one<1>"]) == [""]
    assert names_of_launches(["count<int>", "place<int, 8>"]) == [" (count)", " (place)"]
    assert names_of_launches(["product<1>", "product<2>"]) == [" (product, launch 1)", " (product, launch 2)"]


def test_growth_is_named() -> None:
    committed = {"cases": {"gate, 1 row": asdict(ONE), "gate, 9 rows": asdict(ONE)}}
    same = {"gate, 1 row": ONE, "gate, 9 rows": replace(ONE, instructions_a_row=514.9)}
    assert grown(same, committed) == []
    (wrong,) = grown({**same, "gate, 1 row": replace(ONE, instructions_a_row=520.0)}, committed)
    assert wrong == "gate, 1 row: gate_kernel<4, 0, true> took 500.0 instructions a row and takes 520.0 (+4.0 %)"
    assert grown({"gate, 1 row": replace(ONE, spills=2)}, committed, complete=False) == [
        "gate, 1 row: gate_kernel<4, 0, true> has 2 instructions that spill registers"
    ]
    assert "the table does not have it" in grown({"new, 1 row": ONE}, committed, complete=False)[0]
    assert "not launched any more" in grown({"gate, 1 row": ONE}, committed)[0]


def test_the_committed_table_has_every_case() -> None:
    from bench.sass.cases import cases

    titles = load()["cases"]
    for case in cases():
        assert any(title.startswith(case.title) for title in titles), case.title
    assert "gate_kernel<4, 0, true>" in rows({"gate, 1 row": ONE})


def test_a_missing_module_is_noticed_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.sass import __main__ as command

    monkeypatch.setattr(command, "code", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(command.launches, "missing", lambda: "the emulated CUDA kernels are older: make emulated")
    monkeypatch.setattr("sys.argv", ["sass"])
    with pytest.raises(SystemExit, match="make emulated"):
        command.main()


def test_a_module_that_cannot_hand_its_launches_over_is_unfit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bench.sass import launches

    if launches.missing() is not None:
        pytest.skip("needs the emulated module")
    unfit = tmp_path / "moe_route_emulated.so"
    unfit.write_bytes(Path(_C.__file__).read_bytes())  # a module, and not this one
    monkeypatch.setattr(launches, "_emulated_module", lambda: unfit)
    assert "cannot hand its launches over; build it anew: make emulated" in str(launches.missing())
