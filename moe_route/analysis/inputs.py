"""Check and pair the inputs of analysis (statistics, arrays, tables of scores) once; errors name the fix."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np

from moe_route.analysis.measures import ratio
from moe_route.base import schema
from moe_route.base.identity import same_weights
from moe_route.base.schema import FileRefusedError
from moe_route.recording import SentenceVectors
from moe_route.steering import ExpertSelection, PlanModel
from moe_route.steering.model import CHECKPOINT

NOT_KEPT = "sequences were not kept: record(sequences=True); in a shell, record without --no-sequences"


class AnalysisError(ValueError):
    """Raised if a result cannot be computed from the given inputs; the message names the fix."""


@runtime_checkable
class Statistics(Protocol):
    """The accessors of ``recording.RoutingStatistics`` that analysis reads."""

    groups: tuple[str, ...]
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    metadata: dict[str, Any]
    store: Any

    def tokens(self, phase: Any = None) -> np.ndarray: ...
    def mean_distribution(self, kind: Any = "full", phase: Any = None, by: Any = "sequence") -> np.ndarray: ...
    def frequency(self, phase: Any = None, by: Any = "sequence") -> np.ndarray: ...


Frequencies: TypeAlias = "Statistics | np.ndarray | Sequence[Any]"


def group_index(statistics: Statistics, group: str | None, role: str = "group", phase: str | None = None) -> int:
    """Index of a group that has tokens (of this phase); if no group is named, that of the only group."""
    if not hasattr(statistics, "tokens"):
        raise AnalysisError(f"give RoutingStatistics (recorder.statistics()), not {type(statistics).__name__}")
    if group is None:
        if len(statistics.groups) != 1:
            raise AnalysisError(f"name the {role}: these statistics hold {_names(statistics.groups)}")
        group = statistics.groups[0]
    if group not in statistics.groups:
        raise AnalysisError(f"no {role} {group!r} was recorded: these statistics hold {_names(statistics.groups)}")
    index = statistics.groups.index(group)
    if not statistics.tokens()[index].any():
        raise AnalysisError(f"{role} {group!r} is empty, no token of it was counted: record it or leave it out")
    if phase is not None and not statistics.tokens(phase)[index].any():
        raise AnalysisError(
            f"{role} {group!r} has no token of phase {phase!r}: leave phase out (--phase), or leave the group out"
        )
    return index


def pick_groups(
    statistics: Statistics,
    groups: Sequence[str] | str | None,
    leave_out: str | None = None,
    phase: str | None = None,
) -> tuple[str, ...]:
    """These groups (by default all but ``leave_out``), each named once.

    Each must have tokens; of this phase, each that is named, and one of all groups otherwise.
    """
    if not hasattr(statistics, "groups"):
        raise AnalysisError(f"give RoutingStatistics (recorder.statistics()), not {type(statistics).__name__}")
    names = (groups,) if isinstance(groups, str) else groups
    chosen = tuple(statistics.groups if names is None else names)
    chosen = tuple(group for group in chosen if group != leave_out or names is not None)
    for group in chosen:
        group_index(statistics, group, phase=None if names is None else phase)
    if len(set(chosen)) < len(chosen):
        raise AnalysisError(f"a group is named twice: {_names(chosen)}")
    if not chosen:
        raise AnalysisError(f"there is nothing to compare: these statistics hold only {_names(statistics.groups)}")
    if phase is not None and not any(
        statistics.tokens(phase)[statistics.groups.index(group)].any() for group in chosen
    ):
        raise AnalysisError(f"no token of phase {phase!r} was recorded: leave phase out (--phase)")
    return chosen


def compared_with(
    statistics: Any, groups: Sequence[str] | str | None, reference: str, phase: str | None = None
) -> tuple[str, ...]:
    """These groups (by default all others), each with tokens as for ``pick_groups``; the reference is none of them."""
    names = pick_groups(statistics, groups, leave_out=reference, phase=phase)
    refuse_itself(names, reference)
    return names


def refuse_itself(names: Sequence[str], reference: str) -> None:
    """Refuse to compare a group with itself."""
    if reference in names:
        raise AnalysisError(
            f"{reference!r} would be compared with itself: leave it out of groups= (--groups), or name another "
            "reference"
        )


def check_one_model(first: Statistics, second: Statistics) -> None:
    """Refuse recordings of models with different configurations or weights, as far as their metadata tell."""
    mine, its = (PlanModel.of_recording(one.metadata, ()) for one in (first, second))
    if mine.config_hash and its.config_hash and mine.config_hash != its.config_hash:
        raise AnalysisError("the recordings come from models with different configurations: record both with one model")
    for name in CHECKPOINT:
        if same_weights(getattr(mine, name), getattr(its, name)) is False:
            raise AnalysisError(
                f"the recordings come from two checkpoints of one configuration (their {name.replace('_', ' ')} "
                "differs): record both with one model; analysis.compare compares checkpoints"
            )


def _names(groups: Sequence[str]) -> str:
    return ", ".join(map(repr, groups)) or "no groups"


def as_array(values: Any, name: str) -> np.ndarray:
    """Convert to float64 [layer, expert] or [item, layer, expert], not negative; NaN and all-zero rows: no tokens."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise AnalysisError(f"{name} must hold numbers, in rows of one length") from None
    if array.ndim not in (2, 3):
        raise AnalysisError(
            f"{name} must be [layer, expert] or [item, layer, expert], not of shape {list(array.shape)}"
        )
    if (array < 0).any() or np.isinf(array).any():
        raise AnalysisError(f"{name} must hold finite values of 0 or more: give router scores, not logits")
    return array


def check_draws(number: int, name: str) -> None:
    """Refuse less than one random draw; ``name`` is the argument."""
    if number < 1:
        raise AnalysisError(f"{name} must be 1 or more, not {number}")


def normalized(values: np.ndarray) -> np.ndarray:
    """Divide rows by their sum; NaN for a row that sums to zero."""
    return ratio(values, values.sum(-1, keepdims=True))


def shape_of(values: np.ndarray, num_experts: int | Sequence[int] | None) -> np.ndarray:
    """int64 [layer]: experts of each layer of an array, all of them unless ``num_experts`` says otherwise."""
    layers, width = values.shape[-2:]
    sizes = np.broadcast_to(np.asarray(width if num_experts is None else num_experts, dtype=np.int64), (layers,))
    if (sizes < 1).any() or (sizes > width).any():
        raise AnalysisError(f"num_experts must be between 1 and {width}, the last axis of the arrays")
    padding = np.arange(width) >= sizes[:, None]
    if np.nansum(np.where(padding, values, 0.0)) > 0:
        raise AnalysisError("there are values beyond num_experts: check num_experts")
    return sizes


def warn_of_padding(arrays: Sequence[np.ndarray], *, stacklevel: int) -> None:
    """Warn if the last experts of a layer, an eighth of them and at least two, are used in none of these arrays.

    They may be padding, and then measures that depend on the number of experts are wrong.
    """
    used = np.any([np.nan_to_num(a).reshape(-1, *a.shape[-2:]).any(0) for a in arrays], axis=0)
    sizes = np.where(used.any(1), used.shape[1] - used[:, ::-1].argmax(1), used.shape[1])
    layer = int(sizes.argmin())
    if used.shape[1] - sizes[layer] >= max(2, used.shape[1] // 8):
        warnings.warn(
            f"experts {sizes[layer]} to {used.shape[1] - 1} of layer {layer} are never used: if that layer has fewer "
            "experts than the widest one, pass num_experts",
            stacklevel=stacklevel + 1,
        )


def selection(
    chosen: np.ndarray, scores: np.ndarray, statistics: Any, *, threshold: float | None, description: str
) -> ExpertSelection:
    """The experts for which ``chosen`` [layer, expert] is true, with their scores."""
    layers, experts = np.nonzero(chosen)
    experts_of: dict[int, dict[int, float]] = {}
    for layer, expert in zip(layers.tolist(), experts.tolist(), strict=True):
        experts_of.setdefault(layer, {})[expert] = float(scores[layer, expert])
    known = isinstance(statistics, Statistics)
    sizes = tuple(statistics.num_experts) if known else (chosen.shape[1],) * chosen.shape[0]
    return ExpertSelection(
        experts_of,
        scores=experts_of,
        threshold=threshold,
        description=description,
        model=PlanModel.of_recording(statistics.metadata if known else {}, sizes),
    )


# ---- pairs of sequences by their items, such as a sentence and its translations

Pairing = Literal["paired", "pooled", "auto"]


def common_items(
    statistics: Statistics, groups: Sequence[str], pairing: str, min_common: float, phase: str | None, by: str
) -> list[Any] | None:
    """The items that every group has, by which to pair; None if divergence is to be pooled."""
    if pairing not in ("paired", "pooled", "auto"):
        raise AnalysisError(f'pairing must be "paired", "pooled" or "auto", not {pairing!r}')
    if not 0 < min_common <= 1:
        raise AnalysisError(f"min_common must be above 0 and at most 1, not {min_common}")
    if pairing == "pooled":
        return None
    try:
        return paired_items(statistics, groups, min_common, phase, by)
    except AnalysisError as error:
        if pairing == "paired":
            raise AnalysisError(
                f"no paired divergence: {error}; or pass pairing='pooled' (--pairing pooled), which estimates "
                "something else"
            ) from None
        warnings.warn(f"pooled divergence, not paired: {error}", stacklevel=3)
        return None


def paired_items(
    statistics: Statistics | SentenceVectors,
    groups: Sequence[str],
    min_common: float,
    phase: str | None = None,
    by: str = "sequence",
) -> list[Any]:
    """The items that every group has; raises ``AnalysisError`` with the reason if pairing is impossible."""
    store = statistics.store
    if store is None:
        raise AnalysisError(NOT_KEPT)
    if phase is not None:
        raise AnalysisError("kept sequences join prefill and decode: leave phase out")
    if by != "sequence":
        raise AnalysisError('pairs weigh sequences alike: leave by at "sequence"')
    items: list[Any] = store.paired_items(*groups)
    sequences = Counter(group for _, group in store)
    sizes = {group: sequences[group] for group in groups}
    largest = max(sizes, key=sizes.__getitem__)
    share = len(items) / max(sizes[largest], 1)
    if items and share >= min_common:
        return items
    shares = {group: len(store.paired_items(groups[0], group)) for group in groups[1:]}
    fewest = min(shares, key=shares.__getitem__)
    raise AnalysisError(
        f"{len(items)} items are common to all groups, {share:.0%} of the {sizes[largest]} sequences of {largest!r}, "
        f"and min_common asks for {min_common:.0%}; {fewest!r} has the fewest in common with {groups[0]!r} "
        f"({shares[fewest]}): give labels(items=...) one id for a sentence and its translations, leave groups out "
        "with groups=, or pass a smaller min_common"
    )


# ---- scores of groups


def read_scores(path: Path) -> dict[str, float]:
    """group -> score, of a JSON file or of tab-separated lines, whose first may be a heading.

    Raises ``FileRefusedError`` for another form, a score that is no finite number, and a group that comes twice.
    """
    if path.suffix == ".json":
        named: dict[str, float] = schema.read(Mapping[str, float], schema.load_json(path), str(path))
        return named
    scores: dict[str, float] = {}
    for number, line in enumerate(filter(str.strip, schema.read_text(path).splitlines())):
        group, *rest = line.split("\t")
        try:
            score = float(rest[0])
        except (ValueError, IndexError):
            if number:
                raise FileRefusedError(f"{path}: {line!r} is not a group, a tab and a score") from None
            continue
        if group in scores:
            raise FileRefusedError(f"{path}: {group} comes twice: keep one of its scores")
        if not math.isfinite(score):
            raise FileRefusedError(f"{path}: the score of {group} is {score}: leave the group out")
        scores[group] = score
    return scores
