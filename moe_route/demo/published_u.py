"""The U of a real model: how far its published routing is from English, computed when it is asked for."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_route import analysis, convert
from moe_route.analysis import Divergence, UShape
from moe_route.analysis.result import plain
from moe_route.base.table import number_of
from moe_route.demo.wording import WIDTH, name, paragraph, spark
from moe_route.steering.layers import show_numbers

_SHIPPED = "qwen3-30b-a3b"
_MODEL, _PIVOT = "Qwen3-30B-A3B", "en"
_PROMPTS = 250  # problems of MGSM, the same in every language
_STEP = 0.05  # divergence that makes a bar one step higher
_SOURCE = {
    "paper": "arXiv 2601.14050",
    "repository": "github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs",
    "license": "MIT",
}


@dataclass(frozen=True)
class PublishedU:
    """Divergence of a model's routing from English by layer, pooled over the tokens of the same prompts.

    Attributes:
        divergence: of each language from English, those with the nearest middle layers first.
        shape: its means over the first, middle and last layers.
        tokens: float64 [languages], tokens per prompt.
        english_tokens: the same of English.
        model: its name.
    """

    divergence: Divergence
    shape: UShape
    tokens: np.ndarray
    english_tokens: float
    model: str = _MODEL

    @property
    def u_shaped(self) -> list[str]:
        """The languages that are further from English in the first and in the last layers than in the middle."""
        ends = np.minimum(self.shape.first, self.shape.last)
        return [group for group, is_u in zip(self.shape.groups, ends > self.shape.middle, strict=True) if is_u]

    @property
    def tokens_with_middle(self) -> float:
        """Pearson's r over languages of the tokens per prompt with the divergence of the middle layers."""
        return float(np.corrcoef(self.tokens, self.shape.middle)[0, 1])

    @property
    def tooth(self) -> tuple[int, list[float]]:
        """The layer that stands out most from the layers before and after it, and the divergence of the three.

        Between the ends, where a smooth U would have none; mean over languages.
        """
        mean = self.divergence.values.mean(0)
        inner = range(self.shape.first_layers[-1] + 1, self.shape.last_layers[0])
        layer = max(inner, key=lambda at: 2 * mean[at] - mean[at - 1] - mean[at + 1])
        return layer, mean[layer - 1 : layer + 2].tolist()

    @property
    def sentence(self) -> str:
        """The shape in words, from the means."""
        total, count = len(self.shape.groups), len(self.u_shaped)
        return (
            f"{self.model} routes {count} of {number_of(total, 'language')} unlike English in its first and last "
            f"layers, and more alike in between: {'a U' if count == total else 'a U there only' if count else 'no U'}."
        )

    @property
    def source(self) -> str:
        """What it is computed from."""
        return f"Computed now from the published routing of {_PROMPTS} MGSM prompts ({_SOURCE['paper']})."

    def __str__(self) -> str:
        layers = self.divergence.values.shape[1]
        names = [name(group) for group in self.divergence.groups]
        width = max(map(len, names)) + 2
        parts = (self.shape.first_layers, self.shape.middle_layers, self.shape.last_layers)
        heads = [f"{show_numbers(part):>7}" for part in parts]
        after = f"{''.join(heads)}{'tokens':>8}"
        every = 1 if width + layers + len(after) <= shutil.get_terminal_size((WIDTH, 24)).columns else 2
        shown = range(layers)[every - 1 :: every]  # the last layer is always among them
        means = np.stack([self.shape.first, self.shape.middle, self.shape.last], 1)
        rows = zip(names, self.divergence.values[:, shown], means, self.tokens, strict=True)
        lines = [paragraph(self.sentence, self.source), f"{'layer':<{width}}{_ruler(shown)}{after}"]
        for label, values, three, tokens in rows:
            ends = "".join(f"{value:>7.3f}" for value in three)
            lines.append(f"{label:<{width}}{spark(values, _STEP)}{ends}{tokens:>8.0f}")
        right = f"Right: layer means, tokens a prompt ({name(_PIVOT)} {self.english_tokens:.0f})."
        scale = f"Steps of {_STEP}; 0: same experts, 1: none shared."
        return "\n".join([*lines, paragraph(scale, right), paragraph(self.limits)])

    @property
    def limits(self) -> str:
        """What the curve is not."""
        layer, (before, at, after) = self.tooth
        return (
            f"Pooled over prompts, not by sentence; a comb inside a U (layer {layer}: {at:.2f} between {before:.2f} "
            f"and {after:.2f}); confounded: the more tokens a prompt, the further the middle (r = "
            f"{self.tokens_with_middle:+.2f} over {number_of(len(self.tokens), 'language')})."
        )

    def details(self) -> str:
        """The sentence, the means of layers and the values of all layers, as text."""
        told = paragraph(self.sentence, self.source, self.limits)
        return "\n\n".join((told, repr(self.shape), repr(self.divergence)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        layer, values = self.tooth
        return {
            "sentence": self.sentence,
            "model": self.model,
            "source": _SOURCE,
            "prompts": _PROMPTS,
            "languages": list(self.divergence.groups),
            "by_layer": plain(self.divergence.values),
            "shape": self.shape.to_dict(),
            "u_shaped": self.u_shaped,
            "tokens": dict(zip((_PIVOT, *self.shape.groups), [self.english_tokens, *plain(self.tokens)], strict=True)),
            "tokens_with_middle": self.tokens_with_middle,
            "tooth": {"layer": layer, "before_at_after": values},
        }


def _ruler(layers: range) -> str:
    """Numbers of layers above a line of bars: the first one, those at each third, the last one."""
    third, last = len(layers) // 3, str(layers[-1])
    line = "".join(f"{layers[place]:<{third}}" for place in (0, third, 2 * third))
    return f"{line[: len(layers) - len(last)]:<{len(layers) - len(last)}}{last}"


def published_u() -> PublishedU:
    """Compute the U of the large model whose routing ships with moe-route; see `convert.published_routing`."""
    statistics = convert.published_routing(_SHIPPED)
    # "topk": the recording holds the weights of the chosen experts only, not the router's whole distribution
    measured = analysis.divergence(statistics, _PIVOT, kind="topk", by="token", pairing="pooled")
    nearest = [measured.groups[place] for place in np.argsort(analysis.u_shape(measured).middle)]
    measured = analysis.divergence(statistics, _PIVOT, groups=nearest, kind="topk", by="token", pairing="pooled")
    per_prompt = dict(zip(statistics.groups, statistics.tokens()[:, 0] / _PROMPTS, strict=True))
    tokens = np.array([per_prompt[group] for group in measured.groups])
    return PublishedU(measured, analysis.u_shape(measured), tokens, float(per_prompt[_PIVOT]))
