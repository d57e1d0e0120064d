"""Expert patching, against a model whose experts are worked out and replaced by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from harness.tiny_texts import tiny_language_model

from moe_route.analysis import AnalysisError
from moe_route.experiments import PromptPair, patch_experts
from moe_route.experiments.expert_patching import _Patcher
from moe_route.experts.outputs import expert_outputs
from moe_route.routers import ModelNotSupportedError, find_routers
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import PlanError

FEW = {"resamples": 50, "permutations": 300}
PAIRS = [
    PromptPair("abcdefg", "abXdefg", "q", "r"),
    PromptPair("hello you", "hallo you", "r", "q"),
    PromptPair("0123456", "0123459", "x", "y", group="other"),
]


def by_hand(language_model: LanguageModel, pair: PromptPair, layer: int, expert: int | None, weight: str, last: bool):
    """Contrasts of the clean, the corrupted and the patched run; parts of experts in a loop over tokens."""
    model = language_model.model
    experts = find_routers(model)[layer].block.experts
    a, b = ord(pair.answer), ord(pair.other)

    def run(text: str, change=None):
        seen = []
        hooks = [experts.register_forward_pre_hook(lambda module, args: seen.append(args))]
        if change is not None:
            hooks.append(experts.register_forward_hook(lambda module, args, output: output + change))
        with torch.no_grad():
            logits = model(torch.tensor([[ord(letter) for letter in text]])).logits[0, -1].double()
        for hook in hooks:
            hook.remove()
        return (logits[a] - logits[b]).item(), seen[0]

    def output(hidden, e):
        with torch.no_grad():
            return experts.forward(hidden[None], torch.tensor([[e]]), torch.ones(1, 1))[0]

    clean, (x, ids, w) = run(pair.clean)
    corrupt, (y, ids_now, w_now) = run(pair.corrupt)
    change = torch.zeros_like(y)
    for t in range(len(y)):
        if last and t < len(y) - 1:
            continue
        for slot, e in enumerate(ids_now[t].tolist()):
            if expert in (None, e):
                change[t] -= w_now[t, slot] * output(y[t], e)
                if weight == "own":
                    change[t] += w_now[t, slot] * output(x[t], e)
        for slot, e in enumerate(ids[t].tolist()):
            if expert in (None, e) and weight == "clean":
                change[t] += w[t, slot] * output(x[t], e)
    return clean, corrupt, run(pair.corrupt, change)[0]


@pytest.mark.parametrize(("weight", "positions"), [("clean", "all"), ("own", "all"), ("clean", "last")])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_is_the_model_with_the_part_replaced(name, weight, positions):
    language_model = tiny_language_model(name)
    options = {"weight": weight, "positions": positions, "least_contrast": 1e-9, "batch_size": 5}
    for pair in PAIRS[:2]:
        clean, corrupt, _ = by_hand(language_model, pair, 0, None, weight, False)
        if clean < corrupt:  # the other way round it falls
            pair = PromptPair(pair.clean, pair.corrupt, pair.other, pair.answer)
        found = patch_experts(language_model, [pair], **options, **FEW)
        layers = len(found.num_experts)
        for layer in range(layers):
            for expert in (None, 0, 3, 5):
                hand = by_hand(language_model, pair, layer, expert, weight, positions == "last")
                clean, corrupt, patched = hand
                share = (found.layers.mean[0] if expert is None else found.restored.mean[0, :, expert])[layer]
                assert share == pytest.approx((patched - corrupt) / (clean - corrupt), rel=1e-3, abs=1e-4)
                assert (found.clean[0], found.corrupt[0]) == pytest.approx((clean, corrupt), abs=1e-4)


def test_shares_of_several_pairs_are_pooled_and_the_model_is_restored():
    language_model = tiny_language_model("olmoe")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = language_model.model(ids).logits
    hooks = [len(module._forward_hooks) for module in language_model.model.modules()]
    swapped = [PromptPair(p.clean, p.corrupt, p.other, p.answer, p.group) for p in PAIRS]  # one of the two falls
    found = patch_experts(language_model, [*PAIRS, *swapped], layers=[0, 2], least_contrast=1e-9, **FEW)
    assert found.groups == ("all", "other")
    assert found.pairs.tolist() == [2, 1]
    assert found.left_out == 3
    assert np.isnan(found.layers.mean[:, 1]).all()
    sums, counts = 0.0, 0.0
    for pair in [*PAIRS, *swapped]:
        clean, corrupt, patched = by_hand(language_model, pair, 2, None, "clean", False)
        if pair.group == "all" and clean >= corrupt:
            sums, counts = sums + patched - corrupt, counts + clean - corrupt
    assert found.layers.mean[0, 2] == pytest.approx(sums / counts, rel=1e-3)
    with torch.no_grad():
        assert torch.equal(language_model.model(ids).logits, before)
    assert [len(module._forward_hooks) for module in language_model.model.modules()] == hooks


def test_outputs_of_single_experts_add_up():
    language_model = tiny_language_model("mixtral")
    experts = find_routers(language_model.model)[0].block.experts
    hidden, ids = torch.randn(5, 64), torch.tensor([[0, 3], [1, 2], [7, 0], [4, 5], [6, 1]])
    weights = torch.rand(5, 2)
    with torch.no_grad():
        single = expert_outputs(experts, hidden, ids)
        torch.testing.assert_close((single * weights[..., None]).sum(1), experts(hidden, ids, weights))


def test_on_the_demo_model():
    """The pronoun of the answer follows the prompt, and some expert of the last token carries a part of it."""
    pairs = [
        PromptPair(f"{name} {verb} that", f"Tom {verb} that", " she", " he")
        for name in ("Mary", "Anna")
        for verb in ("said", "knows")
    ]
    found = patch_experts(LanguageModel.load(), pairs, positions="last", **FEW)
    assert found.clean[0] > found.corrupt[0]
    assert found.restored.mean.shape == (1, 8, 16)
    assert np.nanmax(found.restored.mean[0]) > 0
    assert "Share of the contrast" in repr(found)
    assert (found.to_pandas()["adjusted_p"] >= found.to_pandas()["restored_p"]).all()
    assert found.to_dict()["pairs"] == [4]


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([PromptPair("abc", "abcd", "q", "r")], {}, ValueError, "3 and 4 tokens"),
        ([PromptPair("abc", "abd", "qq", "r")], {}, ValueError, "has 2 tokens"),
        ([PromptPair("abc", "abc", "q", "r")], {}, AnalysisError, "no pair of 1"),
        ([], {}, AnalysisError, "no pair of 0"),
        (PAIRS, {"layers": 5}, PlanError, "3 MoE layers"),
        (PAIRS, {"least_contrast": 0.0}, ValueError, "above 0"),
        (PAIRS, {"weight": "mine"}, ValueError, '"clean" or "own"'),
    ],
)
def test_bad_input(pairs, options, error, message):
    with pytest.raises(error, match=message):
        patch_experts(tiny_language_model("mixtral"), pairs, **options, **FEW)


def test_logits_that_are_not_finite_are_no_unchosen_expert(monkeypatch):
    monkeypatch.setattr(_Patcher, "_patched", lambda self, ids, patches: torch.full((len(patches), 300), torch.nan))
    with pytest.raises(AnalysisError, match="not finite"):
        patch_experts(tiny_language_model("mixtral"), PAIRS, **FEW)


def test_experts_that_cannot_be_seen_alone_are_refused():
    with pytest.raises(ModelNotSupportedError, match="cannot be patched"):
        patch_experts(tiny_language_model("jetmoe"), PAIRS[:1], **FEW)
