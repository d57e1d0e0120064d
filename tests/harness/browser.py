"""A page in a real browser: needs playwright and a Chromium, skipped without them.

They are required where MOE_ROUTE_REQUIRE_BROWSER=1.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def _unavailable(reason: str) -> None:
    if os.environ.get("MOE_ROUTE_REQUIRE_BROWSER") == "1":
        pytest.fail(f"MOE_ROUTE_REQUIRE_BROWSER=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _unavailable("playwright is not installed: pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as play:
        if program is None and not Path(play.chromium.executable_path).exists():
            _unavailable("there is no Chromium: install it, or run playwright install chromium")
        running = play.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


class Opened:
    """A page, and what it complained about and asked for."""

    def __init__(
        self, browser: Any, path: Path, width: int, scheme: str = "light", drawn: str = "#experts svg rect.cell"
    ) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(drawn)

    @property
    def tip(self) -> str:
        text: str = self.page.locator("#tip").inner_text()
        return text
