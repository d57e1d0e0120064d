"""Specialization on token ids and on classes of tokens, against plain counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from harness.traces import trace

from moe_route import analysis
from moe_route.analysis import AnalysisError


def counted(traced, token, layer, k, rows):
    """N_x, N_e and N_xe of one layer, from loops."""
    of_id, of_expert, both = Counter(), Counter(), Counter()
    for t in rows:
        slots = np.argsort(-traced.weights[t, layer].astype(float), kind="stable")[:k]
        of_id[int(token[t])] += 1
        for expert in traced.ids[t, layer][slots].tolist():
            of_expert[expert] += 1
            both[int(token[t]), expert] += 1
    return of_id, of_expert, both


@pytest.mark.parametrize("k", [1, None])
def test_shares_are_those_of_plain_counts(k):
    traced = trace(texts=30)
    frequent = {x for x, n in Counter(traced.token.tolist()).items() if n >= 28}
    rows = [t for t in range(len(traced)) if traced.token[t] in frequent]
    found = analysis.vocabulary(traced, k=k, min_tokens=28)
    assert 1 < found.ids == len(frequent) < 9
    assert found.tokens == len(rows)
    for layer in range(4):
        of_id, of_expert, both = counted(traced, traced.token, layer, k, rows)
        largest = [max(both[x, e] for e in range(6)) / of_id[x] for x in frequent]
        assert found.by_layer[layer] == pytest.approx(np.mean(largest))
        for expert in of_expert:
            mean = sum(both[x, expert] ** 2 / of_id[x] for x in frequent) / of_expert[expert]
            assert found.by_expert[layer, expert] == pytest.approx(mean)
            listed = found.top[layer, expert]
            shares = sorted((both[x, expert] / of_id[x] for x in frequent if both[x, expert]), reverse=True)
            assert [share.share for share in listed] == pytest.approx(shares)
            for share in listed:
                assert share.tokens == both[share.token, expert]
                assert share.of_expert == pytest.approx(share.tokens / of_expert[expert])


def test_the_leading_ids_are_kept():
    traced = trace(texts=30)
    everything = analysis.vocabulary(traced, order="tokens", keep=9)
    leading = analysis.vocabulary(traced, order="tokens", keep=2)
    assert all(leading.top[key] == shares[:2] for key, shares in everything.top.items())
    nothing = analysis.vocabulary(traced, keep=0)
    assert nothing.top == {}
    assert "shuffled" in repr(nothing)


def test_the_next_token_is_that_of_the_same_text():
    traced = trace(texts=30)
    follows = np.full(len(traced), -1)
    for t in range(len(traced) - 1):
        if traced.sequence[t] == traced.sequence[t + 1]:
            follows[t] = traced.token[t + 1]
    found, given = analysis.vocabulary(traced, of="next"), analysis.vocabulary(traced, of=follows)
    assert found.tokens == len(traced) - 30
    assert np.array_equal(found.by_expert, given.by_expert)
    assert (found.of, given.of) == ("next", "given")


def test_chance_is_what_shuffled_ids_give():
    traced = trace(texts=400, layers=1)
    found = analysis.vocabulary(traced)
    assert found.by_layer[0] > found.chance[0] + 0.1
    rng = np.random.default_rng(0)
    blind = trace(texts=400, layers=1, token=rng.permutation(traced.token))
    assert analysis.vocabulary(blind).by_layer[0] == pytest.approx(found.chance[0], abs=0.02)


def test_tokens_without_a_choice_in_a_layer_are_left_out_there():
    ids = trace(texts=30).ids.copy()
    ids[: len(ids) // 2, 1] = -1
    traced = trace(texts=30, ids=ids)
    found = analysis.vocabulary(traced, min_tokens=1)
    of_id, _, both = counted(traced, traced.token, 1, None, range(len(ids) // 2, len(ids)))
    largest = [max(both[x, e] for e in range(6)) / of_id[x] for x in of_id]
    assert found.by_layer[1] == pytest.approx(np.mean(largest))


def test_class_frequencies_are_those_of_plain_counts():
    traced = trace(texts=30)
    classes = ["vowel", "other", "vowel", "digit", "digit", "digit", "vowel"]  # ids 7 and 8 are beyond the list
    found = analysis.class_routing(traced, classes)
    names = np.array([classes[t] if t < 7 else "other" for t in traced.token])
    assert sorted(found.classes) == ["digit", "other", "vowel"]
    assert found.tokens.tolist() == sorted(Counter(names.tolist()).values(), reverse=True)
    counts = {}
    for name in found.classes:
        for layer in range(4):
            chosen = Counter(traced.ids[names == name, layer].reshape(-1).tolist())
            counts[name, layer] = np.array([chosen[e] for e in range(6)])
            assert found.of(name)[layer] == pytest.approx(counts[name, layer] / (names == name).sum())
    for c, name in enumerate(found.classes):
        for layer in range(4):
            total = sum(counts[other, layer] for other in found.classes)
            shares = [table / table.sum() for table in (counts[name, layer], total)]
            expected = analysis.normalized_jensen_shannon(shares[0], shares[1], found.num_experts[layer])
            assert found.divergence[c, layer] == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("text", "script", "start"),
    [
        (" the", "latin", "word start"),
        ("▁the", "latin", "word start"),
        ("ing", "latin", "inside"),
        ("क", "devanagari", "inside"),
        ("ा", "devanagari", "inside"),
        (" 中", "cjk", "word start"),
        ("か", "hiragana", "inside"),
        ("12", "digit", "inside"),
        ("٣", "digit", "inside"),
        (",", "punctuation", "inside"),
        (" +", "symbol", "word start"),
        ("\n\n", "whitespace", "word start"),
        ("", "whitespace", "inside"),
        ("�", "bytes", "inside"),
        ("'s", "latin", "inside"),
    ],
)
def test_classes_of_tokens(text, script, start):
    assert analysis.token_classes([text]) == (script,)
    assert analysis.token_classes([text], by="start") == (start,)


def test_special_tokens_are_a_class_of_their_own():
    assert analysis.token_classes(["<s>", "a"], special=[0]) == ("special", "latin")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"of": "predicted"}, '"input", "next" or an array'),
        ({"of": np.zeros(3, np.int64)}, "an integer for each of the"),
        ({"min_tokens": 10_000}, "no token id occurs 10000 times"),
        ({"order": "name"}, "order must be"),
        ({"k": 5}, "k must be between"),
    ],
)
def test_bad_input(options, words):
    with pytest.raises(AnalysisError, match=words):
        analysis.vocabulary(trace(), **options)


def test_a_trace_of_embeddings_has_no_ids():
    with pytest.raises(AnalysisError, match="called with embeddings"):
        analysis.vocabulary(trace(token=np.full_like(trace().token, -1)))
    with pytest.raises(AnalysisError, match='by must be "script"'):
        analysis.token_classes(["a"], by="length")
    with pytest.raises(AnalysisError, match="no class 'verb'"):
        analysis.class_routing(trace(), ["a"] * 9).of("verb")


def test_shown_and_saved():
    names = [chr(ord("a") + number) for number in range(9)]
    found = analysis.vocabulary(trace(texts=30), names=names)
    assert {row["text"] for row in found.to_dict()["top"]} <= set(names)
    assert "most specialized experts" in repr(found)
    classes = analysis.class_routing(trace(), names)
    assert classes.to_dict()["classes"][0] in names
    assert "Divergence of each class" in repr(classes)
    pytest.importorskip("pandas")
    assert len(found.to_pandas()) == sum(map(len, found.top.values()))
    assert list(analysis.vocabulary(trace(), min_tokens=1, keep=0).to_pandas().columns)[:2] == ["layer", "expert"]
    assert len(classes.to_pandas()) == len(classes.classes) * sum(classes.num_experts)
