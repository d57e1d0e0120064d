"""Expert patching: put the output of one expert of a clean run into a corrupted run, and see what it restores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moe_route.analysis import AnalysisError, benjamini_hochberg, effects_by_group
from moe_route.analysis.effects import PERMUTATIONS, Effects
from moe_route.analysis.result import Result, by_depth, plain
from moe_route.analysis.stats import RESAMPLES
from moe_route.base.table import Table, interval
from moe_route.data.batches import Text
from moe_route.experts.outputs import NoExpertOutputsError, expert_outputs, one_module_of
from moe_route.routers.discovery import ModelNotSupportedError, RouterInfo, find_routers
from moe_route.runs.language_model import LanguageModel
from moe_route.runs.lines import KeptRuns
from moe_route.steering import PlanError
from moe_route.steering.layers import as_layers

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class PromptPair:
    """Two prompts of the same number of tokens that differ in what decides the answer.

    ``answer`` is the token that continues ``clean``, ``other`` the one that continues ``corrupt``; each must be one
    token (with its leading space, if the tokenizer has one).
    """

    clean: str
    corrupt: str
    answer: str
    other: str
    group: str = "all"


@dataclass(frozen=True, eq=False, repr=False)
class ExpertPatching(Result):
    """Share of the contrast between clean and corrupted runs that patches restore: 0 nothing, 1 all.

    A share is ``sum of (patched - corrupt) / sum of (clean - corrupt)`` over pairs, where each term is the logit of the
    answer minus that of the other token. Shares of single experts need not add up to that of their layer.

    Attributes:
        groups: names of the G groups.
        num_experts: number of experts of each layer.
        restored: effects [G, L, E] of each expert; 0 for experts that no run chose, NaN for layers not tested.
        layers: effects [G, L] of all experts of a layer together.
        adjusted: float64 [G, L, E], p-values of ``restored``, for each group adjusted for the number of experts that
            some run chose (Benjamini-Hochberg); NaN for the others.
        clean, corrupt: float64 [G], mean contrast of the two runs, in logits.
        pairs: int64 [G], number of pairs.
        left_out: number of pairs left out, whose contrast differs too little.
    """

    groups: tuple[str, ...]
    num_experts: tuple[int, ...]
    restored: Effects
    layers: Effects
    adjusted: np.ndarray
    clean: np.ndarray
    corrupt: np.ndarray
    pairs: np.ndarray
    left_out: int

    def columns(self) -> dict[str, Any]:
        """A row per group, layer and expert that some run chose, with its share, interval and p-values."""
        group, layer, expert = np.nonzero(~np.isnan(self.adjusted))
        keys = {"group": np.asarray(self.groups, object)[group], "layer": layer, "expert": expert}
        columns = self.restored.columns("restored") | {"adjusted_p": self.adjusted}
        return keys | {name: values[group, layer, expert] for name, values in columns.items()}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        names = ("groups", "num_experts", "clean", "corrupt", "pairs", "left_out", "adjusted")
        columns = self.restored.columns("restored") | self.layers.columns("layer_restored")
        return plain({name: getattr(self, name) for name in names} | columns)

    def tables(self) -> list[Table]:
        """Whole layers, and the ten experts that restore most, or most of the opposite."""
        sizes = ", ".join(f"{name} {count}" for name, count in zip(self.groups, self.pairs.tolist(), strict=True))
        note = f"pairs: {sizes}" + (f"; {self.left_out} left out" if self.left_out else "")
        title = "Share of the contrast restored by all experts of a layer"
        strength = np.where(np.isnan(self.adjusted), -1.0, np.abs(self.restored.mean)).reshape(-1)
        largest = np.argsort(-strength, kind="stable")[: min(_SHOWN, int((strength >= 0).sum()))]
        rows = []
        for g, layer, expert in zip(*np.unravel_index(largest, self.adjusted.shape), strict=True):
            at = (g, layer, expert)
            ends = interval(self.restored.low[at], self.restored.high[at])
            share, p_value = float(self.restored.mean[at]), float(self.adjusted[at])
            rows.append([self.groups[g], int(layer), int(expert), share, ends, p_value])
        head = ("group", "layer", "expert", "restored", "95 % interval", "adjusted p")
        return [
            by_depth(self.groups, self.layers.mean, title=title, note=note),
            Table(head, rows, "Share of the contrast restored by single experts"),
        ]


def patch_experts(
    language_model: LanguageModel,
    pairs: Sequence[PromptPair],
    *,
    layers: Iterable[int] | int | None = None,
    weight: Literal["clean", "own"] = "clean",
    positions: Literal["all", "last"] = "all",
    least_contrast: float = 0.1,
    batch_size: int = 32,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    kept: KeptRuns | None = None,
) -> ExpertPatching:
    """Patch single experts of clean runs into corrupted runs, and measure the restored contrast [arXiv 2606.03780].

    At every token, the expert's part of the layer's output in the corrupted run, ``w_e f_e(x)``, is replaced by that of
    the clean run. Parts of experts that a run does not choose are 0. Everything before the layer stays as in the
    corrupted run, and everything after it is computed anew. Intervals and p-values are over pairs.

    Args:
        language_model: the model. Its experts must be a module ``experts(hidden, ids, weights)``, as in transformers 5.
        pairs: prompts; their groups (such as languages) are the groups of the result.
        layers: MoE layers to patch; by default all.
        weight: "clean" patches weight and output, and so also who is chosen; "own" keeps the weights of the corrupted
            run and patches the outputs only.
        positions: "all" tokens, or the "last" one, which predicts the answer.
        least_contrast: pairs whose contrast falls by less, in logits, from the clean to the corrupted run are left out.
        batch_size: number of patches that run together.
        resamples, permutations, seed: of the intervals and tests.
        kept: keeps every pair, so that a call that was interrupted goes on (``runs.lines.KeptRuns``).

    Raises ``ValueError`` for prompts of different length, and answers that are not one token each; ``AnalysisError`` if
    no pair is left or logits are not finite; ``PlanError`` for layers that the model lacks; ``ModelNotSupportedError``
    if the outputs of experts cannot be computed one by one.
    """
    if weight not in ("clean", "own") or positions not in ("all", "last"):
        raise ValueError('weight is "clean" or "own", and positions are "all" or "last"')
    if least_contrast <= 0:
        raise ValueError(
            f"least_contrast must be above 0, since shares are divided by the contrast, not {least_contrast}"
        )
    encoded = [_encoded(language_model, pair) for pair in pairs]
    routers = find_routers(language_model.model)
    tested = range(len(routers)) if layers is None else as_layers(layers)
    if not tested or tested[-1] >= len(routers):
        raise PlanError(
            f"the model has {len(routers)} MoE layers, 0 to {len(routers) - 1}: {list(tested)} are asked for"
        )
    sizes = tuple(router.num_experts for router in routers)
    patcher = _Patcher(language_model, [routers[layer] for layer in tested], max(sizes), weight, positions, batch_size)
    if kept is not None:
        kept.check(language_model.model)
    runs = [partial(patcher.contrasts, *ids) for ids in encoded]
    contrasts = [run() if kept is None else kept(f"pair {pair}", run) for pair, run in enumerate(runs)]
    used = [pair for pair, (clean, corrupt, *_) in enumerate(contrasts) if clean - corrupt >= least_contrast]
    if not used:
        raise AnalysisError(
            f"no pair of {len(pairs)} has a contrast that falls by {least_contrast:g} from the clean to the corrupted "
            "run: give prompts that the model tells apart, or lower least_contrast"
        )
    shape = (len(used), len(sizes), max(sizes) + 1)  # the last place: the whole layer
    sums, counts, chosen = np.zeros(shape), np.zeros(shape), np.zeros(shape, bool)
    for at, pair in enumerate(used):
        clean, corrupt, *patched = contrasts[pair]
        change = np.reshape(patched, (len(tested), -1)) - corrupt
        counts[at, list(tested)] = clean - corrupt
        sums[at, list(tested)], chosen[at, list(tested)] = np.nan_to_num(change), ~np.isnan(change)
    of_pair = [pairs[pair].group for pair in used]
    options = {"resamples": resamples, "permutations": permutations, "seed": seed}
    groups, effects = effects_by_group(of_pair, list(range(len(used))), sums, counts, **options)
    restored = effects.part((..., slice(max(sizes))))
    seen = np.stack([chosen[[group == name for group in of_pair], :, :-1].any(0) for name in groups])
    tests = np.where(seen, restored.p_value, np.nan)
    of_group = np.array([groups.index(group) for group in of_pair])
    number = np.bincount(of_group)
    clean_mean, corrupt_mean = (
        np.bincount(of_group, np.array([contrasts[pair][side] for pair in used])) / number for side in (0, 1)
    )
    adjusted = np.stack([benjamini_hochberg(p_values) for p_values in tests])
    whole = effects.part((..., max(sizes)))
    return ExpertPatching(
        groups, sizes, restored, whole, adjusted, clean_mean, corrupt_mean, number, len(pairs) - len(used)
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the experts of one layer were given in one run: hidden [S, H], ids [S, k], weights [S, k]."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor

    def parts(self, experts: nn.Module, hidden: Tensor, num_experts: int) -> Tensor:
        """``w_e f_e(hidden)`` for this run's ids and weights, [E, S, H]; 0 where an expert is not chosen."""
        outputs = expert_outputs(experts, hidden, self.ids) * self.weights[..., None]
        parts = outputs.new_zeros(num_experts, *hidden.shape)
        tokens = torch.arange(len(hidden), device=hidden.device)[:, None].expand_as(self.ids)
        held = (self.ids >= 0) & (self.ids < num_experts)
        parts[self.ids[held].long(), tokens[held]] = outputs[held]
        return parts


class _Patcher:
    """Runs pairs of prompts, and the corrupted one with patches."""

    def __init__(
        self,
        language_model: LanguageModel,
        routers: Sequence[RouterInfo],
        most_experts: int,
        weight: str,
        positions: str,
        batch_size: int,
    ) -> None:
        self.model, self.device = language_model.model, language_model.model.device
        self.routers, self.experts = routers, [_experts_of(router) for router in routers]
        self.most_experts = most_experts
        self.own, self.last, self.batch_size = weight == "own", positions == "last", batch_size

    @torch.inference_mode()
    def contrasts(self, clean: Sequence[int], corrupt: Sequence[int], answer: int, other: int) -> np.ndarray:
        """Contrasts, float64: of the clean run, of the corrupted one, and then [L, E + 1] of the patched ones.

        The last place of a layer is that of all its experts. Experts that neither run chooses have NaN.
        """
        (clean_logits, clean_seen), (logits, seen) = self._watched(clean), self._watched(corrupt)
        patches: dict[tuple[int, int | None], Tensor] = {}
        for router, experts, before, now in zip(self.routers, self.experts, clean_seen, seen, strict=True):
            size = router.num_experts
            source = now if self.own else before
            change = source.parts(experts, before.hidden, size) - now.parts(experts, now.hidden, size)
            if self.last:
                change[:, :-1] = 0
            patches[router.layer, None] = change.sum(0)
            ids = now.ids if self.own else torch.cat([before.ids, now.ids])
            here = ids if not self.last else ids.view(-1, len(corrupt), ids.shape[1])[:, -1]
            for expert in here[(here >= 0) & (here < size)].unique().tolist():
                patches[router.layer, expert] = change[expert]
        keys, places = list(patches), {router.layer: place for place, router in enumerate(self.routers)}
        patched = np.full((len(self.routers), self.most_experts + 1), np.nan)
        for first in range(0, len(keys), self.batch_size):
            part = keys[first : first + self.batch_size]
            logits_of_rows = self._patched(corrupt, [(layer, patches[layer, expert]) for layer, expert in part])
            values = (logits_of_rows[:, answer] - logits_of_rows[:, other]).double().tolist()
            for (layer, expert), value in zip(part, values, strict=True):
                patched[places[layer], -1 if expert is None else expert] = value
        whole = [float(of[answer].double() - of[other].double()) for of in (clean_logits, logits)]
        tested = patched[[places[layer] for layer, _ in keys], [-1 if expert is None else expert for _, expert in keys]]
        if not np.isfinite([*whole, *tested]).all():  # NaN says below that no token chose an expert
            raise AnalysisError("the logits of a run are not finite: load the model with dtype float32")
        return np.array([*whole, *patched.flat])

    def _logits(self, ids: Sequence[int], rows: int) -> Tensor:
        """Logits [rows, V] of the token after ``ids``, in several equal rows."""
        inputs = torch.tensor([ids] * rows, device=self.device)
        logits: Tensor = self.model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False).logits
        return logits[:, -1].float()

    def _watched(self, ids: Sequence[int]) -> tuple[Tensor, list[_Seen]]:
        """Logits [V] of a run, and what the experts of each layer were given."""
        seen: list[_Seen] = []

        def watch(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            hidden, chosen, weights = (*args, *kwargs.values())[:3]
            now = _Seen(hidden.reshape(-1, hidden.shape[-1]), chosen, weights)
            if chosen.shape != weights.shape:
                raise _unsupported(module, f"it is given weights {list(weights.shape)} for ids {list(chosen.shape)}")
            whole = (expert_outputs(module, now.hidden, chosen) * weights[..., None]).sum(1)
            if not torch.allclose(whole, output.reshape(whole.shape), rtol=0.02, atol=0.02 * float(output.abs().max())):
                raise _unsupported(module, "the weighted outputs of its experts do not add up to its output")
            seen.append(now)

        with _hooks([(module, watch) for module in self.experts], with_kwargs=True):
            logits = self._logits(ids, 1)
        return logits[0], seen

    def _patched(self, ids: Sequence[int], patches: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Logits [n, V] under each of n patches: a layer, and what is added to its output [S, H]."""

        def add(rows: Sequence[int]) -> Any:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                changed = output.clone()
                by_row = changed.view(len(patches), len(ids), -1)
                for row in rows:
                    by_row[row] += patches[row][1].to(output.dtype)
                return changed

            return hook

        hooks = []
        for router, experts in zip(self.routers, self.experts, strict=True):
            rows = [row for row, (layer, _) in enumerate(patches) if layer == router.layer]
            if rows:
                hooks.append((experts, add(rows)))
        with _hooks(hooks):
            return self._logits(ids, len(patches))


@contextlib.contextmanager
def _hooks(hooks: Iterable[tuple[nn.Module, Any]], **options: Any) -> Iterator[None]:
    """Forward hooks for the duration of a block."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook, **options))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _experts_of(router: RouterInfo) -> nn.Module:
    """The module that runs the experts of a router on (hidden, ids, weights)."""
    try:
        return one_module_of(router)
    except NoExpertOutputsError as error:
        raise _unsupported(router.block, str(error)) from None


def _unsupported(module: nn.Module, why: str) -> ModelNotSupportedError:
    return ModelNotSupportedError(
        f"single experts of {type(module).__name__} cannot be patched: {why}. Use a model whose experts are one "
        "module, experts(hidden, ids, weights), as Qwen3-MoE, OLMoE or gpt-oss in transformers 5."
    )


def _encoded(language_model: LanguageModel, pair: PromptPair) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    """Token ids of both prompts, and those of the answers."""
    texts = [Text(pair.group, name, getattr(pair, name)) for name in ("clean", "corrupt")]
    encoded = language_model.encode(texts)
    clean, corrupt = encoded.ids
    if encoded.cut or not clean or len(clean) != len(corrupt):
        raise ValueError(
            f"prompts {pair.clean!r} and {pair.corrupt!r} have {len(clean)} and {len(corrupt)} tokens (at most "
            f"{encoded.limit}): patches go from token to token, so give prompts of equal length"
        )
    answers = []
    for text in (pair.answer, pair.other):
        ids = language_model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"answer {text!r} has {len(ids)} tokens: give answers of one token (with leading space)")
        answers.append(int(ids[0]))
    return clean, corrupt, answers[0], answers[1]
