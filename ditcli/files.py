"""Files that are there whole or not at all, whatever happens to the process or the machine while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """A name beside `path` to write to; what was written there takes its place when all of it is on the disk.

    If the block raises, `path` is as it was. With `lasting=False` the system may write later, when it likes: nothing
    is half-written after a killed process, but the newest files may be lost with the machine's power.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        if lasting:
            _sync(partial)
        partial.replace(path)
        if lasting and os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The file has the text, or what it had before."""
    with replacing(path) as partial:
        partial.write_text(text)


def remove_partials(folder: Path) -> None:
    """Clear what killed processes left half-written in a folder that no other process writes to."""
    for left in folder.glob(".*.partial") if folder.is_dir() else ():
        if left.is_file():
            left.unlink()


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
