"""What an answer of a model depends on beside the request, for the name of lm-eval's cache of answers.

lm-eval keys its cache by type and arguments of a request alone, so one file would serve the answers of one model or
plan to another (EleutherAI/lm-evaluation-harness, issue 4063).
"""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from moe_route import files

__all__ = ["key_of", "weights_fingerprint"]


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex) over names, shapes, dtypes and values of all weights; reads one tensor at a time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(files.content_hash({name: tensor}, None).encode())
    return digest.hexdigest()


def key_of(content: Any) -> str:
    """SHA-256 (hex) of JSON-able content; anything else counts as its text."""
    return hashlib.sha256(files.canonical_json(_plain(content)).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (str, bool, int)) else repr(value)
