"""Run a model on texts under their labels while a recorder counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moe_route.data.batches import EncodedTexts, Text
from moe_route.recording import Recorder
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
    used.
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
    recorder.add_metadata(ran.metadata)
    return ran
