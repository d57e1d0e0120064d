"""Models on devices: the same code, the same counts, tables where the routers are, and a host that never waits.

Every test runs on the CPU, on devices that are not there (`standin_device`: the code sees cuda:0 and cuda:1, every wait
of the host for a device is an error), and, where there is one, on a CUDA device.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from harness.exhaustive import exhaustive_but
from harness.standin_device import HostWaitedError, OnDevice, StandInDevices, StandInGraph, asked_by, move, to_device
from harness.tiny_models import tiny_model, tokens

import moe_route as mr
from moe_route import ops
from moe_route.base.devices import Answers, CaptureRefusedError, upload
from moe_route.calls import Labels
from moe_route.experts import layout
from moe_route.ops import StatisticsTables, SteeringTables
from moe_route.patching import Attachment
from moe_route.patching.deferred import MOST_TOKENS
from moe_route.recording import RecordingError

NAMES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")


class Place:
    """A device that tests run on."""

    first, second = torch.device("cpu"), torch.device("cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def put(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        return tensor.to(device or self.first)

    def move(self, module: nn.Module, device: torch.device | None = None) -> nn.Module:
        return module.to(device or self.first)

    def host(self, tensor: Tensor) -> Tensor:
        return tensor.cpu()

    @contextlib.contextmanager
    def on(self) -> Iterator[Place]:
        """Code of moe_route that waits for the device inside fails, but inside `reading`."""
        yield self

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def block(self, *managers: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
        """Blocks that are entered, and left, where the host may wait."""
        stack = contextlib.ExitStack()
        with self.reading():
            for manager in managers:
                stack.enter_context(manager)
        try:
            yield
        finally:
            with self.reading():
                stack.__exit__(*sys.exc_info())

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        yield

    def graph(self, step: Callable[[], Any]) -> Callable[[], None]:
        """`step` as a graph: what replays it."""
        raise NotImplementedError


class StandIn(Place):
    first, second = torch.device("cuda:0"), torch.device("cuda:1")

    def put(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        return to_device(tensor, device or self.first)

    def move(self, module: nn.Module, device: torch.device | None = None) -> nn.Module:
        return move(module, device or self.first)

    def host(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, "cpu")

    @contextlib.contextmanager
    def on(self) -> Iterator[Place]:
        self.monkeypatch.setattr("moe_route.ops.library.serves_cuda", lambda: "")
        self.monkeypatch.setattr("torch.cuda._lazy_init", lambda: None)
        self.monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: torch.zeros(1))
        self.monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: None)
        with StandInDevices() as self.devices:
            yield self

    def reading(self) -> contextlib.AbstractContextManager[None]:
        return self.devices.waiting_allowed()

    def graph(self, step: Callable[[], Any]) -> Callable[[], None]:
        graph = StandInGraph()
        with graph.capture():
            step()
        return graph.replay


class Cuda(Place):
    first = torch.device("cuda:0")  # and the CPU as the second one

    @contextlib.contextmanager
    def on(self) -> Iterator[Place]:
        """torch warns where it makes the host wait; who asked for it is on the stack."""
        self.strict = True
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = self._warned
                yield self
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _warned(self, message: Any, *_: Any) -> None:
        where = asked_by("moe_route")
        if self.strict and where is not None and "synchroniz" in str(message):
            raise HostWaitedError(f"the host waits, asked for at {where}")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        self.strict = False
        try:
            yield
        finally:
            self.strict = True

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def graph(self, step: Callable[[], Any]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


NEEDS_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
AWAY = [pytest.param(StandIn, id="standin"), pytest.param(Cuda, id="cuda", marks=NEEDS_CUDA)]
PLACES = [pytest.param(Place, id="cpu"), *AWAY]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    return request.param(monkeypatch)


@pytest.fixture(params=AWAY)
def away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place that is not the CPU."""
    return request.param(monkeypatch)


def model_of(name: str, **options: Any) -> nn.Module:
    model = tiny_model(name, head=True, **options)
    model.set_experts_implementation("batched_mm")  # the one that asks the device for nothing
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def inputs(padding: str | None = None, batch: int = 3, length: int = 7) -> dict[str, Tensor]:
    ids = tokens(batch, length)
    if padding is None:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    mask[0, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
    return {"input_ids": ids, "attention_mask": mask}


GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "disable_compile": True}


def compared(place: Place, name: str, work: Callable[[Place, mr.RoutedModel], Any], **attach: Any) -> None:
    """`work` on the place and on the CPU: what it returns, and what was recorded meanwhile, agrees."""
    home = Place(place.monkeypatch)
    found = []
    for where in (home, place):
        with where.on(), torch.no_grad():
            model = where.move(model_of(name))
            with where.reading():
                routed = mr.attach(model, **attach)
            made = work(where, routed)
            with where.reading():
                found.append((made, routed.statistics()))
                routed.detach()
    (expected, ours), (made, theirs) = found
    torch.testing.assert_close(place.host(made), expected, rtol=1e-4, atol=1e-4)
    for plane in ("counts", "natural_counts") if "natural_counts" in ours.metrics else ("counts",):
        assert (ours.token_sum(plane) == theirs.token_sum(plane)).all()
    for scalar in ("tokens", "slots", "empty", "steered", "flipped"):
        assert (ours.scalar(scalar) == theirs.scalar(scalar)).all()
    for plane in ("probability", "weight", "weight_share"):
        torch.testing.assert_close(
            torch.from_numpy(theirs.token_sum(plane)), torch.from_numpy(ours.token_sum(plane)), rtol=1e-4, atol=1e-4
        )
    assert (ours.sequences() == theirs.sequences()).all()
    assert ours.metadata["fingerprint"] == theirs.metadata["fingerprint"]


def put_all(place: Place, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: place.put(tensor) for name, tensor in given.items()}


# ---------------------------------------------------------------------------------------------------------------
# What is counted on a device is what is counted on the CPU, and the host waits for nothing.


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_recording_on_a_device(place: Place, name: str, padding: str | None) -> None:
    def work(where: Place, routed: mr.RoutedModel) -> Tensor:
        given = put_all(where, inputs(padding))
        recorder = routed.record(groups=["x", "y"], sequences=True)
        with where.block(recorder, recorder.labels(["x", "y", "y"], items=[1, 2, 3])):
            out = routed.model(**given, use_cache=False).logits
        return out if padding is None else out * given["attention_mask"][..., None]

    compared(place, name, work)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", NAMES)
def test_generating_on_a_device(place: Place, name: str, padding: str | None, cache: str | None) -> None:
    options = GREEDY | ({} if cache is None else {"cache_implementation": cache})

    def work(where: Place, routed: mr.RoutedModel) -> Tensor:
        recorder = routed.record(groups=["x", "y"])
        with where.block(recorder, recorder.labels([["x", "x", "y"]] * 3)):
            return routed.model.generate(**put_all(where, inputs(padding)), **options)

    compared(place, name, work)


PLAN = (
    mr.Plan.activate({0: [1, 2], 1: [5]}, strength=1.0)
    + mr.Plan.force_on({1: [3]}).only(groups="y")
    + mr.Plan.bias({1: [0]}, strength=0.25, on="choice").only(phase="decode")
)


# rules worked out token by token, around `route`
AROUND = (
    mr.Plan.activate({0: [1, 2]}, strength=1.0).only(absent=True, positions=slice(2, None))
    + mr.Plan.force_on({0: [0]}).random_per_token(3)
    + mr.Plan.reserve_slot({1: [3]}).only(groups="y")
    + mr.Plan.replace_scores({1: {2: 0.5, 4: 0.25, 5: 0.125}}).only(phase="decode")
)

# three sequences, the end of whose texts was not recorded
RECORDED = torch.rand(3, 8, 2, 8, generator=torch.Generator().manual_seed(4)).topk(2).indices
REPLAY = mr.Plan.replay(RECORDED, layers=[0, 1])


@pytest.mark.parametrize("plan", [PLAN, AROUND, REPLAY], ids=["rows", "around", "replay"])
@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", exhaustive_but(NAMES[:1], NAMES))
def test_steering_on_a_device(place: Place, name: str, engine: str, plan: mr.Plan) -> None:
    def work(where: Place, routed: mr.RoutedModel) -> Tensor:
        recorder = routed.record(groups=["x", "y"])
        with where.block(routed.steer(plan), recorder, recorder.labels(["x", "y", "y"])):
            return routed.model.generate(**put_all(where, inputs("left")), **GREEDY)

    compared(place, name, work, engine=engine)


@pytest.mark.parametrize("plan", [PLAN, AROUND, REPLAY], ids=["rows", "around", "replay"])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
def test_the_host_waits_for_nothing_between_label_blocks(
    away: Place, cache: str | None, inference: bool, plan: mr.Plan
) -> None:
    """All that a block may hold: masks of the labels, labels per token, tensors as labels, small and large calls."""
    options = GREEDY | ({} if cache is None else {"cache_implementation": cache})
    mode = torch.inference_mode if inference else torch.no_grad
    with away.on(), mode():
        model = away.move(model_of("qwen3_moe"))
        with away.reading():
            routed = mr.attach(model)
        counted = away.put(torch.tensor([[1, 1, 0, 1, 1, 1, 1]] * 3).bool())
        recorder = routed.record(groups=["x", "y"])
        labels = recorder.labels(away.put(torch.tensor([0, 1, 1])), count_mask=counted)
        with away.block(routed.steer(plan), recorder, labels):
            for padding in (None, "left", "right"):
                routed.model(**put_all(away, inputs(padding)))
            routed.model.generate(**put_all(away, inputs("left")), **options)
            routed.model(**put_all(away, inputs(length=MOST_TOKENS)))
        with away.reading():
            assert recorder.statistics().tokens().sum() > 0


def test_a_wait_is_seen(away: Place) -> None:
    """The tests above mean something."""
    with away.on():
        attachment = Attachment(away.move(model_of("qwen3_moe")), verify=False)
        attachment.set_statistics(zeros(attachment))
        attachment.listener.labels_of = lambda call: Labels(group=int(_item(call.input_ids)))
        with torch.no_grad(), pytest.raises(HostWaitedError, match="moe_route"):
            attachment.model(input_ids=away.put(tokens()))


def _item(ids: Tensor) -> float:
    return ids.sum().item() * 0


def zeros(attachment: Attachment, **options: Any) -> list[StatisticsTables]:
    devices = [router.parameter.device for router in attachment.routers]
    return [
        StatisticsTables.zeros(router.num_experts, groups=1, device=device, **options)
        for router, device in zip(attachment.routers, devices, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------
# Small calls: counted together, once it is known that they may be kept.


def test_small_calls_are_counted_together_once_the_answer_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    place = StandIn(monkeypatch)
    with place.on(), torch.no_grad():
        attachment = Attachment(place.move(model_of("qwen3_moe")), verify=False)
        tables = zeros(attachment)
        attachment.set_statistics(tables, lag=100)
        ids = place.put(tokens(1, 2))
        place.devices.late = True
        for call in range(1, 4):  # the answer is on its way: router by router
            attachment.model(input_ids=ids)
            assert place.host(tables[0].scalar("tokens")).item() == 2 * call
        place.devices.deliver()
        attachment.model(input_ids=ids)
        assert place.host(tables[0].scalar("tokens")).item() == 8
        for _ in range(3):
            attachment.model(input_ids=ids)
        assert place.host(tables[0].scalar("tokens")).item() == 8
        attachment.flush()
        assert [place.host(table.scalar("tokens")).item() for table in tables] == [14] * 3


def test_answers_and_uploads(place: Place) -> None:
    with place.on():
        answers = Answers(place.put(torch.tensor([True, False, True])))
        while (found := answers.read()) is None:
            pass
        assert found == [True, False, True]
        there = upload(torch.arange(3), place.first)
        assert there.device == place.first
        assert upload(there, place.first) is there
        assert place.host(upload(there, place.second)).tolist() == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------------
# Several devices.


def spread_over_two(place: Place, model: nn.Module) -> nn.Module:
    """The last layer and what follows on the second device, as a device map does it."""
    inner = model.model
    place.move(model, place.first)

    def bring(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def there(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(there(part) for part in value)
            if not isinstance(value, Tensor):
                return value
            return place.put(place.host(value) if isinstance(place, StandIn) else value, place.second)

        return tuple(map(there, args)), {name: there(value) for name, value in kwargs.items()}

    for module in (inner.layers[-1], inner.norm, model.lm_head):
        place.move(module, place.second)
        module.register_forward_pre_hook(bring, with_kwargs=True)
    return model


@pytest.mark.parametrize("plan", [PLAN, AROUND, REPLAY], ids=["rows", "around", "replay"])
@pytest.mark.parametrize("engine", ["hook", "fused"])
def test_layers_on_two_devices(away: Place, engine: str, plan: mr.Plan) -> None:
    with torch.no_grad():
        home = model_of("qwen3_moe")
        expected = mr.attach(home, engine=engine)
        given = inputs("left")
        with expected.steer(plan), expected.record(groups=["x", "y"]) as recorder, recorder.labels(["x", "y", "y"]):
            plain = home.generate(**given, **GREEDY)
        ours = recorder.statistics()
        with away.on():
            model = spread_over_two(away, model_of("qwen3_moe"))
            with away.reading():
                routed = mr.attach(model, engine=engine)
            theirs = routed.record(groups=["x", "y"])
            with away.block(routed.steer(plan), theirs, theirs.labels(["x", "y", "y"])):
                assert [table.device for table in theirs._counting._tables.layers] == [
                    away.first,
                    away.first,
                    away.second,
                ]
                # bringing a table to the CPU waits
                with away.reading() if isinstance(away, Cuda) else contextlib.nullcontext():
                    out = model.generate(**put_all(away, given), **GREEDY)
            with away.reading():
                there = theirs.statistics()
                routed.detach()
    assert torch.equal(away.host(out), plain)
    for plane in ("counts", "natural_counts"):
        assert (ours.token_sum(plane) == there.token_sum(plane)).all()


def test_small_calls_of_layers_on_two_devices_are_counted_together(
    away: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_route import ops

    together, calls = ops.observe_layers, []
    monkeypatch.setattr(ops, "observe_layers", lambda *args, **kw: (calls.append(len(args[0])), together(*args, **kw)))
    with away.on(), torch.no_grad(), away.reading():
        attachment = Attachment(spread_over_two(away, model_of("qwen3_moe")))
        tables = zeros(attachment)
        attachment.set_statistics(tables)
        for _ in range(3):
            attachment.model(input_ids=away.put(tokens(1, 2)), use_cache=False)
            if isinstance(away, Cuda):
                torch.cuda.synchronize()
        assert calls == [2, 1] * 2  # one operator call a device, for each call of the model after the first
        assert [away.host(table.scalar("tokens")).item() for table in tables] == [6, 6, 6]


def test_tables_follow_a_model_that_moves(away: Place) -> None:
    model = model_of("qwen3_moe")
    routed = mr.attach(model)
    with torch.no_grad(), routed.steer(mr.Plan.force_on({0: [1]})):
        with routed.record() as recorder:
            model(**inputs(), use_cache=False)
        with away.on():
            with away.reading():
                away.move(model)
            with away.block(recorder):
                model(**put_all(away, inputs()), use_cache=False)
            with away.reading():
                statistics = recorder.statistics()
                assert {table.device for table in recorder._counting._tables.layers} == {away.first}
    assert (statistics.tokens() == 42).all()
    assert statistics.token_sum("counts")[0, 0, 1] == 42


# ---------------------------------------------------------------------------------------------------------------
# Traces, streams, graphs.


def test_a_trace_of_a_device(place: Place) -> None:
    found = []
    for where in (Place(place.monkeypatch), place):
        with where.on(), torch.no_grad():
            model = where.move(model_of("mixtral"))
            with where.reading():
                routed = mr.attach(model)
            recorder = routed.record(trace=[0, 2])
            with where.block(recorder, recorder.labels("x")):
                model.generate(**put_all(where, inputs("left")), **GREEDY)
            with where.reading():
                found.append(recorder.trace())
                routed.detach()
    home, there = found
    assert len(home) == len(there) == 18 + 12
    assert (home.ids == there.ids).all()
    assert (home.position == there.position).all()
    torch.testing.assert_close(torch.from_numpy(home.weights), torch.from_numpy(there.weights), rtol=1e-3, atol=1e-3)


def test_another_stream(place: Place) -> None:
    def work(where: Place, routed: mr.RoutedModel) -> Tensor:
        given = put_all(where, inputs("left"))
        recorder = routed.record(groups=["x", "y"], sequences=True)
        with where.block(recorder, recorder.labels(["x", "y", "y"], items=[1, 2, 3])), where.other_stream():
            return routed.model.generate(**given, **GREEDY)

    compared(place, "qwen3_moe", work)


STEPS = 6


def decode(place: Place, routed: mr.RoutedModel, graph: bool, plan: mr.Plan | None) -> mr.RoutingStatistics:
    """A prefill and decode steps of fixed tokens with a static cache, one by one or as replays of a graph."""
    from transformers import StaticCache

    model = routed.model
    feed = place.put(tokens(2, STEPS, seed=5))
    step_ids = place.put(torch.zeros(2, 1, dtype=torch.long))
    cache = StaticCache(config=model.config, max_cache_len=32)

    def step() -> None:
        model(input_ids=step_ids, past_key_values=cache)

    recorder = routed.record(groups=["x", "y"])
    steered = contextlib.nullcontext() if plan is None else routed.steer(plan)
    with place.block(steered, recorder, recorder.labels(["x", "y"])), place.other_stream():
        model(input_ids=place.put(tokens(2, 4)), past_key_values=cache)
        replay = step
        for at in range(STEPS):
            step_ids.copy_(feed[:, at : at + 1])
            if graph and at == 2:  # what was run once may be captured; capturing runs nothing
                replay = place.graph(step)
            replay()
    with place.reading():
        return recorder.statistics()


TWO = mr.Plan.replay(RECORDED[:2], layers=[0, 1])


@pytest.mark.parametrize("plan", [None, PLAN, AROUND, TWO], ids=["recorded", "steered", "around", "replay"])
def test_a_graph_of_a_decode_step_counts_every_replay(away: Place, plan: mr.Plan | None) -> None:
    with away.on(), torch.no_grad():
        model = away.move(model_of("qwen3_moe"))
        with away.reading():
            routed = mr.attach(model)
        plain, replayed = decode(away, routed, False, plan), decode(away, routed, True, plan)
        routed.detach()
    assert (plain.tokens("decode") == STEPS).all()
    assert (replayed.tokens("decode") == STEPS).all()
    assert (plain.token_sum("counts") == replayed.token_sum("counts")).all()
    assert plain.metadata["captured_calls"] == 0
    assert replayed.metadata["captured_calls"] == 1


# ---------------------------------------------------------------------------------------------------------------
# Experts of few slots: the streamed path.


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots of every call of the experts that took the streamed path."""
    seen: list[int] = []
    real = ops.expert_rows

    def counting(x: Tensor, slots: ops.Dispatch, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(slots.inverse.numel())
        return real(x, slots, *args, **kwargs)

    monkeypatch.setattr(ops, "expert_rows", counting)
    monkeypatch.setattr(layout, "PLAIN", (*layout.PLAIN, OnDevice))  # a device that is not there has its own type
    return seen


@pytest.mark.parametrize("engine", ["hook", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_few_slots_are_streamed_on_a_device(away: Place, name: str, engine: str, streamed: list[int]) -> None:
    """In prefill and decode, recorded and steered; the CPU, which `compared` holds it against, takes the other path."""

    def work(where: Place, routed: mr.RoutedModel) -> Tensor:
        recorder = routed.record(groups=["x", "y"])
        with routed.steer(PLAN), where.block(recorder, recorder.labels(["x", "y", "y"])):
            return routed.model.generate(
                **put_all(where, inputs("left")), **GREEDY | {"cache_implementation": "static"}
            )

    compared(away, name, work, engine=engine, experts_implementation="moe_route")
    assert max(streamed) == 7 * min(streamed)  # prompts of 7 tokens, then steps


def test_many_slots_are_not_streamed_on_a_device(away: Place, streamed: list[int]) -> None:
    with away.on(), torch.no_grad():
        model = away.move(model_of("qwen3_moe"))
        with away.reading():
            routed = mr.attach(model, experts_implementation="moe_route")
        routed.model(**put_all(away, inputs(length=44)))
        assert not streamed
        with away.reading():
            routed.detach()


@pytest.mark.parametrize("plan", [None, PLAN], ids=["plain", "steered"])
def test_a_graph_of_a_decode_step_holds_streamed_experts(
    away: Place, plan: mr.Plan | None, streamed: list[int]
) -> None:
    with away.on(), torch.no_grad():
        model = away.move(model_of("qwen3_moe"))
        with away.reading():
            routed = mr.attach(model, experts_implementation="moe_route")
        plain, calls = decode(away, routed, False, plan), len(streamed)
        replayed = decode(away, routed, True, plan)
        with away.reading():
            routed.detach()
    assert 0 < len(streamed) - calls < calls  # replays run no Python
    assert (plain.token_sum("counts") == replayed.token_sum("counts")).all()
    assert replayed.metadata["captured_calls"] == 1


def test_what_a_graph_cannot_hold_is_refused(away: Place) -> None:
    with away.on(), torch.no_grad():
        model = away.move(model_of("qwen3_moe"))
        with away.reading():
            routed = mr.attach(model)
        given = put_all(away, inputs())
        recorder = routed.record(groups=["x", "y"])
        with away.block(recorder, recorder.labels(["x", "y", "y"])):
            with pytest.raises(CaptureRefusedError, match="run the same step once before the capture"):
                away.graph(lambda: model(**given, use_cache=False))
            for _ in range(2):
                model(**given, use_cache=False)
            away.graph(lambda: model(**given, use_cache=False))
        fixed = pytest.raises(RecordingError, match="a captured CUDA graph adds to them where they are")
        with away.reading(), fixed, recorder, recorder.labels(["x"] * 12):
            model(**put_all(away, inputs(batch=12)), use_cache=False)
        recorder = routed.record(trace=True)
        with away.block(recorder, recorder.labels(["all"] * 3)):
            model(**given, use_cache=False)
            with pytest.raises(RecordingError, match="trace= is read call by call"):
                away.graph(lambda: model(**given, use_cache=False))


def test_compiled_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model = model_of("qwen3_moe", num_hidden_layers=2).to(device)
    routed = mr.attach(model)
    given = {"input_ids": tokens().to(device), "use_cache": False}
    with torch.no_grad():
        plain = model(**given).logits
        model.forward = torch.compile(model.forward, backend="aot_eager")
        with routed.steer(mr.Plan.force_on({1: [3]})), routed.record() as recorder:
            for _ in range(3):
                steered = model(**given).logits
    statistics = recorder.statistics()
    assert (statistics.tokens() == 42).all()
    assert statistics.token_sum("counts")[0, 1, 3] == 42
    assert not torch.allclose(plain, steered)


# ---------------------------------------------------------------------------------------------------------------
# The length of a static cache, which lies on the device.


@pytest.mark.parametrize("inference", [False, True])
def test_the_length_of_a_static_cache_is_followed(away: Place, inference: bool) -> None:
    from transformers import StaticCache

    mode = torch.inference_mode if inference else torch.no_grad
    with away.on(), mode():
        model = away.move(model_of("qwen3_moe"))
        attachment = Attachment(model, verify=False)
        seen: list[int] = []
        attachment.listener.after_call = lambda call: seen.append(call.past_length)
        cache = StaticCache(config=model.config, max_cache_len=64)

        def call(length: int) -> None:
            model(input_ids=away.put(tokens(1, length)), past_key_values=cache)

        attachment.set_statistics(zeros(attachment))
        for length in (4, 1, 1):
            call(length)
        with away.reading() if inference else contextlib.nullcontext():  # without a version counter it is read
            call(3)
        call(1)
        attachment.set_statistics(None)
        call(2)  # not seen
        attachment.set_statistics(zeros(attachment))
        with away.reading():
            call(1)
        call(1)
        cache.reset()
        with away.reading():
            call(5)
        call(1)
    assert seen == [0, 4, 5, 6, 9, 12, 13, 0, 5]


def test_steering_tables_that_lie_elsewhere_are_brought_once(away: Place) -> None:
    with away.on(), torch.no_grad():
        attachment = Attachment(away.move(model_of("olmoe")), verify=False)
        attachment.listener.labels_of = lambda call: Labels(steering_row=0)
        attachment.set_steering([SteeringTables(1, 8, bias=torch.randn(1, 8))] * 3)
        attachment.model(input_ids=away.put(tokens()))
        first = [engine.steering for engine in attachment._engines]
        attachment.model(input_ids=away.put(tokens()))
    assert {table.device for table in first} == {away.first}
    assert all(table is engine.steering for table, engine in zip(first, attachment._engines, strict=True))
    assert first[0].packed[0].device == away.first
