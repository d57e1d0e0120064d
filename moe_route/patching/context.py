"""The call of the model that is running now, and the token table that its routers share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe_route.base.devices import capturing, upload
from moe_route.calls.call import Call, recomputing
from moe_route.calls.generation import Generation
from moe_route.calls.reader import CacheLengths, CallReader, all_or_mask, tokens_of_patches, valid_tokens
from moe_route.calls.token_table import (
    CallListener,
    Labels,
    Tables,
    any_row,
    broadcast_rows,
    build_table,
    on_device,
    one_per_token,
)
from moe_route.contract.tables import token_table
from moe_route.modules.intercept import untraced
from moe_route.patching.deferred import MOST_TOKENS, DeferredCounts
from moe_route.patching.generate import refuse_paged


class RunningCall:
    """The running call and its token table, shared by all routers.

    Plain attributes, so that a compiled model can read them:
        idle: whether nothing is counted, steered or traced now.
        table: int32 [T, 4], the token table; None outside a call.
        last: the table of the latest call, for checkpointed layers that run again in the backward pass.
        tables: the token table on each device that has a router.
        hooks: how many hooks of modules and tensors this process had made when the last call began.
        small: whether a call runs whose routers may be counted after it (`deferred`).
        versioned: whether the tensors that the call makes have version counters; in inference mode they have none.
        steers: whether some token of the call may have a steering row.
        reached: whether some router ran in the call.
    """

    __slots__ = (
        "call",
        "counters",
        "deferred",
        "device",
        "entries",
        "generations",
        "hooks",
        "idle",
        "last",
        "lengths",
        "listener",
        "num_tokens",
        "owner",
        "placeholders",
        "reached",
        "small",
        "steers",
        "table",
        "tables",
        "told",
        "versioned",
        "_ahead",
        "_cached",
        "_finished",
        "_captured",
        "_key",
        "_labels",
        "_lock",
        "_on_capture",
        "_on_hooks",
        "_patches",
        "_thread",
        "_uniform",
    )

    def __init__(
        self,
        listener: CallListener | None = None,
        *,
        finished: Callable[[], Sequence[int]] = tuple,
        on_capture: Callable[[Labels], None] | None = None,
        on_hooks: Callable[[], None] | None = None,
    ) -> None:
        """Create the context of one attached model.

        Args:
            listener: gives the labels of each call.
            finished: returns the ids that ended sequences of a batch are fed.
            on_capture: called with the labels of each call that is captured into a CUDA graph.
            on_hooks: called before a call if hooks were registered anywhere since the last one.
        """
        self.listener = CallListener() if listener is None else listener
        self.deferred = DeferredCounts()
        self.placeholders: tuple[int, ...] = ()  # token ids that stand for pictures in a text
        self._ahead: Generation | None = None  # a generation whose pictures were processed before the model was called
        self._labels = Labels(-1, -1, -1)
        self._patches: dict[int, Tensor | None] = {}  # by number of patches: the token that each patch becomes part of
        self.lengths = CacheLengths()
        self.generations: list[Generation] = []  # running generations, the innermost last
        self.idle = True
        self.owner: nn.Module | None = None
        self.call: Call | None = None
        self.table: Tensor | None = None
        self.last: Tensor | None = None
        self.tables: Tables = {}
        self.counters: Tables = {}
        self.entries: Tables = {}
        self.told: Tables = {}
        self.num_tokens = 0
        self.device: torch.device | None = None
        self.steers = False
        self.reached = False
        self.small = False
        self.versioned = True
        self._captured = False
        self.hooks = RemovableHandle.next_id
        self._finished, self._on_capture, self._on_hooks = finished, on_capture, on_hooks
        self._key: tuple[object, ...] | None = None
        self._cached: Tables = {}
        self._uniform = False
        self._thread = 0
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, object]) -> RunningCall:
        """A new context without listener, for a copied model, whose hooks do nothing."""
        return RunningCall()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a model cannot be pickled while moe-route is attached: detach() first, and attach again where it is "
            "loaded. save_pretrained and state_dict work while attached"
        )

    def release(self) -> None:
        """Drop the listener, so that no reference cycle keeps the model alive."""
        self.listener, self._finished, self._on_capture, self._on_hooks = CallListener(), tuple, None, None
        self.forget_call()

    def forget_call(self) -> None:
        """End the running call, whatever an interrupt left behind."""
        self.deferred.drop_call()
        self.lengths.forget()
        self.call = self.table = self.owner = None
        self.small = False

    def enter(
        self, reader: CallReader, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        """Begin a call, unless one is running and this is an inner part of it.

        Raises `RuntimeError` if another thread runs the model, because one token table serves all routers.
        """
        if self.idle or recomputing():
            return
        _refuse_export()
        if "cache" in kwargs:
            refuse_paged(kwargs)
        if not self._claim(module):
            return
        if self.hooks != RemovableHandle.next_id and not torch.compiler.is_compiling() and self._on_hooks is not None:
            self._on_hooks()
            self.hooks = RemovableHandle.next_id
        generation = self.generation
        finished = self._finished if generation is None else tuple
        call = reader(args, kwargs, finished, self.lengths)
        if call is None:
            self.owner = None
            return
        if generation is not None:
            call = generation.follow(module, call)
            call.valid = all_or_mask(call.valid)
            call.continues = call.continues or self._ahead is generation
            self._ahead = None
        self.begin(call)
        self.reached = False
        # a captured graph does its own counting, since nothing can be counted after its replays
        self.small = self.num_tokens <= MOST_TOKENS and not self._captured
        self.versioned = not torch.is_inference_mode_enabled()

    def _claim(self, module: nn.Module) -> bool:
        """Make the call of `module` the running one; False if this thread already runs an outer call."""
        with nullcontext() if torch.compiler.is_compiling() else self._lock:
            if self.owner is not None:
                self._refuse_other_threads()
                if self.owner is not module:
                    return False
                self.forget_call()  # the last call was interrupted, and torch runs no hook then
            self.owner, self._thread = module, _thread()
            return True

    @property
    def generation(self) -> Generation | None:
        """The innermost `generate` that this thread is running."""
        if not self.generations:
            return None
        here = _thread()
        for generation in reversed(self.generations):
            if here in (0, generation.thread):
                return generation
        return None

    def begin_generation(self, generation: Generation) -> None:
        """Follow `generation`. Raises `RuntimeError` if another thread generates during recording or steering."""
        if not self.idle and any(other.thread != generation.thread for other in self.generations):
            raise RuntimeError(
                "generate was called in one thread while it runs in another: an attached model records and steers one "
                "text batch at a time. Use one thread, or a copy of the model for each"
            )
        self.generations.append(generation)

    def end_generation(self, generation: Generation) -> None:
        """Stop following `generation`, which returned or failed."""
        self.generations.remove(generation)
        if self._ahead is generation:
            self.forget_call()
            self._ahead = None

    def reject_drafts(self, count: int) -> None:
        """Report that the last `count` drafted tokens of the latest call were rejected."""
        if not self.idle:
            self.listener.reject_drafts(count)

    def _refuse_other_threads(self) -> None:
        if self._is_of_other_thread():
            raise RuntimeError(
                "the model was called in one thread while another was running it (or was interrupted in it): an "
                "attached model records and steers one call at a time. Use one thread, or a copy of the model for "
                "each; after an interrupt, begin the recording or steering anew."
            )

    def _is_of_other_thread(self) -> bool:
        here = _thread()
        return here != self._thread and 0 not in (here, self._thread)

    def begin(self, call: Call) -> None:
        """Get the labels of `call` and build its token table."""
        compiling = torch.compiler.is_compiling()
        labels = (_labels_of(self.listener, call) if compiling else self.listener.labels_of(call)) or Labels()
        self._captured = capturing(call.device)
        if self._captured and self._on_capture is not None:
            self._on_capture(labels)
        self.tables = self._build(call, labels)
        self.counters = {} if labels.counter is None else {call.device: one_per_token(labels.counter, call)}
        self.entries = {} if labels.entries is None else {call.device: one_per_token(labels.entries, call)}
        self.told = {} if labels.told is None else {call.device: one_per_token(labels.told, call)}
        self.table = self.last = self.tables[call.device]
        self.num_tokens, self.device, self.call = call.batch * call.length, call.device, call

    def leave(self, module: nn.Module, output: object) -> None:
        """End the call that `module` began; an output of None means that it failed."""
        if self.owner is not module or self._is_of_other_thread():  # that thread's own call was refused
            return
        call, table, small = self.call, self.table, self.small
        if output is None or call is None or table is None:
            self.forget_call()
            return
        self.call = self.table = None
        self.small = False
        try:
            self._complete(module, call, table.shape[0], small)
        finally:
            self.owner = None  # last: another thread may begin a call from here on

    def _complete(self, module: nn.Module, call: Call, num_tokens: int, small: bool) -> None:
        """Count what was deferred, and tell the listener. Raises `RuntimeError` if no router ran."""
        if small:
            self.reached = self.reached or bool(self.deferred.kept)
            self.deferred.end_call(num_tokens, self.tables)
        if not self.reached and not self.idle and not module.training:  # in training, layers may be dropped
            raise RuntimeError(
                f"{type(module).__name__} was called, but none of its routers: the blocks above them were replaced "
                "(kernels, quantization, PEFT's modules_to_save) or compiled before attach. Detach; load the model "
                "without kernels (use_kernels=False), call torch.compiler.reset() after compiling; and attach again."
            )
        if torch.compiler.is_compiling():
            _after_call(self.listener, call)
        else:
            self.listener.after_call(call)

    def table_for(self, num_tokens: int, device: torch.device, name: str) -> Tensor:
        """The token table for the less common cases.

        These are a router called outside a model call, on another device, or with only some of the tokens.
        """
        if self.table is None and not recomputing():
            call = Call(1, num_tokens, 0, None, "prefill", device)
            self.begin(call)
            self.listener.after_call(call)  # the end of the call cannot be observed
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
        """The token table for a router that is given only the tokens with indices `rows` [T]."""
        table = self.table if self.table is not None else self.last
        if table is None or (self.table is None and not recomputing()):
            return self.table_for(len(rows), device, name)
        return on_device(self.tables, device)[rows.to(device)]

    def table_of_patches(self, num_patches: int, device: torch.device) -> Tensor:
        """The token table for a router of a vision tower, one row per patch.

        Each patch has the labels of the token that it becomes part of. If that is unknown, it has the labels that all
        tokens of the call share, and -1 for the others.
        """
        if self.table is None and not recomputing() and not self._begin_ahead():
            return self.table_for(num_patches, device, "of a vision tower")
        rows = self.rows_of_patches(num_patches)
        if rows is not None:
            return on_device(self.tables, device)[rows.to(device)]
        row, group, segment = (value if isinstance(value, int) else -1 for value in self._labels.columns)
        return token_table(num_patches, steering_row=row, group=group, segment=segment, device=device)

    def _begin_ahead(self) -> bool:
        """Begin the call of the prompt whose pictures `generate` passes to a vision tower before it calls the model.

        Returns False if there is no such prompt.
        """
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
        """int64 [P]: the token that each patch becomes part of; None if unknown or if all labels are equal."""
        if num_patches not in self._patches:
            alike = not self.counters and self._labels.uniform
            ids = None if alike or self.call is None else self.call.input_ids
            self._patches[num_patches] = tokens_of_patches(ids, self.placeholders, num_patches)
        return self._patches[num_patches]

    def _build(self, call: Call, labels: Labels) -> Tables:
        self._labels, self._patches = labels, {}
        self._uniform = call.valid is None and labels.uniform
        # memory of a captured graph has no content yet, and the tensors that it reads must keep their address
        keeps = self._uniform and not self._captured
        key = (*labels.columns, call.batch * call.length, call.device) if keeps else None
        if keeps and key == self._key:
            return self._cached  # `steers` is a matter of the key
        row = broadcast_rows(labels.steering_row, call, "steering_row")
        self.steers = any_row(row)
        tables = {call.device: build_table(call, labels, row)}
        self._key, self._cached = key, tables
        return tables


# torch.compile calls these two without tracing them, because bookkeeping in Python cannot be part of a graph. Only a
# call that is compiled takes this way: the wrapper of `disable` costs as much as the bookkeeping of a decode step.
@untraced
def _labels_of(listener: CallListener, call: Call) -> Labels | None:
    return listener.labels_of(call)


@untraced
def _after_call(listener: CallListener, call: Call) -> None:
    listener.after_call(call)


def _thread() -> int:
    """Id of this thread; 0 while compiling, where a whole call is one graph."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _refuse_export() -> None:
    if torch.compiler.is_exporting():
        raise RuntimeError(
            "torch.export inside record() or steer(): the program would keep the counting and the steering of this one "
            "call. Export outside of them; an attached model exports like a free one there"
        )
