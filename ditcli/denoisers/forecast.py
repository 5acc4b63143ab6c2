"""Feature caching: blocks of a DiT that run in some of the steps, and are foreseen in the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditcli.denoisers.torch_denoiser import TorchDenoiser
from ditcli.diffusion.denoiser import Denoiser, Wrapper
from ditcli.diffusion.process import Array
from ditcli.models.dit import DiT

ORDER = 2  # of the polynomial through the latest features


class Forecast(nn.Module):
    """In place of a DiT's blocks: what they add to the tokens, computed in one call of `every` and foreseen in between.

    TaylorSeer (arXiv 2503.06923) foresees each branch of each block by a Taylor series of differences; this foresees
    the sum of them all, by the polynomial in time through the latest calls, so that a foreseen call costs no block.
    """

    def __init__(self, blocks: nn.ModuleList, every: int):
        super().__init__()
        self.blocks, self.every = blocks, every
        self.time = 0.0
        self._seen: list[tuple[float, Tensor]] = []  # time and what the blocks added, the latest first
        self._foreseen = 0

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        if self._seen and (self.time >= self._seen[0][0] or x.shape != self._seen[0][1].shape):
            self._seen = []  # another batch, or guidance begins or ends
        if len(self._seen) > ORDER and self._foreseen < self.every - 1:
            self._foreseen += 1
            return x + self._extrapolate()
        start = x
        for block in self.blocks:
            x = block(x, *conditions)
        self._seen = [(self.time, x - start), *self._seen][: ORDER + 1]
        self._foreseen = 0
        return x

    def _extrapolate(self) -> Tensor:
        """Lagrange's polynomial through what was seen."""
        total = torch.zeros_like(self._seen[0][1])
        for i, (t, added) in enumerate(self._seen):
            weight = 1.0
            for j, (other, _) in enumerate(self._seen):
                weight *= 1.0 if i == j else (self.time - other) / (t - other)
            total = total + weight * added
        return total


@dataclass(frozen=True)
class CachedDenoiser(Wrapper):
    """A torch denoiser whose blocks run in one call of some; times of a trajectory must fall."""

    forecast: Forecast

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        self.forecast.time = t
        return self.denoiser(x_t, t, labels)


def cache_blocks(denoiser: Denoiser, every: int) -> CachedDenoiser:
    """The torch denoiser with its network's blocks replaced, for good, by their forecast."""
    assert isinstance(denoiser, TorchDenoiser)
    assert isinstance(denoiser.module, DiT)
    forecast = Forecast(denoiser.module.blocks, every)
    denoiser.module.blocks = nn.ModuleList([forecast])
    return CachedDenoiser(denoiser, forecast)
