"""`ditcli train-vae`: from a folder of pictures to a run folder whose `vae/` diffusers opens."""

from __future__ import annotations

import copy
import json
import math
import os
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditcli.codecs.codec import Autoencoder, AutoencoderCodec, normalise
from ditcli.codecs.folder import describe_autoencoder, save_codec
from ditcli.codecs.pixels import PixelCodec
from ditcli.codecs.reconstruct import measure_latents, perceptual_distance, psnr, reconstruct
from ditcli.config import TrainVaeConfig, VaeConfig
from ditcli.data.latents import load_latents, open_pictures
from ditcli.devices import choose_dtype, open_device
from ditcli.errors import SettingError
from ditcli.hub import find_lpips
from ditcli.images import make_grid, write_png
from ditcli.models.lpips import LPIPS, load_lpips
from ditcli.progress import say
from ditcli.runs import RunDir
from ditcli.training.batches import other_order, pick_images
from ditcli.training.checkpoints import save_checkpoint
from ditcli.training.ema import ema_decay, update_average
from ditcli.training.loggers import check_loggers
from ditcli.training.loop import Loop, apply_gradients, learning_rate
from ditcli.training.metrics import Measured, Row, append_metrics, rewind_metrics
from ditcli.training.setup import check_same_settings, default_folder, open_run
from ditcli.training.vae.discriminator import smallest_image
from ditcli.training.vae.objective import backward
from ditcli.training.vae.state import VaeState, load_state, make_network, new_state, restore, start_codebook
from ditcli.training.watching import Watcher
from ditcli.training.writer import Writer, telling

# Pixels on which the scale of the latents is measured: 64 pictures of 256x256, 1024 of 64x64.
MEASURED_PIXELS = 2**22


@dataclass(frozen=True)
class VaeRow(Row):
    """`loss` is the weighted sum of distance, LPIPS and prior: what it is made of, and the discriminator's part."""

    distance: float
    lpips: float
    prior: float
    gan_weight: float
    discriminator: float


@dataclass(frozen=True)
class ValidationRow(Measured):
    """Of the held-out pictures' reconstructions, means; LPIPS is not a number where there are no weights."""

    psnr: float
    lpips: float


def train_vae(config: TrainVaeConfig) -> RunDir:
    """Train, or go on with a run of the same settings; returns the run's folder, whose `vae/` is the result.

    Raises ResumeError where the folder holds a run of other settings, ModelNotFoundError without weights for LPIPS,
    RunInUseError where another process trains it, Interrupted after saving on Ctrl-C or SIGTERM, SavingError where a
    checkpoint cannot be written, and DitcliError when gradients stay not finite.
    """
    least = smallest_image(config.gan_layers)
    if config.gan_weight and config.image_size < least:
        raise SettingError(
            f"image-size is {config.image_size}, but a discriminator of {config.gan_layers} layers needs {least} at "
            "least: give fewer --gan-layers, or --gan-weight 0."
        )
    check_loggers(config.log)
    run = RunDir(Path(config.out) if config.out else default_folder(config.data, "vae", config.image_size))
    with run.lock(), Writer(config.when_disk_full) as writer:
        _train(VaeTraining.open(config, run, writer))
    return run


def _train(training: VaeTraining) -> None:
    config, run, state = training.config, training.run, training.state
    say(f"Held-out images: {len(training.held_out)}; training images: {len(training.rows)}.")
    if state.step >= config.steps:
        say(f"{run.path} already has {state.step:,} steps; give a higher --steps to go on.")
        training.export()
        training.writer.finish()
        return
    if state.step == 0 and config.kind == "vq":
        start_codebook(state, normalise(training.images(0)), config.seed)
    rewind_metrics(run.validation_file, state.step, ValidationRow)
    parameters = sum(p.numel() for p in state.model.parameters())
    precision = "bf16" if training.dtype == torch.bfloat16 else "fp32"
    say(f"Training {parameters / 1e6:.1f} M parameters on {training.device} in {precision}; run folder {run.path}")
    with closing(Watcher(config, run, state.step)) as watcher:
        Loop(
            config=config,
            run=run,
            state=state,
            writer=training.writer,
            watcher=watcher,
            take_step=training.take_step,
            save=training.save,
            draw=training.validate,
            go_back=training.go_back,
            row_type=VaeRow,
        ).train()


@dataclass
class VaeTraining:
    """A run while it is being trained. `pixels` (N, 3, H, W) are uint8 pictures on disk."""

    config: TrainVaeConfig
    run: RunDir
    writer: Writer
    state: VaeState
    pixels: np.ndarray
    perceptual: LPIPS | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(cls, config: TrainVaeConfig, run: RunDir, writer: Writer) -> VaeTraining:
        """Open data, networks and run folder."""
        device = open_device(config.device)
        dtype = choose_dtype(config.precision, device)
        perceptual = None
        if config.lpips != "none" and config.lpips_weight > 0:
            perceptual = load_lpips(find_lpips(config.lpips)).to(device)
            perceptual.check_size(config.image_size)
        dataset = open_pictures(config.data)
        say(f"{config.data}: {dataset.layout}; {dataset.summary()}")
        check_same_settings(run, config, dataset)
        latents = load_latents(
            dataset,
            PixelCodec(),
            image_size=config.image_size,
            flip=False,
            strict=config.strict,
            num_workers=config.num_workers or os.cpu_count() or 1,
        )
        assert isinstance(latents.moments, np.ndarray)  # as of any folder of pictures
        pixels = latents.moments[:, 0]
        if config.holdout >= len(pixels):
            raise SettingError(f"holdout is {config.holdout}, but there are only {len(pixels)} images.")
        with torch.device("meta"):
            about = VaeConfig(autoencoder=describe_autoencoder(make_network(config)), image_size=config.image_size)
        checkpoint = open_run(run, config, about, dataset, device)
        run.vae.mkdir(exist_ok=True)
        state = load_state(checkpoint, config, device) if checkpoint else new_state(config, device)
        return cls(config, run, writer, state, pixels, perceptual, device, dtype)

    @cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng((self.config.seed, 2)).permutation(len(self.pixels))

    @property
    def held_out(self) -> np.ndarray:
        """Rows of the pictures that are never trained on."""
        return np.sort(self._order[: self.config.holdout])

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of the pictures to train on."""
        return np.sort(self._order[self.config.holdout :])

    def images(self, step: int) -> Tensor:
        """uint8 images (N, 3, H, W) of a step: a function of seed and step."""
        config = self.config
        order = self.state.order
        rows = self.rows[pick_images(config.seed, step, config.batch_size, len(self.rows), order)]
        images = np.stack([self.pixels[row] for row in rows])
        flipped = (
            np.random.default_rng((config.seed, 1, step, *other_order(order))).random(len(rows)) < 0.5 * config.flip
        )
        images[flipped] = images[flipped, ..., ::-1]
        return torch.from_numpy(images).to(self.device)

    def take_step(self) -> tuple[Tensor, Tensor]:
        """One optimiser step of both networks: loss and the autoencoder's gradient norm."""
        config, state = self.config, self.state
        images = normalise(self.images(state.step)).contiguous(memory_format=torch.channels_last)
        factor = state.model.config.downsampling
        shape = (len(images), config.latent_channels, *(side // factor for side in images.shape[2:]))
        generator = torch.Generator(self.device).manual_seed(_noise_seed(config.seed, state.step, state.order))
        eps = torch.randn(shape, generator=generator, device=self.device)
        judged = config.gan_weight > 0 and state.step >= config.gan_start
        size = config.micro_batch or config.batch_size
        parts = [
            backward(
                state.model,
                images[part],
                eps[part],
                config,
                perceptual=self.perceptual,
                discriminator=state.discriminator if judged else None,
                share=size / len(images),
                dtype=self.dtype,
            )
            for part in (slice(start, start + size) for start in range(0, len(images), size))
        ]
        losses = torch.stack([part.stack() for part in parts]).mean(dim=0)
        lr = learning_rate(config, state.step)
        norm = apply_gradients(state.optimizer, lr, config.clip_grad)
        if judged:
            apply_gradients(state.discriminator_optimizer, lr, config.clip_grad)
        decay = ema_decay(config.ema_decay, state.step, warmup=config.ema_warmup)
        update_average(state.average, state.model, decay)
        state.losses.append(losses)
        state.step += 1
        return losses[0], norm

    def go_back(self, checkpoint: Path) -> None:
        """To the state of a checkpoint, with another order of the images to come."""
        restore(self.state, checkpoint)
        self.state.order += 1
        rewind_metrics(self.run.validation_file, self.state.step, ValidationRow)

    def save(self) -> None:
        """Have a checkpoint written, then the averaged weights in `vae/`, unless that was done after this very step."""
        state, run, writer = self.state, self.run, self.writer
        if writer.saved == state.step:
            return
        about = VaeConfig(
            autoencoder=describe_autoencoder(state.model), image_size=self.config.image_size, step=state.step
        )
        weights, tensors = writer.copy(state.average.state_dict(), "average."), writer.copy(state.tensors())
        keep = self.config.keep_checkpoints
        writer.submit_checkpoint(state.step, lambda: save_checkpoint(run, about, weights, tensors, keep=keep))
        self.export()

    def export(self) -> None:
        """The averaged weights, with the mean and scale of their latents as measured on training images."""
        codec = self._codec()
        num = max(1, MEASURED_PIXELS // self.config.image_size**2)
        rows = np.random.default_rng((self.config.seed, 4)).permutation(self.rows)[:num]
        mean, std = measure_latents(codec, codec.encode(self._pictures(rows)))
        network = codec.network
        network.config = replace(network.config, scaling_factor=1 / max(std, 1e-6), shift_factor=mean)
        network = network.float().cpu()
        self.writer.submit(lambda: self._write(network))

    def _write(self, network: Autoencoder) -> None:
        with telling("the averaged weights", self.run.vae):
            save_codec(network, self.run.vae)

    def validate(self) -> None:
        """Reconstruct held-out images (training images where none are held out): mean PSNR and LPIPS, and a picture."""
        codec, run, step = self._codec(), self.run, self.state.step
        images = self._pictures(self.held_out if len(self.held_out) else self.rows[: self.config.sample_num])
        others = reconstruct(codec, images)
        ratio = psnr(images, others).mean().item()
        distance = perceptual_distance(self.perceptual, images, others).mean().item() if self.perceptual else math.nan
        append_metrics(run.validation_file, ValidationRow(step, ratio, distance))
        which = "held-out" if len(self.held_out) else "training"
        perceived = f", LPIPS {distance:.4f}" if self.perceptual else ""
        say(f"step {step:,}: {which} images are reconstructed at {ratio:.2f} dB PSNR{perceived}")
        rows = [list(part[: self.config.sample_num].permute(0, 2, 3, 1).numpy()) for part in (images, others)]
        grid = make_grid(rows, ["image", "reconstruction"])
        write_png(run.samples / f"step-{step:08}.png", grid, {"ditcli": json.dumps({"step": step, "psnr": ratio})})

    def _codec(self) -> AutoencoderCodec:
        """The averaged weights as a codec of unscaled latents; in float32, as they are judged."""
        network = copy.deepcopy(self.state.average)
        return AutoencoderCodec(network, name=str(self.run.path), device=self.device)  # type: ignore[arg-type]

    def _pictures(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.stack([self.pixels[row] for row in rows]))


def _noise_seed(seed: int, step: int, order: int) -> int:
    return int(np.random.default_rng((seed, 5, step, *other_order(order))).integers(2**63))
