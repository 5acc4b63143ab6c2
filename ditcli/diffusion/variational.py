"""The variational bound that trains a learned variance (Improved DDPM, arXiv 2102.09672, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from ditcli.diffusion.process import Array, like
from ditcli.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Chain:
    """The discrete process that visits `times` (rising, without the data at 0): float64 tables, a row per step."""

    times: np.ndarray
    betas: np.ndarray
    posterior_of_x0: np.ndarray
    posterior_of_x_t: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance: np.ndarray  # its first entry, log 0, is replaced by the second

    @classmethod
    def of(cls, schedule: Schedule, times: np.ndarray) -> Chain:
        """Tables of a schedule at these times: DDPM's when they are all its steps, a respaced process's when fewer."""
        earlier = np.concatenate([[0.0], times[:-1]])
        of_x0, of_x_t, variance, betas = schedule.posterior(times, earlier)
        log_variance = np.log(np.concatenate([variance[1:2], variance[1:]]))
        return cls(times, betas, of_x0, of_x_t, variance, log_variance)

    def mean(self, x0: Array, x_t: Array, step: np.ndarray) -> Array:
        """Of q(x_s | x_t, x0), at one step per image; eq. 7 of DDPM."""
        return like(self.posterior_of_x0[step], x0) * x0 + like(self.posterior_of_x_t[step], x0) * x_t


def variational_bound(
    chain: Chain, step: np.ndarray, x0: Array, x_t: Array, predicted_x0: Array, variance: Array
) -> Array:
    """One term of the bound per image, in bits per dimension, (N,).

    `step` (N,) counts the chain's times from 0; `variance` (N, C, H, W) is the network's output in about [-1, 1], which
    interpolates the log variance between the posterior's and beta (eq. 15). Step 0 is scored by the likelihood of
    8-bit images, the others by the divergence from the true posterior. Pass `predicted_x0` detached, so that the bound
    trains the variance alone.
    """
    xp = array_namespace(x0)
    low, high = like(chain.posterior_log_variance[step], x0), like(np.log(chain.betas[step]), x0)
    log_variance = low + (variance + 1) / 2 * (high - low)
    mean = chain.mean(predicted_x0, x_t, step)
    true_mean = chain.mean(x0, x_t, step)

    # KL between Gaussians of means true_mean, mean and log variances low, log_variance.
    divergence = 0.5 * (
        log_variance - low - 1 + xp.exp(low - log_variance) + (true_mean - mean) ** 2 * xp.exp(-log_variance)
    )
    likelihood = _discretized_log_likelihood(x0, mean, 0.5 * log_variance)
    first = like((step == 0).astype(np.float64), x0)
    bound = xp.where(first > 0, -likelihood, divergence)
    return xp.mean(bound, axis=tuple(range(1, x0.ndim))) / math.log(2)


def _discretized_log_likelihood(images: Array, mean: Array, log_scale: Array) -> Array:
    """Log probability of 8-bit values, scaled to [-1, 1], under a Gaussian; DDPM eq. 13."""
    xp = array_namespace(images)
    inverse = xp.exp(-log_scale)
    above = _normal_cdf((images - mean + 1 / 255) * inverse)
    below = _normal_cdf((images - mean - 1 / 255) * inverse)
    inside = xp.where(images > 0.999, 1 - below, above - below)
    return xp.log(xp.clip(xp.where(images < -0.999, above, inside), 1e-12, None))


def _normal_cdf(x: Array) -> Array:
    """Page's tanh approximation, which the reference implementation uses too."""
    xp = array_namespace(x)
    return 0.5 * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
