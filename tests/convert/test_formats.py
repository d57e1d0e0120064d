"""Every format is recognized, read to hand-computed numbers, loads again after saving, and is refused if not whole."""

from __future__ import annotations

import base64
import collections
import contextlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_route import convert
from moe_route.base.files import FileRefusedError
from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan

IDS = np.array([[[0, 2], [1, 3]], [[2, 1], [3, 0]], [[1, 0], [2, 3]]])  # [3 tokens, 2 layers, top-2], 4 experts
COUNTS = [[2, 2, 2, 0], [1, 1, 1, 3]]  # of IDS


def as_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def as_torch(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def as_pickle(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content))
    return path


def npy(ids: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, ids)
    return base64.b64encode(stream.getvalue()).decode()


def raw(ids: np.ndarray, dtype: str = "int32") -> str:
    return base64.b64encode(ids.astype(dtype).tobytes()).decode()


def gate_sums(folder: Path) -> Path:
    layers = {
        str(layer): {"total_tokens": 3}
        | {str(e): {"activation_tokens": n, "gate_values_sum": n / 2} for e, n in enumerate(counts)}
        for layer, counts in enumerate(COUNTS)
    }
    return as_json(folder / "mgsm_de.json", layers)


def expert_counts(folder: Path) -> Path:
    counts = {0: collections.Counter({e: n for e, n in enumerate(COUNTS[0]) if n}), 7: dict(enumerate(COUNTS[1]))}
    return as_json(folder / "c4.json", counts)


def gpt_oss_example(folder: Path) -> Path:
    rows = [
        {
            f"token_{5 + t}": {
                f"layer_{layer}": {"selected_experts": token[layer].tolist(), "selected_probs": [0.75, 0.25]}
                for layer in range(2)
            }
        }
        for t, token in enumerate(IDS)
    ]
    return as_json(folder / "x_examples.json", {"row_index": 12, "category": "facts", "router_data": rows})


def gpt_oss_analytics(folder: Path) -> Path:
    table = {
        "layer_0": {
            "31": {"prob_density": 0.75, "count_frequency": 3.0},
            "0": {"prob_density": 0.25, "count_frequency": 1},
        }
    }
    content = {"sample_count": 4, "num_think_tokens": 2.5, "num_answer_tokens": 1.0}
    return as_json(folder / "x.json", content | {f"{part}_expert_analytics": table for part in ("think", "answer")})


def esft_choices(folder: Path) -> Path:
    task = folder / "law"
    task.mkdir()
    for layer in range(2):  # two samples: two tokens, one token
        lines = [
            "\t".join(map(str, part[:, layer].ravel())) + "\t\t" + "\t".join(["0.5", "0.25"] * len(part))
            for part in (IDS[:2], IDS[2:])
        ]
        (task / f"expert_weights_{layer + 1}.txt").write_text("\n".join(lines) + "\n")
    return task


def esft_scores(folder: Path) -> Path:
    scores = {"1": {"0": 0.1, "1": 0.6, "2": 0.3}, "2": {"0": 0.4, "1": 0.3, "2": 0.3}}
    return as_json(folder / "summary.json", {"token_scores": scores, "gate_scores": scores})


def esft_experts(folder: Path) -> Path:
    return as_json(folder / "law.json", {"experts": {"1": [3, 0], "2": [1]}, "shared_experts": False})


def sglang(folder: Path) -> Path:
    steps = torch.tensor([COUNTS, COUNTS], dtype=torch.int32)
    return as_torch(
        folder / "dump.pt", {"rank": 0, "logical_count": steps, "average_utilization_rate_over_window": None}
    )


def vllm_load(folder: Path) -> Path:
    owners = np.array([[0, 1, 2, 3, 0], [0, 1, 2, 3, 3]])
    window = np.array([[[1, 2, 2, 0, 1], [1, 1, 1, 1, 2]]])
    np.savez(folder / "load.npz", expert_load_window=window, physical_to_logical_map=owners)
    return folder / "load.npz"


def eplb(folder: Path) -> Path:
    np.save(folder / "weight.npy", np.array(COUNTS, np.float32))
    return folder / "weight.npy"


def replay(folder: Path) -> Path:
    np.savez(folder / "ids.npz", **{"7": IDS.astype(np.uint8), "sequence_1": IDS[:1], "a": IDS[:2]})
    return folder / "ids.npz"


def vllm_response(folder: Path) -> Path:
    answer = {"id": "cmpl-1", "usage": {"prompt_tokens": 2}, "choices": [{"routed_experts": npy(IDS), "text": "x"}]}
    return as_json(folder / "answer.json", answer)


def sglang_response(folder: Path) -> Path:
    about = {"id": "r1", "prompt_tokens": 2, "completion_tokens": 2, "routed_experts": raw(IDS)}
    second = {**about, "id": "r2", "routed_experts": raw(IDS, "uint8"), "routed_experts_dtype": "uint8"}
    lines = [json.dumps({"text": "x", "meta_info": one}) for one in (about, second)]
    (folder / "answers.jsonl").write_text("\n".join(lines))
    return folder / "answers.jsonl"


def megatron(folder: Path) -> Path:
    return as_torch(
        folder / "rank0_routing_replay.pt",
        [[torch.tensor(IDS[:2, layer]), torch.tensor(IDS[2:, layer])] for layer in range(2)],
    )


RISK = np.array([[0.5, -0.25, -0.25], [0.0, 0.25, -0.25]])  # frequency in the first texts minus in the second


def steermoe(folder: Path) -> Path:
    pandas = pytest.importorskip("pandas")
    first = np.array([[4, 0, 0], [2, 1, 1]])
    second = np.array([[2, 1, 1], [2, 0, 2]])
    rows = []
    for layer in range(2):
        for expert in range(3):
            a1, a2 = int(first[layer, expert]), int(second[layer, expert])
            risk = a1 / 4 - a2 / 4
            rows.append({"layer": layer, "expert": expert, "a1": a1, "a2": a2, "d1": 4 - a1, "d2": 4 - a2})
            rows[-1] |= {"risk_diff": risk, "risk_diff_abs": abs(risk), "Layer_Expert": f"L{layer:02d}\nE{expert:02d}"}
    frame = pandas.DataFrame(rows).sort_values(by="risk_diff_abs", ascending=False).reset_index(drop=True)
    frame.to_pickle(folder / "activations.pkl")
    return folder / "activations.pkl"


def easysteer(folder: Path) -> Path:
    layers = {
        "3": {"mode": "deactivate", "expert_ids": [6, 2]},
        "4": {"mode": "steermoe", "activate_ids": [1, 5], "deactivate_ids": [5]},
        "5": {"mode": "soft", "expert_ids": [0], "lambda": 0.75},
        "6": {"mode": "soft_topk", "expert_ids": [0]},
    }
    return as_json(folder / "steer.json", {"layer_configs": layers})


def riy(folder: Path) -> Path:
    pairs = [[0, 3], [0, 1], [4, 7], [0, 3]]
    return as_json(folder / "riy.json", {"version": 1, "model": "m", "workload": "w", "pruned_experts": pairs})


def ascend(folder: Path) -> Path:
    path = folder / "ranked.jsonl"
    path.write_text('{"0":[2,0,3,1]}\n{"1":[1,3,0,2]}\n', "utf-8")
    return path


# format -> (how a file is made, options that it needs)
MADE: dict[str, tuple[Callable[[Path], Path], dict[str, object]]] = {
    "gate-sums": (gate_sums, {}),
    "expert-counts": (expert_counts, {"top_k": 2, "num_experts": 4}),
    "gpt-oss-example": (gpt_oss_example, {}),
    "gpt-oss-analytics": (gpt_oss_analytics, {}),
    "esft-choices": (esft_choices, {"top_k": 2}),
    "esft-scores": (esft_scores, {}),
    "esft-experts": (esft_experts, {}),
    "sglang": (sglang, {"top_k": 2}),
    "vllm-load": (vllm_load, {"top_k": 2}),
    "eplb": (eplb, {"top_k": 2}),
    "replay": (replay, {}),
    "vllm-response": (vllm_response, {}),
    "sglang-response": (sglang_response, {"num_layers": 2, "top_k": 2}),
    "megatron": (megatron, {}),
    "steermoe": (steermoe, {"activate": 1, "deactivate": 2}),
    "easysteer": (easysteer, {}),
    "riy": (riy, {}),
    "ascend": (ascend, {"deactivate": 1}),
}


def read(name: str, folder: Path, **options: object):
    make, needed = MADE[name]
    return convert.read(make(folder), **{**needed, **options})


def test_every_format_has_a_file_here():
    assert convert.FORMATS.keys() - MADE.keys() == {"statistics", "trace", "selection", "plan"}


@pytest.mark.parametrize("name", MADE)
def test_a_file_is_recognized_read_and_loads_again(name, tmp_path):
    found = read(name, tmp_path)
    kind = next(iter(convert.FORMATS[name].gives))
    convert.write(found, tmp_path / "own.safetensors")
    again = convert.read(tmp_path / "own.safetensors")
    assert type(again) is type(found)
    assert kind in convert.TARGETS
    if isinstance(found, Trace):
        np.testing.assert_array_equal(again.ids, found.ids)
    else:
        assert again == found
    assert isinstance(convert.read(MADE[name][0](folder := fresh(tmp_path)), name, **MADE[name][1]), type(found)), (
        folder
    )


def fresh(folder: Path) -> Path:
    (folder / "again").mkdir()
    return folder / "again"


@pytest.mark.parametrize("name", ["gate-sums", "expert-counts", "vllm-load", "eplb"])
def test_statistics_hold_the_counts_and_tokens(name, tmp_path):
    found = read(name, tmp_path)
    np.testing.assert_array_equal(found.token_sum("counts")[0], COUNTS)
    np.testing.assert_array_equal(found.tokens(), [[3, 3]])
    assert (found.num_experts, found.top_k) == ((4, 4), (2, 2))
    assert found.metadata["source"] == "imported"


def test_names_of_groups_and_layers(tmp_path):
    assert read("gate-sums", tmp_path).groups == ("de",)
    counts = read("expert-counts", tmp_path, group="web")
    assert (counts.groups, counts.layers) == (("web",), ("0", "7"))
    np.testing.assert_allclose(read("gate-sums", tmp_path).token_sum("weight_share")[0], np.array(COUNTS) / 2)


def test_pickles_of_counters_are_counts(tmp_path):
    path = as_pickle(tmp_path / "c4.pkl", {0: collections.Counter({np.int64(1): 4, 0: 2})})
    np.testing.assert_array_equal(convert.read(path, top_k=2).token_sum("counts"), [[[2, 4]]])


def test_files_of_several_groups_are_one_recording(tmp_path):
    first, second = gate_sums(tmp_path), gate_sums(fresh(tmp_path))
    second = second.rename(second.parent / "mgsm_zh.json")
    assert convert.read([first, second]).groups == ("de", "zh")
    twice = convert.read([first, first])
    np.testing.assert_array_equal(twice.tokens(), [[6, 6]])


# ---- SGLang and EPLB


def test_sglang_steps_are_added_up(tmp_path):
    found = read("sglang", tmp_path)
    np.testing.assert_array_equal(found.token_sum("counts")[0], 2 * np.array(COUNTS))


def test_sglang_passes_count_the_copies_of_an_expert_together(tmp_path):
    record = {"forward_pass_id": 1, "rank": 0, "gatherer_key": "primary"}
    load = torch.tensor([[1, 2, 1], [0, 0, 0], [4, 0, 0]])  # a dense layer between
    content = {
        "records": [record | {"global_physical_count": load}, record | {"global_physical_count": load}],
        "last_physical_to_logical_map": torch.tensor([[0, 1, 0], [0, 1, 0], [1, 0, 0]]),
    }
    found = convert.read(as_torch(tmp_path / "d.pt", content), top_k=1)
    assert found.layers == ("0", "2")
    np.testing.assert_array_equal(found.token_sum("counts")[0], [[4, 4], [0, 8]])
    two = convert.read([tmp_path / "d.pt", tmp_path / "d.pt"], top_k=1, group="all")  # two ranks
    np.testing.assert_array_equal(two.tokens(), [[16, 16]])


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".pt", ".json", ".npz"])
def test_eplb_weights_in_every_container(suffix, tmp_path):
    path, counts = tmp_path / f"w{suffix}", np.array(COUNTS)
    {
        ".npy": lambda: np.save(path, counts),
        ".npz": lambda: np.savez(path, weight=counts),
        ".pt": lambda: torch.save(torch.tensor(counts), path),
        ".json": lambda: path.write_text(json.dumps(COUNTS)),
        ".safetensors": lambda: save_file({"weight": torch.tensor(counts)}, path),
    }[suffix]()
    np.testing.assert_array_equal(convert.read(path, top_k=2).token_sum("counts")[0], COUNTS)


# ---- traces


@pytest.mark.parametrize("name", ["gpt-oss-example", "vllm-response", "megatron", "esft-choices"])
def test_traces_hold_the_ids(name, tmp_path):
    found = read(name, tmp_path)
    np.testing.assert_array_equal(found.ids, IDS)
    np.testing.assert_array_equal(found.layer_numbers, [0, 1])
    np.testing.assert_array_equal(convert.statistics_of(found, num_experts=4).token_sum("counts").sum(0), COUNTS)


def test_positions_phases_items_and_weights(tmp_path):
    example = read("gpt-oss-example", tmp_path)
    assert (example.items, example.groups) == ((12,), ("facts",))
    np.testing.assert_array_equal(example.position, [5, 6, 7])
    np.testing.assert_array_equal(example.phase, [1, 1, 1])
    np.testing.assert_allclose(example.weights[0, 0], [0.75, 0.25])
    answer = read("vllm-response", tmp_path)
    assert answer.items == ("cmpl-1",)
    np.testing.assert_array_equal(answer.phase, [0, 0, 1])
    assert np.isnan(answer.weights).all()
    samples = read("esft-choices", tmp_path)
    assert (samples.items, samples.layers, samples.groups) == ((0, 1), ("1", "2"), ("law",))
    np.testing.assert_array_equal(samples.sequence, [0, 0, 1])
    texts = read("sglang-response", tmp_path)
    assert texts.items == ("r1", "r2")
    np.testing.assert_array_equal(texts.ids, np.concatenate([IDS, IDS]))
    calls = read("megatron", tmp_path)
    np.testing.assert_array_equal(calls.sequence, [0, 0, 1])


def test_sums_of_a_trace_against_plain_loops(tmp_path):
    trace = read("esft-choices", tmp_path)
    weight, share = np.zeros((2, 2, 4))
    for token in range(3):
        for layer in range(2):
            for slot, raw_weight in enumerate((0.5, 0.25)):
                weight[layer, IDS[token, layer, slot]] += raw_weight
                share[layer, IDS[token, layer, slot]] += raw_weight / 0.75
    found = convert.read(tmp_path / "law", to="statistics", top_k=2, num_experts=4)
    np.testing.assert_allclose(found.token_sum("weight")[0], weight)
    np.testing.assert_allclose(found.token_sum("weight_share")[0], share)
    np.testing.assert_array_equal(trace.ids, IDS)
    phases = convert.statistics_of(read("vllm-response", tmp_path), num_experts=4)
    assert (phases.tokens("prefill").tolist(), phases.tokens("decode").tolist()) == ([[2, 2]], [[1, 1]])
    assert phases.metrics == ("counts",)


def test_replay_arrays_become_a_trace_and_a_plan(tmp_path):
    trace = read("replay", tmp_path)
    assert trace.items == (7, None, "a")
    np.testing.assert_array_equal(trace.sequence, [0, 0, 0, 1, 2, 2])
    np.save(tmp_path / "one.npy", IDS.astype(np.int32))
    assert convert.read(tmp_path / "one.npy", "replay", to="plan") == Plan.replay(IDS, layers=range(2))
    np.save(tmp_path / "batch.npy", np.stack([IDS, IDS]))
    assert len(convert.read(tmp_path / "batch.npy").items) == 2


@pytest.mark.parametrize("empty", [-1, 0])
def test_dense_layers_are_left_out_or_named(empty, tmp_path, caplog):
    whole = np.insert(IDS, 0, empty, axis=1)
    np.save(tmp_path / "ids.npy", whole)
    found = convert.read(tmp_path / "ids.npy", "replay")
    assert (found.layers, found.layer_numbers) == (("1", "2"), (0, 1))
    assert "count as dense" in caplog.text
    assert convert.read(tmp_path / "ids.npy", "replay", layers=[2]).layers == ("2",)
    with pytest.raises(ValueError, match="there is no layer 5"):
        convert.read(tmp_path / "ids.npy", "replay", layers=[5])


def test_steps_and_tokens_are_told_apart_by_the_caller(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 2, 2), int))
    with pytest.raises(ValueError, match="may be eplb or replay: say which"):
        convert.read(tmp_path / "x.npy")


# ---- analytics, selections, plans


def test_gpt_oss_means_are_sums_over_generations(tmp_path):
    found = read("gpt-oss-analytics", tmp_path)
    assert found.groups == ("x think", "x answer")
    np.testing.assert_allclose(found.frequency(by="sequence")[0, 0, [0, 31]], [1, 3])
    np.testing.assert_allclose(found.mean_distribution("topk")[0, 0, [0, 31]], [0.25, 0.75])
    assert found.tokens("decode").tolist() == [[10], [4]]
    assert found.sequences().tolist() == [4, 4]


def test_esft_selections(tmp_path):
    assert read("esft-experts", tmp_path) == {0: (0, 3), 1: (1,)}
    assert read("esft-scores", tmp_path, top_p=0.7) == {0: (1, 2), 1: (0, 1)}
    plan = convert.read(tmp_path / "law.json", to="plan", action="force_on")
    assert plan == Plan.force_on({0: [0, 3], 1: [1]})


def test_steermoe_takes_the_largest_differences_of_each_sign(tmp_path):
    found = read("steermoe", tmp_path)
    assert found == {0: (0, 1, 2)}
    assert found.scores[0] == {0: 0.5, 1: -0.25, 2: -0.25}
    statistics = convert.read(tmp_path / "activations.pkl", to="statistics")
    assert (statistics.groups, statistics.top_k) == (("first", "second"), (1, 1))
    np.testing.assert_allclose(np.subtract(*statistics.frequency(by="token")), RISK)
    both = convert.read(tmp_path / "activations.pkl", to="plan", activate=2, deactivate=1)
    on, off = {0: [0], 1: [1]}, {0: [1]}
    model = {"num_experts": (3, 3)}
    expected = Plan.force_on(on, weight="steermoe") + Plan.force_off(off, weight="steermoe")
    assert both == expected.for_model(**model)
    assert read("steermoe", tmp_path, activate=1, deactivate=0, reverse=True).scores == {0: {1: 0.25}}


def test_experts_that_a_server_prunes(tmp_path):
    assert read("riy", tmp_path) == {0: (1, 3), 4: (7,)}
    assert read("ascend", tmp_path, deactivate=2) == {0: (1, 3), 1: (0, 2)}
    for name, words in (('{"0":[0,1]}\n{"0":[1,0]}\n', "two lines"), ('{"0":[0,2]}\n{"1":[1,0]}\n', "each of its")):
        (tmp_path / "wrong.jsonl").write_text(name, "utf-8")
        with pytest.raises(FileRefusedError, match=words):
            convert.read(tmp_path / "wrong.jsonl", deactivate=1)
    with pytest.raises(FileRefusedError, match="version 1 is read"):
        convert.read(as_json(tmp_path / "riy.json", {"version": 2, "pruned_experts": []}))
    with pytest.raises(FileRefusedError, match="leaves none"):
        read("ascend", tmp_path, deactivate=4)


def test_easysteer_rules(tmp_path):
    expected = (
        Plan.force_off({3: [2, 6], 4: [5]}, weight="steermoe")
        + Plan.force_on({4: [1]}, weight="steermoe")
        + Plan.activate({5: [0]}, strength=0.75, correction=1)
        + Plan.activate({6: [0]}, strength=0.5, correction=1).only(absent=True)
    )
    assert read("easysteer", tmp_path) == expected


# ---- what is refused


def _empty(folder: Path) -> Path:
    (folder / "x.json").touch()
    return folder / "x.json"


def _binary(folder: Path) -> Path:
    (folder / "x").write_bytes(b"\xff\xfe" * 50)
    return folder / "x"


REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, object], str]] = {
    "missing": (lambda folder: folder / "none.json", {}, "does not exist: check the name"),
    "empty": (_empty, {}, "is empty"),
    "unknown": (lambda folder: as_json(folder / "x.json", {"a": 1}), {}, "no known format: give one of"),
    "binary": (_binary, {}, "of no known kind"),
    "other format": (esft_experts, {"format": "sglang"}, "check --from, it looks like esft-experts"),
    "no such format": (esft_experts, {"format": "sgl"}, "no format 'sgl': one of"),
    "unknown option": (esft_experts, {"top_k": 3}, "esft-experts takes no top_k here: it takes first_layer"),
    "no such kind": (eplb, {"to": "plan"}, "eplb gives no plan: it gives statistics"),
    "no top_k": (eplb, {}, "pass top_k"),
    "wrong top_k": (eplb, {"top_k": 4}, "layer 0 has 6 selections, not a multiple of top_k 4"),
    "no num_experts": (vllm_response, {"to": "statistics"}, "pass num_experts"),
    "few experts": (vllm_response, {"to": "statistics", "num_experts": 3}, "expert 3 of 3: check num_experts"),
    "no shape": (sglang_response, {}, "pass num_layers"),
    "wrong shape": (sglang_response, {"num_layers": 5, "top_k": 2}, "check num_layers and top_k"),
    "other shape": (sglang_response, {"num_layers": 1, "top_k": 2}, "experts of 6 tokens, and 3 were fed"),
    "first layer": (esft_experts, {"first_layer": 2}, "check first_layer"),
    "no numbers asked": (steermoe, {}, "say how many experts"),
    "too many asked": (steermoe, {"activate": 9}, "2 experts have such a risk difference, 9 were asked"),
    "esft top_k": (esft_choices, {"top_k": 6}, "is not ids and weights of 6 experts"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_with_the_fix(what, tmp_path):
    make, options, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        convert.read(make(tmp_path), **options)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[0.5, 1.5]], "not whole numbers"),
        ([[1, -1]], "negative"),
        ([[np.nan, 1]], "not finite"),
        ([[0, 0]], "no expert was chosen"),
    ],
)
def test_loads_that_are_no_counts_are_refused(counts, message, tmp_path):
    np.save(tmp_path / "w.npy", np.array(counts))
    with pytest.raises(ValueError, match=message):
        convert.read(tmp_path / "w.npy", top_k=1)


def test_numbers_that_contradict_each_other_are_refused(tmp_path):
    path = gate_sums(tmp_path)
    record = json.loads(path.read_text())
    record["1"]["0"]["activation_tokens"] = 50
    with pytest.raises(FileRefusedError, match=r"do not add up to the slots .*tolerance"):
        convert.read(as_json(path, record), top_k=2)
    del record["1"]["3"]
    with pytest.raises(FileRefusedError, match="layer 1 has 3 experts, layer 0 has 4"):
        convert.read(as_json(path, record))


def test_files_of_other_layers_or_formats_do_not_mix(tmp_path):
    with pytest.raises(ValueError, match="different formats"):
        convert.read([gate_sums(tmp_path), eplb(tmp_path)])
    np.save(tmp_path / "other.npy", np.array(COUNTS)[:1])
    with pytest.raises(ValueError, match="different layers"):
        convert.read([tmp_path / "weight.npy", tmp_path / "other.npy"], top_k=2)
    with pytest.raises(ValueError, match="different layers"):
        convert.read(sorted(esft_choices(tmp_path).iterdir()), top_k=2)


def test_an_expert_twice_is_refused(tmp_path):
    wrong = IDS.copy()
    wrong[1, 1] = 3
    np.save(tmp_path / "x.npy", wrong)
    with pytest.raises(FileRefusedError, match="token 1 has an expert twice in layer 1"):
        convert.read(tmp_path / "x.npy", "replay")


@pytest.mark.parametrize("name", [name for name in MADE if name != "esft-choices"])
def test_a_truncated_file_is_refused(name, tmp_path):
    make, options = MADE[name]
    path = make(tmp_path)
    whole = path.read_bytes()
    for kept in (0.3, 0.6, 0.95):
        path.write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(ValueError, match=str(tmp_path)):
            convert.read(path, **options)


def _replaced(content: object, value: object) -> list[object]:
    """Copies of a JSON document with one entry, at some place, replaced or removed."""
    made: list[object] = [value]
    if isinstance(content, dict):
        for key in list(content)[:3]:
            made += [{**content, key: other} for other in _replaced(content[key], value)]
            made.append({other: content[other] for other in content if other != key})
    if isinstance(content, list) and content:
        made += [[other, *content[1:]] for other in _replaced(content[0], value)]
    return made


JSON = ["gate-sums", "expert-counts", "gpt-oss-example", "gpt-oss-analytics", "esft-scores", "esft-experts"]
JSON += ["vllm-response", "easysteer", "riy"]


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("value", [None, "x", -3, 1e300, [], {}])
def test_a_json_file_with_a_wrong_entry_meets_a_clear_error_or_is_read(name, value, tmp_path):
    make, options = MADE[name]
    path = make(tmp_path)
    for content in _replaced(json.loads(path.read_text()), value):
        as_json(path, content)
        with contextlib.suppress(ValueError):  # any other error would be a fault of the reader
            assert isinstance(convert.read(path, name, **options), (RoutingStatistics, Trace, ExpertSelection, Plan))
