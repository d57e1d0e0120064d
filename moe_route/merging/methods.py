"""``merge``: several fine-tunes of one base become one model, expert by expert."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from moe_route.merging.checkpoint import Checkpoint, Merged, check_alike, check_descent
from moe_route.merging.layout import Layout
from moe_route.merging.swapping import Source, opened

# ---- PCB merging: parameters compete within a model and between models (arXiv 2410.02396).
#
# The differences of a model from its base are one long row of N numbers. The method needs order statistics of that
# row, so every tensor is read six times: once to count, twice for those of the sizes, twice for those of the scores,
# and once to merge. They are found exactly, by counting the high and then the low 16 bits of float32 numbers; only one
# tensor of each model is in memory at a time.

_CLAMPED = 1e-4  # share of the sizes that is clamped at each end
_HALF = 1 << 16


@dataclass(frozen=True)
class Scores:
    """What the merge of a tensor needs to know of the whole model; each is float32 [models, 1]."""

    low: Tensor  # sizes of differences are clamped to low and high
    high: Tensor
    least: Tensor  # scores below are set to it
    greatest: Tensor

    def merge(self, differences: Tensor) -> Tensor:
        """[models, n] -> [n]: the merged difference, where no score is above the least zero."""
        sizes = differences.abs().clamp(self.low, self.high)
        scores = _scaled(torch.maximum(_raw(differences, self.low, self.high), self.least), self.least, self.greatest)
        return (differences.sign() * sizes * scores).sum(0) / scores.sum(0).clamp(min=1e-12)


def pcb_scores(read: Callable[[], Iterable[Tensor]], ratio: float) -> Scores:
    """Thresholds of the merge of all differences; ``read`` yields them in portions, float32 [models, n]."""
    total = sum(portion.shape[1] for portion in read())
    low, high = order_statistics(
        lambda: (portion.abs() for portion in read()), [int(total * _CLAMPED), int(total * (1 - _CLAMPED) - 1)]
    )
    place = min(int(total * (1 - ratio)), total - 1)
    least, greatest = order_statistics(lambda: (_raw(portion, low, high) for portion in read()), [place, total - 1])
    return Scores(low, high, least, greatest)


def _raw(differences: Tensor, low: Tensor, high: Tensor) -> Tensor:
    sizes = _scaled(differences.abs().clamp(low, high), low, high)
    return (len(differences) * sizes.square()).exp() * (differences * differences.sum(0)).tanh()


def _scaled(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(high > low, (values - low) / (high - low), 0.0)


def order_statistics(read: Callable[[], Iterable[Tensor]], places: list[int]) -> list[Tensor]:
    """The values at some places of every sorted row, each float32 [rows, 1].

    ``read`` yields the rows in portions, float32 [rows, n], and is called twice.
    """
    high: dict[int, Tensor] = {}
    for portion in read():
        for row, values in enumerate(portion):
            high[row] = high.get(row, 0) + torch.bincount(_keys(values) >> 16, minlength=_HALF)
    buckets = {(row, place): _place(counts, place) for row, counts in high.items() for place in places}
    low = {(row, bucket): torch.zeros(_HALF, dtype=torch.int64) for (row, _), (bucket, _) in buckets.items()}
    for portion in read():
        for row, values in enumerate(portion):
            keys = _keys(values)
            for of_row, bucket in low:
                if of_row == row:
                    low[row, bucket] += torch.bincount(keys[keys >> 16 == bucket] & (_HALF - 1), minlength=_HALF)
    statistics = {key: bucket << 16 | _place(low[key[0], bucket], rest)[0] for key, (bucket, rest) in buckets.items()}
    return [_values(torch.tensor([statistics[row, place] for row in high]))[:, None] for place in places]


def _place(counts: Tensor, place: int) -> tuple[int, int]:
    """The bucket that holds the place of a sorted list, and the place within the bucket."""
    upto = counts.cumsum(0)
    bucket = int(torch.searchsorted(upto, place, right=True))
    return bucket, place - (int(upto[bucket - 1]) if bucket else 0)


def _keys(values: Tensor) -> Tensor:
    """int64 in [0, 2^32) that order as the float32 numbers do."""
    bits = (values.contiguous() + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def _values(keys: Tensor) -> Tensor:
    bits = torch.where(keys < 1 << 31, -1 - keys, keys - (1 << 31))
    return bits.to(torch.int32).view(torch.float32)


# ---- WIDEN: weights of each column by how far it moved in size and in direction (arXiv 2408.03092).


def widen(base: Tensor, differences: Tensor) -> Tensor:
    """Merge the differences of several models from one matrix.

    Args:
        base: float32 [out, in], or a vector [n].
        differences: float32 [models, out, in], or [models, n].

    For a matrix, each model ranks the columns by the change of their norm and by the change of their direction. A rank
    above the model's mean gives weight 1, another one the softmax over the models; both weights are averaged. For a
    vector, the sizes of the differences take the place of the ranks. Weights need not add up to 1.
    """
    if base.dim() < 2:
        return base + (_weights(differences.abs()) * differences).sum(0)
    models = base + differences
    before, after = base.norm(dim=0), models.norm(dim=1)
    cosine = (models * base).sum(1) / (before * after).clamp(min=1e-12)
    same = (differences == 0).all(1)
    turned = torch.where(same, 0.0, 1.0 - cosine)
    weights = (_weights(_ranks((after - before).abs())) + _weights(_ranks(turned))) / 2
    return base + (weights[:, None] * differences).sum(0)


def _ranks(changes: Tensor) -> Tensor:
    """[models, columns]: rank of each column in its model, divided by the number of columns; ties in order."""
    number = changes.shape[1]
    ranks = torch.empty_like(changes)
    values = (torch.arange(number, dtype=changes.dtype) / number).expand_as(changes)
    return ranks.scatter_(1, changes.argsort(dim=1, stable=True), values)


def _weights(importance: Tensor) -> Tensor:
    return torch.where(importance > importance.mean(1, keepdim=True), 1.0, importance.softmax(0))


Method: TypeAlias = Literal["linear", "task_arithmetic", "ties", "dare", "pcb", "widen"]
# Method -> options that it reads, with their defaults; None for weights is one share each.
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weights": None},
    "task_arithmetic": {"weights": None, "density": 1.0},
    "ties": {"weights": 1.0, "density": 0.2, "trim": "matrix"},
    "dare": {"weights": None, "density": 0.5, "seed": 0},
    "pcb": {"ratio": 0.1, "scale": 1.0},
    "widen": {},
}
_Part: TypeAlias = Callable[[str, Tensor, Tensor], Tensor]  # name, base, differences [models, ...] -> merged


def merge(
    models: Sequence[Source],
    *,
    base: Source | None = None,
    method: Method = "linear",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    ratio: float | None = None,
    scale: float | None = None,
    seed: int | None = None,
    trim: Literal["matrix", "model"] | None = None,
) -> Merged:
    """Merge fine-tunes of one base.

    Weighted sums work on single values. The other methods work on each matrix of each expert by itself, gate and up
    apart, whatever the layout of the checkpoint; ``"pcb"``, and ``"ties"`` where it trims the model, also on the whole
    model. Products are computed in float32; the result has the dtypes of the base (of the first model, for
    ``"linear"``). Tensors that are not floating point come from the base.

    Args:
        models: models, state dicts or folders.
        base: the model that all were trained from. Needed by every method but ``"linear"``, which takes none.
        method: ``"linear"``, the weighted sum of the models; ``"task_arithmetic"``, the base plus the weighted sum of
            the differences, of which each keeps the share ``density`` of largest size (arXiv 2212.04089, 2110.07560);
            ``"ties"`` (2306.01708) and ``"dare"`` (2311.03099), whose functions are PEFT's; ``"pcb"`` (2410.02396);
            ``"widen"`` (2408.03092).
        weights: one per model, for the first four methods. By default 1 for ``"ties"``, and otherwise 1 / models.
        density: share of each difference that is kept, by default 1 for ``"task_arithmetic"``, 0.2 for ``"ties"``
            (largest), 0.5 for ``"dare"`` (drawn at random).
        ratio: share of the parameters that ``"pcb"`` keeps, by default 0.1.
        scale: factor of the merged difference of ``"pcb"``, by default 1.
        seed: of the drawing of ``"dare"``, by default 0.
        trim: where ``"ties"`` keeps the share ``density`` of largest size: of each ``"matrix"`` (PEFT's, the default),
            or of the whole ``"model"``, as the method was published.

    Raises ``ValueError`` for an option that the method does not read, for models that cannot be merged and for a base
    that a model was not trained from; ``ImportError`` without PEFT.
    """
    given = {"weights": weights, "density": density, "ratio": ratio, "scale": scale, "seed": seed, "trim": trim}
    options = _options(method, {name: value for name, value in given.items() if value is not None}, len(models))
    if (base is None) != (method == "linear"):
        raise ValueError(
            'method="linear" takes no base: use "task_arithmetic"'
            if base is not None
            else f'method="{method}" merges differences: name base=, the model that all were trained from'
        )
    checkpoints = [opened(model) for model in models]
    start = checkpoints[0] if base is None else opened(base)
    check_alike([start, *checkpoints])
    for checkpoint in checkpoints:
        check_descent(checkpoint, start)
    # A sum needs no experts told apart, so it also runs where the layout does not tell them apart.
    layout = None if method == "linear" or (method == "task_arithmetic" and options["density"] == 1) else Layout(start)
    part = _parts(method, options, start, checkpoints)

    def read(name: str) -> Tensor:
        origin = start.read(name)
        if not origin.is_floating_point():
            return origin
        before = origin.float()
        after = [checkpoint.read(name).float() for checkpoint in checkpoints]
        merged = torch.empty_like(before, memory_format=torch.contiguous_format)
        views = [
            [(None, "", tensor)] if layout is None else layout.matrices(name, tensor)
            for tensor in (before, merged, *after)
        ]
        for number, ((expert, kind, old), (_, _, out), *new) in enumerate(zip(*views, strict=True)):
            values = torch.stack([view for _, _, view in new])
            out.copy_(part(f"{name} {expert} {kind} {number}", old, values if base is None else values - old))
        return merged.to(origin.dtype)

    sources = {f"model {number}": checkpoint for number, checkpoint in enumerate(checkpoints)}
    if base is not None:
        sources["base"] = start
    return Merged(sources, read, {"function": "merge", "method": method, **options}, start)


def _options(method: str, given: dict[str, Any], models: int) -> dict[str, Any]:
    """The options of a method; refuses a method or an option that is not known, and values out of range."""
    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}: choose one of {', '.join(METHODS)}")
    if not models:
        raise ValueError("there is nothing to merge: give at least one model")
    foreign = sorted(given.keys() - METHODS[method].keys())
    if foreign:
        known = ", ".join(METHODS[method]) or "none"
        raise ValueError(f'method="{method}" does not read {", ".join(foreign)}; its options: {known}')
    options = {**METHODS[method], **given}
    if "weights" in options:
        weights = options["weights"]
        shares = [1 / models] * models if weights is None else [weights] * models if weights == 1.0 else list(weights)
        if len(shares) != models:
            raise ValueError(f"{len(shares)} weights for {models} models: give one for each")
        options["weights"] = [float(share) for share in shares]
    for name in ("density", "ratio"):
        if name in options and not 0 < options[name] <= 1:
            raise ValueError(f"{name}={options[name]}: a share is above 0 and at most 1")
    if options.get("trim", "matrix") not in ("matrix", "model"):
        raise ValueError(f'trim={options["trim"]!r}: a share is kept of each "matrix" or of the whole "model"')
    return options


def _parts(method: str, options: dict[str, Any], base: Checkpoint, models: list[Checkpoint]) -> _Part:
    """The function that merges one matrix."""
    if method == "widen":
        return lambda name, old, differences: widen(old, differences)
    if method == "pcb":
        scores = pcb_scores(lambda: _differences(base, models), options["ratio"])

        def compete(name: str, old: Tensor, differences: Tensor) -> Tensor:
            merged = scores.merge(differences.reshape(len(differences), -1)).reshape(old.shape)
            return old + options["scale"] * merged

        return compete
    weights = torch.tensor(options["weights"])
    if method == "linear":
        return lambda name, old, values: torch.tensordot(weights, values, 1)
    if method == "task_arithmetic" and options["density"] == 1:
        return lambda name, old, differences: old + torch.tensordot(weights, differences, 1)
    least = None
    if options.get("trim") == "model":
        least = _least_kept(lambda: _differences(base, models), options["density"])
    return _of_peft(method, weights, options["density"], options.get("seed", 0), least)


def _least_kept(read: Callable[[], Iterable[Tensor]], density: float) -> Tensor:
    """float32 [models, 1]: the smallest size among the share ``density`` of largest differences of each whole model."""
    total = sum(portion.shape[1] for portion in read())
    place = min(total - int(density * total), total - 1)
    return order_statistics(lambda: (portion.abs() for portion in read()), [place])[0]


def _of_peft(method: str, weights: Tensor, density: float, seed: int, least: Tensor | None) -> _Part:
    """A function of PEFT on one matrix; ``least`` float32 [models, 1] trims for ties in place of the density."""
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise ImportError(f"this merge ({method}) uses functions of PEFT: pip install 'moe-route[train]'") from error

    def pruned(name: str, old: Tensor, differences: Tensor) -> Tensor:
        tensors = list(differences)
        if least is not None:
            sizes = differences.abs() >= least.view(-1, *[1] * old.dim())
            trimmed = torch.where(sizes, differences, 0.0)
            signs = merge_utils.calculate_majority_sign_mask(trimmed)
            merged = merge_utils.disjoint_merge(weights.view(-1, *[1] * old.dim()) * trimmed, signs)
        elif method == "ties":
            merged = merge_utils.ties(tensors, weights, density)
        elif method == "dare":
            # The name seeds the drawing, so that the result does not depend on the order in which tensors are read.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                merged = merge_utils.dare_linear(tensors, weights, density)
        else:
            merged = merge_utils.magnitude_prune(tensors, weights, density)
        return old + merged

    return pruned


def _differences(base: Checkpoint, models: list[Checkpoint]) -> Iterator[Tensor]:
    """float32 [models, n] of each tensor."""
    for name in base.names:
        before = base.read(name)
        if before.is_floating_point() and before.numel():
            yield torch.stack([(model.read(name).float() - before.float()).reshape(-1) for model in models])
