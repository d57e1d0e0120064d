"""Files that ask for more than their bytes: refused at once, by one error; and a short run of the fuzzing."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from convert import fuzzing
from hypothesis import given, settings

from moe_route import convert
from moe_route.base import budget, files, schema
from moe_route.base.budget import Budget, BudgetError, FileRefusedError


def shared_lists(levels: int) -> bytes:
    """A pickle in which each list holds the one before twice."""
    return b"\x80\x04]\x94K\x01a" + b"".join(b"]\x94(h%ch%ce" % (n, n) for n in range(levels)) + b"."


def shared_key(levels: int) -> bytes:
    """A pickle of a mapping whose key holds itself twice, at every level: to hash it takes 2^levels steps."""
    return b"\x80\x04}K\x01\x85\x94" + b"".join(b"h%c\x86\x94" % n for n in range(levels)) + b"K\x01s."


def archived(members: dict[str, bytes], packed: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packed) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def npy(array: np.ndarray, shape: bytes = b"") -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    said = stream.getvalue()
    start = said.index(b"'shape': (") + 10
    return said[:start] + shape + said[start + len(shape) :]


def torch_file(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


BOMBS: dict[str, bytes] = {
    "lists that share their parts": shared_lists(31),
    "a key that shares its parts": shared_key(60),
    "a memo of 2^31 entries": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a bytearray of 2^63 bytes": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "a tensor of stride 0": torch_file({"logical_count": torch.ones(1, 1).expand(1 << 30, 1 << 10)}),
    "an array of 2^40 rows": npy(np.zeros((2, 3)), b"1099511627776, 2"),
    "an empty array of 2^40 layers": npy(np.zeros((2, 3, 1)), b"0, 1099511627776, 2"),
    "zeros in an archive": archived({"a.npy": npy(np.zeros((1 << 13, 1 << 11)))}),
    "JSON of 100,000 lists": b"[" * 100_000 + b"]" * 100_000,
    "JSON of 70 lists": b"[" * 70 + b"]" * 70,
    "an expert of number 10^12": json.dumps({"0": {"1000000000000": 2}}).encode(),
    "wide text": json.dumps([["x" * 100_000], *[["y"]] * 20_000]).encode(),
}


@pytest.mark.parametrize("what", BOMBS)
def test_what_would_cost_more_than_its_budget_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(BOMBS[what])
    with pytest.raises(FileRefusedError, match=str(tmp_path)):
        convert.read(tmp_path / "x", top_k=2)


def test_the_smallest_bomb_is_a_matter_of_the_budget(tmp_path: Path) -> None:
    bomb = shared_lists(31)
    assert len(bomb) <= 257
    (tmp_path / "x").write_bytes(bomb)
    with pytest.raises(BudgetError, match=r"numbers and objects.*--budget"):
        convert.read(tmp_path / "x", "eplb", top_k=2)


OTHER_FAMILIES: dict[str, bytes] = {
    # a name that is no UTF-8, a packing and a version of zip that Python does not have
    "UnicodeDecodeError": archived({"a/data.pkl": b"N."}).replace(b"a/data", b"\xff/data"),
    "NotImplementedError": archived({"a.npy": npy(np.zeros((2, 2)))}, zipfile.ZIP_STORED).replace(
        b"PK\x01\x02\x14\x03\x14\x00", b"PK\x01\x02\x14\x03\xff\x00"
    ),
    "cut off": torch_file({"a": torch.zeros(3)})[:300],
}


@pytest.mark.parametrize("what", OTHER_FAMILIES)
def test_damaged_archives_are_refused_by_the_same_error(what: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(OTHER_FAMILIES[what])
    with pytest.raises(FileRefusedError, match=r"x\.pt"):
        convert.read(tmp_path / "x.pt", top_k=1)


def test_the_budget_is_raised_for_a_block(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, weight=np.zeros((1, 1 << 24)))  # 128 MiB of zeros
    with pytest.raises(BudgetError, match="packed"):
        convert.read(path, "eplb", top_k=1)
    with budget.raised(8), pytest.raises(FileRefusedError, match="no expert was chosen"):
        convert.read(path, "eplb", top_k=1)
    with pytest.raises(ValueError, match="at least 1"), budget.raised(0.5):
        pass


def test_a_wait_without_progress_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"[1]")
    clock = iter([0.0, 59.0, 120.0])
    monkeypatch.setattr(budget.time, "monotonic", lambda: next(clock))
    drawn = Budget(tmp_path / "x")
    drawn.spend(1)
    with pytest.raises(BudgetError, match="no progress for 61 s"):
        drawn.spend(1)


@pytest.mark.parametrize("read", [convert.read, schema.load_json, lambda path: files.read(path, "plan")])
def test_what_has_no_end_is_not_read(read, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    for path in (tmp_path / "x.json", Path("/dev/zero")):
        with pytest.raises(FileRefusedError, match="not a regular file"):
            read(path)


def test_tensors_of_one_file_share_no_byte(tmp_path: Path) -> None:
    files.write(tmp_path / "x", {"a": np.zeros(4), "b": np.ones(4)}, {}, "plan")
    said = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(
        said.replace(b'"data_offsets":[32,64]', b'"data_offsets":[00,32]').replace(b"[00", b"[ 0")
    )
    with pytest.raises(FileRefusedError, match=r"damaged|altered"):
        files.read(tmp_path / "x", "plan")


@pytest.mark.parametrize("name", fuzzing.FORMATS)
def test_hostile_files_give_a_result_or_one_error(name: str, tmp_path: Path) -> None:
    @settings(max_examples=25)
    @given(fuzzing.files_of(name))
    def one(made: dict[str, bytes]) -> None:
        for left in tmp_path.iterdir():
            left.unlink()
        fuzzing.read(name, made, tmp_path)

    one()
