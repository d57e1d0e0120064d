"""Names from data command nothing: a terminal, a page, a table program, a picture or a folder."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import moe_route as mr
from moe_route.base.table import Table, csv_text, data_frame, printable
from moe_route.cli import main
from moe_route.report.page import safe_json

NAMES = {
    "escape sequence": "\x1b]0;taken\x07\x1b[2J",
    "C1 control": "\x9b31mred",
    "script": "<script>alert(1)</script>",
    "formula": '=cmd|"/c calc"!A1',
    "at": "@SUM(1)",
    "right to left": "\u202egnp.exe",
    "isolate": "\u2067a\u2066b",
    "path": "../../../etc/passwd",
    "device": "CON",
    "long": "n" * 10_000,
    "line": "one\r\ntwo\ttab",
    "mathtext": r"$\frac{$",
    "hidden": "_hidden",
    "half": "\ud83d",
    "nul": "a\0b",
}
UNSEEN = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def statistics() -> mr.RoutingStatistics:
    """Statistics with a group of every name."""
    counts = np.stack([np.roll([[4, 3, 2, 1], [1, 2, 3, 4]], number, axis=1) for number in range(len(NAMES))])
    tokens = np.full(len(NAMES), 10)
    return mr.RoutingStatistics.from_token_sums(list(NAMES.values()), counts=counts, tokens=tokens, top_k=1)


def test_a_terminal_shows_names_and_does_not_obey_them(
    statistics: mr.RoutingStatistics, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable("\x1b[2J") == r"\u001b[2J"
    assert printable("سلام 👩‍👩‍👧 日本\n\t") == "سلام 👩‍👩‍👧 日本\n\t"
    plan = mr.Plan.forbid({0: [1]}).only(groups=list(NAMES.values()))
    shown = [repr(statistics), repr(plan), plan.describe(), str(Table(["group"], [[name] for name in NAMES.values()]))]
    for text in shown:
        assert not UNSEEN.search(text)
    assert max(map(len, shown[-1].splitlines())) <= 500
    assert len(shown[-1].splitlines()) == len(NAMES) + 1
    path = tmp_path / "s.safetensors"
    mr.RoutingStatistics.save(statistics.select(groups=[n for k, n in NAMES.items() if k != "half"]), path)
    for words in (["convert"], ["convert", "--json"], ["analyze", "divergence", "--reference", "\x1b[2J"]):
        main([*words, str(path)])
        out = capsys.readouterr()
        assert out.out or out.err
        assert not UNSEEN.search(out.out + out.err)


def test_a_notebook_shows_names_as_text(statistics: mr.RoutingStatistics) -> None:
    page = statistics._repr_html_() + Table(["a"], [[name] for name in NAMES.values()], NAMES["script"])._repr_html_()
    assert "<script" not in page
    assert not UNSEEN.search(page)


def test_a_table_program_gets_no_formula() -> None:
    numbers = ["-1", "+2.5", "=1", "plain"]
    names = [name for name in NAMES.values() if name != NAMES["half"]]  # which pandas refuses
    frame = data_frame({"group": [*names, *numbers], "value": np.linspace(-1, 1, len(names) + 4)})
    rows = list(csv.reader(io.StringIO(csv_text(frame), newline="")))
    cells = [row[0] for row in rows[1:]]
    assert cells[-4:] == ["-1", "+2.5", "'=1", "plain"]
    assert cells[list(NAMES).index("formula")] == "'" + NAMES["formula"]
    assert cells[list(NAMES).index("at")] == "'@SUM(1)"
    assert rows[1][1] == "-1.0"


def test_a_page_of_a_report_holds_names_as_data() -> None:
    text = safe_json({"groups": list(NAMES.values())})
    assert "<" not in text
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", text)


def test_a_picture_draws_names_as_they_are(statistics: mr.RoutingStatistics, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    how = {"by": "token", "kind": "count", "pairing": "pooled"}
    mr.plots.save(mr.plots.divergence(mr.analysis.divergence(statistics, NAMES["at"], **how)), tmp_path / "x.svg")
    text = "".join(ElementTree.parse(tmp_path / "x.svg").getroot().itertext())
    for shown in ("<script>", "../../../etc", r"$\frac{$", "_hidden", r"\u202egnp.exe", r"\u001b"):
        assert shown in text
    assert "n" * 100 not in text


def test_no_file_is_named_by_data(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    names = [name for key, name in NAMES.items() if key not in ("half", "nul")]
    texts.write_text("".join(json.dumps({"group": name, "text": "One two."}) + "\n" for name in names))
    out = tmp_path / "run" / "deep"
    out.parent.mkdir()
    assert main(["record", "--data", str(texts), "--out", str(out)]) == 0
    made = {path.name for path in out.rglob("*")}
    assert not made & {"CON", "passwd"}
    assert all(re.fullmatch(r"[\w.-]{1,60}", name) for name in made), made
    assert {path.name for path in tmp_path.iterdir()} == {"texts.jsonl", "run"}
