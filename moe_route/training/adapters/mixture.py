"""The adapters of one linear layer: what they add to its output, and who mixes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_route.calls.call import recomputing
from moe_route.contract.spec import RouterSpec
from moe_route.nn import TopKRouter
from moe_route.training.adapters.block_input import BlockInput
from moe_route.training.adapters.call_state import CallState
from moe_route.training.adapters.config import AdapterConfig, AdapterError

__all__ = ["AdapterRouter", "EmbeddingMixture", "LowRankMixture"]


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
