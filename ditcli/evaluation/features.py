"""From pictures to features: what an extractor is, and the one that runs any ONNX file.

The extractor of FID itself is `inception.InceptionFeatures`, another `dinov2.Dinov2Features`; this module imports no
torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import onnxruntime as ort
from PIL import Image

from ditcli.errors import DitcliError

if TYPE_CHECKING:
    import torch

Images: TypeAlias = "np.ndarray | torch.Tensor | Sequence[np.ndarray]"


# As the field calls it in the features of 2015-12-05, and in any others.
RESULT_NAMES = {
    "fid": ("FID", "FD"),
    "kid": ("KID", "KD"),
    "is": ("Inception Score", "Inception Score"),
    "precision": ("precision", "precision"),
    "recall": ("recall", "recall"),
}


class Extractor(Protocol):
    """A network that turns pictures into features. Scores are comparable only between equal extractors."""

    @property
    def name(self) -> str:
        """What the features are called in a result: `inception`, `dinov2-large` and a hash, or the file's name."""

    @property
    def is_fid(self) -> bool:
        """Whether the Frechet distance of these features is what the field calls FID."""

    @property
    def width(self) -> int:
        """Numbers per picture, D."""

    @property
    def weights_sha256(self) -> str:
        """Of the weights file."""

    @property
    def resize(self) -> str:
        """How pictures come to the network's size."""

    def __call__(self, images: Images) -> np.ndarray:
        """uint8 pictures -> float32 features (N, D).

        A numpy array is (N, H, W, 3), a torch tensor (N, 3, H, W); pictures of several sizes come as a list of
        (H, W, 3) arrays. A picture's features do not depend on the batch it comes in, beyond rounding.
        """


def result_name(extractor: Extractor, metric: str = "fid") -> str:
    """`FID`, `KID`, ... for the network and weights that they are defined with; any other names its features."""
    defined, other = RESULT_NAMES[metric]
    return defined if extractor.is_fid else f"{other} ({extractor.name})"


def extractor_id(extractor: Extractor) -> str:
    """All that decides what features are, on one line: equal lines, comparable features."""
    return f"{extractor.name} sha256={extractor.weights_sha256} resize={extractor.resize}"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_batches(images: Images) -> list[np.ndarray]:
    """Pictures in any of the three forms that an extractor takes -> uint8 batches (N, H, W, 3), in order."""
    if isinstance(images, np.ndarray):
        batches = [images]
    elif isinstance(images, Sequence):
        batches = [image[None] for image in images]
    else:
        batches = [images.permute(0, 2, 3, 1).cpu().numpy()]
    if not batches:
        raise ValueError("there are no pictures to compute features of.")
    for batch in batches:
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[3] != 3 or 0 in batch.shape:
            raise ValueError(
                f"pictures must be uint8 (N, H, W, 3), or torch (N, 3, H, W), not {batch.dtype} {batch.shape}."
            )
    return batches


def resize_batch(batch: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (N, H, W, 3) of any size -> of `size`, (width, height), with Pillow's bicubic filter: antialiased."""
    if size == (batch.shape[2], batch.shape[1]):
        return batch
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in batch])


class OnnxFeatures:
    """An ONNX file that maps float32 pictures (N, 3, H, W) in [0, 1] to features (N, D), run on the CPU.

    Where the graph fixes H and W, pictures are resized to it with Pillow's bicubic filter, which is antialiased;
    where it does not, they go in as they are. DitcliError where the file is no such graph.
    """

    is_fid = False

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen exception classes without a common base
            raise DitcliError(f"{path} cannot be opened as an ONNX model: {str(error).splitlines()[0]}") from None
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape, features = inputs[0].shape, outputs[0].shape
        fits = len(inputs) == 1 and inputs[0].type == "tensor(float)" and len(shape) == 4 and shape[1] in (3, "C")
        if not fits or len(features) != 2 or not isinstance(features[1], int):
            raise DitcliError(
                f"{path} must map float pictures [N, 3, H, W] to features [N, D] with a fixed D, "
                f"but maps {[i.shape for i in inputs]} to {features}: export it with that one input and output."
            )
        if isinstance(shape[0], int) and shape[0] != 1:
            raise DitcliError(f"{path} takes exactly {shape[0]} pictures at a time: export it with a free batch size.")
        self.one_by_one = shape[0] == 1
        self.size = (shape[3], shape[2]) if isinstance(shape[2], int) and isinstance(shape[3], int) else None
        self.resize = f"pillow-bicubic to {self.size[0]}x{self.size[1]}" if self.size else "none"
        self.input_name = inputs[0].name
        self.name = path.stem
        self.width: int = features[1]
        self.weights_sha256 = file_sha256(path)

    def __call__(self, images: Images) -> np.ndarray:
        batches = [resize_batch(batch, self.size) if self.size else batch for batch in as_batches(images)]
        if self.size:
            batches = [np.concatenate(batches)]
        if self.one_by_one:
            batches = [image[None] for batch in batches for image in batch]
        return np.concatenate([self._run(batch) for batch in batches])

    def _run(self, batch: np.ndarray) -> np.ndarray:
        pixels = np.ascontiguousarray(batch.transpose(0, 3, 1, 2), dtype=np.float32) / 255
        return self.session.run([], {self.input_name: pixels})[0]
