"""Where a picture starts: the noise of its seed or between two seeds, and a given picture, whole or in part."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditcli.errors import SettingError
from ditcli.images import fit_square, read_image

Normals = Callable[[tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Start:
    """The randomness of a picture: that of `seed`, or `share` of the way from there to that of `to_seed`."""

    seed: int
    to_seed: int | None = None
    share: float = 0.0

    def normals(self) -> Normals:
        """A function that draws fresh standard normals, float32 of a shape, in an order that the seeds fix."""
        first = np.random.default_rng(self.seed)
        if self.to_seed is None:
            return lambda shape: first.standard_normal(shape, dtype=np.float32)
        second = np.random.default_rng(self.to_seed)
        return lambda shape: slerp(
            first.standard_normal(shape, dtype=np.float32), second.standard_normal(shape, dtype=np.float32), self.share
        )


def slerp(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """The point `share` of the way along the great circle from one array to another: noise keeps its length."""
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return ((1 - share) * first + share * second).astype(first.dtype)
    weights = math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)
    return (weights[0] * first + weights[1] * second).astype(first.dtype)


@dataclass(frozen=True)
class Photo:
    """A picture to start from: uint8 pixels (S, S, 3) and where to repaint it, bool (S, S), if only in part."""

    pixels: np.ndarray
    paint: np.ndarray | None

    def latent_mask(self, height: int, width: int) -> np.ndarray | None:
        """float32 (1, height, width), 1 where any pixel of a latent is to be repainted."""
        if self.paint is None:
            return None
        side = len(self.paint)
        blocks = self.paint.reshape(height, side // height, width, side // width)
        return np.any(blocks, axis=(1, 3)).astype(np.float32)[None]

    def paste(self, image: np.ndarray) -> np.ndarray:
        """The image where it was to be repainted, elsewhere the photo's own pixels."""
        return image if self.paint is None else np.where(self.paint[..., None], image, self.pixels)

    def digest(self) -> str:
        digest = hashlib.sha256(self.pixels.tobytes())
        digest.update(b"" if self.paint is None else self.paint.tobytes())
        return digest.hexdigest()[:16]


def read_photo(path: str, mask: str | None, size: int) -> Photo:
    """The centre square of a picture and of its mask (white is repainted), `size` pixels a side.

    Raises UnreadableImageError for what is no picture, SettingError for a mask that is not as large as the picture.
    """
    picture = read_image(Path(path))
    pixels = fit_square(picture, size)
    if mask is None:
        return Photo(pixels, None)
    drawn = read_image(Path(mask))
    if drawn.size != picture.size:
        raise SettingError(
            f"mask is {mask!r} of {drawn.size[0]}x{drawn.size[1]} pixels, but must be as large as the picture, "
            f"{picture.size[0]}x{picture.size[1]}."
        )
    return Photo(pixels, fit_square(drawn, size)[..., 1] >= 128)
