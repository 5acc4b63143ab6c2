"""The loop that every training shares: steps, metrics, checkpoints, pictures, and a clean stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditcli.config import TrainConfig, TrainVaeConfig
from ditcli.errors import DitcliError, Interrupted
from ditcli.memory import used_memory
from ditcli.progress import progress, say, sparkline
from ditcli.runs import RunDir
from ditcli.training.metrics import Row, append_metrics, rewind_metrics, smooth
from ditcli.training.signals import stop_signals
from ditcli.training.trouble import ADVICE, MOST_SKIPS_IN_A_ROW, Skips, mean_of_finite, spike
from ditcli.training.watching import Watcher
from ditcli.training.writer import Writer

AnyRow = TypeVar("AnyRow", bound=Row)


class State(Protocol):
    """What the loop knows of a training's state; `losses` are those since the last row of metrics, the loss first."""

    step: int
    seconds: float
    losses: list[Tensor]


@dataclass(kw_only=True)
class Loop(Generic[AnyRow]):
    """Calls `take_step`, which gives loss and gradient norm, until `config.steps`; saves and draws at their intervals.

    They are tensors on the device, which is waited for at the intervals alone, or after each step where it is the CPU.
    `peak_rate` are the images/s at which the device would do nothing but the model's operations, where that is known.
    `go_back` makes the state that of a checkpoint, with another order of the data to come, when gradients stay not
    finite. `judge` sees the rows of metrics after every step and says whether it took time that is none of training's.
    The watcher is told of all that a user may want to see. The writer's processes call everything in the same steps.
    """

    config: TrainConfig | TrainVaeConfig
    run: RunDir
    state: State
    writer: Writer
    watcher: Watcher
    take_step: Callable[[], tuple[Tensor, Tensor]]
    save: Callable[[], object]
    draw: Callable[[], object]
    go_back: Callable[[Path], object]
    judge: Callable[[list[AnyRow]], bool] = lambda rows: False
    row_type: type[AnyRow] = Row  # type: ignore[assignment]
    peak_rate: float | None = None

    def train(self) -> None:
        """What the writer was given is written when this returns, and what goes wrong there is raised here.

        Raises Interrupted after saving on Ctrl-C or SIGTERM to any of the processes, and DitcliError when gradients
        stay not finite.
        """
        config, state, writer = self.config, self.state, self.writer
        alone = writer.processes.num == 1
        self._gone_back_to = 0
        self._begin()
        with stop_signals() as stop, progress("training", config.steps, start=state.step) as advance:
            while state.step < config.steps:
                loss, norm = self.take_step()
                if self._skips_too_many(norm):
                    failed = state.step
                    self._go_back()
                    advance(state.step - failed + 1, "")
                    continue
                state.seconds = time.monotonic() - self._began
                if self._row_is_due():
                    self._measure(norm)
                advance(1, self._note(loss))
                writer.check()
                stopping = writer.processes.any(stop.received)
                self._save_where_due(stopping)
                if alone:
                    stop.may_leave(self._show)
                elif not stopping:  # one that left would leave the others waiting
                    self._show()
                if (stopping or (alone and stop.received)) and not self._is_last():
                    self.save()
                    writer.finish()
                    raise Interrupted(
                        f"stopped at step {state.step:,} and saved; to go on, run the same command again."
                    )
            writer.finish()

    def _begin(self) -> None:
        """Set out from the state's step: rows of metrics after it will be written again."""
        step, processes = self.state.step, self.writer.processes
        self._rows: list[AnyRow] = processes.agree(
            rewind_metrics(self.run.metrics_file, step, self.row_type) if processes.first else []
        )
        self._unwritten: list[AnyRow] = []
        self._skips, self._is_saving = Skips(), False
        self._began = time.monotonic() - self.state.seconds
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._interval_began, self._interval_step = time.monotonic(), self.state.step

    def _is_last(self) -> bool:
        return self.state.step == self.config.steps

    def _row_is_due(self) -> bool:
        return self.state.step % self.config.log_every == 0 or self._is_last()

    def _skips_too_many(self, norm: Tensor) -> bool:
        self._skips.add(norm)
        if self._row_is_due() or norm.device.type == "cpu":
            self._skips.read()
        return self._skips.in_a_row > MOST_SKIPS_IN_A_ROW

    def _go_back(self) -> None:
        """To the last checkpoint; DitcliError where there is none, or none since the run last went back."""
        self.writer.wait()
        step = self.state.step
        former = self.writer.processes.agree((self.run.saved_steps() or [0])[-1])
        failed = f"the gradient was not finite {self._skips.in_a_row} times in a row"
        if former <= self._gone_back_to:
            again = f", as before from the checkpoint of step {former:,}," if former else ""
            raise DitcliError(f"{failed}{again} up to step {step:,}. {ADVICE}")
        self.go_back(self.run.checkpoint_file(former))
        self.writer.saved = former  # a later one that could not be written is tried again
        going = f"going back to step {former:,}, and on with the data in another order."
        say(f"{failed[0].upper()}{failed[1:]} up to step {step:,}: {going}")
        self._gone_back_to = former
        self._begin()

    def _measure(self, norm: Tensor) -> None:
        """Add a row of metrics: the means over the interval that ends here."""
        config, state, rows = self.config, self.state, self._rows
        seconds = time.monotonic() - self._interval_began
        rate = (state.step - self._interval_step) * config.batch_size / seconds
        self._begin_interval()
        mean, *others = mean_of_finite(state.losses)
        row = self.row_type(
            step=state.step,
            loss=mean,
            smoothed=smooth([*(row.loss for row in rows), mean])[-1],
            lr=learning_rate(config, state.step - 1),
            grad_norm=norm.item(),
            images_per_second=round(rate, 2),
            seconds=round(state.seconds, 2),
            memory_gb=round(used_memory(str(state.losses[0].device)) / 1e9, 3),
            skipped=self._skips.since_row,
            **self.row_type.parts(others),
        )
        rows.append(row)
        self._unwritten += [row] if self.writer.processes.first else []
        with self.writer.telling("metrics.csv", self.run.path):
            while self._unwritten:
                append_metrics(self.run.metrics_file, self._unwritten[0])
                self._unwritten.pop(0)
        self.watcher.measured(row)
        state.losses.clear()
        self._skips.since_row = 0
        if jump := spike(rows):
            say(f"Note: the loss rose to {mean:.4g} at step {state.step:,}, {jump:.1f} times what it was.")

    def _note(self, loss: Tensor) -> str:
        """What stands behind the progress: the last row, or before the first one what costs no waiting."""
        if not self._rows:
            return f"loss {loss.item():.4f}" if loss.device.type == "cpu" else ""
        row = self._rows[-1]
        trend = sparkline([row.smoothed or row.loss for row in self._rows[-50:]]) or f" lr {row.lr:.2g} "
        note = f"loss {row.loss:.4f} {trend} {row.images_per_second:.1f} images/s"
        return note + (f"  {row.images_per_second / self.peak_rate:.0%} MFU" if self.peak_rate else "")

    def _save_where_due(self, stopping: bool) -> None:
        """At the interval, but no state that may have to be gone back from: then after the next step that is sound."""
        if self.state.step % self.config.checkpoint_every == 0:
            self._skips.read()
            self._is_saving = True
        if (self._is_saving and not self._skips.in_a_row) or self._is_last() or stopping:
            self.save()
            self._is_saving = False
            self.watcher.saved()

    def _show(self) -> None:
        """Pictures and scores where they are due, which may take minutes and change nothing that is learnt."""
        every = self.config.sample_every
        if every and (self.state.step % every == 0 or self._is_last()):
            with self.writer.telling("a picture", self.run.samples):
                self.draw()
            self.watcher.drawn(self.state.step)
            self._begin_interval()
        if self.judge(self._rows):
            self._begin_interval()


def learning_rate(config: TrainConfig | TrainVaeConfig, step: int) -> float:
    """The rate of the step after `step` others: a linear warm-up, then constant or half a cosine to 0."""
    rate = float(config.lr) * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.lr_schedule == "cosine" and step >= config.warmup_steps:
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate


def apply_gradients(optimizer: torch.optim.Optimizer, lr: float, clip: float) -> Tensor:
    """Clip, step and clear; returns the gradient norm. A gradient that is not finite changes no weight."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Where a gradient scaler would put its finding the fused optimiser looks on the device, so that nobody waits.
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
