"""Finding routers, and refusing by name what cannot be attached to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from harness.tiny_models import tiny_model, tokens

from moe_route.calls import Labels
from moe_route.ops import Force, StatisticsTables, SteeringTables
from moe_route.patching import Attachment
from moe_route.routers import ModelNotSupportedError, find_routers


def test_sites_in_forward_order() -> None:
    model = tiny_model("deepseek_v3", head=True)  # its first layer is dense
    routers = find_routers(model)
    assert [router.name for router in routers] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    assert [router.layer for router in routers] == [0, 1]
    for router in routers:
        assert router.module is model.get_submodule(router.name)
        assert (router.num_experts, router.top_k, router.engine, router.steerable) == (8, 3, "hook", True)
        assert router.spec.score == "sigmoid"
        assert router.spec.groups == 4
    called = []
    for router in routers:
        router.module.register_forward_hook(lambda *_, layer=router.layer: called.append(layer))
    model(input_ids=torch.tensor([[5, 6]]))
    assert called == [0, 1]


def test_dense_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(
        ModelNotSupportedError, match=r"LlamaForCausalLM has no router.*dense.*Attach to a Mixture-of-Experts"
    ):
        find_routers(LlamaForCausalLM(config))


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module is needed, not str"):
        find_routers("Qwen/Qwen3-30B-A3B")


def test_unknown_router_beside_experts() -> None:
    model = tiny_model("qwen3_moe")
    model.layers[1].mlp.gate = nn.Linear(64, 8)  # the layout of transformers 4
    with pytest.raises(
        ModelNotSupportedError, match=r"Qwen3MoeSparseMoeBlock at 'layers.1.mlp'.*gate Linear.*transformers 5"
    ):
        find_routers(model)


def test_changed_router_is_refused_by_the_check() -> None:
    """A router that no longer does what its class did: transformers of another version, or an edit."""
    model = tiny_model("mixtral")
    router = type(model.layers[0].mlp.gate)

    class Doubled(router):
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return logits, 2 * weights, ids

    class Probabilities(router):  # of other temperature
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return (logits / 2).softmax(-1), weights, ids

    class Narrow(router):
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights[:, :1], ids

    for changed, message in (
        (Doubled, "does not weigh"),
        (Probabilities, "does not weigh"),
        (Narrow, "returns shapes"),
    ):
        model.layers[0].mlp.gate.__class__ = changed
        with pytest.raises(ModelNotSupportedError, match=message):
            Attachment(model)
        assert not model.layers[0].mlp.gate._forward_hooks
    Attachment(model, verify=False).detach()


def loaded_after_attach(name: str, form: type[nn.Module] | None = None, engine: Any = "hook") -> Any:
    """An attached model whose weights come after, its first router of the class ``form``."""
    model = tiny_model(name)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model = model.to("meta")
    attachment = Attachment(model, engine=engine)
    if form is not None:
        attachment._forwards[0] = (form.forward, ())  # as if it had that form at attach, where it could not be run
        attachment.routers[0].module.__class__ = form
    model.to_empty(device="cpu")
    model.load_state_dict(state, assign=True)
    model.rotary_emb = tiny_model(name).rotary_emb
    return attachment


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_weights_that_cannot_be_read_are_not_checked_and_say_so(engine: str) -> None:
    attachment = loaded_after_attach("qwen3_moe", engine=engine)
    assert attachment.routers[0].notes[-1] == "not checked: its weights are on the meta device"
    assert {router.engine for router in attachment.routers} == {engine}
    attachment.set_statistics([StatisticsTables.zeros(router.num_experts, groups=1) for router in attachment.routers])
    with torch.no_grad():
        attachment.model(input_ids=tokens(1, 3))
    assert not any(note.startswith("not checked") for router in attachment.routers for note in router.notes)
    attachment.detach()


def test_weights_that_come_after_attach_are_checked_in_the_first_forward() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    class Doubled(Qwen3MoeTopKRouter):
        def forward(self, hidden: torch.Tensor) -> Any:
            logits, weights, ids = super().forward(hidden)
            return logits, 2 * weights, ids

    class Fewer(Qwen3MoeTopKRouter):
        def forward(self, hidden: torch.Tensor) -> Any:
            return super().forward(hidden)[1:]

    class Bare(Qwen3MoeTopKRouter):
        def forward(self, hidden: torch.Tensor) -> Any:
            return super().forward(hidden)[0]

    for form, said in ((Doubled, "does not weigh"), (Fewer, "its family says"), (Bare, "its family says")):
        attachment = loaded_after_attach("qwen3_moe", form)
        tables = [StatisticsTables.zeros(router.num_experts, groups=1) for router in attachment.routers]
        attachment.set_statistics(tables)
        with torch.no_grad(), pytest.raises(ModelNotSupportedError, match=rf"layers\.0\.mlp\.gate.*{said}"):
            attachment.model(input_ids=tokens(1, 3))
        attachment.detach()


# ---------------------------------------------------------------------------------------------------------------
# Routers that no row names.


class Stranger(nn.Module):
    """A router as the next version may have it: order of what it returns, and how it routes, are its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.randn(8, 64) * 0.3)
        self.routed_scaling_factor = 2.5
        self.register_buffer("e_score_correction_bias", torch.rand(8))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = nn.functional.linear(hidden, self.weight).float()
        if self.kind == "sigmoid":
            scores = logits.sigmoid()
            ids = (scores + self.e_score_correction_bias).topk(2, dim=-1).indices
            weights = scores.gather(1, ids)
            return logits, weights / weights.sum(1, keepdim=True) * self.routed_scaling_factor, ids
        if self.kind == "softmax, ids first":
            weights, ids = logits.softmax(-1).topk(2, dim=-1)
            return ids, weights, logits
        if self.kind == "probabilities":
            weights, ids = logits.softmax(-1).topk(2, dim=-1)
            return logits.softmax(-1), weights / weights.sum(1, keepdim=True), ids
        weights, ids = logits.abs().topk(2, dim=-1)
        return logits, weights.softmax(-1), ids


class StrangersBlock(nn.Module):
    """A block that takes what its router returns, or chooses again."""

    def __init__(self, kind: str, experts: nn.Module, follows: bool = True) -> None:
        super().__init__()
        self.gate, self.experts, self.follows = Stranger(kind), experts, follows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, 64)
        parts = self.gate(flat) if self.follows else self.gate.forward(flat)
        ids = next(part for part in parts if not part.is_floating_point())
        weights = next(part for part in parts if part.is_floating_point() and part.shape == ids.shape)
        return self.experts(flat, ids, weights).view_as(hidden)


def strange_model(kind: str, follows: bool = True) -> nn.Module:
    model = tiny_model("qwen3_moe")
    for layer in model.layers:
        layer.mlp = StrangersBlock(kind, layer.mlp.experts, follows)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "score", "renormalize", "scale"),
    [
        ("sigmoid", "sigmoid", "sum", 2.5),
        ("softmax, ids first", "softmax", "none", 1.0),
        ("probabilities", "softmax", "sum", 1.0),
    ],
)
def test_unknown_routers_are_recognized_by_what_they_do(kind: str, score: str, renormalize: str, scale: float) -> None:
    model = strange_model(kind)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        plain = model(input_ids=ids)[0]
        attachment = Attachment(model)
        spec = attachment.routers[0].spec
        assert (spec.score, spec.renormalize, spec.scale) == (score, renormalize, scale)
        assert "recognized by what it does" in attachment.routers[0].notes[0]
        tables = [StatisticsTables.zeros(8, groups=1) for _ in range(3)]
        attachment.set_statistics(tables)
        seen = []
        for layer in model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        assert torch.equal(model(input_ids=ids)[0], plain)
        for table, chosen in zip(tables, seen, strict=True):
            assert torch.equal(table.metric("counts")[0], torch.bincount(chosen.flatten(), minlength=8))
        attachment.listener.labels_of = lambda call: Labels(steering_row=0)
        force = torch.zeros(1, 8)
        force[0, 3] = Force.FORBID
        attachment.set_steering([SteeringTables(1, 8, force=force)] * 3)
        seen.clear()
        model(input_ids=ids)
        assert all(3 not in chosen for chosen in seen)
        attachment.detach()
        assert torch.equal(model(input_ids=ids)[0], plain)


def test_unknown_routers_of_an_unknown_kind_are_refused() -> None:
    with pytest.raises(
        ModelNotSupportedError, match=r"gate Stranger is not a known router, and no known way of routing gives"
    ):
        find_routers(strange_model("absolute"))
    with pytest.raises(ModelNotSupportedError, match="its block does not follow it: other ids give the same output"):
        find_routers(strange_model("sigmoid", follows=False))


def test_recognizing_disturbs_nothing() -> None:
    model = strange_model("sigmoid").train()
    before, state = torch.get_rng_state(), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    find_routers(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
