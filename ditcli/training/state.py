"""What training carries from step to step, and its way to a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ditcli.config import ModelConfig, TrainConfig
from ditcli.errors import CheckpointError
from ditcli.models.dit import DiT
from ditcli.models.weights import RAW, load_dit, read_tensors
from ditcli.runs import state_file
from ditcli.training.ema import average_of


@dataclass
class TrainState:
    """After `step` optimiser steps; `losses` are those since the last row of metrics."""

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the average, for a file."""
        tensors = {RAW + name: value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        return tensors | {"seconds": torch.tensor(self.seconds, dtype=torch.float64), "losses": losses}


def new_state(config: TrainConfig, model: ModelConfig, device: torch.device) -> TrainState:
    """A fresh network, drawn from the run's seed on the CPU, so that it does not depend on the device."""
    torch.manual_seed(config.seed)
    network = DiT(model.dit).to(device)
    return TrainState(network, average_of(network), _optimizer(network, config))


def load_state(checkpoint: Path, config: TrainConfig, device: torch.device) -> TrainState:
    """The state saved with a checkpoint, to the bit. Raises CheckpointError where it is damaged."""
    average, model = load_dit(checkpoint)
    network, _ = load_dit(checkpoint, ema=False)
    network = network.to(device).train()
    state = TrainState(network, average.to(device).requires_grad_(False), _optimizer(network, config), step=model.step)
    saved = read_tensors(state_file(checkpoint))
    try:
        for name, parameter in network.named_parameters():
            prefix = f"optimizer.{name}."
            moments = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
            state.optimizer.state[parameter] = {
                key: value.to(device if value.ndim or device.type == "cuda" else "cpu")
                for key, value in moments.items()
            }
        state.seconds, state.losses = saved["seconds"].item(), list(saved["losses"].to(device))
    except KeyError as error:
        raise CheckpointError(f"{state_file(checkpoint)} lacks {error}: it is not a training state.") from error
    return state


def _optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        network.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
