"""The scores of bench_quality.py: lines of its results.jsonl, and the tables and curves of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ditcli.errors import SettingError
from ditcli.files import replacing, write_text

Row = dict[str, Any]


class Results:
    """The lines of results.jsonl; a score is found by variant, seed, and `share` of the images or `seconds`."""

    def __init__(self, path: Path, recipes: dict[str, Row]):
        self.path, self.recipes = path, recipes
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        self.rows: list[Row] = [json.loads(line) for line in lines if line.endswith("\n")]
        for row in self.rows:
            now = recipes.get(row["variant"], row["recipe"])
            if json.loads(json.dumps(now)) != row["recipe"]:
                raise SettingError(
                    f"{path} has scores of {row['variant']!r} with other settings ({row['recipe']}, now {now}): "
                    "give another --out, or --add it under another name."
                )
        write_text(
            path, "".join(json.dumps(row) + "\n" for row in self.rows)
        )  # without half a line of a killed process

    def find(self, variant: str, seed: int, at: float | str) -> Row | None:
        return next((r for r in self.rows if (r["variant"], r["seed"], r["at"]) == (variant, seed, at)), None)

    def add(self, variant: str, seed: int, at: float | str, values: Row) -> None:
        row = {**values, "variant": variant, "seed": seed, "at": at, "recipe": self.recipes.get(variant, {})}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def tables(rows: Sequence[Row], images: int, about: Sequence[str]) -> str:
    """Markdown: what was done, then means over seeds, with the lowest and the highest, at equal images and seconds."""
    floor = next(row for row in rows if row["variant"] == "floor")
    seeds = sorted({row["seed"] for row in rows if row["variant"] != "floor"})
    ends = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})" if len(seeds) > 1 else f"seed {seeds[0]} alone"
    text = ["\n\n".join(about), ""]
    text += [f"Means over {ends}, lowest to highest behind them. `FD / paper` is a mean over seeds too.", ""]
    for title, at in (f"Equal images: {images:,}", 1.0), ("Equal seconds: those of paper", "seconds"):
        text += [
            f"### {title}",
            "",
            "| recipe | FD | FD / paper | KID x 1000 | images | seconds | images/s | nearest |",
        ]
        text += ["|---|---|---|---|---|---|---|---|"]
        for name, found in by_variant(rows, at).items():
            base = {row["seed"]: row["fd"] for row in by_variant(rows, at)["paper"]}
            same = " =" if all(row.get("shared") for row in found) and name != "paper" else ""
            cells = [
                name + same,
                spread([row["fd"] for row in found], "{:.4g}"),
                spread([row["fd"] / base[row["seed"]] for row in found if row["seed"] in base], "{:.2f}"),
                spread([1000 * row["kid"] for row in found], "{:.4g}"),
                spread([row["images"] for row in found], "{:,.0f}"),
                spread([row["seconds"] for row in found], "{:,.0f}"),
                spread([row["images"] / row["seconds"] for row in found], "{:.1f}"),
                spread([row["nearest"] for row in found], "{:.2f}"),
            ]
            text.append(f"| {' | '.join(cells)} |")
        text += [f"| floor: training pictures through the codec | {floor['fd']:.4g} | | {1000 * floor['kid']:.4g} |"
                 + " |" * 4, ""]  # fmt: skip
    text.append("= is the score at equal images: within 3 % (or a batch) as many were seen in those seconds.\n")
    return "\n".join(text)


def by_variant(rows: Sequence[Row], at: float | str) -> dict[str, list[Row]]:
    """The rows of each variant at a point, in the order in which they came."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["at"] == at and row["variant"] != "floor":
            found.setdefault(row["variant"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[0] != "paper"))


def spread(values: Sequence[float], form: str) -> str:
    """`41.2 (40.1..42.3)`; one number where the ends look the same."""
    if not values:
        return "–"
    low, high = form.format(min(values)), form.format(max(values))
    mean = form.format(sum(values) / len(values))
    return mean if low == high else f"{mean} ({low}..{high})"


def curves(rows: Sequence[Row], path: Path, features: str) -> None:
    """FD and KID against images seen: a line of means for each variant, a dot for each seed."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    floor = next(row for row in rows if row["variant"] == "floor")
    points = sorted({row["at"] for row in rows if row["at"] != "seconds"})
    names = list(by_variant(rows, 1.0))
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    figure = Figure(figsize=(12, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    sides: list[tuple[str, Callable[[Row], float]]] = [
        ("Frechet distance", lambda row: row["fd"]),
        ("kernel distance x 1000", lambda row: 1000 * row["kid"]),
    ]
    left, right = figure.subplots(1, 2)
    for axes, (title, value) in zip((left, right), sides, strict=True):
        for i, name in enumerate(names):
            color, line = colors[i % len(colors)], []
            for at in points:
                found = by_variant(rows, at).get(name, [])
                axes.plot([row["images"] for row in found], [value(row) for row in found], ".", color=color, alpha=0.5)
                if found:
                    line.append((found[0]["images"], sum(map(value, found)) / len(found)))
            width = 2.5 if name in ("paper", "fast") else 1.2
            axes.plot(*zip(*line, strict=True), color=color, linewidth=width, label=name)
        if value(floor) > 0:
            axes.axhline(value(floor), color="grey", linestyle="--", label="floor")
        axes.set_xscale("log")
        axes.set_yscale("log", nonpositive="clip")
        axes.set_xlabel("images seen")
        axes.set_ylabel(f"{title} ({features})")
        for axis in axes.xaxis, axes.yaxis:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda number, place: f"{number:,g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    with replacing(path, lasting=False) as partial:
        figure.savefig(partial, format="png")
