"""A torch module as a denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ditcli.diffusion.process import Diffusion


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
