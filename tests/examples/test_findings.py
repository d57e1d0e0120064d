"""The findings of `examples/findings`: their numbers on known data, their words, and the command that runs them."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_route.analysis import Divergence
from moe_route.data import demo_corpus
from moe_route.demo.circle import DemoTexts
from moe_route.demo.measurement import Measurement, Scores
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import ExpertSelection, Plan

FINDINGS = Path(__file__).parents[2] / "examples" / "findings"
MODULES = ("run", "switching", "skill", "depth", "association", "raising", "control", "pictures", "words")
LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan")
EXPERTS = ExpertSelection({1: [0], 2: [3, 5], 5: [2], 7: [1, 4]}, num_experts=[16] * 8)
pytestmark = pytest.mark.skipif(not FINDINGS.is_dir(), reason="examples/ is not here (a source checkout has it)")
pytest.importorskip("matplotlib", reason="the findings are drawn with matplotlib")
pytest.importorskip("transformers", reason="the shipped model needs transformers")


@pytest.fixture(scope="module")
def of() -> Iterator[SimpleNamespace]:
    """The modules of the findings, imported as their command imports them, and forgotten afterwards."""
    kept = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FINDINGS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FINDINGS))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def scores(match: float, languages: int = 3, items: int = 40, seed: int = 0) -> Scores:
    """Random scores with this probability of an exact match."""
    rng = np.random.default_rng(seed)
    return Scores((rng.random((items, languages)) < match).astype(float), rng.exponential(1, (items, languages)))


class TestSkill:
    def test_share_is_wilson_s(self, of: Any):
        share = of.skill.Share.of(np.array([1.0] * 8 + [0.0] * 2))
        assert share == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-3)
        every = of.skill.Share.of(np.ones(10))
        assert every.high == 1
        assert every.low < 0.8, "ten of ten do not prove certainty"

    def skill(self, of: Any, english_only: float, unseen: float, languages: tuple[str, ...] = LANGUAGES) -> Any:
        number = len(languages)
        parts = {"seen": 0.9, "english_only": english_only, "unseen": unseen}
        return of.skill.Skill(
            languages, {k: scores(v, number, 100, seed) for seed, (k, v) in enumerate(parts.items())}, {}
        )

    def test_transfer_leaves_english_out(self, of: Any):
        found = self.skill(of, 0.9, 0.3)
        columns = [1, 2]
        means = [found.scores[subset].correct[:, columns].mean() for subset in ("english_only", "unseen")]
        assert found.transfer(*found.others).value == pytest.approx(means[0] - means[1])
        assert "English transfers" in found.sentence
        assert "nothing transfers" in self.skill(of, 0.3, 0.9).sentence
        assert "cannot be told from none" in self.skill(of, 0.5, 0.5).sentence

    def test_english_alone(self, of: Any):
        found = self.skill(of, 0.5, 0.5, LANGUAGES[:1])
        assert "mean of the others" not in str(found)
        assert found.to_dict()["mean_transfer"] is None

    def test_shares_come_from_the_record_of_the_training(self, of: Any, tmp_path: Path):
        assert of.skill.shares_in_training(str(tmp_path)) == {}
        assert of.skill.shares_in_training("someone/their-model") == {}
        (tmp_path / "training.json").write_text('{"seed": 1}', encoding="utf-8")
        assert of.skill.shares_in_training(str(tmp_path)) == {}
        (tmp_path / "training.json").write_text('{"shares": {"deu_Latn": 0.25}}', encoding="utf-8")
        assert of.skill.shares_in_training(str(tmp_path)) == {"deu_Latn": 0.25}
        for foreign in ("{", "[1]", '{"shares": [0.5]}', '{"shares": {"deu_Latn": null}}', '{"shares": {"gpu": 8}}'):
            (tmp_path / "training.json").write_text(foreign, encoding="utf-8")
            assert of.skill.shares_in_training(str(tmp_path)) == {}, "other programs write files of this name, too"


@pytest.fixture(scope="module")
def language_model() -> LanguageModel:
    return LanguageModel.load()


class TestDepth:
    def test_untrained_is_the_same_configuration_and_the_same_every_time(self, of: Any, language_model: LanguageModel):
        first, reason = of.depth.untrained_model(language_model)
        second, _ = of.depth.untrained_model(language_model)
        assert reason == ""
        shapes = [{k: v.shape for k, v in one.model.state_dict().items()} for one in (language_model, first, second)]
        assert shapes[0] == shapes[1]
        assert all((a == b).all() for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))

    def test_a_large_model_has_no_untrained_one_and_the_reason_is_told(
        self, of: Any, language_model: LanguageModel, monkeypatch
    ):
        monkeypatch.setattr(of.depth, "LARGEST", 1000)
        assert of.depth.untrained_model(language_model)[0] is None
        with language_model.attach() as routed:
            statistics = Measurement(language_model, routed).record(demo_corpus().subset(LANGUAGES, 3), "text")
        found = of.depth.Depth(of.depth.profile_of(statistics), *of.depth.untrained_model(language_model))
        assert "billion random weights" in str(found)
        assert found.beyond_untrained is None

    def test_the_interval_of_the_difference_is_paired(self, of: Any, language_model: LanguageModel):
        """The same model beside itself: no difference, and no width."""
        with language_model.attach() as routed:
            profile = of.depth.profile_of(
                Measurement(language_model, routed).record(demo_corpus().subset(LANGUAGES, 4), "text")
            )
        beyond = of.depth.Depth(profile, profile).beyond_untrained
        assert (beyond.low, beyond.value, beyond.high) == (0, 0, 0)


SHARE, LOSS = "share of pairs seen", "loss of general text"


class TestAssociation:
    languages = ("deu_Latn", "fra_Latn", "rus_Cyrl", "jpn_Jpan", "hin_Deva", "swh_Latn", "ind_Latn")

    def found(self, of: Any, slope: float, number: int = 7, covariates: bool = True) -> Any:
        """Divergence of a layer that follows exact match, and of one that is noise."""
        rng = np.random.default_rng(1)
        names = self.languages[:number]
        match = np.linspace(0.2, 0.9, number)
        values = np.stack([0.5 + slope * match, rng.uniform(0.3, 0.4, number)], axis=1)
        pairs = values[:, None] + rng.normal(0, 0.01, (number, 6, 2))
        made = Divergence(values, names, "eng_Latn", ("0", "1"), pair_values=pairs, pairs=6, pairing="paired")

        class Recorded:
            groups = ("eng_Latn", *names)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(of.association, "divergence", lambda *_, **__: made)
            shares = dict(zip(names, match**2, strict=True)) if covariates else {}
            loss = dict(zip(names, rng.uniform(50, 60, number), strict=True))
            return of.association.associate(
                Recorded(),
                dict(zip(names, match, strict=True)),
                {SHARE: shares, LOSS: loss},
            )

    def test_the_layer_is_corrected_for_and_the_mean_is_no_layer(self, of: Any):
        found = self.found(of, -0.3)
        assert found.strongest == 0
        assert found.raw.layers == ("0", "1", "mean")
        assert found.raw.pearson[0] == pytest.approx(-1)
        assert (found.raw.p_corrected >= found.raw.p_value).all()
        assert "answer better" in found.sentence

    def test_confounders_are_told(self, of: Any):
        found = self.found(of, -0.3)
        assert list(found.partial) == [
            (SHARE,),
            (LOSS,),
            (SHARE, LOSS),
        ]
        assert found.explained_by(SHARE) > 0.9
        assert "given" in str(found)
        assert list(self.found(of, -0.3, covariates=False).partial) == [(LOSS,)]
        json.dumps(found.to_dict(), allow_nan=False)

    def test_a_covariate_that_leaves_the_other_sign_explains_it_all(self, of: Any):
        found = self.found(of, -0.3)
        (held, given), sign = list(found.partial.items())[-1], np.array([-0.9, 0.1, -0.5])
        clear = np.array([0.01, 0.9, 0.5])

        def told(pearson: np.ndarray) -> str:
            changed = replace(given, pearson=pearson, p_corrected=clear)
            return replace(found, partial={**found.partial, held: changed}).sentence

        assert "also given" in told(sign)
        assert "no layer is clear once" in told(-sign), "a clear correlation of the other sign is another finding"

    def test_every_largest_set_of_covariates_must_leave_it(self, of: Any):
        found = self.found(of, -0.3)
        clear = replace(found.raw, p_corrected=np.full(3, 0.01))
        gone = replace(found.raw, p_corrected=np.full(3, 0.9))
        told = replace(found, partial={(SHARE,): gone, (LOSS,): clear}).sentence
        assert f"no layer is clear once the {SHARE} is held constant" in told
        assert "also given" in replace(found, partial={(SHARE,): clear, (LOSS,): clear}).sentence

    def test_divergence_without_values_is_no_correlation(self, of: Any):
        found = self.found(of, float("nan"))
        assert found.raw is not None, "the other layer has values"
        names = self.languages
        flat = Divergence(np.full((7, 2), np.nan), names, "eng_Latn", ("0", "1"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(of.association, "divergence", lambda *_, **__: flat)
            match = dict(zip(names, np.linspace(0.1, 0.7, 7), strict=True))
            none = of.association.associate(SimpleNamespace(groups=("eng_Latn", *names)), match, {})
        assert none.raw is None
        assert "undefined" in str(none)
        json.dumps(none.to_dict(), allow_nan=False)

    def test_few_languages_say_nothing(self, of: Any):
        found = self.found(of, -0.3, number=3)
        assert found.raw is None
        assert "too few" in found.sentence


class TestRaising:
    def test_plans_and_their_controls(self, of: Any):
        found = of.raising.raising_plans(EXPERTS, 8, 1)
        assert list(found) == ["+0.5", "+1", "forced on", "+0.5, layers 2-5", "+0.5, other layers", "-0.5"]
        assert found["+0.5"] == Plan.activate(EXPERTS, strength=0.5)
        assert found["+0.5, layers 2-5"] == Plan.activate(EXPERTS.restrict(range(2, 6)), strength=0.5)
        assert found["-0.5"] == Plan.deactivate(EXPERTS, strength=0.5)
        inside = of.raising.raising_plans(ExpertSelection({3: [1]}, num_experts=[16] * 8), 8, 2)
        assert list(inside) == ["+0.5", "+1", "forced on", "-0.5"]
        assert of.raising.raising_plans(ExpertSelection({}), 8, 2) == {}

    def test_the_sentence_follows_the_interval(self, of: Any):
        def raised(after: float) -> str:
            return of.raising.Raising(EXPERTS, LANGUAGES, scores(0.5), {"+0.5": scores(after)}).sentence

        assert "raises exact match" in raised(0.9)
        assert "lowers exact match" in raised(0.1)
        assert "no more than" in raised(0.5)
        assert (
            of.raising.Raising(ExpertSelection({}), LANGUAGES, scores(0.5)).sentence
            == "There is no task expert to raise."
        )


@pytest.fixture(scope="module")
def made(of: Any, language_model: LanguageModel) -> Any:
    """All findings on a part of their texts."""
    study = DemoTexts.read(None, ["eng_Latn", "deu_Latn", "jpn_Jpan", "rus_Cyrl", "swh_Latn"], 6)
    with language_model.attach() as routed:
        return of.run.measure(study, Measurement(language_model, routed), draws=2)


class TestCommand:
    def test_the_text_fits_and_is_numbered_as_the_demo_s(self, made: Any):
        text = str(made)
        assert max(map(len, text.splitlines())) <= 120
        assert "nan" not in text
        assert "Japanese" in text
        assert "6 sentences in 5 languages, 18 problems in 5 of them." in text
        names = ["task_experts_off", "language_experts_off", "skill", "depth", "association", "raising", "control"]
        assert [name for name, _ in made.findings()] == names
        begins = [text.index(f"\n\n{n}. {one.sentence[:20]}") for n, (_, one) in enumerate(made.findings(), 2)]
        assert begins == sorted(begins)

    def test_json_holds_the_same(self, made: Any):
        content = json.loads(json.dumps(made.to_dict(), allow_nan=False))
        for name, finding in made.findings():
            assert content[name]["sentence"] == finding.sentence

    def test_files_and_page(self, of: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
        monkeypatch.setattr(of.run, "measure", lambda study, run, draws: made)
        page = tmp_path / "page.md"
        page.write_text("before\n<!-- findings -->\nof the last run\n<!-- end of findings -->\nafter\n")
        out = tmp_path / "findings"
        of.run.main(["--limit", "4", "--out", str(out), "--page", str(page)])
        pictures = {f"{name}.png" for name, _ in made.findings()}
        assert {path.name for path in out.iterdir()} == pictures | {"report.json", "report.txt"}
        assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
        text = page.read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert made.skill.sentence in text
        assert "of the last run" not in text
        assert str(made) in capsys.readouterr().out

    def test_the_first_two_are_the_demo_s_with_tables(self, made: Any):
        off = made.task_experts_off.off
        assert made.task_experts_off.sentence == off.sentence
        text = str(made.task_experts_off)
        for one, change in off.changes.items():
            (row,) = (line for line in text.splitlines() if line.startswith(f"{one} ") and "[" in line)
            assert f"{change.value:+.2f}" in row.replace(f"{change.value:+.3f}", f"{change.value:+.2f}")
        assert set(made.task_experts_off.thresholds) == set(off.task_experts.others)
        experts = sum(len(ids) for ids in made.to_dict()["task_experts_off"]["task_experts"]["experts"].values())
        assert f"the {experts} experts of sums" in text
        table = str(made.language_experts_off)
        assert all(f"{value:+.2f}<" in table for value in made.language_experts_off.off.own)

    def test_what_the_demo_tells_of_them(self, of: Any, made: Any):
        told = of.run.told_by_the_demo(made, "a command")
        claims = {one["claim"]: one for one in told["claims"]}
        transfer = made.skill.transfer(*made.skill.others)
        assert claims["transfer from English"]["value"] == transfer.value
        assert claims["transfer from English"]["shown"] is (transfer.verdict == "higher")
        assert claims["a U"]["value"] == made.depth.trained.depth.value
        assert {"a U", "transfer from English", "a gain by raising"} == set(claims)
        with pytest.raises(SystemExit, match="--limit"):
            of.run.main(["--results", "results.json", "--limit", "4"])

    def test_what_cannot_be_done_is_said(self, of: Any, tmp_path: Path):
        with pytest.raises(SystemExit, match="--draws"):
            of.run.main(["--draws", "0"])
        (tmp_path / "page.md").write_text("nothing")
        with pytest.raises(SystemExit, match="findings"):
            of.run.into_page(tmp_path / "page.md", "text")


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_shallow_model_gives_no_finding_that_it_cannot_show(of: Any, layers: int, tmp_path: Path):
    """Where no layer lies outside the middle, nothing is said of a U; nothing is nan, nothing is warned of."""
    shallow = LanguageModel.load()
    shallow.model.model.layers = shallow.model.model.layers[:layers]
    shallow.model.config.num_hidden_layers = layers
    with warnings.catch_warnings(), shallow.attach() as routed:
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        study = DemoTexts.read(None, ["eng_Latn", "deu_Latn"], 2)
        findings = of.run.measure(study, Measurement(shallow, routed), draws=2)
        findings.draw(tmp_path)
    assert "nan" not in str(findings)
    assert ("too few layers" in findings.depth.sentence) is (layers < 3)
    json.dumps(findings.to_dict(), allow_nan=False)


def test_a_model_without_task_experts(
    of: Any, language_model: LanguageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("moe_route.demo.task_experts.expert_difference", lambda *_, **__: np.zeros((8, 16)))
    study = DemoTexts.read(None, ["eng_Latn", "deu_Latn"], 2)
    with language_model.attach() as routed:
        findings = of.run.measure(study, Measurement(language_model, routed))
    assert not findings.raising.after
    assert {path.stem for path in findings.draw(tmp_path)} == {"language_experts_off", "skill", "depth"}
