"""The sections of `moe-route bench`, and how sections are run. Loads no torch: the command line reads the table.

A new section is one entry of a table such as `SECTIONS`, and a function of an `Effort` that returns `Measured`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_route.bench.results import BenchmarkResults
    from moe_route.bench.timing import Effort

log = logging.getLogger(__name__)

PROGRAM = "moe-route bench"


@dataclass(frozen=True)
class Section:
    """One part of the benchmarks.

    Attributes:
        about: what it measures.
        measure: the function, as "module:name"; imported when the section runs.
        file: what the name of its results file ends with; sections with the same ending share a file.
        transformers: whether it runs models of transformers.
    """

    about: str
    measure: str
    file: str = ""
    transformers: bool = False


SECTIONS = {
    "gate": Section("route against softmax, top-k and bincount, 4096 rows", "moe_route.bench.gate:measure"),
    "one-row": Section("the same, one row a call", "moe_route.bench.gate:measure_one_row"),
}


@dataclass(frozen=True)
class Outcome:
    """What a run of sections gives.

    Attributes:
        data: results and comparison as JSON types, with the names of the files.
        text: the same as tables, with the names of the files.
        passed: whether no ratio regressed against the earlier results.
    """

    data: dict[str, Any]
    text: str
    passed: bool


def run_sections(
    names: Iterable[str],
    effort: Effort,
    *,
    out: Path | None = None,
    earlier: Sequence[Path] = (),
    sections: Mapping[str, Section] = SECTIONS,
    program: str = PROGRAM,
) -> Outcome:
    """Measure sections, write their results into the folder `out`, and compare them with the files of earlier runs.

    Raises FileRefusedError for an earlier file that cannot be read, before anything is measured, and the errors of
    `measure`.
    """
    from moe_route.base import files
    from moe_route.bench.comparison import compare
    from moe_route.bench.results import BenchmarkResults

    before = [BenchmarkResults.load(path) for path in earlier]
    if out is not None:
        files.make_folder(out)
    by_file: dict[str, BenchmarkResults] = {}
    for name, results in measure(names, effort, sections, program):
        by_file[name] = results
        if out is not None:  # after each section, so that a run that is cut short leaves what it has
            results.save(out / f"{name}.json")
    written = [] if out is None else [str(out / f"{name}.json") for name in by_file]
    now = BenchmarkResults.joined(list(by_file.values()))
    data, tables, passed = {**now.to_dict(), "files": written}, [*now.tables()], True
    if before:
        comparison = compare(now, before)
        data["comparison"] = comparison.to_dict()
        tables += comparison.tables()
        passed = comparison.passed
    return Outcome(data, "\n\n".join([*map(str, tables), *written]), passed)


def measure(
    names: Iterable[str], effort: Effort, sections: Mapping[str, Section] = SECTIONS, program: str = PROGRAM
) -> Iterator[tuple[str, BenchmarkResults]]:
    """Measure sections of a table with the threads that torch has now; `program` is how results say they were made.

    Yields the name of a results file and all that belongs into it so far, after each section. The name is "cpu-", the
    instruction set of the kernels, and the ending of the section.

    Raises ImportError at once if a section needs transformers and it is not installed.
    """
    names = list(dict.fromkeys(names))
    needing = [name for name in names if sections[name].transformers]
    if needing and find_spec("transformers") is None:
        raise ImportError(
            f"transformers is missing, which {', '.join(needing)} measures: pip install 'moe-route[hf]', or name other "
            "--sections"
        )
    import torch

    from moe_route.bench.results import BenchmarkResults, Measured, machine
    from moe_route.ops import library

    options = f"--rounds {effort.rounds} --threads {torch.get_num_threads()}{' --quick' if effort.quick else ''}"
    if effort.shape is not None:
        one = effort.shape
        dtype = str(one.dtype).removeprefix("torch.")
        options += f" --experts {one.experts} --top-k {one.k} --tokens {one.tokens} --dtype {dtype}"
    command = f"{program} --sections {' '.join(names)} {options}"
    by_file: dict[str, Measured] = {}
    family = library.instruction_set().removesuffix("_bf16")
    for name in names:
        section = sections[name]
        log.info("measuring %s: %s", name, section.about)
        module, _, function = section.measure.partition(":")
        measured = getattr(import_module(module), function)(effort)
        file = "-".join(filter(None, ("cpu", family, section.file)))
        by_file[file] = by_file.get(file, Measured()) + measured
        yield file, BenchmarkResults(machine(command), by_file[file])
