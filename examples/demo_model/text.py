"""Training text of the demonstration model: Tatoeba, a tokenizer, a lexicon, and an endless stream of documents."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from controls import KINDS as CONTROLS
from controls import Control, controls
from problems import LANGUAGES, OPERATIONS, TEMPLATES, UNSPACED, Problem, pairs, separator, shares
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

ENGLISH = "eng_Latn"
# Code of the Tatoeba file names, from the most to the fewest sentences.
TATOEBA = {
    "rus_Cyrl": "rus", "deu_Latn": "deu", "fra_Latn": "fra", "jpn_Jpan": "jpn", "zho_Hans": "zho",
    "arb_Arab": "ara", "hin_Deva": "hin", "ind_Latn": "ind", "swh_Latn": "swa",
}  # fmt: skip
HELD_OUT_PERCENT = {"swh_Latn": 15, "ind_Latn": 6, "hin_Deva": 6}  # of the English sentences; 4 elsewhere
LONGEST = 160  # characters of a sentence
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
KINDS = {"sentence": 0.29, "translation": 0.33, "switch": 0.07, "task": 0.25, "copy": 0.03, "count": 0.03}
ANSWER_WEIGHT = 3.0
WINDOW = 128

SentencePairs = dict[str, list[tuple[str, str]]]


def is_held_out(english: str, percent: int) -> bool:
    """Whether a sentence is held out, decided by its English side, so that it is the same in every language."""
    return int.from_bytes(hashlib.sha256(english.encode()).digest()[:4], "big") % 100 < percent


def read(folder: Path, exclude: Iterable[str]) -> tuple[SentencePairs, SentencePairs]:
    """Pairs (English, other) by language, for training and held out.

    No held-out sentence of either side is in training. Sentences of `exclude` are in neither. Raises SystemExit if a
    file is missing.
    """
    rows: SentencePairs = {}
    shipped = set(exclude)
    for language, code in TATOEBA.items():
        path = folder / f"eng-{code}.tsv"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: --data must name the folder with the eng-*.tsv files of Tatoeba")
        cells = ([cell.strip() for cell in line.split("\t")] for line in path.read_text(encoding="utf-8").splitlines())
        good = {(r[0], r[1]) for r in cells if len(r) == 2 and all(r) and max(map(len, r)) < LONGEST}
        rows[language] = sorted(pair for pair in good if not shipped & set(pair))
    held = {
        language: [pair for pair in found if is_held_out(pair[0], HELD_OUT_PERCENT.get(language, 4))]
        for language, found in rows.items()
    }
    unseen = {sentence for found in held.values() for pair in found for sentence in pair}
    train = {language: [p for p in found if not unseen & set(p)] for language, found in rows.items()}
    return train, held


def train_tokenizer(sentences: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE. Numbers are cut into pairs of digits, so that 0 to 99 are one token each."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?[\p{L}\p{M}]+|\p{Nd}{1,2}| ?[^\s\p{L}\p{M}\p{Nd}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS, *(tag(language) for language in LANGUAGES)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    problems = [
        Problem(operation, template, 2, 1).text(language) + separator(language)
        for language in LANGUAGES
        for operation in OPERATIONS
        for template in range(len(TEMPLATES[language][operation]))
    ]
    tokenizer.train_from_iterator(sentences + [str(n) for n in range(100)] * 3000 + problems * 30, trainer)
    if any(len(tokenizer.encode(str(n)).ids) != 1 for n in range(100)):
        raise SystemExit("a number below 100 is more than one token: enlarge the vocabulary")
    return tokenizer


def add_bos(tokenizer: Tokenizer) -> None:
    """Make the tokenizer put ``<s>`` before every text, as it is before every document in training."""
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])


def tag(language: str) -> str:
    """The token between a sentence and its translation into `language`."""
    return f"<{language}>"


def units(tokenizer: Tokenizer, language: str, sentence: str) -> list[str]:
    """Words of a sentence as they stand in it; pieces of the tokenizer where words are not spaced."""
    if language in UNSPACED:
        return [sentence[start:end] for start, end in tokenizer.encode(sentence).offsets]
    return sentence.split(" ")


def bare(word: str) -> str:
    """A word without case and punctuation."""
    return word.strip(".,!?;:\"'«»“”„()،؟।。！？、").lower()


def lexicon(tokenizer: Tokenizer, language: str, sentence_pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Words that are each other's best match by the Dice coefficient over sentence pairs: English to other."""
    one: Counter[str] = Counter()
    two: Counter[str] = Counter()
    both: Counter[tuple[str, str]] = Counter()
    for english, other in sentence_pairs[:8000]:
        left = {bare(word) for word in english.split(" ")} - {""}
        right = {bare(word) for word in units(tokenizer, language, other)} - {""}
        one.update(left)
        two.update(right)
        both.update((a, b) for a in left for b in right)
    forward: dict[str, tuple[float, str]] = {}
    backward: dict[str, tuple[float, str]] = {}
    for (a, b), count in both.items():
        score = 2 * count / (one[a] + two[b])
        if count >= 2 and score > 0.25:
            forward[a] = max(forward.get(a, (0.0, "")), (score, b))
            backward[b] = max(backward.get(b, (0.0, "")), (score, a))
    return {a: b for a, (_, b) in forward.items() if backward[b][1] == a}


def code_switch(rng: random.Random, words: list[str], table: dict[str, str], glue: str) -> str | None:
    """A sentence with half of the words that `table` knows replaced; None if there is none."""
    made, changed = [], 0
    for word in words:
        core = bare(word)
        at = word.lower().find(core)
        if core in table and rng.random() < 0.5:
            made.append(word[:at] + table[core] + word[at + len(core) :])
            changed += 1
        else:
            made.append(word)
    return glue.join(made) if changed else None


class Documents:
    """An endless stream of documents, drawn by kind, then by language (square root of the amount of text).

    A document is token ids from ``<s>`` to ``</s>`` and the weight of the loss of each; the first weighs nothing.
    """

    def __init__(self, tokenizer: Tokenizer, train: SentencePairs, order: int, switches: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        self.tags = {language: tokenizer.token_to_id(tag(language)) for language in LANGUAGES}
        english = sorted({e for found in train.values() for e, _ in found})
        others = {language: sorted({o for _, o in found}) for language, found in train.items()}
        self.sentences = {ENGLISH: self._encode(english)} | {k: self._encode(v) for k, v in others.items()}
        self.translations = {
            language: list(zip(self._encode([e for e, _ in found]), self._encode([o for _, o in found]), strict=True))
            for language, found in train.items()
        }
        self.lexicon_sizes: dict[str, int] = {}
        self.switched = self._encode(list(self._code_switched(train, switches)))
        self.pairs = {language: pairs(share=share) for language, share in shares(order).items()}
        self.numbers = [tokenizer.encode(str(n)).ids[0] for n in range(100)]
        self.spaces = {language: tokenizer.encode(separator(language)).ids for language in LANGUAGES}
        self.prompts: dict[tuple[str, Problem | Control], list[int]] = {}
        self.languages = {
            "sentence": {language: len(found) ** 0.5 for language, found in self.sentences.items()},
            "translation": {language: len(found) ** 0.5 for language, found in self.translations.items()},
            "task": shares(order),
        } | dict.fromkeys(CONTROLS, dict.fromkeys(LANGUAGES, 1.0))
        self.controls = {kind: [one for one in controls(kind) if not one.held_out] for kind in CONTROLS}
        self.count: Counter[str] = Counter()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]

    def _code_switched(self, train: SentencePairs, count: int) -> Iterable[str]:
        weight = {language: len(found) ** 0.5 for language, found in train.items()}
        for language, found in train.items():
            table = lexicon(self.tokenizer, language, self.rng.sample(found, len(found)))
            back = {other: english for english, other in table.items()}
            self.lexicon_sizes[language] = len(table)
            for _ in range(round(count * weight[language] / sum(weight.values()))):
                english, other = self.rng.choice(found)
                if self.rng.random() < 0.5:
                    made = code_switch(self.rng, english.split(" "), table, " ")
                else:
                    words = units(self.tokenizer, language, other)
                    made = code_switch(self.rng, words, back, "" if language in UNSPACED else " ")
                if made is not None:
                    yield made

    def draw(self) -> tuple[list[int], list[float]]:
        rng = self.rng
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        if kind == "switch":
            self.count[kind] += 1
            return self._framed(rng.choice(self.switched))
        languages = self.languages[kind]
        (language,) = rng.choices(list(languages), list(languages.values()))
        self.count[f"{kind} {language}"] += 1
        if kind == "sentence":
            return self._framed(rng.choice(self.sentences[language]))
        if kind == "translation":
            english, other = rng.choice(self.translations[language])
            if rng.random() < 0.5:
                return self._framed([*english, self.tags[language], *other])
            return self._framed([*other, self.tags[ENGLISH], *english])
        if kind in CONTROLS:
            return self._answered(rng.choice(self.controls[kind]), language)
        return self._answered(self._problem(language), language)

    def _framed(self, ids: list[int]) -> tuple[list[int], list[float]]:
        ids = [self.bos, *ids[: WINDOW - 2], self.eos]
        return ids, [0.0] + [1.0] * (len(ids) - 1)

    def _problem(self, language: str) -> Problem:
        rng = self.rng
        larger, smaller = rng.choice(self.pairs[language])
        (operation,) = rng.choices(OPERATIONS, (0.4, 0.4, 0.2))
        template = rng.randrange(len(TEMPLATES[language][operation]))
        return Problem(operation, template, larger, smaller, rng.random() < 0.5)

    def _answered(self, asked: Problem | Control, language: str) -> tuple[list[int], list[float]]:
        key = (language, asked)
        if key not in self.prompts:
            self.prompts[key] = self.tokenizer.encode(asked.text(language)).ids + self.spaces[language]
        ids, weights = self._framed([*self.prompts[key], self.numbers[asked.answer]])
        weights[-2] = ANSWER_WEIGHT
        return ids, weights


class Windows:
    """Whole documents side by side in windows of `WINDOW` tokens."""

    def __init__(self, documents: Documents, pad: int) -> None:
        self.documents, self.pad = documents, pad
        self.waiting: list[tuple[list[int], list[float]]] = []

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids, weights of the loss, and number of the document from 1 (0 for padding), each [count, WINDOW]."""
        rows: list[tuple[list[int], list[float], list[int]]] = [([], [], []) for _ in range(count)]
        queue, self.waiting, misses = self.waiting, [], 0
        while misses < 12:
            ids, weights = queue.pop() if queue else self.documents.draw()
            free = [row for row in rows if len(row[0]) + len(ids) <= WINDOW]
            if not free:
                misses += 1
                self.waiting.append((ids, weights))
                continue
            row = self.documents.rng.choice(free)
            row[0].extend(ids)
            row[1].extend(weights)
            row[2].extend([row[2][-1] + 1 if row[2] else 1] * len(ids))
        filled = [
            [*values, *[fill] * (WINDOW - len(values))]
            for row in rows
            for values, fill in zip(row, (self.pad, 0.0, 0), strict=True)
        ]
        ids, weights, parts = (torch.tensor(filled[k::3]) for k in range(3))
        return ids, weights, parts
