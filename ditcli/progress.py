"""What a long task tells the user, on stderr: a bar on a terminal, now and then a plain line on a pipe.

`--quiet` and `--verbose` of every command decide how much of it is told; errors and results are told in any case.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

Verbosity = Literal["quiet", "normal", "verbose"]
SECONDS_BETWEEN_LINES: dict[Verbosity, float] = {"quiet": 10.0, "normal": 10.0, "verbose": 1.0}
BARS = "▁▂▃▄▅▆▇█"

_verbosity: Verbosity = "normal"
_began = time.monotonic()


def set_verbosity(verbosity: Verbosity) -> None:
    """How much is told from now on, by this process."""
    global _verbosity, _began
    _verbosity, _began = verbosity, time.monotonic()


def say(message: str) -> None:
    """One line to the user, beside the results on stdout; nothing with --quiet, and with --verbose after the time."""
    if _verbosity == "quiet":
        return
    stamp = f"[{time.monotonic() - _began:7.2f} s] " if _verbosity == "verbose" else ""
    print(f"{stamp}{message}", file=sys.stderr, flush=True)


def say_more(message: str) -> None:
    """A line for --verbose alone."""
    if _verbosity == "verbose":
        say(message)


def duration(seconds: float) -> str:
    """`1:02:03`, or `02:03` below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


def sparkline(values: Sequence[float], width: int = 10) -> str:
    """The course of the last values in small, `▇▅▃▂▁`; empty where stderr is no terminal that shows it."""
    recent, stream = [value for value in values[-5 * width :] if math.isfinite(value)], sys.__stderr__
    if len(recent) < 2 or stream is None or not stream.isatty() or "utf" not in stream.encoding.lower():
        return ""
    size = -(-len(recent) // width)
    means = [sum(part) / len(part) for part in (recent[i : i + size] for i in range(0, len(recent), size))]
    low, high = min(means), max(means)
    return "".join(BARS[int((value - low) / ((high - low) or 1) * (len(BARS) - 1) + 0.5)] for value in means)


@contextmanager
def progress(task: str, total: int, *, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields ``advance(count, note)``; the bar shows count, rate and time left, and the latest note."""
    if _verbosity == "quiet":
        yield _ignore
    elif sys.stderr.isatty():
        yield from _bar(task, total, start)
    else:
        yield from _lines(task, total, start)


def _ignore(count: int, note: str = "") -> None:
    """Progress that nobody wants to see."""


def _bar(task: str, total: int, start: int) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), expand=True) as bar:
        identity = bar.add_task(task, total=total, completed=start, note="")

        def advance(count: int, note: str = "") -> None:
            bar.update(identity, advance=count, note=note)

        yield advance


def _lines(task: str, total: int, start: int) -> Iterator[Callable[[int, str], None]]:
    done, began, told = start, time.monotonic(), time.monotonic()

    def advance(count: int, note: str = "") -> None:
        nonlocal done, told
        done += count
        now = time.monotonic()
        if now - told < SECONDS_BETWEEN_LINES[_verbosity] and done < total:
            return
        told = now
        left = (total - done) * (now - began) / max(done - start, 1)
        say(f"{task}: {done:,}/{total:,}" + (f"  {note}" if note else "") + f"  {duration(left)} left")

    yield advance
