"""What a whole model costs with moe-route, and with the tools that a user would take instead.

The model has the layers of Qwen3-30B-A3B, in bfloat16 with random weights, but only `LAYERS` of them. There is one copy
of it: every contender is installed before its calls and taken out after them. nnsight and TransformerLens are measured
where they are installed; where not, the results say so.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

import moe_route as mr
from bench.cpu.recording import WINDOW, ByHand, Decoding, race_in_hooks
from moe_route.bench.results import Fact, Measured, Target, rows
from moe_route.bench.timing import Contender, Effort, Race, race
from moe_route.patching.deferred import MOST_TOKENS

SECTION = "Whole models"
LAYERS = 4
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 8192,
}
QUICK = {"hidden_size": 256, "moe_intermediate_size": 64, "vocab_size": 512}
STOCK = "stock"
EVERYTHING = "recording everything"
FAST = "moe_route experts"
FAST_BOTH = "moe_route experts, recording + steering"
# Goals: hooks of a recording per step, FAST_BOTH against stock at decode, FAST against stock at prefill.
SHARE, SPEED, PREFILL_SPEED = 0.004, 1.5, 1.1

Install = Callable[[], AbstractContextManager[Contender]]
"""Enters a contender: yields what runs one call of the case."""


def model_of(layers: int = LAYERS, **changes: int) -> Any:
    """A random Qwen3-MoE in bfloat16 with the layers of Qwen3-30B-A3B: 1.2 GB for each."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": layers, **changes}
    # TransformerLens finds the architecture by its name
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, dtype=torch.bfloat16, architectures=["Qwen3MoeForCausalLM"])
    with torch.device("meta"):
        empty: Any = Qwen3MoeForCausalLM(config)
    model = empty.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config)  # its frequencies are no parameters
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator).mul_(0.02).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1)
            continue
        flat, at = parameter.view(-1), int(torch.randint(0, len(noise), (), generator=generator))
        for start in range(0, len(flat), len(noise)):  # the same noise from another place: drawing 2.4 G takes minutes
            part = flat[start : start + len(noise)]
            part.copy_(noise.roll(at + 7919 * start)[: len(part)])
    return model


@dataclass(frozen=True)
class Case:
    """Calls of one kind: `step` makes one, with further arguments for the model; `calls` of them are timed together."""

    title: str
    model: Any
    calls: int
    step: Callable[..., torch.Tensor]
    inputs: Callable[[], dict[str, Any]]
    after: Callable[[], None]  # takes back what a call with `inputs` left in the cache
    decoding: Decoding | None = None


def decode(model: Any, batch: int) -> Case:
    """Decode steps after `PAST` tokens; as many as a recorder counts together."""
    decoding = Decoding(model, batch)
    calls = min(WINDOW, MOST_TOKENS // batch)
    back = partial(decoding.cache.crop, -1)
    return Case(f"decode, batch {batch}", model, calls, decoding.step, decoding.inputs, back, decoding)


def prefill(model: Any, length: int) -> Case:
    """One call on a prompt without a cache."""
    generator = torch.Generator().manual_seed(2)
    prompts = cycle(torch.randint(0, model.config.vocab_size, (8, 1, length), generator=generator))

    def inputs() -> dict[str, Any]:
        return {"input_ids": next(prompts), "use_cache": False}

    def step(_: int, **arguments: Any) -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs(), **arguments).logits

    return Case(f"prefill, {length} tokens", model, 1, step, inputs, lambda: None)


class ProcessTime:
    """Processor time of all threads of the process, because nnsight works in threads of its own."""

    name = "processor time of the process"

    def timer(self, contender: Contender) -> Callable[[range], float]:
        def timed(turns: range) -> float:
            start = time.process_time()
            for each in turns:
                contender(each)
            return time.process_time() - start

        return timed


# ---- contenders


def plan_of(model: Any) -> mr.Plan:
    """A soft push of two experts in every layer."""
    layers = range(model.config.num_hidden_layers)
    return mr.Plan.activate({layer: [1, 2] for layer in layers}, strength=0.5)


def ours(case: Case) -> dict[str, Install]:
    """moe-route, from attached only to everything at once."""
    model = case.model
    counts: dict[str, Any] = {"metrics": ["counts"], "entropy": False}
    kinds: dict[str, tuple[str | None, dict[str, Any] | None, bool]] = {
        "attached": (None, None, False),
        "recording counts": (None, counts, False),
        EVERYTHING: (None, {}, False),
        "recording every sequence": (None, {"sequences": True}, False),
        "steering": (None, None, True),
        "recording + steering": (None, {}, True),
        FAST: ("moe_route", None, False),
        FAST_BOTH: ("moe_route", {}, True),
    }

    def installing(experts: Any, options: dict[str, Any] | None, steers: bool) -> Install:
        @contextmanager
        def install() -> Iterator[Contender]:
            with ExitStack() as stack:
                routed = stack.enter_context(mr.attach(model, verify=False, experts_implementation=experts))
                if steers:
                    stack.enter_context(routed.steer(plan_of(model)))
                if options is not None:
                    recorder = stack.enter_context(routed.record(groups=["text"], **options))
                    stack.enter_context(recorder.labels(groups="text"))
                yield case.step

        return install

    return {name: installing(*kind) for name, kind in kinds.items()}


def others(case: Case) -> dict[str, Install]:
    """What torch and transformers offer: hooks written by hand, and the router logits that the model returns."""

    @contextmanager
    def by_hand() -> Iterator[Contender]:
        with ByHand(case).recording():
            yield case.step

    @contextmanager
    def logits() -> Iterator[Contender]:
        plain = _attributes(case.model)
        try:
            yield lambda turn: case.step(turn, output_router_logits=True)
        finally:
            _set_attributes(plain, plain)  # transformers leaves the hooks of its first such call on the model

    return {"hooks by hand": by_hand, "output_router_logits=True": logits}


PEERS = ("nnsight", "transformer-lens")


def peers(case: Case) -> tuple[dict[str, Install], list[str]]:
    """nnsight and TransformerLens, and why one of them is missing."""
    found: dict[str, Install] = {}
    missing = []
    for name, making in zip(PEERS, (_nnsight, _transformer_lens), strict=True):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(f"{name} is not installed here, and was not measured")
            continue
        try:
            installed = _Restored(case.model, making)
            with installed() as run:
                run(case)
            found[f"{name} {version}"] = _for_case(installed, case)
        except Exception as error:  # whatever another library raises is the answer to the question
            missing.append(f"{name} {version} cannot run this case: {type(error).__name__}: {str(error)[:200]}")
    return found, missing


def _for_case(installed: _Restored, case: Case) -> Install:
    @contextmanager
    def install() -> Iterator[Contender]:
        with installed() as run:
            yield lambda _: run(case)

    return install


def _nnsight(model: Any) -> Callable[[Case], object]:
    """A trace that saves the output of every router: logits, weights and ids."""
    import nnsight

    wrapped = nnsight.NNsight(model)

    def run(case: Case) -> object:
        given = case.inputs()
        with torch.inference_mode(), wrapped.trace(**given):
            saved = nnsight.save([layer.mlp.gate.output for layer in wrapped.model.layers])
        if len(saved) != model.config.num_hidden_layers:
            raise RuntimeError(f"the trace has the outputs of {len(saved)} routers")
        case.after()
        return saved

    return run


def _transformer_lens(model: Any) -> Callable[[Case], object]:
    """A TransformerBridge whose cache keeps scores, weights and ids of every router, and nothing else."""
    from transformer_lens.model_bridge import TransformerBridge

    from moe_route.data import load_demo_model

    tokenizer = load_demo_model()[1]  # it asks for one, and is given none of this model's own
    bridge = TransformerBridge.boot_transformers(
        "Qwen/Qwen3-30B-A3B", hf_model=model, tokenizer=tokenizer, dtype=torch.bfloat16
    )
    wanted = ("gate.hook_out", "gate.hook_expert_weights", "gate.hook_expert_indices")

    def run(case: Case) -> object:
        given = case.inputs()
        ids = given.pop("input_ids")
        with torch.inference_mode():
            _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith(wanted), **given)
        if len(cache) != len(wanted) * model.config.num_hidden_layers:
            raise RuntimeError(f"the cache has {len(cache)} entries: {', '.join(cache)}")
        case.after()
        return cache

    return run


class _Restored:
    """A library that rebuilds the model in place, once; entered and left by exchanging the modules' attributes."""

    def __init__(self, model: Any, making: Callable[[Any], Callable[[Case], object]]) -> None:
        self.model = model
        plain = _attributes(model)
        self.run = making(model)
        self.changed = _attributes(model)
        self.plain = plain
        _set_attributes(plain, self.changed)

    @contextmanager
    def __call__(self) -> Iterator[Callable[[Case], object]]:
        _set_attributes(self.changed, self.plain)
        try:
            yield self.run
        finally:
            self.changed = _attributes(self.model)
            _set_attributes(self.plain, self.changed)


_Attributes = dict[torch.nn.Module, dict[str, Any]]


def _attributes(model: torch.nn.Module) -> _Attributes:
    """The attributes of every module, with copies of its tables of parameters, children and hooks."""
    return {
        module: {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    }


def _set_attributes(wanted: _Attributes, present: _Attributes) -> None:
    for module in wanted.keys() & present.keys():
        vars(module).clear()
        vars(module).update(
            {name: value.copy() if isinstance(value, dict) else value for name, value in wanted[module].items()}
        )


# ---- measuring


def measure_case(case: Case, rounds: int) -> Measured:
    """Time all contenders of a case in turns, and their memory; then the time inside the hooks of a recording."""
    from_peers, missing = peers(case)
    installs: dict[str, Install] = {STOCK: lambda: nullcontext(case.step), **ours(case), **others(case), **from_peers}
    before = _first_output(case)
    run, peaks = timed(case, installs, rounds)
    if not torch.equal(before, _first_output(case)):
        raise RuntimeError(f"{case.title}: the contenders left the model changed")
    facts = [Fact(SECTION, case.title, f"{name}: memory at its peak", peak, "MB") for name, peak in peaks.items()]
    facts += [Fact(SECTION, case.title, text, 0, "calls") for text in missing]
    peers_of = dict.fromkeys([name for name in installs if name != STOCK], STOCK)
    strangers = [*others(case), *from_peers]
    measured = Measured(rows(SECTION, case.title, run, peers=peers_of, others=strangers), facts)
    if case.decoding is not None:
        return measured + decode_goals(case, case.decoding, run)
    return measured + Measured(targets=[faster(case, run, FAST, PREFILL_SPEED)])


def timed(case: Case, installs: Mapping[str, Install], rounds: int) -> tuple[Race, dict[str, float]]:
    """Seconds a call of each contender, and by how many MB the process's memory rose at its peak (median of rounds).

    A contender is entered, makes one call that is not timed, and then `case.calls` that are. Memory is the kernel's
    high-water mark of resident memory, because it sees every allocator, over what was resident before entering. It is
    read from /proc; elsewhere than on Linux there are no figures of memory.
    """
    running: dict[str, Contender] = {}
    peaks: dict[str, list[float]] = {name: [] for name in installs}

    def entering(name: str) -> Callable[[], AbstractContextManager[object]]:
        @contextmanager
        def entered() -> Iterator[None]:
            before = _settled()
            with installs[name]() as run:
                run(0)
                running[name] = run
                yield
                if before is not None:
                    peaks[name].append(_status("VmHWM") - before)

        return entered

    run = race(
        {name: partial(_run, running, name) for name in installs},
        rounds=rounds,
        warmup=0,
        burst=case.calls,
        around={name: entering(name) for name in installs},
        clock=ProcessTime(),
    )
    return run, {name: statistics.median(risen) for name, risen in peaks.items() if risen}


def _run(running: Mapping[str, Contender], name: str, turn: int) -> object:
    return running[name](turn)


def _settled() -> float | None:
    """Resident memory in MB, after freed memory went back and the mark was reset to it; None where there is no mark."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


def decode_goals(case: Case, decoding: Decoding, run: Race) -> Measured:
    """Time inside the hooks of a recording, which is exact where ratios of steps are noise; and the goals."""
    windows = 3 if case.calls == WINDOW else 2
    inside, hooks = race_in_hooks(decoding, {EVERYTHING: partial(_recording, case)}, windows)
    took = inside.timing(EVERYTHING).median
    share = took / run.timing(STOCK).median
    what = f"{EVERYTHING}: time inside its {hooks[EVERYTHING]} hooks"
    facts = [
        Fact(SECTION, case.title, what, took * 1e6, "us a step"),
        Fact(SECTION, case.title, f"{EVERYTHING}: that as a share of the stock step", 100 * share, "%"),
    ]
    targets = [
        Target(f"{case.title}: time inside the hooks", f"<= {SHARE:.1%} of a step", f"{share:.2%}", share <= SHARE),
        faster(case, run, FAST_BOTH, SPEED),
    ]
    return Measured(facts=facts, targets=targets)


def faster(case: Case, run: Race, name: str, wanted: float) -> Target:
    """The goal that a contender is so many times as fast as the stock model."""
    times = run.ratio(STOCK, name)
    return Target(f"{case.title}: {name}", f">= {wanted} times as fast as stock", f"{times:.2f}", times >= wanted)


@contextmanager
def _recording(case: Case) -> Iterator[None]:
    with ours(case)[EVERYTHING]() as run:
        run(0)
        yield


def _first_output(case: Case) -> torch.Tensor:
    """Logits of the same call each time."""
    with torch.inference_mode():
        return case.model(input_ids=torch.arange(16)[None], use_cache=False).logits.clone()


def measure(effort: Effort) -> Measured:
    """All cases on one model; decoding at batch 1 takes a twentieth of the rounds, and the others half of those."""
    model = model_of(1, **QUICK) if effort.quick else model_of()
    rounds = max(effort.rounds // 20, 2)
    half = max(rounds // 2, 2)
    measured = Measured()
    for case, times in ((decode(model, 1), rounds), (decode(model, 8), half), (prefill(model, 512), half)):
        measured += measure_case(case, times)
    return measured
