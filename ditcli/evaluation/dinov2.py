"""DINOv2 (Oquab et al., arXiv 2304.07193) as an extractor, after dgm-eval (Stein et al., arXiv 2306.04675).

A picture's feature is the class token behind the last norm. The weights are a folder as Hugging Face's transformers
writes it. Position embeddings are interpolated to the size of the grid, as transformers does. The original code, which
dgm-eval runs, interpolates by a factor (16.1 / 37 at 224 pixels) and so samples them up to 0.2 of a cell elsewhere:
compare scores of this extractor with each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditcli.errors import CheckpointError
from ditcli.evaluation.features import Images, as_batches, file_sha256, resize_batch
from ditcli.hub import SHARED_MODEL as WEIGHTS
from ditcli.models.files import read_tensors
from ditcli.models.from_original import misfits

SIDE = 224  # of the network's input
BATCH = 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SIZES = {(384, 12): "small", (768, 12): "base", (1024, 24): "large"}  # by width and depth

# How our names begin or go on -> the published ones.
PUBLISHED = (
    ("blocks.", "encoder.layer."),
    ("class_token", "embeddings.cls_token"),
    ("positions", "embeddings.position_embeddings"),
    ("patches.", "embeddings.patch_embeddings.projection."),
    ("query.", "attention.attention.query."),
    ("key.", "attention.attention.key."),
    ("value.", "attention.attention.value."),
    ("joined.", "attention.output.dense."),
    ("scale1", "layer_scale1.lambda1"),
    ("scale2", "layer_scale2.lambda1"),
    ("fc", "mlp.fc"),
)
UNUSED = "embeddings.mask_token"  # of the pretraining


class Block(nn.Module):
    """Attention, then an MLP, each behind a norm and scaled per channel (LayerScale, arXiv 2103.17239)."""

    def __init__(self, width: int, num_heads: int, hidden: int, *, bias: bool, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps)
        self.query, self.key, self.value = (nn.Linear(width, width, bias) for _ in range(3))
        self.joined = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.empty(width))
        self.norm2 = nn.LayerNorm(width, eps)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale2 = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.joined(y)
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Dinov2(nn.Module):
    """Pictures (N, 3, H, W), ImageNet's mean and deviation taken off -> features (N, width)."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        patch_size: int,
        image_size: int,
        bias: bool,
        eps: float,
    ) -> None:
        super().__init__()
        self.grid = image_size // patch_size  # of the pretraining: one position embedding for each of its patches
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid**2, width))
        hidden = int(width * mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden, bias=bias, eps=eps) for _ in range(depth))
        self.layernorm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)  # (N, D, h, w)
        height, width = x.shape[2:]
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x.flatten(2).mT], dim=1)  # (N, 1 + h w, D)
        x = x + self._positions(height, width)
        for block in self.blocks:
            x = block(x)
        return self.layernorm(x[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        """(1, 1 + h w, D): the class token's own, and the patches' interpolated to the grid's size."""
        if (height, width) == (self.grid, self.grid):
            return self.positions
        grid = self.positions[:, 1:].mT.unflatten(2, (self.grid, self.grid))
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], grid.flatten(2).mT], dim=1)


def load_dinov2(folder: Path) -> Dinov2:
    """The network of a folder with config.json and model.safetensors, in float32 on the CPU.

    CheckpointError where a file is damaged, or holds another network or size than config.json says.
    """
    with torch.device("meta"):
        net = Dinov2(**_read_config(folder / "config.json"))
    state = read_tensors(folder / WEIGHTS)
    expected = {_published(key): value.shape for key, value in net.state_dict().items()}
    misfit = misfits(
        missing=[key for key in expected if key not in state],
        unexpected=[key for key in state if key not in expected and key != UNUSED],
        reshaped=[
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        ],
    )
    if misfit:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit its config.json: {misfit}.")
    net.load_state_dict({key: state[_published(key)].float() for key in net.state_dict()}, assign=True)
    return net.eval().requires_grad_(False)


def _published(key: str) -> str:
    for ours, theirs in PUBLISHED:
        key = key.replace(ours, theirs)
    return key


def _read_config(path: Path) -> dict[str, Any]:
    """What `Dinov2` is made with."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download or copy it again.") from error
    if not isinstance(values, dict) or values.get("model_type") != "dinov2":
        kind = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise CheckpointError(
            f"{path} describes no DINOv2 (its model_type is {kind!r}): give the folder of facebook/dinov2-small, "
            "-base or -large."
        )
    if values.get("use_swiglu_ffn"):
        raise CheckpointError(
            f"{path} describes DINOv2 with SwiGLU (the giant), which is not supported: give the folder of "
            "facebook/dinov2-small, -base or -large."
        )
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    for name in names:
        if type(values.get(name)) is not int or not 1 <= values[name] <= 1 << 16:
            raise CheckpointError(f"{path}: {name} is {values.get(name)!r}, but must be a positive whole number.")
    width, depth, num_heads, patch_size, image_size = (values[name] for name in names)
    ratio, eps = values.get("mlp_ratio", 4), values.get("layer_norm_eps", 1e-6)
    for name, value in ("mlp_ratio", ratio), ("layer_norm_eps", eps):
        if type(value) not in (int, float) or not 0 < value < 1 << 16:
            raise CheckpointError(f"{path}: {name} is {value!r}, but must be a positive number.")
    for name, fits, must in (
        ("num_attention_heads", width % num_heads == 0, f"a divisor of hidden_size, {width}"),
        ("patch_size", patch_size <= min(SIDE, image_size), f"at most {min(SIDE, image_size)}"),
        ("hidden_act", values.get("hidden_act", "gelu") == "gelu", "gelu"),
        ("num_channels", values.get("num_channels", 3) == 3, "3"),
    ):
        if not fits:
            raise CheckpointError(f"{path}: {name} is {values[name]!r}, but must be {must}.")
    bias = bool(values.get("qkv_bias", True))
    shape = {"width": width, "depth": depth, "num_heads": num_heads, "mlp_ratio": ratio}
    return shape | {"patch_size": patch_size, "image_size": image_size, "bias": bias, "eps": eps}


class Dinov2Features:
    """The extractor: features (N, width), 1024 wide for dinov2-large.

    Pictures are prepared as in dgm-eval: resized to 224x224 with Pillow's bicubic filter, which is antialiased, without
    a crop; then ImageNet's mean and deviation.
    """

    is_fid = False
    resize = f"pillow-bicubic to {SIDE}x{SIDE}"

    def __init__(self, folder: Path, *, device: torch.device | str = "cpu") -> None:
        self.net = load_dinov2(folder).to(device)
        self.device = torch.device(device)
        self.weights_sha256 = file_sha256(folder / WEIGHTS)
        self.width: int = self.net.layernorm.normalized_shape[0]
        size = SIZES.get((self.width, len(self.net.blocks)), f"{self.width}x{len(self.net.blocks)}")
        self.name = f"dinov2-{size} {self.weights_sha256[:8]}"

    @torch.inference_mode()
    def __call__(self, images: Images) -> np.ndarray:
        """uint8 pictures -> float32 (N, width); see `Extractor`."""
        pixels = np.concatenate([resize_batch(batch, (SIDE, SIDE)) for batch in as_batches(images)])
        # TF32, which cuDNN takes by default, would move the features by 1e-3 of themselves.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            parts = (pixels[i : i + BATCH] for i in range(0, len(pixels), BATCH))
            return np.concatenate([self.net(self._prepare(part)).cpu().numpy() for part in parts])

    def _prepare(self, pixels: np.ndarray) -> Tensor:
        """uint8 (N, H, W, 3) -> (N, 3, H, W)."""
        x = torch.tensor(pixels, device=self.device).float() / 255
        return ((x - x.new_tensor(MEAN)) / x.new_tensor(STD)).permute(0, 3, 1, 2)
