"""`report.html`: a run on one page that needs nothing else, neither files nor a network."""

from __future__ import annotations

import time
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ditcli.config import TrainConfig, TrainVaeConfig
from ditcli.files import replacing
from ditcli.images import read_image
from ditcli.progress import duration
from ditcli.reporting.charts import Line, chart
from ditcli.reporting.nearest import Neighbours
from ditcli.reporting.pictures import embed, spread
from ditcli.reporting.summary import Summary
from ditcli.training.metrics import NOISE_LEVELS, smooth

MOST_GRIDS = 12
SECONDS_TO_RELOAD = 60
# From nearly clean to nearly noise, told apart on white and on black.
LEVEL_COLORS = ("#7b4fd6", "#4a6fe3", "#1e90d2", "#12a5a0", "#3da755", "#94a51d", "#d98a12", "#dd5b33")


def write_report(summary: Summary, neighbours: Neighbours | str | None = None, path: Path | None = None) -> Path:
    """Write the page of a run, in its folder or as `path`; `neighbours` may be the reason why there are none."""
    parts = [
        _head(summary),
        _samples(summary),
        _curves(summary),
        _scores(summary),
        _nearest(neighbours),
        _commands(summary),
        _settings(summary),
    ]
    path = path or summary.run.report_file
    write_page(path, summary.name, "\n".join(part for part in parts if part), reload=not summary.is_done)
    return path


def write_page(path: Path, title: str, body: str, *, reload: bool = False) -> None:
    """The frame of all our pages around a body of HTML; an open one looks for news where it says so."""
    template = Template(files("ditcli.reporting").joinpath("page.html").read_text(encoding="utf-8"))
    refresh = f'<meta http-equiv="refresh" content="{SECONDS_TO_RELOAD}">' if reload else ""
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    body += f"\n<footer>Written by ditcli on {written}, from the files of the run. {_news(reload)}</footer>"
    with replacing(path, lasting=False) as partial:
        partial.write_text(template.substitute(title=escape(title), refresh=refresh, body=body), encoding="utf-8")


def _news(reload: bool) -> str:
    return "While the run goes on it is written anew, and this page reloads itself every minute." if reload else ""


def _head(summary: Summary) -> str:
    step, steps = summary.step, max(summary.steps, 1)
    share = min(100, 100 * step / steps)
    about, data = summary.about, summary.about.get("data", {})
    last = summary.rows[-1] if summary.rows else None
    tiles = []
    if last:
        tiles.append((f"{summary.smoothed[-1]:.4g}", "loss, smoothed"))
        if summary.best:
            best_step, best = summary.best
            tiles.append((f"{best:.4g}", f"best score, at step {best_step:,}"))
        tiles.append((f"{last.images_per_second:,.1f}", "images per second"))
        tiles.append((duration(last.seconds), "of training so far"))
        if summary.seconds_left is not None:
            tiles.append((f"≈ {duration(summary.seconds_left)}", "left"))
        if last.memory_gb is not None:
            tiles.append((f"{last.memory_gb:.2f} GB", "memory"))
        if skipped := sum(row.skipped or 0 for row in summary.rows):
            tiles.append((f"{skipped:,.0f}", "steps skipped: no finite gradient"))
    state = "done" if summary.is_done else f"{share:.0f} %"
    what = " · ".join(
        escape(str(word))
        for word in (
            summary.settings.get("model") or ("VAE" if summary.is_vae else None),
            f"{data.get('images', 0):,} images",
            f"{len(summary.class_names)} classes" if summary.class_names else "no labels",
            about.get("device"),
        )
        if word
    )
    shown = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in tiles)
    waiting = "" if last else "<p class=dim>No numbers yet: the first line of metrics.csv is still to come.</p>"
    return (
        f'<header><h1>{escape(summary.name)}</h1><div class="dim">{what}</div>'
        f'<div class="bar{" done" if summary.is_done else ""}"><i style="width:{share:.1f}%"></i></div>'
        f"<p><b>Step {step:,} of {steps:,}</b> · {state}</p>"
        f'<div class="tiles">{shown}</div>{waiting}</header>'
    )


def _samples(summary: Summary) -> str:
    grids = summary.run.sample_files()
    if not grids:
        every = summary.settings.get("sample_every")
        when = f"the first grid comes at step {every:,}" if every else "the run draws none (--sample-every 0)"
        return f'<h2>Samples</h2><p class="dim">None yet: {when}.</p>'
    steps = spread(list(grids), MOST_GRIDS)

    def shot(step: int, said: str = "") -> str:
        alt = escape(f"grid at step {step:,}", quote=True)
        source = embed(read_image(grids[step]))
        caption = f"<figcaption><b>{said}step {step:,}</b></figcaption>"
        return f'<div class="shot">{caption}<img src="{source}" alt="{alt}"></div>'

    names = summary.class_names
    if summary.is_vae:
        note = "The same pictures each time, and below them what is left of each after the autoencoder."
    else:
        rows = f"a row each for {_listed(names, 8)}" if names else "without labels"
        note = f"From the averaged weights and the same starting noise each time: {rows}."
    if len(steps) == 1:
        return f'<h2>Samples</h2><p class="dim">{escape(note)}</p><figure class="grids">{shot(steps[0])}</figure>'
    slide = (
        f'<input class="slide" type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        'aria-label="step of the samples shown">'
    )
    shots = "".join(shot(step) for step in steps)
    return (
        f'<h2>Samples, first to last</h2><p class="dim">{escape(note)} Move the slider to see them form.</p>'
        f'<div class="pair"><figure class="grids first">{shot(steps[0], "first: ")}</figure>'
        f'<figure class="grids">{shots}{slide}</figure></div>'
    )


def _curves(summary: Summary) -> str:
    rows = summary.rows
    if not rows:
        return ""
    loss = chart(
        "Loss",
        [
            Line("mean of an interval", [(row.step, row.loss) for row in rows], faint=True),
            Line("smoothed", list(zip((row.step for row in rows), summary.smoothed, strict=True))),
        ],
        note="should fall, ever more slowly; its start is cut off",
        settled=True,
    )
    levels = []
    for k, color in enumerate(LEVEL_COLORS):
        known = [(row.step, level) for row in rows if (level := row.noise_levels[k]) is not None]
        ends = {0: ", nearly clean", NOISE_LEVELS - 1: ", nearly noise"}.get(k, "")
        name = f"{k / NOISE_LEVELS:g} to {(k + 1) / NOISE_LEVELS:g}{ends}"
        smoothed = smooth([level for _, level in known])
        levels.append(Line(name, [(step, level) for (step, _), level in zip(known, smoothed, strict=True)], color))
    score = chart(
        summary.score_name or "Score",
        [Line("score", summary.scores, "var(--good)")],
        note="lower is better",
    )
    small: list[tuple[str, list[tuple[float, float | None]], str, bool]] = [
        ("Learning rate", [(row.step, row.lr) for row in rows], "", True),
        ("Gradient norm", [(row.step, row.grad_norm) for row in rows], "spikes mean a rate too high", False),
        ("Images per second", [(row.step, row.images_per_second) for row in rows], "", True),
        ("Memory, GB", [(row.step, row.memory_gb) for row in rows], "", True),
    ]
    charts = [
        loss,
        chart("Loss by noise level", levels, note="t from 0, the image, to 1, pure noise; smoothed", settled=True),
        score,
        *(chart(name, [Line(name, points)], note=note, zero=zero) for name, points, note, zero in small),
    ]
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>'


def _scores(summary: Summary) -> str:
    if not summary.scores or summary.best is None:
        return ""
    best = summary.best
    lines = "".join(
        f'<tr><td class="num">{step:,}</td><td class="num">{score:.5g}{" ★" if (step, score) == best else ""}</td></tr>'
        for step, score in reversed(summary.scores[-12:])
    )
    older = f" The last 12 of {len(summary.scores)}." if len(summary.scores) > 12 else ""
    return (
        f'<h2>Scores</h2><p class="dim">{escape(summary.score_name)}; lower is better. The weights of ★ are kept as '
        f"best.safetensors.{older}</p><div class='card scroll'><table><tr><th class='num'>step</th>"
        f"<th class='num'>score</th></tr>{lines}</table></div>"
    )


def _nearest(neighbours: Neighbours | str | None) -> str:
    title = "<h2>Is it reciting? The nearest training images</h2>"
    if neighbours is None:
        return ""
    if isinstance(neighbours, str):
        return f'{title}<p class="dim">Not searched: {escape(neighbours)}</p>'
    rows = []
    for label, image, nearest in neighbours.samples:
        cells = [_cell(image, label or "sample", own=True)]
        for neighbour in nearest:
            times = (
                f"{neighbour.distance / neighbours.usual:.2f} ×" if neighbours.usual else f"{neighbour.distance:.3g}"
            )
            cells.append(_cell(neighbour.image, times, title=neighbour.name))
        rows.append(f'<div class="card row">{"".join(cells)}</div>')
    if neighbours.features == "pixels":
        how = "by their pixels, made small (no network's weights were at hand: see ditcli report --features)"
    else:
        how = f"in the features of {neighbours.features}"
    return (
        f'{title}<p class="dim">Samples of step {neighbours.step:,} (framed), and beside each the nearest of '
        f"{neighbours.searched:,} training images, {escape(how)}. 1 × is how far a training image usually is from the "
        "nearest other one: much less, with a picture that looks the same, means that the model recites.</p>"
        f'<div class="near">{"".join(rows)}</div>'
    )


def _cell(image: Any, text: str, *, own: bool = False, title: str = "") -> str:
    name = escape(title or text, quote=True)
    frame = ' class="own"' if own else ""
    return f'<div title="{name}"><img src="{embed(image, 160)}" alt="{name}"{frame}><small>{escape(text)}</small></div>'


def _commands(summary: Summary) -> str:
    parts = []
    if summary.sample_command:
        parts.append(f"<h2>Draw from it</h2>{_command(summary.sample_command)}")
    if summary.train_command:
        title = "It was trained by" if summary.is_done else "To go on after a stop, run the same command again"
        parts.append(f'<p class="dim">{title}:</p>{_command(summary.train_command)}')
    return "".join(parts)


def _command(text: str) -> str:
    """Broken between its words alone."""
    return f"<pre>{' '.join(f'<span>{escape(word)}</span>' for word in text.split(' '))}</pre>"


def _settings(summary: Summary) -> str:
    settings, about = summary.settings, summary.about
    config_class = TrainVaeConfig if summary.is_vae else TrainConfig
    left = getattr(config_class, "LEFT_TO_SOURCE", {})
    known = {name: value for name, value in settings.items() if value not in (None, [], ())}
    changed = {k: v for k, v in known.items() if v not in (getattr(config_class, k, None), left.get(k))}
    model, data = about.get("model", {}), about.get("data", {})
    dit = model.get("dit")
    facts = {
        "data": f"{data.get('images', 0):,} images, {data.get('layout', '')}",
        "classes": _listed(summary.class_names, 12) or "none",
        "input": "x".join(map(str, [dit["in_channels"], *dit["input_size"]])) if dit else "",
        "diffusion": _words(model.get("diffusion", {})),
        "codec": model.get("codec", ""),
        "device": about.get("device", ""),
        "versions": _words(about.get("versions", {})),
    }
    others = {name: value for name, value in known.items() if name not in changed}
    return (
        f"<h2>Settings</h2>{_list({name: value for name, value in facts.items() if value})}"
        f"<details open><summary>Given, and other than the defaults</summary>{_list(changed)}</details>"
        f"<details><summary>Left at their defaults</summary>{_list(others)}</details>"
    )


def _list(values: dict[str, Any]) -> str:
    entries = (
        f"<div><dt>{escape(name.strip('_').replace('_', '-'))}</dt><dd>{escape(_said(value))}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="card">{"".join(entries)}</dl>'


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in values.items())


def _listed(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
