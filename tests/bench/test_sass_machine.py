"""The interpreter of machine code, on instructions written by hand whose results are known."""

from __future__ import annotations

import ctypes
import ctypes.util
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("bench.sass", reason="needs the source tree")

from bench.sass.disassembly import Kernel, parse
from bench.sass.machine import Launch, Program
from bench.sass.memory import RESERVED_SHARED, GlobalMemory, Region
from bench.sass.opcodes import executable
from bench.sass.state import SassError, Warp

LANE = np.arange(32, dtype=np.uint32)
BASE = 0x10000  # of global memory
WORDS = st.integers(0, 2**32 - 1)
EDGES = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]) | WORDS


def run(*lines: str, memory: np.ndarray | None = None, threads: int = 32, parameters: bytes = b"") -> list[Warp]:
    """The warps of one block that executed these instructions and EXIT. R0 is the thread's number to begin with."""
    texts = ["S2R R0, SR_TID.X", *lines, "EXIT"]
    kernel = Kernel("by_hand", [parse(text, 16 * at) for at, text in enumerate(texts)])
    regions = [] if memory is None else [Region(BASE, memory.view(np.uint8))]
    launch = Launch((1, 1, 1), (threads, 1, 1), 256, parameters)
    return next(Program(kernel).run(launch, GlobalMemory(regions)))


def result(*lines: str, register: int = 1) -> np.ndarray:
    return run(*lines)[0].r[register].copy()


def as_float(value: float) -> str:
    """An integer instruction that puts a float into a register."""
    return hex(int(np.float32(value).view(np.uint32)))


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


# ---- integers ---------------------------------------------------------------------------------------------------


@given(a=EDGES, b=EDGES, c=EDGES)
def test_integer_arithmetic(a: int, b: int, c: int) -> None:
    warp = run(
        f"MOV R2, {a:#x}",
        f"MOV R3, {b:#x}",
        f"MOV R4, {c:#x}",
        "MOV R5, R2",
        "IADD3 R10, P0, R2, R3, RZ",
        "IADD3.X R11, R3, R4, RZ, P0, !PT",
        "IMAD R12, R2, R3, R4",
        "IMAD.WIDE.U32 R14, R2, R3, R4",
        "IMAD.WIDE R16, R2, R3, RZ",
        "IMAD.HI.U32 R18, R2, R3, RZ",
        "IADD3 R19, R2, -R3, R4",
        "LEA R20, R2, R3, 0x2",
        "SHF.R.S32.HI R21, RZ, 0x5, R2",
        "SHF.L.U64.HI R22, R2, 0x3, R3",
        "LOP3.LUT R23, R2, R3, R4, 0x96, !PT",
        "LOP3.LUT R24, R2, R3, R4, 0xe8, !PT",
        "VIMNMX R25, R2, R3, PT",
        "VIMNMX.U32 R26, R2, R3, !PT",
        "POPC R27, R2",
        "FLO.U32 R28, R2",
        "BREV R29, R2",
        "PRMT R30, R2, 0x7510, R3",
        "IADD3 R32, P1, R2, -R3, RZ",
        "IADD3.X R33, R3, ~R4, RZ, P1, !PT",
    )[0]
    got = {number: int(warp.r[number][7]) for number in range(10, 34)}
    whole = 2**32
    assert got[10] == (a + b) % whole
    assert got[11] == (b + c + (a + b >= whole)) % whole
    assert got[12] == (a * b + c) % whole
    assert got[14] + (got[15] << 32) == (a * b + c + (a << 32)) % 2**64  # the sum takes the pair R4, R5
    assert got[16] + (got[17] << 32) == signed(a) * signed(b) % 2**64
    assert got[18] == a * b >> 32
    assert got[19] == (a - b + c) % whole
    assert got[20] == (a * 4 + b) % whole
    assert got[21] == (signed(a) >> 5) % whole
    assert got[22] == ((a + (b << 32)) << 3 >> 32) % whole
    assert got[23] == a ^ b ^ c
    assert got[24] == (a & b) | (a & c) | (b & c)
    assert got[25] == min(signed(a), signed(b)) % whole
    assert got[26] == max(a, b)
    assert got[27] == a.bit_count()
    assert got[28] == (a.bit_length() - 1) % whole
    assert got[29] == int(f"{a:032b}"[::-1], 2)
    assert got[30] == a & 0xFFFF | (b >> 8 & 255) << 16 | (b >> 24) << 24
    assert got[32] + (got[33] << 32) == (a + (b << 32) - b - (c << 32)) % 2**64


@given(a=EDGES, b=EDGES)
def test_arithmetic_of_the_uniform_datapath(a: int, b: int) -> None:
    """One result for the warp, which vector instructions read as any other operand."""
    warp = run(
        f"UMOV UR4, {a:#x}",
        f"UMOV UR5, {b:#x}",
        "UFLO.U32 UR6, UR4",
        "UFLO.U32.SH UR7, UR4",
        "UBREV UR8, UR4",
        "UPRMT UR9, UR4, 0x7510, UR5",
        "UPOPC UR10, UR4",
        "IADD3 R1, R0, UR10, RZ",
    )[0]
    length = a.bit_length()
    assert [int(warp.u[n][0]) for n in (6, 7)] == [(length - 1) % 2**32, 32 - length if a else 2**32 - 1]
    assert int(warp.u[8][0]) == int(f"{a:032b}"[::-1], 2)
    assert int(warp.u[9][0]) == a & 0xFFFF | (b >> 8 & 255) << 16 | (b >> 24) << 24
    assert np.array_equal(warp.r[1], LANE + a.bit_count())


def test_masks_of_lanes_are_those_of_the_warp() -> None:
    names = ("EQMASK", "LTMASK", "LEMASK", "GTMASK", "GEMASK")
    warp = run(*(f"S2R R{n}, SR_{name}" for n, name in enumerate(names, 1)), threads=64)[
        1
    ]  # of the warp, not the block
    for lane in range(32):
        below, whole = (1 << lane) - 1, 2**32 - 1
        at_most = below | 1 << lane
        expected = [1 << lane, below, at_most, whole - at_most, whole - below]
        assert [int(warp.r[n][lane]) for n in range(1, 6)] == expected


@given(a=st.integers(0, 2**64 - 1), b=st.integers(0, 2**64 - 1), equal=st.booleans())
def test_a_comparison_of_64_bits(a: int, b: int, equal: bool) -> None:
    if equal:
        b = a >> 32 << 32 | b & 0xFFFFFFFF
    warp = run(
        *(f"MOV R{2 + n}, {part:#x}" for n, part in enumerate((a & 0xFFFFFFFF, a >> 32, b & 0xFFFFFFFF, b >> 32))),
        "ISETP.LT.U32.AND P0, PT, R2, R4, PT",
        "ISETP.LT.AND.EX P1, P2, R3, R5, PT, P0",
        "ISETP.NE.U32.AND P3, PT, R2, R4, PT",
        "ISETP.NE.AND.EX P3, PT, R3, R5, PT, P3",
    )[0]
    below = (a - (1 << 64) if a >> 63 else a) < (b - (1 << 64) if b >> 63 else b)
    assert [bool(warp.p[n][0]) for n in (1, 2, 3)] == [below, not below, a != b]


# ---- floating point ---------------------------------------------------------------------------------------------

_fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [1 + 2.0**-12, 1 - 2.0**-24, 2.0**-126, 2.0**-149, 1 + 2.0**-23, -(2.0**-24), 2.0**-60]
)


def operands(*values: float) -> list[str]:
    return [f"MOV R{2 + n}, {as_float(value)}" for n, value in enumerate(values)]


@given(a=FLOATS, b=FLOATS, c=FLOATS)
def test_fused_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    got = result(*operands(a, b, c), "FFMA R1, R2, R3, R4").view(np.float32)[0]
    assert got.tobytes() == np.float32(_fmaf(a, b, c)).tobytes()


def test_fused_multiply_add_where_two_roundings_go_wrong() -> None:
    """In double, (1 + 2^-12)^2 + 2^-60 loses its last term, and the tie that is left goes down."""
    got = result(*operands(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60), "FFMA R1, R2, R3, R4").view(np.float32)[0]
    assert got == np.float32(1 + 2.0**-11 + 2.0**-23)


@given(a=FLOATS, b=FLOATS, c=FLOATS)
def test_directed_roundings(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0 or abs(exact) >= Fraction(2) ** 127:
        return
    warp = run(
        *operands(a, b, c), *(f"FFMA.{mode} R{10 + n}, R2, R3, R4" for n, mode in enumerate(("RM", "RP", "RZ")))
    )[0]
    down, up, to_zero = (warp.r[10 + n].view(np.float32)[0] for n in range(3))
    assert Fraction(float(down)) <= exact <= Fraction(float(up))
    if down != up:
        assert np.nextafter(down, np.float32(np.inf)) == up
    assert to_zero == (down if exact > 0 else up)


def test_minima_and_comparisons_with_nan_and_signed_zero() -> None:
    nan, zero = float("nan"), 0.0
    warp = run(
        *operands(nan, 1.0, zero, -zero),
        "FMNMX R10, R2, R3, PT",
        "FMNMX R11, R4, R5, PT",
        "FMNMX R12, R4, R5, !PT",
        "FSETP.GT.AND P0, PT, R2, R3, PT",
        "FSETP.GTU.AND P1, PT, R2, R3, PT",
        "FSETP.NAN.AND P2, PT, R2, R2, PT",
        "FSETP.EQ.AND P3, PT, R4, R5, PT",
    )[0]
    assert warp.r[10].view(np.float32)[0] == 1
    assert [int(warp.r[n][0]) for n in (11, 12)] == [0x80000000, 0]
    assert [bool(warp.p[n][0]) for n in range(4)] == [False, True, True, True]


def test_conversions() -> None:
    warp = run(
        *operands(-2.5, 1 + 2.0**-7 + 2.0**-8, 3e9),
        "F2I.TRUNC.NTZ R10, R2",
        "F2I.S64 R12, R2",
        "F2I.U32.TRUNC.NTZ R14, R2",
        "F2I.TRUNC.NTZ R15, R4",
        "F2FP.BF16.F32.PACK_AB R16, R2, R3",
        "MOV R5, 0x1000001",
        "I2F.U32.RP R17, R5",
        "I2FP.F32.S32 R18, R5",
        "HADD2.F32 R19, -RZ, R6.H0_H0",
    )[0]
    assert [signed(int(warp.r[n][0])) for n in (10, 12, 13, 14, 15)] == [-2, -2, -1, 0, 2**31 - 1]
    assert warp.r[16][0] == 0xC0203F82  # ties to even, upwards
    assert [warp.r[n].view(np.float32)[0] for n in (17, 18)] == [16777218.0, 16777216.0]


@given(value=st.integers(0, 2**64 - 1) | st.integers(0, 63).map(lambda bit: (1 << bit) + 1))
def test_conversions_from_16_and_64_bits(value: int) -> None:
    warp = run(
        f"UMOV UR4, {value & 0xFFFFFFFF:#x}",
        f"UMOV UR5, {value >> 32:#x}",
        "MOV R2, UR4",
        "I2F.U64.RP R10, UR4",
        "I2F.U64.RM R11, UR4",
        "I2F.U64 R12, UR4",
        "I2F.U16 R13, R2",
    )[0]
    up, down, nearest, short = (Fraction(float(warp.r[n].view(np.float32)[0])) for n in range(10, 14))
    assert down <= value <= up
    assert np.nextafter(np.float32(float(down)), np.float32(np.inf)) == np.float32(float(up)) or down == up == value
    assert nearest in (up, down)
    assert abs(nearest - value) == min(up - value, value - down)
    assert short == value & 0xFFFF


# ---- lanes ------------------------------------------------------------------------------------------------------


def test_shuffles() -> None:
    warp = run(
        "SHFL.BFLY PT, R1, R0, 0x5, 0x1f",
        "SHFL.UP P0, R2, R0, 0x3, RZ",
        "SHFL.DOWN P1, R3, R0, 0x3, 0x1f",
        "SHFL.IDX PT, R4, R0, 0x12, 0x1f",
        "SHFL.BFLY PT, R5, R0, 0x8, 0x101f",
        "SHFL.IDX PT, R6, R0, 0x2, 0x101f",
    )[0]
    assert np.array_equal(warp.r[1], LANE ^ 5)
    assert np.array_equal(warp.r[2], np.where(LANE >= 3, LANE - 3, LANE))
    assert np.array_equal(warp.p[0], LANE >= 3)
    assert np.array_equal(warp.r[3], np.where(LANE < 29, LANE + 3, LANE))
    assert np.array_equal(warp.r[4], np.full(32, 18))
    assert np.array_equal(warp.r[5], LANE ^ 8)  # inside half a warp
    assert np.array_equal(warp.r[6], (LANE & 16) | 2)


def test_votes_matches_and_reductions() -> None:
    warp = run(
        "ISETP.GE.AND P0, PT, R0, 0x10, PT",
        "VOTE.ANY R1, PT, P0",
        "VOTE.ALL P1, P0",
        "LOP3.LUT R2, R0, 0x3, RZ, 0xc0, !PT",
        "MATCH.ANY R3, R2",
        "REDUX.MAX.S32 UR4, R0",
        "REDUX.SUM UR5, R0",
        "@P0 REDUX.MIN UR6, R0",
        "IADD3 R4, RZ, -R0, RZ",
        "REDUX.MIN.S32 UR7, R4",
        "MATCH.ALL P2, R5, R6",
        "VOTEU.ANY UR8, UPT, P0",
        "VOTEU.ALL UP0, P0",
        "VOTEU.ANY UR9, UP1, PT",
    )[0]
    assert warp.r[1][0] == 0xFFFF0000
    assert not warp.p[1].any()
    assert np.array_equal(warp.r[3], 0x11111111 << (LANE & 3))
    assert [int(warp.u[n][0]) for n in (4, 5, 6, 7)] == [31, 496, 16, 2**32 - 31]
    assert warp.p[2].all()
    assert warp.r[5][0] == 0xFFFFFFFF
    assert [int(warp.u[n][0]) for n in (8, 9)] == [0xFFFF0000, 0xFFFFFFFF]
    assert [bool(warp.up[n][0]) for n in (0, 1)] == [False, True]


def test_lanes_part_and_come_together() -> None:
    """if (lane < 8) R1 = 1; else R1 = 2, then all of the warp vote. Each side is issued once."""
    warp = run(
        "ISETP.GE.AND P0, PT, R0, 0x8, PT",  # 0x10
        "BSSY B0, 0x80",  # 0x20
        "@P0 BRA 0x60",  # 0x30
        "MOV R1, 0x1",  # 0x40
        "BRA 0x70",  # 0x50
        "MOV R1, 0x2",  # 0x60
        "BSYNC B0",  # 0x70
        "VOTE.ANY R2, PT, PT",  # 0x80
    )[0]
    assert np.array_equal(warp.r[1], np.where(LANE < 8, 1, 2))
    assert np.array_equal(warp.r[2], np.full(32, 0xFFFFFFFF))
    assert warp.trace.count(8) == 1
    assert len(warp.trace) == 11  # both lanes' ways to the BSYNC


def test_a_loop_that_lanes_leave_one_by_one() -> None:
    """R1 counts the rounds of every lane: as many as its number, and one."""
    warp = run(
        "BSSY B1, 0x90",  # 0x10
        "VIADD R1, R1, 0x1",  # 0x20
        "ISETP.GT.AND P0, PT, R1, R0, PT",  # 0x30
        "@P0 BRA 0x60",  # 0x40
        "BRA 0x20",  # 0x50
        "BREAK B1",  # 0x60: those that leave are waited for no longer
        "BRA 0x90",  # 0x70
        "NOP",  # 0x80
        "MOV R3, R1",  # 0x90
    )[0]
    assert np.array_equal(warp.r[1], LANE + 1)
    assert np.array_equal(warp.r[3], LANE + 1)


def test_a_guard_that_holds_for_no_lane_is_marked() -> None:
    warp = run("ISETP.GT.AND P0, PT, R0, 0x40, PT", "@P0 MOV R1, 0x7", "@!P0 MOV R2, 0x7")[0]
    assert warp.trace[:4] == [0, 1, ~2, 3]
    assert not warp.r[1].any()
    assert (warp.r[2] == 7).all()


def test_calls_return() -> None:
    warp = run(
        "MOV R8, 0x30",  # 0x10
        "CALL.REL.NOINC 0x50",  # 0x20
        "VIADD R1, R1, 0x1",  # 0x30
        "EXIT",  # 0x40
        "MOV R1, 0x29",  # 0x50
        "RET.REL.NODEC R8 0x0",  # 0x60
    )[0]
    assert (warp.r[1] == 42).all()


def test_a_uniform_jump_by_table() -> None:
    """The register holds an offset in the kernel; the operand takes back where the instruction is."""
    warp = run(
        "UMOV UR8, 0x50",  # 0x10
        "BRXU UR8 -0x30",  # 0x20
        "MOV R1, 0x7",  # 0x30
        "EXIT",  # 0x40
        "MOV R2, 0x7",  # 0x50
    )[0]
    assert not warp.r[1].any()
    assert (warp.r[2] == 7).all()


# ---- memory -----------------------------------------------------------------------------------------------------


def test_global_memory_of_every_width() -> None:
    memory = np.arange(512, dtype=np.uint32)
    warp = run(
        f"MOV R2, {BASE:#x}",
        "IMAD.WIDE.U32 R4, R0, 0x10, R2",
        "LDG.E.128.CONSTANT R8, desc[UR4][R4.64]",
        "LDG.E.64 R12, desc[UR4][R4.64+0x8]",
        "LDG.E.U8 R14, desc[UR4][R4.64+0x4]",
        "LDG.E.S16 R15, desc[UR4][R4.64+0x200]",
        "STG.E.64 desc[UR4][R4.64+0x200], R12",
        "ISETP.GE.AND P0, PT, R0, 0x1e, PT",
        "@P0 LDG.E R16, desc[UR4][R4.64]",
        memory=memory,
    )[0]
    assert np.array_equal(np.stack(warp.r[8:12], 1).reshape(-1), np.arange(128))
    assert np.array_equal(warp.r[12], 4 * LANE + 2)
    assert np.array_equal(warp.r[14], 4 * LANE + 1)
    assert np.array_equal(warp.r[15], 4 * LANE + 128)
    assert memory[128:132].tolist() == [2, 3, 130, 131]
    assert [access.bytes for access in warp.loads] == [512, 256, 32, 64, 8]


def test_shared_memory_and_barriers() -> None:
    """Warp 1 reads what warp 0 has written, and both count in one word."""
    first = RESERVED_SHARED
    warps = run(
        f"LEA R1, R0, {first:#x}, 0x2",
        "STS [R1], R0",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LOP3.LUT R2, R0, 0x3f, RZ, 0x3c, !PT",
        f"LEA R2, R2, {first:#x}, 0x2",
        "LDS R3, [R2]",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        f"MOV R4, {first:#x}",
        "@!PT NOP",
        "STS [R4], RZ",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "ATOMS.POPC.INC.32 RZ, [R4+URZ]",
        "ATOMS.ADD R5, [R4], R0",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "LDS R6, [R4]",
        "LDS.128 R8, [R4+0x10]",
        threads=64,
    )
    assert np.array_equal(warps[0].r[3], 63 - LANE)
    assert np.array_equal(warps[1].r[3], 31 - LANE)
    assert all((warp.r[6] == 64 + 63 * 32).all() for warp in warps)
    assert [int(warp[0]) for warp in warps[0].r[8:12]] == [4, 5, 6, 7]
    assert warps[0].bars == [4, 8, 12, 15]


def test_copies_to_shared_memory_and_atomics_on_global_memory() -> None:
    memory = np.zeros(64, np.uint32)
    memory[:32] = LANE
    warp = run(
        f"MOV R2, {BASE:#x}",
        "IMAD.WIDE.U32 R4, R0, 0x4, R2",
        f"LEA R6, R0, {RESERVED_SHARED:#x}, 0x2",
        "LDGSTS.E [R6], desc[UR4][R4.64]",
        "ISETP.GE.AND P0, PT, R0, 0x8, PT",
        "LDGSTS.E [R6+0x80], desc[UR4][R4.64], P0",
        "LDGDEPBAR",
        "DEPBAR.LE SB0, 0x0",
        "LDS R7, [R6]",
        "LDS R10, [R6+0x80]",
        "MOV R8, 0xffffffff",
        "REDG.E.ADD.64.STRONG.GPU desc[UR4][R2.64+0x80], R8",
        "REDG.E.ADD.STRONG.GPU desc[UR4][R2.64+0xc0], R0",
        memory=memory,
    )[0]
    assert np.array_equal(warp.r[7], LANE)
    assert np.array_equal(warp.r[10], np.where(LANE >= 8, LANE, 0))
    assert int(memory[32:34].view(np.uint64)[0]) == 32 * (2**32 - 1)
    assert memory[48] == 496


def test_parameters() -> None:
    parameters = np.array([7, 8, 9], np.uint32).tobytes()
    warp = run(
        "LDC R1, c[0x0][0x214]", "ULDC.64 UR4, c[0x0][0x210]", "LDC R3, c[0x0][0x0]", "LDC R4, c[0x0][R0+0x210]",
        parameters=parameters,
    )[0]  # fmt: skip
    assert [int(warp.r[1][0]), int(warp.u[4][0]), int(warp.u[5][0]), int(warp.r[3][0])] == [8, 7, 8, 32]


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("WGMMA.FOO R1, R2", "the opcode WGMMA is unknown"),
        ("IMAD.NEW R1, R2, R3, R4", "the modifier NEW of IMAD is unknown"),
        ("MUFU.EX2 R1, R2", "the modifier EX2 of MUFU is unknown"),
        ("S2R R1, SR_CLOCKLO", "SR_CLOCKLO is unknown"),
        ("LDC R1, c[0x3][0x10]", "only bank 0"),
        ("IADD3 R1, R2", "not written as expected"),
        ("ATOMS.INC R1, [R2], R3", "a counter that wraps"),
    ],
)
def test_what_is_unknown_is_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(SassError, match=problem):
        executable(parse(text))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["MOV R2, 0x99990000", "LDG.E R1, desc[UR4][R2.64]"], "0x20 'LDG.E.*no memory at address 0x99990000"),
        ([f"MOV R2, {BASE + 2:#x}", "LDG.E R1, desc[UR4][R2.64]"], "no multiple of 4"),
        (["LDS R1, [0x600]"], "outside the block's shared memory, which ends at 0x500"),
        (["STS [0x20], RZ"], "outside the block's shared memory"),
        (["BRA 0x800"], "behind its last instruction"),
        (["ISETP.GE.AND P0, PT, R0, 0x8, PT", "@P0 BRA 0x50", "WARPSYNC 0xffffffff", "NOP", "BAR.SYNC 0x1, 0x40"],
         "wait for one another"),
    ],
)  # fmt: skip
def test_what_hardware_would_not_allow_is_refused(lines: list[str], problem: str) -> None:
    with pytest.raises(SassError, match=problem):
        run(*lines, memory=np.zeros(64, np.uint32))
