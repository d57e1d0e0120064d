"""`moe-route record --vectors` and `analyze similarity`, with a reference and without, give what the library gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness.commands import refused

from moe_route import analysis
from moe_route.cli import main
from moe_route.recording import RoutingStatistics, SentenceVectors

LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn", "swh_Latn")
ALIGNMENT = ("analyze", "similarity", "--reference", "eng_Latn")
SOME = ("--languages", ",".join(LANGUAGES), "--limit", "12")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parallel")
    paths = {name: folder / f"{name}.safetensors" for name in ("vectors", "general")}
    assert main(["record", "--vectors", "position", "--out", str(paths["vectors"]), *SOME]) == 0
    assert main(["record", "--hidden", "--out", str(paths["general"]), *SOME]) == 0
    return paths


def plain(found):
    return json.loads(json.dumps(found.to_dict()))


def test_vectors(answer, made, tmp_path: Path) -> None:
    found = answer("record", "--out", tmp_path / "v.safetensors", *SOME, "--vectors", "mean", "--max-length", "6")
    assert found["groups"] == list(LANGUAGES)
    assert found["items"] == 12
    assert found["layers"][:2] == ["embedding", "layer 1"]
    assert found["cut"] > 0
    read = SentenceVectors.load(tmp_path / "v.safetensors")
    assert read.pooling == "mean"
    assert read.numpy().shape == (12, 4, 9, 128)


def test_alignment_of_vectors_and_of_routing(answer, made, tmp_path: Path) -> None:
    vectors = SentenceVectors.load(made["vectors"])
    found = answer(*ALIGNMENT, made["vectors"], "--accuracy", "0.8")
    expected = analysis.alignment(vectors, "eng_Latn")
    assert {name: found[name] for name in plain(expected)} == plain(expected)
    assert found["estimates"] == expected.estimate(0.8)
    part = answer(*ALIGNMENT, made["vectors"], "--rule", "cosine", "--layers", "1-3", "--center")
    np.testing.assert_allclose(
        part["values"], analysis.alignment(vectors, "eng_Latn", rule="cosine", center=True).values[:, 1:4]
    )
    statistics = RoutingStatistics.load(made["general"])
    for kind, rule in (("full", "margin"), ("hidden", "retrieval")):
        options = ("--rule", rule, "--neighbors", "3", "--kind", kind, "--no-center")
        found = answer(*ALIGNMENT, made["general"], *options, "--groups", "deu_Latn,swh_Latn")
        expected = analysis.alignment(
            statistics, "eng_Latn", rule=rule, neighbors=3, kind=kind, center=False, groups=["deu_Latn", "swh_Latn"]
        )
        assert {name: found[name] for name in plain(expected)} == plain(expected)
    scores = tmp_path / "scores.tsv"
    scores.write_text("deu_Latn\t3\nfra_Latn\t2\nswh_Latn\t1\n")
    found = answer(*ALIGNMENT, made["vectors"], "--scores", scores)
    assert found["correlation"]["quantity"] == "MEXA alignment with"


def test_similarity_of_vectors(answer, moe_route, made) -> None:
    found = answer("analyze", "similarity", made["vectors"], "--target", "deu_Latn", "--tree", "average")
    expected = analysis.similarity(SentenceVectors.load(made["vectors"]))
    assert {name: found[name] for name in plain(expected)} == plain(expected)
    assert found["source"] == expected.best_source("deu_Latn")
    assert found["order"] == list(expected.order(method="average"))
    _, text, _ = moe_route("analyze", "similarity", made["vectors"], "--clusters", "2")
    assert "cluster 2:" in text
    assert "fertility" in text


def test_refuses_with_the_fix(moe_route, made) -> None:
    vectors = made["vectors"]
    refused(moe_route(*ALIGNMENT, vectors, vectors), "one file of vectors")
    refused(moe_route(*ALIGNMENT, vectors, "--layers", "9"), "9 layers, counted from 0")
    refused(moe_route(*ALIGNMENT, vectors, "--kind", "full"), "leave it out")
    refused(moe_route("analyze", "similarity", vectors, "--reference", "zho_Hans"), "no group 'zho_Hans'")
    refused(moe_route(*ALIGNMENT, vectors, "--rule", "cosine", "--accuracy", "0.5"), 'rule="mexa"')
    refused(moe_route("analyze", "divergence", vectors), "give a file of the right kind")


def test_plots(answer, moe_route, made, tmp_path: Path) -> None:
    for number, source in enumerate(made.values()):
        for picture, options in (
            ("alignment", ("--interval", "0.9")),
            ("similarity", ()),
            ("tree", ("--layers", "2-4")),
        ):
            out = tmp_path / f"{picture}{number}.png"
            answer("plot", picture, source, *options, "--out", out)
            assert out.stat().st_size > 5000
    refused(
        moe_route("plot", "alignment", made["vectors"], "--layers", "1", "--out", tmp_path / "x.png"),
        "takes no --layers",
    )
