"""Autoencoders in diffusers' folder format: `config.json` beside one safetensors file of weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.autoencoder_tiny import AutoencoderTiny, AutoencoderTinyConfig
from ditcli.codecs.codec import Autoencoder, AutoencoderCodec
from ditcli.codecs.vq_model import VQModel, VQModelConfig
from ditcli.config import TILE
from ditcli.errors import CheckpointError, ModelNotFoundError
from ditcli.files import write_text
from ditcli.hub import WEIGHTS_NAMES, weights_in
from ditcli.models.files import read_tensors, write_tensors

WEIGHTS = WEIGHTS_NAMES[0]

# Attention as diffusers named it before 0.15, which published Stable Diffusion VAEs still do.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def open_codec(
    folder: Path,
    *,
    name: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tile: int = TILE,
) -> AutoencoderCodec:
    """The codec of an autoencoder's folder, or of a pipeline's or a `ditcli train-vae` run's whose `vae/` holds one.

    `name` is what messages call it (default: the folder's name). `dtype` is torch.float32 or torch.bfloat16.
    Pictures with a side above `tile` pixels pass in tiles (0: never).
    Raises ModelNotFoundError where there is none, CheckpointError where it is damaged or of an unknown kind.
    """
    network = read_autoencoder(folder)
    return AutoencoderCodec(network, name=name or folder.resolve().name, device=device, dtype=dtype, tile=tile)


def read_autoencoder(folder: Path) -> Autoencoder:
    """The network in a folder, in evaluation mode on the CPU, its weights in the type of the file."""
    folder = _find(folder)
    values = _read_config(folder)
    name = weights_in(path.name for path in folder.iterdir())
    if name is None:
        raise ModelNotFoundError(
            f"{folder} has a config.json but no {WEIGHTS} beside it; it holds {_contents(folder)}."
        )
    try:
        with torch.device("meta"):  # No time is spent on weights that are replaced.
            network = build_autoencoder(values)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not understood: {error}") from error
    state = _rename_old_attention(read_tensors(folder / name))
    _check_weights(folder / name, state, network.state_dict())
    network.load_state_dict(state, assign=True)
    return network.eval()


def describe_autoencoder(network: Autoencoder) -> dict[str, Any]:
    """What config.json holds."""
    return {"_class_name": type(network).__name__} | network.config.to_dict()


def build_autoencoder(values: dict[str, Any]) -> Autoencoder:
    """A fresh network of what config.json holds; ValueError where it is not understood."""
    kind = values.get("_class_name")
    if kind == "AutoencoderKL":
        return AutoencoderKL(AutoencoderKLConfig.from_dict(values))
    if kind == "AutoencoderTiny":
        return AutoencoderTiny(AutoencoderTinyConfig.from_dict(values))
    if kind == "VQModel":
        return VQModel(VQModelConfig.from_dict(values))
    raise ValueError(f"_class_name is {kind!r}, but must be AutoencoderKL, AutoencoderTiny or VQModel.")


def save_codec(network: Autoencoder, folder: Path) -> None:
    """Write the folder so that ``open_codec`` and diffusers' ``from_pretrained`` open it.

    Each file is written beside its name and then renamed, config.json last: without it a folder is no autoencoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, network.state_dict(), {"format": "pt"})
    write_text(folder / "config.json", json.dumps(describe_autoencoder(network), indent=2) + "\n")


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise ModelNotFoundError(f"{folder} {found}; a VAE is a folder with config.json and {WEIGHTS}.")
    for candidate in (folder / "vae", folder):  # A run has a config.json of its own.
        if (candidate / "config.json").is_file():
            return candidate
    raise ModelNotFoundError(
        f"{folder} is no VAE: neither it nor a vae/ in it has a config.json; it holds {_contents(folder)}."
    )


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download or copy it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no settings, but a {type(values).__name__}.")
    return values


def _rename_old_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, weight in state.items():
        match = re.fullmatch(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)", key)
        if match:
            key = f"{match[1]}{OLD_ATTENTION[match[2]]}.{match[3]}"
        if ".attentions." in key and weight.ndim == 4:  # Once these were 1x1 convolutions.
            weight = weight[:, :, 0, 0]
        renamed[key] = weight
    return renamed


def _check_weights(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """CheckpointError naming the weights that are missing, unexpected or of another shape than config.json says."""
    faults = [f"{key} is missing" for key in expected if key not in state]
    faults += [f"{key} is unexpected" for key in state if key not in expected]
    faults += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(weight.shape)}"
        for key, weight in expected.items()
        if key in state and state[key].shape != weight.shape
    ]
    if faults:
        more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise CheckpointError(f"{path} does not fit its config.json: {'; '.join(faults[:4])}{more}.")
