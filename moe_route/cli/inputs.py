"""Inputs that several commands share (model, texts, statistics files, layers), and the errors caused by the user."""

from __future__ import annotations

import argparse
import contextlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_route.data.batches import Text
    from moe_route.recording import RoutingStatistics, SentenceVectors
    from moe_route.routed import RoutedModel
    from moe_route.runs.language_model import LanguageModel

__all__ = [
    "attached_model",
    "command",
    "load_language_model",
    "layers",
    "layers_argument",
    "merged_statistics",
    "model_arguments",
    "names",
    "numbers",
    "output",
    "parallel_source",
    "positive",
    "quiet_libraries",
    "seed_argument",
    "shown_options",
    "text_arguments",
    "text_options",
    "texts",
    "token_texts",
    "tokenizer_argument",
    "tokenizer_of",
]

# Errors whose message names the problem and the fix. Any other error is a bug of moe-route and keeps its traceback.
USER_ERRORS = (ValueError, KeyError, OSError, ImportError)


def command(verbs: Any, name: str, run: Any, help: str, example: str) -> argparse.ArgumentParser:
    """Add a command with the options that all commands have; `example` is shown at the end of its help."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example:\n{textwrap.indent(example, '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=run, verb=parser)
    return parser


def model_arguments(
    parser: argparse.ArgumentParser, *, engine: bool = True, engines: Sequence[str] = ("hook", "fused")
) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="demo", metavar="NAME", help="checkpoint folder or hub name (default: the demo model)"
    )
    group.add_argument(
        "--device", help="where to put the model, such as cpu or cuda:0 (default: where it loads, the CPU for most)"
    )
    group.add_argument(
        "--device-map", metavar="MAP", help="spread the layers over devices: auto, balanced, sequential (accelerate)"
    )
    group.add_argument(
        "--dtype", default="auto", help="dtype of the weights, such as bfloat16 (default: the checkpoint's)"
    )
    if engine:
        inside = ", or vllm, which runs the model itself" if "vllm" in engines else ""
        group.add_argument(
            "--engine",
            default="hook",
            type=partial(_engine, engines),
            choices=engines,
            help=f"how to attach{inside} (default: hook)",
        )


def _engine(engines: Sequence[str], name: str) -> str:
    if name == "vllm" and name not in engines:
        raise argparse.ArgumentTypeError(
            "vLLM loads and runs its models itself: `moe-route record --corpus` can use it, or record inside it with "
            "mr.vllm.record (docs/serving.md)"
        )
    return name


def text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("texts")
    group.add_argument(
        "--data",
        default="general",
        metavar="PATH",
        help="table of tab-separated texts, folder with devtest/LANGUAGE.devtest, or general or arithmetic, which "
        "moe-route brings (default: general)",
    )
    group.add_argument("--languages", type=names, metavar="A,B", help="languages to take (default: all)")
    group.add_argument("--limit", type=positive, metavar="N", help="sentences per language (default: all)")
    group.add_argument("--batch-size", type=positive, default=16, metavar="N", help="texts per batch (default: 16)")
    group.add_argument(
        "--max-length", type=positive, metavar="N", help="cut texts to N tokens (default: the model's limit)"
    )


def layers_argument(
    parser: argparse.ArgumentParser, what: str = "MoE layers to look at, counted from 0 (default: all)"
) -> None:
    parser.add_argument("--layers", type=layers, metavar="A-B", help=what)


def seed_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default: 0)")


def load_language_model(options: argparse.Namespace, **how: Any) -> LanguageModel:
    """The model of the options; `how` are further arguments of `LanguageModel.load`."""
    from moe_route.runs.language_model import LanguageModel

    quiet_libraries()
    where = {"device": options.device, "device_map": options.device_map}
    return LanguageModel.load(options.model, dtype=options.dtype, **where, **how)


def quiet_libraries() -> None:
    """Silence what other libraries print while a model is loaded; their final error is shown."""
    if find_spec("transformers"):
        from huggingface_hub.utils.logging import set_verbosity_error
        from transformers.utils.logging import disable_progress_bar

        set_verbosity_error()  # hides its retries
        if not sys.stderr.isatty():
            disable_progress_bar()


def text_options(options: argparse.Namespace) -> dict[str, Any]:
    """How the texts of `text_arguments` are run, as keyword arguments."""
    return {"batch_size": options.batch_size, "max_length": options.max_length}


def shown_options(options: argparse.Namespace, caption: str | None = None) -> dict[str, Any]:
    """`text_options` with `progress`, which only a terminal sees: the caption of a bar, or whether there are bars."""
    terminal = sys.stderr.isatty()
    return {**text_options(options), "progress": terminal if caption is None else caption if terminal else None}


@contextlib.contextmanager
def attached_model(options: argparse.Namespace, **how: Any) -> Iterator[tuple[LanguageModel, RoutedModel]]:
    """The model of the options, and the attached model, detached at the end; `how` as in `load_language_model`."""
    language_model = load_language_model(options, **how)
    with language_model.attach(options.engine) as routed:
        yield language_model, routed


def texts(options: argparse.Namespace) -> list[Text]:
    from moe_route.data.batches import texts_of
    from moe_route.runs.record import read_corpus

    return texts_of(read_corpus(options.data, languages=options.languages, limit=options.limit))


def tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="tokenizer for the texts of token ids: folder, hub name, or demo"
    )


def tokenizer_of(name: str) -> Any:
    """The tokenizer in a folder, on the hub, or of the demo model."""
    from moe_route.data import demo_model_folder

    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("reading a tokenizer needs transformers: pip install 'moe-route[hf]'") from error
    return AutoTokenizer.from_pretrained(demo_model_folder() if name == "demo" else name)


def token_texts(name: str) -> tuple[list[str], list[int]]:
    """The text of every token id, and the ids of special tokens."""
    tokenizer = tokenizer_of(name)
    return [str(tokenizer.decode([number])) for number in range(len(tokenizer))], list(tokenizer.all_special_ids)


def merged_statistics(paths: Sequence[Path]) -> RoutingStatistics:
    """The sum of the statistics in `paths`."""
    from moe_route.recording import RoutingStatistics

    first, *others = [RoutingStatistics.load(path) for path in paths]
    for other in others:
        first = first + other
    return first


def parallel_source(paths: Sequence[Path], layers: Sequence[int] | None) -> RoutingStatistics | SentenceVectors:
    """Sentence vectors in one file, or the sum of statistics; some of their layers, if these are given."""
    from moe_route.base import files
    from moe_route.recording import SentenceVectors

    found: RoutingStatistics | SentenceVectors
    if files.read_header(paths[0])["kind"] == "sentence_vectors":
        if len(paths) > 1:
            raise ValueError("vectors of different runs cannot be added up: give one file of vectors")
        found = SentenceVectors.load(paths[0])
    else:
        found = merged_statistics(paths)
    if layers is None:
        return found
    if layers[-1] >= len(found.layers):
        raise ValueError(f"--layers must name some of the {len(found.layers)} layers, counted from 0")
    return found.select(layers=layers)


def output(*paths: Path | None) -> None:
    """Refuse files that cannot be written (``OSError``), or are one file, before the work whose results go there."""
    from moe_route.base import files

    given = [path for path in paths if path is not None]
    if len({path.resolve() for path in given}) < len(given):
        raise ValueError(f"two results would be written to one file ({given[0]}): give each a name of its own")
    for path in given:
        files.check_writable(path)


def layers(text: str) -> tuple[int, ...]:
    """Parse layers from the command line, both ends included: "2-5", "0,3,8-11"."""
    found: set[int] = set()
    for part in text.split(","):
        ends = [int(end) for end in part.split("-") if end.strip().isdecimal()]
        if len(ends) != part.count("-") + 1 or len(ends) > 2:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers: write them as 2-5 or 0,3,8-11")
        if ends[0] > ends[-1]:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} runs backwards: write {ends[-1]}-{ends[0]}")
        found.update(range(ends[0], ends[-1] + 1))
    return tuple(sorted(found))


def names(text: str) -> tuple[str, ...]:
    """Parse names from the command line: "eng_Latn,deu_Latn"."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers from the command line: "0.5,1,2"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: write them as 0.5,1,2") from None


def positive(text: str) -> int:
    """Parse a whole number from 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
