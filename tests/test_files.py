"""moe_route.files: what was written comes back; everything else is refused with a reason."""

from __future__ import annotations

import io
import json
import os
import pickle

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_route import files
from moe_route.files import FileRefusedError


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
    monkeypatch.setattr(files, "SCHEMA", 2)
    files.write(tmp_path / "newer", {}, {}, "plan")
    monkeypatch.setattr(files, "SCHEMA", 1)
    with pytest.raises(FileRefusedError, match=r"schema 2, .* upgrade moe-route"):
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


def test_overwriting_a_link_changes_its_target_and_folders_are_made(tmp_path):
    real = tmp_path / "a" / "b" / "real"
    files.write(real, {}, {"n": 1}, "any")
    link = tmp_path / "link"
    link.symlink_to(real)
    files.write(link, {}, {"n": 2}, "any")
    assert link.is_symlink()
    assert files.read(real, "any")[1] == {"n": 2}
    with pytest.raises(IsADirectoryError):
        files.write(tmp_path, {}, {}, "any")


def test_big_endian_and_read_only_arrays(tmp_path):
    value = np.arange(5, dtype=">i4")
    value.flags.writeable = False
    files.write(tmp_path / "x", {"v": value}, {}, "any")
    np.testing.assert_array_equal(files.read(tmp_path / "x", "any")[0]["v"], np.arange(5))


def test_other_safetensors_readers_can_open_the_file(good):
    with safetensors.safe_open(str(good), framework="np") as reader:
        assert set(reader.keys()) == {"counts", "probability"}
        assert json.loads(reader.metadata()["moe_route"])["kind"] == "statistics"
