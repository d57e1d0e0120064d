"""The attachment on real model classes: nothing changes unasked, what is asked for does, and detach undoes it all."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from harness.exhaustive import exhaustive_but
from harness.tiny_models import MAIN, tiny_model, tokens

import moe_route as mr
from moe_route import ops, reference
from moe_route.calls import Call, Labels
from moe_route.ops import FIXED_POINT, Force, StatisticsTables, SteeringTables, library
from moe_route.patching import AlreadyAttachedError, Attachment, attachment_of

DTYPES = (torch.float32, torch.bfloat16)


def zeros(attachment: Attachment, groups: int = 1, **options: Any) -> list[StatisticsTables]:
    return [StatisticsTables.zeros(router.num_experts, groups=groups, **options) for router in attachment.routers]


def capture(model: nn.Module, attachment: Attachment) -> list[tuple[Tensor, ...]]:
    """Outputs of the routers, as hooks registered now see them."""
    seen: list[tuple[Tensor, ...]] = []
    for router in attachment.routers:
        router.module.register_forward_hook(lambda _, args, output: seen.append((*output, *args[1:2])))
    return seen


@torch.no_grad()
def run(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return model(*args, **kwargs)[0]


# ---------------------------------------------------------------------------------------------------------------
# Nothing changes unasked.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_counting_changes_no_bit_and_counts_what_the_routers_chose(name: str, dtype: torch.dtype) -> None:
    model, ids = tiny_model(name, dtype), tokens()
    plain = run(model, input_ids=ids)
    attachment = Attachment(model)
    assert torch.equal(run(model, input_ids=ids), plain)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    seen = capture(model, attachment)
    assert torch.equal(run(model, input_ids=ids), plain)
    for router, table, (_, weights, chosen, *_) in zip(attachment.routers, tables, seen, strict=True):
        counts = torch.bincount(chosen.reshape(-1), minlength=router.num_experts)
        assert torch.equal(table.metric("counts")[0], counts)
        assert table.scalar("tokens").item() == ids.numel()
        assert table.scalar("slots").item() == table.metric("counts").sum().item() == chosen.numel()
        assert table.metric("probability").sum().item() * FIXED_POINT == pytest.approx(ids.numel(), abs=1e-4)
        given = torch.zeros(router.num_experts, dtype=torch.float64)
        given.index_add_(0, chosen.reshape(-1), weights.reshape(-1).double())
        torch.testing.assert_close(table.metric("weight")[0].double() * FIXED_POINT, given, atol=1e-6, rtol=1e-6)
    null = SteeringTables(1, attachment.routers[0].num_experts, bias=torch.zeros(1, attachment.routers[0].num_experts))
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([null] * len(attachment.routers))
    assert torch.equal(run(model, input_ids=ids), plain)
    attachment.detach()
    assert torch.equal(run(model, input_ids=ids), plain)


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", MAIN)
def test_detach_restores_everything(name: str, engine: str) -> None:
    model, ids = tiny_model(name, head=True), tokens()
    hooks = lambda: {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()}  # noqa: E731
    attributes = lambda: {n: set(vars(m)) for n, m in model.named_modules()}  # noqa: E731
    plain, keys, kinds = run(model, input_ids=ids), list(model.state_dict()), [type(m) for m in model.modules()]
    before = hooks(), attributes()
    attachment = Attachment(model, engine=engine)
    attachment.set_statistics(zeros(attachment))
    run(model, input_ids=ids)
    assert list(model.state_dict()) == keys
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    attachment.detach()
    attachment.detach()
    assert [type(m) for m in model.modules()] == kinds
    assert (hooks(), attributes()) == before
    assert torch.equal(run(model, input_ids=ids), plain)
    Attachment(model).detach()


def test_saving_while_attached_writes_a_clean_checkpoint(tmp_path) -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens()
    plain = run(model, input_ids=ids)
    attachment = Attachment(model, engine="fused")
    attachment.set_statistics(zeros(attachment))
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(run(again, input_ids=ids), plain)
    attachment.detach()


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_router_logits_live_on(engine: str) -> None:
    model, ids = tiny_model("mixtral", head=True), tokens()
    plain = model(input_ids=ids, output_router_logits=True)
    attachment = Attachment(model, engine=engine)
    attachment.set_statistics(zeros(attachment))
    now = model(input_ids=ids, output_router_logits=True)
    assert len(now.router_logits) == 3
    for a, b in zip(now.router_logits, plain.router_logits, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(now.aux_loss, plain.aux_loss)


# ---------------------------------------------------------------------------------------------------------------
# Who is attached.


def test_attaching_twice_names_detach() -> None:
    model = tiny_model("olmoe", head=True)
    first = Attachment(model)
    for part in (model, model.model):
        with pytest.raises(AlreadyAttachedError, match=r"detach\(\)"):
            Attachment(part)
        assert attachment_of(part) is first
    first.detach()
    assert attachment_of(model) is None
    Attachment(model.model).detach()


def test_two_models_side_by_side() -> None:
    models = [tiny_model("qwen3_moe", seed=seed) for seed in (0, 1)]
    attachments = [Attachment(model) for model in models]
    tables = [zeros(attachment) for attachment in attachments]
    for attachment, table in zip(attachments, tables, strict=True):
        attachment.set_statistics(table)
    run(models[0], input_ids=tokens(2, 5))
    run(models[1], input_ids=tokens(1, 3))
    run(models[1], input_ids=tokens(1, 3))
    assert [table[0].scalar("tokens").item() for table in tables] == [10, 6]


def test_choices_are_named() -> None:
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="engine must be one of 'hook', 'fused', not 'fast'"):
        Attachment(model, engine="fast")
    with pytest.raises(ValueError, match="experts_implementation must be one of None, 'moe_route', not 'mine'"):
        Attachment(model, experts_implementation="mine")


def test_tables_that_do_not_fit() -> None:
    attachment = Attachment(tiny_model("olmoe"))
    with pytest.raises(ValueError, match="2 statistics tables for 3 routers"):
        attachment.set_statistics(zeros(attachment)[:2])
    with pytest.raises(ValueError, match=r"layer 0 have 9 experts, router 'layers\.0\.mlp\.gate' has 8"):
        attachment.set_steering([SteeringTables(1, 9, bias=torch.ones(1, 9))] * 3)


# ---------------------------------------------------------------------------------------------------------------
# Who is counted.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MAIN)
def test_padding_is_not_counted(name: str, side: str) -> None:
    model, ids = tiny_model(name, head=True), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    attachment = Attachment(model)
    tables, seen = zeros(attachment), capture(model, attachment)
    attachment.set_statistics(tables)
    run(model, input_ids=ids, attention_mask=mask)
    for router, table, (_, _, chosen, *_) in zip(attachment.routers, tables, seen, strict=True):
        real = chosen[mask.reshape(-1).bool()]
        assert torch.equal(table.metric("counts")[0], torch.bincount(real.reshape(-1), minlength=router.num_experts))
        assert table.scalar("tokens").item() == 10


def test_groups_segments_and_tokens_apart() -> None:
    model, ids = tiny_model("qwen3_moe"), tokens(2, 3)
    attachment = Attachment(model)
    tables, seen = zeros(attachment, groups=3, segments=2), capture(model, attachment)
    attachment.set_statistics(tables)
    group = torch.tensor([[0, 1, -1], [2, 2, 1]])
    attachment.listener.labels_of = lambda call: Labels(group=group, segment=torch.tensor([1, 0]))
    run(model, input_ids=ids)
    for table, (_, _, chosen, *_) in zip(tables, seen, strict=True):
        for row in range(3):
            picked = chosen[(group == row).reshape(-1)].reshape(-1)
            assert torch.equal(table.metric("counts")[row], torch.bincount(picked, minlength=8))
        for row, piece in ((1, chosen[:3]), (0, chosen[3:])):
            assert torch.equal(
                table.metric("counts", of="segments")[row], torch.bincount(piece.reshape(-1), minlength=8)
            )


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_counts_prefill_and_decode_apart(name: str, cache: str | None) -> None:
    model = tiny_model(name, head=True)
    ids = tokens(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    if cache is not None:
        options["cache_implementation"] = cache
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    options["pad_token_id"] = 0
    plain = model.generate(ids, attention_mask=mask, **options)
    attachment = Attachment(model)
    tables, calls = zeros(attachment, groups=2), []
    attachment.set_statistics(tables)
    attachment.listener.labels_of = lambda call: Labels(group=int(call.phase == "decode"))
    attachment.listener.after_call = calls.append
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), plain)
    assert [(call.phase, call.length, call.past_length) for call in calls] == [
        ("prefill", 5, 0),
        ("decode", 1, 5),
        ("decode", 1, 6),
        ("decode", 1, 7),
    ]
    for table in tables:
        assert table.scalar("tokens").tolist() == [8, 6]  # the last token is returned, not fed


def test_a_batch_counts_what_its_sequences_count_alone() -> None:
    """Sequences that end early are fed padding and their end, which are marked valid: not counted."""
    model = tiny_model("qwen3_moe", torch.float64, head=True)  # so that no choice hangs on rounding
    model.set_experts_implementation("eager")
    prompts = [tokens(1, 4, seed) for seed in range(6)]
    attachment = Attachment(model)
    lengths = set()

    def counted(batches: list[Tensor]) -> list[int]:
        tables = zeros(attachment)
        attachment.set_statistics(tables)
        for batch in batches:
            out = model.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=12, do_sample=False)
            lengths.update((out != 0).sum(1).tolist())
        return [table.scalar("tokens").item() for table in tables]

    model.generation_config.pad_token_id = 0
    first = run(model, input_ids=torch.cat(prompts))[:, -1].argmax(-1)
    model.generation_config.eos_token_id = int(first.mode().values)
    assert counted([torch.cat(prompts)]) == counted(prompts)
    assert len(lengths) > 1


def test_beams_take_their_sequences_labels() -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens(2, 4)
    attachment = Attachment(model)
    tables = zeros(attachment, groups=2)
    attachment.set_statistics(tables)
    attachment.listener.labels_of = lambda call: Labels(group=torch.tensor([0, 1]))
    model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=2, do_sample=False, eos_token_id=None
    )
    assert tables[0].scalar("tokens").tolist() == [3 * 4 + 3] * 2  # generate repeats the prompt too


def test_inner_model_called_directly_and_nested_calls_count_once() -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens()
    attachment = Attachment(model)
    calls: list[Call] = []
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    attachment.listener.after_call = calls.append
    run(model, ids)
    run(model.model, ids)
    run(model.model, inputs_embeds=model.model.embed_tokens(ids))
    assert len(calls) == 3
    assert calls[0].input_ids is ids
    assert calls[2].input_ids is None
    assert tables[0].scalar("tokens").item() == 3 * ids.numel()


def test_a_call_that_fails_leaves_the_next_one_right() -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens()
    attachment = Attachment(model)
    tables, calls = zeros(attachment), []
    attachment.set_statistics(tables)
    attachment.listener.after_call = calls.append
    stop = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=ids)
    stop.remove()
    for table in tables:
        table.zero_()
    run(model.model, input_ids=tokens(1, 3))
    assert len(calls) == 1
    assert tables[0].scalar("tokens").item() == 3


# ---------------------------------------------------------------------------------------------------------------
# Small calls are counted when they end.


def small_calls(model: nn.Module, calls: int = 3) -> list[StatisticsTables]:
    """Statistics of small calls; from the second on they are counted at the end of the call."""
    attachment = Attachment(model)
    tables = zeros(attachment, segments=1, metrics=ops.METRICS)
    attachment.set_statistics(tables)
    attachment.listener.labels_of = lambda call: Labels(segment=0)
    for seed in range(calls):
        run(model, input_ids=tokens(1, 2, seed=seed))
    attachment.detach()
    return tables


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", MAIN)
def test_counting_at_the_end_of_a_call_is_counting_at_once(
    name: str, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, together, ends = tiny_model(name), ops.observe_layers, []
    monkeypatch.setattr(ops, "observe_layers", lambda *args, **kw: (ends.append(args), together(*args, **kw)))
    with torch.inference_mode(inference):
        deferred = small_calls(model)
        assert len(ends) == 2
        monkeypatch.setattr("moe_route.patching.context.MOST_TOKENS", 0)
        at_once = small_calls(model)
    assert len(ends) == 2
    for one, other in zip(deferred, at_once, strict=True):
        assert one.scalar("tokens").item() == 6
        assert torch.equal(one.groups, other.groups)
        assert torch.equal(one.segments, other.segments)


def test_calls_that_wait_are_counted_by_flush_and_when_there_are_enough() -> None:
    model = tiny_model("qwen3_moe")
    attachment, at_once = Attachment(model), zeros(Attachment(tiny_model("qwen3_moe")), metrics=ops.METRICS)
    tables = zeros(attachment, metrics=ops.METRICS)
    attachment.set_statistics(tables, lag=3)
    seen = []
    for seed in range(7):
        run(model, input_ids=tokens(1, 2, seed=seed))
        seen.append(tables[0].scalar("tokens").item())
    assert seen == [2, 2, 2, 2, 10, 10, 10]  # the first is counted at once, then four together
    attachment.flush()
    attachment.set_statistics(at_once)
    for seed in range(7):
        run(model, input_ids=tokens(1, 2, seed=seed))
    for one, other in zip(tables, at_once, strict=True):
        assert one.scalar("tokens").item() == 14
        assert torch.equal(one.groups, other.groups)


def test_calls_that_wait_are_counted_before_anything_changes() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    tables, others = zeros(attachment), zeros(attachment)
    attachment.set_statistics(tables, lag=9)
    for _ in range(3):
        run(model, input_ids=tokens(1, 2))
    attachment.set_statistics(others, lag=9)
    assert tables[0].scalar("tokens").item() == 6
    for _ in range(2):
        run(model, input_ids=tokens(1, 2))
    run(model, input_ids=tokens(2, 40))  # too many tokens to keep: counted at once, whatever waits
    attachment.detach()
    assert others[0].scalar("tokens").item() == 84


def spoil_weights(model: nn.Module) -> None:
    """Make a block of `model` overwrite its router's weights after the experts have used them."""
    spoilt: list[Tensor] = []

    def spoil(*_: object) -> None:
        spoilt[-1].zero_()

    model.layers[1].mlp.gate.register_forward_hook(lambda _, args, output: spoilt.append(output[1]))
    model.layers[1].mlp.register_forward_hook(spoil)


def test_a_model_that_changes_router_outputs_in_place_is_counted_at_once() -> None:
    expected = small_calls(tiny_model("qwen3_moe"))
    model = tiny_model("qwen3_moe")
    spoil_weights(model)
    tables = small_calls(model)
    for one, other in zip(tables, expected, strict=True):
        assert torch.equal(one.groups, other.groups)


def test_a_router_output_changed_later_on_is_an_error_not_a_wrong_count() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    run(model, input_ids=tokens(1, 2))
    spoil_weights(model)
    with pytest.raises(RuntimeError, match="changed in place"):
        run(model, input_ids=tokens(1, 2))
    assert {table.scalar("tokens").item() for table in tables} == {2}
    run(model, input_ids=tokens(1, 2))
    assert {table.scalar("tokens").item() for table in tables} == {4}


@pytest.mark.parametrize("name", MAIN)
def test_modes_may_alternate(name: str) -> None:
    """Tensors of inference mode have no version counter; those of a router that divides in place are at 1 else."""
    model = tiny_model(name)
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables, lag=3)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad):
        for _ in range(2):
            with mode():
                model(input_ids=tokens(1, 2))
    attachment.flush()
    assert {table.scalar("tokens").item() for table in tables} == {20}


def test_after_an_alarm_every_router_is_counted_at_once() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    run(model, input_ids=tokens(1, 2))
    for layer in model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, _, output: setattr(module, "spoilt", output[1]))
        layer.mlp.register_forward_hook(lambda module, *_: [module.gate.spoilt.zero_(), None][1])
    with pytest.raises(RuntimeError, match="changed in place"):
        run(model, input_ids=tokens(1, 2))
    run(model, input_ids=tokens(1, 2))
    assert {table.scalar("tokens").item() for table in tables} == {4}


@pytest.mark.parametrize("length", [2, 80])
def test_an_interrupt_leaves_the_next_call_right(length: int) -> None:
    """torch runs no hook at KeyboardInterrupt, so the interrupted call never ends."""
    model = tiny_model("qwen3_moe", head=True)
    attachment = Attachment(model)
    tables = zeros(attachment, groups=3)
    attachment.set_statistics(tables)
    group = 0
    attachment.listener.labels_of = lambda call: Labels(group=group)
    run(model, input_ids=tokens(1, length))
    before = [table.groups.clone() for table in tables]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    group, stop = 1, model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, input_ids=tokens(1, length))
    stop.remove()
    group = 2
    run(model, input_ids=tokens(1, length))
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table.groups[0], old[0])
        assert table.scalar("tokens")[2] == length


@pytest.mark.parametrize("length", [3, 80])
@pytest.mark.parametrize("meanwhile", ["its labels are asked", "a layer runs"])
def test_a_second_thread_is_refused_and_the_first_goes_on(meanwhile: str, length: int) -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    failures: list[BaseException] = []
    asked: list[Call] = []

    def call_too() -> None:
        try:
            run(model, input_ids=tokens(1, 3))
        except RuntimeError as failure:
            failures.append(failure)

    def elsewhere(*_: object) -> None:
        thread = threading.Thread(target=call_too)
        thread.start()
        thread.join()

    def labels_of(call: Call) -> Labels:
        asked.append(call)
        if meanwhile == "its labels are asked" and len(asked) == 1:
            elsewhere()
        return Labels(group=0)

    attachment.listener.labels_of = labels_of
    if meanwhile == "a layer runs":
        model.layers[1].register_forward_pre_hook(elsewhere)
    run(model, input_ids=tokens(1, length))
    assert len(failures) == len(asked) == 1
    assert "the model was called in one thread while another was running it" in str(failures[0])
    assert [table.scalar("tokens").item() for table in tables] == [length] * 3


def test_a_failed_small_call_is_forgotten() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    run(model, input_ids=tokens(1, 2))
    stop = model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, input_ids=tokens(1, 2))
    stop.remove()
    run(model, input_ids=tokens(1, 2))
    assert {table.scalar("tokens").item() for table in tables} == {4}


def test_nothing_is_asked_while_nothing_is_set() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    attachment.listener.labels_of = attachment.listener.after_call = lambda call: pytest.fail("asked")
    run(model, input_ids=tokens())
    attachment.set_statistics(zeros(attachment))
    attachment.set_statistics(None)
    run(model, input_ids=tokens())


def test_statistics_may_grow_while_labels_are_asked() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    attachment.set_statistics(zeros(attachment))
    grown = zeros(attachment, segments=2)

    def label(call: Call) -> Labels:
        attachment.set_statistics(grown)
        return Labels(segment=torch.arange(2))

    attachment.listener.labels_of = label
    run(model, input_ids=tokens(2, 3))
    assert grown[0].scalar("tokens", of="segments").tolist() == [3, 3]


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_trace(engine: str) -> None:
    model, ids = tiny_model("qwen3_moe"), tokens()
    attachment = Attachment(model, engine=engine)
    seen, rows = capture(model, attachment), []
    attachment.on_choice = lambda layer, ids, weights: rows.append((layer, ids, weights))
    run(model, input_ids=ids)
    attachment.on_choice = None
    run(model, input_ids=ids)
    assert [row[0] for row in rows] == [0, 1, 2]
    for (_, chosen, weights), (_, own_weights, own, *_) in zip(rows, seen[:3], strict=True):
        assert torch.equal(chosen.long(), own)
        assert torch.equal(weights, own_weights)


# ---------------------------------------------------------------------------------------------------------------
# What steering does.


def steering_tables(experts: int) -> dict[str, SteeringTables]:
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(2, experts, generator=generator)
    force = torch.zeros(2, experts)
    force[0, 1], force[0, 2], force[1, 5] = Force.ON_PAPER, Force.OFF_PAPER, Force.FORBID
    forbid = torch.full((2, experts), float(Force.FORBID))
    forbid[:, 3] = Force.NONE
    return {
        "bias": SteeringTables(2, experts, bias=bias),
        "std": SteeringTables(2, experts, std=bias),
        "force": SteeringTables(2, experts, force=force),
        "only one expert left": SteeringTables(2, experts, force=forbid),
        "one expert a token": SteeringTables(2, experts, top_k=1),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MAIN)
def test_steered_rows_follow_the_reference_and_others_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype)
    for kind in steering_tables(8):
        check_steering(copy.deepcopy(model), kind)


def check_steering(model: nn.Module, kind: str) -> None:
    ids, rows = tokens(3, 4), torch.tensor([[0, 0, -1, 1], [-1, -1, -1, -1], [1, 1, 0, -1]])
    attachment = Attachment(model, verify=False)
    before = capture(model, attachment)
    attachment.detach()
    attachment = Attachment(model, verify=False)
    tables = [steering_tables(router.num_experts)[kind] for router in attachment.routers]
    counted = zeros(attachment, metrics=("counts", "natural_counts"))
    attachment.listener.labels_of = lambda call: Labels(steering_row=rows)
    attachment.set_steering(tables)
    attachment.set_statistics(counted)
    after = capture(model, attachment)
    run(model, input_ids=ids)
    flat = rows.reshape(-1)
    for router, steering, own, new, count in zip(attachment.routers, tables, before, after, counted, strict=True):
        logits, own_weights, own_ids, *more = own
        assert (new[1].dtype, new[2].dtype) == (own_weights.dtype, torch.int64)
        left = flat < 0
        assert torch.equal(new[2][left], own_ids[left])
        assert torch.equal(new[1][left], own_weights[left])
        expected_weights, expected_ids = reference.route(
            logits,
            router.top_k,
            router.spec,
            correction_bias=router.family.bias_of(router.module, (None, *more)),
            steering=steering,
            tokens=ops.token_table(flat.numel(), steering_row=flat),
        )
        steered, empty = ~left, expected_ids < 0
        filled = torch.where(empty, expected_ids.amax(1, keepdim=True), expected_ids)
        assert torch.equal(new[2][steered], filled[steered].long())
        expected_weights = torch.where(empty, 0.0, expected_weights)
        torch.testing.assert_close(new[1][steered], expected_weights[steered].to(new[1].dtype))
        slots = torch.cat([own_ids[left].reshape(-1), expected_ids[steered][~empty[steered]].reshape(-1).long()])
        assert torch.equal(count.metric("counts")[0], torch.bincount(slots, minlength=router.num_experts))
        assert torch.equal(
            count.metric("natural_counts")[0], torch.bincount(own_ids.reshape(-1), minlength=router.num_experts)
        )
        assert count.scalar("steered").item() == 6


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_empty_slots_are_safe_for_every_experts_implementation(experts: str) -> None:
    model, ids = tiny_model("qwen3_moe"), tokens()
    model.set_experts_implementation(experts)
    attachment = Attachment(model)
    forbid = torch.full((1, 8), float(Force.FORBID))
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([SteeringTables(1, 8, force=forbid)] * 3)
    seen = capture(model, attachment)
    out = run(model, input_ids=ids)
    assert bool(torch.isfinite(out).all())
    for _, weights, chosen, *_ in seen:
        assert not weights.any()
        assert not chosen.any()


def test_steering_can_leave_layers_alone_and_end() -> None:
    model, ids = tiny_model("olmoe"), tokens()
    plain = run(model, input_ids=ids)
    attachment = Attachment(model)
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    table = SteeringTables(1, 8, bias=torch.randn(1, 8) * 9)
    attachment.set_steering([None, None, table])
    seen = capture(model, attachment)
    changed = run(model, input_ids=ids)
    assert not torch.equal(changed, plain)
    attachment.set_steering(None)
    assert torch.equal(run(model, input_ids=ids), plain)
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[4], strict=True))
    assert not torch.equal(seen[2][2], seen[5][2])


def test_labels_without_rows_steer_nothing() -> None:
    model, ids = tiny_model("olmoe"), tokens()
    plain = run(model, input_ids=ids)
    attachment = Attachment(model)
    attachment.set_steering([SteeringTables(1, 8, bias=torch.randn(1, 8))] * 3)
    assert torch.equal(run(model, input_ids=ids), plain)


# ---------------------------------------------------------------------------------------------------------------
# Fused.


def test_fused_falls_back_by_name() -> None:
    attachment = Attachment(tiny_model("phimoe"), engine="fused")
    assert {router.engine for router in attachment.routers} == {"hook"}
    assert "samples its experts in training mode" in attachment.routers[0].reason


def test_fused_falls_back_under_a_replaced_forward() -> None:
    """accelerate offload keeps the bound forward: a class's forward would never be called."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model("qwen3_moe"), tokens()
    plain = run(model, input_ids=ids)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    attachment = Attachment(model, engine="fused")
    assert attachment.routers[0].engine == "hook"
    assert "replaced already" in attachment.routers[0].reason
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    assert torch.equal(run(model, input_ids=ids), plain)
    assert tables[0].scalar("tokens").item() == ids.numel()


@pytest.mark.parametrize("kind", ["bias", "force", "one expert a token"])
def test_fused_and_observed_steer_alike(kind: str) -> None:
    model, ids = tiny_model("qwen3_moe"), tokens()
    rows = torch.tensor([0, -1])
    outputs, counts = [], []
    for engine in ("hook", "fused"):
        attachment = Attachment(model, engine=engine)
        tables = zeros(attachment, metrics=("counts", "natural_counts"))
        attachment.listener.labels_of = lambda call: Labels(steering_row=rows)
        attachment.set_steering([steering_tables(8)[kind]] * 3)
        attachment.set_statistics(tables)
        outputs.append(run(model, input_ids=ids))
        counts.append([table.groups for table in tables])
        attachment.detach()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for a, b in zip(*counts, strict=True):
        assert torch.equal(a[:, 8:], b[:, 8:])


# ---------------------------------------------------------------------------------------------------------------
# Training.


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", MAIN)
def test_counting_disturbs_no_gradient(name: str) -> None:
    model, ids = tiny_model(name, head=True).train(), tokens()
    torch.manual_seed(5)
    plain = gradients(model, ids)
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    torch.manual_seed(5)
    counted = gradients(model, ids)
    assert plain.keys() == counted.keys()
    assert all(torch.equal(plain[name], counted[name]) for name in plain)
    assert tables[0].scalar("tokens").item() == ids.numel()


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_gradient_through_steered_weights(engine: str) -> None:
    """Steered tokens: the reference's gradient, in the tables too. Tokens left alone: the model's own."""
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model, engine=engine)
    rows, router, spec = torch.tensor([[0, -1, 0, 0, -1, 1]]), attachment.routers[0].module, attachment.routers[0].spec
    attachment.listener.labels_of = lambda call: Labels(steering_row=rows)
    bias = torch.randn(2, 8, requires_grad=True)
    steering = SteeringTables(2, 8, bias=bias)
    attachment.set_steering([steering] * 3)
    hidden, upstream = torch.randn(6, 64, requires_grad=True), torch.randn(6, 2)
    leaves = (hidden, router.weight, bias)
    _, weights, chosen = router(hidden)
    found = torch.autograd.grad((weights * upstream).sum(), leaves)
    attachment.detach()
    logits, own_weights, own = router(hidden)
    table = ops.token_table(6, steering_row=rows)
    steered_weights = reference.route_weights(logits, chosen, spec, steering=steering, tokens=table)
    left = rows.reshape(-1, 1) < 0
    assert torch.equal(chosen[left[:, 0]], own[left[:, 0]])
    assert not torch.equal(chosen, own)
    expected = torch.autograd.grad((torch.where(left, own_weights, steered_weights) * upstream).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert bool(a.any())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_gradient_checkpointing_counts_once(engine: str, reentrant: bool) -> None:
    model, ids = tiny_model("qwen3_moe", head=True).train(), tokens()
    model.config.use_cache = False
    attachment = Attachment(model, engine=engine)
    attachment.listener.labels_of = lambda call: Labels(steering_row=torch.tensor([0, -1]))
    attachment.set_steering([steering_tables(8)["bias"]] * 3)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tables, rows = zeros(attachment), []
    attachment.set_statistics(tables)
    attachment.on_choice = lambda *row: rows.append(row)
    again = gradients(model, ids)
    assert [table.scalar("tokens").item() for table in tables] == [ids.numel()] * 3
    assert len(rows) == 3
    assert plain.keys() == again.keys()
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])


def test_sampling_router_keeps_its_sample() -> None:
    """Phi-3.5-MoE samples in training: what is counted is the sample."""
    model, ids = tiny_model("phimoe").train(), tokens(4, 16)
    attachment = Attachment(model)
    tables, seen = zeros(attachment), capture(model, attachment)
    attachment.set_statistics(tables)
    run(model, input_ids=ids)
    for table, (_, _, chosen, *_) in zip(tables, seen, strict=True):
        assert torch.equal(table.metric("counts")[0], torch.bincount(chosen.reshape(-1), minlength=8))


# ---------------------------------------------------------------------------------------------------------------
# Odd places.


def test_router_called_outside_the_model() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    run(model.layers[0].mlp, torch.randn(2, 3, 64))
    assert tables[0].scalar("tokens").item() == 6
    assert tables[1].scalar("tokens").item() == 0


def test_own_modules() -> None:
    from moe_route.nn import SparseMoE

    model = nn.Sequential(*(SparseMoE(hidden_size=16, num_experts=8, top_k=2, intermediate_size=8) for _ in range(2)))
    attachment = Attachment(model)
    tables = zeros(attachment, groups=2)
    attachment.set_statistics(tables)
    attachment.listener.labels_of = lambda call: Labels(group=torch.tensor([0, 1]))
    with torch.no_grad():
        model(torch.randn(2, 5, 16))
    assert tables[1].scalar("tokens").tolist() == [5, 5]


def test_deep_copies_are_free_of_the_original() -> None:
    model, ids = tiny_model("qwen3_moe"), tokens()
    attachment = Attachment(model)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    other = copy.deepcopy(model)
    plain = run(other, input_ids=ids)
    assert tables[0].scalar("tokens").item() == 0
    assert torch.equal(run(model, input_ids=ids), plain)


@pytest.mark.parametrize("engine", exhaustive_but(["hook"], ["hook", "fused"]))
def test_compiled_after_attaching(engine: str) -> None:
    """What is set after compilation is seen: the hooks were there when the model was compiled."""
    model, ids = tiny_model("qwen3_moe", num_hidden_layers=2), tokens()
    model.set_experts_implementation("batched_mm")
    attachment = Attachment(model, engine=engine)
    plain = run(model, input_ids=ids)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    torch.testing.assert_close(run(model, input_ids=ids), plain)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    torch.testing.assert_close(run(model, input_ids=ids), plain)
    assert [table.scalar("tokens").item() for table in tables] == [ids.numel()] * 2
    run(model, input_ids=tokens(seed=9))
    assert tables[1].scalar("tokens").item() == 2 * ids.numel()
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([SteeringTables(1, 8, bias=torch.randn(1, 8) * 9)] * 2)
    assert not torch.allclose(run(model, input_ids=ids), plain, atol=1e-3)
    attachment.set_steering(None)
    attachment.set_statistics(None)
    torch.testing.assert_close(run(model, input_ids=ids), plain)
    assert tables[1].scalar("tokens").item() == 3 * ids.numel()


def test_compiled_before_attaching() -> None:
    """A function that only the user holds, and two models of a class, whose graphs Dynamo would confuse."""
    models, ids = [tiny_model("qwen3_moe", num_hidden_layers=2, seed=seed) for seed in (0, 1)], tokens()
    compiled = [torch.compile(model, backend="aot_eager") for model in models]
    plain = run(compiled[0], input_ids=ids)
    for model, function in zip(models, compiled, strict=True):
        attachment = Attachment(model)
        tables = zeros(attachment)
        attachment.set_statistics(tables)
        run(function, input_ids=ids)
        torch.testing.assert_close(run(compiled[0], input_ids=ids), plain)
        assert tables[0].scalar("tokens").item() == ids.numel() * (2 if function is compiled[0] else 1)
        attachment.detach()
    torch.testing.assert_close(run(compiled[0], input_ids=ids), plain)


def test_routers_that_are_never_called_are_not_silent() -> None:
    """A block replaced after attaching: counts of zero would look like a result."""
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    attachment.set_statistics(zeros(attachment))
    for layer in model.layers:
        layer.mlp.forward = lambda hidden: hidden
    with pytest.raises(RuntimeError, match="none of its routers"):
        run(model, input_ids=tokens())


def test_a_layer_that_was_replaced_is_not_counted_as_nothing() -> None:
    model, other = tiny_model("qwen3_moe"), tiny_model("qwen3_moe", seed=5)
    attachment = Attachment(model)
    model.layers[1] = other.layers[1]
    bias = SteeringTables(1, 8, bias=torch.ones(1, 8))
    for begin in (lambda: attachment.set_statistics(zeros(attachment)), lambda: attachment.set_steering([bias] * 3)):
        with pytest.raises(
            RuntimeError, match=r"'layers\.1\.mlp\.gate' is not part of the model any more.*attach\(model\)"
        ):
            begin()
    attachment.detach()
    assert len(Attachment(model).routers) == 3


CHANGES: dict[str, Any] = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "load": lambda model: model.load_state_dict(tiny_model("qwen3_moe", head=True, seed=4).state_dict()),
    "assign": lambda model: model.load_state_dict(tiny_model("qwen3_moe", head=True, seed=4).state_dict(), assign=True),
    "resize": lambda model: model.resize_token_embeddings(140),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "experts": lambda model: model.set_experts_implementation("batched_mm"),
    "training": lambda model: model.train(),
}


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_changed_while_attached(change: str, engine: str) -> None:
    """It runs as it does when changed unattached, and what the experts are given is counted."""
    free, model, ids = (*(tiny_model("qwen3_moe", head=True) for _ in range(2)), tokens())
    attachment = Attachment(model, engine=engine)
    for each in (free, model):
        torch.manual_seed(0)
        CHANGES[change](each)
    tables = zeros(attachment)
    attachment.set_statistics(tables)
    given = watch(attachment)
    torch.testing.assert_close(run(model, input_ids=ids), run(free, input_ids=ids), rtol=1e-2, atol=1e-2)
    for table, ids_of in zip(tables, given, strict=True):
        assert torch.equal(table.metric("counts")[0], torch.bincount(ids_of[0].reshape(-1), minlength=8))
    attachment.detach()
    assert torch.equal(run(model, input_ids=ids), run(free, input_ids=ids))


def watch(attachment: Attachment) -> list[list[Tensor]]:
    """The ids that the experts of each layer are given from now on."""
    given: list[list[Tensor]] = [[] for _ in attachment.routers]
    for router, seen in zip(attachment.routers, given, strict=True):
        router.block.experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[1]))
    return given


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "llama4_text", "jetmoe"])
def test_a_model_is_freed_with_its_last_name(name: str, engine: str) -> None:
    model, ids = tiny_model(name, head=True), tokens()
    routed = mr.attach(model, engine=engine)
    with routed.record(sequences=True, trace=True) as recorder:
        run(model, input_ids=ids)
    statistics = recorder.statistics()
    routed.detach()
    parameter = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model, routed, recorder
        assert parameter() is None
    finally:
        gc.enable()
    assert statistics.tokens().max() == ids.numel()


@pytest.mark.parametrize("doing", ["nothing", "recording", "steering"])
def test_export(doing: str) -> None:
    model, ids = tiny_model("qwen3_moe", head=True), tokens()
    model.set_experts_implementation("batched_mm")
    given = {"input_ids": ids, "use_cache": False}
    plain = run(model, **given)
    with mr.attach(model) as routed:
        blocks = {
            "nothing": nullcontext,
            "recording": routed.record,
            "steering": lambda: routed.steer(mr.Plan.forbid({0: [1]})),
        }
        refused = pytest.raises(RuntimeError, match=r"torch\.export inside record\(\) or steer\(\).*Export outside")
        with nullcontext() if doing == "nothing" else refused, blocks[doing]():
            program = torch.export.export(model, (), given, strict=False)
            assert not [node for node in program.graph.nodes if "moe_route" in str(node.target)]
            torch.testing.assert_close(program.module()(**given).logits, plain)


def test_attaching_says_once_that_torch_serves_and_why(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "why_torch", lambda device: "this installation has no compiled library")
    library.tell.cache_clear()
    for _ in range(2):
        mr.attach(tiny_model("qwen3_moe")).detach()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["torch computes the routing operators on cpu, since this installation has no compiled library"]
    library.tell.cache_clear()


def test_kernels_that_are_demanded_and_absent_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "why_torch", lambda device: "this installation has no compiled library")
    monkeypatch.setenv("MOE_ROUTE_BACKEND", "native")
    model = tiny_model("qwen3_moe")
    with pytest.raises(RuntimeError, match=r"MOE_ROUTE_BACKEND=native.*no compiled library.*unset"):
        mr.attach(model)
    assert attachment_of(model) is None


# ---------------------------------------------------------------------------------------------------------------
# Hooks that others put on a router after attach.


def turned(router: Any, by: int = 1) -> Any:
    """A hook that moves every chosen id of a router on by some experts."""

    def turn_ids(module: nn.Module, args: Any, output: Any) -> Any:
        return (*output[:2], (output[2] + by) % router.num_experts)

    return turn_ids


def what_experts_get(model: nn.Module, attachment: Attachment) -> list[Tensor]:
    """Ids that the experts of each layer are given."""
    given: list[Tensor] = []
    for router in attachment.routers:
        router.block.experts.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    return given


@pytest.mark.parametrize("name", ["qwen3_moe", "dots1"])
def test_a_hook_put_on_a_router_after_attach_is_counted_and_steered_as_the_model_runs(name: str) -> None:
    model, ids = tiny_model(name), tokens()
    attachment = Attachment(model)
    for router in attachment.routers:
        router.module.register_forward_hook(turned(router))
    given = what_experts_get(model, attachment)
    attachment.set_statistics(tables := zeros(attachment))
    run(model, input_ids=ids)
    for router, table, got in zip(attachment.routers, tables, given, strict=True):
        assert torch.equal(table.metric("counts")[0], torch.bincount(got.reshape(-1), minlength=router.num_experts))
    given.clear()
    force = [torch.full((1, router.num_experts), float(Force.FORBID)) for router in attachment.routers]
    for table in force:
        table[:, :4] = 0
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([SteeringTables(1, table.shape[1], force=table) for table in force])
    run(model, input_ids=ids)
    assert all(bool((got < 4).all()) for got in given)
    attachment.detach()


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_hooks_that_return_nothing_or_the_same_never_matter(engine: str) -> None:
    model, ids = tiny_model("qwen3_moe"), tokens()
    plain = run(model, input_ids=ids)
    attachment = Attachment(model, engine=engine)
    seen = capture(model, attachment)
    model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: tuple(output))
    attachment.set_statistics(zeros(attachment))
    model.layers[1].mlp.gate.register_forward_hook(lambda module, args, output: tuple(output))
    torch.testing.assert_close(run(model, input_ids=ids), plain)
    assert len(seen) == 3
    attachment.detach()
    assert [len(router.module._forward_hooks) for router in attachment.routers] == [2, 2, 1]


@pytest.mark.parametrize("changed", ["returned", "in place"])
@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_a_hook_that_changes_the_choice_after_it_was_seen_is_refused_by_name(engine: str, changed: str) -> None:
    def zero_weights(module: nn.Module, args: Any, output: Any) -> None:
        output[1].zero_()

    model, ids = tiny_model("qwen3_moe"), tokens()
    attachment = Attachment(model, engine=engine)
    hook = zero_weights if changed == "in place" else turned(attachment.routers[1])
    if engine == "fused":
        model.layers[1].mlp.gate.register_forward_hook(hook)
    attachment.set_statistics(zeros(attachment))
    if engine == "hook":
        run(model, input_ids=ids)
        model.layers[1].mlp.gate.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match=rf"layers\.1\.mlp\.gate.*{hook.__qualname__.split('.')[0]}"):
        run(model, input_ids=ids)
    attachment.set_statistics(None)
    run(model, input_ids=ids)  # nothing is seen, and nothing is refused
    attachment.detach()


def test_a_compiled_model_counts_what_a_later_hook_makes_of_the_choice() -> None:
    torch.compiler.reset()
    model, ids = tiny_model("qwen3_moe"), tokens()
    attachment = Attachment(model)
    compiled = torch.compile(model, backend="eager")
    run(compiled, input_ids=ids)
    for router in attachment.routers:
        router.module.register_forward_hook(turned(router, 3))
    attachment.set_statistics(tables := zeros(attachment))
    run(compiled, input_ids=ids)
    again = zeros(attachment)
    attachment.set_statistics(again)
    run(model, input_ids=ids)
    for table, eager in zip(tables, again, strict=True):
        assert torch.equal(table.metric("counts"), eager.metric("counts"))
    attachment.detach()
    torch.compiler.reset()


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("where", ["instance", "class"])
def test_a_forward_that_was_replaced_after_attach_is_refused_by_name(engine: str, where: str, monkeypatch: Any) -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model, engine=engine)
    gate, own = model.layers[1].mlp.gate, type(model.layers[1].mlp.gate).forward
    if where == "instance":
        gate.forward = lambda hidden: own(gate, -hidden)
    else:
        monkeypatch.setattr(type(gate), "forward", lambda module, hidden: own(module, -hidden))
    with pytest.raises(RuntimeError, match=r"gate.*attach\(model\) again"):
        attachment.set_statistics(zeros(attachment))
    attachment.detach()
    assert attachment_of(model) is None


@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_accelerates_own_wrapper_may_come_after_attach(engine: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny_model("qwen3_moe"), tokens()
    plain = run(model, input_ids=ids)
    attachment = Attachment(model, engine=engine)
    for router in attachment.routers:
        accelerate.hooks.add_hook_to_module(router.module, accelerate.hooks.AlignDevicesHook(io_same_device=True))
    attachment.set_statistics(tables := zeros(attachment))
    torch.testing.assert_close(run(model, input_ids=ids), plain)
    assert all(table.scalar("tokens").item() == ids.numel() for table in tables)
    attachment.set_statistics(None)

    class Turned(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return turned(attachment.routers[0])(module, (), output)

    accelerate.hooks.add_hook_to_module(model.layers[0].mlp.gate, Turned(), append=True)
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.gate"):
        attachment.set_statistics(tables)
    attachment.detach()


def test_a_hook_of_ours_that_was_taken_out_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    attachment = Attachment(model)
    model.layers[2].mlp.gate._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="taken out"):
        attachment.set_statistics(zeros(attachment))
    attachment.detach()
