"""The settings of `ditcli fid`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ditcli.config.base import Config, Precision, option, suggest
from ditcli.config.sample import SamplerName

FidResize = Literal["torch-fidelity", "pytorch-fid"]
NETWORKS = ("inception", "dinov2")  # the extractors of ours, which take weights
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
        self._check_types()
        words = tuple(word for text in self.metrics for word in text.lower().split(",") if word)
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(words)))
        for word in words:
            self._check("metrics", word in METRICS, f"of {', '.join(METRICS)}.{suggest(word, METRICS)}".rstrip("."))
        self._check_at_least(1, "image_size", "steps", "batch_size", "num_workers")
        self._check_at_least(2, "num")
        self._check_at_most(1_000_000, "num")
        self._check_at_most(100_000, "steps")
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
