"""`moe-route experiment`: run a model under interventions, and measure what they change.

An experiment is a row of a table: its options are the keyword arguments of its function, under the same names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moe_route as mr
from moe_route.base.schema import read_text
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import attached_model, load_language_model, shown_options, texts
from moe_route.cli.options import (
    Parser,
    add,
    command,
    existing,
    given,
    layers,
    model_arguments,
    positive,
    resumable_argument,
    text_arguments,
    verbs_of,
)
from moe_route.cli.saving import resumed

if TYPE_CHECKING:
    from moe_route.runs.lines import KeptRuns

ROUTES = ("own", "pooled", "choice", "other", "scores")


@dataclass(frozen=True)
class Experiment:
    """A command below `experiment`.

    Attributes:
        function: name in ``moe_route.experiments``.
        takes: its keyword arguments that are options, under the same names.
        help, example: for its help.
        add: adds the options that it alone has.
        more: further keyword arguments, from the options and the texts.
    """

    function: str
    takes: tuple[str, ...]
    help: str
    example: str
    add: Callable[[Parser], None]
    more: Callable[[argparse.Namespace, Any], dict[str, Any]] = lambda options, work: {}


def add_experiment(verbs: Any) -> None:
    below = verbs_of(verbs, "experiment", "measure what experts and routes do, by changing them", title="experiments")
    for name, experiment in EXPERIMENTS.items():
        parser = command(below, name, partial(_run, experiment), experiment.help, experiment.example)
        experiment.add(parser)
        add(parser, *(option for option in ("layers", "seed") if option in experiment.takes))
        resumable_argument(parser, f"experiment {name}")
        model_arguments(parser)
        text_arguments(parser)
    _add_patch(below)


def _run(experiment: Experiment, options: argparse.Namespace) -> Answer:
    work = texts(options)

    def measured(kept: KeptRuns | None) -> Answer:
        more = experiment.more(options, work)
        with attached_model(options) as (language_model, routed):
            chosen = {**given(options, experiment.takes), **more, **shown_options(options)}
            result = getattr(mr.experiments, experiment.function)(
                language_model, work, routed=routed, kept=kept, **chosen
            )
        answer = Answer.of(result)
        if not hasattr(result, "agreement"):
            return answer
        agreement = result.agreement()
        data = {**answer.data, "agreement": agreement.to_dict()}
        return Answer(data, f"{answer.text}\n{agreement!r}", frame=answer.frame)

    asked = {name: getattr(options, name, None) for name in (*experiment.takes, "donor", "band")}
    return resumed(options, f"experiment {experiment.function}", asked, work, measured)


def _add_regret(parser: Parser) -> None:
    parser.add_argument("--routes", type=positive, metavar="N", help="routes to draw (default: 8)")
    parser.add_argument("--temperature", type=float, metavar="X", help="size of the noise on the logits (default: 1)")


def _add_transplant(parser: Parser) -> None:
    add(parser, "reference", reference="language that routes come from (default: eng_Latn)")
    parser.add_argument(
        "--kinds", type=_kinds, metavar="A,B", help=f"routes, from {', '.join(ROUTES)} (default: all but scores)"
    )
    parser.add_argument("--donor", metavar="NAME", help="checkpoint whose routes are used too")
    parser.add_argument(
        "--band", type=_band, action="append", metavar="NAME=A-B", help="also use the routes in these layers only"
    )


def _kinds(text: str) -> list[str]:
    return [kind.strip() for kind in text.split(",") if kind.strip()]


def _band(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, numbers = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} has no name: write it as middle=2-5")
    return name, layers(numbers)


def _donated(options: argparse.Namespace, work: Any) -> dict[str, Any]:
    more: dict[str, Any] = {"bands": dict(options.band or ())}
    if options.donor is not None:
        donor = load_language_model(argparse.Namespace(**{**vars(options), "model": options.donor}))
        more["routes"] = {"donor": mr.experiments.record_trace(donor, work, **shown_options(options))}
    return more


EXPERIMENTS: Mapping[str, Experiment] = {
    "knockout": Experiment(
        "knockout",
        ("layers", "seed"),
        "change of the loss when one expert is switched off, for every expert",
        "moe-route experiment knockout --languages eng_Latn,swh_Latn --limit 20 --layers 5",
        lambda parser: None,
    ),
    "regret": Experiment(
        "regret",
        ("routes", "temperature", "layers", "seed"),
        "how much better the best of several drawn routes predicts each token",
        "moe-route experiment regret --languages eng_Latn,swh_Latn --limit 20 --temperature 0.2",
        _add_regret,
    ),
    "transplant": Experiment(
        "transplant",
        ("reference", "kinds", "seed"),
        "loss of every language with the routes of another one, or of another checkpoint",
        "moe-route experiment transplant --languages eng_Latn,deu_Latn --limit 20 --band middle=2-5",
        _add_transplant,
        _donated,
    ),
}
"""The commands below `experiment` that run texts, by name; `patch` runs pairs of prompts."""


# ---- patch


def _add_patch(below: Any) -> None:
    parser = command(
        below,
        "patch",
        _run_patch,
        "what the output of single experts of a clean run restores in a corrupted run",
        "moe-route experiment patch --pairs pairs.tsv --positions last",
    )
    parser.add_argument(
        "--pairs",
        type=existing,
        required=True,
        metavar="FILE",
        help="tab-separated lines: clean prompt, corrupted prompt, answer, other answer, and optionally a group",
    )
    parser.add_argument(
        "--weight",
        choices=("clean", "own"),
        help="weights of the clean run, or the corrupted run's own (default: clean)",
    )
    parser.add_argument("--positions", choices=("all", "last"), help="tokens that are patched (default: all)")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="patches a batch (default: 32)")
    add(parser, "layers", "seed")
    resumable_argument(parser, "experiment patch")
    model_arguments(parser, engine=False)


def _run_patch(options: argparse.Namespace) -> Answer:
    pairs = _pairs(options.pairs)
    takes = ("layers", "weight", "positions", "batch_size", "seed")

    def measured(kept: KeptRuns | None) -> Answer:
        language_model = load_language_model(options)
        return Answer.of(mr.experiments.patch_experts(language_model, pairs, kept=kept, **given(options, takes)))

    return resumed(options, "experiment patch", {name: getattr(options, name) for name in takes}, pairs, measured)


def _pairs(path: Path) -> list[mr.experiments.PromptPair]:
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        cells = line.split("\t")  # answers may begin with a space
        if line.strip() and len(cells) not in (4, 5):
            raise ValueError(
                f"line {number} of {path} has {len(cells)} cells: write clean prompt, corrupted prompt, answer, other "
                "answer and, if wanted, a group, with tabs between"
            )
        if line.strip():
            pairs.append(mr.experiments.PromptPair(*cells))
    return pairs
