"""The settings of `ditcli find-lr`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ditcli.config.base import Config, option


@dataclass(frozen=True, kw_only=True)
class FindLrConfig(Config):
    """`ditcli find-lr`: the ramp; what a step is says a TrainConfig."""

    out: str = option("lr.png", "The curve to draw.")
    min_lr: float = option(1e-6, "The first rate.")
    max_lr: float = option(0.1, "The last rate; the test ends sooner where the loss diverges.")
    num_rates: int = option(100, "Rates to try, a step each.")

    # Of the settings of a training these change nothing in its first steps, or are what is searched.
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        *("out", "steps", "lr", "lr_schedule", "warmup_steps", "ema_decay", "ema_warmup", "log"),
        *("ema_snapshot_every", "when_disk_full"),
        *("log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_num", "sample_cfg"),
        *("sample_steps", "eval_every", "eval_num", "eval_metric", "eval_features", "eval_weights", "eval_cfg"),
        "eval_steps",
    )

    def __post_init__(self) -> None:
        self._check_types()
        self._check("min_lr", self.min_lr > 0, "positive")
        self._check("max_lr", self.max_lr > self.min_lr, f"above min-lr, {self.min_lr:g}")
        self._check_at_least(10, "num_rates")
