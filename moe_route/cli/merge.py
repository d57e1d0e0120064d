"""`moe-route merge`: merge fine-tunes of one base, or measure how far each was moved from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command

_METHODS = ("linear", "task_arithmetic", "ties", "dare", "pcb", "widen")
_SWAPS = ("layers", "experts")
# Options of every way to merge; `difference` takes none.
_TAKES: dict[str, set[str]] = {
    "difference": set(),
    "layers": {"bottom", "top", "transition", "others"},
    "experts": {"selection", "router", "others"},
    "linear": {"weights"},
    "task_arithmetic": {"weights", "density"},
    "ties": {"weights", "density"},
    "dare": {"weights", "density", "seed"},
    "pcb": {"ratio", "scale"},
    "widen": set(),
}
_OPTIONS = sorted(set[str]().union(*_TAKES.values()))


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "merge",
        run,
        "merge fine-tunes of one base, expert by expert",
        "moe-route merge math swahili --method layers --bottom 1 --top 1 --out merged\n"
        "moe-route merge math swahili --base base --method widen --out merged\n"
        "moe-route merge math --base base --method difference --picture change.png",
    )
    parser.add_argument("models", type=Path, nargs="+", metavar="FOLDER", help="checkpoints in safetensors")
    parser.add_argument("--base", type=Path, metavar="FOLDER", help="the model that all were trained from")
    parser.add_argument(
        "--method",
        choices=(*_METHODS, *_SWAPS, "difference"),
        default="linear",
        help="`layers`: outer layers of the second model (a language) in the first (a task); `experts`: the selected "
        "experts of the first model in the second; `difference` writes no model (default: linear)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new folder for the merged checkpoint")
    parser.add_argument("--weights", type=_floats, metavar="W,W", help="one per model")
    parser.add_argument("--density", type=float, metavar="SHARE", help="share of each difference that is kept")
    parser.add_argument("--ratio", type=float, metavar="SHARE", help="of pcb: share of the parameters that is kept")
    parser.add_argument("--scale", type=float, metavar="X", help="of pcb: factor of the merged difference")
    parser.add_argument("--seed", type=int, metavar="N", help="of the drawing of dare")
    parser.add_argument("--bottom", type=int, metavar="N", help="of layers: lowest layers from the language")
    parser.add_argument("--top", type=int, metavar="N", help="of layers: highest layers from the language")
    parser.add_argument("--transition", type=int, metavar="N", help="of layers: averaged layers on each side")
    parser.add_argument("--selection", type=Path, metavar="FILE", help="of experts: those that come from the first")
    parser.add_argument(
        "--router", choices=("expert", "a", "b", "average", "base"), help="of experts: where the routers come from"
    )
    parser.add_argument("--others", metavar="MODEL", help="where weights outside of what is swapped come from")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="of difference: draw change by layer and expert")


def run(options: argparse.Namespace) -> Answer:
    given = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    foreign = sorted(given.keys() - _TAKES[options.method])
    if foreign:
        raise ValueError(f"--method {options.method} does not read --{', --'.join(foreign)}: leave it out")
    if options.method == "difference":
        return _difference(options)
    if options.out is None:
        raise ValueError("name the folder for the merged checkpoint: --out FOLDER")
    if options.picture is not None:
        raise ValueError("--picture draws --method difference: leave it out")
    from moe_route.base.files import check_new_folder

    check_new_folder(options.out)  # before anything is read
    merged = _merged(options, given)
    merged.save(options.out)
    size = sum(file.stat().st_size for file in options.out.glob("*.safetensors"))
    data = {"out": options.out, "bytes": size, "recipe": merged.recipe}
    return Answer(data, f"{options.method} of {len(options.models)} models; {size / 2**20:.1f} MiB to {options.out}")


def _merged(options: argparse.Namespace, given: dict[str, Any]) -> Any:
    from moe_route import merging

    if options.method not in _SWAPS:
        return merging.merge(options.models, base=options.base, method=options.method, **given)
    if len(options.models) != 2:
        raise ValueError(f"--method {options.method} takes two models, not {len(options.models)}")
    first, second = options.models
    if options.method == "layers":
        if options.base is not None:
            raise ValueError("--method layers reads no --base: leave it out")
        return merging.swap_layers(task=first, language=second, **given)
    from moe_route.steering import ExpertSelection

    missing = [name for name in ("selection", "router") if name not in given]
    if missing:
        raise ValueError(f"--method experts needs --{' and --'.join(missing)}")
    given["selection"] = ExpertSelection.load(given["selection"])
    return merging.swap_experts(first, second, base=options.base, **given)


def _difference(options: argparse.Namespace) -> Answer:
    from moe_route import merging
    from moe_route.base.table import Table

    if options.base is None or len(options.models) != 1 or options.out is not None:
        raise ValueError("--method difference takes one model and --base, and no --out")
    found = merging.difference(options.models[0], options.base)
    if options.picture is not None:
        from moe_route import plots

        plots.save(plots.weight_change(found), options.picture)
    rows = [(str(layer), f"{value:.2%}") for layer, value in found.by_layer().items()]
    text = str(Table(("layer", "change"), rows)) + (f"\nwritten to {options.picture}" if options.picture else "")
    return Answer(found.to_dict(), text)


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]
