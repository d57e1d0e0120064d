"""The study runs from its one command, resumes, and its tables and verdicts follow from its numbers."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness.routing_data import FOLDER, needs_data

from moe_route import analysis
from moe_route.data import demo_corpus

STUDY = Path(__file__).parents[2] / "examples" / "study"
MODULES = ("run", "measure", "findings", "tables", "recorded", "published_routing")
pytestmark = pytest.mark.skipif(not STUDY.is_dir(), reason="examples/ is not here (a source checkout has it)")
pytest.importorskip("matplotlib", reason="the study imports the example that draws with matplotlib")
pytest.importorskip("transformers", reason="the shipped model needs transformers")


@pytest.fixture(scope="module")
def study() -> Iterator[SimpleNamespace]:
    """The modules of the study, imported as its command imports them, and forgotten afterwards."""
    kept = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(STUDY))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(STUDY))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout that the study reads, with the shipped sentences in the place of FLORES."""
    folder = tmp_path_factory.mktemp("data")
    corpus = demo_corpus().subset(limit=6)
    (folder / "flores200" / "devtest").mkdir(parents=True)
    for language in corpus.languages:
        (folder / "flores200" / "devtest" / f"{language}.devtest").write_text("\n".join(corpus[language]) + "\n")
    return folder


@pytest.fixture(scope="module")
def arguments(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("out")
    return ["--data", str(data), "--out", str(out), "--sentences", "6", "--questions", "5", "--random", "2"]


@pytest.fixture(scope="module")
def numbers(study: SimpleNamespace, arguments: list[str]) -> dict[str, Any]:
    """The numbers of one small run on the shipped model."""
    study.run.main(arguments)
    return json.loads((Path(arguments[3]) / "study.json").read_text(encoding="utf-8"))


@pytest.mark.exhaustive
def test_the_command_resumes_and_fills_a_page(study, arguments, numbers, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- tables -->\nold\n<!-- end of tables -->\n\nafter\n")
    study.run.main([*arguments, "--page", str(page)])
    assert " s\n" not in capsys.readouterr().out  # no stage ran, so none says how long it took
    out = Path(arguments[3])
    assert json.loads((out / "study.json").read_text(encoding="utf-8")) == numbers
    tables = (out / "tables.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8") == (f"before\n\n<!-- tables -->\n{tables}<!-- end of tables -->\n\nafter\n")
    assert str(out) not in tables


def test_a_page_without_markers_is_refused(study, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit, match="add them where the tables go"):
        study.run.into_page(page, "tables")
    assert page.read_text() == "nothing\n"


def test_other_settings_are_measured_again(study, arguments, numbers):
    args = study.run.parser().parse_args(arguments)
    more = study.run.parser().parse_args([*arguments, "--random", "3"])
    folder = study.run.demo_model_folder()
    keys = [study.run.fingerprint(folder, study.run.material(one)) for one in (args, args, more)]
    assert keys[0] == keys[1] != keys[2]


def test_numbers_agree_with_one_another(study, numbers):
    (model,) = numbers["models"]
    depth = model["routing"]["depth"]["general"]
    assert depth["mean"]["value"] == pytest.approx(np.mean(depth["depth"]))
    assert depth["mean"]["low"] <= depth["mean"]["value"] <= depth["mean"]["high"]
    above = model["routing"]["depth"]["above_untrained"]["value"]
    assert above == pytest.approx(depth["mean"]["value"] - model["routing"]["depth"]["untrained"]["mean"]["value"])
    less = np.array(depth["by_layer"]) - np.array(depth["floor_by_layer"])
    np.testing.assert_allclose(model["routing"]["depth"]["less the floor"]["by_layer"], less, atol=1e-12)
    steering = model["steering"]
    assert steering["restored"]
    for found in steering["plans"].values():
        languages = [one["value"] for one in found["by_language"].values()]
        assert found["exact_match"]["value"] == pytest.approx(np.mean(languages))
    drawn = steering["random"]["errors"]
    assert drawn["mean_of_random"]["value"] == pytest.approx(np.mean(drawn["random"]))
    assert drawn["plan"] == pytest.approx(-steering["plans"][study.measure.RAISED]["exact_match"]["value"])
    middle = set(steering["middle"])
    assert {layer for layer, _ in steering["plans"][study.measure.RAISED]["experts"]} <= middle


def test_every_claim_is_in_the_tables_with_its_number_and_verdict(study, numbers):
    (model,) = numbers["models"]
    lines = study.tables.markdown(numbers).splitlines()
    for claim in study.findings.CLAIMS:
        (row,) = [line for line in lines if line.startswith(f"| {claim.finding} | {claim.text} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3] == claim.shown(model)
        assert cells[-1] == claim.verdict(model)
    assert {claim.finding for claim in study.findings.CLAIMS} == set(range(1, 7))


def test_verdicts_follow_from_the_numbers(study, numbers):
    found = copy.deepcopy(numbers)
    mean = found["models"][0]["routing"]["depth"]["general"]["mean"]
    claim = study.findings.CLAIMS[0]
    expected = {"appears": (0.1, 0.3), "opposite": (-0.3, -0.1), "unclear": (-0.1, 0.3), "not testable": (None, None)}
    for verdict, (low, high) in expected.items():
        mean |= {"low": low, "high": high}
        assert claim.verdict(found["models"][0]) == verdict
        assert verdict in study.tables.markdown(found)


@pytest.mark.parametrize(
    ("found", "sign", "verdict"),
    [
        ({"low": 0.1, "high": 0.2}, 1, "appears"),
        ({"low": 0.1, "high": 0.2}, -1, "opposite"),
        ({"low": -0.2, "high": -0.1}, -1, "appears"),
        ({"low": 0.0, "high": 0.2}, 1, "unclear"),
        ({"low": None, "high": None}, 1, "not testable"),
    ],
)
def test_an_interval_decides(study, found, sign, verdict):
    assert study.findings.by_interval(found, sign) == verdict


def test_verdicts_of_several_models_are_counted(study):
    assert study.tables.said(["appears"] * 3) == "appears"
    assert study.tables.said(["unclear", "appears", "appears"]) == "appears in 2 of 3, unclear in 1 of 3"


def test_what_cannot_be_tested_is_said(study, numbers):
    found = copy.deepcopy(numbers)
    model = found["models"][0]
    model["steering"]["plans"].pop(study.measure.MULTILINGUAL, None)
    model["steering"]["missing"][study.measure.MULTILINGUAL] = "there is no such expert at threshold 0.5"
    text = study.tables.markdown(found)
    assert "could not be tested, because there is no such expert" in text
    (claim,) = [one for one in study.findings.CLAIMS if "multilingual experts hurts" in one.text]
    assert claim.verdict(model) == "not testable"
    assert "Not computed" in text  # there is no recorded routing in this folder


def test_the_correlation_of_a_mean_over_layers(study):
    rng = np.random.default_rng(0)
    pairs = rng.random((5, 7, 4))
    found = analysis.Divergence(
        pairs.mean(1), tuple("abcde"), "en", tuple("wxyz"), undefined=np.zeros((5, 4), np.int64),
        pairing="paired", pairs=7, pair_values=pairs,
    )  # fmt: skip
    scores = dict(zip("abcde", rng.random(5).tolist(), strict=True))
    middle = study.measure.over_layers(found, range(1, 3))
    expected = np.corrcoef(pairs[..., 1:3].mean((1, 2)), list(scores.values()))[0, 1]
    assert analysis.correlation(middle, scores).pearson[0] == pytest.approx(expected)
    assert middle.interval()[0].shape == (5, 1)


def test_shares_of_pairs_are_those_of_training(study):
    for order in (0, 1):
        shares = study.run.shares_of_pairs(order)
        assert set(shares) == set(demo_corpus().languages) - {"eng_Latn"}
        assert all(0 < share < 1 for share in shares.values())
    assert study.run.shares_of_pairs(0) != study.run.shares_of_pairs(1)


@needs_data
@pytest.mark.data
def test_the_recorded_routing(study, numbers):
    found = study.recorded.recorded_routing(FOLDER)
    assert all(depth > 0.1 for depth in found["shape"]["depth"])
    assert [sum(counts) for counts in found["order"]["counts"]] == [found["layers"]] * 4
    assert found["specific"]["shared"][0][0] == found["specific"]["number"]
    matrix = np.array(found["matrix"]["middle"])
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(matrix[0, 1:], found["shape"]["middle"], atol=1e-9)
    assert sorted(found["matrix"]["joined"][-1]["groups"]) == sorted(found["languages"])
    text = study.tables.markdown(numbers | {"recorded": found})
    assert "Multilingual experts per layer" in text
