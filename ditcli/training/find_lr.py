"""The learning-rate range test (Smith, arXiv 1506.01186): a ramp of rates, and where the loss stops to fall."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ditcli.config import FindLrConfig, TrainConfig
from ditcli.data.latents import Latents
from ditcli.diffusion.process import Diffusion
from ditcli.errors import DitcliError
from ditcli.files import replacing
from ditcli.progress import progress, say
from ditcli.training.loop import apply_gradients
from ditcli.training.setup import Setup, cached_latents, make_batches, prepare
from ditcli.training.state import new_state
from ditcli.training.step import Steps

# A run lasts longer than the test, and what is just stable for some steps is not for thousands.
MARGIN = 10
DIVERGED = 4.0  # times the lowest loss so far, smoothed; as in fastai
FORGET = 0.8
SPREAD = 4.0  # steps over which the curve is smoothed, on both sides


@dataclass(frozen=True)
class RangeTest:
    """`losses` at `rates`, both in the order of the steps; `suggested` is a tenth of the rate with the lowest loss."""

    rates: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> np.ndarray:
        """Means with the weights of a bell around each step: it lags behind to neither side."""
        steps = np.arange(len(self.losses))
        weights = np.exp(-0.5 * ((steps[:, None] - steps) / SPREAD) ** 2)
        return weights @ np.array(self.losses) / weights.sum(axis=1)

    @property
    def lowest(self) -> int:
        return int(np.argmin(self.smoothed))

    @property
    def suggested(self) -> float:
        """With two digits, since the test does not know more."""
        return float(f"{self.rates[self.lowest] / MARGIN:.1e}")


def find_lr(config: TrainConfig, ramp: FindLrConfig) -> RangeTest:
    """Test the rates of a training, and draw them in `ramp.out`. Nothing is written besides.

    Raises DitcliError where the loss never falls.
    """
    setup = prepare(config)
    return try_rates(setup, cached_latents(setup), ramp)


def try_rates(setup: Setup, latents: Latents, ramp: FindLrConfig) -> RangeTest:
    """As `find_lr`, of a run that is set up: on a copy of its fresh model and the batches of its first steps."""
    config = replace(setup.config, lr=ramp.min_lr)
    setup = replace(setup, config=config)
    state = new_state(config, setup.model, setup.device, setup.source, setup.processes, setup.dtype)
    diffusion = Diffusion(setup.model.diffusion)
    batches = make_batches(setup, latents, diffusion)
    steps = Steps(setup, state, batches, diffusion)
    rates, losses = list[float](), list[float]()
    running, lowest = 0.0, math.inf
    with progress("testing rates", ramp.num_rates) as advance:
        for k in range(ramp.num_rates):
            rate = ramp.min_lr * (ramp.max_lr / ramp.min_lr) ** (k / (ramp.num_rates - 1))
            loss = steps.backward(batches[k])[0].item()  # of the weights that the rates so far have made
            norm = apply_gradients(state.optimizer, rate, config.clip_grad)
            state.step += 1
            if not math.isfinite(loss) or not torch.isfinite(norm):
                break
            rates.append(rate)
            losses.append(loss)
            running = FORGET * running + (1 - FORGET) * loss
            unbiased = running / (1 - FORGET ** len(losses))
            lowest = min(lowest, unbiased)
            advance(1, f"lr {rate:.2g}  loss {loss:.4f}")
            if unbiased > DIVERGED * lowest:
                break
    found = RangeTest(rates, losses)
    if len(rates) < 2 or found.lowest == 0:
        raise DitcliError(
            f"the loss fell at no rate from {ramp.min_lr:g} to {ramp.max_lr:g}: give a lower --min-lr, more "
            "--num-rates or a larger --batch-size, or train with a rate of your own."
        )
    if found.lowest == ramp.num_rates - 1:
        say(f"Note: the loss still fell at the highest rate, {ramp.max_lr:g}; try a higher --max-lr.")
    if setup.processes.first:
        plot_rates(found, Path(ramp.out))
    return found


def plot_rates(found: RangeTest, path: Path) -> None:
    """Loss against rate, with the suggested one marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    smoothed = found.smoothed
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="#9ecae1", linewidth=1, label="loss of a step")
    axes.plot(found.rates, smoothed, color="#08519c", linewidth=2, label="smoothed")
    axes.plot(found.rates[found.lowest], smoothed[found.lowest], "o", color="#08519c", label="lowest")
    axes.axvline(found.suggested, color="#d94801", linestyle="--", label=f"suggested: {found.suggested:g}")
    axes.set_xscale("log")
    fall = smoothed[: found.lowest + 1]
    low, high = float(fall.min()), float(fall.max())
    axes.set_ylim(low - 0.2 * (high - low), high + 0.3 * (high - low))  # not to what it diverges to
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, lasting=False) as partial:
        figure.savefig(partial, format="png")
