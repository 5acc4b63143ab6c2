"""What a codec is, and the codec that any autoencoder network becomes.

A codec turns pictures into what the diffusion model sees and back: ``encode`` gives moments, which are stored,
``to_latents`` draws the model's input from them, ``decode`` gives pictures. Autoencoders follow latent diffusion
(Rombach et al., arXiv 2112.10752): moments are the mean and log-variance of a Gaussian, or the latents themselves
where the network has no variance.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from ditcli.codecs.tiling import run_tiled
from ditcli.config import TILE, Config
from ditcli.errors import SettingError


class Codec(Protocol):
    """Pictures <-> the model's input. Device and precision are chosen where a codec is made and stay.

    Args and results may lie on any device; results come back on the device of the argument.
    """

    name: str
    """What the user calls it."""
    downsampling: int
    """Pixels per latent, along a side."""
    latent_channels: int
    moments_channels: int
    moments_dtype: np.dtype
    """Type in which moments are stored."""
    flip_equivariant: bool
    """The encoding of a flipped picture is the flipped encoding."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; ValueError where `downsampling` does not divide a side."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, H, W) -> moments (N, M, h, w): float32, or uint8 for pixels."""

    def to_latents(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """Moments (N, M, h, w), any dtype -> float32 latents (N, C, h, w) of about unit variance.

        `eps` (N, C, h, w) draws from the posterior; None gives its mean.
        """

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> uint8 images (N, 3, H, W)."""

    def fingerprint(self) -> str:
        """Hex digest of all that decides what `encode` and `to_latents` give: equal digests, equal latents."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Config, ABC):
    """What the config.json of every autoencoder holds, under diffusers' names and with diffusers' defaults.

    Latents are ``(z - shift_factor) * scaling_factor``.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    force_upcast: bool = False  # Warns of overflow in float16, in which nothing here computes.

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from config.json; its private keys (`_class_name`, `_diffusers_version`, ...) are left out."""
        return super().from_dict({key: value for key, value in values.items() if not key.startswith("_")})

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name} is {getattr(self, name)!r}, but must be {allowed}.")

    def __post_init__(self) -> None:
        self._check_types()
        self._check("in_channels", self.in_channels == 3, "3 (RGB)")
        self._check("out_channels", self.out_channels == 3, "3 (RGB)")
        self._check_at_least(1, "latent_channels")
        self._check("scaling_factor", self.scaling_factor > 0, "positive")

    def _check_counts(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            ok = isinstance(value, tuple) and len(value) > 0 and all(type(n) is int and n > 0 for n in value)
            self._check(name, ok, "a list of positive whole numbers")

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Pixels per latent, along a side."""

    @property
    @abstractmethod
    def moments_channels(self) -> int:
        """`2 * latent_channels` for mean and log-variance, `latent_channels` for a network without variance."""


class Autoencoder(nn.Module, ABC):
    """A network that encodes images in [-1, 1] to moments and decodes unscaled latents to images in about [-1, 1]."""

    config: AutoencoderConfig

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> moments (N, M, h, w)."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W)."""


def normalise(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def quantise(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> the nearest uint8 in 0..255."""
    return ((images.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def fingerprint(network: Autoencoder) -> str:
    """SHA-256 over configuration and weights; the weights as float32, so that the type of the file does not matter."""
    digest = hashlib.sha256(json.dumps([type(network).__name__, network.config.to_dict()], sort_keys=True).encode())
    for key, weight in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def _parts(num: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, start + size) for start in range(0, num, size)]


class AutoencoderCodec:
    """The codec of an autoencoder network, which moves to `device` and computes in `dtype`, float32 or bfloat16.

    The network is taken over, not copied: in bfloat16 its own weights are rounded. Large batches pass through it a
    few pictures at a time, so that memory stays bounded. Nothing is recorded for gradients; results may still be
    inputs of a training step.

    A picture with a side of more than `tile` pixels passes in overlapping tiles (0: never), so that memory does not
    grow with it. Away from the seams, by more than the network looks around, a network without group norm and attention
    (the tiny one) then gives what it gives for the whole picture; others see the statistics of a tile instead of the
    picture's, which shows as a slight change of tone.
    """

    moments_dtype = np.dtype(np.float16)
    flip_equivariant = False

    def __init__(
        self,
        network: Autoencoder,
        *,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        tile: int = TILE,
    ):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}, but codecs compute in torch.float32 or torch.bfloat16.")
        self.name = name
        self.config = network.config
        self.downsampling = network.config.downsampling
        self.latent_channels = network.config.latent_channels
        self.moments_channels = network.config.moments_channels
        self.device = torch.device(device)
        self.dtype = dtype
        self.tile = tile // self.downsampling * self.downsampling
        if tile and self.tile < 8 * self.downsampling:
            raise SettingError(
                f"tile is {tile}, but must be at least {8 * self.downsampling} for the VAE {name}, or 0."
            )
        # Pixels in one pass: 4 pictures of 256x256 on a CPU, 16 on a GPU. In float32 the Stable Diffusion VAE takes
        # 0.16 GB to encode one of them and 0.25 GB to decode it.
        self._pixels = 2**16 if self.device.type == "cpu" else 2**20
        self._fingerprint = fingerprint(network)  # Of the weights as they are, before they are rounded to dtype.
        self.network = network.to(self.device, dtype).eval()
        # On a CPU 1.2 times as fast in float32; bfloat16 doubles that where the hardware has it.
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture; ValueError where `downsampling` does not divide a side."""
        f = self.downsampling
        if height < f or width < f or height % f or width % f:
            near = [max(f, round(side / f) * f) for side in (height, width)]
            raise SettingError(
                f"a picture of {width}x{height} does not fit the VAE {self.name}, which shrinks each side by {f}: "
                f"use a multiple of {f}, such as {near[1]}x{near[0]}."
            )
        return self.latent_channels, height // f, width // f

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N, 3, H, W) -> float32 moments (N, M, h, w)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, but must be uint8 (N, 3, H, W).")
        _, height, width = self.latent_shape(*images.shape[2:])
        moments = images.new_empty((len(images), self.moments_channels, height, width), dtype=torch.float32)
        for part in _parts(len(images), self._pixels // (images.shape[2] * images.shape[3])):
            pixels = normalise(images[part].to(self.device))
            if self.tile and max(images.shape[2:]) > self.tile:
                shrunk = Fraction(1, self.downsampling)
                moments[part] = run_tiled(self._encode, pixels, self.tile, shrunk, self.downsampling)
            else:
                moments[part] = self._encode(pixels)
        return moments

    def to_latents(self, moments: Tensor, eps: Tensor | None = None) -> Tensor:
        """Moments (N, M, h, w) -> float32 latents (N, C, h, w); `eps` is ignored by a network without variance."""
        z = moments.float()  # (N, M, h, w)
        if self.moments_channels > self.latent_channels:
            z, logvar = z.chunk(2, dim=1)  # 2 x (N, C, h, w)
            if eps is not None:
                z = z + torch.exp(0.5 * logvar.clamp(-30, 20)) * eps  # bounds of latent diffusion
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, C, h, w) -> uint8 images (N, 3, H, W)."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents are {tuple(latents.shape)}, but must be (N, {self.latent_channels}, h, w).")
        height, width = (side * self.downsampling for side in latents.shape[2:])
        images = latents.new_empty((len(latents), 3, height, width), dtype=torch.uint8)
        # On a CPU one at a time: as fast, and then a picture does not depend on the others in its batch, to the bit.
        size = 1 if self.device.type == "cpu" else self._pixels // (height * width)
        for part in _parts(len(latents), size):
            z = latents[part].to(self.device, torch.float32) / self.config.scaling_factor
            z = z + (self.config.shift_factor or 0.0)
            if self.tile and max(height, width) > self.tile:
                tile = self.tile // self.downsampling
                images[part] = quantise(run_tiled(self._decode, z, tile, Fraction(self.downsampling)))
            else:
                images[part] = quantise(self._decode(z))
        return images

    def fingerprint(self) -> str:
        """Digest of configuration, weights as they were in the file, and precision."""
        return f"{self._fingerprint}-{self.dtype}"

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.network.encode(pixels.to(self.dtype, memory_format=torch.channels_last))

    def _decode(self, z: Tensor) -> Tensor:
        return self.network.decode(z.to(self.dtype, memory_format=torch.channels_last))


def numpy_decoder(codec: Codec) -> Callable[[np.ndarray], np.ndarray]:
    """The codec's `decode` from float32 latents (N, C, h, w) to uint8 images (N, H, W, 3)."""

    def decode(latents: np.ndarray) -> np.ndarray:
        return codec.decode(torch.from_numpy(latents)).permute(0, 2, 3, 1).contiguous().numpy()

    return decode
