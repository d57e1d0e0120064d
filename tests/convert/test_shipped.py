"""The published routing that ships: what it holds, that it equals its source, how it is asked for and refused."""

from __future__ import annotations

import numpy as np
import pytest
from harness.routing_data import FOLDER, needs_data, published_routing, routing

import moe_route as mr
from moe_route import analysis, convert
from moe_route.base.files import FileRefusedError
from moe_route.data import shipped_routing

NAME = "qwen3-30b-a3b"
# Mean divergence from English over layers 0-3, 16-31, 44-47, computed from the published JSON files.
BANDS = {
    "de": (0.1635321, 0.0508860, 0.2337554),
    "zh": (0.2598792, 0.0614284, 0.3921497),
    "bn": (0.3131658, 0.1387389, 0.2975553),
    "sw": (0.3261158, 0.1389574, 0.2976599),
}


def divergence(statistics: mr.RoutingStatistics) -> analysis.Divergence:
    return analysis.divergence(statistics, "en", kind="topk", by="token", pairing="pooled")


def test_it_holds_five_languages_with_their_gap():
    statistics = convert.published_routing(NAME)
    assert statistics.groups == ("en", *BANDS)
    assert (len(statistics.layers), set(statistics.num_experts), set(statistics.top_k)) == (48, {128}, {8})
    assert statistics.tokens().tolist() == [[n] * 48 for n in (18286, 23433, 19413, 67455, 29543)]
    assert statistics.tolerance == 1e-3
    assert 1e-5 < statistics.conservation().largest_gap < 3.1e-4
    assert (statistics.metadata["source"], statistics.metadata["format"]) == ("imported", "gate-sums")


def test_its_divergence_is_the_published_one():
    shape = analysis.u_shape(divergence(convert.published_routing(NAME)))
    assert shape.groups == tuple(BANDS)
    np.testing.assert_allclose(np.stack([shape.first, shape.middle, shape.last], 1), list(BANDS.values()), atol=1e-6)


@needs_data
def test_it_equals_the_published_files():
    published = convert.read([routing("qwen3_30b_a3b_mgsm", f"mgsm_{name}.json") for name in ("en", *BANDS)])
    shipped = convert.published_routing(NAME)
    np.testing.assert_array_equal(shipped.token_sum("counts"), published.token_sum("counts"))
    np.testing.assert_array_equal(shipped.token_sum("weight_share"), published.token_sum("weight_share"))
    np.testing.assert_allclose(divergence(shipped).values, divergence(published).values, rtol=0, atol=1e-6)
    licence = routing("qwen3_30b_a3b_mgsm", "LICENSE.txt").read_text("utf-8")
    assert shipped_routing()[NAME].with_name("LICENSE.txt").read_text("utf-8") == licence


@needs_data
def test_its_script_makes_it_again(tmp_path):
    published_routing().main(["--data", str(FOLDER), "--pack", str(tmp_path / "again.npz")])
    with np.load(tmp_path / "again.npz") as again, np.load(shipped_routing()[NAME]) as shipped:
        assert set(again) == set(shipped)
        for name in shipped:
            assert again[name].dtype == shipped[name].dtype
            np.testing.assert_array_equal(again[name], shipped[name])


def test_the_file_is_small_and_holds_no_pickle():
    (path,) = shipped_routing().values()
    assert path.stat().st_size <= 150_000
    with np.load(path, allow_pickle=False) as arrays:
        assert {name: str(arrays[name].dtype) for name in ("tokens", "counts", "gate_sums")} == {
            "tokens": "int32",
            "counts": "int32",
            "gate_sums": "float32",
        }
        assert arrays["groups"].tolist() == ["en", *BANDS]
    text = path.with_name("README.md").read_text("utf-8")
    assert "github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs" in text
    assert "ea1d65b66beaebc622276817cb52069a44792271" in text
    assert "MIT License" in path.with_name("LICENSE.txt").read_text("utf-8")


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "qwen3", "qwen3_30b_a3b"])
def test_an_unknown_name_is_refused_with_the_nearest(name):
    with pytest.raises(ValueError, match=f"did you mean '{NAME}'"):
        convert.published_routing(name)


def test_a_name_that_is_near_none_is_refused_with_all():
    with pytest.raises(ValueError, match=f"there is '{NAME}'"):
        convert.published_routing("olmo")


def arrays(**changed: np.ndarray) -> dict[str, np.ndarray]:
    """Two groups, one layer, three experts, two of them a token."""
    made = {
        "groups": np.array(["en", "de"]),
        "tokens": np.array([[2], [3]], np.int32),
        "counts": np.array([[[2, 2, 0]], [[0, 3, 3]]], np.int32),
        "gate_sums": np.array([[[1, 1, 0]], [[0, 2, 1]]], np.float32),
    }
    return made | changed


def test_a_file_of_arrays_is_recognized_and_read(tmp_path):
    np.savez(tmp_path / "sums.npz", **arrays())
    found = convert.read(tmp_path / "sums.npz")
    assert found.groups == ("en", "de")
    np.testing.assert_array_equal(found.token_sum("weight_share"), arrays()["gate_sums"])
    with pytest.raises(ValueError, match="leave group out"):
        convert.read(tmp_path / "sums.npz", group="xx")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": np.array([[[2, 2, 0]], [[0, 3, -3]]])}, "negative"),
        ({"gate_sums": np.full((2, 1, 3), np.nan, np.float32)}, "not finite"),
        ({"counts": np.array([[[2, 2, 0]], [[0, 9, 3]]])}, "slots"),
        ({"counts": np.zeros(3, np.int32)}, "gate_sums"),
        ({"groups": np.array(["en"])}, "groups"),
        ({"groups": np.array("en")}, "groups"),
        ({"tokens": np.array([[2, 2], [3, 3]])}, "tokens"),
        ({"tokens": np.array([[2.5], [3.0]])}, "tokens"),
        ({"gate_sums": np.zeros((2, 1, 4), np.float32)}, "gate_sums"),
        ({"tokens": np.array([[-2], [3]])}, "negative"),
        ({"groups": np.array([{}, {}], dtype=object)}, "objects"),
    ],
)
def test_a_damaged_file_of_arrays_is_refused(changed, message, tmp_path):
    np.savez(tmp_path / "sums.npz", **arrays(**changed))
    with pytest.raises(FileRefusedError, match=message):
        convert.read(tmp_path / "sums.npz", "gate-sums")


def test_the_example_draws_from_what_ships(tmp_path, capsys):
    picture = tmp_path / "divergence.png"
    published_routing().main(["--out", str(picture)])
    assert ["de", "0.164", "0.051", "0.234", "0.148"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert picture.read_bytes().startswith(b"\x89PNG")
