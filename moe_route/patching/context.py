"""What one call of the model says about its tokens, and the token table its routers share.

Flatten order is `b * S + s` everywhere. Padding tokens are routed (the model routes them too) but neither counted nor
steered: group, segment and steering row -1, valid 1.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

from moe_route.calls.cache_lengths import CacheLengths
from moe_route.calls.generation import Generation
from moe_route.calls.images import tokens_of_patches
from moe_route.contract.tables import token_table
from moe_route.devices import capturing, upload
from moe_route.patching.deferred import MOST_TOKENS, DeferredCounts
from moe_route.patching.generate import refuse_paged

IntLike = int | Tensor | Sequence[int]


@dataclass(slots=True, eq=False)
class Call:
    """One forward of the model. `valid` is bool [batch, length], or None where every token is real; `input_ids` are the
    token ids [batch, length], or None where embeddings were passed. `continues`: about the same sequences as the call
    before it (a decoder's after its encoder's, a step of `generate` without a cache). `again`, bool [batch, length]:
    real tokens that an earlier call ran already, steered as they were then (the first `prompt` columns as prefill) and
    not counted; they are not in `valid`. `denoises`: its tokens are a block that runs anew at every step of a
    diffusion. `drafted`: the last columns are drafts of `generate`, which is told after the call how many of them were
    refused; with them, the first `prompt` columns are prefill. `ahead`: the model is called with these tokens later;
    what runs now is a vision tower. `beside`: run for a text, but no part of it (an assistant's call, guidance), so
    not counted. `mask` and `position_ids` are what the call was given, where they say which positions its tokens have;
    `counter` is the length of a static cache, where it lies on the device (the replays of a graph read it anew)."""

    batch: int
    length: int
    past_length: int
    valid: Tensor | None
    phase: Literal["prefill", "decode"]
    device: torch.device
    input_ids: Tensor | None = None
    continues: bool = False
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    counter: Tensor | None = None
    again: Tensor | None = None
    prompt: int = 0
    denoises: bool = False
    ahead: bool = False
    drafted: int = 0
    beside: bool = False

    def positions(self) -> Tensor:
        """int64 [batch or 1, length]: the place of each token in its sequence, padding not counted. To be asked before
        the model runs."""
        given, mask = self.position_ids, self.mask
        if given is not None and given.dim() == 2 and given.shape[1] == self.length:
            return given.to(torch.int64)
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= self.length:
            return (mask.bool().cumsum(1) - 1).clamp(min=0)[:, mask.shape[1] - self.length :]
        here = torch.arange(self.length, device=self.device)[None]
        return here + (self.past_length if self.counter is None else self.counter)

    def tokens_before(self) -> Tensor:
        """int64 [batch or 1, length]: how many real tokens of its row come before each token, which is what a trace
        calls its position. Unlike `positions` it goes on where texts are packed into one row. To be asked before the
        model runs."""
        if self.past_length or self.counter is not None:
            return self.positions()
        if self.valid is None:
            return torch.arange(self.length, device=self.device)[None]
        real = self.valid if self.again is None else self.valid | self.again
        return (real.cumsum(1) - 1).clamp(min=0)


@dataclass(slots=True, eq=False)
class Labels:
    """What the token table is built from: an int for all tokens, or integers [B] or [B, S].

    Fewer rows than the batch (beams, several returned sequences) are repeated where they divide it. `steering_row` is
    a row of the steering tables, `group` and `segment` rows of the statistics tables; -1 is none. `counter` [B, S]
    tells the tokens apart for what is drawn for each of them; `entries` [B, S, M] says which entry of each of M tables
    of recorded choices is a token's, -1 for none.
    """

    steering_row: IntLike = -1
    group: IntLike = 0
    segment: IntLike = -1
    counter: Tensor | None = None
    entries: Tensor | None = None


class CallReader:
    """Reads a `Call` from the arguments of one module's forward, positional or by name.

    With `first_tensor`, the first tensor argument stands for the tokens: integers [B, S], floats [B, S, H] or, one
    token a row, [T, H].
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
        # a decoder that denoises blocks has names of its own for what is its
        self.denoises = decodes and "input_ids" not in parameters
        # an encoder and a decoder inside, which see different tokens: each is a call of its own
        self.holds_two = decodes and not self.denoises
        self.names = {name.removeprefix("decoder_") if self.denoises else name: name for name in parameters}
        self.places = {name: place for place, name in enumerate(self.names) if name in self.NAMES}

    def argument(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """The argument `name` of the call, None where it was not given."""
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
        """The call, or None where the arguments hold neither token ids nor embeddings.

        `finished` gives the token ids that a sequence of a batch is fed after its end (padding and end of sequence):
        `generate` marks them valid in its mask, here they count as padding. `lengths` knows the caches of earlier
        calls.
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
        phase: Literal["prefill", "decode"] = "decode" if grows or self.denoises else "prefill"
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
        """The length of the cache, where the cache keeps it on the device."""
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
                    # a number above 0 needs no following; a static cache says 0 until it has its counter
                    return lengths.before(cache, past, length) if isinstance(past, Tensor) or not past else int(past)
                except ValueError:  # a cache of linear attention alone has no length; the mask may say it
                    continue
            if isinstance(cache, (tuple, list)) and cache:
                return int(cache[0][0].shape[-2])
        position = self.argument("cache_position", args, kwargs)
        if isinstance(position, Tensor) and position.numel():
            return int(position.reshape(-1)[0])  # waits for a device; transformers 5 passes the cache instead
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
    labels = upload(torch.as_tensor(value), call.device)
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


Tables = dict[torch.device, Tensor]  # something of a call, on each device that asked for it


def on_device(tables: Tables, device: torch.device) -> Tensor:
    """Something of a call on `device`: copied there once."""
    if device not in tables:
        tables[device] = upload(next(iter(tables.values())), device)
    return tables[device]


class RunningCall:
    """The token table of the call that is running, shared by all routers. Plain attributes, so that a compiled model
    can read them.

    `table` is None outside a call; `last` is kept for the recomputation of a checkpointed layer in the backward.
    `tables` holds it on each device that has a router, `small` is True inside a call whose routers may be counted
    after it (`deferred`).
    `steers` is False where no token of the call can have a steering row.
    """

    __slots__ = (
        "after",
        "call",
        "counters",
        "deferred",
        "device",
        "entries",
        "generations",
        "idle",
        "label",
        "last",
        "lengths",
        "num_tokens",
        "owner",
        "placeholders",
        "reached",
        "settle",
        "small",
        "steers",
        "table",
        "tables",
        "_ahead",
        "_cached",
        "_columns",
        "_finished",
        "_key",
        "_patches",
        "_thread",
        "_uniform",
    )

    def __init__(
        self,
        label: Callable[[Call], Labels | None],
        after: Callable[[Call], None],
        finished: Callable[[], Sequence[int]] = tuple,
        settle: Callable[[int], None] | None = None,
    ) -> None:
        self.label, self.after, self.settle = label, after, settle
        self.deferred = DeferredCounts()
        self.placeholders: tuple[int, ...] = ()  # ids that stand for pictures among those of a text
        self._ahead: Generation | None = None  # whose prompt's pictures were seen before the model was called
        self._columns: tuple[IntLike, ...] = (-1, -1, -1)  # steering row, group and segment of the call
        self._patches: dict[int, Tensor | None] = {}  # by their number, which tokens patches become part of
        self.lengths = CacheLengths()
        self.generations: list[Generation] = []  # that are running, one inside the other
        self.idle = True
        self.owner: nn.Module | None = None
        self.call: Call | None = None
        self.table: Tensor | None = None
        self.last: Tensor | None = None
        self.tables: Tables = {}
        self.counters: Tables = {}
        self.entries: Tables = {}
        self.num_tokens = 0
        self.device: torch.device | None = None
        self.steers = False
        self.reached = False
        self.small = False
        self._finished = finished
        self._key: tuple[object, ...] | None = None
        self._cached: Tables = {}
        self._uniform = False
        self._thread = 0

    def __deepcopy__(self, memo: dict[int, object]) -> RunningCall:
        """Of a copied model, whose hooks have nothing to do."""
        return RunningCall(_no_labels, _nothing)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a model cannot be pickled while moe-route is attached: detach() first, and attach again where it is "
            "loaded. save_pretrained and state_dict work while attached"
        )

    def release(self) -> None:
        """Nobody listens any more: no cycle keeps the model alive."""
        self.label, self.after, self.settle, self._finished = _no_labels, _nothing, None, tuple
        self.forget_call()

    def forget_call(self) -> None:
        """No call is running, whatever an interrupt left behind."""
        self.deferred.drop_call()
        self.lengths.forget()
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
        _refuse_export()
        refuse_paged(kwargs)
        if self.owner is not None:
            self._refuse_other_threads()
            if self.owner is not module:
                return
            self.forget_call()  # the last call was interrupted: torch runs no hook then
        generation = self.generation
        finished = self._finished if generation is None else tuple
        call = reader(args, kwargs, finished, self.lengths)
        if call is None:
            return
        if generation is not None:
            generation.follow(module, call)
            call.valid = all_or_mask(call.valid)
            call.continues = call.continues or self._ahead is generation
            self._ahead = None
        self.begin(call)
        self.owner, self.reached, self._thread = module, False, _thread()
        # a graph that is captured counts in itself, not after it
        self.small = self.num_tokens <= MOST_TOKENS and not capturing(call.device)

    @property
    def generation(self) -> Generation | None:
        """The innermost `generate` of this thread that is running."""
        here = _thread()
        for generation in reversed(self.generations):
            if here in (0, generation.thread):
                return generation
        return None

    def begin_generation(self, generation: Generation) -> None:
        """Raises `RuntimeError` where another thread generates while something records or steers."""
        if not self.idle and any(other.thread != generation.thread for other in self.generations):
            raise RuntimeError(
                "generate was called in one thread while it runs in another: an attached model records and steers one "
                "text batch at a time. Use one thread, or a copy of the model for each"
            )
        self.generations.append(generation)

    def end_generation(self, generation: Generation) -> None:
        """It returned, or failed."""
        self.generations.remove(generation)
        if self._ahead is generation:
            self.forget_call()
            self._ahead = None

    def take_back(self, tokens: int) -> None:
        """The last `tokens` columns of the call that was just made are in no text: drafts that were refused."""
        if not self.idle and self.settle is not None:
            self.settle(tokens)

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
        self.tables = self._build(call, labels)
        self.counters = {} if labels.counter is None else {call.device: _one_a_token(labels.counter, call)}
        self.entries = {} if labels.entries is None else {call.device: _one_a_token(labels.entries, call)}
        self.table = self.last = self.tables[call.device]
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
            self.deferred.end_call(table.shape[0], partial(on_device, self.tables))
        if not self.reached and not self.idle and not module.training:  # in training, layers may be dropped
            raise RuntimeError(
                f"{type(module).__name__} was called, but none of its routers: the blocks above them were replaced "
                "(kernels, quantization, PEFT's modules_to_save) or compiled before attach. Detach; load the model "
                "without kernels (use_kernels=False), call torch.compiler.reset() after compiling; and attach again."
            )
        self.after(call)

    def table_for(self, num_tokens: int, device: torch.device, name: str) -> Tensor:
        """The table for a router that the common case does not fit: called outside a model call, on another device,
        or with only some of the tokens."""
        if self.table is None and not recomputing():
            call = Call(1, num_tokens, 0, None, "prefill", device)
            self.begin(call)
            self.after(call)  # its end is not seen
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
            return upload(table[:1], device).expand(num_tokens, 4).contiguous()
        return on_device(self.tables, device)

    def table_of(self, rows: Tensor, device: torch.device, name: str) -> Tensor:
        """The table for a router that is given only the tokens `rows` [T] of the call."""
        table = self.table if self.table is not None else self.last
        if table is None or (self.table is None and not recomputing()):
            return self.table_for(len(rows), device, name)
        return on_device(self.tables, device)[rows.to(device)]

    def table_of_patches(self, num_patches: int, device: torch.device) -> Tensor:
        """The table for a router of a vision tower: each patch has the labels of the token that it becomes part of;
        where that is not known, those that all tokens of the call share, -1 for the others."""
        if self.table is None and not recomputing() and not self._begin_ahead():
            return self.table_for(num_patches, device, "of a vision tower")
        rows = self.rows_of_patches(num_patches)
        if rows is not None:
            return on_device(self.tables, device)[rows.to(device)]
        row, group, segment = (value if isinstance(value, int) else -1 for value in self._columns)
        return token_table(num_patches, steering_row=row, group=group, segment=segment, device=device)

    def _begin_ahead(self) -> bool:
        """Begin the call of the prompt whose pictures `generate` lets a tower see before the model is called; False
        where there is none."""
        generation = self.generation
        if generation is None or generation.prompt is None:
            return False
        ids, mask, cache = generation.prompt
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        ids = ids[:, past:]
        batch, length = ids.shape
        valid = all_or_mask(valid_tokens(mask, batch, length, past))
        mask = mask if isinstance(mask, Tensor) else None
        self.begin(Call(batch, length, past, valid, "prefill", ids.device, ids, mask=mask, ahead=True))
        self._ahead = generation
        return True

    def rows_of_patches(self, num_patches: int) -> Tensor | None:
        """The token of the call that each patch becomes part of, int64 [P], where tokens differ and it is known."""
        if num_patches not in self._patches:
            alike = not self.counters and all(isinstance(value, int) for value in self._columns)
            ids = None if alike or self.call is None else self.call.input_ids
            self._patches[num_patches] = tokens_of_patches(ids, self.placeholders, num_patches)
        return self._patches[num_patches]

    def _build(self, call: Call, labels: Labels) -> Tables:
        columns = (labels.steering_row, labels.group, labels.segment)
        self._columns, self._patches = columns, {}
        alike = call.valid is None and labels.entries is None
        self._uniform = alike and all(isinstance(value, int) for value in columns)
        key = (*columns, call.batch * call.length, call.device) if self._uniform else None
        row = spread(columns[0], call, "steering_row")
        self.steers = _any_row(row)
        # what a graph fills in when it is replayed holds nothing yet, and what it reads must stay where it is
        keeps = key is not None and not capturing(call.device)
        if keeps and key == self._key:
            return self._cached
        group, segment = spread(columns[1], call, "group"), spread(columns[2], call, "segment")
        table = torch.empty((call.batch, call.length, 4), dtype=torch.int32, device=call.device)
        for column, value in enumerate((row, group, segment, 1)):
            table[..., column] = value
        if call.valid is not None:
            table[..., 1:3].masked_fill_(~call.valid[..., None], -1)
            steered = call.valid if call.again is None else call.valid | call.again
            table[..., 0].masked_fill_(~steered, -1)
        tables = {call.device: table.view(-1, 4)}
        if keeps:
            self._key, self._cached = key, tables
        return tables


def _no_labels(call: Call) -> None:
    """Nothing is known of the tokens."""


def _nothing(call: Call) -> None:
    """Nobody asks about the call."""


def _one_a_token(values: Tensor, call: Call) -> Tensor:
    """int64 [T] from integers that broadcast to [B, S]; [T, M] from those that broadcast to [B, S, M]."""
    more = values.shape[2:]
    return upload(values, call.device).expand(call.batch, call.length, *more).reshape(-1, *more)


def _any_row(row: int | Tensor) -> bool:
    if isinstance(row, int):
        return row >= 0
    return row.device.type != "cpu" or bool((row >= 0).any())


def _thread() -> int:
    """Which thread this is; 0 while compiling, where a call is one graph."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _refuse_export() -> None:
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "torch.export inside record() or steer(): the program would keep the counting and the steering of this one "
            "call. Export outside of them; an attached model exports like a free one there"
        )


def recomputing() -> bool:
    """Whether this is a checkpointed layer run again inside the backward, whose tokens were counted already."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0
