"""What a run folder says of its run, read at once: settings, numbers, scores, pictures."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ditcli.config import TrainConfig, TrainVaeConfig
from ditcli.errors import CheckpointError
from ditcli.progress import duration, say
from ditcli.runs import RunDir
from ditcli.training.metrics import DiffusionRow, read_metrics, read_scores, smooth


@dataclass(frozen=True)
class Summary:
    """A run as its folder had it when it was read."""

    run: RunDir
    about: dict[str, Any]
    rows: list[DiffusionRow]
    score_name: str
    scores: list[tuple[int, float]]

    @property
    def is_vae(self) -> bool:
        return TrainVaeConfig.COMMAND in self.about

    @property
    def settings(self) -> dict[str, Any]:
        """Of the command that trains."""
        return self.about.get(TrainVaeConfig.COMMAND if self.is_vae else TrainConfig.COMMAND, {})

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def step(self) -> int:
        return self.rows[-1].step if self.rows else 0

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.settings.get("steps", self.step)

    @property
    def is_done(self) -> bool:
        return 0 < self.steps <= self.step

    @cached_property
    def smoothed(self) -> list[float]:
        return smooth([row.loss for row in self.rows])

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, score) of the lowest."""
        return min(self.scores, key=lambda entry: entry[1], default=None)

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last rows; None before there are two, and when the run is done."""
        if len(self.rows) < 2 or self.is_done:
            return None
        first, last = self.rows[max(0, len(self.rows) - 10)], self.rows[-1]
        return (self.steps - last.step) * (last.seconds - first.seconds) / max(last.step - first.step, 1)

    @property
    def class_names(self) -> list[str]:
        return self.about.get("data", {}).get("classes", [])

    @property
    def sample_command(self) -> str | None:
        """What draws from the run; None for a VAE, or before the first checkpoint."""
        if self.is_vae or not self.run.model_steps():
            return None
        labels = ["--labels", *self.class_names[:3], "--cfg", "4"] if self.class_names else []
        return shlex.join(["ditcli", "sample", "--model", str(self.run.path), *labels, "--num", "4", "--grid"])

    @property
    def train_command(self) -> str | None:
        """The command that the run was begun with."""
        command = self.about.get("command", [])
        return shlex.join(["ditcli", *command[1:]]) if command else None


def read_summary(run: RunDir) -> Summary:
    """Raises CheckpointError where config.json is damaged."""
    try:
        about = run.read_config()
    except OSError as error:
        raise CheckpointError(f"{run.config_file} cannot be read ({error.strerror or error}).") from error
    return Summary(run, about, read_metrics(run.metrics_file, DiffusionRow), *read_scores(run.scores_file))


def read_summaries(runs: Sequence[RunDir]) -> list[Summary]:
    """Of those runs that can be read; of the others it is said why not."""
    summaries = []
    for run in runs:
        try:
            summaries.append(read_summary(run))
        except CheckpointError as error:
            say(f"Note: {error}")
    return summaries


def facts(summary: Summary) -> dict[str, Any]:
    """The numbers of a run, ready for JSON."""
    last = summary.rows[-1] if summary.rows else None
    best = summary.best
    return {
        "run": str(summary.run.path),
        "command": TrainVaeConfig.COMMAND if summary.is_vae else TrainConfig.COMMAND,
        "step": summary.step,
        "steps": summary.steps,
        "loss": summary.smoothed[-1] if last else None,
        "score": best[1] if best else None,
        "score_name": summary.score_name or None,
        "score_step": best[0] if best else None,
        "age_seconds": round(time.time() - summary.run.last_change()),
        "images_per_second": last.images_per_second if last else None,
        "memory_gb": last.memory_gb if last else None,
        "seconds": last.seconds if last else None,
        "seconds_left": summary.seconds_left,
        "data": summary.about.get("data", {}).get("layout"),
        "images": summary.about.get("data", {}).get("images"),
        "classes": summary.class_names,
        "checkpoints": summary.run.model_steps(),
        "report": str(summary.run.report_file) if summary.run.report_file.is_file() else None,
        "sample": summary.sample_command,
    }


def list_text(summaries: Sequence[Summary]) -> str:
    """A line for each run: name, step, loss, score and age."""
    lines = [("run", "step", "loss", "score", "age")]
    for summary in summaries:
        known = facts(summary)
        loss, score = known["loss"], known["score"]
        lines.append(
            (
                summary.name,
                f"{known['step']:,} of {known['steps']:,}",
                "" if loss is None else f"{loss:.4g}",
                "" if score is None else f"{score:.4g}",
                age(known["age_seconds"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def show_text(summary: Summary) -> str:
    """A line for each fact of a run."""
    known = facts(summary)
    score = None
    if known["score"] is not None:
        score = f"{known['score']:.5g} at step {known['score_step']:,} ({known['score_name']})"
    classes = known["classes"]
    lines = {
        "run": known["run"],
        "trained by": summary.train_command,
        "data": known["images"] and f"{known['images']:,} images, {known['data']}",
        "classes": classes and f"{len(classes):,}: " + ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else ""),
        "step": f"{known['step']:,} of {known['steps']:,}",
        "loss": None if known["loss"] is None else f"{known['loss']:.5g}, smoothed",
        "best score": score,
        "speed": known["images_per_second"] and f"{known['images_per_second']:,.1f} images/s",
        "memory": known["memory_gb"] and f"{known['memory_gb']:.2f} GB",
        "time": known["seconds"] and duration(known["seconds"]),
        "time left": known["seconds_left"] and duration(known["seconds_left"]),
        "last change": f"{age(known['age_seconds'])} ago",
        "checkpoints": ", ".join(f"{step:,}" for step in known["checkpoints"]) or "none yet",
        "report": known["report"] or f"none yet: ditcli report {shlex.quote(known['run'])}",
        "draw with": known["sample"],
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items() if value)


def to_json(summaries: Summary | Sequence[Summary]) -> str:
    whole = facts(summaries) if isinstance(summaries, Summary) else [facts(summary) for summary in summaries]
    return json.dumps(whole, indent=2)


def age(seconds: float) -> str:
    """`40 s`, `3 min`, `5 h` or `2 days`."""
    for size, unit in ((86_400, "day"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit == "min" and seconds >= size):
            number = int(seconds // size)
            return f"{number} {unit}" + ("s" if unit == "day" else "")
    return f"{int(seconds)} s"
