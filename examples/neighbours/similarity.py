"""Which languages are alike? In the shipped model, and in published similarities of larger ones.

    python examples/neighbours/similarity.py --data DATA/mplm_sim \\
        --out RESULTS.json --page docs/groups.md --picture TREES.png     # minutes
    python examples/neighbours/similarity.py --permutations 99              # a short form, the shipped model alone

DATA/mplm_sim holds tables of mPLM-Sim [arXiv 2305.13684]: similarities of languages in layers of Glot500 and XLM-R over
FLORES, and genetic similarity. Each layer's similarities are compared with genetic similarity: the mean over languages
of the correlation of their rows, and a p-value by permuting languages (Mantel 1967). Those of the shipped model are
compared with scripts, too (1 for a common one), with a bootstrap over sentences. Eight pairs of relatives should be
each other's nearest, among 24 languages.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from seeds import add_outputs, span, write

import moe_route as mr
from moe_route import recording
from moe_route.analysis import Similarity
from moe_route.analysis.matrices import names_in

MODELS = {"Glot500": ("glot500-base", (0, 5, 6)), "XLM-R": ("xlm-roberta-base", (2,))}  # stem of the files, layers
# Languages of which the nearest is looked for, and pairs of a language and the relative expected to be its nearest.
NAMED = "eng deu nld fra spa por ita rus ukr pol hin ben tur fin jpn cmn kor arb heb ind vie swh sna tam"
BOTH_WAYS = ("deu nld", "spa por", "rus ukr", "hin ben", "jpn kor", "arb heb")
ONE_WAY = ("fra ita", "sna swh")
TABLE_NAMES = {"zho_Hans": "cmn_Hani"}  # codes that the tables spell in another way
RESAMPLES = 1000


def same_script(groups: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {a: {b: float(a[-4:] == b[-4:]) for b in groups} for a in groups}


def agreement(found: Similarity, table: Any, permutations: int) -> list[dict[str, float]]:
    """Of each layer: mean correlation of rows, number of languages in it, p-value."""
    compared = found.compare(table, permutations=permutations)
    columns = zip(compared.pearson, compared.spearman, compared.rows, compared.p_value, strict=True)
    return [dict(zip(("pearson", "spearman", "languages", "p"), map(float, each), strict=True)) for each in columns]


def by_sentence(vectors: Any) -> np.ndarray:
    """Cosine of each sentence in two languages, float64 [item, layer, language, language]."""
    states = np.moveaxis(vectors.numpy().astype(np.float64), 2, 1)  # [item, layer, language, width]
    states /= np.linalg.norm(states, axis=-1, keepdims=True)
    return np.einsum("nlax,nlbx->nlab", states, states)


def shipped(genetic: Path | None, permutations: int) -> tuple[dict[str, Any], Similarity]:
    """The shipped model, layer by layer."""
    model, tokenizer = mr.data.load_demo_model()
    vectors = recording.sentence_vectors(model, tokenizer, mr.data.demo_corpus())
    found = mr.analysis.similarity(vectors)
    names = tuple(TABLE_NAMES.get(name, name) for name in found.groups)
    renamed = Similarity.of(found.values, names, found.layers)
    cosines = by_sentence(vectors)
    drawn = np.random.default_rng(0).integers(len(cosines), size=(RESAMPLES, len(cosines)))
    resampled = [cosines[items].mean(0) for items in drawn]  # each [layer, language, language]
    results: dict[str, Any] = {"layers": list(found.layers)}
    for title, table in {"script": same_script(names), "genetic": genetic}.items():
        if table is None:
            continue
        results[title] = agreement(renamed, table, permutations)
        again = np.array(
            [[row["pearson"] for row in agreement(Similarity.of(one, names), table, 1)] for one in resampled]
        )
        for row, low, high in zip(results[title], *np.quantile(again, (0.025, 0.975), axis=0), strict=True):
            row |= {"low": float(low), "high": float(high)}
    last = len(found.layers) - 1
    results["clusters"] = [list(cluster) for cluster in found.clusters(4, last)]
    return results, found


def published(folder: Path, permutations: int) -> tuple[dict[str, Any], Similarity]:
    """The published tables, and the last layer of Glot500 among the named languages."""
    results: dict[str, Any] = {}
    named: dict[str, Similarity] = {}
    for model, (stem, layers) in MODELS.items():
        for layer in layers:
            path = folder / f"{stem}_flores200_layer{layer}.tsv"
            (found,) = agreement(Similarity.read(path), folder / "genetic.tsv", permutations)
            codes = {name[:3]: name for name in names_in(path) if name != "arb_Latn"}
            among = Similarity.read(path, groups=[codes[name] for name in NAMED.split() if name in codes])
            results[f"{model}, layer {layer}"] = found | {"among": len(among.groups), "nearest": nearest(among, codes)}
            named[model] = among
    return results, named["Glot500"]


def nearest(found: Similarity, codes: dict[str, str]) -> dict[str, bool]:
    """Pair -> whether the relatives are nearest; pairs of languages that are not in the table are left out."""
    answers = {}
    for pair in (*BOTH_WAYS, *ONE_WAY):
        a, b = (codes.get(name, "") for name in pair.split())
        if a in found.groups and b in found.groups:
            back = pair in ONE_WAY or found.best_source(b) == a
            answers[pair] = found.best_source(a) == b and back
    return answers


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    ours = results["the shipped model"]
    against = [name for name in ("script", "genetic") if name in ours]
    heads = " | ".join(
        f"r with {'a common script' if name == 'script' else 'genetic similarity'} | p" for name in against
    )
    lines = [f"| layer of the demo model | {heads} |", "|---|" + "---|---|" * len(against)]
    for i, layer in enumerate(ours["layers"]):
        rows = [ours[name][i] for name in against]
        cells = [f"{row['pearson']:+.2f}{span(row['low'], row['high'], '+.2f')} | {row['p']:.3f}" for row in rows]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    if "published" not in results:
        return "\n".join(lines)
    lines += ["", "| published | languages | r with genetic similarity | rho | p | relatives nearest |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in results["published"].items():
        missed = [pair.replace(" ", "-") for pair, found in row["nearest"].items() if not found]
        pairs = f"{sum(row['nearest'].values())} of {len(row['nearest'])} pairs among {row['among']} languages"
        pairs += f" (not {', '.join(missed)})" if missed else ""
        p = f"{row['p']:.4f}"
        cells = [name, f"{row['languages']:.0f}", f"{row['pearson']:.3f}", f"{row['spearman']:.3f}", p, pairs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(ours: Similarity, theirs: Similarity | None, path: Path) -> None:
    """The trees, side by side."""
    from matplotlib.figure import Figure

    trees = {"the demo model, last layer": (ours, len(ours.layers) - 1)}
    if theirs is not None:
        trees["Glot500, layer 6 (published)"] = (theirs, 0)
    figure = Figure(figsize=(4.8 * len(trees), 5.6), layout="constrained")
    axes = figure.subplots(1, len(trees), squeeze=False)[0]
    for ax, (title, (found, layer)) in zip(axes, trees.items(), strict=True):
        mr.plots.tree(found, layers=[layer], ax=ax)
        ax.set_title(title, fontsize="medium")
    mr.plots.save(axes[0], path)


FIRST, LAST = "<!-- similarity: begin -->", "<!-- similarity: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the tables of mPLM-Sim")
    parser.add_argument("--permutations", type=int, default=1999, help="of languages, for p-values")
    parser.add_argument("--picture", type=Path, help="draw the trees")
    add_outputs(parser)
    options = parser.parse_args()
    genetic = None if options.data is None else options.data / "genetic.tsv"
    found, ours = shipped(genetic, options.permutations)
    results, theirs = {"permutations": options.permutations, "the shipped model": found}, None
    if options.data is not None:
        results["published"], theirs = published(options.data, options.permutations)
    write(options, results, table(results), FIRST, LAST)
    if options.picture:
        draw(ours, theirs, options.picture)


if __name__ == "__main__":
    main()
