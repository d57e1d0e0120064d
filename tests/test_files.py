"""moe_route.base.files: what was written comes back; everything else is refused with a reason."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_route.base import files
from moe_route.base.files import FileRefusedError


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    tensors = {"counts": np.arange(12, dtype=np.int64).reshape(3, 4), "probability": torch.linspace(0, 1, 5)}
    files.write(path, tensors, {"model": "demo", "layers": [0, 1], "note": "é"}, "statistics")
    return path


def test_round_trip_of_numpy_and_torch(good):
    tensors, header = files.read(good, "statistics")
    assert header == {"model": "demo", "layers": [0, 1], "note": "é"}
    np.testing.assert_array_equal(tensors["counts"], np.arange(12).reshape(3, 4))
    assert tensors["counts"].dtype == np.int64
    as_torch, _ = files.read(good, "statistics", framework="torch")
    assert torch.equal(as_torch["probability"], torch.linspace(0, 1, 5))


arrays = st.sampled_from([np.int64, np.int32, np.uint8, np.float64, np.float32, np.float16, np.bool_]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")


@settings(max_examples=60, deadline=None)
@given(tensors=st.dictionaries(names, arrays, max_size=3), header=st.dictionaries(st.text(), json_values, max_size=4))
def test_any_arrays_and_any_header_come_back(tmp_path_factory, tensors, header):
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    digest = files.write(path, tensors, header, "any")
    again, header_again = files.read(path, "any")
    assert header_again == header
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        assert again[name].dtype == value.dtype
        assert again[name].shape == value.shape
        assert again[name].tobytes() == value.tobytes()
    assert files.read_header(path)["sha256"] == digest


def test_torch_only_dtypes_views_and_zero_dims(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "half": base.to(torch.bfloat16),
        "view": base.t(),
        "again": base.t(),
        "scalar": torch.tensor(3),
        "none": base[:0],
    }
    files.write(tmp_path / "t", tensors, {}, "any")
    again, _ = files.read(tmp_path / "t", "any", framework="torch")
    for name, value in tensors.items():
        assert torch.equal(again[name], value)
        assert again[name].dtype == value.dtype
    with pytest.raises(TypeError, match='framework="torch"'):
        files.read(tmp_path / "t", "any")


def test_equal_content_gives_equal_bytes_and_hash(tmp_path):
    one, two = {"a": np.arange(3), "b": np.ones(2)}, {"b": torch.ones(2, dtype=torch.float64), "a": torch.arange(3)}
    assert files.write(tmp_path / "1", one, {"x": 1, "y": 2}, "any") == files.write(
        tmp_path / "2", two, {"y": 2, "x": 1}, "any"
    )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert files.content_hash(one, {}) == files.content_hash(two, {}) != files.content_hash(one, {"x": 1})
    assert files.content_hash({"a": np.zeros(4)}, {}) != files.content_hash({"a": np.zeros((2, 2))}, {})


def test_truncated_at_every_length_is_refused(good, tmp_path):
    data = good.read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(data)):
        cut.write_bytes(data[:length])
        with pytest.raises(FileRefusedError, match="empty" if length == 0 else "truncated"):
            files.read(cut, "statistics")
        with pytest.raises(FileRefusedError):
            files.read_header(cut)
    cut.write_bytes(data + b"\0")
    with pytest.raises(FileRefusedError, match="altered"):
        files.read(cut, "statistics")


def test_any_changed_byte_is_refused(good, tmp_path):
    data = good.read_bytes()
    changed = tmp_path / "changed"
    for position in range(len(data)):
        for flip in (1, 0x20):
            altered = bytearray(data)
            altered[position] ^= flip
            changed.write_bytes(altered)
            try:
                tensors, header = files.read(changed, "statistics")
            except FileRefusedError:
                continue
            # safetensors pads its header with spaces: only a changed pad that still reads the same is let through
            original, original_header = files.read(good, "statistics")
            assert header == original_header
            assert all((tensors[name] == original[name]).all() for name in original)


def test_missing_folder_and_wrong_kind(good, tmp_path):
    with pytest.raises(FileRefusedError, match="does not exist"):
        files.read(tmp_path / "nowhere", "statistics")
    with pytest.raises(FileRefusedError, match="folder"):
        files.read(tmp_path, "statistics")
    with pytest.raises(FileRefusedError, match="holds 'statistics', not 'plan'"):
        files.read(good, "plan")
    assert files.read_header(good)["kind"] == "statistics"


def test_foreign_files_are_refused_by_name(tmp_path):
    path = tmp_path / "foreign"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
        with pytest.raises(FileRefusedError, match="pickle"):
            files.read(path, "plan")
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(FileRefusedError, match="zip archive"):
        files.read(path, "plan")
    path.write_bytes(safetensors.numpy.save({"a": np.ones(2)}, metadata={"format": "np"}))
    with pytest.raises(FileRefusedError, match="not one that moe-route wrote"):
        files.read(path, "plan")
    path.write_text('{"a": 1, "text": "this is plain JSON"}')
    with pytest.raises(FileRefusedError, match="not a moe-route file"):
        files.read(path, "plan")


def test_newer_schema_is_refused(good, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SCHEMA", 3)
    files.write(tmp_path / "newer", {}, {}, "plan")
    monkeypatch.undo()
    with pytest.raises(FileRefusedError, match=r"schema 3, .* upgrade moe-route"):
        files.read(tmp_path / "newer", "plan")


def test_a_forged_hash_field_is_refused(good, tmp_path):
    data = good.read_bytes()
    envelope = files.read_header(good)
    forged = data.replace(envelope["sha256"].encode(), ("0" * 64).encode())
    (tmp_path / "forged").write_bytes(forged)
    with pytest.raises(FileRefusedError, match="altered"):
        files.read(tmp_path / "forged", "statistics")


@pytest.mark.parametrize("header", [{"x": float("nan")}, {"x": object()}, {1: "x"}, {"x": {2: 3}}])
def test_a_header_that_json_cannot_hold_is_refused_and_nothing_is_lost(good, header):
    before = good.read_bytes()
    with pytest.raises((TypeError, ValueError), match="header"):
        files.write(good, {}, header, "statistics")
    assert good.read_bytes() == before


def test_a_tensor_that_a_file_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match="'words'"):
        files.write(tmp_path / "x", {"words": np.array(["a", "b"])}, {}, "any")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(good, monkeypatch, step):
    before = good.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    def half_a_file():
        with files.replacing(good) as stream:
            stream.write(b"half")
            fail()

    if step != "write":
        monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        half_a_file() if step == "write" else files.write(good, {}, {}, "statistics")
    assert good.read_bytes() == before
    assert [entry.name for entry in good.parent.iterdir()] == [good.name]


def test_overwriting_a_link_changes_its_target(tmp_path):
    (tmp_path / "a").mkdir()
    real = tmp_path / "a" / "real"
    files.write(real, {}, {"n": 1}, "any")
    link = tmp_path / "link"
    link.symlink_to(real)
    files.write(link, {}, {"n": 2}, "any")
    assert link.is_symlink()
    assert files.read(real, "any")[1] == {"n": 2}


def test_a_path_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.write_bytes(b"mine")
    files.check_writable(path)
    files.check_writable(tmp_path / "new")
    (tmp_path / "file").write_bytes(b"")
    cases = [
        (tmp_path / "mistyped" / "run", FileNotFoundError, f"no folder {tmp_path / 'mistyped'}; make it first"),
        (tmp_path / "file" / "run", FileNotFoundError, f"no folder {tmp_path / 'file'}"),
        (tmp_path, IsADirectoryError, "is a folder: give the name of a file in it"),
        ("", IsADirectoryError, "is a folder"),
        (tmp_path / ("n" * 256), OSError, "name too long.*choose a shorter name"),
    ]
    for wrong, error, why in cases:
        for attempt in (files.check_writable, lambda path: files.write(path, {}, {}, "any")):
            with pytest.raises(error, match=why):
                attempt(wrong)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(OSError, match=r"run was not written \(read-only file system\).*choose a folder"):
        files.check_writable(path)
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"/proc/run was not written .*choose a folder in which files can be made"):
        files.check_writable("/proc/run")
    assert path.read_bytes() == b"mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "run"]


class Rows(NamedTuple):
    """A block whose arrays are in memory."""

    arrays: dict[str, np.ndarray]

    @property
    def rows(self):
        return len(self.arrays["tokens"])

    def read(self):
        return self.arrays


def three_blocks():
    rng = np.random.default_rng(0)
    return [Rows({"tokens": rng.integers(0, 9, (n, 2)), "q": rng.random((n, 2, 3), np.float32)}) for n in (4, 1, 3)]


@pytest.mark.parametrize("size", [100, 5000, 20_000, 70_000])
def test_a_full_disk_keeps_the_old_file_and_names_it(good, size):
    """The disk is full after so many bytes: the system itself refuses to write more."""
    before = good.read_bytes()
    rows = [Rows({"tokens": np.ones((500, 8), np.int64)}) for _ in range(3)]
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
    try:
        with pytest.raises(OSError, match=r"good\.safetensors was not written \(file too large\)"):
            files.write(good, {"x": np.ones(100)}, {}, "statistics", blocks=rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert good.read_bytes() == before
    assert [entry.name for entry in good.parent.iterdir()] == [good.name]


def test_a_folder_is_made_once_and_its_absence_is_explained(tmp_path):
    assert files.make_folder(tmp_path / "new").is_dir()
    (tmp_path / "new" / "kept").write_text("x")
    files.make_folder(tmp_path / "new")
    assert (tmp_path / "new" / "kept").is_file()
    with pytest.raises(OSError, match=r"no folder .*missing; make it first"):
        files.make_folder(tmp_path / "missing" / "new")
    with pytest.raises(OSError, match="is a file: give the name of a folder"):
        files.make_folder(tmp_path / "new" / "kept")


def test_only_what_a_killed_process_left_is_removed(tmp_path):
    path, other = tmp_path / "run", tmp_path / "other"
    write = f"import os; from moe_route.base import files; from pathlib import Path; p = Path({str(path)!r})\n"
    kill = "with files.replacing(p) as stream: stream.write(b'half'); stream.flush(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", write + kill], check=False)
    (left,) = tmp_path.iterdir()
    with files.replacing(other) as stream:  # another file: leftovers of its own
        stream.write(b"other")
    assert left.exists()
    with files.replacing(path) as first, files.replacing(path) as second:  # neither is a leftover
        assert not left.exists()
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "run"]


WINDOWS = """
import os, sys
from pathlib import Path
from harness.windows_files import imitate

imitate()
from moe_route.base import files
from moe_route.runs.job import ForeignFolderError, Job

step, folder = sys.argv[1], Path(sys.argv[2])
if step == "killed":
    with files.replacing(folder / "x") as stream, Job(folder / "job", "test", {}):
        stream.write(b"unfinished")
        stream.flush()
        print("ready", flush=True)
        sys.stdin.read()
elif step == "beside":
    files.write_text(folder / "x", "new")
    try:
        Job(folder / "job", "test", {}).__enter__()
    except ForeignFolderError as error:
        print(error)
else:
    files.write_text(folder / "x", "newer")
    with Job(folder / "job", "test", {}) as job:
        print(job.resumed)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="imitates Windows by /proc")
def test_files_and_jobs_are_locked_where_there_is_no_fcntl(tmp_path) -> None:
    def command(step: str) -> list[str]:
        return [sys.executable, "-c", WINDOWS, step, str(tmp_path)]

    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command("killed"), env=variables, text=True, **pipes) as killed:
        assert killed.stdout.readline() == "ready\n"
        beside = subprocess.run(command("beside"), env=variables, text=True, capture_output=True, check=True)
        assert "another process writes to" in beside.stdout
        assert len(list(tmp_path.glob(".moe-route-*.tmp"))) == 1  # its own is gone, that of a living process is not
        killed.kill()
    after = subprocess.run(command("after"), env=variables, text=True, capture_output=True, check=True)
    assert after.stdout == "True\n"
    assert (tmp_path / "x").read_text() == "newer"
    assert list(tmp_path.glob(".moe-route-*.tmp")) == []


def test_blocks_come_back_and_are_ordinary_tensors_for_others(tmp_path):
    path, blocks = tmp_path / "x.safetensors", three_blocks()
    files.write(path, {"plain": np.arange(3)}, {"n": 1}, "any", blocks=blocks)
    tensors, header, found = files.read_blocks(path, "any")
    assert header == {"n": 1}
    assert list(tensors) == ["plain"] == list(files.read(path, "any")[0])
    assert [block.rows for block in found] == [4, 1, 3]
    for one, other in zip(blocks, found, strict=True):
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(other.read()[name], array)
            assert other.read()[name].dtype == array.dtype
    whole = safetensors.numpy.load_file(path)
    assert sorted(whole) == ["plain", "rows.q", "rows.tokens"]
    np.testing.assert_array_equal(whole["rows.q"], np.concatenate([block.arrays["q"] for block in blocks]))
    files.write(tmp_path / "copy", tensors, header, "any", blocks=found)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


def test_any_changed_byte_of_a_file_with_blocks_is_refused(tmp_path):
    path = tmp_path / "x"
    files.write(path, {"plain": np.arange(3)}, {}, "any", blocks=three_blocks())
    whole = path.read_bytes()
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1
        path.write_bytes(altered)
        try:
            found = [block.read() for block in files.read_blocks(path, "any")[2]]
        except FileRefusedError:
            continue
        for one, other in zip(three_blocks(), found, strict=True):  # a space that pads the header
            assert all((other[name] == array).all() for name, array in one.arrays.items())


def test_a_file_that_is_replaced_or_cut_after_it_was_opened_is_refused(tmp_path):
    path, blocks = tmp_path / "x", three_blocks()
    files.write(path, {}, {}, "any", blocks=blocks)
    found = files.read_blocks(path, "any")[2]
    files.write(path, {}, {}, "any", blocks=blocks[::-1])
    with pytest.raises(FileRefusedError, match="altered or replaced since it was opened"):
        found[0].read()
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(FileRefusedError, match="truncated"):
        files.read_blocks(path, "any")
    files.write(path, {}, {}, "any", blocks=blocks)
    os.truncate(path, 400)
    with pytest.raises(FileRefusedError, match="truncated"):
        found[2].read()


def test_blocks_that_differ_are_refused_and_nothing_is_lost(good):
    before = good.read_bytes()
    blocks = three_blocks()
    for other in (
        Rows({"tokens": np.ones((2, 3), np.int64), "q": np.ones((2, 2, 3), np.float32)}),
        Rows({"tokens": np.ones((2, 2), np.int64)}),
    ):
        with pytest.raises(ValueError, match="blocks of a file hold the same tensors"):
            files.write(good, {}, {}, "statistics", blocks=[*blocks, other])
    with pytest.raises(ValueError, match=r"rename 'rows\.q'"):
        files.write(good, {"rows.q": np.ones(2)}, {}, "statistics")
    assert good.read_bytes() == before
    assert [entry.name for entry in good.parent.iterdir()] == [good.name]


def test_a_header_longer_than_readers_take_is_refused(good, monkeypatch):
    monkeypatch.setattr(files, "_LONGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="safetensors readers take 1000"):
        files.write(good, {}, {"text": "x" * 1000}, "statistics")


def test_a_large_foreign_file_is_refused_by_its_header(tmp_path):
    """A checkpoint of 1 GiB, sparse: only its header is read."""
    path, size = tmp_path / "model.safetensors", 1 << 30
    layout = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(layout).to_bytes(8, "little") + layout)
    os.truncate(path, 8 + len(layout) + size)
    tracemalloc.start()
    with pytest.raises(FileRefusedError, match="not one that moe-route wrote"):
        files.read(path, "statistics")
    path.write_bytes((1 << 29).to_bytes(8, "little") + b"{")  # a header of half a GiB
    os.truncate(path, size)
    with pytest.raises(FileRefusedError, match="header is too long"):
        files.read(path, "statistics")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("depth", [990, 3000, 200_000])
def test_nesting_without_end_is_refused(tmp_path, depth):
    path = tmp_path / "deep"
    nested = "[" * depth + "]" * depth
    for text in (nested, f'{{"schema":1,"kind":"plan","header":{{"x":{nested}}}}}'):
        path.write_bytes(safetensors.numpy.save({}, metadata={"moe_route": text}))
        with pytest.raises(FileRefusedError):
            files.read(path, "plan")
        with pytest.raises(FileRefusedError):
            files.read_blocks(path, "plan")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]},
    ],
)
def test_tensors_that_lie_nowhere_are_refused(tmp_path, entry):
    path = tmp_path / "x"
    envelope = json.dumps({"schema": 1, "kind": "plan", "header": {}})
    end = max(entry["data_offsets"][1], 0)
    layout = json.dumps({"__metadata__": {"moe_route": envelope}, "w": entry}).encode()
    path.write_bytes(len(layout).to_bytes(8, "little") + layout + b"\0" * end)
    with pytest.raises(FileRefusedError, match="header is not valid"):
        files.read(path, "plan")


def test_big_endian_and_read_only_arrays(tmp_path):
    value = np.arange(5, dtype=">i4")
    value.flags.writeable = False
    files.write(tmp_path / "x", {"v": value}, {}, "any")
    np.testing.assert_array_equal(files.read(tmp_path / "x", "any")[0]["v"], np.arange(5))


def test_other_safetensors_readers_can_open_the_file(good):
    with safetensors.safe_open(str(good), framework="np") as reader:
        assert set(reader.keys()) == {"counts", "probability"}
        assert json.loads(reader.metadata()["moe_route"])["kind"] == "statistics"


def test_a_json_file_without_schema_is_told_what_to_add(tmp_path) -> None:
    path = tmp_path / "experts.json"
    path.write_text('{"moe_route": "selection", "experts": {"3": [1]}}')
    with pytest.raises(FileRefusedError, match='add "schema": 2'):
        files.read_json(path, "selection")
    path.write_text('{"moe_route": "selection", "schema": 2, "experts": {"3": [1]}}')
    assert files.read_json(path, "selection")["experts"] == {"3": [1]}
