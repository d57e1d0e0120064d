"""SGLang's routing, scheduler and runner from its wheel, hooked, beside transformers: the same choice for every token.

A stand-in takes the place of the model: its layers are SGLang's ``TopK`` alone, which get the logits that the shipped
model had in transformers. Requests run in chunks, mixed with the decoding of others, as SGLang lays them out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from harness.vllm_demo import GROUPS, PLAN, Answers, Row, assert_same, in_transformers
from torch import nn

import moe_route as mr
from moe_route.integrations.serving.options import EngineNotSupportedError, Options
from moe_route.integrations.sglang import seams, sites
from moe_route.integrations.sglang.options import SEAMS, refuse_engine
from moe_route.recording.statistics import RecordingError, RoutingStatistics
from moe_route.recording.trace import Trace

BUDGET = 24  # tokens of prompts in a step


class Ran(NamedTuple):
    """What transformers did: statistics and texts; by row [layer, token, ...] what routers got and what they gave."""

    answers: Answers
    logits: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]


def transformers_ran(model: Any, rows: list[Row], plan: mr.Plan | None) -> Ran:
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    parts: dict[str, list[list[torch.Tensor]]] = {}

    def keep(name: str, layer: int, value: torch.Tensor) -> None:
        parts.setdefault(name, [[] for _ in gates])[layer].append(value.detach().clone())

    handles, ran = [], []
    for layer, gate in enumerate(gates):
        handles.append(
            gate.register_forward_pre_hook(
                lambda module, args, layer=layer: keep(
                    "logits", layer, nn.functional.linear(args[0].reshape(-1, module.weight.shape[1]), module.weight)
                )
            )
        )
    texts = []
    try:
        answers = in_transformers(model, rows, plan)
        lengths = [len(row.ids) + len(text) - 1 for row, text in zip(rows, answers.texts, strict=True)]
        logits = torch.stack([torch.cat(layer) for layer in parts["logits"]])
        ran = list(logits[:, -sum(lengths) :].split(lengths, dim=1))
        texts = answers.texts
    finally:
        for handle in handles:
            handle.remove()
    ids, weights = [], []
    with mr.attach(model) as routed, routed.steer(plan) if plan else nullcontext():
        with routed.record(groups=GROUPS, trace=True) as recorder, torch.no_grad():
            for row, text in zip(rows, texts, strict=True):
                whole = torch.tensor([row.ids])
                with recorder.labels(groups=row.group, items=[row.item]):
                    model.generate(
                        whole,
                        attention_mask=torch.ones_like(whole),
                        max_new_tokens=len(text),
                        do_sample=False,
                        pad_token_id=0,
                    )
        trace = recorder.trace()
    for number in range(len(rows)):
        mine = np.flatnonzero(trace.sequence == number)
        mine = mine[np.argsort(trace.position[mine])]
        ids.append(torch.from_numpy(trace.ids[mine]))
        weights.append(torch.from_numpy(trace.weights[mine]))
    return Ran(answers, ran, ids, weights)


@pytest.fixture(scope="module")
def ran(demo: Any, rows: list[Row]) -> dict[str, Ran]:
    return {"free": transformers_ran(demo[0], rows, None), "steered": transformers_ran(demo[0], rows, PLAN)}


class Engine:
    """A scheduler and a runner of SGLang without a model behind them."""

    def __init__(self, sglang: Any, model: Any):
        self.sglang = sglang
        served = type(type(model).__name__, (nn.Module,), {})()
        for name, gate in [(name, gate) for name, gate in model.named_modules() if name.endswith(".gate")]:
            at = served
            for part in name.split(".")[:-1]:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.gate = nn.Linear(gate.weight.shape[1], gate.weight.shape[0], bias=False)
            standard = sglang.topk.TopKOutputFormat.STANDARD
            renormalize = model.config.norm_topk_prob
            at.topk = sglang.topk.TopK(
                model.config.num_experts_per_tok,
                layer_id=int(name.split(".")[2]),
                renormalize=renormalize,
                output_format=standard,
            )
            at.topk.topk_config.torch_native = True
        self.topks = [module for module in served.modules() if isinstance(module, sglang.topk.TopK)]
        config = SimpleNamespace(hf_config=model.config, model_path="demo", context_len=128)
        self.runner = MagicMock(model=served, model_config=config, is_draft_worker=False, max_running_requests=16)
        self.runner._forward_raw.side_effect = self._forward
        self.scheduler = MagicMock(waiting_queue=[], chunked_req=None)
        self.scheduler.collect_inflight_reqs.side_effect = lambda: set(self.running)
        self.running: list[Any] = []
        sglang.runner.init_cuda_graphs(self.runner)
        sglang.scheduler.init_all_cuda_graphs(self.scheduler)

    @property
    def session(self) -> seams.RunnerSession:
        assert seams._session is not None
        return seams._session

    def request(self, name: str, ids: list[int], **arguments: Any) -> Any:
        given = {f"moe_route_{key}": value for key, value in arguments.items()}
        params = self.sglang.params(custom_params=given, max_new_tokens=64)
        return self.sglang.scheduler._create_generation_req(
            self.scheduler, None, name, "", ids, params, vocab_size=1 << 20
        )

    def step(self, parts: list[tuple[Any, int, int]]) -> None:
        """Run tokens ``start`` to before ``end`` of requests, as one batch; a batch of single tokens decodes."""
        mode = self.sglang.forward.ForwardMode
        batch = MagicMock(reqs=[request for request, _, _ in parts])
        self.sglang.scheduler.run_batch(self.scheduler, batch)
        self.parts = parts
        decodes = all(end - start == 1 and start >= len(one.origin_input_ids) for one, start, end in parts)
        ids = [[*one.origin_input_ids, *one.output_ids][start:end] for one, start, end in parts]
        forward = self.sglang.forward.ForwardBatch(
            forward_mode=mode.DECODE if decodes else mode.MIXED,
            batch_size=len(parts),
            input_ids=torch.tensor([one for part in ids for one in part], dtype=torch.int32),
            req_pool_indices=None,
            seq_lens=None,
            out_cache_loc=None,
            seq_lens_sum=0,
            seq_lens_cpu=torch.tensor([end for _, _, end in parts]),
            extend_prefix_lens_cpu=None if decodes else [start for _, start, _ in parts],
            extend_seq_lens_cpu=None if decodes else [end - start for _, start, end in parts],
            rids=[one.rid for one, _, _ in parts],
        )
        self.sglang.runner.forward(self.runner, forward)

    def end(self, *requests: Any, aborted: bool = False) -> None:
        for one in requests:
            kind = self.sglang.batches.FINISH_ABORT if aborted else self.sglang.batches.FINISH_LENGTH
            one.finished_reason = kind() if aborted else kind(length=1)
            self.running.remove(one)
        self.sglang.scheduler.process_batch_result(self.scheduler, MagicMock(reqs=list(requests)), None)

    def _forward(self, *args: Any) -> Any:
        pad = 2  # rows that a graph would add
        for layer, topk in enumerate(self.topks):
            logits = torch.cat([self.logits[one.rid][layer, start:end] for one, start, end in self.parts])
            logits = torch.cat([logits, logits[:1].expand(pad, -1)])
            chosen = topk.forward_native(torch.zeros(len(logits), 1), logits)
            places = np.cumsum([0, *(end - start for _, start, end in self.parts)])
            for (one, start, _), first, last in zip(self.parts, places[:-1], places[1:], strict=True):
                for place in range(first, last):
                    key = one.rid, start + int(place - first), layer
                    self.chosen[key] = chosen.topk_ids[place].clone(), chosen.topk_weights[place].clone()
        return MagicMock()

    def serve(self, rows: list[Row], ran: Ran, **arguments: Any) -> list[list[int]]:
        """Run rows to their end: prompts in chunks of all that fits, while others decode."""
        self.logits = {str(number): logits for number, logits in enumerate(ran.logits)}
        self.chosen: dict[tuple[str, int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        requests = [
            self.request(str(number), row.ids, group=row.group, item=row.item, **arguments)
            for number, row in enumerate(rows)
        ]
        done = dict.fromkeys(range(len(rows)), 0)
        while done:
            room, parts = BUDGET, []
            for number in list(done):
                request, start = requests[number], done[number]
                tokens = min(len(rows[number].ids) - start, room) if start < len(rows[number].ids) else 1
                if tokens <= 0 or len(parts) == 8:
                    break
                room -= tokens if start < len(rows[number].ids) else 0
                parts.append((request, start, start + tokens))
                if request not in self.running:
                    self.running.append(request)
            self.step(parts)
            ended = []
            for request, _, end in parts:
                number, text = int(request.rid), ran.answers.texts[int(request.rid)]
                done[number] = end
                if end >= len(rows[number].ids):
                    request.output_ids.append(text[end - len(rows[number].ids)])
                if len(request.output_ids) == len(text):
                    ended.append(request)
                    del done[number]
            self.end(*ended)
        return [list(request.output_ids) for request in requests]

    def verb(self, verb: str, **given: Any) -> None:
        getattr(self.scheduler, f"moe_route_{verb}")(**given)

    def statistics(self, folder: Path, **given: Any) -> RoutingStatistics:
        self.verb("statistics", path=str(folder / "s.safetensors"), **given)
        return RoutingStatistics.load(folder / "s.safetensors", partial=given.get("partial", False))


@pytest.fixture
def engine(sglang: Any, demo: Any) -> Iterator[Engine]:
    yield Engine(sglang, demo[0])
    seams._session = None


def plan_file(plan: mr.Plan, folder: Path) -> str:
    plan.save(folder / "plan.safetensors")
    return str(folder / "plan.safetensors")


@pytest.mark.parametrize("name", ["free", "steered"])
def test_every_token_is_routed_and_counted_as_in_transformers(
    engine: Engine, rows: list[Row], ran: dict[str, Ran], name: str, tmp_path: Path
) -> None:
    if name == "steered":
        engine.verb("steer", plan=plan_file(PLAN, tmp_path))
    engine.verb("record")
    texts = engine.serve(rows, ran[name])
    found = engine.statistics(tmp_path)
    assert_same(Answers(found, texts), ran[name].answers)
    assert found.metadata["engines"] == ["sglang"]
    assert found.metadata["ungrouped_requests"] == found.metadata["aborted_requests"] == 0
    for (row, position, layer), (ids, weights) in engine.chosen.items():
        expected = ran[name].ids[int(row)][position, layer], ran[name].weights[int(row)][position, layer]
        order, other = ids.argsort(), expected[0].argsort()
        assert ids[order].tolist() == expected[0][other].tolist(), (row, position, layer)
        torch.testing.assert_close(weights[order].half(), expected[1][other].half(), atol=1e-3, rtol=1e-3)
    engine.verb("trace", path=str(tmp_path / "t.safetensors"))
    trace = Trace.load(tmp_path / "t.safetensors")
    assert len(trace.token) == found.tokens().max(axis=1).sum()
    assert trace.token.min() >= 0


def test_a_request_chooses_its_plan_and_shares_cached_prefixes_with_its_like(engine: Engine, tmp_path: Path) -> None:
    engine.verb("steer", plan=plan_file(PLAN, tmp_path), name="soft")

    def key(**arguments: Any) -> Any:
        return engine.request("r", [1, 2, 3], **arguments).extra_key

    group = "eng_Latn"
    assert key(group=group) is key(group="free", plan="soft") is None  # nothing steers them
    steered = key(group=group, plan="soft")
    assert steered not in (None, key(group="rus_Cyrl", plan="soft"))
    assert steered == key(group=group, plan="soft", item="other")
    engine.verb("record")
    other = engine.request("s", [1, 2, 3], group=group, plan="soft").extra_key
    assert len({key(group=group), key(group=group, plan="soft"), other, steered}) == 4  # each routes its whole prompt
    engine.verb("pause")
    engine.running = [engine.request("t", [5, 6], group=group)]
    engine.logits = {"t": torch.zeros(len(engine.topks), 2, 16)}
    engine.chosen = {}
    engine.step([(engine.running[0], 0, 2)])
    waiting = engine.request("w", [1, 2, 3], group=group, plan="soft")
    engine.scheduler.waiting_queue.append(waiting)
    engine.verb("steer", plan=None, name="soft")
    assert waiting.extra_key not in (None, steered)  # blocks of the running one hold what two plans made


def test_requests_that_are_given_up_and_those_without_a_group_are_in_the_books(engine: Engine, tmp_path: Path) -> None:
    engine.verb("record")
    names = ("a", "b", "c")
    engine.logits = {name: torch.randn(len(engine.topks), 4, 16) for name in names}
    engine.chosen = {}
    first = engine.request("a", [1, 2, 3], group="eng_Latn")
    second = engine.request("b", [1, 2], group="eng_Latn")
    third = engine.request("c", [1, 2])
    engine.running = [first, second, third]
    engine.step([(first, 0, 3), (second, 0, 2), (third, 0, 2)])
    engine.end(first, aborted=True)
    engine.running.remove(second)  # taken out of the queue while it waited, without a word
    found = engine.statistics(tmp_path)
    meta = found.metadata
    assert (meta["aborted_requests"], meta["ungrouped_requests"], meta["ungrouped_tokens"]) == (2, 1, 2)
    assert meta["running_sequences"] == 0
    assert found.tokens()[:, 0].sum() == 5
    assert found.sequences().sum() == 0


def test_a_router_that_is_gone_round_shows(engine: Engine, tmp_path: Path) -> None:
    engine.verb("record")
    del engine.topks[2].topk_config.moe_route_site
    engine.running = [engine.request("a", [1, 2, 3], group="eng_Latn")]
    engine.logits, engine.chosen = {"a": torch.randn(len(engine.topks), 3, 16)}, {}
    engine.step([(engine.running[0], 0, 3)])
    with pytest.raises(RecordingError, match="never reached"):
        engine.statistics(tmp_path)
    law = engine.statistics(tmp_path, partial=True).metadata["unbalanced"]
    assert [(one["expected"], one["counted"]) for one in law.values()] == [(3, 0)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"moe_route_group": "xyz"}, "none of the groups"),
        ({"moe_route_gruop": "free"}, "moe_route_group"),
        ({"moe_route_group": "free", "moe_route_plan": "other"}, "none of the plans"),
    ],
)
def test_a_wrong_request_is_refused_before_the_scheduler(sglang: Any, arguments: dict[str, Any], words: str) -> None:
    body = SimpleNamespace(sampling_params={"custom_params": arguments})
    with pytest.raises(ValueError, match=words):
        sglang.manager._validate_one_request(MagicMock(), body, [1])


def test_hooks_that_did_not_take_are_named(sglang: Any) -> None:
    patched = sglang.registry.HookRegistry._patched
    assert not seams.missing_hooks(patched)
    place = "sglang.srt.managers.scheduler.Scheduler.run_batch"
    assert seams.missing_hooks(patched - {place}) == [f"{place} is not wrapped"]


def test_a_hook_that_fails_ends_the_process(sglang: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang itself only logs it."""
    registry = sglang.registry.HookRegistry
    place = next(iter(SEAMS))
    monkeypatch.setattr(registry, "_patched", set(registry._patched) - {place})
    monkeypatch.setattr(registry, "_apply_target", MagicMock(side_effect=RuntimeError("no")))
    with pytest.raises(SystemExit, match="_post_process_topk_ids is not wrapped"):
        registry.apply_hooks()


def test_options_that_are_wrong_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_route.integrations import sglang as plugin

    for given, words in (("{", "not JSON"), ('{"gruops": []}', "groups"), ('{"save": "x"}', "'save'")):
        monkeypatch.setenv("MOE_ROUTE_SGLANG", given)
        with pytest.raises(SystemExit, match=words):
            plugin.register()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_format": SimpleNamespace(name="BYPASSED")}, "BYPASSED top-k.*--moe-runner-backend triton"),
        ({"output_format": SimpleNamespace(name="TRITON_KERNEL")}, "TRITON_KERNEL top-k"),
        ({"custom_routing_function": max}, r"of its own \(max\)"),
    ],
)
def test_routers_that_cannot_be_followed_are_refused(engine: Engine, change: dict[str, Any], words: str) -> None:
    config = engine.topks[1].topk_config
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(EngineNotSupportedError, match=words):
        sites.find_sites(engine.runner.model, "qwen3_moe")


def test_a_router_that_does_not_route_as_its_configuration_says_is_refused(engine: Engine) -> None:
    site = engine.session.sites[0]
    site.module.topk_config.renormalize = not site.module.topk_config.renormalize
    with pytest.raises(EngineNotSupportedError, match="weights differ"):
        sites.check(site)


def test_a_choice_made_by_a_kernel_of_the_gate_is_refused(engine: Engine) -> None:
    with pytest.raises(EngineNotSupportedError, match="layer 3 chooses"):
        engine.sglang.topk.build_precomputed_topk_output(None, None, None, layer_id=3)


@pytest.mark.parametrize(
    ("where", "name", "value", "words"),
    [
        ("schedule", "disable_overlap_schedule", False, "--disable-overlap-schedule"),
        ("spec", "speculative_algorithm", "EAGLE", "--speculative-algorithm"),
        ("parallel", "pp_size", 2, "--pp-size"),
        ("parallel", "dp_size", 2, "--dp-size"),
        ("disagg", "disaggregation_mode", "prefill", "--disaggregation-mode"),
    ],
)
def test_engines_that_would_count_wrongly_are_refused(where: str, name: str, value: Any, words: str) -> None:
    given = {
        "schedule": {"disable_overlap_schedule": True},
        "spec": {"speculative_algorithm": None},
        "parallel": {"pp_size": 1, "dp_size": 1, "attn_cp_size": 1, "dcp_size": 1},
        "disagg": {"disaggregation_mode": "null"},
    }
    run = SimpleNamespace(
        overlap=SimpleNamespace(enable_two_batch_overlap=False),
        dllm=SimpleNamespace(dllm_algorithm=None),
        moe=SimpleNamespace(elastic_ep_backend=None),
    )

    def runtime() -> Any:
        bags = {f"get_{key}": lambda bag=bag: SimpleNamespace(**bag) for key, bag in given.items()}
        return SimpleNamespace(**bags, get_exec=lambda: run)

    refuse_engine(runtime())
    given[where][name] = value
    with pytest.raises(EngineNotSupportedError, match=words):
        refuse_engine(runtime())


def test_drafts_are_left_alone(engine: Engine) -> None:
    former = engine.session
    engine.sglang.runner.init_cuda_graphs(MagicMock(is_draft_worker=True))
    assert engine.session is former
    assert Options(groups=tuple(GROUPS)).groups == former.options.groups
