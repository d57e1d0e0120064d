"""Extraction of answers: the traps of many scripts and separators, channels, and stop texts."""

from __future__ import annotations

import pytest

from moe_route.evaluation.tasks import (
    NUMBER_SCORERS,
    channel_of,
    flexible_extract,
    normalized_number,
    until_first,
)

FLEXIBLE, NORMALIZED = NUMBER_SCORERS


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("The answer is 18.", "18"),
        ("উত্তর হল ১৮", "18"),  # Bengali
        ("คำตอบคือ ๑๘ บาท", "18"),  # Thai
        ("الجواب ٣٫٥", "3.5"),  # Arabic, with its decimal separator
        ("١٬٢٣٤", "1234"),  # Arabic, with its separator of thousands
        ("उत्तर १२३४ है", "1234"),  # Devanagari
        ("答えは１８です", "18"),  # full width
        ("第18个", "18"),
        ("答案是-5", "-5"),
        ("1.234,50 €", "1234.5"),
        ("$1,234.50", "1234.5"),
        ("1.234", "1234"),
        ("1,234", "1234"),
        ("12,34,567", "1234567"),  # Indian grouping
        ("1\u202f234\u202f567 francs", "1234567"),
        ("1'234", "1234"),
        ("1 234", "234"),  # a plain space stands between two numbers
        ("12,5", "12.5"),
        ("0,125", "0.125"),
        ("12345.678", "12345.678"),
        ("18.00", "18"),
        ("x = −7.", "-7"),  # a minus sign, not a hyphen
        ("24-5", "5"),
        ("16 - 3 = 13, so 13 * 2 = 26 dollars", "26"),
        ("007", "7"),
        ("-0", "0"),
        ("eighteen", ""),
        ("", ""),
    ],
)
def test_normalized_reads_numbers_of_all_scripts(output: str, number: str):
    assert normalized_number(output) == number


def test_flexible_extract_is_that_of_lm_eval_with_its_faults():
    assert flexible_extract("16 - 3 = 13, so 26 dollars.") == "26"
    assert flexible_extract("$1,234.50") == "$1,234.50"
    assert flexible_extract("উত্তর ১৮") == ""  # it sees no other digits
    assert FLEXIBLE.equal("1.5", "15")  # its comparison drops punctuation
    assert not NORMALIZED.equal(normalized_number("1.5"), "15")


def test_flexible_extract_agrees_with_lm_eval():
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    theirs = extraction.RegexFilter("(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1, fallback="")
    outputs = ["18", "a 1 b 2", "$5.", "x", "-3,000 or 7", "১৮", "4.5.6", "..", "no. 7"]
    assert [flexible_extract(output) for output in outputs] == [
        found[0] for found in theirs.apply([[o] for o in outputs], [])
    ]


def test_values_are_compared_not_texts():
    assert NORMALIZED.equal(normalized_number("It costs 1.234,0"), "1,234")
    assert not NORMALIZED.equal("", "")  # no answer is never right


def test_only_the_asked_channel_counts():
    begin = "<|channel|>analysis<|message|>2+2=5<|end|><|start|>assistant<|channel|>final<|message|>"
    assert channel_of(f"{begin}It is 4.<|return|>", "final") == "It is 4."
    assert channel_of("<|channel|>analysis<|message|>It is 4", "final") == ""  # cut before the channel


def test_an_output_ends_at_the_first_stop_text():
    assert until_first("18\nQuestion: 5\n\nFrage: 7", ["Frage:", "Question:"]) == "18\n"
    assert until_first("18", ["Question:"]) == "18"
    assert until_first("18", []) == "18"
