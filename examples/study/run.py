"""Test the findings of "Multilingual Routing in Mixture-of-Experts" (arXiv 2510.04694) on small models, end to end.

    python examples/study/run.py --data DATA --out OUT --models SEED0 SEED1 SEED2 --page examples/study/README.md

DATA holds flores200 (parallel text) and, if it is there, routing/qwen3_30b_a3b_mgsm (routing of a large model).
Each of --models is a folder as examples/demo_model/train.py writes it; by default the shipped model is taken.
OUT receives one file per model and stage, study.json with all numbers, and tables.md, which --page puts into a page
between the lines `<!-- tables -->` and `<!-- end of tables -->`. Stages whose files are there, of the same model, texts
and settings, are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import runpy
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from recorded import recorded_routing
from tables import markdown

import moe_route as mr
from moe_route import RoutingStatistics
from moe_route.base.files import write_text
from moe_route.data import Corpus, demo_corpus, demo_model_folder, demo_problems
from moe_route.runs.language_model import DEMO_MODEL, LanguageModel

MARKERS = ("<!-- tables -->", "<!-- end of tables -->")
QWEN3 = Path("routing") / "qwen3_30b_a3b_mgsm"


def material(args: argparse.Namespace) -> measure.Material:
    """FLORES in the ten languages of the shipped corpus, and the shipped problems."""
    languages = demo_corpus().languages
    general = Corpus.read(args.data / "flores200", languages=languages, limit=args.sentences)
    problems = demo_problems().subset(languages=languages, limit=args.questions)
    return measure.Material(general, problems, args.random)


class Study:
    """One model's part of the study: its stages, each kept in a file."""

    def __init__(self, name: str, seed: int, material: measure.Material, out: Path) -> None:
        self.name, self.seed, self.material = name, seed, material
        self.language_model = LanguageModel.load(name, dtype=torch.float32)
        self.folder = demo_model_folder() if name == DEMO_MODEL else Path(name)
        self.out = out / f"model-{seed}"
        self.out.mkdir(parents=True, exist_ok=True)
        self.key = fingerprint(self.folder, material)

    def run(self) -> dict[str, Any]:
        """All numbers of this model."""
        say(f"model {self.seed}: {self.name}")
        content = {"name": self.folder.name if self.name != DEMO_MODEL else DEMO_MODEL, "training": self.training()}
        content["skill"] = self.stage("skill", lambda: measure.skill(self.language_model, self.material.problems))
        recordings = self.recordings()
        content["routing"] = self.stage(
            "routing", lambda: measure.routing(recordings, content["skill"], content["training"])
        )
        content["steering"] = self.stage(
            "steering",
            lambda: measure.steering(
                self.language_model, recordings["problems"], recordings["general"], self.material, say
            ),
        )
        return content

    def recordings(self) -> dict[str, RoutingStatistics]:
        """The routing of general text and of problems, and of general text in the untrained model, from files."""
        parts = {
            "general": (self.material.general, lambda: self.language_model),
            "problems": (self.material.finding, lambda: self.language_model),
            "untrained": (self.material.general, lambda: self.language_model.untrained(self.seed)),
        }
        found = {}
        for name, (corpus, language_model) in parts.items():
            path = self.out / f"{name}.safetensors"

            def make(path: Path = path, corpus: Any = corpus, language_model: Any = language_model) -> dict[str, Any]:
                measure.record(language_model(), corpus).save(path)
                return {"sequences": len(corpus) * len(corpus.languages)}

            self.stage(f"record-{name}", make, also=path)
            found[name] = RoutingStatistics.load(path)
        return found

    def training(self) -> dict[str, Any]:
        """From training.json: sentence pairs per language, and shares of number pairs seen (None where not told)."""
        path = self.folder / "training.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        shares = shares_of_pairs(report["order"]) if "order" in report else None
        return {"pairs": report.get("training_pairs"), "shares": shares, "seed": report.get("seed")}

    def stage(self, name: str, make: Callable[[], dict[str, Any]], also: Path | None = None) -> dict[str, Any]:
        """The numbers of a stage: from its file if that was made of the same inputs, else made and written."""
        path = self.out / f"{name}.json"
        if path.is_file() and (also is None or also.is_file()):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["key"] == self.key:
                return dict(kept["content"])
        began = time.monotonic()
        content = make()
        write(path, {"key": self.key, "seconds": round(time.monotonic() - began, 1), "content": content})
        say(f"  {name}: {time.monotonic() - began:.0f} s")
        return json.loads(path.read_text(encoding="utf-8"))["content"]  # type: ignore[no-any-return]


def shares_of_pairs(order: int) -> dict[str, float]:
    """The share of number pairs that each language but English saw in training, as examples/demo_model makes them."""
    problems = runpy.run_path(str(Path(__file__).resolve().parents[1] / "demo_model" / "problems.py"))
    return dict(zip(problems["ORDERS"][order], problems["SHARES"], strict=True))


def fingerprint(folder: Path, material: measure.Material) -> str:
    """SHA-256 over the model's files, the texts, and the program that measures."""
    digest = hashlib.sha256(mr.__version__.encode())
    here = Path(__file__).resolve().parent
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json"), here / "measure.py"]
    for path in sorted(files, key=lambda path: path.name):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    texts = [material.general.texts[language] for language in material.languages]
    digest.update(repr((texts, material.problems.questions, material.random_sets)).encode())
    return digest.hexdigest()


def write(path: Path, content: Any) -> None:
    write_text(path, content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def into_page(page: Path, tables: str) -> None:
    """Replace what stands between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(MARKERS[0]) + ".*" + re.escape(MARKERS[1]), re.S)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"{page} does not hold the lines {MARKERS[0]} and {MARKERS[1]}: add them where the tables go")
    write(page, pattern.sub(lambda _: f"{MARKERS[0]}\n{tables}{MARKERS[1]}", text))


def command(args: argparse.Namespace) -> str:
    """The command as another reader would give it: with the options that change numbers, without local paths."""
    models = [] if args.models == [DEMO_MODEL] else ["--models", *(f"SEED{i}" for i in range(len(args.models)))]
    limits = [f"--{name}={value}" for name in ("sentences", "questions", "random")
              if (value := getattr(args, name)) != parser().get_default(name)]  # fmt: skip
    return shlex.join(["python", "examples/study/run.py", "--data", "DATA", "--out", "OUT", *models, *limits])


def say(text: str) -> None:
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--data", type=Path, required=True, help="the folder with flores200 and routing")
    found.add_argument("--out", type=Path, required=True, help="the folder for numbers and tables")
    found.add_argument("--models", nargs="+", default=[DEMO_MODEL], metavar="DIR", help="checkpoints, one per seed")
    found.add_argument("--page", type=Path, metavar="FILE.md", help="put the tables into this page")
    found.add_argument("--sentences", type=int, metavar="N", help="the first N of FLORES (default: all)")
    found.add_argument("--questions", type=int, metavar="N", help="the first N of each subset (default: all)")
    found.add_argument("--random", type=int, default=19, metavar="N", help="sets of random experts (default 19)")
    found.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as torch chooses)")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    if len({str(name) for name in args.models}) < len(args.models):
        raise SystemExit("a model is named twice: it would count as two seeds")
    texts = material(args)
    args.out.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "command": command(args),
        "sentences": len(texts.general),
        "questions": len(texts.measuring.questions) // len(texts.languages),
        "random_sets": args.random,
        "models": [Study(name, seed, texts, args.out).run() for seed, name in enumerate(args.models)],
        "recorded": recorded_routing(args.data) if (args.data / QWEN3).is_dir() else None,
    }
    write(args.out / "study.json", content)
    tables = markdown(json.loads((args.out / "study.json").read_text(encoding="utf-8")))
    write(args.out / "tables.md", tables)
    if args.page is not None:
        into_page(args.page, tables)
    say(f"written: {args.out / 'study.json'}, {args.out / 'tables.md'}{f', {args.page}' if args.page else ''}")


if __name__ == "__main__":
    main()
