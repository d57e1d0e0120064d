"""Rules that judge, from the cosines of sentences and their translations, how well two languages are aligned.

C [n, n] holds the cosine of sentence i of one language with sentence j of the other; C_ii are translations.

- "mexa": C_ii is above every other entry of row i and of column i [MEXA, arXiv 2410.05873].
- "retrieval": C_ii is above every other entry of row i.
- "margin": the same of ``2 C_ij / (r_i + c_j)``, with r_i the mean of the m largest entries of row i and c_j that of
  column j [ratio margin, arXiv 1811.01136].
- "cosine": C_ii itself [Language Ranker, arXiv 2404.11553; mPLM-Sim, arXiv 2305.13684].

The first three are true or false for each sentence. A tie is lost, so a sentence that occurs twice never wins.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from moe_route.analysis.inputs import AnalysisError

__all__ = [
    "FEWEST", "RULES", "RULE_NAMES", "Judged", "Rule", "Side", "check_rule", "cosines", "judge", "same_vectors",
]  # fmt: skip

Rule = Literal["mexa", "retrieval", "margin", "cosine"]
RULES = ("mexa", "retrieval", "margin", "cosine")
RULE_NAMES = {
    "mexa": "share of sentences that are nearest to their translation, in both directions",
    "retrieval": "share of sentences whose nearest neighbor is their translation",
    "margin": "share of sentences whose nearest neighbor by the ratio margin is their translation",
    "cosine": "mean cosine similarity of parallel sentences",
}
FEWEST = 10  # sentences for a share of them


class Side(NamedTuple):
    """Sentences of one language, with each different vector once.

    Sentences with the same vector then have the same cosines to the bit, which a product of matrices does not promise.

    Attributes:
        rows: the different unit vectors, float64 [u, D]; NaN for sentences without a vector.
        place: int64 [n], the row of each sentence.
    """

    rows: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, units: np.ndarray) -> Side:
        """From the unit vectors of all sentences, float64 [n, D]."""
        rows, place = np.unique(units, axis=0, return_inverse=True)
        return cls(rows, place.reshape(-1))


class Judged(NamedTuple):
    """What a rule says of two languages.

    Attributes:
        values: float64 [n], of each sentence; NaN for one without a vector.
        chance: what ``values`` are on average if each sentence is paired with a random one.
    """

    values: np.ndarray
    chance: float


def cosines(first: Side, second: Side) -> np.ndarray:
    """float64 [n, n]: cosine of each sentence of one language with each of the other."""
    of_rows: np.ndarray = first.rows @ second.rows.T
    return of_rows[np.ix_(first.place, second.place)]


def judge(found: np.ndarray, rule: Rule, neighbors: int = 4) -> Judged:
    """Apply a rule to cosines, float64 [n, n]; sentences whose own cosine is NaN take no part.

    ``neighbors`` is the m of "margin". Raises ``AnalysisError`` where the neighbors of a sentence have no positive mean
    cosine, which margins divide by.
    """
    seen = np.flatnonzero(~np.isnan(np.diag(found)))
    values = np.full(len(found), np.nan)
    if not len(seen):
        return Judged(values, float("nan"))
    c = found[np.ix_(seen, seen)]
    if rule == "cosine":
        judged = c
    elif rule == "mexa":
        judged = _largest(c) & _largest(c.T).T
    else:
        judged = _largest(c if rule == "retrieval" else _margins(c, neighbors))
    values[seen] = np.diag(judged)
    return Judged(values, float(judged.mean()) if rule == "cosine" else float(judged.sum() / len(seen) ** 2))


def _largest(values: np.ndarray) -> np.ndarray:
    """bool [n, n]: entries above every other entry of their row."""
    top = values == values.max(1, keepdims=True)
    return top & (top.sum(1, keepdims=True) == 1)


def _margins(c: np.ndarray, neighbors: int) -> np.ndarray:
    near = min(neighbors, len(c))
    of_rows = np.partition(c, -near, axis=1)[:, -near:].mean(1)
    of_columns = np.partition(c, -near, axis=0)[-near:].mean(0)
    below = of_rows[:, None] + of_columns
    if (below <= 0).any():
        raise AnalysisError(
            "the nearest neighbors of a sentence have no positive mean cosine, which margins divide by: use "
            'rule="retrieval" (or center=False, where means are subtracted)'
        )
    margins: np.ndarray = 2 * c / below
    return margins


def check_rule(rule: str, sentences: int, neighbors: int) -> None:
    """Refuse an unknown rule, too few sentences for a share, and numbers of neighbors that cannot be."""
    if rule not in RULES:
        raise AnalysisError(f"no rule {rule!r}: use one of {', '.join(RULES)}")
    if rule != "cosine" and sentences < FEWEST:
        raise AnalysisError(f"a share of {sentences} sentences says little: give at least {FEWEST} common items")
    if rule == "margin" and not 1 <= neighbors <= sentences:
        raise AnalysisError(f"neighbors must be 1 to {sentences}, the number of sentences, not {neighbors}")


def same_vectors(sides: list[Side]) -> np.ndarray:
    """bool [n]: sentences that have the vectors of another sentence in every layer, from the sides of one language."""
    codes = np.zeros(len(sides[0].place), np.int64)
    for side in sides:
        codes = np.unique(np.stack([codes, side.place]), axis=1, return_inverse=True)[1].reshape(-1)
    repeated: np.ndarray = np.bincount(codes)[codes] > 1
    return repeated
