"""`moe-route analyze paths`, `saturation`, `vocabulary`, `token-classes`, `locality`: questions to trace files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.analyze.arguments import groups_argument, phase_argument
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers_argument, positive, token_texts, tokenizer_argument

CLASSES = ("script", "start")


def add(questions: Any) -> None:
    _add_paths(questions)
    _add_saturation(questions)
    _add_vocabulary(questions)
    _add_token_classes(questions)
    _add_locality(questions)


def _question(questions: Any, name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
    """A command on one trace, with the options that choose its tokens and layers."""
    parser = command(questions, name, run, help, f"moe-route analyze {name} {example}")
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace file, from moe-route record --trace")
    layers_argument(parser)
    groups_argument(parser)
    phase_argument(parser)
    return parser


def _add_paths(questions: Any) -> None:
    parser = _question(
        questions,
        "paths",
        run_paths,
        "the experts that tokens visit layer after layer",
        "trace.safetensors --layers 2-5",
    )
    parser.add_argument("--window", type=positive, metavar="N", help="every run of N layers (default: all together)")
    parser.add_argument(
        "--experts", type=positive, default=1, metavar="K", help="experts per layer that make up a path (default: 1)"
    )
    parser.add_argument(
        "--min-tokens",
        type=positive,
        default=5,
        metavar="N",
        help="tokens of a path that counts for purity (default: 5)",
    )
    parser.add_argument(
        "--classes", choices=CLASSES, help="purity by this class of tokens, not by group; needs --tokenizer"
    )
    tokenizer_argument(parser)


def run_paths(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.recording import Trace

    found = analysis.paths(
        Trace.load(options.trace),
        layers=options.layers,
        window=options.window,
        k=options.experts,
        groups=options.groups,
        classes=None if options.classes is None else _classes(options.tokenizer, options.classes),
        phase=options.phase,
        min_tokens=options.min_tokens,
    )
    return Answer(found.to_dict(), repr(found))


def _add_saturation(questions: Any) -> None:
    parser = command(
        questions,
        "saturation",
        run_saturation,
        "how many of the final checkpoint's experts an earlier checkpoint already chose",
        "moe-route analyze saturation step1000.safetensors --final final.safetensors",
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace of the earlier checkpoint")
    parser.add_argument(
        "--final", type=Path, required=True, metavar="TRACE", help="trace of the final checkpoint over the same texts"
    )
    layers_argument(parser)
    groups_argument(parser)


def run_saturation(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.recording import Trace

    early, final = Trace.load(options.trace), Trace.load(options.final)
    found = analysis.saturation(early, final, layers=options.layers, groups=options.groups)
    return Answer(found.to_dict(), repr(found))


def _add_vocabulary(questions: Any) -> None:
    parser = _question(
        questions,
        "vocabulary",
        run_vocabulary,
        "how far experts specialize on token ids",
        "trace.safetensors --tokenizer demo --min-tokens 20",
    )
    parser.add_argument(
        "--of", default="input", choices=("input", "next"), help="a token's own id, or the next one (default: input)"
    )
    parser.add_argument(
        "--min-tokens", type=positive, default=10, metavar="N", help="tokens of an id that counts (default: 10)"
    )
    tokenizer_argument(parser)


def run_vocabulary(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.recording import Trace

    found = analysis.vocabulary(
        Trace.load(options.trace),
        of=options.of,
        layers=options.layers,
        groups=options.groups,
        phase=options.phase,
        min_tokens=options.min_tokens,
        names=None if options.tokenizer is None else token_texts(options.tokenizer)[0],
    )
    return Answer(found.to_dict(), repr(found))


def _add_token_classes(questions: Any) -> None:
    parser = _question(
        questions,
        "token-classes",
        run_token_classes,
        "how differently each class of tokens is routed",
        "trace.safetensors --tokenizer demo",
    )
    parser.add_argument(
        "--classes",
        default="script",
        choices=CLASSES,
        help="script, digits, punctuation, ..., or start and inside of words (default: script)",
    )
    tokenizer_argument(parser)


def run_token_classes(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.recording import Trace

    found = analysis.class_routing(
        Trace.load(options.trace),
        _classes(options.tokenizer, options.classes),
        layers=options.layers,
        groups=options.groups,
        phase=options.phase,
    )
    return Answer(found.to_dict(), repr(found))


def _add_locality(questions: Any) -> None:
    parser = _question(
        questions,
        "locality",
        run_locality,
        "how well one set of experts serves consecutive tokens",
        "trace.safetensors --segment 16",
    )
    parser.add_argument("--segment", type=positive, default=16, metavar="M", help="consecutive tokens (default: 16)")


def run_locality(options: argparse.Namespace) -> Answer:
    from moe_route import analysis
    from moe_route.recording import Trace

    found = analysis.local_consistency(
        Trace.load(options.trace),
        segment=options.segment,
        layers=options.layers,
        groups=options.groups,
        phase=options.phase,
    )
    return Answer(found.to_dict(), repr(found))


def _classes(tokenizer: str | None, by: Any) -> tuple[str, ...]:
    from moe_route import analysis

    if tokenizer is None:
        raise ValueError("classes of tokens are read from their texts: pass --tokenizer")
    texts, special = token_texts(tokenizer)
    return analysis.token_classes(texts, by=by, special=special)
