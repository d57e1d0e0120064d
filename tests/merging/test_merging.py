"""Merging on tiny models of transformers, on the shipped model, and on hand-made tensors."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from harness import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_route import merging
from moe_route.base import files
from moe_route.merging.layout import INTERLEAVED, TRANSPOSED, Layout
from moe_route.merging.methods import order_statistics, pcb_scores, widen

pytest.importorskip("transformers", reason="needs the extra hf")
NAMES = ("qwen3_moe", "gpt_oss", "aria_text", "llama4_text", "mixtral", "deepseek_v3", "granitemoe")


def tuned(base: nn.Module, seed: int, size: float = 0.02) -> nn.Module:
    """A copy of which every weight is moved a little."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=NAMES)
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, nn.Module]:
    base = tiny_models.tiny_model(request.param, head=True)
    return base, tuned(base, 1), tuned(base, 2)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class TestValues:
    def test_pcb(self):
        rows = torch.tensor([[1, -2, 3, -4, 5, -6, 7, -8], [2, 2, -3, -1, 0.5, -6, 1, 4]]) / 10
        merged = pcb_scores(lambda: rows.split(3, 1), 0.5).merge(rows)
        expected = torch.tensor([0.2, 0, 0, 0, 0, -0.4740, 0.6959, -0.7])
        torch.testing.assert_close(merged, expected, atol=5e-5, rtol=0)

    def test_widen(self):
        base = torch.tensor([[1, 0, 2, 1], [0, 1, 1, -1], [1, 1, 0, 2.0]])
        a = torch.tensor([[0.1, 0, 0.3, 0], [0, 0.2, 0, 0.1], [0, 0, 0, -0.4]])
        b = torch.tensor([[0, 0.5, 0, 0.1], [0.3, 0, 0.1, 0], [0, 0, 0.2, 0.1]])
        expected = [[1.0439, 0.5, 2.225, 1.0689], [0.225, 1.1438, 1.0469, -0.9], [1, 1, 0.0938, 1.6689]]
        torch.testing.assert_close(widen(base, torch.stack([a, b])), torch.tensor(expected), atol=5e-5, rtol=0)


floats = st.floats(-4, 4, width=32)


@st.composite
def differences(draw: st.DrawFn) -> Tensor:
    models, columns = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    rows = st.lists(floats, min_size=columns, max_size=columns)
    return torch.tensor(draw(st.lists(rows, min_size=models, max_size=models)))


@given(differences(), st.integers(1, 7), st.data())
def test_order_statistics_are_those_of_the_sorted_rows(rows: Tensor, portion: int, data: st.DataObject):
    place = data.draw(st.integers(0, rows.shape[1] - 1))
    found = order_statistics(lambda: rows.split(portion, 1), [place, 0])
    assert torch.equal(found[0], rows.sort(1).values[:, place : place + 1])
    assert torch.equal(found[1], rows.min(1, keepdim=True).values)


@given(differences(), st.integers(1, 7), st.sampled_from([0.1, 0.5, 1.0]))
def test_pcb_is_the_formula_on_the_whole(rows: Tensor, portion: int, ratio: float):
    models, total = rows.shape
    sizes = rows.abs()
    ordered = sizes.sort(1).values
    low, high = (ordered[:, place : place + 1] for place in (int(total * 1e-4), int(total * (1 - 1e-4) - 1)))
    sizes = sizes.clamp(low, high)
    scores = torch.exp(models * _zero_to_one(sizes) ** 2) * torch.tanh(rows * rows.sum(0))
    place = min(int(total * (1 - ratio)), total - 1)
    scores = _zero_to_one(torch.maximum(scores, scores.sort(1).values[:, place : place + 1]))
    expected = (rows.sign() * sizes * scores).sum(0) / scores.sum(0).clamp(min=1e-12)
    found = pcb_scores(lambda: rows.split(portion, 1), ratio).merge(rows)
    torch.testing.assert_close(found, expected)


def _zero_to_one(values: Tensor) -> Tensor:
    low, high = values.min(1, keepdim=True).values, values.max(1, keepdim=True).values
    return ((values - low) / (high - low)).nan_to_num(0.0, 0.0, 0.0)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_widen_is_the_formula_column_by_column(seed: int, models: int, rows: int, columns: int):
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=draw)
    moved = torch.randn(models, rows, columns, generator=draw) * 0.1
    importance = np.zeros((2, models, columns))
    for m in range(models):
        size, turn = [], []
        for c in range(columns):
            before, after = base[:, c], base[:, c] + moved[m, :, c]
            size.append(float((after.norm() - before.norm()).abs()))
            turn.append(float(1 - (before @ after) / (before.norm() * after.norm())))
        if (
            min(min(abs(x - y) for y in (*v[:i], *v[i + 1 :], 9.0)) for v in (size, turn) for i, x in enumerate(v))
            < 1e-5
        ):
            return  # too near to call in float32
        importance[:, m] = [np.argsort(np.argsort(size)) / columns, np.argsort(np.argsort(turn)) / columns]
    shares = np.exp(importance) / np.exp(importance).sum(1, keepdims=True)
    weights = np.where(importance > importance.mean(2, keepdims=True), 1.0, shares).mean(0)
    expected = base.numpy() + (weights[:, None] * moved.numpy()).sum(0)
    np.testing.assert_allclose(widen(base, moved).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", tiny_models.EVERY)
def test_the_layouts_are_those_of_the_flags_of_transformers(name: str):
    from moe_route.experts import layout as experts_layout

    model = tiny_models.tiny_model(name)
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            kind = model.config.model_type
            assert experts_layout.flag(module, "is_transposed") == (kind in TRANSPOSED)
            assert (not experts_layout.flag(module, "is_concatenated")) == (kind in INTERLEAVED)


def test_matrices_of_packed_experts_are_those_of_the_layout():
    model = tiny_models.tiny_model("gpt_oss")
    checkpoint = merging.Checkpoint(model)
    name = next(name for name in checkpoint.names if name.endswith("gate_up_proj"))
    tensor = checkpoint.read(name)
    parts = {(expert, kind): view for expert, kind, view in Layout(checkpoint).matrices(name, tensor)}
    assert len(parts) == 2 * len(tensor)
    assert torch.equal(parts[3, "gate"], tensor[3, :, 0::2].T)
    assert torch.equal(parts[3, "up"], tensor[3, :, 1::2].T)


@pytest.mark.parametrize("name", ["qwen3_moe", "aria_text", "llama4_text"])
def test_matrices_compute_what_the_experts_of_the_model_do(name: str):
    """Transposed or not: gate, up and down of every expert, as [out, in]."""
    model = tiny_models.tiny_model(name, head=True)
    checkpoint = merging.Checkpoint(model)
    prefix, experts = next((n, m) for n, m in model.named_modules() if n.endswith("experts"))
    matrices = {
        (expert, kind): view
        for tensor in (f"{prefix}.gate_up_proj", f"{prefix}.down_proj")
        for expert, kind, view in Layout(checkpoint).matrices(tensor, checkpoint.read(tensor))
    }
    x = torch.randn(8, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))  # 5 tokens per expert
    with torch.no_grad():
        if name == "llama4_text":  # takes the tokens of the experts one after the other
            found = experts(x.flatten(0, 1)).view_as(x)
        else:
            ids = torch.arange(8).repeat_interleave(5)[:, None]
            found = experts(x.flatten(0, 1), ids, torch.ones(40, 1)).view_as(x)
    for expert, tokens in enumerate(x):
        gate, up, down = (matrices[expert, kind] for kind in ("gate", "up", "down"))
        expected = (torch.nn.functional.silu(tokens @ gate.T) * (tokens @ up.T)) @ down.T
        torch.testing.assert_close(found[expert], expected, atol=1e-4, rtol=1e-4)


class TestFusedExperts:
    """DBRX keeps the experts of a block in one matrix without an axis of experts, [E * I, H]."""

    def models(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        base = tiny_models.tiny_model("dbrx", head=True)
        return base, tuned(base, 1), tuned(base, 2)

    def test_what_goes_expert_by_expert_is_refused(self):
        base, a, b = self.models()
        message = r"experts\.mlp\.\w+ has no axis of 8 experts, so they cannot be told apart: use swap_layers"
        with pytest.raises(ValueError, match=message):
            merging.swap_experts(a, b, {0: [1]}, router="expert")
        with pytest.raises(ValueError, match=message):
            merging.difference(a, base)
        with pytest.raises(ValueError, match=message):
            merging.merge([a, b], base=base, method="widen").state_dict()

    def test_sums_need_no_experts_told_apart(self):
        base, a, b = self.models()
        linear = merging.merge([a, b], weights=[0.25, 0.75]).state_dict()
        arithmetic = merging.merge([a, b], base=base, method="task_arithmetic", weights=[0.25, 0.75]).state_dict()
        for name, tensor in a.state_dict().items():
            expected = 0.25 * tensor + 0.75 * b.state_dict()[name]
            torch.testing.assert_close(linear[name], expected)
            torch.testing.assert_close(arithmetic[name], expected)

    def test_whole_layers_are_swapped(self):
        _, a, b = self.models()
        every = merging.swap_layers(task=a, language=b, bottom=3, top=0, transition=0)
        assert_same(every.state_dict(), b.state_dict())
        mixed = merging.swap_layers(task=a, language=b, bottom=1, top=0, transition=0, others="task").state_dict()
        for name, tensor in mixed.items():
            assert torch.equal(tensor, (b if ".blocks.0." in name else a).state_dict()[name])


class TestIdentities:
    def test_a_model_swapped_with_itself_keeps_its_bits(self, family: tuple[nn.Module, nn.Module, nn.Module]):
        a = family[1]
        assert_same(merging.swap_layers(task=a, language=a).state_dict(), a.state_dict())
        for router in ("expert", "a", "b", "average", "base"):
            found = merging.swap_experts(a, a, {0: [1, 2]}, router=router, base=a)
            assert_same(found.state_dict(), a.state_dict())

    def test_no_layers_and_all_layers(self, family: tuple[nn.Module, nn.Module, nn.Module]):
        _, a, b = family
        total = a.config.num_hidden_layers
        none = merging.swap_layers(task=a, language=b, bottom=0, top=0, others="task")
        assert_same(none.state_dict(), a.state_dict())
        every = merging.swap_layers(task=a, language=b, bottom=total, top=0, transition=0)
        assert_same(every.state_dict(), b.state_dict())

    def test_no_experts_and_all_experts(self, family: tuple[nn.Module, nn.Module, nn.Module]):
        _, a, b = family
        layout = Layout(merging.Checkpoint(a))
        every = {layer: range(8) for layer in range(len(layout.moe_layers))}
        assert_same(merging.swap_experts(a, b, {}, router="expert").state_dict(), b.state_dict())
        for router in ("expert", "a"):
            found = merging.swap_experts(a, b, every, router=router, others="a")
            assert_same(found.state_dict(), a.state_dict())

    @pytest.mark.parametrize("method", merging.METHODS)
    def test_merging_the_base_with_itself_keeps_its_bits(
        self, family: tuple[nn.Module, nn.Module, nn.Module], method: str
    ):
        if method in ("ties", "dare"):
            pytest.importorskip("peft", reason="needs the extra train")
        base = family[0]
        merged = merging.merge([base, base], base=None if method == "linear" else base, method=method)
        assert_same(merged.state_dict(), base.state_dict())


def test_swapped_layers_and_experts_lie_where_they_should(family: tuple[nn.Module, nn.Module, nn.Module]):
    base, a, b = family
    state = merging.swap_layers(task=a, language=b, bottom=1, top=0, transition=1).state_dict()
    for name, tensor in state.items():
        first, second = a.state_dict()[name], b.state_dict()[name]
        expected = second if ".layers." not in name or ".layers.0." in name else first
        if ".layers.1." in name:
            expected = ((first + second) / 2).to(first.dtype)
        assert torch.equal(tensor, expected) if ".layers.1." not in name else torch.allclose(tensor, expected), name
    moved = merging.swap_experts(a, b, {0: [2]}, router="expert").state_dict()
    layout = Layout(merging.Checkpoint(a))
    for name, tensor in moved.items():
        place = layout.places.get(name)
        if place is None or place.layer != layout.moe_layers[0] or place.part == "other":
            assert torch.equal(tensor, b.state_dict()[name])
        elif tensor.shape[0] == 8:
            assert torch.equal(tensor[2], a.state_dict()[name][2])
            assert torch.equal(tensor[3], b.state_dict()[name][3])
    whole = merging.swap_experts(a, b, {0: [2]}, router="base", base=base).state_dict()
    for name in (name for name, place in layout.places.items() if place.part == "router"):
        assert torch.equal(whole[name], base.state_dict()[name])


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "pcb", "widen"])
def test_packed_experts_merge_as_single_ones_do(method: str, tmp_path: Path):
    """Transposed, interleaved and packed experts give what the same matrices give one by one."""
    if method == "ties":
        pytest.importorskip("peft", reason="needs the extra train")
    draw = torch.Generator().manual_seed(0)
    sets = [
        {(e, kind): torch.randn(shape, generator=draw) for e in range(3) for kind, shape in SHAPES.items()}
        for _ in range(3)
    ]
    base, *models = [{k: sets[0][k] + (0.1 * one[k] if one is not sets[0] else 0) for k in one} for one in sets]
    options = {} if method == "linear" else {"base": None}

    def merged(model_type: str) -> dict[tuple[int, str], Tensor]:
        stored = [merging.Checkpoint(_stored(one, model_type), model_type=model_type) for one in (base, *models)]
        given = {**options, "base": stored[0]} if options else {}
        result = merging.merge(stored[1:], method=method, **given)
        found = {}
        for name, tensor in result.state_dict().items():
            for expert, kind, view in Layout(stored[0]).matrices(name, tensor):
                if expert is not None:
                    found[expert, kind] = view
        return found

    single = merged("single")
    assert len(single) == 9
    for model_type in ("qwen3_moe", "gpt_oss", "aria_text", "llama4_text"):
        found = merged(model_type)
        for key, matrix in single.items():
            torch.testing.assert_close(found[key], matrix, atol=1e-6, rtol=1e-6)


SHAPES = {"gate": (4, 5), "up": (4, 5), "down": (5, 4)}


def _stored(weights: Mapping[tuple[int, str], Tensor], model_type: str) -> dict[str, Tensor]:
    prefix = "model.layers.0.mlp"
    state = {f"{prefix}.gate.weight": torch.ones(3, 5)}
    if model_type == "single":
        return state | {f"{prefix}.experts.{e}.{kind}_proj.weight": w for (e, kind), w in weights.items()}
    gate, up, down = (torch.stack([weights[e, kind] for e in range(3)]) for kind in SHAPES)
    both = torch.stack([gate, up], 2).flatten(1, 2) if model_type in INTERLEAVED else torch.cat([gate, up], 1)
    if model_type in TRANSPOSED:
        both, down = both.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    return state | {f"{prefix}.experts.gate_up_proj": both, f"{prefix}.experts.down_proj": down}


class TestDifference:
    def test_only_what_was_moved_has_changed(self, family: tuple[nn.Module, nn.Module, nn.Module]):
        base, *_ = family
        moved = copy.deepcopy(base)
        layout = Layout(merging.Checkpoint(base))
        name = next(n for n, p in layout.places.items() if p.part == "experts" and p.kind == "down")
        moved.state_dict()[name][5] += 0.1
        found = merging.difference(moved, base)
        assert list(found.to_pandas()["relative"]) == pytest.approx([change.relative for change in found], nan_ok=True)
        changed = [change for change in found if change.change]
        assert [(c.moe_layer, c.expert, c.kind) for c in changed] == [(0, 5, "down")]
        expected = float((moved.state_dict()[name][5] - base.state_dict()[name][5]).double().norm())
        assert changed[0].change == pytest.approx(expected, rel=1e-6)
        assert np.argwhere(found.experts() > 0).tolist() == [[0, 5]]
        assert [layer for layer, value in found.by_layer().items() if value] == [layout.moe_layers[0]]


class TestFiles:
    @pytest.mark.parametrize("method", ["linear", "widen", "pcb"])
    def test_folders_merge_as_loaded_models_do(self, method: str, tmp_path: Path):
        import transformers

        base = tiny_models.tiny_model("qwen3_moe", head=True)
        models = [base, tuned(base, 1), tuned(base, 2)]
        folders = [tmp_path / str(number) for number in range(3)]
        for model, folder in zip(models, folders, strict=True):
            model.save_pretrained(folder, max_shard_size="100KB")
        assert (folders[0] / "model.safetensors.index.json").is_file()
        for start, name in ((models, "memory"), (folders, "disk")):
            given = {} if method == "linear" else {"base": start[0]}
            merging.merge(start[1:], method=method, **given).save(tmp_path / name)
        loaded = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("memory", "disk")]
        for name, tensor in loaded[0].state_dict().items():
            torch.testing.assert_close(tensor, loaded[1].state_dict()[name], atol=1e-6, rtol=1e-5)
        recipe = files.read_json(tmp_path / "disk" / "merge_recipe.json", "merge")
        assert recipe["method"] == method
        assert recipe["result"] == merging.Checkpoint(tmp_path / "disk").sha256()
        assert recipe["sources"]["model 0"]["sha256"] == merging.Checkpoint(folders[1]).sha256()

    def test_the_shipped_model_is_read_from_disk_and_loads(self, tmp_path: Path):
        from moe_route import data

        shipped = data.load_demo_model()[0]
        folder = tmp_path / "base"
        shipped.save_pretrained(folder)
        tuned(shipped, 3, 0.001).save_pretrained(tmp_path / "tuned")
        merged = merging.swap_experts(tmp_path / "tuned", folder, {0: [1], 7: [2]}, router="expert")
        merged.save(tmp_path / "merged")
        loaded = type(shipped).from_pretrained(tmp_path / "merged")
        changed = merging.difference(tmp_path / "merged", folder).experts()
        assert np.argwhere(changed > 0).tolist() == [[0, 1], [7, 2]]
        assert loaded.config.num_experts == 16

    def test_a_folder_that_holds_something_is_not_written_over(self, tmp_path: Path):
        base = tiny_models.tiny_model("qwen3_moe")
        (tmp_path / "x").write_text("")
        with pytest.raises(FileExistsError, match="name a new one"):
            merging.merge([base]).save(tmp_path)


class TestRefusals:
    base: ClassVar = {f"model.layers.{layer}.mlp.weight": torch.eye(4) for layer in range(2)}

    def test_another_architecture(self):
        a, b = tiny_models.tiny_model("qwen3_moe"), tiny_models.tiny_model("mixtral")
        with pytest.raises(ValueError, match="models of one architecture"):
            merging.merge([a, b])

    def test_other_names_and_shapes(self):
        with pytest.raises(ValueError, match="only one of"):
            merging.merge([self.base, {**self.base, "extra": torch.eye(4)}])
        with pytest.raises(ValueError, match=r"\[4, 4\] and \[5, 4\]: sizes differ"):
            merging.merge([self.base, {**self.base, "model.layers.0.mlp.weight": torch.ones(5, 4)}])

    def test_a_foreign_base_and_foreign_experts(self):
        a, b = tiny_models.tiny_model("qwen3_moe"), tiny_models.tiny_model("qwen3_moe")
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in b.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
        for call in (
            lambda: merging.merge([a], base=b, method="widen"),
            lambda: merging.swap_experts(a, b, {0: [1]}, router="b"),
            lambda: merging.swap_layers(task=a, language=b),
            lambda: merging.difference(a, b),
        ):
            with pytest.raises(ValueError, match="fine-tunes of one base"):
                call()

    def test_another_vocabulary_or_tying(self, tmp_path: Path):
        for name, vocabulary, tied in (("a", {"x": 0}, False), ("b", {"y": 0}, False), ("c", {"x": 0}, True)):
            (tmp_path / name).mkdir()
            save_file(self.base, tmp_path / name / "model.safetensors")
            (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
            (tmp_path / name / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        with pytest.raises(ValueError, match="different vocabularies"):
            merging.merge([tmp_path / "a", tmp_path / "b"])
        with pytest.raises(ValueError, match="tie_word_embeddings"):
            merging.merge([tmp_path / "a", tmp_path / "c"])

    def test_quantized_weights(self):
        with pytest.raises(ValueError, match="quantize the result"):
            merging.merge([{"model.layers.0.mlp.weight": torch.ones(4, 4, dtype=torch.int8)}])

    def test_packed_experts_of_an_unknown_architecture(self):
        state = {"layers.0.mlp.experts.down_proj": torch.ones(3, 4, 4), "layers.0.mlp.gate.weight": torch.ones(3, 4)}
        with pytest.raises(ValueError, match="model_type"):
            merging.merge([state], base=state, method="widen").state_dict()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "slerp"}, "choose one of"),
            ({"method": "widen"}, "name base="),
            ({"method": "linear", "density": 0.5}, "does not read density"),
            ({"method": "ties", "density": 0.0}, "above 0"),
            ({"method": "linear", "weights": [1.0, 2.0]}, "2 weights for 1 models"),
        ],
    )
    def test_options(self, arguments: dict[str, object], message: str):
        with pytest.raises(ValueError, match=message):
            merging.merge(
                [self.base],
                **({"base": self.base} if "density" in arguments and arguments["method"] != "linear" else {}),
                **arguments,
            )  # type: ignore[arg-type]

    def test_layers_and_experts_that_are_not_there(self):
        a = tiny_models.tiny_model("qwen3_moe")
        with pytest.raises(ValueError, match="do not fit into 3 layers"):
            merging.swap_layers(task=a, language=a, bottom=2, top=2)
        with pytest.raises(ValueError, match="there is no MoE layer 9"):
            merging.swap_experts(a, a, {9: [1]}, router="b")
        with pytest.raises(ValueError, match="experts 0 to 7"):
            merging.swap_experts(a, a, {0: [8]}, router="b")
        with pytest.raises(ValueError, match="needs base="):
            merging.swap_experts(a, a, {0: [1]}, router="base")

    def test_without_peft_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "peft.utils", None)
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"moe-route\[train\]"):
            merging.merge([self.base], base=self.base, method="dare")


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
def test_ties_trims_the_whole_model_as_published(density: float):
    """Trim, elect, merge of arXiv 2306.01708 on one long row of all differences, in float64."""
    pytest.importorskip("peft", reason="needs the extra train")
    draw = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (6, 7), "b.weight": (5, 4), "c.bias": (9,)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    sizes = {"a.weight": 0.3, "b.weight": 0.03, "c.bias": 0.1}  # b moves least, and keeps least
    models = [{n: t + sizes[n] * torch.randn(t.shape, generator=draw) for n, t in base.items()} for _ in range(3)]
    rows = np.stack([np.concatenate([(m[n] - base[n]).double().numpy().ravel() for n in base]) for m in models])
    kept = np.argsort(-np.abs(rows), axis=1)[:, : int(density * rows.shape[1])]
    trimmed = np.zeros_like(rows)
    np.put_along_axis(trimmed, kept, np.take_along_axis(rows, kept, 1), 1)
    sign = np.where(trimmed.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(trimmed) == sign
    expected = (trimmed * agree).sum(0) / np.maximum(agree.sum(0), 1)

    def merged(**options: object) -> Tensor:
        result = merging.merge(models, base=base, method="ties", density=density, **options).state_dict()
        return torch.cat([(result[n] - base[n]).reshape(-1) for n in base])

    np.testing.assert_allclose(merged(trim="model").numpy(), expected, atol=1e-6)
    assert torch.equal(merged(), merged(trim="matrix"))
    assert torch.equal(merged(trim="model"), merged()) == (density == 1.0)
    with pytest.raises(ValueError, match="does not read trim"):
        merging.merge(models, base=base, method="dare", trim="model")
    with pytest.raises(ValueError, match="trim='layer'"):
        merging.merge(models, base=base, method="ties", trim="layer")


def test_dare_draws_the_same_whatever_is_read_first():
    pytest.importorskip("peft", reason="needs the extra train")
    draw = torch.Generator().manual_seed(0)
    base = {f"model.layers.{i}.mlp.weight": torch.randn(16, 16, generator=draw) for i in range(3)}
    model = {name: tensor + 0.1 for name, tensor in base.items()}
    merged = merging.merge([model], base=base, method="dare", density=0.5)
    before = torch.random.get_rng_state()
    backwards = {name: merged.read(name) for name in reversed(list(merged))}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(merged.state_dict(), {name: backwards[name] for name in merged})
    other = merging.merge([model], base=base, method="dare", density=0.5, seed=1).state_dict()
    assert any(not torch.equal(other[name], backwards[name]) for name in base)
