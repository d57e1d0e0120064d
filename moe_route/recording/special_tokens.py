"""Tokens that are not counted because of their id: beginning and end of a text, padding, marks of a chat template."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from moe_route.base.devices import upload
from moe_route.calls.call import Call
from moe_route.calls.generation import setting, without_repeats
from moe_route.calls.token_table import broadcast_rows
from moe_route.recording.statistics import RecordingError

_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def special_ids_of(model: nn.Module) -> tuple[int, ...]:
    """Ids of the special tokens that the model's configuration and generation configuration name.

    Marks of a chat template are known to the tokenizer only. Raises ``ValueError`` if no token is named.
    """
    configs = [getattr(model, "generation_config", None), getattr(model, "config", None)]
    configs.append(getattr(configs[1], "text_config", None))
    ids = without_repeats([token for config in configs for name in _NAMES for token in setting(name, {}, config)])
    if not ids:
        raise ValueError(
            "the configuration of the model names no special tokens: give their ids, "
            "record(special_tokens=tokenizer.all_special_ids)"
        )
    return ids


class SpecialTokens:
    """Tells which tokens of a call have one of some ids."""

    def __init__(self, ids: object) -> None:
        """Keep these ids. Raises ``ValueError`` unless they are token ids, at least one."""
        listed: list[Any] = list(ids) if isinstance(ids, Iterable) else []
        wrong = [one for one in listed if isinstance(one, bool) or not isinstance(one, Integral) or one < 0]
        if wrong or not listed:
            raise ValueError(
                "special_tokens is True (count all tokens), False (leave out those of the model's configuration), or "
                f"the token ids to leave out, such as tokenizer.all_special_ids; not {ids!r}"
            )
        self.ids = tuple(sorted({int(one) for one in listed}))
        self._on: dict[torch.device, Tensor] = {}
        self._latest: tuple[Call, Tensor] | None = None  # a call, and which of its tokens are special

    def left_out(self, rows: int | Tensor, call: Call) -> Tensor:
        """These rows of a call's tokens as ``[batch, length]``, -1 at special tokens; does not wait for the device.

        Raises ``RecordingError`` for a call without token ids.
        """
        spread = broadcast_rows(rows, call, "rows")
        return torch.where(self._special(call), -1, spread)

    def _special(self, call: Call) -> Tensor:
        if self._latest is not None and self._latest[0] is call:
            return self._latest[1]
        ids = call.input_ids
        if ids is None or ids.shape != (call.batch, call.length):
            raise RecordingError(
                "special tokens are known by their ids, and the model was called with embeddings: mark them by "
                "rec.labels(count_mask=...), or count them, record(special_tokens=True)"
            )
        if ids.device not in self._on:
            self._on[ids.device] = upload(torch.tensor(self.ids), ids.device)
        special = (ids[..., None] == self._on[ids.device]).any(-1).to(call.device)
        self._latest = call, special
        return special
