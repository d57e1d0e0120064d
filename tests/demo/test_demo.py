"""The demonstration: its statistics on known numbers, its controls, and the whole of it on the demo model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_route.analysis import AnalysisError, paired_difference, random_control
from moe_route.demo import DemoReport, demo
from moe_route.demo.circle import RANDOM_SETS, THRESHOLDS, choose_threshold, plans, random_plans
from moe_route.recording import RoutingStatistics
from moe_route.steering import ExpertSelection, Plan
from moe_route.workload import (
    EncodedTexts,
    LanguageModel,
    ModelNotFoundError,
    Text,
    read_corpus,
    record_texts,
    texts_of,
)


class TestPairedDifference:
    def test_value_is_the_change_per_token(self):
        tokens = np.array([10.0, 30.0])
        found = paired_difference(np.array([12.0, 33.0]), np.array([10.0, 30.0]), tokens)
        assert found.value == pytest.approx(5 / 40)

    def test_a_constant_change_has_no_spread(self):
        base = np.random.default_rng(0).uniform(50, 100, 20)
        tokens = np.full(20, 10.0)
        found = paired_difference(base + 1, base, tokens)
        assert (found.low, found.value, found.high) == pytest.approx((0.1, 0.1, 0.1))
        assert found.verdict == "higher"
        assert paired_difference(base - 1, base, tokens).verdict == "lower"

    def test_no_change_is_unclear(self):
        base = np.ones(20)
        assert paired_difference(base, base, base).verdict == "unclear"

    def test_one_text_has_no_interval(self):
        found = paired_difference(np.array([12.0]), np.array([10.0]), np.array([10.0]))
        assert found.value == pytest.approx(0.2)
        assert np.isnan([found.low, found.high]).all()
        assert found.verdict == "unclear"
        assert str(found) == "+0.2000 no interval (unclear)"

    def test_few_texts_hold_the_truth_as_often_as_said(self):
        """Plain percentiles of 15 items hold it in about 92 of 100 cases; of 1200, 1118 is four deviations below."""
        rng = np.random.default_rng(4)
        change = rng.normal(size=(1200, 15))
        zeros, ones = np.zeros(15), np.ones(15)
        found = [paired_difference(row, zeros, ones, resamples=400, seed=i) for i, row in enumerate(change)]
        assert sum(one.verdict == "unclear" for one in found) >= 1118

    def test_noise_is_mostly_unclear(self):
        """95 % intervals of differences without an effect leave zero out in about one case of twenty."""
        rng = np.random.default_rng(1)
        base, tokens = np.zeros(40), np.ones(40)
        clear = sum(
            paired_difference(rng.normal(size=40), base, tokens, resamples=500, seed=i).verdict != "unclear"
            for i in range(200)
        )
        assert 2 <= clear <= 24

    def test_width_is_that_of_the_mean(self):
        change = np.random.default_rng(2).normal(size=400)
        found = paired_difference(change, np.zeros(400), np.ones(400))
        assert found.high - found.low == pytest.approx(2 * 1.96 * change.std() / 20, rel=0.1)

    def test_languages_are_averaged_and_drawn_together(self):
        """Changes that cancel between the languages of each item leave no spread in the mean."""
        change = np.random.default_rng(3).normal(size=50)
        nats = np.stack([change, -change], axis=1)
        found = paired_difference(nats, np.zeros((50, 2)), np.ones((50, 2)))
        assert found.high - found.low == pytest.approx(0, abs=1e-12)


class TestRandomControl:
    """The plan's change, that of each random set, and the two sources of chance: texts and draws."""

    def losses(self, seed, sets=19, items=40, spread=0.0):
        rng = np.random.default_rng(seed)
        base, tokens = rng.uniform(20, 30, (items, 2)), np.full((items, 2), 10.0)
        of_sets = rng.normal(0, spread, sets) if spread else np.zeros(sets)
        random = base + 10 * of_sets[:, None, None] + rng.normal(0, 0.1, (sets, items, 2))
        return base, tokens, random

    def test_numbers_by_hand(self):
        base, tokens, random = self.losses(0)
        found = random_control(base - 1, random, base, tokens)
        changes = ((random - base).sum(1) / tokens.sum(0)).mean(-1)
        assert found.plan == pytest.approx(-0.1)
        np.testing.assert_allclose(found.random, changes)
        assert found.difference.value == pytest.approx(-0.1 - changes.mean())
        assert found.difference.verdict == "lower"
        assert (found.rank, found.p_value) == (1, 1 / 20)
        worst = random_control(base + 1, random, base, tokens)
        assert (worst.rank, worst.p_value) == (20, 1.0)
        assert random_control(random[3], random, base, tokens).rank > 1, "equal changes count against the plan"
        json.dumps(found.to_dict(), allow_nan=False)
        with pytest.raises(AnalysisError, match="no random set"):
            random_control(base, random[:0], base, tokens)

    def test_p_is_never_below_one_in_the_number_of_sets_and_the_plan(self):
        base, tokens, random = self.losses(0, sets=5)
        assert random_control(base - 9, random, base, tokens).p_value == pytest.approx(1 / 6)

    def test_the_interval_holds_the_draws(self):
        """Plans that are random sets themselves: their mean is not different. Over items alone the interval is too
        narrow, since it is the draws that differ."""
        clear = {False: 0, True: 0}
        for seed in range(60):
            base, tokens, random = self.losses(seed, sets=10, spread=0.05)
            truth = base + np.random.default_rng(seed + 1000).normal(
                0, 0.1, base.shape
            )  # what the sets bring on average
            for enumerated in clear:
                found = random_control(truth, random, base, tokens, enumerated=enumerated, resamples=500)
                clear[enumerated] += found.difference.verdict != "unclear"
        assert clear[False] <= 9
        assert clear[True] >= 40


class TestPlans:
    experts = ExpertSelection({1: [0], 2: [3, 5], 5: [2], 7: [1, 4]}, num_experts=[16] * 8)

    def test_the_published_plan_comes_first(self):
        found = plans(self.experts, (2, 3, 4, 5), 8)
        assert next(iter(found.values())) == Plan.activate(self.experts, (2, 3, 4, 5), strength=0.5)

    def test_controls_are_there(self):
        found = plans(self.experts, (2, 3, 4, 5), 8)
        layers = {rule.layers for rule in found["other layers +0.5"].rules}
        assert layers == {(0, 1, 6, 7)}
        assert found["task -0.5"] == Plan.deactivate(self.experts, (2, 3, 4, 5), strength=0.5)

    def test_all_other_experts_are_taken_where_they_are_few(self):
        one = ExpertSelection({1: [0], 4: [7]}, num_experts=[16] * 8)
        found, enumerated = random_plans(one, (2, 3, 4, 5))
        assert enumerated
        expected = [ExpertSelection({4: [expert]}, num_experts=[16] * 8) for expert in range(16) if expert != 7]
        assert found == [Plan.activate(other, (2, 3, 4, 5), strength=0.5) for other in expected]

    def test_so_many_are_drawn_that_p_can_be_small(self):
        found, enumerated = random_plans(self.experts, (2, 3, 4, 5))
        assert not enumerated
        assert len(found) == RANDOM_SETS >= 19
        activate = Plan.activate(self.experts, (2, 3, 4, 5), strength=0.5)
        assert found[:3] == [activate.random(seed) for seed in range(3)]

    def test_a_layer_whose_experts_are_all_steered_leaves_nothing_else(self):
        assert random_plans(ExpertSelection({2: range(4)}, num_experts=[4] * 8), (2, 3, 4, 5)) == ([], True)

    def test_nothing_in_the_middle_is_nothing_to_steer(self):
        assert plans(ExpertSelection({0: [1]}, num_experts=[16] * 8), (2, 3, 4, 5), 8) == {}

    def test_nothing_outside_leaves_that_control_out(self):
        found = plans(ExpertSelection({3: [1]}, num_experts=[16] * 8), (2, 3, 4, 5), 8)
        assert not [name for name in found if name.startswith("other layers")]

    def test_the_largest_threshold_with_an_expert_in_the_middle(self):
        outside, inside = ExpertSelection({0: [1]}), ExpertSelection({3: [1]})
        found = {t: inside if t <= 0.3 else outside for t in THRESHOLDS}
        assert choose_threshold(found, (2, 3, 4, 5)) == 0.3
        assert choose_threshold(dict.fromkeys(THRESHOLDS, outside), (2, 3, 4, 5)) == THRESHOLDS[-1]


@pytest.fixture(scope="module")
def spoken() -> LanguageModel:
    return LanguageModel.load()


@pytest.fixture(scope="module")
def made(spoken: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoReport, Path]:
    """The whole demonstration on a part of its texts: the report, and the folder with the pictures."""
    out = tmp_path_factory.mktemp("demo")
    return demo(spoken, languages=["eng_Latn", "deu_Latn", "jpn_Jpan"], limit=12, out=out), out


class TestLanguageModel:
    def test_losses_do_not_depend_on_the_batch(self, spoken: LanguageModel):
        texts = texts_of(read_corpus(languages=["eng_Latn", "jpn_Jpan"], limit=5))
        alone, together = spoken.losses(texts, batch_size=1), spoken.losses(texts, batch_size=10)
        assert (alone[:, 1] == together[:, 1]).all()
        np.testing.assert_allclose(alone[:, 0], together[:, 0], rtol=1e-4)

    def test_loss_is_the_model_s_own(self, spoken: LanguageModel):
        text = "The last bus leaves at half past nine."
        ids = spoken.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = spoken.model(input_ids=ids, labels=ids, output_router_logits=False).loss.item()
        ((nats, tokens),) = spoken.losses([Text("eng_Latn", "1", text)])
        assert tokens == ids.shape[1] - 1
        assert nats / tokens == pytest.approx(expected, rel=1e-5)

    def test_order_of_texts_is_kept(self, spoken: LanguageModel):
        texts = texts_of(read_corpus(languages=["eng_Latn"], limit=6))
        forth, back = spoken.losses(texts, batch_size=2), spoken.losses(texts[::-1], batch_size=2)
        np.testing.assert_allclose(forth, back[::-1], rtol=1e-4)

    def test_cut_texts_are_counted(self, spoken: LanguageModel, tmp_path: Path, recwarn):
        texts = [
            Text("eng_Latn", "long", "one two three " * 400),
            Text("eng_Latn", "short", "One."),
            *texts_of(read_corpus(languages=["eng_Latn"], limit=3)),
        ]
        encoded = spoken.encode(texts, max_length=20)
        lengths = [len(spoken.tokenizer(text.text)["input_ids"]) for text in texts]
        assert encoded.cut == sum(length > 20 for length in lengths) >= 1
        assert [len(ids) for ids in encoded.ids] == [min(length, 20) for length in lengths]
        assert encoded.note == f"{encoded.cut} of 5 texts cut to 20 tokens"
        np.testing.assert_array_equal(spoken.losses(encoded), spoken.losses(texts, max_length=20))
        with pytest.raises(ValueError, match="encoded already"):
            spoken.losses(encoded, max_length=20)
        whole = spoken.encode(texts[1:2])
        assert (whole.cut, whole.note, whole.metadata) == (0, "", {})
        assert spoken.encode(texts).limit == spoken.model.config.max_position_embeddings
        assert spoken.encode([]).ids == ()

    def test_files_say_how_many_texts_were_cut(self, spoken: LanguageModel, tmp_path: Path):
        texts = texts_of(read_corpus(languages=["eng_Latn"], limit=4))
        kept = []
        with spoken.attach() as routed:
            for part, length in ((texts[:2], 5), (texts[2:], 6)):
                with routed.record() as recorder:
                    found = record_texts(recorder, spoken, part, max_length=length)
                assert isinstance(found, EncodedTexts)
                assert found.cut == 2
                kept.append(recorder.statistics())
            with routed.record() as recorder:
                record_texts(recorder, spoken, texts)
            assert "cut" not in repr(recorder.statistics())
        assert "cut: 2 texts to 5 tokens" in repr(kept[0])
        (kept[0] + kept[1]).save(tmp_path / "both.safetensors")
        both = RoutingStatistics.load(tmp_path / "both.safetensors")
        assert (both.metadata["cut_texts"], both.metadata["cut_to_tokens"]) == (4, [5, 6])
        assert "cut: 4 texts to 5/6 tokens" in repr(both)

    def test_an_unknown_name(self, tmp_path: Path):
        with pytest.raises(ModelNotFoundError, match="checkpoint"):
            LanguageModel.load(str(tmp_path / "nothing"))

    def test_a_checkpoint_without_its_tokenizer(self, spoken: LanguageModel, tmp_path: Path):
        spoken.model.save_pretrained(tmp_path)
        with pytest.raises(ModelNotFoundError, match="tokenizer"):
            LanguageModel.load(str(tmp_path))


class TestDemo:
    def test_the_model_is_restored(self, made):
        assert made[0].restored

    def test_pictures_and_reports_are_written(self, made):
        report, out = made
        assert {path.name for path in out.iterdir()} == {
            *(p.name for p in report.pictures),
            "report.json",
            "report.txt",
        }
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.pictures)
        assert json.loads((out / "report.json").read_text())["restored"] is True

    def test_report_reads(self, made):
        text = str(made[0])
        for words in ("Divergence of the routing from eng_Latn", "Task experts", "random", "equal bit for bit"):
            assert words in text

    def test_divergence_is_of_every_other_language(self, made):
        report = made[0]
        assert report.divergence.groups == ("deu_Latn", "jpn_Jpan")
        assert report.divergence.pairing == "paired"
        assert ((report.divergence.values > 0) & (report.divergence.values < 1)).all()

    def test_the_conclusion_follows_the_intervals(self, made):
        report = made[0]
        assert report.outcomes, "the demo model has a task expert in the middle layers"
        raised = report.outcomes[0].mean
        words = {"lower": "lowers the loss", "higher": "does not help", "unclear": "makes no difference"}
        assert words[raised.verdict] in report.conclusion

    def test_the_middle_is_told_with_its_interval_only(self, made):
        text = str(made[0])
        (line,) = [line for line in text.splitlines() if line.startswith("Mean over layers 2-5")]
        assert line.count("[") == 1
        assert "bootstrap over sentences" in text

    def test_random_experts_are_told_with_their_number_and_p(self, made):
        report = made[0]
        control = report.control
        assert len(control.random) == (15 if control.enumerated else RANDOM_SETS)
        assert f"of {len(control.random) + 1}: p = {control.p_value:.3f}" in str(report)
        assert report.outcomes[-1].mean.value == pytest.approx(np.mean(control.random))
        assert report.outcomes[0].mean.value == pytest.approx(control.plan)
        assert json.loads(json.dumps(report.to_dict()))["random_control"]["p_value"] == control.p_value

    def test_thresholds_find_fewer_experts_as_they_rise(self, made):
        sizes = [len(selection) for selection in made[0].all_found.values()]
        assert sizes == sorted(sizes)

    def test_without_english_there_is_nothing_to_compare(self):
        with pytest.raises(ValueError, match="eng_Latn"):
            demo(languages=["deu_Latn", "jpn_Jpan"], limit=2)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_shallow_model_gives_no_finding_that_it_cannot_show(layers: int, tmp_path: Path):
    """Where no layer lies outside the middle, nothing is said of the middle; nothing is nan, nothing is warned of."""
    shallow = LanguageModel.load()
    shallow.model.model.layers = shallow.model.model.layers[:layers]
    shallow.model.config.num_hidden_layers = layers
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        for limit, out in ((6, tmp_path), (1, None)):
            text = str(demo(shallow, languages=["eng_Latn", "deu_Latn"], limit=limit, out=out))
            assert "nan" not in text
            assert ("Mean over layers" in text) is (layers == 3 and limit > 1)
