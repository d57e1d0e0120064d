"""The adapters of one linear layer: what they add to its output, and who mixes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from moe_route.calls.call import recomputing
from moe_route.contract.spec import RouterSpec
from moe_route.nn import TopKRouter
from moe_route.training.adapters.call_state import CallState, Sequences, valid_tokens
from moe_route.training.adapters.config import AdapterConfig, AdapterError, ShardPool

# ---- what the routers of one block read: the hidden states that the block is given, one decision for all its adapters.


class BlockInput:
    """The hidden states that one block of layers is given in the running call, and the sequences that they belong to.

    A layer that gradient checkpointing runs again reads them once more, in the backward pass. They are therefore
    remembered, without being kept alive: the checkpoint does that.
    """

    def __init__(self, name: str, number: int, state: CallState) -> None:
        self.name, self.number, self.state = name, number, state
        self._hidden: Tensor | None = None
        self._pooled: Tensor | None = None
        self._sequences: Sequences | None = None
        self._graphs: list[tuple[TensorWeakRef, Sequences]] = []  # calls whose backward pass may come
        self._with_gradient = False

    def __deepcopy__(self, memo: dict[int, object]) -> BlockInput:
        """That of a copied model, without hidden states."""
        copied = BlockInput(self.name, self.number, copy.deepcopy(self.state, memo))
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return BlockInput, (self.name, self.number, self.state)

    def see(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """The forward pre-hook of the block."""
        if not self.state.enabled:
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        self._hidden = self._pooled = None
        sequences = self.sequences() if recomputing() else self.state.of_layer(self.name)
        call = sequences.call
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != (call.batch, call.length):
            given = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise AdapterError(
                f"block {self.name!r} is given {given}, and not hidden states [{call.batch}, {call.length}, H] of the "
                "call: its adapters cannot tell the sequences apart. Leave its layers out by target_modules="
            )
        self._hidden, self._sequences = hidden, sequences
        self._with_gradient = torch.is_grad_enabled()
        if self._with_gradient and module.training and not recomputing():
            self._graphs = [(ref, of) for ref, of in self._graphs if ref() is not None]
            self._graphs.append((TensorWeakRef(hidden), sequences))

    def forget(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """The forward hook of the block: keeps nothing alive."""
        self._hidden = self._pooled = self._sequences = None

    def sequences(self) -> Sequences:
        """The sequences of the call that the block runs in, or runs again in."""
        return self._given()[1]

    def of_tokens(self) -> Tensor:
        """What each token's decision reads, [B, S, H]."""
        hidden = self._given()[0]
        if self.state.config.router == "token":
            return hidden
        if self._pooled is None:
            self._pooled = self._prefix_means(hidden)
        return self._pooled

    def of_sequences(self) -> Tensor:
        """What each sequence's decision reads, [B, H]."""
        if self._pooled is None:
            hidden, (call, first, _) = self._given()
            if self.state.config.pooling == "mean":
                valid = valid_tokens(call).to(hidden.device)[..., None]
                total = hidden.float().masked_fill(~valid, 0).sum(1)
                self._pooled = (total / valid.sum(1).clamp(min=1)).to(hidden.dtype)
            else:
                self._pooled = hidden[torch.arange(call.batch, device=hidden.device), first.to(hidden.device)]
        return self._pooled

    def first_rows(self) -> Tensor:
        """Numbers of the first tokens of all sequences in the call, int64 [B]."""
        hidden, (call, first, _) = self._given()
        return torch.arange(call.batch, device=hidden.device) * call.length + first.to(hidden.device)

    def no_tokens(self) -> Tensor:
        """Hidden states of no token, [0, H]."""
        return self._given()[0][0, :0]

    def no_rows(self) -> Tensor:
        """Numbers of no token, int64 [0]."""
        return torch.empty(0, dtype=torch.int64, device=self._given()[0].device)

    def _given(self) -> tuple[Tensor, Sequences]:
        if self._hidden is not None and self._sequences is not None:
            if self._with_gradient and not torch.is_grad_enabled():
                raise AdapterError(
                    "reentrant gradient checkpointing loses the gradient of what the adapters read: use "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            return self._hidden, self._sequences
        if not recomputing():
            raise AdapterError(f"a layer of block {self.name!r} ran outside it: call the model, not its layers")
        waiting = [(hidden, of) for ref, of in self._graphs if (hidden := ref()) is not None]
        if len(waiting) != 1:
            raise AdapterError(
                f"gradient checkpointing runs block {self.name!r} again, and the model was called {len(waiting)} times "
                "since the latest backward pass: call backward() after each call"
            )
        return waiting[0]

    def _prefix_means(self, hidden: Tensor) -> Tensor:
        """Mean of the real tokens up to each one, those of earlier calls included, [B, S, H]."""
        text, call = self.state.text, self.sequences().call
        valid = valid_tokens(call).to(hidden.device)[..., None]
        totals = hidden.float().masked_fill(~valid, 0).cumsum(1)
        counts = valid.cumsum(1)
        if text is not None and call.past_length > 0:
            total, count = text.sums[self.number]
            totals, counts = totals + total[:, None], counts + count[:, None]
        if text is not None and not recomputing():
            text.sums[self.number] = totals[:, -1], counts[:, -1]
        return (totals / counts.clamp(min=1)).to(hidden.dtype)


# ---- the factors A and B of the adapters of one linear layer: its own, or gathered from pools of shards


class OwnFactors(nn.Module):
    """Factors of n adapters of rank r: `a` [n, r, d_in] and `b` [n, r, d_out]; the update of adapter i is `b_i^T a_i`.

    A starts as in LoRA (arXiv 2106.09685 section 4.1; Kaiming uniform with a = sqrt 5), B at zero.
    """

    def __init__(
        self, experts: int, rank: int, sizes: tuple[int, int], generator: torch.Generator, **place: Any
    ) -> None:
        super().__init__()
        inner, outer = sizes
        self.a = nn.Parameter(_drawn((experts, rank, inner), inner, generator, **place))
        self.b = nn.Parameter(torch.zeros(experts, rank, outer, **place))

    def forward(self) -> tuple[Tensor, Tensor]:
        """A [n, r, d_in] and B [n, r, d_out]."""
        return self.a, self.b


class Pools(nn.Module):
    """The pools of one kind of linear layer: shards of A [e L l, d_in / l] and of B [e L l, d_out / l].

    L is the number of adapters that draw from them. A is drawn with the fan-in of a whole row, d_in.
    """

    def __init__(
        self,
        pool: ShardPool,
        rank: int,
        users: int,
        sizes: tuple[int, int],
        generator: torch.Generator,
        **place: Any,
    ) -> None:
        super().__init__()
        if any(size % pool.shards for size in sizes):
            raise AdapterError(f"shards={pool.shards} must divide both sizes of a layer, and {list(sizes)} are not")
        if rank - pool.private > (pool.rank - pool.private) * users:
            raise AdapterError(
                f"rank={rank} needs {rank - pool.private} public ranks, and {users} layers share "
                f"{(pool.rank - pool.private) * users}: lower rank= or raise ShardPool(rank=)"
            )
        self.pool, self.rank, self.users = pool, rank, users
        inner, outer = (size // pool.shards for size in sizes)
        rows = pool.rank * users * pool.shards
        self.a = nn.Parameter(_drawn((rows, inner), sizes[0], generator, **place))
        self.b = nn.Parameter(torch.zeros(rows, outer, **place))

    def draw(self, user: int, generator: torch.Generator) -> Tensor:
        """Rows of the shards of one user, int64 [r l]: public ones at random, then its private ones."""
        pool = self.pool
        public = (pool.rank - pool.private) * self.users * pool.shards
        chosen = torch.randperm(public, generator=generator)[: (self.rank - pool.private) * pool.shards]
        own = pool.private * pool.shards
        return torch.cat([chosen, torch.arange(own) + public + user * own])


class PooledFactors(nn.Module):
    """Factors of n adapters whose rows are laid together from shards, as the buffers `shards_a`, `shards_b` say.

    Outside training, the rows are gathered once and kept until the pool changes.
    """

    shards_a: Tensor
    shards_b: Tensor

    def __init__(self, pools: Pools, experts: int, first_user: int, generator: torch.Generator) -> None:
        super().__init__()
        self._pools = (pools,)  # in a tuple, so that its parameters are registered in one place only
        self.experts = experts
        device = pools.a.device
        for name in ("shards_a", "shards_b"):  # drawn apart, so that pairs of rows differ from layer to layer
            rows = torch.cat([pools.draw(first_user + expert, generator) for expert in range(experts)])
            self.register_buffer(name, rows.to(device))
        self._kept: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """A [n, r, d_in] and B [n, r, d_out]."""
        (pools,) = self._pools
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or pools.a.is_inference():
            self._kept = None
            return self._gathered(pools.a, self.shards_a), self._gathered(pools.b, self.shards_b)
        state = (pools.a.data_ptr(), pools.a._version, pools.b.data_ptr(), pools.b._version)
        if self._kept is None or self._kept[0] != state:
            kept = self._gathered(pools.a, self.shards_a), self._gathered(pools.b, self.shards_b)
            self._kept = (state, *kept)
        return self._kept[1:]

    def _gathered(self, pool: Tensor, rows: Tensor) -> Tensor:
        (pools,) = self._pools
        return pool.index_select(0, rows).reshape(self.experts, pools.rank, -1)


def _drawn(shape: tuple[int, ...], fan_in: int, generator: torch.Generator, **place: Any) -> Tensor:
    """Kaiming uniform with a = sqrt 5 for this fan-in: uniform in +-1 / sqrt(fan-in)."""
    if torch.device(place.get("device") or "cpu").type == "meta":
        return torch.empty(shape, **place)
    bound = 1 / math.sqrt(fan_in)
    return (torch.rand(shape, generator=generator) * (2 * bound) - bound).to(**place)


class AdapterRouter(TopKRouter):
    """The router of the adapters of one linear layer. `attach` records and steers it.

    `rows` are the tokens of the call that it decided for, int64 [N]; None: all of them. A router that decides once a
    sequence names the first token of each.
    """

    rows: Tensor | None = None

    @classmethod
    def of(cls, config: AdapterConfig, hidden_size: int, generator: torch.Generator, **place: Any) -> AdapterRouter:
        """A new router for these adapters, with weights drawn from `generator`."""
        top_k = config.experts if config.top_k is None else config.top_k
        renormalize = config.renormalize if top_k < config.experts else "none"  # all weights sum to 1 by themselves
        spec = RouterSpec(score="softmax", renormalize=renormalize)
        router = cls(hidden_size=hidden_size, num_experts=config.experts, top_k=top_k, spec=spec, **place)
        if not router.weight.is_meta:
            drawn = torch.rand(router.weight.shape, generator=generator)
            with torch.no_grad():
                router.weight.copy_((2 * drawn - 1) / hidden_size**0.5)
        return router


class LowRankMixture(nn.Module):
    """The adapters of one linear layer; adds ``scale * sum_i w_i B_i A_i dropout(x)`` to its output.

    Attributes:
        name: dotted name of the layer in the model.
        router: gives the weights, or None.
    """

    def __init__(
        self,
        name: str,
        number: int,
        config: AdapterConfig,
        factors: nn.Module,
        router: AdapterRouter | None,
        state: CallState,
        block: BlockInput | None,
    ) -> None:
        super().__init__()
        self.name, self.number, self.config = name, number, config
        self.factors, self.router, self.state, self.block = factors, router, state, block

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook of the linear layer."""
        if not self.state.enabled:
            return output
        return output + self(args[0]).to(output.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the adapters add for the inputs of the linear layer [..., d_in]: [..., d_out]."""
        a, b = self.factors()
        inputs = F.dropout(hidden.to(a.dtype), self.config.dropout, self.training)
        if self.config.router == "group":
            return self._of_groups(inputs, a, b) * self.config.scale
        rows = F.linear(inputs, a.flatten(0, 1))
        if self.router is not None:
            weights = self._weights(hidden)
            rows = (rows.unflatten(-1, a.shape[:2]) * weights.to(rows)[..., None]).flatten(-2)
        return F.linear(rows, b.flatten(0, 1).t()) * self.config.scale

    def _of_groups(self, inputs: Tensor, a: Tensor, b: Tensor) -> Tensor:
        sequences = self.state.of_layer(self.name) if self.block is None else self.block.sequences()
        call, codes = sequences.call, sequences.codes
        if isinstance(codes, int):
            return F.linear(F.linear(inputs, a[codes]), b[codes].t())
        assert codes is not None  # enter() read them
        codes = codes.to(inputs.device)
        by_sequence = _by_sequence(inputs, call.batch, self.name)
        added = by_sequence @ a[codes].transpose(1, 2) @ b[codes]
        return added.reshape(*inputs.shape[:-1], b.shape[-1])

    def _weights(self, hidden: Tensor) -> Tensor:
        """Weight of each adapter for each row of the layer's inputs: [..., n], or [B, 1, n]."""
        assert self.block is not None
        call = self.block.sequences().call
        if self.config.router == "sequence" and self.config.pooling != "prefix":
            weights = self._decided_once()
            if hidden.dim() > 2 and hidden.shape[0] == call.batch:
                return weights.reshape(call.batch, *[1] * (hidden.dim() - 2), -1)
            rows = hidden.shape[:-1].numel()
            if rows % call.batch:
                raise AdapterError(_not_all(self.name, rows, call.batch * call.length))
            return weights.repeat_interleave(rows // call.batch, 0).reshape(*hidden.shape[:-1], -1)
        weights = self._route(self.block.of_tokens().flatten(0, 1), None)
        if hidden.shape[:-1].numel() != len(weights):
            raise AdapterError(_not_all(self.name, hidden.shape[:-1].numel(), len(weights)))
        return weights.reshape(*hidden.shape[:-1], -1)

    def _decided_once(self) -> Tensor:
        """Weights [B, n] that hold for the whole sequence, decided in the call that began it."""
        assert self.block is not None
        text, call = self.state.text, self.block.sequences().call
        if text is not None and call.past_length > 0:
            if self._is_watched():  # an attached model must see its routers run in every call
                self._route(self.block.no_tokens(), self.block.no_rows())  # nothing is decided, so nothing is counted
            return text.weights[self.number]
        weights = self._route(self.block.of_sequences(), self.block.first_rows())
        if text is not None and not recomputing():
            text.weights[self.number] = weights
        return weights

    def _is_watched(self) -> bool:
        """Whether the router is attached to, by a hook or by another forward."""
        return bool(self.router is not None and self.router._forward_hooks) or type(self.router) is not AdapterRouter

    def _route(self, read: Tensor, rows: Tensor | None) -> Tensor:
        """Route [N, H]; `rows` are the tokens that this decides for. Returns [N, n], zero where not chosen."""
        router = self.router
        assert router is not None
        router.rows = rows
        logits, weights, ids = router(read.to(router.weight))
        if self.training and torch.is_grad_enabled() and not recomputing():
            self.state.decisions[self.number] = logits, ids
        return torch.zeros_like(logits).scatter_add(1, ids.long(), weights.to(logits.dtype))


class EmbeddingMixture(LowRankMixture):
    """The adapters of an embedding, whose inputs are token ids [B, S].

    There are no hidden states yet that a router could read, so the weights of a mixture are the softmax of numbers that
    are trained, the same for all tokens (MT4CrossOIE, arXiv 2308.06552 section 3.2).

    Attributes:
        mix: these numbers [n], zero at the start; None where adapters are not routed.
    """

    def __init__(
        self, name: str, number: int, config: AdapterConfig, factors: nn.Module, state: CallState, **place: Any
    ):
        super().__init__(name, number, config, factors, None, state, None)
        self.mix = nn.Parameter(torch.zeros(config.experts, **place)) if config.routed else None

    def forward(self, ids: Tensor) -> Tensor:
        """What the adapters add for token ids [...]: [..., d_out]."""
        a, b = self.factors()
        rows = F.embedding(ids, a.flatten(0, 1).t()).unflatten(-1, a.shape[:2])
        rows = F.dropout(rows, self.config.dropout, self.training)
        if self.config.router == "group":
            rows = rows * self._one_hot(ids, len(a)).to(rows)
        elif self.mix is not None:
            rows = rows * self.mix.softmax(0)[:, None]
        return F.linear(rows.flatten(-2), b.flatten(0, 1).t()) * self.config.scale

    def _one_hot(self, ids: Tensor, experts: int) -> Tensor:
        """1 for the adapter of each sequence, [n, 1] or [B, 1, ..., n, 1]."""
        sequences = self.state.of_layer(self.name)
        codes, call = sequences.codes, sequences.call
        if isinstance(codes, int):
            return F.one_hot(torch.tensor(codes, device=ids.device), experts)[:, None]
        assert codes is not None  # enter() read them
        if ids.shape[0] != call.batch:
            raise AdapterError(_not_all(self.name, ids.shape[0], call.batch))
        return F.one_hot(codes.to(ids.device), experts).reshape(call.batch, *[1] * (ids.dim() - 1), experts, 1)


def _by_sequence(inputs: Tensor, batch: int, name: str) -> Tensor:
    """[B, S, d] from [B, S, d] or [B S, d]."""
    rows = inputs.shape[:-1].numel()
    if rows % batch or (inputs.dim() > 2 and inputs.shape[0] != batch):
        raise AdapterError(_not_all(name, rows, batch))
    return inputs.reshape(batch, rows // batch, inputs.shape[-1])


def _not_all(name: str, rows: int, tokens: int) -> str:
    return (
        f"{name!r} is given {rows} rows, not the {tokens} of its block: whose decision is whose cannot be told. "
        "Leave it out by target_modules="
    )
