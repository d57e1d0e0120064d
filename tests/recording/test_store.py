"""The sequence store: keyed reading, bounded memory, shards, merging, and what is refused."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_route import files
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


def test_saving_replaces_a_store_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    filled(KEYS, memory_bytes=300).save(folder)
    assert SequenceStore.load(folder).keys() == KEYS
    filled(KEYS[:2]).save(folder)
    assert SequenceStore.load(folder).keys() == KEYS[:2]
    SequenceStore(LAYERS, EXPERTS).save(tmp_path / "empty")
    assert SequenceStore.load(tmp_path / "empty").keys() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "kept"]
    reread = SequenceStore.load(folder)
    assert reread.save(folder) == reread.files_hash()
    np.testing.assert_array_equal(reread.counts(*KEYS[1]), arrays(2)["counts"][1])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a sequence store"):
        filled(KEYS).save(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert SequenceStore.load(folder).keys() == KEYS[:2]


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
    with pytest.raises(files.FileRefusedError, match="holds no sequence shards"):
        SequenceStore.load(tmp_path)
    folder = tmp_path / "run"
    filled(KEYS).save(folder)
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
