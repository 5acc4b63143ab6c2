"""Every setting of ditcli as a frozen dataclass: defaults, help texts and validation live here and nowhere else.

Free of torch, numpy and click, so that ``ditcli train --help`` reads it in milliseconds. A field made with `option`
becomes a command-line option of the same name with hyphens; ``__post_init__`` raises a ``ValueError`` that names the
field, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

from ditcli.errors import SettingError

Conditioning = Literal["adaln-zero", "adaln", "cross-attention", "in-context"]
ScheduleName = Literal["linear", "cosine", "flow"]
Prediction = Literal["eps", "x0", "v", "flow"]
Loss = Literal["mse", "l1"]
SamplerName = Literal["ddim", "ddpm", "euler", "heun", "midpoint", "rk4", "lms", "dpm++2m", "dpm++2m-sde", "unipc"]
Walk = Literal["seeds", "labels"]
Spacing = Literal["uniform", "quadratic", "karras", "leading", "trailing"]
Precision = Literal["auto", "bf16", "fp32"]
VaeKind = Literal["kl", "vq"]
Backend = Literal["auto", "torch", "onnx"]
ExportDtype = Literal["fp32", "fp16"]
FidResize = Literal["torch-fidelity", "pytorch-fid"]
NETWORKS = ("inception", "dinov2")  # the extractors of ours, which take weights

DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"
TILE = 1024  # Pixels: 16 times the 0.25 GB that decoding 256x256 with the Stable Diffusion VAE takes.

# Paper table 1: depth, width, heads.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


def option(default: Any, help: str, *, choices: Any = None) -> Any:
    """A dataclass field that is also a command-line option; `choices` is a ``Literal`` or a tuple of strings."""
    choices = get_args(choices) or choices
    return field(default=default, metadata={"help": help, "choices": choices})


def suggest(word: str, known: Sequence[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word.lower(), [k.lower() for k in known], n=1)
    original = {k.lower(): k for k in known}
    return f" Did you mean {original[near[0]]!r}?" if near else ""


class Config:
    """What all configs share: strict reading from a dictionary and checks that name the field."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dictionary whose keys may use hyphens or underscores; an unknown key is a ValueError."""
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        values = {key.replace("-", "_"): value for key, value in values.items()}
        values = {f"{key}_" if keyword.iskeyword(key) else key: value for key, value in values.items()}  # `from`
        for key in values:
            if key not in known:
                hint = suggest(key, known) or f" Known: {', '.join(known)}."
                raise SettingError(f"unknown setting {key!r} in {cls.__name__}.{hint}")
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**(values | lists))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise SettingError(
                f"{name.strip('_').replace('_', '-')} is {getattr(self, name)!r}, but must be {allowed}."
            )

    def _check_types(self) -> None:
        """Each value has the type its annotation names (an int passes for a float), and is one of its choices."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            kinds = [kind.strip() for kind in str(f.type).split("|")]
            if value is None and ("None" in kinds or f.default is None):
                continue
            choices = f.metadata.get("choices")
            if choices:
                hint = suggest(value, choices) if isinstance(value, str) else ""
                self._check(f.name, value in choices, f"one of {', '.join(choices)}.{hint}".rstrip("."))
                continue
            if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, f.name, float(value))
                continue
            named = {"int": int, "float": float, "str": str, "bool": bool}
            allowed = [named[kind] for kind in kinds if kind in named]
            if allowed:
                self._check(f.name, type(value) in allowed, " or ".join(kind.__name__ for kind in allowed))

    def _check_at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(name, value is None or value >= minimum, f"at least {minimum}")


@dataclass(frozen=True, kw_only=True)
class DiTConfig(Config):
    """The shape of a Diffusion Transformer; `input_size` is the (height, width) of its input.

    The last two are conventions in which published weights differ; their defaults are the reference DiT's. Frequency i
    of the 128 of the time embedding is 10000^(-i / frequency_divisor), and diffusers divides by 127. `mlp_norm_eps` is
    that of the norm before a block's MLP, 1e-5 in diffusers.
    """

    input_size: tuple[int, int] = (32, 32)
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    conditioning: Conditioning = "adaln-zero"
    frequency_divisor: int = 128
    mlp_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        self._check_types()
        self._check("conditioning", self.conditioning in get_args(Conditioning), f"one of {get_args(Conditioning)}")
        self._check_at_least(1, "in_channels", "out_channels", "patch_size", "width", "depth", "num_heads")
        self._check_at_least(1, "frequency_divisor")
        self._check("mlp_norm_eps", self.mlp_norm_eps > 0, "positive")
        self._check_at_least(0, "num_classes")
        self._check("width", self.width % 4 == 0, "a multiple of 4 (2-D sin-cos positions)")
        self._check("num_heads", self.width % self.num_heads == 0, f"a divisor of width {self.width}")
        self._check("mlp_ratio", self.mlp_ratio > 0, "positive")
        fits = len(self.input_size) == 2 and all(n > 0 and n % self.patch_size == 0 for n in self.input_size)
        self._check("input_size", fits, f"two multiples of the patch size {self.patch_size}")


def parse_model_name(name: str) -> dict[str, int]:
    """`"DiT-B/2"` -> its depth, width, heads and patch size (paper table 1)."""
    match = re.fullmatch(r"DiT-(S|B|L|XL)/(\d+)", name, flags=re.IGNORECASE)
    names = [f"DiT-{size}/{patch}" for size in DIT_SIZES for patch in (2, 4, 8)]
    if not match:
        hint = suggest(name, names)
        raise SettingError(
            f"model is {name!r}, but must be DiT-S, -B, -L or -XL with a patch size, as in DiT-B/2.{hint}"
        )
    depth, width, num_heads = DIT_SIZES[match[1].upper()]
    return {"depth": depth, "width": width, "num_heads": num_heads, "patch_size": int(match[2])}


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Config):
    """The noising process and what the network predicts of it.

    The last four are conventions in which published weights differ. A flow model is given the time `time_scale` t
    (default: num_timesteps t), or `time_scale` (1 - t) with `reversed_time`, where its flow points from noise to data
    too (SiT). `guided_channels` says how many channels guidance moves (None: all; 3 in the published DiT and SiT).
    `spacing` is how samplers space their steps unless told otherwise (diffusers' DiT: leading).
    """

    schedule: ScheduleName = "linear"
    num_timesteps: int = 1000
    prediction: Prediction = "eps"
    learn_sigma: bool = False
    time_scale: float | None = None
    reversed_time: bool = False
    guided_channels: int | None = None
    spacing: Spacing = "uniform"

    def __post_init__(self) -> None:
        self._check_types()
        self._check("schedule", self.schedule in get_args(ScheduleName), f"one of {get_args(ScheduleName)}")
        self._check("prediction", self.prediction in get_args(Prediction), f"one of {get_args(Prediction)}")
        self._check_at_least(2, "num_timesteps")
        self._check_at_least(1, "guided_channels")
        self._check("spacing", self.spacing in get_args(Spacing), f"one of {get_args(Spacing)}")
        if self.schedule != "flow":
            self._check("time_scale", self.time_scale is None, "left out: only the flow schedule has it")
            self._check("reversed_time", not self.reversed_time, "false: only the flow schedule has it")
        if self.schedule == "flow":
            # At t = 1 flow matching has alpha = 0: eps says nothing there of x0.
            self._check("prediction", self.prediction != "eps", "x0, v or flow with the flow schedule")
            self._check(
                "learn_sigma", not self.learn_sigma, "off with the flow schedule, which has no variance to learn"
            )


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
        None, "Named size: DiT-S, -B, -L or -XL with the patch size behind the slash.  [default: DiT-B/2]"
    )
    depth: int | None = option(None, "Number of blocks.  [default: the named size's]")
    width: int | None = option(None, "Width of the tokens.  [default: the named size's]")
    num_heads: int | None = option(None, "Attention heads.  [default: the named size's]")
    patch_size: int | None = option(None, "Side of a patch.  [default: the named size's]")
    mlp_ratio: float = option(None, "Hidden width of the MLP over the width of the tokens.  [default: 4]")
    conditioning: Conditioning = option(
        None, "How blocks see time and label.  [default: adaln-zero]", choices=Conditioning
    )

    schedule: ScheduleName = option(None, "Noise schedule.  [default: linear]", choices=ScheduleName)
    num_timesteps: int = option(None, "Steps of the noise schedule.  [default: 1000]")
    prediction: Prediction | None = option(
        None, "What the network predicts.  [default: flow for --schedule flow, else eps]", choices=Prediction
    )
    learn_sigma: bool | None = option(
        None, "Learn the variance of the reverse process too.  [default: with --prediction eps and --loss mse]"
    )
    loss: Loss = option("mse", "Distance between prediction and target.", choices=Loss)
    label_dropout: float = option(0.1, "Chance that a label is replaced by the null class, for guidance.")

    steps: int = option(400_000, "Optimiser steps in all.")
    batch_size: int = option(256, "Images per optimiser step.")
    micro_batch: int | None = option(None, "Images per forward pass; gradients accumulate.  [default: batch size]")
    lr: float = option(1e-4, "Learning rate of AdamW.")
    lr_schedule: Literal["constant", "cosine"] = option(
        "constant", "Learning rate after warm-up.", choices=("constant", "cosine")
    )
    warmup_steps: int = option(0, "Steps over which the learning rate rises from 0.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    beta1: float = option(0.9, "AdamW: decay of the first moment.")
    beta2: float = option(0.999, "AdamW: decay of the second moment.")
    clip_grad: float = option(0.0, "Clip the gradient norm to this; 0 leaves it.")
    ema_decay: float = option(0.9999, "Decay of the averaged weights that samples are drawn from.")
    ema_warmup: bool = option(True, "Let the decay rise as (1 + step) / (10 + step).")

    seed: int = option(0, "Seed of everything random.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option("auto", "auto is bf16 where the hardware has it.", choices=Precision)
    num_workers: int | None = option(None, "Threads that read images.  [default: number of cores]")

    log_every: int = option(50, "Steps between lines of metrics.csv.")
    checkpoint_every: int = option(1000, "Steps between checkpoints.")
    keep_checkpoints: int = option(3, "Checkpoints to keep; 0 keeps all.")
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
        *("out", "steps", "micro_batch", "device", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
        *("sample_every", "sample_num", "sample_cfg", "sample_steps", "eval_every", "eval_num", "eval_metric"),
        *("eval_features", "eval_weights", "eval_cfg", "eval_steps"),
    )

    # Left open they are None until the source of a fine-tuning has settled them; without one these are the defaults.
    LEFT_TO_SOURCE: ClassVar[dict[str, Any]] = {
        "image_size": 256,
        "model": "DiT-B/2",
        "mlp_ratio": 4.0,
        "conditioning": "adaln-zero",
        "schedule": "linear",
        "num_timesteps": 1000,
    }

    def __post_init__(self) -> None:
        for name, value in self.LEFT_TO_SOURCE.items() if self.from_ is None else ():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check_types()
        self._check_at_least(
            1, "image_size", "depth", "width", "num_heads", "patch_size", "steps", "batch_size", "micro_batch"
        )
        self._check_at_least(1, "log_every", "checkpoint_every", "sample_num", "sample_steps", "num_workers")
        self._check_at_least(2, "num_timesteps")
        if self.schedule != "flow" and self.num_timesteps is not None:
            most = f"at most num-timesteps, {self.num_timesteps}"
            self._check("sample_steps", self.sample_steps <= self.num_timesteps, most)
        self._check_at_least(
            0, "seed", "warmup_steps", "weight_decay", "clip_grad", "keep_checkpoints", "sample_every", "sample_cfg"
        )
        self._check_at_least(0, "eval_every", "eval_cfg")
        self._check_at_least(2, "eval_num")
        self._check_at_least(1, "eval_steps")
        if not self.eval_every:
            for f in dataclasses.fields(self):
                if f.name.startswith("eval_"):
                    self._check(f.name, getattr(self, f.name) == f.default, "left out without --eval-every")
        elif self.eval_features not in NETWORKS:
            self._check("eval_weights", self.eval_weights is None, f"left out with {self.eval_features}")
        for name in ("label_dropout", "ema_decay", "beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        self._check("lr", self.lr > 0, "positive")
        if self.micro_batch is not None:
            self._check(
                "micro_batch", self.batch_size % self.micro_batch == 0, f"a divisor of batch-size {self.batch_size}"
            )
        if self.pixels and self.vae is not None:
            raise SettingError(f"pixels and vae {self.vae!r} exclude each other: give one of them.")
        self._check_at_least(0, "lora_rank")
        if self.from_ is not None:
            return  # what follows is the source's
        for name in ("freeze", "lora_rank"):
            self._check(name, not getattr(self, name), "left out without --from, which names the model to fine-tune")
        if self.model_shape()["patch_size"] > self.image_size:
            raise SettingError(f"image-size is {self.image_size}, smaller than a patch.")
        self.diffusion()

    @property
    def codec(self) -> str:
        """The codec's name: `pixels`, or the VAE's."""
        return "pixels" if self.pixels else self.vae or DEFAULT_VAE

    def model_shape(self) -> dict[str, int]:
        """Depth, width, heads and patch size: the named size's, where no option says otherwise."""
        shape = parse_model_name(self.model)
        return {key: getattr(self, key) or value for key, value in shape.items()}

    def diffusion(self) -> DiffusionConfig:
        """The noising process, with what was left open settled."""
        prediction = self.prediction or ("flow" if self.schedule == "flow" else "eps")
        learn_sigma = self.learn_sigma
        if learn_sigma is None:
            learn_sigma = self.schedule != "flow" and prediction == "eps" and self.loss == "mse"
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
            **self.model_shape(),
        )


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
    checkpoint_every: int = option(1000, "Steps between checkpoints.")
    keep_checkpoints: int = option(3, "Checkpoints to keep; 0 keeps all.")
    sample_every: int = option(1000, "Steps between reconstructions of held-out images; 0 draws none.")
    sample_num: int = option(8, "Reconstructions in a picture.")

    COMMAND: ClassVar[str] = "train-vae"
    RESUMABLE: ClassVar[tuple[str, ...]] = (
        *("out", "steps", "device", "num_workers", "log_every", "checkpoint_every", "keep_checkpoints"),
        *("sample_every", "sample_num", "lpips"),
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(1, "image_size", "latent_channels", "layers_per_block", "norm_groups", "steps")
        self._check_at_least(1, "batch_size", "micro_batch", "log_every", "checkpoint_every", "sample_num")
        self._check_at_least(1, "num_workers", "gan_width", "gan_layers")
        self._check_at_least(2, "num_codes")
        self._check_at_least(0, "seed", "warmup_steps", "weight_decay", "clip_grad", "keep_checkpoints", "sample_every")
        self._check_at_least(0, "holdout", "lpips_weight", "kl_weight", "commitment_weight", "gan_weight", "gan_start")
        for name in ("ema_decay", "beta1", "beta2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")
        self._check("lr", self.lr > 0, "positive")
        groups = self.norm_groups
        fits = len(self.widths) > 0 and all(type(n) is int and n > 0 and n % groups == 0 for n in self.widths)
        self._check("widths", fits, f"multiples of norm-groups {groups}")
        factor = 2 ** (len(self.widths) - 1)
        self._check("image_size", self.image_size % factor == 0, f"a multiple of {factor}, the factor of the VAE")
        if self.micro_batch is not None:
            self._check(
                "micro_batch", self.batch_size % self.micro_batch == 0, f"a divisor of batch-size {self.batch_size}"
            )


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


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """`ditcli sample`."""

    model: str | None = option(
        None,
        "Run, checkpoint file, folder (also of `ditcli export-onnx`) or Hub repository owner/name.  "
        "[default: the newest run]",
    )
    adapter: str | None = option(None, "Low-rank adapter to put onto --model: a run, file or Hub repository.")
    labels: tuple[str, ...] = option((), "Classes to draw, by name.  [default: every class]")
    num: int = option(1, "Images per label, or in all for a model without labels.")
    cfg: float = option(4.0, "Scale of guidance, by the null class or --guide-model; 1 is none.")
    cfg_interval: tuple[float, float] = option(
        (0.0, 1.0), "Guide only at times from LO to HI, 0 data and 1 noise.  [default: 0 1]"
    )
    cfg_rescale: float = option(0.0, "Share of its unguided contrast that a guided output gets back, 0 to 1.")
    cfg_channels: int | None = option(
        None, "Guide only the first channels: 3 as in the published DiT samples.  [default: the model's own, else all]"
    )
    guide_model: str | None = option(None, "Autoguidance: a weaker checkpoint takes the place of the null class.")
    sampler: SamplerName = option("ddim", "Sampler.", choices=SamplerName)
    steps: int = option(50, "Sampler steps.")
    spacing: Spacing | None = option(
        None, "How the steps lie in time.  [default: the model's own, else uniform]", choices=Spacing
    )
    shift: float = option(1.0, "Flow models: multiply the noise level of each step.")
    eta: float = option(0.0, "DDIM: 0 is deterministic, 1 adds the noise of DDPM.")
    order: int | None = option(None, "lms: order of the multistep method, 1 to 4.  [default: 4]")
    seed: int = option(0, "Seed of the starting noise.")
    interpolate: Walk | None = option(
        None, "Walk in --num pictures from --seed to --to-seed, or between two --labels.", choices=Walk
    )
    to_seed: int | None = option(None, "--interpolate seeds: where the walk ends.  [default: --seed + 1]")
    init: str | None = option(None, "Start from this picture instead of noise.")
    strength: float | None = option(
        None, "--init: 0 keeps the picture, 1 all but forgets it.  [default: 0.6; with --mask 1]"
    )
    mask: str | None = option(None, "--init: repaint only where this picture is white; --sampler ddpm blends best.")
    cache: int = option(1, "Run the blocks in every N-th step and foresee them in between; changes the images.")
    ema: bool = option(True, "Sample from the averaged weights.")
    out: str = option("samples", "Folder for the images, or one NAME.npz for all of them.")
    grid: bool = option(False, "Write one picture with a row per label as well.")
    trajectory: bool = option(False, "Write how each image came about as well, as a GIF and a strip.")
    batch_size: int | str = option("auto", "Images drawn at a time, changes no image; auto is what fits in memory.")
    vae: str | None = option(None, "Decode with this VAE instead of the one the model was trained with.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option("fp32", "auto is bf16 where the hardware has it.", choices=Precision)
    backend: Backend = option("auto", "auto is onnx for a model exported to it.", choices=Backend)

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, str) and self.batch_size.isdigit():
            object.__setattr__(self, "batch_size", int(self.batch_size))
        self._check_types()
        fits = self.batch_size == "auto" if isinstance(self.batch_size, str) else self.batch_size > 0
        self._check("batch_size", fits, "auto or at least 1")
        self._check_at_least(1, "num", "steps", "cfg_channels", "cache")
        self._check_at_least(0, "cfg", "seed", "eta", "to_seed")
        once = self.sampler not in ("heun", "midpoint", "rk4")
        self._check("cache", self.cache == 1 or once, f"1 with --sampler {self.sampler}, which calls in mid-step")
        low, high = self.cfg_interval
        self._check("cfg_interval", 0 <= low <= high <= 1, "two times, 0 <= LO <= HI <= 1")
        self._check("cfg_rescale", 0 <= self.cfg_rescale <= 1, "from 0 to 1")
        self._check("shift", self.shift > 0, "positive")
        self._check("eta", self.eta == 0 or self.sampler == "ddim", f"0 with --sampler {self.sampler}")
        self._check("order", self.order is None or self.sampler == "lms", f"left out with --sampler {self.sampler}")
        self._check("order", self.order is None or 1 <= self.order <= 4, "1 to 4")
        self._check("strength", self.strength is None or self.init is not None, "given with --init only")
        self._check("strength", self.strength is None or 0 <= self.strength <= 1, "from 0 to 1")
        self._check("mask", self.mask is None or self.init is not None, "given with --init only")
        self._check(
            "to_seed", self.to_seed is None or self.interpolate == "seeds", "given with --interpolate seeds only"
        )
        self._check(
            "num", self.num > 1 or self.interpolate is None, "at least 2 with --interpolate: the pictures of the walk"
        )
        if self.out.endswith(".npz") and (self.grid or self.trajectory or self.interpolate):
            raise SettingError(f"out is {self.out!r}, one file: --grid, --trajectory and --interpolate need a folder.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """`ditcli export-onnx`."""

    model: str | None = option(None, "Run folder or checkpoint file.  [default: the newest run]")
    out: str | None = option(None, "Folder for the files.  [default: onnx in the run folder]")
    dtype: ExportDtype = option("fp32", "fp16 halves the files; norms and softmax stay in fp32.", choices=ExportDtype)
    opset: int = option(23, "ONNX operator set, 20 to 23; from 23 on attention is one node.")
    ema: bool = option(True, "Export the averaged weights.")
    vae: str | None = option(None, "Export this VAE's decoder instead of the one the model was trained with.")

    def __post_init__(self) -> None:
        self._check_types()
        self._check("opset", 20 <= self.opset <= 23, "20, 21, 22 or 23")


METRICS = ("fid", "kid", "is", "pr")


@dataclass(frozen=True, kw_only=True)
class FidConfig(Config):
    """`ditcli fid`: two sides, what to compare of them, and how pictures become features."""

    real: str = option("", "The real side: folder, .zip, .npz of ADM's suite, saved statistics, or model.")
    fake: str | None = option(None, "The side to score, of the same kinds.")
    metrics: tuple[str, ...] = option(
        (),
        "fid, kid, is (Inception Score), pr (precision and recall).  [default: fid, and kid where both have pictures]",
    )
    features: str = option("inception", "inception, dinov2, or an ONNX file that maps N x 3 x H x W in [0,1] to N x D.")
    weights: str | None = option(
        None,
        "Inception's of 2015-12-05: a file, or OWNER/REPOSITORY/FILE on the Hub. DINOv2's: a folder with config.json "
        "and model.safetensors, or OWNER/REPOSITORY.  [default: fetched once, facebook/dinov2-large for dinov2]",
    )
    resize: FidResize | None = option(
        None, "Whose resize to 299 Inception sees.  [default: torch-fidelity]", choices=FidResize
    )
    image_size: int | None = option(
        None, "Crop and resize both sides to squares of this side.  [default: the fake side's, for the real one]"
    )
    codec: str | None = option(None, "VAE whose floor to score too: real pictures against their reconstructions.")
    save_stats: str | None = option(None, "Write the real side's statistics and features to this .npz.")

    num: int = option(10_000, "Model: pictures to draw.")
    cfg: float = option(1.0, "Model: scale of classifier-free guidance; 1 is none.")
    steps: int = option(50, "Model: sampler steps.")
    sampler: SamplerName = option("ddim", "Model: sampler.", choices=SamplerName)
    seed: int = option(0, "Model: seed of the first picture; the next has the next.")
    batch_size: int = option(16, "Model: pictures drawn at a time; changes none.")
    precision: Precision = option("fp32", "Model: auto is bf16 where the hardware has it.", choices=Precision)

    num_workers: int | None = option(None, "Threads that read pictures.  [default: number of cores]")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")

    # Without a model among the sides they would have no effect, and are refused.
    OF_MODELS: ClassVar[tuple[str, ...]] = ("num", "cfg", "steps", "sampler", "seed", "batch_size", "precision")

    def __post_init__(self) -> None:
        words = tuple(word for text in self.metrics for word in text.lower().split(",") if word)
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(words)))
        self._check_types()
        for word in words:
            self._check("metrics", word in METRICS, f"of {', '.join(METRICS)}.{suggest(word, METRICS)}".rstrip("."))
        self._check_at_least(1, "image_size", "steps", "batch_size", "num_workers")
        self._check_at_least(2, "num")
        self._check_at_least(0, "cfg", "seed")
        if self.features not in NETWORKS:
            self._check("weights", self.weights is None, f"left out with --features {self.features}")
        if self.features != "inception":
            self._check("resize", self.resize is None, f"left out with --features {self.features}")
            self._check("metrics", "is" not in words, "without `is`, which only --features inception has")
        if self.fake is None:
            self._check("fake", bool(self.codec or self.save_stats), "given, unless --save-stats or --codec is")
            self._check("metrics", "is" not in words, "without `is` where there is no --fake")
        npz = self.save_stats is None or self.save_stats.endswith(".npz")
        self._check("save_stats", npz, "a name that ends with .npz")


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
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
    "mnist": {
        "pixels": True,
        "image_size": 28,
        "flip": False,
        "patch_size": 2,
        "width": 288,
        "num_heads": 6,
        "depth": 6,
        "num_timesteps": 400,
    },
}  # fmt: skip


VAE_PRESETS: dict[str, dict[str, Any]] = {
    "sd": {},
    # For two CPU cores.
    "small": {
        "image_size": 64,
        "widths": (32, 64, 128),
        "layers_per_block": 1,
        "norm_groups": 8,
        "gan_width": 32,
        "gan_layers": 2,
        "gan_start": 2000,
        "batch_size": 16,
        "lr": 5e-4,
        "lr_schedule": "cosine",
        "warmup_steps": 100,
        "clip_grad": 1.0,
        "beta2": 0.99,
        "steps": 3000,
        "sample_every": 500,
        "checkpoint_every": 500,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PushConfig(Config):
    """`ditcli push`: `run` is shared as the Hub repository `repo`."""

    run: str
    repo: str
    license: str | None = option(None, "Licence of the weights, as the Hub writes it: mit, apache-2.0, cc-by-4.0 ...")
    private: bool = option(False, "Make a private repository.")
    merge: bool = option(False, "Share an adapter merged into its base, instead of the adapter alone.")
    dry_run: bool = option(False, "Write the folder locally and upload nothing.")
    out: str | None = option(None, "With --dry-run: where to write the folder.  [default: the repository's name]")

    def __post_init__(self) -> None:
        self._check_types()
        self._check("repo", bool(re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", self.repo)), "owner/name")
        named = self.license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license)
        self._check("license", bool(named), "the licence that you give the weights, such as mit or cc-by-nc-4.0")
        self._check("out", self.out is None or self.dry_run, "left out without --dry-run")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """All that a checkpoint says of itself: with the weights it is enough to sample."""

    dit: DiTConfig
    diffusion: DiffusionConfig
    codec: str  # `pixels`, a VAE's folder or its Hub repository
    image_size: int
    class_names: tuple[str, ...] = ()
    step: int = 0
    base: str = ""  # the model it was fine-tuned from
    lora_rank: int = 0  # above 0 the weights are an adapter's, and `base` is needed to sample

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        dit = DiTConfig.from_dict(values.get("dit", {}))
        return super().from_dict(
            values | {"dit": dit, "diffusion": DiffusionConfig.from_dict(values.get("diffusion", {}))}
        )

    def __post_init__(self) -> None:
        self._check_types()
        names = f"as many as the model's {self.dit.num_classes} classes"
        self._check("class_names", len(self.class_names) == self.dit.num_classes, names)
        self._check("codec", bool(self.codec), "the name of a codec")
        self._check_at_least(1, "image_size")
        self._check_at_least(0, "step", "lora_rank")


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
