"""moe_route.data.languages: names and scripts of the codes that corpora use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_route.data import demo_corpus
from moe_route.data.languages import _ALIASES, _FLORES, _SCRIPTS, flores_code, language, language_name


@pytest.mark.parametrize(
    ("code", "name", "script"),
    [
        ("eng_Latn", "English", "Latin"),
        ("swh_Latn", "Swahili", "Latin"),
        ("SW", "Swahili", "Latin"),
        ("swa", "Swahili", "Latin"),
        ("zho_Hans", "Chinese", "Chinese"),
        ("zho-Hant", "Chinese (traditional)", "Chinese"),
        ("zho-CN", "Chinese", "Chinese"),
        ("zho-TW", "Chinese (traditional)", "Chinese"),
        ("zh", "Chinese", "Chinese"),
        ("eng-GB", "English (GB)", "Latin"),
        ("arb_Arab", "Arabic", "Arabic"),
        ("arb_Latn", "Arabic (romanized)", "Latin"),
        ("ar", "Arabic", "Arabic"),
        ("aze-Latn", "North Azerbaijani", "Latin"),
        ("ace", "Acehnese", ""),
        ("srp_Latn", "Serbian", "Latin"),
    ],
)
def test_a_code_names_a_language_and_a_script(code: str, name: str, script: str):
    found = language(code)
    assert found is not None
    assert (found.name, found.script_name) == (name, script)
    assert language_name(code) == name


@pytest.mark.parametrize(
    "code", ["math", "general", "eng_math", "lang3", "", "group 1", "in both", "de_novo", "xyz_Latn"]
)
def test_a_code_without_a_language_is_shown_as_it_is(code: str):
    assert language(code) is None
    assert language_name(code) == code


def test_codes_of_flores():
    given = ("sw", "zho-TW", "fil", "ms", "srp_Latn", "ace", "kas", "math")
    found = ("swh_Latn", "zho_Hant", "tgl_Latn", "zsm_Latn", "srp_Cyrl", "ace_Latn", "kas_Arab", None)
    assert tuple(map(flores_code, given)) == found


def test_the_table_has_each_language_of_flores_once():
    codes = [row.split(" ")[0] for row in _FLORES.replace("\n", "").split("|")]
    assert len(codes) == len(set(codes)) == 204
    names = [language_name(code) for code in codes]
    assert len(set(names)) == 204, "no two are shown alike"
    assert all(found is not None and found.script in _SCRIPTS for found in map(language, codes))
    aliases = [code for row in _ALIASES.replace("\n", "").split("|") for code in row.split()[1:]]
    assert len(aliases) == len(set(aliases))
    assert not {code.split("_")[0] for code in codes} & set(aliases)


def test_the_languages_of_the_corpora_have_names():
    for code in demo_corpus().languages:
        assert language(code) is not None
    folder = os.environ.get("MOE_ROUTE_DATA")
    if folder is None:
        pytest.skip("MOE_ROUTE_DATA names no data folder")
    root = Path(folder)
    codes = [path.name.removesuffix(".devtest") for path in (root / "flores200" / "devtest").iterdir()]
    codes += [path.name.split(".")[1] for path in (root / "ntrex128" / "NTREX-128").iterdir()]
    codes += [path.stem.split("-")[1] for path in (root / "tatoeba").glob("eng-*.tsv")]
    codes += [path.stem.split("_")[1] for path in (root / "mgsm").glob("mgsm_*.tsv")]
    codes += [path.stem for path in (root / "belebele").glob("*.jsonl")]
    assert len(codes) > 80
    assert [code for code in codes if language(code) is None] == []
