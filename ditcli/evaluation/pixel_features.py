"""Features without a network, for where no weights are at hand: the picture itself, made small."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ditcli.evaluation.features import Images, as_batches

SIDE = 16


class PixelFeatures:
    """A picture of 16x16: 768 numbers such that the distance of two is the root mean square of their difference."""

    is_fid = False
    name = "pixels"
    width = SIDE * SIDE * 3
    weights_sha256 = "none"
    resize = f"pillow-box to {SIDE}x{SIDE}"

    def __call__(self, images: Images) -> np.ndarray:
        small = [
            np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))
            for batch in as_batches(images)
            for image in batch
        ]
        return (np.stack(small).reshape(len(small), -1) / (255 * self.width**0.5)).astype(np.float32)
