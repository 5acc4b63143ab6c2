"""What the network is shown at each step: a function of (seed, step), never of what came before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ditcli.codecs.codec import Codec
from ditcli.config import TrainConfig
from ditcli.data.latent_files import Moments
from ditcli.data.latents import Latents
from ditcli.devices import place
from ditcli.diffusion.process import Diffusion
from ditcli.memory import free_memory
from ditcli.processes import ALONE, Processes

# Latents stay on the training device when they take at most this part of its free memory.
RESIDENT_SHARE = 0.4


@dataclass(frozen=True)
class Batch:
    """A batch on the device; `t` (N,) are times in (0, 1] as float64."""

    x0: Tensor  # (N, C, h, w)
    eps: Tensor  # (N, C, h, w)
    labels: Tensor  # (N,), some of them the null class
    t: np.ndarray

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of `size` images: together they are the batch, whatever the size."""
        return [
            Batch(self.x0[part], self.eps[part], self.labels[part], self.t[part])
            for part in (slice(start, start + size) for start in range(0, len(self.t), size))
        ]


class Batches:
    """Batch number `step` as ``batches[step]``, another one for each `order`.

    Every picture is seen once an epoch, in an order of its own; flips, times, noise and dropped labels are drawn anew.
    Of several processes each gets its part of the same batch.
    """

    def __init__(
        self,
        latents: Latents,
        codec: Codec,
        diffusion: Diffusion,
        config: TrainConfig,
        *,
        num_classes: int,
        device: torch.device,
        processes: Processes = ALONE,
    ):
        self.codec, self.diffusion, self.config = codec, diffusion, config
        self.num_classes, self.device = num_classes, device
        part = processes.part(config.batch_size)
        self.part = slice(part.start, part.stop)
        self.order = 0
        self.labels = latents.labels if latents.labels is not None else np.zeros(len(latents.moments), np.int64)
        self.moments = latents.moments
        self.flips = latents.moments.shape[1]
        self.resident = None
        if latents.moments.nbytes <= RESIDENT_SHARE * free_memory(str(device)):
            self.resident = _place(latents.moments, device).flatten(0, 1)

    def __getitem__(self, step: int) -> Batch:
        config = self.config
        rng = np.random.default_rng((config.seed, 1, step, *other_order(self.order)))
        images = pick_images(config.seed, step, config.batch_size, len(self.moments), self.order)
        flipped = rng.random(len(images)) < 0.5 * config.flip
        dropped = rng.random(len(images)) < config.label_dropout
        t = self._times(rng, len(images))
        generator = torch.Generator(self.device).manual_seed(int(rng.integers(2**63)))

        moments = self._moments(images[self.part], flipped[self.part])
        shape = (len(images), self.codec.latent_channels, *moments.shape[2:])
        eps, posterior = torch.randn((2, *shape), generator=generator, device=self.device)[:, self.part]
        x0 = self.codec.to_latents(moments, posterior)
        labels = np.where(dropped, self.num_classes, self.labels[images])[self.part]
        return Batch(x0, eps, place(labels, self.device), t[self.part])

    def _times(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Uniform, or logit-normal with mean 0 and deviation 1 (Stable Diffusion 3, arXiv 2403.03206, eq. 19)."""
        steps = self.diffusion.schedule.num_steps
        if self.config.time_sampling == "logit-normal":
            t = 1 / (1 + np.exp(-rng.standard_normal(num)))
            return t if steps is None else np.ceil(t * steps) / steps
        return rng.random(num) if steps is None else (1 + rng.integers(steps, size=num)) / steps

    def _moments(self, images: np.ndarray, flipped: np.ndarray) -> Tensor:
        rows = images * self.flips + flipped * (self.flips > 1)
        if self.resident is not None:
            moments = self.resident[place(rows, self.device)]
        else:
            picked = np.stack([self.moments[row // self.flips, row % self.flips] for row in rows])
            moments = place(picked, self.device)
        if self.flips == 1:  # a flip of the moments is the flip's moments
            mirror = place(flipped, self.device)[:, None, None, None]
            moments = torch.where(mirror, moments.flip(-1), moments)
        return moments


def pick_images(seed: int, step: int, batch_size: int, num: int, order: int = 0) -> np.ndarray:
    """Which of `num` images a step sees: every one once an epoch, in an order of its own."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = positions // num
    orders = {int(epoch): _order((seed, 0, int(epoch), *other_order(order)), num) for epoch in np.unique(epochs)}
    return np.array([orders[int(epoch)][position] for epoch, position in zip(epochs, positions % num, strict=True)])


def other_order(order: int) -> tuple[int, ...]:
    """What an order of the data adds to a seed: nothing to the first one's."""
    return (order,) if order else ()


@lru_cache(maxsize=2)
def _order(seed: tuple[int, ...], num: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(num)


def _place(moments: np.ndarray | Moments, device: torch.device) -> Tensor:
    """A copy on the device, made in parts so that the machine's own memory need not hold them all."""
    placed = torch.empty(moments.shape, dtype=torch.from_numpy(moments[:0].copy()).dtype, device=device)
    for start in range(0, len(moments), 4096):
        part = slice(start, start + 4096)
        placed[part] = torch.from_numpy(moments[part].copy()).to(device)
    return placed
