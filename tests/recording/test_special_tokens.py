"""Special tokens that are left out by their id: the same numbers as a mask made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness.tiny_models import tiny_model, tokens
from torch import nn

import moe_route as mr
from moe_route.data import demo_corpus, load_demo_model
from moe_route.recording import RecordingError, RoutingStatistics
from moe_route.recording.special_tokens import special_ids_of

EVERYTHING = {"consistency": True, "pairs": True, "trace": True, "sequences": True}


@pytest.fixture(scope="module")
def routed() -> Iterator[mr.RoutedModel]:
    model: Any = tiny_model("qwen3_moe", torch.float64, head=True)
    model.set_experts_implementation("eager")
    with mr.attach(model) as routed, torch.no_grad():
        yield routed


def same(a: RoutingStatistics, b: RoutingStatistics) -> None:
    mine, other = a._arrays(), b._arrays()
    assert mine.keys() == other.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_real_text_without_its_beginnings() -> None:
    model, tokenizer = load_demo_model()
    texts = list(demo_corpus()["eng_Latn"][:6])
    given = tokenizer(texts, padding=True, return_tensors="pt")
    ids = given["input_ids"]
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    found = []
    with mr.attach(model) as routed, torch.no_grad():
        ways = ((False, None), (tokenizer.all_special_ids, None), (True, ~special))
        for left_out, mask in ways:
            recording = routed.record(special_tokens=left_out, **EVERYTHING)
            with recording as rec, rec.labels("english", items=range(6), count_mask=mask):
                model(**given)
            found.append((rec.statistics(), rec.trace()))
    real = given["attention_mask"].bool() & ~special
    for statistics, trace in found:
        same(statistics, found[-1][0])
        assert (statistics.tokens() == int(real.sum())).all()
        np.testing.assert_array_equal(trace.token, ids[real].numpy())
        np.testing.assert_array_equal(trace.position, (given["attention_mask"].cumsum(1) - 1)[real].numpy())
    named = found[0][0].metadata
    assert named["masked"] == ["padding", "special tokens"]
    assert set(named["special_tokens"]) <= set(tokenizer.all_special_ids)
    assert named["special_tokens"] == sorted(special_ids_of(model))
    assert found[-1][0].metadata["masked"] == ["padding", "tokens outside the masks of the labels"]
    assert named["fingerprint"] == found[-1][0].metadata["fingerprint"]  # the same texts


def test_with_a_mask_and_groups_by_token_and_chunks(routed: mr.RoutedModel) -> None:
    ids, mask = tokens(2, 8), torch.rand(2, 8, generator=torch.Generator().manual_seed(2)) < 0.7
    special = sorted({int(ids[0, 1]), int(ids[1, 5]), int(ids[1, 7])})
    groups = [["a", "b"] * 4, ["b"] * 8]
    found = []
    for left_out, counted in ((special, mask), (True, mask & ~torch.isin(ids, torch.tensor(special)))):
        recording = routed.record(special_tokens=left_out, **EVERYTHING)
        with recording as rec, rec.labels(groups, items=[1, 2], count_mask=counted):
            first = routed.model(ids[:, :3], use_cache=True)
            routed.model(ids[:, 3:], past_key_values=first.past_key_values)
        found.append(rec.statistics())
    same(*found)


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generated_tokens_too(routed: mr.RoutedModel, way: dict[str, int]) -> None:
    prompt = tokens(1, 4).repeat(1, 3)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | way
    with routed.record(trace=True) as rec, rec.labels("x", items=[1]):
        routed.model.generate(prompt, **options)
    whole = rec.trace()
    special = [int(whole.token[1]), int(whole.token[-1])]
    with routed.record(special_tokens=special, **EVERYTHING) as rec, rec.labels("x", items=[1]):
        routed.model.generate(prompt, **options)
    kept = ~np.isin(whole.token, special)
    assert 0 < kept.sum() < len(kept)
    assert (rec.statistics().tokens() == kept.sum()).all()
    np.testing.assert_array_equal(rec.trace().token, whole.token[kept])
    np.testing.assert_array_equal(rec.trace().ids, whole.ids[kept])
    np.testing.assert_array_equal(rec.trace().position, whole.position[kept])


def test_ids_of_a_model() -> None:
    def model(config: dict[str, Any], generation: dict[str, Any] | None = None) -> Any:
        made: Any = nn.Linear(1, 1)
        made.config = SimpleNamespace(**config)
        made.generation_config = None if generation is None else SimpleNamespace(**generation)
        return made

    assert special_ids_of(model({"bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": None})) == (1, 2, 7)
    assert special_ids_of(model({"bos_token_id": 1}, {"eos_token_id": 9, "pad_token_id": 0})) == (9, 0, 1)
    assert special_ids_of(model({"text_config": SimpleNamespace(eos_token_id=4)})) == (4,)
    with pytest.raises(ValueError, match=r"record\(special_tokens=tokenizer\.all_special_ids\)"):
        special_ids_of(model({}))


@pytest.mark.parametrize("ids", [[], [-1], ["<s>"], [True], "bos", 3, None, [1.5]])
def test_ids_are_checked(routed: mr.RoutedModel, ids: Any) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.all_special_ids"):
        routed.record(special_tokens=ids)


def test_a_call_with_embeddings_is_refused(routed: mr.RoutedModel) -> None:
    embedded = routed.model.get_input_embeddings()(tokens(1, 4))
    with (
        routed.record(special_tokens=False),
        pytest.raises(RecordingError, match=r"called with embeddings.*count_mask"),
    ):
        routed.model(inputs_embeds=embedded)


def test_nothing_but_special_tokens_is_no_silence(routed: mr.RoutedModel) -> None:
    with routed.record(special_tokens=[5]) as rec:
        routed.model(torch.full((1, 4), 5))
    assert not rec.statistics().tokens().any()
