"""A torch module as a denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ditcli.config import ModelConfig
from ditcli.diffusion.process import Diffusion
from ditcli.models.weights import load_dit
from ditcli.progress import say


@dataclass(frozen=True)
class TorchDenoiser:
    """`module(x_t, network_time, labels)` on the device of its weights; fp32 states, the network runs in `dtype`."""

    module: nn.Module
    diffusion: Diffusion
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: float, labels: Tensor) -> Tensor:
        network_time = float(self.diffusion.network_time(t))
        time = torch.full((len(x_t),), network_time, device=x_t.device)
        with torch.autocast(x_t.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.module(x_t, time, labels).float()

    def from_numpy(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def to_numpy(self, array: Tensor) -> np.ndarray:
        return array.cpu().numpy()


def open_denoiser(
    checkpoint: Path,
    *,
    ema: bool = True,
    adapter: Path | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[TorchDenoiser, ModelConfig]:
    """The denoiser of a checkpoint, and what the checkpoint says of itself."""
    model, config = load_dit(checkpoint, ema=ema, adapter=adapter)
    if dtype == torch.bfloat16:
        cast_products(model)
    return as_denoiser(model.to(device), config, dtype=dtype), config


def compile_blocks(denoiser: TorchDenoiser) -> None:
    """torch.compile for the blocks, which are alike; where it does not work that is told, and they stay as they are."""
    blocks = list(denoiser.module.get_submodule("blocks").children())
    for block in blocks:
        block.compile()
    say("Compiling the blocks.")
    states = np.zeros((2, *denoiser.input_shape), np.float32)
    try:
        denoiser(denoiser.from_numpy(states), 0.5, denoiser.from_numpy(np.zeros(2, np.int64)))
    except Exception as error:  # a compiler that is missing, and all that may go wrong with one
        for block in blocks:
            block._compiled_call_impl = None
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        say(f"torch.compile does not work here ({reason}): drawing without it.")


def cast_products(module: nn.Module) -> None:
    """Cast to bf16, once and in place, the weights that autocast would cast at every call: the result is the same."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(torch.bfloat16)


def as_denoiser(module: nn.Module, config: ModelConfig, *, dtype: torch.dtype) -> TorchDenoiser:
    """A network as the denoiser that its config describes."""
    shape = (config.dit.in_channels, *config.dit.input_size)
    return TorchDenoiser(module, Diffusion(config.diffusion), shape, config.class_names, dtype)
