"""What several commands take: the model, the texts, statistics files, layers; and which errors are the user's."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_route.recording import RoutingStatistics
    from moe_route.workload import LanguageModel, Text

__all__ = [
    "command",
    "language_model",
    "layers",
    "merged_statistics",
    "model_arguments",
    "text_arguments",
    "texts",
]

# The library says what is wrong and the mend in these; anything else is a fault of moe-route and keeps its traceback.
USER_ERRORS = (ValueError, KeyError, OSError, ImportError)


def command(verbs: Any, name: str, run: Any, help: str, **more: Any) -> argparse.ArgumentParser:
    """A verb of the command line with what every verb takes."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, **more)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run)
    return parser


def model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="demo", metavar="NAME", help="checkpoint folder or hub name (default: the demo model)"
    )
    group.add_argument("--device", help="where to put the model, such as cpu or cuda:0 (default: where it loads)")
    group.add_argument(
        "--dtype", default="auto", help="dtype of the weights, such as bfloat16 (default: the checkpoint's)"
    )
    group.add_argument("--engine", default="hook", choices=("hook", "fused"), help="how to attach (default: hook)")


def text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("texts")
    group.add_argument(
        "--data",
        default="general",
        metavar="PATH",
        help="table of tab-separated texts, folder with devtest/LANGUAGE.devtest, or general or arithmetic, which "
        "moe-route brings (default: general)",
    )
    group.add_argument("--languages", type=_names, metavar="A,B", help="languages to take (default: all)")
    group.add_argument("--limit", type=_positive, metavar="N", help="sentences per language (default: all)")
    group.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="texts a batch (default: 16)")
    group.add_argument(
        "--max-length", type=_positive, metavar="N", help="cut texts to N tokens (default: the model's limit)"
    )


def language_model(options: argparse.Namespace) -> LanguageModel:
    from moe_route.workload import LanguageModel

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the error that ends them is shown
    if not sys.stderr.isatty() and find_spec("transformers"):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    return LanguageModel.load(options.model, dtype=options.dtype, device=options.device)


def texts(options: argparse.Namespace) -> list[Text]:
    from moe_route.workload import read_corpus, texts_of

    return texts_of(read_corpus(options.data, languages=options.languages, limit=options.limit))


def merged_statistics(paths: Sequence[Path]) -> RoutingStatistics:
    """The statistics in `paths`, added up."""
    from moe_route.recording import RoutingStatistics

    first, *others = [RoutingStatistics.load(path) for path in paths]
    for other in others:
        first = first + other
    return first


def layers(text: str) -> tuple[int, ...]:
    """Layers as written on the command line, both ends included: "2-5", "0,3,8-11"."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            found.update(range(int(first), int(last or first) + 1))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of layers: write them as 2-5 or 0,3,8-11") from error
    return tuple(sorted(found))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
