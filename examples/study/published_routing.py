"""Draw the U of multilingual routing on a real model: the published routing of Qwen3-30B-A3B on MGSM prompts.

    python examples/study/published_routing.py --data DATA --out divergence.png

DATA/routing/qwen3_30b_a3b_mgsm holds mgsm_en.json, mgsm_de.json, mgsm_zh.json, mgsm_bn.json and mgsm_sw.json, a file a
language. No model is needed: the files hold how many prompt tokens chose each expert, and the sum of its gate weights.
Where they come from is told in examples/README.md. Needs `pip install 'moe-route[plot]'`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import moe_route as mr
from moe_route import analysis, plots
from moe_route.base.files import replacing
from moe_route.recording import RoutingStatistics

LANGUAGES = {"en": "English", "de": "German", "zh": "Chinese", "bn": "Bengali", "sw": "Swahili"}
CAPTION = (
    "Gate weight of the 8 chosen of 128 experts, pooled over the tokens of 250 prompts per language; grey: middle\n"
    "third of the layers. Routing recorded by github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs (MIT)."
)


def read(data: Path) -> RoutingStatistics:
    """The recordings of the five languages as statistics: ``counts`` and ``weight_share``, each [5, 48, 128]."""
    folder = data / "routing" / "qwen3_30b_a3b_mgsm"
    try:
        return mr.convert.read([folder / f"mgsm_{language}.json" for language in LANGUAGES], "gate-sums")
    except ValueError as error:
        raise SystemExit(f"{error}; see examples/README.md") from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with routing/qwen3_30b_a3b_mgsm")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    args = parser.parse_args(arguments)

    statistics = read(args.data)
    # "topk": the recording holds the weights of the chosen experts only, not the router's whole distribution
    found = analysis.divergence(statistics, "en", kind="topk", by="token", pairing="pooled")
    shape = analysis.u_shape(found)
    print(statistics, f"\nDivergence from English, mean over layers:\n{shape}", sep="\n")

    figure = Figure(figsize=(6.4, 3.6), dpi=144, layout="constrained")
    plots.divergence(
        found,
        ax=figure.add_subplot(),
        labels=LANGUAGES,
        middle=shape.middle_layers,
        title="Qwen3-30B-A3B on MGSM prompts: routing divergence, pooled",
    )
    figure.supxlabel(CAPTION, fontsize=7, color="#555555", x=0.01, ha="left")
    with replacing(args.out) as stream:
        figure.savefig(stream, format="png", pil_kwargs={"compress_level": 9})
    print(f"\n{args.out} is written")


if __name__ == "__main__":
    main()
