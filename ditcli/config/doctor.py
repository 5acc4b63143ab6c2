"""The settings of `ditcli doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from ditcli.config.base import Config, option


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Config):
    """`ditcli doctor`."""

    device: str = option("auto", "Whose speed to check: auto, cpu, cuda or cuda:N.")
    speed: bool = option(True, "Train for ten seconds to see how fast it is.")

    def __post_init__(self) -> None:
        self._check_types()
