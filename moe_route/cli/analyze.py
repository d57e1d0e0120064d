"""`moe-route analyze`: compute numbers from recordings. A question is a row of a table: functions and their options.

The options of a question are the keyword arguments of its functions, under the same names; a test compares them with
the signatures. What `analyze experts` asks stands in `experts.py`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import moe_route as mr
from moe_route.base.schema import read_text
from moe_route.base.table import Table
from moe_route.cli import experts
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import in_layers, load_language_model, merged_statistics, output, sentences, token_texts
from moe_route.cli.options import (
    Parser,
    add,
    command,
    existing,
    given,
    layers,
    model_arguments,
    positive,
    refuse,
    statistics_arguments,
    table_argument,
    verbs_of,
)

_DIVERGENCE = ("groups", "measure", "pairing", "kind", "by", "top", "correct", "phase")
_PARALLEL = ("groups", "rule", "kind", "center", "neighbors")


@dataclass(frozen=True)
class Variant:
    """One function that a question may ask.

    Attributes:
        function: name in ``moe_route.analysis``.
        takes: its keyword arguments that are options, under the same names.
        also: further options that are read when this function is asked.
    """

    function: str
    takes: tuple[str, ...]
    also: tuple[str, ...] = ()

    @property
    def options(self) -> frozenset[str]:
        return frozenset((*self.takes, *self.also))


@dataclass(frozen=True)
class Question:
    """A command below `analyze`.

    Attributes:
        help, example: for its help.
        add: adds its options.
        run: answers it.
        variants: what it may ask, by the value of ``--of`` or by a name that ``run`` chooses.
    """

    help: str
    example: str
    add: Any
    run: Any
    variants: Mapping[str, Variant] = field(default_factory=dict)

    @property
    def options(self) -> frozenset[str]:
        """The options of all its variants."""
        return frozenset[str]().union(*(variant.options for variant in self.variants.values()))


def add_analyze(verbs: Any) -> None:
    questions = verbs_of(verbs, "analyze", "turn recordings into numbers, selections and plans", title="questions")
    for name, question in QUESTIONS.items():
        parser = command(questions, name, partial(question.run, question), question.help, question.example)
        question.add(parser)
        if name != "experts":  # its table has an option of its own, beside the selection
            table_argument(parser)


def ask(question: Question, options: argparse.Namespace, variant: str, *sources: Any, **more: Any) -> Any:
    """The result of a variant's function; options that only other variants read are refused."""
    asked = question.variants[variant]
    refuse(options, sorted(question.options - asked.options), f"is not for {variant}")
    return getattr(mr.analysis, asked.function)(*sources, **given(options, asked.takes), **more)


def _with_ends(result: Any, level: float | None, table: Any, **more: Any) -> Answer:
    """The answer with a result, and if a level is given, with the ends of its interval; ``table`` shows one end."""
    data, parts = result.to_dict() | more, [repr(result)]
    if level is not None:
        low, high = result.interval(level)
        data |= {"level": level, "low": low, "high": high}
        ends = (("low", low), ("high", high))
        parts += [str(table(end, title=f"{name} end of the {level * 100:g} % interval")) for name, end in ends]
    return _answer(result, data, parts)


def _answer(result: Any, data: dict[str, Any], parts: list[str]) -> Answer:
    return Answer(data, "\n".join(parts), frame=lambda: result.to_pandas())


# ---- divergence, correlation


def _add_divergence_options(parser: Parser) -> None:
    statistics_arguments(parser)
    add(parser, "reference", *_DIVERGENCE, by="pooled: mean over sequences or tokens (default: sequence)")


def _add_divergence(parser: Parser) -> None:
    _add_divergence_options(parser)
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--all-pairs", action="store_true", help="of all pairs of groups")
    shape.add_argument("--shape", action="store_true", help="whether it is lower in the middle layers (U shape)")
    add(parser, "interval", "layers", layers="--all-pairs: layers to look at, counted from 0 (default: all)")
    parser.add_argument("--edge", type=positive, metavar="N", help="--shape: layers at each end (default: a twelfth)")
    parser.add_argument(
        "--middle",
        type=layers,
        metavar="A-B",
        help="--shape: layers of the middle (default: those between the first third and the last)",
    )


def _divergence(question: Question, options: argparse.Namespace) -> Answer:
    from moe_route.analysis.result import by_depth

    name = "--all-pairs" if options.all_pairs else "--shape" if options.shape else "divergence from a reference"
    statistics = merged_statistics(options.files)
    if options.all_pairs:
        matrix = ask(question, options, name, in_layers(statistics, options.layers))

        def rows(ends: Any, title: str) -> Table:
            cells = [[group, *row] for group, row in zip(matrix.groups, ends.tolist(), strict=True)]
            return Table(["", *matrix.groups], cells, title)

        return _with_ends(matrix, options.interval, rows, mean=matrix.mean())
    divergence = ask(question, options, name, statistics, options.reference or "eng_Latn")
    if options.shape:
        return Answer.of(mr.analysis.u_shape(divergence, **given(options, ("edge", "middle"))))
    return _with_ends(divergence, options.interval, partial(by_depth, divergence.groups))


def _add_correlation(parser: Parser) -> None:
    _add_divergence_options(parser)
    add(parser, "scores", "interval", required=("scores",))
    parser.add_argument(
        "--covariates",
        type=existing,
        metavar="FILE",
        help="hold these constant: tab-separated, a line per group, names of the columns in the first line",
    )
    parser.add_argument("--fertility", action="store_true", help="hold constant the tokens per sequence, too")
    parser.add_argument(
        "--blocks", metavar="COLUMN", help="column of --covariates, such as the family, in which scores are exchanged"
    )
    parser.add_argument(
        "--exchange",
        default="within",
        choices=("within", "blocks"),
        help="exchange scores within blocks, or whole blocks of equal size (default: within)",
    )


def _correlation(question: Question, options: argparse.Namespace) -> Answer:
    from moe_route.analysis.inputs import read_scores

    divergence = ask(
        question, options, "correlation", merged_statistics(options.files), options.reference or "eng_Latn"
    )
    columns = {} if options.covariates is None else read_columns(options.covariates)
    blocks = None
    if options.blocks is not None:
        if options.blocks not in columns:
            raise ValueError(
                f"--blocks names a column of --covariates: {', '.join(columns) or 'there is no such file'}"
            )
        blocks = columns.pop(options.blocks)
    if options.fertility:
        tokens = divergence.tokens
        columns["tokens"] = {} if tokens is None else dict(zip(divergence.groups, tokens.tolist(), strict=True))
    result = mr.analysis.correlation(
        divergence, read_scores(options.scores), covariates=columns, blocks=blocks, exchange=options.exchange
    )
    data, parts = result.to_dict(), [repr(result)]
    if options.interval is not None:
        low, high = result.interval(options.interval)
        data |= {"level": options.interval, "low": low, "high": high}
        rows = [[layer, *ends] for layer, ends in enumerate(zip(low.tolist(), high.tolist(), strict=True))]
        title = f"{options.interval * 100:g} % interval of Pearson r"
        parts.append(str(Table(("layer", "low", "high"), rows, title)))
    return _answer(result, data, parts)


def read_columns(path: Path) -> dict[str, dict[str, float | str]]:
    """column -> (group -> value) of a tab-separated table; a column of numbers throughout holds numbers."""
    head, *lines = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
    if len(head) < 2 or any(len(line) != len(head) for line in lines):
        raise ValueError(f"{path} must be a tab-separated table: groups in the first column, names in the first line")
    columns: dict[str, dict[str, float | str]] = {}
    for place, name in enumerate(head[1:], 1):
        values: dict[str, float | str] = {line[0]: line[place] for line in lines}
        with contextlib.suppress(ValueError):  # labels
            values = {group: float(value) for group, value in values.items()}
        columns[name] = values
    return columns


# ---- measures by layer


def _add_layers(parser: Parser) -> None:
    statistics_arguments(parser)
    parser.add_argument(
        "--of",
        required=True,
        choices=("entropy", "consistency", "load-balance", "narrowing", "specialization"),
        help="how spread the routing is, how alike the tokens of a sequence route (record --consistency), how evenly "
        "choices are spread over experts, how far experts narrow towards the last layers against a reference, or how "
        "much the expert tells of the language",
    )
    add(
        parser,
        *("groups", "reference", "phase", "by", "pool", "interval"),
        reference="narrowing: group to compare with (default: eng_Latn)",
        by="load-balance, narrowing: mean over these (default: token)",
    )
    add(
        parser,
        "kind",
        kind="entropy, narrowing: of all scores, of the chosen experts' weights, or of choices (default: full)",
    )
    parser.add_argument(
        "--correct", choices=("miller_madow", "jackknife"), help="entropy: correct for short texts; needs --kind count"
    )
    parser.add_argument("--normalized", action="store_true", help="entropy: divide by log E, so that uniform is 1")


def _layers(question: Question, options: argparse.Namespace) -> Answer:
    result = ask(question, options, options.of, merged_statistics(options.files))
    if options.of == "specialization":
        rows = [[layer, value] for layer, value in enumerate(result.tolist())]
        return Answer({"specialization": result.tolist()}, str(Table(("layer", "specialization"), rows)))
    if options.of != "entropy":
        return Answer.of(result)
    from moe_route.analysis.result import by_depth

    data, parts = result.to_dict(), [repr(result)]
    if options.normalized:
        present = [name for name in ("token", "sequence") if getattr(result, name) is not None]
        values = {name: result.normalized(name) for name in present}
        data["normalized"] = values
        parts = [str(by_depth(result.groups, rows, title=f"{name} entropy / log E")) for name, rows in values.items()]
    if options.interval is not None:
        data["level"] = options.interval
        kinds = ("token", "sequence", "gap")
        for of in kinds if result.token_values is not None else kinds[1:2]:
            low, high = result.interval(options.interval, of=of)
            data |= {f"{of}_low": low, f"{of}_high": high}
            what = of if of == "gap" else f"{of} entropy"
            for name, ends in (("low", low), ("high", high)):
                title = f"{what} (nats), {name} end of the {options.interval * 100:g} % interval"
                parts.append(str(by_depth(result.groups, ends, title=title)))
    return _answer(result, data, parts)


# ---- pairs of experts, sizes of their outputs


def _add_pairs(parser: Parser) -> None:
    statistics_arguments(parser)
    parser.add_argument("--next", action="store_true", help="from the expert of a layer to that of the next")
    add(parser, "groups")


def _pairs(question: Question, options: argparse.Namespace) -> Answer:
    variant = "--next" if options.next else "one layer"
    return Answer.of(ask(question, options, variant, merged_statistics(options.files)))


def _add_saliency(parser: Parser) -> None:
    statistics_arguments(parser)
    add(parser, "groups", "pool")


def _saliency(question: Question, options: argparse.Namespace) -> Answer:
    return Answer.of(ask(question, options, "saliency", merged_statistics(options.files)))


# ---- single tokens


def _add_tokens(parser: Parser) -> None:
    parser.add_argument("trace", type=existing, metavar="TRACE", help="trace file, from moe-route record --trace")
    parser.add_argument(
        "--of",
        required=True,
        choices=("paths", "vocabulary", "class-routing", "local-consistency", "saturation", "predict"),
        help="the experts that tokens visit layer after layer; how far experts specialize on token ids; how "
        "differently each class of tokens is routed; how well one set of experts serves consecutive tokens; how many "
        "of the final checkpoint's experts an earlier one already chose; how well a token's id, the one before it, its "
        "language and position predict its experts",
    )
    add(parser, "layers", "groups", "phase", "tokenizer")
    parser.add_argument("--window", type=positive, metavar="N", help="paths: runs of N layers (default: all together)")
    parser.add_argument("--k", type=positive, metavar="K", help="paths: experts per layer of a path (default: 1)")
    parser.add_argument(
        "--min-tokens",
        type=positive,
        metavar="N",
        help="paths: tokens of a path that counts for purity (default: 5); vocabulary: of an id (default: 10)",
    )
    parser.add_argument(
        "--classes",
        choices=("script", "start"),
        help="class-routing, paths: script, digits, punctuation, ..., or start and inside of words; needs --tokenizer "
        "(class-routing: script by default; paths: purity by class instead of group)",
    )
    parser.add_argument(
        "--token", choices=("input", "next"), help="vocabulary: a token's own id, or the next one (default: input)"
    )
    parser.add_argument(
        "--segment", type=positive, metavar="M", help="local-consistency: consecutive tokens (default: 16)"
    )
    parser.add_argument(
        "--final", type=existing, metavar="TRACE", help="saturation: trace of the final checkpoint, over the same texts"
    )


def _tokens(question: Question, options: argparse.Namespace) -> Answer:
    trace = mr.Trace.load(options.trace)
    more: dict[str, Any] = {}
    sources: tuple[Any, ...] = (trace,)
    if options.of == "saturation":
        if options.final is None:
            raise ValueError("saturation compares two checkpoints: name the trace of the later one with --final")
        sources = (trace, mr.Trace.load(options.final))
    elif options.of == "class-routing":
        sources = (trace, _classes(options.tokenizer, options.classes or "script"))
    elif options.of == "predict":
        more = {} if options.tokenizer is None else {"names": token_texts(options.tokenizer)[0]}
    elif options.of == "vocabulary":
        names = None if options.tokenizer is None else token_texts(options.tokenizer)[0]
        more = {"names": names} | ({} if options.token is None else {"of": options.token})
    elif options.of == "paths" and options.classes is not None:
        more = {"classes": _classes(options.tokenizer, options.classes)}
    return Answer.of(ask(question, options, options.of, *sources, **more))


def _classes(tokenizer: str | None, by: Any) -> tuple[str, ...]:
    if tokenizer is None:
        raise ValueError("classes of tokens are read from their texts: pass --tokenizer")
    texts, special = token_texts(tokenizer)
    return mr.analysis.token_classes(texts, by=by, special=special)


# ---- checkpoints, runs


def _add_compare(parser: Parser) -> None:
    statistics_arguments(
        parser, "two recordings of the same texts, or more checkpoints in order, or two files of answers"
    )
    add(
        parser,
        "groups",
        "kind",
        "phase",
        "reference",
        "picture",
        reference="a series, answers: compare without it, with it",
    )


def _compare(question: Question, options: argparse.Namespace) -> Answer:
    from dataclasses import replace

    if options.files[0].suffix == ".jsonl":
        if len(options.files) > 2:
            raise ValueError("outcomes are of one file of answers (in a language and in the reference), or of two")
        answers = [mr.analysis.read_answers(path) for path in options.files]
        return Answer.of(ask(question, options, "answers", *answers))
    if len(options.files) < 2:
        raise ValueError("a comparison needs two recordings or more: name them in the order of training")
    output(options.picture, options.out)
    recordings = [mr.RoutingStatistics.load(path) for path in options.files]
    if len(recordings) == 2:
        result = ask(question, options, "two recordings", *recordings)
    else:
        names = dict(zip((path.stem for path in options.files), recordings, strict=True))
        if len(names) < len(recordings):
            raise ValueError("two files have one name, by which checkpoints are told apart: rename one")
        result = ask(question, options, "a series", names)
    answer = Answer.of(result)
    if options.picture is None:
        return answer
    drawn = mr.plots.checkpoints(result) if len(recordings) > 2 else mr.plots.compared(result)
    mr.plots.save(drawn, options.picture)
    text = f"{answer.text}\nwritten to {options.picture}"
    return replace(answer, data={**answer.data, "picture": options.picture}, text=text)


# ---- selections, geometry


def _add_overlap(parser: Parser) -> None:
    parser.add_argument(
        "files",
        type=existing,
        nargs="+",
        metavar="SELECTION",
        help="selections, as `analyze experts --out` writes them",
    )
    add(parser, "layers", "num_experts", "picture")


def _overlap(question: Question, options: argparse.Namespace) -> Answer:
    from dataclasses import replace

    output(options.picture, options.out)
    stems = [path.stem for path in options.files]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in options.files]
    if len(set(names)) < len(names):
        raise ValueError("a selection is named twice: name each file once")
    selections = {name: mr.ExpertSelection.load(path) for name, path in zip(names, options.files, strict=True)}
    result = ask(question, options, "overlap", selections)
    answer = Answer.of(result)
    if options.picture is None:
        return answer
    mr.plots.save(mr.plots.overlap(result), options.picture)
    text = f"{answer.text}\nwritten to {options.picture}"
    return replace(answer, data={**answer.data, "picture": options.picture}, text=text)


def _add_geometry(parser: Parser) -> None:
    statistics_arguments(parser)
    add(parser, "reference", "groups")
    parser.add_argument(
        "--weights", action="store_true", help="load the model, and split hidden states by what its routers see"
    )
    parser.checks.append(_refuse_model_without_weights)  # before the model gets its default
    model_arguments(parser, positional=False)


def _refuse_model_without_weights(options: argparse.Namespace) -> None:
    if not options.weights:
        refuse(options, ("model", "device", "device_map", "dtype", "engine"), "is for --weights")
        options.model = "demo"  # not read, so the environment is not asked either


def _geometry(question: Question, options: argparse.Namespace) -> Answer:
    weights = None
    statistics = merged_statistics(options.files)
    if options.weights:
        with load_language_model(options).attach(options.engine) as routed:
            weights = mr.experiments.router_weights(routed)
    return Answer.of(ask(question, options, "geometry", statistics, options.reference or "eng_Latn", weights=weights))


# ---- parallel sentences


def _add_similarity(parser: Parser) -> None:
    statistics_arguments(parser, "vectors, or statistics; several statistics are added up")
    add(parser, *(name for name in _PARALLEL if name != "kind"))
    parser.add_argument(
        "--kind",
        choices=("full", "topk", "count", "hidden"),
        help="of statistics: scores over all experts, weights of the chosen ones, how often they are chosen, or inputs "
        "of the routers (record --hidden); default: full",
    )
    add(
        parser,
        "reference",
        "layers",
        "scores",
        reference="how well sentences find their translation in this language (default: compare all pairs)",
        layers="layers to look at, counted from 0, which is the embedding in vectors (default: all)",
        scores="--reference: correlate with a score per group, as for analyze correlation",
    )
    parser.add_argument(
        "--accuracy", type=float, metavar="X", help="--reference, mexa: estimate accuracies from that of the reference"
    )
    parser.add_argument("--clusters", type=positive, metavar="N", help="cut the tree of languages into N clusters")
    parser.add_argument(
        "--tree",
        choices=("complete", "average", "single"),
        help="distance of two clusters in the tree of languages (default: complete)",
    )
    parser.add_argument("--target", metavar="GROUP", help="name the language that is most similar to this one")
    parser.add_argument(
        "--compare", type=existing, metavar="FILE", help="correlate with a tab-separated matrix, such as published ones"
    )


def _similarity(question: Question, options: argparse.Namespace) -> Answer:
    source = in_layers(sentences(options.files), options.layers)
    if options.reference is not None:
        return _alignment(question, options, source)
    result = ask(question, options, "all pairs", source)
    method = options.tree or "complete"
    data, parts = result.to_dict() | {"order": result.order(method=method)}, [repr(result)]
    if options.clusters is not None:
        data["clusters"] = result.clusters(options.clusters, method=method)
        parts += [f"cluster {number}: {', '.join(one)}" for number, one in enumerate(data["clusters"], 1)]
    if options.target is not None:
        data["source"] = result.best_source(options.target)
        parts.append(f"most similar to {options.target}: {data['source']}")
    if options.compare is not None:
        compared = result.compare(options.compare)
        data["compared"] = compared.to_dict()
        parts.append(repr(compared))
    return _answer(result, data, parts)


def _alignment(question: Question, options: argparse.Namespace, source: Any) -> Answer:
    from moe_route.analysis.inputs import read_scores

    result = ask(question, options, "--reference", source, options.reference)
    data, parts = result.to_dict() | {"ranking": list(result.ranking())}, [repr(result)]
    if options.accuracy is not None:
        data["estimates"] = result.estimate(options.accuracy)
        rows = [[name, value] for name, value in data["estimates"].items()]
        title = f"Estimated accuracy: {options.accuracy:g} in {result.reference}, times the mean over layers"
        parts.append(str(Table(("group", "estimate"), rows, title)))
    if options.scores is not None:
        correlation = mr.analysis.correlation(result, read_scores(options.scores))
        data["correlation"] = correlation.to_dict()
        parts.append(repr(correlation))
    return _answer(result, data, parts)


_OF_TOKENS = ("layers", "groups", "phase")
QUESTIONS: Mapping[str, Question] = {
    "divergence": Question(
        "how far each group's routing is from a reference, by layer; --shape: is it a U; --all-pairs: of all pairs",
        "moe-route analyze divergence general.safetensors --reference eng_Latn --correct floor --interval 0.95",
        _add_divergence,
        _divergence,
        {
            "divergence from a reference": Variant("divergence", _DIVERGENCE, ("reference", "interval")),
            "--shape": Variant("divergence", _DIVERGENCE, ("reference", "edge", "middle")),
            "--all-pairs": Variant("divergence_matrix", _DIVERGENCE, ("layers", "interval")),
        },
    ),
    "layers": Question(
        "entropy, consistency within sequences, balance of the load, narrowing, specialization, by layer",
        "moe-route analyze layers general.safetensors --of entropy --normalized",
        _add_layers,
        _layers,
        {
            "entropy": Variant("entropy", ("groups", "phase", "kind", "correct"), ("normalized", "interval")),
            "consistency": Variant("consistency", ("groups",)),
            "load-balance": Variant("load_balance", ("groups", "phase", "by", "pool")),
            "narrowing": Variant("narrowing", ("reference", "groups", "phase", "kind", "by")),
            "specialization": Variant("specialization", ("groups", "phase")),
        },
    ),
    "pairs": Question(
        "experts that tokens choose together in a layer; --next: one after the other",
        "moe-route analyze pairs pairs.safetensors --groups eng_Latn",
        _add_pairs,
        _pairs,
        {"one layer": Variant("coactivation", ("groups",)), "--next": Variant("transitions", ("groups",))},
    ),
    "tokens": Question(
        "questions to a trace: paths, vocabulary, class routing, local consistency, saturation, prediction",
        "moe-route analyze tokens trace.safetensors --of paths --layers 2-5",
        _add_tokens,
        _tokens,
        {
            "paths": Variant("paths", (*_OF_TOKENS, "window", "k", "min_tokens"), ("classes", "tokenizer")),
            "vocabulary": Variant("vocabulary", (*_OF_TOKENS, "min_tokens"), ("token", "tokenizer")),
            "class-routing": Variant("class_routing", _OF_TOKENS, ("classes", "tokenizer")),
            "local-consistency": Variant("local_consistency", (*_OF_TOKENS, "segment")),
            "saturation": Variant("saturation", ("layers", "groups"), ("final",)),
            "predict": Variant("predict", _OF_TOKENS, ("tokenizer",)),
        },
    ),
    "experts": Question(
        "experts of a task, a language or a behavior, by one of several rules",
        "moe-route analyze experts task.safetensors --baseline general.safetensors --group eng_Latn \\\n"
        "    --layers 2-5 --plan plan.safetensors",
        experts.add_options,
        lambda question, options: experts.run(options),
    ),
    "saliency": Question(
        "how much each expert adds to the tokens routed to it (REAP; record --expert-outputs)",
        "moe-route record --expert-outputs --out general.safetensors\n"
        "moe-route analyze saliency general.safetensors --pool",
        _add_saliency,
        _saliency,
        {"saliency": Variant("saliency", ("groups", "pool"))},
    ),
    "compare": Question(
        "how far routing moved between checkpoints, fine-tunes or quantized models; or outcomes of answers",
        "moe-route analyze compare base.safetensors tuned.safetensors --groups eng_Latn\n"
        "moe-route analyze compare results/evaluate/base.jsonl results/evaluate/steered.jsonl",
        _add_compare,
        _compare,
        {
            "two recordings": Variant("compare", ("groups", "kind"), ("picture",)),
            "a series": Variant("checkpoint_series", ("groups", "reference", "phase"), ("picture",)),
            "answers": Variant("outcomes", ("reference",)),
        },
    ),
    "overlap": Question(
        "how far selections of experts overlap, against chance",
        "moe-route analyze overlap task.json multilingual.json --layers 2-5",
        _add_overlap,
        _overlap,
        {"overlap": Variant("overlap", ("layers", "num_experts"))},
    ),
    "geometry": Question(
        "similarity of hidden states beside the divergence of routing (record --hidden)",
        "moe-route record --hidden --out general.safetensors\n"
        "moe-route analyze geometry general.safetensors --reference eng_Latn --weights",
        _add_geometry,
        _geometry,
        {"geometry": Variant("geometry", ("groups",), ("reference",))},
    ),
    "similarity": Question(
        "how alike languages are and which of them cluster; --reference: how well sentences find their translation",
        "moe-route analyze similarity general.safetensors --layers 2-5 --clusters 3\n"
        "moe-route analyze similarity vectors.safetensors --reference eng_Latn --rule mexa",
        _add_similarity,
        _similarity,
        {
            "all pairs": Variant("similarity", _PARALLEL, ("layers", "tree", "clusters", "target", "compare")),
            "--reference": Variant("alignment", _PARALLEL, ("layers", "reference", "accuracy", "scores")),
        },
    ),
    "correlation": Question(
        "whether groups that are routed like the reference score better, by layer",
        "moe-route analyze correlation general.safetensors --scores accuracy.tsv --covariates table.tsv --fertility",
        _add_correlation,
        _correlation,
        {"correlation": Variant("divergence", _DIVERGENCE)},
    ),
}
"""The commands below `analyze`, by name."""
