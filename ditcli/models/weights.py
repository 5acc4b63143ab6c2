"""Reading checkpoints into networks."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ditcli.config import ModelConfig
from ditcli.errors import CheckpointError
from ditcli.models.dit import DiT
from ditcli.runs import read_model_config, state_file

# In a training state the optimiser's own weights stand under this prefix.
RAW = "model."


def load_dit(checkpoint: Path, *, ema: bool = True) -> tuple[DiT, ModelConfig]:
    """The network of a checkpoint, on the CPU and in evaluation mode, with its averaged weights or the raw ones.

    Raises CheckpointError where a file is missing, damaged or not what its config says.
    """
    config = read_model_config(checkpoint)
    if ema:
        weights = read_tensors(checkpoint)
    else:
        state = read_tensors(state_file(checkpoint))
        weights = {key.removeprefix(RAW): value for key, value in state.items() if key.startswith(RAW)}
    with torch.device("meta"):  # no time is spent on weights that are replaced
        model = DiT(config.dit)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit its own config: {error}") from error
    return model.eval(), config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}).") from error
