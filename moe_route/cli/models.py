"""`moe-route prune | upcycle | merge`: write a model that is made from others."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moe_route as mr
from moe_route.base.table import Table
from moe_route.cli.answer import Answer
from moe_route.cli.inputs import (
    attached_model,
    is_selection,
    load_language_model,
    merged_statistics,
    output,
    quiet_libraries,
    shown_options,
    texts,
)
from moe_route.cli.options import (
    TABLES,
    Parser,
    add,
    command,
    existing,
    given,
    made_by_a_model,
    model_arguments,
    names,
    numbers,
    out_argument,
    positive,
    refuse,
    text_arguments,
    writable,
)
from moe_route.cli.saving import resumed
from moe_route.runs.job import made_folder

if TYPE_CHECKING:
    from moe_route.runs.lines import KeptRuns

CRITERIA = ("reap", "frequency", "difference", "random")
_OF_MODEL = ("model", "device", "device_map", "dtype", "engine", "any_model")
_OF_TEXTS = ("data", "columns", "quotes", "split", "languages", "limit", "batch_size", "max_length")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# ---- prune


def add_prune(verbs: Any) -> None:
    parser = command(
        verbs,
        "prune",
        run_prune,
        "choose experts to drop, measure what that costs, or write a model without them",
        "moe-route record --expert-outputs --out general.safetensors\n"
        "moe-route prune general.safetensors --keep 0.75,0.5 --measure --data arithmetic\n"
        "moe-route prune general.safetensors --keep 0.5 --selection dropped.json\n"
        "moe-route prune dropped.json --out smaller",
    )
    parser.add_argument(
        "files",
        type=existing,
        nargs="+",
        metavar="FILE",
        help="statistics by which experts are chosen (several are added up), or a selection of experts to drop",
    )
    parser.add_argument("--keep", type=numbers, metavar="X[,Y]", help="share of the experts to keep")
    parser.add_argument(
        "--criterion",
        type=_criteria,
        metavar="A[,B]",
        help=f"what an expert is worth: {', '.join(CRITERIA)} (default: reap; --measure: reap,frequency,random)",
    )
    add(parser, "group", "reference", "allocation", "seed", "resamples")
    parser.add_argument("--n-group", type=positive, metavar="N", help="router groups of the model (default: 1)")
    parser.add_argument("--topk-group", type=positive, metavar="N", help="router groups per token (default: 1)")
    what = parser.add_argument_group("what is made (default: the experts to drop are shown)")
    what.add_argument("--measure", action="store_true", help="loss of texts against the share of experts kept")
    what.add_argument("--selection", type=writable, metavar="FILE", help="write the selection of experts to drop")
    out_argument(
        what, "new folder for the smaller model; --measure: a table, or a folder that is resumed", metavar="FOLDER|FILE"
    )
    what.add_argument("--any-model", action="store_true", help="the model may be another than the experts are of")
    made_by_a_model(parser, "prune")
    parser.checks.append(_refuse_ignored)  # before texts and model get their defaults
    model_arguments(parser, positional=False)
    text_arguments(parser)


def _criteria(text: str) -> tuple[str, ...]:
    listed = names(text)
    if not listed or not set(listed) <= set(CRITERIA):
        raise argparse.ArgumentTypeError(f"{text!r}: write some of {', '.join(CRITERIA)}")
    return listed


def _refuse_ignored(options: argparse.Namespace) -> None:
    if not options.measure:
        refuse(options, (*_OF_TEXTS, "engine"), "is for --measure")
        options.data = "general"  # not read, so the environment is not asked either
        if options.out is None:
            refuse(options, _OF_MODEL, "is for --measure, or for the model that --out makes smaller")
            options.model = "demo"  # nor is it for a model
        return
    refuse(options, ("selection", "resamples", "n_group", "topk_group", "any_model"), "is not for --measure")


def run_prune(options: argparse.Namespace) -> Answer:
    if options.measure:
        return _measured(options)

    output(options.selection)
    if is_selection(options.files):
        choices = ("keep", "criterion", "group", "reference", "allocation", "resamples", "n_group", "topk_group")
        refuse(options, choices, "chooses experts, and a selection has them")
        dropped = mr.ExpertSelection.load(options.files[0])
        text = [repr(dropped)]
        data: dict[str, Any] = {"dropped": dropped.to_dict()}
    else:
        dropped, data, text = _chosen(options)
    if options.selection is not None:
        dropped.save(options.selection)
        text.append(f"written to {options.selection}")
    if options.out is not None:
        made, size = _write_pruned(options, dropped), _size(options.out)
        data |= {"out": options.out, "bytes": size}
        dropping = f"{len(dropped)} experts dropped; {size / 2**20:.1f} MiB written to {options.out}"
        text.append(dropping if made else f"kept: this same command made {options.out}")
    return Answer(data, "\n".join(text))


def _chosen(options: argparse.Namespace) -> tuple[Any, dict[str, Any], list[str]]:
    """The experts to drop, by the statistics."""
    if options.keep is None or len(options.keep) != 1 or len(options.criterion or ("",)) != 1:
        raise ValueError("name one share of experts to keep (--keep 0.5), and one --criterion; --measure takes several")
    statistics = merged_statistics(options.files)
    shared = {"keep": options.keep[0]} | given(options, ("group", "allocation", "seed", "n_group", "topk_group"))
    criterion: Any = (options.criterion or ("reap",))[0]
    dropped = mr.analysis.prune(statistics, criterion=criterion, reference=options.reference, **shared)
    data: dict[str, Any] = {"dropped": dropped.to_dict()}
    text = [repr(dropped)]
    if options.resamples is not None:
        stability = mr.analysis.pruning_stability(statistics, resamples=options.resamples, **shared)
        data["stability"] = stability.to_dict()
        text.append(repr(stability))
    return dropped, data, text


def _write_pruned(options: argparse.Namespace, dropped: Any) -> bool:
    """Write the smaller model; False if this same command made it before."""
    inputs = {"model": options.model, "dropped": {str(layer): sorted(of) for layer, of in dropped.items()}}
    cut = dict(dropped) if options.any_model else dropped
    with made_folder(options.out, "prune", inputs, force=options.force) as inside:
        if inside is not None:
            language_model = load_language_model(options)
            mr.experiments.export_pruned(language_model.model, cut, inside, tokenizer=language_model.tokenizer)
    return inside is not None


def _measured(options: argparse.Namespace) -> Answer:
    if options.out is not None and options.out.suffix not in (*TABLES, ""):
        raise ValueError(
            f"--measure keeps a table, or a folder, and {options.out} is neither: write {', '.join(TABLES)}"
        )
    statistics, chosen = merged_statistics(options.files), texts(options)
    asked = {
        "criteria": options.criterion or ("reap", "frequency", "random"),
        "keep": options.keep or (0.75, 0.5, 0.25),
        **given(options, ("group", "reference", "allocation", "seed")),
    }

    def measured(kept: KeptRuns | None) -> Answer:
        with attached_model(options) as (language_model, routed):
            how = {**asked, **shown_options(options), "routed": routed, "kept": kept}
            return Answer.of(mr.experiments.pruning_curve(language_model, chosen, statistics, **how))

    read = [hashlib.sha256(path.read_bytes()).hexdigest() for path in options.files]
    return resumed(options, "prune", {"measure": True, "statistics": read, **asked}, chosen, measured)


# ---- upcycle


def add_upcycle(verbs: Any) -> None:
    parser = command(
        verbs,
        "upcycle",
        run_upcycle,
        "turn a dense model into a sparse one with an expert per language family",
        "moe-route upcycle dense --languages eng_Latn,deu_Latn,swh_Latn --out sparse --plan families.json",
    )
    parser.add_argument("named", metavar="MODEL", help="folder or hub name of a dense model")
    parser.add_argument(
        "--languages", type=names, metavar="A,B", help="languages, which get the published families (arXiv 2410.10626)"
    )
    parser.add_argument("--families", type=existing, metavar="FILE", help="families of your own: JSON, group -> family")
    add(parser, "layers", layers="layers of the model, counted from 0 (default: the last two)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2)")
    parser.add_argument("--renormalize", choices=("sum", "none"), default="sum", help="of the weights (default: sum)")
    parser.add_argument("--fixed-by-label", action="store_true", help="with --top-k 1: a group's own expert, always")
    parser.add_argument("--noise", type=float, default=0.0, metavar="X", help="on the copies, relative (default: 0)")
    add(parser, "seed", "dtype")
    out_argument(parser, "folder for the sparse checkpoint", required=True, metavar="FOLDER")
    parser.add_argument("--plan", type=writable, metavar="FILE", help="write the family plan, for training")
    made_by_a_model(parser, "upcycle")


def run_upcycle(options: argparse.Namespace) -> Answer:
    from moe_route.base import schema

    if (options.languages is None) == (options.families is None):
        raise ValueError("give either --languages or --families")
    if options.families is not None:
        families = schema.read(Mapping[str, str | int], schema.load_json(options.families), str(options.families))
    else:
        families = mr.data.families_of(options.languages)
    how = {
        name: getattr(options, name) for name in ("layers", "top_k", "renormalize", "fixed_by_label", "noise", "seed")
    }
    quiet_libraries()
    inputs = {"model": options.named, "families": families, "dtype": options.dtype, **how}
    with made_folder(options.out, "upcycle", inputs, force=options.force) as folder:
        if folder is None:
            if options.plan is not None and not options.plan.exists():
                raise ValueError(
                    f"{options.out} was made before, and its plan is not kept there: --force makes both again"
                )
            return Answer({"out": options.out, "made": False}, f"kept: this same command made {options.out}")
        data, lines = _upcycled(options, families, how, folder)
    return Answer(data, "\n".join([*lines, f"written to {options.out}"]))


def _upcycled(
    options: argparse.Namespace, families: Any, how: dict[str, Any], folder: Path
) -> tuple[dict[str, Any], list[str]]:
    dense = mr.LanguageModel.load(options.named, dtype=options.dtype)
    made: Any = mr.training.upcycle(dense.model, families=families, **how)
    made.model.save_pretrained(folder)
    dense.tokenizer.save_pretrained(folder)
    if options.plan is not None:
        made.plan.save(options.plan)
    shape = made.model.config.moe_route_upcycling
    of_expert: dict[int, list[str]] = {}
    for group, expert in shape["families"].items():
        of_expert.setdefault(expert, []).append(group)
    lines = [
        f"{type(dense.model).__name__} -> {type(made.model).__name__}, layers {', '.join(map(str, shape['layers']))}: "
        f"{shape['num_experts']} experts, top-{shape['top_k']}",
        *(f"  expert {expert}: {', '.join(groups)}" for expert, groups in sorted(of_expert.items())),
    ]
    if options.plan is not None:
        lines.append(f"plan for training written to {options.plan}")
    return {"out": options.out, "plan": options.plan, "class": type(made.model).__name__, **shape}, lines


# ---- merge

_METHODS = ("linear", "task_arithmetic", "ties", "dare", "pcb", "widen")
_SWAPS = ("layers", "experts")
# Options of every way to merge; `difference` takes none.
_TAKES: dict[str, set[str]] = {
    "difference": set(),
    "layers": {"bottom", "top", "transition", "others"},
    "experts": {"selection", "router", "others"},
    "linear": {"weights"},
    "task_arithmetic": {"weights", "density"},
    "ties": {"weights", "density", "trim"},
    "dare": {"weights", "density", "seed"},
    "pcb": {"ratio", "scale"},
    "widen": set(),
}
_OPTIONS = sorted(set[str]().union(*_TAKES.values()))


def add_merge(verbs: Any) -> None:
    parser = command(
        verbs,
        "merge",
        run_merge,
        "merge fine-tunes of one base, expert by expert",
        "moe-route merge math swahili --method layers --bottom 1 --top 1 --out merged\n"
        "moe-route merge math swahili --base base --method widen --out merged\n"
        "moe-route merge math --base base --method difference --picture change.png",
    )
    parser.add_argument("models", type=existing, nargs="+", metavar="FOLDER", help="checkpoints in safetensors")
    parser.add_argument("--base", type=existing, metavar="FOLDER", help="the model that all were trained from")
    parser.add_argument(
        "--method",
        choices=(*_METHODS, *_SWAPS, "difference"),
        default="linear",
        help="`layers`: outer layers of the second model (a language) in the first (a task); `experts`: the selected "
        "experts of the first model in the second; `difference` writes no model (default: linear)",
    )
    out_argument(parser, "new folder for the merged checkpoint; difference: .csv, .json, .parquet", metavar="FOLDER")
    made_by_a_model(parser, "merge")
    _add_methods(parser)


def _add_methods(parser: Parser) -> None:
    parser.add_argument("--weights", type=numbers, metavar="W,W", help="one per model")
    parser.add_argument("--density", type=float, metavar="SHARE", help="share of each difference that is kept")
    parser.add_argument(
        "--trim", choices=("matrix", "model"), help="of ties: keep that share of each matrix, or of the whole model"
    )
    parser.add_argument("--ratio", type=float, metavar="SHARE", help="of pcb: share of the parameters that is kept")
    parser.add_argument("--scale", type=float, metavar="X", help="of pcb: factor of the merged difference")
    parser.add_argument("--seed", type=int, metavar="N", help="of the drawing of dare")
    parser.add_argument("--bottom", type=int, metavar="N", help="of layers: lowest layers from the language")
    parser.add_argument("--top", type=int, metavar="N", help="of layers: highest layers from the language")
    parser.add_argument("--transition", type=int, metavar="N", help="of layers: averaged layers on each side")
    add(parser, "selection", "picture", selection="of experts: those that come from the first")
    parser.add_argument(
        "--router", choices=("expert", "a", "b", "average", "base"), help="of experts: where the routers come from"
    )
    parser.add_argument("--others", metavar="MODEL", help="where weights outside of what is swapped come from")


def run_merge(options: argparse.Namespace) -> Answer:
    chosen = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    foreign = sorted(chosen.keys() - _TAKES[options.method])
    if foreign:
        raise ValueError(f"--method {options.method} does not read --{', --'.join(foreign)}: leave it out")
    if options.method == "difference":
        return _difference(options)
    if options.out is None:
        raise ValueError("name the folder for the merged checkpoint: --out FOLDER")
    if options.picture is not None:
        raise ValueError("--picture draws --method difference: leave it out")
    inputs = {
        "models": [str(path) for path in options.models],
        "base": None if options.base is None else str(options.base),
        "method": options.method,
        **{name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()},
    }
    with made_folder(options.out, "merge", inputs, force=options.force) as inside:
        if inside is None:
            return Answer({"out": options.out, "made": False}, f"kept: this same command made {options.out}")
        merged = _merged(options, chosen)
        merged.save(inside)
    size = _size(options.out)
    data = {"out": options.out, "bytes": size, "recipe": merged.recipe}
    return Answer(data, f"{options.method} of {len(options.models)} models; {size / 2**20:.1f} MiB to {options.out}")


def _merged(options: argparse.Namespace, chosen: dict[str, Any]) -> Any:
    if options.method not in _SWAPS:
        if "weights" in chosen:
            chosen["weights"] = list(chosen["weights"])
        return mr.merging.merge(options.models, base=options.base, method=options.method, **chosen)
    if len(options.models) != 2:
        raise ValueError(f"--method {options.method} takes two models, not {len(options.models)}")
    first, second = options.models
    if options.method == "layers":
        if options.base is not None:
            raise ValueError("--method layers reads no --base: leave it out")
        return mr.merging.swap_layers(task=first, language=second, **chosen)

    missing = [name for name in ("selection", "router") if name not in chosen]
    if missing:
        raise ValueError(f"--method experts needs --{' and --'.join(missing)}")
    chosen["selection"] = mr.ExpertSelection.load(chosen["selection"])
    return mr.merging.swap_experts(first, second, base=options.base, **chosen)


def _difference(options: argparse.Namespace) -> Answer:
    if options.base is None or len(options.models) != 1:
        raise ValueError("--method difference takes one model and --base")
    if options.out is not None and options.out.suffix not in (".csv", ".json", ".parquet"):
        raise ValueError(f"--method difference writes no model, and {options.out} is no table: leave --out out")
    change = mr.merging.difference(options.models[0], options.base)
    if options.picture is not None:
        from moe_route import plots

        plots.save(plots.weight_change(change), options.picture)
    rows = [(str(layer), f"{value:.2%}") for layer, value in change.by_layer().items()]
    text = str(Table(("layer", "change"), rows)) + (f"\nwritten to {options.picture}" if options.picture else "")
    return Answer(change.to_dict(), text, frame=lambda: change.to_pandas())
