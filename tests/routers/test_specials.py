"""Routers whose decision has a form of its own: what is particular to each of them."""

from __future__ import annotations

import copy
from importlib.metadata import version
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from harness.model_decisions import watch_experts
from harness.tiny_models import inputs, tiny_model, tokens
from packaging.version import Version

import moe_route as mr
from moe_route.calls import Call, Labels
from moe_route.calls.token_table import CallListener
from moe_route.ops import Force, StatisticsTables, SteeringTables
from moe_route.patching import Attachment
from moe_route.routers import ModelNotSupportedError, find_routers
from moe_route.routers.architectures.nllb import experts_called

DECODERS = ("dbrx", "llama4_text", "jetmoe", "inkling_text", "zaya", "deepseek_v4_with_hash")
ENCODER_DECODERS = ("switch_transformers", "nllb-moe")


def counted(attachment: Attachment, groups: int = 1) -> list[StatisticsTables]:
    tables = [StatisticsTables.zeros(router.num_experts, groups=groups) for router in attachment.routers]
    attachment.set_statistics(tables)
    return tables


def bias(router: Any, size: float = 2.0) -> SteeringTables:
    generator = torch.Generator().manual_seed(router.layer)
    return SteeringTables(1, router.num_experts, bias=torch.randn((1, router.num_experts), generator=generator) * size)


# ---------------------------------------------------------------------------------------------------------------
# Generating, padding, recording, steering: refused nowhere.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_padding_is_not_counted(name: str, side: str) -> None:
    model, ids = tiny_model(name), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    attachment = Attachment(model, verify=False)
    tables, given = counted(attachment), [watch_experts(router) for router in attachment.routers]
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    for table, ((chosen, _),) in zip(tables, given, strict=True):
        assert table.scalar("tokens").item() == 10
        assert torch.equal(table.metric("counts")[0], chosen[mask.flatten().bool()].sum(0))


@pytest.mark.parametrize("name", DECODERS)
def test_generating_counts_prefill_and_decode_apart_and_can_be_steered(name: str) -> None:
    model = tiny_model(name, head=True)
    model.generation_config.eos_token_id = None
    ids, options = tokens(2, 5), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    plain = model.generate(ids, attention_mask=mask, **options)
    attachment = Attachment(model)
    tables = counted(attachment, groups=2)
    attachment.listener.labels_of = lambda call: Labels(group=int(call.phase == "decode"))
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), plain)
    attachment.flush()
    for router, table in zip(attachment.routers, tables, strict=True):
        assert table.scalar("tokens").tolist() == [8, 6]
        assert (table.metric("counts").sum(1) + table.scalar("empty")).tolist() == [8 * router.top_k, 6 * router.top_k]
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([bias(router, 6.0) if router.steerable else None for router in attachment.routers])
    assert not torch.equal(model.generate(ids, attention_mask=mask, **options), plain)
    attachment.detach()
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), plain)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_and_decoder_are_calls_of_their_own(name: str) -> None:
    model = tiny_model(name)
    attachment = Attachment(model)
    tables, calls = counted(attachment), []
    attachment.listener.after_call = calls.append
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens(2, 3))
    assert [(call.length, call.continues) for call in calls] == [(6, False), (3, True)]
    assert {
        (router.role, table.scalar("tokens").item()) for router, table in zip(attachment.routers, tables, strict=True)
    } == {
        ("encoder", 10),
        ("decoder", 6),
    }


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_generating_with_an_encoder(name: str) -> None:
    model = tiny_model(name, head=True)
    model.generation_config.eos_token_id = None
    ids, options = tokens(2, 6), {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [0]}  # never padding
    plain = model.generate(ids, **options)
    with mr.attach(model) as routed:
        with routed.record(groups=["a", "b"], sequences=True) as rec, rec.labels(groups=["a", "b"], items=[1, 1]):
            assert torch.equal(model.generate(ids, **options), plain)
        statistics = rec.statistics()
        part = [router.role for router in routed.routers]
        assert {p: set(row) for p, row in zip(part, statistics.tokens().T.tolist(), strict=True)} == {
            "encoder": {6},
            "decoder": {4},
        }
        assert statistics.sequences().tolist() == [1, 1]
        with routed.record() as rec:
            model.generate(ids, **options)
        assert rec.statistics().sequences().tolist() == [2]  # not one for the encoder and one for the decoder
        with routed.steer(mr.Plan.bias({layer: [0, 3] for layer in range(len(part))}, strength=30.0)):
            model.generate(ids, **options)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_positions_of_a_trace_begin_anew_with_the_decoder(name: str) -> None:
    model = tiny_model(name, head=True)
    model.generation_config.eos_token_id = None
    ids, mask = tokens(2, 6), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    with mr.attach(model) as routed:
        with routed.record(trace=True) as rec, rec.labels(["a", "b"]):
            model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2, suppress_tokens=[0])
        trace, decoder = rec.trace(), [router.role == "decoder" for router in routed.routers]
    of_decoder = (trace.ids[:, decoder] >= 0).any((1, 2))
    for sequence, length in ((0, 4), (1, 6)):
        mine = trace.sequence == sequence
        assert sorted(trace.position[mine & ~of_decoder].tolist()) == list(range(length))
        assert sorted(trace.position[mine & of_decoder].tolist()) == sorted([*range(4)] * 2)  # two beams


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS, "ernie4_5_vl_moe", "doge"])
def test_recording_with_everything_on(name: str) -> None:
    model = tiny_model(name)
    with mr.attach(model) as routed, torch.no_grad():
        with routed.record(sequences=True, trace=True, metrics=mr.ops.METRICS) as rec:
            model(**inputs(name, model))
        statistics, trace = rec.statistics(), rec.trace()
    assert statistics.num_experts == tuple(router.num_experts for router in routed.routers)
    assert trace.ids.shape[1:] == (len(routed.routers), max(router.top_k for router in routed.routers))


@pytest.mark.parametrize("name", ["dbrx", "llama4_text", "jetmoe", "inkling_text", "zaya", "switch_transformers"])
def test_gradients_reach_steering_tables(name: str) -> None:
    model = tiny_model(name)
    attachment = Attachment(model, verify=False)
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    learned = torch.zeros(1, attachment.routers[0].num_experts, requires_grad=True)
    tables = SteeringTables(1, attachment.routers[0].num_experts, bias=learned)
    attachment.set_steering([tables] * len(attachment.routers))
    model(**inputs(name, model))[0].square().sum().backward()
    assert learned.grad is not None
    assert bool(learned.grad.isfinite().all())
    assert bool(learned.grad.any())


# ---------------------------------------------------------------------------------------------------------------
# One by one.


def test_jetmoe_keeps_its_two_kinds_apart() -> None:
    routers = find_routers(tiny_model("jetmoe"))
    assert [router.role for router in routers] == ["feed-forward"] * 3 + ["attention"] * 3
    assert [router.name for router in routers[2:4]] == ["layers.2.mlp.router", "layers.0.self_attention.experts.router"]
    counts_them_twice = Version(version("transformers")) < Version("5.24")
    assert any("count the routers" in note for note in routers[0].notes) == counts_them_twice


@pytest.mark.parametrize("name", ["switch_transformers", "nllb-moe_with_capacity"])
def test_dropped_tokens_are_empty_slots(name: str) -> None:
    model = tiny_model(name)
    attachment = Attachment(model)
    tables = counted(attachment)
    traced: list[tuple[int, Tensor]] = []
    attachment.on_choice = lambda layer, ids, weights: traced.append((layer, ids))
    with torch.no_grad():
        model(**inputs(name, model, 2, 12))
    assert sum(table.scalar("empty").item() for table in tables) > 0
    for layer, ids in traced:
        assert tables[layer].scalar("empty").item() == int((ids < 0).sum())
        assert tables[layer].scalar("slots").item() == ids.numel()


def test_switch_steering_admits_and_drops_others() -> None:
    """Every token sent to one expert: it takes its capacity of each sequence, in order."""
    model = tiny_model("switch_transformers")
    attachment = Attachment(model)
    tables = counted(attachment)
    force = torch.full((1, 8), float(Force.FORBID))
    force[0, 5] = 0
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([SteeringTables(1, 8, force=force)] * len(tables))
    given = [watch_experts(router) for router in attachment.routers]
    with torch.no_grad():
        model(**inputs("switch_transformers", model, 2, 7))
    for ((chosen, _),), table in zip(given, tables, strict=True):
        assert chosen[:, 5].view(2, -1).int().tolist() == [[1, 1] + [0] * (len(chosen) // 2 - 2)] * 2
        assert table.metric("counts")[0].tolist() == [0, 0, 0, 0, 0, 4, 0, 0]


@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_nllb_capacity_rule_is_the_models(priority: bool, before: bool) -> None:
    """Writing the router's own choice back gives its own output, whatever the options, padding included."""
    options = {"batch_prioritized_routing": priority, "normalize_router_prob_before_dropping": before}
    model = tiny_model("nllb-moe_with_capacity", **options)
    (router, *_) = find_routers(model)
    hidden = torch.randn(24, 64)
    mask = torch.zeros(2, 1, 12, 12)
    mask[0, :, :, 9:] = torch.finfo(torch.float32).min
    for padding in (None, mask):
        output = router.module.forward(hidden, padding)
        decision = router.adapter.read((hidden, padding), output)
        start = router.adapter.chosen((hidden, padding), output, decision)
        again, weights, ids = router.adapter.write((hidden, padding), output, decision, start.weights, start.ids)
        assert all(torch.equal(a, b) for a, b in zip(again, output, strict=True))
        assert torch.equal(ids, decision.ids)
        assert torch.equal(weights, decision.weights)
        assert bool((ids < 0).any())


def test_nllb_defect_is_seen_by_what_the_experts_do() -> None:
    import transformers
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

    class Right(NllbMoeExperts):
        def forward(self, hidden: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
            for expert in mask.nonzero()[:, 1].tolist():
                self[f"expert_{expert}"](hidden)
            return hidden

    assert experts_called(Right) == {2}
    notes = find_routers(tiny_model("nllb-moe"))[0].notes
    defect = [note for note in notes if "only expert_0 and expert_1 are run" in note]
    assert bool(defect) == (experts_called(NllbMoeExperts) != {2})
    assert all(note.startswith(f"transformers {transformers.__version__}: ") for note in defect)


def test_nllb_random_policies_are_refused() -> None:
    with pytest.raises(ModelNotSupportedError, match=r"'random' draws the second expert.*second_expert_policy=\"all\""):
        find_routers(tiny_model("nllb-moe", second_expert_policy="random"))


def test_hash_layers_are_recorded_and_not_steered() -> None:
    model = tiny_model("deepseek_v4_with_hash")
    router = model.layers[0].mlp.gate
    ids = tokens()
    with mr.attach(model) as routed, torch.no_grad():
        assert [s.steerable for s in routed.routers] == [False, True, True]
        with routed.record(trace=True) as rec:
            model(input_ids=ids)
        assert rec.trace().ids[:, 0].tolist() == router.tid2eid[ids.flatten()].tolist()
        everywhere = mr.Plan.forbid({layer: [1] for layer in range(3)})
        refused = pytest.raises(ValueError, match=r"\(layer 0\) cannot be steered: a frozen table.*plan\.only")
        with refused, routed.steer(everywhere):
            pass
        with routed.steer(everywhere.only(layers=[1, 2])):
            model(input_ids=ids)


def test_ernie_modalities_see_their_own_tokens() -> None:
    model, ids = tiny_model("ernie4_5_vl_moe"), tokens(2, 6)
    image = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 2, 2, 2]])
    options = {"input_ids": ids, "moe_mm_token_type_ids": image}
    with torch.no_grad():
        plain = model(**options)[0]
        attachment = Attachment(model)
        tables = [StatisticsTables.zeros(8, groups=2) for _ in attachment.routers]
        attachment.set_statistics(tables)
        traced: dict[int, Tensor] = {}
        attachment.on_choice = lambda layer, chosen, weights: traced.update({layer: chosen})
        attachment.listener.labels_of = lambda call: Labels(group=torch.tensor([0, 1]))
        given = [watch_experts(router) for router in attachment.routers]
        assert torch.equal(model(**options)[0], plain)
        for router, table, ((chosen, _),) in zip(attachment.routers, tables, given, strict=True):
            mine = (image > 0) == (router.role == "vision")
            assert table.scalar("tokens").tolist() == mine.sum(1).tolist()
            rows = torch.tensor([0, 1]).repeat_interleave(6)[mine.flatten()]
            assert torch.equal(table.metric("counts")[0], chosen[rows == 0].sum(0))
            assert torch.equal((traced[router.layer] >= 0).all(1), mine.flatten())
        rows = torch.tensor([[-1, -1, 0, 0, 0, -1], [-1] * 6])
        attachment.listener.labels_of = lambda call: Labels(steering_row=rows)
        only = torch.full((1, 8), float(Force.FORBID))
        only[0, 6] = 0
        attachment.set_steering([SteeringTables(1, 8, force=only)] * 4)
        model(**options)
        for router in attachment.routers:
            mine = ((image > 0) == (router.role == "vision")) & (rows >= 0)
            assert set(traced[router.layer][mine.flatten()].flatten().tolist()) == {6, -1}
            other = ((image > 0) == (router.role == "vision")) & (rows < 0)
            assert -1 not in traced[router.layer][other.flatten()]
        attachment.set_steering(None)
        model(input_ids=ids)  # text alone: the ordinary way
        assert torch.equal(traced[0] >= 0, torch.ones(12, 2, dtype=torch.bool))
        attachment.detach()
        assert torch.equal(model(**options)[0], plain)


class Seeing(nn.Module):
    """A model with experts in its vision tower and in its text."""

    def __init__(self) -> None:
        super().__init__()
        self.vision_tower, self.text = tiny_model("dots3_note_with_vision"), tiny_model("qwen3_moe")

    def forward(self, input_ids: Tensor, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        image = self.vision_tower(pixel_values=pixel_values, grid_thw=grid_thw).pooler_output
        hidden = self.text.embed_tokens(input_ids)
        hidden[0, 1 : 1 + len(image)] = image
        return tuple(self.text(inputs_embeds=hidden))


def test_patches_of_a_vision_tower_are_no_tokens() -> None:
    model = Seeing().eval()
    given = inputs("dots3_note_with_vision", model.vision_tower) | {"input_ids": tokens(2, 8)}  # 16 patches, 16 tokens
    attachment = Attachment(model)
    assert [router.role for router in attachment.routers] == ["vision"] * 2 + [""] * 3
    for group, counted_patches in ((0, 16), (torch.tensor([0, 0]), 0)):
        tables = counted(attachment)
        traced: list[int] = []
        attachment.on_choice = lambda layer, ids, weights, traced=traced: traced.append(layer)
        attachment.listener.labels_of = lambda call, group=group: Labels(group=group)
        with torch.no_grad():
            for _ in range(2):
                model(**given)
        attachment.flush()
        assert [table.scalar("tokens").item() for table in tables] == [2 * counted_patches] * 2 + [32] * 3
        assert traced == [2, 3, 4] * 2
    tables, attachment.listener = counted(attachment), CallListener()
    with torch.no_grad():  # the tower by itself: its patches are what the call is about
        model.vision_tower(**{key: given[key] for key in ("pixel_values", "grid_thw")})
    assert tables[0].scalar("tokens").item() == 16


def test_dbrx_copies_are_free_of_the_original() -> None:
    model, ids = tiny_model("dbrx"), tokens()
    attachment = Attachment(model)
    tables = counted(attachment)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other(input_ids=ids)
        assert tables[0].scalar("tokens").item() == 0
        model(input_ids=ids)
        assert tables[0].scalar("tokens").item() == ids.numel()


def test_inkling_shared_experts_are_weighed_anew() -> None:
    """Weights and gammas go on to sum to the router's constant."""
    model = tiny_model("inkling_text")
    attachment = Attachment(model)
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([bias(router) for router in attachment.routers])
    counted(attachment)
    seen: list[tuple[Tensor, ...]] = []
    router = attachment.routers[0].module
    router.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=tokens())
        attachment.set_steering(None)
        model(input_ids=tokens())
    (_, steered, _, gammas), (_, own, _, own_gammas) = seen
    assert not torch.equal(gammas, own_gammas)
    constant = float(router.route_scale * router.global_scale.detach())
    for total in ((steered.sum(1) + gammas.sum(1)), (own.sum(1) + own_gammas.sum(1))):
        torch.testing.assert_close(total, torch.full_like(total, constant))


def test_zaya_can_be_made_to_skip() -> None:
    model = tiny_model("zaya")
    attachment = Attachment(model)
    tables = counted(attachment)
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    force = torch.zeros(1, 9)
    force[0, 8] = Force.ON_NATURAL
    attachment.set_steering([SteeringTables(1, 9, force=force)] * 3)
    given = [watch_experts(router) for router in attachment.routers]
    with torch.no_grad():
        model(input_ids=tokens())
    for table, ((_, weights),) in zip(tables, given, strict=True):
        assert table.metric("counts")[0].tolist() == [0] * 8 + [14]
        assert table.metric("weight").sum().item() == 0
        assert not weights.any()


def test_doge_past_the_width_of_the_tables_is_refused() -> None:
    with pytest.raises(
        ModelNotSupportedError, match=r"DogeCDMoE at 'layers\.0\.mlp' cannot be attached to: it has 4225"
    ):
        find_routers(tiny_model("doge", num_experts=4225))


def test_vitpose_has_nothing_to_attach_to() -> None:
    from transformers import VitPoseBackbone, VitPoseBackboneConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    model = VitPoseBackbone(VitPoseBackboneConfig(num_experts=3, part_features=16, **sizes))
    with pytest.raises(ModelNotSupportedError, match=r"VitPoseBackboneMoeMLP.*nothing is routed: the caller"):
        find_routers(model)


# ---------------------------------------------------------------------------------------------------------------
# gpt-oss blocks that go round their router.


class Packed(nn.Module):
    """Stands for `Mxfp4GptOssExperts`, without its kernels: the same two ways in."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts, self.kernel_calls = experts, 0

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.experts(hidden, ids, weights)

    def forward_routed(self, hidden: Tensor, routing: Any, gather: Any, scatter: Any) -> Tensor:
        self.kernel_calls += 1
        weights, ids = routing
        return self.experts(hidden, ids, weights)


def packed_model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A gpt-oss with the block class of MXFP4, whose routing kernel is played by torch."""
    from types import SimpleNamespace

    from transformers.integrations import mxfp4

    def routing(logits: Tensor, k: int) -> tuple[Any, None, None]:
        best = logits.topk(k, dim=-1)
        return (best.values.softmax(1), best.indices), None, None

    hub = SimpleNamespace(routing=SimpleNamespace(routing=routing))
    monkeypatch.setattr(mxfp4, "triton_kernels_hub", hub, raising=False)
    model = tiny_model("gpt_oss")
    for layer in model.layers:
        layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, Packed(layer.mlp.experts))
    return model.eval()


def test_mxfp4_blocks_are_led_through_their_router(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = packed_model(monkeypatch), tokens()
    with torch.no_grad():
        plain = model(input_ids=ids)[0]
        assert model.layers[0].mlp.experts.kernel_calls == 1
        attachment = Attachment(model)
        assert any("takes its way through the router" in note for note in attachment.routers[0].notes)
        tables = counted(attachment)
        torch.testing.assert_close(model(input_ids=ids)[0], plain)
        assert [table.scalar("tokens").item() for table in tables] == [ids.numel()] * 3
        attachment.listener.labels_of = lambda call: Labels(steering_row=0)
        attachment.set_steering([bias(router) for router in attachment.routers])
        assert not torch.allclose(model(input_ids=ids)[0], plain)
        assert model.layers[0].mlp.experts.kernel_calls == 1
        attachment.detach()
        assert torch.equal(model(input_ids=ids)[0], plain)
        assert model.layers[0].mlp.experts.kernel_calls == 2
    assert "_is_hooked" not in vars(model.layers[0].mlp.experts)


def test_mxfp4_block_without_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in versions before the way of expert parallelism."""
    model = packed_model(monkeypatch)
    block = type(model.layers[0].mlp)
    monkeypatch.setattr(block, "forward", lambda self, hidden: (hidden, None))
    with pytest.raises(ModelNotSupportedError, match=r"Mxfp4GptOssMLP routes inside its MXFP4 kernel.*dequantize=True"):
        find_routers(model)


def kernelize(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[int]:
    """What kernels.kernelize leaves on gpt-oss blocks, its kernel played by torch: the list of its calls."""
    calls = []

    def kernel(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        flat = hidden.flatten(0, 1)
        router = block.router
        best = nn.functional.linear(flat, router.weight, router.bias).topk(router.top_k)
        weights = best.values.softmax(1)
        return block.experts(flat, best.indices, weights).view_as(hidden), weights

    monkeypatch.setattr(type(model.layers[0].mlp), "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    for layer in model.layers:
        layer.mlp.forward = MethodType(kernel, layer.mlp)
    return calls


@pytest.mark.parametrize("hooked", [False, True])
def test_kernelized_blocks_are_led_through_their_router(monkeypatch: pytest.MonkeyPatch, hooked: bool) -> None:
    model, ids = tiny_model("gpt_oss"), tokens()
    calls = kernelize(monkeypatch, model)
    if hooked:
        hooks = pytest.importorskip("accelerate.hooks")
        for layer in model.layers:
            hooks.add_hook_to_module(layer.mlp, hooks.ModelHook())
    with torch.no_grad():
        plain = model(input_ids=ids)[0]
        assert len(calls) == 3
        attachment = Attachment(model)
        assert any("use_kernels=True bypasses the router" in note for note in attachment.routers[0].notes)
        tables = counted(attachment)
        torch.testing.assert_close(model(input_ids=ids)[0], plain)
        assert [table.scalar("tokens").item() for table in tables] == [ids.numel()] * 3
        attachment.listener.labels_of = lambda call: Labels(steering_row=0)
        attachment.set_steering([bias(router) for router in attachment.routers])
        assert not torch.allclose(model(input_ids=ids)[0], plain)
        assert len(calls) == 3
        attachment.detach()
        assert torch.equal(model(input_ids=ids)[0], plain)
        assert len(calls) == 6


def test_blocks_with_another_forward_are_refused() -> None:
    model = tiny_model("gpt_oss")
    block = model.layers[0].mlp
    block.forward = (lambda self, hidden: (hidden, None)).__get__(block)
    with pytest.raises(ModelNotSupportedError, match=r"GptOssTopKRouter at 'layers.0.mlp.router'.*was replaced"):
        find_routers(model)
    del block.forward
    Attachment(model).detach()


def test_offloaded_gpt_oss_is_not_taken_for_kernelized() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model("gpt_oss"), tokens()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    attachment = Attachment(model)
    tables = counted(attachment)
    with torch.no_grad():
        model(input_ids=ids)
    assert tables[0].scalar("tokens").item() == ids.numel()


@pytest.mark.parametrize("name", ["switch_transformers", "inkling_text", "zaya"])  # DBRX, JetMoE, Llama 4 fail alone
def test_offloaded_specials(name: str) -> None:
    """Weights are elsewhere between the calls: what is needed is read from outputs, and buffers."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(name)
    given = inputs(name, model)
    with torch.no_grad():
        plain = model(**given)[0]
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        attachment = Attachment(model)
        counted(attachment)
        assert torch.equal(model(**given)[0], plain)
        attachment.listener.labels_of = lambda call: Labels(steering_row=0)
        attachment.set_steering([bias(router) for router in attachment.routers])
        assert not torch.equal(model(**given)[0], plain)


def test_calls_know_what_they_continue() -> None:
    assert not Call(1, 1, 0, None, "prefill", torch.device("cpu")).continues
