"""`moe-route vectors`: compute the vectors of sentences in every layer of a model, with experts or without."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    command,
    load_language_model,
    model_arguments,
    output,
    shown_options,
    text_arguments,
    texts,
)
from moe_route.cli.saving import save, save_when_there_is_room


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "vectors",
        run,
        "pool the hidden states of sentences in every layer; the model needs no experts",
        "moe-route vectors --languages eng_Latn,deu_Latn --out vectors.safetensors\n"
        "moe-route analyze alignment vectors.safetensors",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file of vectors to write")
    parser.add_argument(
        "--pooling",
        default="position",
        choices=("position", "reversed", "mean", "last"),
        help="weights of the tokens: 1 to S (MEXA), S to 1 (mPLM-Sim on decoders), alike, or the last one alone "
        "(default: position)",
    )
    model_arguments(parser, engine=False)
    text_arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from moe_route.recording import sentence_vectors

    output(options.out)
    work = texts(options)
    language_model = load_language_model(options)
    found = sentence_vectors(
        language_model.model,
        language_model.tokenizer,
        work,
        pooling=options.pooling,
        **shown_options(options, "vectors"),
    )
    write = partial(found.save, options.out)
    if (error := save(write)) is not None:
        save_when_there_is_room(write, error)
    cut = found.metadata.get("cut_texts", 0)
    data = {
        "out": options.out,
        "groups": found.groups,
        "items": len(found.items),
        "layers": found.layers,
        "pooling": found.pooling,
        "cut": cut,
    }
    note = [f"{cut} of {len(work)} texts cut"] if cut else []
    return Answer(data, "\n".join([repr(found), *note, f"written to {options.out}"]))
