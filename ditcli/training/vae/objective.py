"""The loss of an autoencoder (Rombach et al., arXiv 2112.10752, equation 25), divided by the numbers in a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ditcli.codecs.autoencoder_kl import AutoencoderKL
from ditcli.codecs.vq_model import VQModel
from ditcli.config import TrainVaeConfig
from ditcli.training.vae.discriminator import Discriminator, generator_loss, hinge_loss

Perceptual = Callable[[Tensor, Tensor], Tensor]
Network = AutoencoderKL | VQModel


@dataclass(frozen=True)
class Losses:
    """Of one batch, each a scalar. `total` is the weighted sum of the next three."""

    total: Tensor
    distance: Tensor  # L1 or L2 in [-1, 1]
    lpips: Tensor
    prior: Tensor  # of the latents: divergence from a Gaussian, or distance from the codebook
    gan_weight: Tensor
    discriminator: Tensor

    def stack(self) -> Tensor:
        return torch.stack(astuple(self))


def backward(
    network: Network,
    images: Tensor,
    eps: Tensor,
    config: TrainVaeConfig,
    *,
    perceptual: Perceptual | None,
    discriminator: Discriminator | None,
    share: float,
    dtype: torch.dtype,
) -> Losses:
    """Add `share` times the gradients of both networks for images (N, 3, H, W) in [-1, 1]; `eps` draws the latents.

    Without a `discriminator` its part is left out. Every loss goes backward to the reconstruction by itself and from
    there they pass through the autoencoder together.
    """
    autocast = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    zero = torch.zeros((), device=images.device)
    with autocast:
        moments = network.encode(images)  # (N, M, h, w)
        z, prior = draw_latents(network, moments, eps, config, values=images[0].numel())
        reconstruction = network.decode(z).float()  # (N, 3, H, W)

    leaf = reconstruction.detach().requires_grad_()
    error = leaf - images
    distance = (error.abs() if config.loss == "l1" else error.square()).mean()
    with autocast:
        lpips = perceptual(leaf, images).mean() if perceptual else zero
    (gradient,) = torch.autograd.grad(distance + config.lpips_weight * lpips, leaf)

    gan_weight = judgement = zero
    if discriminator:
        with autocast:
            fake = generator_loss(discriminator(leaf))
        (gan_gradient,) = torch.autograd.grad(fake, leaf)
        gan_weight = config.gan_weight * adaptive_weight(network, reconstruction, gradient, gan_gradient)
        gradient = gradient + gan_weight * gan_gradient
        with autocast:
            judgement = hinge_loss(discriminator(images), discriminator(leaf.detach()))
        (judgement * share).backward()

    weight = config.kl_weight if config.kind == "kl" else 1.0
    torch.autograd.backward([reconstruction, prior * weight * share], [gradient * share, None])
    total = distance + config.lpips_weight * lpips + weight * prior
    return Losses(*(value.detach() for value in (total, distance, lpips, prior, gan_weight, judgement)))


def draw_latents(
    network: Network, moments: Tensor, eps: Tensor, config: TrainVaeConfig, *, values: int
) -> tuple[Tensor, Tensor]:
    """Latents for the decoder, and what keeps them in place: nats per value of a picture, or the codebook's loss."""
    if isinstance(network, VQModel):
        return moments, network.codebook_loss(moments, config.commitment_weight)
    mean, logvar = moments.float().chunk(2, dim=1)  # 2 x (N, C, h, w)
    logvar = logvar.clamp(-30, 20)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))  # (N,)
    return mean + torch.exp(0.5 * logvar) * eps, divergence.mean() / values


def adaptive_weight(network: Network, reconstruction: Tensor, gradient: Tensor, gan_gradient: Tensor) -> Tensor:
    """How much larger the reconstruction's gradient is than the discriminator's, at the decoder's last layer.

    VQGAN (Esser et al., arXiv 2012.09841), equation 7; both gradients are given at the reconstruction.
    """
    last = network.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(reconstruction, last, part, retain_graph=True)[0].norm()
        for part in (gradient, gan_gradient)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
