"""`ditcli train`: from a folder of pictures to a run folder with checkpoints, metrics and sample grids."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ditcli.codecs.codec import numpy_decoder
from ditcli.config import TrainConfig
from ditcli.data.latents import load_latents
from ditcli.denoisers.torch_denoiser import as_denoiser
from ditcli.diffusion.process import Diffusion
from ditcli.errors import DitcliError, Interrupted
from ditcli.images import make_grid, write_png
from ditcli.progress import progress, say
from ditcli.runs import RunDir
from ditcli.sampling import draw
from ditcli.training.batches import Batches
from ditcli.training.checkpoints import save_checkpoint
from ditcli.training.ema import ema_decay, update_average
from ditcli.training.metrics import Row, append_metrics, plot_loss, rewind_metrics, write_metrics
from ditcli.training.objective import diffusion_loss
from ditcli.training.setup import Setup, prepare, start_or_resume
from ditcli.training.state import TrainState

MOST_CLASSES_IN_A_GRID = 8
MOST_SKIPS_IN_A_ROW = 10


def train(config: TrainConfig) -> RunDir:
    """Train, or go on with a run of the same settings; returns the run's folder.

    Raises ResumeError where the folder holds a run of other settings, Interrupted after saving on Ctrl-C or SIGTERM,
    and DitcliError when gradients stay not finite.
    """
    setup = prepare(config)
    run = setup.run
    state = start_or_resume(setup)
    if state.step >= config.steps:
        say(f"{run.path} already has {state.step:,} steps; give a higher --steps to go on.")
        return run
    latents = load_latents(
        setup.dataset,
        setup.codec,
        image_size=config.image_size,
        flip=config.flip,
        strict=config.strict,
        num_workers=config.num_workers or torch.get_num_threads(),
    )
    diffusion = Diffusion(setup.model.diffusion)
    batches = Batches(
        latents, setup.codec, diffusion, config, num_classes=setup.model.dit.num_classes, device=setup.device
    )
    parameters = sum(p.numel() for p in state.model.parameters())
    precision = "bf16" if setup.dtype == torch.bfloat16 else "fp32"
    say(f"Training {parameters / 1e6:.1f} M parameters on {setup.device} in {precision}; run folder {run.path}")
    _loop(setup, state, batches, diffusion)
    return run


def _loop(setup: Setup, state: TrainState, batches: Batches, diffusion: Diffusion) -> None:
    config, run = setup.config, setup.run
    rows = rewind_metrics(run.metrics_file, state.step)
    write_metrics(run.metrics_file, rows)
    skipped = 0
    began = time.monotonic() - state.seconds
    interval_began, interval_step = time.monotonic(), state.step
    with _stop_signals() as stop, progress("training", config.steps, start=state.step) as advance:
        while state.step < config.steps:
            loss, norm = _step(setup, state, batches, diffusion)
            skipped = 0 if math.isfinite(norm) else skipped + 1
            if skipped > MOST_SKIPS_IN_A_ROW:
                raise DitcliError(
                    f"the gradient was not finite {skipped} times in a row at step {state.step:,}: try a lower --lr, "
                    f"--clip-grad 1 or --precision fp32. The last checkpoint in {run.path} is good."
                )
            state.seconds = time.monotonic() - began

            if state.step % config.log_every == 0 or state.step == config.steps:
                now = time.monotonic()
                rate = (state.step - interval_step) * config.batch_size / (now - interval_began)
                interval_began, interval_step = now, state.step
                mean = torch.stack(state.losses).mean().item()
                row = Row(
                    state.step,
                    mean,
                    learning_rate(config, state.step - 1),
                    norm,
                    round(rate, 2),
                    round(state.seconds, 2),
                )
                append_metrics(run.metrics_file, row)
                rows.append(row)
                state.losses.clear()
            note = f"loss {loss:.4f}"
            if rows:
                note = f"loss {rows[-1].loss:.4f}  lr {rows[-1].lr:.2g}  {rows[-1].images_per_second:.1f} images/s"
            advance(1, note)

            last = state.step == config.steps or bool(stop)
            if state.step % config.checkpoint_every == 0 or last:
                _save(setup, state)
                plot_loss(rows, run.loss_file)
            if config.sample_every and (state.step % config.sample_every == 0 or state.step == config.steps):
                _draw_grid(setup, state)
                interval_began, interval_step = time.monotonic(), state.step
            if stop and state.step < config.steps:
                raise Interrupted(f"stopped at step {state.step:,} and saved; to go on, run the same command again.")


def _step(setup: Setup, state: TrainState, batches: Batches, diffusion: Diffusion) -> tuple[float, float]:
    """One optimiser step: loss and gradient norm. A step whose gradient is not finite changes no weight."""
    config, network = setup.config, state.model
    micro_batches = batches[state.step].split(config.micro_batch or config.batch_size)
    total = torch.zeros((), device=setup.device)
    for batch in micro_batches:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16, enabled=setup.dtype == torch.bfloat16):
            losses = diffusion_loss(network, diffusion, batch, config.loss)
        loss = losses.mean() / len(micro_batches)
        loss.backward()
        total += loss.detach()

    parameters = list(network.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.clip_grad, norm)
    if torch.isfinite(norm):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, state.step)
        state.optimizer.step()
        update_average(state.average, network, ema_decay(config.ema_decay, state.step, warmup=config.ema_warmup))
    state.optimizer.zero_grad(set_to_none=True)
    state.losses.append(total)
    state.step += 1
    return total.item(), norm.item()


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of the step after `step` others: a linear warm-up, then constant or half a cosine to 0."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.lr_schedule == "cosine" and step >= config.warmup_steps:
        done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate


def _save(setup: Setup, state: TrainState) -> None:
    model = replace(setup.model, step=state.step)
    try:
        save_checkpoint(setup.run, model, state.average, state.tensors(), keep=setup.config.keep_checkpoints)
    except OSError as error:
        raise DitcliError(
            f"the checkpoint of step {state.step:,} could not be written to {setup.run.checkpoints} "
            f"({error.strerror}): the former one is kept. Make room and run the same command again."
        ) from error


def _draw_grid(setup: Setup, state: TrainState) -> None:
    """A row of samples per class from the averaged weights, with the same starting noise every time."""
    config, names = setup.config, setup.model.class_names[:MOST_CLASSES_IN_A_GRID]
    rows = max(len(names), 1)
    images = list(
        draw(
            as_denoiser(state.average, setup.model, dtype=setup.dtype),
            numpy_decoder(setup.codec),
            labels=[label for label in range(rows) for _ in range(config.sample_num)],
            seeds=list(range(config.sample_num)) * rows,
            cfg=config.sample_cfg if names else 1.0,
            steps=min(config.sample_steps, config.num_timesteps),
        )
    )
    grid = make_grid([images[i * config.sample_num : (i + 1) * config.sample_num] for i in range(rows)], names)
    write_png(setup.run.samples / f"step-{state.step:08}.png", grid, {"ditcli": json.dumps({"step": state.step})})


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is filled by the first Ctrl-C or SIGTERM; the second one has its usual effect."""
    received: list[int] = []

    def remember(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, former[signal.Signals(number)])
        say("\nFinishing the step and saving; once more to stop at once.")

    former = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
