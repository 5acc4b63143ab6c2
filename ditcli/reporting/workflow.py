"""`ditcli report`: from run folders to a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ditcli.config import ReportConfig
from ditcli.errors import DitcliError, SettingError
from ditcli.reporting.compare import write_comparison
from ditcli.reporting.nearest import Neighbours, find_neighbours
from ditcli.reporting.pictures import plot_loss, write_animation
from ditcli.reporting.report import write_report
from ditcli.reporting.summary import read_summary
from ditcli.runs import find_run


def report(runs: Sequence[str], config: ReportConfig) -> Path:
    """Write the page of one run, beside its curves and animation, or of several compared; its path."""
    if len(runs) > 1:
        if config.features is not None:
            raise SettingError(f"features is {config.features!r}, but a comparison of runs searches no neighbours.")
        summaries = [read_summary(find_run(name)) for name in runs]
        return write_comparison(summaries, Path(config.out or "comparison.html"))
    summary = read_summary(find_run(runs[0] if runs else None))
    neighbours: Neighbours | str | None
    try:
        neighbours = find_neighbours(summary, features=config.features, weights=config.weights, num=config.num_real)
    except DitcliError as error:
        if config.features is not None:
            raise
        neighbours = str(error)
    if summary.rows:
        plot_loss(summary.rows, summary.run.loss_file)
    write_animation(summary.run)
    return write_report(summary, neighbours, Path(config.out) if config.out else None)
