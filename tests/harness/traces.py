"""Traces with random choices, for tests of what reads traces."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_route.recording import Trace

GROUPS = ("eng", "deu", "swh")


def trace(seed: int = 0, *, texts: int = 12, layers: int = 4, experts: int = 6, k: int = 2, **columns: Any) -> Trace:
    """Texts of 5 to 14 tokens, in three groups; token ids below 9. ``columns`` replace fields of the trace."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 15, texts)
    tokens = int(lengths.sum())
    sequence = np.repeat(np.arange(texts), lengths).astype(np.int32)
    token = rng.integers(0, 9, tokens).astype(np.int32)
    taste = rng.dirichlet(np.full(experts, 0.7), (layers, 9))  # the experts that each id prefers
    keys = rng.random((tokens, layers, experts)) ** (1.0 / np.maximum(taste[:, token].transpose(1, 0, 2), 1e-9))
    fields: dict[str, Any] = {
        "layers": tuple(f"layers.{layer}" for layer in range(layers)),
        "layer_numbers": tuple(range(layers)),
        "groups": GROUPS,
        "items": tuple(f"s{number // 3}" for number in range(texts)),
        "sequence": sequence,
        "group": (sequence % 3).astype(np.int32),
        "position": np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
        "token": token,
        "phase": (rng.random(tokens) < 0.3).astype(np.uint8),
        "ids": np.argsort(-keys, axis=-1)[..., :k].astype(np.int8),
        "weights": rng.random((tokens, layers, k)).astype(np.float16),
    }
    return Trace(**(fields | columns))
