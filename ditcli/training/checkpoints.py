"""Writing checkpoints: safetensors alone, each file whole or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ditcli.config import ModelConfig, VaeConfig
from ditcli.files import remove_partials, replacing
from ditcli.models.files import write_tensors
from ditcli.runs import FORMAT, VAE_FORMAT, RunDir, state_file
from ditcli.training.writer import telling


def save_checkpoint(
    run: RunDir,
    config: ModelConfig | VaeConfig,
    average: nn.Module | Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    *,
    keep: int,
) -> Path:
    """Write the training state, then the averaged weights, whose presence says that both are whole.

    `keep` newest checkpoints stay, all of them with 0. Raises SavingError where the disk is full, or something else
    forbids it: the former checkpoints are left as they are.
    """
    path = run.checkpoint_file(config.step)
    with telling(f"the checkpoint of step {config.step:,}", run.checkpoints):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(state_file(path), state, {})
            write_weights(path, average.state_dict() if isinstance(average, nn.Module) else average, config)
        finally:
            if not path.is_file():
                state_file(path).unlink(missing_ok=True)
    for step in run.saved_steps()[:-keep] if keep else []:
        old = run.checkpoint_file(step)
        old.unlink()
        state_file(old).unlink()
    return path


def write_weights(path: Path, weights: Mapping[str, Tensor], config: ModelConfig | VaeConfig) -> None:
    """A checkpoint that is enough to sample."""
    kind = FORMAT if isinstance(config, ModelConfig) else VAE_FORMAT
    write_tensors(path, weights, {"format": kind, "config": json.dumps(config.to_dict())})


def remove_leftovers(run: RunDir) -> None:
    """Clear what a killed run left half-written: partial files, and states whose weights were never written."""
    remove_partials(run.path)
    if not run.checkpoints.is_dir():
        return
    states = {state_file(run.checkpoint_file(step)) for step in run.saved_steps()}
    for file in run.checkpoints.iterdir():
        unfinished = file.name.startswith((".step-", ".tmp"))  # ours, and those that safetensors writes to first
        orphan = re.fullmatch(r"step-\d+\.state\.safetensors", file.name) and file not in states
        if file.is_file() and (unfinished or orphan):
            file.unlink()


def link_or_copy(path: Path, other: Path) -> None:
    """Give a file a second name, in place of what has it: no copy where the disk can do without."""
    with telling("the best weights", other.parent), replacing(other) as partial:
        try:
            os.link(path, partial)
        except OSError:  # a file system without links
            shutil.copyfile(path, partial)
