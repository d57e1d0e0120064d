"""The fused engine's contract, router by router: given one input it chooses as the model does, unless scores are tied.

Inputs are those that a model gives its routers, and made ones: a gate that hands its logits through, and logits beside
the very number at which the model changes its choice. What a model compares is read from its calls of `topk`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

pytest.importorskip("transformers")

from harness.tiny_models import EVERY, inputs, tiny_model, tokens

import moe_route as mr
from moe_route.base.devices import CaptureRefusedError
from moe_route.modules.intercept import at
from moe_route.patching import Attachment, engine
from moe_route.routers import RouterInfo
from moe_route.routers.adapter import Decision
from moe_route.routers.check import SCORE_UNITS, tie_units, undecided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOVED = ("flex_olmo", "lfm2_moe", "minimax", "mistral4", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe")
"""Their logits were seen to move by more than 6 % in norm in bfloat16: other experts follow from a tie."""
FLOAT32_UNITS, LOW_UNITS = 8, 4  # of weights, as `attach` says
ROWS, SCALES, STEPS = 128, (0.01, 0.3, 1.0, 4.0, 12.0), (-6, -3, -2, -1, 0, 1, 2, 3, 6)


class Compared(TorchFunctionMode):
    """Notes what every `topk` chooses from, and how many."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "topk":
            self.calls.append((args[0].detach().clone(), kwargs["k"] if "k" in kwargs else args[1]))
        return func(*args, **kwargs)


def spacing(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit in the last place of numbers [...] in `dtype`."""
    limits = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(x.abs().double().clamp(min=limits.tiny)))) * limits.eps


def dense(decision: tuple[Tensor, Tensor], experts: int) -> tuple[Tensor, Tensor]:
    """Whether each expert is chosen [T, E], and its weight."""
    weights, ids = decision
    chosen = torch.zeros(len(ids), experts, dtype=torch.bool).scatter_(1, ids.long(), True)
    return chosen, torch.zeros(len(ids), experts, dtype=torch.float64).scatter_(1, ids.long(), weights.double())


class Judge:
    """One router of a model, its own forward, and what the fused engine may do otherwise."""

    def __init__(self, name: str, router: RouterInfo) -> None:
        self.name, self.router, self.own = name, router, type(router.module).forward
        self.differ = 0  # rows with another set of experts

    def decide(self, args: tuple[Tensor, ...]) -> tuple[Decision, list[tuple[Tensor, int]]]:
        """What the model chooses, and among what."""
        with torch.no_grad(), Compared() as compared:
            output = self.own(self.router.module, *args)
        return self.router.adapter.read(args, output), compared.calls

    def compare(self, args: tuple[Tensor, ...]) -> None:
        """Assert that the router, fused now, keeps the contract on this input."""
        (logits, *own), calls = self.decide(args)
        with torch.no_grad():
            fused_logits, *fused = self.router.module.forward(*args)
        assert torch.equal(fused_logits, logits)
        assert fused[0].dtype == own[0].dtype
        (own_chosen, own_weights), (chosen, weights) = (dense(each, self.router.num_experts) for each in (own, fused))
        other = (own_chosen != chosen).any(1)
        self.differ += int(other.sum())
        self.compare_sets(args, logits, calls, other)
        self.compare_weights(logits, own_weights, weights, (own_chosen & ~other[:, None]), own[0].dtype)

    def compare_sets(
        self, args: tuple[Tensor, ...], logits: Tensor, calls: list[tuple[Tensor, int]], other: Tensor
    ) -> None:
        family, bias = self.router.family, self.router.family.bias_of(self.router.module, args)
        limits = torch.finfo(logits.dtype if family.low_precision else torch.float32)
        least = limits.tiny + (0.0 if bias is None else float(bias.abs().max()))  # subnormal numbers share a unit
        apart = torch.full(other.shape, torch.inf, dtype=torch.float64)
        for values, k in calls[-2:]:  # of three, the first takes the two best of each group, whose values alone count
            best = values.double().sort(-1, descending=True).values
            if k < best.shape[-1]:
                pair = best[..., k - 1 : k + 1]
                units = (pair[:, 0] - pair[:, 1]) / (limits.eps * (pair.abs().amax(1) + least))
                apart = torch.minimum(apart, units.where(pair[:, 0] != pair[:, 1], 0.0))
        wrong = other & ~(apart <= tie_units(self.router.spec, bias is not None))
        if bool(wrong.any()):
            token, (values, k) = int(wrong.nonzero()[0]), calls[-1]
            two = values[token].sort(descending=True).values[k - 1 : k + 1].tolist()
            pytest.fail(
                f"{self.name}, layer {self.router.layer}, token {token}: another set of experts, and scores {two} are "
                f"{float(apart[token]):.1f} units apart"
            )

    def compare_weights(self, logits: Tensor, own: Tensor, fused: Tensor, shown: Tensor, dtype: torch.dtype) -> None:
        low, half = self.router.family.low_precision, dtype is not torch.float32
        if low and half:
            shown = shown & (logits > -8).all(1, keepdim=True)  # below, float16 scores are subnormal and lose digits
        error = ((own - fused).abs() / spacing(torch.maximum(own.abs(), fused.abs()), dtype))[shown]
        most = FLOAT32_UNITS if not half else LOW_UNITS if low else 1
        assert float(error.nan_to_num(0.0).max() if len(error) else 0.0) <= most, self.name


def given_inputs(name: str, model: nn.Module, routers: list[RouterInfo]) -> list[tuple[Tensor, ...]]:
    """What the model gives each router in one call."""
    seen: dict[int, tuple[Tensor, ...]] = {}
    hooks = [
        router.module.register_forward_pre_hook(
            lambda _, args, layer=router.layer: seen.setdefault(layer, args) and None
        )
        for router in routers
    ]
    with torch.no_grad():
        model(**inputs(name, model, 8, 32))
    for hook in hooks:
        hook.remove()
    return [seen[router.layer] for router in routers if router.layer in seen]


# ---- logits beside a change of choice


def numbered(x: Tensor) -> Tensor:
    """Floats as integers of the same order, neighbors one apart."""
    bits = x.view(torch.int32 if x.dtype is torch.float32 else torch.int16)
    return torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits.long(), bits.long())


def unnumbered(number: Tensor, dtype: torch.dtype) -> Tensor:
    kind = torch.int32 if dtype is torch.float32 else torch.int16
    return torch.where(number < 0, torch.iinfo(kind).min - number, number).to(kind).view(dtype)


def handed_through(router: RouterInfo) -> tuple[Callable[[Tensor], Tensor], torch.dtype]:
    """Make a gate hand its input through: returns hidden states of logits, and the dtype of logits it can be given."""
    gate = router.family.gate
    assert gate is not None
    weight, bias = at(router.module, gate.weight), None if gate.bias is None else at(router.module, gate.bias)
    experts, width = weight.shape
    wide = gate.compute == "float32" or weight.dtype is torch.float32
    parts = min(width // experts, 3) if wide else 1  # float32 is a sum of three numbers of bfloat16
    states = torch.float32 if weight.dtype is torch.float32 and gate.compute == "native" else router_dtype(router)
    with torch.no_grad():
        weight.copy_(torch.eye(experts).repeat(1, width)[:, :width] * (torch.arange(width) < parts * experts))
        if bias is not None:
            bias.zero_()

    def hidden(logits: Tensor) -> Tensor:
        made, left = torch.zeros(len(logits), width, dtype=states), logits.double()
        for part in range(parts):
            made[:, part * experts : (part + 1) * experts] = left.to(states)
            left = left - left.to(states).double()
        return made[None] if router.family.input_rank == 3 else made

    return hidden, torch.float32 if wide else weight.dtype


def router_dtype(router: RouterInfo) -> torch.dtype:
    """The dtype of the hidden states: that of the experts."""
    return next(p.dtype for p in router.block.parameters() if p.dim() == 3 or p.dtype is not torch.float32)


def beside_changes(
    judge: Judge, hidden: Callable[[Tensor], Tensor], dtype: torch.dtype, rest: tuple[Tensor, ...]
) -> list[Tensor]:
    """Logits [rows, E]: random ones, and some where one logit lies a few numbers beside where its expert is chosen."""
    made, row = [], torch.arange(ROWS)
    for scale in SCALES:
        logits = (torch.randn(ROWS, judge.router.num_experts) * scale).to(dtype)

        def chosen(logits: Tensor) -> Tensor:
            (_, *own), _ = judge.decide((hidden(logits), *rest))
            return dense(own, judge.router.num_experts)[0]

        expert = (torch.rand(logits.shape) - 2 * chosen(logits).float()).argmax(1)  # not chosen
        low = numbered(logits[row, expert])
        high = numbered(torch.full((ROWS,), 30 * max(scale, 1), dtype=dtype))
        while bool((high - low > 1).any()):
            middle = (low + high) // 2
            there = chosen(logits.index_put((row, expert), unnumbered(middle, dtype)))[row, expert]
            high, low = torch.where(there, middle, high), torch.where(there, low, middle)
        made.append(logits)
        made += [logits.index_put((row, expert), unnumbered(high + step, dtype)) for step in STEPS]
    return made


def kinds_of(routers: list[RouterInfo]) -> list[RouterInfo]:
    return list({(type(router.module), router.spec): router for router in routers}.values())


def fused_routers(model: nn.Module, **options: Any) -> tuple[Attachment, list[RouterInfo]]:
    attachment = Attachment(model, engine="fused", verify=False, **options)
    return attachment, [router for router in attachment.routers if router.engine == "fused"]


def check(name: str, dtype: torch.dtype) -> int:
    """Rows with another set of experts, all of them tied."""
    model = tiny_model(name, dtype)
    attachment, routers = fused_routers(model)
    attachment.detach()
    assert {r.layer for r in routers} == {r.layer for r in attachment.routers if r.family.gate is not None}
    if not routers:
        return 0
    judges = [Judge(name, router) for router in routers]
    of_model = given_inputs(name, model, routers)
    attachment = Attachment(model, engine="fused")
    assert all(router.engine == "fused" for router in attachment.routers if router.layer in {r.layer for r in routers})
    for judge, args in zip(judges, of_model, strict=False):
        judge.compare(args)
    attachment.detach()
    made = []
    for router in kinds_of(routers):
        judge, rest = judges[routers.index(router)], of_model[routers.index(router)][1:]
        hidden, of_logits = handed_through(router)
        logits = beside_changes(judge, hidden, of_logits, rest)
        made += [(judge, (hidden(each), *rest)) for each in logits]
    fused_routers(model)
    for judge, args in made:
        judge.compare(args)
    return sum(judge.differ for judge in judges)


@pytest.mark.parametrize("name", MOVED)
def test_only_ties_differ_where_logits_were_seen_to_move(name: str) -> None:
    assert check(name, torch.bfloat16) > 0  # ties were among what was compared


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(EVERY))
def test_only_ties_differ(name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


# ---- ties="model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "mistral4", "lfm2_moe", "longcat_flash"])
def test_the_model_chooses_where_a_row_is_tied(name: str, dtype: torch.dtype) -> None:
    """One token a call, so that a call without ties is not left to the model; of tied ones the model's every bit."""
    model = tiny_model(name, dtype)
    attachment, routers = fused_routers(model)
    attachment.detach()
    judge = Judge(name, routers[0])
    rest = given_inputs(name, model, routers)[0][1:]
    hidden, of_logits = handed_through(routers[0])
    logits = torch.cat([each[:8] for each in beside_changes(judge, hidden, of_logits, rest)])
    asked = []
    own = type(routers[0].module).forward
    attachment, (router, *_) = fused_routers(model, ties="model")
    replaced = next(e for e in attachment._engines if e.router.layer == router.layer)
    replaced.own_forward = lambda *args: asked.append(args) or own(*args)
    left = 0
    for row in logits[:, None]:
        args, before = (hidden(row), *rest), len(asked)
        (_, *expected), _ = judge.decide(args)
        _, *found = router.module.forward(*args)
        chosen = dense(expected, router.num_experts)[0]
        assert torch.equal(dense(found, router.num_experts)[0], chosen)
        if len(asked) > before:
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        left += len(asked) > before
    assert 0 < left < len(logits)


def test_a_call_with_a_tie_is_counted_and_steered_as_with_a_hook() -> None:
    outputs, counts = [], []
    for options in ({"engine": "hook"}, {"engine": "fused", "ties": "model"}):
        model = tiny_model("qwen3_moe", torch.bfloat16)
        with torch.no_grad():
            for layer in model.layers:
                layer.mlp.gate.weight[1] = layer.mlp.gate.weight[0]  # two experts that are always tied
        ids = tokens(4, 16)
        with mr.attach(model, **options) as routed, routed.record() as recorder, torch.no_grad():
            outputs.append(model(input_ids=ids)[0])
            with routed.steer(mr.Plan.forbid({0: [2]})):
                outputs.append(model(input_ids=ids)[0])
        counts.append(recorder.statistics().token_sum("counts"))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert (counts[0] == counts[1]).all()


def test_gradients_are_the_model_s_where_it_chooses() -> None:
    grown = []
    for options in ({"engine": "hook"}, {"engine": "fused", "ties": "model"}):
        model = tiny_model("mixtral")
        with torch.no_grad():
            model.layers[0].mlp.gate.weight[1] = model.layers[0].mlp.gate.weight[0]
        with mr.attach(model, **options):
            model(input_ids=tokens())[0].sum().backward()
        grown.append(model.layers[0].mlp.gate.weight.grad)
    torch.testing.assert_close(*grown, rtol=1e-3, atol=1e-4)


def test_where_nothing_may_wait_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("qwen3_moe"), tokens()
    with mr.attach(model, engine="fused", ties="model"):
        for whole in (False, True):
            torch.compiler.reset()
            with pytest.raises(RuntimeError, match=r"ties='model'.*compiled graph"):
                torch.compile(model, backend="eager", fullgraph=whole)(input_ids=ids)
        monkeypatch.setattr(engine, "capturing", lambda device: True)
        with pytest.raises(CaptureRefusedError, match=r"ties='model'.*CUDA graph"):
            model(input_ids=ids)


def test_ties_are_asked_for_with_the_fused_engine_alone() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(ValueError, match=r"engine='fused'.*leave it out"):
        mr.attach(model, ties="model")
    with pytest.raises(ValueError, match="'index', 'model', not 'last'"):
        mr.attach(model, engine="fused", ties="last")
    with mr.attach(model, engine="fused", ties="model"), torch.no_grad():
        model(input_ids=tokens())


# ---- what is called tied


SPECS = {
    "softmax": (mr.ops.RouterSpec(), 0),
    "chosen logits": (mr.ops.RouterSpec("sigmoid", order="topk_then_score"), 0),
    "sigmoid": (mr.ops.RouterSpec("sigmoid"), SCORE_UNITS),
    "groups": (mr.ops.RouterSpec(groups=4, top_groups=2), SCORE_UNITS),
}


@pytest.mark.parametrize(("spec", "units"), SPECS.values(), ids=SPECS)
def test_rows_are_tied_within_the_units_of_their_kind(spec: Any, units: int) -> None:
    logits = torch.tensor([[3.0, 1.2, 1.0, 0.7, 0.5, 0.0, -0.5, -1.0]])
    assert tie_units(spec, False) == units
    assert not undecided(logits, 2, spec, None, False)
    assert undecided(logits.index_fill(1, torch.tensor(2), 1.2), 2, spec, None, False)
    assert undecided(torch.full((1, 8), torch.nan), 2, spec, None, False)
    assert not undecided(logits.index_fill(1, torch.tensor(2), 1.2), 8, spec, None, False)  # all are chosen
    near = logits.clone()
    near[0, 2] = near[0, 1] - 2**-23  # the next lower number: its softmax is a unit lower
    assert undecided(near, 2, spec, None, False) == (units > 0)


def test_a_group_that_is_tied_is_seen() -> None:
    spec = mr.ops.RouterSpec("sigmoid", groups=4, top_groups=2)
    logits = torch.tensor([[3.0, 3.0, 2.0, 1.0, 2.0, 1.0, -5.0, -5.0]])  # the second and the third group
    assert undecided(logits, 2, spec, None, False)
    assert not undecided(logits.index_fill(1, torch.tensor(4), 1.9), 2, spec, None, False)
    assert tie_units(spec, True) == SCORE_UNITS


def test_a_bias_widens_what_is_called_tied() -> None:
    """A large bias takes digits from the sum, and scores that differ in them are tied."""
    logits = torch.tensor([[2.0, 1.0, 1.0 + 2**-18, -4.0]])
    spec = mr.ops.RouterSpec("sigmoid")
    assert not undecided(logits, 2, spec, torch.zeros(4), False)
    assert undecided(logits, 2, spec, torch.full((4,), 64.0), False)
