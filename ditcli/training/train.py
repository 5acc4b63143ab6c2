"""`ditcli train`: from a folder of pictures to a run folder with checkpoints, metrics and sample grids."""

from __future__ import annotations

import json
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ditcli.codecs.codec import numpy_decoder
from ditcli.config import FindLrConfig, TrainConfig
from ditcli.data.latents import measure, warn_of_scale
from ditcli.denoisers.torch_denoiser import as_denoiser
from ditcli.devices import bf16_peak
from ditcli.diffusion.process import Diffusion
from ditcli.images import make_grid, write_png
from ditcli.models.conv import make_network
from ditcli.models.flops import training_flops
from ditcli.progress import say
from ditcli.runs import RunDir
from ditcli.sampling import draw
from ditcli.training.batches import Batches
from ditcli.training.best import BestWeights
from ditcli.training.checkpoints import save_checkpoint
from ditcli.training.find_lr import try_rates
from ditcli.training.finetune import unfrozen
from ditcli.training.loggers import check_loggers
from ditcli.training.loop import Loop
from ditcli.training.metrics import DiffusionRow, write_metrics
from ditcli.training.power_ema import forget_snapshots, snapshot_file, write_snapshot
from ditcli.training.setup import (
    Setup,
    cached_latents,
    check_same_settings,
    make_batches,
    prepare,
    start_or_resume,
)
from ditcli.training.sharding import whole
from ditcli.training.state import TrainState, restore
from ditcli.training.step import Steps
from ditcli.training.watching import Watcher, watch
from ditcli.training.writer import Writer

if TYPE_CHECKING:
    from ditcli.evaluation.during_training import TrainingScore

MOST_CLASSES_IN_A_GRID = 8


def train(config: TrainConfig) -> RunDir:
    """Train, or go on with a run of the same settings; returns the run's folder.

    Raises ResumeError where the folder holds a run of other settings, RunInUseError where another process trains it,
    Interrupted after saving on Ctrl-C or SIGTERM, SavingError where a checkpoint cannot be written, and DitcliError
    when gradients stay not finite.
    """
    setup = prepare(config)
    lock = setup.run.lock() if setup.processes.first else nullcontext()
    with lock, Writer(setup.config.when_disk_full, setup.processes) as writer:
        _train(setup, writer)
    return setup.run


def _train(setup: Setup, writer: Writer) -> None:
    config, run, processes = setup.config, setup.run, setup.processes
    check_loggers(config.log)
    if config.lr == "auto":
        setup = _with_lr(setup, processes.agree(_former_lr(run)))
        config = setup.config
    if processes.first:
        check_same_settings(run, config, setup.dataset)
    done = processes.agree((run.saved_steps() or [0])[-1])
    if done >= config.steps:
        say(f"{run.path} already has {done:,} steps; give a higher --steps to go on.")
        return
    latents = cached_latents(setup)
    if config.lr == "auto":
        ramp = FindLrConfig(out=str(run.path / "lr.png"))
        setup = _with_lr(setup, try_rates(setup, latents, ramp).suggested)
        config = setup.config
        say(f"--lr auto: {config.lr:g}, by the curve in {ramp.out}")
    state = start_or_resume(setup)
    warn_of_scale(*measure(latents, setup.codec), setup.codec)
    diffusion = Diffusion(setup.model.diffusion)
    batches = make_batches(setup, latents, diffusion)
    batches.order = state.order
    if processes.first:
        forget_snapshots(run, state.step)
    _store_averages(setup, state, writer)  # the process may have been killed just before
    parameters, trained = (sum(p.numel() for p in ps) for ps in (state.model.parameters(), unfrozen(state.model)))
    precision = "bf16" if setup.dtype == torch.bfloat16 else "fp32"
    share = f"{trained / 1e6:.2f} M of " if trained < parameters else ""
    where = f"{setup.device}" if processes.num == 1 else f"{processes.num} x {setup.device.type}"
    say(f"Training {share}{parameters / 1e6:.1f} M parameters on {where} in {precision}; run folder {run.path}")
    score = None
    if config.eval_every:
        from ditcli.evaluation.during_training import open_training_score

        score = open_training_score(config, setup.dataset, diffusion.schedule, setup.device, processes)
    best = BestWeights(run, state.step, writer, score.name if score else None)
    with closing(watch(setup, state.step)) as watcher:
        Loop(
            config=config,
            run=run,
            state=state,
            writer=writer,
            watcher=watcher,
            take_step=Steps(setup, state, batches, diffusion).take,
            save=lambda: _save(setup, state, writer),
            draw=lambda: _draw_grid(setup, state),
            go_back=lambda checkpoint: _go_back(checkpoint, state, batches, best),
            judge=lambda rows: _judge(setup, state, rows, best, score, watcher),
            row_type=DiffusionRow,
            peak_rate=_peak_rate(setup),
        ).train()


def _peak_rate(setup: Setup) -> float | None:
    """Images/s, were the devices always busy with the model's operations in bf16; None where its peak is not known."""
    peak = bf16_peak(setup.device)
    if peak is None:
        return None
    with torch.device("meta"):
        return setup.processes.num * peak / training_flops(make_network(setup.model.dit), setup.model.dit)


def _go_back(checkpoint: Path, state: TrainState, batches: Batches, best: BestWeights) -> None:
    restore(state, checkpoint)
    if state.processes.first:
        forget_snapshots(best.run, state.step)
    state.order += 1
    batches.order = state.order
    best.rewind(state.step)


def _store_averages(setup: Setup, state: TrainState, writer: Writer) -> None:
    """Where it is time have a snapshot written, unless that was done."""
    every, step = setup.config.ema_snapshot_every, state.step
    due = state.powers and step and (step % every == 0 or step == setup.config.steps)
    if state.powers and due and not state.processes.agree(snapshot_file(setup.run, step).is_file()):
        values = writer.copy(whole(state.powers.values, state.processes), "snapshot.")
        writer.submit(lambda: write_snapshot(setup.run, step, values))


def _former_lr(run: RunDir) -> float | str:
    """What --lr auto found when the run began; `auto` for a new one."""
    return run.read_config().get("train", {}).get("lr", "auto") if run.saved_steps() else "auto"


def _with_lr(setup: Setup, lr: float | str) -> Setup:
    return replace(setup, config=replace(setup.config, lr=lr))


def _judge(
    setup: Setup,
    state: TrainState,
    rows: list[DiffusionRow],
    best: BestWeights,
    score: TrainingScore | None,
    watcher: Watcher,
) -> bool:
    """Where it is time, score samples of the averaged weights, or look at the loss; whether they were scored."""
    config, last = setup.config, state.step == setup.config.steps
    _store_averages(setup, state, best.writer)
    if score and (state.step % config.eval_every == 0 or last):
        denoiser = as_denoiser(state.drawing_network(), setup.model, dtype=setup.dtype)
        value = score(denoiser, numpy_decoder(setup.codec))
        best.judge_score(state.step, value, save=lambda: _save(setup, state, best.writer))
        if rows:
            rows[-1] = replace(rows[-1], score=value)
            if setup.processes.first:
                write_metrics(setup.run.metrics_file, rows, DiffusionRow)
        watcher.scored(state.step, score.name, value)
        return True
    if not score and (state.step % config.checkpoint_every == 0 or last):
        best.judge_loss(state.step, rows, save=lambda: _save(setup, state, best.writer))
    return False


def _save(setup: Setup, state: TrainState, writer: Writer) -> None:
    """Have a copy of the state written, unless that was done after this very step."""
    if writer.saved == state.step:
        return
    model, keep = replace(setup.model, step=state.step), setup.config.keep_checkpoints
    weights, tensors = writer.copy(state.weights(), "average."), writer.copy(state.tensors())
    writer.submit_checkpoint(state.step, lambda: save_checkpoint(setup.run, model, weights, tensors, keep=keep))


def _draw_grid(setup: Setup, state: TrainState) -> None:
    """A row of samples per class from the averaged weights, with the same starting noise every time."""
    config, names = setup.config, setup.model.class_names[:MOST_CLASSES_IN_A_GRID]
    rows = max(len(names), 1)
    part = setup.processes.part(rows * config.sample_num)
    drawn = list(
        draw(
            as_denoiser(state.drawing_network(), setup.model, dtype=setup.dtype),
            numpy_decoder(setup.codec),
            labels=[i // config.sample_num for i in part],
            seeds=[i % config.sample_num for i in part],
            cfg=config.sample_cfg if names else 1.0,
            steps=config.sample_steps,
        )
    )
    images = [image for images in setup.processes.collect(drawn) for image in images]
    if not setup.processes.first:
        return
    grid = make_grid([images[i * config.sample_num : (i + 1) * config.sample_num] for i in range(rows)], names)
    write_png(setup.run.samples / f"step-{state.step:08}.png", grid, {"ditcli": json.dumps({"step": state.step})})
