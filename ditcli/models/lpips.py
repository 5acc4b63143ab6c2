"""LPIPS, version 0.1: the perceptual distance of two pictures (Zhang et al., arXiv 1801.03924).

Both pictures pass through a network trained on ImageNet; at several depths features are scaled to unit length and their
squared differences weighed by learnt, non-negative numbers. Weights come from a file, under torchvision's names for the
network (`features.N...`) and the lpips package's for the learnt numbers (`linN.model.1.weight`).
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ditcli.errors import CheckpointError, ModelNotFoundError, SettingError

# The layers of torchvision's `features` after which features are compared, and their widths.
SQUEEZE_TAPS = {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512}
VGG_TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}
SMALLEST = {"squeeze": 17, "vgg": 16}  # side of a picture of which the last pooling leaves something

# Where a folder holds the network and the learnt numbers in files of their own: how these files' names begin.
PARTS = (("squeezenet1_1", "squeeze."), ("vgg16", "vgg."))


class Fire(nn.Module):
    """A 1x1 convolution, then a 1x1 and a 3x3 one side by side (SqueezeNet, arXiv 1602.07360)."""

    def __init__(self, in_channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))  # (N, S, h, w)
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))  # (N, 2E, h, w)


def squeezenet() -> nn.Sequential:
    """The features of SqueezeNet 1.1."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64)),
        *(pool(), Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192)),
        *(Fire(384, 64, 256), Fire(512, 64, 256)),
    )


def vgg16() -> nn.Sequential:
    """The features of VGG-16, without the last pooling."""
    layers: list[nn.Module] = []
    width = 3
    for stage, (num_convolutions, stage_width) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)]):
        layers += [nn.MaxPool2d(2)] if stage else []
        for _ in range(num_convolutions):
            layers += [nn.Conv2d(width, stage_width, 3, padding=1), nn.ReLU()]
            width = stage_width
    return nn.Sequential(*layers)


class LPIPS(nn.Module):
    """The distance of pictures in [-1, 1]; its weights are fixed. `name` is `squeeze` or `vgg`."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.features = squeezenet() if name == "squeeze" else vgg16()
        self.taps = SQUEEZE_TAPS if name == "squeeze" else VGG_TAPS
        self.heads = nn.ParameterList([nn.Parameter(torch.empty(width)) for width in self.taps.values()])
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        self.requires_grad_(False)

    def check_size(self, image_size: int) -> None:
        """SettingError for pictures too small for the network."""
        if image_size < SMALLEST[self.name]:
            raise SettingError(
                f"image-size is {image_size}, but LPIPS needs {SMALLEST[self.name]} at least: give a larger one, or go "
                "on without LPIPS: --lpips none."
            )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two times (N, 3, H, W) in [-1, 1], sides of `SMALLEST` at least -> (N,) distances, 0 for equal pictures."""
        distance = torch.zeros(len(a), device=a.device)
        x, y = ((images - self.mean) / self.std for images in (a, b))
        heads = iter(self.heads)
        for number, layer in enumerate(self.features):
            x, y = layer(x), layer(y)  # (N, D, h, w)
            if number in self.taps:
                squares = (_unit(x) - _unit(y)).square()
                # Equation 1, with the learnt weights as they are stored: already squared.
                distance = distance + (squares * next(heads)[:, None, None]).sum(dim=1).mean(dim=(1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Features of each place at length 1; where all are 0 the gradient is 0 too."""
    features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def load_lpips(path: Path) -> LPIPS:
    """Read a file that holds both parts, or a folder with such a file or with one for each part.

    The parts are torchvision's `squeezenet1_1-*.pth` or `vgg16-*.pth` and the lpips package's `squeeze.pth` or
    `vgg.pth`. Raises ModelNotFoundError where they are not there, CheckpointError where a file is damaged or another.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors |= _read(file)
    name = "squeeze" if "features.3.squeeze.weight" in tensors else "vgg"
    with torch.device("meta"):
        network = LPIPS(name)
    expected = dict(network.features.state_dict(prefix="features."))
    expected |= {f"lin{i}.model.1.weight": head[None, :, None, None] for i, head in enumerate(network.heads)}
    faults = [key for key, value in expected.items() if key not in tensors or tensors[key].shape != value.shape]
    if faults:
        raise CheckpointError(
            f"{path} does not hold LPIPS v0.1 of SqueezeNet 1.1 or VGG-16: {faults[0]} and {len(faults) - 1} more "
            "weights are missing or of another shape."
        )
    network = LPIPS(name)
    network.features.load_state_dict({key: tensors[f"features.{key}"] for key in network.features.state_dict()})
    for i, head in enumerate(network.heads):
        head.copy_(tensors[f"lin{i}.model.1.weight"].flatten())
    return network.eval()


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pth")) if path.is_dir() else []
    for parts in PARTS:
        found = [next((file for file in files if file.name.startswith(part)), None) for part in parts]
        if None not in found:
            return [file for file in found if file]
    whole = [file for file in files if file.suffix == ".safetensors"]
    if len(whole) != 1:
        raise ModelNotFoundError(
            f"there are no weights of LPIPS in {path}: put one safetensors file with the network and its heads there, "
            "or torchvision's squeezenet1_1-b8a52dc0.pth beside squeeze.pth of the lpips package, "
            "or go on without LPIPS: --lpips none."
        )
    return whole


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, EOFError, RuntimeError, ValueError) as error:
        reason = str(error).partition(".")[0]
        raise CheckpointError(f"{file} is damaged ({reason}): download or copy it again.") from error
