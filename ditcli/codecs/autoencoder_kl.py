"""AutoencoderKL: the VAE of Stable Diffusion and its family, with diffusers' parameter names.

The convolutional encoder and decoder of latent diffusion (Rombach et al., arXiv 2112.10752, appendix G.1): residual
blocks with group norm, one single-head attention in the middle, and a Gaussian as the encoder's result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcli.codecs.codec import Autoencoder, AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(AutoencoderConfig):
    """Widths per stage from the picture inwards; each stage but the last halves the sides."""

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    sample_size: int = 32  # The picture size in training: a note, which nothing depends on.
    scaling_factor: float = 0.18215
    force_upcast: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from config.json: the settings of which one value is understood must have it."""
        values = dict(values)
        types = {key: values.pop(key, None) for key in ("down_block_types", "up_block_types")}
        for key in ("latents_mean", "latents_std"):
            value = values.pop(key, None)
            if value is not None:
                raise ValueError(f"{key} is {value}, but must be null: only scaling_factor and shift_factor are known.")
        config = super().from_dict(values)
        for key, value in types.items():
            allowed = config.to_dict()[key]
            if value not in (None, allowed):
                raise ValueError(f"{key} is {value}, but must be {allowed[0]} once for each of block_out_channels.")
        return config

    def to_dict(self) -> dict[str, Any]:
        """As in config.json."""
        stages = len(self.block_out_channels)
        return super().to_dict() | {
            "down_block_types": ["DownEncoderBlock2D"] * stages,
            "up_block_types": ["UpDecoderBlock2D"] * stages,
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_at_least(1, "layers_per_block", "norm_num_groups")
        self._check_counts("block_out_channels")
        divides = all(width % self.norm_num_groups == 0 for width in self.block_out_channels)
        self._check("block_out_channels", divides, f"multiples of norm_num_groups {self.norm_num_groups}")
        self._check("act_fn", self.act_fn == "silu", "'silu'")

    @property
    def downsampling(self) -> int:
        """Each stage but the last halves the sides."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def moments_channels(self) -> int:
        """Mean and log-variance."""
        return 2 * self.latent_channels


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (N, D, h, w)
        h = self.conv2(F.silu(self.norm2(h)))  # (N, D, h, w)
        return self.conv_shortcut(x) + h  # (N, D, h, w)


class Attention(nn.Module):
    """Single-head self-attention over all places of the picture, beside a skip connection."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        N, D, height, width = x.shape
        h = self.group_norm(x).permute(0, 2, 3, 1).reshape(N, 1, height * width, D)  # (N, 1, T, D)
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))  # (N, 1, T, D)
        h = self.to_out[0](h).reshape(N, height, width, D).permute(0, 3, 1, 2)  # (N, D, h, w)
        return x + h


class Downsample(nn.Module):
    """Halves the sides; one row and column of zeros at the bottom and right only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (N, D, h/2, w/2)


class Upsample(nn.Module):
    """Doubles the sides: each pixel becomes 2 x 2, then a 3 x 3 convolution.

    Of the three rows (columns) under the kernel two are copies of one, so that each of the four places of a doubled
    pixel is a 2 x 2 convolution of the small picture with sums of the weights: 4/9 of the products.
    """

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (1, 1, 1, 1))
        rows = []
        for i, of_rows in enumerate(_halves(self.conv.weight, dim=2)):
            places = [
                F.conv2d(x[:, :, i : i + height + 1, j : j + width + 1], weight, self.conv.bias).permute(0, 2, 3, 1)
                for j, weight in enumerate(_halves(of_rows, dim=3))
            ]  # (N, h, w, D) each
            rows.append(torch.stack(places, dim=3))  # (N, h, w, 2, D)
        return torch.stack(rows, dim=2).flatten(1, 2).flatten(2, 3).permute(0, 3, 1, 2)  # (N, D, 2h, 2w)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two kernels of length 2 that a kernel of length 3 is to the first and to the second of a pixel's copies."""
    before, middle, after = weight.split(1, dim)
    return torch.cat([before, middle + after], dim), torch.cat([before + middle, after], dim)


class DownBlock(nn.Module):
    """One stage of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, downsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.Sequential(*(ResnetBlock(widths[i], widths[i + 1], groups) for i in range(layers)))
        self.downsamplers = nn.Sequential(Downsample(out_channels)) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsamplers(self.resnets(x))


class UpBlock(nn.Module):
    """One stage of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, groups: int, *, upsample: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.Sequential(*(ResnetBlock(widths[i], widths[i + 1], groups) for i in range(layers)))
        self.upsamplers = nn.Sequential(Upsample(out_channels)) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsamplers(self.resnets(x))


class MidBlock(nn.Module):
    """Two residual blocks with the attention between them."""

    def __init__(self, width: int, groups: int, *, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups) for _ in range(2)])
        self.attentions = nn.Sequential(Attention(width, groups)) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions(self.resnets[0](x)))  # (N, D, h, w)


class Encoder(nn.Module):
    """Images in [-1, 1] -> moments, before the quant convolution."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.Sequential(
            *(
                DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, downsample=i < last)
                for i, width in enumerate(widths)
            )
        )
        self.mid_block = MidBlock(widths[-1], groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.moments_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)  # (N, D0, H, W)
        h = self.mid_block(self.down_blocks(h))  # (N, D, h, w)
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (N, 2C, h, w)


class Decoder(nn.Module):
    """Latents, after the post-quant convolution -> images in about [-1, 1]."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        layers, last = config.layers_per_block + 1, len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention=config.mid_block_add_attention)
        self.up_blocks = nn.Sequential(
            *(
                UpBlock(widths[max(i - 1, 0)], width, layers, groups, upsample=i < last)
                for i, width in enumerate(widths)
            )
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))  # (N, D, h, w)
        h = self.up_blocks(h)  # (N, D0, H, W)
        return self.conv_out(F.silu(self.conv_norm_out(h)))  # (N, 3, H, W)


class AutoencoderKL(Autoencoder):
    """Encoder and decoder, and the 1x1 convolutions between them where the configuration has them."""

    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        moments, latents = config.moments_channels, config.latent_channels
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else nn.Identity()

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> moments (N, 2C, h, w): the mean, then the log-variance, not clamped."""
        return self.quant_conv(self.encoder(images))

    def decode(self, z: Tensor) -> Tensor:
        """Unscaled latents (N, C, h, w) -> images (N, 3, H, W) in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))
