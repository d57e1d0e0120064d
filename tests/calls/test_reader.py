"""What is read from a call of the model: shapes, masks, caches, labels, and the token table made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_route.calls.call import Call
from moe_route.calls.reader import CallReader, valid_tokens
from moe_route.calls.token_table import Labels, broadcast_rows


class Model(nn.Module):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None):
        raise AssertionError("only its signature is read")


class Renamed(nn.Module):
    """The signature of transformers 5.24, whose models still take the older names of the cache as keywords."""

    def forward(self, input_ids=None, attention_mask=None, cache=None, inputs_embeds=None, **kwargs):
        raise AssertionError("only its signature is read")


class Cache:
    def __init__(self, length: int | Tensor | None) -> None:
        self.length = length

    def get_seq_length(self) -> int | Tensor:
        if self.length is None:
            raise ValueError("a cache of linear attention alone has no length")
        return self.length


LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
IDS = torch.arange(10).view(2, 5)


def read(*args: Any, **kwargs: Any) -> Call:
    call = CallReader(Model())(args, kwargs)
    assert call is not None
    return call


def causal(valid: Tensor, past: int = 0, window: int | None = None) -> Tensor:
    """4-D bool mask of `valid` [B, past + S] as transformers builds it."""
    keys = torch.arange(valid.shape[1])
    rows = keys[past:, None]
    allowed = keys <= rows
    if window is not None:
        allowed &= keys > rows - window
    return (allowed & valid[:, None, :].bool())[:, None]


def test_shapes_by_name_and_by_place() -> None:
    for call in (read(IDS), read(input_ids=IDS), read(None, inputs_embeds=torch.zeros(2, 5, 8))):
        assert (call.batch, call.length, call.past_length, call.phase, call.valid) == (2, 5, 0, "prefill", None)
    assert read(IDS).input_ids is IDS
    assert read(inputs_embeds=torch.zeros(2, 5, 8)).input_ids is None


def test_arguments_without_tokens_are_no_call() -> None:
    assert CallReader(Model())((), {"attention_mask": LEFT}) is None


@pytest.mark.parametrize("past", [0, 3])
def test_flat_mask_gives_its_last_columns(past: int) -> None:
    mask = torch.cat([torch.zeros(2, past, dtype=torch.long), LEFT], 1)
    call = read(IDS, mask, past_key_values=Cache(past))
    assert torch.equal(call.valid, LEFT.bool())
    assert call.past_length == past
    assert read(IDS, torch.ones(2, past + 5), past_key_values=Cache(past)).valid is None


@pytest.mark.parametrize("form", ["bool", "float", "wide", "window", "dict", "linear"])
def test_other_forms_of_mask(form: str) -> None:
    square = causal(LEFT)
    if form == "float":
        masks: Any = torch.where(square, 0.0, torch.finfo(torch.float32).min)
    elif form == "wide":  # a static cache: columns of the future follow
        masks = torch.cat([square, torch.zeros(2, 1, 5, 7, dtype=torch.bool)], 3)
    elif form == "window":
        masks = causal(LEFT, window=2)
    elif form == "dict":
        masks = {"sliding_attention": causal(LEFT, window=2), "full_attention": square}
    elif form == "linear":
        masks = {"linear_attention": LEFT, "full_attention": square}
    else:
        masks = square
    assert torch.equal(read(IDS, masks).valid, LEFT.bool())


def test_right_padding_and_a_past_in_four_dimensions() -> None:
    right = LEFT.flip(1)
    assert torch.equal(read(IDS, causal(right)).valid, right.bool())
    seen = torch.cat([torch.ones(2, 4, dtype=torch.long), LEFT], 1)
    assert torch.equal(read(IDS, causal(seen, past=4), past_key_values=Cache(4)).valid, LEFT.bool())


def test_decode_with_a_four_dimensional_mask_is_valid() -> None:
    call = read(IDS[:, :1], causal(LEFT, past=4), past_key_values=Cache(torch.tensor(4)))
    assert (call.valid, call.phase, call.past_length) == (None, "decode", 4)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
@pytest.mark.parametrize("model", [Model, Renamed])
def test_a_cache_is_read_by_every_name(model: type[nn.Module], name: str) -> None:
    call = CallReader(model())((), {"input_ids": IDS[:, :1], name: Cache(7)})
    assert call is not None
    assert (call.past_length, call.phase) == (7, "decode")


def test_a_cache_is_read_by_its_place() -> None:
    call = CallReader(Renamed())((IDS[:, :1], None, Cache(7)), {})
    assert call is not None
    assert (call.past_length, call.phase) == (7, "decode")


def test_the_mask_shows_the_past_of_a_cache_without_a_length() -> None:
    assert read(IDS, torch.ones(2, 9), past_key_values=Cache(None)).past_length == 4


def test_past_without_a_cache() -> None:
    assert read(IDS, torch.ones(2, 9)).past_length == 4
    assert read(IDS, past_key_values=((torch.zeros(2, 1, 6, 8), None),)).past_length == 6
    assert CallReader(Model())((IDS,), {"cache_position": torch.arange(3, 8)}).past_length == 3


def test_one_token_of_prompt_is_prefill_and_many_after_a_past_too() -> None:
    assert read(IDS[:, :1]).phase == "prefill"
    assert read(IDS, past_key_values=Cache(7)).phase == "prefill"
    assert read(IDS[:, :1], past_key_values=Cache(7)).phase == "decode"


def test_finished_sequences_of_a_batch_are_padding() -> None:
    reader, cache = CallReader(Model()), {"past_key_values": Cache(4)}
    call = reader((torch.tensor([[5], [0]]),), cache, lambda: (0, 2))
    assert call.valid.tolist() == [[True], [False]]
    assert reader((torch.tensor([[0]]),), cache, lambda: (0, 2)).valid is None  # a sequence alone stops instead
    assert reader((torch.tensor([[5, 0], [0, 0]]),), {}, lambda: (0, 2)).valid is None  # a prompt says it by its mask


def test_unreadable_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="columns"):
        valid_tokens(torch.ones(2, 3), 2, 5, 0)
    with pytest.raises(ValueError, match="does not say which tokens are padding"):
        valid_tokens(object(), 2, 5, 0)


def call_of(batch: int, length: int, valid: Tensor | None = None) -> Call:
    return Call(batch, length, 0, valid, "prefill", torch.device("cpu"))


def context(labels: Labels | None) -> Any:
    from moe_route.patching.context import RunningCall

    made = RunningCall()
    made.listener.labels_of = lambda call: labels
    made.idle = False
    return made


def table(labels: Labels | None, call: Call) -> list[list[int]]:
    made = context(labels)
    made.begin(call)
    return made.table.tolist()


def test_table_in_order_of_sequence_then_place() -> None:
    labels = Labels(steering_row=torch.tensor([4, 5]), group=torch.tensor([[1, 2, 3], [7, 8, 9]]), segment=6)
    expected = [[4, 1, 6, 1], [4, 2, 6, 1], [4, 3, 6, 1], [5, 7, 6, 1], [5, 8, 6, 1], [5, 9, 6, 1]]
    assert table(labels, call_of(2, 3)) == expected


def test_padding_is_neither_counted_nor_steered_but_routed() -> None:
    valid = torch.tensor([[False, True]])
    assert table(Labels(2, 3, 4), call_of(1, 2, valid)) == [[-1, -1, -1, 1], [2, 3, 4, 1]]


def test_no_labels_are_the_defaults() -> None:
    assert table(None, call_of(1, 2)) == [[-1, 0, -1, 1]] * 2


def test_uniform_tables_are_made_once() -> None:
    made = context(Labels(1, 2, 3))
    made.begin(call_of(2, 1))
    first = made.table
    made.begin(call_of(2, 1))
    assert made.table is first
    made.begin(call_of(1, 2))
    assert made.table is first  # the same tokens, whatever their shape
    made.begin(call_of(3, 1))
    assert made.table.shape == (3, 4)


@pytest.mark.parametrize("values", [[1, 2], torch.tensor([1, 2])])
def test_beams_repeat_their_sequences_labels(values: Any) -> None:
    assert broadcast_rows(values, call_of(6, 1), "group")[:, 0].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(4, dtype=torch.long), "4 rows, the batch has 6"),
        (torch.zeros(0, dtype=torch.long), "0 rows"),
        (torch.zeros(6), "must be integers"),
        (torch.zeros(6, 2, dtype=torch.long), "2 columns, the call has 3"),
        (torch.zeros(6, 2, 1, dtype=torch.long), "must be integers, one number"),
    ],
)
def test_labels_that_do_not_fit(value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        broadcast_rows(value, call_of(6, 3), "group")


def test_steers_only_where_a_row_is_given() -> None:
    for row, steers in ((-1, False), (0, True), (torch.tensor([-1, -1]), False), (torch.tensor([-1, 0]), True)):
        made = context(Labels(steering_row=row))
        made.begin(call_of(2, 3))
        assert made.steers is steers


def test_nested_and_failed_calls() -> None:
    ended: list[Call] = []
    made = context(Labels())
    made.listener.after_call = ended.append
    outer, inner = Model(), Model()
    reader = CallReader(outer)
    made.enter(reader, outer, (IDS,), {})
    made.enter(reader, inner, (IDS[:, :2],), {})
    made.leave(inner, "output")
    assert made.call.length == 5
    assert not ended
    made.reached = True  # as a router sets it
    made.leave(outer, "output")
    assert len(ended) == 1
    assert made.table is None
    assert made.owner is None
    made.enter(reader, outer, (IDS,), {})
    made.leave(outer, None)  # the forward raised
    assert len(ended) == 1
    assert made.owner is None


def test_tokens_that_cannot_be_told_apart_are_refused() -> None:
    made = context(Labels(group=torch.tensor([0, 1])))
    made.begin(call_of(2, 3))
    with pytest.raises(RuntimeError, match="cannot be told apart"):
        made.table_for(4, torch.device("cpu"), "layers.0.gate")
    made = context(Labels(group=1))
    made.begin(call_of(2, 3))
    assert made.table_for(4, torch.device("cpu"), "layers.0.gate").tolist() == [[-1, 1, -1, 1]] * 4
