"""Seven findings of multilingual routing beside their controls, on the demonstration model or one of your own.

    python examples/findings/run.py --out findings                      # the shipped model and corpus: minutes
    python examples/findings/run.py --page examples/study/README.md --results moe_route/data/findings.json
    python examples/findings/run.py --limit 4 --draws 3 --languages eng_Latn deu_Latn swh_Latn       # a quick look

They follow "Multilingual Routing in Mixture-of-Experts" (arXiv 2510.04694). The first two are those of `moe-route demo`
(whose 1 is of another model) with all tables and more random sets: experts of sums (2) and of languages (3) switched
off. The others go on from there: exact match by what was seen in training (4); divergence of every language from
English by layer (5), and its correlation with exact match (6); the paper's soft activation of task experts (7), and
whether a gain by it would have been seen (8). The
folder receives the text as report.txt, all numbers as report.json, and a picture of each finding. `--page` puts the
text between the lines `<!-- findings -->` and `<!-- end of findings -->` of a page, and `--results` writes what
`moe-route demo` tells of the findings that it does not measure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pictures
from association import LOSS, SHARE, Association, associate
from control import Control, control
from depth import Depth, profile_of, untrained_model
from raising import Raising, raise_task_experts
from skill import Skill, shares_in_training
from switching import LanguageTables, TaskTables, at_thresholds

from moe_route.base.files import make_folder, write_text
from moe_route.base.table import number_of
from moe_route.data import demo_model_folder
from moe_route.demo import Finding
from moe_route.demo.circle import DemoTexts, Natural
from moe_route.demo.circle import measure as switch_off
from moe_route.demo.measurement import PIVOT, Measurement, Scores
from moe_route.demo.wording import paragraph
from moe_route.runs.language_model import DEMO_MODEL, LanguageModel

COMMAND = "make findings PAGE=examples/study/README.md"
MARKERS = ("<!-- findings -->", "<!-- end of findings -->")
FIRST = 2  # 1 of `moe-route demo` is of another model
DRAWS = 99  # random sets beside task experts; the smallest p-value is 0.01


@dataclass(frozen=True)
class Findings:
    """What was measured. `str(findings)` is the printed text, `to_dict` the JSON content.

    Attributes:
        model: its name.
        languages, sentences, problems: languages and number of sentences, and number of problems per language.
        task_experts_off to control: the findings, in the order of the text; association and control are None without a
            language beside English, control also without task experts.
    """

    model: str
    languages: tuple[str, ...]
    sentences: int
    problems: int
    task_experts_off: TaskTables
    language_experts_off: LanguageTables
    skill: Skill
    depth: Depth
    association: Association | None
    raising: Raising
    control: Control | None

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """The findings with their names, in the order of the text."""
        names = ("task_experts_off", "language_experts_off", "skill", "depth", "association", "raising", "control")
        yield from ((name, finding) for name in names if (finding := getattr(self, name)) is not None)

    def __str__(self) -> str:
        begin = paragraph(
            f"Model {self.model}: {number_of(self.sentences, 'sentence')} in {len(self.languages)} languages, "
            f"{number_of(self.problems, 'problem')} in {len(self.skill.languages)} of them."
        )
        return "\n\n".join((begin, *(f"{number}. {one}" for number, (_, one) in enumerate(self.findings(), FIRST))))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able content (NaN as None)."""
        content: dict[str, Any] = {name: getattr(self, name) for name in ("model", "sentences", "problems")}
        content["languages"] = list(self.languages)
        return content | {name: finding.to_dict() for name, finding in self.findings()}

    def draw(self, folder: Path) -> list[Path]:
        """Draw each finding that has something to show, as PNG; returns the files in the order of the text."""
        return pictures.save({name: getattr(pictures, name)(finding) for name, finding in self.findings()}, folder)


def measure(study: DemoTexts, run: Measurement, draws: int = DRAWS) -> Findings:
    """Measure the seven findings on the texts of a study, with `draws` random sets beside the first, else fewer."""
    natural, problems = study.natural(run), study.problems
    task_experts_off, language_experts_off = switch_off(study, natural, run, draws)
    sums, text = study.tasks["sums"], study.texts["text"]
    thresholds = at_thresholds(run, natural.task_experts, sums, text, natural.reading)
    scores = natural.reading.tasks["sums"]
    by_subset = {subset: study.of(scores, subset) for subset in dict.fromkeys(study.subsets.tolist())}
    seen: Scores = run.answers(problems.subset("seen"), "problems that were seen")
    skill = Skill(problems.languages, {"seen": seen, **by_subset}, shares_in_training(run.language_model.name))
    english_only = problems.subset("english_only")
    association = associate(
        run.record(english_only.corpus(), "routing of problems"),
        {language: share.value for language, share in skill.match("english_only").items()},
        {SHARE: skill.shares, LOSS: nats_per_sentence(study, natural)},
    )
    raising = raise_task_experts(
        run,
        natural.task_experts.experts,
        len(run.routed.routers),
        english_only,
        by_subset["english_only"],
        draws,
    )
    misled = control(run, study, natural.task_experts.experts, draws)
    corpus, number = study.corpus, len(problems.subset(languages=[PIVOT]).questions)
    return Findings(
        run.language_model.name,
        corpus.languages,
        len(corpus),
        number,
        TaskTables(task_experts_off, thresholds),
        LanguageTables(language_experts_off),
        skill,
        depth_of(study, run),
        association,
        raising,
        misled,
    )


def nats_per_sentence(study: DemoTexts, natural: Natural) -> dict[str, float]:
    """Loss by language. Sentences are translations, so unlike nats per token it does not depend on tokens."""
    return dict(zip(study.corpus.languages, natural.losses.nats.mean(0).tolist(), strict=True))


def depth_of(study: DemoTexts, run: Measurement) -> Depth:
    """Divergence by layer of the model, and of an untrained one if one can be made."""
    trained = profile_of(run.record(study.corpus, "routing of all text"))
    blank, reason = untrained_model(run.language_model)
    if blank is None:
        return Depth(trained, None, reason)
    with blank.attach() as routed:
        other = replace(run, language_model=blank, routed=routed)
        return Depth(trained, profile_of(other.record(study.corpus, "routing of an untrained model")))


def told_by_the_demo(findings: Findings, command: str) -> dict[str, Any]:
    """What `moe-route demo` tells of the findings that it does not measure, and of which weights it was measured."""
    skill, depth, raising = findings.skill, findings.depth, findings.raising
    raised = next(iter(raising.after.values())).change_of_match(raising.before)
    beyond = depth.beyond_untrained
    claims = (
        ("a U", depth.trained.depth, beyond is not None and beyond.verdict == "higher"),
        ("transfer from English", skill.transfer(*skill.others), True),
        ("a gain by raising", raised, raising.sets["exact match"].difference.verdict == "higher"),
    )
    weights = hashlib.sha256((demo_model_folder() / "model.safetensors").read_bytes()).hexdigest()
    return {
        "command": command,
        "weights": weights,
        "claims": [
            {"claim": claim, "shown": bool(also and change.verdict == "higher"), **change.to_dict()}
            for claim, change, also in claims
            if change is not None
        ],
    }


def page_of(findings: Findings, command: str) -> str:
    """The findings in Markdown: their sentences, and the whole text to unfold."""
    sentences = "\n".join(f"- {finding.sentence}" for _, finding in findings.findings())
    return (
        f"Made by `{command}`.\n\n{sentences}\n\n<details><summary>All of its output</summary>\n\n<!-- not run -->\n"
        f"```text\n{findings}\n```\n\n</details>\n"
    )


def into_page(page: Path, text: str) -> None:
    """Replace what stands between the markers of a page."""
    whole = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(MARKERS[0]) + ".*" + re.escape(MARKERS[1]), re.S)
    if len(pattern.findall(whole)) != 1:
        raise SystemExit(f"{page} does not hold the lines {MARKERS[0]} and {MARKERS[1]}: add them where the text goes")
    write_text(page, pattern.sub(lambda _: f"{MARKERS[0]}\n{text}{MARKERS[1]}", whole))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, metavar="FOLDER", help="folder for report and pictures (default: none)")
    options.add_argument("--page", type=Path, metavar="FILE.md", help="put the results into this page")
    options.add_argument("--results", type=Path, metavar="FILE.json", help="write what the demo tells of them")
    options.add_argument("--model", default=DEMO_MODEL, help="a name or folder (default: the shipped model)")
    options.add_argument(
        "--data", type=Path, help="general text, as for `moe-route demo` (default: the shipped corpus)"
    )
    options.add_argument("--languages", nargs="+", metavar="CODE", help="of the corpus (default: all)")
    options.add_argument("--limit", type=int, metavar="N", help="the first N sentences, and problems of each kind")
    options.add_argument(
        "--draws", type=int, default=DRAWS, metavar="N", help=f"random sets beside 2 and 8 (default: {DRAWS})"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.draws < 1:
        raise SystemExit(f"--draws must be at least 1, not {options.draws}: an effect needs random sets beside it")
    if options.results is not None and (options.model, options.data, options.limit) != (DEMO_MODEL, None, None):
        raise SystemExit("--results is what ships with the shipped model: leave out --model, --data and --limit")
    if options.out is not None:
        make_folder(options.out)
    study = DemoTexts.read(options.data, options.languages, options.limit)
    language_model = LanguageModel.load(options.model)
    with language_model.attach() as routed:
        findings = measure(study, Measurement(language_model, routed), options.draws)
    print(findings)
    if options.out is not None:
        drawn = findings.draw(options.out)
        write_text(options.out / "report.txt", f"{findings}\n")
        write_text(options.out / "report.json", json.dumps(findings.to_dict(), indent=1) + "\n")
        print(f"\nPictures: {', '.join(map(str, drawn))}")
    if options.page is not None:
        into_page(options.page, page_of(findings, "make findings"))
    if options.results is not None:
        write_text(options.results, json.dumps(told_by_the_demo(findings, COMMAND), indent=1) + "\n")


if __name__ == "__main__":
    main()
