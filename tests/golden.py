"""Reading the reference numbers of ../shared/golden."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ditcli.config import DiffusionConfig, DiTConfig
from ditcli.models.dit import DiT


def load_golden(shared: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A fixture's tensors and its description."""
    folder = shared / "golden"
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())


def reference_dit(tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> DiT:
    """Our network with the reference's weights."""
    config = description["config"]
    channels = config["in_channels"]
    model = DiT(
        DiTConfig(
            input_size=(config["input_size"],) * 2,
            in_channels=channels,
            out_channels=2 * channels if config["learn_sigma"] else channels,
            patch_size=config["patch_size"],
            width=config["hidden_size"],
            depth=config["depth"],
            num_heads=config["num_heads"],
            mlp_ratio=config["mlp_ratio"],
            num_classes=config["num_classes"],
        )
    )
    model.load_state_dict({key[2:]: value for key, value in tensors.items() if key.startswith("w.")})
    return model.eval()


def reference_diffusion(description: dict[str, Any]) -> DiffusionConfig:
    return DiffusionConfig(learn_sigma=description["config"]["learn_sigma"])


def inception_state() -> dict[str, torch.Tensor]:
    """Weights for the FID Inception network, made from seeds by the rule in the golden file."""
    recipe = json.loads((Path(__file__).parent / "golden" / "fid_inception.json").read_text())
    tensors = {}
    for i, (key, shape) in enumerate(sorted(recipe["keys"].items())):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(recipe["base_seed"] + i))
        if key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(0)
        elif key.endswith(("conv.weight", "fc.weight")):
            tensors[key] = noise * math.sqrt(2 / math.prod(shape[1:]))
        elif key.endswith("running_var"):
            tensors[key] = 1 + 0.1 * noise.abs()
        else:
            tensors[key] = float(key.endswith("bn.weight")) + 0.1 * noise
    return tensors
