"""The settings of `ditcli train-vae`, `encode` and `decode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ditcli.config.base import Config, Loss, Precision, WhenDiskFull, check_training, option
from ditcli.config.train import DEFAULT_VAE
from ditcli.errors import SettingError

VaeKind = Literal["kl", "vq"]
TILE = 1024  # Pixels: 16 times the 0.25 GB that decoding 256x256 with the Stable Diffusion VAE takes.


@dataclass(frozen=True, kw_only=True)
class TrainVaeConfig(Config):
    """`ditcli train-vae`: the defaults are those of latent diffusion (arXiv 2112.10752) for a factor of 8."""

    data: str = option("", "Folder of images, or the name of an embedded data set (fashion-mnist).")
    out: str | None = option(None, "Run folder.  [default: runs/DATA-vae-SIZE]")
    image_size: int = option(256, "Side of the square that images are cropped and resized to.")
    flip: bool = option(True, "Train on left-right flipped images too.")
    strict: bool = option(False, "Stop at the first unreadable image instead of leaving it out.")
    holdout: int = option(64, "Images kept out of training, to measure reconstructions on.")

    kind: VaeKind = option("kl", "kl: Gaussian latents; vq: vectors of a codebook.", choices=VaeKind)
    latent_channels: int = option(4, "Channels of the latents.")
    widths: tuple[int, ...] = option(
        (128, 256, 512, 512), "Width of each stage, from the image inwards; each but the last halves the sides."
    )
    layers_per_block: int = option(2, "Residual blocks in a stage of the encoder; the decoder has one more.")
    norm_groups: int = option(32, "Groups of the group norms.")
    attention: bool = option(True, "Self-attention where the image is smallest.")
    num_codes: int = option(8192, "kind vq: vectors in the codebook.")

    loss: Loss = option("l1", "Distance between image and reconstruction: l1 or mse (L2).", choices=Loss)
    lpips: str | None = option(
        None, "LPIPS weights: a file, a folder or a Hub repository; none to go without.  [default: lpips/ in the cache]"
    )
    lpips_weight: float = option(1.0, "Weight of LPIPS.")
    kl_weight: float = option(1e-6, "kind kl: weight of the divergence from a standard Gaussian.")
    commitment_weight: float = option(0.25, "kind vq: how strongly latents are drawn to the codebook.")
    gan_weight: float = option(0.5, "Weight of the discriminator, relative to the other losses; 0 for none.")
    gan_start: int = option(50_000, "Step at which the discriminator joins in.")
    gan_width: int = option(64, "Width of the discriminator's first layer.")
    gan_layers: int = option(3, "Layers of the discriminator that halve the sides.")

    steps: int = option(200_000, "Optimiser steps in all.")
    batch_size: int = option(12, "Images per optimiser step.")
    micro_batch: int | None = option(None, "Images per forward pass; gradients accumulate.  [default: batch size]")
    lr: float = option(5e-5, "Learning rate of AdamW, for the discriminator too.")
    lr_schedule: Literal["constant", "cosine"] = option(
        "constant", "Learning rate after warm-up.", choices=("constant", "cosine")
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    beta1: float = option(0.5, "AdamW: decay of the first moment.")
    beta2: float = option(0.9, "AdamW: decay of the second moment.")
    clip_grad: float = option(0.0, "Clip the gradient norm to this; 0 leaves it.")
    ema_decay: float = option(0.999, "Decay of the averaged weights, which are the result.")
    ema_warmup: bool = option(True, "Let the decay rise as (1 + step) / (10 + step).")

    seed: int = option(0, "Seed of everything random.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option("auto", "auto is bf16 where the hardware has it.", choices=Precision)
    num_workers: int | None = option(None, "Threads that read images.  [default: number of cores]")

    log_every: int = option(50, "Steps between lines of metrics.csv.")
    log: tuple[str, ...] = option((), "Send numbers and samples to tensorboard, wandb or trackio too, or to several.")
    checkpoint_every: int = option(1000, "Steps between checkpoints.")
    keep_checkpoints: int = option(3, "Checkpoints to keep; 0 keeps all.")
    when_disk_full: WhenDiskFull = option(
        "stop",
        "Whether a checkpoint that cannot be written stops the run, or the next one has to do.",
        choices=WhenDiskFull,
    )
    sample_every: int = option(1000, "Steps between reconstructions of held-out images; 0 draws none.")
    sample_num: int = option(8, "Reconstructions in a picture.")

    COMMAND: ClassVar[str] = "train-vae"
    RESUMABLE: ClassVar[tuple[str, ...]] = (
        *("out", "steps", "device", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
        *("log", "sample_every", "sample_num", "lpips", "when_disk_full"),
    )

    def __post_init__(self) -> None:
        self._check_types()
        check_training(self)
        self._check_at_least(1, "latent_channels", "layers_per_block", "norm_groups", "gan_width", "gan_layers")
        self._check_at_least(2, "num_codes")
        self._check_at_least(0, "holdout", "lpips_weight", "kl_weight", "commitment_weight", "gan_weight", "gan_start")
        groups = self.norm_groups
        fits = len(self.widths) > 0 and all(type(n) is int and n > 0 and n % groups == 0 for n in self.widths)
        self._check("widths", fits, f"multiples of norm-groups {groups}")
        factor = 2 ** (len(self.widths) - 1)
        self._check("image_size", self.image_size % factor == 0, f"a multiple of {factor}, the factor of the VAE")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Config):
    """`ditcli encode`."""

    data: str = option("", "Folder of images, or the name of an embedded data set (fashion-mnist).")
    out: str = option("", "Folder for the latents.")
    vae: str | None = option(None, f"VAE: a local folder, a run or a Hub repository.  [default: {DEFAULT_VAE}]")
    image_size: int = option(256, "Side of the square that images are cropped and resized to.")
    label_attr: str = option("Male", "CelebA attribute that gives the two classes.")
    flip: bool = option(True, "Encode left-right flipped images too, as `ditcli train` wants them.")
    num: int | None = option(None, "Encode the first so many images only.")
    shard_size: int | None = option(None, "Images per .npy file.  [default: all in one]")
    per_image: bool = option(False, "Write one .npy per image, under the image's name.")
    reconstruct: bool = option(False, "Decode again: write image beside reconstruction, and print PSNR and LPIPS.")
    lpips: str | None = option(
        None, "LPIPS weights: a file, a folder or a Hub repository; none to go without.  [default: lpips/ in the cache]"
    )
    strict: bool = option(False, "Stop at the first unreadable image instead of leaving it out.")
    batch_size: int = option(32, "Images encoded between two notes of progress, from which a killed run goes on.")
    tile: int = option(TILE, "Images with a side above this are encoded in overlapping tiles; 0 for never.")
    num_workers: int | None = option(None, "Threads that read images.  [default: number of cores]")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option("auto", "auto is bf16 where the hardware has it.", choices=Precision)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(1, "image_size", "num", "shard_size", "batch_size", "num_workers")
        self._check("lpips", self.lpips is None or self.reconstruct, "left out without --reconstruct")
        self._check_at_least(0, "tile")
        if self.per_image and self.shard_size is not None:
            raise SettingError(f"per-image and shard-size {self.shard_size} exclude each other: give one of them.")


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(Config):
    """`ditcli decode`."""

    out: str = option("decoded", "Folder for the images.")
    vae: str | None = option(None, "Decode with this VAE instead of the one the latents were made with.")
    num: int | None = option(None, "Decode the first so many images only.")
    batch_size: int = option(16, "Images decoded at a time; changes no image.")
    tile: int = option(TILE, "Images with a side above this are decoded in overlapping tiles; 0 for never.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option("auto", "auto is bf16 where the hardware has it.", choices=Precision)

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(1, "num", "batch_size")
        self._check_at_least(0, "tile")


@dataclass(frozen=True, kw_only=True)
class VaeConfig(Config):
    """All that the checkpoint of a VAE says of itself; `autoencoder` is what config.json holds, in diffusers' words."""

    autoencoder: dict[str, Any]
    image_size: int
    step: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check("autoencoder", isinstance(self.autoencoder, dict), "settings by name")
        self._check_at_least(1, "image_size")
        self._check_at_least(0, "step")


VAE_PRESETS: dict[str, dict[str, Any]] = {
    "sd": {},
    # For 20 minutes on two CPU cores.
    "small": {
        "image_size": 64,
        "widths": (32, 64, 128),
        "layers_per_block": 1,
        "norm_groups": 8,
        "gan_width": 32,
        "gan_layers": 2,
        "gan_start": 1600,
        "batch_size": 16,
        "lr": 5e-4,
        "lr_schedule": "cosine",
        "warmup_steps": 100,
        "clip_grad": 1.0,
        "beta2": 0.99,
        "steps": 2200,
        "sample_every": 500,
        "checkpoint_every": 500,
    },
}  # fmt: skip
