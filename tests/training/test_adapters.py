"""Low-rank adapters mixed by a router, by a label, or not at all: what they compute, in every way a model is run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness.adapted_models import (
    CAUSAL,
    CONFIGS,
    GROUPS,
    ROUTED,
    SIZES,
    adapted_model,
    as_trained,
    batch,
    logits,
    model_of,
)
from torch import Tensor

import moe_route as mr
from moe_route.training import (
    STAGES,
    AdaptedModel,
    AdapterConfig,
    AdapterError,
    ShardPool,
    add_adapters,
    freeze,
    load_adapters,
    own_expert_loss,
)

transformers = pytest.importorskip("transformers")


@pytest.fixture(params=CAUSAL)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# ---- what they compute


def test_nothing_changes_at_the_start_and_after_removing(name: str, kind: str) -> None:
    model = model_of(kind)
    with torch.no_grad():
        before, state = model(**batch()).logits, {key: value.clone() for key, value in model.state_dict().items()}
        adapted = add_adapters(model, CONFIGS[name])
        assert torch.equal(logits(adapted), before)
        as_trained(adapted)
        assert not torch.allclose(logits(adapted), before, atol=1e-2)
        with adapted.disabled():
            assert torch.equal(model(**batch()).logits, before)
        assert adapted.enabled
        adapted.remove()
        assert torch.equal(model(**batch()).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_logits_do_not_depend_on_tokens_that_come_later(name: str, kind: str) -> None:
    adapted = adapted_model(name, kind)
    whole, changed = logits(adapted), batch()["input_ids"].clone()
    changed[:, 6:] = 5
    # batched products of some experts round by the batch: nothing beyond that
    torch.testing.assert_close(logits(adapted, input_ids=changed)[:, :6], whole[:, :6], rtol=0, atol=1e-5)
    assert not torch.allclose(logits(adapted, input_ids=changed)[:, 6:], whole[:, 6:], atol=1e-2)


def test_padding_changes_nothing(name: str, kind: str) -> None:
    adapted = adapted_model(name, kind)
    padded = logits(adapted)[1, 4:]
    with torch.no_grad(), adapted.labels("swh"):
        alone = adapted.model(input_ids=batch()["input_ids"][1:2, 4:]).logits[0]
    if kind == "gpt2":  # its positions count padding unless position_ids are given
        return
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-4)


@pytest.mark.parametrize("sizes", [(6, 1, 1, 1), (5, 4), (1, 4, 4)])
def test_a_cache_gives_the_logits_of_the_whole_text(name: str, kind: str, sizes: tuple[int, ...]) -> None:
    adapted, given = adapted_model(name, kind), batch()
    given["attention_mask"][:] = 1
    whole, parts, cache, start = logits(adapted, attention_mask=given["attention_mask"]), [], None, 0
    with torch.no_grad(), adapted.labels(GROUPS):
        for size in sizes:
            end = start + size
            ids, mask = given["input_ids"][:, start:end], given["attention_mask"][:, :end]
            output = adapted.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, start = output.past_key_values, end
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generated_tokens_are_those_of_the_whole_text(name: str, options: dict[str, Any]) -> None:
    """Every generated text, run whole, has the probabilities with which it was generated."""
    adapted = adapted_model(name)
    times = options.get("num_return_sequences", 1)
    with torch.no_grad(), adapted.labels(GROUPS):
        torch.manual_seed(0)
        made = adapted.model.generate(
            **batch(),
            max_new_tokens=5,
            min_new_tokens=5,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **options,
        )
        mask = F.pad(batch()["attention_mask"], (0, 5), value=1).repeat_interleave(times, 0)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        again = adapted.model(input_ids=made.sequences, attention_mask=mask, position_ids=positions).logits
    if "num_beams" in options:
        score = again.log_softmax(-1)[:, 8:-1].gather(-1, made.sequences[:, 9:, None]).sum((1, 2)) / 5
        torch.testing.assert_close(score, made.sequences_scores, rtol=0, atol=1e-2)
    else:
        torch.testing.assert_close(again[:, 8:-1], torch.stack(made.logits, 1), rtol=0, atol=1e-4)


def test_a_mixture_is_the_formula() -> None:
    """y = W x + sum_i w_i (alpha / r) B_i A_i x, with w = softmax(R c) for the block's input c."""
    config = AdapterConfig(rank=4, experts=3, router="sequence", alpha=6.0, target_modules=("k_proj",))
    adapted = add_adapters(model_of(), config)
    as_trained(adapted)
    seen: dict[str, Tensor] = {}
    layer = adapted.model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, args: seen.__setitem__("block", args[0]))
    layer.self_attn.k_proj.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    logits(adapted)
    number = adapted.layers.index("model.layers.1.self_attn.k_proj")
    a, b = adapted.factors(number)
    router = layer.self_attn.k_proj.adapter.router.weight
    for row, first in enumerate((0, 4, 0)):
        weights = torch.softmax(router @ seen["block"][row, first], 0)
        update = sum(weights[i] * b[i].t() @ a[i] for i in range(3)) * 6.0 / 4
        expected = seen["x"][row] @ (layer.self_attn.k_proj.weight + update).t()
        torch.testing.assert_close(seen["y"][row], expected, rtol=0, atol=1e-5)


def test_top_k_drops_the_others() -> None:
    adapted = adapted_model("token, two of three")
    outcome = {}
    routers = [m for m in adapted.model.modules() if type(m).__name__ == "AdapterRouter"]
    routers[0].register_forward_hook(lambda module, args, output: outcome.update(weights=output[1], ids=output[2]))
    logits(adapted)
    assert outcome["ids"].shape == (27, 2)
    torch.testing.assert_close(outcome["weights"].sum(1), torch.ones(27))


def test_a_group_takes_its_own_adapter() -> None:
    adapted = adapted_model("group")
    mixed = logits(adapted)
    with torch.no_grad():
        for group, rows in (("eng", [0, 2]), ("swh", [1])):
            with adapted.labels(group):
                torch.testing.assert_close(adapted.model(**batch()).logits[rows], mixed[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "token", "sequence", "group", "shards by token"])
def test_adapters_of_an_embedding(name: str, tmp_path: Path) -> None:
    """Mixed by the softmax of trained numbers, or by group: the same as an embedding with other weights."""
    config = replace(CONFIGS[name], target_modules=("embed_tokens",))
    model = model_of()
    before, own = logits(AdaptedModel(model_of(), CONFIGS["none"])), model.model.embed_tokens.weight.clone()
    adapted = add_adapters(model, config)
    assert adapted.embeddings == adapted.layers == ("model.embed_tokens",)
    assert torch.equal(logits(adapted), before)
    as_trained(adapted)
    with torch.no_grad():
        for key, parameter in adapted.adapter_parameters().items():
            if key.endswith(".mix"):
                parameter.copy_(torch.tensor([0.0, 1.0, -1.0]))
    a, b = adapted.factors(0)
    updates = a.transpose(1, 2) @ b * config.scale
    weights = torch.softmax(torch.tensor([0.0, 1.0, -1.0]), 0) if config.routed else torch.ones(1)
    found, plain = logits(adapted), model_of()
    for row, group in enumerate(GROUPS):
        chosen = updates[config.groups.index(group)] if config.groups else (updates * weights[:, None, None]).sum(0)
        with torch.no_grad():
            plain.model.embed_tokens.weight.copy_(own + chosen)
            expected = plain(**batch()).logits[row]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in gradients(adapted).values())
    adapted.model.eval()
    adapted.save(tmp_path / "adapters.safetensors")
    assert torch.equal(logits(load_adapters(model_of(), tmp_path / "adapters.safetensors")), found)
    if not config.routed:
        with torch.no_grad():
            expected = found[0] if name == "group" else found
            merged = adapted.merge("eng" if name == "group" else None)(**batch()).logits
        torch.testing.assert_close(merged[0] if name == "group" else merged, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "prefix"])
def test_an_encoder_reads_the_whole_sentence(pooling: Any) -> None:
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    targets = ("query", "key", "value", "attention.output.dense", "intermediate.dense")
    config = AdapterConfig(rank=4, experts=3, router="sequence", pooling=pooling, target_modules=targets)
    adapted = add_adapters(model, config)
    as_trained(adapted)
    given = batch()
    given["attention_mask"] = given["attention_mask"].flip(1)
    with torch.no_grad():
        padded = model(**given).last_hidden_state[1, :5]
        alone = model(input_ids=given["input_ids"][1:2, :5]).last_hidden_state[0]
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-5)


def test_an_encoder_and_its_decoder_each_decide() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    adapted = add_adapters(model, AdapterConfig(rank=4, experts=3, router="sequence", target_modules=("q", "v")))
    as_trained(adapted)
    with torch.no_grad():
        made = model.generate(
            **batch(), max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
        whole = model(**batch(), decoder_input_ids=made.sequences[:, :-1]).logits
    torch.testing.assert_close(whole, torch.stack(made.logits, 1), rtol=0, atol=1e-5)


# ---- training


def gradients(adapted: AdaptedModel, **options: Any) -> dict[str, Tensor]:
    model = adapted.model.train()
    model.zero_grad()
    with adapted.labels(GROUPS):
        model(**batch(), labels=batch()["input_ids"], use_cache=False, **options).loss.backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_the_adapters_alone_also_with_checkpointing(name: str, kind: str) -> None:
    adapted = adapted_model(name, kind)
    plain = gradients(adapted)
    assert plain.keys() == adapted.adapter_parameters().keys()
    if name != "group":
        assert all(gradient.abs().max() > 0 for gradient in plain.values())
    adapted.model.gradient_checkpointing_enable()
    for _ in range(2):
        again = gradients(adapted)
        assert again.keys() == plain.keys()
        for key, gradient in plain.items():
            torch.testing.assert_close(again[key], gradient, rtol=0, atol=1e-6, msg=key)


def test_the_gradient_of_a_router_equals_plain_torch() -> None:
    torch.manual_seed(0)
    adapted = adapted_model("token, two of three")
    linear = adapted.model.model.layers[0].self_attn.q_proj
    mixture, x, hidden = linear.adapter, torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    a, b = (factor.detach().clone().requires_grad_() for factor in mixture.factors())
    weight = mixture.router.weight.detach().clone().requires_grad_()
    probability = (hidden @ weight.t()).softmax(-1)
    kept = probability * (probability >= probability.topk(2, -1).values[..., -1:])
    kept = kept / kept.sum(-1, keepdim=True)
    expected = torch.einsum("bsn,nrd,bsd,nro->bso", kept, a, x, b) * adapted.config.scale
    target = torch.randn(expected.shape)
    (expected * target).sum().backward()
    block = mixture.block
    adapted._state.sequences = _sequences(2, 5)
    block.see(linear, (hidden,), {})
    found = mixture(x)
    (found * target).sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixture.router.weight.grad, weight.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixture.factors.a.grad, a.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixture.factors.b.grad, b.grad, rtol=0, atol=1e-5)


def _sequences(rows: int, length: int) -> Any:
    from moe_route.calls import Call
    from moe_route.training.adapters.call_state import Sequences

    call = Call(rows, length, 0, None, "prefill", torch.device("cpu"))
    return Sequences(call, torch.zeros(rows, dtype=torch.int64), None)


@pytest.mark.parametrize("name", ["token", "sequence", "prefix", "group"])
def test_two_calls_before_backward_are_refused_where_layers_run_again(name: str) -> None:
    adapted = adapted_model(name)
    adapted.model.train()
    adapted.model.gradient_checkpointing_enable()
    with adapted.labels(GROUPS):
        losses = [adapted.model(**batch(), labels=batch()["input_ids"], use_cache=False).loss for _ in range(2)]
    with pytest.raises(AdapterError, match=r"call backward\(\) after each call"):
        sum(losses).backward()
    del losses
    assert gradients(adapted)  # nothing of it is left behind


def test_reentrant_checkpointing_is_refused() -> None:
    adapted = adapted_model("token")
    adapted.model.gradient_checkpointing_enable({"use_reentrant": True})
    adapted.model.enable_input_require_grads()
    with pytest.raises(AdapterError, match="use_reentrant"):
        gradients(adapted)


def test_the_same_seed_trains_the_same_bits(name: str) -> None:
    runs = []
    for _ in range(2):
        adapted = add_adapters(model_of(), CONFIGS[name])
        optimizer = torch.optim.AdamW(adapted.adapter_parameters().values(), lr=1e-2)
        for _ in range(3):
            gradients(adapted)
            optimizer.step()
        runs.append(adapted.adapter_parameters())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


@pytest.mark.parametrize("name", ROUTED)
def test_a_balancing_loss_trains_the_routers(name: str) -> None:
    adapted = adapted_model(name)
    with pytest.raises(AdapterError, match="training mode"):
        adapted.balance_loss()
    adapted.model.train()
    with adapted.labels(GROUPS):
        adapted.model(**batch())
    loss = adapted.balance_loss()
    loss.backward()
    # all adapters mixed are balanced whatever the router says
    assert loss.item() == pytest.approx(3.0) if adapted.config.top_k is None else loss.item() > 2.0
    trained = {key for key, p in adapted.model.named_parameters() if p.grad is not None}
    assert trained >= {key for key in adapted.adapter_parameters() if ".router." in key}


def test_routers_learn_the_labels_of_sequences() -> None:
    """By the loss that teaches upcycled models their own expert."""
    adapted = add_adapters(model_of(), CONFIGS["prefix"])
    assert adapted.router_logits == {}
    routers = [p for key, p in adapted.adapter_parameters().items() if ".router." in key]
    optimizer = torch.optim.AdamW(routers, lr=0.05)
    own = torch.tensor([2, 0, 2])[:, None].expand(3, 9).masked_fill(batch()["attention_mask"] == 0, -1).flatten()
    losses = []
    for _ in range(60):
        adapted.model.train()(**batch())
        assert list(adapted.router_logits) == list(adapted.layers)
        loss = torch.stack([own_expert_loss(each, own) for each in adapted.router_logits.values()]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 < 1 < losses[0]
    chosen = torch.stack([each.argmax(1) for each in adapted.router_logits.values()])
    assert (chosen == own)[:, own >= 0].float().mean() > 0.9


def test_stages_say_what_is_trained() -> None:
    adapted = adapted_model("token")
    model = adapted.model
    counts = [freeze(model, stage) for stage in STAGES]
    assert [set(count) for count in counts] == [
        {"embeddings", "head"},
        {"body", "head"},
        {"adapters", "routers", "head"},
    ]
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {*adapted.adapter_parameters(), "lm_head.weight"}
    assert freeze(model, ["*.q_proj.weight"]) == {"body": 3 * 32 * 32}
    assert sum(freeze(model, ["embeddings", "body", "head"]).values()) == sum(
        p.numel() for p in model_of().parameters()
    )
    with pytest.raises(AdapterError, match="'bodies': its parts are embeddings, body, head, adapters, routers"):
        freeze(model, ["bodies"])


def test_a_model_can_be_copied_and_pickled_after_a_step(name: str) -> None:
    adapted = adapted_model(name)
    expected = logits(adapted)
    gradients(adapted)
    adapted.model.eval()
    for copied in (copy.deepcopy(adapted.model), pickle.loads(pickle.dumps(adapted.model))):
        with torch.no_grad(), adapted.labels(GROUPS):
            assert torch.equal(copied(**batch()).logits, expected)


@pytest.mark.parametrize("name", ["token", "sequence", "shards", "group"])
def test_a_model_whose_weights_are_offloaded(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected, model = logits(adapted_model(name)), model_of()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    adapted = add_adapters(model, CONFIGS[name])
    as_trained(adapted)
    assert torch.equal(logits(adapted), expected)


@pytest.mark.exhaustive
def test_a_compiled_model_computes_the_same(name: str) -> None:
    adapted = adapted_model(name)
    expected = logits(adapted)
    compiled = torch.compile(adapted.model, backend="aot_eager")
    with torch.no_grad(), adapted.labels(GROUPS):
        torch.testing.assert_close(compiled(**batch()).logits, expected, rtol=0, atol=1e-5)


def test_a_block_that_is_never_entered_says_so() -> None:
    adapted = adapted_model("group")
    for block, call in ((adapted.disabled, "disabled"), (lambda: adapted.labels("eng"), "labels")):
        with pytest.warns(RuntimeWarning, match=rf"adapted\.{call}\(.*was never entered"):
            block()
    assert adapted.enabled


# ---- with recordings and plans


@pytest.fixture
def routed_moe() -> Iterator[tuple[AdaptedModel, Any]]:
    adapted = adapted_model("sequence", "qwen3_moe")
    with mr.attach(adapted.model) as routed:
        yield adapted, routed


def test_routers_are_numbered_after_those_of_the_model(routed_moe: tuple[AdaptedModel, Any]) -> None:
    _, routed = routed_moe
    assert [router.role for router in routed.routers] == [""] * 3 + ["adapter"] * (len(routed.routers) - 3)
    assert {router.num_experts for router in routed.routers[3:]} == {3}


def test_a_decision_for_a_sequence_is_counted_once(routed_moe: tuple[AdaptedModel, Any]) -> None:
    adapted, routed = routed_moe
    expected = logits(adapted)
    with routed.record(groups=["eng", "swh"]) as recording, recording.labels(groups=GROUPS), torch.no_grad():
        assert torch.equal(adapted.model(**batch()).logits, expected)
    statistics = recording.statistics()
    statistics.verify()
    assert statistics.tokens()[:, :3].tolist() == [[18] * 3, [5] * 3]
    assert (statistics.tokens()[:, 3:] == [[2], [1]]).all()
    with routed.record(groups=["eng", "swh"]) as recording, recording.labels(groups=GROUPS), torch.no_grad():
        adapted.model.generate(**batch(), max_new_tokens=4, min_new_tokens=4)
    statistics = recording.statistics()
    assert (statistics.tokens()[:, 3:] == [[2], [1]]).all()  # nothing is decided while generating
    assert (statistics.tokens("decode")[:, :3] == [[6], [3]]).all()


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", ROUTED)
def test_a_plan_chooses_the_adapter(name: str, engine: Any) -> None:
    """Steered to one adapter, a mixture is that adapter."""
    adapted = adapted_model(name)
    own = logits(adapted)
    with mr.attach(adapted.model, engine=engine) as routed:
        every = [router.layer for router in routed.routers]
        plan = mr.Plan.bias({layer: [2] for layer in every}, strength=1e4)
        with routed.steer(plan):
            steered = logits(adapted)
        torch.testing.assert_close(logits(adapted), own, rtol=0, atol=1e-5)
    with torch.no_grad():
        for number in range(len(adapted.layers)):
            a, b = adapted.factors(number)
            weight = adapted.model.get_submodule(adapted.layers[number]).weight
            weight += b[2].t() @ a[2] * adapted.config.scale
    with adapted.disabled():
        real = batch()["attention_mask"].bool()  # padding is not steered
        torch.testing.assert_close(steered[real], logits(adapted)[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("of", ["adapted", "routed", "recording"])
def test_labels_of_an_attached_model_name_the_adapter_too(of: str) -> None:
    adapted = adapted_model("group", "qwen3_moe")
    expected = logits(adapted)
    with torch.no_grad(), mr.attach(adapted.model) as routed:
        if of == "recording":
            with routed.record(groups=["eng", "swh"]) as recording, recording.labels(groups=GROUPS):
                assert torch.equal(adapted.model(**batch()).logits, expected)
        else:
            labels = adapted.labels(GROUPS) if of == "adapted" else routed.labels(groups=GROUPS)
            with labels:
                assert torch.equal(adapted.model(**batch()).logits, expected)
        with pytest.raises(AdapterError, match="chosen by group"):
            adapted.model(**batch())


def test_peft_trains_beside_the_adapters() -> None:
    peft = pytest.importorskip("peft")
    adapted = adapted_model("token")
    expected = logits(adapted)
    wrapped = peft.get_peft_model(adapted.model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    wrapped.eval()
    with torch.no_grad(), mr.attach(wrapped) as routed, routed.record(groups=["eng"]) as recording:
        torch.testing.assert_close(wrapped(**batch()).logits, expected, rtol=0, atol=1e-6)
    assert recording.statistics().tokens().min() > 0


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is an integer of at least 1"),
        ({"experts": 3}, "router='none' has one adapter"),
        ({"router": "words"}, "router must be one of"),
        ({"router": "token"}, "needs experts= of 2 or more"),
        ({"router": "token", "experts": 3, "top_k": 4}, "more than the 3 adapters"),
        ({"router": "token", "experts": 3, "top_k": 1}, "gets no gradient"),
        ({"router": "group"}, "groups= names the adapters"),
        ({"groups": ("eng",)}, "groups= names the adapters"),
        ({"router": "group", "groups": ("eng", "eng")}, "groups must be different names"),
        ({"router": "group", "groups": ("eng", "swh"), "experts": 3}, "2 groups have as many adapters"),
        ({"router": "group", "groups": ("eng", "swh"), "top_k": 1}, "chooses nothing: leave out top_k"),
        ({"dropout": 1.0}, "dropout lies in"),
        ({"target_modules": ()}, "target_modules must be different names"),
        ({"rank": 1, "pool": ShardPool(rank=2, private=2)}, "private=2 ranks are more than rank=1"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        AdapterConfig(**{"rank": 4, **options})


def test_pools_with_more_private_ranks_than_they_have_are_refused() -> None:
    with pytest.raises(AdapterError, match="private=3 ranks are more than the rank=2"):
        ShardPool(rank=2, private=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("q_proj", "w1")}, "no linear layer or embedding is named 'w1'; the model's are .*q_proj"),
        ({"target_modules": r".*\.w1"}, "no linear layer or embedding is named"),
        ({"target_modules": ("lm_head",), "router": "token", "experts": 2}, "'lm_head' stands in no block"),
        ({"router": "sequence", "experts": 2, "pooling": "mean"}, "every token would depend on those after it"),
        ({"pool": ShardPool(rank=2, shards=5)}, "shards=5 must divide both sizes"),
        ({"rank": 8, "pool": ShardPool(rank=2)}, "rank=8 needs 7 public ranks, and 3 layers share 3"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused(options: dict[str, Any], message: str) -> None:
    model = model_of()
    before = model.state_dict().keys()
    with pytest.raises(AdapterError, match=message):
        add_adapters(model, AdapterConfig(**{"rank": 4, **options}))
    assert model.state_dict().keys() == before
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("second", ["none", "token", "sequence", "group", "shards by token"])
def test_two_sets_of_adapters_add_up(name: str, second: str, tmp_path: Path) -> None:
    first = adapted_model(name)
    before = logits(first)
    added = add_adapters(first.model, CONFIGS[second])
    assert torch.equal(logits(first), before)
    as_trained(added)
    assert first.adapter_parameters().keys().isdisjoint(added.adapter_parameters())
    assert {p for p in first.model.parameters() if p.requires_grad} == set(added.adapter_parameters().values())
    both = logits(first)
    assert not torch.allclose(both, before, atol=1e-2)
    added.save(tmp_path / "second.safetensors")
    added.remove()
    assert torch.equal(logits(first), before)
    again = load_adapters(first.model, tmp_path / "second.safetensors")
    assert torch.equal(logits(first), both)
    with first.disabled():
        alone = load_adapters(model_of(), tmp_path / "second.safetensors")
        torch.testing.assert_close(logits(first), logits(alone), rtol=0, atol=1e-6)
    first.remove()
    torch.testing.assert_close(logits(again), logits(alone), rtol=0, atol=1e-6)


def test_a_model_with_adapters_is_not_upcycled() -> None:
    adapted = adapted_model("none")
    with pytest.raises(mr.training.UpcyclingError, match="has adapters"):
        mr.training.upcycle(adapted.model, families={"eng": "a", "swh": "b"})


def test_labels_that_fit_no_adapter_are_refused() -> None:
    adapted = adapted_model("group")
    for labels, message in (
        ("fra", "no adapter for 'fra': the groups are eng, swh"),
        (["eng", "swh"], "2 labels for a batch of 3 sequences"),
        ([["eng"] * 8 + ["swh"]] * 3, "differ within a sequence"),
    ):
        with pytest.raises(AdapterError, match=message), adapted.labels(labels):
            adapted.model(**batch())
    with pytest.raises(AdapterError, match="chosen by group: run the model inside"):
        adapted.model(**batch())
    assert logits(adapted).isfinite().all()


@pytest.mark.parametrize("name", ["sequence", "prefix"])
def test_a_cache_that_the_adapters_did_not_see_is_refused(name: str) -> None:
    adapted = adapted_model(name)
    with torch.no_grad():
        with adapted.disabled():
            cache = adapted.model(**batch(), use_cache=True).past_key_values
        with pytest.raises(AdapterError, match="whose beginning the adapters did not see"):
            adapted.model(input_ids=batch()["input_ids"][:, :1], past_key_values=cache)
        cache = adapted.model(**batch(), use_cache=True).past_key_values
        cache.crop(-2)
        with pytest.raises(AdapterError, match="a cache that was cut"):
            adapted.model(input_ids=batch()["input_ids"][:, :1], past_key_values=cache)


def test_several_texts_in_a_row_are_refused() -> None:
    adapted = adapted_model("sequence")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, 9)
    with pytest.raises(AdapterError, match="several texts are packed into one row"):
        logits(adapted, position_ids=positions, attention_mask=torch.ones(3, 9, dtype=torch.int64))
    assert logits(adapted_model("token"), position_ids=positions).isfinite().all()


def test_a_layer_outside_the_model_is_refused() -> None:
    adapted = adapted_model("token")
    with pytest.raises(AdapterError, match="outside"):
        adapted.model.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, 32))


@pytest.mark.parametrize("part", ["model", "model.model"])
def test_an_interrupted_call_leaves_nothing_behind(name: str, part: str) -> None:
    adapted = adapted_model(name)
    expected, given = logits(adapted), batch()
    inner = adapted.model if part == "model" else adapted.model.model

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = adapted.model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), adapted.labels("swh"):
        inner(input_ids=given["input_ids"][:2, 3:], use_cache=True)
    handle.remove()
    assert torch.equal(logits(adapted), expected)
