"""Arguments that several questions share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import layers_argument, names, positive

if TYPE_CHECKING:
    from moe_route.base.table import ShownAsTables
    from moe_route.steering import ExpertSelection

__all__ = [
    "baseline_group_argument",
    "by_argument",
    "compared_arguments",
    "divergence_arguments",
    "divergence_options",
    "groups_argument",
    "interval_argument",
    "level",
    "parallel_arguments",
    "parallel_options",
    "phase_argument",
    "reference_argument",
    "saved",
    "selection_argument",
    "statistics_argument",
]


def statistics_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="statistics; several are added up")


def reference_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference", default="eng_Latn", metavar="GROUP", help="group to compare with (default: eng_Latn)"
    )


def compared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", type=Path, nargs="+", required=True, metavar="FILE", help="statistics of task texts")
    parser.add_argument(
        "--baseline", type=Path, nargs="+", required=True, metavar="FILE", help="statistics of general texts"
    )
    parser.add_argument("--group", metavar="GROUP", help="group of the task, such as eng_Latn (default: the only one)")


def baseline_group_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline-group", metavar="GROUP", help="group of the baseline (default: that of the task)")


def by_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by", default="sequence", choices=("sequence", "token"), help="mean over these (default: sequence)"
    )


def interval_argument(parser: argparse.ArgumentParser, over: str) -> None:
    parser.add_argument(
        "--interval", type=level, metavar="LEVEL", help=f"add bootstrap intervals over {over}, such as 0.95"
    )


def phase_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--phase", choices=("prefill", "decode"), help="tokens of this phase only")


def groups_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--groups", type=names, metavar="A,B", help="groups to take (default: all)")


def parallel_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Vectors of parallel sentences, and the rule by which they are compared."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="vectors, or statistics; several statistics are added up"
    )
    parser.add_argument(
        "--rule",
        default=default,
        choices=("mexa", "retrieval", "margin", "cosine"),
        help="share of sentences that are nearest to their translation in both directions, in one, or by the ratio "
        f"margin, or mean cosine of translations (default: {default})",
    )
    parser.add_argument(
        "--kind",
        choices=("full", "topk", "count", "hidden"),
        help="statistics: router scores used, or inputs of the routers, from record --hidden (default: full)",
    )
    parser.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        help="subtract the mean of each group (default: of routing, not of vectors)",
    )
    parser.add_argument(
        "--neighbors", type=positive, default=4, metavar="N", help="margin: neighbors to divide by (default: 4)"
    )
    layers_argument(parser, "layers to look at, counted from 0, which is the embedding in vectors (default: all)")


def parallel_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``parallel_arguments``."""
    return {name: getattr(options, name) for name in ("rule", "kind", "center", "neighbors")}


def selection_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the selection of these experts")


def saved(found: ShownAsTables, selection: ExpertSelection, path: Path | None) -> Answer:
    """The answer with a result whose experts `--out` writes."""
    data, text = found.to_dict(), repr(found)  # type: ignore[attr-defined]
    if path is None:
        return Answer(data, text)
    selection.save(path)
    return Answer({**data, "out": path}, f"{text}\nwritten to {path}")


def divergence_arguments(parser: argparse.ArgumentParser) -> None:
    """How divergence is measured."""
    groups_argument(parser)
    parser.add_argument(
        "--measure",
        default="normalized_jsd",
        choices=("normalized_jsd", "jsd", "cosine", "jaccard"),
        help="how two distributions over experts are compared (default: normalized_jsd)",
    )
    parser.add_argument(
        "--pairing",
        default="paired",
        choices=("paired", "pooled", "auto"),
        help="compare each text with its translation, or whole groups; auto: paired where that can be done "
        "(default: paired)",
    )
    parser.add_argument(
        "--kind",
        default="full",
        choices=("full", "topk", "count"),
        help="scores over all experts, weights of the chosen ones, or how often they are chosen (default: full)",
    )
    parser.add_argument(
        "--by", default="sequence", choices=("sequence", "token"), help="pooled: what weighs alike (default: sequence)"
    )
    parser.add_argument("--top", type=positive, metavar="N", help="jaccard: experts to compare (default: top-k)")
    parser.add_argument(
        "--correct",
        choices=("floor", "rarefy", "jackknife", "rarefy+floor", "jackknife+floor"),
        help="correct for short texts: subtract the divergence of unrelated sentences of one language, compare equally "
        "many selections, or remove the bias of first order; all but the first need --kind count",
    )
    phase_argument(parser)


def divergence_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``analysis.divergence`` that ``divergence_arguments`` asks for."""
    names = ("groups", "measure", "pairing", "kind", "by", "top", "correct", "phase")
    return {name: getattr(options, name) for name in names}


def level(text: str) -> float:
    """Parse the level of an interval, above 0 and below 1."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level between 0 and 1, such as 0.95")
    return found
