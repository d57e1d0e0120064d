"""`moe-route analyze` divergence, layers, correlation, similarity, and pictures with intervals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from harness.commands import refused

import moe_route as mr
from moe_route import analysis
from moe_route.cli import main

LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn", "hin_Deva", "swh_Latn")


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "general.safetensors"
    assert main(["record", "--out", str(out), "--languages", ",".join(LANGUAGES), "--limit", "12"]) == 0
    return out


def test_divergence_takes_every_option(answer, general):
    statistics = mr.RoutingStatistics.load(general)
    options = {
        ("--correct", "floor", "--interval", "0.9"): {"correct": "floor"},
        ("--kind", "count", "--correct", "jackknife"): {"kind": "count", "correct": "jackknife"},
        ("--groups", "hin_Deva,swh_Latn", "--reference", "deu_Latn"): {"groups": ["hin_Deva", "swh_Latn"]},
        ("--measure", "jaccard", "--top", "3"): {"measure": "jaccard", "top": 3},
        ("--pairing", "pooled", "--by", "token", "--kind", "topk"): {
            "pairing": "pooled",
            "by": "token",
            "kind": "topk",
        },
    }
    for arguments, keywords in options.items():
        reference = "deu_Latn" if "--reference" in arguments else "eng_Latn"
        found = answer("analyze", "divergence", general, *arguments)
        expected = analysis.divergence(statistics, reference, **keywords)
        assert found["groups"] == list(expected.groups)
        np.testing.assert_allclose(np.array(found["values"], float), expected.values)
        if "--interval" in arguments:
            low, high = expected.interval(0.9)
            np.testing.assert_allclose(np.array([found["low"], found["high"]], float), [low, high])


def test_divergence_prints_tokens_and_floor(moe_route, general):
    code, out, _ = moe_route("analyze", "divergence", general, "--interval", "0.9")
    assert code == 0
    assert "tokens" in out
    assert "floor" in out
    assert "low end of the 90 % interval" in out


def test_u_shape(answer, general):
    found = answer("analyze", "divergence", general, "--shape", "--middle", "2-5")
    assert found["groups"] == list(LANGUAGES[1:])
    assert found["layers"]["middle"] == [2, 3, 4, 5]
    assert len(found["low"]) == 4


def test_entropy(answer, moe_route, general):
    found = answer("analyze", "layers", general, "--of", "entropy", "--normalized", "--interval", "0.95")
    assert np.max(found["normalized"]["token"]) <= 1
    for of in ("token", "sequence", "gap"):
        assert (np.array(found[f"{of}_low"]) <= np.array(found[f"{of}_high"])).all()
    corrected = answer("analyze", "layers", general, "--of", "entropy", "--kind", "count", "--correct", "jackknife")
    assert corrected["correct"] == "jackknife"
    assert "token" not in corrected
    refused(moe_route("analyze", "layers", general, "--of", "entropy", "--correct", "jackknife"), "--kind count")


def test_all_pairs(answer, general):
    found = answer("analyze", "divergence", general, "--all-pairs", "--layers", "2-5", "--interval", "0.95")
    assert np.shape(found["values"]) == (4, 5, 5)
    assert (np.array(found["low"]) <= np.array(found["mean"])).all()


def test_correlation(answer, moe_route, general, tmp_path: Path):
    scores = dict(zip(LANGUAGES, (0.8, 0.71, 0.69, 0.52, 0.44), strict=True))
    tsv, as_json, table = tmp_path / "s.tsv", tmp_path / "s.json", tmp_path / "c.tsv"
    tsv.write_text("group\taccuracy\n" + "".join(f"{group}\t{score}\n" for group, score in scores.items()))
    as_json.write_text(json.dumps(scores))
    table.write_text(
        "code\tlog_size\tfamily\n" + "".join(f"{g}\t{i}\t{'ab'[i % 2]}\n" for i, g in enumerate(LANGUAGES))
    )
    plain = answer("analyze", "correlation", general, "--scores", tsv, "--interval", "0.9")
    assert plain == answer("analyze", "correlation", general, "--scores", as_json, "--interval", "0.9")
    assert len(plain["low"]) == 8
    blocks = answer("analyze", "correlation", general, "--scores", tsv, "--covariates", table, "--blocks", "family")
    assert blocks["covariates"] == ["log_size"]
    assert (blocks["exchange"], blocks["orders"]) == ("within blocks", 4)
    given = answer("analyze", "correlation", general, "--scores", tsv, "--fertility")
    assert given["covariates"] == ["tokens"]
    refused(moe_route("analyze", "correlation", general, "--scores", tsv, "--blocks", "family"), "--covariates")
    table.write_text("code\na\n")
    refused(moe_route("analyze", "correlation", general, "--scores", tsv, "--covariates", table), "tab-separated table")


def test_similarity(answer, general, tmp_path: Path):
    other = tmp_path / "other.tsv"
    rows = ["\t".join([a, *(str(float(a[-4:] == b[-4:])) for b in LANGUAGES)]) for a in LANGUAGES]
    other.write_text("\n".join(["\t".join(["", *LANGUAGES]), *rows]))
    found = answer("analyze", "similarity", general, "--layers", "2-5", "--clusters", "2", "--compare", other)
    assert sorted(name for cluster in found["clusters"] for name in cluster) == sorted(LANGUAGES)
    assert found["compared"]["groups"] == list(found["groups"])
    assert len(found["compared"]["pearson"]) == 4
    assert answer("analyze", "similarity", general, "--rule", "mexa", "--no-center")["centered"] is False


def test_pictures_of_a_strength_sweep(answer, moe_route, tmp_path: Path):
    cell = {"value": -0.02, "low": -0.03, "high": -0.01, "p_value": 0.01, "verdict": "lower"}
    none = {"value": 0.0, "low": None, "high": None}
    found = {"groups": ["deu_Latn", "swh_Latn"], "strengths": [0.5, 1.0], "texts": [9, 9]}
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({**found, "change": [[cell, none], [cell, cell]]}))
    for what, *arguments in (("steering-table", "--intervals"), ("strengths",)):
        out = tmp_path / f"{what}.svg"
        answer("plot", what, path, "--out", out, *arguments)
        assert ">Swahili<" in out.read_text()
    path.write_text("{}")
    refused(moe_route("plot", "steering-table", path, "--out", tmp_path / "e.svg"), "--strengths")


def test_pictures_with_floor_and_intervals(answer, moe_route, general, files, tmp_path: Path):
    levels = tmp_path / "levels.tsv"
    levels.write_text("code\tlevel\neng_Latn\thigh\ndeu_Latn\thigh\nswh_Latn\tlow\n")
    scores = tmp_path / "scores.tsv"
    scores.write_text("".join(f"{code}\t{place}\n" for place, code in enumerate(LANGUAGES)))
    for what, *arguments in (
        ("divergence", "--interval", "0.9", "--floor", "--levels", levels),
        ("divergence-matrix", "--cluster"),
        ("entropy", "--of", "sequence", "--by-script", "--interval", "0.9", "--column", "3.3", "--size", "7"),
        ("correlation", "--scores", scores, "--interval", "0.9"),
        ("heat-maps", "--reference", "eng_Latn"),
        ("sweep-overlap", "--task", files["task"], "--group", "eng_Latn"),
        ("sweep", "--task", files["task"], "--group", "eng_Latn", "--of", "both"),
    ):
        out = tmp_path / f"{what}.svg"
        answer("plot", what, general, "--out", out, *arguments)
        assert out.stat().st_size > 1000
        if "--column" in arguments:
            assert 'width="237.6pt"' in out.read_text(), "3.3 inches"
        if "--levels" in arguments:
            text = out.read_text()
            assert ">low (n = 1)<" in text
            assert ">German<" in text
    refused(moe_route("plot", "correlation", general, "--out", tmp_path / "e.svg"), "--scores")
    narrow = ("plot", "divergence", general, "--out", tmp_path / "e.svg", "--column", "0")
    refused(moe_route(*narrow), "1 to 40 inches")
    levels.write_text("kor_Hang\tlow\n")
    refused(
        moe_route("plot", "divergence", general, "--out", tmp_path / "e.svg", "--levels", levels), "none of the groups"
    )
    refused(moe_route("plot", "sweep-overlap", general, "--out", tmp_path / "e.svg"), "--task")
    refused(moe_route("plot", "divergence", general, "--out", tmp_path / "e.svg", "--by-script", "--floor"), "--floor")
    refused(moe_route("plot", "entropy", general, "--out", tmp_path / "e.svg", "--floor"), "takes no --floor")
    assert moe_route("plot", "divergence", general, "--out", tmp_path / "e.svg", "--interval", "3")[0] == 2


def test_recordings_answers_and_checkpoints_are_compared(answer, moe_route, general, tmp_path):
    other, third = tmp_path / "other.safetensors", tmp_path / "third.safetensors"
    for path, plan in ((other, mr.Plan.activate({2: [5]}, strength=2.0)), (third, mr.Plan.forbid({2: [5]}))):
        plan.save(tmp_path / "plan.json")
        arguments = ["--languages", "eng_Latn,deu_Latn", "--limit", "12", "--plan", str(tmp_path / "plan.json")]
        assert main(["record", "--out", str(path), *arguments]) == 0
    statistics = [mr.RoutingStatistics.load(path) for path in (general, other, third)]
    picture = tmp_path / "moved.png"
    found = answer("analyze", "compare", general, other, "--groups", "deu_Latn", "--picture", picture)
    expected = analysis.compare(*statistics[:2], groups=["deu_Latn"])
    np.testing.assert_allclose(found["values"], expected.values)
    assert found["moved"]["deu_Latn"][0][:2] == [2, 5]
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = answer("analyze", "compare", general, other, third)
    expected = analysis.checkpoint_series(dict(zip(("general", "other", "third"), statistics, strict=True)))
    np.testing.assert_allclose(found["specialization"], expected.specialization)
    lines = [
        json.dumps({"item": str(n), "language": group, "correct": {"exact": group == "eng_Latn" or n % 2 == 0}})
        for n in range(6)
        for group in ("eng_Latn", "deu_Latn")
    ]
    (tmp_path / "base.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert answer("analyze", "compare", tmp_path / "base.jsonl")["counts"] == [[3, 3, 0, 0]]
    refused(moe_route("analyze", "compare", general), "recordings or more")
    refused(moe_route("analyze", "compare", general, other, "--phase", "prefill"), "leave it out")
    found = answer("analyze", "layers", general, "--of", "narrowing", "--reference", "deu_Latn")
    np.testing.assert_allclose(found["against"], analysis.narrowing(statistics[0], "deu_Latn").against)
    found = answer("analyze", "layers", general, "--of", "specialization")
    np.testing.assert_allclose(found["specialization"], analysis.specialization(statistics[0]))
