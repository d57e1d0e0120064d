"""What is written is what its readers take: shapes, dtypes, numbers; and it is read again to the same."""

from __future__ import annotations

import base64
import csv
import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moe_route import convert
from moe_route.convert.traces import RoutedSequence, trace_of
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan

COUNTS = np.array([[[4, 2, 0], [1, 2, 3]], [[0, 2, 2], [2, 2, 0]]])  # two groups, 2 layers, 3 experts, top-2


def statistics(layers=("model.layers.1.mlp.gate", "model.layers.3.mlp.gate")) -> RoutingStatistics:
    return RoutingStatistics.from_token_sums(
        ["a", "b"], counts=COUNTS, tokens=np.array([3, 2]), top_k=2, layers=layers, num_experts=3
    )


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt", ".json"])
def test_eplb_weights_are_counts_of_layers_and_experts(suffix, tmp_path):
    path = tmp_path / f"weight{suffix}"
    convert.write(statistics(), path, "eplb")
    read = {
        ".npy": lambda: np.load(path),
        ".safetensors": lambda: load_file(path)["weight"].numpy(),
        ".pt": lambda: torch.load(path, weights_only=True).numpy(),
        ".json": lambda: np.array(json.loads(path.read_text())),
    }
    found = read[suffix]()
    np.testing.assert_array_equal(found, COUNTS.sum(0))
    assert found.dtype == np.int64
    np.testing.assert_array_equal(convert.read(path, top_k=2).token_sum("counts")[0], found)


def test_eplb_weights_of_some_groups(tmp_path):
    convert.write(statistics(), tmp_path / "w.npy", "eplb", groups=["b"])
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), COUNTS[1])


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_logical_counts_of_sglang_have_a_row_for_dense_layers(suffix, tmp_path):
    path = tmp_path / f"count{suffix}"
    convert.write(statistics(), path, "sglang")
    content = torch.load(path, weights_only=True) if suffix == ".pt" else json.loads(path.read_text())
    expected = np.zeros((4, 3), int)
    expected[[1, 3]] = COUNTS.sum(0)
    np.testing.assert_array_equal(np.asarray(content["logical_count"]), expected)
    again = convert.read(path, top_k=2)
    assert again.layers == ("1", "3")
    with pytest.raises(ValueError, match="'first' and others do not say which they are"):
        convert.write(statistics(("first", "second")), path, "sglang")


IDS = np.array([[[0, 2], [1, 3]], [[2, 1], [3, 0]], [[1, 0], [2, 3]]])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_replay_arrays_come_back_as_the_same_trace_and_plan(suffix, layers, tmp_path):
    np.savez(tmp_path / "in.npz", **{"7": IDS, "b": IDS[:2]})
    trace = convert.read(tmp_path / "in.npz")
    if layers:
        np.savez(tmp_path / "in.npz", **{"7": IDS[:, layers], "b": IDS[:2, layers], "layers": np.array([5])})
        trace = convert.read(tmp_path / "in.npz")
        assert trace.layer_numbers == (5,)
    path = tmp_path / f"ids{suffix}"
    convert.write(trace, path, "replay")
    again = convert.read(path)
    assert (again.items, again.layer_numbers) == (trace.items, trace.layer_numbers)
    np.testing.assert_array_equal(again.ids, trace.ids)
    assert Plan.replay(again).hash == Plan.replay(trace).hash == convert.read(path, to="plan").hash


def test_one_sequence_is_an_array_as_engines_return_it(tmp_path):
    np.save(tmp_path / "in.npy", IDS)
    convert.write(convert.read(tmp_path / "in.npy", "replay"), tmp_path / "ids.npy", "replay")
    found = np.load(tmp_path / "ids.npy")
    np.testing.assert_array_equal(found, IDS)
    assert found.dtype == np.int32
    np.save(tmp_path / "in.npy", np.stack([IDS, IDS]))
    with pytest.raises(ValueError, match="one sequence of all layers"):
        convert.write(convert.read(tmp_path / "in.npy", "replay"), tmp_path / "ids.npy", "replay")


def test_a_recorded_trace_is_written_and_replayed(tmp_path):
    import moe_route as mr
    from moe_route.data import demo_corpus, load_demo_model

    model, tokenizer = load_demo_model()
    texts = demo_corpus().subset(["eng_Latn"], limit=2)
    batch = tokenizer(list(texts["eng_Latn"]), padding=True, return_tensors="pt")
    with mr.attach(model) as routed:
        with routed.record(trace=True) as recorder, recorder.labels(groups="eng_Latn", items=texts.items):
            natural = model(**batch).logits
        trace = recorder.trace()
        convert.write(trace, tmp_path / "ids.npz", "replay")
        plan = convert.read(tmp_path / "ids.npz", to="plan")
        with routed.steer(plan), routed.labels(items=texts.items):
            replayed = model(**batch).logits
        experts = routed.routers[0].num_experts
        sums = convert.statistics_of(trace, num_experts=experts)
        np.testing.assert_array_equal(sums.token_sum("counts"), recorder.statistics().token_sum("counts"))
        np.testing.assert_allclose(
            sums.token_sum("weight_share"), recorder.statistics().token_sum("weight_share"), atol=2e-3 * len(trace)
        )
    assert plan == Plan.replay(trace)
    torch.testing.assert_close(replayed, natural)


def npy(encoded: str) -> np.ndarray:
    return np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False)


def test_answers_of_engines_are_written_as_they_give_them(tmp_path):
    """Layers 1 and 3 of the model route; its others are rows of zeros. Two of three tokens are the prompt."""
    sequences = [
        RoutedSequence(IDS, "a", prompt=2),
        RoutedSequence(IDS[::-1][:2], "b", prompt=1),
    ]
    trace = trace_of(sequences, ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate"])
    rows = np.zeros((3, 5, 2), int)
    rows[:, [1, 3]] = IDS

    convert.write(trace, tmp_path / "vllm.jsonl", "vllm-response", num_layers=5)
    first, second = map(json.loads, (tmp_path / "vllm.jsonl").read_text().splitlines())
    assert (first["id"], second["id"]) == ("a", "b")
    assert first["usage"] == {"prompt_tokens": 2, "completion_tokens": 2}  # the last one was never fed
    found = npy(first["choices"][0]["routed_experts"])
    np.testing.assert_array_equal(found, rows)
    assert found.dtype == np.int16

    convert.write(trace, tmp_path / "sglang.jsonl", "sglang-response", num_layers=5)
    about = json.loads((tmp_path / "sglang.jsonl").read_text().splitlines()[0])["meta_info"]
    flat = np.frombuffer(base64.b64decode(about["routed_experts"]), about["routed_experts_dtype"])
    np.testing.assert_array_equal(flat.reshape(3, 5, 2), rows)
    assert (about["id"], about["prompt_tokens"], about["completion_tokens"]) == ("a", 2, 2)

    convert.write(trace, tmp_path / "rank0_routing_replay.pt", "megatron")
    layers = torch.load(tmp_path / "rank0_routing_replay.pt", weights_only=True)
    assert [[list(of.shape) for of in calls] for calls in layers] == [[[3, 2], [2, 2]]] * 2
    np.testing.assert_array_equal(layers[1][0].numpy(), IDS[:, 1])

    again = {
        "vllm": convert.read(tmp_path / "vllm.jsonl"),
        "sglang": convert.read(tmp_path / "sglang.jsonl", num_layers=5, top_k=2),
        "megatron": convert.read(tmp_path / "rank0_routing_replay.pt"),
    }
    for name, one in again.items():
        np.testing.assert_array_equal(one.ids, trace.ids)
        if name != "megatron":  # its file has neither names nor prompts
            assert (one.items, one.layers) == (("a", "b"), ("1", "3"))
            np.testing.assert_array_equal(one.phase, trace.phase)
            assert Plan.replay(one).hash == Plan.replay(trace).hash


def test_answers_need_every_token_and_the_numbers_of_the_layers(tmp_path):
    sequence = RoutedSequence(IDS, "a", first=1)  # its first token was not counted
    with pytest.raises(ValueError, match="token 0 of sequence 'a' has no experts"):
        convert.write(trace_of([sequence], ["0", "1"]), tmp_path / "a.jsonl", "vllm-response")
    whole = trace_of([RoutedSequence(IDS, "a")], ["0", "7"])
    with pytest.raises(ValueError, match="num_layers is 8 or more"):
        convert.write(whole, tmp_path / "a.jsonl", "sglang-response", num_layers=7)
    with pytest.raises(ValueError, match="do not say which they are"):
        convert.write(
            trace_of([RoutedSequence(IDS, "a")], ["first", "second"]),
            tmp_path / "a.jsonl",
            "vllm-response",
        )


def test_easysteer_configurations_come_back(tmp_path):
    plan = (
        Plan.force_on({4: [1]}, weight="steermoe")
        + Plan.force_off({4: [5], 6: [0, 2]}, weight="steermoe")
        + Plan.activate({5: [0, 3]}, strength=0.75, correction=1)
    )
    convert.write(plan, tmp_path / "steer.json", "easysteer", first_layer=1)
    content = json.loads((tmp_path / "steer.json").read_text())["layer_configs"]
    assert content == {
        "5": {"mode": "activate", "activate_ids": [1], "deactivate_ids": [5]},
        "6": {"mode": "soft", "expert_ids": [0, 3], "lambda": 0.75},
        "7": {"mode": "activate", "deactivate_ids": [0, 2]},
    }
    assert convert.read(tmp_path / "steer.json", first_layer=1) == plan


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan.force_on({0: [1]}), "has no rule such as"),
        (Plan.activate({0: [1]}), "has no rule such as"),
        (Plan.force_on({0: [1]}, weight="steermoe").only(phase="decode"), "for all tokens"),
        (Plan.activate({0: {1: 1.0, 2: 2.0}}, correction=1), "one strength in a layer"),
        (
            Plan.activate({0: [1]}, correction=1) + Plan.force_off({0: [2]}, weight="steermoe"),
            "layer 0 has (both|more): split it",
        ),
    ],
)
def test_rules_that_easysteer_lacks_are_refused(plan, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert.write(plan, tmp_path / "x.json", "easysteer")
    assert not (tmp_path / "x.json").exists()


def test_tables_and_json(tmp_path):
    pytest.importorskip("pandas")
    convert.write(statistics(), tmp_path / "s.csv", "csv")
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    kept = [
        row for row in rows if (row["group"], row["phase"], row["layer"], row["expert"]) == ("b", "prefill", "1", "0")
    ]
    assert [row["counts"] for row in kept] == ["2"]
    selection = ExpertSelection({2: [1, 0]}, scores={2: {1: 0.5}})
    convert.write(selection, tmp_path / "e.csv", "csv")
    assert (tmp_path / "e.csv").read_text().splitlines() == ["layer,expert,score", "2,0,", "2,1,0.5"]
    convert.write(statistics(), tmp_path / "s.json", "json")
    content = json.loads((tmp_path / "s.json").read_text())
    assert (content["counts"], content["tokens"]) == (COUNTS.tolist(), [[3, 3], [2, 2]])
    convert.write(selection, tmp_path / "e.json", "json")
    assert ExpertSelection.from_dict(json.loads((tmp_path / "e.json").read_text())) == selection
    convert.write(Plan.forbid({0: [1]}), tmp_path / "p.json", "json")
    assert convert.read(tmp_path / "p.json") == Plan.forbid({0: [1]})


@pytest.mark.parametrize(
    ("value", "name", "to", "message"),
    [
        (1, "x.npy", None, "a int is not written: give statistics"),
        (Plan(), "x.npy", "eplb", "eplb holds statistics, not a plan"),
        (Plan(), "x.json", "sglng", "no format 'sglng' to write: one of"),
        (statistics(), "x.txt", "eplb", "eplb is written as .npy"),
    ],
)
def test_what_cannot_be_written_is_refused(value, name, to, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert.write(value, tmp_path / name, to)
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_of_a_writer_is_refused(tmp_path):
    np.save(tmp_path / "in.npy", IDS)
    trace = convert.read(tmp_path / "in.npy", "replay")
    with pytest.raises(ValueError, match="replay takes no groups=: leave it out"):
        convert.write(trace, tmp_path / "x.npy", "replay", groups=["a"])
    with pytest.raises(ValueError, match="no group 'c'"):
        convert.write(statistics(), tmp_path / "x.npy", "eplb", groups=["c"])
