"""Every architecture, in both precisions: nothing changes unasked, what is recorded is what the experts are given,
plans change exactly what the reference says, and detaching leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from harness.model_decisions import Dense, dense, expected, watch_experts, watch_router
from harness.tiny_models import EVERY, inputs, tiny_model
from safetensors import safe_open

from moe_route.calls import Labels
from moe_route.ops import FIXED_POINT, Force, StatisticsTables, SteeringTables
from moe_route.patching import Attachment
from moe_route.routers import RouterInfo, find_routers

DTYPES = (torch.float32, torch.bfloat16)
Hooks = dict[str, tuple[list[int], list[int], set[str]]]


def hooks(model: nn.Module) -> Hooks:
    """Hooks and attributes of every module."""
    return {
        name: (list(m._forward_hooks), list(m._forward_pre_hooks), set(vars(m))) for name, m in model.named_modules()
    }


@dataclass
class Case:
    """A model, what it is called with, and what it returned before anything was attached."""

    name: str
    dtype: torch.dtype
    model: nn.Module
    inputs: dict[str, Tensor]
    plain: Tensor
    routers: list[RouterInfo]
    traced: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.model(**self.inputs)[0]

    @property
    def num_tokens(self) -> dict[str, int]:
        """Tokens of a call that the routers of a part see."""
        first = next(iter(self.inputs.values()))
        tokens = first.shape[0] * (1 if "grid_thw" in self.inputs else first.shape[1])
        decoder = self.inputs.get("decoder_input_ids")
        return {"decoder": 0 if decoder is None else decoder.numel(), "vision": 0, "": tokens}

    def tokens_of(self, router: RouterInfo) -> int:
        return self.num_tokens.get(router.role, self.num_tokens[""])

    def attach(self, **options: Any) -> Attachment:
        """Attached, with a trace."""
        attachment = Attachment(self.model, **options)
        self.traced.clear()
        attachment.on_choice = lambda layer, ids, weights: self.traced.append((layer, ids.clone(), weights.clone()))
        return attachment

    def decisions(self) -> dict[int, Dense]:
        """What was traced, by layer."""
        return {layer: dense(ids, weights, self.routers[layer].num_experts) for layer, ids, weights in self.traced}


@pytest.fixture(
    scope="module", params=[(name, dtype) for name in EVERY for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}"
)
def case(request: pytest.FixtureRequest) -> Case:
    name, dtype = request.param
    torch.manual_seed(0)
    model = tiny_model(name, dtype)
    given = inputs(name, model)
    with torch.no_grad():
        plain = model(**given)[0]
    assert bool(plain.isfinite().all())
    return Case(name, dtype, model, given, plain, find_routers(model))


@pytest.fixture(autouse=True)
def _clean(case: Case) -> Iterator[None]:
    """Hooks that a test adds to the shared model are taken away."""
    kept = {m: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in case.model.modules()}
    yield
    for module, (after, before) in kept.items():
        for now, then in ((module._forward_hooks, after), (module._forward_pre_hooks, before)):
            for key in [key for key in now if key not in then]:
                del now[key]


def counted(attachment: Attachment, **options: Any) -> list[StatisticsTables]:
    tables = [StatisticsTables.zeros(router.num_experts, groups=1, **options) for router in attachment.routers]
    attachment.set_statistics(tables)
    return tables


def test_nothing_changes_and_what_is_recorded_is_what_the_experts_get(case: Case) -> None:
    attachment = case.attach()
    tables = counted(attachment)
    given = [watch_experts(router) for router in attachment.routers]
    assert torch.equal(case.run(), case.plain)
    attachment.detach()
    decisions = case.decisions()
    for router, table, seen in zip(attachment.routers, tables, given, strict=True):
        tokens = case.tokens_of(router)
        assert table.scalar("tokens").item() == tokens
        if not tokens:
            continue
        ((own_chosen, own_weights),), (chosen, weights) = seen, decisions[router.layer]
        assert torch.equal(chosen, own_chosen)
        if type(router.module).__name__ != "DogeCDMoE":  # whose weights pass through no module
            assert torch.equal(weights, own_weights)
        assert torch.equal(table.metric("counts")[0], chosen.sum(0))
        assert table.scalar("slots").item() == tokens * router.top_k
        assert table.scalar("empty").item() == tokens * router.top_k - int(chosen.sum())
        torch.testing.assert_close(
            table.metric("weight")[0].double() * FIXED_POINT, weights.double().sum(0), rtol=1e-6, atol=1e-6
        )
        mass = table.metric("probability").sum().item() * FIXED_POINT
        assert mass == pytest.approx(tokens - table.scalar("unscored").item(), abs=1e-4)


def plan(kind: str, num_experts: int) -> SteeringTables:
    """One row of steering tables."""
    generator = torch.Generator().manual_seed(3)
    if kind == "soft":
        return SteeringTables(1, num_experts, bias=torch.randn((1, num_experts), generator=generator) * 1.5)
    force = torch.zeros(1, num_experts)
    if kind == "hard":
        force[0, 1], force[0, 2], force[0, 4] = Force.ON_STEERMOE, Force.FORBID, Force.OFF_NATURAL
    else:
        force[0, 1:] = Force.FORBID  # one expert left: slots stay empty
    return SteeringTables(1, num_experts, force=force)


@pytest.mark.parametrize("kind", ["soft", "hard", "one left"])
def test_a_plan_changes_exactly_what_the_reference_says(case: Case, kind: str) -> None:
    runs = {router.layer: watch_router(router) for router in case.routers}
    attachment = case.attach(verify=False)
    if not any(router.steerable for router in attachment.routers):
        with pytest.raises(ValueError, match="cannot be steered"):
            attachment.set_steering([plan(kind, router.num_experts) for router in attachment.routers])
        attachment.detach()
        return
    tables = counted(attachment, metrics=("counts", "weight", "natural_counts"))
    sequences = torch.tensor([0, -1]) if "grid_thw" not in case.inputs else torch.tensor([0])
    attachment.listener.labels_of = lambda call: Labels(steering_row=sequences)
    attachment.set_steering([plan(kind, s.num_experts) if s.steerable else None for s in attachment.routers])
    given = {router.layer: watch_experts(router) for router in attachment.routers}
    changed = case.run()
    attachment.detach()
    assert bool(changed.isfinite().all())
    assert not torch.equal(changed, case.plain)
    decisions, room = case.decisions(), 1e-5 if case.dtype is torch.float32 else 4 * torch.finfo(case.dtype).eps
    for router in attachment.routers:
        tokens = case.tokens_of(router)
        if not tokens or not router.steerable:
            continue
        rows = sequences.repeat_interleave(tokens // len(sequences))
        ((run,), ((_, got),), (chosen, weights)) = runs[router.layer], given[router.layer], decisions[router.layer]
        want_chosen, want_weights = expected(router, run, plan(kind, router.num_experts), rows)
        assert torch.equal(chosen, want_chosen)
        torch.testing.assert_close(weights, want_weights, rtol=room, atol=room * 0.1)
        torch.testing.assert_close(got, weights, rtol=2 * torch.finfo(case.dtype).eps, atol=1e-6)
        table, natural = tables[router.layer], expected(router, run, None, torch.full_like(rows, -1))[0]
        assert torch.equal(table.metric("counts")[0], chosen.sum(0))
        assert torch.equal(table.metric("natural_counts")[0], natural.sum(0))
        assert table.scalar("steered").item() == int((rows >= 0).sum())
        assert table.scalar("slots").item() == table.scalar("empty").item() + int(chosen.sum())


def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    return found


def test_detaching_leaves_no_trace_and_saving_writes_a_clean_checkpoint(case: Case, tmp_path: Path) -> None:
    before, keys, kinds = hooks(case.model), list(case.model.state_dict()), [type(m) for m in case.model.modules()]
    whole = saved(case.model, tmp_path / "before") if case.dtype is torch.float32 else {}
    attachment = case.attach(verify=False)
    counted(attachment)
    attachment.listener.labels_of = lambda call: Labels(steering_row=0)
    attachment.set_steering([plan("hard", s.num_experts) if s.steerable else None for s in attachment.routers])
    case.run()
    assert list(case.model.state_dict()) == keys
    if whole:
        again = saved(case.model, tmp_path / "attached")
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[key], whole[key]) for key in whole)
    attachment.detach()
    assert hooks(case.model) == before
    assert [type(m) for m in case.model.modules()] == kinds
    assert torch.equal(case.run(), case.plain)


def test_sites_say_what_they_are(case: Case) -> None:
    attachment = Attachment(case.model, engine="fused", verify=False)
    assert [router.layer for router in attachment.routers] == list(range(len(attachment.routers)))
    for router in attachment.routers:
        assert case.model.get_submodule(router.name) is router.module
        assert (router.num_experts, router.top_k) > (1, 0)
        assert router.family.name
        assert router.engine == "fused" or "fused was asked for, but" in router.reason
        assert router.steerable or any("cannot be steered" in note for note in router.notes)
    attachment.detach()
