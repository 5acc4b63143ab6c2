"""The training loss (paper section 3.1): the distance to the target, and the bound that trains a learned variance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ditcli.config import Loss
from ditcli.devices import place
from ditcli.diffusion.process import Diffusion
from ditcli.diffusion.schedule import Schedule
from ditcli.diffusion.variational import Chain, variational_bound
from ditcli.training.batches import Batch
from ditcli.training.metrics import NOISE_LEVELS

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def diffusion_loss(network: Network, diffusion: Diffusion, batch: Batch, loss: Loss) -> Tensor:
    """Loss of each image, (N,), in float32; `network` takes (x_t, network time, labels)."""
    x0, eps, t = batch.x0, batch.eps, batch.t
    x_t = diffusion.add_noise(x0, eps, t)
    network_time = place(diffusion.network_time(t).astype(np.float32), x_t.device)
    output = network(x_t, network_time, batch.labels).float()

    channels = x0.shape[1]
    error = output[:, :channels] - diffusion.target(x0, eps, t)
    distance = (error.square() if loss == "mse" else error.abs()).mean(dim=(1, 2, 3))
    if not diffusion.config.learn_sigma:
        return distance
    predicted_x0, _ = diffusion.split(output.detach(), x_t, t)
    chain = _full_chain(diffusion.schedule)
    step = np.rint(t * len(chain.times)).astype(np.int64) - 1
    return distance + variational_bound(chain, step, x0, x_t, predicted_x0, output[:, channels:])


def by_noise_level(losses: Tensor, t: np.ndarray) -> Tensor:
    """Of losses (N,) at times t (N,) the mean; then, over N, their sum and number in each eighth of (0, 1]: (17,).

    Sums and numbers of several batches may be averaged, as means of an eighth may not. Nothing waits for the device.
    """
    level = np.ceil(t * NOISE_LEVELS).astype(np.int64) - 1
    member = np.eye(NOISE_LEVELS, dtype=np.float32)[level] / len(t)  # (N, 8)
    share = place(member, losses.device)
    return torch.cat([losses.mean()[None], losses @ share, share.sum(dim=0)])


@cache
def _full_chain(schedule: Schedule) -> Chain:
    """All steps of a discrete schedule."""
    num_steps = schedule.num_steps
    assert num_steps is not None, "only a discrete schedule has a variance to learn"
    return Chain.of(schedule, np.arange(1, num_steps + 1) / num_steps)
