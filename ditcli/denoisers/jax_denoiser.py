"""A network in JAX as a denoiser: the weights of a checkpoint, in a jitted function."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import numpy as np

from ditcli.config import DiTConfig, ModelConfig
from ditcli.diffusion.process import Diffusion
from ditcli.errors import SettingError
from ditcli.models.jax_dit import Weights, apply
from ditcli.models.weights import load_dit


@dataclass(frozen=True)
class JaxDenoiser:
    """`apply` compiled for each shape that it meets; all in fp32, on GPUs too, where JAX would multiply in TF32."""

    weights: Weights = field(repr=False)
    dit: DiTConfig
    diffusion: Diffusion
    class_names: tuple[str, ...]
    device: jax.Device

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (self.dit.in_channels, *self.dit.input_size)

    def __call__(self, x_t: jax.Array, t: float, labels: jax.Array) -> jax.Array:
        time = np.full(len(x_t), self.diffusion.network_time(t), dtype=np.float32)
        return _jitted(self.weights, self.dit, x_t, self.from_numpy(time), labels)

    def from_numpy(self, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, self.device)

    def to_numpy(self, array: jax.Array) -> np.ndarray:
        return np.array(array)  # a copy: JAX's own memory is not to be written


@partial(jax.jit, static_argnames="config")
def _jitted(weights: Weights, config: DiTConfig, x: jax.Array, t: jax.Array, labels: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return apply(weights, config, x, t, labels)


def open_denoiser(
    checkpoint: Path, *, ema: bool = True, adapter: Path | None = None, device: str = "auto"
) -> tuple[JaxDenoiser, ModelConfig]:
    """The denoiser of whatever `load_dit` reads, and what it says of itself."""
    place = open_device(device)
    network, config = load_dit(checkpoint, ema=ema, adapter=adapter)
    weights = {name: jax.device_put(value.float().numpy(), place) for name, value in network.state_dict().items()}
    return JaxDenoiser(weights, config.dit, Diffusion(config.diffusion), config.class_names, place), config


def open_device(name: str) -> jax.Device:
    """`auto` is what JAX takes first; SettingError for a device that it does not see."""
    if name == "auto":
        return jax.devices()[0]
    platform, _, number = name.partition(":")
    try:
        devices = jax.devices(platform)
        return devices[int(number or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        seen = ", ".join(f"{device.platform}:{device.id}" for device in jax.devices())
        raise SettingError(
            f"device is {name!r}, but JAX {jax.__version__} sees {seen}: give one of them, or auto."
        ) from error
