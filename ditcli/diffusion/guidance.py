"""Classifier-free guidance (arXiv 2207.12598): a denoiser made of a denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from array_api_compat import array_namespace

from ditcli.diffusion.denoiser import Denoiser
from ditcli.diffusion.process import Array, Diffusion


def guide(denoiser: Denoiser, scale: float, *, channels: int | None = None) -> Denoiser:
    """The denoiser guided by `scale`; at scale 1 that is the denoiser itself, at one pass per step.

    `channels` guides only the first few channels: 3 is what the published DiT and SiT samples used.
    """
    return denoiser if scale == 1 else GuidedDenoiser(denoiser, scale, channels or denoiser.input_shape[0])


@dataclass(frozen=True)
class GuidedDenoiser:
    """null + scale (labelled - null) over the first `channels` of the output, in one doubled batch.

    The other channels, a learned variance among them, are the labelled ones.
    """

    denoiser: Denoiser
    scale: float
    channels: int

    @property
    def diffusion(self) -> Diffusion:
        return self.denoiser.diffusion

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.denoiser.input_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.denoiser.class_names

    def __call__(self, x_t: Array, t: float, labels: Array) -> Array:
        xp = array_namespace(x_t)
        null = xp.full_like(labels, len(self.class_names))
        output = self.denoiser(xp.concat([x_t, x_t]), t, xp.concat([labels, null]))  # (2N, C or 2C, H, W)
        labelled, unlabelled = output[: len(x_t)], output[len(x_t) :]
        with_label, without = labelled[:, : self.channels], unlabelled[:, : self.channels]
        return xp.concat([without + self.scale * (with_label - without), labelled[:, self.channels :]], axis=1)

    def from_numpy(self, array: np.ndarray) -> Array:
        return self.denoiser.from_numpy(array)

    def to_numpy(self, array: Array) -> np.ndarray:
        return self.denoiser.to_numpy(array)
