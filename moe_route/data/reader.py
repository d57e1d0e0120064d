"""Read texts: tables, JSON lines, Parquet, data sets in their published folders, and data sets by name.

A published layout is a row of ``LAYOUTS``. This module alone opens the files of corpora. It yields their texts one by
one and keeps none of them, so that memory does not grow with a corpus. What cannot be told from the files is refused
with the option that tells it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moe_route.base import hub, schema
from moe_route.base.budget import Budget
from moe_route.base.schema import FileMissingError, FileRefusedError, misspelt, parse_json
from moe_route.data.languages import flores_code, is_language, language, spaces_words

Quotes = Literal["csv", "none"]

_SHIPPED_FOLDER = Path(__file__).resolve().parent / "corpus"
_SHIPPED = {"general": "general.tsv", "arithmetic": "problems.tsv"}
_TABLES = (".tsv", ".csv")
_SUFFIXES = (*_TABLES, ".jsonl", ".parquet")
_PARQUET_ROWS = 1024  # rows of a Parquet file that are in memory at a time
_LONGEST_FIELD = 1 << 27  # characters of a CSV field; the default of the csv module, 128 KiB, is less than a document
_ROWS_LOOKED_AT = 100_000  # of a first column that may be a language
_SPLITS = ("devtest", "dev", "test")
_NAMES_SHOWN = 20
_PAIR = re.compile(r"[\w-]+=.")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_SENTENCE_ENDS = tuple(".!?\u2026\u3002\uff01\uff1f\u061f\u06d4\u0964\u17d4\u104b")
# eight letters of a script that puts no space between words: Thai to Myanmar, Khmer, Japanese and Chinese
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_UNSPACED_LETTERS = 8
_LONGEST_NAME = 40


class CorpusError(FileRefusedError):
    """Raised for a corpus that cannot be read; the message says where the problem is and what to do."""


class CorpusText(NamedTuple):
    """A text of a corpus.

    `group` is its language or another label, `item` pairs it with its translations, and `read` is the share of the
    corpus up to here, from 0 to 1, or None if the size of the corpus is unknown.
    """

    group: str
    item: str
    text: str
    read: float | None


@dataclass(frozen=True)
class CorpusRow:
    """A row of a table, of JSON lines or of a dataset, with a text; it may have other columns.

    Attributes:
        text: a text.
        group: its language or another label; by default the name of the file.
        item: key that it shares with its translations; by default its number.
    """

    text: str
    group: str | int | None = None
    item: str | int | float | None = None


class Layout(NamedTuple):
    """How a data set is published: a file for each language, without a header.

    Attributes:
        name: of the data set.
        pattern: of a file's name. A part named `split` tells which part of the data set the file is.
        group: part of the file's name, or column, that holds the language. A code without a script becomes that of
            FLORES, unless another file has it.
        item: key of a row, from its columns, the parts of the file's name, and `line`, the number of its line.
        columns: of a row, in their order. The text is the column `text`; without it, all of them, a line each.
    """

    name: str
    pattern: re.Pattern[str]
    group: str
    item: str
    columns: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that make the text."""
        return ("text",) if "text" in self.columns else self.columns


_CODE = r"(?P<code>[A-Za-z]{2,3}(?:[_-]\w+)*)"
LAYOUTS = (
    Layout("FLORES", re.compile(rf"{_CODE}\.(?P<split>devtest|dev|test)"), "code", "{split}-{line:04d}", ("text",)),
    Layout("NTREX", re.compile(rf"newstest2019-(?:src|ref)\.{_CODE}\.txt"), "code", "ntrex-{line:04d}", ("text",)),
    Layout("TICO-19", re.compile(rf"tico19-(?P<split>dev|test)\.{_CODE}"), "code", "{split}-{line:04d}", ("text",)),
    Layout("MGSM", re.compile(rf"mgsm_{_CODE}\.tsv"), "code", "mgsm-{line:03d}", ("text", "answer")),
    Layout(
        "Belebele",
        re.compile(r"(?P<dialect>[a-z]{3}_[A-Z][a-z]{3}\w*)\.jsonl"),
        "dialect",
        "{link}#{question_number}",
        ("flores_passage", "question"),
    ),
)
"""Published folders that are read as they are; a data set of a layout of its own is a row here."""


@dataclass(frozen=True)
class CorpusStream:
    """The texts of a corpus, in a fixed order; every iteration reads them anew.

    `source` is one of:

    - a table with a header: `.tsv`, or `.csv`. A table with the column `text` holds a text in each row. Any other
      holds a column for each language, and the ids of the items in the column `item`, or else in the first column;
    - a `.jsonl` file, an object per line, or a `.parquet` file, with the column `text`;
    - a folder of such files, read in the order of their names;
    - a folder or file of a data set in `LAYOUTS`;
    - `CODE=FILE,CODE=FILE`: files of a text per line; line i is the same item in all of them;
    - "general" or "arithmetic", which moe-route brings;
    - a folder of `datasets.save_to_disk`, or the name of a dataset, optionally `NAME:CONFIGURATION`.

    Attributes:
        source: see above.
        columns: names of the columns of a table without a header, separated by commas: "item,eng_Latn,deu_Latn" or
            "text,-", where "-" leaves a column out. Without "item", an item is the number of its line.
        quotes: "csv" if quotes enclose the fields of a table, "none" if they are part of the text. By default a .csv
            has them, and a .tsv if every field that begins with a quote is well-formed CSV and one of them holds a
            doubled quote. A row of a .tsv is a line in any case.
        text, group, item: names of these columns. Without the column `group`, the group is the stem of the file, or
            the split. Without the column `item`, texts are numbered.
        split: of a dataset, and of a published folder that holds several; "devtest" by default, if there is a choice.
        groups: languages to read, None for all.
        limit: number of texts to read in each language, None for all. If a column tells the group of a text, the
            source is read to its end, unless `groups` are named.

    Blank texts are given out too. Iterating raises `CorpusError` naming the file and line that cannot be read.
    """

    source: str
    columns: str | None = None
    quotes: Quotes | None = None
    text: str = "text"
    group: str = "group"
    item: str = "item"
    split: str | None = None
    groups: tuple[str, ...] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, not {self.limit}")
        if self.groups is not None and not self.groups:
            raise ValueError("languages is empty: name at least one, or None for all")
        if self.quotes not in (None, "csv", "none"):
            raise ValueError(f'quotes must be "csv" or "none", not {self.quotes!r}')

    def __iter__(self) -> Iterator[CorpusText]:
        parts = self._parts
        count: Counter[str] = Counter()
        others: dict[str, None] = {}
        for number, part in enumerate(parts):
            expected = part.languages or self.groups  # None if only the rows tell
            full = 0 if expected is None else sum(self._is_full(count, name) for name in expected)
            if expected is not None and full == len(expected):
                continue
            for text in part.texts():
                if self.groups is not None and text.group not in self.groups:
                    others[text.group] = None
                    continue
                if self._is_full(count, text.group):
                    continue
                count[text.group] += 1
                yield text._replace(read=None if text.read is None else (number + text.read) / len(parts))
                full += self._is_full(count, text.group)
                if expected is not None and full == len(expected):
                    break
        missing = next((name for name in self.groups or () if not count[name]), None)
        if missing is not None and others:  # only its rows tell the languages of a dataset
            raise unknown_language(missing, self.name, [*count, *others])

    def _is_full(self, count: Mapping[str, int], group: str) -> bool:
        return self.limit is not None and count[group] >= self.limit

    @property
    def _split(self) -> str:
        return self.split or "devtest"

    @property
    def name(self) -> str:
        """A short name for messages: the last part of a path."""
        if self.source in _SHIPPED:
            return _SHIPPED[self.source]
        folder = self._folder_of_split
        if folder is not None:
            return folder.name if folder == Path(self.source) else f"{Path(self.source).name}/{folder.name}"
        return Path(self.source).name if Path(self.source).exists() else self.source

    @property
    def identity(self) -> dict[str, Any]:
        """What tells the corpus from others without reading it, JSON-able: the arguments."""
        return asdict(self)

    @property
    def described(self) -> str:
        """How the source is read: "items: column 'id'; languages: eng_Latn, deu_Latn"."""
        items = list(dict.fromkeys(part.items for part in self._parts))
        groups = list(dict.fromkeys(name for part in self._parts for name in part.languages or (part.told,)))
        notes = dict.fromkeys(part.note for part in self._parts if part.note)
        return "; ".join([f"items: {' and '.join(items)}", f"languages: {', '.join(groups)}", *notes])

    @property
    def languages(self) -> tuple[str, ...] | None:
        """The groups of all texts in order, or None where only reading to the end would tell."""
        if self.groups is not None:
            return self.groups
        listed = [part.languages for part in self._parts]
        return None if None in listed else tuple(dict.fromkeys(name for names in listed for name in names or ()))

    @cached_property
    def _parts(self) -> list[_Part]:
        """The parts of the source, with the languages asked for only and in their order."""
        parts = self._all_parts()
        if self.groups is None:
            return parts
        known = dict.fromkeys(name for part in parts for name in part.languages or ())
        if any(part.languages is None for part in parts) and Path(self.source).exists():
            # a misspelt language is told before a model is loaded; in most files every language comes early
            for part in parts:
                for text in part.texts() if part.languages is None else ():
                    known[text.group] = None
                    if all(group in known for group in self.groups):
                        break
        if known:
            for group in self.groups:
                if group not in known:
                    raise unknown_language(group, self.name, list(known))
        chosen = [part for part in parts if part.languages is None or set(part.languages) & set(self.groups)]
        place = {group: number for number, group in enumerate(self.groups)}
        ordered = [part._replace(languages=part.only(self.groups)) for part in chosen]
        return sorted(ordered, key=lambda part: place[part.languages[0]] if part.languages else 0)

    def _all_parts(self) -> list[_Part]:
        path = Path(self.source)
        if self.source in _SHIPPED:
            self._refuse_table_options("a corpus that moe-route brings")
            return [self._wide(table(_SHIPPED_FOLDER / "general.tsv"), "")] if path.name == "general" else [_sums()]
        if _PAIR.match(self.source) and not path.exists():
            return self._pairs()
        if path.is_dir():
            return self._folder(path)
        if path.suffix in _SUFFIXES or path.exists() or self.source.startswith((".", "/", "~")):
            return self._file(path, "")
        if close := get_close_matches(self.source, _SHIPPED, n=1):
            raise CorpusError(f"there is no file {self.source!r}: did you mean {close[0]!r}, which moe-route brings?")
        self._refuse_table_options("a dataset")
        return [self._long(lambda: _hub_dataset(self.source, self._split), self._split, "", uniform=True)]

    # ---- folders and files

    @cached_property
    def _folder_of_split(self) -> Path | None:
        """The folder with the files of the layout that the source is; None if it is none."""
        path = Path(self.source)
        inner = [path / self._split, path] if path.is_dir() else []
        return next((folder for folder in inner if folder.is_dir() and _layout_of(folder) is not None), None)

    def _folder(self, path: Path) -> list[_Part]:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            self._refuse_table_options("a folder of datasets.save_to_disk")
            return [self._long(lambda: _saved_dataset(path, self._split), self._split, "", uniform=True)]
        if self._folder_of_split is not None and self.columns is None:
            return self._layout(self._folder_of_split)
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        inner = sorted(folder for folder in path.iterdir() if folder.is_dir())
        inside = {folder.name: layout.name for folder in inner if (layout := _layout_of(folder)) is not None}
        if inside and self.columns is None:
            first = next(iter(inside))
            split = f", or its split by split={first!r} (--split)" if first in _SPLITS else ""
            raise CorpusError(
                f"{path} holds {inside[first]} in {_listed(inside)}: give the folder {path / first}{split}"
            )
        if not files:
            raise CorpusError(
                f"{path} holds no corpus: give a folder with {self._split}/CODE.{self._split}, with files "
                f"{', '.join(_SUFFIXES)}, or of datasets.save_to_disk; files of a text per line are given as "
                "CODE=FILE,CODE=FILE"
            )
        by_language = all(is_language(file.stem) for file in files)  # they pair by item, or by line
        return [part for file in files for part in self._file(file, "" if by_language else f"{file.stem}-")]

    def _file(self, path: Path, prefix: str) -> list[_Part]:
        if not path.is_file():
            raise FileMissingError(f"no file {path}")
        if self.columns is None and (layout := _layout_of(path)) is not None:
            self._refuse_table_options(layout.name)
            return self._layout_files(layout, [path])
        if path.suffix == ".jsonl":
            self._refuse_table_options("a .jsonl file")
            return [self._long(lambda: json_rows(path), path.stem, prefix)]
        if path.suffix == ".parquet":
            self._refuse_table_options("a .parquet file")
            return [self._long(lambda: _parquet(path), path.stem, prefix, uniform=True)]
        if path.suffix in _TABLES or self.columns is not None:
            read = table(path, columns=self.columns, quotes=self.quotes)
            if self.text in read.header:
                return [self._long(read.rows, path.stem, prefix, uniform=True, note=read.note)]
            return [self._wide(read, prefix)]
        if path.suffix == ".txt":
            raise CorpusError(
                f"{path} does not say what its lines are: for a text per line, give the language with the file, "
                f"eng_Latn={path}, and for several columns name them by columns (--columns item,eng_Latn,...)"
            )
        raise CorpusError(f"{path} is none of {', '.join(_SUFFIXES)}: rename it, or convert it")

    def _refuse_table_options(self, what: str) -> None:
        for name in ("columns", "quotes"):
            if getattr(self, name) is not None:
                raise CorpusError(f"{name} is for a table (.tsv or .csv), and {self.source} is {what}: leave it out")

    def _pairs(self) -> list[_Part]:
        """`CODE=FILE,CODE=FILE`: paired by line."""
        self._refuse_table_options("a list of files of a text per line")
        given = [part.partition("=") for part in re.split(r",(?=[\w-]+=)", self.source)]
        codes = [code for code, _, _ in given]
        if len(set(codes)) < len(codes):
            raise CorpusError(f"a language comes twice in {self.source!r}: give every file a name of its own")
        files = {code: Path(name) for code, _, name in given}
        for path in files.values():
            if not path.is_file():
                raise FileMissingError(f"no file {path}")
            if path.suffix in _SUFFIXES:
                raise CorpusError(f"{path} is a {path.suffix} file, not one of a text per line: give it by itself")
        _refuse_lengths(files, self.groups)
        return [_lines_part(code, path, "{line}", "line numbers") for code, path in files.items()]

    def _layout(self, folder: Path) -> list[_Part]:
        layout = _layout_of(folder)
        assert layout is not None
        self._refuse_table_options(layout.name)
        files = [path for path in sorted(folder.iterdir()) if layout.pattern.fullmatch(path.name)]
        splits = dict.fromkeys(split for path in files if (split := _named(layout, path).get("split")))
        if splits and self._split not in splits and (self.split is not None or len(splits) > 1):
            raise CorpusError(
                f"{folder} holds the split {' and '.join(splits)} of {layout.name}, not {self._split!r}: name it by "
                "split (--split)"
            )
        if self._split in splits:
            files = [path for path in files if _named(layout, path)["split"] == self._split]
        return self._layout_files(layout, files)

    def _layout_files(self, layout: Layout, files: Sequence[Path]) -> list[_Part]:
        named = {path: _named(layout, path)[layout.group] for path in files}
        codes: dict[str, Path] = {}
        for path in sorted(files, key=lambda path: (len(named[path]), named[path])):  # eng before eng-GB
            code = _flores(named[path])
            codes[named[path] if code in codes else code] = path
        ordered = dict(sorted(codes.items(), key=lambda entry: (entry[0] != "eng_Latn", entry[0])))
        if files[0].suffix == ".jsonl":
            return [self._layout_rows(layout, code, path) for code, path in ordered.items()]
        items = f"line numbers ({layout.name})"
        _refuse_lengths(ordered, self.groups)
        return [
            _lines_part(code, path, layout.item, items, layout.columns, _named(layout, path))
            for code, path in ordered.items()
        ]

    def _layout_rows(self, layout: Layout, code: str, path: Path) -> _Part:
        def texts() -> Iterator[CorpusText]:
            for line, row in enumerate(json_rows(path), start=1):
                yield _by_layout(layout, {**row.fields, "line": line}, row)._replace(group=code)

        names = " and ".join(f"{name!r}" for name in re.findall(r"{(\w+)", layout.item))
        return _Part((code,), texts, f"columns {names} ({layout.name})")

    # ---- rows

    def _wide(self, read: Table, prefix: str) -> _Part:
        """A table with a column for each language."""
        given = self.columns is not None
        header = [name for name in read.header if name != "-"]
        item = self.item if self.item in header else None if given else header[0]
        languages = tuple(name for name in header if name != item)
        if item is not None and item != self.item:
            _refuse_language_as_item(read, item)
        if not languages:
            raise CorpusError(
                f"{read.path}: the first line names no language; "
                f"{'commas' if read.path.suffix == '.csv' else 'tabs'} separate columns, and a table has a column "
                f"{self.text!r} or one for each language; name the columns of a table without a header by columns "
                "(--columns item,eng_Latn,...)"
            )
        for name in languages:
            if not is_language(name) and (near := misspelt([name], [self.text, self.item])) is not None:
                raise CorpusError(f"{read.path} has a column {name!r}: did you mean {near[1]!r}? Rename it")
            if name == self.group:
                raise CorpusError(f"{read.path} has a column {name!r} and none {self.text!r}: name it with text=")
            _refuse_text_as_name(read.path, name)
        chosen = languages if self.groups is None else tuple(name for name in self.groups if name in languages)

        def texts() -> Iterator[CorpusText]:
            for number, row in enumerate(read.rows(), start=1):
                key = f"{prefix}{number if item is None else row.fields[item]}"
                for name in chosen:
                    yield CorpusText(name, key, row.fields[name], row.read)

        return _Part(languages, texts, "line numbers" if item is None else f"column {item!r}", note=read.note)

    def _long(
        self, rows: Callable[[], Iterator[Row]], group: str, prefix: str, *, uniform: bool = False, note: str = ""
    ) -> _Part:
        """Rows of a text each; `uniform` if all rows have the columns of the first one."""
        first = next(rows(), None)
        fields: Mapping[str, Any] = {} if first is None else first.fields
        layout = None if self.text in fields else next((one for one in LAYOUTS if _fits(one, fields)), None)
        checked: set[tuple[str, ...]] = set()  # names of columns

        def texts() -> Iterator[CorpusText]:
            for number, row in enumerate(rows(), start=1):
                if layout is not None:
                    yield _by_layout(layout, {layout.group: group, **row.fields, "line": number}, row)
                    continue
                names = tuple(name for name, value in row.fields.items() if not isinstance(value, (list, dict)))
                if names not in checked:
                    self._refuse_misspelt(names, row.where)
                    checked.add(names)
                said = self._said(row)
                key = f"{prefix}{number if said.item is None else said.item}"
                yield CorpusText(str(said.group or group), key, said.text, row.read)

        if layout is not None:
            return _Part(None, texts, f"of {layout.name}", f"column {layout.group!r}")
        told = f"column {self.group!r}" if self.group in fields else group
        only = (group,) if uniform and self.group not in fields else None
        return _Part(only, texts, f"column {self.item!r}" if self.item in fields else "row numbers", told, note)

    def _refuse_misspelt(self, names: Sequence[str], where: str) -> None:
        """Refuse a column that is one letter away from one that is not there; others may be what they like.

        `names` leaves out columns of lists and tables, which are no text, group or item.
        """
        known = {"text": self.text, "group": self.group, "item": self.item}
        if near := misspelt(names, list(known.values())):
            option = next(option for option, name in known.items() if name == near[1])
            raise CorpusError(
                f"{where} has a column {near[0]!r}: did you mean {near[1]!r}? Rename it, or name it with "
                f"{option}={near[0]!r}"
            )
        if self.text not in names:
            raise CorpusError(
                f"{where}: no text in the column {self.text!r}; there are {', '.join(map(repr, names))}: name it with "
                "text="
            )

    def _said(self, row: Row) -> CorpusRow:
        """The columns of a row that are read."""
        given = {"text": row.fields.get(self.text), "group": row.fields.get(self.group)}
        said: CorpusRow = schema.read(CorpusRow, given | {"item": row.fields.get(self.item)}, row.where, CorpusError)
        return said


def read_texts(
    source: str | Path,
    *,
    columns: str | None = None,
    quotes: Quotes | None = None,
    languages: Sequence[str] | None = None,
    limit: int | None = None,
    text: str = "text",
    group: str = "group",
    item: str = "item",
    split: str | None = None,
    opened: bool = True,
) -> CorpusStream:
    """The texts of `source`, in any form that `CorpusStream` reads; its `described` tells how they are read.

    Files are opened at once, or with `opened=False` when they are iterated. Raises `FileNotFoundError` for a missing
    file, and `CorpusError` for a table whose columns cannot be told, for a language that is not there, and for files
    that are not parallel.
    """
    groups = (languages,) if isinstance(languages, str) else None if languages is None else tuple(languages)
    stream = CorpusStream(str(source), columns, quotes, text, group, item, split, groups, limit)
    if opened:
        stream.described  # noqa: B018
    return stream


def unknown_language(name: str, where: str, known: Sequence[str]) -> CorpusError:
    """The error for a language that a corpus does not have, with the nearest one."""
    code = flores_code(name)
    same = [one for one in known if code is not None and flores_code(one) == code]
    close = same or get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return CorpusError(f"no language {name!r} in {where}: {hint}there are {_listed(known)}")


# ---- parts of a source


class _Part(NamedTuple):
    """A file of a corpus, or what else is read from its beginning to its end."""

    languages: tuple[str, ...] | None  # that it can hold; None if only its rows tell
    texts: Callable[[], Iterator[CorpusText]]
    items: str  # where the keys of the items come from
    told: str = ""  # what tells the group, if the languages are None
    note: str = ""

    def only(self, groups: Sequence[str]) -> tuple[str, ...] | None:
        """Those of its languages that are in `groups`, in the order there."""
        return None if self.languages is None else tuple(name for name in groups if name in self.languages)


def _sums() -> _Part:
    """The shipped problems that every language saw in training, with their answers, as texts."""
    read = table(_SHIPPED_FOLDER / _SHIPPED["arithmetic"])
    languages = tuple(name for name in read.header if is_language(name))

    def texts() -> Iterator[CorpusText]:
        for row in read.rows():
            for name in languages if row.fields["subset"] == "seen" else ():
                problem = row.fields[name].strip()
                answer = f" {row.fields['answer']}" if spaces_words(name) else row.fields["answer"]
                yield CorpusText(name, row.fields["item"], problem + answer, row.read)

    return _Part(languages, texts, "column 'item'")


def _lines_part(
    code: str,
    path: Path,
    item: str,
    items: str,
    columns: Sequence[str] = ("text",),
    named: Mapping[str, str] | None = None,
) -> _Part:
    """A file of one language, a row per line."""

    def texts() -> Iterator[CorpusText]:
        for number, (line, read) in enumerate(_whole_lines(path), start=1):
            fields = _fields_of(path, number, line, columns)
            yield CorpusText(code, item.format(line=number, **(named or {})), fields["text"], read)

    return _Part((code,), texts, items)


def _fields_of(path: Path, number: int, line: str, columns: Sequence[str]) -> dict[str, str]:
    cells = line.split("\t") if len(columns) > 1 else [line]
    if len(cells) != len(columns):
        raise CorpusError(
            f"{path}, line {number}: {len(cells)} fields, and there are {len(columns)} in its data set "
            f"({', '.join(columns)}): correct the line, or name the columns by columns (--columns)"
        )
    return dict(zip(columns, cells, strict=True))


def _refuse_lengths(files: Mapping[str, Path], groups: Sequence[str] | None) -> None:
    """Refuse files of these groups that do not pair by line."""
    read = [path for code, path in files.items() if groups is None or code in groups]
    counts = {path: sum(1 for _ in _whole_lines(path)) for path in read}
    for path, first in ((path, read[0]) for path in read[1:]):
        if counts[path] != counts[first]:
            raise CorpusError(f"{path} has {counts[path]} lines, {first} has {counts[first]}: they are not parallel")


def _layout_of(path: Path) -> Layout | None:
    """The layout of a folder, or of a file."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for layout in LAYOUTS:
        first = next((file for file in files if layout.pattern.fullmatch(file.name) and file.is_file()), None)
        if first is not None and (first.suffix != ".jsonl" or _fits_file(layout, first)):
            return layout
    return None


def _fits_file(layout: Layout, path: Path) -> bool:
    """Whether the first object of JSON lines has the columns of a layout."""
    with path.open("rb") as stream:
        line = stream.readline()
    try:
        first = parse_json(line, str(path))
    except FileRefusedError:
        return False  # read as any other file, with its errors
    return isinstance(first, dict) and _fits(layout, first)


def _fits(layout: Layout, fields: Mapping[str, Any]) -> bool:
    return "text" not in layout.columns and all(name in fields for name in layout.columns)


def _named(layout: Layout, path: Path) -> dict[str, str]:
    """The parts of a file's name."""
    match = layout.pattern.fullmatch(path.name)
    assert match is not None
    return match.groupdict()


def _flores(code: str) -> str:
    """A code with a script as it is, any other as FLORES has it."""
    known = language(code)
    return code if known is None or re.fullmatch(r"[a-z]{3}_[A-Z][a-z]{3}\w*", code) else flores_code(code) or code


def _by_layout(layout: Layout, fields: Mapping[str, Any], row: Row) -> CorpusText:
    try:
        text = "\n".join(str(fields[name]).strip() for name in layout.texts)
        return CorpusText(str(fields[layout.group]), layout.item.format_map(fields), text, row.read)
    except KeyError as error:
        raise CorpusError(f"{row.where} has no {error}, which the rows of {layout.name} have: correct it") from error


# ---- tables


class Row(NamedTuple):
    """A row of a file: its fields by the names of the columns, where it stands, and the share of the file up to it."""

    fields: Mapping[str, Any]
    where: str  # for messages: file and line
    read: float | None


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        path: of the file.
        header: names of the columns.
        rows: gives out the rows, from the first one at each call.
        note: how quotes were read; "" if no field begins with one.
    """

    path: Path
    header: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    note: str = ""


def table(path: str | Path, *, columns: str | None = None, quotes: Quotes | None = None) -> Table:
    """Open a table; the first line names its columns, unless `columns` does. See `CorpusStream` for the arguments.

    Raises `FileNotFoundError`, and `CorpusError` naming the faulty line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileMissingError(f"no file {path}")
    begins = _quotes_of(path) if quotes is None and path.suffix != ".csv" else ("csv" if quotes is None else quotes)
    how: Quotes = "csv" if begins == "csv" else "none"
    first = next(_records(path, how), None)
    if first is None:
        raise CorpusError(f"{path} is empty: the first line must name the columns (item id, then the languages)")
    header = tuple(first[1] if columns is None else (name.strip() for name in columns.split(",")))
    if twice := next((name for name, count in Counter(header).items() if count > 1 and name != "-"), None):
        raise CorpusError(
            f"{path}: the column {twice!r} comes twice in the header; give every column a name of its own"
        )
    for number, name in enumerate(header, start=1):
        if not name.strip() and (number > 1 or columns is not None):  # pandas gives its index no name
            raise CorpusError(
                f"{path}: column {number} has no name; the first line must name the columns, or the option columns "
                "(--columns item,eng_Latn,...)"
            )
    if columns is not None and _is_header(first[1], header):
        raise CorpusError(
            f"{path}: the first line names the columns already ({', '.join(first[1])}): leave out columns"
        )

    def rows() -> Iterator[Row]:
        for where, fields, read in islice(_records(path, how), 0 if columns is not None else 1, None):
            if len(fields) != len(header):
                quoted = how == "none" and any(field.startswith('"') for field in fields)
                hint = '; if quotes enclose its fields, give quotes="csv" (--quotes csv)' if quoted else ""
                said = "the header has" if columns is None else "columns names"
                raise CorpusError(f"{where}: {len(fields)} fields where {said} {len(header)}{hint}")
            yield Row(dict(zip(header, fields, strict=True)), where, read)

    note = {"": "", "csv": "quotes enclose fields (csv)", "none": "quotes are part of the texts (none)"}[begins]
    return Table(path, header, rows, "" if quotes is None and path.suffix == ".csv" else note)


def _records(path: Path, quotes: Quotes) -> Iterator[tuple[str, list[str], float]]:
    """(place, fields, share read) of each row; only a quoted field of a .csv goes over the end of a line."""
    if path.suffix == ".csv" and quotes == "csv":
        yield from _csv_records(path)
        return
    separator = "," if path.suffix == ".csv" else "\t"
    for number, (line, read) in enumerate(_whole_lines(path), start=1):
        where = f"{path}, line {number}"
        if quotes == "none" or '"' not in line:
            yield where, line.split(separator), read
            continue
        try:
            (fields,) = csv.reader([line], delimiter=separator, strict=True)
        except (csv.Error, ValueError) as error:
            raise CorpusError(
                f'{where} is not quoted as CSV ({error}): correct it, or give quotes="none" (--quotes none)'
            ) from error
        yield where, fields, read


def _csv_records(path: Path) -> Iterator[tuple[str, list[str], float]]:
    share = [0.0]

    def texts() -> Iterator[str]:
        for text, share[0] in _whole_lines(path):
            yield text + "\n"

    csv.field_size_limit(_LONGEST_FIELD)
    parsed, number = csv.reader(texts(), strict=True), 0
    try:
        for number, fields in enumerate(filter(None, parsed), start=1):
            yield f"{path}, row {number}", fields, share[0]
    except csv.Error as error:
        raise CorpusError(
            f'{path}, row {number + 1} is not quoted as CSV ({error}): correct it, or give quotes="none" '
            "(--quotes none)"
        ) from error


def _quotes_of(path: Path) -> Literal["", "csv", "none"]:
    """Whether quotes enclose the fields of a .tsv; "" if no field begins with a quote.

    They do if every field that begins with a quote is well-formed CSV, and one of them holds a doubled quote.
    """
    any_quote = doubled = False
    for line, _ in _whole_lines(path):
        if '"' not in line:
            continue
        for field in line.split("\t"):
            if not field.startswith('"'):
                continue
            any_quote = True
            match = _QUOTED.fullmatch(field)
            if match is None:
                return "none"
            doubled = doubled or '""' in match[1]
    return "csv" if doubled else "none" if any_quote else ""


def _is_header(first: Sequence[str], columns: Sequence[str]) -> bool:
    """Whether the first line of a table names its columns."""
    same = [cell.strip().lower() for cell in first] == [name.lower() for name in columns]
    return same or all(len(cell) > 2 and is_language(cell) for cell in first)


def _refuse_language_as_item(read: Table, name: str) -> None:
    """Refuse a first column that is a language: its texts would become the ids of the items."""
    if not is_language(name):
        return
    why = "is a language"
    if len(name) == 2:  # id and no are languages, too
        looked = [str(row.fields[name]) for row in islice(read.rows(), _ROWS_LOOKED_AT)]
        sentences = sum(_is_sentence(value, words=3) for value in looked)
        if any(not value.strip() for value in looked):
            why = "is the code of a language, and some of its values are blank"
        elif len(set(looked)) < len(looked):
            why = "is the code of a language, and its values repeat (if they are ids, give every row its own)"
        elif 2 * sentences > len(looked):
            why = "is the code of a language, and most of its values are sentences"
        else:
            return
    if len(read.header) == 2 and _is_sentence(read.header[1], words=2):
        raise CorpusError(
            f"{read.path}: the first line must name the columns, and it is a text in {name!r}: give "
            "columns='group,text' (--columns), for lines of a language and a text"
        )
    raise CorpusError(
        f"{read.path}: the first column, {name!r}, {why}, where the ids of the items belong: put a column of ids "
        f"before it (named item), or remove the header and give columns={','.join(read.header)!r} (--columns), which "
        "numbers the lines"
    )


def _refuse_text_as_name(path: Path, name: str) -> None:
    """Refuse a name of a column that is a text: the table has no header."""
    number = any(sign.isdigit() for sign in name) and not any(sign.isalpha() for sign in name)
    if not number and (is_language(name) or not _is_sentence(name, words=2)):
        return
    shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    raise CorpusError(
        f"{path}: the first line must name the columns, and {shown!r} is a {'number' if number else 'sentence'}, no "
        "language: name the columns of a table without a header by columns (--columns item,eng_Latn,...; - leaves one "
        "out)"
    )


def _is_sentence(text: str, words: int) -> bool:
    """Whether a text looks like a sentence, of so many words or more, and not like a name or a key."""
    text = text.strip().rstrip("\"'\u201c\u201d\u00bb\u300d")
    ends = text.endswith(_SENTENCE_ENDS) and any(sign.isalpha() for sign in text)
    unspaced = len(_UNSPACED.findall(text)) >= _UNSPACED_LETTERS
    return ends or unspaced or len(text.split()) >= words or len(text) > _LONGEST_NAME


# ---- files


def _lines(path: str | Path) -> Iterator[tuple[str, float]]:
    """The lines of a UTF-8 file, and the share of the file up to each; only line feeds end a line."""
    path = Path(path)
    size = max(path.stat().st_size, 1)
    done = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            done += len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path}, line {number} is not UTF-8: save it as UTF-8") from error
            yield text.rstrip("\r\n"), done / size


def _whole_lines(path: Path) -> Iterator[tuple[str, float]]:
    """The lines of a file without the blank ones at its end."""
    blank: list[tuple[str, float]] = []
    for line, read in _lines(path):
        blank.append((line, read))
        if line.strip():
            yield from blank
            blank.clear()


def json_rows(path: str | Path) -> Iterator[Row]:
    """The objects of a file of JSON lines. Raises `CorpusError` naming the line that is none."""
    budget = Budget(path)
    for number, (line, read) in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        fields = parse_json(line, where, CorpusError, budget)
        if not isinstance(fields, dict):
            raise CorpusError(f"{where} is not an object: write an object per line")
        yield Row(fields, where, read)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'moe-route[analysis]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            budget, size = Budget(path), path.stat().st_size
            number, total = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                budget.unpack(size, batch.nbytes)
                budget.spend(batch.num_rows * batch.num_columns)
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}, row {number}", number / total)
    except ArrowException as error:
        raise CorpusError(f"{path} is not a whole Parquet file ({error}): write it again") from error


# ---- datasets


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a dataset by name needs datasets: pip install 'moe-route[eval]'; for a corpus on disk, give the "
            "path of a file or folder that exists"
        ) from error
    return datasets


def _saved_dataset(folder: Path, split: str) -> Iterator[Row]:
    saved = _datasets().load_from_disk(str(folder))
    if hasattr(saved, "keys"):  # a split is named
        if split not in saved:
            raise CorpusError(f"no split {split!r} in {folder}: there are {', '.join(saved)}")
        saved = saved[split]
    for number, fields in enumerate(saved, start=1):
        yield Row(fields, f"{folder}, row {number}", number / len(saved))


def _hub_dataset(name: str, split: str) -> Iterator[Row]:
    address, _, configuration = name.partition(":")
    datasets = _datasets()
    if not hub.answers(address):
        raise CorpusError(
            f"{address!r} is no file or folder here, and the hub, which may have a dataset of this name, cannot be "
            "reached: give a path, or load it where there is a network and bring it here by datasets.save_to_disk"
        )
    try:
        rows = datasets.load_dataset(address, configuration or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split("\nExample")[0].split()) or type(error).__name__
        raise CorpusError(
            f"no dataset {name!r} with a split {split!r} can be read ({reason.rstrip('.')}): name it as NAME or "
            "NAME:CONFIGURATION, and its split by --split"
        ) from error
    for number, fields in enumerate(rows, start=1):
        yield Row(fields, f"{name}, row {number}", None)


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    shown = ", ".join(islice(names, _NAMES_SHOWN))
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
