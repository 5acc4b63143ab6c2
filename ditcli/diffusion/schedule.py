"""Gaussian paths from data to noise: x_t = alpha(t) x0 + sigma(t) eps, with t = 0 data and t = 1 noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Time = Any  # a float for a whole batch, or an array of one time per image; results are of the same kind


@dataclass(frozen=True)
class Schedule:
    """Two functions of time. Both take a float and give a float, or an array of times and give an array.

    A discrete schedule of T steps has its step i (0..T-1) at t = (i + 1) / T, and t = 0 is the clean image.
    """

    alpha: Callable[[Time], Time]
    sigma: Callable[[Time], Time]
    num_steps: int | None = None  # None: continuous in time

    def posterior(self, t: Time, s: Time) -> tuple[Time, Time, Time, Time]:
        """q(x_s | x_t, x0) for s < t: the mean's coefficients of x0 and x_t, its variance, and that of q(x_t | x_s).

        Variational Diffusion Models (arXiv 2107.00630), appendix A.2; with alpha^2 + sigma^2 = 1 these are eqs. 6 and 7
        of DDPM, and the last number is beta_t.
        """
        step_alpha = self.alpha(t) / self.alpha(s)
        step_variance = self.sigma(t) ** 2 - step_alpha**2 * self.sigma(s) ** 2
        of_x0 = self.alpha(s) * step_variance / self.sigma(t) ** 2
        of_x_t = step_alpha * self.sigma(s) ** 2 / self.sigma(t) ** 2
        return of_x0, of_x_t, step_variance * self.sigma(s) ** 2 / self.sigma(t) ** 2, step_variance


def linear_beta(num_steps: int = 1000) -> Schedule:
    """DDPM (arXiv 2006.11239): beta rises from 1e-4 to 2e-2 in 1000 steps.

    Other step counts scale beta by 1000 / num_steps, as guided-diffusion does, so that the last step is as noisy.
    """
    scale = 1000 / num_steps
    return _from_betas(np.linspace(scale * 1e-4, min(scale * 2e-2, 0.999), num_steps))


def cosine(num_steps: int = 1000) -> Schedule:
    """Improved DDPM (arXiv 2102.09672), eq. 17: alpha^2 = cos^2((t + 0.008) / 1.008 * pi / 2), beta at most 0.999."""

    def alpha_bar(i: float) -> float:
        return math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return _from_betas(np.array([min(1 - alpha_bar(i + 1) / alpha_bar(i), 0.999) for i in range(num_steps)]))


def flow() -> Schedule:
    """Flow matching on straight lines (arXiv 2210.02747, 2209.03003): x_t = (1 - t) x0 + t eps."""
    return Schedule(alpha=lambda t: 1 - t, sigma=lambda t: t)


def _from_betas(betas: np.ndarray) -> Schedule:
    """alpha^2 is the running product of 1 - beta, its logarithm linear in between."""
    num_steps = len(betas)
    log_alpha_bar = np.concatenate([[0.0], np.cumsum(np.log1p(-betas))])

    def log_alpha_bar_at(t: Time) -> Time:
        value = np.interp(t * num_steps, np.arange(num_steps + 1), log_alpha_bar)
        return value if isinstance(t, np.ndarray) else float(value)

    def alpha(t: Time) -> Time:
        value = np.exp(log_alpha_bar_at(t) / 2)
        return value if isinstance(t, np.ndarray) else float(value)

    def sigma(t: Time) -> Time:
        value = np.sqrt(-np.expm1(log_alpha_bar_at(t)))
        return value if isinstance(t, np.ndarray) else float(value)

    return Schedule(alpha=alpha, sigma=sigma, num_steps=num_steps)
