"""Reading models into networks: our own checkpoints, and those of others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ditcli import hub
from ditcli.config import ModelConfig
from ditcli.errors import CheckpointError
from ditcli.models.conv import make_network
from ditcli.models.dit import DiT
from ditcli.models.files import read_tensors
from ditcli.models.from_diffusers import read_diffusers
from ditcli.models.from_original import UNDERSTOOD, misfits, read_original
from ditcli.models.lora import merge
from ditcli.runs import is_checkpoint, read_model_config, state_file

# In a training state the optimiser's own weights stand under this prefix.
RAW = "model."


def load_dit(path: Path, *, ema: bool = True, adapter: Path | None = None) -> tuple[DiT, ModelConfig]:
    """The network in a checkpoint, in a file of others or in diffusers' folder, on the CPU and in evaluation mode.

    It has its averaged weights, or the raw ones where both are kept. A low-rank adapter is merged into the model it was
    trained on; with `adapter` into the model at `path`. Raises CheckpointError where a file is missing, damaged, not
    what its config says or of a kind that is not read, with the keys that did not fit.
    """
    if adapter is not None:
        _, base = load_dit(path, ema=True)
        if base.lora_rank:
            raise CheckpointError(f"{path} is an adapter itself: give --model the model under it.")
        return _build(*_adapted(adapter, path, ema=ema), source=adapter)
    if is_checkpoint(path) and read_model_config(path).lora_rank:
        return _build(*_adapted(path, None, ema=ema), source=path)
    return _build(*read_model(path, ema=ema), source=path)


def read_model(path: Path, *, ema: bool = True) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What a model says of itself, and the weights in its files: of an adapter, those that were trained."""
    if path.is_dir():
        return read_diffusers(path, ema=ema)
    if not is_checkpoint(path):
        return read_original(path, ema=ema)
    config = read_model_config(path)
    if ema:
        return config, read_tensors(path)
    if not state_file(path).is_file():
        raise CheckpointError(
            f"{path} holds the averaged weights, and no training state lies beside it: leave --no-ema out."
        )
    state = read_tensors(state_file(path))
    return config, {key.removeprefix(RAW): value for key, value in state.items() if key.startswith(RAW)}


def _adapted(adapter: Path, base: Path | None, *, ema: bool) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The adapter's config, and its weights merged into those of the model under it."""
    if not is_checkpoint(adapter) or not read_model_config(adapter).lora_rank:
        raise CheckpointError(f"{adapter} is no low-rank adapter: `ditcli train --from MODEL --lora-rank N` makes one.")
    config, trained = read_model(adapter, ema=ema)
    network, _ = load_dit(base or hub.find_checkpoint(config.base))
    try:
        return config, merge(network.state_dict(), trained)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{adapter} does not fit {base or config.base}: {error}.") from error


def _build(config: ModelConfig, weights: dict[str, Tensor], *, source: Path) -> tuple[DiT, ModelConfig]:
    with torch.device("meta"):  # no time is spent on weights that are replaced
        model = make_network(config.dit)
    expected = model.state_dict()
    misfit = misfits(
        missing=[key for key in expected if key not in weights],
        unexpected=[key for key in weights if key not in expected],
        reshaped=[
            f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
            for key, value in expected.items()
            if key in weights and weights[key].shape != value.shape
        ],
    )
    if misfit:
        raise CheckpointError(f"{source} is not understood: {misfit}. {UNDERSTOOD}")
    model.load_state_dict(weights, assign=True)
    return model.float().eval(), config
