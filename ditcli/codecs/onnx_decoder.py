"""The decoder of an exported model, in ONNX Runtime. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ditcli.sessions import open_session

Decode = Callable[[np.ndarray], np.ndarray]


def open_decoder(path: Path, *, device: str = "auto") -> Decode:
    """From float32 latents (N, C, h, w) to uint8 images (N, H, W, 3), as the codec in torch decodes them.

    One picture at a time: then memory stays bounded, and a picture does not depend on the others in its batch.
    """
    session = open_session(path, device)

    def decode(latents: np.ndarray) -> np.ndarray:
        images = [session.run(None, {"latents": latents[i : i + 1]})[0] for i in range(len(latents))]
        return decode_pixels(np.concatenate(images))

    return decode


def decode_pixels(images: np.ndarray) -> np.ndarray:
    """Float images (N, 3, H, W) in [-1, 1] -> the nearest uint8 (N, H, W, 3)."""
    levels = np.clip(np.rint((images + 1) * 127.5), 0, 255)
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))
