"""The run's numbers: `metrics.csv`, a row per interval, and `loss.png`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TypeVar


@dataclass(frozen=True)
class Measured:
    """A line of a file of numbers: what was measured after `step`."""

    step: int


@dataclass(frozen=True)
class Row(Measured):
    """Means over the interval that ends with `step`; `seconds` of training since the run began."""

    loss: float
    lr: float
    grad_norm: float
    images_per_second: float
    seconds: float


Rows = TypeVar("Rows", bound=Measured)


def read_metrics(path: Path, row_type: type[Rows] = Row) -> list[Rows]:  # type: ignore[assignment]
    """All whole rows; a line that a killed process left half-written ends the list."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="") as file:
        for values in list(csv.reader(file))[1:]:
            try:
                rows.append(row_type(int(values[0]), *map(float, values[1:])))
            except (ValueError, TypeError, IndexError):
                break
    return rows


def rewind_metrics(path: Path, step: int, row_type: type[Rows] = Row) -> list[Rows]:  # type: ignore[assignment]
    """Drop the rows after `step`, which the run will write again; a file without rows has the header alone."""
    rows = [row for row in read_metrics(path, row_type) if row.step <= step]
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(row_type))
        writer.writerows(astuple(row) for row in rows)
    partial.rename(path)
    return rows


def append_metrics(path: Path, row: Measured) -> None:
    """Add a row at the end of the file."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(astuple(row))


def smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Running mean that forgets by `weight` a row, unbiased at its start as in Adam."""
    smoothed, mean = [], 0.0
    for i, value in enumerate(values):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight ** (i + 1)))
    return smoothed


def plot_loss(rows: Sequence[Row], path: Path) -> None:
    """Loss against steps, as measured and smoothed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="mean of an interval")
    axes.plot(steps, smooth(losses), color="#08519c", linewidth=2, label="smoothed")
    if min(losses, default=0) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.rename(path)
