"""Tiny random models as language models: a tokenizer with a token per character, and texts for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from harness.tiny_models import BASE, tiny_model

from moe_route.data.batches import Text

if TYPE_CHECKING:
    from moe_route.runs.language_model import LanguageModel

_LETTERS = [chr(code) for code in range(3, BASE["vocab_size"])]


class Characters:
    """The part of a tokenizer that `LanguageModel` uses: the code of each character is its token."""

    pad_token_id = 0
    all_special_ids = (0,)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [ord(letter) for letter in texts][: options.get("max_length")]}
        return {"input_ids": [self(text, **options)["input_ids"] for text in texts]}

    def pad(self, rows: dict[str, list[list[int]]], return_tensors: str) -> dict[str, torch.Tensor]:
        ids = rows["input_ids"]
        width = max(map(len, ids))
        padded = torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        return {"input_ids": padded, "attention_mask": mask}


def tiny_language_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    from moe_route.runs.language_model import LanguageModel

    return LanguageModel(name, tiny_model(name, dtype, seed=seed, head=True), Characters())


def tiny_texts(groups: Sequence[str] = ("a", "b"), items: int = 4, seed: int = 0) -> list[Text]:
    """Random texts of different lengths, in every group."""
    draw = random.Random(seed)
    return [
        Text(group, f"item {item}", "".join(draw.choices(_LETTERS, k=draw.randint(4, 9))))
        for group in groups
        for item in range(items)
    ]
