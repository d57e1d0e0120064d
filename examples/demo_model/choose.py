"""Choose among judged seeds of the demonstration model, and install the chosen one with its card.

    python examples/demo_model/choose.py SEED0 SEED1 SEED2 --install
    python examples/demo_model/choose.py LONGER --follows OUT --install

The rule: the median seed of the mean exact match on english_only, over the nine languages other than English. The U
shape of its routing plays no part. All results are printed side by side, and those of all seeds are installed.

With `--follows`, a model that was trained further takes the place of the installed one, which is judged in OUT, if
nothing got worse (`judge.worse`). What is known of the seeds stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tables
from judge import TEXT_TOLERANCE, TOLERANCE, worse
from measures import OTHERS
from problems import LANGUAGES, shares

from moe_route.base.files import readable_json, replacing, write_text

RULE = "median of the mean exact match on english_only over the nine languages other than English"
CARD = Path(__file__).with_name("model_card_template.md")
MODEL = Path(__file__).resolve().parents[2] / "moe_route" / "data" / "model"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MOST_BYTES = 16_000_000  # of the checkpoint, which is part of the package

Json = dict[str, Any]
Judged = Mapping[str, Any]


def score(judged: Judged) -> float:
    """What the seeds are ordered by."""
    found = judged["trained"]["skill"]["english_only"]
    return sum(found[language]["exact_match"] for language in OTHERS) / len(OTHERS)


def choose(results: Sequence[Judged]) -> int:
    """Index of the median result; of equal ones, the first is the smallest."""
    return sorted(range(len(results)), key=lambda number: score(results[number]))[len(results) // 2]


def read(folders: Sequence[Path]) -> list[Json]:
    """The results of judge.py. Raises SystemExit if one is missing, from a trial, or from another checkpoint."""
    results = []
    for folder in folders:
        path = folder / "judged.json"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: run judge.py --model {folder}")
        judged = json.loads(path.read_text(encoding="utf-8"))
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if any(judged[name] != training[name] for name in ("seed", "steps", "tokens")):
            raise SystemExit(f"{path} judges another checkpoint than the one beside it: run judge.py again")
        if training["progress"] < 1:
            raise SystemExit(f"the training of {folder} has not ended: it is at {training['progress']:.0%}")
        if judged["limit"] is not None:
            raise SystemExit(f"{path} is a trial with --limit {judged['limit']}: run judge.py without --limit")
        results.append(judged)
    return results


def seeds_table(results: Sequence[Judged]) -> str:
    """The seeds side by side: the figure of the rule, exact match by language, and what decides nothing."""
    chosen = results[choose(results)]["seed"]
    rows: list[list[object]] = [["order of the shares", *(one["order"] for one in results)]]
    rows.append(["gates passed", *(f"{sum(g['passed'] for g in r['gates'])} of {len(r['gates'])}" for r in results)])
    rows.append(["mean of nine languages, english_only", *(f"{score(one):.3f}" for one in results)])
    for language in LANGUAGES:
        found = (one["trained"]["skill"]["english_only"][language]["exact_match"] for one in results)
        share = (100 * one["shares"][language] for one in results)
        rows.append([language, *(f"{em:.2f} (saw {seen:.0f} %)" for em, seen in zip(found, share, strict=True))])
    off = [one["task_experts"].get("off", {}).get("mean") for one in results]
    for name, title in (("exact_match", "exact match"), ("nats", "answer, nats"), ("text", "text, nats/token")):
        rows.append([f"task experts off: {title}", *("-" if one is None else f"{one[name]:+.3f}" for one in off)])
    depths = (one["trained"]["divergence"]["own"]["depth"]["mean"] for one in results)
    rows.append(["depth of the U, mean", *(tables.interval(depth) for depth in depths)])
    heads = (f"seed {one['seed']}" + (" (ships)" if one["seed"] == chosen else "") for one in results)
    return tables.table(("", *heads), rows)


def shape_table(folder: Path, training: Judged) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    experts = config.get("num_experts", config.get("num_local_experts"))
    rows = {
        "parameters": training["parameters"],
        "layers": config["num_hidden_layers"],
        "experts of a layer, of which a token chooses": f"{experts}, {config['num_experts_per_tok']}",
        "hidden size": config["hidden_size"],
        "intermediate size of an expert": config["moe_intermediate_size"],
        "heads, key-value heads, size of a head": ", ".join(
            str(config[name]) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        ),
        "vocabulary (byte-level BPE), tied embeddings": config["vocab_size"],
        "positions, of which training saw": f"{config['max_position_embeddings']}, {training['window_tokens']}",
        "size of the weights": f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB",
    }
    return tables.table(("", ""), rows.items())


def training_table(trainings: Sequence[Judged]) -> str:
    """Length of each run, and its last figures."""
    rows = [
        ["steps", *(one["steps"] for one in trainings)],
        [f"windows of {trainings[0]['window_tokens']} tokens per step", *(one["batch_windows"] for one in trainings)],
        ["tokens, million", *(f"{one['tokens'] / 1e6:.1f}" for one in trainings)],
        ["minutes", *(f"{one['minutes']:.0f}" for one in trainings)],
        ["device", *(one["device"] for one in trainings)],
        ["runs, one after the other", *(len(one["runs"]) for one in trainings)],
        [
            "peak learning rate of each",
            *(", ".join(f"{run['learning_rate']:g}" for run in one["runs"]) for one in trainings),
        ],
    ]
    logged = all(one["log"] for one in trainings)  # the first entry comes after 50 steps
    for name, title in (("text", "text, nats/token"), ("answer", "answer, nats"), ("balance", "balance loss")):
        if not logged:
            break
        rows.append([f"at the end: {title}", *(f"{one['log'][-1][name]:.2f}" for one in trainings)])
    return tables.table(("", *(f"seed {one['seed']}" for one in trainings)), rows)


def documents_table(training: Judged) -> str:
    """Pairs of sentences of each language, documents drawn of each kind, and share of the pairs of numbers."""
    seen, drawn = shares(training["order"]), training["documents"]
    rows = [
        (
            language,
            training["training_pairs"].get(language, "-"),
            *(drawn.get(f"{kind} {language}", "-") for kind in ("sentence", "translation", "task", "copy", "count")),
            f"{100 * seen[language]:.0f}",
        )
        for language in LANGUAGES
    ]
    rows.append(("words of two languages", "-", drawn["switch"], *["-"] * 5))
    head = (
        "language",
        "sentence pairs",
        "sentences drawn",
        "translations drawn",
        "problems drawn",
        "numbers copied",
        "counted on",
        "pairs of numbers seen, %",
    )
    return tables.table(head, rows)


def seeds_parts(results: Sequence[Judged], trainings: Sequence[Judged]) -> dict[str, str]:
    """The sections of the card that compare the seeds."""
    values = ", ".join(f"{score(one):.3f} (seed {one['seed']})" for one in results)
    rule = f"The rule: the {RULE}.\nIt is {values}, so seed {results[choose(results)]['seed']} ships."
    return {
        "training": training_table(trainings),
        "seeds": f"{rule}\n\n{seeds_table(results)}",
        "gates": tables.gates_table(results),
        "follows": "The seed ships as it was chosen.",
    }


def following_parts(
    before: Judged, after: Judged, before_runs: Sequence[Judged], training: Judged, card: str
) -> dict[str, str]:
    """The same sections where a model takes the place of the installed one, whose card tells about the seeds."""
    runs = "; ".join(
        f"{run['steps']} steps, {run['tokens'] / 1e6:.1f} million tokens, peak learning rate {run['learning_rate']:g}"
        for run in training["runs"][len(before_runs) :]
    )
    text = (
        f"The model that ships went on from seed {after['seed']} ({runs}).\n"
        "Its documents were also numbers to copy and to count on from (`examples/demo_model/controls.py`), so that "
        "sums can be told from digits.\n"
        "The gates on these two, and the rule that nothing may get worse, were set before: no gate that was passed "
        f"fails, no value falls by more than {TOLERANCE:g} of what is wanted, and the loss of text rises by "
        f"{TEXT_TOLERANCE:g} nats per token at most."
    )
    parts = {name: section(card, name) for name in ("training", "seeds", "gates")}
    return parts | {"follows": f"{text}\n\n{tables.following_table(before, after)}"}


def card(folder: Path, result: Judged, training: Judged, parts: Mapping[str, str]) -> str:
    """The text of `CARD` with every table between its markers: `parts`, and the tables of the model that ships."""
    own = {
        "shape": shape_table(folder, training),
        "documents": documents_table(training),
        "skill": tables.skill_table(result),
        "controls": tables.controls_table(result),
        "text": tables.text_table(result),
        "load": tables.load_table(result),
        "changes": tables.changes_table(result),
        "singles": tables.singles_table(result),
        "divergence": tables.divergence_table(result),
        "depth": tables.depth_table(result),
    }
    return fill(CARD.read_text(encoding="utf-8"), own | parts)


def section(text: str, name: str) -> str:
    """What stands between the markers ``<!-- name -->`` and ``<!-- /name -->`` of a card."""
    content = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0].strip()
    if not content:
        raise ValueError(f"the card has no section {name}")
    return content


def fill(text: str, parts: Mapping[str, str]) -> str:
    """A text with new content between the markers ``<!-- name -->`` and ``<!-- /name -->``; a marker must be there."""
    for name, content in parts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the card has no {start.strip()} with {end} after it: add both lines")
        text = f"{before}{start}\n{content}\n\n{end}{after}"
    return text


def install(folder: Path, result: Judged, parts: Mapping[str, str], judged: Json, target: Path) -> None:
    """Copy a checkpoint, and write training.json, judged.json and the card beside it."""
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    size = sum((folder / name).stat().st_size for name in FILES)
    if size > MOST_BYTES:
        raise SystemExit(f"the checkpoint has {size / 1e6:.1f} MB, and the package takes {MOST_BYTES / 1e6:.0f} MB")
    text = card(folder, result, training, parts)
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        with (folder / name).open("rb") as source, replacing(target / name) as stream:
            shutil.copyfileobj(source, stream)
    for name, content in (
        ("training.json", readable_json(training | {"shares": shares(training["order"])})),
        ("judged.json", readable_json(judged)),
        ("MODEL_CARD.md", text.rstrip("\n")),
    ):
        write_text(target / name, f"{content}\n")


def follow(folder: Path, earlier: Path, installed: Path, target: Path | None) -> None:
    """Compare a model with the one that it goes on from, and install it if nothing got worse."""
    before, after = read([earlier, folder])
    print(tables.following_table(before, after))
    if found := worse(before, after):
        raise SystemExit("it does not ship, since it got worse:\n  " + "\n  ".join(found))
    if target is None:
        return
    first, training = (json.loads((one / "training.json").read_text(encoding="utf-8")) for one in (earlier, folder))
    card_before = (installed / "MODEL_CARD.md").read_text(encoding="utf-8")
    judged = json.loads((installed / "judged.json").read_text(encoding="utf-8")) | {"before": before, "shipped": after}
    install(folder, after, following_parts(before, after, first["runs"], training, card_before), judged, target)
    print(f"installed in {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="an odd number of folders that judge.py judged")
    parser.add_argument(
        "--install",
        nargs="?",
        type=Path,
        const=MODEL,
        metavar="FOLDER",
        help=f"to {MODEL.parent.name}/{MODEL.name} of the package, or to FOLDER",
    )
    parser.add_argument("--follows", type=Path, metavar="OUT", help="the installed model, judged in OUT, is replaced")
    args = parser.parse_args()
    if len(args.folders) % 2 == 0:
        parser.error("the median needs an odd number of seeds")
    if args.follows:
        if len(args.folders) > 1:
            parser.error("one model takes the place of another: name one folder")
        follow(args.folders[0], args.follows, MODEL, args.install)
        return
    results = read(args.folders)
    print(f"Rule: the {RULE}.\n\n{seeds_table(results)}\n\n{tables.gates_table(results)}")
    print(f"\nChosen: seed {results[choose(results)]['seed']}")
    if args.install:
        chosen = choose(results)
        trainings = [json.loads((one / "training.json").read_text(encoding="utf-8")) for one in args.folders]
        judged = {"rule": RULE, "chosen": results[chosen]["seed"], "seeds": results, "shipped": results[chosen]}
        install(args.folders[chosen], results[chosen], seeds_parts(results, trainings), judged, args.install)
        print(f"installed in {args.install}")


if __name__ == "__main__":
    main()
