"""The settings of `ditcli train`, its presets and the demo."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ditcli.config.base import Config, Loss, Precision, WhenDiskFull, check_training, option
from ditcli.config.model import (
    CONV_DIT,
    Conditioning,
    DiffusionConfig,
    DiTConfig,
    MLPKind,
    Prediction,
    ScheduleName,
    parse_model_name,
)
from ditcli.config.score import NETWORKS
from ditcli.errors import SettingError

TimeSampling = Literal["uniform", "logit-normal"]
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """`ditcli train`: the defaults are those of the paper (section 4)."""

    data: str = option("", "Folder of images, or the name of an embedded data set (fashion-mnist).")
    out: str | None = option(None, "Run folder.  [default: runs/DATA-MODEL-SIZE]")
    label_attr: str = option("Male", "CelebA attribute that gives the two classes.")
    image_size: int = option(
        None, "Side of the square that images are cropped and resized to.  [default: 256, or the source's]"
    )
    flip: bool = option(True, "Train on left-right flipped images too.")
    strict: bool = option(False, "Stop at the first unreadable image instead of leaving it out.")

    vae: str | None = option(None, f"VAE: a local folder or a Hub repository.  [default: {DEFAULT_VAE}]")
    pixels: bool = option(False, "Train on pixels, without a VAE.")

    from_: str | None = option(None, "Fine-tune this model: a run, checkpoint, folder or Hub repository (the source).")
    freeze: tuple[str, ...] = option((), "With --from: parameters that stay as they are, as patterns ('blocks.0.*').")
    lora_rank: int = option(0, "With --from: train low-rank adapters of this rank alone.")

    model: str = option(
        None,
        "Named size: DiT-S, -B, -L or -XL with the patch size behind the slash; or conv-dit, which needs no VAE.  "
        "[default: DiT-B/2; with --pixels the patch that gives at most 256 of them]",
    )
    depth: int | None = option(None, "Number of blocks.  [default: the named size's]")
    width: int | None = option(None, "Width of the tokens.  [default: the named size's]")
    num_heads: int | None = option(None, "Attention heads.  [default: the named size's]")
    patch_size: int | None = option(None, "Side of a patch.  [default: the named size's]")
    conv_widths: tuple[int, ...] | None = option(
        None, "conv-dit: channels of the convolutions, each of which halves the size.  [default: 64 128 4]"
    )
    mlp_ratio: float = option(None, "Hidden width of the MLP over the width of the tokens.  [default: 4]")
    conditioning: Conditioning = option(
        None, "How blocks see time and label.  [default: adaln-zero]", choices=Conditioning
    )

    mlp: MLPKind = option(
        None, "The blocks' MLP; swiglu is gated, at equal parameters.  [default: gelu]", choices=MLPKind
    )
    rope: bool = option(None, "Rotate queries and keys by their position (2-D RoPE).  [default: no-rope]")
    qk_norm: bool = option(None, "Normalise queries and keys.  [default: no-qk-norm]")

    schedule: ScheduleName = option(None, "Noise schedule.  [default: linear]", choices=ScheduleName)
    num_timesteps: int = option(None, "Steps of the noise schedule.  [default: 1000]")
    prediction: Prediction | None = option(
        None,
        "What the network predicts.  [default: eps; with --schedule flow the flow, or x0 for a DiT of pixels]",
        choices=Prediction,
    )
    learn_sigma: bool | None = option(
        None,
        "Learn the variance of the reverse process too.  [default: with --prediction eps and --loss mse, for a DiT]",
    )
    loss: Loss = option("mse", "Distance between prediction and target.", choices=Loss)
    time_sampling: TimeSampling = option(
        "uniform", "How times of training are drawn; logit-normal prefers the middle.", choices=TimeSampling
    )
    label_dropout: float = option(0.1, "Chance that a label is replaced by the null class, for guidance.")

    steps: int = option(400_000, "Optimiser steps in all.")
    batch_size: int = option(256, "Images per optimiser step.")
    micro_batch: int | str | None = option(
        None, "Images per forward pass; gradients accumulate. auto is what fits in memory.  [default: batch size]"
    )
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "muon trains the blocks' matrices by Muon and the rest by AdamW.", choices=("adamw", "muon")
    )
    lr: float | str = option(1e-4, "Learning rate, of the size that AdamW needs; auto is what `ditcli find-lr` finds.")
    lr_schedule: Literal["constant", "cosine"] = option(
        "constant", "Learning rate after warm-up.", choices=("constant", "cosine")
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.")
    weight_decay: float = option(0.0, "Decoupled weight decay.")
    beta1: float = option(0.9, "AdamW: decay of the first moment.")
    beta2: float = option(0.999, "AdamW: decay of the second moment.")
    clip_grad: float = option(0.0, "Clip the gradient norm to this; 0 leaves it.")
    ema_decay: float = option(0.9999, "Decay of the averaged weights that samples are drawn from.")
    ema_warmup: bool = option(True, "Let the decay rise as (1 + step) / (10 + step).")
    ema_snapshot_every: int = option(
        0, "Steps between snapshots for `ditcli ema`, each of twice the weights' size; 0 keeps none."
    )

    seed: int = option(0, "Seed of everything random.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    compile: bool | None = option(None, "Compile the blocks with torch.compile.  [default: on a GPU]")
    checkpoint_activations: bool = option(
        False, "Keep only the blocks' inputs and compute the rest again: less memory, a third slower."
    )
    shard: bool = option(False, "With --devices: keep a part of every weight in each, for models that outgrow one GPU.")
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
    sample_every: int = option(1000, "Steps between sample grids; 0 draws none.")
    sample_num: int = option(4, "Samples per class in a grid (of at most 8 classes).")
    sample_cfg: float = option(4.0, "Guidance scale of the sample grids.")
    sample_steps: int = option(50, "Sampler steps of the sample grids.")
    eval_every: int = option(0, "Steps between scores of samples against the data; 0 scores none.")
    eval_num: int = option(1000, "Samples per score.")
    eval_metric: Literal["fid", "kid"] = option(
        "fid", "Which score; the best weights are those with the lowest.", choices=("fid", "kid")
    )
    eval_features: str = option("inception", "Features of the score, as in `ditcli fid`.")
    eval_weights: str | None = option(None, "Their weights, as in `ditcli fid`.  [default: fetched once]")
    eval_cfg: float = option(1.0, "Guidance scale of the scored samples.")
    eval_steps: int = option(50, "Sampler steps of the scored samples.")

    COMMAND: ClassVar[str] = "train"
    # May differ when a run goes on: they change what is learnt by rounding at most.
    RESUMABLE: ClassVar[tuple[str, ...]] = (
        *("out", "steps", "micro_batch", "compile", "checkpoint_activations", "device", "shard", "num_workers"),
        *("log", "log_every", "checkpoint_every", "keep_checkpoints", "when_disk_full"),
        *("sample_every", "sample_num", "sample_cfg", "sample_steps", "eval_every", "eval_num", "eval_metric"),
        *("eval_features", "eval_weights", "eval_cfg", "eval_steps"),
    )

    # Left open they are None until the source of a fine-tuning has settled them; without one these are the defaults.
    LEFT_TO_SOURCE: ClassVar[dict[str, Any]] = {
        "image_size": 256,
        "mlp_ratio": 4.0,
        "conditioning": "adaln-zero",
        "mlp": "gelu",
        "rope": False,
        "qk_norm": False,
        "schedule": "linear",
        "num_timesteps": 1000,
    }

    def __post_init__(self) -> None:
        for name, value in self.LEFT_TO_SOURCE.items() if self.from_ is None else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_types()
        if isinstance(self.micro_batch, str):
            if self.micro_batch.isdigit():
                object.__setattr__(self, "micro_batch", int(self.micro_batch))
            else:
                self._check("micro_batch", self.micro_batch == "auto", "auto or a number of images")
        self._read_lr()
        check_training(self)
        self._check_at_least(1, "depth", "width", "num_heads", "patch_size", "sample_steps")
        self._check_at_least(2, "num_timesteps")
        if self.schedule != "flow" and self.num_timesteps is not None:
            most = f"at most num-timesteps, {self.num_timesteps}"
            self._check("sample_steps", self.sample_steps <= self.num_timesteps, most)
        self._check_at_least(0, "ema_snapshot_every", "sample_cfg", "eval_every", "eval_cfg")
        self._check_at_least(2, "eval_num")
        self._check_at_least(1, "eval_steps")
        if not self.eval_every:
            for f in dataclasses.fields(self):
                if f.name.startswith("eval_"):
                    self._check(f.name, getattr(self, f.name) == f.default, "left out without --eval-every")
        elif self.eval_features not in NETWORKS:
            self._check("eval_weights", self.eval_weights is None, f"left out with {self.eval_features}")
        self._check("label_dropout", 0 <= self.label_dropout < 1, "at least 0 and less than 1")
        if self.pixels and self.vae is not None:
            raise SettingError(f"pixels and vae {self.vae!r} exclude each other: give one of them.")
        if self.shard:
            self._check("optimizer", self.optimizer == "adamw", "adamw with --shard: Muon needs whole matrices")
        self._check_at_least(0, "lora_rank")
        if self.from_ is not None:
            return  # what follows is the source's
        for name in ("freeze", "lora_rank"):
            self._check(name, not getattr(self, name), "left out without --from, which names the model to fine-tune")
        if self.model is None:
            object.__setattr__(self, "model", f"DiT-B/{fitting_patch(self.image_size) if self.pixels else 2}")
        shape = self.model_shape()
        if shape["patch_size"] > self.image_size:
            raise SettingError(f"image-size is {self.image_size}, smaller than a patch.")
        if self.is_conv:
            self._check("vae", self.vae is None, "left out with --model conv-dit, which works on pixels")
            object.__setattr__(self, "pixels", True)
        else:
            self._check("conv_widths", not self.conv_widths, "left out but with --model conv-dit")
        if self.pixels:
            stride = shape["patch_size"] * 2 ** len(shape["conv_widths"])
            doubled = ", doubled by each of conv-widths" if self.is_conv else ""
            self._check("image_size", self.image_size % stride == 0, f"a multiple of {stride}, the patch size{doubled}")
        self.diffusion()

    def _read_lr(self) -> None:
        """A number that came as text, as from the command line."""
        if isinstance(self.lr, str) and self.lr != "auto":
            try:
                object.__setattr__(self, "lr", float(self.lr))
            except ValueError:
                self._check("lr", False, "a positive number, or auto")

    @property
    def is_conv(self) -> bool:
        """Whether convolutions take the place of the VAE."""
        return self.model is not None and self.model.lower() == CONV_DIT

    @property
    def codec(self) -> str:
        """The codec's name: `pixels`, or the VAE's."""
        return "pixels" if self.pixels else self.vae or DEFAULT_VAE

    def model_shape(self) -> dict[str, Any]:
        """Depth, width, heads, patch size and `conv_widths`: the named size's, where no option says otherwise."""
        shape = parse_model_name(self.model)
        return {key: getattr(self, key) or value for key, value in shape.items()}

    def diffusion(self) -> DiffusionConfig:
        """The noising process, with what was left open settled."""
        # Pictures lie near a manifold of few dimensions; noise does not, nor do velocities (arXiv 2511.13720). What
        # conv-dit's convolutions and skips make of that was not measured.
        flow: Prediction = "x0" if self.pixels and not self.is_conv else "flow"
        prediction = self.prediction or (flow if self.schedule == "flow" else "eps")
        learn_sigma = self.learn_sigma
        if learn_sigma is None:
            learn_sigma = self.schedule != "flow" and prediction == "eps" and self.loss == "mse" and not self.is_conv
        return DiffusionConfig(
            schedule=self.schedule, num_timesteps=self.num_timesteps, prediction=prediction, learn_sigma=learn_sigma
        )

    def dit(self, *, input_shape: tuple[int, int, int], num_classes: int) -> DiTConfig:
        """The network for inputs of shape (channels, height, width)."""
        channels, height, width = input_shape
        return DiTConfig(
            input_size=(height, width),
            in_channels=channels,
            out_channels=channels * (2 if self.diffusion().learn_sigma else 1),
            mlp_ratio=self.mlp_ratio,
            num_classes=num_classes,
            conditioning=self.conditioning,
            mlp=self.mlp,
            rope=self.rope,
            qk_norm=self.qk_norm,
            **self.model_shape(),
        )


def fitting_patch(image_size: int) -> int:
    """The smallest patch that makes at most 256 tokens of a picture, as many as DiT/2 has of latents at 256 pixels."""
    patches = (patch for patch in (2, 4, 8, 16, 32) if image_size % patch == 0 and image_size // patch <= 16)
    return next(patches, 2)


# What each brings to 2 M parameters is in the README (scripts/bench_quality.py); a DiT-B/2 is calm at this rate too.
FAST: dict[str, Any] = {
    "mlp": "swiglu",
    "rope": True,
    "qk_norm": True,
    "schedule": "flow",
    "time_sampling": "logit-normal",
    "batch_size": 64,
    "optimizer": "muon",
    "lr": 2e-3,
    "warmup_steps": 100,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": FAST,
    # Half an hour on two CPU cores for 4,559 pictures: the faces of the README.
    "small": FAST
    | {
        "vae": "madebyollin/taesd",
        "image_size": 128,
        "model": "DiT-S/2",
        "width": 256,
        "depth": 10,
        "num_heads": 4,
        "steps": 2600,
        "lr_schedule": "cosine",
    },
    "celeba": {
        "model": "DiT-B/2",
        "depth": 10,
        "num_heads": 8,
        "width": 768,
        "schedule": "cosine",
        "num_timesteps": 500,
        "loss": "l1",
        "lr": 2e-5,
        "batch_size": 200,
    },
    # 15 minutes on two CPU cores (scripts/mnist.sh). As in the demo below, x0 makes patches of 4 pixels sharp.
    "mnist": {
        "pixels": True,
        "image_size": 28,
        "flip": False,
        "model": "DiT-S/4",
        "width": 192,
        "depth": 6,
        "num_heads": 3,
        "schedule": "flow",
        "prediction": "x0",
        "batch_size": 32,
        "steps": 7500,
        "lr": 1e-3,
        "warmup_steps": 50,
        "lr_schedule": "cosine",
        "sample_every": 2500,
        "sample_cfg": 3,
        "sample_steps": 20,
    },
}  # fmt: skip


def default_preset(given: dict[str, Any]) -> str:
    """`fast`, or `paper` where it does not fit what is given: a source, shards, convolutions, or another diffusion."""
    discrete = ("num_timesteps", "learn_sigma")  # of the flow schedule there are none
    other_diffusion = given.get("schedule", "flow") != "flow" or given.get("prediction") == "eps"
    convolutions = str(given.get("model")).lower() == CONV_DIT
    others = (given.get(name) for name in ("from", "shard", *discrete))
    return "paper" if other_diffusion or convolutions or any(others) else "fast"


# `ditcli demo`: what two CPU cores learn in two minutes. Predicting x0 is what makes a patch of 4 pixels sharp (arXiv
# 2511.13720); flips would turn shoes around, which all point left.
DEMO: dict[str, Any] = {
    "data": "fashion-mnist",
    "pixels": True,
    "image_size": 28,
    "flip": False,
    "model": "DiT-S/4",
    "width": 192,
    "depth": 6,
    "num_heads": 3,
    "schedule": "flow",
    "prediction": "x0",
    "batch_size": 32,
    "steps": 1300,
    "lr": 1e-3,
    "warmup_steps": 50,
    "lr_schedule": "cosine",
    "checkpoint_every": 400,
    "sample_every": 0,
}
