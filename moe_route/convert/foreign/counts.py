"""Counts per layer and expert: published tables, dumps of engines, and the weights of their load balancers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_route.base.budget import BudgetError
from moe_route.contract.tables import FIXED_POINT, SCALARS
from moe_route.convert.formats import reads, writes
from moe_route.convert.source import Source, counted, number_table, whole_numbers
from moe_route.convert.traces import RoutedSequence, model_layers, trace_of
from moe_route.convert.writers import pickled, write_arrays, write_bytes, write_json
from moe_route.recording import RoutingStatistics, Trace
from moe_route.recording.statistics import IMPORTED, SEQUENCE_SCALARS, VIEWS

# ---- selections by layer and expert, as published for OLMoE and Mixtral
#
# github.com/allenai/OLMoE, ``scripts/routing_output``: {layer: {expert: selections}}, as JSON or as pickles of
# counters, one file per domain. Some layers only. ``expert_counts_top1`` counts first choices, so its ``top_k`` is 1.


def _is_expert_counts(source: Source) -> bool:
    content = source.content
    return (
        source.form in ("json", "objects")
        and isinstance(content, dict)
        and bool(content)
        and all(
            isinstance(of, dict) and of and all(isinstance(n, (int, float)) for n in of.values())
            for of in content.values()
        )
    )


@reads(
    "expert-counts",
    "selections per layer and expert (OLMoE, Mixtral), .json or .pkl",
    gives="statistics",
    when=_is_expert_counts,
)
def read_expert_counts(
    source: Source, *, top_k: int | None = None, num_experts: int | None = None, group: str | None = None
) -> RoutingStatistics:
    """Statistics of one group, named after the file. An expert that is absent was never chosen.

    ``num_experts`` is needed if the last experts were never chosen.
    """
    tables = {int(layer): of for layer, of in zip(whole_numbers(source, source.content), _sorted(source), strict=True)}
    experts = [whole_numbers(source, of) for of in tables.values()]
    width = num_experts or max(ids[-1] for ids in experts) + 1
    if max(ids[-1] for ids in experts) >= width:
        raise ValueError(f"{source.path} counts expert {max(ids[-1] for ids in experts)}: check num_experts {width}")
    rows = np.zeros(source.room(len(tables), width))
    for row, of in enumerate(tables.values()):
        for expert, count in of.items():
            rows[row, int(expert)] = count
    counts = number_table(source, rows, "layer, expert")
    return counted(
        source, counts, top_k=top_k, format="expert-counts", group=group, layers=[str(layer) for layer in tables]
    )


def _sorted(source: Source) -> list[dict[str, float]]:
    return [source.content[key] for key in sorted(source.content, key=int)]


# ---- loads of experts: dumps of SGLang's expert distribution recorder, vLLM's balancer state, EPLB weights.
#
# SGLang (``sglang/srt/eplb/expert_distribution.py``) saves with torch.save. Mode "stat": {"logical_count": int [steps,
# layers, experts]}. Modes "per_pass" and "per_token": {"records": [{"global_physical_count": int [layers, physical]}],
# "last_physical_to_logical_map": int [layers, physical]}, one file per rank. ``--init-expert-location`` takes
# {"logical_count"}, too. vLLM's EplbState has ``expert_load_window`` [window, layers, physical] and
# ``physical_to_logical_map`` [layers, physical]. EPLB (github.com/deepseek-ai/EPLB) takes one array [layers, experts].


def _is_sglang(source: Source) -> bool:
    return _holds(source, "logical_count") or _holds(source, "records", "last_physical_to_logical_map")


def _holds(source: Source, *names: str) -> bool:
    return isinstance(source.content, Mapping) and all(name in source.content for name in names)


def _one_array(source: Source) -> Any:
    """The only array of the file, or None."""
    content = source.content
    if isinstance(content, Mapping) and len(content) == 1 and source.form != "json" and not _is_sglang(source):
        content = next(iter(content.values()))
    if source.form == "json" and not (isinstance(content, list) and content and isinstance(content[0], list)):
        return None
    try:
        return source.array(content)
    except BudgetError:
        raise
    except (ValueError, TypeError):
        return None


@reads(
    "sglang",
    "dump of SGLang's expert distribution recorder, .pt, or its logical_count as .json",
    gives="statistics",
    when=_is_sglang,
)
def read_sglang(source: Source, *, top_k: int | None = None, group: str | None = None) -> RoutingStatistics:
    """Statistics of a dump; add up the files of all ranks (modes "per_pass" and "per_token").

    The dump tells neither prompts from answers nor requests apart: all counts are of one group and phase "prefill".
    """
    if "logical_count" in source.content:
        counts = number_table(source, source.content["logical_count"], "layer, expert")
        return counted(source, counts, top_k=top_k, format="sglang", group=group)
    records = source.content["records"]
    if not records:
        raise source.refused("it has no records", "start the recording before the requests")
    owners = source.array(source.content["last_physical_to_logical_map"])
    load = np.zeros(owners.shape, np.int64)
    for one in records:
        physical = number_table(source, one["global_physical_count"], "layer, physical expert")
        if physical.shape != load.shape:
            raise source.refused(f"a record is {list(physical.shape)}, the map {list(load.shape)}", "dump one server")
        load += physical
    return counted(source, _logical(source, load, owners), top_k=top_k, format="sglang", group=group)


@reads(
    "vllm-load",
    "expert_load_window and physical_to_logical_map of vLLM's balancer, .pt, .npz, .safetensors",
    gives="statistics",
    when=lambda source: _holds(source, "expert_load_window", "physical_to_logical_map"),
)
def read_vllm(source: Source, *, top_k: int | None = None, group: str | None = None) -> RoutingStatistics:
    """Statistics of the window of steps that vLLM's balancer keeps."""
    load = number_table(source, source.content["expert_load_window"], "layer, physical expert")
    owners = source.array(source.content["physical_to_logical_map"])
    return counted(source, _logical(source, load, owners), top_k=top_k, format="vllm-load", group=group)


@reads(
    "eplb",
    "loads [layers, experts] for EPLB, .npy, .safetensors, .pt, .json",
    gives="statistics",
    when=lambda source: np.ndim(_one_array(source)) in (2, 3),
)
def read_eplb(source: Source, *, top_k: int | None = None, group: str | None = None) -> RoutingStatistics:
    """Statistics of loads [layer, expert], or [step, layer, expert]; they must be counts."""
    counts = number_table(source, _one_array(source), "layer, expert")
    return counted(source, counts, top_k=top_k, format="eplb", group=group)


def _logical(source: Source, load: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Sum the loads of the copies of each expert: ``load[l, p]`` goes to expert ``owners[l, p]``."""
    if owners.shape != load.shape or owners.dtype.kind not in "iu":
        raise source.refused(
            f"its map of physical experts is {owners.dtype} {list(owners.shape)}, its loads are {list(load.shape)}",
            "save both from one process, after the last rebalancing",
        )
    if owners.min() < 0:
        raise source.refused("its map has physical experts that belong to no expert", "save it after the start")
    counts = np.zeros(source.room(len(load), int(owners.max()) + 1), load.dtype)
    np.add.at(counts, (np.arange(len(load))[:, None], owners), load)
    return counts


@writes(
    "eplb",
    "loads [MoE layers, experts] for EPLB",
    takes=["statistics"],
    suffixes=[".npy", ".safetensors", ".pt", ".json"],
)
def write_eplb(statistics: RoutingStatistics, path: Path, *, groups: Sequence[str] | str | None = None) -> None:
    counts = _selections(statistics, groups)
    if len(set(statistics.num_experts)) > 1:
        raise ValueError("EPLB takes layers with the same number of experts: select(layers=...) those first")
    if path.suffix == ".json":
        write_json(path, counts.tolist())
    else:
        write_arrays(path, {"weight": counts})


@writes(
    "sglang",
    "logical_count [layers, experts] for SGLang's --init-expert-location",
    takes=["statistics"],
    suffixes=[".pt", ".json"],
)
def write_sglang(statistics: RoutingStatistics, path: Path, *, groups: Sequence[str] | str | None = None) -> None:
    numbers = model_layers(statistics.layers)
    rows = np.zeros((max(numbers) + 1, max(statistics.num_experts)), np.int64)
    rows[numbers] = _selections(statistics, groups)
    if path.suffix == ".json":
        write_json(path, {"logical_count": rows.tolist()})
        return
    write_bytes(path, pickled({"logical_count": torch.from_numpy(rows)}))


def _selections(statistics: RoutingStatistics, groups: Sequence[str] | str | None) -> np.ndarray:
    """Selections of each expert, int64 ``[L, E]``, summed over the groups."""
    chosen = statistics if groups is None else statistics.select(groups=groups)  # type: ignore[arg-type]
    return np.ascontiguousarray(chosen.token_sum("counts").sum(axis=0))


# ---- counts and sums of gate weights by layer and expert, as published for Qwen3-30B-A3B on MGSM.
#
# github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs, ``routing/mgsm_result/mgsm_<language>.json``: {layer:
# {expert: {"activation_tokens": n, "gate_values_sum": w}, "total_tokens": n}}, one file per language. The weights of a
# token's experts add up to 1. That recorder summed in bfloat16, so counts miss top_k * tokens by up to 0.03 %.
# moe-route ships five of these languages as arrays of one .npz file, written by examples/study/published_routing.py:
# ``groups`` [G], ``tokens`` int32 [G, L], ``counts`` int32 [G, L, E] and ``gate_sums`` float32 [G, L, E].

_GATE_ARRAYS = ("groups", "tokens", "counts", "gate_sums")


def _is_gate_sums(source: Source) -> bool:
    content = source.content
    if source.form == "arrays":
        return _holds(source, *_GATE_ARRAYS)
    return (
        source.form == "json"
        and isinstance(content, dict)
        and bool(content)
        and all(isinstance(of, dict) and "total_tokens" in of for of in content.values())
    )


@reads(
    "gate-sums",
    "counts and gate sums per layer and expert (Qwen3-30B-A3B on MGSM), .json or .npz",
    gives="statistics",
    when=_is_gate_sums,
)
def read_gate_sums(
    source: Source, *, group: str | None = None, top_k: int | None = None, tolerance: float = 1e-3
) -> RoutingStatistics:
    """Statistics with counts and weight_share: of one group, named after a JSON file (``mgsm_de.json`` is "de"), or of
    the groups of an .npz file.
    """
    if source.form == "arrays":
        groups, tokens, counts, share = (source.content[name] for name in _GATE_ARRAYS)
        wanted = [counts.shape[:1], counts.shape[:2], counts.shape]
        if counts.ndim != 3 or [groups.shape, tokens.shape, share.shape] != wanted or tokens.dtype.kind not in "iu":
            raise source.refused(f"its arrays are not those of {', '.join(_GATE_ARRAYS)}", "check --from")
        layers = list(range(counts.shape[1]))
        if group is not None:
            raise ValueError(f"{source.path} names its groups ({', '.join(groups)}): leave group out")
        counts, share = (
            np.stack([number_table(source, of, "layer, expert") for of in table]) for table in (counts, share)
        )
    else:
        groups, layers = [group or source.name.removeprefix("mgsm_")], whole_numbers(source, source.content)
        tokens, counts, share = (table[None] for table in _gate_tables(source, layers))
    if tokens.min(initial=0) < 0:
        raise source.refused("it has negative numbers of tokens", "record again")
    if top_k is None:
        top_k = round(counts.sum() / max(int(tokens.sum()), 1))
    return RoutingStatistics.from_token_sums(
        [str(name) for name in groups],
        counts=counts,
        tokens=tokens,
        top_k=top_k,
        layers=[str(layer) for layer in layers],
        num_experts=counts.shape[2],
        tolerance=tolerance,
        weight_share=share,
        metadata={"format": "gate-sums"},
    )


def _gate_tables(source: Source, layers: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens int64 ``[L]``, counts and sums of gate weights float64 ``[L, E]`` of a JSON file."""
    experts = whole_numbers(source, {key for key in source.content[str(layers[0])] if key != "total_tokens"})
    tokens = np.zeros(len(layers), np.int64)
    counts, share = np.zeros((2, len(layers), len(experts)))
    for row, layer in enumerate(layers):
        of_layer = source.content[str(layer)]
        if len(of_layer) != len(experts) + 1:
            raise source.refused(
                f"layer {layer} has {len(of_layer) - 1} experts, layer {layers[0]} has {len(experts)}",
                "it is not whole; get it again",
            )
        tokens[row] = of_layer["total_tokens"]
        entries = [of_layer[str(expert)] for expert in experts]
        counts[row] = number_table(source, [entry["activation_tokens"] for entry in entries], "expert")
        share[row] = number_table(source, [entry["gate_values_sum"] for entry in entries], "expert")
    return tokens, counts, share


# ---- routing of gpt-oss as published by github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting.
#
# ``*_examples.json`` is one generation: ``router_data`` [{"token_<position>": {"layer_<l>": {"selected_experts",
# "selected_probs"}}}, ...]. ``<split>.json`` has means over generations, in ``think_expert_analytics`` and
# ``answer_expert_analytics``: {"layer_<l>": {expert: {"prob_density", "count_frequency"}}}, without the experts that
# were never chosen.

_EXPERTS, _TOP_K = 32, 4
_PARTS = ("think", "answer")


@reads(
    "gpt-oss-example",
    "one generation of gpt-oss, token by token, *_examples.json",
    gives="trace",
    when=lambda source: any("router_data" in one for one in source.documents()),
    defaults={"num_experts": _EXPERTS},
)
def read_example(source: Source, *, group: str | None = None) -> Trace:
    """A trace of the generated tokens: groups are the datasets, items the row indices; all tokens are decode."""
    sequences, layers = [], 0
    for one in source.documents():
        tokens = {int(key.removeprefix("token_")): of for row in one["router_data"] for key, of in row.items()}
        positions = sorted(tokens)
        if not positions or positions != list(range(positions[0], positions[0] + len(positions))):
            raise source.refused("some generated tokens are missing", "get it again")
        layers = len(tokens[positions[0]])
        chosen = [[tokens[p][f"layer_{layer}"] for layer in range(layers)] for p in positions]
        ids = source.array([[of["selected_experts"] for of in token] for token in chosen])
        weights = source.array([[of["selected_probs"] for of in token] for token in chosen])
        if ids.ndim != 3 or ids.dtype.kind != "i" or weights.shape != ids.shape or not (np.abs(weights) <= 1).all():
            raise source.refused("its experts and probabilities are not [tokens, layers, k]", "get it again")
        name = group or str(one.get("category") or source.name)
        sequences.append(RoutedSequence(ids, one.get("row_index"), name, weights, prompt=0, first=positions[0]))
    return trace_of(sequences, [str(layer) for layer in range(layers)])


@reads(
    "gpt-oss-analytics",
    "means over generations of gpt-oss, .json",
    gives="statistics",
    when=lambda source: source.json_with("think_expert_analytics"),
)
def read_analytics(source: Source, *, group: str | None = None) -> RoutingStatistics:
    """Statistics with the groups "<name> think" and "<name> answer", of sequences only.

    The published means over generations are the sequence sums of arXiv 2510.04694, eq. 1 and 3, so they are read with
    ``by="sequence"`` and kind "topk". There are no token sums; tokens are the published means times the generations.
    """
    content = source.content
    samples = int(content["sample_count"])
    tables = [content[f"{part}_expert_analytics"] for part in _PARTS]
    tokens = [round(samples * float(content[f"num_{part}_tokens"])) for part in _PARTS]
    layers = len(tables[0])
    density, frequency = (
        np.stack([[_row(source, table[f"layer_{layer}"], key) for layer in range(layers)] for table in tables])
        for key in ("prob_density", "count_frequency")
    )
    if samples < 1 or min(tokens) < 0 or max(density.max(initial=0), frequency.max(initial=0)) > _TOP_K:
        raise source.refused("its numbers of generations or its means are not possible", "get it again")
    name = group or source.name
    cells = (len(_PARTS), layers)
    scalars = np.zeros((2, *cells, len(SCALARS)), np.int64)
    scalars[1, ..., SCALARS.index("tokens")] = np.array(tokens)[:, None]
    scalars[1, ..., SCALARS.index("slots")] = np.array(tokens)[:, None] * _TOP_K
    scalars[1, ..., SCALARS.index("unscored")] = np.array(tokens)[:, None]
    sequences = np.zeros((len(VIEWS), *cells, len(SEQUENCE_SCALARS)), np.int64)
    sequences[1:, ..., [SEQUENCE_SCALARS.index("sequences"), SEQUENCE_SCALARS.index("topk")]] = samples
    sums = {}
    for kind, mean in (("topk", density), ("frequency", frequency)):
        sums[kind] = np.zeros((len(VIEWS), *cells, _EXPERTS), np.int64)
        sums[kind][1:] = np.rint(mean * samples / FIXED_POINT)
    return RoutingStatistics(
        groups=[f"{name} {part}" for part in _PARTS],
        layers=[str(layer) for layer in range(layers)],
        num_experts=[_EXPERTS] * layers,
        top_k=[_TOP_K] * layers,
        scalars=scalars,
        metrics={},
        sequence_scalars=sequences,
        sequence_sums=sums,
        entropy=False,
        metadata={"source": IMPORTED, "format": "gpt-oss-analytics"},
    )


def _row(source: Source, table: dict[str, dict[str, float]], key: str) -> np.ndarray:
    row = np.zeros(_EXPERTS)
    for expert, of in table.items():
        row[int(expert)] = of[key]
    return number_table(source, row, "expert")
