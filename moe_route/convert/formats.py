"""The formats that can be read, as one table, and how a file's format is found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_route.convert import counts, routed_experts, selections
from moe_route.convert.source import Source
from moe_route.convert.traces import statistics_of
from moe_route.recording import RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan

__all__ = ["FORMATS", "KINDS", "Format", "format_of", "options_of"]

KINDS: Mapping[str, type] = {
    "statistics": RoutingStatistics,
    "trace": Trace,
    "selection": ExpertSelection,
    "plan": Plan,
}
"""Kinds of results, by the names that their files have."""


@dataclass(frozen=True)
class Format:
    """A format that can be read."""

    holds: str  # what a file holds and who writes it, in a few words
    recognizes: Callable[[Source], bool]
    gives: Mapping[str, Callable[..., Any]]  # kind -> reader of one source; the first is what the format is
    defaults: Mapping[str, Any] = field(default_factory=dict)  # options that are known of the format


def _ours(kind: str) -> Format:
    def recognizes(source: Source) -> bool:
        plain = kind in ("plan", "selection") and source.form == "json" and isinstance(source.content, dict)
        return (
            source.content == kind if source.form == "moe-route" else plain and source.content.get("moe_route") == kind
        )

    return Format(f"{kind}, saved by moe-route", recognizes, {kind: lambda source: KINDS[kind].load(source.path)})  # type: ignore[attr-defined]


FORMATS: Mapping[str, Format] = {
    **{kind: _ours(kind) for kind in KINDS},
    "gate-sums": Format(
        "counts and gate sums per layer and expert (Qwen3-30B-A3B on MGSM), .json",
        counts.is_gate_sums,
        {"statistics": counts.read_gate_sums},
    ),
    "expert-counts": Format(
        "selections per layer and expert (OLMoE, Mixtral), .json or .pkl",
        counts.is_expert_counts,
        {"statistics": counts.read_expert_counts},
    ),
    "gpt-oss-example": Format(
        "one generation of gpt-oss, token by token, *_examples.json",
        counts.is_example,
        {"trace": counts.read_example},
        {"num_experts": counts.EXPERTS},
    ),
    "gpt-oss-analytics": Format(
        "means over generations of gpt-oss, .json", counts.is_analytics, {"statistics": counts.read_analytics}
    ),
    "esft-choices": Format(
        "experts and gate weights per token (ESFT), folder of expert_weights_<layer>.txt",
        selections.is_choices,
        {"trace": selections.read_choices},
        {"num_experts": 64},
    ),
    "esft-scores": Format(
        "scores of a task (ESFT), summary.json", selections.is_summary, {"selection": selections.read_summary}
    ),
    "esft-experts": Format(
        "experts of a task (ESFT), expert_configs", selections.is_config, {"selection": selections.read_config}
    ),
    "sglang": Format(
        "dump of SGLang's expert distribution recorder, .pt, or its logical_count as .json",
        counts.is_sglang,
        {"statistics": counts.read_sglang},
    ),
    "vllm-load": Format(
        "expert_load_window and physical_to_logical_map of vLLM's balancer, .pt, .npz, .safetensors",
        counts.is_vllm,
        {"statistics": counts.read_vllm},
    ),
    "eplb": Format(
        "loads [layers, experts] for EPLB, .npy, .safetensors, .pt, .json",
        counts.is_eplb,
        {"statistics": counts.read_eplb},
    ),
    "replay": Format(
        "experts of each token [tokens, layers, k], .npy, .npz, .safetensors",
        routed_experts.is_replay,
        {"trace": routed_experts.read_replay},
    ),
    "vllm-response": Format(
        "answers of vLLM with routed_experts, .json or a line each",
        routed_experts.is_vllm_response,
        {"trace": routed_experts.read_vllm_response},
    ),
    "sglang-response": Format(
        "answers of SGLang with routed_experts, .json or a line each",
        routed_experts.is_sglang_response,
        {"trace": routed_experts.read_sglang_response},
    ),
    "megatron": Format(
        "routing replay of slime and Miles on Megatron, rank<N>_routing_replay.pt",
        routed_experts.is_megatron,
        {"trace": routed_experts.read_megatron},
    ),
    "steermoe": Format(
        "SteerMoE's table of risk differences, .pkl",
        selections.is_table,
        {
            "selection": selections.read_selection,
            "plan": selections.read_plan,
            "statistics": selections.read_statistics,
        },
    ),
    "easysteer": Format(
        "EasySteer's configuration of router steering, .json",
        selections.is_easysteer,
        {"plan": selections.read_easysteer},
    ),
}
"""Every format that can be read, by name."""


def _plan_of(selection: ExpertSelection, *, action: str = "activate", strength: float = 0.5) -> Plan:
    if action in ("activate", "deactivate"):
        return getattr(Plan, action)(selection, strength=strength)  # type: ignore[no-any-return]
    if action in ("force_on", "force_off", "forbid"):
        return getattr(Plan, action)(selection)  # type: ignore[no-any-return]
    raise ValueError(f"no action {action!r}: activate, deactivate, force_on, force_off or forbid")


DERIVED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("trace", "statistics"): statistics_of,
    ("trace", "plan"): lambda trace: Plan.replay(trace),
    ("selection", "plan"): _plan_of,
}
"""(kind, other kind) -> how the first becomes the other."""


def format_of(source: Source, name: str | None = None) -> str:
    """The name of a file's format: ``name`` if it is given and fits, else the only one that recognizes the file."""
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f"no format {name!r}: one of {', '.join(FORMATS)}")
        if not _fits(name, source):
            raise source.refused(f"it is not {FORMATS[name].holds}", f"check --from, {_others(source, name)}")
        return name
    found = [known for known in FORMATS if _fits(known, source)]
    if len(found) > 1:
        raise ValueError(f"{source.path} may be {' or '.join(found)}: say which (--from, format=)")
    if not found:
        raise source.refused("it is of no known format", f"give one of {', '.join(FORMATS)}")
    return found[0]


def _fits(name: str, source: Source) -> bool:
    try:
        return FORMATS[name].recognizes(source)
    except (LookupError, TypeError, AttributeError):  # a list where the format has a mapping, and the like
        return False


def _others(source: Source, name: str) -> str:
    found = [known for known in FORMATS if known != name and _fits(known, source)]
    return f"it looks like {' or '.join(found)}" if found else "it is of no known format"


def options_of(*functions: Callable[..., Any]) -> set[str]:
    """The keyword options of readers."""
    return {
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def readers(name: str, to: str | None) -> tuple[str, Callable[..., Any], Sequence[Callable[..., Any]]]:
    """How format ``name`` becomes kind ``to``: the kind that is read, its reader, and what is then done to it."""
    gives = FORMATS[name].gives
    if to is None or to in gives:
        kind = to or next(iter(gives))
        return kind, gives[kind], ()
    for kind, reader in gives.items():
        if (kind, to) in DERIVED:
            return kind, reader, (DERIVED[kind, to],)
    known = [*gives, *(other for kind, other in DERIVED if kind in gives)]
    raise ValueError(f"{name} gives no {to}: it gives {', '.join(dict.fromkeys(known))}")
