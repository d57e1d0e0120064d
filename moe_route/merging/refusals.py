"""Checks that checkpoints can be merged."""

from __future__ import annotations

import json
from collections.abc import Sequence

from moe_route.merging.checkpoint import Checkpoint

__all__ = ["check_alike", "check_descent"]

_QUANTIZED = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F4")
_PROBED = 12  # matrices that are read to see whether two models have one ancestor


def check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse checkpoints of different architectures, shapes or tokenizers, and quantized ones, by ``ValueError``."""
    first = checkpoints[0]
    for other in checkpoints:
        _refuse_quantized(other)
        pair = f"{first.name} and {other.name}"
        if first.model_type != other.model_type and None not in (first.model_type, other.model_type):
            raise ValueError(
                f"{pair} are a {first.model_type} and a {other.model_type}: merge models of one architecture"
            )
        if first.config.get("tie_word_embeddings", False) != other.config.get("tie_word_embeddings", False) and (
            first.config and other.config
        ):
            raise ValueError(
                f"the output embeddings of one of {pair} are tied to its input embeddings, those of the other are not: "
                "save both alike (tie_word_embeddings)"
            )
        _refuse_names(first, other, pair)
        for name in first.names:
            if first.shape(name) != other.shape(name):
                what = "vocabularies differ" if "embed" in name or "lm_head" in name else "sizes differ"
                raise ValueError(
                    f"{name} of {pair} has shapes {list(first.shape(name))} and {list(other.shape(name))}: {what}, and "
                    "only models of one architecture and one tokenizer can be merged"
                )
        if _vocabulary(first) != _vocabulary(other) and None not in (_vocabulary(first), _vocabulary(other)):
            raise ValueError(f"the tokenizers of {pair} have different vocabularies: merge fine-tunes of one base")


def check_descent(model: Checkpoint, base: Checkpoint) -> None:
    """Refuse a model that was not trained from ``base``, by ``ValueError``.

    Expert 3 of one training has nothing to do with expert 3 of another. Weights of independent trainings lie farther
    apart than the weights are long; fine-tuning moves them by far less. Reads up to 12 matrices.
    """
    names = [n for n in base.names if len(base.shape(n)) >= 2 and min(base.shape(n)) > 1]
    change = size = 0.0
    for name in names[:: max(1, -(-len(names) // _PROBED))]:
        before = base.read(name).double()
        change += float((model.read(name).double() - before).square().sum())
        size += float(before.square().sum())
    if change > size:
        raise ValueError(
            f"{model.name} differs from {base.name} by more than the size of its weights, so one was not trained from "
            "the other and their experts have nothing in common: merge fine-tunes of one base"
        )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    found = next((name for name in checkpoint.names if checkpoint.dtype(name) in _QUANTIZED), None)
    if found is not None or checkpoint.config.get("quantization_config"):
        raise ValueError(
            f"{checkpoint.name} is quantized{f' ({found})' if found else ''}: merge the weights in floating point and "
            "quantize the result"
        )


def _refuse_names(first: Checkpoint, other: Checkpoint, pair: str) -> None:
    different = set(first.names) ^ set(other.names)
    if not different:
        return
    if (first.folder is None) != (other.folder is None):
        raise ValueError(
            f"{pair} name their tensors differently ({min(different)}): give both as folders or both as loaded models"
        )
    raise ValueError(f"only one of {pair} has {min(different)}: merge models of one architecture")


def _vocabulary(checkpoint: Checkpoint) -> object:
    path = checkpoint.folder / "tokenizer.json" if checkpoint.folder else None
    if path is None or not path.is_file():
        return None
    return json.loads(path.read_text("utf-8")).get("model", {}).get("vocab")
