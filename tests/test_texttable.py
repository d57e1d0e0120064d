"""Tables on terminals and in notebooks."""

from __future__ import annotations

import re

from moe_route.base.table import Table, table

ROWS = [(2, "3 (0.361)", -0.5, ""), (5, "7 (0.600)", None, "")]
HEAD = ("layer", "experts", "change", "where")


def test_numbers_are_set_to_the_right_and_text_that_begins_with_one_to_the_left():
    assert table(HEAD, ROWS).splitlines() == [
        "layer  experts    change  where",
        "    2  3 (0.361)  -0.500",
        "    5  7 (0.600)       -",
    ]
    head = Table(HEAD, ROWS)._repr_html_().partition("</thead>")[0]
    assert re.findall(r"text-align: (\w+)", head) == ["right", "left", "right", "left"]


def test_cells_in_notebooks_are_text_not_markup():
    shown = Table(["name"], [["<b>"]], title="a < b", note="one\ntwo")._repr_html_()
    assert '<td style="text-align: left">&lt;b&gt;</td>' in shown
    assert "<caption>a &lt; b</caption>" in shown
    assert "<p>one<br>two</p>" in shown


def test_long_lines_around_a_table_are_broken_for_a_terminal():
    note = "an estimate: " + "word " * 40
    shown = str(Table(("a",), [(1,)], title=f"{'1. rule ' * 20}\n2. rule", note=note)).splitlines()
    assert max(map(len, shown)) <= 120
    assert [line[:4] for line in shown] == ["1. r", "    ", "2. r", "a", "1", "an e", "    "]
    assert " ".join(line.strip() for line in shown[5:]) == note.strip()
