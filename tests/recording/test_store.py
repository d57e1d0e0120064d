"""The sequence store: keyed reading, bounded memory, shards, merging, and what is refused."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from moe_route.base import files
from moe_route.recording import SequenceStore
from moe_route.recording.store import Item

LAYERS, EXPERTS = ("a.gate", "b.gate"), (4, 4)


def arrays(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, (n, 2))
    counts = rng.multinomial(tokens * 2, np.full(4, 0.25)).astype(np.int32)
    q = rng.dirichlet(np.ones(4), (n, 2)).astype(np.float32)
    return {"tokens": tokens, "counts": counts, "full": q, "topk": q[..., ::-1].copy()}


def filled(keys: list[tuple[Item, str]], seed: int = 0, **options: Any) -> SequenceStore:
    store = SequenceStore(LAYERS, EXPERTS, **options)
    held = arrays(len(keys), seed)
    for row, key in enumerate(keys):
        store.append([key], {name: array[row : row + 1] for name, array in held.items()})
    return store


KEYS: list[tuple[Item, str]] = [(item, group) for group in ("eng", "swh", "deu") for item in (1, 2, "three")]


@pytest.mark.parametrize("memory_bytes", [1 << 20, 400, 0])
def test_sequences_come_back_whether_in_memory_or_on_disk(memory_bytes: int) -> None:
    store, held = filled(KEYS, memory_bytes=memory_bytes), arrays(len(KEYS))
    assert store.keys() == KEYS == list(store)
    assert len(store) == 9
    assert store.groups() == ("eng", "swh", "deu")
    assert store.items("swh") == [1, 2, "three"]
    assert ("three", "deu") in store
    assert (3, "deu") not in store
    for row in (0, 8, 3, 1):
        item, group = KEYS[row]
        np.testing.assert_array_equal(store.distributions(item, group), held["full"][row])
        np.testing.assert_array_equal(store.distributions(item, group, "topk"), held["topk"][row])
        np.testing.assert_array_equal(store.counts(item, group), held["counts"][row])
        np.testing.assert_allclose(store.frequency(item, group).sum(-1), 2)
        np.testing.assert_allclose(store.distributions(item, group, "count").sum(-1), 1)
        assert store.distributions(item, group).dtype == np.float64
    rows = [key for shard in store.shards() for key in shard.keys]
    assert rows == KEYS


def test_memory_is_bounded_and_the_temporary_folder_goes() -> None:
    one = sum(array.nbytes for array in arrays(1).values())
    store = filled(KEYS, memory_bytes=3 * one)
    assert store._in_memory <= 3 * one
    assert store._folder is not None
    folder = store._folder.path
    assert len(list(folder.iterdir())) >= 2
    snapshot = store.snapshot()
    del store
    gc.collect()
    assert snapshot.keys() == KEYS
    snapshot.counts("three", "deu")  # the snapshot keeps the shards alive
    del snapshot
    gc.collect()
    assert not folder.exists()


def test_a_snapshot_does_not_see_what_comes_later() -> None:
    store = filled(KEYS[:4], memory_bytes=0)
    snapshot = store.snapshot()
    store.append([KEYS[5]], arrays(1))
    assert len(snapshot) == 4
    assert KEYS[5] not in snapshot
    with pytest.raises(KeyError, match="holds 4 sequences of eng, swh"):
        snapshot.counts(*KEYS[5])


def test_a_named_folder_holds_everything_at_the_end(tmp_path: Path) -> None:
    store = filled(KEYS, folder=tmp_path / "run")
    store.close()
    again = SequenceStore.load(tmp_path / "run")
    assert again.keys() == KEYS
    assert again.content_hash() == store.content_hash() == filled(KEYS).content_hash()
    del store
    gc.collect()
    np.testing.assert_array_equal(again.counts(2, "swh"), filled(KEYS).counts(2, "swh"))
    with pytest.raises(FileExistsError, match="another recording"):
        SequenceStore(LAYERS, EXPERTS, folder=tmp_path / "run")


def test_merging_unites_keys_and_numbers_the_unnamed_anew() -> None:
    one = filled([("#0", "eng"), (1, "eng")], 1)
    one.next_unnamed()
    two = filled([("#0", "eng"), ("#1", "swh"), (1, "swh")], 2, memory_bytes=0)
    two.next_unnamed(), two.next_unnamed()
    merged = one.merge(two)
    assert merged.keys() == [("#0", "eng"), (1, "eng"), ("#1", "eng"), ("#2", "swh"), (1, "swh")]
    np.testing.assert_array_equal(merged.counts("#2", "swh"), two.counts("#1", "swh"))
    np.testing.assert_array_equal(merged.counts("#0", "eng"), one.counts("#0", "eng"))
    assert merged.paired_items("eng", "swh") == [1]
    with pytest.raises(ValueError, match="both stores hold item 1 of group 'eng'"):
        merged.merge(one)
    with pytest.raises(ValueError, match="different models"):
        one.merge(SequenceStore(("a.gate",), (4,)))


def test_what_is_not_there_is_named() -> None:
    store = filled(KEYS)
    with pytest.raises(KeyError, match="no sequence of item 9 in group 'eng'"):
        store.distributions(9, "eng")
    with pytest.raises(ValueError, match="no distribution kind 'weight'"):
        store.distributions(1, "eng", "weight")  # type: ignore[arg-type]
    bare = SequenceStore(LAYERS, EXPERTS)
    bare.append([(1, "eng")], {"tokens": np.ones((1, 2), np.int64)})
    with pytest.raises(ValueError, match="with 'probability'"):
        bare.distributions(1, "eng")
    with pytest.raises(ValueError, match="recorded already"):
        store.append([("new", "eng"), (1, "eng")], arrays(2))
    assert ("new", "eng") not in store


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(files.FileRefusedError, match="holds no sequences"):
        SequenceStore.load(tmp_path)
    folder = tmp_path / "run"
    filled(KEYS, folder=folder).close()
    (shard,) = folder.iterdir()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3] + b"abc")
    damaged = SequenceStore.load(folder)
    with pytest.raises(files.FileRefusedError, match="altered"):
        damaged.counts(1, "eng")
    shard.write_bytes(whole[:-3])
    with pytest.raises(files.FileRefusedError, match="truncated"):
        SequenceStore.load(folder)
    shard.write_bytes(whole)
    (folder / "sequences-00001-again.safetensors").write_bytes(whole)
    with pytest.raises(files.FileRefusedError, match="holds a sequence twice"):
        SequenceStore.load(folder)
    other = SequenceStore(("a.gate",), (4,), folder=tmp_path / "other")
    other.append([(7, "eng")], {name: array[:, :1] for name, array in arrays(1).items()})
    other.close()
    (folder / "sequences-00001-again.safetensors").write_bytes(next((tmp_path / "other").iterdir()).read_bytes())
    with pytest.raises(files.FileRefusedError, match="another model"):
        SequenceStore.load(folder)


def test_any_changed_byte_of_a_shard_is_refused(tmp_path: Path) -> None:
    filled(KEYS[:2], folder=tmp_path / "run").close()
    (shard,) = (tmp_path / "run").iterdir()
    whole, expected = shard.read_bytes(), filled(KEYS[:2]).content_hash()
    for position in range(len(whole)):
        altered = bytearray(whole)
        altered[position] ^= 1
        shard.write_bytes(altered)
        try:
            found = SequenceStore.load(tmp_path / "run").content_hash()
        except files.FileRefusedError:
            continue
        assert found == expected  # a space that pads the header and reads the same


def test_a_shard_that_is_exchanged_after_loading_is_refused(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        filled(KEYS, seed, folder=tmp_path / name).close()
    store = SequenceStore.load(tmp_path / "one")
    (one,), (two,) = (tmp_path / "one").iterdir(), (tmp_path / "two").iterdir()
    one.write_bytes(two.read_bytes())  # valid, with the same keys
    with pytest.raises(files.FileRefusedError, match="altered or replaced since it was opened"):
        store.counts(1, "eng")
    one.unlink()
    with pytest.raises(files.FileRefusedError, match="does not exist"):
        store.counts(1, "eng")


def test_a_file_with_other_fields_is_refused(tmp_path: Path) -> None:
    files.write(tmp_path / "sequences-0.safetensors", {}, {"layers": ["a"], "items": [], "groups": []}, "sequences")
    with pytest.raises(files.FileRefusedError, match="does not hold what this version of moe-route reads"):
        SequenceStore.load(tmp_path)


def test_selected_layers_are_those_of_the_whole() -> None:
    for memory_bytes in (0, 300, 1 << 20):
        store = SequenceStore(("a", "b", "c"), (2, 4, 3), memory_bytes=memory_bytes)
        held = {"tokens": np.arange(6).reshape(2, 3), "counts": np.arange(24, dtype=np.int32).reshape(2, 3, 4)}
        store.append([(1, "x"), ("#0", "x")], held)
        store.next_unnamed()
        part = store.select([2, 0])
        assert (part.layers, part.num_experts, part.keys()) == (("c", "a"), (3, 2), store.keys())
        np.testing.assert_array_equal(part.counts(1, "x"), store.counts(1, "x")[[2, 0], :3])
        np.testing.assert_array_equal(part.tokens("#0", "x"), store.tokens("#0", "x")[[2, 0]])
        last = part.select([1])
        np.testing.assert_array_equal(last.counts("#0", "x"), store.counts("#0", "x")[[0], :2])
        part.flush()
        np.testing.assert_array_equal(part.counts(1, "x"), store.counts(1, "x")[[2, 0], :3])
        assert part.next_unnamed() == "#1"


def test_small_appends_share_few_arrays() -> None:
    store = SequenceStore(LAYERS, EXPERTS)
    for item in range(5000):
        store.append([(item, "eng")], arrays(1, item))
    assert len(list(store.shards())) == 1
    one = sum(array.nbytes for array in arrays(1).values())
    assert store._in_memory == 5000 * one
    assert store._growing is not None
    assert sum(array.nbytes for array in store._growing._arrays.values()) <= 8 << 20
    for item in (0, 77, 4999):
        np.testing.assert_array_equal(store.counts(item, "eng"), arrays(1, item)["counts"][0])


def test_sequences_with_other_arrays_are_refused() -> None:
    store = filled(KEYS[:1])
    with pytest.raises(ValueError, match="record alike"):
        store.append([KEYS[1]], {"tokens": np.ones((1, 2), np.int64)})


def in_a_child(work: str, folder: Path) -> None:
    """Run lines of Python, with a store that keeps everything in a temporary folder, in a process of their own."""
    given = f"""
import os, signal, sys
from pathlib import Path
import numpy as np
from moe_route.recording import RoutingStatistics, SequenceStore
folder = Path({str(folder)!r})
store = SequenceStore(("a",), (4,), memory_bytes=0)
store.append([(1, "x")], {{"tokens": np.ones((1, 1), np.int64)}})
"""
    subprocess.run([sys.executable, "-c", given + work], check=True, env={**os.environ, "TMPDIR": str(folder)})


def test_a_forked_child_that_ends_leaves_the_sequences_of_its_parent(tmp_path: Path) -> None:
    in_a_child(
        """
child = os.fork()
if not child:
    sys.exit(0)
os.waitpid(child, 0)
assert store.tokens(1, "x") == 1
del store
assert not list(folder.iterdir())
""",
        tmp_path,
    )
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_in_the_temporary_folder_is_removed_by_the_next(tmp_path: Path) -> None:
    kill = "child = os.fork()\nif not child:\n    os.kill(os.getpid(), signal.SIGKILL)\nos.waitpid(child, 0)\n"
    with pytest.raises(subprocess.CalledProcessError):
        in_a_child("os.kill(os.getpid(), signal.SIGKILL)", tmp_path)
    (left,) = tmp_path.iterdir()
    in_a_child(kill + "assert len(list(folder.iterdir())) == 1 and store.tokens(1, 'x') == 1", tmp_path)
    assert not left.exists()
    assert not list(tmp_path.iterdir())


def test_a_killed_recording_leaves_what_it_wrote_and_no_lock(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        in_a_child(
            """
kept = SequenceStore(("a",), (4,), folder=folder / "run", memory_bytes=0)
kept.append([(1, "x")], {"tokens": np.ones((1, 1), np.int64)})
os.kill(os.getpid(), signal.SIGKILL)
""",
            tmp_path,
        )
    assert SequenceStore.load(tmp_path / "run").keys() == [(1, "x")]
    for entry in (tmp_path / "run").iterdir():
        entry.unlink()
    SequenceStore(LAYERS, EXPERTS, folder=tmp_path / "run")


def test_a_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    filled(KEYS, folder=tmp_path / "link").close()
    assert (tmp_path / "link").is_symlink()
    assert SequenceStore.load(tmp_path / "real").keys() == KEYS


def test_a_killed_save_leaves_the_old_or_the_new_recording(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_saves.py")
    subprocess.run(
        [sys.executable, script, tmp_path, "23"], check=True, env={**os.environ, "PYTHONPATH": str(script.parents[1])}
    )


# ---- counts in half the bytes


def dtypes_in(path: Path) -> set[torch.dtype]:
    return {block.dtypes["counts"] for block in files.read_blocks(path, "sequences")[2]}


def test_counts_take_two_bytes_in_a_file_and_are_int32_when_read(tmp_path: Path) -> None:
    store, held = filled(KEYS), arrays(len(KEYS))
    path = tmp_path / "sequences-a.safetensors"
    store.save(path)
    assert dtypes_in(path) == {torch.uint16}
    loaded = SequenceStore.load(tmp_path)
    for shard in loaded.shards():
        assert shard.arrays["counts"].dtype == np.int32
        np.testing.assert_array_equal(shard.arrays["counts"], held["counts"])
    assert loaded.content_hash() == store.content_hash()
    with safetensors.safe_open(path, "numpy") as file:  # as another program reads it
        np.testing.assert_array_equal(file.get_tensor("rows.counts"), held["counts"])


@pytest.mark.parametrize(("largest", "dtype"), [(65535, torch.uint16), (65536, torch.int32)])
def test_counts_that_are_too_large_for_it_keep_their_four(largest: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """One of them is enough, in whichever portion it lies, in memory or on disk."""
    store, path = filled(KEYS, memory_bytes=0), tmp_path / "sequences-a.safetensors"
    long = arrays(1, seed=5)
    long["counts"][0, 1, 2] = largest
    store.append([("long", "eng")], long)
    store.append([("last", "eng")], arrays(1, seed=6))
    store.save(path)
    assert dtypes_in(path) == {dtype}
    loaded = SequenceStore.load(tmp_path)
    assert loaded.counts("long", "eng")[1, 2] == largest
    assert loaded.content_hash() == store.content_hash()


def test_files_of_both_kinds_merge(tmp_path: Path) -> None:
    """Also those of before, whose counts are int32 though they would fit."""
    old, new = filled(KEYS), filled([(f"{item}b", group) for item, group in KEYS], seed=1)
    for name, store in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        store.save(tmp_path / name / "sequences-a.safetensors")
    content = old._blocks()
    files.write(tmp_path / "old" / "sequences-a.safetensors", {}, old._header(content), "sequences", blocks=content)
    assert dtypes_in(tmp_path / "old" / "sequences-a.safetensors") == {torch.int32}
    merged = SequenceStore.load(tmp_path / "old").merge(SequenceStore.load(tmp_path / "new"))
    merged.save(tmp_path / "sequences-m.safetensors")
    again = SequenceStore.load(tmp_path)
    assert again.content_hash() == old.merge(new).content_hash()
    selected = again.select([1])
    np.testing.assert_array_equal(selected.counts(1, "swh"), old.counts(1, "swh")[1:])
