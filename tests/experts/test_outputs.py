"""Outputs of single experts: recorded sums against an explicit float64 forward of each family, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")

from harness.tiny_models import inputs, tiny_model, tokens

import moe_route as mr
from moe_route.experts import NoExpertOutputsError, register_experts
from moe_route.recording import RecordingError, RoutingStatistics
from moe_route.steering import Plan

NAMES = ("weighted_norm", "norm", "peak", "first")
H, E, K = 16, 8, 2
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3])
GROUPS = ["a", "b", "a"]


def gated(experts: Any, e: int, x: Tensor) -> Tensor:
    """Gate and up in one matrix [E, 2 I, H]: the layout of most families."""
    gate, up = (experts.gate_up_proj[e].double() @ x).chunk(2)
    return experts.down_proj[e].double() @ (F.silu(gate) * up)


def gpt_oss(experts: Any, e: int, x: Tensor) -> Tensor:
    """Transposed, with biases; gate and up alternate; both are clamped."""
    both = x @ experts.gate_up_proj[e].double() + experts.gate_up_proj_bias[e].double()
    gate, up = both[0::2].clamp(max=experts.limit), both[1::2].clamp(-experts.limit, experts.limit)
    inner = (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
    return inner @ experts.down_proj[e].double() + experts.down_proj_bias[e].double()


def identity_past(experts: Any, e: int, x: Tensor) -> Tensor:
    return gated(experts, e, x) if e < experts.num_routed_experts else x


def dbrx(experts: Any, e: int, x: Tensor) -> Tensor:
    mlp, part = experts.mlp, slice(e * experts.ffn_hidden_size, (e + 1) * experts.ffn_hidden_size)
    return mlp.w2[part].double().T @ (F.silu(mlp.w1[part].double() @ x) * (mlp.v1[part].double() @ x))


def linear(experts: Any, e: int, x: Tensor) -> Tensor:
    return experts[e].weight.double() @ x


FORMS: dict[str, Callable[[Any, int, Tensor], Tensor]] = {
    "qwen3_moe": gated,
    "olmoe": gated,
    "mixtral": gated,
    "deepseek_v3": gated,
    "gpt_oss": gpt_oss,
    "longcat_flash": identity_past,
    "dbrx": dbrx,
    "legacy": linear,
}


class Loops(nn.Module):
    """The block of transformers 4: a linear gate, a choice inside its forward, a loop over a list of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.norm_topk_prob = E, K, True
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(E))
        self.backwards = False

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        shape, hidden = hidden.shape, hidden.view(-1, H)
        logits = self.gate(hidden)
        weights, ids = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        result = torch.zeros_like(hidden)
        mask = F.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slots, rows = torch.where(mask[number])
            if self.backwards:
                slots, rows = slots.flip(0), rows.flip(0)
            result.index_add_(0, rows, expert(hidden[rows]) * weights[rows, slots, None])
        return result.view(shape), logits


class Legacy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        block = type("OlmoeSparseMoeBlock", (Loops,), {"__module__": "transformers.models.of_a_test"})
        self.embed, self.layers = nn.Embedding(128, H), nn.ModuleList(nn.ModuleDict({"mlp": block()}) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer["mlp"](hidden)[0]
        return (hidden,)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return Legacy().eval() if name == "legacy" else tiny_model(name)


def expected(routed: mr.RoutedModel, trace: Any, rows: list[int], hidden: list[Tensor], form: Any) -> dict[str, Any]:
    """The four arrays by plain loops over a trace, whose n-th token is row ``rows[n]`` of the batch."""
    shape = (2, len(routed.routers), max(router.num_experts for router in routed.routers))
    found = {name: np.zeros(shape) for name in NAMES}
    for layer, (module, states) in enumerate(hidden):
        for n, row in enumerate(rows):
            for slot, e in enumerate(trace.ids[n, layer].tolist()):
                if e < 0:
                    continue
                at, output = (trace.group[n], layer, e), form(module, e, states[row])
                found["norm"][at] += float(output.norm())
                found["weighted_norm"][at] += float(trace.weights[n, layer, slot]) * float(output.norm())
                found["peak"][at] = max(found["peak"][at], float(output.abs().max()))
                found["first"][at] += trace.position[n] == 0
    return found


def experts_of(router: Any) -> nn.Module:
    found: nn.Module = router.module._modules.get("experts") or router.block._modules.get("experts")
    return found


def run(name: str, plan: Plan | None = None, implementation: str | None = None) -> tuple[RoutingStatistics, dict]:
    """Recorded statistics of a padded batch, and the arrays expected."""
    model, hidden = model_of(name), []
    if implementation is not None:
        model.set_experts_implementation(implementation)
    batch = {"input_ids": tokens(3, 6), "attention_mask": MASK}
    with torch.no_grad(), mr.attach(model) as routed, routed.steer(plan or Plan()):
        before = model(**batch)[0]
        hooks = []
        for router in routed.routers:
            experts = experts_of(router)
            owner = router.module if isinstance(experts, nn.ModuleList) else experts

            def keep(module: nn.Module, args: Any, kwargs: Any, experts: nn.Module = experts) -> None:
                states = (*args, *kwargs.values())[0]
                hidden.append((experts, states.double().reshape(-1, states.shape[-1])))

            hooks.append(owner.register_forward_pre_hook(keep, with_kwargs=True))
        options = {"trace": True, "trace_weights": "float32", "expert_outputs": True}
        with routed.record(["a", "b"], **options) as recorder, recorder.labels(groups=GROUPS):
            after = model(**batch)[0]
        for hook in hooks:
            hook.remove()
        assert torch.equal(before, after)
        rows = torch.nonzero(MASK.reshape(-1)).reshape(-1).tolist()
        return recorder.statistics(), expected(routed, recorder.trace(), rows, hidden, FORMS[name])


@pytest.mark.parametrize("name", FORMS)
def test_sums_are_those_of_an_explicit_forward(name: str) -> None:
    statistics, want = run(name)
    for what in NAMES:
        np.testing.assert_allclose(statistics.expert_outputs(what), want[what], rtol=2e-5, atol=1e-6, err_msg=what)
    assert want["first"].sum() == 3 * sum(statistics.top_k)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "moe_route"])
def test_every_implementation_of_the_experts_is_seen(implementation: str) -> None:
    if implementation == "moe_route":
        register_experts()
    statistics, want = run("qwen3_moe", implementation=implementation)
    np.testing.assert_allclose(statistics.expert_outputs("weighted_norm"), want["weighted_norm"], rtol=2e-5, atol=1e-6)


def test_a_slot_that_steering_empties_counts_nowhere() -> None:
    statistics, want = run("qwen3_moe", plan=Plan.top_k(1))
    np.testing.assert_allclose(statistics.expert_outputs("norm"), want["norm"], rtol=2e-5, atol=1e-6)
    assert want["first"].sum() == 3 * 3


@torch.no_grad()
def test_experts_that_are_a_module_each_are_read_as_they_run() -> None:
    """Switch: an encoder, a decoder, and tokens without room."""
    model, norms = tiny_model("switch_transformers"), []
    with mr.attach(model) as routed:
        for router in routed.routers:
            for expert in router.block.experts.values():

                def keep(module: Any, args: Any) -> None:
                    inner = F.relu(args[0].double() @ module.wi.weight.double().T)
                    norms.append(float((inner @ module.wo.weight.double().T).norm(dim=-1).sum()))

                expert.register_forward_pre_hook(keep)
        with routed.record(expert_outputs=True) as recorder:
            model(**inputs("switch_transformers", model))
    assert np.isclose(recorder.statistics().expert_outputs("norm").sum(), sum(norms), rtol=1e-5)


@torch.no_grad()
def test_experts_given_their_tokens_in_another_order_are_refused() -> None:
    model = model_of("legacy")
    for layer in model.layers:
        layer["mlp"].backwards = True
    with mr.attach(model) as routed, routed.record(expert_outputs=True), pytest.raises(RuntimeError, match="order"):
        model(tokens(3, 6))


@torch.no_grad()
def test_experts_that_are_given_another_choice_are_refused() -> None:
    model = tiny_model("qwen3_moe")
    with mr.attach(model) as routed:
        experts = model.layers[1].mlp.experts
        experts.register_forward_pre_hook(lambda _, args: (args[0], args[1].flip(1), args[2]))
        with routed.record(expert_outputs=True), pytest.raises(RuntimeError, match="layer 1 are not given"):
            model(tokens())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama4_text", "Llama4TextExperts.*multiplies the input"),
        ("jetmoe", "JetMoeMoE.*two products"),
        ("doge", "DogeCDMoE.*embedding"),
        ("nllb-moe", "NllbMoeExperts.*mask"),
    ],
)
def test_other_layouts_are_refused_by_name(name: str, words: str) -> None:
    model = tiny_model(name)
    with mr.attach(model) as routed:
        with pytest.raises(NoExpertOutputsError, match=words), routed.record(expert_outputs=True):
            pass
        with torch.no_grad(), routed.record() as recorder:  # nothing is left behind
            model(**inputs(name, model))
        assert recorder.statistics().tokens().sum() > 0


@torch.no_grad()
def test_chunks_and_runs_add_up_exactly(tmp_path: Any) -> None:
    model = tiny_model("qwen3_moe", torch.float64)
    model.set_experts_implementation("eager")
    ids = tokens(2, 8)

    def record(*batches: Tensor) -> RoutingStatistics:
        with mr.attach(model) as routed, routed.record(expert_outputs=True, hidden=True) as recorder:
            for batch in batches:
                model(input_ids=batch)
        return recorder.statistics()

    whole, parts = record(ids), record(ids[:1]) + record(ids[1:])
    for name in whole.accumulated:
        # peaks are as the model computed them, and its products round by the size of the batch
        equal = np.testing.assert_allclose if name == "peak" else np.testing.assert_array_equal
        equal(whole.accumulated[name], parts.accumulated[name], err_msg=name)
    whole.save(tmp_path / "s.safetensors")
    loaded = RoutingStatistics.load(tmp_path / "s.safetensors")
    np.testing.assert_array_equal(loaded.expert_outputs("peak"), whole.expert_outputs("peak"))
    assert (loaded.select(layers=[1]).expert_outputs("norm") == whole.expert_outputs("norm")[:, 1:2]).all()


@torch.no_grad()
def test_a_pause_and_the_end_of_a_recording_take_the_hooks_away() -> None:
    model = tiny_model("qwen3_moe")

    def hooks() -> int:
        return sum(len(module._forward_pre_hooks) for module in model.modules())

    with mr.attach(model) as routed:
        attached = hooks()
        with routed.record(expert_outputs=True, hidden=True) as recorder:
            assert hooks() == attached + 6
            model(tokens())
            before = recorder.statistics().expert_outputs("norm").sum()
            with recorder.pause():
                assert hooks() == attached
                model(tokens())
        assert hooks() == attached
        assert recorder.statistics().expert_outputs("norm").sum() == before
    assert hooks() == 0


@torch.no_grad()
def test_generation_is_seen_step_by_step() -> None:
    model = tiny_model("qwen3_moe", head=True)
    with mr.attach(model) as routed:
        with routed.record(expert_outputs=True) as recorder:
            text = model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False)
        with routed.record(expert_outputs=True) as again:
            model(text[:, :-1])
    steps, whole = recorder.statistics(), again.statistics()
    np.testing.assert_allclose(steps.expert_outputs("norm"), whole.expert_outputs("norm"), rtol=1e-4)
    np.testing.assert_array_equal(steps.expert_outputs("first"), whole.expert_outputs("first"))


def test_what_was_not_recorded_is_named() -> None:
    model = tiny_model("qwen3_moe")
    with torch.no_grad(), mr.attach(model) as routed, routed.record() as recorder:
        model(tokens())
    with pytest.raises(ValueError, match="expert_outputs=True"):
        recorder.statistics().expert_outputs("norm")
    with pytest.raises(ValueError, match="hidden=True"):
        _ = recorder.statistics().hidden
    with pytest.raises(ValueError, match="weighted_norm, norm"):
        recorder.statistics().expert_outputs("mean")  # type: ignore[arg-type]


@torch.no_grad()
def test_outputs_that_are_not_finite_are_reported() -> None:
    model = tiny_model("qwen3_moe")
    model.layers[0].mlp.experts.down_proj[0].fill_(float("nan"))
    with mr.attach(model) as routed, routed.record(expert_outputs=True) as recorder:
        model(tokens(8, 7))
    with pytest.raises(RecordingError, match="not finite"):
        recorder.statistics()
