"""Solvers of the probability flow ODE (arXiv 2011.13456, section 4.3): Runge-Kutta and linear multistep.

They work in coordinates (u, y) in which x_t = alpha x0 + sigma eps is a straight line: for flow matching y = x_t and
u = t with slope eps - x0; on other schedules EDM's (arXiv 2206.00364, section 4), y = x_t / alpha and u = sigma / alpha
with slope eps. So a step is exact where the network's x0 and eps do not change.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.process import Array
from ditcli.diffusion.samplers.ancestral import Noise, Watch
from ditcli.diffusion.samplers.times import time_of


@dataclass(frozen=True)
class Path:
    """The ODE dy/du = slope of a denoiser and its labels."""

    denoiser: Denoiser
    labels: Array

    @property
    def straight(self) -> bool:
        return self.denoiser.diffusion.schedule.num_steps is None

    @property
    def ends_in_data(self) -> bool:
        """Whether the slope is known at t = 0: no discrete schedule has that step, and x0 says nothing of eps there."""
        return self.straight and self.denoiser.diffusion.config.prediction != "x0"

    def scale(self, t: float) -> float:
        return 1.0 if self.straight else self.denoiser.diffusion.schedule.alpha(t)

    def u(self, t: float) -> float:
        return self.denoiser.diffusion.schedule.sigma(t) / self.scale(t)

    def time(self, u: float) -> float:
        return u if self.straight else time_of(self.denoiser.diffusion.schedule, u)

    def slope(self, y: Array, t: float) -> Array:
        x_t = self.scale(t) * y
        x0, eps = self.denoiser.diffusion.split(self.denoiser(x_t, t, self.labels), x_t, t)
        return eps - x0 if self.straight else eps


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: stage i is at node[i] of the step, from earlier slopes weighted by matrix[i]."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


EULER = Tableau((0,), ((),), (1,))
HEUN = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
MIDPOINT = Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1))
# Kutta's 3/8 rule, which torchdiffeq and with it SiT call rk4.
THREE_EIGHTHS = Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))


def euler(
    denoiser: Denoiser, x_t: Array, labels: Array, times: list[float], *, noise: Noise, watch: Watch | None = None
) -> Array:
    """Euler's method, one call a step. The same as DDIM with eta 0."""
    return _runge_kutta(EULER, Path(denoiser, labels), x_t, times, watch)


def heun(
    denoiser: Denoiser, x_t: Array, labels: Array, times: list[float], *, noise: Noise, watch: Watch | None = None
) -> Array:
    """Heun's method of order 2 (EDM, algorithm 1), two calls a step."""
    return _runge_kutta(HEUN, Path(denoiser, labels), x_t, times, watch)


def midpoint(
    denoiser: Denoiser, x_t: Array, labels: Array, times: list[float], *, noise: Noise, watch: Watch | None = None
) -> Array:
    """The midpoint method of order 2, two calls a step."""
    return _runge_kutta(MIDPOINT, Path(denoiser, labels), x_t, times, watch)


def runge_kutta_4(
    denoiser: Denoiser, x_t: Array, labels: Array, times: list[float], *, noise: Noise, watch: Watch | None = None
) -> Array:
    """Kutta's 3/8 rule of order 4, four calls a step."""
    return _runge_kutta(THREE_EIGHTHS, Path(denoiser, labels), x_t, times, watch)


def _runge_kutta(tableau: Tableau, path: Path, x_t: Array, times: list[float], watch: Watch | None) -> Array:
    for t, s in pairwise(times):
        # A step to data whose slope there is not known is Euler's, which needs none.
        method = tableau if s > 0 or path.ends_in_data else EULER
        start, step = path.u(t), path.u(s) - path.u(t)
        y = (1 / path.scale(t)) * x_t
        slopes: list[Array] = []
        for node, row in zip(method.nodes, method.matrix, strict=True):
            stage = t if node == 0 else s if node == 1 else path.time(start + node * step)
            slopes.append(path.slope(_plus(y, [step * weight for weight in row], slopes), stage))
        x_t = path.scale(s) * _plus(y, [step * weight for weight in method.weights], slopes)
        if watch:
            watch(s, x_t)
    return x_t


def linear_multistep(
    denoiser: Denoiser,
    x_t: Array,
    labels: Array,
    times: list[float],
    *,
    noise: Noise,
    order: int = 4,
    watch: Watch | None = None,
) -> Array:
    """Adams-Bashforth of `order` 1 to 4 on an uneven grid, one call a step.

    It starts with lower orders, as k-diffusion's does. The error of those steps stays, so orders 3 and 4 show where
    they are short or straight, as they nearly are in pure noise.
    """
    path = Path(denoiser, labels)
    nodes: list[float] = []
    slopes: list[Array] = []
    for t, s in pairwise(times):
        y = (1 / path.scale(t)) * x_t
        nodes = [path.u(t), *nodes][:order]
        slopes = [path.slope(y, t), *slopes][:order]
        x_t = path.scale(s) * _plus(y, adams_bashforth(nodes, path.u(s)), slopes)
        if watch:
            watch(s, x_t)
    return x_t


def adams_bashforth(nodes: list[float], end: float) -> list[float]:
    """Weights of the slopes at `nodes` in the step from nodes[0] to `end`: integrals of the Lagrange polynomials."""
    step = end - nodes[0]
    places = (np.array(nodes) - nodes[0]) / step  # the step is from 0 to 1
    weights = []
    for i, place in enumerate(places):
        others = np.delete(places, i)
        basis = np.atleast_1d(np.poly(others)) / np.prod(place - others)
        weights.append(float(step * np.polyval(np.polyint(basis), 1.0)))
    return weights


def _plus(y: Array, weights: list[float], slopes: list[Array]) -> Array:
    for weight, slope in zip(weights, slopes, strict=True):
        y = y + weight * slope if weight else y
    return y
