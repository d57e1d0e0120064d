"""Metadata of a recording (model, data, versions, plans), and how the metadata of two runs are merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moe_route.base import files

_FINGERPRINT_BITS = 128


def merge_metadata(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the metadata of two runs.

    Numbers add up, and so do those of ``token_classes``, by group and class, and of layers that are not balanced.
    Fingerprints add up modulo 2^128, so their order does not matter. Lists are united. Versions that differ are listed.
    Any other entry is kept if both agree.
    """
    merged: dict[str, Any] = {}
    for key in [*a, *(key for key in b if key not in a)]:
        left, right = a.get(key), b.get(key)
        if key == "fingerprint":
            merged[key] = add_fingerprints(left, right)
        elif key == "versions":
            merged[key] = _merge_versions(left or {}, right or {})
        elif key == "token_classes":
            merged[key] = add_classes(left or {}, right or {})
        elif key == "unbalanced":
            merged[key] = _added_laws(left or {}, right or {})
        elif isinstance(left, list) or isinstance(right, list):
            merged[key] = _united(left or [], right or [])
        elif isinstance(left, int) and isinstance(right, int):
            merged[key] = left + right
        elif left == right or right is None:
            merged[key] = left
        elif left is None:
            merged[key] = right
        elif isinstance(left, dict) and isinstance(right, dict):
            merged[key] = {name: left[name] for name in left if left[name] == right.get(name)}
    return merged


def add_fingerprints(a: str | None, b: str | None) -> str:
    """Sum of two hexadecimal fingerprints modulo 2^128; None counts as zero."""
    total = (int(a or "0", 16) + int(b or "0", 16)) % (1 << _FINGERPRINT_BITS)
    return f"{total:032x}"


def add_classes(a: Mapping[str, Mapping[str, int]], b: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Sum of two numbers of tokens by group and class, in the order of their names."""
    return {
        group: {
            name: a.get(group, {}).get(name, 0) + b.get(group, {}).get(name, 0)
            for name in sorted({*a.get(group, {}), *b.get(group, {})})
        }
        for group in sorted({*a, *b})
    }


def _united(a: Sequence[Any], b: Sequence[Any]) -> list[Any]:
    by_text = {files.canonical_json(value): value for value in [*a, *b]}
    return [by_text[text] for text in sorted(by_text)]


def _added_laws(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """By layer, tokens expected and counted by both."""
    merged = {**a, **b}
    for layer in a.keys() & b.keys():
        added = {name: a[layer][name] + b[layer][name] for name in ("expected", "counted")}
        merged[layer] = {**b[layer], **added}
    return merged


def _merge_versions(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    both = {name: {*a.get(name, "").split(", "), *b.get(name, "").split(", ")} - {""} for name in [*a, *b]}
    return {name: ", ".join(sorted(versions)) for name, versions in sorted(both.items())}


def config_hash_of(metadata: Mapping[str, Any]) -> str | None:
    """Hash of the model's configuration, or None if unknown."""
    return (metadata.get("model") or {}).get("config_hash")
