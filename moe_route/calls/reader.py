"""Read a `Call` from the arguments of a forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from moe_route.calls.cache_lengths import CacheLengths
from moe_route.calls.call import Call, Phase
from moe_route.calls.padding import all_or_mask, valid_tokens


class CallReader:
    """Reads a `Call` from the arguments of one module's forward, positional or by name.

    With `first_tensor`, the first tensor argument stands for the tokens: integers [B, S], floats [B, S, H], or floats
    [T, H] with one token per row.
    """

    NAMES = (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "past_key_values",
        "cache_params",
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
        self.names = {name.removeprefix("decoder_") if self.denoises else name: name for name in parameters}
        self.places = {name: place for place, name in enumerate(self.names) if name in self.NAMES}

    def argument(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """The argument `name` of a call, or None if it was not passed."""
        given = self.names.get(name, name)
        if given in kwargs:
            return kwargs[given]
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else None

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
        ids = self.argument("input_ids", args, kwargs)
        shaped = ids if isinstance(ids, Tensor) else self.argument("inputs_embeds", args, kwargs)
        if self.first_tensor and not isinstance(shaped, Tensor):
            shaped = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if not isinstance(shaped, Tensor) or shaped.dim() == 0:
            return None
        if not shaped.is_floating_point():
            ids = shaped
        batch = shaped.shape[0]
        length = shaped.shape[1] if shaped.dim() > (2 if shaped.is_floating_point() else 1) else 1
        mask = self.argument("attention_mask", args, kwargs)
        past = self._past_length(args, kwargs, mask, length, lengths or CacheLengths())
        grows = past > 0 and length == 1
        phase: Phase = "decode" if grows or self.denoises else "prefill"
        valid = valid_tokens(mask, batch, length, past)
        if grows and batch > 1 and not self.denoises and isinstance(ids, Tensor):
            for token in finished():
                valid = ids != token if valid is None else valid & (ids != token)
        continues = self.argument("encoder_hidden_states", args, kwargs) is not None
        ids = ids if isinstance(ids, Tensor) else None
        places = self.argument("position_ids", args, kwargs)
        mask, places = (given if isinstance(given, Tensor) else None for given in (mask, places))
        return Call(
            batch,
            length,
            past,
            all_or_mask(valid),
            phase,
            shaped.device,
            ids,
            continues,
            mask=mask,
            position_ids=places,
            counter=self._counter(args, kwargs, shaped.device),
            denoises=self.denoises,
        )

    def _counter(self, args: tuple[object, ...], kwargs: Mapping[str, object], device: torch.device) -> Tensor | None:
        """The length of the cache, if the cache keeps it on the device."""
        cache = self.argument("past_key_values", args, kwargs)
        if device.type == "cpu" or not hasattr(cache, "get_seq_length"):
            return None
        try:
            length = cache.get_seq_length()
        except ValueError:
            return None
        return length if isinstance(length, Tensor) and length.device == device else None

    def _past_length(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        mask: object,
        length: int,
        lengths: CacheLengths,
    ) -> int:
        for name in ("past_key_values", "cache_params"):
            cache = self.argument(name, args, kwargs)
            if cache is not None and hasattr(cache, "get_seq_length"):
                try:
                    past = cache.get_seq_length()
                    # a number above 0 is the length itself; a static cache reports 0 until it has its counter
                    return lengths.before(cache, past, length) if isinstance(past, Tensor) or not past else int(past)
                except ValueError:  # caches of linear attention have no length; the mask may show it
                    continue
            if isinstance(cache, (tuple, list)) and cache:
                return int(cache[0][0].shape[-2])
        position = self.argument("cache_position", args, kwargs)
        if isinstance(position, Tensor) and position.numel():
            return int(position.reshape(-1)[0])  # waits for the device; transformers 5 passes the cache instead
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return max(mask.shape[1] - length, 0)
        return 0
