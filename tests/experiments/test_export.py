"""A pruned model as a checkpoint: outputs of the whole model under Plan.forbid, and models that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from harness.tiny_models import inputs, tiny_model

import moe_route as mr
from moe_route.base.identity import checkpoint_of, identity_of
from moe_route.experiments import CannotExportError, export_pruned
from moe_route.routers import find_routers
from moe_route.steering import ExpertSelection, Plan, PlanModel

FAMILIES = (
    "qwen3_moe",
    "olmoe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "phimoe",
    "minimax_m2",
    "lfm2_moe",
    "ernie4_5_moe",
    "gemma4_text",
)


def drawn(routers, number: int) -> dict[int, list[int]]:
    """``number`` experts of each layer, equally many of each router group."""
    generator, found = torch.Generator().manual_seed(0), {}
    for router in routers:
        groups, size = router.spec.groups, router.num_experts // router.spec.groups
        each = [torch.randperm(size, generator=generator)[: number // groups] + g * size for g in range(groups)]
        found[router.layer] = torch.cat(each).tolist()
    return found


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_pruned_model_is_the_whole_one_without_these_experts(name: str, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 16)
    changes = sizes if name == "deepseek_v3" else {}
    model = tiny_model(name, head=True, **changes)
    batch = inputs(name, model)
    with mr.attach(model) as routed:
        dropped = drawn(routed.routers, 8 if name == "deepseek_v3" else 3)
        with routed.steer(Plan.forbid(dropped)):
            whole = model(**batch).logits
        export_pruned(model, dropped, tmp_path)  # attached or not
    pruned = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(pruned(**batch).logits, whole, rtol=1e-4, atol=1e-4)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (pruned, model)]
    assert sizes[0] < sizes[1]
    assert {router.num_experts for router in find_routers(pruned)} == {
        router.num_experts - len(dropped[router.layer]) for router in find_routers(model)
    }


@torch.no_grad()
def test_bfloat16_and_the_model_itself_stay(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", torch.bfloat16, head=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_pruned(model, {0: [1], 1: [0], 2: [7]}, tmp_path)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.config.num_experts == 8
    pruned = type(model).from_pretrained(tmp_path, dtype="auto")
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned.model.layers[1].mlp.gate.weight, before["model.layers.1.mlp.gate.weight"][1:])


@pytest.mark.parametrize(
    ("name", "selection", "words"),
    [
        ("qwen3_moe", {0: [1]}, 'keep 7, 8 experts.*allocation="uniform"'),
        ("qwen3_moe", {9: [1]}, "lacks experts"),
        ("qwen3_moe", {0: range(7), 1: range(7), 2: range(7)}, "its tokens choose 2"),
        ("deepseek_v3", {0: [0, 1], 1: [0, 1]}, "n_group=4"),
        ("dbrx", {0: [0], 1: [0], 2: [0]}, "DbrxExperts.*first axis"),
        ("deepseek_v4_with_hash", {0: [0], 1: [0], 2: [0]}, "token id"),
        ("switch_transformers", {0: [0], 1: [0], 2: [0]}, "encoder part"),
    ],
)
def test_export_refuses(name: str, selection: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(CannotExportError, match=words):
        export_pruned(tiny_model(name, head=True), selection, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_of_ones_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotExportError, match="not a model of transformers"):
        export_pruned(mr.nn.SparseMoE(hidden_size=8, intermediate_size=8, num_experts=4, top_k=2), {0: [1]}, tmp_path)


def test_a_selection_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    """Of these weights it is cut; of others, or of another configuration, only when its model is taken away."""
    model = tiny_model("qwen3_moe", head=True)
    with mr.attach(model) as routed:
        identity = PlanModel.of_recording(
            {"model": identity_of(model) | checkpoint_of(model, [router.weights for router in routed.routers])},
            tuple(router.num_experts for router in routed.routers),
        )
    selection = ExpertSelection({0: [1], 1: [0], 2: [7]}, model=identity)
    export_pruned(model, selection, tmp_path / "same")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2)
    with pytest.raises(CannotExportError, match=r"another checkpoint.*weights hash.*--any-model"):
        export_pruned(model, selection, tmp_path / "other")
    with pytest.raises(CannotExportError, match=r"another model .layers and experts|another model .configuration"):
        export_pruned(tiny_model("mixtral", head=True), selection, tmp_path / "other")
    export_pruned(model, dict(selection), tmp_path / "other")


def test_an_export_that_is_stopped_leaves_no_checkpoint(tmp_path) -> None:
    model, selection, folder = tiny_model("qwen3_moe", head=True), {0: [1], 1: [0], 2: [7]}, tmp_path / "smaller"

    class Stopped:
        def save_pretrained(self, path: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_pruned(model, selection, folder, tokenizer=Stopped())
    assert not list(tmp_path.iterdir())
    export_pruned(model, selection, folder)
    with pytest.raises(FileExistsError, match="name a new one"):
        export_pruned(model, selection, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["smaller"]
