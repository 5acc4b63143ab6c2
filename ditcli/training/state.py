"""What training carries from step to step, and its way to a checkpoint and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ditcli.config import ModelConfig, TrainConfig, TrainVaeConfig
from ditcli.errors import CheckpointError
from ditcli.models.conv import make_network
from ditcli.models.files import read_tensors
from ditcli.models.weights import RAW
from ditcli.processes import ALONE, Processes
from ditcli.runs import read_model_config, state_file
from ditcli.training.ema import average_of
from ditcli.training.finetune import Source, carry_over, choose_trainable, unfrozen
from ditcli.training.metrics import NOISE_LEVELS
from ditcli.training.muon import MuonAndAdamW
from ditcli.training.power_ema import PowerAverages
from ditcli.training.sharding import laid_out_as, load_weights, shard, whole


@dataclass
class TrainState:
    """After `step` optimiser steps; `losses` are those since the last row of metrics, `order` that of the data.

    `kept` are the names of the weights that a checkpoint holds: all of them, but with adapters only what is trained.
    Where the weights are sharded over `processes`, `skeleton` is the network on the meta device; what is then called in
    one process is called in all.
    """

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    kept: Set[str]
    step: int = 0
    order: int = 0
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)
    powers: PowerAverages | None = None
    processes: Processes = ALONE
    skeleton: nn.Module | None = None

    def weights(self) -> dict[str, Tensor]:
        """The averaged ones, for a checkpoint."""
        weights = {name: value for name, value in self.average.state_dict().items() if name in self.kept}
        return whole(weights, self.processes)

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the average, for a file."""
        tensors = {RAW + name: value for name, value in self.model.state_dict().items() if name in self.kept}
        tensors |= optimizer_tensors(self.model, self.optimizer)
        tensors |= self.powers.values if self.powers else {}
        tensors = whole(tensors, self.processes)
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        return tensors | {"seconds": seconds, "losses": losses, "order": torch.tensor(self.order)}

    @torch.no_grad()
    def drawing_network(self) -> nn.Module:
        """The averaged weights, to draw from in each process by itself."""
        if self.skeleton is None:
            return self.average
        network = copy.deepcopy(self.skeleton).to_empty(device=next(self.model.parameters()).device)
        for name, parameter in self.average.named_parameters():
            assert isinstance(parameter, DTensor)
            network.get_parameter(name).copy_(parameter.full_tensor())
        return network


def new_state(
    config: TrainConfig,
    model: ModelConfig,
    device: torch.device,
    source: Source | None = None,
    processes: Processes = ALONE,
    dtype: torch.dtype = torch.float32,
) -> TrainState:
    """A fresh network, drawn from the run's seed on the CPU, so that it does not depend on the device.

    With a source it has that one's weights, as far as they fit. Where the config asks for it it is sharded over the
    processes, for computing in `dtype`.
    """
    torch.manual_seed(config.seed)
    network = make_network(model.dit)
    network.checkpoint_activations = config.checkpoint_activations
    fresh = carry_over(source, network, model.class_names) if source else set()
    kept = choose_trainable(network, config, fresh)
    if config.shard and processes.num > 1:
        average = average_of(network)
        skeleton = copy.deepcopy(average).to("meta")
        for copied in (network, average):
            shard(copied, device, processes, dtype)
    else:
        network = network.to(device)
        average, skeleton = average_of(network), None
    optimizer = make_optimizer(network, config)
    powers = PowerAverages(network) if config.ema_snapshot_every else None
    return TrainState(network, average, optimizer, kept, powers=powers, processes=processes, skeleton=skeleton)


def load_state(
    checkpoint: Path,
    config: TrainConfig,
    model: ModelConfig,
    device: torch.device,
    source: Source | None = None,
    processes: Processes = ALONE,
    dtype: torch.dtype = torch.float32,
) -> TrainState:
    """The state saved with a checkpoint, to the bit. Raises CheckpointError where it is damaged."""
    state = new_state(config, model, device, source, processes, dtype)
    restore(state, checkpoint)
    return state


def restore(state: TrainState, checkpoint: Path) -> None:
    """Make a state that of a checkpoint. Raises CheckpointError where it is damaged, or of other weights."""
    saved = read_tensors(state_file(checkpoint))
    raw = {key.removeprefix(RAW): value for key, value in saved.items() if key.startswith(RAW)}
    for network, weights in ((state.average, read_tensors(checkpoint)), (state.model, raw)):
        if weights.keys() != state.kept:
            raise CheckpointError(f"{checkpoint} and its training state do not hold the weights of this run.")
        load_weights(network, weights)
    state.step = read_model_config(checkpoint).step
    try:
        load_optimizer(state.model, state.optimizer, saved)
        if state.powers:
            state.powers.load(saved)
        losses = saved["losses"].to(next(state.model.parameters()).device)
        if losses.ndim == 1:  # of version 0.1, which did not tell noise levels apart
            losses = nn.functional.pad(losses[:, None], (0, 2 * NOISE_LEVELS))
        state.losses = list(losses)
        state.seconds, state.order = saved["seconds"].item(), int(saved.get("order", torch.tensor(0)))
    except KeyError as error:
        raise CheckpointError(f"{state_file(checkpoint)} lacks {error}: it is not a training state.") from error


def optimizer_tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, prefix: str = "optimizer."
) -> dict[str, Tensor]:
    """The optimiser's moments under the names of the network's weights."""
    return {
        f"{prefix}{name}.{key}": value
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
        for key, value in optimizer.state[parameter].items()
    }


def load_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor], prefix: str = "optimizer."
) -> None:
    """Give the optimiser the moments that `optimizer_tensors` gave."""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        start = f"{prefix}{name}."
        moments = {key.removeprefix(start): value for key, value in saved.items() if key.startswith(start)}
        # In the parameter's own memory layout: the fused optimiser walks through both side by side.
        optimizer.state[parameter] = {
            key: laid_out_as(parameter, value) if value.ndim else value.to(_place_of_steps(parameter))
            for key, value in moments.items()
        }


def _place_of_steps(parameter: Tensor) -> torch.device:
    """Where the fused optimiser wants its count of steps."""
    return parameter.device if parameter.device.type == "cuda" else torch.device("cpu")


def make_optimizer(network: nn.Module, config: TrainConfig | TrainVaeConfig) -> torch.optim.Optimizer:
    """The optimiser over what is not frozen."""
    lr, betas, decay = float(config.lr), (config.beta1, config.beta2), config.weight_decay
    if isinstance(config, TrainConfig) and config.optimizer == "muon":
        return MuonAndAdamW(network, lr=lr, betas=betas, weight_decay=decay)
    return torch.optim.AdamW(unfrozen(network), lr=lr, betas=betas, weight_decay=decay, fused=True)
