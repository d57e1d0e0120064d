"""Fixtures of report tests: what is recorded from the demo model over a few texts, some of them hostile to a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_route import report
from moe_route.data.batches import Text
from moe_route.report import Figure, Inputs, ResultTable
from moe_route.runs.language_model import LanguageModel
from moe_route.steering import ExpertSelection, Plan

HOSTILE = """</script><script>document.title = "taken"</script><img src=x onerror="alert('x')"> & "quotes" 👩‍👩‍👧 🦓"""
TEXTS = {
    "eng_Latn": ["The bus to the city leaves at seven.", HOSTILE, "She reads a book by the river."],
    "deu_Latn": ["Der Bus in die Stadt fährt um sieben.", "Das „Buch“ ist alt.", "Sie liest ein Buch am Fluss."],
    "arb_Arab": ["تغادر الحافلة إلى المدينة في السابعة.", "الكتاب قديم.", "تقرأ كتابا بجانب النهر."],
    "jpn_Jpan": ["街へ行くバスは七時に出ます。", "その本は古い。", "彼女は川のそばで本を読む。"],
    "hin_Deva": ["शहर की बस सात बजे जाती है।", "किताब पुरानी है।", "वह नदी के पास किताब पढ़ती है।"],
}


@pytest.fixture(scope="session")
def demo() -> LanguageModel:
    return LanguageModel.load()


@pytest.fixture(scope="session")
def inputs(demo: LanguageModel) -> Inputs:
    """Natural and steered recordings and traces, with a selection, scores and a table of results."""
    texts = [Text(group, str(item), text) for group, all_ in TEXTS.items() for item, text in enumerate(all_)]
    plan = Plan.force_on({3: [5], 4: [2, 7]})
    found = report.record_inputs(demo, texts, plan=plan, traced_items=3)
    return Inputs(
        found.recordings,
        found.traces,
        {"task": ExpertSelection({2: [1, 3], 6: [0]}, description="<b>bold</b>")},
        found.plans,
        {"accuracy": {"deu_Latn": 0.8, "arb_Arab": 0.5, "jpn_Jpan": 0.6, "hin_Deva": 0.4}},
        (
            ResultTable(
                "Effect of the plan",
                ("language", "change", "low", "high"),
                (("eng_Latn", -0.1, -0.2, 0.05), ("deu_Latn", 0.2, 0.1, 0.3), ("jpn_Jpan", -0.3, -0.4, -0.2)),
                effect={"label": "language", "value": "change", "low": "low", "high": "high"},
            ),
            ResultTable(
                "Accuracy",
                ("language", "change"),
                (("eng_Latn", -0.1), ("deu_Latn", 0.2), ("jpn_Jpan", 0.0)),
                effect={"label": "language", "value": "change", "better": "higher"},
            ),
        ),
    )


@pytest.fixture(scope="session")
def page_file(inputs: Inputs, demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return report.write(path, inputs, tokenizer=demo.tokenizer, title='A "title" with <b>&amp;</b> 🦓')


@pytest.fixture(scope="session")
def figures() -> tuple[Figure, ...]:
    """A figure of each kind, with names and texts that are hostile to a page."""
    return (
        Figure(
            "u", "A U", HOSTILE, "lines", {"German": [0.5, 0.1, 0.4], HOSTILE: [0.6, None, 0.3]}, "divergence", "far"
        ),
        Figure(
            "effect",
            "Experts off",
            "Sums fall.",
            "bars",
            {"English": [0.9, 0.2, [0.8, 0.7, 0.95]], "Indonesian": [0.7, 0.4, [0.6, 0.6, 0.5]]},
            "exact match",
            labels=("as it is", "off", "random"),
        ),
        Figure("plain", "Without draws", "", "bars", {"English": [0.9, 0.0, []]}, "exact match"),
        Figure(
            "matrix",
            "Own experts",
            "Own text suffers.",
            "matrix",
            {"English": [0.31, -0.12, 0.002], "German": [-0.001, 0.2, None]},
            "experts off",
            columns=("English", "German", "random"),
        ),
    )


@pytest.fixture(scope="session")
def figures_file(
    figures: tuple[Figure, ...], inputs: Inputs, demo: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("figures") / "figures.html"
    story = Inputs(traces=inputs.traces, figures=figures)
    return report.write(path, story, tokenizer=demo.tokenizer, title="Figures", lead=HOSTILE)
