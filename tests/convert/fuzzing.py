"""Files of every format with hostile content, by grammar: `cd tests; python -m convert.fuzzing [FORMAT ...]`.

A file is made as its program makes it; then entries of its content are replaced, removed, renamed, repeated, nested and
widened, arrays get other dtypes, shapes and strides, its container is packed, cut or altered, and pickles become other
programs. Reading it must give a result or ``FileRefusedError``, within seconds and a memory of 1 GiB more.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convert import test_formats
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st

from moe_route import convert, data
from moe_route.base import files
from moe_route.base.files import FileRefusedError
from moe_route.convert.pickles import BUILDERS
from moe_route.recording import Trace
from moe_route.steering import ExpertSelection, Plan

Draw = Callable[[st.SearchStrategy[Any]], Any]

SECONDS, MEMORY = 5, 1 << 30
BATCH = 5_000  # inputs

_LEAVES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 255, 1 << 15, 1 << 31, 1 << 40, 1 << 63, 10**30, -(10**30)),
    *(0.5, -0.0, 1e300, 5e-324, float("nan"), float("inf"), 2.0**53 + 2),
    *(
        "",
        "x",
        "0",
        "-1",
        "7",
        "999999999999",
        "1e9",
        "١",
        "layer_0",
        "token_4000000000",
        "\x1b[2J",
        "../x",
        "x" * 5000,
    ),
    *([], {}, [[]], [{}], {"": {}}, [0, 1], [[0, 1], [2]], {"0": {"1000000000000": 1}}, {"70000": {"70000": 2}}),
]
_DTYPES = ["<i8", "<i4", "<i2", "u1", "i1", "<u8", "<f8", "<f4", "<f2", "?", "<c8", "S3", "U2", "<M8[s]", "V4"]
_SHAPES = [(), (0,), (1,), (2, 3), (0, 1 << 20, 2), (3, 2, 2), (1, 2, 3, 4), (2, 0, 2), (1,) * 32, (3, 1, 200)]


def leaf(draw: Draw) -> Any:
    """A value that a reader may not expect."""
    kind = draw(st.integers(0, 9))
    if kind < 7:
        return copy.deepcopy(_LEAVES[draw(st.integers(0, len(_LEAVES) - 1))])
    if kind == 7:
        return draw(st.integers(-5, 300))
    if kind == 8:
        return draw(st.floats() | st.text(max_size=4))
    nested: Any = 1
    for _ in range(draw(st.sampled_from([3, 31, 63, 70, 600]))):
        nested = [nested] if draw(st.booleans()) else {"a": nested}
    return nested


def array(draw: Draw, like: np.ndarray | None) -> np.ndarray:
    """An array of another dtype, shape or content."""
    dtype, shape = draw(st.sampled_from(_DTYPES)), draw(st.sampled_from(_SHAPES))
    if like is None or draw(st.booleans()):
        made = np.zeros(shape, dtype)
        if made.size and made.dtype.kind in "iuf":
            made.flat[draw(st.integers(0, made.size - 1))] = draw(st.sampled_from([0, 1, 3, 100, 127]))
        return made
    made = np.array(like)
    if made.size and made.dtype.kind in "iuf":
        made.flat[draw(st.integers(0, made.size - 1))] = draw(st.sampled_from([0, 1, 2, 9, 100, 127]))
    return made.astype(dtype) if made.dtype.kind in "biuf" and dtype[-1] not in "V]" and draw(st.booleans()) else made


def edited(draw: Draw, value: Any, arrays: bool) -> Any:
    """The value with one of its entries, at some depth, made hostile; ``arrays`` where the container holds them."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return array(draw, np.asarray(value))
    here = draw(st.integers(0, 7))
    if isinstance(value, dict) and value and here:
        key = list(value)[draw(st.integers(0, len(value) - 1))]
        if here == 1:
            return {other: of for other, of in value.items() if other != key}
        if here == 2:
            name = leaf(draw)
            return {**value, name if isinstance(name, (str, int)) else str(name)[:20]: value[key]}
        return {**value, key: edited(draw, value[key], arrays)}
    if isinstance(value, (list, tuple)) and len(value) and here:
        place = draw(st.integers(0, len(value) - 1))
        parts = list(value)
        if here == 1:
            return parts[:place] + parts[place + 1 :]
        if here == 2:
            return parts + [parts[place]] * draw(st.sampled_from([1, 2, 300]))
        parts[place] = edited(draw, parts[place], arrays)
        return parts
    return array(draw, None) if arrays and draw(st.integers(0, 3)) == 0 else leaf(draw)


def altered(draw: Draw, content: bytes) -> bytes:
    """The bytes of a file, some of them changed, removed, or repeated."""
    made = bytearray(content)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(len(made) - 1, 0)))
        how = draw(st.integers(0, 4))
        if how == 0:
            del made[place:]
        elif how == 1:
            made[place : place + draw(st.sampled_from([1, 4, 8]))] = draw(
                st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"[", b"{", b'"', b"\n"])
            )
        elif how == 2:
            made[place:place] = made[place : place + 40]
        elif made:
            made[place] = draw(st.integers(0, 255))
    return bytes(made)


# ---- containers: content -> the bytes of a file


def as_json(draw: Draw, content: Any) -> bytes:
    return json.dumps(
        content, default=lambda value: value.tolist() if hasattr(value, "tolist") else str(value)
    ).encode()


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def as_lines(draw: Draw, content: Any) -> bytes:
    return b"\n".join(as_json(draw, one) for one in (content if isinstance(content, list) else [content]))


def as_npy(draw: Draw, content: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, content if isinstance(content, np.ndarray) else np.zeros(2))
    said = stream.getvalue()
    if draw(st.integers(0, 3)) == 0:  # a header that says something else, of the same length
        start = said.index(b"'shape': (") + len(b"'shape': (")
        wanted = draw(st.sampled_from([b"1099511627776, 2", b"-4, 2", b"0, 99999999999", b"9" * 18]))
        said = said[:start] + wanted + said[start + len(wanted) :]
    return said


def as_npz(draw: Draw, content: Any) -> bytes:
    stream = io.BytesIO()
    packed = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", packed) as archive:
        warnings.simplefilter("ignore")  # a name that comes twice
        for name, one in content.items() if isinstance(content, dict) else [("a", content)]:
            where = f"{name}.npy".partition("\0")[0] or "none.npy"  # as an archive cuts names; it holds no empty one
            archive.writestr(where, as_npy(draw, np.asarray(one)) if _plain(one) else b"\0" * (1 << 22))
    return stream.getvalue()


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, np.ndarray)) and not (isinstance(value, int) and abs(value) >= 1 << 63)


def as_torch(draw: Draw, content: Any) -> bytes:
    def tensors(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tensors(of) for key, of in value.items()}
        if isinstance(value, (list, tuple)):
            return [tensors(of) for of in value]
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            if draw(st.integers(0, 3)) == 0:
                return tensor[..., None].expand(*tensor.shape, draw(st.sampled_from([1, 3, 1 << 20, 1 << 40])))
            return tensor.bfloat16() if draw(st.integers(0, 5)) == 0 else tensor
        return value

    stream = io.BytesIO()
    torch.save(tensors(content), stream)
    whole = stream.getvalue()
    if draw(st.integers(0, 3)):
        return whole
    again, packed = io.BytesIO(), draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(again, "w", packed) as archive:
        for member in source.infolist():
            said = source.read(member)
            program = member.filename.endswith("data.pkl") and draw(st.booleans())
            archive.writestr(member.filename, as_program(draw, None) if program else altered(draw, said))
    return again.getvalue()


def as_pickle(draw: Draw, content: Any) -> bytes:
    said = content if isinstance(content, bytes) else pickle.dumps(content, draw(st.integers(2, 5)))
    if draw(st.integers(0, 2)):
        return said
    return as_program(draw, said)


_NAMES = sorted(BUILDERS)
_PUSHES = [
    b"N",
    b"\x88",
    b"K\x05",
    b"M\x00\x80",
    b"J\xff\xff\xff\xff",
    b"G\x7f\xf0" + b"\0" * 6,
    b"]",
    b"}",
    b")",
    b"\x8f",
]
_PUSHES += [b"\x8c\x01a", b"\x8c\x02i8", b"C\x04abcd", b"\x96\x04" + b"\0" * 7 + b"abcd", b"\x8a\x08" + b"\x7f" * 8]
_PUSHES += [b"(", b"(", b"\x8c\x07storage", b"B\xff\xff\xff\x7fab", b"\x8e" + b"\xff" * 7 + b"\x7f"]
_ACTS = [
    b"\x94",
    b"\x94",
    b"\x85",
    b"\x86",
    b"\x87",
    b"t",
    b"l",
    b"d",
    b"e",
    b"a",
    b"s",
    b"u",
    b"R",
    b"b",
    b"\x81",
    b"\x90",
]
_ACTS += [
    b"\x91",
    b"Q",
    b"0",
    b"1",
    b"2",
    b"\x92",
    b"q\x07",
    b"r\xff\xff\xff\x7f",
    b"\x95\xff\xff\xff\xff\xff\xff\0\0",
    b"o",
]


def as_program(draw: Draw, whole: bytes | None) -> bytes:
    """A pickle of opcodes that push values, share them, build containers, and call names; or nested shared parts."""
    if draw(st.integers(0, 4)) == 0:
        grown, wide = (
            b"\x80\x04]\x94",
            draw(st.sampled_from([b"]\x94(%be", b"(%bt\x94", b"}\x94(%bu", b"\x8f\x94(%b\x90"])),
        )
        for number in range(draw(st.integers(2, 90))):
            grown += wide % (b"h%c" % number * 2 * draw(st.integers(1, 3)))
        return grown + draw(st.sampled_from([b".", b"\x85.", b"}\x8c\x0dlogical_counth\x08s."]))
    parts = [b"\x80\x04"]
    for _ in range(draw(st.integers(1, 40))):
        kind = draw(st.integers(0, 9))
        if kind < 4:
            parts.append(draw(st.sampled_from(_PUSHES)))
        elif kind == 4:
            module, _, name = draw(st.sampled_from(_NAMES)).rpartition(".")
            parts.append(b"c%b\n%b\n" % (module.encode(), name.encode()))
        elif kind == 5:
            parts.append(b"h%c" % draw(st.integers(0, 12)))
        else:
            parts.append(draw(st.sampled_from(_ACTS)))
    return b"".join([*parts, b"."])


def as_own(draw: Draw, content: Any) -> bytes:
    """A file of moe-route with its hash, which a stranger can compute as well."""
    tensors = {str(name): one for name, one in content["tensors"].items() if isinstance(one, np.ndarray)}
    path = Path(tempfile.gettempdir(), f"own-{os.getpid()}")
    try:
        files.write(path, tensors, content["header"], content["kind"])
    except (TypeError, ValueError):  # a dtype or a header that no file holds
        return as_json(draw, content["header"])
    made = path.read_bytes()
    path.unlink()
    return made


# ---- formats: what a file holds, and how it is read


@functools.cache
def _own_files() -> dict[str, dict[str, Any]]:
    """Kind -> the parts of a file of moe-route."""
    with tempfile.TemporaryDirectory() as folder:
        trace: Trace = convert.read(test_formats.esft_choices(Path(folder)), top_k=2)
        selection = ExpertSelection({0: [1, 2], 1: [0]}, num_experts=4)
        plan = Plan.replay(trace) + Plan.activate(selection, strength=0.5).only(groups=["de"])
        made = {
            "statistics": convert.statistics_of(trace, num_experts=4),
            "trace": trace,
            "selection": selection,
            "plan": plan,
        }
        parts = {}
        for kind, value in made.items():
            value.save(path := Path(folder, kind))
            tensors, header = files.read(path, kind)
            parts[kind] = {"tensors": tensors, "header": header, "kind": kind}
            if kind in ("plan", "selection"):
                value.save(path := Path(folder, f"{kind}.json"))
                parts[f"{kind}.json"] = json.loads(path.read_text())
        return parts


@functools.cache
def _made(name: str) -> tuple[Any, list[Any]]:
    """The content of a file of a format, and containers that hold it."""
    if name in _own_files():
        own = _own_files()[name]
        return own, [as_json] if name.endswith(".json") else [as_own]
    if name.startswith("texts"):
        rows = [{"item": n, "eng_Latn": "A text.", "deu_Latn": 'Ein "Text".'} for n in range(3)]
        long = [{"group": "de", "item": "a", "text": "Ein Text."}, {"group": "en", "text": "A text."}]
        return (long, [as_lines]) if name == "texts.jsonl" else (rows, [_as_table])
    with tempfile.TemporaryDirectory() as folder:
        path = test_formats.MADE[name][0](Path(folder))
        if path.is_dir():
            return {one.name: one.read_bytes() for one in path.iterdir()}, [as_json]
        said = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            lines = [json.loads(line) for line in said.decode().splitlines()]
            content = lines[0] if len(lines) == 1 else lines
            return content, [as_json, as_lines] + ([as_pickle] if name == "expert-counts" else [])
        if path.suffix == ".npy":
            return np.load(path), [as_npy, as_json, as_torch, as_pickle]
        if path.suffix == ".npz":
            with np.load(path) as archive:
                return dict(archive), [as_npz, as_torch, as_pickle]
        if path.suffix == ".pt":
            return _arrays(torch.load(path, weights_only=True)), [as_torch, as_pickle]
        if name == "steermoe":
            import pandas

            frame = pandas.read_pickle(path)
            return {column: frame[column].to_numpy() for column in frame}, [as_pickle, as_npz, lambda *_: said]
        raise ValueError(name)


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_arrays(of) for of in value]
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _as_table(draw: Draw, content: Any) -> bytes:
    rows = [row for row in content if isinstance(row, dict)] if isinstance(content, list) else []
    heads = list(rows[0]) if rows else ["item"]
    lines = [heads, *([str(row.get(head)) for head in heads] for row in rows)]
    return "\n".join("\t".join(map(str, line)) for line in lines).encode(errors="replace")


FORMATS = sorted({*test_formats.MADE, "statistics", "trace", "selection", "plan", "plan.json", "selection.json"})
FORMATS += ["texts.jsonl", "texts.tsv"]
_ARRAYS = (as_npy, as_npz, as_torch, as_pickle, as_own)


@st.composite
def files_of(draw: Draw, name: str) -> dict[str, bytes]:
    """File names with their bytes: one file of a format, or those of its folder."""
    content, containers = _made(name)
    container = draw(st.sampled_from(containers))
    if name == "esft-choices":
        swaps = [(b"\t", b" "), (b"\n", b""), (b"1", b"-9"), (b"0.5", b"nan"), (b"2", b"99999"), (b"3", b"9" * 30)]
        made = {}
        for of, said in content.items():
            old, new = draw(st.sampled_from(swaps))
            made[of] = altered(draw, said.replace(old, new, draw(st.integers(0, 2))))
        return made
    for _ in range(draw(st.integers(0, 3))):
        if container is as_own:
            part = draw(st.sampled_from(["header", "header", "tensors"]))
            content = {**content, part: edited(draw, content[part], part == "tensors")}
            if not isinstance(content[part], dict):
                content[part] = {}
        else:
            content = edited(draw, content, container in _ARRAYS)
    try:
        said = container(draw, content)
    except MemoryError:  # a content that is too large to be written
        reject()
    suffix = {"texts.tsv": ".tsv", "texts.jsonl": ".jsonl"}.get(name, ".json" if container is as_json else ".x")
    return {f"mgsm_de{suffix}": said if draw(st.booleans()) else altered(draw, said)}


def read(name: str, made: dict[str, bytes], folder: Path) -> None:
    """Write the files, and read them. Any error but ``FileRefusedError`` goes on to the caller."""
    for of, said in made.items():
        (folder / of).write_bytes(said)
    path = folder if name == "esft-choices" else folder / next(iter(made))
    with contextlib.suppress(FileRefusedError):
        if name.startswith("texts"):
            for _ in data.read_texts(path):
                pass
        else:
            format_name = name.removesuffix(".json")
            repr(convert.read(path, format_name, **test_formats.MADE.get(name, (None, {}))[1]))
    with contextlib.suppress(FileRefusedError):  # what it is recognized as
        if not name.startswith("texts"):
            convert.read(path)


# ---- the command


def _too_long(number: int, frame: Any) -> None:
    raise TimeoutError(f"an input took more than {SECONDS} s")


def _allow(seconds: int) -> None:
    """Raise `TimeoutError` after so many seconds, and again each second, where a callback swallows it; 0 ends that."""
    signal.setitimer(signal.ITIMER_PROF, seconds, 1 if seconds else 0)


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Refuse more memory than allowed, and end an input that hangs, by processor time: a machine may be shared.

    Only reading is limited: an input that could be made once and not again would be another input.
    """
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.signal(signal.SIGPROF, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, most))
    _allow(SECONDS)
    try:
        yield
    finally:
        _allow(0)
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run(name: str, inputs: int, first: int) -> None:
    """Read so many inputs of a format; raises the first error of another family with the example."""
    began, done = time.monotonic(), 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for start in range(0, inputs, BATCH):
            done += _batch(name, min(BATCH, inputs - start), first + start // BATCH, Path(folder))
    _say(f"{name}: {done} inputs in {time.monotonic() - began:.0f} s (seed {first})")


def _batch(name: str, inputs: int, number: int, folder: Path) -> int:
    """Inputs of one seed. hypothesis keeps all that it drew, which would take the memory of a long run."""
    outcomes = {"read": 0}

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(files_of(name))
    def one(made: dict[str, bytes]) -> None:
        outcomes["read"] += 1
        for left in folder.iterdir():
            left.unlink()
        with _limits():
            read(name, made, folder)

    one()
    return outcomes["read"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=FORMATS, metavar="FORMAT", help="formats (default: all)")
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs of each format (default: 100000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    failed = 0
    for name in options.formats:
        _made(name)
        try:
            run(name, options.inputs, options.seed)
        except Exception:  # the other formats still run
            failed += 1
            _say(f"{name}: FAILED\n{traceback.format_exc()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
