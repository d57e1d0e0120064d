"""The token table of a step, in numpy: phases, groups, plans, positions, chunks and preemption."""

from __future__ import annotations

import numpy as np

from moe_route.integrations.serving.requests import PlanRows, RequestTable


def table_of(requests: RequestTable, names: list[str], counts: list[int], starts: list[int]) -> np.ndarray:
    table = np.full((64, 4), 7, np.int32)
    total = requests.fill(table, names, np.array(counts), np.array(starts))
    assert total == sum(counts)
    assert (table[total:] == 7).all()
    return table[:total]


def counting(plans: int = 1) -> RequestTable:
    requests = RequestTable(groups=2, plans=plans, capacity=2)
    requests.group_capacity, requests.segment_capacity = 2, 8
    requests.forget()
    requests.counts = True
    return requests


def test_a_chunk_that_reaches_past_the_prompt_has_two_phases() -> None:
    requests = counting()
    requests.begin("a", prompt=3, group=1, segment=5, plan=0)
    assert table_of(requests, ["a"], [4], [0]).tolist() == [[-1, 1, 5, 1]] * 3 + [[-1, 3, 13, 1]]


def test_tokens_that_run_again_are_steered_and_not_counted() -> None:
    requests = counting()
    requests.plan_rows = PlanRows(np.full((2, 2, 3, 1), 4, np.int32))
    requests.begin("a", prompt=4, group=0, segment=0, plan=0)
    table_of(requests, ["a"], [4], [0])
    table_of(requests, ["a"], [1], [4])
    again = table_of(requests, ["a"], [6], [0])
    assert again[:, 0].tolist() == [4] * 6
    assert again[:, 1].tolist() == [-1] * 5 + [2]
    assert requests.tokens_run_again == 5
    assert requests.routed(requests.running["a"]) == 6


def test_rows_follow_plan_phase_group_and_position() -> None:
    requests = counting(plans=2)
    rows = np.full((3, 2, 3, 2), -1, np.int32)
    rows[0, 0, 1] = [0, 1]  # plan 0, prefill, group 0: another row from position 2 on
    rows[1, 1, 2] = [2, 2]  # plan 1, decode, group 1
    requests.plan_rows = PlanRows(rows, np.array([2]))
    requests.begin("a", prompt=4, group=0, segment=0, plan=0)
    requests.begin("b", prompt=1, group=1, segment=1, plan=1)
    requests.begin("c", prompt=1, group=0, segment=2, plan=-1)  # more requests than capacity: the table grows
    found = table_of(requests, ["b", "a", "c"], [2, 4, 1], [0, 0, 0])
    assert found[:, 0].tolist() == [-1, 2, 0, 0, 1, 1, -1]


def test_a_request_without_group_and_an_unknown_one_are_not_counted() -> None:
    requests = counting()
    requests.begin("a", prompt=2, group=-1, segment=-1, plan=0)
    assert (table_of(requests, ["a", "unknown"], [2, 1], [0, 0])[:, :3] == -1).all()


def test_cached_tokens_are_not_counted_when_they_run_again() -> None:
    requests = counting()
    requests.begin("a", prompt=4, group=0, segment=0, plan=0, first=2)
    assert table_of(requests, ["a"], [2], [2])[:, 1].tolist() == [0, 0]
    assert table_of(requests, ["a"], [4], [0])[:, 1].tolist() == [-1] * 4


def test_nothing_is_counted_while_paused_and_requests_of_before_a_recording_never() -> None:
    requests = counting()
    requests.begin("a", prompt=8, group=0, segment=0, plan=0)
    requests.counts = False
    assert (table_of(requests, ["a"], [2], [0])[:, 1] == -1).all()
    requests.counts = True
    assert table_of(requests, ["a"], [2], [2])[:, 1].tolist() == [0, 0]
    requests.forget()
    assert (table_of(requests, ["a"], [2], [4])[:, 1] == -1).all()


def test_slots_are_used_again() -> None:
    requests = counting()
    for number in range(50):
        request = requests.begin(str(number), prompt=1, group=0, segment=0, plan=0)
        assert request.slot < 2
        assert requests.end([str(number), "unknown"]) == [request]


def test_tokens_are_expected_by_phase_and_group_and_once() -> None:
    requests = counting()
    requests.begin("a", prompt=3, group=1, segment=0, plan=0)
    for count, start in ((4, 0), (1, 4), (5, 0), (1, 5)):  # preempted after five tokens, and run again
        requests.expect(table_of(requests, ["a"], [count], [start]))
    assert requests.laid_out.tolist() == [0, 3, 0, 3]
    requests.forget()
    assert not requests.laid_out.any()


def test_tokens_without_a_group_are_counted_apart_and_once() -> None:
    requests = counting()
    requests.begin("a", prompt=2, group=-1, segment=-1, plan=0)
    requests.begin("b", prompt=2, group=0, segment=0, plan=0)
    requests.expect(table_of(requests, ["a", "b"], [3, 3], [0, 0]))
    requests.expect(table_of(requests, ["a"], [4], [0]))  # three of them ran before
    assert requests.ungrouped_tokens == 4
    assert requests.laid_out.sum() == 3
    tails = np.array([2])
    requests.fill(np.zeros((8, 4), np.int32), ["a"], np.array([3]), np.array([4]), tails)  # two may not become text
    assert requests.ungrouped_tokens == 5
    requests.advance("a", 6)
    assert requests.ungrouped_tokens == 6
