"""The settings of `ditcli report`."""

from __future__ import annotations

from dataclasses import dataclass

from ditcli.config.base import Config, option


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """`ditcli report`."""

    out: str | None = option(None, "The page to write.  [default: report.html in the run; comparison.html for several]")
    features: str | None = option(
        None,
        "Features for the nearest training images: inception, dinov2, an ONNX file, or pixels without any network.  "
        "[default: the run's --eval-features, else inception where its weights are here, else pixels]",
    )
    weights: str | None = option(None, "Their weights, as in `ditcli fid`.")
    num_real: int = option(20_000, "Training images to search, picked at random where there are more.")

    def __post_init__(self) -> None:
        self._check_types()
        self._check_at_least(2, "num_real")
        if self.features is None:
            self._check("weights", self.weights is None, "left out without --features")
