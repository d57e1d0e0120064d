"""Pickles of other programs are read without running anything of them."""

from __future__ import annotations

import builtins
import collections
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_route import convert
from moe_route.base.files import FileRefusedError
from moe_route.convert.pickles import read_pickle

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)


class Calls:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *args):
        self.what = (function, args)

    def __reduce__(self):
        return self.what


def written(path: Path, content, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def attacks(marker: Path) -> dict[str, object]:
    command = f"touch {marker}"
    return {
        "system": Calls(os.system, command),
        "Popen": Calls(subprocess.Popen, ["touch", str(marker)]),
        "eval": Calls(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "exec": Calls(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "open": Calls(builtins.open, str(marker), "w"),
        "getattr": Calls(builtins.getattr, "a", "upper"),
        "__import__": Calls(builtins.__import__, "os"),
        "load": Calls(np.load, str(marker)),
        "nested": {"layer": np.arange(2), "risk_diff": [Calls(os.system, command)]},
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", sorted(attacks(Path("x"))))
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(name, protocol, tmp_path):
    marker = tmp_path / "ran"
    path = written(tmp_path / "table.pkl", attacks(marker)[name], protocol)
    word = {"nested": "system"}.get(name, name)
    with pytest.raises(FileRefusedError, match=rf"uses \S*{word}, which is not an array.*nothing of it ran"):
        convert.read(path)
    assert not marker.exists()


def test_a_torch_file_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"logical_count": Calls(os.system, f"touch {marker}")}, tmp_path / "dump.pt")
    with pytest.raises(FileRefusedError, match=r"system.*nothing of it ran"):
        convert.read(tmp_path / "dump.pt", top_k=1)
    assert not marker.exists()


def test_an_array_of_objects_is_refused(tmp_path):
    np.save(tmp_path / "w.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(FileRefusedError, match="save numbers, not objects"):
        convert.read(tmp_path / "w.npy")
    np.savez(tmp_path / "w.npz", weight=np.array([[Calls(print)]], object))
    with pytest.raises(ValueError, match="save numbers, not objects"):
        convert.read(tmp_path / "w.npz")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_tensors_and_containers_are_read(protocol, tmp_path):
    content = {
        "int": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "bool": np.array([True, False]),
        "text": np.array(["a", "bc"]),
        "objects": np.array([1, "x", None], object),
        "scalar": np.float32(2.5),
        "tensor": torch.arange(6).reshape(2, 3).t(),
        "bfloat16": torch.ones(2, dtype=torch.bfloat16),
        "counter": collections.Counter([np.int64(1), 1, 2]),
        "default": collections.defaultdict(int, {3: 4}),
        "ordered": collections.OrderedDict(a=1),
        "set": {1, 2},
        "nested": [(1, 2.0, "x", None, True, b"y", slice(1, 2))],
    }
    found = read_pickle(written(tmp_path / "x.pkl", content, protocol))
    assert found.keys() == content.keys()
    for name in ("int", "fortran", "bool", "text", "objects"):
        np.testing.assert_array_equal(found[name], content[name])
    np.testing.assert_array_equal(found["tensor"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(found["bfloat16"], [1, 1])
    assert (found["scalar"], found["counter"], found["default"]) == (2.5, {1: 2, 2: 1}, {3: 4})
    assert (found["ordered"], found["set"], found["nested"]) == ({"a": 1}, {1, 2}, content["nested"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("texts", ["str", object])
def test_a_table_of_pandas_is_read_column_by_column(protocol, texts, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"layer": [0, 0, 1], "risk_diff": [0.1, -0.2, 0.3], "name": ["a", "b\nc", None]})
    frame["name"] = frame["name"].astype(texts)
    frame.columns = frame.columns.astype(texts)
    frame.attrs = {"num_experts": 2}
    frame = frame.sort_values("risk_diff").reset_index(drop=True)
    found = read_pickle(written(tmp_path / "x.pkl", frame, protocol))
    assert list(found) == ["layer", "risk_diff", "name"]
    np.testing.assert_array_equal(found["layer"], [0, 0, 1])
    np.testing.assert_array_equal(found["risk_diff"], [-0.2, 0.1, 0.3])
    assert list(found["name"][:2]) == ["b\nc", "a"]


def test_damaged_pickles_are_refused(tmp_path):
    whole = pickle.dumps({"a": np.arange(100.0)})
    for length in (2, 20, len(whole) - 1):
        (tmp_path / "x.pkl").write_bytes(whole[:length])
        with pytest.raises(FileRefusedError, match=r"truncated|not a pickle"):
            read_pickle(tmp_path / "x.pkl")
    itself: list[object] = []
    itself.append(itself)
    with pytest.raises(FileRefusedError, match="hold themselves"):
        read_pickle(written(tmp_path / "x.pkl", itself))


def test_a_tensor_may_not_reach_past_its_data(tmp_path):
    tensor = torch.arange(4)
    function, (storage, _, _, _, *rest) = tensor.__reduce_ex__(2)
    for given in ((storage, 2, (3,), (1,), *rest), (storage, -1, (1,), (1,), *rest), (storage, 0, (9,), (-1,), *rest)):
        with pytest.raises(FileRefusedError, match="past its data"):
            read_pickle(written(tmp_path / "x.pkl", Calls(function, *given)))


def test_old_files_of_torch_and_impossible_tables_are_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(FileRefusedError, match=r"before torch 1\.6"):
        convert.read(tmp_path / "x.pt")
    with pytest.raises(FileRefusedError, match="not a number of them"):
        read_pickle(written(tmp_path / "x.pkl", Calls(bytearray, 1 << 40)))
