"""The recorder on real tiny models: what it counts is what the routers did, token by token and sequence by sequence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.stub_model import StubModel
from harness.tiny_models import MAIN, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import moe_route as mr
from moe_route.base import files
from moe_route.recording import Recorder, RecordingError, SequenceStore

E = 8


class ByHand:
    """Scores, ids and weights of every layer as the model's own routers return them, float64 [B, S, ...]."""

    def __init__(self, model: nn.Module):
        self.layers: dict[int, list[tuple[np.ndarray, ...]]] = {}
        self.handles = [
            router.module.register_forward_hook(self._hook(router.layer, router.spec.score))
            for router in mr.routers.find_routers(model)
        ]

    def _hook(self, layer: int, score: str) -> Any:
        def hook(module: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
            logits, weights, ids = (t.detach().double() for t in output)
            scores = torch.sigmoid(logits) if score == "sigmoid" else torch.softmax(logits, -1)
            found = (scores / scores.sum(-1, keepdim=True), weights, ids.long())
            self.layers.setdefault(layer, []).append(tuple(t.numpy() for t in found))

        return hook

    def __enter__(self) -> ByHand:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def sums(self, keep: np.ndarray, call: int = 0) -> dict[str, np.ndarray]:
        """Sums over the tokens of one call where ``keep`` [B * S] holds: metric -> [L, E]."""
        metrics = {
            name: np.zeros((len(self.layers), E)) for name in ("counts", "probability", "weight", "weight_share")
        }
        for layer, calls in self.layers.items():
            scores, weights, ids = (array[keep.reshape(-1)] for array in calls[call])
            metrics["probability"][layer] = scores.sum(0)
            np.add.at(metrics["counts"][layer], ids, 1)
            np.add.at(metrics["weight"][layer], ids, weights)
            np.add.at(metrics["weight_share"][layer], ids, weights / weights.sum(-1, keepdims=True))
        return metrics

    def entropy(self, keep: np.ndarray, call: int = 0) -> np.ndarray:
        kept = [calls[call][0][keep.reshape(-1)] for _, calls in sorted(self.layers.items())]
        return np.array([-(p * np.log(p)).sum(-1).sum() for p in kept])


def padded(lengths: list[int], side: str = "right", seed: int = 1) -> dict[str, torch.Tensor]:
    ids = tokens(len(lengths), max(lengths), seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if side == "right" else slice(-length, None)] = 1
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_model("qwen3_moe", head=True)


@pytest.fixture
def routed(model: nn.Module) -> Iterator[mr.RoutedModel]:
    with mr.attach(model) as routed:
        yield routed


def run(routed: mr.RoutedModel, inputs: dict[str, torch.Tensor], **more: Any) -> Any:
    with torch.inference_mode():
        return routed.model(**inputs, **more)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("side", ["left", "right"])
def test_token_sums_are_those_of_the_routers(name: str, side: str) -> None:
    inputs = padded([7, 4, 9], side)
    with mr.attach(tiny_model(name)) as routed:
        with ByHand(routed.model) as hand, routed.record() as rec:
            run(routed, inputs)
        statistics = rec.statistics()
    keep = inputs["attention_mask"].bool().numpy()
    expected = hand.sums(keep)
    assert (statistics.tokens() == 20).all()
    np.testing.assert_array_equal(statistics.token_sum("counts")[0], expected["counts"])
    for metric in ("probability", "weight", "weight_share"):
        np.testing.assert_allclose(statistics.token_sum(metric)[0], expected[metric], atol=2e-5)
    np.testing.assert_allclose(statistics.entropy("token")[0] * 20, hand.entropy(keep), atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_distribution_is_equation_1(routed: mr.RoutedModel, side: str) -> None:
    inputs = padded([7, 4, 9], side)
    with ByHand(routed.model) as hand, routed.record(sequences=True) as rec, rec.labels("x", items=[10, 11, 12]):
        run(routed, inputs)
    statistics = rec.statistics()
    assert statistics.store is not None
    qs, frequencies, entropies, token_entropies = [], [], [], []
    for row, item in enumerate([10, 11, 12]):
        keep = inputs["attention_mask"].bool().numpy().copy()
        keep[np.arange(3) != row] = False
        sums, length = hand.sums(keep), keep.sum()
        q = sums["probability"] / length  # arXiv 2510.04694 eq. 1
        np.testing.assert_allclose(statistics.store.distributions(item, "x"), q, atol=1e-6)
        np.testing.assert_array_equal(statistics.store.counts(item, "x"), sums["counts"])
        np.testing.assert_array_equal(statistics.store.tokens(item, "x"), length)
        np.testing.assert_allclose(
            statistics.store.distributions(item, "x", "topk"), sums["weight_share"] / length, atol=1e-6
        )
        qs.append(q)
        frequencies.append(sums["counts"] / length)
        entropies.append(-(q * np.log(q)).sum(-1))
        token_entropies.append(hand.entropy(keep) / length)
    np.testing.assert_allclose(statistics.mean_distribution()[0], np.mean(qs, 0), atol=1e-6)
    np.testing.assert_allclose(statistics.frequency()[0], np.mean(frequencies, 0), atol=1e-9)
    np.testing.assert_allclose(statistics.entropy("sequence")[0], np.mean(entropies, 0), atol=1e-5)
    np.testing.assert_allclose(statistics.entropy(by="sequence")[0], np.mean(token_entropies, 0), atol=1e-5)
    assert statistics.sequences().tolist() == [3]


def test_generation_counts_prefill_and_decode_apart(routed: mr.RoutedModel) -> None:
    inputs = padded([6, 3], "left")
    with routed.record(sequences=True) as rec, rec.labels("x", items=["a", "b"]):
        routed.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    statistics = rec.statistics()
    assert (statistics.tokens("prefill") == 9).all()
    assert (statistics.tokens("decode") == 2 * 4).all()  # the last token is never fed back
    assert statistics.sequences().tolist() == statistics.sequences("decode").tolist() == [2]
    assert statistics.store is not None
    assert statistics.store.tokens("b", "x").tolist() == [3 + 4] * 3
    # a sequence's average over both phases is over all its tokens
    together = statistics.store.counts("a", "x") + statistics.store.counts("b", "x")
    np.testing.assert_array_equal(together, statistics.token_sum("counts")[0])
    only = [statistics.frequency(phase)[0].sum(-1) for phase in ("prefill", "decode", None)]
    np.testing.assert_allclose(only, 2.0)


def test_chunked_prefill_is_the_same_sequence(routed: mr.RoutedModel) -> None:
    inputs = padded([8, 5], "left")
    with routed.record(sequences=True) as whole, whole.labels("x", items=[1, 2]):
        run(routed, inputs)
    with routed.record(sequences=True) as chunked, chunked.labels("x", items=[1, 2]):
        mask = inputs["attention_mask"]
        first = run(routed, {"input_ids": inputs["input_ids"][:, :5], "attention_mask": mask[:, :5]}, use_cache=True)
        cache = first.past_key_values
        run(routed, {"input_ids": inputs["input_ids"][:, 5:], "attention_mask": mask}, past_key_values=cache)
    a, b = whole.statistics(), chunked.statistics()
    np.testing.assert_array_equal(a.token_sum("counts"), b.token_sum("counts"))
    np.testing.assert_allclose(a.token_sum("probability"), b.token_sum("probability"), atol=1e-5)
    np.testing.assert_allclose(a.mean_distribution(), b.mean_distribution(), atol=1e-6)
    assert a.sequences().tolist() == b.sequences().tolist() == [2]
    assert a.metadata["fingerprint"] == b.metadata["fingerprint"]


def test_without_labels_a_call_with_a_past_goes_on_and_one_without_begins_anew(routed: mr.RoutedModel) -> None:
    ids = tokens(2, 6)
    with routed.record() as rec:
        first = run(routed, {"input_ids": ids}, use_cache=True)
        run(routed, {"input_ids": ids[:, :1]}, past_key_values=first.past_key_values)
        assert rec.statistics().sequences().tolist() == [0]  # not finished yet
        assert "2 sequences still running: tokens so far are counted" in repr(rec.statistics())
        run(routed, {"input_ids": ids})
        assert rec.statistics().sequences().tolist() == [2]
    assert rec.statistics().sequences().tolist() == [4]
    assert "running" not in repr(rec.statistics())
    assert rec.statistics().sequences("decode").tolist() == [2]


def test_one_name_for_all_batches_of_a_block(routed: mr.RoutedModel) -> None:
    with routed.record(groups=["x", "y"]) as rec, rec.labels("y"):
        run(routed, {"input_ids": tokens(4, 6)})
        run(routed, {"input_ids": tokens(3, 5)})
    statistics = rec.statistics()
    assert statistics.sequences().tolist() == [0, 7]
    assert statistics.tokens()[:, 0].tolist() == [0, 39]


def test_two_halves_merge_to_the_whole(routed: mr.RoutedModel) -> None:
    batches = [(padded([7, 4, 9], "right", seed), ["x", "y", "x"], [seed, seed, -seed]) for seed in range(1, 5)]

    def record(part: list[Any]) -> mr.RoutingStatistics:
        with routed.record(groups=["x", "y"], sequences=True) as rec:
            for inputs, groups, items in part:
                with rec.labels(groups, items):
                    run(routed, inputs)
        return rec.statistics()

    whole, one, two = record(batches), record(batches[:2]), record(batches[2:])
    assert one + two == whole
    assert two + one == whole
    assert one != whole
    assert (one + two).metadata["fingerprint"] == whole.metadata["fingerprint"]
    merged = (one + two).store
    assert merged is not None
    assert whole.store is not None
    assert merged.content_hash() == whole.store.content_hash()


def test_groups_side_by_side_are_what_they_are_alone(routed: mr.RoutedModel) -> None:
    ids = tokens(4, 6)
    with routed.record(groups=["x", "y"]) as mixed, mixed.labels(["x", "y", "y", "x"]):
        run(routed, {"input_ids": ids})
    for group, rows in (("x", [0, 3]), ("y", [1, 2])):
        with routed.record(groups=[group]) as alone:
            run(routed, {"input_ids": ids[rows]})
        part = mixed.statistics().select(groups=[group])
        np.testing.assert_array_equal(part.token_sum("counts"), alone.statistics().token_sum("counts"))
        np.testing.assert_allclose(part.mean_distribution(), alone.statistics().mean_distribution(), atol=1e-6)


@pytest.mark.parametrize("form", ["names", "ids", "numpy", "tensor", "tuple"])
def test_forms_of_groups(routed: mr.RoutedModel, form: str) -> None:
    names = ["x", "y", "y"]
    forms: dict[str, Any] = {"names": names, "ids": [0, 1, 1], "tuple": tuple(names), "numpy": np.array(names)}
    forms["tensor"] = torch.tensor([0, 1, 1])
    with routed.record(groups=["x", "y"]) as rec, rec.labels(forms[form]):
        run(routed, {"input_ids": tokens(3, 6)})
    assert rec.statistics().tokens()[:, 0].tolist() == [6, 12]


def test_labels_per_token(routed: mr.RoutedModel) -> None:
    inputs = padded([6, 4], "left")
    labels = [["x", "x", "y", "y", "y", "x"], ["y", "y", "y", "y", "y", "x"]]
    with ByHand(routed.model) as hand, routed.record(sequences=True) as rec, rec.labels(labels, items=["a", "b"]):
        run(routed, inputs)
    statistics = rec.statistics()
    assert statistics.store is not None
    real = inputs["attention_mask"].bool().numpy()
    for index, group in enumerate(statistics.groups):
        keep = real & (np.array(labels) == group)
        np.testing.assert_array_equal(statistics.token_sum("counts")[index], hand.sums(keep)["counts"])
        for row, item in enumerate("ab"):
            alone = keep.copy()
            alone[1 - row] = False
            np.testing.assert_array_equal(statistics.store.counts(item, group), hand.sums(alone)["counts"])
    assert statistics.sequences().tolist() == [2, 2]


def test_labels_per_token_follow_chunks_and_last_while_generating(routed: mr.RoutedModel) -> None:
    labels = [["x", "x", "y", "y"], ["x", "y", "y", "x"]]
    with routed.record(groups=["x", "y"]) as rec, rec.labels(labels):
        routed.model.generate(tokens(2, 4), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    statistics = rec.statistics()
    assert statistics.tokens("prefill")[:, 0].tolist() == [4, 4]
    assert statistics.tokens("decode")[:, 0].tolist() == [3, 3]


def test_a_mask_counts_only_its_tokens(routed: mr.RoutedModel) -> None:
    inputs = padded([6, 4], "right")
    span = torch.zeros(2, 6, dtype=torch.bool)
    span[:, 2:5] = True
    with ByHand(routed.model) as hand, routed.record() as rec, rec.labels("x", count_mask=span):
        run(routed, inputs)
    keep = span.numpy() & inputs["attention_mask"].bool().numpy()
    np.testing.assert_array_equal(rec.statistics().token_sum("counts")[0], hand.sums(keep)["counts"])
    assert rec.statistics().tokens()[0, 0] == 5
    assert "tokens outside the masks of the labels" in rec.statistics().metadata["masked"]


def test_pause_counts_nothing_and_the_sequence_goes_on(routed: mr.RoutedModel) -> None:
    ids = tokens(2, 6)
    with routed.record(sequences=True) as rec, rec.labels("x", items=[1, 2]):
        run(routed, {"input_ids": ids})
        with rec.pause():
            run(routed, {"input_ids": tokens(5, 3)})
            with rec.pause():
                run(routed, {"input_ids": ids})
            run(routed, {"input_ids": ids})
        run(routed, {"input_ids": ids})
    statistics = rec.statistics()
    assert (statistics.tokens() == 24).all()
    assert statistics.store is not None
    assert statistics.store.tokens(1, "x").tolist() == [12] * 3


def test_only_some_phases(routed: mr.RoutedModel) -> None:
    with routed.record(phases=["prefill"]) as rec:
        routed.model.generate(tokens(2, 4), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    statistics = rec.statistics()
    assert statistics.tokens("prefill")[0, 0] == 8
    assert statistics.tokens("decode")[0, 0] == 0
    assert statistics.metadata["masked"] == ["decode tokens", "padding"]


def test_large_batches_and_new_groups_make_the_tables_grow(routed: mr.RoutedModel) -> None:
    with routed.record() as rec:
        for batch in (3, 20, 5):
            names = [f"g{i % batch}" for i in range(batch)]
            with rec.labels(names):
                run(routed, {"input_ids": tokens(batch, 4)})
    statistics = rec.statistics()
    assert statistics.groups == tuple(f"g{i}" for i in range(20))
    assert statistics.tokens()[:, 0].tolist() == [12] * 3 + [8] * 2 + [4] * 15
    assert statistics.sequences().tolist() == [3] * 3 + [2] * 2 + [1] * 15


def test_returned_sequences_and_beams_belong_to_the_one_they_grew_from(routed: mr.RoutedModel) -> None:
    for more in ({"do_sample": True, "num_return_sequences": 3}, {"do_sample": False, "num_beams": 2}):
        ways = 3 if more["do_sample"] else 2
        with routed.record(sequences=True) as rec, rec.labels(["x", "y"], items=[1, 1]):
            routed.model.generate(tokens(2, 4), max_new_tokens=4, min_new_tokens=4, **more)
        statistics = rec.statistics()
        assert statistics.tokens("prefill")[:, 0].tolist() == [4 * ways] * 2
        assert statistics.tokens("decode")[:, 0].tolist() == [3 * ways] * 2
        assert statistics.sequences().tolist() == [1, 1]
        assert statistics.store is not None
        assert statistics.store.tokens(1, "y").tolist() == [7 * ways] * 3


def test_training_steps_are_recorded_once(model: nn.Module, routed: mr.RoutedModel) -> None:
    ids = tokens(2, 6)
    with routed.record() as rec:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    assert (rec.statistics().tokens() == 12).all()


def test_a_recorder_can_be_entered_again(routed: mr.RoutedModel) -> None:
    rec = routed.record()
    for _ in range(2):
        with rec:
            run(routed, {"input_ids": tokens(2, 4)})
        run(routed, {"input_ids": tokens(2, 4)})
    assert (rec.statistics().tokens() == 16).all()
    assert rec.statistics().sequences().tolist() == [4]


def test_a_block_that_broke_off_leaves_its_sequences_out(
    routed: mr.RoutedModel, caplog: pytest.LogCaptureFixture
) -> None:
    with routed.record(sequences=True) as rec:
        with pytest.raises(RuntimeError, match="same number of dimensions"), rec.labels("x", items=[1, 2]):
            torch.cat([run(routed, {"input_ids": tokens(2, 4)}).logits, torch.ones(2)])
        with rec.labels("x", items=[3]):
            run(routed, {"input_ids": tokens(1, 4)})
    statistics = rec.statistics()
    assert statistics.sequences().tolist() == [1]
    assert statistics.store is not None
    assert statistics.store.keys() == [(3, "x")]
    assert statistics.metadata["abandoned_sequences"] == 2
    assert "2 sequences broke off" in caplog.text


def test_the_fingerprint_says_what_was_run(routed: mr.RoutedModel) -> None:
    def fingerprint(ids: torch.Tensor, items: list[int], group: str = "x") -> str:
        with routed.record() as rec, rec.labels(group, items=items):
            run(routed, {"input_ids": ids})
        return rec.statistics().metadata["fingerprint"]

    ids = tokens(2, 6)
    base = fingerprint(ids, [1, 2])
    with routed.record() as rec:  # in other batches, padded otherwise, under another order of groups
        with rec.labels(["other", "x"], items=[0, 2]):
            run(routed, {"input_ids": ids})
        with rec.labels("x", items=[1]):
            padding = torch.cat([torch.zeros_like(ids[:1]), ids[:1]], 1)
            run(routed, {"input_ids": padding, "attention_mask": padding.clamp(max=1)})
    with routed.record() as other, other.labels("other", items=[0]):
        run(routed, {"input_ids": ids[:1]})
    difference = int(rec.statistics().metadata["fingerprint"], 16) - int(other.statistics().metadata["fingerprint"], 16)
    assert f"{difference % (1 << 128):032x}" == base
    assert base == fingerprint(ids.flip(0), [2, 1])
    assert base != fingerprint(ids, [2, 1])
    assert base != fingerprint(ids, [1, 2], "y")
    changed = ids.clone()
    changed[1, 5] = 3 + (int(changed[1, 5]) == 3)
    assert base != fingerprint(changed, [1, 2])


def test_offloaded_routers_are_counted_where_they_run() -> None:
    accelerate = pytest.importorskip("accelerate")
    inputs = padded([6, 4])
    with mr.attach(tiny_model("qwen3_moe")) as routed, routed.record() as plain:
        run(routed, inputs)
    model = tiny_model("qwen3_moe")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.layers[0].mlp.gate.parameters()).device.type == "meta"
    plan = mr.Plan.force_on({0: [3]})
    with mr.attach(model) as routed, routed.record() as offloaded:
        run(routed, inputs)
        with routed.steer(plan):
            run(routed, inputs)
    counts = offloaded.statistics().token_sum("natural_counts")[0, 0]
    np.testing.assert_array_equal(counts, 2 * plain.statistics().token_sum("counts")[0, 0])
    assert offloaded.statistics().scalar("steered")[0].tolist() == [10, 0, 0]


def test_progress_is_shown_only_when_asked_for(routed: mr.RoutedModel, capsys: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        with routed.record(progress=progress):
            run(routed, {"input_ids": tokens(3, 4)})
        assert ("3 sequences" in capsys.readouterr().err) is progress


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.exhaustive), False])
def test_a_compiled_model_is_recorded_and_steered_the_same(whole: bool) -> None:
    model, ids = tiny_model("qwen3_moe", head=True, num_hidden_layers=2), tokens(2, 6)
    model.set_experts_implementation("batched_mm")
    plan = mr.Plan.force_on({0: [3]}).only(groups="y")

    def record(called: Any) -> mr.RoutingStatistics:
        with routed.record(sequences=True, trace=whole) as rec, torch.no_grad():
            for item in range(2):
                with rec.labels(["x", "y"], items=[item] * 2):
                    called(ids)
            with routed.steer(plan), rec.labels(["y", "x"], items=[2, 2]):
                called(ids)
        assert whole is False or len(rec.trace()) == 3 * ids.numel()
        return rec.statistics()

    with mr.attach(model) as routed:
        plain = record(model)
        if whole:
            compiled = torch.compile(model, backend="eager")
        else:
            compiled, model.forward = model, torch.compile(model.forward, backend="eager", fullgraph=True)
        again = record(compiled)
    np.testing.assert_array_equal(again.token_sum("counts"), plain.token_sum("counts"))
    assert again.scalar("steered").tolist() == plain.scalar("steered").tolist() == [[0, 0], [6, 0]]
    assert again.sequences().tolist() == [3, 3]
    assert again.metadata["fingerprint"] == plain.metadata["fingerprint"]


def test_sequences_in_a_folder(routed: mr.RoutedModel, tmp_path: Path) -> None:
    with routed.record(sequences=tmp_path / "run", memory_bytes=1) as rec:
        for item in range(3):
            with rec.labels(["x", "y"], items=[item] * 2):
                run(routed, {"input_ids": tokens(2, 5, item)})
    store = rec.statistics().store
    assert store is not None
    again = SequenceStore.load(tmp_path / "run")
    assert again.keys() == store.keys() == [(item, group) for item in range(3) for group in "xy"]
    assert again.content_hash() == store.content_hash()
    with pytest.raises(FileExistsError, match="another recording"):
        routed.record(sequences=tmp_path / "run")
    with pytest.raises(ValueError, match="names no folder"):
        routed.record(sequences="")
    with pytest.raises(FileNotFoundError, match=f"there is no folder {tmp_path / 'mistyped'}"):
        routed.record(sequences=tmp_path / "mistyped" / "run")
    first = routed.record(sequences=tmp_path / "two")
    with pytest.raises(FileExistsError, match="another recording writes its sequences to"):
        routed.record(sequences=tmp_path / "two")
    assert not first.on


def test_a_full_disk_ends_the_recording_and_loses_nothing(
    routed: mr.RoutedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    def record() -> None:
        with rec, rec.labels("x", items=[1, 2]):
            run(routed, {"input_ids": tokens(2, 4)})
            monkeypatch.setattr(files, "write", full)

    rec = routed.record(sequences=tmp_path / "run")
    with pytest.raises(OSError, match="No space left"):
        record()
    assert not rec.on
    run(routed, {"input_ids": tokens(2, 4)})
    monkeypatch.undo()
    store = rec.statistics().store
    assert store is not None
    assert store.tokens(2, "x").tolist() == [4] * 3
    rec.statistics().save(tmp_path / "elsewhere")
    kept = mr.RoutingStatistics.load(tmp_path / "elsewhere").store
    assert kept is not None
    assert kept.keys() == [(1, "x"), (2, "x")]
    assert kept.content_hash() == store.content_hash()


def test_embeddings_in_place_of_ids(model: nn.Module, routed: mr.RoutedModel) -> None:
    with routed.record() as rec:
        run(routed, {"inputs_embeds": model.get_input_embeddings()(tokens(2, 6))})
    assert (rec.statistics().tokens() == 12).all()


def test_the_entropy_of_tokens_is_kept_by_sequence_without_the_scores_of_all_experts(routed: mr.RoutedModel) -> None:
    inputs = padded([7, 2])
    with ByHand(routed.model) as hand, routed.record(metrics=["counts"]) as rec:
        run(routed, inputs)
    keep = inputs["attention_mask"].bool().numpy()
    means = [hand.entropy(keep & (np.arange(2) == row)[:, None]) / keep[row].sum() for row in range(2)]
    np.testing.assert_allclose(rec.statistics().entropy(by="sequence")[0], np.mean(means, 0), atol=1e-5)
    assert (rec.statistics().sequence_scalar("full") == 2).all()
    with routed.record(entropy=False) as rec:
        run(routed, inputs)
    assert not rec.statistics().sequence_scalar("mean_token_entropy").any()
    with pytest.raises(ValueError, match="token entropy was not recorded"):
        rec.statistics().entropy(by="sequence")


def test_planes_that_were_not_recorded_are_named(routed: mr.RoutedModel) -> None:
    with routed.record(metrics=["counts"], entropy=False) as rec:
        run(routed, {"input_ids": tokens(2, 6)})
    statistics = rec.statistics()
    np.testing.assert_allclose(statistics.frequency().sum(-1), 2)
    for read in (statistics.mean_distribution, lambda: statistics.token_sum("probability"), statistics.entropy):
        with pytest.raises(ValueError, match="was not recorded"):
            read()


# ---- what is refused


def test_unknown_groups_are_refused_with_the_known_ones(routed: mr.RoutedModel) -> None:
    with routed.record(groups=["x", "y"]) as rec:
        for groups, why in ((["x", "z"], "unknown group 'z'.* x, y"), ([0, 2], "group id 2 is out of range")):
            with pytest.raises(ValueError, match=why), rec.labels(groups):
                pytest.fail("the block was entered")
        with pytest.raises(TypeError, match="a name or an id"), rec.labels([1.5]):
            pytest.fail("the block was entered")
        with pytest.raises(RecordingError, match="which of x, y"):
            run(routed, {"input_ids": tokens(1, 4)})
        with rec.labels("x"):
            run(routed, {"input_ids": tokens(1, 4)})
    assert rec.statistics().tokens()[:, 0].tolist() == [4, 0]


def test_labels_that_do_not_fit_are_refused(routed: mr.RoutedModel) -> None:
    with routed.record(sequences=True) as rec:
        with pytest.raises(ValueError, match="3 groups, 2 items"), rec.labels(["x"] * 3, items=[1, 2]):
            pytest.fail("the block was entered")
        with pytest.raises(ValueError, match="sequences without an id"), rec.labels("x", items=["#1"]):
            pytest.fail("the block was entered")
        with pytest.raises(TypeError, match="a string or an integer"), rec.labels("x", items=[1.5]):
            pytest.fail("the block was entered")
        with pytest.raises(ValueError, match="of no sequences"), rec.labels([]):
            pytest.fail("the block was entered")
        with pytest.raises(ValueError, match="mask must be bool"), rec.labels("x", count_mask=[1, 0]):
            pytest.fail("the block was entered")
        with pytest.raises(ValueError, match="rectangular"), rec.labels([["x", "y"], ["x"]]):
            pytest.fail("the block was entered")
        with pytest.raises(RecordingError, match=r"names 3 sequences.*batch of 4"), rec.labels(["x"] * 3):
            run(routed, {"input_ids": tokens(4, 4)})
        with rec.labels("x"), pytest.raises(RecordingError, match="inside labels"), rec.labels("y"):
            pytest.fail("the block was entered")
    with pytest.raises(RecordingError, match="outside the recording"), rec.labels("x"):
        pytest.fail("the block was entered")


def test_an_item_is_recorded_once_for_a_group(routed: mr.RoutedModel) -> None:
    with routed.record(sequences=True) as rec:
        with rec.labels(["x", "y"], items=[1, 1]):
            run(routed, {"input_ids": tokens(2, 4)})
        for groups, items in ((["y", "x"], [2, 1]), (["x", "x"], [3, 3])):
            with pytest.raises(ValueError, match="given already"), rec.labels(groups, items):
                pytest.fail("the block was entered")
    assert rec.statistics().sequences().tolist() == [1, 1]


def test_sequences_without_items_pair_with_nothing(routed: mr.RoutedModel) -> None:
    with routed.record(sequences=True) as rec:
        for group in ("x", "y"):
            with rec.labels([group] * 2):
                run(routed, {"input_ids": tokens(2, 4)})
    store = rec.statistics().store
    assert store is not None
    assert store.keys() == [("#0", "x"), ("#1", "x"), ("#2", "y"), ("#3", "y")]
    assert store.paired_items("x", "y") == []


def test_bad_options_are_refused(routed: mr.RoutedModel) -> None:
    for options, why in (
        ({"groups": "x"}, "list of different names"),
        ({"groups": ["x", "x"]}, "list of different names"),
        ({"metrics": ["count"]}, "metrics are some of counts"),
        ({"phases": ["encode"]}, "phases are some of prefill"),
        ({"trace": [3]}, "no layer 3 to trace"),
    ):
        with pytest.raises(ValueError, match=why):
            routed.record(**options)


def test_a_recording_without_calls_is_refused(routed: mr.RoutedModel) -> None:
    with routed.record() as rec:
        pass
    with pytest.raises(RecordingError, match="was not called inside the recording"):
        rec.statistics()


def test_layers_of_different_width() -> None:
    stub = StubModel([4, 9])
    logits = [torch.randn(6, n, generator=torch.Generator().manual_seed(n)) for n in (4, 9)]
    with Recorder(stub, sequences=True) as rec:
        stub(rec, logits)
    statistics = rec.statistics()
    assert statistics.num_experts == (4, 9)
    for layer, values in enumerate(logits):
        p = torch.softmax(values.double(), -1).mean(0).numpy()
        np.testing.assert_allclose(statistics.mean_distribution()[0, layer, : len(p)], p, atol=1e-6)
        assert (statistics.mean_distribution()[0, layer, len(p) :] == 0).all()
    frame = statistics.to_pandas()
    assert len(frame) == 2 * (4 + 9)
    assert frame["counts"].sum() == 2 * 6 * 2


call_sizes = st.tuples(st.sampled_from(["prefill", "decode"]), st.integers(1, 5))
sequence = st.tuples(st.sampled_from(["x", "y", "z"]), st.lists(call_sizes, min_size=1, max_size=3))


@given(st.lists(sequence, min_size=1, max_size=6), st.data())
def test_any_split_of_the_sequences_merges_to_the_whole(sequences: list[Any], data: st.DataObject) -> None:
    def record(indices: list[int]) -> mr.RoutingStatistics:
        stub = StubModel([4, 6])
        with Recorder(stub) as rec:
            for index in indices:
                group, calls = sequences[index]
                with rec.labels(group, items=[index]):
                    for number, (phase, length) in enumerate(calls):
                        random = torch.Generator().manual_seed(100 * index + number)
                        stub(rec, [torch.randn(length, n, generator=random) for n in (4, 6)], phase)
        return rec.statistics()

    order = data.draw(st.permutations(range(len(sequences))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(order)), max_size=3)) | {0, len(order)})
    parts = [record(order[a:b]) for a, b in itertools.pairwise(cuts)]
    whole = record(list(range(len(sequences))))
    assert sum(parts) == whole
    assert whole.sequences().sum() == len(sequences)
    assert whole.tokens()[:, 0].sum() == sum(length for _, calls in sequences for _, length in calls)


def test_silent_captures_are_refused() -> None:
    stub = StubModel([4, 4], silent=True)
    with Recorder(stub) as rec:
        stub(rec, [torch.randn(6, 4)] * 2)
    with pytest.raises(RecordingError, match="reached no router"):
        rec.statistics()


def test_a_broken_table_is_noticed_when_read() -> None:
    stub = StubModel([4, 4])
    with Recorder(stub) as rec:
        stub(rec, [torch.randn(6, 4)] * 2)
        stub.tables[1].metric("counts")[0, 2] += 1
        with pytest.raises(RecordingError, match=r"do not add up to the slots.*layers\.1"):
            rec.statistics()
        stub.tables[1].metric("counts")[0, 2] -= 1
        stub.tables[0].metric("probability")[0, 1] += 1 << 40
        with pytest.raises(RecordingError, match=r"probability mass.*layers\.0"):
            rec.statistics()
        stub.tables[0].metric("probability")[0, 1] -= 1 << 40
    assert rec.statistics().tokens().tolist() == [[6, 6]]


@pytest.mark.parametrize("labeled", [False, True])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_a_sequence_whose_call_failed_is_left_out(model: nn.Module, kind: type[BaseException], labeled: bool) -> None:
    """Also where the failure was caught inside the block, and the next call went well."""

    def fail(*_: object) -> None:
        raise kind

    with mr.attach(model) as routed, routed.record(sequences=True) as recorder:
        run(routed, {"input_ids": tokens(1, 4)})
        with recorder.labels(["x"], items=[1]) if labeled else nullcontext():
            stop = model.model.layers[1].register_forward_pre_hook(fail)
            with pytest.raises(kind):
                run(routed, {"input_ids": tokens(1, 4)})
            stop.remove()
            run(routed, {"input_ids": tokens(1, 5)})
        run(routed, {"input_ids": tokens(1, 6)})
    statistics = recorder.statistics()
    assert statistics.sequences().sum() == (2 if labeled else 3)
    assert statistics.metadata["abandoned_sequences"] == 1
    assert statistics.tokens().sum(0)[1:].tolist() == [15, 15]  # the failed call reached the first layer alone


def test_ending_a_recorder_that_did_not_begin_leaves_the_other_on(model: nn.Module) -> None:
    with mr.attach(model) as routed:
        other = routed.record()
        with routed.record() as recorder:
            with pytest.raises(RuntimeError, match="a recording is on already"):
                other.__enter__()
            other.__exit__(None, None, None)
            run(routed, {"input_ids": tokens(1, 4)})
        assert recorder.statistics().tokens().max() == 4
