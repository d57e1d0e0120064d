"""Similarity of languages by the answers that a model gives in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from moe_route.analysis.inputs import AnalysisError
from moe_route.analysis.similarity import Similarity
from moe_route.analysis.translation_rules import FEWEST

__all__ = ["answer_similarity"]


def answer_similarity(answers: Mapping[str, Mapping[Any, Hashable]]) -> Similarity:
    """Measure how often a model answers the same question alike in two languages, for all pairs of them.

    An answer is anything that can be compared: the text or the choice given, or whether it was right. Chance is what
    two languages with these answers share if their questions are shuffled, so two languages that are mostly right are
    alike by chance, too.

    Args:
        answers: group -> item -> answer. Compared are the items that all groups have.

    Returns a ``Similarity`` of one layer, [1, G, G], with its tree, clusters, comparisons and pictures. Raises
    ``AnalysisError`` for fewer than two groups or ten common items.
    """
    groups = tuple(answers)
    if len(groups) < 2:
        raise AnalysisError("two groups or more are compared: give answers by group, and by item in each")
    items = [item for item in answers[groups[0]] if all(item in answers[group] for group in groups)]
    if len(items) < FEWEST:
        raise AnalysisError(f"{len(items)} items are common to all groups: give at least {FEWEST}")
    given = [[answers[group][item] for item in items] for group in groups]
    number, often = len(items), [Counter(row) for row in given]
    values, chance = np.ones((1, len(groups), len(groups))), np.full((1, len(groups), len(groups)), np.nan)
    for i in range(len(groups)):
        for j in range(i):
            same = sum(one == other for one, other in zip(given[i], given[j], strict=True))
            values[0, i, j] = values[0, j, i] = same / number
            expected = sum(times * often[j][answer] for answer, times in often[i].items()) / number**2
            chance[0, i, j] = chance[0, j, i] = expected
    return Similarity(values, groups, ("answers",), "answers", number, by_chance=chance)
