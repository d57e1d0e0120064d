"""Measures of a checkpoint of train.py: load, skill, translation, retrieval, divergence, and experts switched off.

Nothing is measured on the text that it was found on: task experts are found on problems whose numbers every language
saw and on every second held-out sentence, and measured on problems that English alone saw and on the other sentences.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from problems import LANGUAGES
from text import ENGLISH, tag

from moe_route import Plan, analysis
from moe_route.analysis.stats import draw_items, interval_of, resampled_means
from moe_route.data import Question, Task, demo_controls, demo_numbers
from moe_route.data.batches import Text, texts_of
from moe_route.demo.measurement import pick_items
from moe_route.demo.task_experts import find_task_experts
from moe_route.recording import RoutingStatistics
from moe_route.routed import RoutedModel
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.record import record_texts

OTHERS = tuple(language for language in LANGUAGES if language != ENGLISH)
COUNTED = (0.1, 0.2, 0.3, 0.4, 0.5)  # thresholds at which task experts are counted
SINGLE_LAYERS = (0, 1)  # layers whose experts are switched off one by one
FEW = 20  # questions per language where many runs are made
TOKENS = (3, 60)  # shortest and longest sentence of the other language
BATCH = 64
FEW_COMMON = 1e-6  # English has a sentence for each of the other languages, so few of its items are in a given one

SentencePairs = dict[str, list[tuple[str, str]]]


@dataclass(frozen=True)
class Material:
    """What a model is judged on: held-out sentence pairs (English, other) by language, and problems."""

    pairs: SentencePairs
    problems: Task
    few: int = FEW

    @property
    def sentences(self) -> list[Text]:
        """Both sides of every pair; English sentences come once for each other language."""
        return [
            Text(group, f"{language}-{number}", sentence)
            for language, found in self.pairs.items()
            for number, pair in enumerate(found)
            for group, sentence in zip((ENGLISH, language), pair, strict=True)
        ]


def held_out_pairs(folder: Path, language_model: LanguageModel, count: int) -> SentencePairs:
    """Up to `count` pairs per language from held_out.json, in a fixed order; no sentence comes twice."""
    held: dict[str, list[list[str]]] = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    kept: SentencePairs = {}
    for language in OTHERS:
        rows = sorted((english, other) for english, other in held[language])
        random.Random(7).shuffle(rows)
        lengths = [len(ids) for ids in language_model.encode([Text(language, "", other) for _, other in rows]).ids]
        seen: set[str] = set()
        kept[language] = []
        for pair, length in zip(rows, lengths, strict=True):
            if TOKENS[0] <= length <= TOKENS[1] and not seen & set(pair) and len(kept[language]) < count:
                seen |= set(pair)
                kept[language].append(pair)
    return kept


def record(language_model: LanguageModel, routed: RoutedModel, texts: Sequence[Text]) -> RoutingStatistics:
    with routed.record(groups=LANGUAGES, sequences=True) as recorder:
        record_texts(recorder, language_model, texts, batch_size=BATCH)
    return recorder.statistics()


def load(statistics: RoutingStatistics) -> dict[str, list[float]]:
    """By layer, languages weighed alike: entropy of the load over its maximum, least and largest share of an expert."""
    shares = analysis.load_balance(statistics).load.mean(0)
    entropy = analysis.entropy_of(shares) / np.log(shares.shape[1])
    return {"entropy": entropy.tolist(), "least": shares.min(1).tolist(), "largest": shares.max(1).tolist()}


def skill(language_model: LanguageModel, questions: Sequence[Question]) -> dict[str, dict[str, dict[str, float]]]:
    """Subset -> language -> exact match, and nats of the right answer."""
    found = language_model.answers(questions, batch_size=BATCH)
    rows: dict[str, dict[str, list[int]]] = {}
    for number, question in enumerate(questions):
        rows.setdefault(question.subset, {}).setdefault(question.language, []).append(number)
    return {
        subset: {
            language: {"exact_match": float(found.correct[at].mean()), "nats": float(found.nats[at].mean())}
            for language, at in languages.items()
        }
        for subset, languages in rows.items()
    }


def text_loss(language_model: LanguageModel, texts: Sequence[Text]) -> dict[str, dict[str, float]]:
    """Language -> nats per token, bits per byte, and number of different sentences."""
    unique = [Text(group, "", text) for group, text in dict.fromkeys((one.group, one.text) for one in texts)]
    found = language_model.losses(unique, batch_size=BATCH)
    result = {}
    for language in dict.fromkeys(one.group for one in unique):
        at = [number for number, one in enumerate(unique) if one.group == language]
        nats, tokens = found[at].sum(0)
        size = sum(len(unique[number].text.encode()) for number in at)
        result[language] = {
            "sentences": len(at),
            "nats_per_token": float(nats / tokens),
            "bits_per_byte": float(nats / math.log(2) / size),
        }
    return result


def translation(language_model: LanguageModel, pairs: SentencePairs) -> dict[str, dict[str, dict[str, Any]]]:
    """Language -> direction -> nats of a sentence after its own translation and after another one's, and the gain.

    The text is the source, the tag of the target language, the target and the end of the text; the target is judged.
    The gain has a 95 % interval, from a bootstrap over sentences.
    """
    end = language_model.tokenizer.eos_token
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for language, found in pairs.items():
        english, other = [list(side) for side in zip(*found, strict=True)]
        result[language] = {}
        for direction, sources, targets, target in (
            ("from_english", english, other, language),
            ("to_english", other, english, ENGLISH),
        ):
            unrelated = [*sources[1:], sources[0]]
            own, another = (
                language_model.answers(
                    [
                        Question(str(number), target, f"{source}{tag(target)}", f"{answer}{end}")
                        for number, (source, answer) in enumerate(zip(context, targets, strict=True))
                    ],
                    batch_size=BATCH,
                ).nats
                for context in (sources, unrelated)
            )
            gain = another - own
            low, high = interval_of(resampled_means(draw_items(len(gain), 1000, 0), gain), len(gain), 0.95)
            result[language][direction] = {
                "own": float(own.mean()),
                "another": float(another.mean()),
                "gain": float(gain.mean()),
                "interval": [float(low), float(high)],
            }
    return result


def routing_retrieval(statistics: RoutingStatistics) -> dict[str, list[float]]:
    """Language -> by layer: share of sentences whose translation routes most alike, mean of both directions."""
    result = {}
    for language in OTHERS:
        both = (ENGLISH, language)
        found = analysis.similarity(statistics, groups=both, rule="retrieval", min_common=FEW_COMMON).values
        result[language] = ((found[:, 0, 1] + found[:, 1, 0]) / 2).tolist()
    return result


def hidden_retrieval(language_model: LanguageModel, pairs: SentencePairs) -> dict[str, list[float]]:
    """The same with mean hidden states: the embedding, then the output of each layer."""
    result = {}
    for language, found in pairs.items():
        english, other = (_mean_states(language_model, [pair[side] for pair in found]) for side in (0, 1))
        cosine = np.einsum("nlh,mlh->lnm", english, other)
        own = np.arange(len(found))
        right = (cosine.argmax(2) == own).mean(1) + (cosine.argmax(1) == own).mean(1)
        result[language] = (right / 2).tolist()
    return result


def _mean_states(language_model: LanguageModel, sentences: Sequence[str]) -> np.ndarray:
    """Mean over tokens of the hidden states, without the mean over sentences, of unit length: [n, layers + 1, H]."""
    texts = [Text("", str(number), sentence) for number, sentence in enumerate(sentences)]
    rows: dict[int, np.ndarray] = {}
    for batch in language_model.batches(texts, batch_size=BATCH):
        with torch.inference_mode():
            states = language_model.model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
        mask = batch.inputs["attention_mask"][..., None]
        means = torch.stack([(layer * mask).sum(1) / mask.sum(1) for layer in states], 1)
        rows |= dict(zip(batch.positions, means.float().cpu().numpy(), strict=True))
    states = np.stack([rows[number] for number in range(len(texts))])
    states -= states.mean(0)
    return states / np.linalg.norm(states, axis=2, keepdims=True)


def divergence(statistics: RoutingStatistics, pairs: SentencePairs) -> dict[str, dict[str, Any]]:
    """Kind -> divergence from English by language and layer, and the depth of the U with its 95 % interval.

    "own" compares a sentence with its translation, "unrelated" with the translation of another sentence; "floor" is the
    divergence between unrelated sentences of one language, mean of English and the other one.
    """
    store = statistics.store
    found: dict[str, dict[str, analysis.UShape]] = {"own": {}, "unrelated": {}}
    values: dict[str, dict[str, list[float]]] = {"own": {}, "unrelated": {}, "floor": {}}
    for seed, (language, sentences) in enumerate(pairs.items()):
        items = [f"{language}-{number}" for number in range(len(sentences))]
        english, other = (np.stack([store.distributions(i, group) for i in items]) for group in (ENGLISH, language))
        own = analysis.divergence(statistics, ENGLISH, groups=[language], min_common=FEW_COMMON)
        unrelated = analysis.divergence(other, np.roll(english, 1, axis=0), num_experts=statistics.num_experts)
        values["floor"][language] = own.expected_floor[0].tolist()
        for kind, one in (("own", own), ("unrelated", unrelated)):
            values[kind][language] = one.values[0].tolist()
            found[kind][language] = analysis.u_shape(one, seed=seed)
    depths = {kind: {"depth": _depths(shapes)} for kind, shapes in found.items()}
    return {kind: {"by_layer": by_layer} | depths.get(kind, {}) for kind, by_layer in values.items()}


def _depths(shapes: dict[str, analysis.UShape]) -> dict[str, dict[str, Any]]:
    """Depth of the U by language, and of their mean, whose sentences are drawn language by language."""
    result: dict[str, dict[str, Any]] = {}
    for language, shape in shapes.items():
        low, high = shape.interval()
        result[language] = {"depth": float(shape.depth[0]), "interval": [float(low[0]), float(high[0])]}
    drawn = np.mean([shape.resampled[:, 0] for shape in shapes.values()], axis=0)
    low, high = interval_of(drawn, min(shape.pairs for shape in shapes.values()), 0.95)
    mean = float(np.mean([shape.depth[0] for shape in shapes.values()]))
    return result | {"mean": {"depth": mean, "interval": [float(low), float(high)]}}


def task_experts_off(
    language_model: LanguageModel, routed: RoutedModel, material: Material, draws: int
) -> dict[str, Any]:
    """Find the experts of the task in English, switch them off in every language, and compare with random experts.

    They are those of the demo (`moe_route.demo`): one in ten of all, found against half of the English sentences with
    numbers. "threshold" is the smallest of their differences, and "count" has the experts above others against general
    text. Changes are with the experts off minus with all experts: exact match and nats per answer on problems that
    English alone saw, nats per token on general text. Random experts are as many of the same layers, drawn from all
    experts of the layer; they are judged on the first `few` questions of each language, and so are the task experts
    once more.
    """
    sentences = material.sentences
    finding, measuring = ([one for one in sentences if _number(one) % 2 == half] for half in (0, 1))
    task = record(language_model, routed, texts_of(material.problems.subset("seen", languages=[ENGLISH]).corpus()))
    general = record(language_model, routed, [one for one in finding if one.group == ENGLISH])
    selections = {
        threshold: analysis.task_experts(task, general, threshold=threshold, group=ENGLISH, baseline_group=ENGLISH)
        for threshold in COUNTED
    }
    numbers = pick_items(demo_numbers(), range(0, len(demo_numbers()), 2))
    chosen = find_task_experts(task, record(language_model, routed, texts_of(numbers)))
    found = chosen.experts
    counts = {str(threshold): sum(map(len, one.values())) for threshold, one in selections.items()}
    result = {
        "threshold": round(chosen.threshold, 3),
        "count": counts,
        "experts": {str(layer): list(ids) for layer, ids in found.items()},
    }
    if not found:
        return result
    changes = Changes(language_model, routed, material.problems.subset("english_only").questions, measuring)
    few = Changes(
        language_model, routed, material.problems.subset("english_only", limit=material.few).questions, measuring
    )
    plan = Plan.forbid(found)
    return result | {
        "off": changes.under(plan),
        "off_few": few.under(plan)["mean"],
        "random_few": [few.under(plan.random(seed))["mean"] for seed in range(draws)],
    }


def single_experts_off(language_model: LanguageModel, routed: RoutedModel, material: Material) -> dict[str, Any]:
    """Change of the answers with one expert off, mean over languages: every expert of `SINGLE_LAYERS`."""
    questions = material.problems.subset("english_only", limit=material.few).questions
    changes = Changes(language_model, routed, questions, [])
    return {
        f"L{layer}E{expert}": changes.under(Plan.forbid({layer: [expert]}))["mean"]
        for layer in SINGLE_LAYERS
        for expert in range(routed.routers[layer].num_experts)
    }


class Changes:
    """What a plan changes in answers and in the loss of general text, by language and in the mean of languages."""

    def __init__(
        self, language_model: LanguageModel, routed: RoutedModel, questions: Sequence[Question], texts: Sequence[Text]
    ) -> None:
        self.language_model, self.routed, self.questions, self.texts = language_model, routed, questions, texts
        self.before = self._measured()

    def _measured(self) -> dict[str, dict[str, float]]:
        (answers,) = skill(self.language_model, self.questions).values()
        texts = text_loss(self.language_model, self.texts) if self.texts else {}
        return {
            language: found | ({"text": texts[language]["nats_per_token"]} if texts else {})
            for language, found in answers.items()
        }

    def under(self, plan: Plan) -> dict[str, dict[str, float]]:
        with self.routed.steer(plan):
            after = self._measured()
        change = {
            language: {name: after[language][name] - value for name, value in found.items()}
            for language, found in self.before.items()
        }
        names = next(iter(change.values()))
        return change | {"mean": {name: float(np.mean([one[name] for one in change.values()])) for name in names}}


def _number(text: Text) -> int:
    """Number of the sentence pair of a text."""
    return int(text.item.rsplit("-", 1)[1])


def measure(language_model: LanguageModel, routed: RoutedModel, material: Material) -> dict[str, Any]:
    """All measures that an untrained model has, too."""
    general = record(language_model, routed, material.sentences)
    tasks = record(language_model, routed, texts_of(material.problems.subset("english_only").corpus()))
    return {
        "load": {"text": load(general), "tasks": load(tasks)},
        "skill": skill(language_model, material.problems.questions),
        "controls": skill(language_model, demo_controls().questions),
        "text": text_loss(language_model, material.sentences),
        "translation": translation(language_model, material.pairs),
        "retrieval": {
            "routing": routing_retrieval(general),
            "hidden": hidden_retrieval(language_model, material.pairs),
        },
        "divergence": divergence(general, material.pairs),
    }
