"""How much of a picture survives a codec."""

from __future__ import annotations

import torch
from torch import Tensor

from ditcli.codecs.codec import Codec, normalise
from ditcli.models.lpips import LPIPS


def reconstruct(codec: Codec, images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) -> what is left of them after encoding and decoding, without noise."""
    return codec.decode(codec.to_latents(codec.encode(images)))


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB of each pair of uint8 pictures (N, 3, H, W); infinite for equal ones."""
    error = (images.float() - others.float()).square().mean(dim=(1, 2, 3))  # (N,)
    return 10 * torch.log10(255**2 / error)


@torch.no_grad()
def perceptual_distance(lpips: LPIPS, images: Tensor, others: Tensor) -> Tensor:
    """LPIPS of each pair of uint8 pictures (N, 3, H, W)."""
    device = lpips.mean.device
    pairs = zip(images.split(16), others.split(16), strict=True)
    return torch.cat([lpips(normalise(a.to(device)), normalise(b.to(device))).cpu() for a, b in pairs])


@torch.no_grad()
def measure_latents(codec: Codec, moments: Tensor, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the latents drawn from moments (N, M, h, w), over all channels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(moments), codec.latent_channels, *moments.shape[2:])
    latents = codec.to_latents(moments.cpu(), torch.randn(shape, generator=generator)).double()
    return latents.mean().item(), latents.std().item()
