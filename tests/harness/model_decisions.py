"""What the experts of a live model are given, and what its router would choose: read without the adapters of this
library, from the arguments of the experts and from what the model's own source does.

Choices are dense: chosen bool [T, E] and weights float32 [T, E], so that the order of the slots does not matter.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_route import ops, reference
from moe_route.contract.tables import SteeringTables
from moe_route.routers import RouterInfo

Dense = tuple[Tensor, Tensor]


def dense(ids: Tensor, weights: Tensor, num_experts: int) -> Dense:
    """Of ids [T, k]; -1 names no expert."""
    known = (ids >= 0).float()
    at, empty = ids.long().clamp(min=0), torch.zeros(len(ids), num_experts)
    return empty.scatter_add(1, at, known) > 0, empty.scatter_add(1, at, weights.float() * known)


# ---- what the experts are given: called with the arguments of the experts, or with the last output of the router


def _plain(router: RouterInfo, hidden: Tensor, ids: Tensor, weights: Tensor) -> Dense:
    ids, weights = ids.flatten(0, -2), weights.flatten(0, -2)
    if weights.shape != ids.shape:  # scores: zero where an expert was not chosen
        return weights != 0, weights.float()
    return dense(ids, weights, router.num_experts)


def _zaya(router: RouterInfo, hidden: Tensor, ids: Tensor, weights: Tensor) -> Dense:
    """Nothing has weight 0 but a token that skips."""
    return dense(torch.where(weights == 0, router.num_experts - 1, ids), weights, router.num_experts)


def _switch(router: RouterInfo, hidden: Tensor, mask: Tensor, weights: Tensor) -> Dense:
    return mask[:, 0] > 0, (mask[:, 0] * weights).float()


def _nllb(router: RouterInfo, hidden: Tensor, first: Tensor, weights: Tensor) -> Dense:
    return weights != 0, weights.float()


def _llama4(router: RouterInfo, scores: Tensor, logits: Tensor) -> Dense:
    return scores != 0, scores.float()


def _jetmoe(
    router: RouterInfo, order: Tensor, tokens: Tensor, gates: Tensor, sizes: list[int], logits: Tensor
) -> Dense:
    weights, start = torch.zeros(logits.shape), 0
    for expert, size in enumerate(sizes):
        rows = slice(start, start + size)
        weights[:, expert].index_add_(0, tokens[rows], gates[rows].float())
        start += size
    return weights != 0, weights


def _doge(router: RouterInfo, ids: Tensor) -> Dense:
    """The embeddings of the experts are looked up by id; their weights are a softmax in between."""
    return dense(ids, torch.ones_like(ids), router.num_experts)


def _pair(router: RouterInfo, *output: Tensor) -> Dense:
    """Transformers 4: the router returns ids and weights, and no experts module is called with them."""
    ids, weights = sorted(output, key=Tensor.is_floating_point)
    return _plain(router, ids, ids, weights)


class _Used(TorchFunctionMode):
    """Transformers 4: the block loops over its experts, and picks for each its tokens' weights."""

    def __init__(self, router: RouterInfo) -> None:
        super().__init__()
        self.experts, self.expert = router.num_experts, -1
        self.chosen: list[tuple[int, Tensor, Tensor]] = []
        self.tokens = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__ and isinstance(args[1], tuple) and len(args[1]) == 3 and args[1][2] is None:
            self.tokens = len(args[0])
            self.chosen.append((self.expert, args[1][0], result[:, 0].detach().float()))
        return result

    def dense(self) -> Dense:
        chosen, weights = torch.zeros(self.tokens, self.experts), torch.zeros(self.tokens, self.experts)
        for expert, tokens, given in self.chosen:
            chosen[tokens, expert] = 1
            weights[:, expert].index_add_(0, tokens, given)
        return chosen > 0, weights


def _watch_loop(router: RouterInfo, seen: list[Dense]) -> list[Dense]:
    running: list[_Used] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(_Used(router))
        running[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        used = running.pop()
        used.__exit__(None, None, None)
        seen.append(used.dense())

    def number(expert: int) -> Callable[..., None]:
        return lambda module, args: setattr(running[-1], "expert", expert)

    router.module.register_forward_pre_hook(enter)
    router.module.register_forward_hook(leave, always_call=True)
    for expert, module in enumerate(router.module.experts):
        module.register_forward_pre_hook(number(expert))
    return seen


def _watch_method(router: RouterInfo, seen: list[Dense]) -> list[Dense]:
    """The experts choose, in a method, and multiply by products that are told how many tokens each expert has."""
    method = router.module.route_tokens_to_experts

    def look(logits: Tensor) -> Any:
        seen.append(_pair(router, *(chosen := method(logits))))
        return chosen

    router.module.route_tokens_to_experts = look
    return seen


_OF_EXPERTS = {"ZayaRouter": _zaya, "SwitchTransformersTop1Router": _switch, "NllbMoeTop2Router": _nllb}
_OF_ROUTER = {
    "Llama4Router": _llama4,
    "JetMoeTopKGating": _jetmoe,
    "GraniteMoeTopKGating": _jetmoe,
    "GraniteMoeSharedTopKGating": _jetmoe,
    "GraniteMoeHybridTopKGating": _jetmoe,
}


def look_last(module: nn.Module, look: Callable[[nn.Module, Any, Any], object]) -> Any:
    """Register a hook that sees what all others made of the output, those that are moved to the end later as well."""
    handle = module.register_forward_hook(lambda *given: [None, look(*given)][0])

    def move(*_: object) -> None:
        if handle.id in module._forward_hooks:
            cast("OrderedDict[int, Any]", module._forward_hooks).move_to_end(handle.id)

    module.register_forward_pre_hook(move)
    return handle


def watch_experts(router: RouterInfo) -> list[Dense]:
    """A list that takes a dense choice each time the experts of `router` are run. After attaching only: what the router
    returns is seen as steering leaves it."""
    seen: list[Dense] = []
    kind = type(router.module).__name__
    if type(getattr(router.module, "experts", None)) is nn.ModuleList:
        return _watch_loop(router, seen)
    if type(getattr(router.block, "experts", None)) is nn.ModuleList or "scores" in router.family.returns:
        read = _pair
        look_last(router.module, lambda module, args, output: seen.append(read(router, *output)))
        return seen
    if kind == "AriaExperts":
        return _watch_method(router, seen)
    if kind in _OF_ROUTER:
        read = _OF_ROUTER[kind]
        look_last(router.module, lambda module, args, output: seen.append(read(router, *output)))
        return seen
    if kind == "DogeCDMoE":
        experts, read = router.module.down_embed, _doge
    else:
        experts, read = getattr(router.block, "experts", None) or router.module.experts, _OF_EXPERTS.get(kind, _plain)
    experts.register_forward_pre_hook(lambda module, args: seen.append(read(router, *args)))
    return seen


# ---- what a router says before anybody steers: to be watched before attaching


@dataclass
class Natural:
    """One run of a router: its arguments, what it returned, and the router logits [T, E] in it."""

    args: tuple[Any, ...]
    output: Any
    logits: Tensor


_LOGITS: dict[str, Callable[[Any], Tensor]] = {
    "Llama4Router": lambda output: output[1],
    "JetMoeTopKGating": lambda output: output[4],
    "SwitchTransformersTop1Router": lambda output: output[2].flatten(0, 1),
    "NllbMoeTop2Router": lambda output: output[2],
    "DbrxFFN": lambda output: output,
    "Gemma4TextRouter": lambda output: output[0].log(),
    "DiffusionGemmaTextRouter": lambda output: output[0].log(),
}


def watch_router(router: RouterInfo) -> list[Natural]:
    """A list that takes what the router of `router` returns each time."""
    seen: list[Natural] = []
    kind = type(router.module).__name__
    read = _LOGITS.get(kind, lambda output: output[0])
    module = router.module.router if kind == "DbrxFFN" else router.module
    module.register_forward_hook(lambda module, args, output: seen.append(Natural(args, output, read(output))))
    return seen


# ---- what a steered choice must be: the reference on the same logits, then the model's own rule


def expected(router: RouterInfo, run: Natural, steering: SteeringTables | None, rows: Tensor) -> Dense:
    """The dense choice of a steered run; `rows` int [T] are the tokens' steering rows, -1 for none."""
    weights, ids = reference.route(
        run.logits,
        router.top_k,
        router.spec,
        correction_bias=router.family.bias_of(router.module, run.args),
        expert_scale=router.family.scale_of(router.module),
        steering=steering,
        tokens=ops.token_table(len(rows), steering_row=rows),
    )
    kind = type(router.module).__name__
    if kind in _OF_EACH:
        ids, weights = _OF_EACH[kind](router.module, run, ids.long(), weights)
    own_ids, own_weights = _OWN.get(kind, _returned)(router, run)
    steered = rows[:, None] >= 0
    ids, weights = torch.where(steered, ids, own_ids), torch.where(steered, weights, own_weights.float())
    if kind in _OF_ALL:
        ids, weights = _OF_ALL[kind](router.module, run, ids, weights)
    return dense(ids, weights, router.num_experts)


def _returned(router: RouterInfo, run: Natural) -> tuple[Tensor, Tensor]:
    return run.output[2], run.output[1]


def _own_llama4(router: RouterInfo, run: Natural) -> tuple[Tensor, Tensor]:
    ids = run.logits.topk(router.top_k, dim=1).indices
    return ids, run.output[0].gather(1, ids)


def _own_jetmoe(router: RouterInfo, run: Natural) -> tuple[Tensor, Tensor]:
    best = run.logits.topk(router.top_k, dim=1)
    return best.indices, best.values.softmax(1).type_as(run.output[2])


def _own_dbrx(router: RouterInfo, run: Natural) -> tuple[Tensor, Tensor]:
    best = run.logits.softmax(1).topk(router.top_k, dim=-1)
    return best.indices, best.values / best.values.norm(p=router.spec.norm_p, dim=-1, keepdim=True)


def _own_zaya(router: RouterInfo, run: Natural) -> tuple[Tensor, Tensor]:
    probabilities = run.logits.softmax(-1)
    ids = (probabilities.float() + router.module.balancing_biases).topk(1, dim=-1).indices
    return ids, torch.where(ids == router.num_experts - 1, 0.0, probabilities.gather(1, ids))


def _own_switch(router: RouterInfo, run: Natural) -> tuple[Tensor, Tensor]:
    best = run.logits.softmax(-1).to(run.output[1].dtype).max(-1, keepdim=True)
    return best.indices, best.values


def _own_nllb(router: RouterInfo, run: Natural) -> tuple[Tensor, Tensor]:
    probabilities = run.logits.softmax(-1).to(run.output[1].dtype)
    first = probabilities.argmax(-1, keepdim=True)
    second = run.logits.clone().scatter_(1, first, -torch.inf).argmax(-1, keepdim=True)
    ids = torch.cat((first, second), 1)
    weights = probabilities.gather(1, ids)
    return ids, weights / weights.sum(1, keepdim=True)


_OWN = {
    "Llama4Router": _own_llama4,
    "JetMoeTopKGating": _own_jetmoe,
    "DbrxFFN": _own_dbrx,
    "ZayaRouter": _own_zaya,
    "SwitchTransformersTop1Router": _own_switch,
    "NllbMoeTop2Router": _own_nllb,
}


def _skipping(router: Any, run: Natural, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.where(ids == router.config.num_experts, 0.0, weights)


def _with_shared(router: Any, run: Natural, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The shared experts' logits from the gate matrix, then one normalization over both kinds."""
    shared = F.linear(run.args[0].reshape(-1, router.hidden_dim).float(), router.weight.float())[
        :, router.num_experts :
    ]
    total = weights.sum(1, keepdim=True) + shared.sigmoid().sum(1, keepdim=True)
    return ids, weights / total * router.route_scale * router.global_scale.float()


def _first_come(router: Any, run: Natural, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token of each sequence, until an expert is full."""
    batch, length, _ = run.output[0].shape
    kept = ids.clone()
    for sequence in range(batch):
        taken: dict[int, int] = {}
        for token in range(sequence * length, (sequence + 1) * length):
            expert = int(ids[token, 0])
            taken[expert] = taken.get(expert, 0) + 1
            if expert >= 0 and taken[expert] > router.expert_capacity:
                kept[token] = -1
    return kept, weights


def _first_choices_first(router: Any, run: Natural, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """All first choices, then all second ones, until an expert is full; a choice left alone weighs all."""
    capacity = math.ceil(router.moe_eval_capacity_token_fraction * len(ids))
    padding = run.args[1] if len(run.args) > 1 else None
    real = torch.ones(len(ids), dtype=torch.bool)
    if padding is not None:
        real = padding[:, :, -1, :].reshape(-1)[-len(ids) :] == 0
    kept = ids.clone()
    taken: dict[int, int] = {}
    for slot in range(2):
        for token in range(len(ids)):
            expert = int(ids[token, slot])
            if expert < 0 or not real[token]:
                kept[token, slot] = -1
                continue
            taken[expert] = taken.get(expert, 0) + 1
            if taken[expert] > capacity:
                kept[token, slot] = -1
    weights = torch.where(kept >= 0, weights, 0.0)
    lost = ((kept < 0) & (ids >= 0)).any(1, keepdim=True)
    return kept, torch.where(lost & (weights.sum(1, keepdim=True) > 0), weights / weights.sum(1, keepdim=True), weights)


_OF_EACH = {"ZayaRouter": _skipping, "InklingTopkRouter": _with_shared}  # rules for a token by itself
_OF_ALL = {"SwitchTransformersTop1Router": _first_come, "NllbMoeTop2Router": _first_choices_first}  # among all tokens
