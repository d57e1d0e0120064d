"""Router saturation, against sets of experts."""

from __future__ import annotations

import numpy as np
import pytest
from harness.traces import trace

from moe_route import analysis
from moe_route.analysis import AnalysisError


def later(seed=5, **columns):
    """A trace of the same tokens as `trace()` with other choices."""
    rng = np.random.default_rng(seed)
    shape = trace().ids.shape
    ids = np.argsort(rng.random((*shape[:2], 6)), axis=-1)[..., : shape[2]].astype(np.int8)
    return trace(**({"ids": ids, "weights": rng.random(shape).astype(np.float16)} | columns))


def leading(found, token, layer, k):
    order = np.argsort(-found.weights[token, layer].astype(float), kind="stable")[:k]
    return {int(e) for e in found.ids[token, layer][order] if e >= 0}


def test_saturation_is_that_of_sets():
    early, final = trace(), later()
    found = analysis.saturation(early, final)
    assert found.ks == (1, 2)
    for row, k in enumerate(found.ks):
        for layer in range(4):
            shares = [len(leading(early, t, layer, k) & leading(final, t, layer, k)) / k for t in range(len(final))]
            assert found.values[row, layer] == pytest.approx(np.mean(shares))
            for g in range(3):
                of_group = np.asarray(shares)[final.group == g]
                assert found.by_group[row, g, layer] == pytest.approx(of_group.mean())


def test_a_checkpoint_is_saturated_against_itself():
    assert (analysis.saturation(trace(), trace()).values == 1).all()


def test_tokens_with_fewer_experts():
    ids = trace().ids.copy()
    ids[:, 0, 1] = -1
    ids[:5, 1] = -1
    found = analysis.saturation(trace(ids=ids), trace(ids=ids), k=2)
    assert found.values[0].tolist() == [1, 1, 1, 1]
    assert np.isnan(
        analysis.saturation(trace(ids=np.full_like(ids, -1)), trace(ids=np.full_like(ids, -1))).values
    ).all()


def test_layers_are_those_that_both_traces_hold():
    early = trace()
    final = later(layer_numbers=(2, 3, 4, 5))
    assert analysis.saturation(early, final).layers == (2, 3)
    assert "2" in repr(analysis.saturation(early, final)).splitlines()[1]
    with pytest.raises(AnalysisError, match="layer 0 was not traced"):
        analysis.saturation(early, final, layers=[0])


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("token", "token 3 has token id"),
        ("position", "token 3 has position"),
        ("group", "token 3 has group eng in one trace and deu"),
        ("sequence", "token 3 has text s0 in one trace and s1"),
    ],
)
def test_other_tokens_are_refused(column, words):
    changed = getattr(trace(), column).copy()
    changed[3] = 5 if column == "sequence" else changed[3] + 1
    with pytest.raises(AnalysisError, match=words):
        analysis.saturation(trace(), trace(**{column: changed}))


def test_bad_input():
    with pytest.raises(AnalysisError, match="the same texts"):
        analysis.saturation(trace(texts=5), trace())
    with pytest.raises(AnalysisError, match="k must be between"):
        analysis.saturation(trace(), trace(), k=3)
    with pytest.raises(AnalysisError, match="was not compared"):
        analysis.saturation(trace(), trace(), k=2).of(1)
    with pytest.raises(AnalysisError, match="no tokens of group"):
        analysis.saturation(trace(), trace(), groups=["fra"])


def test_shown_and_saved():
    found = analysis.saturation(trace(), later(), groups=["eng", "deu"])
    assert found.to_dict()["ks"] == [1, 2]
    assert found.tokens.tolist() == [(trace().group == 0).sum(), (trace().group == 1).sum(), 0]
    assert (found.of(2) == found.values[1]).all()
    assert "top-2, by group" in repr(found)
    pytest.importorskip("pandas")
    assert len(found.to_pandas()) == 2 * 3 * 4
