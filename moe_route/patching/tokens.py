"""What one call of the model says about its tokens, and the token table its routers share.

Flatten order is `b * S + s` everywhere. Padding tokens are routed (the model routes them too) but neither counted nor
steered: group, segment and steering row -1, valid 1.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moe_route.patching.deferred import MOST_TOKENS, DeferredCounts

IntLike = int | Tensor | Sequence[int]


@dataclass(slots=True, eq=False)
class Call:
    """One forward of the model. `valid` is bool [batch, length], or None where every token is real; `input_ids` are the
    token ids [batch, length], or None where embeddings were passed."""

    batch: int
    length: int
    past_length: int
    valid: Tensor | None
    phase: Literal["prefill", "decode"]
    device: torch.device
    input_ids: Tensor | None = None


@dataclass(slots=True, eq=False)
class Labels:
    """What the token table is built from: an int for all tokens, or integers [B] or [B, S].

    Fewer rows than the batch (beams, several returned sequences) are repeated where they divide it. `steering_row` is
    a row of the steering tables, `group` and `segment` rows of the statistics tables; -1 is none.
    """

    steering_row: IntLike = -1
    group: IntLike = 0
    segment: IntLike = -1


class CallReader:
    """Reads a `Call` from the arguments of one module's forward, positional or by name.

    With `first_tensor`, the first tensor argument stands for the tokens: integers [B, S], floats [B, S, H] or, one
    token a row, [T, H].
    """

    NAMES = ("input_ids", "inputs_embeds", "attention_mask", "past_key_values", "cache_params", "cache_position")

    def __init__(self, module: nn.Module, first_tensor: bool = False) -> None:
        self.first_tensor = first_tensor
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]
        self.places = {name: parameters.index(name) for name in self.NAMES if name in parameters}

    def argument(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """The argument `name` of the call, None where it was not given."""
        if name in kwargs:
            return kwargs[name]
        place = self.places.get(name, len(args))
        return args[place] if place < len(args) else None

    def __call__(
        self,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        finished: Callable[[], Sequence[int]] = tuple,
    ) -> Call | None:
        """The call, or None where the arguments hold neither token ids nor embeddings.

        `finished` gives the token ids that a sequence of a batch is fed after its end (padding and end of sequence):
        `generate` marks them valid in its mask, here they count as padding.
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
        past = self._past_length(args, kwargs, mask, length)
        phase: Literal["prefill", "decode"] = "decode" if past > 0 and length == 1 else "prefill"
        valid = valid_tokens(mask, batch, length, past)
        if phase == "decode" and batch > 1 and isinstance(ids, Tensor):
            for token in finished():
                valid = ids != token if valid is None else valid & (ids != token)
        return Call(
            batch, length, past, all_or_mask(valid), phase, shaped.device, ids if isinstance(ids, Tensor) else None
        )

    def _past_length(self, args: tuple[object, ...], kwargs: Mapping[str, object], mask: object, length: int) -> int:
        for name in ("past_key_values", "cache_params"):
            cache = self.argument(name, args, kwargs)
            if cache is not None and hasattr(cache, "get_seq_length"):
                try:
                    return int(cache.get_seq_length())
                except ValueError:  # a cache of linear attention alone has no length; the mask may say it
                    continue
            if isinstance(cache, (tuple, list)) and cache:
                return int(cache[0][0].shape[-2])
        position = self.argument("cache_position", args, kwargs)
        if isinstance(position, Tensor) and position.numel():
            return int(position.reshape(-1)[0])
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return max(mask.shape[1] - length, 0)
        return 0


def valid_tokens(mask: object, batch: int, length: int, past: int) -> Tensor | None:
    """bool [B, S]: which tokens are real, from any form of attention mask; None where the mask says nothing.

    Forms: None; [B, past + S]; 4-D bool or additive float; a dict of those by kind of attention. Raises `ValueError`
    for a mask that cannot be read.
    """
    if isinstance(mask, Mapping):
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
        return None  # a token that is being generated attends at least to itself
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if allowed.dim() == 4:
        allowed = allowed[:, 0]
    keys = allowed.shape[-1]
    first = past if past + length <= keys else keys - length
    # A real token attends to itself; the row of a padding token is masked at its own column, in full and sliding
    # attention alike.
    return _rows(allowed[:, :, first : first + length].diagonal(dim1=1, dim2=2), batch)


def _full_attention(masks: Mapping[str, object]) -> object:
    """The mask of a dict by kind of attention that says most about padding."""
    flat = next((m for m in masks.values() if isinstance(m, Tensor) and m.dim() == 2), None)
    if flat is not None:
        return flat
    full = masks.get("full_attention")
    return full if full is not None else next((m for m in masks.values() if m is not None), None)


def _rows(valid: Tensor, batch: int) -> Tensor:
    return valid.expand(batch, -1) if valid.shape[0] == 1 else valid


def all_or_mask(valid: Tensor | None) -> Tensor | None:
    """None for a mask that is all true, where that can be told without waiting for a device."""
    if valid is not None and valid.device.type == "cpu" and bool(valid.all()):
        return None
    return valid


def spread(value: IntLike, call: Call, what: str) -> int | Tensor:
    """A label as an int, or as integers that broadcast to [B, S]."""
    if isinstance(value, int):
        return value
    labels = torch.as_tensor(value, device=call.device)
    if labels.is_floating_point() or labels.dim() > 2:
        raise ValueError(
            f"{what} must be integers, one number, [batch] or [batch, length], not {labels.dtype} {list(labels.shape)}"
        )
    if labels.dim() == 0:
        return labels
    if labels.shape[0] == 0 or call.batch % labels.shape[0]:
        raise ValueError(
            f"{what} has {labels.shape[0]} rows, the batch has {call.batch}: give one per sequence (fewer only where "
            "they divide the batch, as with beams)"
        )
    if labels.shape[0] != call.batch:
        labels = labels.repeat_interleave(call.batch // labels.shape[0], dim=0)
    if labels.dim() == 1:
        return labels[:, None]
    if labels.shape[1] not in (1, call.length):
        raise ValueError(f"{what} has {labels.shape[1]} columns, the call has {call.length} tokens a sequence")
    return labels


class TokenContext:
    """The token table of the call that is running, shared by all routers. Plain attributes, so that a compiled model
    can read them.

    `table` is None outside a call; `last` is kept for the recomputation of a checkpointed layer in the backward.
    `small` is True inside a call whose routers may be counted after it (`deferred`).
    `steers` is False where no token of the call can have a steering row.
    """

    __slots__ = (
        "after",
        "call",
        "deferred",
        "device",
        "idle",
        "label",
        "last",
        "num_tokens",
        "owner",
        "reached",
        "small",
        "steers",
        "table",
        "_cached",
        "_finished",
        "_key",
        "_thread",
        "_uniform",
    )

    def __init__(
        self,
        label: Callable[[Call], Labels | None],
        after: Callable[[Call], None],
        finished: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        self.label, self.after = label, after
        self.deferred = DeferredCounts()
        self.idle = True
        self.owner: nn.Module | None = None
        self.call: Call | None = None
        self.table: Tensor | None = None
        self.last: Tensor | None = None
        self.num_tokens = 0
        self.device: torch.device | None = None
        self.steers = False
        self.reached = False
        self.small = False
        self._finished = finished
        self._key: tuple[object, ...] | None = None
        self._cached: Tensor | None = None
        self._uniform = False
        self._thread = 0

    def forget_call(self) -> None:
        """No call is running, whatever an interrupt left behind."""
        self.deferred.drop_call()
        self.call = self.table = self.owner = None
        self.small = False

    def enter(
        self, reader: CallReader, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        """Begin a call, unless it is an inner part of one that is running.

        Raises `RuntimeError` where another thread runs the model: one token table serves all routers.
        """
        if self.idle or recomputing():
            return
        if self.owner is not None:
            self._refuse_other_threads()
            if self.owner is not module:
                return
            self.deferred.drop_call()  # the last call was interrupted: torch runs no hook then
        call = reader(args, kwargs, self._finished)
        if call is None:
            return
        self.begin(call)
        self.owner, self.reached, self._thread = module, False, _thread()
        self.small = self.num_tokens <= MOST_TOKENS

    def _refuse_other_threads(self) -> None:
        here = _thread()
        if here != self._thread and 0 not in (here, self._thread):
            raise RuntimeError(
                "the model was called in one thread while another was running it (or was interrupted in it): an "
                "attached model records and steers one call at a time. Use one thread, or a copy of the model for "
                "each; after an interrupt, begin the recording or steering anew."
            )

    def begin(self, call: Call) -> None:
        """Ask for the labels of `call` and build its table."""
        labels = self.label(call) or Labels()
        self.table = self.last = self._build(call, labels)
        self.num_tokens, self.device, self.call = call.batch * call.length, call.device, call

    def leave(self, module: nn.Module, output: object) -> None:
        """End the call that `module` began; an output of None means that it failed."""
        if self.owner is not module:
            return
        call, table, small = self.call, self.table, self.small
        if output is None or call is None or table is None:
            self.forget_call()
            return
        self.call = self.table = self.owner = None
        self.small = False
        if small:
            self.reached = self.reached or bool(self.deferred.kept)
            self.deferred.end_call(table)
        if not self.reached and not self.idle:
            raise RuntimeError(
                f"{type(module).__name__} was called, but none of its routers: the blocks above them were replaced "
                "(kernels, quantisation). Detach, load the model without it (use_kernels=False), and attach again."
            )
        self.after(call)

    def table_for(self, num_tokens: int, device: torch.device, name: str) -> Tensor:
        """The table for a router that the common case does not fit: called outside a model call, on another device,
        or with only some of the tokens."""
        if self.table is None and not recomputing():
            call = Call(1, num_tokens, 0, None, "prefill", device)
            self.begin(call)
            table, self.table, self.call = self.table, None, None
        else:
            table = self.last
        if table is None:
            raise RuntimeError(
                f"router {name!r} is recomputed before the model was called with the attachment in place"
            )
        if table.shape[0] != num_tokens:
            if not self._uniform:
                raise RuntimeError(
                    f"router {name!r} was given {num_tokens} tokens, the call of the model has {table.shape[0]}: its "
                    "tokens cannot be told apart. Use one label for the whole batch and no padding."
                )
            table = table[:1].expand(num_tokens, 4).contiguous()
        return table if table.device == device else table.to(device)

    def _build(self, call: Call, labels: Labels) -> Tensor:
        columns = (labels.steering_row, labels.group, labels.segment)
        self._uniform = call.valid is None and all(isinstance(value, int) for value in columns)
        key = (*columns, call.batch * call.length, call.device) if self._uniform else None
        row = spread(columns[0], call, "steering_row")
        self.steers = _any_row(row)
        if self._cached is not None and key is not None and key == self._key:
            return self._cached
        group, segment = spread(columns[1], call, "group"), spread(columns[2], call, "segment")
        table = torch.empty((call.batch, call.length, 4), dtype=torch.int32, device=call.device)
        for column, value in enumerate((row, group, segment, 1)):
            table[..., column] = value
        if call.valid is not None:
            table[..., :3].masked_fill_(~call.valid[..., None], -1)
        table = table.view(-1, 4)
        self._key, self._cached = key, table
        return table


def _any_row(row: int | Tensor) -> bool:
    if isinstance(row, int):
        return row >= 0
    return row.device.type != "cpu" or bool((row >= 0).any())


def _thread() -> int:
    """Which thread this is; 0 while compiling, where a call is one graph."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def recomputing() -> bool:
    """Whether this is a checkpointed layer run again inside the backward, whose tokens were counted already."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0
