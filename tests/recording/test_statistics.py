"""RoutingStatistics without a model: exact merging, selection, files, frames, and what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_route.base import files
from moe_route.contract.tables import FIXED_POINT, SCALARS
from moe_route.recording import MergeError, RecordingError, RoutingStatistics, SequenceStore
from moe_route.recording.statistics import SEQUENCE_KINDS, SEQUENCE_SCALARS
from moe_route.recording.tables import TableSums
from moe_route.recording.vectors import SequencePool

LAYERS, EXPERTS, TOP_K = ("a.gate", "b.gate"), (3, 4), (1, 2)
UNIT = 1 << 32


def statistics(groups: tuple[str, ...], seed: int, **more: Any) -> RoutingStatistics:
    """Random sums that obey the conservation laws; ``more`` replaces arguments of the constructor."""
    rng = np.random.default_rng(seed)
    cell = (len(groups), 2)
    tables = {name: np.zeros((2, *cell, 4), np.int64) for name in ("counts", "probability")}
    scalars = np.zeros((2, *cell, len(SCALARS)), np.int64)
    for layer, (experts, k) in enumerate(zip(EXPERTS, TOP_K, strict=True)):
        tokens = rng.integers(0, 50, (2, len(groups)))
        scalars[:, :, layer, SCALARS.index("tokens")] = tokens
        scalars[:, :, layer, SCALARS.index("slots")] = tokens * k
        scalars[:, :, layer, SCALARS.index("entropy")] = tokens * UNIT // 3
        counts = rng.multinomial(tokens * k, np.full(experts, 1 / experts))
        tables["counts"][:, :, layer, :experts] = counts
        tables["probability"][:, :, layer, :experts] = counts * (UNIT // k)
    sequences = rng.integers(1, 9, (3, *cell, 1))
    sums = {kind: rng.integers(0, 1 << 40, (3, *cell, 4)) for kind in SEQUENCE_KINDS if kind != "topk"}
    metadata = {
        "model": {"name": "m", "config_hash": "c0"},
        "fingerprint": f"{rng.integers(1 << 60):032x}",
        "calls": int(rng.integers(9)),
        "plans": [],
        "versions": {"torch": f"2.{seed % 3}"},
    }
    arguments = {
        "groups": groups,
        "layers": LAYERS,
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "scalars": scalars,
        "metrics": tables,
        "sequence_scalars": np.repeat(sequences, len(SEQUENCE_SCALARS), axis=-1),
        "sequence_sums": sums,
        "metadata": metadata,
    }
    return RoutingStatistics(**(arguments | more))


some = st.builds(
    statistics,
    st.lists(st.sampled_from(["eng", "swh", "deu"]), unique=True, min_size=1).map(tuple),
    st.integers(0, 1 << 20),
)


@given(some, some, some)
def test_merging_is_exact_in_any_order(a: RoutingStatistics, b: RoutingStatistics, c: RoutingStatistics) -> None:
    assert a + b == b + a
    assert (a + b) + c == a + (b + c) == sum([c, b, a])
    merged = (a + b) + c
    assert set(merged.groups) == {*a.groups, *b.groups, *c.groups}
    for group in merged.groups:
        parts = [s.select(groups=[group]).token_sum("counts") for s in (a, b, c) if group in s.groups]
        np.testing.assert_array_equal(merged.select(groups=[group]).token_sum("counts"), sum(parts))
    assert merged.metadata["calls"] == sum(s.metadata["calls"] for s in (a, b, c))
    assert (a + b).metadata == (b + a).metadata


@given(some)
def test_files_give_back_what_was_saved(a: RoutingStatistics) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        a.save(Path(folder) / "s.safetensors")
        again = RoutingStatistics.load(Path(folder) / "s.safetensors")
    assert again == a
    assert again.metadata == a.metadata
    assert again.groups == a.groups


def test_merging_refuses_what_is_not_of_one_model() -> None:
    a = statistics(("eng",), 1)
    other_model = statistics(("eng",), 2, metadata={"model": {"config_hash": "c1"}})
    for other, why in (
        (other_model, "two models .configuration c0 and c1"),
        (statistics(("eng",), 2, layers=("a.gate", "z.gate")), "different layers"),
        (statistics(("eng",), 2, top_k=(1, 1)), "different top-k"),
        (
            statistics(("eng",), 2, metrics=a._metrics | {"weight_share": a._metrics["probability"]}),
            "only one of the two runs recorded weight_share",
        ),
        (statistics(("eng",), 2, entropy=False), "entropy"),
    ):
        with pytest.raises(MergeError, match=why):
            a + other
    assert a.__add__(3) is NotImplemented
    with pytest.raises(TypeError):
        a + "b"  # type: ignore[operator]


def test_merging_refuses_to_overflow() -> None:
    a = statistics(("eng",), 1)
    huge = a._sequence_sums["full"].copy()
    huge[0, 0, 0, 0] = (1 << 63) - 1
    b = statistics(("eng",), 1, sequence_sums=a._sequence_sums | {"full": huge})
    with pytest.raises(RecordingError, match="past 63 bits"):
        b + b


def test_an_unsteered_run_has_its_choice_as_natural_choice() -> None:
    plain = statistics(("eng",), 1)
    steered = statistics(("eng",), 2)
    tables = steered._metrics | {"natural_counts": steered._metrics["counts"]}
    steered = statistics(("eng",), 2, metrics=tables, metadata=steered.metadata | {"plans": ["p"]})
    both = plain + steered
    expected = plain.token_sum("counts") + steered.token_sum("natural_counts")
    np.testing.assert_array_equal(both.token_sum("natural_counts"), expected)
    assert both.metadata["plans"] == ["p"]
    with pytest.raises(MergeError, match="natural_counts"):
        statistics(("eng",), 1, metadata={"plans": ["q"]}) + steered


def test_select() -> None:
    a = statistics(("eng", "swh", "deu"), 1)
    part = a.select(groups=["deu", "eng"], layers=[1])
    assert (part.groups, part.layers, part.num_experts) == (("deu", "eng"), ("b.gate",), (4,))
    np.testing.assert_array_equal(part.token_sum("counts"), a.token_sum("counts")[[2, 0]][:, [1]])
    np.testing.assert_array_equal(part.frequency(), a.frequency()[[2, 0]][:, [1]])
    assert a.select(layers=["a.gate"]) == a.select(layers=range(1)) == a.select(layers=0)
    assert a.select(layers=[0]).token_sum("probability").shape == (3, 1, 3)
    assert a.select("swh").groups == ("swh",)
    with pytest.raises(ValueError, match=r"no group 'fra'.*eng, swh, deu"):
        a.select(groups=["fra"])
    with pytest.raises(ValueError, match="layers 0 to 1"):
        a.select(layers=[2])


def test_averages_follow_their_definitions() -> None:
    a = statistics(("eng", "swh"), 3)
    counts, tokens = a.token_sum("counts"), a.tokens()
    np.testing.assert_allclose(a.frequency(by="token"), counts / tokens[..., None])
    np.testing.assert_allclose(
        a.frequency("decode", by="token"), a.token_sum("counts", "decode") / a.tokens("decode")[..., None]
    )
    np.testing.assert_allclose(a.mean_distribution("full", by="token").sum(-1), 1)
    np.testing.assert_allclose(a.mean_distribution("count", by="token"), counts / counts.sum(-1, keepdims=True))
    np.testing.assert_allclose(a.mean_distribution("full").sum(-1), 1)
    sums = a._sequence_sums["frequency"][2] * FIXED_POINT
    np.testing.assert_allclose(a.frequency(), sums / a.sequence_scalar("sequences")[..., None])
    assert a.token_sum("counts").dtype == a.tokens().dtype == np.int64
    assert a.token_sum("probability").dtype == np.float64
    np.testing.assert_array_equal(a.token_sum("counts", "prefill") + a.token_sum("counts", "decode"), counts)


def test_sequences_of_any_length_weigh_alike_in_the_entropy_of_tokens() -> None:
    """99 tokens that are all of one mind, and a sequence of one token: there is no gap within any of them."""
    sums = TableSums(2, 1, 4, ["probability"])
    for row, (tokens, p) in enumerate(((99, [0.25] * 4), (1, [0.5, 0.5, 0.0, 0.0]))):
        entropy = -sum(x * np.log(x) for x in p if x)
        sums.metrics["probability"][0, row, 0] = np.array(p) * tokens * UNIT
        for name, value in (
            ("tokens", tokens),
            ("slots", tokens),
            ("empty", tokens),
            ("entropy", tokens * entropy * UNIT),
        ):
            sums.scalars[0, row, 0, SCALARS.index(name)] = round(value)
    pool = SequencePool(1, 1, 4, ["probability"], entropy=True)
    pool.add(sums, np.zeros(2, int))
    one = RoutingStatistics(
        groups=["eng"],
        layers=["a"],
        num_experts=[4],
        top_k=[1],
        scalars=sums.scalars.sum(1, keepdims=True),
        metrics={"probability": sums.metrics["probability"].sum(1, keepdims=True)},
        sequence_scalars=pool.scalars,
        sequence_sums=pool.sums,
    )
    for statistics in (one, one + one):
        np.testing.assert_allclose(statistics.entropy("sequence"), statistics.entropy("token", by="sequence"))
        np.testing.assert_allclose(statistics.entropy("sequence", "prefill"), (np.log(4) + np.log(2)) / 2)
        np.testing.assert_allclose(statistics.entropy("token"), (99 * np.log(4) + np.log(2)) / 100)
        assert np.isnan(statistics.entropy("token", "decode", by="sequence")).all()


def test_nothing_seen_is_nan_without_a_warning() -> None:
    empty = statistics(("eng", "swh"), 3)
    scalars, metrics = empty._scalars.copy(), {n: t.copy() for n, t in empty._metrics.items()}
    for table in (scalars, *metrics.values()):
        table[:, 1] = 0
    part = statistics(("eng", "swh"), 3, scalars=scalars, metrics=metrics)
    for values in (part.mean_distribution(by="token"), part.frequency(by="token"), part.entropy("token")):
        assert np.isnan(values[1]).all()
        assert not np.isnan(values[0]).any()


def test_token_sums_of_another_recorder() -> None:
    counts = np.array([[[3, 1], [2, 2]]])
    imported = RoutingStatistics.from_token_sums(
        ["eng"], counts=counts, tokens=np.array([4]), top_k=1, probability=counts * 1.0
    )
    imported.verify()
    np.testing.assert_array_equal(imported.token_sum("counts"), counts)
    np.testing.assert_allclose(imported.mean_distribution(by="token"), counts / 4)
    with pytest.raises(ValueError, match='pass by="token"'):
        imported.mean_distribution()
    with pytest.raises(ValueError, match='pass by="token"'):
        imported.frequency()
    assert (imported + imported).tokens().tolist() == [[8, 8]]
    without = RoutingStatistics.from_token_sums(["eng"], counts=counts, tokens=np.array([4]), top_k=1)
    without.verify()
    with pytest.raises(ValueError, match="'probability' was not recorded"):
        without.mean_distribution(by="token")


def lossy(missing: int = 3, weight: float = 1.0003, **options: Any) -> RoutingStatistics:
    """Sums of a recorder that lost some choices of 10000 tokens and rounded weights to bfloat16."""
    counts = np.array([[[6000, 4000 - missing]]])
    return RoutingStatistics.from_token_sums(
        ["eng"], counts=counts, tokens=np.array([10_000]), top_k=1, weight_share=counts * weight, **options
    )


def test_sums_of_a_lossy_recorder_are_saved_and_loaded_with_their_tolerance(tmp_path: Path) -> None:
    imported = lossy()
    imported.save(tmp_path / "s")
    again = RoutingStatistics.load(tmp_path / "s")
    assert again == imported
    assert again.tolerance == imported.tolerance == 1e-3
    assert again.metadata["source"] == (again + again).metadata["source"] == "imported"
    assert (again + lossy(30, tolerance=0.01)).tolerance == 0.01
    for options, what in (({"missing": 30}, "counts and empty slots"), ({"weight": 1.01}, "shares of weight")):
        with pytest.raises(RecordingError, match=rf"{what}.*beyond the tolerance of 0\.001.*tolerance=\.\.\."):
            lossy(**options)
        assert lossy(**options, tolerance=0.02).tolerance == 0.02
    assert statistics(("eng",), 1).tolerance == 0  # what this library records holds to the last slot


def test_conservation_shows_how_many_slots_are_missing() -> None:
    found = lossy().conservation()
    assert (found.tokens.tolist(), found.expected.tolist(), found.found.tolist()) == ([[10_000]], [[10_000]], [[9997]])
    assert found.largest_gap == pytest.approx(3e-4)
    assert found.holds
    assert "largest gap 3.00e-04, within the tolerance of 0.001" in repr(found)
    assert found.to_dict()["largest_gap"] == found.largest_gap
    whole = statistics(("eng", "swh"), 5).conservation("prefill")
    assert whole.largest_gap == 0
    assert whole.gap.shape == (2, 2)
    more = statistics(("eng",), 5)
    scalars = more._scalars.copy()
    scalars[..., SCALARS.index("slots")] = 0
    none_expected = statistics(("eng",), 5, scalars=scalars, tolerance=0.5).conservation()
    assert not none_expected.holds
    assert none_expected.to_dict()["largest_gap"] is None


def test_experts_that_pad_a_narrow_layer_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    counts = np.array([[[3, 1, 0, 0], [2, 1, 1, 0]]])
    given: dict[str, Any] = {"groups": ["eng"], "counts": counts, "tokens": np.array([4]), "top_k": 1}
    assert RoutingStatistics.from_token_sums(**given).num_experts == (4, 4)
    assert "no group chose the last experts of 2 of 2 layers, such as 0 (2 of 4), 1 (3 of 4)" in caplog.text
    caplog.clear()
    narrow = RoutingStatistics.from_token_sums(**given, num_experts=(2, 3))
    assert not caplog.text
    np.testing.assert_array_equal(narrow.token_sum("counts"), counts[..., :3])
    assert RoutingStatistics.from_token_sums(**given, num_experts=4).num_experts == (4, 4)
    with pytest.raises(ValueError, match="layer 1 has 2 experts, and counts of expert 2"):
        RoutingStatistics.from_token_sums(**given, num_experts=2)
    for wrong in ((4,), 5):
        with pytest.raises(ValueError, match="one for each of 2 layers, up to 4"):
            RoutingStatistics.from_token_sums(**given, num_experts=wrong)


def test_arrays_are_read_only_and_copied() -> None:
    a = statistics(("eng",), 1)
    with pytest.raises(ValueError, match="read-only"):
        a._scalars[0] = 0
    a.token_sum("counts")[:] = -1
    a.tokens("prefill")[:] = -1
    assert (a.token_sum("counts") >= 0).all()
    assert (a.tokens("prefill") >= 0).all()


def test_wrong_arguments_are_refused() -> None:
    a = statistics(("eng",), 1)
    for call, why in (
        (lambda: statistics(("eng", "eng"), 1), "named twice"),
        (lambda: statistics(("eng",), 1, scalars=np.zeros((2, 1, 2, 7), np.int64)), "scalars has shape"),
        (lambda: statistics(("eng",), 1, scalars=np.zeros((2, 1, 2, 8))), "must hold integers"),
        (lambda: statistics(("eng",), 1, top_k=(1,)), "one entry per layer"),
        (lambda: a.token_sum("count"), "no metric 'count'"),
        (lambda: a.scalar("token"), "no scalar 'token'"),
        (lambda: a.tokens("encode"), "no phase 'encode'"),
        (lambda: a.frequency(by="group"), "by must be"),
        (lambda: a.mean_distribution("weights"), "no distribution kind"),
        (lambda: a.mean_distribution("topk"), "'weight_share' was not recorded"),
        (lambda: a.entropy("layer"), "entropy of"),
    ):
        with pytest.raises(ValueError, match=why):
            call()


def test_frames_are_tidy() -> None:
    a = statistics(("eng", "swh"), 4)
    frame = a.to_pandas()
    assert len(frame) == 2 * 2 * (3 + 4)
    row = frame.set_index(["group", "phase", "layer", "expert"]).loc[("swh", "decode", 1, 3)]
    assert row["counts"] == a.token_sum("counts", "decode")[1, 1, 3]
    assert row["probability"] == a.token_sum("probability", "decode")[1, 1, 3]
    assert row["tokens"] == a.tokens("decode")[1, 1]
    assert row["router"] == "b.gate"
    scalars = a.scalars_to_pandas().set_index(["group", "phase", "layer"])
    assert scalars.loc[("swh", "prefill", 0), "slots"] == a.scalar("slots", "prefill")[1, 0]
    assert scalars.loc[("eng", "decode", 1), "sequences"] == a.sequence_scalar("sequences", "decode")[0, 1]


def test_repr_says_what_it_holds() -> None:
    text = repr(statistics(("eng", "swh"), 4))
    assert "2 groups x 2 layers x 3/4 experts, top-1/2" in text
    assert "counts, probability, entropy" in text
    many = repr(statistics(tuple("abcdefghij"), 4)).splitlines()
    assert "    and 2 more" in many
    assert max(map(len, many)) <= 120
    one = repr(statistics(("eng",), 4).select(layers=[0]))
    assert "1 group x 1 layer x 3 experts" in one


# ---- files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    statistics(("eng", "swh"), 5).save(tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def with_sequences(seed: int, items: range) -> RoutingStatistics:
    store = SequenceStore(LAYERS, EXPERTS, memory_bytes=300)
    rng = np.random.default_rng(seed)
    for item in items:
        store.append([(item, "eng")], {"tokens": rng.integers(1, 9, (1, 2)), "full": rng.random((1, 2, 4), np.float32)})
    return statistics(("eng",), seed, store=store.snapshot())


def test_a_recording_with_sequences_is_one_file_and_may_replace_itself(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with_sequences(1, range(9)).save(path)
    loaded = RoutingStatistics.load(path)
    both = loaded + with_sequences(2, range(9, 12))
    content = both.store.content_hash()
    both.save(path)  # over the file that nine of the sequences are read from
    assert both.store.content_hash() == content
    with pytest.raises(files.FileRefusedError, match="altered or replaced since it was opened"):
        loaded.store.content_hash()
    again = RoutingStatistics.load(path)
    assert again == both
    assert again.store.keys() == both.store.keys()
    assert again.store.content_hash() == content
    again.save(path)
    assert again.store.content_hash() == content
    again.save(path, sequences=False)
    assert RoutingStatistics.load(path).store is None
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    empty = statistics(("eng",), 3, store=SequenceStore(LAYERS, EXPERTS))
    empty.save(path)
    assert RoutingStatistics.load(path).store.keys() == []


def test_unnamed_sequences_of_files_are_numbered_anew_when_they_merge(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run = with_sequences(1, range(0))
        run.store.append([("#0", "eng")], {"tokens": np.ones((1, 2), np.int64)})
        run.save(tmp_path / name)
    both = RoutingStatistics.load(tmp_path / "a") + RoutingStatistics.load(tmp_path / "b")
    assert both.store.keys() == [("#0", "eng"), ("#1", "eng")]


def test_selected_layers_keep_their_sequences(tmp_path: Path) -> None:
    whole = with_sequences(1, range(4))
    part = whole.select(layers=[1])
    assert part.store is not None
    np.testing.assert_array_equal(part.store.distributions(2, "eng"), whole.store.distributions(2, "eng")[[1]])
    part.save(tmp_path / "part")
    again = RoutingStatistics.load(tmp_path / "part")
    assert again == part
    assert again.store.content_hash() == part.store.content_hash()
    assert whole.select(groups=["eng"]).store is whole.store


def test_a_file_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    a = statistics(("eng",), 1)
    header = {"groups": ["eng"], "layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K, "entropy": True}
    header |= {"metadata": {}, "sequences": {"folder": "s.sequences", "hash": "0", "keys": 1}}
    files.write(tmp_path / "s", a._arrays(), header, "statistics")
    with pytest.raises(
        files.FileRefusedError, match=r"does not hold what this version of moe-route reads.*make it again"
    ):
        RoutingStatistics.load(tmp_path / "s")


def test_truncated_files_are_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(files.FileRefusedError):
            RoutingStatistics.load(saved)


def test_altered_files_are_refused(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in (header + 3, len(whole) - 1):
        altered = bytearray(whole)
        altered[place] ^= 1
        saved.write_bytes(altered)
        with pytest.raises(files.FileRefusedError, match="altered"):
            RoutingStatistics.load(saved)
    saved.write_bytes(bytes(whole).replace(b"eng", b"enf"))
    with pytest.raises(files.FileRefusedError, match="altered"):
        RoutingStatistics.load(saved)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "f.safetensors"
    files.write(foreign, {"x": np.zeros(3)}, {}, "plan")
    with pytest.raises(files.FileRefusedError, match="'plan'"):
        RoutingStatistics.load(foreign)
    foreign.write_text(json.dumps({"counts": [1, 2]}))
    with pytest.raises(files.FileRefusedError):
        RoutingStatistics.load(foreign)
    with pytest.raises(files.FileRefusedError, match="does not exist"):
        RoutingStatistics.load(tmp_path / "nothing.safetensors")


def test_sums_that_break_conservation_are_refused(tmp_path: Path) -> None:
    a = statistics(("eng",), 5)
    counts = a._metrics["counts"].copy()
    counts[0, 0, 1, 0] += 1
    statistics(("eng",), 5, metrics={**a._metrics, "counts": counts}).save(tmp_path / "s.safetensors")
    with pytest.raises(RecordingError, match=r"do not add up to the slots .group 'eng', layer b\.gate, prefill"):
        RoutingStatistics.load(tmp_path / "s.safetensors")
    counts[0, 0, 1, 0] = -5
    with pytest.raises(RecordingError, match="negative sum"):
        statistics(("eng",), 5, metrics={**a._metrics, "counts": counts}).verify()


def test_what_a_server_says_is_missing_is_refused_unless_asked_for(tmp_path: Path) -> None:
    def served(counted: int) -> RoutingStatistics:
        made = RoutingStatistics.from_token_sums(
            ["a"], counts=np.array([[[3, 1], [2, 2]]]), tokens=np.array([4]), top_k=1, layers=["x", "y"]
        )
        made.metadata = {"unbalanced": {"y": {"expected": 6, "counted": counted, "kernel": "Fast"}}}
        return made

    path = tmp_path / "server.safetensors"
    served(4).save(path)
    with pytest.raises(RecordingError, match="layer y counted 4 of the 6"):
        RoutingStatistics.load(path)
    both = RoutingStatistics.load(path, partial=True) + served(5)
    assert both.metadata["unbalanced"] == {"y": {"expected": 12, "counted": 9, "kernel": "Fast"}}
    with pytest.raises(RecordingError, match="partial=True"):
        both.verify()
    both.verify(partial=True)
    both.metadata = {"gaps": ["3 requests found no row"]}
    with pytest.raises(RecordingError, match="3 requests"):
        both.verify()
