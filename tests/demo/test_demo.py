"""The demonstration: its statistics on known numbers, its controls, and the whole of it on the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_route.analysis import paired_difference
from moe_route.demo import DemoReport, demo, middle_layers
from moe_route.demo.circle import THRESHOLDS, choose_threshold, plans
from moe_route.steering import ExpertSelection, Plan
from moe_route.workload import LanguageModel, ModelNotFoundError, Text, read_corpus, texts_of


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


class TestPlans:
    experts = ExpertSelection({1: [0], 2: [3, 5], 5: [2], 7: [1, 4]}, num_experts=[16] * 8)

    def test_the_middle_is_the_middle_half(self):
        assert middle_layers(8) == (2, 3, 4, 5)
        assert middle_layers(1) == (0,)
        assert middle_layers(48) == tuple(range(12, 36))

    def test_the_published_plan_comes_first(self):
        found = plans(self.experts, (2, 3, 4, 5), 8)
        assert next(iter(found.values())) == Plan.activate(self.experts, (2, 3, 4, 5), strength=0.5)

    def test_controls_are_there(self):
        found = plans(self.experts, (2, 3, 4, 5), 8)
        assert [name for name in found if name.startswith("random")] == [f"random {seed}" for seed in range(5)]
        layers = {rule.layers for rule in found["other layers +0.5"].rules}
        assert layers == {(0, 1, 6, 7)}
        assert found["task -0.5"] == Plan.deactivate(self.experts, (2, 3, 4, 5), strength=0.5)

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

    def test_thresholds_find_fewer_experts_as_they_rise(self, made):
        sizes = [len(selection) for selection in made[0].all_found.values()]
        assert sizes == sorted(sizes)

    def test_without_english_there_is_nothing_to_compare(self):
        with pytest.raises(ValueError, match="eng_Latn"):
            demo(languages=["deu_Latn", "jpn_Jpan"], limit=2)
