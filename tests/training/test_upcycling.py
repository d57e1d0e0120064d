"""Dense models become sparse ones: the same logits at the start, hybrid-k in training, plain top-k without a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_route as mr
from moe_route.routers import ModelNotSupportedError
from moe_route.training import UpcyclingError, family_plan, load_upcycled, own_expert_loss, upcycle

transformers = pytest.importorskip("transformers")

FAMILIES = {"eng": "Germanic", "rus": "Slavic", "deu": "Germanic", "jpn": "Japonic"}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Model types with every form of a feed-forward block, and the class of the sparse model.
MODELS = {
    "qwen3": ("Qwen3MoeForCausalLM", {"head_dim": 12}),
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 12}),  # tanh GELU, norms before and after
    "phi3": ("Phi3ForCausalLM", {}),  # gate and up in one matrix
    "gpt_neox": ("GPTNeoXForCausalLM", {}),  # no gate, biases
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
    "nemotron": ("NemotronForCausalLM", {}),  # no gate, squared ReLU
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 48, "n_head": 4, "n_layer": 3, "n_inner": 96}),  # transposed matrices
}


def dense(kind: str = "qwen3", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **MODELS[kind][1], **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens() if ids is None else ids).logits


@pytest.mark.parametrize("kind", MODELS)
def test_starts_as_the_dense_model(kind: str, tmp_path: Path) -> None:
    model = dense(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sparse, plan = upcycle(model, families=FAMILIES)
    assert type(sparse).__name__ == MODELS[kind][0]
    torch.testing.assert_close(logits(sparse), logits(model), rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    unnormalized, _ = upcycle(model, families=FAMILIES, renormalize="none")
    assert (logits(unnormalized) - logits(model)).abs().max() > 1e-3
    with mr.attach(sparse) as routed:
        assert len(routed.routers) == 2
        with routed.record(groups=["eng"]) as recorder, routed.labels("eng"):
            logits(sparse)
        assert recorder.statistics().tokens().tolist() == [[18, 18]]
    sparse.save_pretrained(tmp_path)
    loaded = load_upcycled(tmp_path)
    assert type(loaded) is type(sparse)
    assert torch.equal(logits(loaded.eval()), logits(sparse))
    assert family_plan(loaded) == plan


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_all_layers_make_a_mixtral(kind: str, tmp_path: Path) -> None:
    sparse, _ = upcycle(dense(kind), families=FAMILIES, layers=range(3))
    assert type(sparse).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(logits(sparse), logits(dense(kind)), rtol=0, atol=1e-5)
    sparse.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(sparse))


def test_a_class_that_computes_something_else_is_not_used() -> None:
    model = dense(
        "qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1
    )  # windows in some layers only
    sparse, _ = upcycle(model, families=FAMILIES)
    assert type(sparse).__name__ == "Qwen3ForCausalLM"
    torch.testing.assert_close(logits(sparse), logits(model), rtol=0, atol=1e-5)
    with pytest.raises(UpcyclingError, match="computes something else"):
        upcycle(model, families=FAMILIES, stock_class=True)
    with pytest.raises(UpcyclingError, match="there is none for PhiForCausalLM"):
        upcycle(dense("phi"), families=FAMILIES, stock_class=True)
    assert type(upcycle(dense(), families=FAMILIES, stock_class=False).model).__name__ == "Qwen3ForCausalLM"


def hybrid_choice(scores: Tensor, own: Tensor, k: int) -> Tensor:
    """Plain torch: the k best experts, and the own one in the place of the last where it is not among them."""
    ids = scores.topk(k).indices
    missing = ~(ids == own[:, None]).any(1)
    return torch.where(missing[:, None] & (torch.arange(k) == k - 1), own[:, None], ids)


def plain_block(block: nn.Module, hidden: Tensor, own: Tensor | None, k: int, renormalize: bool) -> Tensor:
    """An upcycled block of Qwen3-MoE in plain torch."""
    scores = F.softmax(F.linear(hidden, block.gate.weight), dim=-1)
    ids = scores.topk(k).indices if own is None else hybrid_choice(scores.detach(), own, k)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    out = torch.zeros_like(hidden)
    for slot in range(k):
        for expert in range(scores.shape[1]):
            rows = (ids[:, slot] == expert).nonzero()[:, 0]
            gate, up = F.linear(hidden[rows], block.experts.gate_up_proj[expert]).chunk(2, -1)
            part = F.linear(F.silu(gate) * up, block.experts.down_proj[expert]) * weights[rows, slot, None]
            out = out.index_add(0, rows, part)
    return out


@pytest.mark.parametrize("renormalize", ["sum", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stock_class", [True, False])
def test_one_training_step_under_the_plan(renormalize: Any, checkpointing: bool, stock_class: bool) -> None:
    options = {"families": FAMILIES, "renormalize": renormalize, "router_std": 1.0, "noise": 1.0}
    model, plan = upcycle(dense(), **options, stock_class=stock_class)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, groups = tokens(4), ["jpn", "eng", "rus", "deu"]
    own = torch.tensor([2, 0, 1, 0]).repeat_interleave(ids.shape[1])
    with mr.attach(model) as routed, routed.steer(plan), routed.record() as recorder, routed.labels(groups=groups):
        model(input_ids=ids, labels=ids).loss.backward()
    statistics = recorder.statistics()
    for group, expert in {"jpn": 2, "eng": 0, "rus": 1, "deu": 0}.items():
        chosen = statistics.token_sum("counts")[statistics.groups.index(group), :, expert]
        assert (chosen == ids.shape[1]).all()  # chosen for every token, in every layer
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}

    reference, _ = upcycle(dense(), **options)
    reference.train()
    for layer in reference.model.layers[1:]:
        block = layer.mlp
        block.forward = lambda hidden, block=block: plain_block(
            block, hidden.flatten(0, 1), own, 2, renormalize == "sum"
        ).view_as(hidden)
    reference(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in reference.named_parameters():
        mine = name if stock_class else name.replace("mlp.gate.weight", "mlp.router.weight")
        torch.testing.assert_close(grads[mine], parameter.grad, rtol=1e-4, atol=1e-6)
        if "mlp.gate.weight" in name:
            assert parameter.grad.abs().max() > 1e-4

    with mr.attach(model.eval()) as routed, routed.record() as recorder:
        logits(model, ids)
    assert (recorder.statistics().token_sum("counts") < ids.numel()).all()  # plain top-k without the plan


def test_fixed_by_label_has_weight_one() -> None:
    model, plan = upcycle(dense(), families=FAMILIES, top_k=1, fixed_by_label=True, noise=0.5)
    block = model.model.layers[2].mlp
    seen: list[tuple[Tensor, Tensor]] = []
    block.experts.register_forward_pre_hook(lambda _, given: seen.append((given[1], given[2])))
    ids = tokens(4)
    with mr.attach(model) as routed, routed.steer(plan), routed.labels(groups=["jpn", "eng", "rus", "deu"]):
        model(input_ids=ids)
    chosen, weights = seen[0]
    assert torch.equal(chosen[:, 0], torch.tensor([2, 0, 1, 0]).repeat_interleave(ids.shape[1]))
    assert (weights == 1).all()


def test_experts_from_several_models() -> None:
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(transformers.AutoModelForCausalLM.from_config(dense().config).eval())
    model, _ = upcycle(models[0], families=FAMILIES, experts_from=models)
    experts = model.model.layers[1].mlp.experts
    for expert, source in enumerate(models):
        mlp = source.model.layers[1].mlp
        assert torch.equal(experts.gate_up_proj[expert], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        assert torch.equal(experts.down_proj[expert], mlp.down_proj.weight)
    mean = sum(source.model.layers[0].mlp.up_proj.weight for source in models) / 3
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight, mean)


def test_noise_tells_experts_apart_and_a_seed_repeats_it() -> None:
    first, second = (upcycle(dense(), families=FAMILIES, noise=0.1, seed=3).model for _ in range(2))
    one = first.model.layers[1].mlp.experts.down_proj
    assert torch.equal(one, second.model.layers[1].mlp.experts.down_proj)
    assert 0.13 < ((one[0] - one[1]).std() / one[0].std()).item() < 0.15  # sqrt(2) * 0.1


def test_own_expert_loss() -> None:
    scores = torch.randn(5, 3, requires_grad=True)
    own = torch.tensor([0, 2, -1, 1, 1])
    loss = own_expert_loss(scores, own)
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(loss, -torch.log_softmax(scores, 1)[kept, own[kept]].mean())
    assert own_expert_loss(scores, torch.full((5,), -1)) == 0
    with pytest.raises(ValueError, match="between -1 and 2"):
        own_expert_loss(scores, torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(ValueError, match=r"\[T, E\]"):
        own_expert_loss(scores, own[:3])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k = 1 that cannot learn": ({"top_k": 1}, "router gets no gradient"),
    "k above E": ({"top_k": 4}, "between 1 and the 3 families"),
    "label with k = 2": ({"fixed_by_label": True}, "needs top_k=1"),
    "no families": ({"families": {}}, "must map groups"),
    "gap": ({"families": {"a": 0, "b": 2}}, "without gaps"),
    "layer": ({"layers": [3]}, "some of 0 to 2"),
    "no layer": ({"layers": []}, "some of 0 to 2"),
    "renormalize": ({"renormalize": "softmax"}, "'sum' or 'none'"),
    "stack": ({"stack": "model.blocks"}, "known here: model.layers"),
    "too few models": ({"experts_from": []}, "0 models for 3 experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(UpcyclingError, match=message):
        upcycle(dense(), **{"families": FAMILIES, **options})


def test_refused_models(tmp_path: Path) -> None:
    sparse, _ = upcycle(dense(), families=FAMILIES, layers=range(3))
    with pytest.raises(UpcyclingError, match="no stack of layers"):
        upcycle(sparse, families=FAMILIES)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(dense().config)
    with pytest.raises(UpcyclingError, match="not loaded"):
        upcycle(empty, families=FAMILIES)
    other = dense(intermediate_size=64)
    with pytest.raises(UpcyclingError, match="not every model of experts_from"):
        upcycle(dense(), families=FAMILIES, experts_from=[dense(), dense(), other])
    with pytest.raises(UpcyclingError, match="keeps no families"):
        family_plan(dense())
    with pytest.raises(UpcyclingError, match="more than the 3 experts"):
        family_plan(sparse, {str(i): i for i in range(4)})
    dense().save_pretrained(tmp_path)
    with pytest.raises(UpcyclingError, match="no upcycled model"):
        load_upcycled(tmp_path)


def test_blocks_of_moe_route_run_on_its_kernels_already() -> None:
    sparse, _ = upcycle(dense("llama"), families=FAMILIES)
    with pytest.raises(ModelNotSupportedError, match="run on moe_route's kernels already"):
        mr.attach(sparse, experts_implementation="moe_route")


def test_two_stacks_need_a_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = dense().model, dense().model

    with pytest.raises(UpcyclingError, match=r"choose one by stack=, of 'left.layers', 'right.layers'"):
        upcycle(Two(), families=FAMILIES)


def test_published_families() -> None:
    families = mr.data.LANGUAGE_FAMILIES
    assert list(dict.fromkeys(families.values())).index(families["swh_Latn"]) == 6
    assert families["eng_Latn"] == families["hin_Deva"] != families["arb_Arab"] == families["heb_Hebr"]
    assert mr.data.families_of(["sw", "eng"]) == {"sw": "African", "eng": "Indo-European and others"}
    with pytest.raises(ValueError, match="no language has the code 'xx'"):
        mr.data.families_of(["xx"])
