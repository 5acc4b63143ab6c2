"""Running commands in this process, as a shell would: words in; exit code, stdout and stderr out."""

from __future__ import annotations

import sys
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
