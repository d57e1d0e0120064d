"""SGLang's own files, from its wheel, on a machine that cannot run it: packages that are absent are stood in for.

`make test-sglang` downloads the wheels of SGLang and of msgspec, in which SGLang's structs are, to a folder that
MOE_ROUTE_SGLANG_WHEELS names. Nothing is installed: they are unpacked, and imported while `imported` runs.
"""

from __future__ import annotations

import asyncio
import importlib.abc
import importlib.machinery
import os
import sys
import types
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WHEELS = sorted(Path(os.environ.get("MOE_ROUTE_SGLANG_WHEELS") or os.devnull).glob("*.whl"))
WHEEL = next((wheel for wheel in WHEELS if wheel.name.startswith("sglang-")), None)
ABSENT = frozenset(
    (
        *("compressed_tensors", "einops", "fastapi", "openai", "orjson", "partial_json_parser", "pybase64"),
        *("sentencepiece", "setproctitle", "starlette", "torchvision", "triton", "tvm_ffi", "uvicorn", "uvloop"),
        *("zmq", "aiohttp", "psutil"),
    )
)
"""Packages that SGLang imports, and that routing does not need. Those that are installed are taken as they are."""


class _Kind(type):
    """A class whose attributes are classes like it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class Absent(metaclass=_Kind):
    """Whatever an absent package has: a class, a decorator, a function, an object with attributes."""

    backend = "cpu"  # of Triton's driver

    def __init__(self, *args: Any, **given: Any):
        vars(self).update(given)

    def __init_subclass__(cls, **given: Any):
        pass

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def __call__(self, *args: Any, **given: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent()

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Module(types.ModuleType):
    __version__ = "3.6.0"
    EventLoopPolicy = asyncio.DefaultEventLoopPolicy

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last to be asked for a module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        here = name.partition(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if here else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        made = _Module(spec.name)
        made.__path__ = []
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def imported(folder: Path) -> Iterator[None]:
    """Let SGLang be imported from its wheels, which are unpacked to ``folder``; afterwards nothing of it is left."""
    import torch._dynamo
    import torch._higher_order_ops.triton_kernel_wrap
    import torch._inductor.select_algorithm  # before Triton seems to be there
    import torch.utils._triton

    torch.utils._triton.has_triton_package()
    torch.utils._triton.has_triton()
    for wheel in WHEELS:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    finder = _Finder()
    before = set(sys.modules)
    policy = asyncio.get_event_loop_policy()
    sys.path.insert(0, str(folder))
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path.remove(str(folder))
        asyncio.set_event_loop_policy(policy)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ABSENT | {"sglang", "msgspec"}:
                del sys.modules[name]
