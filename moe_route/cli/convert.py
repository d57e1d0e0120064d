"""`moe-route convert`: read recordings of other programs, and write what other programs read."""

from __future__ import annotations

import argparse
from typing import Any

import moe_route as mr
from moe_route.base.table import table
from moe_route.cli.answer import Answer
from moe_route.cli.experts import KINDS
from moe_route.cli.inputs import output
from moe_route.cli.options import add, command, existing, layers, out_argument, positive

# Options of formats: passed on if they are given. The format refuses those that it does not take.
# option -> keyword of `convert.read`
_OPTIONS = {
    "group": "group",
    "top_k": "top_k",
    "num_experts": "num_experts",
    "num_layers": "num_layers",
    "layers": "layers",
    "first_layer": "first_layer",
    "tolerance": "tolerance",
    "activate": "activate",
    "deactivate": "deactivate",
    "reverse": "reverse",
    "kind": "action",
    "strength": "strength",
    "top_p": "top_p",
    "scores": "score",
}


def add_convert(verbs: Any) -> None:
    parser = command(
        verbs,
        "convert",
        run,
        "read recordings of other programs, or write files for them",
        "moe-route convert mgsm_en.json mgsm_de.json --to statistics --out qwen3.safetensors\n"
        "moe-route convert dump.pt --top-k 8 --to eplb --out weight.npy\n"
        "moe-route convert --formats",
    )
    parser.add_argument(
        "files", type=existing, nargs="*", metavar="FILE", help="files of one format; several are added up"
    )
    parser.add_argument("--formats", action="store_true", help="list what can be read and written, and leave")
    parser.add_argument("--from", dest="format", metavar="FORMAT", help="what the files are (default: found)")
    parser.add_argument(
        "--to", metavar="FORMAT", help="what to write (default: moe-route's own file of what they hold)"
    )
    out_argument(parser, "file to write (default: only show what they hold)")
    add(parser, "groups", groups="eplb, sglang: groups to add up (default: all)")
    read = parser.add_argument_group("options of formats")
    read.add_argument("--group", metavar="NAME", help="name of the group (default: from the file)")
    read.add_argument("--top-k", type=positive, metavar="K", help="experts per token, where the file has no tokens")
    add(read, "num_experts", "top_p", top_p="esft-scores: sum of scores to reach (default: 0.2)")
    read.add_argument("--num-layers", type=positive, metavar="N", help="sglang-response: layers of the model")
    read.add_argument("--layers", type=layers, metavar="A-B", help="replay arrays: layers to take, counted from 0")
    read.add_argument("--first-layer", type=int, metavar="N", help="the model's number of the first MoE layer")
    read.add_argument(
        "--tolerance", type=float, metavar="X", help="gate-sums: relative error of the counts (default: 0.001)"
    )
    read.add_argument("--activate", type=int, metavar="N", help="steermoe: experts with the largest risk difference")
    read.add_argument(
        "--deactivate", type=int, metavar="N", help="steermoe: experts with the smallest one; ascend: the last N"
    )
    read.add_argument("--reverse", action="store_true", default=None, help="steermoe: change the signs")
    read.add_argument("--kind", choices=KINDS, help="selection to plan: what it does to them (default: activate)")
    read.add_argument(
        "--strength",
        type=float,
        metavar="X",
        help="selection to plan: in standard deviations of the logits (default: 0.5)",
    )
    read.add_argument("--scores", choices=("token", "gate"), help="esft-scores: kind of scores (default: token)")


def run(options: argparse.Namespace) -> Answer:
    if options.formats:
        return _formats()
    if not options.files:
        raise ValueError("there is no file to read: give one, or --formats")
    if options.to is not None and options.to not in mr.convert.TARGETS:
        raise ValueError(f"no format {options.to!r} to write: one of {', '.join(mr.convert.TARGETS)}")
    output(options.out)
    given = {
        name: getattr(options, option) for option, name in _OPTIONS.items() if getattr(options, option) is not None
    }
    if "action" in given:
        given["action"] = given["action"].replace("-", "_")
    written: dict[str, Any] = {}
    if options.groups is not None:
        written["groups"] = options.groups
    if options.to == "easysteer" and "first_layer" in given:
        written["first_layer"] = given.pop("first_layer")
    kinds = () if options.to is None else mr.convert.TARGETS[options.to].kinds
    found = mr.convert.read(options.files, options.format, to=kinds[0] if len(kinds) == 1 else None, **given)
    data, text = _shown(found)
    if options.out is not None:
        mr.convert.write(found, options.out, options.to, **written)
        data, text = {**data, "out": options.out}, f"{text}\nwritten to {options.out}"
    return Answer(data, text)


def _formats() -> Answer:
    read = [[name, "/".join(format.gives), format.holds] for name, format in mr.convert.FORMATS.items()]
    write = [[name, "/".join(target.kinds), target.holds] for name, target in mr.convert.TARGETS.items()]
    columns = ["format", "gives", "files"]
    text = f"read (--from):\n{table(columns, read)}\n\nwritten (--to):\n{table(['format', 'takes', 'files'], write)}"
    data = {
        "read": {
            name: {"gives": list(format.gives), "holds": format.holds} for name, format in mr.convert.FORMATS.items()
        },
        "written": {
            name: {"takes": target.kinds, "holds": target.holds} for name, target in mr.convert.TARGETS.items()
        },
    }
    return Answer(data, text)


def _shown(found: Any) -> tuple[dict[str, Any], str]:
    """What was read, in numbers and as text."""
    text = repr(found)
    if isinstance(found, mr.RoutingStatistics):
        data: dict[str, Any] = {
            "kind": "statistics",
            "groups": dict(zip(found.groups, found.tokens().max(axis=1).tolist(), strict=True)),
            "layers": list(found.layers),
            "experts": list(found.num_experts),
            "top_k": list(found.top_k),
            "metrics": list(found.metrics),
        }
        if "counts" in found.metrics:
            data["largest_gap"] = found.conservation().largest_gap
            gap = data["largest_gap"]
            text += f"\n  choices fill the slots of the tokens{f', but for {gap:.2%} at most' if gap else ' exactly'}"
        return data, text
    if isinstance(found, mr.Trace):
        sizes = {"tokens": len(found), "sequences": len(found.items), "groups": list(found.groups)}
        return {"kind": "trace", **sizes, "layers": list(found.layers), "slots": found.ids.shape[2]}, text
    if isinstance(found, mr.Plan):
        return {"kind": "plan", "hash": found.hash, "rules": len(found.rules)}, found.describe()
    return {"kind": "selection", **found.to_dict()}, text
