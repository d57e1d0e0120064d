"""Learning the routing from texts of the shipped model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from moe_route.data import demo_corpus
from moe_route.data.batches import Text, texts_of
from moe_route.experiments import learn_directions, learn_routing
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import ExpertSelection, Plan, PlanError


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load("demo")


def test_the_loss_of_the_texts_falls(language_model: LanguageModel) -> None:
    texts = texts_of(demo_corpus().subset(["swh_Latn"], 6))
    before = {key: value.clone() for key, value in language_model.model.state_dict().items()}
    base = language_model.losses(texts)
    losses = learn_routing(language_model, texts, layers=[2, 3], steps=5, lr=0.05).losses
    assert losses[0] == pytest.approx(base[:, 0].sum() / base[:, 1].sum(), rel=1e-4)
    best = int(np.argmin(losses))
    assert best > 0
    learned = learn_routing(language_model, texts, layers=[2, 3], steps=best, lr=0.05)
    assert all(torch.equal(value, before[key]) for key, value in language_model.model.state_dict().items())
    assert np.array_equal(language_model.losses(texts), base)
    with language_model.attach() as routed, routed.steer(learned.plan):
        steered = language_model.losses(texts)
    assert steered[:, 0].sum() / steered[:, 1].sum() == pytest.approx(losses[best], rel=1e-4)
    assert steered[:, 0].sum() < base[:, 0].sum()


def test_groups_get_numbers_of_their_own(language_model: LanguageModel) -> None:
    texts = texts_of(demo_corpus().subset(["eng_Latn", "swh_Latn"], 2))
    learned = learn_routing(
        language_model, [*texts, Text("deu_Latn", "x", "")], by_group=True, layers=2, steps=2, what="scale"
    )
    assert learned.groups == ("eng_Latn", "swh_Latn")
    assert {rule.groups for rule in learned.plan.rules} == {("eng_Latn",), ("swh_Latn",)}


def test_texts_without_a_token_to_predict_are_refused(language_model: LanguageModel) -> None:
    with pytest.raises(ValueError, match="nothing to predict"):
        learn_routing(language_model, [])


# ---- directions

EXPERTS = {2: [5, 1], 4: [0]}
GROUPS = ("eng_Latn", "swh_Latn")


def some_texts(each: int = 5) -> list[Text]:
    return [*texts_of(demo_corpus().subset([*GROUPS, "deu_Latn"], each)), Text("eng_Latn", "short", "A")]


def inputs_of(language_model: LanguageModel, layer: int, text: Text) -> torch.Tensor:
    """What the experts of a layer are given for each token of a text, float64 [S, H], in a run of its own."""
    seen: list[torch.Tensor] = []
    experts = language_model.model.model.layers[layer].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    for batch in language_model.batches([text], batch_size=1):
        language_model.run(batch)
    hook.remove()
    return seen[0].double()


def expert_by_hand(language_model: LanguageModel, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
    """``down(silu(gate x) * up x)`` in float64."""
    experts = language_model.model.model.layers[layer].mlp.experts
    gate, up = (experts.gate_up_proj[expert].double() @ x).chunk(2)
    return experts.down_proj[expert].double() @ (torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("position", [-1, -3])
def test_a_direction_is_the_difference_of_mean_outputs(language_model: LanguageModel, position: int) -> None:
    """Against single texts without padding, and experts written out in float64."""
    texts = some_texts()
    found = learn_directions(language_model, texts, EXPERTS, GROUPS, position=position, batch_size=4)
    used = [text for text in texts if len(language_model.encode([text]).ids[0]) >= -position]
    assert found.texts == tuple(sum(text.group == group for text in used) for group in GROUPS)
    assert found.left_out == len(texts) - len(used)
    for layer, ids in EXPERTS.items():
        for expert in ids:
            means = []
            for group in GROUPS:
                outputs = [
                    expert_by_hand(language_model, layer, expert, inputs_of(language_model, layer, text)[position])
                    for text in used
                    if text.group == group
                ]
                means.append(torch.stack(outputs).mean(0).detach())
            expected = (means[0] - means[1]).numpy()
            np.testing.assert_allclose(found.directions[layer][expert], expected, rtol=1e-3, atol=1e-5)
            place = list(zip(found.layers, found.experts, strict=True)).index((layer, expert))
            norms = [float(mean.norm()) for mean in means]
            np.testing.assert_allclose(found.norms[place], norms, rtol=1e-4)


def test_the_agreement_is_the_cosine_of_two_halves(language_model: LanguageModel) -> None:
    texts = texts_of(demo_corpus().subset([*GROUPS], 6))  # 6 of one group, then 6 of the other
    found = learn_directions(language_model, texts, EXPERTS, GROUPS)
    one, other = (learn_directions(language_model, texts[half::2], EXPERTS, GROUPS).vectors for half in (0, 1))
    cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    np.testing.assert_allclose(found.agreement, cosines, rtol=1e-6)
    mixed = [text for pair in zip(texts[:6], texts[6:], strict=True) for text in pair]  # the groups in turn
    again = learn_directions(language_model, mixed, EXPERTS, GROUPS)
    np.testing.assert_allclose(again.agreement, cosines, rtol=1e-4)


def block_outputs(language_model: LanguageModel, layer: int, text: Text) -> torch.Tensor:
    seen: list[Any] = []
    hook = language_model.model.model.layers[layer].mlp.register_forward_hook(lambda *of: seen.append(of[2]))
    for batch in language_model.batches([text], batch_size=1):
        language_model.run(batch)
    hook.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return output.reshape(-1, output.shape[-1]).double()


def alone(layer: int, expert: int) -> Plan:
    """The paper's way to see one expert: +100 on its logit, -100 on all others."""
    return Plan.bias({layer: {other: 100.0 if other == expert else -100.0 for other in range(16)}})


def test_it_is_the_block_where_the_expert_is_forced_alone(language_model: LanguageModel) -> None:
    """The definition of 2606.04160: outputs of the block under its router bias, and what the plan then adds to them."""
    texts = [text for text in some_texts() if text.group in GROUPS and text.item != "short"]
    found = learn_directions(language_model, texts, {4: [3]}, GROUPS)
    with language_model.attach() as routed:
        with routed.steer(alone(4, 3)):
            plain = [block_outputs(language_model, 4, text) for text in texts]
        with routed.steer(alone(4, 3) + found.plan(strength=0.5)):
            moved = [block_outputs(language_model, 4, text) for text in texts]
    last = torch.stack([rows[-1] for rows in plain])
    first = torch.tensor([text.group == GROUPS[0] for text in texts])
    direction = (last[first].mean(0) - last[~first].mean(0)).numpy()
    np.testing.assert_allclose(found.directions[4][3], direction, rtol=1e-3, atol=1e-5)
    for before, after in zip(plain, moved, strict=True):
        np.testing.assert_allclose((after - before).numpy(), 0.5 * np.tile(direction, (len(before), 1)), atol=1e-4)


def test_directions_are_shown_and_made_a_plan(language_model: LanguageModel, tmp_path: Any) -> None:
    texts = [text for text in some_texts(3) if text.item != "short"]
    found = learn_directions(language_model, texts, ExpertSelection(EXPERTS), GROUPS)
    other = learn_directions(language_model, texts, EXPERTS, GROUPS[::-1])
    np.testing.assert_allclose(found.vectors, -other.vectors, atol=1e-12)
    assert {"layer", "expert", "norm", "agreement"} <= found.columns().keys()
    assert "eng_Latn" in repr(found)
    assert found.to_dict()["texts"] == [3, 3]
    plan = found.plan(unit=True, strength=2.0)
    (rule,) = plan.rules
    np.testing.assert_allclose(np.linalg.norm(rule.table.values, axis=1), 1.0, rtol=1e-6)
    plan.save(tmp_path / "plan.safetensors")
    plain = language_model.losses(texts)
    with language_model.attach() as routed, routed.steer(Plan.load(tmp_path / "plan.safetensors")):
        assert not np.array_equal(language_model.losses(texts), plain)
    with language_model.untrained().attach() as routed, pytest.raises(PlanError, match="another checkpoint"):
        routed.steer(plan).__enter__()


def test_one_text_of_a_group_has_no_halves(language_model: LanguageModel) -> None:
    found = learn_directions(language_model, texts_of(demo_corpus().subset([*GROUPS], 1)), {1: [2]}, GROUPS)
    assert np.isnan(found.agreement).all()
    assert np.isfinite(found.vectors).all()


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        ({"groups": ("eng_Latn", "swh_Lat")}, ValueError, 'did you mean "swh_Latn"'),
        ({"groups": ("eng_Latn", "eng_Latn")}, ValueError, "two groups"),
        ({"position": 0}, ValueError, "from the end"),
        ({"position": -4000}, ValueError, "4000 tokens"),
        ({"experts": {1: [16]}}, PlanError, "expert 16 of layer 1"),
        ({"experts": {8: [1]}}, PlanError, "layer 8"),
        ({"experts": {}}, PlanError, "no experts"),
    ],
)
def test_directions_refuse(language_model: LanguageModel, given: Any, error: type[Exception], named: str) -> None:
    options = {"experts": EXPERTS, "groups": GROUPS} | given
    with pytest.raises(error, match=named):
        learn_directions(language_model, some_texts(2), **options)
