"""Vectors of sequences: averages of their routing, summed by group, and hidden states of sentences.

``SequencePool`` rounds the averages of each sequence once to a multiple of 2^-32 and adds them up as integers.
``sentence_vectors`` pools the hidden states of every layer over the tokens of a sentence, of any model.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe_route.base import files
from moe_route.base.devices import widest
from moe_route.base.identity import identity_of, library_versions
from moe_route.calls.call import PHASES, fewer_logits
from moe_route.contract.tables import FIXED_POINT, SCALARS
from moe_route.data.batches import Batch, EncodedTexts, Text, encode, padded_batches, texts_of
from moe_route.data.corpus import Corpus
from moe_route.recording.statistics import KIND_METRIC, SEQUENCE_KINDS, SEQUENCE_SCALARS, VIEWS, RecordingError
from moe_route.recording.store import Item, SequenceStore
from moe_route.recording.tables import TableSums

Pooling = Literal["position", "reversed", "mean", "last"]
POOLINGS = ("position", "reversed", "mean", "last")
_FILE_KIND = "sentence_vectors"
_ALL = VIEWS.index("all")


@dataclass(frozen=True)
class SequenceAverages:
    """Averages of n sequences.

    Attributes:
        tokens: int64 ``[n, L]``, number of tokens L_i of each sequence.
        counts: int64 ``[n, L, E]``, number of tokens a_i that chose each expert; None if not recorded.
        values: kind -> float64 ``[n, L, E]``: q_i of each kind, and a_i / L_i. Rows without tokens are NaN.
        scalars: name from ``SEQUENCE_SCALARS`` -> ``[n, L]``. Those that count sequences are bool. ``entropy`` (H(q_i))
            and ``mean_token_entropy`` (mean over tokens t of H(p_t)) are float64 in nats, NaN without tokens.
    """

    tokens: np.ndarray
    counts: np.ndarray | None
    values: Mapping[str, np.ndarray]
    scalars: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scalars: np.ndarray, metrics: Mapping[str, np.ndarray], *, entropy: bool) -> SequenceAverages:
        """Compute the averages from sums over the tokens of each sequence.

        ``scalars [n, L, 8]`` are ``ops.SCALARS``; ``metrics`` maps a name to ``[n, L, E]``; ``entropy`` says whether
        token entropies were recorded. q_i (arXiv 2510.04694 eq. 1) is a metric divided by its own sum, so tokens with
        an all-zero row are left out.
        """
        tokens, unscored, summed = (scalars[..., SCALARS.index(name)] for name in ("tokens", "unscored", "entropy"))
        values = {}
        for kind in SEQUENCE_KINDS:
            if KIND_METRIC[kind] not in metrics:
                continue
            table = metrics[KIND_METRIC[kind]].astype(np.float64)
            divisor = tokens[..., None] if kind == "frequency" else table.sum(-1, keepdims=True)
            values[kind] = table / np.where(divisor > 0, divisor, np.nan)
        columns: dict[str, np.ndarray] = {"sequences": tokens > 0}
        columns |= {kind: ~np.isnan(table[..., 0]) for kind, table in values.items() if kind in SEQUENCE_SCALARS}
        if "full" in values:
            q = values["full"]
            columns["entropy"] = -(q * np.log(np.where(q > 0, q, 1.0))).sum(-1)
        if entropy:
            scored = tokens - unscored
            columns["full"] = scored > 0  # every scored token adds 1 to q_i
            columns["mean_token_entropy"] = summed * FIXED_POINT / np.where(scored > 0, scored, np.nan)
        return cls(tokens, metrics.get("counts"), values, columns)

    def stored(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays that a `SequenceStore` keeps of the sequences ``rows``."""
        arrays: dict[str, np.ndarray] = {"tokens": self.tokens[rows]}
        if self.counts is not None:
            arrays["counts"] = self.counts[rows].astype(np.int32)
        arrays |= {kind: self.values[kind][rows].astype(np.float32) for kind in ("full", "topk") if kind in self.values}
        if "mean_token_entropy" in self.scalars:
            arrays["token_entropy"] = self.scalars["mean_token_entropy"][rows]
        return arrays


class SequencePool:
    """int64 sums over finished sequences per (view, group, layer, expert); the views are prefill, decode and all."""

    def __init__(self, groups: int, layers: int, widest: int, metrics: Sequence[str], *, entropy: bool):
        self._entropy = entropy
        kinds = [kind for kind in SEQUENCE_KINDS if KIND_METRIC[kind] in metrics]
        self.scalars = np.zeros((len(VIEWS), groups, layers, len(SEQUENCE_SCALARS)), np.int64)
        self.sums = {kind: np.zeros((len(VIEWS), groups, layers, widest), np.int64) for kind in kinds}

    def reserve(self, groups: int) -> None:
        """Make room for ``groups`` groups."""
        missing = groups - self.scalars.shape[1]
        if missing <= 0:
            return

        def widened(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.zeros((array.shape[0], missing, *array.shape[2:]), np.int64)], axis=1)

        self.scalars = widened(self.scalars)
        self.sums = {kind: widened(table) for kind, table in self.sums.items()}

    def add(self, sums: TableSums, groups: np.ndarray) -> SequenceAverages:
        """Add n finished sequences, sequence i to group ``groups[i]``; returns their averages over all phases."""
        tokens = sums.scalar("tokens")
        ran = [phase for phase in range(len(PHASES)) if tokens[phase].any()]
        averages = None
        for phase in ran:
            averages = self._averages(sums.scalars[phase], {name: table[phase] for name, table in sums.metrics.items()})
            # sequences that ran in one phase only have the same averages over all phases
            self._add((phase,) if len(ran) > 1 else (phase, _ALL), averages, groups)
        if averages is None or len(ran) > 1:
            averages = self._averages(sums.scalars.sum(0), {name: table.sum(0) for name, table in sums.metrics.items()})
            self._add((_ALL,), averages, groups)
        return averages

    def _averages(self, scalars: np.ndarray, metrics: Mapping[str, np.ndarray]) -> SequenceAverages:
        return SequenceAverages.of(scalars, metrics, entropy=self._entropy)

    def _add(self, views: tuple[int, ...], averages: SequenceAverages, groups: np.ndarray) -> None:
        for kind, values in averages.values.items():
            _add_rows([self.sums[kind][view] for view in views], groups, _fixed(values))
        for name, column in averages.scalars.items():
            rows = column.astype(np.int64) if column.dtype == bool else _fixed(column)
            place = SEQUENCE_SCALARS.index(name)
            _add_rows([self.scalars[view, ..., place] for view in views], groups, rows)


def _add_rows(targets: Sequence[np.ndarray], groups: np.ndarray, rows: np.ndarray) -> None:
    """Add row i of ``rows`` to row ``groups[i]`` of each target."""
    for group in np.unique(groups):
        total = rows[groups == group].sum(0)
        for target in targets:
            target[group] += total


def _fixed(values: np.ndarray) -> np.ndarray:
    """Round to multiples of 2^-32, as int64; NaN (no tokens) becomes 0."""
    scaled = np.nan_to_num(values / FIXED_POINT, copy=False, nan=0.0)
    return np.rint(scaled, out=scaled).astype(np.int64)


# ---- sentence vectors


class SentenceVectors:
    """Vectors of sentences in every layer, keyed by (item, group), where the item pairs a sentence with translations.

    Attributes:
        store: the vectors, in memory up to a limit and then on disk (`SequenceStore.hidden`), with the number of tokens
            of every sentence.
        groups: the groups, in the order of the texts.
        items: the items, likewise.
        layers: names of the layers. Layer 0 is "embedding", and "layer i" is the output of layer i. transformers
            applies the final norm to the last one.
        pooling: how tokens were pooled.
        metadata: model, versions, and how many texts were cut.
    """

    def __init__(
        self,
        store: SequenceStore,
        groups: Sequence[str],
        items: Sequence[Item],
        pooling: str,
        metadata: Mapping[str, Any],
    ) -> None:
        self.store = store
        self.groups = tuple(groups)
        self.items = tuple(items)
        self.pooling = pooling
        self.metadata = dict(metadata)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return self.store.layers

    def __len__(self) -> int:
        return len(self.store)

    def vector(self, item: Item, group: str) -> np.ndarray:
        """The vector of one sentence in each layer, float32 ``[L, H]``. Raises ``KeyError`` for an unknown one."""
        return self.store.hidden(item, group)

    def numpy(self, groups: Sequence[str] | None = None) -> np.ndarray:
        """The vectors of the items that all these groups have, float32 ``[item, group, L, H]``.

        Items keep the order of ``items``. Raises ``RecordingError`` if no item is common to the groups.
        """
        names = self.groups if groups is None else tuple(groups)
        common = set(self.store.paired_items(*names))
        items = [item for item in self.items if item in common]
        if not items:
            raise RecordingError(f"no item is common to {', '.join(names)}: give translations one item id")
        return np.stack([np.stack([self.vector(item, name) for name in names]) for item in items])

    def select(self, layers: Sequence[int]) -> SentenceVectors:
        """Select layers by index, in the given order; vectors are shared, not copied."""
        return SentenceVectors(self.store.select(layers), self.groups, self.items, self.pooling, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the vectors to one file, whole or not at all."""
        names, blocks = self.store.content()
        header = {
            "layers": list(self.layers),
            "sentences": names,
            "groups": list(self.groups),
            "items": list(self.items),
            "pooling": self.pooling,
            "metadata": self.metadata,
        }
        files.write(path, {}, header, _FILE_KIND, blocks=blocks)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SentenceVectors:
        """Open a file that ``save`` wrote; vectors are read when they are used.

        Raises ``files.FileRefusedError`` for another or a damaged file.
        """
        _, header, blocks = files.read_blocks(path, _FILE_KIND)
        with files.expected_content(path):
            layers = header["layers"]
            store = SequenceStore.of_file(layers, [0] * len(layers), header["sentences"], blocks)
            return cls(store, header["groups"], header["items"], header["pooling"], header["metadata"])

    def __repr__(self) -> str:
        return (
            f"SentenceVectors({len(self.items)} items, {len(self.groups)} groups, {len(self.layers)} layers, "
            f"pooling {self.pooling!r})"
        )


def pool(hidden: Tensor, valid: Tensor, pooling: Pooling = "position") -> Tensor:
    """Pool hidden states [B, S, H] over the tokens where ``valid``, bool [B, S], is true: [B, H] in `devices.widest`.

    The S_i real tokens of a row have the weights 1 to S_i ("position", MEXA), S_i to 1 ("reversed", mPLM-Sim on
    decoders), 1 ("mean", mPLM-Sim on encoders), or 1 for the last one alone ("last", Language Ranker). What padding
    holds has no effect, even if it is not finite.
    """
    place = valid.cumsum(1)
    number = place[:, -1:]
    weights = {
        "position": place,
        "reversed": number + 1 - place,
        "mean": torch.ones_like(place),
        "last": (place == number).long(),
    }[pooling] * valid
    wide = widest(hidden.device)
    kept = hidden.masked_fill(~valid[..., None], 0).to(wide)
    return (weights.to(wide)[:, None] @ kept)[:, 0] / weights.sum(1, keepdim=True)


def sentence_vectors(
    model: nn.Module,
    tokenizer: Any,
    texts: Corpus | EncodedTexts | Sequence[Text] | Iterable[Batch],
    *,
    pooling: Pooling = "position",
    layers: Literal["all"] | Sequence[int] = "all",
    batch_size: int = 16,
    max_length: int | None = None,
    add_special_tokens: bool = True,
    folder: str | os.PathLike[str] | None = None,
    memory_bytes: int = 256 << 20,
    progress: str | None = None,
) -> SentenceVectors:
    """Compute the vectors of sentences, in every layer of a model: its hidden states, pooled over tokens.

    The model needs no experts, and need not be attached; an attached one may be steered or recorded meanwhile. The
    result depends on neither the batch size nor the side of the padding, beyond rounding: padding is moved to the right
    before the model runs, and is never counted. Texts with the same tokens run once, so their vectors are equal to the
    bit.

    Args:
        model: a decoder or an encoder of transformers, in evaluation mode.
        tokenizer: that of the model; special tokens that it adds are tokens as others. None for batches.
        texts: a parallel corpus, texts with a group and an item each, or padded batches of such texts.
        pooling: "position", "reversed", "mean" or "last", see ``pool``.
        layers: indices of the hidden states to keep, 0 for the embedding; by default all.
        batch_size: texts that run together.
        max_length: texts are cut to this number of tokens, by default to the limit of model and tokenizer. The
            metadata says how many were cut.
        add_special_tokens: False for texts that have their special tokens already, as those of a chat template do.
        folder, memory_bytes: as of ``SequenceStore``: where vectors go that exceed the memory.
        progress: caption of a progress bar on standard error.

    Raises ``ValueError`` for a model in training mode, an encoder-decoder model, a text without tokens, two texts with
    one (item, group), and layers that the model lacks; ``RecordingError`` for vectors that are not finite.
    """
    _check_model(model)
    if pooling not in POOLINGS:
        raise ValueError(f"no pooling {pooling!r}: use one of {', '.join(POOLINGS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    metadata: dict[str, Any] = {"model": identity_of(model), "versions": library_versions(), "pooling": pooling}
    writer = _Writer(model, pooling, layers, folder, memory_bytes)
    if isinstance(texts, (Corpus, EncodedTexts)) or _are_texts(texts):
        encoded = _encoded(model, tokenizer, texts, max_length, add_special_tokens)
        metadata |= encoded.metadata
        some, same = _distinct(encoded)
        device = next(model.parameters()).device
        for batch in padded_batches(tokenizer, some, batch_size=batch_size, device=device, progress=progress):
            writer.add(batch, [[encoded.texts[i] for i in same[position]] for position in batch.positions])
        order: Sequence[Text] = encoded.texts
    else:
        if max_length is not None:
            raise ValueError("batches hold tokens already: leave max_length out, and cut the texts of the batches")
        seen: list[Text] = []
        given: Iterable[Any] = texts
        for batch in given:
            writer.add(batch, [[text] for text in batch.texts])
            seen.extend(batch.texts)
        order = seen
    if writer.store is None:
        raise ValueError("there is no text: give at least one")
    writer.store.close()
    groups, items = (tuple(dict.fromkeys(getattr(text, name) for text in order)) for name in ("group", "item"))
    return SentenceVectors(writer.store, groups, items, pooling, metadata)


class _Writer:
    """Runs batches, and writes the vectors of their texts to a store, which the first batch shapes."""

    def __init__(
        self,
        model: nn.Module,
        pooling: Pooling,
        layers: Literal["all"] | Sequence[int],
        folder: str | os.PathLike[str] | None,
        memory_bytes: int,
    ) -> None:
        self.store: SequenceStore | None = None
        self._model, self._pooling, self._wanted = model, pooling, layers
        self._folder, self._memory_bytes = folder, memory_bytes
        self._layers: list[int] = []

    def add(self, batch: Batch, texts: Sequence[Sequence[Text]]) -> None:
        """Run one batch; ``texts`` are those of each row, which has several if they have the same tokens."""
        ids, valid = _padded_right(batch.inputs)
        counted = valid.sum(1).cpu().numpy()
        for of_row, number in zip(texts, counted, strict=True):
            if not number:
                text = of_row[0]
                raise ValueError(f"item {text.item!r} of group {text.group!r} has no token: leave it out")
        states = _hidden_states(self._model, ids, valid)
        if self.store is None:
            self._begin(len(states))
            assert self.store is not None
        # layers may lie on several devices
        pooled = [pool(states[i], valid.to(states[i].device), self._pooling).float().cpu() for i in self._layers]
        vectors = torch.stack(pooled, 1).numpy()
        broken = np.flatnonzero(~np.isfinite(vectors).all((1, 2)))
        if len(broken):
            text = texts[broken[0]][0]
            raise RecordingError(
                f"the vector of item {text.item!r} of group {text.group!r} is not finite: load the model in bfloat16 "
                "or float32"
            )
        rows = [row for row, of_row in enumerate(texts) for _ in of_row]
        tokens = np.repeat(counted[rows, None].astype(np.int64), len(self._layers), axis=1)
        keys = [(text.item, text.group) for of_row in texts for text in of_row]
        self.store.append(keys, {"tokens": tokens, "hidden": vectors[rows]})

    def _begin(self, states: int) -> None:
        self._layers = list(range(states)) if isinstance(self._wanted, str) else [int(i) for i in self._wanted]
        unknown = [i for i in self._layers if not 0 <= i < states]
        if unknown or not self._layers or len(set(self._layers)) < len(self._layers):
            raise ValueError(
                f'layers must be "all", or different indices from 0 (the embedding) to {states - 1}, not '
                f"{self._wanted!r}"
            )
        names = ["embedding" if i == 0 else f"layer {i}" for i in self._layers]
        options: dict[str, Any] = {"folder": self._folder, "memory_bytes": self._memory_bytes}
        self.store = SequenceStore(names, [0] * len(names), **options)


def _check_model(model: nn.Module) -> None:
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change its hidden states: call model.eval()")
    parameters = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in parameters:
        raise ValueError("the model has an encoder and a decoder: give one of them, such as model.get_encoder()")


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, Sequence) and all(isinstance(text, Text) for text in texts)


def _encoded(
    model: nn.Module,
    tokenizer: Any,
    texts: Corpus | EncodedTexts | Sequence[Text] | Iterable[Batch],
    max_length: int | None,
    add_special_tokens: bool,
) -> EncodedTexts:
    if isinstance(texts, EncodedTexts):
        if max_length is not None:
            raise ValueError("these texts are encoded already: pass max_length to encode()")
        return texts
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be 1 or more, not {max_length}")
    of_model = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    known = [one for one in (of_model, getattr(tokenizer, "model_max_length", None)) if one is not None]
    limit = max_length or min(known, default=None)
    some: Any = texts_of(texts) if isinstance(texts, Corpus) else texts
    return encode(tokenizer, some, limit=limit, add_special_tokens=add_special_tokens)


def _distinct(encoded: EncodedTexts) -> tuple[EncodedTexts, list[list[int]]]:
    """The first of all texts with the same tokens, and for each of them the indices of all."""
    same: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(encoded.ids):
        if not row:
            text = encoded.texts[i]
            raise ValueError(f"item {text.item!r} of group {text.group!r} has no token: leave it out")
        same.setdefault(row, []).append(i)
    return encoded.only([of_row[0] for of_row in same.values()]), list(same.values())


def _padded_right(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids [B, S] with the real tokens of every row first, and which are real, bool [B, S].

    Padding on the left would move the positions that a model counts from the start of a row.
    """
    others = sorted(set(inputs) - {"input_ids", "attention_mask", "token_type_ids"})
    if others:
        raise ValueError(f"vectors are made from token ids alone: leave {', '.join(others)} out of the batches")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is None:
        raise ValueError("a batch needs its attention_mask, int [B, S], which tells tokens from padding")
    valid = mask.bool()
    order = (~valid).long().argsort(dim=1, stable=True)
    longest = max(int(valid.sum(1).max()), 1)
    return ids.gather(1, order)[:, :longest], valid.gather(1, order)[:, :longest]


def _hidden_states(model: nn.Module, ids: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    """The embedding and the output of every layer, [B, S, H] each."""
    options = fewer_logits(model, torch.tensor([0]))
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    with torch.inference_mode():
        output = model(input_ids=ids, attention_mask=valid.long(), output_hidden_states=True, **options)
    states: Iterator[Tensor] | None = getattr(output, "hidden_states", None)
    states_of_layers = () if states is None else tuple(states)
    if not states_of_layers or any(one is None or one.shape[:2] != ids.shape for one in states_of_layers):
        raise RecordingError(
            f"{type(model).__name__} returns no hidden states per token for output_hidden_states=True: give the model "
            "of transformers below its head, such as model.model"
        )
    return states_of_layers
