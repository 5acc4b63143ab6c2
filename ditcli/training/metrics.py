"""The run's numbers: `metrics.csv`, a row per interval."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TypeVar

from ditcli.files import replacing

NOISE_LEVELS = 8


@dataclass(frozen=True)
class Measured:
    """A line of a file of numbers: what was measured after `step`; None where a file says nothing."""

    step: int


@dataclass(frozen=True)
class Row(Measured):
    """Means over the interval that ends with `step`; `seconds` of training since the run began.

    `memory_gb` is a CUDA device's peak so far, or what the process holds where there is none. `skipped` steps changed
    no weight since their gradient was not finite; means are over those whose loss was.
    """

    loss: float
    smoothed: float | None
    lr: float
    grad_norm: float
    images_per_second: float
    seconds: float
    memory_gb: float | None
    skipped: float | None

    @classmethod
    def parts(cls, others: Sequence[float]) -> dict[str, float | None]:
        """Columns of a kind of training's own, from what its steps measured besides the loss."""
        return dict(zip([field.name for field in fields(cls)][len(fields(Row)) :], others, strict=True))


@dataclass(frozen=True)
class DiffusionRow(Row):
    """`loss_noise_k` is the loss of images at times t in ((k - 1) / 8, k / 8]: 1 is nearly clean, 8 nearly noise.

    `score` is the last one measured since `step` and before the next row; scores.csv has them all.
    """

    loss_noise_1: float | None
    loss_noise_2: float | None
    loss_noise_3: float | None
    loss_noise_4: float | None
    loss_noise_5: float | None
    loss_noise_6: float | None
    loss_noise_7: float | None
    loss_noise_8: float | None
    score: float | None

    @classmethod
    def parts(cls, others: Sequence[float]) -> dict[str, float | None]:
        """From the sums of the losses at each level, then their numbers."""
        pairs = zip(others[:NOISE_LEVELS], others[NOISE_LEVELS:], strict=True)
        levels = {f"loss_noise_{k}": total / num if num else None for k, (total, num) in enumerate(pairs, start=1)}
        return levels | {"score": None}

    @property
    def noise_levels(self) -> list[float | None]:
        return [getattr(self, f"loss_noise_{k}") for k in range(1, NOISE_LEVELS + 1)]


Rows = TypeVar("Rows", bound=Measured)


def read_metrics(path: Path, row_type: type[Rows] = Row) -> list[Rows]:  # type: ignore[assignment]
    """All whole rows; a line that a killed process left half-written ends the list.

    Columns are found by their names: those that the file lacks, as an older version's does, are None.
    """
    if not path.is_file():
        return []
    rows = []
    whole = path.read_text().rpartition("\n")[0]
    header, *lines = list(csv.reader(io.StringIO(whole))) or [[]]
    wanted = [field.name for field in fields(row_type)]
    for values in lines:
        found = dict(zip(header, values, strict=False))
        try:
            if len(values) != len(header):
                break
            numbers = {name: float(found[name]) if found.get(name) else None for name in wanted[1:]}
            rows.append(row_type(int(found["step"]), **numbers))
        except (ValueError, KeyError):
            break
    return rows


def rewind_metrics(path: Path, step: int, row_type: type[Rows] = Row) -> list[Rows]:  # type: ignore[assignment]
    """Drop the rows after `step`, which the run will write again; a file without rows has the header alone."""
    rows = [row for row in read_metrics(path, row_type) if row.step <= step]
    write_metrics(path, rows, row_type)
    return rows


def write_metrics(path: Path, rows: Sequence[Rows], row_type: type[Rows]) -> None:
    """The whole file anew."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(row_type))
        writer.writerows(astuple(row) for row in rows)


def append_metrics(path: Path, row: Measured) -> None:
    """Add a row at the end of the file; if the disk is full, OSError, and the file ends with the row before."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", newline="") as file:
            csv.writer(file).writerow(astuple(row))
    except OSError:
        os.truncate(path, size)
        raise


def read_scores(path: Path) -> tuple[str, list[tuple[int, float]]]:
    """What `scores.csv` measures, and (step, score); a line that was left half-written ends the list."""
    if not path.is_file():
        return "", []
    scores: list[tuple[int, float]] = []
    with path.open(newline="") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    for row in rows:
        try:
            scores.append((int(row[0]), float(row[1])))
        except (ValueError, IndexError):
            break
    return (header[1] if len(header) == 2 else ""), scores


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Running mean that forgets by `weight` a row, unbiased at its start as in Adam; values not finite are left out."""
    smoothed, mean, num = [], 0.0, 0
    for value in values:
        if math.isfinite(value):
            mean, num = weight * mean + (1 - weight) * value, num + 1
        smoothed.append(mean / (1 - weight**num) if num else math.nan)
    return smoothed
