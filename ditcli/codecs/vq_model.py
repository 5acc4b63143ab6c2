"""VQModel: an autoencoder whose latents are vectors of a codebook, with diffusers' parameter names.

VQ-VAE (van den Oord et al., arXiv 1711.00937) with the networks of latent diffusion. As there (arXiv 2112.10752,
section 3.1) the quantiser belongs to the decoder: a diffusion model sees latents before it, which are continuous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditcli.codecs.autoencoder_kl import AutoencoderKLConfig, Decoder, Encoder
from ditcli.codecs.codec import Autoencoder


@dataclass(frozen=True, kw_only=True)
class VQModelConfig(AutoencoderKLConfig):
    """The networks of AutoencoderKL and a codebook of `num_vq_embeddings` vectors."""

    latent_channels: int = 3
    num_vq_embeddings: int = 256
    vq_embed_dim: int | None = None
    norm_type: str = "group"
    lookup_from_codebook: bool = False  # How diffusers' decode takes indices: a note, which nothing here depends on.
    force_upcast: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As in config.json; diffusers knows no shift_factor, so it is left out where there is none."""
        unknown = {"use_quant_conv", "use_post_quant_conv"} | ({"shift_factor"} if self.shift_factor is None else set())
        return {key: value for key, value in super().to_dict().items() if key not in unknown}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(1, "num_vq_embeddings")
        same = self.vq_embed_dim in (None, self.latent_channels)
        self._check("vq_embed_dim", same, f"latent_channels {self.latent_channels}")
        self._check("norm_type", self.norm_type == "group", "'group'")

    @property
    def moments_channels(self) -> int:
        """There is no variance: moments are the latents before quantisation."""
        return self.latent_channels


class Codebook(nn.Module):
    """`num` vectors of `width` numbers."""

    def __init__(self, num: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(num, width)
        nn.init.uniform_(self.embedding.weight, -1 / num, 1 / num)

    def indices(self, z: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> number of each place's nearest vector (N, h, w)."""
        flat = z.movedim(1, -1).flatten(0, -2).float()  # (N h w, C)
        vectors = self.embedding.weight.float()  # (K, C)
        # |z - e|^2 without |z|^2, which is the same for every vector.
        distances = vectors.square().sum(dim=1) - 2 * flat @ vectors.T  # (N h w, K)
        return distances.argmin(dim=1).unflatten(0, (z.shape[0], *z.shape[2:]))

    def forward(self, z: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> each place's nearest vector (N, C, h, w)."""
        return self.embedding(self.indices(z)).movedim(-1, 1)


class VQModel(Autoencoder):
    """Encoder, codebook and decoder."""

    config: VQModelConfig

    def __init__(self, config: VQModelConfig):
        super().__init__()
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(channels, channels, 1)
        self.quantize = Codebook(config.num_vq_embeddings, channels)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> latents (N, C, h, w), not quantised."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, C, h, w), quantised here -> images (N, 3, H, W) in about [-1, 1].

        The gradient passes straight through the quantiser (VQ-VAE, section 3.2), as if it were not there.
        """
        quantised = self.quantize(z).to(z.dtype)
        through = z + (quantised - z).detach() if torch.is_grad_enabled() else quantised
        return self.decoder(self.post_quant_conv(through))

    def codebook_loss(self, z: Tensor, commitment: float) -> Tensor:
        """Draws vectors to the latents and, `commitment` times, latents to the vectors (VQ-VAE, equation 3)."""
        z = z.float()
        quantised = self.quantize(z)
        return (quantised - z.detach()).square().mean() + commitment * (quantised.detach() - z).square().mean()
