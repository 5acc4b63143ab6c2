"""Samplers that step through the posterior: DDIM and DDPM."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import log, sqrt

from array_api_compat import array_namespace

from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.process import Array

Noise = Callable[[], Array]
Watch = Callable[[float, Array], object]


def ddim(
    denoiser: Denoiser,
    x_t: Array,
    labels: Array,
    times: list[float],
    *,
    noise: Noise,
    eta: float = 0.0,
    watch: Watch | None = None,
) -> Array:
    """DDIM (arXiv 2010.02502), eq. 12: deterministic with `eta` 0, DDPM's noise with 1. On a flow schedule, Euler."""
    schedule = denoiser.diffusion.schedule
    for t, s in pairwise(times):
        x0, eps = denoiser.diffusion.split(denoiser(x_t, t, labels), x_t, t)
        variance = eta**2 * schedule.posterior(t, s)[2] if eta else 0.0
        x_t = schedule.alpha(s) * x0 + sqrt(max(schedule.sigma(s) ** 2 - variance, 0.0)) * eps
        if variance > 0:
            x_t = x_t + sqrt(variance) * noise()
        if watch:
            watch(s, x_t)
    return x_t


def ddpm(
    denoiser: Denoiser,
    x_t: Array,
    labels: Array,
    times: list[float],
    *,
    noise: Noise,
    clip: bool = False,
    watch: Watch | None = None,
) -> Array:
    """Ancestral sampling (arXiv 2006.11239, algorithm 2) with the learned variance where the model has one.

    Without one the variance is the posterior's, the better of DDPM's two choices when steps are few. `clip` keeps x0
    in [-1, 1].
    """
    schedule = denoiser.diffusion.schedule
    channels = x_t.shape[1]
    for t, s in pairwise(times):
        output = denoiser(x_t, t, labels)
        xp = array_namespace(output)
        x0, _ = denoiser.diffusion.split(output, x_t, t)
        if clip:
            x0 = xp.clip(x0, -1, 1)
        of_x0, of_x_t, variance, beta = schedule.posterior(t, s)
        x_t = of_x0 * x0 + of_x_t * x_t
        if s > 0 and denoiser.diffusion.config.learn_sigma:
            # Improved DDPM eq. 15: between the posterior's variance and beta, in the logarithm.
            fraction = (output[:, channels:] + 1) * 0.5
            x_t = x_t + xp.exp(0.5 * (log(variance) + fraction * (log(beta) - log(variance)))) * noise()
        elif s > 0:
            x_t = x_t + sqrt(variance) * noise()
        if watch:
            watch(s, x_t)
    return x_t
