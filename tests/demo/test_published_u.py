"""The first finding: the U of a large model, from the routing that ships."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from moe_route.demo.published_u import PublishedU, published_u
from moe_route.demo.wording import WIDTH, spark


@pytest.fixture(scope="module")
def computed() -> PublishedU:
    return published_u()


def shown(value: PublishedU, monkeypatch: pytest.MonkeyPatch, *, columns: int = WIDTH, encoding: str = "utf-8"):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    return [f"1. {line}" for line in str(value).splitlines()]


def test_the_numbers_are_those_of_the_published_routing(computed):
    assert computed.u_shaped == ["de", "zh", "bn", "sw"]
    np.testing.assert_allclose(computed.shape.middle, [0.050886, 0.061428, 0.138739, 0.138957], atol=1e-6)
    np.testing.assert_allclose(computed.tokens, [93.732, 77.652, 269.82, 118.172])
    assert computed.english_tokens == 18286 / 250
    assert computed.tokens_with_middle == pytest.approx(0.70, abs=0.005)
    layer, (before, at, after) = computed.tooth
    mean = computed.divergence.values.mean(0)
    assert (before, at, after) == tuple(mean[layer - 1 : layer + 2])
    assert at > before
    assert at > after


@pytest.mark.parametrize(("columns", "layers"), [(200, 48), (86, 48), (80, 24)])
def test_a_line_a_language_in_ten_lines(computed, columns, layers, monkeypatch):
    lines = shown(computed, monkeypatch, columns=columns)
    assert len(lines) <= (10 if columns >= WIDTH else 13)
    assert max(map(len, lines)) <= WIDTH
    rows = {line.split()[1]: line for line in lines if "█" in line or "▇" in line}
    assert list(rows) == ["German", "Chinese", "Bengali", "Swahili"]
    assert all(sum(mark in "▁▂▃▄▅▆▇█" for mark in row) == layers for row in rows.values())
    assert rows["German"].endswith("0.164  0.051  0.234      94")
    (ruler,) = (line for line in lines if "layer " in line and "47" in line and "0-3" in line)
    assert ruler.index("47") + 1 == rows["German"].index("█"), "the last bar stands below the number of its layer"
    assert "+0.70 over 4" in lines[-1]
    assert max(map(len, rows.values())) - len("1. ") <= columns


def test_ascii_where_the_output_has_no_blocks(computed, monkeypatch):
    text = "\n".join(shown(computed, monkeypatch, encoding="ascii"))
    assert text.isascii()
    assert "#=-" in text
    assert "\x1b" not in text
    assert "▇▄▃" in "\n".join(shown(computed, monkeypatch))


def test_bars_rise_by_steps(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert spark([0, 0.04, 0.06, 0.34, 0.36, 0.9], 0.05) == "▁▁▂▇██"


def test_the_sentence_follows_the_means(computed):
    assert "4 of 4 languages" in computed.sentence
    assert computed.sentence.endswith("a U.")
    flat = replace(computed.shape, middle=computed.shape.middle + np.array([1, 1, 0, 0]))
    assert "2 of 4 languages" in replace(computed, shape=flat).sentence
    assert replace(computed, shape=replace(flat, middle=flat.first)).sentence.endswith("no U.")


def test_json_holds_what_the_page_draws(computed):
    content = json.loads(json.dumps(computed.to_dict(), allow_nan=False))
    assert content["sentence"] == computed.sentence
    assert np.shape(content["by_layer"]) == (4, 48)
    assert content["languages"] == ["de", "zh", "bn", "sw"]
    assert content["tokens"]["en"] == pytest.approx(73.144)
    assert content["shape"]["layers"]["middle"] == list(range(16, 32))
