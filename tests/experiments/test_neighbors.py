"""Scores from solved neighbors, against the formula written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import moe_route as mr
from moe_route.analysis import AnalysisError
from moe_route.data import demo_corpus, load_demo_model
from moe_route.experiments import neighbor_scores
from moe_route.recording import RoutingStatistics


@pytest.fixture(scope="module")
def recorded() -> tuple[Any, RoutingStatistics, RoutingStatistics]:
    """The shipped model; 6 items in English and Swahili; 2 others in English."""
    model, tokenizer = load_demo_model()
    corpus = demo_corpus().subset(["eng_Latn", "swh_Latn"], 8)
    found = []
    with mr.attach(model) as routed:
        for part, languages in ((slice(0, 6), ("eng_Latn", "swh_Latn")), (slice(6, 8), ("eng_Latn",))):
            with routed.record(sequences=True) as recorder:
                for language in languages:
                    batch = tokenizer(list(corpus[language])[part], padding=True, return_tensors="pt")
                    with recorder.labels(groups=language, items=list(corpus.items)[part]):
                        model(**batch)
            found.append(recorder.statistics())
    return (model, tokenizer, corpus), found[0], found[1]


@pytest.mark.parametrize(("bandwidth", "share"), [(None, 1.0), (0.05, 0.25)])
def test_scores_are_the_kernel_regression(recorded: Any, bandwidth: float | None, share: float) -> None:
    _, solved, new = recorded
    known = solved.store.items("eng_Latn")
    good = [known[0], known[2], known[3], known[5]]
    found = neighbor_scores(
        solved, new, successful=good, group="eng_Latn", neighbors=3, bandwidth=bandwidth, share=share
    )
    assert found.items == tuple(new.store.items("eng_Latn"))
    for row, item in enumerate(found.items):
        own = new.store.distributions(item, "eng_Latn")
        paths = {name: solved.store.distributions(name, "eng_Latn") for name in good}
        distance = {name: math.sqrt(sum(float(x) ** 2 for x in (path - own).ravel())) for name, path in paths.items()}
        nearest = sorted(good, key=lambda name: distance[name])[:3]
        h = bandwidth or sum(distance[name] for name in nearest) / 3
        kernel = [math.exp(-(distance[name] ** 2) / (2 * h**2)) for name in nearest]
        average = sum(k * paths[name] for k, name in zip(kernel, nearest, strict=True)) / sum(kernel)
        assert found.neighbors[row] == tuple(nearest)
        np.testing.assert_allclose(found.scores[row], share * average + (1 - share) * own, rtol=1e-9, atol=1e-12)
        assert found.weights[row].sum() == pytest.approx(1)
    assert "Scores of 2 items" in repr(found)
    assert found.to_dict()["neighbors"][0] == list(found.neighbors[0])


def test_the_plan_routes_by_the_scores(recorded: Any) -> None:
    (model, tokenizer, corpus), solved, new = recorded
    found = neighbor_scores(solved, new, group="eng_Latn", new_group="eng_Latn")
    plan = found.plan(layers=[3])
    batch = tokenizer(list(corpus["eng_Latn"])[6:8], padding=True, return_tensors="pt")
    with mr.attach(model) as routed, routed.steer(plan), routed.record(trace=True) as recorder:
        with recorder.labels(groups="eng_Latn", items=list(found.items)):
            model(**batch)
        top_k = routed.routers[3].top_k
    trace = recorder.trace()
    for row, sequence in enumerate(range(2)):
        wanted = set(np.argsort(-found.scores[row, 3], kind="stable")[:top_k].tolist())
        chosen = trace.ids[trace.sequence == sequence][:, 3]
        assert all(set(ids.tolist()) == wanted for ids in chosen)


def test_an_item_is_not_its_own_neighbor(recorded: Any) -> None:
    _, solved, _ = recorded
    found = neighbor_scores(solved, solved, group="eng_Latn", neighbors=1)
    assert all(item not in names for item, names in zip(found.items, found.neighbors, strict=True))
    assert (found.weights == 1).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "name the group: the solved recording holds 'eng_Latn', 'swh_Latn'"),
        ({"group": "xyz"}, "no group 'xyz' is in the solved recording"),
        ({"group": "swh_Latn"}, "no group 'swh_Latn' is in the new recording"),
        ({"group": "eng_Latn", "neighbors": 7}, "7 neighbors are asked for"),
        ({"group": "eng_Latn", "neighbors": 0}, "neighbors 1 or more"),
        ({"group": "eng_Latn", "share": 0}, "share must be in"),
        ({"group": "eng_Latn", "bandwidth": 0}, "bandwidth above 0"),
        ({"group": "eng_Latn", "successful": ["nobody"]}, "'nobody' was not recorded"),
        ({"group": "eng_Latn", "successful": []}, "0 successful items"),
        ({"group": "eng_Latn", "space": "words"}, 'space must be "routing" or "hidden"'),
    ],
)
def test_what_it_refuses(recorded: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        neighbor_scores(recorded[1], recorded[2], **given)


def test_recordings_that_cannot_be_compared_are_refused(recorded: Any) -> None:
    _, solved, new = recorded
    with pytest.raises(AnalysisError, match="other layers or experts"):
        neighbor_scores(solved, new.select(layers=[0, 1]), group="eng_Latn")
    counts = np.full((1, len(new.layers), max(new.num_experts)), 1)
    bare = RoutingStatistics.from_token_sums(
        ["eng_Latn"],
        counts=counts,
        tokens=np.array([counts.shape[2] // new.top_k[0]]),
        top_k=new.top_k[0],
        layers=new.layers,
    )
    with pytest.raises(AnalysisError, match="has no sequences"):
        neighbor_scores(solved, bare, group="eng_Latn")
