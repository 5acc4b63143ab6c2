"""The numbers and pictures of a run for TensorBoard, Weights & Biases and Trackio: optional extras, several at once."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ditcli.config import TrainConfig, TrainVaeConfig
from ditcli.errors import SettingError
from ditcli.images import read_image
from ditcli.progress import say
from ditcli.runs import RunDir
from ditcli.training.metrics import Row

PROJECT = "ditcli"


class Backend(Protocol):
    """What a logger of the field is to us; each method may raise anything."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers measured after a step."""

    def image(self, step: int, image: np.ndarray) -> None:
        """A grid of samples, uint8 (H, W, 3)."""

    def close(self) -> None:
        """The end of the process."""


class Logger:
    """A backend that is let go when it fails, with a word to the user; the run goes on without it."""

    def __init__(self, name: str, open_backend: Callable[[], Backend]) -> None:
        self.name = name
        self.backend: Backend | None = None
        with self._sheltered():
            self.backend = open_backend()

    def log(self, row: Row) -> None:
        """A row of metrics."""
        values = {f.name: getattr(row, f.name) for f in fields(row) if f.name not in ("step", "seconds", "score")}
        self._scalars(row.step, {f"train/{name}": float(value) for name, value in values.items() if value is not None})

    def log_score(self, step: int, name: str, score: float) -> None:
        """A score, under what it measures."""
        self._scalars(step, {f"score/{name}": score})

    def log_image(self, step: int, path: Path) -> None:
        """A grid of samples in a file."""
        with self._sheltered():
            if self.backend:
                self.backend.image(step, np.asarray(read_image(path)))

    def close(self) -> None:
        """No more will come."""
        with self._sheltered():
            if self.backend:
                self.backend.close()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        with self._sheltered():
            if self.backend:
                self.backend.scalars(step, values)

    @contextmanager
    def _sheltered(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # whatever it is, training is worth more
            self.backend = None
            reason = " ".join(str(error).split())[:300]
            say(f"Note: --log {self.name} failed ({type(error).__name__}: {reason}); the run goes on without it.")


def check_loggers(names: tuple[str, ...]) -> None:
    """SettingError where a package is not installed, before any time goes into the run."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SettingError(
                f"log is {name!r}, but {name} is not installed: pip install 'ditcli[{name}]', or leave it out."
            )


def open_loggers(config: TrainConfig | TrainVaeConfig, run: RunDir, step: int) -> list[Logger]:
    """Those of `config.log`; a run that goes on from `step` goes on in them too."""
    kinds: dict[str, Callable[[], Backend]] = {
        "tensorboard": lambda: TensorBoard(run, step),
        "wandb": lambda: WeightsAndBiases(run, config.to_dict()),
        "trackio": lambda: Trackio(run, config.to_dict()),
    }
    return [Logger(name, kinds[name]) for name in config.log]


def stable_id(run: RunDir) -> str:
    """The same when the run goes on, another for a new run in the same folder."""
    file = run.path / ".log-id"
    if not file.is_file():
        file.write_text(f"{run.path.resolve().name}-{uuid.uuid4().hex[:6]}"[-64:])
    return file.read_text()


class TensorBoard:
    """Event files in the run's `tensorboard/`: `tensorboard --logdir runs` shows all runs."""

    def __init__(self, run: RunDir, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def image(self, step: int, image: np.ndarray) -> None:
        self.writer.add_image("samples", image, step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of project `ditcli`, whose files lie in the run's `wandb/`; offline with WANDB_MODE=offline."""

    def __init__(self, run: RunDir, settings: dict[str, Any]) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=PROJECT,
            name=run.path.name,
            id=stable_id(run),
            resume="allow",
            dir=run.path,
            config=settings,
            settings=wandb.Settings(silent=True, disable_git=True, console="off"),
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def image(self, step: int, image: np.ndarray) -> None:
        self.run.log({"samples": self.wandb.Image(image)}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of project `ditcli` in Trackio's database on this machine: `trackio show` opens it."""

    def __init__(self, run: RunDir, settings: dict[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=PROJECT, name=stable_id(run), resume="allow", config=settings, embed=False, auto_log_gpu=False
        )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step=step)

    def image(self, step: int, image: np.ndarray) -> None:
        self.trackio.log({"samples": self.trackio.Image(image)}, step=step)

    def close(self) -> None:
        self.trackio.finish()
