"""Read a `Call` from the arguments of a forward: its tokens, the padding among them, and what came before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from moe_route.base.devices import capturing, refuse_capture
from moe_route.calls.call import Call, Phase
from moe_route.modules.intercept import untraced

_PLACEHOLDERS = ("image_token_id", "video_token_id")  # in the configuration of a model
_CACHES = ("cache", "past_key_values", "cache_params")  # the first from transformers 5.24 on


class CallReader:
    """Reads a `Call` from the arguments of one module's forward, positional or by name.

    With `first_tensor`, the first tensor argument stands for the tokens: integers [B, S], floats [B, S, H], or floats
    [T, H] with one token per row.
    """

    NAMES = (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        *_CACHES,
        "cache_position",
        "encoder_hidden_states",
        "position_ids",
    )

    def __init__(self, module: nn.Module, first_tensor: bool = False) -> None:
        self.first_tensor = first_tensor
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        decodes = "decoder_input_ids" in parameters
        # a decoder that denoises blocks has argument names of its own
        self.denoises = decodes and "input_ids" not in parameters
        # a model with an encoder and a decoder, which see different tokens, so each makes a call of its own
        self.holds_two = decodes and not self.denoises
        names = [name.removeprefix("decoder_") if self.denoises else name for name in parameters]
        self.places = {name: place for place, name in enumerate(names) if name in self.NAMES}
        self.parameters = parameters

    def named(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Mapping[str, object]:
        """The arguments of a call by their names in `NAMES`; those that were not passed are absent."""
        if not args and not self.denoises:
            return kwargs  # as `generate` calls, in every step
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        own = {name: self.parameters[place] for name, place in self.places.items()}
        return {name: given[own.get(name, name)] for name in self.NAMES if own.get(name, name) in given}

    def __call__(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        finished: Callable[[], Sequence[int]] = tuple,
        lengths: CacheLengths | None = None,
    ) -> Call | None:
        """Read the call; None where the arguments hold neither token ids nor embeddings.

        `finished` returns the token ids that ended sequences of a batch are fed (padding and end of sequence).
        `generate` marks them valid in its mask; here they count as padding. `lengths` holds the cache lengths of
        earlier calls.
        """
        given = self.named(args, kwargs)
        ids = given.get("input_ids")
        shaped = ids if isinstance(ids, Tensor) else given.get("inputs_embeds")
        if self.first_tensor and not isinstance(shaped, Tensor):
            shaped = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if not isinstance(shaped, Tensor) or shaped.dim() == 0:
            return None
        if not shaped.is_floating_point():
            ids = shaped
        batch = shaped.shape[0]
        length = shaped.shape[1] if shaped.dim() > (2 if shaped.is_floating_point() else 1) else 1
        mask = given.get("attention_mask")
        past = self._past_length(given, length, lengths or CacheLengths())
        grows = past > 0 and length == 1
        phase: Phase = "decode" if grows or self.denoises else "prefill"
        valid = valid_tokens(mask, batch, length, past)
        if grows and batch > 1 and not self.denoises and isinstance(ids, Tensor):
            for token in finished():
                valid = ids != token if valid is None else valid & (ids != token)
        places = given.get("position_ids")
        return Call(
            batch,
            length,
            past,
            all_or_mask(valid),
            phase,
            shaped.device,
            ids if isinstance(ids, Tensor) else None,
            given.get("encoder_hidden_states") is not None,
            mask=mask if isinstance(mask, Tensor) else None,
            position_ids=places if isinstance(places, Tensor) else None,
            counter=None if shaped.device.type == "cpu" else self._counter(given, shaped.device),
            denoises=self.denoises,
        )

    def _counter(self, given: Mapping[str, object], device: torch.device) -> Tensor | None:
        """The length of the cache, if the cache keeps it on the device."""
        length = _length_of(cache_among(given))
        return length if isinstance(length, Tensor) and length.device == device else None

    def _past_length(self, given: Mapping[str, object], length: int, lengths: CacheLengths) -> int:
        cache = cache_among(given)
        past = _length_of(cache)
        if past is not None:
            # a number above 0 is the length itself; a static cache reports 0 until it has its counter
            return lengths.before(cache, past, length) if isinstance(past, Tensor) or not past else int(past)
        if isinstance(cache, (tuple, list)) and cache:
            return int(cache[0][0].shape[-2])
        position, mask = given.get("cache_position"), given.get("attention_mask")
        if isinstance(position, Tensor) and position.numel():
            return int(position.reshape(-1)[0])  # waits for the device; transformers 5 passes the cache instead
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return max(mask.shape[1] - length, 0)
        return 0


def cache_among(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a forward or the fields of its output, None where there is none.

    The mapping is walked, not asked: outputs of transformers warn when they are asked for an old name.
    """
    return next((value for name, value in named.items() if name in _CACHES and value is not None), None)


def _length_of(cache: Any) -> Any:
    """Number of tokens in a cache, an int or a tensor; None without one, and where only the mask may show it."""
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        return cache.get_seq_length()
    except ValueError:  # caches of linear attention alone have no length
        return None


def call_readers(model: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, CallReader]]:
    """The modules whose calls are read: those above the modules `names` that are given token ids or embeddings by name.

    Any of them may be the one that is called. In a model with an encoder and a decoder, these are the two. If there is
    none, it is `model` itself, whose first tensor argument then stands for the tokens.
    """
    readers = []
    for name, module in model.named_modules():
        if not name or any(inner.startswith(name + ".") for inner in names):
            reader = CallReader(module)
            if reader.places.keys() & {"input_ids", "inputs_embeds"} and not reader.holds_two:
                readers.append((module, reader))
    return readers or [(model, CallReader(model, first_tensor=True))]


# ---- what came before


class _Known(NamedTuple):
    past: int  # tokens in the cache before the latest call seen
    added: int  # tokens of that call
    version: int | None  # version counter before that call; None in inference mode
    replayed: bool = False  # captured in a CUDA graph, whose replays add tokens that are not seen


class CacheLengths:
    """The lengths of the static caches of one model. Such a cache keeps its length in a tensor on the device.

    Reading that tensor in every call would make the host wait in every call. The length is instead computed from the
    calls seen so far. The tensor's version counter shows whether anything else changed it. Tensors made in inference
    mode have no version counter. They are read at every call of more than one token, and at the first call after calls
    that were not seen.
    """

    def __init__(self) -> None:
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @untraced
    def before(self, cache: object, counter: int | Tensor, added: int) -> int:
        """Tokens in `cache` before a call that adds `added`; `counter` is the length that the cache reports."""
        if not isinstance(counter, Tensor):
            if counter == 0:  # a static cache creates its counter in its first call
                self._known[cache] = _Known(0, added, None if torch.is_inference_mode_enabled() else 0)
            return int(counter)
        if counter.device.type == "cpu":
            return int(counter)
        known: _Known | None = self._known.get(cache)
        version = None if counter.is_inference() else counter._version
        captured = capturing(counter.device)
        past = _follow(known, version, added, captured)
        if past is None:
            refuse_capture(counter.device, "reading the length of its cache")
            past = int(counter)
        self._known[cache] = _Known(past, added, version, captured or (known is not None and known.replayed))
        return past

    def forget(self) -> None:
        """Drop the lengths of caches without version counter, after calls that were not seen or that failed."""
        for cache in [cache for cache, known in self._known.items() if known.version is None]:
            del self._known[cache]


def _follow(known: _Known | None, version: int | None, added: int, captured: bool) -> int | None:
    """The length computed from the latest call, or None where it has to be read."""
    if known is None or (known.replayed and not captured):
        return None
    after = known.past + known.added
    if captured:
        return after  # a lower bound after replays: a graph has one length for all of them
    if version is not None and known.version is not None:
        return after if version == known.version + 1 else None  # a forward increments it once
    return after if version is None and added == 1 else None


# ---- padding


def valid_tokens(mask: object, batch: int, length: int, past: int) -> Tensor | None:
    """bool [B, S]: which tokens are real, from any form of attention mask; None where the mask excludes none.

    Forms: None; [B, past + S]; 4-D bool or additive float; a dict of those by kind of attention. Raises `ValueError`
    for any other mask.
    """
    if mask is not None and isinstance(mask, Mapping):
        mask = _full_attention(mask)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        if length == 1 and past > 0:
            return None
        raise ValueError(
            f"an attention_mask of type {type(mask).__name__} does not say which tokens are padding. "
            'Pass the 2-D mask [batch, length], or load the model with attn_implementation="sdpa".'
        )
    if mask.dim() == 2:
        if mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {length} tokens; pass [batch, past + length]"
            )
        return _rows(mask[:, mask.shape[1] - length :].bool(), batch)
    if length == 1 and past > 0:
        return None  # a generated token attends at least to itself
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if allowed.dim() == 4:
        allowed = allowed[:, 0]
    keys = allowed.shape[-1]
    first = past if past + length <= keys else keys - length
    # A real token attends to itself, and a padding token is masked in its own column. This holds for full and for
    # sliding attention.
    return _rows(allowed[:, :, first : first + length].diagonal(dim1=1, dim2=2), batch)


def _full_attention(masks: Mapping[str, object]) -> object:
    """From a dict of masks by kind of attention, the mask that shows padding best."""
    flat = next((m for m in masks.values() if isinstance(m, Tensor) and m.dim() == 2), None)
    if flat is not None:
        return flat
    full = masks.get("full_attention")
    return full if full is not None else next((m for m in masks.values() if m is not None), None)


def _rows(valid: Tensor, batch: int) -> Tensor:
    return valid.expand(batch, -1) if valid.shape[0] == 1 else valid


def all_or_mask(valid: Tensor | None) -> Tensor | None:
    """None for a mask that is all true, if that can be found without waiting for a device."""
    if valid is not None and valid.device.type == "cpu" and bool(valid.all()):
        return None
    return valid


# ---- pictures: the routers of a vision tower use the labels of the token that a patch is merged into


def placeholder_ids(model: nn.Module) -> tuple[int, ...]:
    """Token ids that stand for pictures and videos in a text, from the model's configuration."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return tuple(token for token in found if isinstance(token, int))


def tokens_of_patches(ids: Tensor | None, placeholders: Sequence[int], num_patches: int) -> Tensor | None:
    """int64 [P]: for each of P patches, the index of the call's token that it becomes part of, in row-major order.

    Patches come in the order of the placeholder tokens in `ids`, equally many for each. None unless exactly one kind of
    placeholder divides the number of patches evenly.
    """
    if ids is None:
        return None
    fitting = []
    for token in placeholders:
        places = (ids.flatten() == token).nonzero().flatten()
        if len(places) and num_patches % len(places) == 0:
            fitting.append(places)
    return torch.repeat_interleave(fitting[0], num_patches // len(fitting[0])) if len(fitting) == 1 else None
