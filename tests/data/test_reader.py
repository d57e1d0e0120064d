"""The reader of texts: every form gives the same texts, nothing is guessed, and what is refused names the fix."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from moe_route.data import Corpus, CorpusError, CorpusStream, demo_corpus, read_texts
from moe_route.data.batches import texts_of

LANGUAGES = ("eng_Latn", "deu_Latn", "jpn_Jpan")
TEXT = "id\teng_Latn\tdeu_Latn\na\tOne.\tEins.\nb\tTwo.\tZwei.\n"


def written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def triples(source: object, **options) -> list[tuple[str, str, str]]:
    return [(text.group, text.item, text.text) for text in read_texts(str(source), **options)]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    corpus = demo_corpus().subset(LANGUAGES, 40)
    return [
        {"group": language, "item": item, "text": text}
        for item, *texts in zip(corpus.items, *(corpus[language] for language in LANGUAGES), strict=True)
        for language, text in zip(LANGUAGES, texts, strict=True)
    ]


class TestForms:
    def stream(self, path: Path, **options) -> list[tuple[str, str, str]]:
        texts = list(CorpusStream(str(path), **options))
        read = [text.read for text in texts]
        assert read == sorted(read)
        assert read[-1] == pytest.approx(1.0)
        return [(text.group, text.item, text.text) for text in texts]

    def test_every_form_gives_the_same_texts(self, rows, tmp_path: Path):
        expected = [tuple(row.values()) for row in rows]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        assert self.stream(written(tmp_path / "lines" / "texts.jsonl", lines)) == expected
        with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["item", "text", "group"])
            writer.writeheader()
            writer.writerows(rows)
        wide: dict[str, list[str]] = {}
        for row in rows:
            wide.setdefault(row["item"], [row["item"]]).append(row["text"])
        table = ["\t".join(line) for line in [["id", *LANGUAGES], *wide.values()]]
        written(tmp_path / "b.tsv", "\n".join(table) + "\n")
        assert self.stream(tmp_path / "a.csv") == expected
        assert self.stream(tmp_path / "b.tsv") == expected
        (tmp_path / "lines" / "texts.jsonl").unlink()
        (tmp_path / "lines").rmdir()
        assert [item for _, item, _ in self.stream(tmp_path)] == [
            f"{s}-{item}" for s in "ab" for _, item, _ in expected
        ]
        for language in LANGUAGES:
            texts = [row["text"] for row in rows if row["group"] == language]
            written(tmp_path / "flores" / "dev" / f"{language}.dev", "\n".join(texts) + "\n")
        read = self.stream(tmp_path / "flores", split="dev")
        assert sorted((group, text) for group, _, text in read) == sorted((row["group"], row["text"]) for row in rows)

    def test_a_corpus_and_its_stream_give_the_same_list_of_texts(self):
        assert texts_of(read_texts("general", limit=5)) == texts_of(demo_corpus().subset(limit=5))
        assert texts_of(read_texts("arithmetic", limit=2)) == texts_of(Corpus.read("arithmetic", limit=2))

    def test_parquet_and_datasets(self, rows, tmp_path: Path):
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        expected = [tuple(row.values()) for row in rows]
        table = arrow.Table.from_pylist(rows)
        parquet.write_table(table, tmp_path / "texts.parquet", row_group_size=7)
        assert self.stream(tmp_path / "texts.parquet") == expected
        whole = (tmp_path / "texts.parquet").read_bytes()
        (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CorpusError, match=r"cut.parquet is not a whole Parquet file"):
            self.stream(tmp_path / "cut.parquet")
        datasets = pytest.importorskip("datasets")
        datasets.DatasetDict({"dev": datasets.Dataset(table)}).save_to_disk(str(tmp_path / "saved"))
        assert self.stream(tmp_path / "saved", split="dev") == expected
        with pytest.raises(CorpusError, match="there are dev"):
            list(CorpusStream(str(tmp_path / "saved"), split="train"))

    def test_a_dataset_by_name_and_configuration(self, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """As the hub lays them out; a folder of this name is looked for before the hub."""
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pytest.importorskip("datasets")
        folder = tmp_path / "owner" / "corpus"
        folder.mkdir(parents=True)
        parquet.write_table(arrow.Table.from_pylist(rows), folder / "all.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows[:2]), folder / "two.parquet")
        configurations = "".join(
            f"- config_name: {name}\n  data_files:\n  - split: dev\n    path: {name}.parquet\n"
            for name in ("all", "two")
        )
        (folder / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
        monkeypatch.chdir(tmp_path)
        expected = [tuple(row.values()) for row in rows]
        for name, count in (("all", len(rows)), ("two", 2)):
            assert triples(f"owner/corpus:{name}", split="dev") == expected[:count]
        for name, split, message in (
            ("owner/corpus:all", "test", r"Available splits: \['dev'\]\): name it as NAME"),
            ("owner/corpus:three", "dev", r"'three' not found. Available: \['all', 'two'\]"),
        ):
            with pytest.raises(CorpusError, match=message):
                list(CorpusStream(name, split=split))
        with pytest.raises(CorpusError, match="no language 'deu_Lat'"):
            triples("owner/corpus:all", split="dev", languages=["deu_Lat"])

    def test_a_dataset_by_name_without_a_network(self, monkeypatch: pytest.MonkeyPatch):
        pytest.importorskip("datasets")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setattr("moe_route.base.hub.getproxies", dict)
        with pytest.raises(CorpusError, match=r"'nobody/nothing' is no file or folder here.*give a path"):
            list(CorpusStream("nobody/nothing"))

    def test_files_named_by_language_pair_by_line(self, tmp_path: Path):
        written(tmp_path / "eng_Latn.jsonl", '{"text": "One."}\n{"text": "Two."}\n')
        written(tmp_path / "deu_Latn.jsonl", '{"text": "Eins."}\n{"text": "Zwei."}\n')
        assert Corpus.read(tmp_path)["eng_Latn"] == ("One.", "Two.")

    def test_files_of_a_text_per_line_pair_by_line(self, tmp_path: Path):
        en, de = written(tmp_path / "a, b.txt", "One.\n\nTwo.\n\n"), written(tmp_path / "de.txt", "Eins.\n-\nZwei.\n")
        source = f"en={en},de={de}"
        assert triples(source) == [
            *(("en", "1", "One."), ("en", "2", ""), ("en", "3", "Two.")),
            *(("de", "1", "Eins."), ("de", "2", "-"), ("de", "3", "Zwei.")),
        ]
        assert read_texts(source).described == "items: line numbers; languages: en, de"
        assert triples(source, languages=["de"], limit=1) == [("de", "1", "Eins.")]
        written(de, "Eins.\n")
        for wrong, message in (
            (source, "1 lines.*not parallel"),
            (f"en={en},en={de}", "comes twice"),
            (f"en={written(tmp_path / 't.tsv', TEXT)}", "by itself"),
        ):
            with pytest.raises(CorpusError, match=message):
                triples(wrong)
        with pytest.raises(FileNotFoundError, match=r"nothing\.txt"):
            triples(f"en={en},de={tmp_path / 'nothing.txt'}")

    def test_a_misspelt_name_of_a_shipped_corpus(self):
        with pytest.raises(CorpusError, match="did you mean 'general'"):
            triples("generl")


class TestTables:
    def test_reads_a_table(self, tmp_path: Path):
        corpus = Corpus.read(written(tmp_path / "t.tsv", TEXT))
        assert (corpus.languages, corpus.items) == (("eng_Latn", "deu_Latn"), ("a", "b"))
        assert corpus["deu_Latn"] == ("Eins.", "Zwei.")
        assert corpus.described == "items: column 'id'; languages: eng_Latn, deu_Latn"
        assert Corpus.read(tmp_path / "t.tsv", ["deu_Latn"]).languages == ("deu_Latn",)

    @pytest.mark.parametrize("text", [TEXT.replace("\n", "\r\n"), "\ufeff" + TEXT, TEXT + "\n\n", TEXT.rstrip("\n")])
    def test_reads_what_editors_leave(self, tmp_path: Path, text: str):
        assert Corpus.read(written(tmp_path / "t.tsv", text))["eng_Latn"] == ("One.", "Two.")

    def test_line_separators_inside_a_text_do_not_split_it(self, tmp_path: Path):
        corpus = Corpus.read(written(tmp_path / "t.tsv", "id\teng_Latn\na\tOne\u2028more\x0bline.\n"))
        assert corpus["eng_Latn"] == ("One\u2028more\x0bline.",)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty"),
            ("id\teng_Latn\n", "no item"),
            ("id\na\n", "names no language"),
            ("id\teng_Latn\tdeu_Latn\na\tOne.\tEins.\nb\tTwo.\n", "line 3: 2 fields where the header has 3"),
            ("id\teng_Latn\na\tOne.\nb\tTwo.\tZwei.\n", "line 3: 3 fields"),
            ("id\teng_Latn\n\na\tOne.\n", "line 2: 1 fields"),
            ("key\teng_Latn\na\tOne.\na\tTwo.\n", "item 'a' comes twice"),
            ("id\teng_Latn\teng_Latn\na\tOne.\tEins.\n", "column 'eng_Latn' comes twice"),
            ("id\teng_Latn\tdeu_Latn\na\tOne.\t \n", "item 'a' has no text in deu_Latn"),
            ("id\t\tdeu_Latn\na\tOne.\tEins.\n", "column 2 has no name"),
            ("id\tgroup\tdeu_Latn\na\tx\tEins.\n", "none 'text'"),
        ],
    )
    def test_refuses_a_wrong_table_and_says_where(self, tmp_path: Path, text: str, message: str):
        with pytest.raises(CorpusError, match=message):
            Corpus.read(written(tmp_path / "t.tsv", text))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.jsonl", '{"text": "A."}\n{"text": ', "line 2 is not JSON"),
            ("a.jsonl", '{"words": "A."}\n', "there are 'words'"),
            ("a.csv", "text,group\nA.\n", "row 2: 1 fields"),
            ("a.csv", 'text,group\n"A,b\n', "row 2 is not quoted as CSV"),
            ("a.tsv", "", "is empty"),
            ("a.txt", "A.\n", "eng_Latn="),
            ("a.md", "A.\n", "convert it"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, tmp_path: Path, name: str, content: str, message: str):
        with pytest.raises(CorpusError, match=message):
            triples(written(tmp_path / name, content))

    def test_refuses_another_encoding(self, tmp_path: Path):
        with pytest.raises(CorpusError, match="line 2 is not UTF-8"):
            Corpus.read(written(tmp_path / "t.tsv", "id\tdeu_Latn\na\tfünf\n", "latin-1"))

    def test_a_missing_file(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=r"nothing\.tsv"):
            Corpus.read(tmp_path / "nothing.tsv")

    def test_texts_that_are_not_parallel(self, tmp_path: Path):
        lines = [{"item": "a", "group": "x", "text": "A"}, {"item": "b", "group": "y", "text": "B"}]
        path = written(tmp_path / "t.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        assert len(triples(path)) == 2
        with pytest.raises(CorpusError, match="'a' has no text in y"):
            Corpus.read(path)

    def test_options_that_would_be_ignored_are_refused(self, tmp_path: Path):
        path = written(tmp_path / "t.jsonl", '{"text": "A."}\n')
        for options in ({"columns": "text"}, {"quotes": "csv"}):
            with pytest.raises(CorpusError, match="leave it out"):
                triples(path, **options)


class TestFirstColumn:
    """The first column of a wide table holds ids; a language there is refused."""

    @pytest.mark.parametrize("name", ["eng_Latn", "eng", "zho-CN", "English"])
    def test_a_language_is_refused(self, tmp_path: Path, name: str):
        with pytest.raises(CorpusError, match=f"'{name}', is a language.*columns='{name},deu'"):
            triples(written(tmp_path / "t.tsv", f"{name}\tdeu\nx1\tEins.\nx2\tZwei.\n"))

    def test_lines_of_a_language_and_a_text_without_a_header(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", "eng\tOne text.\ndeu\tEin Text.\n")
        with pytest.raises(CorpusError, match="columns='group,text'"):
            triples(path)
        assert [group for group, _, _ in triples(path, columns="group,text")] == ["eng", "deu"]

    @pytest.mark.parametrize("name", ["en", "id", "no"])
    @pytest.mark.parametrize(
        ("values", "why"),
        [
            (["Yes", "Yes"], "repeat"),
            (["Yes", " "], "blank"),
            (["How are you?", "It rains a lot.", "Yes"], "sentences"),
        ],
    )
    def test_two_letters_whose_values_are_texts(self, tmp_path: Path, name: str, values: list[str], why: str):
        rows = "".join(f"{value}\ttext {number}\n" for number, value in enumerate(values))
        with pytest.raises(CorpusError, match=f"{why}.*put a column of ids"):
            triples(written(tmp_path / "t.tsv", f"{name}\tdeu_Latn\n{rows}"))

    @pytest.mark.parametrize("name", ["id", "no", "ID", "item", "key", "No.", "#", ""])
    def test_short_unique_values_are_items(self, tmp_path: Path, name: str):
        path = written(tmp_path / "t.tsv", f"{name}\tdeu_Latn\na 1\tEins.\na 2\tZwei.\n")
        assert [item for _, item, _ in triples(path)] == ["a 1", "a 2"]
        assert read_texts(path).described == f"items: column {name!r}; languages: deu_Latn"

    def test_a_column_named_item_is_one_wherever_it_stands(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", "eng\titem\nOne.\ta\n")
        assert triples(path) == [("eng", "a", "One.")]


class TestHeader:
    """The first line names the columns, or `columns` does; neither is guessed."""

    @pytest.mark.parametrize(
        ("first", "what"),
        [
            ("Janet has 16 eggs.\t18", "number"),
            ("x\t1,234.5", "number"),
            ("Hello there.\tHallo.", "sentence"),
            ("x\tguten Tag", "sentence"),
            ("x\tبيت كبير", "sentence"),
            ("x\t汤姆和他的朋友们在公园", "sentence"),
        ],
    )
    def test_a_table_without_one_is_refused(self, tmp_path: Path, first: str, what: str):
        with pytest.raises(CorpusError, match=f"is a {what}.*--columns"):
            triples(written(tmp_path / "t.tsv", f"{first}\nmore\ttext\n"))

    @pytest.mark.parametrize("name", ["deu_Latn", "de", "Chinese (traditional)", "code", "русский", "v1.2"])
    def test_names_of_languages_and_labels_are_none_of_these(self, tmp_path: Path, name: str):
        assert triples(written(tmp_path / "t.tsv", f"id\t{name}\na\tA.\n")) == [(name, "a", "A.")]

    def test_columns_name_them(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", "Eins.\tOne.\t18\nZwei.\tTwo.\t19\n")
        assert triples(path, columns="deu_Latn, eng_Latn, -") == [
            *(("deu_Latn", "1", "Eins."), ("eng_Latn", "1", "One.")),
            *(("deu_Latn", "2", "Zwei."), ("eng_Latn", "2", "Two.")),
        ]
        assert read_texts(path, columns="deu,-,-").described == "items: line numbers; languages: deu"
        assert triples(path, columns="-,eng,item") == [("eng", "18", "One."), ("eng", "19", "Two.")]
        assert triples(path, columns="text,-,item") == [("t", "18", "Eins."), ("t", "19", "Zwei.")]
        path.rename(tmp_path / "t.txt")
        assert len(triples(tmp_path / "t.txt", columns="deu,eng,-")) == 4
        with pytest.raises(CorpusError, match="line 1: 3 fields where columns names 2"):
            triples(tmp_path / "t.txt", columns="deu,eng")

    def test_columns_beside_a_header_are_refused(self, tmp_path: Path):
        for header, columns in (("eng\tdeu", "eng_Latn,deu_Latn"), ("item\ttext", "item,text")):
            with pytest.raises(CorpusError, match="leave out columns"):
                triples(written(tmp_path / "t.tsv", f"{header}\nOne.\tEins.\n"), columns=columns)

    def test_values_of_a_group_column_are_kept(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", "group\ttext\n18\tA.\nA long name of a group.\tB.\n")
        assert [group for group, _, _ in triples(path)] == ["18", "A long name of a group."]
        assert read_texts(path).described == "items: row numbers; languages: column 'group'"


class TestQuotes:
    """A .tsv has enclosing quotes only if every field that begins with one is well-formed, and one is doubled."""

    @pytest.mark.parametrize(
        ("fields", "texts", "note"),
        [
            (['"He said ""hi""."', '"Bye."'], ['He said "hi".', "Bye."], "csv"),
            (['"Hi," he said.', '"He said ""hi""."'], ['"Hi," he said.', '"He said ""hi""."'], "none"),
            (['"Hi."', '"Bye."'], ['"Hi."', '"Bye."'], "none"),
            (["Say ''hi''.", 'a "b" ""c""'], ["Say ''hi''.", 'a "b" ""c""'], ""),
        ],
    )
    def test_the_choice(self, tmp_path: Path, fields: list[str], texts: list[str], note: str):
        rows = "".join(f"{number}\t{field}\n" for number, field in enumerate(fields))
        path = written(tmp_path / "t.tsv", f"id\teng_Latn\n{rows}")
        assert [text for _, _, text in triples(path)] == texts
        assert read_texts(path).described.count(f"({note})") == (1 if note else 0)
        assert [text for _, _, text in triples(path, quotes="none")] == fields

    def test_quotes_that_are_asked_for(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", 'id\teng_Latn\n1\t"Hi."\n2\t"tab\there"\n')
        with pytest.raises(CorpusError, match=r"line 3: 3 fields.*--quotes csv"):
            triples(path)
        assert [text for _, _, text in triples(path, quotes="csv")] == ["Hi.", "tab\there"]
        with pytest.raises(ValueError, match="quotes must be"):
            read_texts(path, quotes="yes")  # type: ignore[arg-type]

    def test_no_lines_of_a_tsv_are_joined(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", 'id\teng_Latn\n1\t"Hi\n2\tthere"\n')
        assert [text for _, _, text in triples(path)] == ['"Hi', 'there"']
        with pytest.raises(CorpusError, match=r"line 2 is not quoted as CSV.*--quotes none"):
            triples(path, quotes="csv")

    def test_a_csv_is_quoted(self, tmp_path: Path):
        path = written(tmp_path / "t.csv", 'id,eng_Latn\n1,"Hi,\nyou ""there""."\n\n')
        assert [text for _, _, text in triples(path)] == ['Hi,\nyou "there".']
        path = written(tmp_path / "u.csv", 'id,eng_Latn\n1,"Hi" there\n')
        assert [text for _, _, text in triples(path, quotes="none")] == ['"Hi" there']


class TestLanguagesAndLimits:
    def test_limits_apply_to_every_language_alike(self, rows, tmp_path: Path):
        by_language = sorted(rows, key=lambda row: row["group"])
        path = written(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in by_language))
        for source in (path, "general"):
            texts = triples(source, languages=LANGUAGES, limit=3)
            assert sorted(group for group, _, _ in texts) == sorted(LANGUAGES * 3)
        assert len(triples(path, limit=3)) == 9
        assert Corpus.read("general", limit=3).items == demo_corpus().items[:3]
        with pytest.raises(ValueError, match="at least 1"):
            read_texts("general", limit=0)

    def test_of_a_file_with_one_group_no_more_is_read_than_asked_for(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", "text\nA.\nB.\ntoo\tmany\n")
        assert len(triples(path, limit=2)) == 2
        with pytest.raises(CorpusError, match="line 4"):
            triples(path)

    def test_languages_come_in_the_order_asked_for(self, tmp_path: Path):
        path = written(tmp_path / "t.tsv", TEXT)
        assert triples(path, languages=["deu_Latn", "eng_Latn"], limit=1) == [
            ("deu_Latn", "a", "Eins."),
            ("eng_Latn", "a", "One."),
        ]

    @pytest.mark.parametrize(
        ("name", "nearest"), [("deu_Lat", "deu_Latn"), ("de", "deu_Latn"), ("German", None), ("engl_Latn", "eng_Latn")]
    )
    def test_a_misspelt_language_is_refused_with_the_nearest(self, tmp_path: Path, name: str, nearest: str | None):
        long = "".join(f'{{"group": "{code}", "text": "A."}}\n' for code in ("eng_Latn", "deu_Latn"))
        hint = "" if nearest is None else f"did you mean '{nearest}'. "
        for path in (written(tmp_path / "t.tsv", TEXT), written(tmp_path / "t.jsonl", long)):
            with pytest.raises(CorpusError, match=f"no language '{name}' in {path.name}: {hint}there are eng_Latn"):
                read_texts(path, languages=["eng_Latn", name])


class TestLayouts:
    @pytest.fixture
    def flores(self, tmp_path: Path) -> Path:
        for code, text in {
            "deu_Latn": "Eins.\nZwei.\n",
            "eng_Latn": "One.\nTwo.\n",
            "arb_Arab": "واحد.\nاثنان.\n",
        }.items():
            written(tmp_path / "devtest" / f"{code}.devtest", text)
        return tmp_path

    def test_flores_english_first(self, flores: Path):
        corpus = Corpus.read(flores)
        assert corpus.languages == ("eng_Latn", "arb_Arab", "deu_Latn")
        assert corpus.items == ("devtest-0001", "devtest-0002")
        assert corpus["arb_Arab"][1] == "اثنان."
        assert corpus.name == f"{flores.name}/devtest"
        assert corpus.described == "items: line numbers (FLORES); languages: eng_Latn, arb_Arab, deu_Latn"
        assert Corpus.read(flores, ["deu_Latn", "eng_Latn"]).languages == ("deu_Latn", "eng_Latn")
        assert Corpus.read(flores / "devtest", "eng_Latn")["eng_Latn"] == ("One.", "Two.")
        assert triples(flores / "devtest" / "deu_Latn.devtest", limit=1) == [("deu_Latn", "devtest-0001", "Eins.")]

    def test_flores_files_of_different_length(self, flores: Path):
        written(flores / "devtest" / "deu_Latn.devtest", "Eins.\n")
        with pytest.raises(CorpusError, match="not parallel"):
            read_texts(flores)
        assert Corpus.read(flores, ["eng_Latn", "arb_Arab"]).items[1] == "devtest-0002"

    def test_another_split_is_named(self, flores: Path):
        with pytest.raises(CorpusError, match="split='devtest'"):
            read_texts(flores, split="dev")
        with pytest.raises(CorpusError, match="holds the split devtest"):
            read_texts(flores / "devtest", split="dev")

    def test_folders_without_texts(self, flores: Path, tmp_path: Path):
        with pytest.raises(CorpusError, match="holds FLORES in devtest"):
            read_texts(flores / "devtest" / "..", split="test")
        (tmp_path / "empty").mkdir()
        with pytest.raises(CorpusError, match=r"holds no corpus.*CODE=FILE"):
            read_texts(tmp_path / "empty")
        with pytest.raises(FileNotFoundError, match="elsewhere"):
            read_texts(tmp_path / "elsewhere")

    def test_codes_become_those_of_flores_unless_two_files_would_share_one(self, tmp_path: Path):
        for name in ("src.eng", "ref.eng-GB", "ref.zho-CN", "ref.swa"):
            written(tmp_path / f"newstest2019-{name}.txt", f"{name} 1\n{name} 2\n")
        corpus = Corpus.read(tmp_path)
        assert corpus.languages == ("eng_Latn", "eng-GB", "swh_Latn", "zho_Hans")
        assert corpus["zho_Hans"][1] == "ref.zho-CN 2"
        assert corpus.items == ("ntrex-0001", "ntrex-0002")

    def test_mgsm(self, tmp_path: Path):
        """Without a header: the first line is a question, and no language is called "18"."""
        for code in ("en", "de"):
            written(tmp_path / f"mgsm_{code}.tsv", f'"{code} 1\t18\n{code} 2\t3\n')
        expected = {"eng_Latn": ('"en 1', "en 2"), "deu_Latn": ('"de 1', "de 2")}
        assert dict(Corpus.read(tmp_path).texts) == expected
        assert triples(tmp_path / "mgsm_de.tsv")[0] == ("deu_Latn", "mgsm-001", '"de 1')
        written(tmp_path / "mgsm_de.tsv", "A\t1\nB\n")
        with pytest.raises(CorpusError, match=r"line 2: 1 fields.*columns"):
            triples(tmp_path / "mgsm_de.tsv")

    def test_belebele_as_published(self, tmp_path: Path):
        row = {
            "link": "https://a/b",
            "question_number": 2,
            "flores_passage": "P.\n",
            "question": "Q?",
            "mc_answer1": "x",
        }
        for code in ("eng_Latn", "deu_Latn"):
            written(tmp_path / f"{code}.jsonl", json.dumps({**row, "dialect": code}) + "\n")
        assert triples(tmp_path) == [(code, "https://a/b#2", "P.\nQ?") for code in ("eng_Latn", "deu_Latn")]
        described = read_texts(tmp_path).described
        assert described == "items: columns 'link' and 'question_number' (Belebele); languages: eng_Latn, deu_Latn"
        both = "".join((tmp_path / f"{code}.jsonl").read_text() for code in ("eng_Latn", "deu_Latn"))
        assert triples(written(tmp_path / "elsewhere" / "test.jsonl", both)) == triples(tmp_path)


@pytest.mark.data
class TestRealFiles:
    """The published files: rows = lines, and the languages that their names tell."""

    @pytest.fixture
    def data(self) -> Path:
        folder = os.environ.get("MOE_ROUTE_DATA", "")
        if not folder or not Path(folder).is_dir():
            pytest.skip(
                "set MOE_ROUTE_DATA to a folder that holds flores200, ntrex128, tatoeba, tico19, mgsm, belebele"
            )
        return Path(folder)

    def part(self, data: Path, name: str) -> Path:
        if not (data / name).is_dir():
            pytest.skip(f"{data} holds no {name}")
        return data / name

    @pytest.mark.parametrize(
        ("name", "items", "first"),
        [
            ("ntrex128/NTREX-128", "line numbers (NTREX)", "ntrex-0001"),
            ("tico19/en-es_LA", "line numbers (TICO-19)", "test-0001"),
            ("mgsm", "line numbers (MGSM)", "mgsm-001"),
            ("flores200", "line numbers (FLORES)", "devtest-0001"),
        ],
    )
    def test_rows_are_lines(self, data: Path, name: str, items: str, first: str):
        folder = self.part(data, name)
        stream = read_texts(folder)
        assert stream.described.startswith(f"items: {items}; languages: eng_Latn, ")
        corpus = Corpus.read(folder)
        assert corpus.items[0] == first
        files = [
            *folder.glob("newstest2019-*"),
            *folder.glob("tico19-*"),
            *folder.glob("mgsm_*"),
            *folder.rglob("*.devtest"),
        ]
        assert len(files) == len(corpus.languages)
        assert {path.read_bytes().count(b"\n") for path in files} == {len(corpus)}

    def test_tatoeba(self, data: Path):
        """17,565 rows of quotes that are no CSV, and 25 files more."""
        for path in sorted(self.part(data, "tatoeba").glob("*.tsv")):
            with pytest.raises(CorpusError, match="--columns"):
                read_texts(path)
            lines = path.read_bytes().decode().split("\n")[:-1]
            texts = list(read_texts(path, columns="eng_Latn,other"))
            assert [f"{a.text}\t{b.text}" for a, b in zip(texts[::2], texts[1::2], strict=True)] == lines

    def test_the_folder_above_names_the_one_that_is_meant(self, data: Path):
        for name, inner in (("ntrex128", "NTREX-128"), ("tico19", "en-am")):
            with pytest.raises(CorpusError, match=inner):
                read_texts(self.part(data, name))

    def test_passages_by_language(self, data: Path):
        """Belebele as others regrouped it: a text in each row, files named by language."""
        assert Corpus.read(self.part(data, "belebele")).languages == ("deu_Latn", "eng_Latn")

    def test_the_shipped_sentences_are_none_of_flores(self, data: Path):
        corpus = Corpus.read(self.part(data, "flores200"), demo_corpus().languages)
        assert len(corpus) >= 500
        shipped = {text for language in corpus.languages for text in demo_corpus()[language]}
        assert not shipped & {text for language in corpus.languages for text in corpus[language]}
