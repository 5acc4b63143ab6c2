"""Several runs on one page: their numbers in a table, their curves in one frame, their samples side by side."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ditcli.images import read_image
from ditcli.progress import duration
from ditcli.reporting.charts import Line, chart
from ditcli.reporting.pictures import embed
from ditcli.reporting.report import LEVEL_COLORS, write_page
from ditcli.reporting.summary import Summary

# Neighbours far apart in hue.
COLORS = [LEVEL_COLORS[k] for k in (1, 7, 4, 0, 6, 3, 5, 2)]


def write_comparison(summaries: Sequence[Summary], path: Path) -> Path:
    """Write the page. Where runs differ in a setting, all of them say what it is."""
    colors = [COLORS[i % len(COLORS)] for i in range(len(summaries))]
    names = _names(summaries)
    body = (
        f"<header><h1>{len(summaries)} runs compared</h1></header>"
        f"{_table(summaries, names, colors)}{_curves(summaries, names, colors)}{_samples(summaries, names, colors)}"
    )
    write_page(path, f"{len(summaries)} runs", body)
    return path


def _names(summaries: Sequence[Summary]) -> list[str]:
    """Folders' names, or where two are the same their paths."""
    names = [summary.name for summary in summaries]
    return names if len({*names}) == len(names) else [str(summary.run.path) for summary in summaries]


def _table(summaries: Sequence[Summary], names: Sequence[str], colors: Sequence[str]) -> str:
    heads = "".join(
        f'<th><i style="background:{color};display:inline-block;width:14px;height:4px;vertical-align:middle"></i> '
        f"{escape(name)}</th>"
        for name, color in zip(names, colors, strict=True)
    )
    lines = [("step", [f"{summary.step:,} of {summary.steps:,}" for summary in summaries])]
    lines.append(("loss, smoothed", [f"{s.smoothed[-1]:.5g}" if s.rows else "none yet" for s in summaries]))
    if any(summary.scores for summary in summaries):
        lines.append(("best score", [_best(summary) for summary in summaries]))
    lines.append(("images per second", [f"{s.rows[-1].images_per_second:,.1f}" if s.rows else "" for s in summaries]))
    lines.append(("time", [duration(s.rows[-1].seconds) if s.rows else "" for s in summaries]))
    keys = dict.fromkeys(key for summary in summaries for key in summary.settings)
    for key in keys:
        values: list[Any] = [summary.settings.get(key) for summary in summaries]
        if key not in ("out", "steps") and any(value != values[0] for value in values):
            lines.append((key.strip("_").replace("_", "-"), ["–" if v is None else str(v) for v in values]))
    cells = "".join(
        f"<tr><td class=dim>{escape(name)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in lines
    )
    return (
        f"<h2>Numbers, and where the settings differ</h2><div class='card scroll'><table><tr><th></th>{heads}</tr>"
        f"{cells}</table></div>"
    )


def _best(summary: Summary) -> str:
    return f"{summary.best[1]:.5g} ({summary.score_name}), at step {summary.best[0]:,}" if summary.best else "–"


def _curves(summaries: Sequence[Summary], names: Sequence[str], colors: Sequence[str]) -> str:
    def lines(points: Any) -> list[Line]:
        return [Line(n, list(points(s)), c) for s, n, c in zip(summaries, names, colors, strict=True)]

    def losses(summary: Summary, x: str) -> list[tuple[float, float]]:
        scale = 60.0 if x == "seconds" else 1.0
        return [(getattr(r, x) / scale, loss) for r, loss in zip(summary.rows, summary.smoothed, strict=True)]

    note = "smoothed; comparable where data, codec, schedule, prediction and loss are the same"
    charts = [
        chart("Loss", lines(lambda s: losses(s, "step")), note=note),
        chart("Loss against time", lines(lambda s: losses(s, "seconds")), x_name="minutes"),
        chart("Score", lines(lambda s: s.scores), note="lower is better; comparable where it measures the same"),
        chart("Gradient norm", lines(lambda s: [(row.step, row.grad_norm) for row in s.rows])),
    ]
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'


def _samples(summaries: Sequence[Summary], names: Sequence[str], colors: Sequence[str]) -> str:
    figures = []
    for summary, name, color in zip(summaries, names, colors, strict=True):
        grids = summary.run.sample_files()
        step = list(grids)[-1] if grids else None
        said = f"step {step:,}" if step is not None else "no samples yet"
        picture = f'<img src="{embed(read_image(grids[step]))}" alt="newest samples">' if step is not None else ""
        figures.append(
            f'<figure class="grids" style="border-top:4px solid {color}"><figcaption><b>{escape(name)}</b> {said}'
            f"</figcaption>{picture}</figure>"
        )
    return f'<h2>Newest samples</h2><div class="pair">{"".join(figures)}</div>'
