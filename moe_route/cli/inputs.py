"""Load what options name: models, texts, statistics, plans, tokenizers; and check where results go."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moe_route as mr

if TYPE_CHECKING:
    from moe_route.data.batches import Text
    from moe_route.recording import SentenceVectors

HUB = "hub:"
"""What begins the name of a plan on the Hugging Face hub: hub:OWNER/NAME, or hub:OWNER/NAME/FILE."""


def load_language_model(options: argparse.Namespace, **how: Any) -> mr.LanguageModel:
    """The model of the options; ``how`` are further arguments of ``LanguageModel.load``."""
    quiet_libraries()
    where = {"device": options.device, "device_map": options.device_map}
    return mr.LanguageModel.load(options.model, dtype=options.dtype, **where, **how)


def quiet_libraries() -> None:
    """Silence what other libraries print while a model is loaded; their final error is shown."""
    if find_spec("transformers"):
        from huggingface_hub.utils.logging import set_verbosity_error
        from transformers.utils.logging import disable_progress_bar

        set_verbosity_error()  # hides its retries
        # transformers imports torchao for every model, which tells of its extensions for other machines
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.stderr.isatty():
            disable_progress_bar()


@contextlib.contextmanager
def attached_model(options: argparse.Namespace, **how: Any) -> Iterator[tuple[mr.LanguageModel, mr.RoutedModel]]:
    """The model of the options, and the attached model, detached at the end; ``how`` as in ``load_language_model``."""
    language_model = load_language_model(options, **how)
    with language_model.attach(options.engine) as routed:
        yield language_model, routed


def text_source(options: argparse.Namespace, *, opened: bool = True, **columns: str) -> mr.data.CorpusStream:
    """The texts of the options; how they are read is said on standard error if they are opened."""
    stream = mr.data.read_texts(
        options.data,
        columns=options.columns,
        quotes=options.quotes,
        languages=options.languages,
        limit=options.limit,
        split=options.split,
        opened=opened,
        **columns,
    )
    if opened:
        print(f"moe-route: {stream.name}: {stream.described}", file=sys.stderr)
    return stream


def texts(options: argparse.Namespace) -> list[Text]:
    """The texts of the options, language by language."""
    return mr.texts_of(text_source(options))


def text_options(options: argparse.Namespace) -> dict[str, Any]:
    """How the texts are run, as keyword arguments."""
    return {"batch_size": options.batch_size, "max_length": options.max_length}


def shown_options(options: argparse.Namespace, caption: str | None = None) -> dict[str, Any]:
    """``text_options`` with ``progress``, which only a terminal sees: a bar's caption, or whether there are bars."""
    terminal = sys.stderr.isatty()
    return {**text_options(options), "progress": terminal if caption is None else caption if terminal else None}


def tokenizer_of(name: str) -> Any:
    """The tokenizer in a folder, on the hub, or of the demo model."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError("reading a tokenizer needs transformers: pip install 'moe-route[hf]'") from error
    return AutoTokenizer.from_pretrained(mr.data.demo_model_folder() if name == "demo" else name)


def token_texts(name: str) -> tuple[list[str], list[int]]:
    """The text of every token id, and the ids of special tokens."""
    tokenizer = tokenizer_of(name)
    return [str(tokenizer.decode([number])) for number in range(len(tokenizer))], list(tokenizer.all_special_ids)


def merged_statistics(paths: Sequence[Path]) -> mr.RoutingStatistics:
    """The sum of the statistics in ``paths``."""
    first, *others = [mr.RoutingStatistics.load(path) for path in paths]
    for other in others:
        first = first + other
    return first


def is_selection(paths: Sequence[Path]) -> bool:
    """Whether these files are one selection of experts, not statistics."""
    from moe_route.base.files import read_header

    return len(paths) == 1 and (paths[0].suffix == ".json" or read_header(paths[0])["kind"] == "selection")


def sentences(paths: Sequence[Path]) -> mr.RoutingStatistics | SentenceVectors:
    """Sentence vectors in one file, or the sum of statistics."""
    from moe_route.base import files
    from moe_route.recording import SentenceVectors

    if files.read_header(paths[0])["kind"] != "sentence_vectors":
        return merged_statistics(paths)
    if len(paths) > 1:
        raise ValueError("vectors of different runs cannot be added up: give one file of vectors")
    return SentenceVectors.load(paths[0])


def in_layers(source: Any, layers: Sequence[int] | None) -> Any:
    """A recording, or its part in some layers."""
    if layers is None:
        return source
    if layers[-1] >= len(source.layers):
        raise ValueError(f"--layers must name some of the {len(source.layers)} layers, counted from 0")
    return source.select(layers=layers)


def load_plan(name: str | Path) -> mr.Plan:
    """The plan in a file, or on the hub: hub:OWNER/NAME[/FILE][@REVISION]."""
    if not str(name).startswith(HUB):
        return mr.Plan.load(name)
    repo, filename, revision = _place_on_hub(str(name))
    return mr.Plan.from_hub(repo, filename or "plan.safetensors", revision=revision)


def save_plan(plan: mr.Plan, out: str | Path, *, private: bool = False) -> str:
    """Write a plan to a file, or to the hub; returns where it is."""
    if not str(out).startswith(HUB):
        plan.save(out)
        return str(out)
    repo, filename, revision = _place_on_hub(str(out))
    return plan.push_to_hub(repo, filename or "plan.safetensors", private=private or None, revision=revision)


def _place_on_hub(name: str) -> tuple[str, str | None, str | None]:
    """Repository, file and revision of hub:OWNER/NAME[/FILE][@REVISION]."""
    place, _, revision = name.removeprefix(HUB).partition("@")
    owner, _, rest = place.partition("/")
    repo, _, filename = rest.partition("/")
    if not owner or not repo:
        raise ValueError(f"{name} names no plan on the hub: write hub:OWNER/NAME or hub:OWNER/NAME/FILE")
    return f"{owner}/{repo}", filename or None, revision or None


def output(*paths: str | Path | None) -> None:
    """Refuse files that cannot be written (``OSError``), or are one file, before the work whose results go there."""
    from moe_route.base import files

    given = [Path(path) for path in paths if path is not None and not str(path).startswith(HUB)]
    if len({path.resolve() for path in given}) < len(given):
        raise ValueError(f"two results would be written to one file ({given[0]}): give each a name of its own")
    for path in given:
        files.check_writable(path)
