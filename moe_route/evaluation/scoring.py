"""Read the answer from what a model wrote: two ways to extract a number, and the parts of an output that count.

`flexible-extract` is that of lm-eval's MGSM tasks, with its faults: it sees no digits but 0-9, and its comparison drops
punctuation, so that 1.5 equals 15. `normalized` reads numbers in the digits of all scripts, with the usual separators
of thousands and decimals, and compares values. Numbers in words are read by neither.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

__all__ = ["NUMBER_SCORERS", "Scorer", "channel_of", "flexible_extract", "normalized_number", "until_first"]

_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# a space inside a number is a separator only if it is one of those that keep it on one line
_THIN = "\u00a0\u2009\u202f"
_SIGNS = str.maketrans({"\u2212": "-", "\uff0d": "-", "\u066b": ".", "\u066c": ",", "\uff0e": ".", "\uff0c": ","})
_NUMBER = re.compile(rf"(?<![0-9A-Za-z.,)])-?\d+(?:[.,'\u2019{_THIN}]\d+)*|\d+(?:[.,'\u2019{_THIN}]\d+)*")
_GROUP = 3  # digits between separators of thousands


@dataclass(frozen=True)
class Scorer:
    """A way to judge an output.

    Attributes:
        name: as it stands in results.
        extract: output -> what is taken as its answer, "" if there is none.
        equal: (extracted, right answer) -> whether they are the same answer.
    """

    name: str
    extract: Callable[[str], str]
    equal: Callable[[str, str], bool]


def flexible_extract(output: str) -> str:
    """The last number of an output, as lm-eval's filter `flexible-extract` of MGSM finds it; "" if there is none."""
    found = _FLEXIBLE.findall(output)
    return next((part.strip() for part in found[-1] if part), "") if found else ""


def _equal_without_punctuation(extracted: str, answer: str) -> bool:
    """lm-eval's exact match with `ignore_case` and `ignore_punctuation`."""
    mine, right = (text.lower().translate(_PUNCTUATION).strip() for text in (extracted, answer))
    return bool(mine) and mine == right


def normalized_number(output: str) -> str:
    """The last number of an output in plain form, such as "1234.5"; "" if there is none.

    A separator that comes before exactly three digits is one of thousands, unless another kind of separator follows it
    or the number begins with 0. Of two kinds, the last one is that of decimals. So "1.234" and "1,234" are 1234, while
    "12,5", "0.125", "1.234,50" and "1,234.50" have decimals.
    """
    found = _NUMBER.findall(_plain_digits(output))
    return str(_value(found[-1])) if found else ""


def _plain_digits(text: str) -> str:
    """The text with the digits of all scripts as 0-9, and usual minus signs and separators as -, . and ,"""
    digits = ((sign, unicodedata.decimal(sign, None)) for sign in text)
    return "".join(sign if digit is None else str(digit) for sign, digit in digits).translate(_SIGNS)


def _value(number: str) -> str:
    """Plain form of a number with separators."""
    negative, digits = number.startswith("-"), number.removeprefix("-")
    separators = [sign for sign in digits if not sign.isdigit()]
    whole, decimals = digits, ""
    if separators and _is_decimal(digits, separators):
        whole, _, decimals = digits.rpartition(separators[-1])
    value = Decimal("".join(filter(str.isdigit, whole)) + "." + (decimals or "0"))
    shown = format(value, "f").rstrip("0").rstrip(".")
    return f"-{shown}" if negative and value else shown or "0"


def _is_decimal(digits: str, separators: Sequence[str]) -> bool:
    """Whether the last separator of a number begins its decimals."""
    last, kinds = separators[-1], set(separators)
    if last not in ".," or separators.count(last) > 1:
        return False
    if len(kinds) > 1:
        return True
    before, _, after = digits.rpartition(last)
    return len(after) != _GROUP or len(before) > _GROUP or before.startswith("0")


def _equal_values(extracted: str, answer: str) -> bool:
    return bool(extracted) and extracted == normalized_number(answer)


def channel_of(output: str, name: str) -> str:
    """The text of the last message in a channel of the harmony format (gpt-oss); "" if there is none.

    The output must hold its special tokens. An output that was cut before the channel began has no answer.
    """
    _, begin, rest = output.rpartition(f"<|channel|>{name}<|message|>")
    return re.split(r"<\|(?:return|end|start|call)\|>", rest)[0] if begin else ""


def until_first(output: str, stops: Sequence[str]) -> str:
    """The output up to the first of several texts."""
    return output[: min((place for stop in stops if (place := output.find(stop)) >= 0), default=len(output))]


NUMBER_SCORERS = (
    Scorer("flexible-extract", flexible_extract, _equal_without_punctuation),
    Scorer("normalized", normalized_number, _equal_values),
)
