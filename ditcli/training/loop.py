"""The loop that every training shares: steps, metrics, checkpoints, pictures, and a clean stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ditcli.config import TrainConfig, TrainVaeConfig
from ditcli.errors import DitcliError, Interrupted
from ditcli.memory import used_memory
from ditcli.progress import progress, say, sparkline
from ditcli.runs import RunDir
from ditcli.training.metrics import Row, append_metrics, rewind_metrics, smooth
from ditcli.training.trouble import ADVICE, MOST_SKIPS_IN_A_ROW, Skips, mean_of_finite, spike
from ditcli.training.watching import Watcher
from ditcli.training.writer import Writer

AnyRow = TypeVar("AnyRow", bound=Row)


class State(Protocol):
    """What the loop knows of a training's state; `losses` are those since the last row of metrics, the loss first."""

    step: int
    seconds: float
    losses: list[Tensor]


def run_loop(
    config: TrainConfig | TrainVaeConfig,
    run: RunDir,
    state: State,
    writer: Writer,
    watcher: Watcher,
    *,
    take_step: Callable[[], tuple[Tensor, Tensor]],
    save: Callable[[], object],
    draw: Callable[[], object],
    go_back: Callable[[Path], object],
    judge: Callable[[list[AnyRow]], bool] = lambda rows: False,
    row_type: type[AnyRow] = Row,  # type: ignore[assignment]
    peak_rate: float | None = None,
) -> None:
    """Call `take_step`, which gives loss and gradient norm, until `config.steps`; save and draw at their intervals.

    They are tensors on the device, which is waited for at the intervals alone, or after each step where it is the CPU.
    `peak_rate` are the images/s at which the device would do nothing but the model's operations, where that is known.
    `go_back` makes the state that of a checkpoint, with another order of the data to come, when gradients stay not
    finite. `judge` sees the rows of metrics after every step and says whether it took time that is none of training's.
    What they give the writer is written when this returns, and what goes wrong there is raised here. The watcher is
    told of all that a user may want to see. The writer's processes call everything in the same steps. Raises
    Interrupted after saving on Ctrl-C or SIGTERM to any of them, and DitcliError when gradients stay not finite.
    """
    processes = writer.processes

    def rewind(step: int) -> list[AnyRow]:
        return processes.agree(rewind_metrics(run.metrics_file, step, row_type) if processes.first else [])

    rows, unwritten = rewind(state.step), list[AnyRow]()
    skips, gone_back_to = Skips(), 0
    began = time.monotonic() - state.seconds
    interval_began, interval_step = time.monotonic(), state.step
    saving = False
    with _stop_signals() as stop, progress("training", config.steps, start=state.step) as advance:
        while state.step < config.steps:
            loss, norm = take_step()
            skips.add(norm)
            row_is_due = state.step % config.log_every == 0 or state.step == config.steps
            if row_is_due or norm.device.type == "cpu":
                skips.read()
            if skips.in_a_row > MOST_SKIPS_IN_A_ROW:
                former, failed = _former_step(run, writer, skips, state.step, gone_back_to), state.step
                go_back(run.checkpoint_file(former))
                writer.saved = former  # a later one that could not be written is tried again
                say(
                    f"The gradient was not finite {skips.in_a_row} times in a row up to step {failed:,}: going back to "
                    f"step {former:,}, and on with the data in another order."
                )
                rows, gone_back_to, skips = rewind(former), former, Skips()
                unwritten.clear()
                saving = False
                began = time.monotonic() - state.seconds
                interval_began, interval_step = time.monotonic(), former
                advance(former - failed + 1, "")
                continue
            state.seconds = time.monotonic() - began

            if row_is_due:
                now = time.monotonic()
                rate = (state.step - interval_step) * config.batch_size / (now - interval_began)
                interval_began, interval_step = now, state.step
                mean, *others = mean_of_finite(state.losses)
                row = row_type(
                    step=state.step,
                    loss=mean,
                    smoothed=smooth([*(row.loss for row in rows), mean])[-1],
                    lr=learning_rate(config, state.step - 1),
                    grad_norm=norm.item(),
                    images_per_second=round(rate, 2),
                    seconds=round(state.seconds, 2),
                    memory_gb=round(used_memory(str(state.losses[0].device)) / 1e9, 3),
                    skipped=skips.since_row,
                    **row_type.parts(others),
                )
                rows.append(row)
                unwritten += [row] if processes.first else []
                with writer.telling("metrics.csv", run.path):
                    while unwritten:
                        append_metrics(run.metrics_file, unwritten[0])
                        unwritten.pop(0)
                watcher.measured(row)
                state.losses.clear()
                skips.since_row = 0
                if jump := spike(rows):
                    say(f"Note: the loss rose to {mean:.4g} at step {state.step:,}, {jump:.1f} times what it was.")
            note = ""
            if not rows and loss.device.type == "cpu":
                note = f"loss {loss.item():.4f}"
            elif rows:
                row = rows[-1]
                trend = sparkline([row.smoothed or row.loss for row in rows[-50:]]) or f" lr {row.lr:.2g} "
                note = f"loss {row.loss:.4f} {trend} {row.images_per_second:.1f} images/s"
            if rows and peak_rate:
                note += f"  {rows[-1].images_per_second / peak_rate:.0%} MFU"
            advance(1, note)

            writer.check()
            last = state.step == config.steps
            if state.step % config.checkpoint_every == 0:
                skips.read()
                saving = True
            stopping = processes.any(stop.received)
            if (saving and not skips.in_a_row) or last or stopping:
                save()  # but not what may have to be gone back from
                saving = False
                watcher.saved()
            try:  # pictures and scores may take minutes, and change nothing that is learnt
                if processes.num == 1:
                    stop.leave_at_once()
                elif stopping:  # later they could only leave each other waiting
                    raise _StopNow
                if config.sample_every and (state.step % config.sample_every == 0 or last):
                    with writer.telling("a picture", run.samples):
                        draw()
                    watcher.drawn(state.step)
                    interval_began, interval_step = time.monotonic(), state.step
                if judge(rows):
                    interval_began, interval_step = time.monotonic(), state.step
                stop.leaving = False
            except _StopNow:
                stop.leaving = False
            if (stopping or (processes.num == 1 and stop.received)) and not last:
                save()
                writer.finish()
                raise Interrupted(f"stopped at step {state.step:,} and saved; to go on, run the same command again.")
        writer.finish()


def _former_step(run: RunDir, writer: Writer, skips: Skips, step: int, gone_back_to: int) -> int:
    """The step of the last checkpoint; DitcliError where there is none, or none since the run last went back."""
    writer.wait()
    former = writer.processes.agree((run.saved_steps() or [0])[-1])
    if former > gone_back_to:
        return former
    again = f", as before from the checkpoint of step {former:,}," if former else ""
    raise DitcliError(
        f"the gradient was not finite {skips.in_a_row} times in a row{again} up to step {step:,}. {ADVICE}"
    )


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


class _StopNow(KeyboardInterrupt):
    """Leaves what need not be finished."""


class _Stop:
    """Whether the first Ctrl-C or SIGTERM was received."""

    received = False
    leaving = False

    def leave_at_once(self) -> None:
        """From here on a signal, also one that came before, raises _StopNow as long as `leaving` is true."""
        self.leaving = True
        if self.received:
            raise _StopNow

    def receive(self) -> None:
        self.received = True
        with suppress(RuntimeError):  # the signal came while something was being printed
            say("\nFinishing the step and saving; once more to stop at once.")
        if self.leaving:
            raise _StopNow


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """The first Ctrl-C or SIGTERM is received, the second one has its usual effect."""
    stop = _Stop()

    def receive(number: int, frame: object) -> None:
        signal.signal(number, former[signal.Signals(number)])
        stop.receive()

    former = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
