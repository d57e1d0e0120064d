"""Tokens that may not become text: counted once it is told, with the bits of those that are counted at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness.standin_device import StandInDevices, StandInGraph, to_device

from moe_route import ops
from moe_route.contract.spec import RouterSpec
from moe_route.contract.tables import StatisticsTables, SteeringTables
from moe_route.integrations.serving import operator
from moe_route.integrations.serving.counts import Known, PendingTokens, StepCounts
from moe_route.integrations.serving.requests import Batch, RequestTable
from moe_route.integrations.serving.sites import Site, TokenNumbers
from moe_route.integrations.vllm.texts import FIELD, Texts

EXPERTS, TOP_K, LAYERS, MOST = 16, 3, 4, 8
SPECS = (RouterSpec(renormalize="sum"), RouterSpec(score="sigmoid", renormalize="sum", scale=2.5))
METRICS = ("counts", "natural_counts", "probability", "weight", "weight_share")


class Worker:
    """Four layers of two specs, a plan for two of them, and two requests whose prompts have 3 and 2 tokens."""

    def __init__(self, device: str = "cpu", *, ahead: bool = False, pending: bool = True):
        self.layer_rows = torch.full((LAYERS, 3), -1, dtype=torch.int32)
        self.layer_rows[1:3, 0], self.layer_rows[1:3, 1] = 0, 1
        self.sites = [self._site(layer, device) for layer in range(LAYERS)]
        self.requests = RequestTable(groups=2, plans=1, capacity=4)
        self.requests.group_capacity, self.requests.segment_capacity = 2, 4
        self.requests.forget()
        self.requests.counts, self.requests.ahead = True, ahead
        self.requests.plan_rows.rows[0, :, 2] = [[0], [1]]  # group 1 has another row in each phase
        self.requests.begin("a", prompt=3, group=0, segment=1, plan=0)
        self.requests.begin("b", prompt=2, group=1, segment=2, plan=0)
        rows = to_device(self.layer_rows, device)
        self.pending = (
            PendingTokens(self.sites, self.requests, rows, TokenNumbers(), torch.device(device), MOST)
            if pending
            else None
        )
        self.counts = StepCounts(self.sites) if device == "cpu" else None
        operator.connect(self.sites, self.counts, self.pending)

    def _site(self, layer: int, device: str) -> Any:
        generator = torch.Generator().manual_seed(layer)
        steering = operator.neutral_tables(2, EXPERTS, torch.device("cpu"))
        if layer in (1, 2):
            bias = torch.randn(2, EXPERTS, generator=generator)
            operator.copy_plan(steering, 0, SteeringTables(2, EXPERTS, bias=bias))
        planes, mask, params, remap = steering.packed
        there = [None if one is None else to_device(one, device) for one in (planes, params, remap)]
        tables = StatisticsTables.zeros(EXPERTS, groups=4, segments=8, metrics=METRICS, entropy=True, device=device)
        return Site(
            f"layers.{layer}.mlp.gate",
            None,
            EXPERTS,
            TOP_K,
            SPECS[layer % 2],
            None,
            torch.device(device),
            steers=layer in (1, 2),
            tokens=to_device(torch.full((64, 4), -1, dtype=torch.int32), device),
            steering=SteeringTables.from_packed(there[0], mask, there[1], there[2], EXPERTS),
            statistics=tables,
        )

    def lay_out(self, batch: Batch) -> int:
        table = np.full((64, 4), -1, np.int32)
        table[:, 3] = 1
        tails = (
            None if self.pending is None else self.requests.tails(batch.names, batch.counts, batch.starts, batch.drafts)
        )
        total = self.requests.fill(table, batch.names, batch.counts, batch.starts, tails)
        if self.pending is not None:
            assert tails is not None
            self.pending.lay_out(table[:total], batch, tails)
        for layer, site in enumerate(self.sites):
            rows = torch.from_numpy(table.copy())
            rows[:total, 0] = self.layer_rows[layer, rows[:total, 0]]
            to_device(site.tokens, "cpu").copy_(rows)
        if self.counts is not None:
            self.counts.forget()
            operator.set_work(operator.Work.STEER if (table[:total, 0] >= 0).any() else operator.Work.KEEP)
        return total

    def run(self, batch: Batch, choices: list[Any]) -> None:
        self.lay_out(batch)
        for layer, choice in enumerate(choices):
            torch.ops.moe_route_serving.reroute(*(one.clone() for one in choice), layer)
        if self.counts is not None:
            self.counts.count(self.sites[0].tokens)


def batch(names: str, counts: list[int], starts: list[int], drafts: list[int] | None = None) -> Batch:
    given = None if drafts is None else np.array(drafts)
    return Batch(list(names), np.array(counts), np.array(starts), torch.empty(0), given)


def choices(tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in range(LAYERS):
        logits = torch.randn(tokens, EXPERTS, generator=generator).to(dtype)
        weights, ids = ops.route(logits, TOP_K, SPECS[layer % 2])
        found.append((logits, weights, ids))
    return found


def at(given: list[Any], places: list[int]) -> list[Any]:
    return [tuple(one[places] for one in layer) for layer in given]


def tables(worker: Worker) -> list[torch.Tensor]:
    found = [table for site in worker.sites for table in (site.statistics.groups, site.statistics.segments)]
    return [to_device(one, "cpu") for one in found]


@pytest.fixture(autouse=True)
def _disconnect() -> Any:
    yield
    operator.connect([])


def assert_equal(found: Worker, plain: Worker) -> None:
    assert sum(int(one.count_nonzero()) for one in tables(plain)) > 100
    for one, other in zip(tables(found), tables(plain), strict=True):
        assert other[len(other) // 2 :].any()  # of answers
        assert one.equal(other)
    for name in "ab":
        mine, theirs = found.requests, plain.requests
        assert mine.routed(mine.running[name]) == theirs.routed(theirs.running[name])


PROMPTS, FIRST = batch("ab", [3, 2], [0, 0]), [4, 0]
STEP = batch("ba", [3, 4], [2, 3], [2, 3])  # each a token of its text and drafts behind it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("accepted", [(0, 0), (2, 1), (2, 3)], ids=str)
def test_accepted_drafts_have_the_bits_of_tokens_that_are_counted_at_once(
    accepted: tuple[int, int], dtype: torch.dtype
) -> None:
    prompts, step = choices(5, 1, dtype), choices(7, 2, dtype)
    found, plain = Worker(), Worker(pending=False)
    for worker in (plain, found):
        operator.connect(worker.sites, worker.counts, worker.pending)
        worker.run(PROMPTS, prompts)
        if worker is plain:
            places = [*range(1 + accepted[0]), *range(3, 4 + accepted[1])]
            worker.run(batch("ba", [1 + accepted[0], 1 + accepted[1]], [2, 3]), at(step, places))
    assert found.pending is not None
    assert not found.pending.resolve({}).size
    found.run(STEP, step)
    assert [found.requests.routed(found.requests.running[name]) for name in "ba"] == [3, 4]  # no draft yet
    known = {"b": Known(3 + accepted[0], False, []), "a": Known(4 + accepted[1], True, [])}
    rejected = found.pending.resolve(known)
    assert rejected.tolist() == [*range(1 + accepted[0], 3), *range(4 + accepted[1], 7)]
    assert found.requests.tokens_rejected == len(rejected)
    assert found.requests.tokens_lost == 0
    assert_equal(found, plain)
    assert not found.pending.resolve(known).size  # nothing is pending any more
    assert_equal(found, plain)


def test_a_captured_graph_keeps_the_choices_of_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not there: the operator is captured once, and only data change; the host never waits."""
    steps = [
        (batch("ba", [3, 4], [2, 3], [2, 3]), {"b": Known(4, False, []), "a": Known(7, False, [])}, [0, 1, 3, 4, 5, 6]),
        (batch("ab", [1, 3], [7, 4], [0, 2]), {"a": Known(8, False, []), "b": Known(5, False, [])}, [0, 1]),
    ]
    plain = Worker(pending=False)
    plain.run(batch("ba", [2, 4], [2, 3]), at(choices(7, 10), steps[0][2]))
    plain.run(batch("ab", [1, 1], [7, 4]), at(choices(4, 11), steps[1][2]))
    monkeypatch.setattr("torch.cuda._lazy_init", lambda: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch._C.TensorBase.pin_memory)  # vLLM replaces it on a CPU
    with StandInDevices():
        found = Worker("cuda:0")
        assert found.pending is not None
        operator.set_work(operator.Work.ROUTE)
        given = [tuple(to_device(torch.zeros(9, *one.shape[1:], dtype=one.dtype), "cuda:0") for one in layer)
                 for layer in choices(9, 0)]  # padded, as graphs are  # fmt: skip
        for layer, choice in enumerate(given):  # as vLLM runs once to see what memory is needed
            operator.reroute(*choice, layer)
        graph = StandInGraph()
        with graph.capture():
            for layer, choice in enumerate(given):
                operator.reroute(*choice, layer)
        for number, (laid_out, known, _) in enumerate(steps):
            total = found.lay_out(laid_out)
            for layer, choice in enumerate(choices(total, 10 + number)):
                for there, one in zip(given[layer], choice, strict=True):
                    there.inner[:total] = one
            graph.replay()
            found.pending.resolve(known)
    assert_equal(found, plain)


def test_a_step_beyond_the_end_is_not_counted() -> None:
    """Under async scheduling: `b` ends with the token that the step before sampled."""
    prompts, first, second = choices(5, 1), choices(2, 2), choices(2, 3)
    plain = Worker(pending=False)
    plain.run(PROMPTS, prompts)
    plain.run(batch("ab", [1, 1], [3, 2]), first)
    plain.run(batch("a", [1], [4]), at(second, [0]))
    found = Worker(ahead=True)
    assert found.pending is not None
    operator.connect(found.sites, found.counts, found.pending)
    found.requests.running["a"].ids = [7, 8, 9]
    found.run(PROMPTS, prompts)
    assert not found.pending.resolve({"a": Known(3, False, [])}).size
    found.run(batch("ab", [1, 1], [3, 2]), first)
    assert not found.pending.resolve({"a": Known(4, False, [5]), "b": Known(3, False, [6])}).size
    found.run(batch("ab", [1, 1], [4, 3]), second)
    assert found.pending.resolve({"a": Known(5, False, [4]), "b": Known(3, True, [2])}).tolist() == [1]
    assert found.requests.running["a"].ids == [7, 8, 9, 5, 4]
    assert (found.requests.tokens_rejected, found.requests.tokens_lost) == (1, 0)
    assert_equal(found, plain)


def test_tokens_of_which_nothing_is_told_are_lost_and_not_counted() -> None:
    found = Worker(ahead=True)
    assert found.pending is not None
    step = batch("ab", [1, 1], [3, 2])
    found.run(step, choices(2, 2))
    found.pending.resolve({"a": Known(4, False, [])})
    assert found.requests.tokens_lost == 1
    found.run(step, choices(2, 2))
    found.pending.resolve({"a": Known(4, False, []), "b": Known(2, False, [])})  # goes on, and yet it does not
    assert found.requests.tokens_lost == 2
    found.run(step, choices(2, 2))
    found.run(step, choices(2, 2))  # the one before failed
    assert found.requests.tokens_lost == 4


def test_more_pending_tokens_than_there_is_room_for_are_lost() -> None:
    found = Worker()
    found.run(batch("ab", [6, 6], [3, 2], [5, 5]), choices(12, 2))
    assert found.requests.tokens_lost == 2
    assert (found.sites[0].tokens[:12, 1] >= 0).sum() == 2


def test_a_preempted_request_counts_again_what_was_rejected() -> None:
    prompts, step, again = choices(3, 1), choices(4, 2), choices(6, 3)
    plain = Worker(pending=False)
    plain.run(batch("a", [3], [0]), prompts)
    plain.run(batch("a", [2], [3]), at(step, [0, 1]))
    plain.run(batch("a", [1], [5]), at(again, [5]))
    found = Worker()
    assert found.pending is not None
    operator.connect(found.sites, found.counts, found.pending)
    found.run(batch("a", [3], [0]), prompts)
    found.run(batch("a", [4], [3], [3]), step)
    found.pending.resolve({"a": Known(5, False, [])})  # one of three drafts is right
    found.run(batch("a", [6], [0]), again)
    assert found.requests.tokens_run_again == 5
    assert_equal(found, plain)


class Text:
    """A request of a scheduler."""

    def __init__(self, prompt: int):
        self.prompt, self.output_token_ids, self.ended = prompt, [], False

    @property
    def num_tokens(self) -> int:
        return self.prompt + len(self.output_token_ids)

    def is_finished(self) -> bool:
        return self.ended


def step_of(*names: str) -> Any:
    return SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1))


def config(**changes: Any) -> Any:
    given = {"additional_config": {"moe_route": {}}, "speculative_config": None, "async_scheduling": False, **changes}
    return SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=given.pop("async_scheduling")), **given)


def test_texts_are_told_where_a_step_may_run_tokens_that_do_not_become_text() -> None:
    assert Texts.of(config()) is None
    assert Texts.of(config(async_scheduling=True, additional_config={})) is None
    assert Texts.of(config(async_scheduling=True)) is not None
    assert Texts.of(config(speculative_config=object())) is not None


def test_after_drafts_all_but_the_last_token_are_known() -> None:
    texts, requests = Texts(ahead=False), {"a": Text(5), "b": Text(3)}
    step = step_of("a", "b")
    texts.attach(texts.news(), step, requests)
    assert getattr(step, FIELD) == {}
    requests["a"].output_token_ids += [1, 2, 3]
    requests["b"].output_token_ids += [1]
    requests["b"].ended = True
    assert texts.news() == {"a": Known(7, False, []), "b": Known(3, True, [])}
    assert texts.news() == {}


def test_ahead_of_its_outcome_the_last_token_of_a_text_that_goes_on_is_known_too() -> None:
    texts, requests = Texts(ahead=True), {"a": Text(5), "b": Text(3)}
    texts.attach(texts.news(), step_of("a", "b"), requests)
    assert texts.news() == {"a": Known(5, False, []), "b": Known(3, False, [])}
    texts.attach({}, step_of("a", "b"), requests)
    for request in requests.values():
        request.output_token_ids.append(9)
    requests["b"].ended = True
    assert texts.news() == {"a": Known(6, False, [9]), "b": Known(3, True, [9])}
    del requests["b"]
    texts.attach({}, step_of(), requests)  # `a` waits, and what it made arrives late
    assert texts.news() == {}
    requests["a"].output_token_ids.append(8)
    assert texts.news() == {"a": Known(7, False, [8])}


def test_a_name_that_is_used_again_is_another_text() -> None:
    texts, old, new = Texts(ahead=True), Text(5), Text(2)
    texts.attach({}, step_of("a"), {"a": old})
    old.output_token_ids += [1, 2]
    old.ended = True
    step = step_of("a")
    texts.attach(texts.news(), step, {"a": new})
    assert getattr(step, FIELD) == {"a": Known(6, True, [1, 2])}
    new.output_token_ids.append(3)
    assert texts.news() == {"a": Known(3, False, [3])}
