"""Texts as tokens, in padded batches of texts of similar length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from moe_route.data.corpus import Corpus
from moe_route.data.reader import CorpusText


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence to run: its text, its group (a language, a task), and the item that pairs it with translations."""

    group: str
    item: str
    text: str


def texts_of(corpus: Corpus | Iterable[CorpusText]) -> list[Text]:
    """All texts of a corpus, language by language; the language is the group. Blank ones are left out."""
    if not isinstance(corpus, Corpus):
        by_group: dict[str, list[Text]] = {}
        for group, item, text, _ in corpus:
            if text.strip():
                by_group.setdefault(group, []).append(Text(group, item, text))
        return [text for texts in by_group.values() for text in texts]
    return [
        Text(language, item, text)
        for language in corpus.languages
        for item, text in zip(corpus.items, corpus[language], strict=True)
    ]


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Texts as tokens, with those that were too long.

    Attributes:
        texts: the n texts.
        ids: token ids of each text.
        shortened: indices, in increasing order, of the texts that were cut after ``limit`` tokens.
        limit: largest number of tokens per text, None for any number.
    """

    texts: tuple[Text, ...]
    ids: tuple[tuple[int, ...], ...]
    shortened: tuple[int, ...]
    limit: int | None

    @property
    def cut(self) -> int:
        """Number of texts that were cut."""
        return len(self.shortened)

    def only(self, positions: Sequence[int]) -> EncodedTexts:
        """The texts at these indices."""
        place = {position: new for new, position in enumerate(positions)}
        shortened = tuple(place[i] for i in self.shortened if i in place)
        return EncodedTexts(
            tuple(self.texts[i] for i in positions), tuple(self.ids[i] for i in positions), shortened, self.limit
        )

    @property
    def note(self) -> str:
        """A short sentence on the texts that were cut; "" if none was."""
        return f"{self.cut} of {len(self.texts)} texts cut to {self.limit} tokens" if self.cut else ""

    @property
    def metadata(self) -> dict[str, Any]:
        """The same as metadata of a recording, which merges with other metadata; empty if no text was cut."""
        return {"cut_texts": self.cut, "cut_to_tokens": [self.limit]} if self.cut else {}


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded texts: `inputs` are `input_ids` and `attention_mask`, int64 [B, S], padded as the tokenizer pads."""

    texts: tuple[Text, ...]
    positions: tuple[int, ...]  # index of each text among the texts that were batched
    inputs: Mapping[str, torch.Tensor]


def encode(
    tokenizer: Any, texts: Sequence[Text], *, limit: int | None = None, add_special_tokens: bool = True
) -> EncodedTexts:
    """Convert texts to tokens, and cut those longer than `limit` tokens."""
    ids = [tuple(row) for row in token_ids(tokenizer, texts, add_special_tokens=add_special_tokens)]
    long = [] if limit is None else [i for i, row in enumerate(ids) if len(row) > limit]
    # the tokenizer cuts the texts, because it knows which tokens belong at the end
    options = {"add_special_tokens": add_special_tokens, "truncation": True, "max_length": limit}
    for i, row in zip(long, token_ids(tokenizer, [texts[i] for i in long], **options), strict=True):
        ids[i] = tuple(row)
    return EncodedTexts(tuple(texts), tuple(ids), tuple(long), limit)


def token_ids(tokenizer: Any, texts: Sequence[Text], **options: Any) -> list[list[int]]:
    """Token ids of each text, without padding; options are those of the tokenizer's call."""
    # not verbose, because it would warn about long texts, which are cut here
    encoded = tokenizer([text.text for text in texts], verbose=False, **options) if texts else {"input_ids": []}
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def padded_batches(
    tokenizer: Any,
    encoded: EncodedTexts,
    *,
    batch_size: int,
    device: torch.device | str,
    progress: str | None = None,
) -> Iterator[Batch]:
    """Yield padded batches on `device`, with texts of similar length together to save padding.

    The longest texts come first, to show whether memory suffices. The other batches come in a fixed random order, so
    that work that ends early has seen texts of every length. `progress` is the caption of a progress bar on standard
    error.
    """
    order = sorted(range(len(encoded.ids)), key=lambda i: -len(encoded.ids[i]))
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    chunks[1:] = random.Random(0).sample(chunks[1:], len(chunks[1:]))
    for chunk in tqdm(chunks, desc=progress, disable=progress is None, leave=False):
        inputs = tokenizer.pad({"input_ids": [list(encoded.ids[i]) for i in chunk]}, return_tensors="pt")
        on_device = {k: inputs[k].to(device) for k in ("input_ids", "attention_mask")}
        yield Batch(tuple(encoded.texts[i] for i in chunk), tuple(chunk), on_device)
