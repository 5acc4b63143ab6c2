"""Denoisers that know something more: a part of the picture, or classes between classes; and one that remembers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from array_api_compat import array_namespace

from ditcli.diffusion.denoiser import Wrapper
from ditcli.diffusion.process import Array


@dataclass(frozen=True)
class KnownRegion(Wrapper):
    """A denoiser that is certain of x0 where `paint` (N, 1, H, W) is 0, and asks the network where it is 1.

    In the known region that is the exact denoiser of a point, so every sampler lands on `known` (N, C, H, W) there, and
    on its way has the noise of its time: RePaint (arXiv 2201.09865, eq. 8) without its repetitions.
    """

    known: Array
    paint: Array

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        output = self.denoiser(x_t, t, labels)
        schedule = self.diffusion.schedule
        x0, eps = self.diffusion.split(output, x_t, t)
        x0 = self.paint * x0 + (1 - self.paint) * self.known
        if schedule.sigma(t) > 0:
            eps = (1 / schedule.sigma(t)) * (x_t - schedule.alpha(t) * x0)
        xp = array_namespace(x_t)
        return xp.concat([self.diffusion.target(x0, eps, t), output[:, x_t.shape[1] :]], axis=1)


@dataclass(frozen=True)
class BetweenClasses(Wrapper):
    """A denoiser whose label i lies on the line from class `start` to class `end`, `shares[i]` of the way.

    Its output is mixed from those of the two classes, so guidance and every backend take it like any other. The label
    ``len(shares)`` is the null class.
    """

    start: int
    end: int
    shares: tuple[float, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        names = self.denoiser.class_names
        return tuple(f"{names[self.start]} to {names[self.end]}, {share:.2f}" for share in self.shares)

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        null = len(self.denoiser.class_names)
        index = self.to_numpy(labels)
        is_null = index == len(self.shares)
        first, second = (
            self.from_numpy(np.where(is_null, null, label).astype(np.int64)) for label in (self.start, self.end)
        )
        share = self.from_numpy(np.array([*self.shares, 0.0], dtype=np.float32)[index].reshape(-1, 1, 1, 1))
        xp = array_namespace(x_t)
        both = self.denoiser(xp.concat([x_t, x_t]), t, xp.concat([first, second]))
        return (1 - share) * both[: len(x_t)] + share * both[len(x_t) :]


@dataclass(frozen=True)
class Remembering(Wrapper):
    """A denoiser that keeps the x0 (N, C, H, W) that it saw in each call, as numpy arrays, in `estimates`."""

    estimates: list[np.ndarray] = field(default_factory=list)

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        output = self.denoiser(x_t, t, labels)
        self.estimates.append(self.to_numpy(self.diffusion.split(output, x_t, t)[0]))
        return output
