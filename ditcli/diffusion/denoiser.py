"""What a sampler knows of a network: a callable with a process, a shape and class names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ditcli.diffusion.process import Array, Diffusion


class Denoiser(Protocol):
    """A network in some runtime. It owns device, precision and session; states stay arrays of its own kind."""

    @property
    def diffusion(self) -> Diffusion: ...

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the states."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        """The network's output at x_t (N, C, H, W) and time t for labels (N,): (N, C, H, W), or 2C with a variance.

        The label ``len(class_names)`` is the null class.
        """
        ...

    def from_numpy(self, array: np.ndarray) -> Array:
        """An array of this runtime, on its device: float32 states, or int64 labels."""
        ...

    def to_numpy(self, array: Array) -> np.ndarray: ...


@dataclass(frozen=True)
class Wrapper:
    """A denoiser that is another one but for its calls."""

    denoiser: Denoiser

    @property
    def diffusion(self) -> Diffusion:
        return self.denoiser.diffusion

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.denoiser.input_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.denoiser.class_names

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        return self.denoiser(x_t, t, labels)

    def from_numpy(self, array: np.ndarray) -> Array:
        return self.denoiser.from_numpy(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return self.denoiser.to_numpy(array)
