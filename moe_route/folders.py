"""Folders that appear whole: written under another name, and renamed when everything is in them."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["appearing", "check_folder"]


def check_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds something, or a file, by ``FileExistsError``."""
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not an empty folder: name a new one")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when the block ends, and is deleted if the block raises."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
