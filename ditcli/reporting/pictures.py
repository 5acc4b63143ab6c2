"""Pictures of a run: `loss.png`, `progress.gif`, and what a page embeds."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ditcli.files import replacing
from ditcli.images import read_image, write_gif
from ditcli.runs import RunDir
from ditcli.training.metrics import NOISE_LEVELS, DiffusionRow, smooth

MOST_FRAMES = 40
MOST_FRAME_PIXELS = 640  # of the longer side of an animation
MILLISECONDS, LAST_MILLISECONDS = 400, 2500


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(k * (len(steps) - 1) / (most - 1))] for k in range(most)]


def write_animation(run: RunDir) -> None:
    """`progress.gif`: the sample grids one after the other, each under its step. Nothing without grids."""
    files = run.sample_files()
    frames: list[np.ndarray] = []
    for step in spread(list(files), MOST_FRAMES):
        frame = _captioned(read_image(files[step]), f"step {step:,}")
        if frames and frame.shape != frames[0].shape:
            frames = []  # the grids had other images before
        frames.append(frame)
    if frames:
        write_gif(run.animation_file, frames, [*[MILLISECONDS] * (len(frames) - 1), LAST_MILLISECONDS])


def _captioned(grid: Image.Image, text: str) -> np.ndarray:
    """The grid with a line of text above."""
    if max(grid.size) > MOST_FRAME_PIXELS:
        grid.thumbnail((MOST_FRAME_PIXELS, MOST_FRAME_PIXELS), Image.Resampling.LANCZOS)
    height = 26
    frame = Image.new("RGB", (max(grid.width, 110), grid.height + height), "white")
    frame.paste(grid, (0, height))
    ImageDraw.Draw(frame).text((6, height // 2), text, fill="black", font=ImageFont.load_default(size=16), anchor="lm")
    return np.asarray(frame)


def plot_loss(rows: Sequence[DiffusionRow], path: Path) -> None:
    """Loss against steps, as measured and smoothed, and beside it by noise level where that is known."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = [row.step for row in rows], [row.loss for row in rows]
    by_level = any(level is not None for row in rows for level in row.noise_levels)
    figure = Figure(figsize=(12 if by_level else 8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    whole, *others = figure.subplots(1, 2 if by_level else 1, squeeze=False)[0]
    marker = "o" if len(rows) == 1 else None
    whole.plot(steps, losses, color="#9ecae1", linewidth=1, marker=marker, label="mean of an interval")
    whole.plot(steps, smooth(losses), color="#08519c", linewidth=2, marker=marker, label="smoothed")
    whole.set_ylabel("loss")
    for axes in others:
        for k in range(NOISE_LEVELS):
            known = [(row.step, level) for row in rows if (level := row.noise_levels[k]) is not None]
            label = f"t to {(k + 1) / NOISE_LEVELS:g}" + {0: " (clean)", NOISE_LEVELS - 1: " (noise)"}.get(k, "")
            color = colormaps["viridis"](k / NOISE_LEVELS)
            axes.plot(
                [step for step, _ in known],
                smooth([level for _, level in known]),
                color=color,
                linewidth=1.5,
                marker="o" if len(known) == 1 else None,
                label=label,
            )
        axes.set_ylabel("loss by noise level, smoothed")
    for axes in (whole, *others):
        values = [value for line in axes.get_lines() for value in line.get_ydata()]
        if min(values, default=0) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:.3g}")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize="small", ncols=2 if axes is not whole else 1)
    with replacing(path, lasting=False) as partial:
        figure.savefig(partial, format="png")


def embed(image: Image.Image | np.ndarray, most_pixels: int = 1200) -> str:
    """A picture as the source of an <img>: small pictures as PNG, others as JPEG, which takes a fourth."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if max(picture.size) > most_pixels:
        picture = picture.copy()
        picture.thumbnail((most_pixels, most_pixels), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    if picture.width * picture.height <= 64 * 64:
        picture.save(data, "PNG")
        kind = "png"
    else:
        picture.save(data, "JPEG", quality=90, subsampling=0)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
