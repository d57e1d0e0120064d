"""Parallel text: the same items in several languages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from moe_route.data.reader import CorpusError, Quotes, read_texts, unknown_language


@dataclass(frozen=True)
class Corpus:
    """Texts aligned by item: ``texts[language][i]`` has the same meaning in all languages.

    ``languages`` are codes in the order of the source (FLORES codes such as ``eng_Latn`` in the shipped corpora).
    ``items`` are the ids that pair a text with its translations, and ``described`` tells how a file was read.
    ``len(corpus)`` is the number of items, and ``corpus[language]`` gives the texts of one language. Raises
    :class:`CorpusError` if texts are missing, empty or too many, or if a language or an item occurs twice.
    """

    languages: tuple[str, ...]
    items: tuple[str, ...]
    texts: Mapping[str, tuple[str, ...]]
    name: str = "corpus"
    described: str = field(default="", compare=False, repr=False)

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
            raise KeyError(str(unknown_language(language, self.name, self.languages)))
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
    def read(
        cls,
        source: str | Path,
        languages: Sequence[str] | None = None,
        *,
        columns: str | None = None,
        quotes: Quotes | None = None,
        limit: int | None = None,
        split: str | None = None,
    ) -> Corpus:
        """Read parallel text from any source of `data.CorpusStream`, which explains the arguments.

        ``languages`` are read in the order given, and ``limit`` items of each. Raises the errors of `data.read_texts`,
        and :class:`CorpusError` for texts that are not parallel.
        """
        stream = read_texts(source, columns=columns, quotes=quotes, languages=languages, limit=limit, split=split)
        texts: dict[str, dict[str, str]] = {language: {} for language in stream.groups or ()}
        for group, item, text, _ in stream:
            of_language = texts.setdefault(group, {})
            if item in of_language:
                raise CorpusError(
                    f"{stream.name}: the item {item!r} comes twice in {group}; give every item a name of its own"
                )
            of_language[item] = text
        if not any(texts.values()):
            raise CorpusError(f"{stream.name} has no item: it needs one at least")
        first, *others = texts
        for language in others:
            for one, other in ((first, language), (language, first)):
                if missing := next((item for item in texts[one] if item not in texts[other]), None):
                    raise CorpusError(
                        f"{stream.name}: item {missing!r} has no text in {other} and one in {one}, so they are not "
                        "parallel; fill it in, or leave the item or the language out"
                    )
        items = tuple(texts[first])
        columns_of = {language: tuple(of[item] for item in items) for language, of in texts.items()}
        return cls(tuple(texts), items, columns_of, stream.name, stream.described)


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
