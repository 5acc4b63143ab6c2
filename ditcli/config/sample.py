"""The settings of `ditcli sample` and `export-onnx`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditcli.config.base import Config, Precision, option
from ditcli.config.model import Spacing
from ditcli.errors import SettingError

SamplerName = Literal["ddim", "ddpm", "euler", "heun", "midpoint", "rk4", "lms", "dpm++2m", "dpm++2m-sde", "unipc"]
Walk = Literal["seeds", "labels"]
Backend = Literal["auto", "torch", "onnx", "jax"]
ExportDtype = Literal["fp32", "fp16"]


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Config):
    """`ditcli sample`."""

    model: str | None = option(
        None,
        "Run, checkpoint file, folder (also of `ditcli export-onnx`), Hub repository owner/name, or demo, the embedded "
        "model.  "
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
    compile: bool = option(False, "Compile the network's blocks first: worth a minute where many images are drawn.")
    backend: Backend = option(
        "auto", "auto is onnx for an exported model and the embedded one; jax needs ditcli[jax].", choices=Backend
    )

    def __post_init__(self) -> None:
        if isinstance(self.batch_size, str) and self.batch_size.isdigit():
            object.__setattr__(self, "batch_size", int(self.batch_size))
        self._check_types()
        fits = self.batch_size == "auto" if isinstance(self.batch_size, str) else self.batch_size > 0
        self._check("batch_size", fits, "auto or at least 1")
        self._check_at_least(1, "num", "steps", "cfg_channels", "cache")
        self._check_at_most(1_000_000, "num")
        self._check_at_most(100_000, "steps")
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
