"""AutoencoderTiny: TAESD and its relatives (madebyollin/taesd), with diffusers' parameter names.

A small distilled autoencoder of another's latent space: 3x3 convolutions and ReLU, no norm, no attention, no variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcli.codecs.codec import Autoencoder, AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig(AutoencoderConfig):
    """Channels and blocks per stage; every stage of a side is equally wide."""

    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    upsampling_scaling_factor: int = 2
    latent_magnitude: float = 3.0  # These two map latents to [0, 1], to be kept as a picture: no part of encode
    latent_shift: float = 0.5  # or decode, carried along for those who do.
    shift_factor: float | None = 0.0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from config.json, where diffusers repeats the decoder's channels as `block_out_channels`."""
        values = dict(values)
        decoder = values.get("decoder_block_out_channels", list(cls.decoder_block_out_channels))
        repeated = values.pop("block_out_channels", decoder)
        if repeated != decoder:
            raise ValueError(f"block_out_channels is {repeated}, but must equal decoder_block_out_channels {decoder}.")
        return super().from_dict(values)

    def __post_init__(self) -> None:
        super().__post_init__()
        for side in ("encoder", "decoder"):
            widths, blocks = f"{side}_block_out_channels", f"num_{side}_blocks"
            self._check_counts(widths, blocks)
            self._check(widths, len(set(getattr(self, widths))) == 1, "the same number for every stage")
            self._check(widths, len(getattr(self, widths)) == len(getattr(self, blocks)), f"as long as {blocks}")
        same = len(self.num_encoder_blocks) == len(self.num_decoder_blocks)
        self._check("num_decoder_blocks", same, "as long as num_encoder_blocks")
        self._check("act_fn", self.act_fn == "relu", "'relu'")
        self._check("upsample_fn", self.upsample_fn == "nearest", "'nearest'")
        self._check("upsampling_scaling_factor", self.upsampling_scaling_factor == 2, "2")

    @property
    def downsampling(self) -> int:
        """Each stage after the first halves the sides."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    @property
    def moments_channels(self) -> int:
        """There is no variance: moments are the latents."""
        return self.latent_channels


class Block(nn.Module):
    """Three convolutions beside a skip connection."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)  # (N, D, h, w)


class Encoder(nn.Module):
    """Images in [0, 1] -> latents."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        width = config.encoder_block_out_channels[0]
        layers: list[nn.Module] = []
        for stage, num_blocks in enumerate(config.num_encoder_blocks):
            if stage == 0:
                layers.append(nn.Conv2d(config.in_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers.extend(Block(width) for _ in range(num_blocks))
        layers.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)  # (N, C, h, w)


class Decoder(nn.Module):
    """Latents -> images in about [0, 1]."""

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        width = config.decoder_block_out_channels[0]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for num_blocks in config.num_decoder_blocks[:-1]:
            layers.extend(Block(width) for _ in range(num_blocks))
            layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        layers.extend(Block(width) for _ in range(config.num_decoder_blocks[-1]))
        layers.append(nn.Conv2d(width, config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        z = torch.tanh(z / 3) * 3  # (N, C, h, w)
        return self.layers(z)  # (N, 3, H, W)


class AutoencoderTiny(Autoencoder):
    """Encoder and decoder; the networks see images in [0, 1], their callers in [-1, 1]."""

    config: AutoencoderTinyConfig

    def __init__(self, config: AutoencoderTinyConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> latents (N, C, h, w)."""
        return self.encoder((images + 1) / 2)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]."""
        return self.decoder(z) * 2 - 1
