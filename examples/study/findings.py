"""The paper's claims, each as a number of study.json, and the verdicts that follow. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import measure

LEVEL = 0.05
APPEARS, OPPOSITE, UNCLEAR, UNTESTED = "appears", "opposite", "unclear", "not testable"


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, as a number that one model gives.

    Attributes:
        finding: number of the finding, 1 to 6.
        text: what is claimed.
        measured: the number, in words.
        sign: +1 if the paper's finding makes the number positive, -1 if negative.
        get: the number of a model: a mapping with value and, if known, low, high and p_value; None if not testable.
        by: whether the interval or the p-value decides.
        digits: number of decimals shown.
        base: the same number of the untrained model, where it has one.
    """

    finding: int
    text: str
    measured: str
    sign: int
    get: Callable[[Mapping[str, Any]], Mapping[str, Any] | None]
    by: str = "interval"
    digits: int = 3
    base: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] | None = None

    def verdict(self, model: Mapping[str, Any]) -> str:
        """Whether the claim appears in a model, shows the opposite, cannot be told, or cannot be tested."""
        found = self.get(model)
        if found is None or found["value"] is None:
            return UNTESTED
        if self.by == "p":
            return _by_p(found, self.sign)
        return _by_share(found["value"]) if self.by == "share" else by_interval(found, self.sign)

    def shown(self, model: Mapping[str, Any]) -> str:
        found = self.get(model)
        if found is None or found["value"] is None:
            return "-"
        if self.by == "share":
            return f"{found['value']:.2f}"
        return number(found, self.digits, p=self.by == "p")

    def untrained(self, models: Sequence[Mapping[str, Any]]) -> str:
        """The numbers of the untrained models, without intervals."""
        found = [None if self.base is None else self.base(model) for model in models]
        values = [plain(one["value"], self.digits) for one in found if one is not None]
        return ", ".join(values) or "-"


def by_interval(found: Mapping[str, Any], sign: int) -> str:
    """Whether the whole interval has the sign that is expected, the other one, or neither."""
    low, high = found.get("low"), found.get("high")
    if low is None or high is None:
        return UNTESTED
    if sign < 0:
        low, high = -high, -low
    return APPEARS if low > 0 else OPPOSITE if high < 0 else UNCLEAR


def _by_p(found: Mapping[str, Any], sign: int) -> str:
    if found.get("p_value") is None:
        return UNTESTED
    if found["p_value"] >= LEVEL:
        return UNCLEAR
    return APPEARS if sign * found["value"] > 0 else OPPOSITE


def _by_share(share: float) -> str:
    return APPEARS if share >= 1 - LEVEL else OPPOSITE if share <= LEVEL else UNCLEAR


def _plan(name: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    def get(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
        found = model["steering"]["plans"].get(name)
        return None if found is None else found["exact_match"]

    return get


def _path(*keys: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    def get(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
        found: Any = model
        for key in keys:
            found = found.get(key) if found is not None else None
        return found  # type: ignore[no-any-return]

    return get


def _opposite(found: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Change of exact match from a change of errors."""
    if found is None:
        return None
    low, high = found["low"], found["high"]
    ends = {"low": None if high is None else -high, "high": None if low is None else -low}
    return {"value": -found["value"], "p_value": found.get("p_value"), **ends}


def _against_random(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = model["steering"].get("random")
    return None if found is None else _opposite(found["errors"]["difference"])


def random_sets(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found = model["steering"].get("random")
    return None if found is None else _opposite(found["errors"]["mean_of_random"])


def _apart(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Share of resamples in which the two sets of experts do not meet; None where one of them is empty."""
    found = model["routing"]["experts_by_threshold"]
    at = found["thresholds"].index(measure.TAU)
    if not sum(found["task"][at]) or not sum(found["multilingual"][at]):
        return None
    return {"value": found["apart"]}


def _fewer(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Experts in both sets minus the number by chance, with the probability of so few by chance."""
    if _apart(model) is None:
        return None
    found = model["routing"]["experts_by_threshold"]
    at = found["thresholds"].index(measure.TAU)
    return {"value": sum(found["both"][at]) - found["expected"][at], "p_value": found["p_fewer"][at]}


def _untrained(*keys: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any] | None]:
    return _path("routing", "untrained", *keys)


CLAIMS = (
    Claim(1, "Divergence is lower in the middle layers than at both ends", "depth of the U, mean of nine languages", 1,
          _path("routing", "depth", "general", "mean"), base=_path("routing", "depth", "untrained", "mean")),
    Claim(1, "So it is without the part that unrelated sentences have", "depth of divergence less its floor", 1,
          _path("routing", "depth", "less the floor", "mean")),
    Claim(1, "Training makes the U", "depth minus that of random weights", 1,
          _path("routing", "depth", "above_untrained")),
    Claim(2, "Languages routed like English do better, on general text",
          "r of exact match and divergence, middle layers", -1,
          _path("routing", "performance", "general", "middle"), "p", 2),
    Claim(2, "Languages routed like English do better, on the problems",
          "r of exact match and divergence, middle layers", -1,
          _path("routing", "performance", "problems", "middle"), "p", 2),
    Claim(2, "This is more than having seen more of the task",
          "r on the problems, given the share of pairs seen in training", -1,
          _path("routing", "performance", "problems", "given_share"), "p", 2),
    Claim(3, "Routing gets sharper with depth", "token entropy, second half of the layers minus first half, nats", -1,
          _path("routing", "entropy", "token", "second_half"), base=_untrained("entropy", "token", "second_half")),
    Claim(3, "Entropy drops in the last layer outside English", "last step of token entropy, nats", -1,
          _path("routing", "entropy", "token", "last_step"), base=_untrained("entropy", "token", "last_step")),
    Claim(3, "The last step is lower than in English", "last step, other languages minus English, nats", -1,
          _path("routing", "entropy", "token", "last_step_above_english"),
          base=_untrained("entropy", "token", "last_step_above_english")),
    Claim(3, "Languages with less text route their tokens more alike", "r of consistency and log amount of text", -1,
          _path("routing", "consistency", "correlation"), "p", 2, _untrained("consistency", "correlation")),
    Claim(4, f"Task experts are no multilingual experts, from threshold {measure.TAU:g} on",
          "share of resamples in which the sets do not meet", 1, _apart, "share"),
    Claim(4, "Fewer experts are both than by chance", "experts in both sets minus those by chance", -1, _fewer, "p", 2),
    Claim(5, "Raising task experts in the middle layers helps", "change of exact match", 1, _plan(measure.RAISED)),
    Claim(5, "It helps more than raising random experts", "change of exact match minus that of random experts", 1,
          _against_random),
    Claim(6, "Raising task experts of the other layers hurts", "change of exact match", -1,
          _plan(measure.OTHER_LAYERS)),
    Claim(6, "Raising multilingual experts hurts", "change of exact match", -1, _plan(measure.MULTILINGUAL)),
    Claim(6, "Raising random experts hurts", "change of exact match, mean of the sets", -1, random_sets),
    Claim(6, "Lowering task experts hurts", "change of exact match", -1, _plan(measure.LOWERED)),
    Claim(6, "Switching task experts off hurts", "change of exact match", -1, _plan(measure.FORCED_OFF)),
    Claim(6, "Switching task experts of all layers off hurts", "change of exact match", -1,
          _plan("task experts of all layers forced off")),
)  # fmt: skip


def number(found: Mapping[str, Any], digits: int = 3, *, p: bool = False) -> str:
    """A number with its interval, or with its p-value: "+0.012 [-0.003, +0.021]"."""
    if found["value"] is None:
        return "-"
    text = f"{_positive_zero(found['value'], digits):+.{digits}f}"
    if p:
        return text if found.get("p_value") is None else f"{text} (p {found['p_value']:.3f})"
    if found.get("low") is None or found.get("high") is None:
        return text
    low, high = (_positive_zero(found[end], digits) for end in ("low", "high"))
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _positive_zero(value: float, digits: int) -> float:
    return round(value, digits) + 0.0


def plain(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or math.isnan(value) else f"{_positive_zero(value, digits):.{digits}f}"
