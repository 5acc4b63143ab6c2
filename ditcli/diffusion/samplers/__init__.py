"""Samplers: functions of a denoiser and a falling list of times, from noise to x0.

All are called as ``sampler(denoiser, x_t, labels, times, noise=..., watch=...)``. States are touched with ``+ - *``
alone and coefficients are Python floats, so one function serves every kind of array. `times` falls to 0.0 at its end; a
step goes from one entry to the next. `noise` draws a fresh standard normal of the states' shape; deterministic samplers
never call it. `watch`, if given, sees (time reached, state) after each step.
"""

from ditcli.diffusion.samplers.ancestral import Noise, Watch, ddim, ddpm
from ditcli.diffusion.samplers.exponential import dpm_solver, dpm_solver_sde, unipc
from ditcli.diffusion.samplers.ode import euler, heun, linear_multistep, midpoint, runge_kutta_4
from ditcli.diffusion.samplers.times import from_strength, time_grid

__all__ = [
    "Noise",
    "Watch",
    "ddim",
    "ddpm",
    "dpm_solver",
    "dpm_solver_sde",
    "euler",
    "from_strength",
    "heun",
    "linear_multistep",
    "midpoint",
    "runge_kutta_4",
    "time_grid",
    "unipc",
]
