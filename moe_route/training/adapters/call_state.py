"""What the adapters of a model must know of the call that is running: its sequences, groups and cache."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from moe_route.base.devices import upload
from moe_route.calls.call import Call, NamedGroups, named_groups, recomputing
from moe_route.calls.reader import CacheLengths, CallReader, cache_among
from moe_route.modules.intercept import untraced
from moe_route.training.adapters.config import AdapterConfig, AdapterError


class RunningText:
    """What was decided for the sequences of one cache, for the calls that continue them."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.length = 0  # tokens per sequence so far, padding included
        self.weights: dict[int, Tensor] = {}  # number of a mixture -> weights [B, n] of its adapters
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}  # number of a block -> sum [B, H] and number [B, 1] of inputs

    def reorder(self, rows: Tensor) -> None:
        """Follow a beam search, which puts other rows of the cache in the place of each row."""
        self.weights = {number: each[rows.to(each.device)] for number, each in self.weights.items()}
        self.sums = {
            number: (total[rows.to(total.device)], count[rows.to(count.device)])
            for number, (total, count) in self.sums.items()
        }


class Sequences(NamedTuple):
    """The sequences of one call."""

    call: Call
    first: Tensor  # column of the first token of each, int64 [B]
    codes: Tensor | int | None  # the adapter of each, int64 [B], or one for all; None: not chosen by group


class CallState:
    """The running call of an adapted model. One for all adapters of the model.

    Attributes:
        enabled: whether adapters change anything.
        sequences: those of the running call, or of the latest one.
        text: what was decided earlier for these sequences, or is decided now.
        decisions: number of a mixture -> router logits and ids of the latest call in training, for a balancing loss.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.enabled = True
        self.sequences: Sequences | None = None
        self.text: RunningText | None = None
        self.decisions: dict[int, tuple[Tensor, Tensor]] = {}
        self._owner: nn.Module | None = None
        self._lengths = CacheLengths()
        self._texts: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: dict[int, object]) -> CallState:
        """That of a copied model, which runs no call."""
        copied = CallState(self.config)
        copied.enabled = self.enabled
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return CallState, (self.config,)

    # ---- hooks on the modules that are given tokens

    @untraced
    def enter(
        self, reader: CallReader, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        """Begin a call, unless one is running and this is an inner part of it."""
        if not self.enabled or recomputing() or self._is_inside(module):
            return
        call = reader(args, kwargs, lengths=self._lengths)
        if call is None:
            return
        self._owner, self.decisions = module, {}
        codes = self._codes(call) if self.config.router == "group" else None
        self.sequences = Sequences(call, _first(call, self.config), codes)
        cache = cache_among(reader.named(args, kwargs))
        self.text = self._continued(call, cache) if self.config.router == "sequence" else None

    @untraced
    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """End the call that `module` began; an output of None means that it failed."""
        if self._owner is not module:
            return
        self._owner = None
        text, self.text = self.text, None
        if output is None or text is None or self.sequences is None:
            return
        text.length = self.sequences.call.past_length + self.sequences.call.length
        cache = cache_among(output if isinstance(output, Mapping) else getattr(output, "__dict__", {}))
        if cache is not None and cache not in self._texts:
            self._keep(cache, text)

    def _is_inside(self, module: nn.Module) -> bool:
        """Whether a module is part of the one whose call runs. After an interrupt that one may have ended long ago."""
        owner = self._owner
        return owner is not None and owner is not module and any(each is module for each in owner.modules())

    # ---- parts of it

    def of_layer(self, name: str) -> Sequences:
        """The sequences that the layer `name` runs on."""
        if self.sequences is None:
            raise AdapterError(f"{name!r} ran outside a call of the model: call the model, or disable() its adapters")
        return self.sequences

    def _continued(self, call: Call, cache: object) -> RunningText:
        text = None if cache is None else self._texts.get(cache)
        if call.past_length == 0:
            text = RunningText(call.batch)
            if cache is not None and not isinstance(cache, (tuple, list)):
                self._keep(cache, text)
            return text
        if text is None or text.batch != call.batch or text.length != call.past_length:
            raise AdapterError(
                f"a call continues {call.batch} sequences of {call.past_length} tokens whose beginning the adapters "
                "did not see like that: their routers decide by it. Give the texts whole, or fill the cache with the "
                "adapters enabled; a cache that was cut (assisted generation) cannot be continued"
            )
        return text

    def _keep(self, cache: Any, text: RunningText) -> None:
        self._texts[cache] = text
        if self.config.pooling != "prefix" or "reorder_cache" in vars(cache) or not hasattr(cache, "reorder_cache"):
            return  # beams of one sentence share its first token
        kept = weakref.ref(cache)  # a cache that refers to itself would stay in memory

        def reorder_cache(rows: Tensor) -> None:
            cache = kept()
            assert cache is not None  # its method runs
            type(cache).reorder_cache(cache, rows)
            self._texts[cache].reorder(rows)

        cache.reorder_cache = reorder_cache

    def _codes(self, call: Call) -> Tensor | int:
        known = self.config.groups
        named = named_groups()
        if named is None:
            raise AdapterError(
                "these adapters are chosen by group: run the model inside `with adapted.labels(groups=...)`, with one "
                f"of {', '.join(known)} for each sequence"
            )
        return _group_codes(named, known, call)


def valid_tokens(call: Call) -> Tensor:
    """Which tokens of a call are real, bool [B, S]."""
    if call.valid is None:
        return torch.ones(call.batch, call.length, dtype=torch.bool, device=call.device)
    return call.valid.expand(call.batch, call.length)


def _first(call: Call, config: AdapterConfig) -> Tensor:
    """Column of the first real token of each sequence, int64 [B].

    Raises `AdapterError` where one row holds several texts, and the adapters decide by the row.
    """
    valid = valid_tokens(call)
    if (
        config.router != "token"
        and call.past_length == 0
        and call.position_ids is not None
        and call.position_ids.dim() == 2
    ):
        starts = ((call.position_ids.expand(call.batch, -1) == 0) & valid).sum(1)
        if int(starts.max()) > 1:
            raise AdapterError(
                "several texts are packed into one row, and the adapters decide by the row: give each text a row of "
                "its own"
            )
    return valid.to(torch.int8).argmax(1)


def _group_codes(named: NamedGroups, known: tuple[str, ...], call: Call) -> Tensor | int:
    unknown = sorted(set(named.names) - set(known))
    if unknown:
        raise AdapterError(f"no adapter for {', '.join(map(repr, unknown))}: the groups are {', '.join(known)}")
    codes = np.asarray([known.index(name) for name in named.names], dtype=np.int64)[named.codes]
    if codes.ndim == 2:
        if (codes != codes[:, :1]).any():
            raise AdapterError("the labels differ within a sequence: adapters are chosen by sequence, one label each")
        codes = codes[:, 0]
    if (codes == codes.flat[0]).all():
        return int(codes.flat[0])
    if call.batch % len(codes):
        raise AdapterError(f"{len(codes)} labels for a batch of {call.batch} sequences: give one for each")
    rows = torch.from_numpy(np.repeat(codes, call.batch // len(codes)))  # beams stand beside each other
    return upload(rows, call.device)
