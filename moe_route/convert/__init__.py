"""Import and export: read the recordings of other programs, and write what they read.

``read`` gives ``RoutingStatistics``, a ``Trace``, an ``ExpertSelection`` or a ``Plan``; ``FORMATS`` lists what it
reads, and ``TARGETS`` what ``write`` writes. Files are checked when they are read, and nothing in them is executed.
``published_routing`` reads the recording of a large model that ships with moe-route.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from operator import add, or_
from typing import Any

from moe_route.base.files import FileRefusedError
from moe_route.convert import foreign
from moe_route.convert.formats import FORMATS, TARGETS, Format, Target, format_of, options_of, readers
from moe_route.convert.source import Source, open_source
from moe_route.convert.traces import joined, statistics_of
from moe_route.convert.writers import write
from moe_route.data import shipped_routing
from moe_route.recording import RecordingError, RoutingStatistics, Trace
from moe_route.steering import ExpertSelection, Plan

__all__ = ["FORMATS", "TARGETS", "Format", "Target", "published_routing", "read", "statistics_of", "write"]

for _module in pkgutil.iter_modules(foreign.__path__):
    importlib.import_module(f"{foreign.__name__}.{_module.name}")  # its formats enter themselves

_MERGED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "statistics": lambda parts: functools.reduce(add, parts),
    "trace": joined,
    "selection": lambda parts: functools.reduce(or_, parts),
    "plan": lambda parts: functools.reduce(add, parts),
}


def read(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    format: str | None = None,
    *,
    to: str | None = None,
    **options: Any,
) -> RoutingStatistics | Trace | ExpertSelection | Plan:
    """Read a file of another program, or several, which are added up.

    Args:
        path: a file (or a folder, for "esft-choices"), or several of the same format. Statistics of several files are
            merged by group, traces put one after another, selections united, plans added.
        format: one of ``FORMATS``. By default it is found from the content, if only one format fits.
        to: "statistics", "trace", "selection" or "plan". By default what the format holds. A trace also becomes
            statistics (its sums), or a plan (its replay); a selection becomes a plan.
        options: of the format and of the conversion, such as ``top_k`` for counts without tokens. docs/files.md
            lists them.

    Raises:
        files.FileRefusedError: a file that is missing, truncated, of another kind, or whose numbers contradict each
            other; a pickle that holds anything but arrays, tables and plain containers.
        ValueError: an unknown format or option, a missing option, files of different models.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ValueError("there is no file to read: give one")
    name = ""
    parts = []
    for one in paths:
        source = open_source(os.fspath(one))
        its_format = format_of(source, format)
        name = name or its_format
        if its_format != name:
            raise ValueError(f"the files are of different formats ({name}, {its_format}): convert them one by one")
        parts.append(_read(source, name, to, options))
    kind, _, steps = readers(name, to)
    result = _MERGED[kind](parts)
    for step in steps:
        result = _run(step, result, name, options)
    return result  # type: ignore[no-any-return]


def published_routing(name: str) -> RoutingStatistics:
    """Routing of a large model that others recorded and published, from a file that ships with moe-route.

    "qwen3-30b-a3b": Qwen3-30B-A3B over the 250 prompts of MGSM in English ("en"), German ("de"), Chinese ("zh"),
    Bengali ("bn") and Swahili ("sw"), 48 layers of 128 experts, 8 a token. ``counts`` and ``weight_share`` (the sums of
    the chosen experts' gate weights, which add up to 1 for each token) are sums over the prompts' tokens, so pass
    ``by="token"``, ``kind="topk"`` and ``pairing="pooled"`` to `analysis.divergence`. The chat template is counted too.

    The recorder summed in bfloat16, so the counts of a layer miss 8 times its tokens by up to 0.03 %; the statistics
    have a tolerance of 0.001.

    Source: github.com/conctsai/Multilingualism-in-Mixture-of-Experts-LLMs, ``routing/mgsm_result``, commit
    ea1d65b66beaebc622276817cb52069a44792271, published with arXiv 2601.14050 under the MIT License, whose text lies
    beside the file in ``moe_route/data/routing``.

    Raises:
        ValueError: no file of this name ships; the message names the nearest one.
        files.FileRefusedError: the installed file is damaged.
    """
    shipped = shipped_routing()
    if name not in shipped:
        close = get_close_matches(str(name).lower(), shipped, n=1, cutoff=0.3)
        fix = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(map(repr, shipped))}"
        raise ValueError(f"no published routing {name!r} ships with moe-route: {fix}")
    return read(shipped[name], "gate-sums")  # type: ignore[return-value]


def _read(source: Source, name: str, to: str | None, options: Mapping[str, Any]) -> Any:
    """Read one file of format ``name``."""
    _, reader, steps = readers(name, to)
    accepted = options_of(reader, *steps) - {"metadata"}
    unknown = options.keys() - accepted
    if unknown:
        known = ", ".join(sorted(accepted)) or "no options"
        raise ValueError(f"{name} takes no {', '.join(sorted(unknown))} here: it takes {known}")
    try:
        return _run(reader, source, name, options)
    except FileRefusedError:
        raise
    except (RecordingError, ValueError) as error:
        said = str(error)
        raise FileRefusedError(said if said.startswith(str(source.path)) else f"{source.path}: {said}") from error
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        problem = f"it is not whole, or not {FORMATS[name].holds} ({type(error).__name__}: {error})"
        raise source.refused(problem, "get it again, or check --from") from error


def _run(function: Callable[..., Any], value: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Call a reader, or a step after it, with those options that it takes."""
    given = {**FORMATS[name].defaults, "metadata": {"format": name}, **options}
    return function(value, **{key: given[key] for key in options_of(function) & given.keys()})
