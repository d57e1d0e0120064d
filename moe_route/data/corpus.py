"""Parallel text: the same items in several languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

__all__ = ["Corpus", "CorpusError"]


class CorpusError(ValueError):
    """Raised for a corpus that cannot be read; the message says where the problem is and what to do."""


@dataclass(frozen=True)
class Corpus:
    """Texts aligned by item: ``texts[language][i]`` has the same meaning in all languages.

    ``languages`` are codes in the order of the source (FLORES codes such as ``eng_Latn`` in the shipped corpora).
    ``items`` are the ids that pair a text with its translations. ``len(corpus)`` is the number of items, and
    ``corpus[language]`` gives the texts of one language. Raises :class:`CorpusError` if texts are missing, empty or too
    many, or if a language or an item occurs twice.
    """

    languages: tuple[str, ...]
    items: tuple[str, ...]
    texts: Mapping[str, tuple[str, ...]]
    name: str = "corpus"

    def __post_init__(self) -> None:
        object.__setattr__(self, "languages", tuple(self.languages))
        object.__setattr__(self, "items", tuple(self.items))
        texts = {language: tuple(column) for language, column in self.texts.items()}
        object.__setattr__(self, "texts", MappingProxyType(texts))
        for kind, names in (("language", self.languages), ("item", self.items)):
            if twice := _repeated(names):
                raise CorpusError(f"{self.name}: the {kind} {twice!r} comes twice; give every {kind} a name of its own")
        if set(texts) != set(self.languages):
            raise CorpusError(
                f"{self.name}: texts are given for {sorted(texts)}, languages are {sorted(self.languages)}"
            )
        for language in self.languages:
            self._check_column(language, texts[language])

    def _check_column(self, language: str, column: Sequence[str]) -> None:
        if len(column) != len(self.items):
            raise CorpusError(
                f"{self.name}: {len(column)} texts in {language} for {len(self.items)} items; every item needs one"
            )
        for item, text in zip(self.items, column, strict=True):
            if not text.strip():
                raise CorpusError(
                    f"{self.name}: item {item!r} has no text in {language}; fill it in or leave the item out"
                )

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        return f"Corpus({self.name}: {len(self)} items x {len(self.languages)} languages)"

    def __getitem__(self, language: str) -> tuple[str, ...]:
        """The texts of one language, in the order of ``items``. Raises ``KeyError`` naming the available languages."""
        if language not in self.texts:
            raise KeyError(self._unknown(language))
        return self.texts[language]

    def subset(self, languages: Iterable[str] | None = None, limit: int | None = None) -> Corpus:
        """Select ``languages`` (in the given order; ``None`` for all) and the first ``limit`` items (``None`` for all).

        Raises ``KeyError`` for an unknown language and ``ValueError`` for a limit below 1.
        """
        if isinstance(languages, str):
            languages = (languages,)
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        chosen = self.languages if languages is None else tuple(languages)
        return Corpus(chosen, self.items[:limit], {language: self[language][:limit] for language in chosen}, self.name)

    @classmethod
    def read(cls, path: str | Path, languages: Iterable[str] | None = None) -> Corpus:
        """Read a folder in the layout of FLORES (:meth:`read_flores`) or a table (:meth:`read_tsv`)."""
        if Path(path).is_dir():
            return cls.read_flores(path, languages)
        corpus = cls.read_tsv(path)
        return corpus if languages is None else corpus.subset(languages)

    @classmethod
    def read_tsv(cls, path: str | Path) -> Corpus:
        """Read a tab-separated UTF-8 table: a header (any name, then the languages), then an item per row, id first.

        Fields are not quoted, so texts contain no tabs and line breaks. Blank lines at the end are ignored. Raises
        ``FileNotFoundError`` if there is no such file, and :class:`CorpusError` naming the faulty line.
        """
        path = Path(path)
        lines = _read_lines(path)
        if not lines:
            raise CorpusError(f"{path} is empty: the first line must name the columns (item id, then the languages)")
        header, *rows = (line.split("\t") for line in lines)
        if len(header) < 2:
            raise CorpusError(
                f"{path}: the first line names no language; columns are separated by tabs. `moe-route record --corpus` "
                "and CorpusStream read .csv, .jsonl and .parquet too"
            )
        for number, row in enumerate(rows, start=2):
            if len(row) != len(header):
                raise CorpusError(f"{path}, line {number}: {len(row)} fields where the header has {len(header)}")
        if not rows:
            raise CorpusError(f"{path} has a header but no item")
        columns = list(zip(*rows, strict=True))
        if twice := _repeated(header[1:]):
            raise CorpusError(f"{path}: the language {twice!r} comes twice in the header")
        return cls(tuple(header[1:]), columns[0], dict(zip(header[1:], columns[1:], strict=True)), path.name)

    @classmethod
    def read_flores(cls, folder: str | Path, languages: Iterable[str] | None = None, split: str = "devtest") -> Corpus:
        """Read FLORES-200 as distributed: ``<folder>/<split>/<code>.<split>``, line *i* the same sentence in all.

        ``languages`` are the codes to read, in that order; ``None`` reads every file, English first. ``folder`` may
        also be the split's own folder. Items are named ``<split>-0001`` and so on. Raises ``FileNotFoundError`` if the
        folder has no such files, ``KeyError`` for a code without a file, and :class:`CorpusError` if the files differ
        in length.
        """
        folder = Path(folder)
        inner = folder / split if (folder / split).is_dir() else folder
        files = {path.stem: path for path in sorted(inner.glob(f"*.{split}")) if path.is_file()}
        if not files:
            raise FileNotFoundError(
                f"no file *.{split} in {inner}: give the folder that holds {split}/eng_Latn.{split} and its neighbors"
            )
        if isinstance(languages, str):
            languages = (languages,)
        codes = sorted(files, key=lambda code: (code != "eng_Latn", code)) if languages is None else tuple(languages)
        for code in codes:
            if code not in files:
                raise KeyError(f"no language {code!r} in {inner}: there are {', '.join(files)}")
        if not codes:
            raise ValueError("languages is empty: name at least one, or None for all")
        texts = {code: tuple(_read_lines(files[code])) for code in codes}
        count = len(texts[codes[0]])
        for code, column in texts.items():
            if len(column) != count:
                raise CorpusError(
                    f"{files[code]} has {len(column)} lines, {files[codes[0]]} has {count}: they are not parallel"
                )
        items = tuple(f"{split}-{number:04d}" for number in range(1, count + 1))
        return cls(tuple(codes), items, texts, f"{folder.name}/{split}")

    def _unknown(self, language: str) -> str:
        return f"no language {language!r} in {self.name}: there are {', '.join(self.languages)}"


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without blank ones at its end; only line feeds end a line."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    return lines
