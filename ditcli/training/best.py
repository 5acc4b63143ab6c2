"""The best weights of a run: those with the lowest score, or with the lowest loss where no score is computed."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ditcli.errors import CheckpointError
from ditcli.files import replacing
from ditcli.progress import say
from ditcli.runs import RunDir, read_model_config
from ditcli.training.checkpoints import link_or_copy
from ditcli.training.metrics import Row, read_scores, smooth
from ditcli.training.writer import Writer


class BestWeights:
    """Keeps `best.safetensors`, which is another name of the checkpoint it was.

    `name` says what the score measures; former scores of another name are not compared with. A score is written to
    `scores.csv`, those after `step`, where the run goes on, are dropped: they will be measured again.
    """

    def __init__(self, run: RunDir, step: int, writer: Writer, name: str | None = None) -> None:
        self.run, self.writer, self.name = run, writer, name
        self.processes = writer.processes
        self.rewind(step)

    def rewind(self, step: int) -> None:
        """Forget what came after a step."""
        run, name = self.run, self.name
        scores = [row for row in scores_of(run.scores_file, name) if row[0] <= step] if name else []
        self.scores, self.step = self.processes.agree((scores, self._former_step(step)))
        self._write_scores()

    def judge_loss(self, step: int, rows: Sequence[Row], save: Callable[[], object]) -> None:
        """Keep the checkpoint of `step` where the smoothed loss is lower than at the best one so far."""
        losses = smooth([row.loss for row in rows])
        lowest = min((loss for row, loss in zip(rows, losses, strict=True) if row.step == self.step), default=math.inf)
        if self.processes.agree(bool(losses) and losses[-1] < lowest):
            self._keep(step, save)

    def judge_score(self, step: int, score: float, save: Callable[[], object]) -> None:
        """Write the score down, and keep the checkpoint of `step` where none was lower."""
        score = self.processes.agree(score)
        lowest = min((value for _, value in self.scores), default=math.inf)
        self.scores.append((step, score))
        self._write_scores()
        best = score < lowest
        say(
            f"step {step:,}: {self.name}: {score:.5g}"
            + (", the best so far" if best else f"; the best is {lowest:.5g}")
        )
        if best:
            self._keep(step, save)

    def _keep(self, step: int, save: Callable[[], object]) -> None:
        if not self.processes.agree(self.run.checkpoint_file(step).is_file()):
            save()
        self.writer.submit(lambda: self._link(step))
        self.step = step

    def _link(self, step: int) -> None:
        checkpoint = self.run.checkpoint_file(step)
        if checkpoint.is_file():  # the disk may have been full
            link_or_copy(checkpoint, self.run.best_file)

    def _write_scores(self) -> None:
        if self.name and self.processes.first:
            write_scores(self.run.scores_file, self.name, self.scores)

    def _former_step(self, step: int) -> int | None:
        """The step of the best weights so far; None where there are none, or from a time that will come again."""
        try:
            former = read_model_config(self.run.best_file).step
        except CheckpointError:
            return None
        return former if former <= step else None


def scores_of(path: Path, name: str) -> list[tuple[int, float]]:
    """(step, score) of `scores.csv` if it measured the same."""
    found, scores = read_scores(path)
    return scores if found == name else []


def write_scores(path: Path, name: str, scores: Sequence[tuple[int, float]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", name])
        writer.writerows(scores)
