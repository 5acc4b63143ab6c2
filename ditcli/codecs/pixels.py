"""Pixels as a codec: the model sees the pictures themselves, in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ditcli.codecs.codec import normalise, quantise


class PixelCodec:
    """Moments are the uint8 pixels, latents the same in [-1, 1]; encoding and decoding lose nothing."""

    name = "pixels"
    downsampling = 1
    latent_channels = 3
    moments_channels = 3
    moments_dtype = np.dtype(np.uint8)
    flip_equivariant = True

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(3, height, width)."""
        if height < 1 or width < 1:
            raise ValueError(f"a picture of {width}x{height} has no pixels.")
        return 3, height, width

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, H, W), unchanged."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, but must be uint8 (N, 3, H, W).")
        return images

    def to_latents(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """uint8 pixels (N, 3, H, W) -> float32 in [-1, 1]; pixels have no variance, so `eps` is ignored."""
        return normalise(moments)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) -> the nearest uint8 images."""
        return quantise(latents)

    def fingerprint(self) -> str:
        """The same for all pixels."""
        return "pixels"
