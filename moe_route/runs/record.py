"""Run a model on texts under their labels while a recorder counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_route.analysis.tokens import token_classes
from moe_route.data.batches import EncodedTexts, Text
from moe_route.recording import Recorder
from moe_route.recording.metadata import add_classes
from moe_route.runs.language_model import LanguageModel


def record_texts(
    recorder: Recorder,
    language_model: LanguageModel,
    texts: Sequence[Text] | EncodedTexts,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: str | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> EncodedTexts:
    """Run every text under its labels: its group, and its item as the key that pairs translations.

    `stop` is called before each batch; if it returns True, the remaining texts do not run. Returns the texts that ran.
    The metadata of the recording gets `cut_texts`, the number of texts that were cut, and `cut_to_tokens`, the limits
    used; and `token_classes`, the number of tokens by group and class (`analysis.token_classes`: digits, punctuation,
    scripts), which says what else differs between two recordings.
    """
    encoded = language_model.encode(texts, max_length=max_length)
    done: list[int] = []
    first = torch.tensor([0])  # logits are not needed
    for batch in language_model.batches(encoded, batch_size=batch_size, progress=progress):
        if stop():
            break
        groups, items = [text.group for text in batch.texts], [text.item for text in batch.texts]
        with recorder.labels(groups=groups, items=items):
            language_model.run(batch, first)
        done.extend(batch.positions)
    ran = encoded.only(sorted(done))
    recorder.add_metadata(ran.metadata | {"token_classes": _classes(ran, language_model.tokenizer)})
    return ran


def _classes(texts: EncodedTexts, tokenizer: Any) -> dict[str, dict[str, int]]:
    """Number of tokens by group and class."""
    of_group: dict[str, Counter[int]] = {}
    for text, ids in zip(texts.texts, texts.ids, strict=True):
        of_group.setdefault(text.group, Counter()).update(ids)
    used = sorted(set[int]().union(*of_group.values()))
    special = [place for place, number in enumerate(used) if number in set(tokenizer.all_special_ids)]
    names = token_classes([str(tokenizer.decode([number])) for number in used], special=special)
    class_of = dict(zip(used, names, strict=True))
    counted = {
        group: {name: sum(n for number, n in tokens.items() if class_of[number] == name) for name in set(names)}
        for group, tokens in of_group.items()
    }
    return add_classes({}, {group: {name: n for name, n in of.items() if n} for group, of in counted.items()})
