"""What the training of an autoencoder carries from step to step, and its way to a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ditcli.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from ditcli.codecs.vq_model import VQModel, VQModelConfig
from ditcli.config import TrainVaeConfig
from ditcli.errors import CheckpointError
from ditcli.models.weights import RAW, read_tensors
from ditcli.runs import read_vae_config, state_file
from ditcli.training.ema import average_of
from ditcli.training.state import load_optimizer, make_optimizer, optimizer_tensors
from ditcli.training.vae.discriminator import Discriminator
from ditcli.training.vae.objective import Network

JUDGE, JUDGE_OPTIMIZER = "discriminator.", "discriminator_optimizer."


@dataclass
class VaeState:
    """After `step` optimiser steps; `losses` are those since the last row of metrics, `order` that of the data."""

    model: Network
    average: nn.Module
    optimizer: torch.optim.Optimizer
    discriminator: Discriminator
    discriminator_optimizer: torch.optim.Optimizer
    step: int = 0
    order: int = 0
    seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """All of it but the average, for a file."""
        tensors = {RAW + name: value for name, value in self.model.state_dict().items()}
        tensors |= {JUDGE + name: value for name, value in self.discriminator.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizer)
        tensors |= optimizer_tensors(self.discriminator, self.discriminator_optimizer, JUDGE_OPTIMIZER)
        losses = torch.stack(self.losses).cpu() if self.losses else torch.zeros(0)
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        return tensors | {"seconds": seconds, "losses": losses, "order": torch.tensor(self.order)}


def make_network(config: TrainVaeConfig) -> Network:
    """A fresh autoencoder; the scale of its latents is measured when it is trained."""
    shape = {
        "latent_channels": config.latent_channels,
        "block_out_channels": config.widths,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.attention,
        "sample_size": config.image_size,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }
    if config.kind == "vq":
        return VQModel(VQModelConfig.from_dict(shape | {"num_vq_embeddings": config.num_codes}))
    return AutoencoderKL(AutoencoderKLConfig.from_dict(shape))


def new_state(config: TrainVaeConfig, device: torch.device) -> VaeState:
    """Fresh networks, drawn from the run's seed on the CPU, so that they do not depend on the device."""
    torch.manual_seed(config.seed)
    network = make_network(config)
    return _state(network, average_of(network), Discriminator(config.gan_width, config.gan_layers), config, device)


@torch.no_grad()
def start_codebook(state: VaeState, images: Tensor, seed: int) -> None:
    """Draw a fresh codebook's vectors from the latents of images (N, 3, H, W) in [-1, 1].

    A random codebook lies far from all latents, which then share the few vectors that happen to be nearest.
    """
    assert isinstance(state.model, VQModel)
    latents = state.model.encode(images).movedim(1, -1).flatten(0, -2)  # (N h w, C)
    vectors = state.model.quantize.embedding.weight
    rng = np.random.default_rng((seed, 3))
    rows = rng.choice(len(latents), len(vectors), replace=len(latents) < len(vectors))
    vectors.copy_(latents[torch.from_numpy(rows).to(latents.device)])
    state.average.load_state_dict(state.model.state_dict())


def load_state(checkpoint: Path, config: TrainVaeConfig, device: torch.device) -> VaeState:
    """The state saved with a checkpoint, to the bit. Raises CheckpointError where it is damaged."""
    state = new_state(config, device)
    restore(state, checkpoint)
    return state


def restore(state: VaeState, checkpoint: Path) -> None:
    """Make a state that of a checkpoint. Raises CheckpointError where it is damaged, or of other networks."""
    saved = read_tensors(state_file(checkpoint))
    try:
        state.model.load_state_dict(_part(saved, RAW))
        state.average.load_state_dict(read_tensors(checkpoint))
        state.discriminator.load_state_dict(_part(saved, JUDGE))
        load_optimizer(state.model, state.optimizer, saved)
        load_optimizer(state.discriminator, state.discriminator_optimizer, saved, JUDGE_OPTIMIZER)
        state.losses = list(saved["losses"].to(next(state.model.parameters()).device))
        state.seconds, state.order = saved["seconds"].item(), int(saved.get("order", torch.tensor(0)))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{state_file(checkpoint)} is not the training state of this run ({error}).") from error
    state.step = read_vae_config(checkpoint).step


def _state(
    network: Network, average: nn.Module, discriminator: Discriminator, config: TrainVaeConfig, device: torch.device
) -> VaeState:
    for module in (network, average, discriminator):
        module.to(device)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    optimizer, other = make_optimizer(network, config), make_optimizer(discriminator, config)
    return VaeState(network, average, optimizer, discriminator, other)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
