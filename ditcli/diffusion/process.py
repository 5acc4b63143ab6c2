"""The diffusion process: a schedule, and what the network predicts of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from ditcli.config import DiffusionConfig
from ditcli.diffusion import schedule as schedules
from ditcli.diffusion.schedule import Schedule, Time

Array = Any  # a torch tensor, numpy array or JAX array of shape (N, C, H, W)


@dataclass(frozen=True)
class Diffusion:
    """Every prediction is p x0 + q eps; with x_t = alpha x0 + sigma eps that is two equations for x0 and eps.

    Times are one float for the whole batch, or an array (N,) with one per image.

    `eps` is DDPM's, `v` is that of arXiv 2202.00512 (alpha eps - sigma x0), `flow` the velocity eps - x0.
    """

    config: DiffusionConfig

    @cached_property
    def schedule(self) -> Schedule:
        steps = self.config.num_timesteps
        match self.config.schedule:
            case "linear":
                return schedules.linear_beta(steps)
            case "cosine":
                return schedules.cosine(steps)
            case "flow":
                return schedules.flow()

    def network_time(self, t: Time) -> Time:
        """The number that the network is given for time t: the step's index 0..T-1, or for flow matching T t.

        SiT (arXiv 2401.08740) has data at 1 and noise at 0, and feeds that time as it is.
        """
        config = self.config
        if self.schedule.num_steps is not None:
            return t * config.num_timesteps - 1
        return (config.time_scale or config.num_timesteps) * ((1 - t) if config.reversed_time else t)

    def add_noise(self, x0: Array, eps: Array, t: Time) -> Array:
        """x_t, a draw of q(x_t | x0)."""
        return _times(self.schedule.alpha(t), x0) + _times(self.schedule.sigma(t), eps)

    def target(self, x0: Array, eps: Array, t: Time) -> Array:
        """What the network should predict at x_t."""
        p, q = self._weights(t)
        return _times(p, x0) + _times(q, eps)

    def split(self, output: Array, x_t: Array, t: Time) -> tuple[Array, Array]:
        """(x0, eps) as the output (N, C or 2C, H, W) at x_t (N, C, H, W) has them; a variance is left out."""
        prediction = output[:, : x_t.shape[1]]
        alpha, sigma, (p, q) = self.schedule.alpha(t), self.schedule.sigma(t), self._weights(t)
        determinant = alpha * q - sigma * p
        x0 = _times(q / determinant, x_t) - _times(sigma / determinant, prediction)
        eps = _times(alpha / determinant, prediction) - _times(p / determinant, x_t)
        return x0, eps

    def _weights(self, t: Time) -> tuple[Time, Time]:
        one = t * 0 + 1.0
        match self.config.prediction:
            case "eps":
                return 0 * one, one
            case "x0":
                return one, 0 * one
            case "v":
                return -self.schedule.sigma(t), self.schedule.alpha(t)
            case "flow":  # the derivative of x_t in the direction of the network's time
                return (one, -one) if self.config.reversed_time else (-one, one)


def _times(coefficient: Time, images: Array) -> Array:
    """A float times the images, or one coefficient per image."""
    if isinstance(coefficient, float):
        return coefficient * images
    return like(coefficient, images) * images


def like(coefficients: np.ndarray, images: Array) -> Array:
    """One number per image, (N,), as an array of the images' kind, type and device that broadcasts over them."""
    xp = array_namespace(images)
    shape = (-1, *(1,) * (images.ndim - 1))
    if getattr(images, "is_cuda", False):  # torch: pinned, so that nobody waits until the GPU has nothing to do
        pinned = xp.asarray(coefficients, dtype=images.dtype).pin_memory()
        return pinned.to(images.device, non_blocking=True).reshape(shape)
    return xp.reshape(xp.asarray(coefficients, dtype=images.dtype, device=images.device), shape)
