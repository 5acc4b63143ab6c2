"""The settings of `ditcli ema`."""

from __future__ import annotations

from dataclasses import dataclass

from ditcli.config.base import Config, option


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Config):
    """`ditcli ema`: an average of the weights of `run`, the newest where it is None, that was not kept in training."""

    run: str | None = None
    sigma_rel: float = option(0.1, "Length of the average: the standard deviation of its profile over the steps.")
    step: int | None = option(None, "Step of a snapshot at which the average ends.  [default: the last]")
    out: str | None = option(None, "File to write.  [default: ema-SIGMA.safetensors in the run]")

    def __post_init__(self) -> None:
        self._check_types()
        # 0.2887 is that of the plain mean of all steps: gamma 0 of equation 123 of arXiv 2312.02696.
        self._check("sigma_rel", 0.001 <= self.sigma_rel <= 0.288, "from 0.001 to 0.288, the mean of all steps")
        self._check_at_least(1, "step")
