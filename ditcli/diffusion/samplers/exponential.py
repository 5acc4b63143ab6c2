"""Exponential integrators in half the log-SNR, lambda = log(alpha / sigma): DPM-Solver++ and UniPC.

They predict x0 and keep the linear part of the ODE exact. On a flow schedule lambda is -inf at t = 1, and at t = 0 it
is inf on all; the formulas below stay finite there and become those of order 1.
"""

from __future__ import annotations

from itertools import pairwise
from math import exp, expm1, inf, log, sqrt
from typing import Literal

from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.process import Array
from ditcli.diffusion.samplers.ancestral import Noise, Watch
from ditcli.diffusion.schedule import Schedule


def dpm_solver(
    denoiser: Denoiser,
    x_t: Array,
    labels: Array,
    times: list[float],
    *,
    noise: Noise,
    variant: Literal["midpoint", "heun"] = "midpoint",
    watch: Watch | None = None,
) -> Array:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), order 2 with one call a step; its last step is of order 1."""
    schedule = denoiser.diffusion.schedule
    former, former_h = None, inf
    for t, s in pairwise(times):
        x0, _ = denoiser.diffusion.split(denoiser(x_t, t, labels), x_t, t)
        h = _log_snr(schedule, s) - _log_snr(schedule, t)
        x_t = (schedule.sigma(s) / schedule.sigma(t)) * x_t + (-schedule.alpha(s) * expm1(-h)) * x0
        if former is not None and s > 0:
            # D1 / h with D1 as in diffusers: the change of x0 per unit of lambda, times h.
            weight = -0.5 * expm1(-h) if variant == "midpoint" else 1 + expm1(-h) / h
            x_t = x_t + (schedule.alpha(s) * weight * h / former_h) * (x0 - former)
        former, former_h = x0, h
        if watch:
            watch(s, x_t)
    return x_t


def dpm_solver_sde(
    denoiser: Denoiser, x_t: Array, labels: Array, times: list[float], *, noise: Noise, watch: Watch | None = None
) -> Array:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, eq. 19 and section 5): the same with fresh noise at each step."""
    schedule = denoiser.diffusion.schedule
    former, former_h = None, inf
    for t, s in pairwise(times):
        x0, _ = denoiser.diffusion.split(denoiser(x_t, t, labels), x_t, t)
        h = _log_snr(schedule, s) - _log_snr(schedule, t)
        renewed = -expm1(-2 * h)  # the share of the variance that is drawn anew
        x_t = (schedule.sigma(s) / schedule.sigma(t) * exp(-h)) * x_t + (schedule.alpha(s) * renewed) * x0
        if former is not None and s > 0:
            x_t = x_t + (0.5 * schedule.alpha(s) * renewed * h / former_h) * (x0 - former)
        if s > 0:
            x_t = x_t + (schedule.sigma(s) * sqrt(renewed)) * noise()
        former, former_h = x0, h
        if watch:
            watch(s, x_t)
    return x_t


def unipc(
    denoiser: Denoiser, x_t: Array, labels: Array, times: list[float], *, noise: Noise, watch: Watch | None = None
) -> Array:
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv 2302.04867, algorithms 5 and 6, there UniPC-B2), one call a step.

    The corrector goes over the last step again once the network was called at its end; the last step is of order 1.
    """
    schedule = denoiser.diffusion.schedule
    start = x_t  # where the last step began
    earlier: list[tuple[Array, float]] = []  # x0 and lambda of former calls, the latest first
    former_order = 1
    for i, (t, s) in enumerate(pairwise(times)):
        x0, _ = denoiser.diffusion.split(denoiser(x_t, t, labels), x_t, t)
        if earlier:
            x_t = _unified(schedule, start, times[i - 1], t, earlier[:former_order], corrector=x0)
        earlier = [(x0, _log_snr(schedule, t)), *earlier][:2]
        start, former_order = x_t, len(earlier) if s > 0 else 1
        x_t = _unified(schedule, start, t, s, earlier[:former_order])
        if watch:
            watch(s, x_t)
    return x_t


def _unified(
    schedule: Schedule,
    x_t: Array,
    t: float,
    s: float,
    earlier: list[tuple[Array, float]],
    *,
    corrector: Array | None = None,
) -> Array:
    """A step from t to s by x0 at t and, at order 2, before it; the corrector knows x0 at s too (UniPC, section 3)."""
    x0, of_t = earlier[0]
    h = _log_snr(schedule, s) - of_t
    b = expm1(-h)
    reached = (schedule.sigma(s) / schedule.sigma(t)) * x_t + (-schedule.alpha(s) * b) * x0
    if len(earlier) == 1:
        return reached if corrector is None else reached + (-0.5 * schedule.alpha(s) * b) * (corrector - x0)
    before, of_before = earlier[1]
    r = (of_before - of_t) / h  # negative; -inf after a step from infinite noise, whose x0 then counts for nothing
    if corrector is None:
        return reached + (-0.5 * schedule.alpha(s) * b / r) * (before - x0)
    # The two weights solve [1 1; r 1] w = (g1, g2), from the functions phi of eq. 5 with -h for h.
    phi = b / -h - 1
    g1, g2 = phi / b, 2 * (phi / -h - 0.5) / b
    w = (g1 - g2) / (1 - r)
    step = -schedule.alpha(s) * b
    return reached + (step * w / r) * (before - x0) + (step * (g1 - w)) * (corrector - x0)


def _log_snr(schedule: Schedule, t: float) -> float:
    """log(alpha / sigma)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if alpha == 0 or sigma == 0:
        return -inf if alpha == 0 else inf
    return log(alpha) - log(sigma)
