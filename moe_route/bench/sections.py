"""The sections of `moe-route bench`. Loads no torch, since the command line reads the table for its help.

A new section is one entry of `SECTIONS`, and a function of an `Effort` that returns what was `Measured`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_route.bench.results import BenchmarkResults
    from moe_route.bench.timing import Effort

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """One part of the benchmarks.

    Attributes:
        about: what it measures.
        measure: the function, as "module:name" of this package; imported when the section runs.
        file: what the name of its results file ends with; sections with the same ending share a file.
        transformers: whether it runs models of transformers.
    """

    about: str
    measure: str
    file: str = ""
    transformers: bool = False


SECTIONS = {
    "gate": Section("route against softmax, top-k and bincount, 4096 rows", "gate:measure"),
    "one-row": Section("the same, one row a call", "gate:measure_one_row"),
    "dispatch": Section(
        "dispatch, permute and combine against argsort, index_select and index_add", "dispatch:measure"
    ),
    "recording": Section(
        "recording a model that decodes, against statistics by hand", "recording:measure", transformers=True
    ),
    "recording-options": Section(
        "what each option of record adds to a prefill and a decode step",
        "recording:measure_options",
        transformers=True,
    ),
    "experts": Section(
        "the experts of one layer against those of transformers", "experts:measure", file="experts", transformers=True
    ),
}


def measure(names: Iterable[str], effort: Effort) -> Iterator[tuple[str, BenchmarkResults]]:
    """Measure sections with the threads that torch has now.

    Yields the name of a results file and all that belongs into it so far, after each section. The name is "cpu-", the
    instruction set of the kernels, and the ending of the section.

    Raises ImportError at once if a section needs transformers and it is not installed.
    """
    names = list(dict.fromkeys(names))
    needing = [name for name in names if SECTIONS[name].transformers]
    if needing and find_spec("transformers") is None:
        raise ImportError(
            f"transformers is missing, which {', '.join(needing)} measures: pip install 'moe-route[hf]', or name other "
            "--sections"
        )
    import torch

    from moe_route import _C
    from moe_route.bench.results import BenchmarkResults, Measured, machine

    options = f"--rounds {effort.rounds} --threads {torch.get_num_threads()}{' --quick' if effort.quick else ''}"
    command = f"moe-route bench --sections {' '.join(names)} {options}"
    found: dict[str, Measured] = {}
    family = _C.instruction_set().removesuffix("_bf16")
    for name in names:
        section = SECTIONS[name]
        log.info("measuring %s: %s", name, section.about)
        module, _, function = section.measure.partition(":")
        measured = getattr(import_module(f"moe_route.bench.{module}"), function)(effort)
        file = "-".join(filter(None, ("cpu", family, section.file)))
        found[file] = found.get(file, Measured()) + measured
        yield file, BenchmarkResults(machine(command), found[file])
