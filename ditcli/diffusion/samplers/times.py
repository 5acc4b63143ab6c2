"""The times that a sampler visits."""

from __future__ import annotations

import numpy as np

from ditcli.config import Spacing
from ditcli.diffusion.schedule import Schedule
from ditcli.errors import SettingError


def time_grid(schedule: Schedule, steps: int, spacing: Spacing = "uniform", *, shift: float = 1.0) -> list[float]:
    """`steps` + 1 falling times, the last of them 0.0.

    `uniform` is evenly spaced in t; on a discrete schedule its first and last step are both visited, as in the
    reference DiT (`space_timesteps` of guided-diffusion). `quadratic` (DDIM, arXiv 2010.02502, appendix D.2) and
    `karras` (EDM, arXiv 2206.00364, eq. 5 with rho 7) visit little noise more often, also between the schedule's steps.
    `leading` and `trailing` (arXiv 2305.08891, table 2) take every k-th step from the first or down from the last.
    `shift` (SD3, arXiv 2403.03206, eq. 23) multiplies the noise level sigma / alpha of each time of a flow model.
    Raises SettingError for what a schedule does not have.
    """
    if schedule.num_steps is None:
        if spacing not in ("uniform", "quadratic"):
            reason = "noise is boundless at t = 1" if spacing == "karras" else "time is continuous and has no steps"
            raise SettingError(f"spacing is {spacing!r}, but with the flow schedule {reason}: use uniform or --shift.")
        grid = np.linspace(1, 0, steps + 1) ** (2 if spacing == "quadratic" else 1)
        return [float(t) for t in shift * grid / (1 + (shift - 1) * grid)]
    if shift != 1:
        raise SettingError(
            f"shift is {shift:g}, but the model's noise schedule ends at a fixed noise level, so there is nothing to "
            "shift it to: use --spacing, or a flow model."
        )
    num_steps = schedule.num_steps
    if steps > num_steps:
        raise SettingError(f"steps is {steps}, but the model's noise schedule has only {num_steps}.")
    return [float((step + 1) / num_steps) for step in _visited(schedule, num_steps, steps, spacing)] + [0.0]


def _visited(schedule: Schedule, num_steps: int, steps: int, spacing: Spacing) -> list[float]:
    """Falling steps of a discrete schedule, from num_steps - 1 to 0 at most."""
    last = _first_visited(schedule, num_steps, steps)
    if spacing == "leading":
        return [i * (num_steps // steps) for i in reversed(range(steps))]
    if spacing == "trailing":
        return [round(num_steps - i * num_steps / steps) - 1 for i in range(steps)]
    if steps == 1:
        return [last]
    fractions = np.arange(steps - 1, -1, -1) / (steps - 1)
    if spacing == "quadratic":
        return [float(f) ** 2 * last for f in fractions]
    if spacing == "karras":
        low, high = (noise_level(schedule, (step + 1) / num_steps) ** (1 / 7) for step in (0, last))
        return [time_of(schedule, float(low + f * (high - low)) ** 7) * num_steps - 1 for f in fractions]
    return [round(i * last / (steps - 1)) for i in reversed(range(steps))]


def _first_visited(schedule: Schedule, num_steps: int, steps: int) -> int:
    """The step to start from: the last one with some data in it, alpha at least 0.006, where DDPM's schedule ends too.

    The cosine schedule ends at 5e-5, and x0 = (x_t - sigma eps) / alpha would multiply the network's error by hundreds.
    A sampler that visits every step is not hurt: it divides by the next alpha at once.
    """
    alphas = schedule.alpha(np.arange(1, num_steps + 1) / num_steps)
    last = int(np.flatnonzero(alphas >= 0.006)[-1])
    return last if steps <= last + 1 else num_steps - 1


def from_strength(times: list[float], strength: float) -> list[float]:
    """The end of a grid that changes a picture by `strength`: all of it at 1, none of its steps at 0 (SDEdit)."""
    return times[round((1 - strength) * (len(times) - 1)) :]


def noise_level(schedule: Schedule, t: float) -> float:
    """sigma / alpha, EDM's sigma."""
    return schedule.sigma(t) / schedule.alpha(t)


def time_of(schedule: Schedule, level: float) -> float:
    """The time of a noise level: the inverse of `noise_level`."""
    if schedule.num_steps is None:
        return level / (1 + level)
    # alpha^2 + sigma^2 = 1, and log alpha is linear between the schedule's steps: interpolating it is exact.
    times = np.arange(schedule.num_steps + 1) / schedule.num_steps
    return float(np.interp(0.5 * np.log1p(level**2), -np.log(schedule.alpha(times)), times))
