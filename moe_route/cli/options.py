"""The options of commands, each declared once, and the parser that names the nearest word for a wrong one.

Nothing here imports torch before a command runs: a file that is missing is told at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from moe_route.runs.job import refuse_made

TABLES = (".csv", ".json", ".parquet")
"""Suffixes of the tables that a result is kept in."""

_NUMBERS = re.compile(r"-\.?\d[\d.,eE+-]*$")
Check = Callable[[argparse.Namespace], None]


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps descriptions, and leaves the lines of examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line. Options are written in full.

    ``checks`` run once all options are read, before the command does: they fill in and refuse what needs no torch.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs |= {"allow_abbrev": False, "formatter_class": _Help}
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = _NUMBERS  # "-1,2" is a value, as "-1" is
        self.checks: list[Check] = []
        self.takes_any_word = False  # the words are those of another program, or of another command

    def error(self, message: str) -> NoReturn:
        print(f"moe-route: {message} (`{self.prog} --help` shows what it takes)", file=sys.stderr)
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            name = "/".join(action.option_strings) or action.metavar or action.dest
            self.error(f"{name} {str(value)!r} is not one of {', '.join(known)}{meant([str(value)], known)}")

    @property
    def options(self) -> list[str]:
        """The names of all options that the help shows."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        return [name for action in shown for name in action.option_strings]

    def refuse_unknown(self, words: Iterable[str]) -> None:
        """End with the nearest known option if some word is an option that this command does not have."""
        unknown = []
        for word in words:
            if word == "--":
                break
            name = word.partition("=")[0]
            if len(name) > 1 and name.startswith("-") and " " not in word and not _NUMBERS.match(word):
                short = not name.startswith("--") and name[:2] in self._option_string_actions
                if name not in self._option_string_actions and not short:
                    unknown.append(name)
        if unknown:
            self.error(f"no option {', '.join(unknown)}{meant(unknown, self.options)}")


def meant(words: Iterable[str], known: Sequence[str]) -> str:
    """A question for the known words that come nearest, or "": those that begin like a word, else the most similar."""
    near = [
        match
        for word in words
        for match in [name for name in known if len(word) > 3 and name.startswith(word)]
        or get_close_matches(word, known, n=1)
    ]
    return f": did you mean {', '.join(dict.fromkeys(near))}?" if near else ""


def command(verbs: Any, name: str, run: Any, help: str, example: str) -> Parser:
    """Add a command; ``example`` is shown at the end of its help."""
    parser: Parser = verbs.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n{textwrap.indent(example, '  ')}",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=run, verb=parser)
    return parser


def verbs_of(verbs: Any, name: str, help: str, *, title: str) -> Any:
    """Add a command that has commands below it, and return where they are added."""
    parser: Parser = verbs.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    below = parser.add_subparsers(title=title, metavar=title.upper()[:-1], required=True, parser_class=Parser)
    parser.epilog = f"`moe-route {name} {title.upper()[:-1]} --help` shows an example."
    return below


# ---- values


def existing(text: str) -> Path:
    """Parse the path of a file or folder that must be there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text} does not exist: check the name")
    return path


def writable(text: str, suffixes: Sequence[str] = (), *, folder: bool = False) -> Path:
    """Parse the path of a file to write: its folder must be there, and its name end in one of ``suffixes``.

    With ``folder``, a name without a suffix is that of a folder.
    """
    path = Path(text)
    if suffixes and not (folder and not path.suffix) and path.suffix.lower() not in suffixes:
        raise argparse.ArgumentTypeError(f"{text} does not end in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist: make it first")
    return path


def layers(text: str) -> tuple[int, ...]:
    """Parse layers, both ends included: "2-5", "0,3,8-11"."""
    numbers: set[int] = set()
    for part in text.split(","):
        ends = [int(end) for end in part.split("-") if end.strip().isdecimal()]
        if len(ends) != part.count("-") + 1 or len(ends) > 2:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers: write them as 2-5 or 0,3,8-11")
        if ends[0] > ends[-1]:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} runs backwards: write {ends[-1]}-{ends[0]}")
        numbers.update(range(ends[0], ends[-1] + 1))
    return tuple(sorted(numbers))


def names(text: str) -> tuple[str, ...]:
    """Parse names: "eng_Latn,deu_Latn"."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[float, ...]:
    """Parse numbers: "0.5,1,2"."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: write them as 0.5,1,2") from None


def positive(text: str) -> int:
    """Parse a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def level(text: str) -> float:
    """Parse the level of an interval, above 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level between 0 and 1, such as 0.95")
    return value


# ---- options that several commands have

_RULES = (
    "share of sentences nearest to their translation in both directions (mexa), in one (retrieval), or by the ratio"
)

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "layers": {"type": layers, "metavar": "A-B", "help": "MoE layers, counted from 0 (default: all)"},
    "groups": {"type": names, "metavar": "A,B", "help": "groups to take (default: all)"},
    "group": {"metavar": "GROUP", "help": "the group to take, such as eng_Latn (default: the only one)"},
    "baseline_group": {"metavar": "GROUP", "help": "group of the baseline (default: the same)"},
    "reference": {"metavar": "GROUP", "help": "group to compare with (default: eng_Latn)"},
    "phase": {"choices": ("prefill", "decode"), "help": "tokens of this phase only"},
    "by": {"choices": ("sequence", "token"), "help": "mean over sequences or tokens (default: that of the question)"},
    "pool": {"action": "store_true", "help": "join the groups into one"},
    "interval": {"type": level, "metavar": "LEVEL", "help": "add bootstrap intervals of this level, such as 0.95"},
    "task": {"type": existing, "nargs": "+", "metavar": "FILE", "help": "statistics of task texts"},
    "baseline": {"type": existing, "nargs": "+", "metavar": "FILE", "help": "statistics of texts to compare with"},
    "measure": {
        "choices": ("normalized_jsd", "jsd", "cosine", "jaccard"),
        "help": "how two distributions over experts are compared (default: normalized_jsd)",
    },
    "pairing": {
        "choices": ("paired", "pooled", "auto"),
        "help": "compare each text with its translation, or whole groups; auto: paired where that can be done "
        "(default: paired)",
    },
    "kind": {
        "choices": ("full", "topk", "count"),
        "help": "scores over all experts, weights of the chosen ones, or how often they are chosen (default: full)",
    },
    "top": {"type": positive, "metavar": "N", "help": "number of experts per layer (default: top-k)"},
    "correct": {
        "choices": ("floor", "rarefy", "jackknife", "rarefy+floor", "jackknife+floor"),
        "help": "correct for short texts: subtract the divergence of unrelated sentences of one language, compare "
        "equally many selections, or remove the bias of first order; all but the first need --kind count",
    },
    "rule": {
        "choices": ("mexa", "retrieval", "margin", "cosine"),
        "help": f"{_RULES} (margin), or mean cosine of translations (cosine)",
    },
    "center": {
        "action": argparse.BooleanOptionalAction,
        "help": "subtract the mean of each group (default: of routing, not of vectors)",
    },
    "neighbors": {"type": positive, "metavar": "N", "help": "number of nearest items (default: that of the command)"},
    "scores": {
        "type": existing,
        "metavar": "FILE",
        "help": "a score per group: JSON {group: score}, or tab-separated lines of group and score",
    },
    "num_experts": {"type": positive, "metavar": "N", "help": "experts per layer, where the file does not say"},
    "tokenizer": {"metavar": "NAME", "help": "tokenizer for the texts of token ids: folder, hub name, or demo"},
    "selection": {"type": existing, "metavar": "FILE", "help": "selection of experts"},
    "plan": {"type": str, "metavar": "PLAN", "help": "steer by this plan: a file, or hub:OWNER/NAME/FILE"},
    "strength": {"type": float, "metavar": "X", "help": "size, or factor (default: that of the kind)"},
    "seed": {"type": int, "default": 0, "metavar": "N", "help": "of everything that is drawn (default: 0)"},
    "resamples": {"type": positive, "metavar": "N", "help": "resamples of the items"},
    "title": {"help": "title (default: none)"},
    "top_p": {"type": float, "metavar": "X", "help": "ESFT: sum of scores to reach (default: 0.2)"},
    "allocation": {
        "choices": ("uniform", "global"),
        "help": "the same share in every layer, or one ranking of all layers (default: uniform)",
    },
    "picture": {
        "type": partial(writable, suffixes=(".png", ".svg", ".pdf")),
        "metavar": "FILE",
        "help": "also draw it: .png, .svg or .pdf",
    },
    "dtype": {"default": "auto", "help": "dtype of the weights, such as bfloat16 (default: the checkpoint's)"},
}
"""Name of an option -> how it is declared. A value that is not given is None, or False, if there is no default here."""


def add(parser: argparse._ActionsContainer, *options: str, required: Iterable[str] = (), **helps: str) -> None:
    """Add options of ``OPTIONS``; ``helps`` replaces what the help of one says, where a command knows more."""
    for name in options:
        declared = dict(OPTIONS[name])
        if name in helps:
            declared["help"] = helps[name]
        if name in required:
            declared["required"] = True
        parser.add_argument(f"--{name.replace('_', '-')}", **declared)


def given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options among ``names`` that were given, or have a default, by name; a flag that is not given is left out."""
    values = {name: getattr(options, name) for name in names}
    off = {name for name, value in values.items() if value is False and options.verb.get_default(name) is False}
    return {name: value for name, value in values.items() if value is not None and name not in off}


def refuse(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse options that would be ignored (``ValueError``): those of ``names`` that differ from their default."""
    for name in names:
        if getattr(options, name) != options.verb.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} {why}: leave it out")


def statistics_arguments(parser: Parser, what: str = "statistics; several are added up") -> None:
    parser.add_argument("files", type=existing, nargs="+", metavar="FILE", help=what)


def out_argument(
    parser: argparse._ActionsContainer,
    what: str,
    *,
    required: bool = False,
    metavar: str = "FILE",
    suffixes: Sequence[str] = (),
    type: Any = None,
) -> None:
    """``-o``, ``--out``: what a command writes."""
    parse = type or partial(writable, suffixes=suffixes)
    parser.add_argument("-o", "--out", type=parse, required=required, metavar=metavar, help=what)


def table_argument(parser: Parser) -> None:
    """``--out``: keep the table of the result."""
    out_argument(parser, "keep the result as a table: .csv, .parquet, or .json (all of it)", suffixes=TABLES)


def resumable_argument(parser: Parser, command: str) -> None:
    """``--out`` for the table of a result, or for a folder in which an interrupted command goes on."""
    parse = partial(writable, suffixes=TABLES, folder=True)
    what = "keep the result as a table (.csv, .parquet, or .json: all of it), or a folder in which it is resumed"
    out_argument(parser, what, metavar="FILE|FOLDER/", type=parse)
    parser.add_argument("--force", action="store_true", help="begin the folder again")

    def refuse_other(options: argparse.Namespace) -> None:
        if options.out is not None and not options.out.suffix:
            refuse_made(options.out, command, force=options.force)
        else:
            refuse(options, ("force",), "is for a folder (--out FOLDER/), and a table is written anew")

    parser.checks.append(refuse_other)


def made_by_a_model(parser: Parser, command: str, *also: str) -> None:
    """``--force``, without which a result that took a model to make is not written over: ``--out``, and ``also``."""
    parser.add_argument("--force", action="store_true", help="write over a result that is there")

    def refuse_existing(options: argparse.Namespace) -> None:
        for path in (getattr(options, name) for name in ("out", *also)):
            if path is not None:
                refuse_made(path, command, force=options.force)

    parser.checks.append(refuse_existing)


# ---- models and texts


def model_arguments(
    parser: Parser, *, positional: bool = True, engine: bool = True, engines: Sequence[str] = ("hook", "fused")
) -> None:
    """The model of a command: MODEL or ``--model``, else ``MOE_ROUTE_MODEL``, else the demo model."""
    if positional:
        parser.add_argument(
            "named", nargs="?", metavar="MODEL", help="checkpoint folder or hub name (default: the demo model)"
        )
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="checkpoint folder or hub name (default: the demo model)")
    group.add_argument(
        "--device", help="where to put the model, such as cpu or cuda:0 (default: where it loads, the CPU for most)"
    )
    group.add_argument(
        "--device-map", metavar="MAP", help="spread the layers over devices: auto, balanced, sequential (accelerate)"
    )
    add(group, "dtype")
    if engine:
        inside = ", or vllm, which runs the model itself" if "vllm" in engines else ""
        kind = partial(_engine, tuple(engines))
        group.add_argument(
            "--engine", default="hook", type=kind, choices=engines, help=f"how to attach{inside} (default: hook)"
        )
    parser.checks.append(_choose_model)


def _engine(engines: tuple[str, ...], name: str) -> str:
    if name == "vllm" and name not in engines:
        raise argparse.ArgumentTypeError(
            "vLLM loads and runs its models itself: `moe-route record --out FOLDER/` can use it, or record inside it "
            "with mr.vllm.record (docs/serving.md)"
        )
    return name


def _choose_model(options: argparse.Namespace) -> None:
    named = getattr(options, "named", None)
    if named is not None and options.model is not None:
        raise ValueError(f"the model is named twice ({named} and --model {options.model}): leave one out")
    options.model = named or options.model or _from_environment("MOE_ROUTE_MODEL", "model") or "demo"
    if options.model.startswith((".", "/", "~")) and not Path(options.model).is_dir():
        raise ValueError(f"there is no folder {options.model!r}: give a folder with a checkpoint, or a name on the hub")


def text_arguments(parser: Parser) -> None:
    """The texts of a command: ``--data``, else ``MOE_ROUTE_TEXTS``, else general text in ten languages."""
    group = parser.add_argument_group("texts")
    group.add_argument(
        "--data",
        metavar="SOURCE",
        help="file or folder of texts (.tsv, .csv, .jsonl, .parquet, FLORES, NTREX, ...), CODE=FILE,CODE=FILE paired "
        "by line, a dataset's name, or general or arithmetic, which moe-route brings (default: general)",
    )
    group.add_argument("--columns", metavar="A,B", help="names of the columns of a table without a header")
    group.add_argument(
        "--quotes",
        choices=("csv", "none"),
        help="whether quotes in a .tsv are those of CSV (default: told by the file)",
    )
    group.add_argument("--split", metavar="NAME", help="split of a dataset, or of FLORES (default: devtest)")
    group.add_argument("--languages", type=names, metavar="A,B", help="languages to take (default: all)")
    group.add_argument("--limit", type=positive, metavar="N", help="sentences per language (default: all)")
    group.add_argument("--batch-size", type=positive, default=16, metavar="N", help="texts per batch (default: 16)")
    group.add_argument(
        "--max-length", type=positive, metavar="N", help="cut texts to N tokens (default: the model's limit)"
    )
    parser.checks.append(_choose_texts)


def _choose_texts(options: argparse.Namespace) -> None:
    options.data = options.data or _from_environment("MOE_ROUTE_TEXTS", "texts") or "general"
    files = [part.partition("=")[2] for part in options.data.split(",")] if "=" in options.data else [options.data]
    out = getattr(options, "out", None)
    if isinstance(out, Path) and any(out.glob("rank-*")):
        return  # the parts of a recording are added up without its texts
    for name in files:
        path = Path(name)
        if (path.suffix or name.startswith((".", "/", "~"))) and not path.exists():
            raise ValueError(f"{name} does not exist: check the name")


def _from_environment(variable: str, what: str) -> str | None:
    """The value of an environment variable, said on standard error."""
    value = os.environ.get(variable)
    if value:
        print(f"moe-route: the {what} of {variable}: {value}", file=sys.stderr)
    return value
