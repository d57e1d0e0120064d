"""Files of ESFT (arXiv 2407.01906, github.com/deepseek-ai/ESFT).

``expert_scores/<task>/expert_weights_<layer>.txt`` has a line per training sample: the expert ids of all its tokens,
separated by tabs, two tabs, and their gate weights. ``summary.json`` has the scores made from them, and
``expert_configs/<task>.json`` the experts that were trained. Layers are those of the model; layer 0 of DeepSeek-V2-Lite
is dense, so layer 1 is the first MoE layer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_route.analysis import esft_experts
from moe_route.convert.source import Source
from moe_route.convert.tables import number_table, whole_numbers
from moe_route.convert.traces import RoutedSequence, trace_of
from moe_route.recording import Trace
from moe_route.steering import ExpertSelection

__all__ = ["is_choices", "is_config", "is_summary", "read_choices", "read_config", "read_summary"]

_FILE = "expert_weights_"
_SCORES = {"token": "token_scores", "gate": "gate_scores"}


def is_choices(source: Source) -> bool:
    if source.form == "folder":
        return any(source.path.glob(f"{_FILE}*.txt"))
    return source.form == "text" and source.name.startswith(_FILE)


def is_config(source: Source) -> bool:
    """Whether these are experts by layer, and not a selection of moe-route, whose layers count otherwise."""
    content = source.content
    return source.form == "json" and isinstance(content, dict) and "experts" in content and "moe_route" not in content


def is_summary(source: Source) -> bool:
    return source.form == "json" and isinstance(source.content, dict) and "token_scores" in source.content


def read_choices(source: Source, *, top_k: int = 6, first_layer: int = 1, group: str | None = None) -> Trace:
    """A trace of every training sample of a task: a folder of files, one per layer, or one such file.

    The group is named after the folder. Layers are numbered from ``first_layer``, the first MoE layer.
    """
    paths = [source.path] if source.form != "folder" else list(source.path.glob(f"{_FILE}*.txt"))
    by_layer = {}
    for path in paths:
        number = path.stem.removeprefix(_FILE)
        if not number.isdecimal() or int(number) < first_layer:
            raise source.refused(f"{path.name} names no MoE layer from {first_layer} on", "check first_layer")
        by_layer[int(number)] = path
    layers = sorted(by_layer)
    columns = [_layer(source, by_layer[layer], top_k) for layer in layers]
    lengths = [[len(ids) for ids, _ in column] for column in columns]
    for layer, found in zip(layers, lengths, strict=True):
        if found != lengths[0]:
            raise source.refused(f"layers {layers[0]} and {layer} are of other samples", "give files of one task")
    task = group or (source.path if source.form == "folder" else source.path.parent).resolve().name
    sequences = [
        RoutedSequence(
            np.stack([column[i][0] for column in columns], axis=1),
            i,
            task,
            np.stack([column[i][1] for column in columns], axis=1),
        )
        for i in range(len(lengths[0]))
    ]
    return trace_of(sequences, [str(layer) for layer in layers], [layer - first_layer for layer in layers])


def _layer(source: Source, path: Path, top_k: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ids and weights ``[T, top_k]`` of each sample in one layer."""
    samples = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                ids, weights = line.rstrip("\n").split("\t\t")
                chosen = np.array(ids.split("\t"), np.int64).astype(np.int16).reshape(-1, top_k)
                samples.append((chosen, np.array(weights.split("\t"), np.float32).reshape(chosen.shape)))
            except (ValueError, OverflowError) as error:
                raise source.refused(
                    f"line {number} of {path.name} is not ids and weights of {top_k} experts per token ({error})",
                    "check top_k, or get it again",
                ) from error
    return samples


def read_config(source: Source, *, num_experts: int | None = None, first_layer: int = 1) -> ExpertSelection:
    """The experts of ``expert_configs/<task>.json``."""
    try:
        experts = {int(layer) - first_layer: ids for layer, ids in source.content["experts"].items()}
        return ExpertSelection(experts, num_experts=num_experts, description=f"ESFT experts, {source.name}")
    except (TypeError, ValueError, AttributeError) as error:
        raise source.refused(f"its experts do not fit ({error})", "check first_layer and num_experts") from error


def read_summary(source: Source, *, top_p: float = 0.2, score: str = "token", first_layer: int = 1) -> ExpertSelection:
    """The experts that the scores of ``summary.json`` choose: per layer the fewest whose scores add up to ``top_p``.

    ``score`` is "token" (selections / (k * tokens)) or "gate" (sum of gate weights / tokens).
    """
    if score not in _SCORES:
        raise ValueError(f'score must be "token" or "gate", not {score!r}')
    table = source.content[_SCORES[score]]
    layers = whole_numbers(source, table)
    experts = whole_numbers(source, table[str(layers[0])])
    rows = [[table[str(layer)][str(expert)] for expert in experts] for layer in layers]
    scores = np.stack([number_table(source, row, "expert") for row in rows])
    if layers[0] < first_layer:
        raise source.refused(f"its layers count from {layers[0]}", f"pass first_layer={layers[0]}")
    found = esft_experts(scores, top_p=top_p)
    numbers = [layer - first_layer for layer in layers]
    return ExpertSelection(
        {numbers[row]: ids for row, ids in found.items()},
        scores={numbers[row]: of for row, of in found.scores.items()},
        threshold=top_p,
        num_experts=len(experts),
        description=f"ESFT experts by {score} scores, top_p {top_p:g}",
    )
