"""Averages of any length after training: the power-function EMA and its reconstruction (EDM2, arXiv 2312.02696).

Its weight at step tau of an average at step t is proportional to tau^gamma, so that its width is a constant part of t:
sigma_rel, the standard deviation of the profile over t. Two of them are tracked; what is stored of them now and then
spans the others well, since a profile is nearly a sum of these profiles (section 3.2, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ditcli import runs
from ditcli.config import EmaConfig
from ditcli.errors import ModelNotFoundError, SettingError
from ditcli.files import remove_partials
from ditcli.models.files import read_tensors, write_tensors
from ditcli.progress import progress, say
from ditcli.training.checkpoints import write_weights
from ditcli.training.sharding import laid_out_as
from ditcli.training.writer import telling

SIGMAS = (0.05, 0.10)
FORMAT = "ditcli-ema-1"
# A profile that is further than this from what the snapshots span is told of.
LARGEST_MISFIT = 0.05


@lru_cache
def exponent(sigma_rel: float) -> float:
    """gamma of the profile tau^gamma whose standard deviation is sigma_rel (equations 123 and 126)."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_decay(sigma_rel: float, step: int) -> float:
    """What update number `step`, the first being 1, keeps of the average (equation 127)."""
    return (1 - 1 / step) ** (exponent(sigma_rel) + 1)


class PowerAverages:
    """The two averages of a network's trained parameters; `values` are theirs by name, the first's before the second's.

    After the first update both are the weights themselves, whatever they were before.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {
            name: value for name, value in network.named_parameters() if value.requires_grad
        }
        self.values = {
            f"ema-{sigma}.{name}": value.detach().clone() for sigma in SIGMAS for name, value in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the network's weights after `step` steps."""
        values, weights = list(self.values.values()), list(self.parameters.values())
        for i, sigma in enumerate(SIGMAS):
            part = values[i * len(weights) : (i + 1) * len(weights)]
            torch._foreach_lerp_(part, weights, 1 - power_decay(sigma, step))

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over values that were saved; KeyError where there are none."""
        for name, value in self.values.items():
            value.copy_(laid_out_as(value, saved[name]))


def inner_products(steps: np.ndarray, sigmas: np.ndarray, others: np.ndarray, their_sigmas: np.ndarray) -> np.ndarray:
    """<p, q> of the profiles p of averages at `steps`, q of averages at `others` (equation 151); all of one shape."""
    gamma = np.vectorize(exponent)(sigmas)
    their_gamma = np.vectorize(exponent)(their_sigmas)
    ratio = np.where(steps < others, (steps / others) ** their_gamma, (others / steps) ** gamma)
    return (gamma + 1) * (their_gamma + 1) * ratio / ((gamma + their_gamma + 1) * np.maximum(steps, others))


def solve(steps: np.ndarray, sigmas: np.ndarray, step: float, sigma_rel: float) -> tuple[np.ndarray, float]:
    """The sum of stored averages (N,), (N,) that is nearest to another one: coefficients (N,), which add up to 1.

    Least squares of the profiles (algorithm 3), and how far the sum is from what was wanted, relative to its norm.
    """
    square = inner_products(*np.broadcast_arrays(steps[:, None], sigmas[:, None], steps[None], sigmas[None]))
    wanted = inner_products(*np.broadcast_arrays(steps, sigmas, float(step), sigma_rel))
    norms = np.sqrt(np.diag(square))  # of profiles of unit length the system is well scaled
    found = np.linalg.lstsq(square / np.outer(norms, norms), wanted / norms, rcond=1e-13)[0] / norms
    found /= found.sum()
    norm = inner_products(*map(np.asarray, (float(step), sigma_rel, float(step), sigma_rel)))
    misfit = 1 - (2 * found @ wanted - found @ square @ found) / norm
    return found, float(np.sqrt(max(misfit, 0.0)))


def snapshot_file(run: runs.RunDir, step: int) -> Path:
    return run.path / "ema" / f"step-{step:08}.safetensors"


def snapshot_steps(run: runs.RunDir) -> list[int]:
    """Steps of which there are snapshots, in order."""
    names = [re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in (run.path / "ema").glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def write_snapshot(run: runs.RunDir, step: int, values: Mapping[str, Tensor]) -> None:
    """Store both averages at a step. Raises SavingError where the disk is full."""
    path = snapshot_file(run, step)
    with telling(f"the averages of step {step:,}", path.parent):
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, values, {"format": FORMAT})


def forget_snapshots(run: runs.RunDir, step: int) -> None:
    """Remove those after a step from which training goes on, and what a killed process left half-written."""
    remove_partials(run.path / "ema")
    for later in (later for later in snapshot_steps(run) if later > step):
        snapshot_file(run, later).unlink()


def reconstruct(config: EmaConfig) -> Path:
    """Write the checkpoint of an average that was not tracked; returns its path.

    Raises ModelNotFoundError where the run stored no snapshots, SettingError for a step of which there is none.
    """
    run = runs.newest_run() if config.run is None else _find_run(config.run)
    steps = snapshot_steps(run)
    if not steps:
        raise ModelNotFoundError(
            f"{run.path} has no snapshots of its averages: train with --ema-snapshot-every N, which stores them."
        )
    step = config.step or steps[-1]
    if step not in steps:
        known = ", ".join(f"{known:,}" for known in steps[-5:])
        raise SettingError(f"step is {step}, but there is no snapshot of it: the last are those of {known}.")
    steps = [before for before in steps if before <= step]
    pairs = [(before, sigma) for before in steps for sigma in SIGMAS]
    ends, sigmas = np.array(pairs, dtype=float).T
    coefficients, misfit = solve(ends, sigmas, step, config.sigma_rel)
    weights: dict[str, Tensor] = {}
    with progress("adding snapshots", len(steps)) as advance:
        for i, before in enumerate(steps):
            values = read_tensors(snapshot_file(run, before))
            for sigma, coefficient in zip(SIGMAS, coefficients[2 * i : 2 * i + 2].tolist(), strict=True):
                for name, value in values.items():
                    if name.startswith(f"ema-{sigma}."):
                        name = name.removeprefix(f"ema-{sigma}.")
                        weights.setdefault(name, torch.zeros_like(value)).add_(value, alpha=coefficient)
            advance(1, "")
    which = f"sigma-rel {config.sigma_rel:g} at step {step:,}"
    say(f"{which} from {len(pairs)} averages; their sum is off its profile by {misfit:.2%}.")
    if misfit > LARGEST_MISFIT:
        say("Warning: that is far: try a sigma-rel nearer to 0.05 ... 0.10, or train with more snapshots.")
    newest = run.newest_checkpoint()
    weights = read_tensors(newest) | weights  # what is frozen is the same in all
    path = Path(config.out) if config.out else run.path / f"ema-{config.sigma_rel:g}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, weights, replace(runs.read_model_config(newest), step=step))
    return path


def _find_run(name: str) -> runs.RunDir:
    for path in (Path(name).expanduser(), runs.RUNS / name):
        if runs.is_run(path):
            return runs.RunDir(path)
    raise ModelNotFoundError(f"there is no run {name}: give the folder of one that `ditcli train` made.")
