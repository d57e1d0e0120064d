"""`moe-route upcycle`: turn a dense model into a sparse one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moe_route.cli.answer import Answer
from moe_route.cli.inputs import command, layers_argument, names, quiet_libraries, seed_argument


def add(verbs: Any) -> None:
    parser = command(
        verbs,
        "upcycle",
        run,
        "turn a dense model into a sparse one with an expert per language family",
        "moe-route upcycle dense --languages eng_Latn,deu_Latn,swh_Latn --out sparse --plan families.json",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a dense model")
    parser.add_argument(
        "--languages", type=names, metavar="A,B", help="languages, which get the published families (arXiv 2410.10626)"
    )
    parser.add_argument("--families", type=Path, metavar="FILE", help="families of your own: JSON, group -> family")
    layers_argument(parser, "layers of the model, counted from 0 (default: the last two)")
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2)")
    parser.add_argument("--renormalize", choices=("sum", "none"), default="sum", help="of the weights (default: sum)")
    parser.add_argument("--fixed-by-label", action="store_true", help="with --top-k 1: a group's own expert, always")
    parser.add_argument("--noise", type=float, default=0.0, metavar="X", help="on the copies, relative (default: 0)")
    seed_argument(parser)
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the checkpoint's)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the sparse checkpoint")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="write the family plan, for training")


def run(options: argparse.Namespace) -> Answer:
    import json

    from moe_route.base.files import new_folder
    from moe_route.data import families_of
    from moe_route.runs.language_model import LanguageModel
    from moe_route.training import upcycle

    if (options.languages is None) == (options.families is None):
        raise ValueError("give either --languages or --families")
    if options.families is not None:
        families = json.loads(options.families.read_text("utf-8"))
    else:
        families = families_of(options.languages)
    quiet_libraries()
    with new_folder(options.out) as folder:  # refused before the model is loaded if it holds something
        dense = LanguageModel.load(options.model, dtype=options.dtype)
        made: Any = upcycle(
            dense.model,
            families=families,
            layers=options.layers,
            top_k=options.top_k,
            renormalize=options.renormalize,
            fixed_by_label=options.fixed_by_label,
            noise=options.noise,
            seed=options.seed,
        )
        made.model.save_pretrained(folder)
        dense.tokenizer.save_pretrained(folder)
    if options.plan is not None:
        made.plan.save(options.plan)
    recipe = made.model.config.moe_route_upcycling
    of_expert: dict[int, list[str]] = {}
    for group, expert in recipe["families"].items():
        of_expert.setdefault(expert, []).append(group)
    data = {"out": options.out, "plan": options.plan, "class": type(made.model).__name__, **recipe}
    lines = [
        f"{type(dense.model).__name__} -> {type(made.model).__name__}, layers {', '.join(map(str, recipe['layers']))}: "
        f"{recipe['num_experts']} experts, top-{recipe['top_k']}",
        *(f"  expert {expert}: {', '.join(groups)}" for expert, groups in sorted(of_expert.items())),
        f"written to {options.out}",
    ]
    if options.plan is not None:
        lines.append(f"plan for training written to {options.plan}")
    return Answer(data, "\n".join(lines))
