"""The Inception network that FID is defined on (TensorFlow's graph of 2015-12-05), made fast for a CPU.

The public weights are those that pytorch-fid and torch-fidelity download, one file under two names. Three rewritings
change no result beyond rounding: batch norms are folded into the convolutions; the 1x1 convolutions that read the same
input become one; and an average pool before a 1x1 convolution moves behind it, where channels are fewer (both are
linear). Memory is channels-last. On two CPU cores this is twice as fast as the plain network.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ditcli.config import FidResize as Resize
from ditcli.errors import CheckpointError
from ditcli.evaluation.features import Images, as_batches, file_sha256

PUBLIC_NAME = "pt_inception-2015-12-05-6726825d.pth"
PUBLIC_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
PUBLIC_URLS = (
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{PUBLIC_NAME}",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)

SIDE = 299  # of the network's input
BATCH_CPU = 4  # the widest layer of 4 pictures stays in a CPU's cache: 8 % faster than 16
BATCH_GPU = 64


class Conv(nn.Conv2d):
    """A convolution, its batch norm folded in, and ReLU. It keeps height and width unless strided or `valid`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        *,
        valid: bool = False,
    ) -> None:
        padding = "valid" if valid or stride > 1 else "same"
        super().__init__(in_channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class Entry(nn.Conv2d):
    """Several of the public network's 1x1 convolutions on one input, as one; `outputs` maps their names to channels."""

    def __init__(self, in_channels: int, outputs: dict[str, int]) -> None:
        super().__init__(in_channels, sum(outputs.values()), 1)
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """One tensor per branch: after ReLU, but for `branch_pool`, which is averaged over its neighbourhood first."""
        branches = super().forward(x).split(list(self.outputs.values()), dim=1)
        return tuple(
            F.relu(average_pool(y) if name == "branch_pool" else y)
            for name, y in zip(self.outputs, branches, strict=True)
        )


def average_pool(x: Tensor) -> Tensor:
    """3x3 as in TensorFlow: the border's average leaves the padding out, so a convolution's bias passes unchanged."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class MixedA(nn.Module):
    def __init__(self, in_channels: int, pool: int) -> None:
        super().__init__()
        self.entry = Entry(in_channels, {"branch1x1": 64, "branch5x5_1": 48, "branch3x3dbl_1": 64, "branch_pool": pool})
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, five, double, pool = self.entry(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(double))
        return torch.cat([one, self.branch5x5_2(five), double, pool], dim=1)


class MixedB(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(in_channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(in_channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedC(nn.Module):
    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.entry = Entry(
            in_channels, {"branch1x1": 192, "branch7x7_1": width, "branch7x7dbl_1": width, "branch_pool": 192}
        )
        self.branch7x7_2 = Conv(width, width, (1, 7))
        self.branch7x7_3 = Conv(width, 192, (7, 1))
        self.branch7x7dbl_2 = Conv(width, width, (7, 1))
        self.branch7x7dbl_3 = Conv(width, width, (1, 7))
        self.branch7x7dbl_4 = Conv(width, width, (7, 1))
        self.branch7x7dbl_5 = Conv(width, 192, (1, 7))

    def forward(self, x: Tensor) -> Tensor:
        one, seven, double, pool = self.entry(x)
        seven = self.branch7x7_3(self.branch7x7_2(seven))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(double))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([one, seven, double, pool], dim=1)


class MixedD(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.entry = Entry(in_channels, {"branch3x3_1": 192, "branch7x7x3_1": 192})
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three, seven = self.entry(x)
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(seven)))
        return torch.cat([self.branch3x3_2(three), seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class MixedE(nn.Module):
    """`max_pool` is the last block's: the graph of 2015 pools there by maximum, which does not move behind anything."""

    def __init__(self, in_channels: int, *, max_pool: bool) -> None:
        super().__init__()
        outputs = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        self.entry = Entry(in_channels, outputs if max_pool else outputs | {"branch_pool": 192})
        self.branch3x3_2a = Conv(384, 384, (1, 3))
        self.branch3x3_2b = Conv(384, 384, (3, 1))
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1))
        if max_pool:
            self.branch_pool = Conv(in_channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, three, double, *pool = self.entry(x)
        if not pool:
            pool = [self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]
        double = self.branch3x3dbl_2(double)
        threes = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([one, *threes, *doubles, *pool], dim=1)


class InceptionNet(nn.Module):
    """Pictures (N, 3, 299, 299) in [-1, 1] -> features (N, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, valid=True)
        self.Mixed_5b = MixedA(192, pool=32)
        self.Mixed_5c = MixedA(256, pool=64)
        self.Mixed_5d = MixedA(288, pool=64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, width=128)
        self.Mixed_6c = MixedC(768, width=160)
        self.Mixed_6d = MixedC(768, width=160)
        self.Mixed_6e = MixedC(768, width=192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, max_pool=False)
        self.Mixed_7c = MixedE(2048, max_pool=True)
        self.fc = nn.Linear(2048, 1008, bias=False)  # of the Inception Score, which leaves the bias out

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_1a_3x3(x)  # (N, 32, 149, 149)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)  # (N, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6a(x)  # (N, 768, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7a(x)  # (N, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (N, 2048, 8, 8)
        return x.mean(dim=(2, 3))


def fold_batch_norms(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The public state dict -> {layer: (weight, bias)}, the batch norms (eps 0.001) folded in, computed in float64."""
    folded = {}
    for key in state:
        if key.endswith(".conv.weight"):
            name = key.removesuffix(".conv.weight")
            weight, bias, mean, var = (
                state[f"{name}.bn.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var")
            )
            scale = weight / torch.sqrt(var + 0.001)
            folded[name] = ((state[key].double() * scale[:, None, None, None]).float(), (bias - mean * scale).float())
    return folded


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a pickle, of which nothing but tensors is unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError):
        raise CheckpointError(
            f"{path} is no file of weights, or is damaged: download {PUBLIC_NAME} again from {PUBLIC_URLS[0]}"
        ) from None


def load_inception(path: Path) -> InceptionNet:
    """The network with the weights in `path` (.pth or .safetensors, under the public names), on the CPU.

    CheckpointError where the file cannot be read, is damaged, or holds another network, torchvision's among them.
    """
    state = read_weights(path)
    if not isinstance(state, dict) or "fc.weight" not in state or "Mixed_7c.branch_pool.conv.weight" not in state:
        raise CheckpointError(f"{path} holds another network than Inception. Give {PUBLIC_NAME}: {PUBLIC_URLS[0]}")
    if len(state["fc.weight"]) == 1000:
        raise CheckpointError(
            f"{path} holds torchvision's ImageNet weights (1000 classes), with which the distance reads about 1.5 "
            f"lower and is not FID. Give the weights of 2015-12-05 (1008 classes), {PUBLIC_NAME}: {PUBLIC_URLS[0]}"
        )
    with torch.device("meta"):
        net = InceptionNet()
    try:
        folded = fold_batch_norms(state)
        ours = {}
        for name, layer in net.named_modules():
            if isinstance(layer, Entry):
                parts = [folded[name.removesuffix("entry") + branch] for branch in layer.outputs]
            elif isinstance(layer, Conv):
                parts = [folded[name]]
            else:
                continue
            weight = torch.cat([weight for weight, _ in parts])
            ours[f"{name}.weight"] = weight.contiguous(memory_format=torch.channels_last)
            ours[f"{name}.bias"] = torch.cat([bias for _, bias in parts])
        net.load_state_dict(ours | {"fc.weight": state["fc.weight"]}, assign=True)
    except KeyError as error:
        raise CheckpointError(f"{path} is not the Inception network of 2015-12-05: it lacks {error}.") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} is not the Inception network of 2015-12-05: {reason}") from None
    return net.eval().requires_grad_(False)


def resize_like_tensorflow(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 299, 299, 3) in [0, 255], bilinear as TensorFlow 1 did it (no half pixels).

    Output pixel i reads the input at i * H / 299, and behind the edge lies the edge itself: the arithmetic of
    torch-fidelity 0.4.0 in its order, so that pixels are equal bit by bit.
    """

    def neighbours(length: int) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(SIDE, device=images.device) * torch.tensor(length / SIDE, dtype=torch.float32)
        low = position.long()
        return low, (low + 1).clamp_max(length - 1), (position - low)[:, None]

    x = images.float()
    low, high, weight = neighbours(images.shape[2])
    left, right = x.index_select(2, low), x.index_select(2, high)
    x = right.sub_(left).mul_(weight).add_(left)  # (N, H, 299, 3)
    low, high, weight = neighbours(images.shape[1])
    top, bottom = x.index_select(1, low), x.index_select(1, high)
    return bottom.sub_(top).mul_(weight[:, None]).add_(top)  # (N, 299, 299, 3)


def prepare(images: Tensor, resize: Resize) -> Tensor:
    """uint8 (N, H, W, 3) -> the network's input (N, 3, 299, 299) in [-1, 1], as the named reference makes it."""
    if resize == "torch-fidelity":
        return resize_like_tensorflow(images).sub_(128).div_(128).permute(0, 3, 1, 2)
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False).mul_(2).sub_(1)


class InceptionFeatures:
    """The extractor that FID is defined with: features (N, 2048), and logits for the Inception Score.

    `resize` names the reference whose numbers to reproduce; the two differ by 0.1 to 0.5 % per feature. A file that
    bears the public name must have the public hash; other weights of the same network work, but not as FID.
    """

    width = 2048

    def __init__(self, path: Path, *, resize: Resize = "torch-fidelity", device: torch.device | str = "cpu") -> None:
        if resize not in get_args(Resize):
            raise ValueError(f"resize is {resize!r}, but must be one of {', '.join(get_args(Resize))}.")
        self.net = load_inception(path).to(device)
        self.weights_sha256 = file_sha256(path)
        public = self.weights_sha256 == PUBLIC_SHA256
        if not public and PUBLIC_SHA256[:8] in path.name:
            raise CheckpointError(
                f"{path} bears the name of the public FID weights, but not their content "
                f"(sha256 {self.weights_sha256}): download it again from {PUBLIC_URLS[0]}"
            )
        self.name = "inception" if public else f"inception {self.weights_sha256[:8]}"
        self.is_fid = public
        self.resize = resize
        self.device = torch.device(device)

    @torch.inference_mode()
    def __call__(self, images: Images) -> np.ndarray:
        """uint8 pictures -> float32 (N, 2048); see `Extractor`."""
        size = BATCH_CPU if self.device.type == "cpu" else BATCH_GPU
        parts = [part for batch in as_batches(images) for part in np.split(batch, range(size, len(batch), size))]
        inputs = torch.cat([prepare(torch.tensor(part, device=self.device), self.resize) for part in parts])
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        # TF32, which cuDNN takes by default, would move the features by 1e-3 of themselves.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return torch.cat([self.net(x) for x in inputs.split(size)]).cpu().numpy()

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Features (N, 2048) -> logits (N, 1008), without the bias: so the Inception Score was defined."""
        return features @ self.net.fc.weight.cpu().numpy().T
