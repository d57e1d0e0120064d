"""Routers with an output of their own that take a page at most: adapters, DBRX, DeepSeek-V4, Inkling, Llama 4, Zaya.

Each has a row of the table of families, with a subclass of `Adapter` where the output needs one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_route.contract.spec import RouterSpec
from moe_route.routers.adapter import Adapter, Decision, Output
from moe_route.routers.architectures.routing_blocks import ByMethod
from moe_route.routers.family import Family, Gate, own_spec, score_function

# ---- low-rank adapters (`moe_route.training.add_adapters`), which stand beside the model's own routers


class OfAdapters(Adapter):
    """Reads a router that decides for each token, or once for each sequence, which is counted at its first token."""

    output_is_complete = False  # the tokens that it decided for are known only while it runs
    added = True

    @property
    def role(self) -> str:
        """These routers are numbered after those of the model itself."""
        return "adapter"

    def token_subset(self) -> Tensor | None:
        """The tokens that the router decided for."""
        rows: Tensor | None = self.module.rows
        return rows


ADAPTER_ROUTER = Family(
    "moe_route",
    ("AdapterRouter",),
    adjust=own_spec,
    gate=Gate(bias="bias"),
    adapter=OfAdapters,
    notes=("chooses low-rank adapters, not experts of the model",),
)


# ---- DBRX: the router returns logits only, and the block chooses in its method `route_tokens_to_experts`.


def _dbrx_norm(block: nn.Module, spec: RouterSpec) -> RouterSpec:
    p = block.moe_normalize_expert_weights
    if p is None:
        return spec
    return RouterSpec(score="softmax", renormalize="norm", norm_p=float(p))  # type: ignore[arg-type]


DBRX = Family(
    "softmax, chosen by the block",
    ("DbrxFFN",),
    RouterSpec(score="softmax"),
    adjust=_dbrx_norm,
    num_experts="experts.num_experts",
    low_precision=True,
    unfused="the block chooses, not the router",
    adapter=ByMethod,
)


# ---- DeepSeek-V4's first layers: a frozen table maps each token id to its experts. The logits only weigh them.


class Hash(Adapter):
    """Reads the usual output (logits, weights, ids) of a router that also needs token ids to run."""

    def probe(self, hidden: Tensor, arguments: tuple[Tensor, ...]) -> tuple[tuple[object, ...], Output]:
        """Run the router on random token ids together with the hidden states."""
        hidden = hidden.reshape(1, -1, hidden.shape[-1])
        generator = torch.Generator().manual_seed(2)
        tokens = torch.randint(len(self.module.tid2eid), hidden.shape[:2], generator=generator).to(hidden.device)
        return (hidden, tokens), self.module.forward(hidden.clone(), tokens)


DEEPSEEK_V4 = Family(
    "by token id, weighed by sigmoid or sqrt-softplus",
    ("DeepseekV4HashRouter",),
    RouterSpec(score="sigmoid", renormalize="sum", eps=1e-20),
    read={"scale": "routed_scaling_factor"},
    adjust=score_function,
    chosen_by="token ids",
    low_precision=True,
    unfused="a table of token ids chooses",
    adapter=Hash,
    unsteerable="a frozen table of token ids names its experts, so there is no choice to steer",
    known_issues=("output_router_logits leaves its layers out",),
)


# ---- Inkling: the chosen experts and the shared experts are normalized together.
#
# Let r be the sigmoids of the chosen experts, s those of the shared experts, R and S their sums, and c a constant. The
# weights are c * r / (R + S) and the gammas (weights of the shared experts) c * s / (R + S). The router does not
# return the logits of the shared experts, but S = R * sum(gammas) / sum(weights).


class Inkling(Adapter):
    """Reads the output (logits of the routed experts, weights, ids, gammas of the shared experts [T, n])."""

    changes_choice = True

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The router's choice, with the sigmoids of the chosen experts before normalization as weights."""
        return decision._replace(weights=decision.logits.gather(1, decision.ids).sigmoid())

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Normalize the new sigmoids jointly with those of the shared experts.

        Tokens whose choice and sigmoids are unchanged keep the router's own weights.
        """
        logits, own, own_ids, gammas = output
        sigmoids = self.chosen(args, output, decision).weights
        routed, shared = own.float().sum(1, keepdim=True), gammas.float().sum(1, keepdim=True)
        before = sigmoids.sum(1, keepdim=True)
        others = before * shared / routed
        after = weights.float().sum(1, keepdim=True) + others
        changed = weights * (routed + shared) / after
        same = (ids == own_ids).all(1, keepdim=True) & (weights == sigmoids).all(1, keepdim=True)
        changed = torch.where(same, own, changed.to(own.dtype))
        gammas = torch.where(same, gammas, (gammas.float() * (before + others) / after).to(gammas.dtype))
        return (logits, changed, self.filled(ids).to(own_ids.dtype), gammas), changed, ids


INKLING = Family(
    "sigmoid with correction bias, normalized with the shared experts",
    ("InklingTopkRouter",),
    RouterSpec(score="sigmoid"),
    correction_bias="e_score_correction_bias",
    weights="input",
    unfused="it normalizes jointly with the shared experts",
    adapter=Inkling,
    notes=("a steered choice changes the weight of the shared experts too: they are normalized together",),
)


# ---- Llama 4: top-k over the logits, then a sigmoid. Dense scores [T, E] weigh the inputs of the experts.
#
# Every expert runs on every token. Its input is zero for tokens that did not choose it.


class Llama4(Adapter):
    """Reads the output (scores [T, E], zero where not chosen; logits [T, E])."""

    output_is_complete = False

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """Repeat the router's own top-k for the ids; nonzero scores would miss a sigmoid that underflowed to zero."""
        scores, logits = output
        ids = torch.topk(logits, int(self.module.top_k), dim=1).indices
        return Decision(logits, scores.gather(1, ids), ids)

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Build dense scores that hold the weights at the chosen experts and zero elsewhere."""
        scores = torch.zeros_like(output[0]).scatter_add(1, ids.clamp(min=0).long(), weights)
        return (scores, *output[1:]), weights, ids


LLAMA4 = Family(
    "sigmoid over the chosen, on the experts' inputs",
    ("Llama4Router",),
    RouterSpec(score="sigmoid", order="topk_then_score"),
    unfused="it returns dense scores",
    adapter=Llama4,
    notes=(
        "the weights scale what goes into the experts, not what comes out: twice the weight is not twice the output",
    ),
)


# ---- Zaya: a router with a state that passes from layer to layer, and one class more than there are experts: "skip".
#
# The model returns a skipped token as expert 0 with weight 0. Here skipping is the id E, so that it can be counted and
# steered like an expert.


class Zaya(Adapter):
    """Reads the output (logits [T, E + 1], weights, ids, state for the next layer)."""

    output_is_complete = False
    changes_choice = True

    def read(self, args: tuple[object, ...], output: Output) -> Decision:
        """The decision, with id E where the model returned expert 0 with weight 0."""
        logits, weights, ids = output[:3]
        return Decision(logits, weights, torch.where((ids == 0) & (weights == 0), logits.shape[1] - 1, ids))

    def chosen(self, args: tuple[object, ...], output: Output, decision: Decision) -> Decision:
        """The router's choice, with the probability of skipping as the weight of a skipped token."""
        probabilities = decision.logits.softmax(-1).gather(1, decision.ids)
        skipped = decision.ids == decision.logits.shape[1] - 1
        return decision._replace(weights=torch.where(skipped, probabilities, decision.weights))

    def write(
        self, args: tuple[object, ...], output: Output, decision: Decision, weights: Tensor, ids: Tensor
    ) -> tuple[Output, Tensor, Tensor]:
        """Write skipped tokens and empty slots as expert 0 with weight 0. The state is passed on unchanged."""
        idle = (ids < 0) | (ids == decision.logits.shape[1] - 1)
        weights = weights.masked_fill(idle, 0)
        chosen = ids.masked_fill(idle, 0).to(output[2].dtype)
        return (output[0], weights, chosen, *output[3:]), weights, ids


ZAYA = Family(
    "softmax with correction bias, may skip",
    ("ZayaRouter",),
    RouterSpec(score="softmax"),
    num_experts="num_router_classes",
    correction_bias="balancing_biases",
    low_precision=True,
    input_rank=3,
    unfused="it is a small network with a state",
    adapter=Zaya,
    notes=("the last id skips the experts: its weight is 0",),
)
