"""What a run shows while it goes on: `loss.png`, `progress.gif`, `report.html` and loggers. None may stop the run."""

from __future__ import annotations

import math
import time

from ditcli.config import ReportConfig, TrainConfig, TrainVaeConfig
from ditcli.data.folders import ImageDataset
from ditcli.errors import DitcliError
from ditcli.evaluation.pixel_features import PixelFeatures
from ditcli.progress import say
from ditcli.reporting.nearest import Neighbours, TrainingPictures, open_pictures
from ditcli.reporting.pictures import plot_loss, write_animation
from ditcli.reporting.report import write_report
from ditcli.reporting.summary import read_summary
from ditcli.runs import RunDir
from ditcli.training.loggers import open_loggers
from ditcli.training.metrics import Row
from ditcli.training.setup import Setup

SECONDS_BETWEEN_PAGES = 30.0


class Watcher:
    """Told of rows of metrics and of samples, it keeps the run's page fresh and hands all on to the loggers.

    `pictures` are what samples are compared with, or the reason why there are none. One that is not `active` does
    nothing: that of a process beside the first.
    """

    def __init__(
        self,
        config: TrainConfig | TrainVaeConfig,
        run: RunDir,
        step: int,
        pictures: TrainingPictures | str | None = None,
        *,
        active: bool = True,
    ) -> None:
        self.run, self.pictures = run, pictures
        self.neighbours: Neighbours | str | None = pictures if isinstance(pictures, str) else None
        self.active, self.loggers = active, open_loggers(config, run, step) if active else []
        self.has_failed, self.is_stale, self.written = False, True, -math.inf

    def measured(self, row: Row) -> None:
        """Hand a row of metrics to the loggers."""
        self.is_stale = True
        for logger in self.loggers:
            logger.log(row)

    def saved(self) -> None:
        """Write the page, but for what was written just before."""
        if time.monotonic() - self.written > SECONDS_BETWEEN_PAGES:
            self.refresh()

    def drawn(self, step: int) -> None:
        """Hand the grid of a step to the loggers, and write the page."""
        grid = self.run.sample_files().get(step)
        for logger in self.loggers:
            if grid:
                logger.log_image(step, grid)
        self.refresh()

    def scored(self, step: int, name: str, score: float) -> None:
        """Hand a score to the loggers, and write the page."""
        for logger in self.loggers:
            logger.log_score(step, name, score)
        self.refresh()

    def refresh(self) -> None:
        """Write curves, animation and page. What goes wrong is said once."""
        try:
            if self.active:
                self._write()
        except Exception as error:  # of what only shows the run, nothing is worth its end
            if not self.has_failed:
                say(f"Note: the report could not be written ({type(error).__name__}: {error}); training goes on.")
            self.has_failed = True
        self.written, self.is_stale = time.monotonic(), False

    def close(self) -> None:
        """A last page, and the loggers' ends."""
        if self.is_stale:
            self.refresh()
        for logger in self.loggers:
            logger.close()

    def _write(self) -> None:
        summary = read_summary(self.run)
        newest = next(reversed(summary.run.sample_files()), None)
        if isinstance(self.pictures, TrainingPictures):
            known = self.neighbours.step if isinstance(self.neighbours, Neighbours) else None
            if newest != known:
                self.neighbours = self.pictures.nearest(summary)
        if summary.rows:
            plot_loss(summary.rows, self.run.loss_file)
        write_animation(self.run)
        write_report(summary, self.neighbours)


def watch(setup: Setup, step: int) -> Watcher:
    """Of a DiT's training from `step` on; of several processes the first one watches."""
    if not setup.processes.first:
        return Watcher(setup.config, setup.run, step, active=False)
    return Watcher(setup.config, setup.run, step, _open_pictures(setup.config, setup.dataset))


def _open_pictures(config: TrainConfig, dataset: ImageDataset) -> TrainingPictures | str | None:
    """What the run's samples will be compared with, by pixels; a sentence where that is not possible."""
    if not config.sample_every:
        return None
    try:
        num = ReportConfig.num_real
        return open_pictures(dataset, config.data, PixelFeatures(), image_size=config.image_size, num=num)
    except DitcliError as error:
        return str(error)
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}"
