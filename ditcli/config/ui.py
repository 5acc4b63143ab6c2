"""The settings of `ditcli ui`."""

from __future__ import annotations

from dataclasses import dataclass

from ditcli.config.base import Config, Precision, option
from ditcli.config.sample import Backend


@dataclass(frozen=True, kw_only=True)
class UiConfig(Config):
    """`ditcli ui`."""

    model: str | None = option(None, "The model, as in `ditcli sample`.  [default: the newest run]")
    host: str = option("127.0.0.1", "Address to listen at; 0.0.0.0 lets others of the network in.")
    port: int | None = option(None, "Port to listen at.  [default: the first free one from 7860 on]")
    vae: str | None = option(None, "Decode with this VAE instead of the one the model was trained with.")
    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: Precision = option("fp32", "auto is bf16 where the hardware has it.", choices=Precision)
    backend: Backend = option("auto", "auto is onnx for a model exported to it.", choices=Backend)

    def __post_init__(self) -> None:
        self._check_types()
        self._check("port", self.port is None or 1 <= self.port <= 65_535, "from 1 to 65535")
