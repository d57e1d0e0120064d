"""Read corpora of any size, text by text: folders like FLORES, tables, JSON lines, Parquet, and `datasets`.

Nothing is kept of a text once it was given out, so memory does not grow with the corpus.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_route.base import hub
from moe_route.data.corpus import CorpusError

__all__ = ["CorpusStream", "CorpusText"]

_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")
_PARQUET_ROWS = 1024  # rows of a Parquet file that are in memory at a time
_LONGEST_FIELD = 1 << 27  # characters of a CSV field; the default of the csv module, 128 KiB, is less than a document


class CorpusText(NamedTuple):
    """A text of a corpus.

    `group` is its language or another label, `item` pairs it with its translations, and `read` is the share of the
    corpus up to here, from 0 to 1, or None if the size of the corpus is unknown.
    """

    group: str
    item: str
    text: str
    read: float | None


class _Row(NamedTuple):
    fields: Mapping[str, Any]
    where: str  # for messages: file and line
    read: float | None


@dataclass(frozen=True)
class CorpusStream:
    """The texts of a corpus, in a fixed order.

    `source` is one of:

    - a folder in the layout of FLORES, `SPLIT/CODE.SPLIT`, line i the same sentence in all languages;
    - a table: `.tsv` (unquoted) or `.csv` (quoted), with a header;
    - a `.jsonl` file, an object per line, or a `.parquet` file;
    - a folder of such files, read in the order of their names;
    - a folder of `datasets.save_to_disk`, or the name of a dataset, optionally `NAME:CONFIGURATION`.

    A table without the column `text` holds a column per language, after the column of item ids. In all others, `text`,
    `group` and `item` name the columns. Without the column `group`, the group is the stem of the file, or the split.
    Without the column `item`, texts are numbered. Blank texts are given out too.
    """

    source: str
    text: str = "text"
    group: str = "group"
    item: str = "item"
    split: str = "devtest"
    groups: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[CorpusText]:
        """Yield the texts. Raises `CorpusError` naming the file and line that cannot be read."""
        wanted = None if self.groups is None else set(self.groups)
        return (text for text in self._texts() if wanted is None or text.group in wanted)

    def _texts(self) -> Iterator[CorpusText]:
        path = Path(self.source)
        if path.is_dir():
            if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
                yield from self._long(_saved_dataset(path, self.split), self.split)
                return
            if (path / self.split).is_dir() or any(path.glob(f"*.{self.split}")):
                yield from self._flores(path)
                return
            files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
            if not files:
                raise CorpusError(
                    f"{path} holds no corpus: give a folder with {self.split}/CODE.{self.split}, with files "
                    f"{', '.join(_SUFFIXES)}, or of datasets.save_to_disk"
                )
            for number, file in enumerate(files):
                for text in self._file(file, f"{file.stem}-"):
                    read = None if text.read is None else (number + text.read) / len(files)
                    yield text._replace(read=read)
        elif path.suffix in _SUFFIXES or path.exists() or self.source.startswith((".", "/", "~")):
            yield from self._file(path, "")
        else:
            yield from self._long(_hub_dataset(self.source, self.split), self.split)

    def _file(self, path: Path, prefix: str) -> Iterator[CorpusText]:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        if path.suffix == ".jsonl":
            yield from self._long(_json_lines(path), path.stem, prefix)
        elif path.suffix == ".parquet":
            yield from self._long(_parquet(path), path.stem, prefix)
        elif path.suffix in (".tsv", ".csv"):
            yield from self._table(path, prefix)
        elif path.suffix == ".txt":
            raise CorpusError(
                f"{path} does not say what its columns are: for a text per line, write `text` as the first line and "
                "rename it to .tsv"
            )
        else:
            raise CorpusError(f"{path} is none of {', '.join(_SUFFIXES)}: rename it, or convert it")

    def _table(self, path: Path, prefix: str) -> Iterator[CorpusText]:
        header, rows = _table(path)
        if self.text in header:
            yield from self._long(rows, path.stem, prefix)
            return
        item, *languages = header
        if not languages:
            raise CorpusError(f"{path} has neither a column {self.text!r} nor one per language: name it with text=")
        for row in rows:
            for language in languages:
                yield CorpusText(language, f"{prefix}{row.fields[item]}", row.fields[language], row.read)

    def _long(self, rows: Iterator[_Row], group: str, prefix: str = "") -> Iterator[CorpusText]:
        for number, (fields, where, read) in enumerate(rows, start=1):
            text = fields.get(self.text)
            if not isinstance(text, str):
                raise CorpusError(
                    f"{where}: no text in the column {self.text!r}; there are {', '.join(map(repr, fields))}: name it "
                    "with text="
                )
            item = fields.get(self.item)
            yield CorpusText(
                str(fields.get(self.group) or group), f"{prefix}{number if item is None else item}", text, read
            )

    def _flores(self, folder: Path) -> Iterator[CorpusText]:
        inner = folder / self.split if (folder / self.split).is_dir() else folder
        found = {path.stem: path for path in sorted(inner.glob(f"*.{self.split}"))}
        codes: Sequence[str] = tuple(found) if self.groups is None else self.groups
        for number, code in enumerate(codes):
            if code not in found:
                raise CorpusError(f"no language {code!r} in {inner}: there are {', '.join(found)}")
            for line, (text, read) in enumerate(_lines(found[code]), start=1):
                yield CorpusText(code, f"{self.split}-{line:04d}", text, (number + (read or 0)) / len(codes))


def _lines(path: Path) -> Iterator[tuple[str, float | None]]:
    """The lines of a UTF-8 file, and the share of the file that was read; only line feeds end a line."""
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


def _table(path: Path) -> tuple[list[str], Iterator[_Row]]:
    """Header and rows of a table."""
    read: list[float | None] = [0.0]

    def lines() -> Iterator[str]:
        for text, read[0] in _lines(path):
            yield text + "\n"

    if path.suffix == ".csv":
        csv.field_size_limit(_LONGEST_FIELD)
        parsed: Iterator[list[str]] = csv.reader(lines(), strict=True)
    else:
        parsed = (line.rstrip("\n").split("\t") for line in lines() if line.strip())
    header = next(parsed, None)
    if header is None:
        raise CorpusError(f"{path} is empty: the first line must name the columns")
    if len(set(header)) < len(header):
        raise CorpusError(f"{path}: a column comes twice in the header; give every column a name of its own")

    def rows() -> Iterator[_Row]:
        for number, fields in enumerate(parsed, start=2):
            if len(fields) != len(header):
                raise CorpusError(f"{path}, row {number}: {len(fields)} fields where the header has {len(header)}")
            yield _Row(dict(zip(header, fields, strict=True)), f"{path}, row {number}", read[0])

    return header, rows()


def _json_lines(path: Path) -> Iterator[_Row]:
    for number, (line, read) in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{where} is not JSON ({error.msg}): write an object per line") from error
        if not isinstance(fields, dict):
            raise CorpusError(f"{where} is not an object: write an object per line")
        yield _Row(fields, where, read)


def _parquet(path: Path) -> Iterator[_Row]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("reading Parquet needs pyarrow: pip install 'moe-route[analysis]'") from error
    with parquet.ParquetFile(path) as file:
        number, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield _Row(fields, f"{path}, row {number}", number / total)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a dataset by name needs datasets: pip install 'moe-route[eval]'; for a corpus on disk, give the "
            "path of a file or folder that exists"
        ) from error
    return datasets


def _saved_dataset(folder: Path, split: str) -> Iterator[_Row]:
    found = _datasets().load_from_disk(str(folder))
    if hasattr(found, "keys"):  # a split is named
        if split not in found:
            raise CorpusError(f"no split {split!r} in {folder}: there are {', '.join(found)}")
        found = found[split]
    for number, fields in enumerate(found, start=1):
        yield _Row(fields, f"{folder}, row {number}", number / len(found))


def _hub_dataset(name: str, split: str) -> Iterator[_Row]:
    address, _, configuration = name.partition(":")
    datasets = _datasets()
    if not hub.answers(address):
        raise CorpusError(
            f"{address!r} is no file or folder here, and the hub, which may have a dataset of this name, cannot be "
            "reached: give a path, or load it where there is a network and bring it here by datasets.save_to_disk"
        )
    try:
        found = datasets.load_dataset(address, configuration or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split("\nExample")[0].split()) or type(error).__name__
        raise CorpusError(
            f"no dataset {name!r} with a split {split!r} can be read ({reason.rstrip('.')}): name it as NAME or "
            "NAME:CONFIGURATION, and its split by --split"
        ) from error
    for number, fields in enumerate(found, start=1):
        yield _Row(fields, f"{name}, row {number}", None)
