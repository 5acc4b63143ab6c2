"""The training loss (paper section 3.1): the distance to the target, and the bound that trains a learned variance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ditcli.config import Loss
from ditcli.diffusion.process import Diffusion
from ditcli.diffusion.schedule import Schedule
from ditcli.diffusion.variational import Chain, variational_bound
from ditcli.training.batches import Batch

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def diffusion_loss(network: Network, diffusion: Diffusion, batch: Batch, loss: Loss) -> Tensor:
    """Loss of each image, (N,), in float32; `network` takes (x_t, network time, labels)."""
    x0, eps, t = batch.x0, batch.eps, batch.t
    x_t = diffusion.add_noise(x0, eps, t)
    network_time = torch.from_numpy(diffusion.network_time(t)).to(x_t.device, torch.float32)
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


@cache
def _full_chain(schedule: Schedule) -> Chain:
    """All steps of a discrete schedule."""
    num_steps = schedule.num_steps
    assert num_steps is not None, "only a discrete schedule has a variance to learn"
    return Chain.of(schedule, np.arange(1, num_steps + 1) / num_steps)
