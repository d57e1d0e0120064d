"""moe-route as an experts implementation of transformers: equal to the classes' own loop, at the edges too."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from harness.exhaustive import exhaustive_but
from harness.tiny_models import ARCHITECTURES, BASE, tiny_model, tokens
from torch import Tensor, nn

import moe_route as mr
from moe_route.experts import forward as expert_layouts
from moe_route.experts import register_experts
from moe_route.experts.forward import experts_forward
from moe_route.experts.interface import NAME
from moe_route.patching import attachment_of
from moe_route.routers import ModelNotSupportedError

transformers = pytest.importorskip("transformers")

# What the experts classes read from their configurations besides BASE.
SETTINGS: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "swiglu_alpha": 1.7,
    "swiglu_limit": 0.5,  # low enough to clamp
    "moe_hidden_size": 64,
    "moe_latent_size": None,
    "post_norm_eps": 1e-6,
    "mlp_gate_softcap": 1.0,
    "mlp_up_softcap": 1.0,
    "_experts_implementation": "eager",
}
# One model a layout.
LAYOUTS = {
    "concatenated": "qwen3_moe",
    "transposed": "aria_text",
    "transposed, bias, interleaved, own gate": "gpt_oss",
    "transposed, bias, float32 products": "openai_privacy_filter",
    "no gate": "nemotron_h",
    "norm after the expert": "muse_spark_text",
    "own gate": "deepseek_v4",
    "own activation": "inkling2_text",
}
WITHOUT_INTERFACE = ("longcat_flash",)


def decorated_classes() -> dict[str, str]:
    """Every class that the installed transformers runs through its experts interface: name -> module."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text("utf-8"), re.M):
            found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


DECORATED = decorated_classes()


def module_of(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """Random experts of a class."""
    config = SimpleNamespace(**(BASE | SETTINGS | changes))
    module = getattr(importlib.import_module(DECORATED[name]), name)(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module.to(dtype)


def eager(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The class's own loop over experts."""
    return inspect.unwrap(type(module).forward)(module, *inputs)


def routing(
    num_tokens: int = 24, k: int = 2, experts: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights of a random choice."""
    weights, ids = torch.softmax(torch.randn(num_tokens, experts), 1).topk(k)
    return torch.randn(num_tokens, 64).to(dtype), ids, weights


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    one, other = one.double(), other.double()
    return ((one - other).abs().max() / other.abs().max().clamp(min=1e-30)).item()


def gradients(forward: Callable[..., Tensor], module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Of hidden states, weights and every parameter."""
    hidden, ids, weights = inputs[0].clone().requires_grad_(), inputs[1], inputs[2].clone().requires_grad_()
    out = forward(module, hidden, ids, weights)
    mix = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    leaves = [hidden, weights, *module.parameters()]
    found = torch.autograd.grad((out * mix).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_experts()


# ---- equal to eager


def test_the_installed_transformers_has_decorated_classes():
    assert len(DECORATED) >= 19  # transformers 5.0
    assert {"Qwen3MoeExperts", "GptOssExperts"} <= DECORATED.keys()


def test_the_page_counts_them():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text("utf-8")
    said = re.search(r"is supported: (\d+) in transformers (\d+\.\d+)\.", page)
    assert said
    if transformers.__version__.startswith(f"{said[2]}."):
        assert int(said[1]) == len(DECORATED)


@pytest.mark.parametrize("name", DECORATED)
def test_float32_is_that_of_eager(name: str):
    module, inputs = module_of(name), routing()
    out = experts_forward(module, *inputs)
    assert gap(out, eager(module, *inputs)) < 2e-6
    for mine, theirs in zip(gradients(experts_forward, module, inputs), gradients(eager, module, inputs), strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert gap(mine, theirs) < 5e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DECORATED)
def test_half_precision_is_as_near_to_float64_as_eager(name: str, dtype: torch.dtype):
    module, (hidden, ids, weights) = module_of(name, dtype), routing(200, dtype=dtype)
    exact = eager(copy.deepcopy(module).double(), hidden.double(), ids, weights.double())
    out, theirs = experts_forward(module, hidden, ids, weights), eager(module, hidden, ids, weights)
    assert out.dtype == dtype
    assert (out.double() - exact).norm() <= 1.05 * (theirs.double() - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WITHOUT_INTERFACE])
def test_every_architecture(name: str, dtype: torch.dtype):
    """The experts of a whole model, on the hidden states and the choice that reach them there."""
    model = tiny_model(name, dtype)
    model.set_experts_implementation("eager")
    seen: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        seen.append((module, (*args, *kwargs.values()), out))

    modules = [m for n, m in model.named_modules() if n.endswith("experts") and type(m).__name__ in DECORATED]
    for module in modules:
        module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=tokens(2, 20))
        assert len(seen) == len(modules) > 0
        for module, inputs, theirs in seen:
            out = experts_forward(module, *inputs)
            assert (out.dtype, out.shape) == (theirs.dtype, theirs.shape)
            if dtype == torch.float32:
                assert gap(out, theirs) < 2e-6
            else:
                wide = [x.double() if x.is_floating_point() else x for x in inputs]
                exact = eager(copy.deepcopy(module).double(), *wide)
                assert (out.double() - exact).norm() <= 1.05 * (theirs.double() - exact).norm()


@pytest.mark.parametrize("name", LAYOUTS.values())
def test_a_model_by_name(name: str, monkeypatch: pytest.MonkeyPatch):
    """`set_experts_implementation` runs it in every layer, and `generate` too."""
    model = tiny_model(name)
    x = tokens()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        theirs = model(input_ids=x).last_hidden_state
    model.set_experts_implementation(NAME)
    called = count_calls(monkeypatch)
    with torch.no_grad():
        out = model(input_ids=x).last_hidden_state
    assert len(called) == sum(type(m).__name__ in DECORATED for m in model.modules())
    assert gap(out, theirs) < 1e-5


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every combine."""
    called: list[str] = []
    combine = mr.ops.combine

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        called.append("combine")
        return combine(*args, **kwargs)

    monkeypatch.setattr(expert_layouts.ops, "combine", counted)
    return called


def test_a_model_made_and_generating_with_it(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("olmoe", head=True)
    want = model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
    made = type(model)._from_config(copy.deepcopy(model.config), experts_implementation=NAME).eval()
    made.load_state_dict(model.state_dict())
    assert made.get_experts_implementation() == {"": NAME}
    called = count_calls(monkeypatch)
    assert torch.equal(made.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, pad_token_id=0), want)
    assert len(called) == 3 * 4


# ---- edges

EDGES = ("Qwen3MoeExperts", "GptOssExperts", "AriaExperts", "NemotronHExperts", "MuseSparkExperts", "BeamExperts")


@pytest.mark.parametrize("name", EDGES)
def test_no_tokens(name: str):
    module = module_of(name)
    inputs = routing(0)
    out = experts_forward(module, *inputs)
    assert (out.shape, out.dtype) == ((0, 64), torch.float32)
    assert all((g == 0).all() for g in gradients(experts_forward, module, inputs))


@pytest.mark.parametrize("name", EDGES)
def test_all_tokens_on_one_expert(name: str):
    """Seven experts see nobody and get no gradient."""
    module = module_of(name)
    hidden, ids, weights = routing(k=1)
    inputs = (hidden, torch.full_like(ids, 5), weights)
    assert gap(experts_forward(module, *inputs), eager(module, *inputs)) < 2e-6
    mine, theirs = gradients(experts_forward, module, inputs), gradients(eager, module, inputs)
    assert all(gap(one, other) < 5e-6 for one, other in zip(mine, theirs, strict=True))
    down = mine[2 + [n for n, _ in module.named_parameters()].index("down_proj")]
    assert (down[5] != 0).any()
    assert (down[[e for e in range(8) if e != 5]] == 0).all()


@pytest.mark.parametrize("name", EDGES)
def test_one_expert_each_with_unit_weights(name: str):
    """What an all-to-all hands to the experts of a rank: integer-typed ids and weights made from them."""
    module = module_of(name, torch.bfloat16)
    hidden, ids, _ = routing(k=1, dtype=torch.bfloat16)
    ones = torch.ones_like(ids, dtype=torch.bfloat16)
    exact = eager(copy.deepcopy(module).double(), hidden.double(), ids, ones.double())
    assert gap(experts_forward(module, hidden, ids, ones), exact) < 0.02


@pytest.mark.parametrize("name", EDGES)
def test_ids_of_32_bits_are_the_same_bits(name: str):
    module, (hidden, ids, weights) = module_of(name), routing()
    assert torch.equal(
        experts_forward(module, hidden, ids, weights), experts_forward(module, hidden, ids.int(), weights)
    )


def test_inputs_that_are_views():
    module, (hidden, ids, weights) = module_of("Qwen3MoeExperts"), routing()
    views = hidden.T.contiguous().T, ids.T.contiguous().T, weights.T.contiguous().T
    assert not any(view.is_contiguous() for view in views)
    assert torch.equal(experts_forward(module, *views), experts_forward(module, hidden, ids, weights))


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("skipped", [-1, 8, 4000])
def test_a_skipped_slot_is_one_of_weight_zero(name: str, skipped: int):
    """An empty slot (-1), or an expert of another rank (the number of experts, and beyond)."""
    module, (hidden, ids, weights) = module_of(name), routing()
    away = torch.rand(ids.shape) < 0.4
    away[3] = True  # a token with nothing left
    inputs = hidden, torch.where(away, skipped, ids), weights  # their weights are never read
    plain = hidden, ids, torch.where(away, 0.0, weights)
    out = experts_forward(module, *inputs)
    assert (out[3] == 0).all()
    assert gap(out, eager(module, *plain)) < 2e-6
    mine, theirs = gradients(experts_forward, module, inputs), gradients(eager, module, plain)
    assert (mine[1][away] == 0).all()
    theirs[1][away] = 0.0  # eager's slot of weight 0 has a gradient, but there is no slot here
    assert all(gap(one, other) < 5e-6 for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_of_expert_parallelism_add_up(name: str, ranks: int):
    """Each rank holds a slice of the experts and is handed local ids, with `num_experts` for what it does not hold."""
    whole, (hidden, ids, weights) = module_of(name), routing()
    local = 8 // ranks
    total = torch.zeros_like(hidden)
    for rank in range(ranks):
        part = copy.deepcopy(whole)
        part.num_experts, part._is_expert_parallel = local, True
        for key, parameter in list(part.named_parameters(recurse=False)):
            sliced = parameter.detach()[rank * local : (rank + 1) * local].clone()
            setattr(part, key, nn.Parameter(sliced))
        off = ids // local != rank
        total += experts_forward(part, hidden, torch.where(off, local, ids % local), weights.masked_fill(off, 0.0))
    assert gap(total, eager(whole, hidden, ids, weights)) < 5e-6


@pytest.mark.parametrize("name", EDGES)
def test_rows_that_nobody_owns_may_hold_anything(name: str, monkeypatch: pytest.MonkeyPatch):
    """On a device the products leave them undefined; here they are made NaN, in forward and backward."""
    products = importlib.import_module("moe_route.ops.grouped")
    module, (hidden, ids, weights) = module_of(name), routing()
    inputs = hidden, torch.where(torch.rand(ids.shape) < 0.4, 8, ids), weights
    want = experts_forward(module, *inputs)
    wanted = gradients(experts_forward, module, inputs)

    class Poisoned(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor, used: Tensor) -> Tensor:
            ctx.save_for_backward(used)
            return torch.where(used, rows, torch.nan)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            (used,) = ctx.saved_tensors
            return torch.where(used, grad, 0.0), None  # grouped products read no such row of a gradient either

    product = products._grouped_product

    def poisoned(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        used = (torch.arange(rows.shape[0]) < ends[-1])[:, None]
        return Poisoned.apply(product(Poisoned.apply(rows, used), weight, ends), used)

    monkeypatch.setattr(products, "_grouped_product", poisoned)
    assert torch.equal(experts_forward(module, *inputs), want)
    for grad, other in zip(gradients(experts_forward, module, inputs), wanted, strict=True):
        assert torch.equal(grad, other)


def test_weights_of_another_dtype_than_the_hidden_states():
    """Routing weights in float32, and experts kept in float32 under a bfloat16 model: only the result is rounded."""
    module, (hidden, ids, weights) = module_of("Qwen3MoeExperts"), routing(dtype=torch.bfloat16)
    out = experts_forward(module, hidden, ids, weights)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, experts_forward(module, hidden.float(), ids, weights).to(torch.bfloat16))
    half = copy.deepcopy(module).to(torch.bfloat16)
    out = experts_forward(half, hidden.float(), ids, weights)
    assert out.dtype == torch.float32
    assert gap(out, eager(module, hidden.float(), ids, weights)) < 0.03


@pytest.mark.parametrize("name", EDGES)
def test_autocast(name: str):
    """Master weights in float32, products in bfloat16, gradients in float32."""
    module, inputs = module_of(name), routing(100)
    exact = eager(copy.deepcopy(module).double(), inputs[0].double(), inputs[1], inputs[2].double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, theirs = experts_forward(module, *inputs), eager(module, *inputs)
        grads = gradients(experts_forward, module, inputs)
    assert out.dtype == theirs.dtype
    # eager leaves a float32 bias and what it is added to in float32; here both are rounded, as by torch's linear
    assert (out.double() - exact).norm() <= (1.25 if module.has_bias else 1.05) * (theirs.double() - exact).norm()
    assert (out.double() - exact).norm() > 1e-4 * exact.norm()  # not float32 after all
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)


# ---- compiled


@pytest.mark.parametrize("name", exhaustive_but(["qwen3_moe"], LAYOUTS.values()))
def test_compiles_in_one_graph(name: str):
    torch._dynamo.reset()
    model = tiny_model(name)
    model.set_experts_implementation(NAME)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for length in (7, 12):
            x = tokens(2, length)
            assert gap(compiled(input_ids=x).last_hidden_state, model(input_ids=x).last_hidden_state) < 1e-5


def test_an_attached_model_compiles_and_trains():
    torch._dynamo.reset()
    model = tiny_model("qwen3_moe", head=True)
    x = tokens()
    with mr.attach(model, experts_implementation="moe_route"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = []
        for run in (compiled, model):
            loss = run(input_ids=x, labels=x).loss
            results.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    for one, other in zip(*results, strict=True):
        assert gap(one, other) < 1e-4


# ---- switched by attach


@pytest.mark.parametrize("before", ["eager", "grouped_mm", "batched_mm"])
def test_attach_and_detach(before: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    model, x = tiny_model("gpt_oss", head=True), tokens()
    model.set_experts_implementation(before)
    keys = list(model.state_dict())
    with torch.no_grad():
        want = model(input_ids=x).logits
        routed = mr.attach(model, experts_implementation="moe_route")
        assert model.get_experts_implementation() == {"": NAME}
        called = count_calls(monkeypatch)
        assert gap(model(input_ids=x).logits, want) < 1e-5
        assert len(called) == 3
        model.save_pretrained(tmp_path)
        routed.detach()
        routed.detach()
        assert model.get_experts_implementation() == {"": before}
        assert torch.equal(model(input_ids=x).logits, want)
    assert list(model.state_dict()) == keys
    assert NAME not in (tmp_path / "config.json").read_text()
    mr.attach(model).detach()
    assert model.get_experts_implementation() == {"": before}


def test_a_model_inside_another_is_switched_and_restored():
    """Settings of every configuration in it: the whole model's, the text's, the vision's."""
    text = BASE | {"norm_topk_prob": True, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.CONFIG_MAPPING["qwen3_vl_moe"](
        text_config=text, vision_config=vision | {"deepstack_visual_indexes": [0]}
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.set_experts_implementation({"": "batched_mm", "text_config": "eager"})
    before = model.get_experts_implementation()
    assert before["text_config"] == "eager"
    with torch.no_grad():
        want = model(input_ids=tokens()).logits
        with mr.attach(model, experts_implementation="moe_route"):
            assert set(model.get_experts_implementation().values()) == {NAME}
            assert gap(model(input_ids=tokens()).logits, want) < 1e-5
    assert model.get_experts_implementation() == before


def test_a_wrapper_around_a_model():
    """Something that is no transformers model itself."""
    inner = tiny_model("olmoe")
    wrapper = nn.Sequential(inner)
    with mr.attach(wrapper, experts_implementation="moe_route"):
        assert inner.get_experts_implementation() == {"": NAME}
    assert inner.get_experts_implementation() == {"": "grouped_mm"}


def test_an_offloaded_model():
    """Weights that are on the meta device until the forward."""
    accelerate = pytest.importorskip("accelerate")
    model, x = tiny_model("gpt_oss", head=True), tokens()
    with torch.no_grad():
        want = model(input_ids=x).logits
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert model.model.layers[0].mlp.experts.down_proj.is_meta
        with mr.attach(model, experts_implementation="moe_route"):
            assert gap(model(input_ids=x).logits, want) < 1e-5


def test_two_models_side_by_side():
    one, other = tiny_model("qwen3_moe", head=True), tiny_model("qwen3_moe", seed=1, head=True)
    x = tokens()
    with torch.no_grad():
        alone = other(input_ids=x).logits
        with mr.attach(one, experts_implementation="moe_route"), mr.attach(other):
            assert one.get_experts_implementation() == {"": NAME}
            assert other.get_experts_implementation() == {"": "grouped_mm"}
            assert torch.equal(other(input_ids=x).logits, alone)


def test_two_models_of_one_configuration_object():
    """They are switched together, and back when the last of them is detached, in either order."""
    one = tiny_model("qwen3_moe")
    other = type(one)(one.config)
    assert one.config is other.config
    for first, second in ((one, other), (other, one)):
        routed = [
            mr.attach(first, experts_implementation="moe_route"),
            mr.attach(second, experts_implementation="moe_route"),
        ]
        routed[0].detach()
        assert second.get_experts_implementation() == {"": NAME}
        routed[1].detach()
        assert second.get_experts_implementation() == {"": "grouped_mm"}


def test_recording_and_steering():
    """The same counts and the same steered output as over the model's own experts, empty slots included."""
    model, x = tiny_model("qwen3_moe", head=True), tokens(2, 12)
    plan = mr.Plan.forbid({0: [0, 1, 2, 3, 4, 5, 6]}, layers=[0])  # one expert left for two slots
    results = []
    for experts in (None, "moe_route"):
        with torch.no_grad(), mr.attach(model, experts_implementation=experts) as routed:
            with routed.record() as recorder:
                model(input_ids=x)
            with routed.steer(plan):
                steered = model(input_ids=x).logits
            results.append((recorder.statistics().token_sum("counts"), steered))
    assert (results[0][0] == results[1][0]).all()
    assert results[1][0].sum() == 3 * 2 * 24
    assert gap(results[1][1], results[0][1]) < 1e-5


# ---- said by describe and by recordings


def test_describe_says_what_runs_the_experts():
    model = tiny_model("qwen3_moe", head=True)
    assert {layer.experts_implementation for layer in mr.describe(model).layers} == {"grouped_mm"}
    assert "engine  experts run by  steerable" in str(mr.describe(model))
    with mr.attach(model, experts_implementation="moe_route"):
        described = mr.describe(model)
        assert [layer["experts_implementation"] for layer in described.to_dict()["layers"]] == [NAME] * 3
        assert f"hook    {NAME} " in str(described)
        assert "layers 0-2: without gradients, experts run streamed" in str(described)
    assert NAME not in str(mr.describe(model))
    model.config._experts_implementation = None  # transformers runs eager then
    assert {layer.experts_implementation for layer in mr.describe(model).layers} == {"eager"}


def test_layers_that_run_their_experts_differently():
    model = tiny_model("qwen3_moe", head=True)
    other = model.model.layers[1].mlp.experts
    other.config = copy.copy(other.config)
    other.config._experts_implementation = "eager"
    described = mr.describe(model)
    assert [layer.experts_implementation for layer in described.layers] == ["grouped_mm", "eager", "grouped_mm"]
    assert [line.split()[0] for line in str(described).splitlines()[2:5]] == ["0", "1", "2"]
    with mr.attach(model) as routed, routed.record() as recorder:
        model(input_ids=tokens())
    assert recorder.statistics().metadata["experts"] == ["eager", "grouped_mm"]


def test_experts_beside_the_interface_are_said_to_be():
    for name in (*WITHOUT_INTERFACE, "jetmoe"):
        assert {layer.experts_implementation for layer in mr.describe(tiny_model(name)).layers} == {"own forward"}


def test_recordings_say_what_ran_the_experts_and_older_ones_load(tmp_path: Path):
    model, recorded = tiny_model("qwen3_moe", head=True), []
    for experts in (None, "moe_route"):
        with mr.attach(model, experts_implementation=experts) as routed, routed.record() as recorder:
            model(input_ids=tokens())
        recorded.append(recorder.statistics())
    kept, ours = recorded
    assert [each.metadata["experts"] for each in recorded] == [["grouped_mm"], [NAME]]
    assert (kept + ours).metadata["experts"] == ["grouped_mm", NAME]
    ours.save(tmp_path / "new.safetensors")
    assert mr.RoutingStatistics.load(tmp_path / "new.safetensors").metadata["experts"] == [NAME]
    del kept.metadata["experts"]  # as recordings of earlier versions have it
    kept.save(tmp_path / "old.safetensors")
    old = mr.RoutingStatistics.load(tmp_path / "old.safetensors")
    assert "experts" not in old.metadata
    assert (old + ours).metadata["experts"] == [NAME]


# ---- registry


def test_registered_twice_is_registered_once():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    keys = sorted(ALL_EXPERTS_FUNCTIONS.keys())
    register_experts()
    register_experts()
    assert sorted(ALL_EXPERTS_FUNCTIONS.keys()) == keys
    assert keys.count(NAME) == 1
    assert ALL_EXPERTS_FUNCTIONS[NAME] is experts_forward


def test_without_transformers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"moe-route\[hf\]"):
        register_experts()


def test_a_transformers_that_is_too_old(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match="transformers 5"):
        register_experts()


def test_one_fp8_registry_less(monkeypatch: pytest.MonkeyPatch):
    """A transformers whose FP8 experts go through no registry."""
    fp8 = importlib.import_module("transformers.integrations.finegrained_fp8")
    monkeypatch.delattr(fp8, "FP8ExpertsInterface")
    register_experts()
    monkeypatch.delattr(fp8, "FP8Experts")
    with mr.attach(tiny_model("olmoe"), experts_implementation="moe_route"):
        pass


# ---- what cannot be done


class Sharded(Tensor):
    """A tensor that is not what it looks like."""


def packed(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(torch.zeros(8, 64, 16, dtype=torch.uint8), requires_grad=False)


def sharded(module: nn.Module) -> None:
    module._parameters["down_proj"] = module.down_proj.detach().as_subclass(Sharded)


def split(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(torch.zeros(4, 64, 32))


def lists(module: nn.Module) -> None:
    del module.down_proj
    module.down_proj = nn.ModuleList([nn.Linear(32, 64)])


def flat(module: nn.Module) -> None:
    module.down_proj = nn.Parameter(torch.zeros(8 * 64, 32))


def interleaved(module: nn.Module) -> None:
    module.is_concatenated = False


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (packed, "uint8"),
        (sharded, "Sharded"),
        (split, "4"),
        (lists, "ModuleList"),
        (flat, "not \\[experts"),
        (interleaved, "interleaved"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(change: Callable[[nn.Module], None], why: str):
    model = tiny_model("qwen3_moe")
    change(model.layers[1].mlp.experts)
    with pytest.raises(ModelNotSupportedError, match=f"layers.1.mlp.experts.*{why}"):
        mr.attach(model, experts_implementation="moe_route")
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    assert attachment_of(model) is None
    model.set_experts_implementation(NAME)
    with pytest.raises(ModelNotSupportedError, match=f"{why}.*set_experts_implementation"):
        model(input_ids=tokens())


@pytest.fixture
def a_later_transformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """One whose decorator has a flag more."""
    moe = importlib.import_module("transformers.integrations.moe")

    def use_experts_implementation(
        experts_class: Any = None, *, has_gate: bool = True, has_experts_within: bool = False
    ) -> None: ...

    with monkeypatch.context() as patch:
        patch.setattr(moe, "use_experts_implementation", use_experts_implementation)
        register_experts()
        yield moe
    register_experts()


@pytest.mark.usefixtures("a_later_transformers")
def test_a_flag_of_a_later_transformers_is_refused_where_it_is_set():
    model = tiny_model("qwen3_moe")
    with mr.attach(model, experts_implementation="moe_route"), torch.no_grad():
        model(input_ids=tokens())
    model.layers[0].mlp.experts.has_experts_within = True
    with pytest.raises(ModelNotSupportedError, match="has_experts_within=True"):
        mr.attach(model, experts_implementation="moe_route")


def test_a_model_without_the_interface():
    model = tiny_model("longcat_flash")
    with pytest.raises(ModelNotSupportedError, match=r"LongcatFlashExperts.*experts_implementation=None"):
        mr.attach(model, experts_implementation="moe_route")
    assert attachment_of(model) is None


def test_experts_beside_the_interface_are_mentioned(caplog: pytest.LogCaptureFixture):
    model = tiny_model("qwen3_moe")
    block = model.layers[1].mlp
    block.experts = mr.nn.Experts(num_experts=8, hidden_size=64, intermediate_size=32)
    with caplog.at_level(logging.WARNING, "moe_route"), mr.attach(model, experts_implementation="moe_route"):
        assert gap(*(run_layers(model, each) for each in ("eager", "moe_route"))) < 1e-5
    assert [record.message for record in caplog.records] == [
        "Experts have a forward of their own and keep it: 'moe_route' runs what goes through transformers' interface"
    ]


def run_layers(model: nn.Module, experts: str) -> Tensor:
    model.set_experts_implementation(experts)
    with torch.no_grad():
        return model(input_ids=tokens()).last_hidden_state


def test_experts_that_cannot_be_left_at_run_time():
    model = tiny_model("olmoe")
    model.config._experts_implementation_internal = "deepgemm_megamoe"
    with pytest.raises(ModelNotSupportedError, match="megamoe"):
        mr.attach(model, experts_implementation="moe_route")
    assert model.get_experts_implementation() == {"": "deepgemm_megamoe"}


# ---- shards


@pytest.fixture
def mesh() -> Iterator[Any]:
    """A group of one process, in which tensors can be shards all the same."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shards_are_looked_at_when_they_are_used(mesh: Any):
    """At rest the weights may be shards. A forward that gets plain tensors runs, one that gets shards is refused."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    model, x = tiny_model("qwen3_moe"), tokens()
    with torch.no_grad():
        want = model(input_ids=x).last_hidden_state
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    experts = model.layers[0].mlp.experts
    assert isinstance(experts.down_proj, DTensor)
    with mr.attach(model, experts_implementation="moe_route"), torch.no_grad():
        assert gap(model(input_ids=x).last_hidden_state, want) < 1e-5

    model = tiny_model("qwen3_moe")
    experts = model.layers[0].mlp.experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    with (
        mr.attach(model, experts_implementation="moe_route"),
        pytest.raises(ModelNotSupportedError, match="DTensor"),
    ):
        model(input_ids=x)


def run_rank(rank: int, folder: str, port: int, plan: dict[str, int]) -> None:
    """One of two processes that hold the model together."""
    import os

    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**plan), dtype=torch.float32
    )
    want = torch.load(Path(folder) / "want.pt")
    with mr.attach(model, experts_implementation="moe_route"):
        with torch.no_grad():
            assert gap(model(input_ids=tokens()).logits, want["logits"]) < 1e-5
        if "ep_size" in plan:  # training sends rows to their experts' ranks, which see k = 1 and unit weights
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            assert gap(loss.detach(), want["loss"]) < 1e-5
    dist.destroy_process_group()


PLANS = {"expert": ("qwen3_moe", {"tp_size": 2, "ep_size": 2}), "tensor": ("gpt_oss", {"tp_size": 2})}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "plan"), PLANS.values(), ids=PLANS)
def test_two_ranks(name: str, plan: dict[str, int], tmp_path: Path):
    """Expert and tensor parallelism of transformers, with our experts inside, give what one process gives."""
    import socket

    model = tiny_model(name, head=True)
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        out = model(input_ids=tokens(), labels=tokens())
    torch.save({"logits": out.logits, "loss": out.loss}, tmp_path / "want.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), port, plan), nprocs=2)


# ---- FP8

fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")


@pytest.fixture
def fp8_model() -> nn.Module:
    """A model whose experts transformers has replaced by its FP8 class, as loading in FP8 does; their weights are
    bfloat16, which that class multiplies as they are, since its FP8 kernels need a GPU."""
    model = tiny_model("qwen3_moe", torch.bfloat16)
    quantization = transformers.FineGrainedFP8Config(weight_block_size=(16, 16))
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own = [layer.mlp.experts for layer in model.layers]
    fp8.replace_with_fp8_linear(model, kept, quantization)
    for layer, experts in zip(model.layers, own, strict=True):
        assert type(layer.mlp.experts) is fp8.FP8Experts
        layer.mlp.experts.gate_up_proj = experts.gate_up_proj
        layer.mlp.experts.down_proj = experts.down_proj
    return model


def test_fp8_experts_run_what_they_ran_before(fp8_model: nn.Module, caplog: pytest.LogCaptureFixture):
    from moe_route.experts import interface as experts

    experts._said.clear()
    fp8_model.set_experts_implementation("eager")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "moe_route"):
        want = fp8_model(input_ids=tokens()).last_hidden_state
        with mr.attach(fp8_model, experts_implementation="moe_route"):
            assert fp8_model.get_experts_implementation() == {"": NAME}
            assert {layer.experts_implementation for layer in mr.describe(fp8_model).layers} == {"eager"}
            assert torch.equal(fp8_model(input_ids=tokens()).last_hidden_state, want)
    assert fp8_model.get_experts_implementation() == {"": "eager"}
    assert not any("moe_route" in name for module in fp8_model.modules() for name in vars(module))
    assert [r.message for r in caplog.records if "FP8" in r.message] == [
        "FP8Experts hold FP8 weights with scales, which 'moe_route' does not multiply: transformers' 'eager' runs them"
    ]


@pytest.mark.parametrize(("scheme", "runs"), [("dynamic", "grouped_mm"), ("static", "eager")])
def test_fp8_experts_by_name_run_what_transformers_takes(
    fp8_model: nn.Module, monkeypatch: pytest.MonkeyPatch, scheme: str, runs: str
):
    called = []

    def grouped_mm(module: nn.Module, *inputs: Tensor) -> Tensor:
        called.append("grouped_mm")
        return eager(module, *inputs)

    monkeypatch.setitem(fp8.ALL_FP8_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", grouped_mm)
    fp8_model.set_experts_implementation("eager")
    for layer in fp8_model.layers:
        layer.mlp.experts.activation_scheme = scheme
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer.mlp.experts, f"{name}_activation_scale", torch.ones(8))
    with torch.no_grad():
        want = fp8_model(input_ids=tokens()).last_hidden_state
        fp8_model.set_experts_implementation(NAME)
        assert torch.equal(fp8_model(input_ids=tokens()).last_hidden_state, want)
    assert {layer.experts_implementation for layer in mr.describe(fp8_model).layers} == {runs}
    assert called == (["grouped_mm"] * 3 if runs == "grouped_mm" else [])
