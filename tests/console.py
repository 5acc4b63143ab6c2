"""Running commands in this process, as a shell would: words in; exit code, stdout and stderr out."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from ditcli.cli import main


class Done(NamedTuple):
    code: int
    out: str
    err: str


def ditcli(capture: pytest.CaptureFixture[str], *words: object) -> Done:
    """Run ``ditcli WORDS``."""
    before, sys.argv = sys.argv, ["ditcli", *map(str, words)]
    capture.readouterr()
    try:
        with pytest.raises(SystemExit) as stop:
            main.run()
    finally:
        sys.argv = before
    captured = capture.readouterr()
    return Done(stop.value.code or 0, captured.out, captured.err)


@contextmanager
def without_rights() -> Iterator[None]:
    """This thread obeys the write permissions of files even as root (Linux: without CAP_DAC_OVERRIDE)."""
    if os.name != "posix" or os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root may write anywhere")
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    before = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; low words, then high words
    assert libc.capget(header, before) == 0
    low, *others = struct.unpack("6I", before.raw)
    override = 1 << 1
    assert libc.capset(header, struct.pack("6I", low & ~override, *others)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before.raw) == 0


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a write beyond fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
