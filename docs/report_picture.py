"""Draw the pictures of docs/plots.md anew, of which the README shows the first: `python docs/report_picture.py`.

They are parts of a real report: problems in five languages, natural and with the task experts switched off. Needs
`pip install 'moe-route[all]' playwright` and a Chromium.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from moe_route import analysis, report
from moe_route.base.files import replacing
from moe_route.data import Corpus
from moe_route.data.batches import texts_of
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts
from moe_route.steering import ExpertSelection, Plan

IMAGES = Path(__file__).parent / "images"
LANGUAGES = ["eng_Latn", "deu_Latn", "hin_Deva", "jpn_Jpan", "arb_Arab"]
WIDTH = 830  # of a README; text of the page is 16 pixels high


def main() -> None:
    language_model = LanguageModel.load()
    with tempfile.TemporaryDirectory() as folder:
        page = report.write(Path(folder) / "report.html", _inputs(language_model), tokenizer=language_model.tokenizer)
        with sync_playwright() as play:
            program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
            browser = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
            opened = browser.new_page(viewport={"width": WIDTH, "height": 1200}, color_scheme="light")
            opened.goto(page.as_uri())
            _arrange(opened)
            for section, name in (("tokens", "report.png"), ("contexts", "report-contexts.png")):
                _save(opened.locator(f"#{section}").screenshot(), IMAGES / name)
            browser.close()


def _save(shown: bytes, path: Path) -> None:
    with Image.open(io.BytesIO(shown)) as image, replacing(path) as stream:
        image.convert("RGB").save(stream, format="png", optimize=True)


def _inputs(language_model: LanguageModel) -> report.Inputs:
    problems = texts_of(Corpus.read("arithmetic", languages=LANGUAGES, limit=4))
    experts = _task_experts(language_model)
    return report.record_inputs(language_model, problems, plan=Plan.forbid(experts), traced_items=4)


def _task_experts(language_model: LanguageModel) -> ExpertSelection:
    found = []
    for data in ("arithmetic", "general"):
        with language_model.attach() as routed, routed.record(sequences=True) as recorder:
            record_texts(recorder, language_model, texts_of(Corpus.read(data, LANGUAGES[:1])))
        found.append(recorder.statistics())
    return analysis.task_experts(*found, threshold=0.2)


def _arrange(page: Page) -> None:
    """Choose a text, and leave the view of tokens and the first contexts of an expert."""
    page.locator("#tokens select").nth(2).select_option(label="German · seen-003")
    page.locator("#tokens .token").nth(4).click()
    page.add_style_tag(
        content="header, #counted, #divergence, #experts, #balance, footer, #tokens > div[aria-live], #tip, "
        "#contexts button, #contexts li:nth-child(n + 4), #contexts details:nth-of-type(n + 3), "
        "#contexts > p { display: none } section { margin: 0; border: 0; padding: .5rem 0 }"
    )


if __name__ == "__main__":
    main()
