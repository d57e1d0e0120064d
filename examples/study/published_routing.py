"""Draw the U of multilingual routing on a real model: the published routing of Qwen3-30B-A3B on MGSM prompts.

    python examples/study/published_routing.py --out divergence.png

No model is needed: moe-route ships how many prompt tokens chose each expert, and the sum of its gate weights. Needs
`pip install 'moe-route[plot]'`.

With `--data DATA` it reads the published files instead: DATA/routing/qwen3_30b_a3b_mgsm holds mgsm_en.json,
mgsm_de.json, mgsm_zh.json, mgsm_bn.json and mgsm_sw.json, a file a language. `--pack FILE.npz` then writes them as the
one file that ships. Where they come from is told in examples/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import moe_route as mr
from moe_route import analysis, plots
from moe_route.base.files import replacing
from moe_route.recording import RoutingStatistics

NAME = "qwen3-30b-a3b"
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


def pack(statistics: RoutingStatistics, path: Path) -> None:
    """Write the statistics as one .npz file that `mr.convert.read` reads; the same bytes each time."""
    tables = {
        "groups": np.array(statistics.groups),
        "tokens": statistics.tokens().astype(np.int32),
        "counts": statistics.token_sum("counts").astype(np.int32),
        "gate_sums": statistics.token_sum("weight_share").astype(np.float32),
    }
    with replacing(path) as stream:
        np.savez_compressed(stream, **tables)


def draw(statistics: RoutingStatistics, path: Path) -> None:
    """Print the mean divergence of the first, middle and last layers, and draw that of every layer."""
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
    with replacing(path) as stream:
        figure.savefig(stream, format="png", pil_kwargs={"compress_level": 9})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder with routing/qwen3_30b_a3b_mgsm (default: what ships)")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture to write")
    parser.add_argument("--pack", type=Path, metavar="FILE.npz", help="write the recordings as one file")
    args = parser.parse_args(arguments)
    if args.out is None and args.pack is None:
        parser.error("give --out FILE.png, --pack FILE.npz or both")

    statistics = mr.convert.published_routing(NAME) if args.data is None else read(args.data)
    if args.out is not None:
        draw(statistics, args.out)
    if args.pack is not None:
        pack(statistics, args.pack)
    print(*("", *(f"{path} is written" for path in (args.out, args.pack) if path is not None)), sep="\n")


if __name__ == "__main__":
    main()
