"""`moe-route record`: run texts through a model and save statistics of its routing."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from moe_route.cli import record_corpus
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    command,
    layers,
    model_arguments,
    output,
    positive,
    shown_options,
    text_arguments,
    texts,
)
from moe_route.cli.interrupt import INTERRUPTED, deferred_interrupt
from moe_route.cli.saving import check_room_after_first_batch, save, save_when_there_is_room


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "record",
        run,
        "record the routing of a model over texts, by language",
        "moe-route record --data texts.tsv --languages eng_Latn,deu_Latn --out general.safetensors",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="statistics file, or with --corpus folder, to write"
    )
    parser.add_argument(
        "--no-sequences", action="store_true", help="keep sums only, not each sentence (no paired divergence)"
    )
    parser.add_argument(
        "--consistency",
        type=positive,
        nargs="?",
        const=True,
        default=False,
        metavar="N",
        help="average the overlap of the experts of two tokens over each sequence, by all pairs or N drawn ones",
    )
    parser.add_argument("--pairs", action="store_true", help="count pairs of experts, within and across layers")
    parser.add_argument(
        "--no-special-tokens", action="store_true", help="leave out the tokenizer's special tokens (begin, end, ...)"
    )
    parser.add_argument(
        "--expert-outputs", action="store_true", help="add up the sizes of the experts' outputs (runs experts twice)"
    )
    parser.add_argument("--hidden", action="store_true", help="average the inputs of the routers")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="steer with this plan while recording")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="also write the experts of every token, up to a million tokens"
    )
    parser.add_argument("--trace-layers", type=layers, metavar="A-B", help="MoE layers to trace (default: all)")
    model_arguments(parser, engines=("hook", "fused", "vllm"))
    text_arguments(parser)
    record_corpus.arguments(parser)


def run(options: argparse.Namespace) -> Answer:
    from contextlib import ExitStack

    from moe_route.runs.record import record_texts
    from moe_route.steering import Plan

    record_corpus.refuse_mixture(options)
    if options.corpus is not None:
        return record_corpus.run(options, asked_for)
    output(options.out, options.trace)
    if options.trace_layers is not None and options.trace is None:
        raise ValueError("--trace-layers chooses the layers of a trace: name its file with --trace")
    plan = None if options.plan is None else Plan.load(options.plan)
    work = texts(options)
    groups = list(dict.fromkeys(text.group for text in work))
    with attached_model(options) as (language_model, routed), ExitStack() as until_saved:
        with ExitStack() as stack:
            if plan is not None:
                stack.enter_context(routed.steer(plan))
            recorder = stack.enter_context(routed.record(groups, **asked_for(options, language_model.tokenizer)))
            stop = until_saved.enter_context(deferred_interrupt())
            checked = check_room_after_first_batch(recorder, options.out, len(work), stop)
            ran = record_texts(recorder, language_model, work, stop=checked, **shown_options(options, "recording"))
        done = len(ran.texts)
        if not done:
            raise KeyboardInterrupt  # before the first batch there is nothing to save
        statistics = recorder.statistics()
        results = [partial(statistics.save, options.out)]
        if options.trace is not None:
            results.append(partial(recorder.trace().save, options.trace))
        unsaved = [(write, error) for write in results if (error := save(write)) is not None]
    for write, error in unsaved:
        save_when_there_is_room(write, error)
    tokens = statistics.tokens().max(axis=1)
    data = {
        "out": options.out,
        "groups": dict(zip(statistics.groups, tokens.tolist(), strict=True)),
        "layers": len(statistics.layers),
        "experts": list(statistics.num_experts),
        "sequences": statistics.sequences().tolist(),
        "texts": done,
        "cut": ran.cut,
        "trace": options.trace,
        "interrupted": done < len(work),
    }
    written = f"written to {options.out}" + (f" and {options.trace}" if options.trace is not None else "")
    text = "\n".join(filter(None, (repr(statistics), ran.note, written)))
    if done < len(work):
        text += f"\ninterrupted: these are {done} of {len(work)} texts"
    return Answer(data, text, code=INTERRUPTED if done < len(work) else 0)


def asked_for(options: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """What to record, as arguments of `record`."""
    return {
        "sequences": not options.no_sequences,
        "trace": options.trace is not None and (options.trace_layers or True),
        "consistency": options.consistency,
        "pairs": options.pairs,
        "expert_outputs": options.expert_outputs,
        "hidden": options.hidden,
        "special_tokens": list(tokenizer.all_special_ids) if options.no_special_tokens else True,
    }
