"""What a checkpoint says of itself: the network, the noising process, the codec and the classes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from ditcli.config.base import Config, suggest
from ditcli.errors import SettingError

Conditioning = Literal["adaln-zero", "adaln", "cross-attention", "in-context"]
MLPKind = Literal["gelu", "swiglu"]
ScheduleName = Literal["linear", "cosine", "flow"]
Prediction = Literal["eps", "x0", "v", "flow"]
Spacing = Literal["uniform", "quadratic", "karras", "leading", "trailing"]


# Paper table 1: depth, width, heads.
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Around a DiT-S/2: 3 x 256 x 256 pixels reach it as 4 x 32 x 32.
CONV_DIT, CONV_WIDTHS = "conv-dit", (64, 128, 4)


@dataclass(frozen=True, kw_only=True)
class DiTConfig(Config):
    """The shape of a Diffusion Transformer; `input_size` is the (height, width) of its input.

    `mlp`, `rope` (rotary beside fixed positions) and `qk_norm` are parts that have changed since the paper.

    `conv_widths` are the channels of the strided convolutions around it, each of which halves height and width; none
    of them is a plain DiT.

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
    mlp: MLPKind = "gelu"
    rope: bool = False
    qk_norm: bool = False
    conv_widths: tuple[int, ...] = ()
    frequency_divisor: int = 128
    mlp_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        self._check_types()
        self._check("conditioning", self.conditioning in get_args(Conditioning), f"one of {get_args(Conditioning)}")
        self._check("mlp", self.mlp in get_args(MLPKind), f"one of {get_args(MLPKind)}")
        self._check_at_least(1, "in_channels", "out_channels", "patch_size", "width", "depth", "num_heads")
        self._check_at_least(1, "frequency_divisor")
        self._check("mlp_norm_eps", self.mlp_norm_eps > 0, "positive")
        self._check_at_least(0, "num_classes")
        self._check("width", self.width % 4 == 0, "a multiple of 4 (2-D sin-cos positions)")
        self._check("num_heads", self.width % self.num_heads == 0, f"a divisor of width {self.width}")
        self._check("mlp_ratio", self.mlp_ratio > 0, "positive")
        turns = not self.rope or self.width // self.num_heads % 4 == 0
        self._check("rope", turns, "false where width / num-heads is no multiple of 4")
        self._check("conv_widths", all(type(n) is int and n > 0 for n in self.conv_widths), "positive whole numbers")
        fits = len(self.input_size) == 2 and all(n > 0 and n % self.stride == 0 for n in self.input_size)
        doubled = ", doubled by each of conv-widths" if self.conv_widths else ""
        self._check("input_size", fits, f"two multiples of {self.stride}, the patch size{doubled}")

    @property
    def stride(self) -> int:
        """Pixels of the input from one token to the next; heights and widths are multiples of it."""
        return self.patch_size * 2 ** len(self.conv_widths)

    @property
    def mlp_width(self) -> int:
        """Of the hidden layer; a gated one has two thirds, in whole eights, so that it has as many parameters."""
        hidden = int(self.width * self.mlp_ratio)
        return hidden if self.mlp == "gelu" else max(8, round(hidden / 12) * 8)

    @property
    def num_tokens(self) -> int:
        """Patches of an input of `input_size`."""
        return math.prod(self.input_size) // self.stride**2

    @property
    def conv_numbers(self) -> int:
        """Numbers in a feature map of each stage of the convolutions, 0 without them."""
        widths = [*self.conv_widths[:1], *self.conv_widths[:-1]]
        return sum(width * math.prod(self.input_size) // 4**i for i, width in enumerate(widths))


def parse_model_name(name: str) -> dict[str, Any]:
    """`"DiT-B/2"` -> its depth, width, heads and patch size (paper table 1), and the widths of convolutions around."""
    if name.lower() == CONV_DIT:
        return parse_model_name("DiT-S/2") | {"conv_widths": CONV_WIDTHS}
    match = re.fullmatch(r"DiT-(S|B|L|XL)/(\d+)", name, flags=re.IGNORECASE)
    names = [CONV_DIT, *(f"DiT-{size}/{patch}" for size in DIT_SIZES for patch in (2, 4, 8))]
    if not match:
        hint = suggest(name, names)
        raise SettingError(
            f"model is {name!r}, but must be DiT-S, -B, -L or -XL with a patch size, as in DiT-B/2, or conv-dit.{hint}"
        )
    depth, width, num_heads = DIT_SIZES[match[1].upper()]
    return {"depth": depth, "width": width, "num_heads": num_heads, "patch_size": int(match[2]), "conv_widths": ()}


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
